"""Fixtures of all tests: one torch thread, the digit shards, and commands in a fresh process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before importing torch; processes started by tests inherit it

import pytest
import torch

from lightning_tdisent.metrics import registry
from lightning_tdisent.metrics.metric import KNOWN

pytest_plugins = ["model_fixtures"]
ROOT = Path(__file__).parents[1]
SLOW = Path(__file__).with_name("slow.txt")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # background jobs of a shell, and their children, ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests: `cli` for users of that fixture, `faults` for their folder, `slow` for those in slow.txt."""
    slow = {line for line in SLOW.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}
    for item in items:
        if "cli" in getattr(item, "fixturenames", ()):
            item.add_marker("cli")
        if "faults" in item.path.parts:
            item.add_marker("faults")
        if item.nodeid.partition("[")[0].removeprefix("tests/") in slow:
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def digits() -> Path:
    """Return the folder of digit shards, created if it does not exist."""
    folder = ROOT / "data" / "digits"
    if not (folder / "test-0000.tar").exists():
        subprocess.run([sys.executable, ROOT / "data" / "digits.py"], check=True, cwd=ROOT)
    return folder


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in the checkout, since configs name their data relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def cli():
    """Return a function that runs a command in a fresh process: (exit code, stdout, stderr)."""

    def run(*argv: object, timeout: float = 120) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "lightning_tdisent", *map(str, argv)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=timeout, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="session")
def prepared():
    """Return the folder of a real data set, in $TDISENT_DATA, in data/, or in shared/data next to the checkout."""

    def find(name: str) -> Path:
        places = [Path(os.environ.get("TDISENT_DATA", ROOT / "data")), ROOT / "data", ROOT.parent / "shared" / "data"]
        for place in places:
            if (place / name).is_dir():
                return (place / name).resolve()
        pytest.skip(f"{name} is in none of {', '.join(map(str, places))}")

    return find


@pytest.fixture
def own_metrics():
    """Forget the metrics that a test defines after it."""
    registry.known()  # the built-in ones stay
    before = dict(KNOWN)
    yield
    KNOWN.clear()
    KNOWN.update(before)
