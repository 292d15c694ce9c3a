import copy
import sys
from datetime import timedelta

import lightning.pytorch as L
import pytest
import torch
from diffusers.training_utils import EMAModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.utils import clip_grad_norm_

from lightning_tdisent.diffusion.rng import draw_rows, key
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.averages import FOLDER, gamma
from lightning_tdisent.sampling.expert import load_expert
from lightning_tdisent.sampling.sampler import from_uint8


def vector(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def same(one, other):
    """Bitwise, also where there are NaNs, and of the same dtypes."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one.dtype == other.dtype and torch.equal(one, other)


def adam(trainer):
    """Its three numbers per weight; before the first step they are zero, or not there yet."""
    (optimizer,) = trainer.optimizers
    parameters = optimizer.param_groups[0]["params"]
    states = [optimizer.state.get(p, {}) for p in parameters]
    return {
        "step": torch.stack([torch.as_tensor(s.get("step", 0.0)) for s in states]),
        **{k: vector(s.get(k, torch.zeros_like(p)) for s, p in zip(states, parameters, strict=True)) for k in MOMENTS},
    }


MOMENTS = ("exp_avg", "exp_avg_sq")


class Watch(L.Callback):
    """Everything that moves, as it is before each batch and at the end; what each batch was."""

    def __init__(self):
        self.live, self.adam, self.averages = [], [], []
        self.batches, self.rows, self.losses, self.ids = [], [], [], []

    def _look(self, trainer, pl_module):
        self.live.append(vector(pl_module.denoiser.parameters()).clone())
        self.adam.append(adam(trainer))
        self.averages.append([a.clone() for c in trainer.callbacks if isinstance(c, EMA) for a in c.averages])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(copy.deepcopy(batch))
        self.rows.append(outputs["row"].clone())
        self.losses.append(outputs["losses"].clone())
        self.ids.append(batch["id"].tolist())

    def on_train_end(self, trainer, pl_module):
        self._look(trainer, pl_module)

    def moved(self):
        """Which batches changed the live weights."""
        return [not same(a, b) for a, b in zip(self.live, self.live[1:], strict=False)]

    def frozen(self, n):
        """Whether batch n (1, 2, ..) left everything as it was."""
        return all(same(kept[n - 1], kept[n]) for kept in (self.live, self.adam, self.averages))

    def named(self, n, positions):
        """Samples of batch n as the guard names them."""
        rows = self.rows[n - 1].tolist()
        return ", ".join(f"{self.ids[n - 1][i]} (state {rows[i]})" for i in positions)


class Explode(torch.autograd.Function):
    """The identity, whose gradient is infinite for one sample."""

    @staticmethod
    def forward(ctx, x, position):
        ctx.position = position
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.position] = float("inf")
        return gradient, None


class Poison(L.Callback):
    """Spoil a batch of some steps: the image, the loss (by a constant) or the gradient of a sample, or of a weight."""

    def __init__(self, steps, kind="image", position=5, micro=0, rank=0):
        self.steps, self.kind, self.position, self.micro, self.rank = steps, kind, position, micro, rank
        self.gradients, self.hooks = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        denoiser = pl_module.denoiser
        vars(denoiser).pop("loss", None)
        while self.hooks:
            self.hooks.pop().remove()
        here = (trainer.global_step + 1, batch_idx % trainer.accumulate_grad_batches, trainer.global_rank)
        if here not in [(step, self.micro, self.rank) for step in self.steps]:
            return
        if self.kind == "image":
            batch["image"] = batch["image"].float()
            batch["image"][self.position, 0, 3, 4] = float("nan")
            return
        if self.kind == "weight":
            first = next(denoiser.parameters())
            infinite = torch.zeros_like(first).index_fill_(0, torch.tensor([2]), float("inf"))
            self.hooks.append(first.register_hook(lambda gradient: gradient + infinite))
            return
        clean = denoiser.loss

        def loss(*args):
            if self.kind == "gradient":
                return Explode.apply(clean(*args), self.position)
            added = torch.zeros(len(args[0]))
            added[self.position] = float(self.kind)
            losses = clean(*args) + added
            own = torch.autograd.grad(losses.mean(), list(denoiser.parameters()), retain_graph=True)
            self.gradients.append(vector(own))
            return losses

        denoiser.loss = loss


class Unfused(ReducedStates):
    """With AdamW as a device without a fused kernel has it."""

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        assert optimizers[0].defaults["fused"]
        group = optimizers[0].param_groups[0]
        plain = torch.optim.AdamW(group["params"], self.lr, weight_decay=self.weight_decay, fused=False)
        rate = schedulers[0]["scheduler"].lr_lambdas[0]
        schedulers[0]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(plain, rate)
        return [plain], schedulers


class Memory(Logger):
    """Keeps what is logged, by images seen."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_, **__):
        pass


@pytest.fixture
def make(tiny):
    def module(cls=ReducedStates, net=tiny, **options):
        torch.manual_seed(7)
        return cls(net(), LatentStates(S=4), **{"lr": 0.01, "warmup": 3, **options})

    return module


@pytest.fixture
def fit(data, tmp_path):
    """Train as the command line does, its callbacks in its order."""

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


def reports(text):
    """What the guard said, among what others write to stderr."""
    return [line for line in text.splitlines() if line.startswith("step ")]


def recursion(trajectory, betas):
    """The averages in float64, from the live weights after each step."""
    average = None
    for n, live in enumerate(trajectory, 1):
        live = live.double()
        average = live if n == 1 else betas(n) * average + (1 - betas(n)) * live
        yield average


def power(sigma_rel):
    return lambda n: (1 - 1 / n) ** (gamma(sigma_rel) + 1)


# the averages


def test_the_average_is_that_of_diffusers(make, fit):
    class Oracle(L.Callback):
        gaps = []

        def on_fit_start(self, trainer, pl_module):
            self.model = EMAModel(pl_module.denoiser.parameters(), decay=0.7, foreach=True)

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.model.step(pl_module.denoiser.parameters())

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.gaps.append(float((ema.averages[0] - vector(self.model.shadow_params)).abs().max()))

    oracle, ema, module = Oracle(), EMA(0.7), make()
    fit(module, 30, oracle, ema=ema)
    oracle.on_train_batch_start(None, module)
    assert len(oracle.gaps) == 31
    assert max(oracle.gaps) < 1e-6
    assert ema.updates == 30
    assert float((ema.averages[0] - vector(module.denoiser.parameters())).abs().max()) > 1e-3


def test_decay_0_is_the_live_weights_at_every_step(make, fit, tmp_path):
    watch, module = Watch(), make()
    fit(module, 6, watch, ema=EMA(0))
    assert len(watch.live) == 7
    assert watch.moved() == [True] * 6
    for live, (average,) in zip(watch.live, watch.averages, strict=True):
        assert same(live, average)
    exported, card = load_expert(tmp_path / "model.safetensors")
    assert (card.weights, card.average, card.steps) == ("ema", {"decay": 0, "steps": 6}, 6)
    assert same(exported.state_dict(), module.denoiser.state_dict())


def test_without_averages_the_live_weights_are_exported(make, trainer, data, tmp_path):
    module = make()
    run = trainer(3)
    run.callbacks = [c for c in run.callbacks if not isinstance(c, EMA)]
    run.fit(module, datamodule=data())
    exported, card = load_expert(tmp_path / "model.safetensors")
    assert (card.weights, card.average, card.steps) == ("live", None, 3)
    assert same(exported.state_dict(), module.denoiser.state_dict())


def test_of_several_lengths_the_first_is_validated_and_exported(make, fit, tmp_path):
    class See(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            self.seen = vector(pl_module.denoiser.parameters()).clone()

    see, ema, module = See(), EMA(lengths=[0.05, 0.1]), make()
    fit(module, 12, see, ema=ema)
    exported, card = load_expert(tmp_path / "model.safetensors")
    assert (card.weights, card.average) == ("ema", {"sigma_rel": 0.05, "steps": 12})
    assert same(see.seen, ema.averages[0])
    assert same(vector(exported.parameters()), ema.averages[0])
    others = [ema.averages[1], vector(module.denoiser.parameters())]
    assert not any(same(see.seen, other) for other in others)


def test_snapshots_are_the_power_function_averages_at_their_steps(make, fit, tmp_path):
    watch, module = Watch(), make()
    fit(module, 13, watch, ema=EMA(lengths=[0.05, 0.1], snapshot_every=5))
    files = {path.name: load_expert(path) for path in (tmp_path / FOLDER).iterdir()}
    assert set(files) == {f"step-{n:09d}_{s:g}.safetensors" for n in (5, 10, 13) for s in (0.05, 0.1)}
    for sigma_rel in (0.05, 0.1):
        expected = dict(enumerate(recursion(watch.live[1:], power(sigma_rel)), 1))
        for n in (5, 10, 13):
            denoiser, card = files[f"step-{n:09d}_{sigma_rel:g}.safetensors"]
            torch.testing.assert_close(vector(denoiser.parameters()).double(), expected[n], rtol=0, atol=1e-5)
            assert (card.weights, card.average) == ("ema", {"sigma_rel": sigma_rel, "steps": n})
            assert (card.steps, card.images_seen) == (n, 32 * n)
            assert card.fingerprint == module.states.fingerprint
        assert (expected[13] - watch.live[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        ({"decay": 0.9}, {"decay": 0.99}),
        ({"decay": 0.9}, {"lengths": [0.05]}),
        ({"lengths": [0.05, 0.1]}, {"decay": 0.9}),
        ({"lengths": [0.05, 0.1]}, {"lengths": [0.1, 0.05]}),
        ({"lengths": [0.05]}, {"lengths": [0.05, 0.1]}),
    ],
)
def test_averages_of_another_kind_are_not_continued(make, fit, tmp_path, kept, asked):
    ema, other = EMA(**kept), EMA(**asked)
    fit(make(), 1, ema=ema).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError) as refusal:
        fit(make(), 2, ema=other, ckpt_path=tmp_path / "x.ckpt")
    assert str(refusal.value) == f"ema: the checkpoint has averages {ema.kinds}, the config {other.kinds}"
    assert ema.kinds != other.kinds


@pytest.mark.parametrize("options", [{"decay": 0.8}, {"lengths": [0.1, 0.05]}], ids=["decay", "lengths"])
def test_a_resumed_run_goes_on_with_its_averages(make, fit, tmp_path, options):
    first, second, ema = Watch(), Watch(), EMA(**options)
    fit(make(), 5, first, ema=EMA(**options)).save_checkpoint(tmp_path / "x.ckpt")
    fit(make(), 11, second, ema=ema, ckpt_path=tmp_path / "x.ckpt")
    assert same(first.averages[-1], second.averages[0])
    assert same(first.live[-1], second.live[0])
    betas = [power(s) for s in ema.lengths] or [lambda n: min(0.8, n / (9 + n))]
    for average, beta in zip(ema.averages, betas, strict=True):
        *_, expected = recursion(first.live[1:] + second.live[1:], beta)
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
    assert ema.updates == 11


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averages_begun_in_the_middle_of_a_run_move_once_a_step(make, fit, trainer, data, tmp_path, accumulate):
    run = trainer(4)
    run.callbacks = [c for c in run.callbacks if not isinstance(c, EMA)]
    run.fit(make(), datamodule=data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    watch, ema = Watch(), EMA(0.8)
    fit(make(), 7, watch, ema=ema, ckpt_path=tmp_path / "x.ckpt", accumulate_grad_batches=accumulate)
    assert ema.updates == 3
    *_, expected = recursion(watch.live[accumulate::accumulate], lambda n: min(0.8, n / (9 + n)))
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=0, atol=1e-6)


class Half(UNet):
    """A network of bfloat16 weights."""

    def forward(self, x, index=None, label=None):
        return super().forward(x.bfloat16(), index, label).float()


def test_averages_of_bfloat16_weights_are_float32_and_move(make, fit, tmp_path):
    options = {"shape": [1, 8, 8], "channels": [8, 16], "layers": 1, "groups": 4, "mid_attention": False}
    module, watch, ema = make(net=lambda: Half(**options).bfloat16()), Watch(), EMA(0.9999)
    ema.betas = lambda n: [0.9999 if n > 1 else 0.0]  # as after 90,000 steps
    fit(module, 12, watch, ema=ema)
    assert watch.live[-1].dtype == torch.bfloat16
    assert ema.averages[0].dtype == torch.float32
    start = watch.live[1].double()
    *_, expected = recursion(watch.live[1:], lambda n: 0.9999)
    moved = (expected - start).abs()
    assert moved.max() > 1e-5
    # each of 11 updates is rounded to float32; in bfloat16, of 8 bits, most weights w could not move at all: by less
    # than w/512 they round back
    bound = 12 * 2**-24 * (start.abs() + moved.max())
    assert ((ema.averages[0] - expected).abs() <= bound).all()
    assert (moved < start.abs() / 512).double().mean() > 0.7
    exported, _ = load_expert(tmp_path / "model.safetensors")
    assert same(vector(exported.parameters()), ema.averages[0])


def test_nothing_that_looks_at_the_average_touches_the_live_weights(make, fit, tmp_path):
    class After(L.Callback):
        """Live weights right after each optimizer step, before any other callback runs."""

        def __init__(self):
            self.live = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.live.append(vector(pl_module.denoiser.parameters()).clone())

    plain, module = Watch(), make()
    fit(module, 6, plain, ema=EMA(lengths=[0.05, 0.1]))
    after, watch, watched = After(), Watch(), make()
    ema, checkpoint = EMA(lengths=[0.05, 0.1], snapshot_every=2), Checkpoint(every=1, keep=9)
    extra = [Pictures(8, 2), SampleQuality("digits", 20), checkpoint]
    options = {"val_check_interval": 2, "enable_checkpointing": True, "plugins": [DurableIO()]}
    fit(watched, 6, after, watch, *extra, ema=ema, **options)
    assert len(list((tmp_path / "pictures").iterdir())) == 9
    assert same(after.live, plain.live[1:])
    assert same(watch.live, plain.live)  # before the next batch, with validation and files in between
    assert same(watch.adam, plain.adam)
    assert same(vector(watched.denoiser.parameters()), after.live[-1])  # after the export
    saved = sorted(checkpoint.folder.glob("*.ckpt"))
    assert len(saved) == 6
    for n, path in enumerate(saved, 1):
        content = torch.load(path, weights_only=True)
        live = [content["state_dict"][f"denoiser.{name}"] for name, _ in watched.denoiser.named_parameters()]
        assert same(vector(live), plain.live[n])
        assert content["ema"]["step"] == n
        kept = [content["ema"]["weights"], *content["ema"]["others"]]
        assert same([vector(weights.values()) for weights in kept], plain.averages[n])


def test_weights_that_are_not_contiguous_are_averaged_and_come_back(make, fit, tmp_path):
    class See(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            self.seen = vector(pl_module.denoiser.parameters()).clone()

    see, watch, module, ema = See(), Watch(), make(), EMA(0.8)
    module.denoiser.to(memory_format=torch.channels_last)
    strides = [p.stride() for p in module.denoiser.parameters()]
    assert sum(not p.is_contiguous() for p in module.denoiser.parameters()) > 5
    fit(module, 8, see, watch, ema=ema)
    assert [p.stride() for p in module.denoiser.parameters()] == strides
    *_, expected = recursion(watch.live[1:], lambda n: min(0.8, n / (9 + n)))
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=0, atol=1e-6)
    assert same(see.seen, ema.averages[0])
    assert same(vector(module.denoiser.parameters()), watch.live[-1])
    exported, _ = load_expert(tmp_path / "model.safetensors")
    assert same(vector(exported.parameters()), ema.averages[0])


class Counting(UNet):
    """A network that keeps a constant and a count beside its weights."""

    def __init__(self, shape, channels, **options):
        super().__init__(shape, channels, **options)
        self.register_buffer("constant", torch.tensor([0.5, 1e6]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, index=None, label=None):
        self.calls += self.training
        return super().forward(x, index, label)


def test_buffers_are_exported_as_they_are(make, fit, tmp_path):
    options = {"layers": 1, "groups": 4, "mid_attention": False}
    fit(make(net=lambda: Counting([1, 8, 8], [8, 16], **options)), 6, ema=EMA(lengths=[0.1], snapshot_every=2))
    for name, calls in (
        ("model", 6),
        (f"{FOLDER}/step-000000002_0.1", 2),
        (f"{FOLDER}/step-000000006_0.1", 6),
    ):
        network = load_expert(tmp_path / f"{name}.safetensors")[0].network
        assert network.constant.tolist() == [0.5, 1e6]
        assert int(network.calls) == calls


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": 1.0}, "ema.decay must lie in [0, 1), got 1.0"),
        ({"decay": -0.1}, "ema.decay must lie in [0, 1), got -0.1"),
        ({"decay": float("nan")}, "ema.decay must lie in [0, 1), got nan"),
        ({"snapshot_every": 0}, "ema.snapshot_every: at least 1, got 0"),
        ({"lengths": [0.1, 0.5]}, "sigma_rel must lie in (0, 0.2887], the plain mean, got 0.5"),
    ],
)
def test_averages_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError) as refusal:
        EMA(**options)
    assert str(refusal.value) == words


