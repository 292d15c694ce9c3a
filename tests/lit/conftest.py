from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.datamodule import ImageShards
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.networks.unet import UNet


@pytest.fixture(autouse=True)
def nothing_brought(monkeypatch):
    """Let a module bring nothing but a guard: these tests name their callbacks, tests/test_functions.py the others."""

    def guard(trainer):
        return [] if any(isinstance(callback, Guard) for callback in trainer.callbacks) else [Guard()]

    monkeypatch.setattr("lightning_tdisent.lit.callbacks.brought.brought", guard)


@pytest.fixture
def tiny():
    """Return a factory of small networks of the digits' shape."""

    def make(**options):
        return UNet(
            **{"shape": [1, 8, 8], "channels": [8, 16], "layers": 1, "groups": 4, "mid_attention": False, **options}
        )

    return make


@pytest.fixture
def data(digits):
    return lambda **options: ImageShards(**{"path": str(digits), "channels": 1, "batch_size": 32, **options})


def cleared(folder):
    """Remove the weights of an earlier training, which the next one would refuse to overwrite."""
    (Path(folder) / "model.safetensors").unlink(missing_ok=True)


@pytest.fixture
def trainer(tmp_path):
    """Return a factory of Trainers like those of the command line, in a temporary run folder."""

    def make(steps, *callbacks, ema=0.9, **options):
        options = {
            "max_epochs": -1,
            "val_check_interval": steps,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            **options,
        }
        always = [EMA(ema), LossPerState(), Export()]
        cleared(options["default_root_dir"])
        return L.Trainer(max_steps=steps, callbacks=[*callbacks, *always], **options)

    return make


@pytest.fixture
def make(tiny):
    def module(cls=ReducedStates, net=tiny, **options):
        torch.manual_seed(7)
        return cls(net(), LatentStates(S=4), **{"lr": 0.01, "warmup": 3, **options})

    return module


@pytest.fixture
def fit(data, tmp_path):
    """Return a function that trains as the command line does, with the same order of callbacks."""

    def run(module, steps, *callbacks, ema=None, guard=None, ckpt_path=None, batch_size=32, **options):
        L.seed_everything(0, verbose=False)
        options = {
            "val_check_interval": steps * options.get("accumulate_grad_batches", 1),
            "log_every_n_steps": 5,
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            **options,
        }
        if ckpt_path is None:
            cleared(options["default_root_dir"])
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            callbacks=[*callbacks, ema or EMA(0.9), LossPerState(), guard or Guard(), Export()],
            **options,
        )
        trainer.fit(module, datamodule=data(batch_size=batch_size), ckpt_path=ckpt_path)
        return trainer

    return run
