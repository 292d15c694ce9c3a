"""Code that processes under test run besides the commands: callbacks for a command line, and loops of saves."""

import itertools
import json
import os
import resource
import time
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_tdisent.lit.checkpoints import DurableIO
from lightning_tdisent.runs import checkpoints_in


def state(step, kilobytes=3000):
    """Return a checkpoint in which every value is its step."""
    n = kilobytes * 1000 // 16
    named = {f"layer{i}.weight": torch.full((n // 4,), float(step)) for i in range(4)}
    moments = {i: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for i, w in enumerate(named.values())}
    return {
        "global_step": step,
        "epoch": 0,
        "state_dict": named,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-3}]}],
        "ema": {"weights": {name: w.clone() for name, w in named.items()}},
        "callbacks": {},
        "card": {"images_seen": 32 * step, "rows": [1], "fingerprint": "f" * 16},
    }


def saving(folder, first, noted):
    """Save one step after the other as training does, keep two, and record every finished save."""
    io, folder, note = DurableIO(), Path(folder), os.open(noted, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for step in itertools.count(first):
        io.save_checkpoint(state(step), folder / f"step-{step}.ckpt")
        os.write(note, b"%d\n" % step)
        for old in checkpoints_in(folder)[:-2]:
            io.remove_checkpoint(old)


def save_one(folder, step, kilobytes):
    """Save one checkpoint, and print the outcome."""
    try:
        DurableIO().save_checkpoint(state(step, kilobytes), Path(folder) / f"step-{step}.ckpt")
        print("saved")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


class Record(L.Callback):
    """Write step, sample ids and losses of every step as a line of JSON, to one file per rank."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        line = {
            "step": trainer.global_step,
            "ids": batch["id"].tolist(),
            "losses": [loss.hex() for loss in outputs["losses"].tolist()],
        }
        rank = trainer.global_rank
        with Path(f"{self.file}.{rank}" if rank else self.file).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Signal(L.Callback):
    """Send this process a signal in the middle of a step, or in a hook before the first one."""

    def __init__(self, number: int = 15, step: int = -1, times: int = 1, hook: str = "") -> None:
        self.number, self.step, self.times, self.hook = number, step, times, hook

    def setup(self, trainer, pl_module, stage):
        if self.hook == "setup":
            os.kill(os.getpid(), self.number)

    def on_fit_start(self, trainer, pl_module):
        if self.hook == "on_fit_start":
            os.kill(os.getpid(), self.number)

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class Full(L.Callback):
    """Limit the size of files that rank 0 writes, once training has begun."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Slow(L.Callback):
    """Delay each step, a validation, or (on rank 0 only) the exit by some seconds."""

    def __init__(self, step: float = 0.0, validation: float = 0.0, leaving: float = 0.0) -> None:
        self.step, self.validation, self.leaving = step, validation, leaving

    def on_train_batch_end(self, trainer, pl_module, *_):
        time.sleep(self.step)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if self.validation:
            (Path(trainer.default_root_dir) / "validating").touch()
            time.sleep(self.validation)

    def on_exception(self, trainer, pl_module, exception):
        if trainer.is_global_zero:
            time.sleep(self.leaving)


class Poison(L.Callback):
    """Replace images by values that are not finite, from a given step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= self.step:
            batch["x0"] = torch.full(batch["image"].shape, float("nan"))


def train_in(folder):
    """Train from Python, with the user's own trainer, in a folder; print the outcome."""
    from lightning_tdisent.diffusion.states import LatentStates
    from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
    from lightning_tdisent.lit.datamodule import ImageShards
    from lightning_tdisent.lit.modules import SingleState
    from lightning_tdisent.networks.unet import UNet

    network = UNet([3, 8, 8], channels=[8, 16], groups=4)
    module = SingleState(network, LatentStates(S=8), expert=1)
    trainer = L.Trainer(
        default_root_dir=folder, max_steps=2, accelerator="cpu", logger=False, callbacks=[Checkpoint()],
        plugins=[DurableIO()],
    )  # fmt: skip
    try:
        trainer.fit(module, ImageShards("data/digits", batch_size=8))
        print("trained")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