# steps that are not finite


def replay(module, watch, skip=(), fused=True, decay=0.9):
    """The training of the recorded batches in plain torch, without the steps named: weights and average."""
    denoiser = module.denoiser.train()
    parameters = list(denoiser.parameters())
    optimizer = torch.optim.AdamW(parameters, module.lr, weight_decay=module.weight_decay, fused=fused)
    generator, average = torch.Generator(), vector(parameters).clone()
    for n, batch in enumerate(watch.batches, 1):
        optimizer.param_groups[0]["lr"] = module.lr * min(1.0, n / module.warmup)
        generator.manual_seed(key(0, 0, n - 1))
        if n not in skip:
            x0 = from_uint8(batch["image"])
            s = draw_rows(module.row_choices, len(x0), generator)
            eps = torch.randn(x0.shape, generator=generator)
            optimizer.zero_grad()
            denoiser.loss(x0, s, eps).mean().backward()
            if module.clip_norm is not None:
                clip_grad_norm_(parameters, module.clip_norm)
            optimizer.step()
            beta = min(decay, n / (9 + n)) if n > 1 else 0.0
            average.lerp_(vector(parameters), 1 - beta)
    return vector(parameters), average


@pytest.mark.parametrize("cls", [ReducedStates, Unfused])
@pytest.mark.parametrize("clip_norm", [0.05, None])
@pytest.mark.parametrize("bad", [set(), {1, 4, 5}], ids=["good", "bad"])
def test_the_guard_leaves_out_bad_steps_and_is_invisible_otherwise(make, fit, cls, clip_norm, bad, capsys):
    watch, module, guard = Watch(), make(cls, clip_norm=clip_norm, weight_decay=0.1), Guard()
    plain = copy.deepcopy(module)
    fit(module, 8, Poison(bad), watch, guard=guard)
    weights, average = replay(plain, watch, bad, fused=cls is ReducedStates)
    assert same(watch.live[-1], weights)
    torch.testing.assert_close(watch.averages[-1][0], average, rtol=0, atol=1e-6)
    assert watch.moved() == [n not in bad for n in range(1, 9)]
    assert guard.skipped == len(bad) == len(reports(capsys.readouterr().err))


