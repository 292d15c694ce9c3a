"""Real processes for real faults.

``FAULTS=full`` (``make faults``) chooses all trials and fresh processes; without it the same tests make few trials, and
commands are forked from a process that has imported everything. Figures go to stdout as lines ``FAULT name key=value``
and, if ``FAULTS_OUT`` names a folder, to ``faults.json`` in it.
"""

import json
import os
import signal
from pathlib import Path

import pytest
from processes import CONFIG, FULL, TINY, Process, Zygote, alive, until


@pytest.fixture
def size():
    """Choose between the number of the full suite and that of the subset."""
    return lambda full, subset: full if FULL else subset


@pytest.fixture
def figures():
    """Print what a test counted, and keep it in faults.json."""

    def add(name, **values):
        print(f"\nFAULT {name} " + " ".join(f"{k}={v}" for k, v in values.items()))
        if folder := os.environ.get("FAULTS_OUT"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = Path(folder) / "faults.json"
            kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            file.write_text(json.dumps(kept | {name: values}, indent=1) + "\n", encoding="utf-8")

    return add


@pytest.fixture(scope="session")
def zygote():
    one = Zygote()
    yield one
    one.process.stdin.close()
    assert one.process.wait(30) == 0
    one.process.stdout.close()


@pytest.fixture
def start(zygote, tmp_path_factory):
    """Start a command, or a function of ``faulty``, in a process of its own; none of them outlives the test."""
    started = []

    def run(*words, fresh=FULL, **options):
        if "call" not in options:
            options["argv"] = [str(word) for word in words]
        process = Process(zygote, tmp_path_factory.mktemp("process"), fresh, **options)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def small_disk(start, figures, tmp_path):
    """A real disk of a few bytes: the folder it is at, the process that `enter` names, and the folder seen from here.

    None where the system lets nobody mount one: then the disks that are full by a limit stand for it.
    """

    def make(size):
        place = tmp_path / "disk"
        place.mkdir()
        holder = start(call="small_disk", args=[str(place), size], fresh=False)
        until(lambda: holder.text or not alive(holder.pid))
        real = holder.text == "mounted\n"
        figures("real_full_disk", mounted=int(real))
        return (place, holder.pid, Path(f"/proc/{holder.pid}/root{place}")) if real else None

    return make


@pytest.fixture
def fit(start):
    """Start `fit` of a tiny network on the digits."""

    def run(folder, steps, *words, **options):
        argv = ["fit", "--config", CONFIG, *TINY, "--run", folder, f"--trainer.max_steps={steps}"]
        return start(*argv, *words, **options)

    return run
