"""Fixtures for faults of real processes.

``FAULTS=full`` (``make faults``) selects all trials and new processes. Without it the same tests make fewer trials, and
commands are forked from a process that has already imported everything. Figures are printed to stdout as lines
``FAULT name key=value`` and, if ``FAULTS_OUT`` names a folder, written to ``faults.json`` in it.
"""

import json
import os
import signal
from pathlib import Path

import pytest
from processes import CONFIG, FULL, TINY, Process, Zygote, alive, until


@pytest.fixture
def size():
    """Return a function that chooses between the number of trials of the full suite and of the subset."""
    return lambda full, subset: full if FULL else subset


@pytest.fixture
def figures():
    """Return a function that prints the figures of a test, and adds them to faults.json."""

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
    """Return a function that starts a command, or a function of ``faulty``, in a process that ends with the test."""
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
    """Mount a small real disk; give its folder, the process for `enter`, and the folder as seen from this process.

    None if the system does not allow to mount one; then tests rely on disks that are full by a limit.
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
    """Return a function that starts `fit` of a tiny network on the digits."""

    def run(folder, steps, *words, **options):
        argv = ["fit", "--config", CONFIG, *TINY, "--run", folder, f"--trainer.max_steps={steps}"]
        return start(*argv, *words, **options)

    return run
