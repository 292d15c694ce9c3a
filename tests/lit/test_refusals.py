"""Options, arguments and callbacks with no effect, or a wrong one, are refused before the first step."""

import math

import jsonargparse
import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner

from lightning_tdisent.cli import main
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.datamodule import ImageShards, Seeds
from lightning_tdisent.lit.inference import as_batch
from lightning_tdisent.lit.modules import ReducedStates, SingleState
from lightning_tdisent.lit.prior import PriorModule
from lightning_tdisent.lit.saved_config import SaveConfig
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.priors.flow import Flow


def own(folder, *callbacks, **options):
    """Return a Trainer without any part of this project."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    kept = {"enable_checkpointing": False, "limit_val_batches": 0, "default_root_dir": folder}
    return L.Trainer(accelerator="cpu", callbacks=[*callbacks], **{"max_steps": 2, **quiet, **kept, **options})


@pytest.mark.parametrize(
    ("value", "options", "said"),
    [
        (-1, {}, "k: at least 0, got -1"),
        (math.nan, {}, "k: a number, at least 0, got nan"),
        (math.inf, {}, "k: a number, at least 0, got inf"),
        ("1", {}, "k: a number, at least 0, got 1"),
        (True, {}, "k: a number, at least 0, got True"),
        (0, {"above": True}, "k: above 0, got 0"),
        (1.5, {"most": 1}, "k: from 0 to 1, got 1.5"),
        (2.0, {"whole": True}, "k: an integer, at least 0, got 2.0"),
        (2**32, {"most": 2**32 - 1, "whole": True}, "k: from 0 to 4294967295, got 4294967296"),
    ],
)
def test_numbers_out_of_range_are_named(value, options, said):
    with pytest.raises(InputError) as refusal:
        check_number("k", value, **options)
    assert str(refusal.value) == said
    assert (refusal.value.key, refusal.value.value) == ("k", value) or math.isnan(value)
    check_number("k", 1, **options)


def facts(error):
    return error.key, error.expected, str(error.value)


ARGUMENTS = [
    ("model.lr", "above 0", "0", {"lr": 0}),
    ("model.lr", "above 0", "-1", {"lr": -1}),
    ("model.lr", "a number, above 0", "nan", {"lr": math.nan}),
    ("model.clip_norm (null for none)", "above 0", "0", {"clip_norm": 0}),
    ("model.clip_norm (null for none)", "above 0", "-1.0", {"clip_norm": -1.0}),
    ("model.weight_decay", "at least 0", "-0.1", {"weight_decay": -0.1}),
    ("model.warmup", "at least 0", "-5", {"warmup": -5}),
    ("model.warmup", "an integer, at least 0", "2.5", {"warmup": 2.5}),
    ("model.label_drop", "from 0 to 1", "2", {"label_drop": 2}),
    ("model.label_drop", "from 0 to 1", "-1", {"label_drop": -1}),
    ("model.decay", "constant or cosine", "cosin", {"decay": "cosin"}),
    ("model.draw", "balanced or iid", "balance", {"draw": "balance"}),
]


@pytest.mark.parametrize(("key", "expected", "value", "options"), ARGUMENTS)
def test_arguments_of_modules_have_ranges(key, expected, value, options, tiny):
    with pytest.raises(InputError) as refusal:
        ReducedStates(tiny(), LatentStates(S=4), **options)
    assert facts(refusal.value) == (key, expected, value)
    if not options.keys() & {"label_drop", "draw"}:
        with pytest.raises(InputError) as refusal:
            PriorModule(Flow([1, 8, 8]), LatentStates(S=4), 4, **options)
        assert facts(refusal.value) == (key, expected, value)


@pytest.mark.parametrize(
    ("key", "expected", "value", "build"),
    [
        ("model.experts", "at least 1", "0", lambda: SingleState(UNet([1, 8, 8], [32]), LatentStates(S=4), experts=0)),
        ("model.expert", "at least 1", "0", lambda: SingleState(UNet([1, 8, 8], [32]), LatentStates(S=4), expert=0)),
        ("losses.bins", "at least 1", "0", lambda: LossPerState(0)),
        ("guard.patience", "at least 1", "0", lambda: Guard(0)),
        ("checkpoint.minutes", "a number, at least 0", "nan", lambda: Checkpoint(minutes=math.nan)),
        ("checkpoint.every", "an integer, at least 1", "2.5", lambda: Checkpoint(every=2.5)),
        ("ema.snapshot_every", "an integer, at least 1", "2.5", lambda: EMA(snapshot_every=2.5)),
        ("ema.lengths", "each must differ from the others", "[0.1, 0.1]", lambda: EMA(lengths=[0.1, 0.1])),
        ("Pictures.samples", "at least 1", "0", lambda: Pictures(0)),
        ("Pictures.strips", "at least 1", "0", lambda: Pictures(strips=0)),
        ("Pictures.first_seed", "from 0 to 4294967232", "-1", lambda: Pictures(first_seed=-1)),
        ("SampleQuality.batch_size", "at least 1", "0", lambda: SampleQuality("digits", batch_size=0)),
        ("data.workers", "at least 0", "-1", lambda: ImageShards("data/digits", 1, workers=-1)),
        ("data.workers", "an integer, at least 0", "None", lambda: ImageShards("data/digits", 1, workers=None)),
        ("data.batch_size", "an integer, at least 1", "None", lambda: ImageShards("data/digits", 1, batch_size=None)),
        ("data.val", "expected text", "3", lambda: ImageShards("data/digits", 1, val=3)),
        ("data.train", "expected text", "''", lambda: ImageShards("data/digits", 1, train="")),
        ("data.verify", "expected true or false", "None", lambda: ImageShards("data/digits", 1, verify=None)),
        ("data.batch_size", "an integer, at least 1", "8.5", lambda: ImageShards("data/digits", 1, batch_size=8.5)),
        ("data.n", "from 1 to 4294967296", "0", lambda: Seeds(0)),
        ("data.first", "from 0 to 4294967232", "-1", lambda: Seeds(64, -1)),
        ("data.batch_size", "at least 1", "0", lambda: Seeds(batch_size=0)),
    ],
)
def test_arguments_of_callbacks_and_data_have_ranges(key, expected, value, build):
    with pytest.raises(InputError) as refusal:
        build()
    assert facts(refusal.value) == (key, expected, value)


@pytest.mark.parametrize(
    "option", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0}, {"gradient_clip_algorithm": "value"}]
)
def test_clipping_by_the_trainer_is_refused(option, make, data, tmp_path):
    ((name, value),) = option.items()
    with pytest.raises(InputError, match=rf"^trainer.{name}: {value} has no effect.*set model.clip_norm$"):
        own(tmp_path, **option).fit(module := make(), datamodule=data())
    assert module.images_seen == 0


class TwoGroups(ReducedStates):
    """A module with its own optimizer, whose groups have different learning rates."""

    def configure_optimizers(self):
        first, *rest = self.denoiser.parameters()
        groups = [{"params": [first], "lr": 0.0}, {"params": rest, "lr": 1.0, "weight_decay": 0.5}]
        optimizer = torch.optim.SGD(groups)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


def test_the_groups_of_a_user_optimizer_are_clipped_and_keep_their_rates(make, data, tmp_path):
    module = make(TwoGroups, clip_norm=1e-4)
    before = [p.detach().clone() for p in module.denoiser.parameters()]
    trainer = own(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data())
    assert [(g["lr"], g["weight_decay"]) for g in trainer.optimizers[0].param_groups] == [(0.0, 0), (1.0, 0.5)]
    moved = [(p - old) + 0.5 * old for p, old in zip(module.denoiser.parameters(), before, strict=True)][1:]
    assert torch.equal(next(module.denoiser.parameters()), before[0])
    assert float(torch.cat([m.flatten() for m in moved]).detach().norm()) <= 1.01e-4


CALLBACKS = [
    (lambda: GradientAccumulationScheduler({1: 2}), "trainer.accumulate_grad_batches"),
    (LearningRateFinder, "set model.lr"),
    (BatchSizeFinder, "set data.batch_size"),
]
CHANGING = [
    lambda: ModelPruning("l1_unstructured", amount=0.5),
    lambda: StochasticWeightAveraging(0.01),
    lambda: EMAWeightAveraging(),
]


@pytest.mark.parametrize(("build", "remedy"), [*CALLBACKS, *((build, "ema.decay") for build in CHANGING)])
def test_callbacks_whose_effect_would_be_lost_are_refused(build, remedy, make, data, tmp_path):
    with pytest.raises(InputError) as refusal:
        own(tmp_path, callback := build(), EMA(0.9), Export()).fit(module := make(), datamodule=data())
    assert str(refusal.value).startswith(f"trainer.callbacks: {type(callback).__name__} ")
    assert remedy in str(refusal.value)
    assert module.images_seen == 0
    assert not list(tmp_path.iterdir())


def test_a_tuner_searches_apart_from_the_run(make, data, tmp_path):
    trainer, module, shards = own(tmp_path), make(), data()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = Tuner(trainer).lr_find(module, datamodule=shards, num_training=40)
    assert module.lr == found.suggestion() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    trainer.fit(module, datamodule=shards)
    assert module.images_seen == 2 * 32


MONITORS = [
    (lambda: EarlyStopping("val/nothing"), {}, "val/nothing"),
    (lambda: ModelCheckpoint(monitor="val/x0"), {}, "Did you mean 'val/x0_mse'?"),
    (lambda: ModelCheckpoint(monitor="val_x0_mse/t0001"), {}, "val_x0_mse/t0001"),
    (lambda: EarlyStopping("val/x0_mse"), {"limit_val_batches": 0}, "val/x0_mse"),
    (lambda: EarlyStopping("train/los"), {}, "Did you mean 'train/loss'?"),
    (lambda: EarlyStopping("quality/fd_digits"), {}, "quality/fd_digits"),
]


@pytest.mark.parametrize(("build", "options", "said"), MONITORS)
def test_monitors_of_metrics_that_nothing_logs_are_refused(build, options, said, make, data, tmp_path):
    kept = {"limit_val_batches": 1, "enable_checkpointing": True, **options}
    with pytest.raises(
        InputError, match=r"^trainer.callbacks: \w+.monitor: nothing logs .* There are: .*train/loss"
    ) as e:
        own(tmp_path, build(), LossPerState(), **kept).fit(module := make(), datamodule=data())
    assert said in str(e.value)
    assert module.images_seen == 0


class Logged(ReducedStates):
    def on_train_epoch_end(self):
        self.log("mine", 1.0)


def test_what_is_logged_can_be_monitored(make, data, tmp_path):
    quality = SampleQuality("digits", n=70, n_real=80)
    names = ["val/x0_mse", "val_eps_mse/t0500", "train/loss", "train_loss/t0750", "step"]
    own(tmp_path, quality, limit_val_batches=1).validate(make(), datamodule=data(), verbose=False)
    names += [f"quality/fd_digits/{quality._quality.protocol.hash}"]
    best = [ModelCheckpoint(tmp_path / str(i), monitor=name) for i, name in enumerate(names)]
    options = {"limit_val_batches": 1, "enable_checkpointing": True, "log_every_n_steps": 1, "val_check_interval": 1}
    own(tmp_path, *best, LossPerState(), quality, **options).fit(make(), datamodule=data())
    assert all(callback.best_model_path for callback in best)
    best = [ModelCheckpoint(tmp_path / "mine", monitor="mine")]
    own(tmp_path, *best, max_steps=-1, max_epochs=1, limit_train_batches=1, enable_checkpointing=True).fit(
        make(Logged), datamodule=data()
    )
    assert best[0].best_model_path


class Lazy(Network):
    def __init__(self, shape: list[int], conditioning: str | None = None) -> None:
        super().__init__(shape, None, conditioning)
        self.conv = torch.nn.LazyConv2d(shape[0], 1)

    def forward(self, x, index=None, label=None):
        return self.conv(x)


def test_lazy_layers_are_refused():
    with pytest.raises(InputError, match=r"^model.network: network.conv.weight, network.conv.bias: .*lazy layers"):
        ReducedStates(Lazy([1, 8, 8]), LatentStates(S=4))


def test_a_batch_that_names_images_twice_is_refused():
    images = {"x0": torch.zeros(4, 1, 8, 8), "image": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}
    with pytest.raises(InputError, match="x0 and image each are images; give one"):
        as_batch(images, [1, 8, 8], None)


def test_a_missing_backbone_is_a_one_line_error(make, data, tmp_path):
    with pytest.raises(InputError, match=r"BackboneFinetuning needs .* backbone; ReducedStates has none"):
        own(tmp_path, BackboneFinetuning()).fit(make(), datamodule=data())


TINY = [
    "fit",
    "--config",
    "experiments/digits/reduced8.yaml",
    "--model.network.channels",
    "[8,16]",
    "--trainer.max_steps",
]
TINY += ["4", "--model.network.groups", "4", "--model.network.layers", "1", "--trainer.limit_val_batches", "0"]
TINY += ["--trainer.callbacks", "[]", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def run(*words):
    """Return the exit code of a command, which exits early if there is nothing to do."""
    try:
        return main([*words])
    except SystemExit as end:
        return end.code


def test_a_value_that_the_config_file_cannot_store_is_refused(tmp_path):
    class Dumps:  # as jsonargparse dumps, for example, a default that is a torch.device
        def dump(self, config, skip_none):
            part = "{class_path: a.B, init_args: {n: 1, device: Unable to serialize instance cpu}}"
            return f"run: {tmp_path}\ntrainer: {{callbacks: [{part}]}}"

    save = SaveConfig(Dumps(), jsonargparse.Namespace(ckpt_path=None))
    with pytest.raises(InputError, match=r"^trainer.callbacks.0.device: a value that config.yaml cannot store"):
        save.setup(own(tmp_path), None, "fit")
    assert not list(tmp_path.iterdir())


def test_fit_prints_where_the_weights_are_and_why_it_does_not_resume(tmp_path, capsys):
    def fit(*words):
        code = run(*TINY, "--run", str(tmp_path / "run"), *words)
        out = capsys.readouterr()
        lines = [line for line in out.out.strip().splitlines() if not line.startswith("draw images: ")]
        return code, lines[-1:], out.err.strip().splitlines()[-1:]

    epoch = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    assert fit(*epoch) == (0, [f"weights of step 3: {tmp_path / 'run' / 'model.safetensors'}"], [])
    ended = "ended at step 3 by trainer.max_epochs (1), trainer.max_time or a callback such as EarlyStopping"
    assert fit(*epoch)[:2] == (0, [f"{tmp_path / 'run'}: {ended}; change that to resume"])
    code, _, (said,) = fit(*epoch, "--trainer.max_steps", "20")  # max_epochs ends it again
    assert (code, "had ended at step 3, and no step was trained now: trainer.max_epochs, " in said) == (2, True)
    epoch[1] = "2"
    assert fit(*epoch)[1] == [f"weights of step 4: {tmp_path / 'run' / 'model.safetensors'}"]
    assert fit(*epoch)[1] == [f"{tmp_path / 'run'}: all 4 steps are done; give a larger --trainer.max_steps to resume"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_run_that_a_callback_ended_says_so(tmp_path, capsys):
    words = [*TINY, "--run", str(tmp_path / "run"), "--trainer.max_steps", "20", "--trainer.val_check_interval", "2"]
    words += ["--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0", "--trainer.callbacks"]
    stop = "[{class_path: EarlyStopping, init_args: {monitor: val/x0_mse, patience: 1, min_delta: 10.0}}]"
    assert run(*words, stop) == 0
    assert "weights of step 4: " in capsys.readouterr().out
    assert run(*words, stop) == 0
    assert "ended at step 4 by trainer.max_time or a callback such as EarlyStopping" in capsys.readouterr().out
    assert run(*words, "[]") == 0
    assert "weights of step 20: " in capsys.readouterr().out


def test_without_log_points_nothing_is_logged(make, data, tmp_path):
    losses = LossPerState()
    own(tmp_path, losses, log_every_n_steps=0, max_steps=3).fit(module := make(), datamodule=data())
    assert module.images_seen == 3 * 32
    assert losses.last == (0, {})


@pytest.mark.parametrize("seed", ["-3", "5000000000", "true"])
def test_seeds_that_would_be_replaced_are_refused(seed, tmp_path, capsys):
    words = ["fit", "--config", "experiments/digits/reduced8.yaml", "--run", str(tmp_path / "run")]
    assert main([*words, "--seed_everything", seed]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "seed_everything: " in said
    assert "from 0 to 4294967295" in said
    assert not (tmp_path / "run").exists()
