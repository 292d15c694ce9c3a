"""Jobs for tests of engines whose commands are stand-ins for trainings, and readers of the files that they write."""

import contextlib
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

STAND_IN = Path(__file__).with_name("stand_in.py")


@dataclass(frozen=True)
class Job:
    name: str
    needs: tuple[str, ...] = ()


def real_command(fleet):
    """Return the command that a user would run for a job."""
    return lambda job: [sys.executable, "-m", "lightning_tdisent", "fleet", "run", str(fleet.root), "--only", job.name]


def saved_step(fleet, name):
    """Return the step of the newest checkpoint, 0 if there is none."""
    pointer = fleet.root / name / "checkpoints" / "newest.json"
    return json.loads(pointer.read_text(encoding="utf-8"))["step"] if pointer.exists() else 0


REAL = {  # of 80 steps each, after a shared model
    "experts": 2,
    "start": {"shared": {"configs": ["shared.yaml"], "images": 16}},
    "budget": 16 + 2 * 8 * 80,
    "set": {"checkpoint.every": 10, "trainer.val_check_interval": 80},
}


class Trainings:
    """Stand-ins for trainings in a folder, and the files that they have written."""

    def __init__(self, folder, steps=12, seconds=0.03, **fates):
        self.folder, self.steps, self.seconds, self.fates, self.said = folder, steps, seconds, fates, []

    def command(self, job):
        words = [sys.executable, STAND_IN, self.folder / job.name, self.steps, self.seconds]
        return [str(word) for word in words + self.fates.get(job.name, [])]

    def lines(self, name, file):
        path = self.folder / name / file
        return (
            [tuple(map(int, line.split())) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )

    def done_steps(self, name):
        """Return (process, first step, last step) of each start; fail for missing steps or simultaneous processes."""
        by = defaultdict(list)
        for step, process in self.lines(name, "steps"):
            by[process].append(step)
        starts = [(process, steps[0], steps[-1]) for process, steps in by.items()]
        order = [process for _, process in self.lines(name, "steps")]
        changes = sum(a != b for a, b in pairwise(order))
        assert changes == len(starts) - 1, "two processes ran at the same time"
        for (_, _, last), (_, first, _) in pairwise(starts):
            assert first == last + 1 or first == last - last % 5 + 1, (
                "resumed neither after a saved step nor from the checkpoint"
            )
        for steps in by.values():
            assert steps == list(range(steps[0], steps[-1] + 1))
        return starts


def until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.02)


def alive(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    return False


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