@pytest.mark.parametrize(
    ("kind", "step", "cls"),
    [
        *((kind, 3, ReducedStates) for kind in ("image", "inf", "-inf", "nan", "gradient", "weight")),
        *((kind, 1, ReducedStates) for kind in ("image", "weight")),
        *((kind, 3, Unfused) for kind in ("image", "inf", "weight")),
        ("image", 1, Unfused),
    ],
)
def test_a_step_that_is_not_finite_moves_nothing_and_is_named(make, fit, kind, step, cls, capsys):
    poison, watch, module, guard = Poison({step}, kind), Watch(), make(cls), Guard()
    trainer = fit(module, 5, poison, watch, guard=guard)
    assert trainer.optimizers[0].defaults["fused"] is (cls is ReducedStates)
    assert trainer.global_step == 5
    assert watch.frozen(step)
    assert watch.moved() == [n != step for n in range(1, 6)]
    assert all(kept.isfinite().all() for kept in [watch.live[-1], *watch.adam[-1].values(), *watch.averages[-1]])
    assert watch.adam[-1]["step"].unique().tolist() == [4]
    if kind in ("gradient", "weight"):
        assert watch.losses[step - 1].isfinite().all()
        what, samples = "gradient", watch.named(step, range(32))
    else:
        assert watch.losses[step - 1].isfinite().tolist() == [i != 5 for i in range(32)]
        what, samples = "loss", watch.named(step, [5])
    assert reports(capsys.readouterr().err) == [
        f"step {step}, rank 0: the {what} is not finite, the step was skipped. Samples: {samples}"
    ]
    assert (guard.skipped, guard.streak) == (1, 0)
    for gradient in poison.gradients:  # the loss alone was not finite
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
    assert len(poison.gradients) == (kind in ("inf", "-inf", "nan"))


