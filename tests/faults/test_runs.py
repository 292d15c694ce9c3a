"""The command under faults: after each fault the same command resumes and ends with the same weights.

Each fault has its own run, with the same few processes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import CONFIG, FULL, TINY, Process, alive, begun, good, name_of, one_line, parts, until
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_tdisent.lit.checkpoints import load, newest, non_finite
from lightning_tdisent.runs import checkpoints_in

LENGTH, VALIDATE, EVERY = 50, 20, 10  # an epoch has 46 steps
OFTEN = [f"--trainer.val_check_interval={VALIDATE}", f"--checkpoint.every={EVERY}"]
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
SPEED = "train/images_per_second"  # differs from run to run


def children(pid):
    """Return the ids of the child processes of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def flat(data, name=""):
    """Return the leaves of nested dicts and lists by name, tensors as bytes."""
    if isinstance(data, dict):
        return {k: v for key, value in data.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(data, (list, tuple)):
        return {k: v for key, value in enumerate(data) for k, v in flat(value, f"{name}.{key}").items()}
    return {name: (str(data.dtype), data.numpy().tobytes()) if isinstance(data, torch.Tensor) else data}


# times, and a count that Lightning keeps for the x-axis of its own logging, which is not used here
LEFT_OUT = (
    ".card.seconds",
    ".card.run",
    ".card.validation.seconds",
    ".validation.seconds",
    ".loops.fit_loop.epoch_loop.state_dict._batches_that_stepped",
)


def trained(run):
    """Return the results of a run: exported weights, last checkpoint, curves."""
    last, _, bad = good(run)
    assert bad == []
    content = flat(load(last))
    for part in (".state_dict", ".optimizer_states", ".ema.weights"):
        assert any(name.startswith(part) for name in content)
    return {
        "exported": flat(load_file(run / "model.safetensors")),
        "checkpoint": {k: v for k, v in content.items() if k not in LEFT_OUT},
        "curves": curves(run),
    }


def curves(run):
    """Return every scalar of a run but the speed as TensorBoard shows it: name -> [(images seen, value)]."""
    events = EventAccumulator(str(run), {"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != SPEED}


def same_end(run, other):
    """Assert that two runs ended with the same bits."""
    mine, theirs = trained(run), trained(other)
    for name in ("exported", "checkpoint", "curves"):
        assert mine[name].keys() == theirs[name].keys()
        assert [k for k in mine[name] if mine[name][k] != theirs[name][k]] == []


def recorded(*files):
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, zygote):
    """Train a run without faults; return its folder and the record of its steps."""
    folder = tmp_path_factory.mktemp("unbroken")
    words = [*TINY, "--run", str(folder / "run"), f"--trainer.max_steps={LENGTH}", *OFTEN]
    argv = ["fit", "--config", CONFIG, *words, *parts("Record", file=folder / "steps")]
    process = Process(zygote, folder, FULL, argv=argv)
    assert process.wait() == 0, process.text
    return folder / "run", recorded(folder / "steps")


# 8. and 9. resumes


def test_three_resumes_in_one_epoch_change_no_loss_no_sample_no_weight_and_no_curve(fit, unbroken, tmp_path, figures):
    whole, lines = unbroken
    run, files = tmp_path / "run", []
    for at, number, code in ((9, 15, 143), (24, 10, 143), (30, 2, 130), (-1, 0, 0)):
        files.append(tmp_path / f"steps-{at}")
        process = fit(run, LENGTH, *OFTEN, *parts("Record", file=files[-1]), *parts("Signal", step=at, number=number))
        assert process.wait() == code, process.text
        if code:
            assert good(run)[1:] == (at + 1, [])
    assert recorded(*files) == lines
    same_end(run, whole)
    values = sum(map(len, curves(whole).values()))
    figures("resumes", resumes=3, steps=len(lines), curve_values=values, different=0)
    assert [line["step"] for line in lines] == list(range(1, LENGTH + 1))
    assert values > 3 * LENGTH // 5


def test_kills_at_random_times_change_nothing(fit, unbroken, size, figures, tmp_path):
    kills, length, rng = size(30, 2), size(2400, LENGTH), np.random.default_rng(9)
    words = ["--trainer.val_check_interval=600", "--checkpoint.every=20"] if FULL else OFTEN
    every = size(20, EVERY)
    run, other, found = tmp_path / "run", unbroken[0], []
    for kill in range(kills):
        trains, before = begun(run), good(run)[1]
        process = fit(run, length, *words)
        if kill % 5 == 4:
            time.sleep(rng.uniform(0, 8))  # also kill it while it starts
        else:
            until(trains, process)
            least = before + every * int(rng.integers(0, 3))
            until(lambda least=least: good(run)[1] >= least, process)
            time.sleep(rng.uniform(0, size(0.5, 0.1)))
        assert process.end() == -9, process.text
        found.append(good(run)[1])
        assert found[-1] >= before
    process = fit(run, length, *words)
    assert process.wait(300) == 0, process.text
    if FULL:
        other = tmp_path / "other"
        process = fit(other, length, *words)
        assert process.wait(300) == 0, process.text
    same_end(run, other)
    figures("soak", kills=kills, steps=length, different_checkpoints=len(set(found)), different=0)
    assert found[-1] < length


def test_a_killed_run_goes_on_at_once_though_the_workers_of_its_loader_linger(fit, tmp_path):
    run, words = tmp_path / "run", ["--data.resident=false", "--data.workers=1"]
    process = fit(run, EVERY, *words, *parts("Slow", step=0.05), fresh=False)
    until(begun(run), process)
    workers = until(lambda: children(process.pid), process)
    assert process.end() == -9
    again = fit(run, EVERY, *words, fresh=False)
    code = again.wait()
    for worker in filter(alive, workers):
        os.kill(worker, signal.SIGKILL)
    assert code == 0, again.text


# 7. signals


def test_a_signal_in_training_saves_that_step_and_the_same_command_goes_on(fit, unbroken, size, figures, tmp_path):
    rng, run, files = np.random.default_rng(7), tmp_path / "run", []
    for number, code in (SIGNALS * 2)[: size(8, 1)]:
        files.append(tmp_path / f"steps-{len(files)}")
        process = fit(run, LENGTH, *OFTEN, *parts("Record", file=files[-1]), *parts("Slow", step=0.02))
        until(lambda file=files[-1]: file.exists(), process)
        time.sleep(rng.uniform(0, 0.15))
        assert process.end(number) == code, process.text
        assert "Traceback" not in process.text
        path, step, bad = good(run)
        assert (step, path.name, bad) == (recorded(files[-1])[-1]["step"], name_of(step), [])
    trials = len(files)
    files.append(tmp_path / "steps")
    process = fit(run, LENGTH, *OFTEN, *parts("Record", file=files[-1]))
    assert process.wait() == 0, process.text
    assert recorded(*files) == unbroken[1]
    same_end(run, unbroken[0])
    figures("signals_in_training", trials=trials, lost_steps=0)


@pytest.mark.parametrize(("number", "code"), SIGNALS if FULL else SIGNALS[:1])
def test_a_signal_in_a_validation_saves_its_step_and_the_validation_is_done_again(
    number, code, fit, unbroken, figures, tmp_path
):
    run, words = tmp_path / "run", [OFTEN[0], "--checkpoint.every=null"]
    process = fit(run, LENGTH, *words, *parts("Slow", validation=60))
    until((run / "validating").exists, process)
    begin = time.monotonic()
    assert process.end(number) == code, process.text
    took = time.monotonic() - begin
    figures(f"validation_{number.name}", seconds=round(took, 2), code=code)
    assert took < 20
    assert [p.name for p in checkpoints_in(run / "checkpoints")] == [name_of(VALIDATE)]
    assert good(run)[1:] == (VALIDATE, [])
    assert fit(run, LENGTH, *words).wait() == 0
    same_end(run, unbroken[0])


def test_ctrl_c_given_twice_stops_at_once(fit, tmp_path):
    process = fit(tmp_path / "run", LENGTH, *parts("Signal", number=2, step=3, times=2))
    assert process.wait() == 130, process.text
    assert "Traceback" not in process.text
    assert good(tmp_path / "run")[0] is None


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
@pytest.mark.parametrize(("number", "codes"), [(15, (143, -15)), (2, (130,))])
def test_a_signal_while_everything_is_set_up_is_not_lost(hook, number, codes, fit, tmp_path):
    process = fit(tmp_path / "run", LENGTH, *parts("Signal", number=number, hook=hook))
    assert process.wait() in codes, process.text  # a shell reports -15 as 143
    assert "Traceback" not in process.text
    assert not (tmp_path / "run" / "model.safetensors").exists()


# two ranks: which one gets which signal, seconds by which rank 0 exits later, and the exit code of the command
TWO = [
    (1, signal.SIGTERM, 0, 143),
    (0, signal.SIGTERM, 0, 143),
    (0, signal.SIGUSR1, 0, 143),
    (1, signal.SIGINT, 0, 130),
    (1, signal.SIGTERM, 8, 143),
]
PAIR = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def pair(fit, tmp_path):
    """Return a function that starts two ranks, and returns when both are training.

    It returns the command, both process ids, and the files that record their steps. The command starts its second
    rank itself; in the subset of trials both are forked, as a cluster would start them.
    """
    running = []

    def start(steps, *words, **options):
        run, file = tmp_path / "run", tmp_path / f"steps-{len(running)}"
        files = [file, Path(f"{file}.1")]
        words = [*OFTEN, *PAIR, *parts("Record", file=file), *words]
        if FULL:
            process = fit(run, steps, *words, **options)
        else:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": "2"}
            process, other = (fit(run, steps, *words, env={**place, "LOCAL_RANK": r}, **options) for r in "01")
        until(lambda: all(f.exists() for f in files), process, 90)
        both = [process.pid, *(children(process.pid) if FULL else [other.pid])]
        assert len(both) == 2
        running.extend(both)
        return process, both, files

    yield start
    assert not any(alive(pid) for pid in running)


def gone(process, both, seconds):
    """Return the exit code of the command after both processes have ended, which must not take too long."""
    begin = time.monotonic()
    code = process.wait(seconds)
    until(lambda: not any(map(alive, both)), seconds=seconds)
    took = time.monotonic() - begin
    assert took < seconds
    return code, round(took, 2)


@pytest.mark.parametrize(("rank", "number", "leaving", "code"), TWO if FULL else TWO[:1])
def test_a_signal_to_one_of_two_ranks_stops_both_at_one_step(rank, number, leaving, code, pair, tmp_path, figures):
    process, both, files = pair(LENGTH, *parts("Slow", step=0.05, leaving=leaving))
    os.kill(both[rank], number)
    ended, took = gone(process, both, 30 + leaving)
    figures(f"rank{rank}_{number.name}_{leaving}", seconds=took, code=ended)
    assert ended == code, process.text
    last = [recorded(file)[-1]["step"] for file in files]
    assert last[0] == last[1]
    assert good(tmp_path / "run")[1:] == (last[0], [])
    process, both, files = pair(last[0] + 5)
    assert gone(process, both, 60)[0] == 0, process.text
    assert f"from step {last[0]} " in process.text
    assert [recorded(file)[0]["step"] for file in files] == [last[0] + 1, last[1] + 1]
    assert good(tmp_path / "run")[1:] == (last[0] + 5, [])


@pytest.mark.parametrize("rank", [0, 1] if FULL else [1])
def test_no_rank_outlives_one_that_is_killed(rank, pair, tmp_path, figures):
    process, both, _ = pair(LENGTH, *parts("Slow", step=0.05))
    until(lambda: good(tmp_path / "run")[0], process)
    os.kill(both[rank], signal.SIGKILL)
    code, took = gone(process, both, 60)
    figures(f"rank{rank}_SIGKILL", seconds=took, code=code)
    assert code != 0
    path, step, _ = good(tmp_path / "run")
    assert step % EVERY == 0 < step
    assert load(path)["global_step"] == step


def test_no_rank_outlives_one_whose_disk_is_full(pair, unbroken, tmp_path, figures):
    size = good(unbroken[0])[0].stat().st_size
    process, both, _ = pair(LENGTH, *parts("Full", size=int(0.8 * size)))
    code, took = gone(process, both, 60)
    figures("rank0_disk_full", seconds=took, code=code)
    assert code == 1, process.text
    said = f"error: {tmp_path}/run/checkpoints/{name_of(EVERY)}: the checkpoint of step {EVERY} cannot be written: File"
    assert said in process.text
    assert good(tmp_path / "run")[0] is None


# 3. a full disk


def test_a_full_disk_stops_the_command_with_one_line_and_loses_nothing(fit, unbroken, tmp_path):
    run = tmp_path / "run"
    assert fit(run, LENGTH, *OFTEN, *parts("Signal", step=EVERY - 1)).wait() == 143
    path, step, _ = good(run)
    process = fit(run, LENGTH, *OFTEN, fsize=path.stat().st_size - 5000)
    assert process.wait() == 1, process.text
    failed = run / "checkpoints" / name_of(2 * EVERY)
    said = f"error: {failed}: the checkpoint of step {2 * EVERY} cannot be written: File too large. Training stops"
    assert one_line(process).startswith(said)
    assert good(run) == (path, step, [])
    assert sorted(p.name for p in path.parent.iterdir()) == ["newest.json", path.name, f"{path.name}.json"]
    assert fit(run, LENGTH, *OFTEN).wait() == 0
    same_end(run, unbroken[0])


@pytest.mark.parametrize("left", [0, 100_000] if FULL else [0])
def test_a_real_full_disk_stops_the_command_with_one_line_and_loses_nothing(left, fit, small_disk, unbroken, tmp_path):
    if disk := small_disk(8_000_000):
        place, holder, seen = disk
        process = fit(place / "run", LENGTH, *OFTEN, *parts("Slow", step=0.05), enter=holder)
        until(lambda: (seen / "run" / "checkpoints" / "newest.json").exists(), process)  # newest.json is written last
        with contextlib.suppress(OSError), (seen / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        os.truncate(seen / "filler", (seen / "filler").stat().st_size - left)
        assert process.wait() == 1, process.text
        assert re.search(r"step-\d+.ckpt: the checkpoint of step 20 cannot be written: No space", one_line(process))
        assert good(seen / "run")[1:] == (EVERY, [])
        (seen / "filler").unlink()
        if FULL:
            process = fit(place / "run", LENGTH, *OFTEN, enter=holder)
            assert process.wait() == 0, process.text
            shutil.copytree(seen / "run", tmp_path / "copy")
            same_end(tmp_path / "copy", unbroken[0])


# 4. permission denied


def test_a_run_folder_that_cannot_be_made_is_refused_before_training(fit, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    process = fit(tmp_path / "file" / "run", LENGTH, fresh=False)
    assert process.wait() == 2, process.text
    assert re.fullmatch(r"error: run: \S+/file/run cannot be written: Not a directory\. .*", one_line(process))


def test_a_run_folder_that_cannot_be_written_is_refused_before_training(fit, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for folder, named in ((run, r"/run"), (run / "checkpoints", r"/run/checkpoints")):
        folder.chmod(0o555)
        process = fit(run, LENGTH, *parts("Record", file=tmp_path / "steps"), drop=True, fresh=False)
        assert process.wait() == 2, process.text
        folder.chmod(0o755)
        assert re.fullmatch(rf"error: run: \S+{named} cannot be written: Permission denied\. .*", one_line(process))
        assert not (tmp_path / "steps").exists()
        assert not (run / "config.yaml").exists()


def test_a_checkpoint_folder_that_can_no_longer_be_written_stops_training_at_the_next_save(fit, unbroken, tmp_path):
    run, file = tmp_path / "run", tmp_path / "steps"
    process = fit(run, LENGTH, *OFTEN, *parts("Record", file=file), *parts("Slow", step=0.05), drop=True)
    step = until(lambda: (run / "checkpoints" / "newest.json").exists() and good(run)[1], process)
    (run / "checkpoints").chmod(0o555)
    assert process.wait() == 1, process.text
    (run / "checkpoints").chmod(0o755)
    assert step == EVERY
    said = f"{name_of(2 * EVERY)}: the checkpoint of step {2 * EVERY} cannot be written: Permission denied. Training"
    assert said in one_line(process)
    assert recorded(file)[-1]["step"] == 2 * EVERY
    assert good(run)[1:] == (EVERY, [])
    if FULL:
        assert fit(run, LENGTH, *OFTEN).wait() == 0
        same_end(run, unbroken[0])


# 6. values that are not finite


def test_losses_that_are_not_finite_stop_the_command_and_are_in_no_checkpoint(fit, tmp_path):
    run, file = tmp_path / "run", tmp_path / "steps"
    words = ["--guard.patience=20", *parts("Record", file=file), *parts("Poison", step=15)]
    process = fit(run, LENGTH, *OFTEN, *words)
    assert process.wait() == 1, process.text
    said = "error: step 35, rank 0: the loss is not finite, the step was skipped, 20 in a row (guard.patience)"
    assert one_line(process).startswith(said)
    assert recorded(file)[-1]["step"] == 35
    found = checkpoints_in(run / "checkpoints")
    assert [p.name for p in found] == [name_of(20), name_of(30)]
    contents = [load(path) for path in found]
    assert [non_finite({"all": content}) for content in contents] == [[], []]
    for part in ("state_dict", "optimizer_states", "ema"):  # nothing changed after the first one
        kept = [{k: v for k, v in flat(c[part]).items() if k != ".step" and not k.endswith("lr")} for c in contents]
        assert kept[0] == kept[1]
    if FULL:
        assert fit(run, LENGTH, *OFTEN).wait() == 0


# 10. content that is more than data, files that are elsewhere, and files without a manifest


class Payload:
    """Create a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def validate(start, tmp_path):
    """Return a function that starts `validate` of a checkpoint."""

    def run(path, **options):
        argv = ["validate", "--config", CONFIG, *TINY, "--run", tmp_path / "validated", "--ckpt_path", path]
        return start(*argv, fresh=False, **options)

    return run


def test_a_malicious_checkpoint_is_refused_and_not_run(fit, validate, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "step-1.ckpt"
    torch.save({"state_dict": {}, "evil": Payload(marker)}, path)
    for process in (fit(tmp_path / "run", 3, "--ckpt_path", path, fresh=False), validate(path)):
        assert process.wait() == 2, process.text
        assert re.search(r"step-1.ckpt: .*(posix|nt).mkdir", one_line(process))
        assert not marker.exists()


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/step-1.ckpt", "s3://bucket/step-1.ckpt"])
def test_a_checkpoint_elsewhere_is_refused(path, fit, validate, tmp_path):
    for process in (fit(tmp_path / "run", 3, "--ckpt_path", path, fresh=False), validate(path)):
        assert process.wait() == 2, process.text
        assert one_line(process).startswith(f"error: {path}: checkpoints are local files.")


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory, zygote):
    """Return a run that was stopped after 11 steps and has checkpoints of steps 10 and 11."""
    folder = tmp_path_factory.mktemp("stopped")
    words = [*TINY, "--run", str(folder / "run"), f"--trainer.max_steps={LENGTH}", *OFTEN]
    process = Process(zygote, folder, False, argv=["fit", "--config", CONFIG, *words, *parts("Signal", step=EVERY)])
    assert process.wait() == 143, process.text
    return folder / "run"


@pytest.fixture
def stopped(stopped_run, tmp_path):
    return shutil.copytree(stopped_run, tmp_path / "stopped")


HYPER = [
    {"_instantiator": "payload.run"},
    {"_class_path": "payload.Module"},
    {"_class_path": "payload.Module", "_instantiator": "payload.run"},
    {"_class_path": "payload.Module", "_instantiator": "lightning.pytorch.cli.instantiate_module"},
]


def test_names_of_code_in_a_checkpoint_do_nothing(stopped, fit, validate, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "step-1.ckpt"
    (tmp_path / "payload.py").write_text(
        f"import os\nimport lightning.pytorch as L\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
        "def run(*_): pass\nclass Module(L.LightningModule): pass\n",
        encoding="utf-8",
    )
    content = load(good(stopped)[0])
    for i, payload in enumerate(HYPER):
        torch.save({**content, "hyper_parameters": payload}, path)
        words = [13, "--ckpt_path", path]
        started = [fit(tmp_path / f"run-{i}", *words, modules=str(tmp_path), fresh=False)] if FULL or i == 2 else []
        for process in [validate(path, modules=str(tmp_path)), *started]:
            code = process.wait()
            assert not marker.exists()
            assert code == 0, process.text


def test_a_checkpoint_without_a_manifest_is_passed_over_and_can_be_named(stopped, fit, validate, tmp_path):
    path, step, _ = good(stopped)
    assert step == EVERY + 1
    path.with_name(path.name + ".json").unlink()
    named = validate(path)
    assert named.wait() == 0, named.text
    branch = fit(tmp_path / "branch", 13, "--ckpt_path", path, fresh=False)
    assert branch.wait() == 0, branch.text
    assert good(tmp_path / "branch")[1] == 13
    process = fit(stopped, 13, *OFTEN, fresh=False)
    assert process.wait() == 0, process.text
    assert f"passed over: {path}: has no manifest" in process.text
    assert f"from step {EVERY} " in process.text


# 11. unusual environments


def test_odd_paths_homes_languages_and_clocks_make_no_difference(fit, unbroken, tmp_path):
    run = tmp_path / "ein Lauf, größer – 実験"
    (tmp_path / "file").write_text("", encoding="utf-8")
    odd = {"HOME": str(tmp_path / "file" / "home"), "LANG": "C", "LC_ALL": "C", "TZ": "Asia/Kathmandu"}
    process = fit(run, LENGTH, *OFTEN, *parts("Signal", step=37), env=odd)
    assert process.wait() == 143, process.text
    assert good(run)[1:] == (38, [])
    process = fit(run, LENGTH, *OFTEN, env={"TZ": "America/Los_Angeles"})
    assert process.wait() == 0, process.text
    same_end(run, unbroken[0])


def test_a_signal_to_the_whole_group_leaves_the_workers_to_their_step(fit, tmp_path):
    """Schedulers send SIGTERM to all processes of a job, including the workers of the loader."""
    run = tmp_path / "run"
    process = fit(run, 100_000, "--data.resident=false", "--data.workers=2", "--checkpoint.every=5")
    until(lambda: checkpoints_in(run / "checkpoints"), process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143, process.text
    assert "stopped by a signal" in process.text
    assert newest(run / "checkpoints")[0] is not None
