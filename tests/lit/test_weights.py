import lightning.pytorch as L
import pytest
import torch
from diffusers.training_utils import EMAModel
from watching import Watch, same, vector

from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.checkpoints import DurableIO
from lightning_tdisent.models.averages import gamma
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.runs import AVERAGES


def recursion(trajectory, betas):
    """Return the averages in float64, computed from the live weights after each step."""
    average = None
    for n, live in enumerate(trajectory, 1):
        live = live.double()
        average = live if n == 1 else betas(n) * average + (1 - betas(n)) * live
        yield average


def power(sigma_rel):
    return lambda n: (1 - 1 / n) ** (gamma(sigma_rel) + 1)


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


def test_the_first_of_several_lengths_is_validated_and_exported(make, fit, tmp_path):
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
    files = {path.name: load_expert(path) for path in (tmp_path / AVERAGES).iterdir()}
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
def test_a_resumed_run_continues_its_averages(make, fit, tmp_path, options):
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
    every = {"accumulate_grad_batches": accumulate, "val_check_interval": 4 * accumulate}
    run = trainer(4, **every)
    run.callbacks = [c for c in run.callbacks if not isinstance(c, EMA)]
    module = make()
    L.seed_everything(0, verbose=False)
    run.fit(module, datamodule=data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    watch, ema = Watch(), EMA(0.8)
    fit(make(), 7, watch, ema=ema, ckpt_path=tmp_path / "x.ckpt", accumulate_grad_batches=accumulate)
    assert ema.updates == 3
    *_, expected = recursion(watch.live[accumulate::accumulate], lambda n: min(0.8, n / (9 + n)))
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=0, atol=1e-6)


class Half(UNet):
    """A network with bfloat16 weights."""

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
    # each of 11 updates is rounded to float32; in bfloat16, with 8 bits, most weights w could not change at all: a
    # change below w/512 is rounded away
    bound = 12 * 2**-24 * (start.abs() + moved.max())
    assert ((ema.averages[0] - expected).abs() <= bound).all()
    assert (moved < start.abs() / 512).double().mean() > 0.7
    exported, _ = load_expert(tmp_path / "model.safetensors")
    assert same(vector(exported.parameters()), ema.averages[0])


def test_nothing_that_looks_at_the_average_touches_the_live_weights(make, fit, tmp_path):
    class After(L.Callback):
        """Record the live weights right after each optimizer step, before any other callback runs."""

        def __init__(self):
            self.live = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.live.append(vector(pl_module.denoiser.parameters()).clone())

    plain, module = Watch(), make()
    fit(module, 6, plain, ema=EMA(lengths=[0.05, 0.1]), default_root_dir=tmp_path / "plain")
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
    """A network with a constant and a counter as buffers."""

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
        (f"{AVERAGES}/step-000000002_0.1", 2),
        (f"{AVERAGES}/step-000000006_0.1", 6),
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
def test_invalid_averages_are_refused(options, words):
    with pytest.raises(InputError) as refusal:
        EMA(**options)
    assert str(refusal.value) == words