@pytest.mark.parametrize("micro", [0, 1])
def test_one_bad_microbatch_skips_the_whole_step(make, fit, micro, capsys):
    watch, module, guard = Watch(), make(), Guard()
    fit(module, 4, Poison({2}, micro=micro), watch, guard=guard, accumulate_grad_batches=2)
    assert len(watch.live) == 9
    assert watch.frozen(3)
    assert watch.frozen(4)
    assert watch.moved() == [False, True, False, False, False, True, False, True]
    assert watch.adam[-1]["step"].unique().tolist() == [3]
    assert reports(capsys.readouterr().err) == [
        f"step 2, rank 0: the loss is not finite, the step was skipped. Samples: {watch.named(3 + micro, [5])}"
    ]
    assert guard.skipped == 1


def test_a_bad_gradient_of_accumulated_batches_names_the_samples_of_all(make, fit, capsys):
    watch = Watch()
    fit(make(), 3, Poison({2}, "gradient"), watch, accumulate_grad_batches=2)
    samples = f"{watch.named(3, range(32))}, {watch.named(4, range(32))}"
    assert reports(capsys.readouterr().err) == [
        f"step 2, rank 0: the gradient is not finite, the step was skipped. Samples: {samples}"
    ]


def test_patience_bad_steps_in_a_row_end_the_run_with_code_1(make, fit, tmp_path):
    watch, guard, module = Watch(), Guard(3), make()
    with pytest.raises(
        Halted, match=r"step 5, rank 0: the loss is not finite.*, 3 in a row \(guard\.patience\)"
    ) as end:
        fit(module, 9, Poison({3, 4, 5, 6}), watch, guard=guard)
    assert end.value.code == 1
    assert (guard.skipped, guard.streak) == (3, 3)
    assert len(watch.batches) == 5
    assert same(vector(module.denoiser.parameters()), watch.live[2])
    assert not (tmp_path / "model.safetensors").exists()


