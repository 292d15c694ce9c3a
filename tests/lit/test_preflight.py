"""The preflight tries everything that a run needs later before its first step, and changes no state."""

import random
import time
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from watching import Watch, same

from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import P2, X0, Constant, Likelihood, MinSNR, Objective, V, Weight
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Inpainting, Operator, SuperResolution
from lightning_tdisent.diffusion.schedules import Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit import modules
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.checkpoints import DurableIO
from lightning_tdisent.lit.modules import Baseline, ReducedStates, SingleState
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver

ZERO = LatentStates(Linear(zero_terminal=True), S=4, spacing="trailing")
SHAPE = [1, 8, 8]
KEPT = {"plugins": [DurableIO()], "enable_checkpointing": True}


class Normed(Network):
    """A network with batch statistics, dropout and a count of calls: all that a training step could change."""

    def __init__(self, shape: list[int], dropout: float = 0.2, conditioning: str | None = None) -> None:
        super().__init__(shape, None, conditioning)
        self.dropout, self.calls = dropout, 0
        self.norm, self.last = nn.BatchNorm2d(shape[0]), nn.Conv2d(shape[0], shape[0], 3, padding=1)

    def forward(self, x, index=None, label=None):
        self.calls += 1
        return self.last(nn.functional.dropout(self.norm(x), self.dropout, self.training))


