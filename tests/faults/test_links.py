"""Links in place of files that are written, temporary files, and the umask."""

import multiprocessing
import os
import stat
import time

import pytest
import torch
from processes import TINY

from lightning_tdisent import files
from lightning_tdisent.cli import main
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.evaluation.pictures import save_png
from lightning_tdisent.files import open_own, remove_orphans, temporary, whole, write_whole
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.state import Jobs
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.fleet.work import Session, work_through
from lightning_tdisent.lit.checkpoints import DurableIO

PRECIOUS = b"the user's own\n"


@pytest.fixture
def precious(tmp_path):
    """Return a file of the user that must not change."""
    file = tmp_path / "precious"
    file.write_bytes(PRECIOUS)
    yield file
    assert file.read_bytes() == PRECIOUS
    assert file.stat().st_nlink == 1 + len(list(tmp_path.rglob("hard")))


def fit(folder):
    config = ["--config", "experiments/digits/reduced8.yaml", *TINY, "--trainer.max_steps=2"]
    try:
        return main(["fit", *config, "--trainer.limit_val_batches=1", "--run", str(folder)])
    except SystemExit as end:
        return end.code


# a written file replaces what has its name, and never writes into it


def by_write_whole(path):
    write_whole(path, b"new")


def by_whole(path):
    with whole(path, sync=False) as stream:
        stream.write(b"new")


def by_store(path):
    Store(path.parent).write(path.name, b"new")


def by_checkpoint(path):
    DurableIO().save_checkpoint({"pytorch-lightning_version": "2", "global_step": 3}, path)


def by_picture(path):
    save_png(torch.zeros(1, 8, 8, dtype=torch.uint8), path)


@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling"])
@pytest.mark.parametrize("write", [by_write_whole, by_whole, by_store, by_checkpoint, by_picture])
def test_a_file_that_is_written_takes_the_place_of_a_link(write, kind, tmp_path, precious):
    folder = tmp_path / "folder"
    folder.mkdir()
    target = tmp_path / "made" if kind == "dangling" else precious
    for name in ("file", "file.json", "newest.json"):
        if kind == "hard":
            os.link(target, folder / name)
        else:
            (folder / name).symlink_to(target)
    write(folder / "file")
    assert not (folder / "file").is_symlink()
    assert (folder / "file").read_bytes() != PRECIOUS
    assert (folder / "file").stat().st_nlink == 1
    assert not (tmp_path / "made").exists()
    assert not list(folder.glob(".*"))
    for name in ("file.json", "newest.json"):
        (folder / name).unlink(missing_ok=True)


def test_only_one_creates_a_name_and_a_link_counts_as_there(tmp_path, precious):
    (tmp_path / "a").symlink_to(precious)
    (tmp_path / "b").symlink_to(tmp_path / "nothing")
    store = Store(tmp_path)
    assert [store.create(name, b"new") for name in ("a", "b", "c", "c")] == [False, False, True, False]
    assert not (tmp_path / "nothing").exists()


# temporary names


def test_temporary_names_differ_each_time_fit_any_name_and_create_nothing_that_is_there(
    tmp_path, precious, monkeypatch
):
    path = tmp_path / ("ü" * 127)  # 254 bytes
    assert len({temporary(path) for _ in range(100)}) == 100
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    planted = tmp_path / ".planted.tmp"
    planted.symlink_to(precious)
    monkeypatch.setattr(files, "temporary", lambda path: planted)  # as if an attacker had guessed the name
    with pytest.raises(Halted, match="File exists"):
        write_whole(tmp_path / "x", b"new")


def left_by(folder, alive):
    """Begin a file in another process, which stays alive or not; return the file."""
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()

    def begin():
        temporary(folder / "step-1.ckpt").write_bytes(b"half")
        temporary(folder / "preflight").mkdir()
        begun.set()
        if alive:
            end.wait()
        os._exit(0)

    process = context.Process(target=begin)
    process.start()
    assert begun.wait(30)
    if not alive:
        process.join(30)
    return process, end


