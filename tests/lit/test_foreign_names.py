"""A user's networks, callbacks, data modules, loggers and optimizers may use any attribute name."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import Logger
from torch import nn

from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM
from lightning_tdisent.studies.plan import Role

NAMES = """
start expect residency prior check_label filled differs at rows states objective network denoiser dropout last sums
rehearse logged_by validated held_out training_images images digest lost shards share decoder image_shape measured
images_seen walked start_error updates averages before kinds report saved tell run round seed _early_exit strict
backbone _digests whole network_is_random
"""  # attribute names that this project uses


def called(*_, **__):
    raise AssertionError("this is somebody else's")


ODD = [called, torch.ones(2), "text"]  # values that raise if the project uses them by mistake


def mark(thing, odd, *but):
    for name in [*NAMES.split(), "classes"]:
        if name not in but:
            object.__setattr__(thing, name, odd)
    return thing


class Net(Network):
    def __init__(self, shape, classes=None, conditioning=None):
        super().__init__(shape, classes, conditioning)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x, index=None, label=None):
        return self.layers(x)


class Functions(Net):
    def __init__(self, shape, classes=None, conditioning=None):
        super().__init__(shape, classes, conditioning)
        mark(self, called, "classes")


class Tensors(Net):
    def __init__(self, shape, classes=None, conditioning=None):
        super().__init__(shape, classes, conditioning)
        mark(self, torch.ones(2), "classes")


class Texts(Net):
    def __init__(self, shape, classes=None, conditioning=None):
        super().__init__(shape, classes, conditioning)
        mark(self, "text", "classes")


class Plain(L.LightningDataModule):
    def __init__(self, images):
        super().__init__()
        self.all = images

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.all, 32)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.all[:64], 32)


class Memory(Logger):
    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, {name: v for name, v in metrics.items() if name != "train/images_per_second"}))

    def log_hyperparams(self, *_, **__):
        pass


def trained(folder, data, network, callback, logger, *more):
    """Train; return the weights, what was logged and reported, evaluation metrics, and images of the export."""
    L.seed_everything(0, verbose=False)
    module = ReducedStates(network([1, 8, 8]), LatentStates(S=4), lr=0.01, warmup=1)
    told = []
    own = [Export(), StepProgress(lambda *a: told.append((a[0], a[2].get("loss")))), EMA(0.9), LossPerState(), Guard()]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=10,
        max_epochs=-1,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=5,
        enable_model_summary=False,
        callbacks=[callback, *own, Checkpoint(every=5), *more],
        plugins=[DurableIO()],
        logger=logger,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)
    (numbers,) = trainer.validate(module, datamodule=data, verbose=False)
    images = torch.cat(list(sample(load_model(folder / "model.safetensors"), DDIM(), range(3))))
    return module.state_dict(), logger.logged, told, numbers, images


def same(a, b):
    (weights, *numbers, images), (other_weights, *other_numbers, other_images) = a, b
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert numbers == other_numbers
    assert numbers[0]
    assert numbers[1]
    assert torch.equal(images, other_images)


@pytest.mark.parametrize(("network", "odd"), zip([Functions, Tensors, Texts], ODD, strict=True))
def test_networks_callbacks_and_loggers_may_use_any_name(network, odd, data, tmp_path):
    more = lambda: [Pictures(4, 2), SampleQuality("digits", 20)] if odd is called else []  # noqa: E731
    plain = trained(tmp_path / "plain", data(val_limit=64), Net, L.Callback(), Memory(), *more())
    callback, logger = mark(L.Callback(), odd), mark(Memory(), odd)
    same(plain, trained(tmp_path / "odd", data(val_limit=64), network, callback, logger, *more()))


@pytest.mark.parametrize("odd", ODD)
def test_data_modules_may_use_any_name(odd, data, tmp_path):
    images = data(val_limit=400).held_out.images[:320]
    plain = trained(tmp_path / "plain", Plain(images), Net, L.Callback(), Memory())
    same(plain, trained(tmp_path / "odd", mark(Plain(images), odd), Net, L.Callback(), Memory()))


def test_a_held_out_set_of_another_data_module_is_left_alone(data, tmp_path):
    class Fetched(Plain):
        @property
        def held_out(self):
            raise AssertionError("this is somebody else's")

    images = data(val_limit=400).held_out.images[:320]
    same(*(trained(tmp_path / d.__name__, d(images), Net, L.Callback(), Memory()) for d in (Plain, Fetched)))


class Foreign(L.LightningModule):
    """A model of another kind with attribute names of this project: ``classes`` are strings, as in a classifier."""

    def __init__(self):
        super().__init__()
        self.layer, self.classes, self.states, self.network = nn.Conv2d(1, 1, 1), ["zero", "one"], 3, "resnet"

    def training_step(self, batch, _):
        return self.layer(batch["image"].float()).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def test_modules_of_other_projects_can_use_the_data_module(data, tmp_path, monkeypatch):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Foreign(), datamodule=data(val_limit=64))
    assert trainer.global_step == 2
    from lightning_tdisent.cli import trainings
    from lightning_tdisent.lit import entry

    monkeypatch.setattr(entry, "parse", lambda argv: type("Parsed", (), {"model": Foreign(), "datamodule": None}))
    assert trainings.role(["fit"]) == Role("", "Foreign", None)


class Scheduler(GradientAccumulationScheduler):
    _early_exit = True


def test_what_is_refused_is_refused_whatever_its_attributes(make, data, tmp_path):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, callbacks=[Scheduler({0: 2})], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(InputError, match="Scheduler accumulates another number of batches"):
        trainer.fit(make(), datamodule=data(val_limit=64))


class Descent(torch.optim.Optimizer):
    """An optimizer without ``found_inf`` that gives ``fused`` another meaning."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01, "fused": True})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= 0.01 * p.grad
        return loss


class Spoilt(ReducedStates):
    def configure_optimizers(self):
        return Descent(self.denoiser.parameters())

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        return out if batch_idx != 1 else out | {"loss": out["loss"] * torch.nan}


def test_a_step_is_skipped_by_an_optimizer_that_calls_something_else_fused(data, tmp_path, capsys):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    module = Spoilt(Net([1, 8, 8]), LatentStates(S=4))
    before = [p.detach().clone() for p in module.denoiser.parameters()]
    trainer.fit(module, datamodule=data(val_limit=64))
    assert "step 2, rank 0: the gradient is not finite, the step was skipped" in capsys.readouterr().err
    assert all(p.isfinite().all() for p in module.denoiser.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, module.denoiser.parameters(), strict=True))
