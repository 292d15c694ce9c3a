"""Fleets whose workers are killed: every expert must end as without faults."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
import yaml
from processes import CONFIG, FULL, ROOT, TINY, alive, until
from safetensors.torch import load_file

from lightning_tdisent.fleet.lease import current, gone
from lightning_tdisent.fleet.store import Store

EXPERTS, STEPS = 4, 600 if FULL else 80  # enough for 20 kills


@pytest.fixture
def fleet(start, tmp_path):
    """Return a function that plans a fleet of small experts, 4 by default, and returns its folder."""

    def make(name, place=tmp_path, experts=EXPERTS, steps=STEPS, **options):
        words = dict(word.removeprefix("--").split("=", 1) for word in TINY)
        settings = {key: yaml.safe_load(value) for key, value in words.items() if key != "data.batch_size"}
        settings |= {"model.states.S": experts, "checkpoint.every": 10 if FULL else 3, "trainer.val_check_interval": 10}
        content = {"configs": [str(ROOT / CONFIG)], "set": settings, "batch": 32, "budget": experts * steps * 32}
        file = tmp_path / "fleet.yaml"
        file.write_text(json.dumps(content), encoding="utf-8")
        planned = start("fleet", "plan", "--config", file, "--out", place / name, **options)
        assert planned.wait() == 0, planned.text
        return place / name

    return make


def processes_of(folder, experts=EXPERTS):
    """Return the processes that currently hold leases."""
    names = [f"expert_{k:03d}" for k in range(1, experts + 1)]
    held = [current(Store(folder), name)[1] for name in names]
    return [content["pid"] for content in held if content and not gone(content)]


def weights(folder, experts=EXPERTS):
    return {k: load_file(folder / f"expert_{k:03d}" / "model.safetensors") for k in range(1, experts + 1)}


def test_a_fleet_killed_at_random_ends_as_the_unbroken_one(fleet, start, size, figures):
    trials, chance = size(20, 2), random.Random(5)  # noqa: S311
    whole, broken = fleet("whole"), fleet("broken")
    assert start("fleet", "run", whole, "--workers", 2).wait(300) == 0
    killed = {"launcher": 0, "worker": 0, "all": 0}
    running = start("fleet", "run", broken, "--workers", 2)
    while (trial := sum(killed.values())) < trials:
        until(lambda pid=running.pid: processes_of(broken) or not alive(pid))
        time.sleep(chance.uniform(0, size(6, 3)))
        holders = processes_of(broken)
        if not alive(running.pid):
            break
        if not holders:  # no training runs at the moment
            continue
        what = ("worker", "all", "launcher")[trial % 3]
        killed[what] += 1
        if what == "worker":  # the launcher replaces it
            os.kill(chance.choice(holders), signal.SIGKILL)
            continue
        if what == "all":
            os.killpg(running.pid, signal.SIGKILL)
        running.end(signal.SIGKILL)  # its workers save and exit
        running = start("fleet", "run", broken, "--workers", 2)
    given_up = 0
    while running.wait(600) and "died 5 times in a row without saving anything" in running.text and given_up < 3:
        given_up += 1  # on a slow machine kills come faster than checkpoints; start again
        running = start("fleet", "run", broken, "--workers", 2)
    assert running.wait(600) == 0, running.text
    assert sum(killed.values()) == trials
    a, b = weights(whole), weights(broken)
    assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])
    figures("killed_fleet", **killed, given_up=given_up, experts=EXPERTS, different=0)


def test_two_launchers_share_one_fleet_without_training_anything_twice(fleet, start):
    folder = fleet("shared")
    both = [start("fleet", "run", folder, "--workers", 1) for _ in range(2)]
    assert [one.wait(300) for one in both] == [0, 0], "".join(one.text for one in both)
    for k in range(1, EXPERTS + 1):
        log = (folder / f"expert_{k:03d}" / "log.txt").read_text(encoding="utf-8")
        assert "going on" not in log
        assert current(Store(folder), f"expert_{k:03d}")[0] == 1


def test_a_real_full_disk_is_named_with_its_expert_and_loses_nothing(fleet, start, small_disk, tmp_path):
    if disk := small_disk(12_000_000):
        place, holder, seen = disk
        folder, whole = fleet("broken", place, enter=holder), fleet("whole")
        run = ("fleet", "run", folder, "--workers", 2, "--ttl", 4)
        running = start(*run, enter=holder)
        until(lambda: list((seen / "broken").glob("expert_*/checkpoints/newest.json")), running)
        with contextlib.suppress(OSError), (seen / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert running.wait(120) in (1, 2, 75), running.text
        assert "Traceback" not in running.stderr, running.stderr
        named = set(re.findall(r"(expert_\d+): .*No space left on device", running.stderr))
        assert named, running.stderr
        (seen / "filler").unlink()
        again = start(*run, enter=holder)
        assert again.wait(300) == 0, again.text
        assert start("fleet", "run", whole, "--workers", 2).wait(300) == 0
        shutil.copytree(seen / "broken", tmp_path / "copy")
        a, b = weights(whole), weights(tmp_path / "copy")
        assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])


KINDS = ("kill a worker", "kill all", "stop a worker", "fill the disk", "move the fleet", "jump the clock",
         "launch twice", "read beside")  # fmt: skip


class Soak:
    """A fleet of 8 under one fault after the other, each applied to the processes that are training it."""

    def __init__(self, start, disk, name, chance):
        self.start, self.chance, self.moves = start, chance, 0
        self.place, self.holder, self.seen = disk
        self.name, self.launchers, self.readers = name, [], []
        self.launch()

    @property
    def folder(self):
        return self.place / self.name

    @property
    def here(self):
        """Return the fleet's folder as this process sees it."""
        return self.seen / self.name

    def launch(self, *words):
        words = ("fleet", "run", self.folder, "--workers", 2, "--ttl", 4, *words)
        self.launchers.append(self.start(*words, enter=self.holder))

    def running(self):
        """Launch again if no launcher runs; those that ended must have given a code and a line that say why."""
        for process in [p for p in self.launchers if not alive(p.pid)]:
            assert process.wait(5) in (0, 1, 2, 75, 143, -9), process.text
            assert "Traceback" not in process.stderr, process.stderr
            self.launchers.remove(process)
        if not self.launchers:
            self.launch()
        return self.launchers[0]

    def holders(self):
        process = self.running()
        until(lambda: processes_of(self.here, 8) or not alive(process.pid))
        return processes_of(self.here, 8)

    def do(self, kind):
        holders = self.holders()
        if not holders:
            return False
        one = self.chance.choice(holders)
        with contextlib.suppress(ProcessLookupError):
            if kind == "kill a worker":
                os.kill(one, signal.SIGKILL)
            elif kind == "kill all":
                for process in self.launchers:
                    os.killpg(process.pid, signal.SIGKILL)
            elif kind == "stop a worker":
                os.kill(one, signal.SIGSTOP)
                time.sleep(6)
                os.kill(one, signal.SIGCONT)
        if kind == "fill the disk":
            with contextlib.suppress(OSError), (self.seen / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            time.sleep(self.chance.uniform(0.5, 3))
            (self.seen / "filler").unlink()
        elif kind == "move the fleet":
            self.moves += 1
            self.here.rename(self.seen / f"moved_{self.moves}")
            self.name = f"moved_{self.moves}"
            for process in self.launchers:  # each ends by itself, since its folder has moved
                assert process.wait(90) in (1, 2, 75), process.text
            assert not list((self.seen / f"moved_{self.moves - 1}").rglob("*"))
        elif kind == "jump the clock":
            self.launch("--import", "ahead")
        elif kind == "launch twice":
            self.launch()
        elif kind == "read beside":
            self.readers.append(self.start("fleet", "status", self.folder, enter=self.holder))
        return True


def test_a_soak_of_all_faults_over_one_fleet_of_eight_changes_no_bit(fleet, start, small_disk, size, figures, tmp_path):
    disk = small_disk(60_000_000)
    if disk is None:
        pytest.skip("no disk can be mounted here")
    steps, chance = size(1500, 60), random.Random(13)  # noqa: S311
    whole = fleet("whole", experts=8, steps=steps)
    assert start("fleet", "run", whole, "--workers", 2).wait(600) == 0
    fleet("moved_0", disk[0], experts=8, steps=steps, enter=disk[1])
    soak, counts = Soak(start, disk, "moved_0", chance), dict.fromkeys(KINDS, 0)
    order = chance.sample(KINDS, len(KINDS))
    while sum(counts.values()) < size(30, 4):
        kind = order[sum(counts.values()) % len(order)]
        time.sleep(chance.uniform(0, size(4, 1)))
        counts[kind] += soak.do(kind)
    end = time.monotonic() + 900
    while (process := soak.running()).wait(600):
        assert "Traceback" not in process.stderr, process.stderr
        assert time.monotonic() < end, process.text
        soak.launchers.remove(process)
    assert all(reader.wait(60) == 0 for reader in soak.readers), [r.text for r in soak.readers]
    shutil.copytree(soak.here, tmp_path / "copy")
    a, b = weights(whole, 8), weights(tmp_path / "copy", 8)
    assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])
    for k in range(1, 9):
        folder = tmp_path / "copy" / f"expert_{k:03d}"
        run = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["id"]
        manifests = [json.loads(p.read_text(encoding="utf-8")) for p in (folder / "checkpoints").glob("*.ckpt.json")]
        assert {manifest["run"] for manifest in manifests} == {run}
        assert max(manifest["step"] for manifest in manifests) == steps
        assert not list(folder.rglob(".*.tmp"))
    figures(
        "soak_of_a_fleet", experts=8, steps=steps, **{k.replace(" ", "_"): v for k, v in counts.items()}, different=0
    )
