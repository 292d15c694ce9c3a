"""Run folders have one holder at a time, which detects that its folder was removed, moved or taken."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import pytest

from lightning_tdisent import runs
from lightning_tdisent.errors import Busy, InputError, Lost
from lightning_tdisent.files import ask_guards, guarded, write_whole
from lightning_tdisent.runs import AVERAGES, LOCK, RunFolder, busy, checkpoints_in, held, snapshot_name, snapshots_in

HOLD = """
import sys
from lightning_tdisent.runs import RunFolder
with RunFolder(sys.argv[1]) as place:
    place.name("f" * 16)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other():
    """Return a function that starts a process which holds a folder; all are killed at the end."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def no_locks(monkeypatch):
    """Simulate a file system without flock."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runs.fcntl, "flock", flock)


def test_the_holder_is_named_and_the_folder_free_when_it_ends(other, tmp_path):
    process = other(tmp_path)
    said = f"process {process.pid} on .* .run ffffffffffffffff"
    with pytest.raises(Busy, match=f"{tmp_path} is in use by {said}"):
        RunFolder(tmp_path).__enter__()
    assert busy(tmp_path).startswith(f"process {process.pid} on ")
    process.kill()
    process.wait()
    assert busy(tmp_path) == ""
    with RunFolder(tmp_path) as place:
        assert held(tmp_path) is place
        assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert held(tmp_path) is None


def test_without_locks_a_holder_of_this_machine_is_known_by_its_process(no_locks, other, tmp_path):
    process = other(tmp_path)
    with pytest.raises(Busy, match=f"process {process.pid}"):
        RunFolder(tmp_path).__enter__()
    assert busy(tmp_path).startswith(f"process {process.pid} on ")
    process.kill()
    process.wait()
    assert busy(tmp_path) == ""
    with RunFolder(tmp_path), pytest.raises(Busy, match=f"process {os.getpid()}"):
        RunFolder(tmp_path).__enter__()


def test_without_locks_a_holder_elsewhere_is_named_and_ends_at_its_next_write(no_locks, tmp_path, capsys):
    with RunFolder(tmp_path) as first:
        first.name("1" * 16)
        content = json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))
        (tmp_path / LOCK).write_text(json.dumps(content | {"host": "elsewhere/1"}), encoding="utf-8")
        with RunFolder(tmp_path) as second:
            assert "no locks; last held by process" in capsys.readouterr().err
            second.check()
            with pytest.raises(Lost, match=f"run 1{{16}}. has lost its folder: it is held by process {os.getpid()}"):
                first.check()


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "a run", "a held run"])
def test_a_folder_that_is_moved_or_replaced_is_noticed_and_left_alone(instead, other, tmp_path):
    folder = tmp_path / "run"
    with RunFolder(folder) as place:
        place.name("a" * 16)
        write_whole(folder / "curve.json", b"1")
        (folder / "checkpoints").mkdir()
        place.check(quick=True)
        folder.rename(tmp_path / "away")
        if instead != "nothing":
            folder.mkdir()
        if instead == "a run":
            (folder / "notes.yaml").write_text("{}", encoding="utf-8")
            (folder / LOCK).write_text("process 1 on elsewhere", encoding="utf-8")
        if instead == "a held run":
            other(folder)
        before = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None
        for quick in (True, False):
            with pytest.raises(Lost, match=r"run a{16}\) has lost its folder"):
                place.check(quick)
        for name in ("curve.json", "new/file"):
            with pytest.raises(Lost):
                write_whole(folder / name, b"2")
        with pytest.raises(Lost):
            ask_guards(folder / "checkpoints" / "step-1.ckpt")
    after = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None
    assert after == before
    assert (tmp_path / "away" / "curve.json").read_bytes() == b"1"


def test_a_folder_removed_and_made_anew_is_not_taken_for_the_old_one(tmp_path):
    folder = tmp_path / "run"
    with RunFolder(folder) as place:
        for _ in range(20):  # inode numbers of removed folders are reused
            shutil.rmtree(folder)
            folder.mkdir()
            with pytest.raises(Lost, match="removed or moved"):
                place.check(quick=True)


def test_a_lock_that_somebody_removes_is_made_again(other, tmp_path):
    with RunFolder(tmp_path) as place:
        (tmp_path / LOCK).unlink()
        place.check()
        assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
        (tmp_path / LOCK).unlink()
        process = other(tmp_path)
        with pytest.raises(Lost, match=f"held by process {process.pid} "):
            place.check()
        process.kill()
        process.wait()
        (tmp_path / LOCK).unlink()
        with pytest.raises(Lost):  # permanently: another process had taken the folder
            place.check()


def test_a_lock_whose_holder_has_just_removed_it_is_taken_anew(monkeypatch, tmp_path):
    flock, calls = runs._flock, []

    def removed_meanwhile(lock):
        calls.append(lock)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        return flock(lock)

    monkeypatch.setattr(runs, "_flock", removed_meanwhile)
    with RunFolder(tmp_path) as place:
        assert len(calls) == 2
        assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
        place.check()


