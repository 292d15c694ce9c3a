"""Runs are never mixed: moved folders, two launchers, holders that were stopped, concurrent readers."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from processes import CONFIG, FULL, ROOT, TINY, alive, begun, good, name_of, one_line, parts, until
from safetensors.torch import load_file

from lightning_tdisent.lit.checkpoints import newest
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.checkpoint import manifest_of
from lightning_tdisent.runs import LOCK, checkpoints_in


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["id"]


# identity


def test_all_files_of_a_run_name_it_and_a_checkpoint_of_another_is_refused_with_both(fit, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert fit(mine, 8, "--checkpoint.every=4").wait() == 0
    assert fit(other, 12, "--seed_everything=1", "--model.lr=0.02").wait() == 0
    run, another = run_of(mine), run_of(other)
    assert re.fullmatch("[0-9a-f]{16}", run)
    assert run != another
    assert [
        json.loads(manifest_of(p).read_text(encoding="utf-8"))["run"] for p in checkpoints_in(mine / "checkpoints")
    ] == [run] * 2
    assert read_card(mine / "model.safetensors").run == run
    assert json.loads((mine / LOCK).read_text(encoding="utf-8"))["run"] == run
    assert [p.name.rpartition(".")[2] for p in mine.glob("events.out.tfevents.*")] == [run]
    for suffix in ("", ".json"):
        name = f"{name_of(12)}{suffix}"
        (mine / "checkpoints" / name).write_bytes((other / "checkpoints" / name).read_bytes())
    before = contents(mine)
    process = fit(mine, 20)
    assert process.wait() == 2
    assert "error: " in process.stderr
    assert run in process.stderr
    assert f"{name_of(12)}: of run {another}" in process.stderr
    for name in before.keys() - {mine / LOCK}:
        assert name.name == LOCK or (mine / name).read_bytes() == before[name]
    for suffix in ("", ".json"):
        (mine / "checkpoints" / f"{name_of(12)}{suffix}").unlink()
    process = fit(mine, 12)
    assert process.wait() == 0, process.text
    assert "from step 8" in process.text
    assert run_of(mine) == run == read_card(mine / "model.safetensors").run
    branch = fit(tmp_path / "branch", 12, "--ckpt_path", mine / "checkpoints" / name_of(8))
    assert branch.wait() == 0, branch.text
    assert run_of(tmp_path / "branch") not in (run, another)


@pytest.mark.parametrize("what", ["removed", "moved", "replaced", "taken"] if FULL else ["moved", "taken"])
def test_a_training_whose_folder_goes_ends_and_writes_nothing_into_what_lies_there_now(what, fit, tmp_path):
    run, away = tmp_path / "run", tmp_path / "away"
    process = fit(run, 100_000, "--checkpoint.every=5", *parts("Slow", step=0.02))
    until(lambda: good(run)[1], process)
    run.rename(away)
    if what == "removed":
        shutil.rmtree(away)
    if what == "replaced":
        run.mkdir()
        (run / "notes.yaml").write_text("mine: 1", encoding="utf-8")
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / name_of(3)).write_bytes(b"mine")
    if what == "taken":
        second = fit(run, 30, "--checkpoint.every=5", "--seed_everything=1")
        assert second.wait() == 0, second.text
    before = contents(run) if run.exists() else None
    assert process.wait(30) == 1, process.text
    said = one_line(process)
    assert f"run: {run}: this training (run " in said
    assert "has lost its folder" in said
    after = contents(run) if run.exists() else None
    if what == "taken":  # by the second run, while the first ended
        assert {p.name.rpartition(".")[2] for p in run.glob("events.out.tfevents.*")} == {run_of(run)}
        assert read_card(run / "model.safetensors").seed == 1
        assert good(run)[1:] == (30, [])
    else:
        assert after == before
    if what != "removed":  # the run resumes in the moved folder
        step = good(away)[1]
        again = fit(away, step + 5)
        assert again.wait() == 0, again.text
        assert f"from step {step}" in again.text


def test_two_trainings_from_python_do_not_share_a_folder(fit, start, tmp_path):
    process = fit(tmp_path / "run", 100_000, *parts("Slow", step=0.02))
    until(begun(tmp_path / "run"), process)
    second = start(call="train_in", args=[str(tmp_path / "run")], fresh=False)
    assert second.wait() == 0
    assert f"Busy: run: {tmp_path / 'run'} is in use by process {process.pid} on" in second.text
    assert process.end(signal.SIGTERM) == 143


# leases


@pytest.fixture
def fleet(start, tmp_path):
    """Plan a fleet of 2 small experts; return its folder."""

    def make(name, steps=400, every=10):
        words = dict(word.removeprefix("--").split("=", 1) for word in TINY)
        settings = {key: yaml.safe_load(value) for key, value in words.items() if key != "data.batch_size"}
        settings |= {"model.states.S": 2, "checkpoint.every": every, "trainer.val_check_interval": steps}
        content = {"configs": [str(ROOT / CONFIG)], "set": settings, "batch": 32, "budget": 2 * steps * 32}
        file = tmp_path / "fleet.yaml"
        file.write_text(json.dumps(content), encoding="utf-8")
        planned = start("fleet", "plan", "--config", file, "--out", tmp_path / name)
        assert planned.wait() == 0, planned.text
        return tmp_path / name

    return make


def holder(folder, name):
    """Return the process and the number of the current lease."""
    found = sorted((folder / "leases").glob(f"{name}.*.json"))
    return (
        (json.loads(found[-1].read_text(encoding="utf-8"))["pid"], int(found[-1].name.split(".")[1]))
        if found
        else (0, 0)
    )


def group(pid):
    return os.getpgid(pid)


def test_a_worker_stopped_for_longer_than_its_lease_saves_nothing_when_it_comes_back(fleet, start, figures):
    folder, whole = fleet("broken"), fleet("whole")
    assert start("fleet", "run", whole, "--workers", 1).wait(200) == 0
    words = ("fleet", "run", folder, "--only", "1", "--ttl", 2, "--import", "nolocks")
    first = start(*words)
    expert = folder / "expert_001"
    until(lambda: good(expert)[1] >= 20, first)
    first.send(signal.SIGSTOP)
    stopped_at = good(expert)[1]
    # pretend that the holder is on another machine, where it is not known whether it runs
    lock = json.loads((expert / LOCK).read_text(encoding="utf-8"))
    (expert / LOCK).write_text(json.dumps(lock | {"host": "elsewhere/1"}), encoding="utf-8")
    (found,) = (folder / "leases").glob("expert_001.*.json")
    found.write_text(
        json.dumps(json.loads(found.read_text(encoding="utf-8")) | {"host": "elsewhere/1"}), encoding="utf-8"
    )
    second = start(*words)
    assert second.wait(200) == 0, second.text
    before = contents(expert)
    first.send(signal.SIGCONT)
    assert first.wait(60) == 0, first.text  # the job was finished by another worker
    after = contents(expert)
    changed = {name.name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # the temporary file that it was writing when stopped, which it removes
    changed -= {name.name for name in before.keys() - after.keys() if name.suffix == ".tmp"}
    assert changed <= {"log.txt"}
    assert re.search("expert_001: .*(has lost its folder|another worker holds its lease)", first.text)
    assert good(expert)[1:] == (400, [])
    a, b = load_file(expert / "model.safetensors"), load_file(whole / "expert_001" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    figures("stopped_beyond_the_lease", stopped_at=stopped_at, ended_at=400, changed_files=len(changed - {"log.txt"}))


def test_a_stopped_worker_whose_lock_is_seen_is_waited_for(fleet, start):
    folder = fleet("one")
    words = ("fleet", "run", folder, "--only", "1", "--ttl", 1)
    first = start(*words)
    expert = folder / "expert_001"
    until(lambda: good(expert)[1] >= 20, first)
    first.send(signal.SIGSTOP)
    second = start(*words)
    until(lambda: "is in use by process" in second.text, second)
    time.sleep(2.5)
    assert holder(folder, "expert_001") == (first.pid, 1)
    first.send(signal.SIGCONT)
    assert first.wait(200) == 0, first.text
    assert second.wait(60) == 0, second.text
    assert good(expert)[1:] == (400, [])


def test_an_expert_that_somebody_trains_by_hand_is_waited_for_and_not_failed(fleet, start):
    folder = fleet("one", steps=100)
    log = folder / "expert_001"
    first = start("fleet", "run", folder, "--only", "1")
    assert first.wait(200) == 0
    config = log / "config.yaml"
    for name in ("model.safetensors",):
        (log / name).unlink()
    shutil.rmtree(log / "checkpoints")
    hand = start("fit", "--config", config, *parts("Slow", step=0.1))
    until(lambda: (log / "checkpoints").exists(), hand)
    fleet_run = start("fleet", "run", folder, "--workers", 2)
    until(lambda: "expert_001: " in fleet_run.text and "whose end is waited for" in fleet_run.text, fleet_run)
    assert alive(hand.pid)
    assert fleet_run.wait(200) == 0, fleet_run.text
    assert hand.wait() == 0, hand.text
    assert not list((folder / "failed").glob("*"))


# checkpoints without a manifest, and readers


def test_a_checkpoint_killed_before_its_manifest_counts_as_none(fit, tmp_path):
    run = tmp_path / "run"
    assert fit(run, 4).wait() == 0
    manifest_of(run / "checkpoints" / name_of(4)).unlink()
    (run / "checkpoints" / "newest.json").unlink()
    (run / "model.safetensors").unlink()
    process = fit(run, 6)
    assert process.wait() == 0, process.text
    assert "passed over: " in process.text
    assert "has no manifest" in process.text
    assert "from the beginning" in process.text
    assert good(run)[1:] == (6, [])


def test_who_reads_beside_a_training_never_fails_for_what_is_pruned(fit, start, tmp_path, size, figures):
    run = tmp_path / "run"
    process = fit(run, 100_000, "--checkpoint.every=1", "--checkpoint.keep=1")
    until(lambda: good(run)[0], process)
    end, reads, seen = time.monotonic() + size(20, 3), 0, set()
    while time.monotonic() < end:
        path, manifest, _ = newest(run / "checkpoints")
        assert path is not None
        reads, seen = reads + 1, seen | {manifest["step"]}
    readers = [start("validate", "--config", run / "config.yaml", "--trainer.logger=false") for _ in range(size(5, 1))]
    for reader in readers:
        assert reader.wait() == 0, reader.text
    figures("readers_beside", reads=reads, checkpoints=len(seen), failed=0)
    assert len(seen) > 5
    assert process.end(signal.SIGTERM) == 143


# a closed terminal


def test_a_training_whose_terminal_is_gone_saves_and_goes(tmp_path):
    run = tmp_path / "run"
    argv = ["fit", "--config", CONFIG, *TINY, "--run", str(run), "--trainer.max_steps=100000", "--checkpoint.every=5"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "lightning_tdisent", *argv])  # noqa: S606
    stop = threading.Event()
    drain = threading.Thread(target=_drain, args=(terminal, stop), daemon=True)
    drain.start()
    until(lambda: good(run)[1])
    newest_before = good(run)[1]
    stop.set()
    drain.join()  # a pending read would keep the terminal open
    os.close(terminal)
    end = time.monotonic() + 60
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(done[1]) == 143
    assert good(run)[1] >= newest_before
    assert good(run)[2] == []


def _drain(terminal, stop):
    with contextlib.suppress(OSError):
        while not stop.is_set():
            if select.select([terminal], [], [], 0.05)[0] and not os.read(terminal, 4096):
                return


def test_a_training_started_by_nohup_does_not_heed_a_lost_terminal(tmp_path):
    run = tmp_path / "run"
    argv = ["fit", "--config", CONFIG, *TINY, "--run", str(run), "--trainer.max_steps=300", "--checkpoint.every=5"]
    nohup = shutil.which("nohup")
    assert nohup is not None
    process = subprocess.Popen(
        [nohup, sys.executable, "-m", "lightning_tdisent", *argv], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip
    until(lambda: good(run)[1])
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert good(run)[1:] == (300, [])


# room


def test_a_disk_with_too_few_inodes_or_too_small_a_file_size_is_refused_before_training(fit, small_disk, tmp_path):
    process = fit(tmp_path / "run", 4, fsize=300_000)
    assert process.wait() == 2, process.text
    assert "does not take 3 checkpoints of" in one_line(process)
    if disk := small_disk("20000000,nr_inodes=14"):
        place, holder, _ = disk
        process = fit(place / "run", 4, enter=holder)
        assert process.wait() == 2, process.text
        assert "has room for" in one_line(process)
        assert "more files (df -i)" in one_line(process)


@pytest.mark.parametrize("left", [0, 1, 2] if FULL else [1])
def test_a_full_inode_table_leaves_no_checkpoint_without_its_manifest(left, fit, small_disk):
    if disk := small_disk("20000000,nr_inodes=60"):
        place, holder, seen = disk
        run = place / "run"
        process = fit(run, 100_000, "--checkpoint.every=5", *parts("Slow", step=0.05), enter=holder)
        until(lambda: (seen / "run/checkpoints/newest.json").exists(), process)
        fillers = []
        try:
            for k in range(100):
                fillers.append(seen / f"filler{k}")
                fillers[-1].touch()
        except OSError:
            fillers.pop()
        for _ in range(left):
            fillers.pop().unlink()
        assert process.wait(60) == 1, process.text
        assert "No space left on device" in one_line(process)
        there = checkpoints_in(seen / "run/checkpoints")
        assert there
        assert all(manifest_of(p).exists() for p in there)
        for filler in fillers:
            filler.unlink()
        last = good(seen / "run")[1]
        again = fit(run, last + 3, enter=holder)
        assert again.wait() == 0, again.text
        assert f"from step {last}" in again.text