class Globals(L.Callback):
    """Record draws of the global generators at every step."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_end(self, *_):
        self.drawn.append((float(torch.rand(())), float(np.random.rand())))  # noqa: NPY002


def generators():
    """Return the states of the global generators."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), *rest)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_preflight_changes_no_state(make, fit, tmp_path, monkeypatch, resumed):
    tries, path = [], None
    if resumed:
        fit(make(net=lambda: Normed(SHAPE)), 2, Checkpoint(), **KEPT)
        (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    tried = modules.preflight

    def counted(*args):
        before = generators()
        tried(*args)
        tries.append([one == other for one, other in zip(before, generators(), strict=True)])

    found = []
    for preflight in (counted, lambda *_: None):
        monkeypatch.setattr(modules, "preflight", preflight)
        module, watch, drawn = make(net=lambda: Normed(SHAPE), sampler=Ancestral()), Watch(), Globals()
        callbacks = [watch, drawn, Pictures(4, 2), SampleQuality("digits", n=70, n_real=80)]
        trainer = fit(module, 4, *callbacks, ckpt_path=path, log_every_n_steps=1)
        metrics = {k: torch.as_tensor(v) for k, v in trainer.callback_metrics.items()}
        found.append([watch.live, watch.adam, watch.averages, watch.losses, watch.batches, watch.rows])
        found[-1] += [module.state_dict(), metrics, torch.tensor(drawn.drawn), torch.tensor(module.images_seen)]
    assert tries == [[True] * 3]
    assert len(found[0][3]) == (2 if resumed else 4)
    for one, other in zip(*found, strict=True):
        assert same(one, other)


def test_the_preflight_takes_few_evaluations_and_is_quick(make, fit, monkeypatch):
    module, counts, seconds = make(sampler=DDIM()), [], []
    tried = modules.preflight

    def timed(*args):
        begin = time.perf_counter()
        tried(*args)
        seconds.append(time.perf_counter() - begin)

    def count(self, *args, **kwargs):
        counts.append(len(args[0]))
        return forward(self, *args, **kwargs)

    forward = UNet.forward
    monkeypatch.setattr(modules, "preflight", timed)
    monkeypatch.setattr(UNet, "forward", count)
    fit(module, 1, limit_val_batches=0)
    # the network, its copy, the copy from another random state and for one image; a training step, four rows of a
    # validation, four steps of a sample; a copy in training mode, to detect random draws
    assert counts[: counts.index(32)] == [2, 2, 2, 1, 2, *[2] * 4, *[2] * 4, 2]
    assert seconds[0] < 2


class Refused(Exception):
    """Raised when the training takes a step."""


class Never(L.Callback):
    def on_train_batch_start(self, *_):
        raise Refused


class Random(Operator):
    def observe(self, x0, item):
        return x0 * (torch.rand_like(x0) > 0.5)


class Loud(Operator):
    def observe(self, x0, item):
        return 3 * x0


class Forgotten(Operator):
    def observe(self, x0, item):
        return x0.expand(-1, 3, -1, -1)


class Companions(Operator):
    def observe(self, x0, item):
        return x0 / 2 - x0.mean() / 4


class Hidden(Operator):
    def __init__(self, **options):
        self.share = options.get("share", 0.5)

    def observe(self, x0, item):
        return x0 * self.share


class HalfKept(Weight):
    def __init__(self, gamma: float = 3.0) -> None:
        self.gamma = gamma + 1

    def on_raw(self, snr, snr_below, unit):
        return self.gamma * unit


class Thrown(Objective):
    prediction = "v"

    def target(self, x0, eps, a, b):
        raise KeyError("middle")

    def x0(self, raw, x, a, b):
        return a * x - b * raw

    def unit(self, snr):
        return torch.ones_like(snr)


class Swapped(V):
    """v with the signs of its estimate exchanged: x0 is not the inverse of target."""

    def x0(self, raw, x, a, b):
        return a * x + b * raw


def conditional(operator, tiny):
    def module(**options):
        channels = 1 + operator.channels(1)
        network = tiny(shape=[channels, 8, 8])
        return ReducedStates(network, ComponentStates(SHAPE, observation=Observation(operator), S=4), **options)

    return module


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (Random(), ["Random.observe makes another observation at a second call"]),
        (Loud(), ["Loud", "from -3 to 3", "[-1, 1]"]),
        (Forgotten(), ["Forgotten", "[4, 3, 8, 8]", "[4, 1, 8, 8]", "channels"]),
        (Companions(), ["Companions.observe makes another observation of an image alone"]),
        (Hidden(share=0.25), ["table built from"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Operator) else "",
)
def test_an_operator_that_cannot_be_sampled_is_refused(operator, words, tiny, fit):
    with pytest.raises(InputError) as refusal:
        fit(conditional(operator, tiny)(), 2, Never())
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize("operator", [Inpainting(), SuperResolution(2)], ids=lambda o: type(o).__name__)
def test_operators_of_this_project_pass_the_preflight(operator, tiny, fit):
    with pytest.raises(Refused):
        fit(conditional(operator, tiny)(), 2, Never(), Pictures(2, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": DDIM(steps=5)}, ["sampler.steps: 5 steps on a table of 4 rows"]),
        ({"objective": V(HalfKept())}, ["HalfKept", "gamma is 4.0", "5.0"]),
        ({"objective": Thrown()}, ["KeyError: 'middle'", "test_preflight.py"]),
        ({"objective": Swapped()}, ["Swapped.x0 is not the inverse of its target", "at row 1"]),
        ({"net": lambda: Normed([1, 8, 8], dropout=1.5)}, ["dropout probability", "1.5"]),
    ],
)
def test_what_would_fail_later_is_refused_at_once(make, fit, tmp_path, options, words):
    with pytest.raises(InputError) as refusal:
        fit(make(**options), 2, Never(), Checkpoint(), **KEPT)
    assert "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(make, fit, precision):
    with pytest.raises(InputError, match=f"trainer.precision: {precision} .*bf16-mixed"):
        fit(make(), 2, Never(), precision=precision)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_are_tried_as_they_are(make, fit, precision):
    fit(make(), 1, Pictures(2, 2), precision=precision)


@pytest.mark.parametrize(
    ("module", "refused"),
    [
        (lambda net: SingleState(net(), ZERO, 4, objective=V(MinSNR())), ["row 4", "this expert has no other"]),
        (lambda net: SingleState(net(), ZERO, 2, 2, objective=X0(P2())), ["row 4", "sampling starts at row 4"]),
        (lambda net: ReducedStates(net(), ZERO, V(P2())), ["P2 of V is 0 at row 4 (SNR 0", "sampling starts"]),
        (lambda net: SingleState(net(), ZERO, 3, objective=V(MinSNR())), None),
        (lambda net: ReducedStates(net(), ZERO, V(Likelihood())), None),
        (lambda net: ReducedStates(net(), ZERO, V(Constant())), None),
        (lambda net: ReducedStates(net(), LatentStates(S=4), V(MinSNR())), None),
    ],
    ids=["expert", "interval", "shared", "other expert", "likelihood", "constant", "not zero"],
)
def test_a_row_without_weight_is_refused(tiny, fit, module, refused):
    with pytest.raises(Refused if refused is None else InputError) as found:
        fit(module(tiny), 2, Never())
    assert all(word in str(found.value) for word in refused or [])


class Masked(Weight):
    """A weight that is 0 in float32 at one row in the middle."""

    def on_raw(self, snr, snr_below, unit):
        out = torch.ones_like(snr)
        out[1] = 1e-50
        return out


def test_a_row_in_the_middle_without_weight_is_a_warning(tiny, fit):
    with pytest.warns(UserWarning, match=r"Masked of V is 0 at row 2 \(SNR"), pytest.raises(Refused):
        fit(ReducedStates(tiny(), LatentStates(S=4), V(Masked())), 2, Never())


class Odd(L.Callback):
    """A callback whose state is more than data: a checkpoint that contains it cannot be loaded."""

    def state_dict(self):
        return {"path": Path("here")}


def test_a_checkpoint_is_written_and_read_before_it_is_needed(make, fit, tmp_path):
    with pytest.raises(InputError, match=r"PosixPath|pathlib"):
        fit(make(), 2, Never(), Odd(), Checkpoint(), **KEPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoints"]
    assert not list((tmp_path / "checkpoints").iterdir())


class Own(Baseline):
    """A module whose steps take batches of its own form."""

    def training_step(self, batch, batch_idx):
        return super().training_step({"image": batch[0], "label": batch[1], "id": batch[1]}, batch_idx)

    def validation_step(self, batch, batch_idx):
        pass


def test_a_plain_trainer_with_a_module_that_has_its_own_steps(tiny, tmp_path):
    images = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(8)), batch_size=4)
    options = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    module = Own(tiny(), LatentStates(S=4))
    L.Trainer(**options).fit(module, loader, loader)
    assert module.images_seen == 8
    with pytest.raises(InputError, match=r"sampler.steps: 9"):
        L.Trainer(**options).fit(Own(tiny(), LatentStates(S=4), sampler=DPMSolver(steps=9)), loader, loader)
