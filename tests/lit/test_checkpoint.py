"""The `Checkpoint` callback: when checkpoints are saved, which are kept, and the checks before training."""

import errno
import json
import os
import pty
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.lit import checkpoints
from lightning_tdisent.lit.callbacks import checkpoint as module
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.checkpoints import DurableIO, load, newest, non_finite, verify
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.runs import checkpoints_in


@pytest.fixture
def fit(tiny, data, trainer, tmp_path):
    """Train a tiny model with a `Checkpoint`; return the steps of the checkpoints that remain."""

    def run(count, *callbacks, **options):
        torch.manual_seed(0)
        model = ReducedStates(tiny(), LatentStates(S=4))
        options = {"plugins": [DurableIO()], "val_check_interval": 1000, "enable_checkpointing": True, **options}
        trainer(count, *callbacks, **options).fit(model, datamodule=data())
        return [int(path.stem[5:]) for path in checkpoints_in(tmp_path / "checkpoints")]

    return run


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [7]),
        ({"every": 2}, [6, 7]),
        ({"every": 2, "keep": 1}, [7]),
        ({"every": 3, "keep": 9}, [3, 6, 7]),
        ({"every": 7, "keep": 9}, [7]),
        ({"minutes": 0, "keep": 4}, [4, 5, 6, 7]),
    ],
)
def test_checkpoints_are_saved_at_intervals_and_the_newest_are_kept(options, left, fit):
    assert fit(7, Checkpoint(**options)) == left


def test_checkpoints_are_saved_by_time(fit, monkeypatch):
    now = 0.0

    def clock():
        nonlocal now
        now += 20.0  # the clock is read once per step, and once more at each save
        return now

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    assert fit(40, Checkpoint(keep=9)) == [16, 32, 40]  # 5 minutes have passed at the 16th reading after a save


def test_a_checkpoint_describes_itself_and_the_pointer_names_the_newest(fit, tmp_path):
    fit(5, Checkpoint(every=2))
    folder = tmp_path / "checkpoints"
    path, manifest, bad = newest(folder)
    assert (path.name, bad) == ("step-000000005.ckpt", [])
    assert json.loads((folder / "newest.json").read_text(encoding="utf-8")) == {
        "schema": 1,
        "file": path.name,
        "step": 5,
        "sha256": manifest["sha256"],
    }
    facts = {k: manifest[k] for k in ("schema", "step", "images_seen", "rows", "fingerprint", "bytes")}
    states = LatentStates(S=4)
    assert facts == {
        "schema": 1,
        "step": 5,
        "images_seen": 160,
        "rows": [1, 2, 3, 4],
        "fingerprint": states.fingerprint,
        "bytes": path.stat().st_size,
    }


def test_lightnings_own_callback_writes_verified_files_too(fit, tmp_path):
    own = ModelCheckpoint(tmp_path / "own", monitor="val/eps_mse", save_last=True, save_top_k=2)
    assert fit(6, own, Checkpoint(), val_check_interval=3) == [6]
    files = sorted((tmp_path / "own").glob("*.ckpt"))
    assert [verify(path)["step"] for path in files] == [3, 6, 6]
    assert [load(path)["global_step"] for path in files] == [3, 6, 6]


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_refused_before_the_first_step(fit, monkeypatch, tmp_path, tiny):
    weights = 4 * sum(p.numel() for p in tiny().parameters())
    size = 4 * weights  # weights, two moments of AdamW, one average

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * size, 0, 3 * size - 1))
    with pytest.raises(InputError, match=r"free, but 3 checkpoints of .* Make room, choose another --run, or lower"):
        fit(1, Checkpoint())
    assert checkpoints_in(tmp_path / "checkpoints") == []
    assert fit(1, Checkpoint(keep=1)) == [1]
    shutil.rmtree(tmp_path / "checkpoints")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * size, 0, 3 * size))
    assert fit(2, Checkpoint())[-1] == 2


