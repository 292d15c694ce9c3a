"""Users without a home folder, users unknown to the system, and homes that are not writable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import FULL, ROOT, TINY

from lightning_tdisent.cli import main, terminal
from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics import dinov2, reference
from lightning_tdisent.metrics.weights import cache_folder, locate

REDUCED = "experiments/digits/reduced8.yaml"
NOBODY = """
import ctypes, os
from pathlib import Path
user, libc = os.getuid(), ctypes.CDLL(None)
assert libc.unshare(0x10000000) == 0
Path("/proc/self/uid_map").write_text(f"12345 {user} 1", encoding="utf-8")
"""


@pytest.fixture
def homeless(monkeypatch):
    """Remove the home folder of this process."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("TDISENT_CACHE", *terminal.CACHES):
        monkeypatch.delenv(name, raising=False)


def test_all_commands_work_for_a_user_whom_the_system_does_not_know(start, tmp_path):
    if subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody make namespaces of users")
    run, toy, made, temporary = (tmp_path / name for name in ("run", "toy", "made", "tmp"))
    temporary.mkdir()
    lines = [
        ["--help"], ["data", "toy", toy, "-n", 8, "--size", 8, "--jobs", 1],
        ["data", "inspect", toy, "--out", tmp_path / "look.png"],
        ["fit", "--config", REDUCED, *TINY, "--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--run", run],
        ["compose", run, "--out", made], ["sample", made, "--out", tmp_path / "images", "--seeds", "0:2"],
        ["evaluate", made, "--data", "data/digits", "--protocol", "digits", "-n", 64, "--held-out", 64,
         "--out", tmp_path / "evaluated"],
        ["export", made, "--out", tmp_path / "exported"], ["fetch", "inception"],
    ]  # fmt: skip
    lines = lines if FULL else [line for line in lines if line[0] in ("--help", "fit", "compose", "sample", "fetch")]
    words = [[str(word) for word in line] for line in lines]
    process = start(call="commands", args=words, nobody=True, env={"TMPDIR": str(temporary)}, fresh=True)
    assert process.wait() == 0, process.text
    codes = [line for line in process.text.splitlines() if line.startswith("CODE ")]
    assert codes == [f"CODE {' '.join(line[:2])}: {2 * (line[0] == 'fetch')}" for line in words], process.text
    assert process.stderr.count("error: ") == 1
    assert "error: there is no home folder for the cache. Set TDISENT_CACHE" in process.stderr
    assert "Traceback" not in process.text
    assert "atplotlib" not in process.text  # it would warn that its cache has no folder
    assert not list(temporary.iterdir())
    assert not (ROOT / "~").exists()


def test_caches_of_libraries_go_to_a_temporary_folder_where_the_home_cannot_be_written(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(terminal.atexit, "register", lambda *end: ends.append(end))
    monkeypatch.setattr(terminal.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "tmp").mkdir()
    terminal.keep_caches()  # a normal home
    assert "MPLCONFIGDIR" not in os.environ
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    terminal.keep_caches()
    terminal.keep_caches()  # no second folder
    (folder,) = (tmp_path / "tmp").iterdir()
    assert os.environ["MPLCONFIGDIR"] == os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    ((end, *arguments),) = ends
    end(*arguments)
    assert not folder.exists()


def test_the_cache_is_named_or_refused_where_there_is_no_home(homeless, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"no home folder for the cache\. Set TDISENT_CACHE"):
        cache_folder()
    with pytest.raises(InputError, match="no home folder for the cache"):
        locate("inception")
    for name in ("~/x", "~"):
        with pytest.raises(InputError, match="there is no home folder ~"):
            dinov2.DINOv2(weights=name)
        monkeypatch.setenv("TDISENT_CACHE", name)
        with pytest.raises(InputError, match=r"TDISENT_CACHE: .* there is no home folder ~"):
            cache_folder()
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_what_would_be_remembered_is_measured_each_time_where_there_is_no_cache(homeless):
    calls = []

    def measure():
        calls.append(1)
        return {"x": len(calls)}

    assert [reference.remembered("x", measure) for _ in range(2)] == [{"x": 1}, {"x": 2}]


def test_a_temporary_folder_that_is_not_there_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(terminal.tempfile, "tempdir", None)
    assert main(["data", "toy", str(tmp_path / "toy"), "-n", "8", "--size", "8", "--jobs", "1"]) == 0