def test_a_folder_that_holds_nothing_is_removed_again_and_one_that_was_there_is_not(tmp_path):
    with RunFolder(tmp_path / "new", tidy=True):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with RunFolder(tmp_path / "old", tidy=True):
        pass
    assert (tmp_path / "old").exists()
    with RunFolder(tmp_path / "run", tidy=True):
        (tmp_path / "run" / "config.yaml").write_text("{}", encoding="utf-8")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_curves_of_a_trainer_of_ones_own_stay(tmp_path):
    with RunFolder(tmp_path / "run"):
        (tmp_path / "run" / "events.out.tfevents.1").write_bytes(b"curve")
    assert (tmp_path / "run" / "events.out.tfevents.1").exists()


def test_a_link_in_the_place_of_the_lock_is_refused_and_not_written(tmp_path):
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="is a symbolic link to"):
        RunFolder(tmp_path / "run").__enter__()
    assert busy(tmp_path / "run") == ""
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("content", ["", "process 7 on box", "[1]", "{", "\x00", '{"pid": "x"}', "x" * 100_000])
def test_what_an_older_version_or_nobody_left_in_a_lock_holds_nothing(content, tmp_path):
    (tmp_path / LOCK).write_text(content, encoding="utf-8")
    assert busy(tmp_path) == ""
    with RunFolder(tmp_path) as place:
        place.check()


def _race(folder, barrier, wins):
    for turn in range(30):
        barrier.wait()
        try:
            with RunFolder(folder / str(turn)):
                wins.put(turn)
                barrier.wait()  # no process releases the folder before all have tried
        except Busy:
            barrier.wait()


def test_of_many_processes_exactly_one_holds_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, barrier, wins)) for _ in range(4)]
    for process in processes:
        process.start()
    won = sorted(wins.get(timeout=30) for _ in range(30))
    for process in processes:
        process.join(30)
    assert won == list(range(30))
    assert wins.empty()


def test_a_guard_is_asked_for_what_lies_below_its_folder_alone(tmp_path):
    asked = []
    with guarded(tmp_path / "a", asked.append):
        write_whole(tmp_path / "b" / "file", b"")
        write_whole(tmp_path / "ab", b"")
        assert not asked
        write_whole(tmp_path / "a" / "deep" / "file", b"")
        assert asked
        assert not any(asked)
        ask_guards(os.path.relpath(tmp_path / "a" / "file"), quick=True)
        assert asked[-1]
    asked.clear()
    write_whole(tmp_path / "a" / "file", b"")
    assert not asked


def test_a_write_that_was_stopped_for_long_asks_again_before_it_counts(tmp_path):
    answers = iter([None, None, Lost("gone")])  # before creating the folder, before the file, and at its end

    def check(quick):
        if (answer := next(answers)) is not None:
            raise answer

    (tmp_path / "file").write_bytes(b"old")
    with guarded(tmp_path, check), pytest.raises(Lost, match="gone"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_cannot_be_read_once_is_not_another_s(tmp_path, monkeypatch):
    read, times = runs._read, iter([True])

    def fails(file):
        if next(times, False):
            raise OSError(errno.EIO, "Input/output error")
        return read(file)

    with RunFolder(tmp_path / "run") as place:
        monkeypatch.setattr(runs, "_read", fails)
        place.check()
        place.check()
        (tmp_path / "run" / ".lock").unlink()  # only the lock is removed: it is taken again
        place.check()
        assert json.loads((tmp_path / "run" / ".lock").read_text(encoding="utf-8"))["token"] == place._token


def test_no_reader_of_yaml_takes_an_identity_for_a_number():
    for _ in range(200):
        run = runs.new_identity()
        assert re.fullmatch("[a-f][0-9a-f]{15}", run)


def test_checkpoints_and_snapshots_are_listed_by_their_steps_and_nothing_else_is(tmp_path):
    for name in ("step-9.ckpt", "step-000000010.ckpt", "step-best.ckpt", "step-1.ckpt.json", "last.ckpt"):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-9.ckpt", "step-000000010.ckpt"]
    folder = tmp_path / AVERAGES
    folder.mkdir()
    steps = {10: 0.1, 9: 0.05, 12_345_678_901: 0.1}
    for step, length in steps.items():
        (folder / snapshot_name(step, length)).touch()
    for name in ("step-best_0.1.safetensors", "step-1_2", "step-000000003.safetensors", "step-4_0.1.safetensors.tmp"):
        (folder / name).touch()
    (folder / "step-7_0.1.safetensors").touch()
    assert list(snapshots_in(tmp_path).values()) == [7, 9, 10, 12_345_678_901]
    assert all(path.exists() for path in snapshots_in(tmp_path))