def test_what_a_dead_process_left_is_removed_and_what_a_live_one_writes_stays(tmp_path):
    left_by(tmp_path, alive=False)
    process, end = left_by(tmp_path, alive=True)
    mine = temporary(tmp_path / "mine")
    mine.write_bytes(b"half")
    kept = sorted(p for p in tmp_path.iterdir() if f"-{process.pid}-" in p.name) + [mine]
    assert (len(list(tmp_path.iterdir())), len(kept)) == (5, 3)
    for _ in range(2):
        remove_orphans(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(kept)
    end.set()
    process.join(30)
    remove_orphans(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]


def test_what_another_machine_left_is_removed_when_it_is_a_day_old(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "host", lambda: "elsewhere/1")
        foreign = [temporary(tmp_path / name) for name in ("old", "new")]
    foreign += [tmp_path / ".older.4711.tmp", tmp_path / ".newer.4711.tmp"]  # names of earlier versions
    for k, file in enumerate(foreign):
        file.write_bytes(b"half")
        age = 86_500 if k % 2 == 0 else 86_300
        os.utime(file, (time.time() - age,) * 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock of this machine is not used
    remove_orphans(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([foreign[1], foreign[3]])


def test_a_process_with_the_number_of_a_dead_one_keeps_nothing(tmp_path):
    mine = temporary(tmp_path / "x")
    mark, pid, began, rest = mine.name.removeprefix(".x.").split("-")
    other = tmp_path / f".x.{mark}-{pid}-{int(began) - 1}-{rest}"
    other.write_bytes(b"half")
    remove_orphans(tmp_path)
    assert not list(tmp_path.iterdir())


# files that are appended to


def test_a_log_is_appended_to_and_made_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        for text in (b"one", b"two"):
            with open_own(tmp_path / "log") as log:
                log.write(text)
    finally:
        os.umask(before)
    assert (tmp_path / "log").read_bytes() == b"onetwo"
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard", "pipe", "folder"])
def test_what_is_no_plain_file_of_one_name_is_not_appended_to(kind, tmp_path, precious):
    place = tmp_path / ("hard" if kind == "hard" else "log")
    make = {
        "symbolic": lambda: place.symlink_to(precious), "dangling": lambda: place.symlink_to(tmp_path / "made"),
        "hard": lambda: os.link(precious, place), "pipe": lambda: os.mkfifo(place), "folder": place.mkdir,
    }  # fmt: skip
    make[kind]()
    with pytest.raises((InputError, IsADirectoryError), match=r"link|not a plain file|directory") as refused:
        open_own(place)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()


# commands


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_a_run_folder_with_a_link_in_the_place_of_a_file_is_refused_in_one_line(name, tmp_path, precious, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(precious)
    assert fit(run) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run / name}: is a symbolic link to {precious}; nothing is written through a link")
    assert said.count("\n") == 1


def test_a_training_writes_through_no_link_of_its_folder(tmp_path, precious):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    run.symlink_to(scratch)  # a folder may be a link
    (run / "checkpoints").mkdir()
    (tmp_path / "others").mkdir()
    for name in ("config.yaml", "curve.json", "model.safetensors", "checkpoints/newest.json", "checkpoints/.writable",
                 "checkpoints/step-000000002.ckpt.json"):  # fmt: skip
        (run / name).symlink_to(tmp_path / "made" / name)  # dangling links, so that the folder holds no run
    (run / "checkpoints" / ".preflight").symlink_to(tmp_path / "others")
    assert fit(run) == 0
    assert not (tmp_path / "made").exists()
    assert not any((tmp_path / "others").iterdir())
    assert not [p for p in scratch.rglob("*") if p.name.endswith(".tmp")]
    assert (scratch / "config.yaml").is_file()
    assert (scratch / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_log_that_is_a_link_fails_its_job_in_one_line_and_no_other(kind, tmp_path, precious):
    jobs = [Job(name, [name], tmp_path / name, ()) for name in ("a", "b")]
    (tmp_path / "a").mkdir()
    if kind == "symbolic":
        (tmp_path / "a" / "log.txt").symlink_to(precious)
    else:
        os.link(precious, tmp_path / "a" / "log.txt")

    def train(argvs, reports):
        print("trained")
        for (name,) in argvs:
            (tmp_path / name / "model.safetensors").touch()
        return [None] * len(argvs)

    why = work_through(Jobs(Store(tmp_path), jobs), train, Session())
    assert list(why) == ["a"]
    assert f"{tmp_path}/a/log.txt: is a" in why["a"]
    assert "link" in why["a"]
    assert (tmp_path / "b" / "log.txt").read_text(encoding="utf-8") == "trained\n"
    (tmp_path / "a" / "log.txt").unlink()


def test_data_prepare_refuses_a_link_where_it_keeps_what_was_asked_for(tmp_path, precious, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.prepare.json").symlink_to(precious)
    assert main(["data", "toy", str(out), "-n", "8", "--size", "8"]) == 2
    assert "train.prepare.json: is a symbolic link to" in capsys.readouterr().err


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("write", [by_write_whole, by_store, by_checkpoint, by_picture])
def test_a_file_has_the_mode_that_the_umask_says(write, mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_every_file_of_a_chain_of_commands_has_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o077)
    try:
        assert main(["data", "toy", str(tmp_path / "toy"), "-n", "8", "--size", "8", "--jobs", "1"]) == 0
        assert main(["data", "inspect", str(tmp_path / "toy"), "--out", str(tmp_path / "toy" / "look.png")]) == 0
        assert fit(tmp_path / "run") == 0
        made, expert = tmp_path / "made", tmp_path / "expert.safetensors"
        expert.symlink_to(tmp_path / "run" / "model.safetensors")  # the file is composed, not the link
        assert main(["compose", str(expert), "--out", str(made / "folder")]) == 0
        assert main(["sample", str(made / "folder"), "--out", str(made / "images"), "--seeds", "0:2"]) == 0
        assert main(["export", str(made / "folder"), "--out", str(made / "diffusers"), "--format", "diffusers"]) == 0
    finally:
        os.umask(before)
    assert not [path for path in made.rglob("*") if path.is_symlink()]
    for path in (p for part in ("toy", "run", "made") for p in (tmp_path / part).rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