def test_averages_count_in_the_required_disk_space(tiny, data, monkeypatch, tmp_path):
    weights = 4 * sum(p.numel() for p in tiny().parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3 * 5 * weights - 1))
    callbacks = [EMA(lengths=[0.05, 0.1]), Checkpoint()]
    trainer = L.Trainer(callbacks=callbacks, default_root_dir=tmp_path, max_steps=1, logger=False, accelerator="cpu")
    with pytest.raises(InputError, match="3 checkpoints of"):
        trainer.fit(ReducedStates(tiny(), LatentStates(S=4)), datamodule=data())


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(fit, tmp_path):
    (tmp_path / "checkpoints").write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match=r"checkpoints cannot be written: File exists. Choose another --run"):
        fit(1, Checkpoint())


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("keep", 0), ("minutes", -1)])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=rf"checkpoint.{name}: at least \d, got {value}"):
        Checkpoint(**{name: value})


def test_what_is_not_finite_is_named_and_not_saved(tmp_path):
    good, nan, inf = torch.ones(3), torch.tensor([1.0, float("nan")]), torch.tensor([float("-inf")])
    large = torch.full((4,), 3e38)  # their sum overflows, they do not
    state = {"state_dict": {"a": good, "b": large}, "optimizer_states": [{"state": {0: {"exp_avg": good}}}]}
    assert non_finite(state) == []
    state["optimizer_states"][0]["state"][0]["exp_avg"] = inf
    state["state_dict"]["c"] = nan
    state["callbacks"] = {"best": torch.tensor(float("inf"))}  # as of an EarlyStopping before its first value
    assert non_finite(state) == ["state_dict.c", "optimizer_states.0.state.0.exp_avg"]
    with pytest.raises(Halted, match=r"x.ckpt: not saved at step 0: state_dict.c, optimizer.* \(2 in all\)"):
        DurableIO().save_checkpoint(state, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []
    torch.save(state, tmp_path / "y.ckpt")
    with pytest.raises(
        InputError, match=r"y.ckpt: not loaded: state_dict.c.* \(2 in all\) hold values that are not finite"
    ):
        load(tmp_path / "y.ckpt")
    del state["state_dict"]["c"], state["optimizer_states"]
    torch.save(state, tmp_path / "y.ckpt")
    assert load(tmp_path / "y.ckpt")["callbacks"]["best"] == torch.inf


def test_the_bytes_are_a_function_of_the_content(tmp_path):
    state = {"global_step": 3, "state_dict": {f"w{i}": torch.randn(1000, 30) for i in range(20)}, "epoch": 0}
    for name in ("a", "b"):
        DurableIO().save_checkpoint(state, tmp_path / name / "step-000000003.ckpt")
    a, b = (newest(tmp_path / name)[1] for name in ("a", "b"))
    assert a["sha256"] == b["sha256"]
    back = load(tmp_path / "a" / "step-000000003.ckpt")
    assert all(torch.equal(back["state_dict"][k], w) for k, w in state["state_dict"].items())


def test_a_tensor_larger_than_one_read_gives_is_saved(tmp_path, monkeypatch):
    """One pread of the kernel returns at most 2 GB; the test limits it to 1 MB, for a tensor of 8 MB."""
    pread, most = os.pread, 2**20
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, most), at))
    monkeypatch.setattr(checkpoints, "PIECE", most)
    weights = torch.arange(2**21, dtype=torch.float32)
    path = tmp_path / "step-1.ckpt"
    DurableIO().save_checkpoint({"global_step": 1, "weights": weights}, path)
    assert torch.equal(load(path)["weights"], weights)
    assert verify(path)["bytes"] > 2**23


def test_a_terminal_closed_before_sighup_is_handled_does_not_end_the_training(fit, monkeypatch):
    """Between the closing of a terminal and the handler of SIGHUP, writes to the terminal fail."""
    master, slave = pty.openpty()
    stream = os.fdopen(slave, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)

    class Talk(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                os.close(master)
            print("step", trainer.global_step, flush=True)

    with stream:
        assert fit(4, Checkpoint(every=2), Talk()) == [2, 4]
        assert sys.stdout is stream


def test_other_errors_of_a_terminal_are_errors():
    def full(text):
        raise OSError(errno.ENOSPC, "No space left")

    with pytest.raises(OSError, match="No space"):
        module._Terminal(SimpleNamespace(write=full)).write("x")