def test_one_bad_step_less_than_patience_is_forgotten_after_a_good_one(make, fit):
    watch, guard = Watch(), Guard(3)
    fit(make(), 9, Poison({1, 2, 4, 5, 7, 8}), watch, guard=guard)
    assert watch.moved() == [n % 3 == 0 for n in range(1, 10)]
    assert (guard.skipped, guard.streak) == (6, 0)


def test_patience_1_ends_at_the_first_and_less_is_refused(make, fit):
    watch = Watch()
    with pytest.raises(Halted, match=r"step 2, rank 0: .*, 1 in a row"):
        fit(make(), 4, Poison({2}), watch, guard=Guard(1))
    assert len(watch.batches) == 2
    with pytest.raises(InputError, match=r"guard\.patience: at least 1, got 0"):
        Guard(0)


def test_bad_steps_are_counted_across_a_resume(make, fit, tmp_path):
    guard, resumed, watch = Guard(3), Guard(3), Watch()
    fit(make(), 5, Poison({1, 4, 5}), guard=guard).save_checkpoint(tmp_path / "x.ckpt")
    assert guard.state_dict() == {"skipped": 3, "streak": 2}
    with pytest.raises(Halted, match=r"step 6, rank 0: .*, 3 in a row"):
        fit(make(), 9, Poison({6}), watch, guard=resumed, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.state_dict() == {"skipped": 4, "streak": 3}
    assert len(watch.batches) == 1


def test_skipped_steps_are_logged_and_left_out_of_the_losses(make, fit):
    memory, watch = Memory(), Watch()
    fit(make(), 10, Poison({2, 4, 9}), watch, logger=memory)
    logged = {images: v["train/skipped_steps"] for images, v in memory.values.items() if "train/skipped_steps" in v}
    assert logged == {64: 1.0, 128: 2.0, 288: 3.0}
    for images, steps in ((160, slice(0, 5)), (320, slice(5, 10))):
        losses, rows = torch.cat(watch.losses[steps]), torch.cat(watch.rows[steps])
        good = losses.isfinite()
        assert int((~good).sum()) == {160: 2, 320: 1}[images]
        assert memory.values[images]["train/loss"] == pytest.approx(losses[good].mean().item(), rel=1e-5)
        for s, t in zip((1, 2, 3, 4), (250, 500, 750, 1000), strict=True):
            mean = losses[good & (rows == s)].mean().item()
            assert memory.values[images][f"train_loss/t{t:04d}"] == pytest.approx(mean, rel=1e-5)


def test_a_state_whose_losses_are_all_bad_has_no_point(make, fit):
    class All(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch["image"] = batch["image"] * float("nan")

    memory = Memory()
    fit(make(), 2, All(), logger=memory, log_every_n_steps=2)
    assert memory.values[64]["train/skipped_steps"] == 2.0
    assert [name for name in memory.values[64] if "loss" in name] == []


class Ranks(Watch):
    """Write what this rank saw to a file."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        guard = next(c for c in trainer.callbacks if isinstance(c, Guard))
        seen = {k: getattr(self, k) for k in ("live", "adam", "averages", "rows", "losses", "ids")}
        torch.save(seen | {"guard": guard.state_dict()}, self.folder / f"rank{trainer.global_rank}.pt")


def test_a_bad_sample_on_one_rank_skips_the_step_on_all(make, fit, tmp_path, capfd):
    sys.stderr.flush()
    capfd.readouterr()
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    callbacks = [Poison({3}, rank=1), Ranks(tmp_path)]
    fit(make(), 5, *callbacks, devices=2, strategy=strategy, batch_size=16)
    ranks = []
    for rank in (0, 1):
        kept = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        watch = Watch()
        vars(watch).update(kept)
        ranks.append(watch)
    for watch in ranks:
        assert watch.frozen(3)
        assert watch.moved() == [True, True, False, True, True]
        assert watch.guard == {"skipped": 1, "streak": 0}
    zero, one = ranks
    for name in ("live", "adam", "averages"):
        assert same(getattr(zero, name), getattr(one, name))
    assert zero.losses[2].isfinite().all()
    assert not set(zero.ids[2]) & set(one.ids[2])
    assert sorted(reports(capfd.readouterr().err)) == [
        f"step 3, rank 0: the gradient is not finite, the step was skipped. Samples: {zero.named(3, range(16))}",
        f"step 3, rank 1: the loss is not finite, the step was skipped. Samples: {one.named(3, [5])}",
    ]
