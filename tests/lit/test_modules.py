import copy

import lightning.pytorch as L
import pytest
import torch
from watching import Memory

from lightning_tdisent.diffusion.objectives import X0, Eps, V
from lightning_tdisent.diffusion.schedules import Cosine, Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.inference import Composite
from lightning_tdisent.lit.modules import Baseline, Diffusion, ReducedStates, SingleState
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.models.warm import start_warm
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.errors_by_row import x0_errors
from lightning_tdisent.sampling.sampler import DDIM


def test_validation_omits_the_error_of_eps_at_rows_without_signal(tiny, data, trainer):
    states = LatentStates(Linear(zero_terminal=True), S=4, spacing="trailing")
    whole, last = ReducedStates(tiny(), states), SingleState(tiny(), states, 4)
    t = trainer(1)
    t.validate(whole, datamodule=data(), verbose=False)
    found = {k: float(v) for k, v in t.callback_metrics.items()}
    each = [found[f"val_eps_mse/t{i:04d}"] for i in (250, 500, 750)]
    assert found["val/eps_mse"] == pytest.approx(sum(each) / 3)
    assert "val_x0_mse/t1000" in found
    assert "val_eps_mse/t1000" not in found
    t.validate(last, datamodule=data(), verbose=False)
    assert {k for k in t.callback_metrics if k.startswith("val")} == {"val/x0_mse", "val_x0_mse/t1000"}


class Recorder(L.Callback):
    """Record live weights, generator state and images of every step."""

    def __init__(self):
        self.losses, self.images, self.rows = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["losses"].clone())
        self.images.append(batch["image"].clone())
        self.rows.append(outputs["row"].clone())


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda net: Baseline(net(), lr=3e-3, warmup=10), 0.75),
        (lambda net: ReducedStates(net(), LatentStates(S=4), lr=3e-3, warmup=10), 0.75),
        (lambda net: SingleState(net(), LatentStates(S=4), 2, lr=3e-3, warmup=10), 0.65),
        (lambda net: SingleState(net(), LatentStates(S=8), 2, 4, lr=3e-3, warmup=10), 0.75),
        (lambda net: SingleState(net(), LatentStates(S=4), 2, objective=Eps(), lr=3e-3, warmup=10), 0.65),
        (lambda net: ReducedStates(net(), LatentStates(Cosine(), S=4), X0(), lr=3e-3, warmup=10), 0.75),
    ],
    ids=["baseline", "reduced", "single", "block", "single-eps", "reduced-x0"],
)
def test_training_lowers_the_error_of_every_state_owned(make, factor, tiny, data, trainer):
    L.seed_everything(0, verbose=False)
    module, shards = make(tiny), data()
    held, rows = shards.held_out, module.rows if len(module.rows) <= 8 else list(range(125, 1001, 125))
    ids = range(128)

    def errors():
        return x0_errors(module.eval().denoiser, held.images[:128], ids, rows).mean(1)

    before = errors()
    module.train()
    trainer(200).fit(module, datamodule=shards)
    after = errors()
    # at almost pure noise an untrained v-network is nearly right: only the difference to the data's variance counts
    assert (after < factor * before).all(), (before, after)


def test_a_step_is_a_function_of_seed_and_step(tiny, data, trainer):
    runs = []
    for seed in (0, 0, 1):
        L.seed_everything(seed, verbose=False)
        recorder = Recorder()
        trainer(5, recorder).fit(ReducedStates(tiny(), LatentStates(S=4)), datamodule=data())
        runs.append(recorder)
    for a, b in zip(runs[0].losses, runs[1].losses, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(runs[0].losses[0], runs[2].losses[0])
    assert not torch.equal(runs[0].images[0], runs[2].images[0])


def test_states_are_balanced_unless_asked_otherwise(tiny, data, trainer):
    recorder = Recorder()
    trainer(4, recorder).fit(ReducedStates(tiny(), LatentStates(S=4)), datamodule=data())
    assert all(r.bincount(minlength=5).tolist() == [0, 8, 8, 8, 8] for r in recorder.rows)
    recorder = Recorder()
    trainer(4, recorder).fit(ReducedStates(tiny(), LatentStates(S=4), draw="iid"), datamodule=data())
    assert any(r.bincount(minlength=5).tolist() != [0, 8, 8, 8, 8] for r in recorder.rows)


def test_an_expert_of_one_state_is_time_agnostic_unless_asked(tiny):
    states = LatentStates(S=4)
    assert not SingleState(tiny(), states).network.sees_state
    assert SingleState(tiny(conditioning="state"), states).network.sees_state
    assert SingleState(tiny(), states, 1, 2).network.sees_state
    given = tiny()
    SingleState(given, states)
    assert given.conditioning is None  # the caller's network is not changed


def test_single_state_owns_its_block():
    class Free(Network):
        def __init__(self):
            super().__init__([1, 2, 2], None, None)

        def forward(self, x, index=None, label=None):
            return x

    states = LatentStates(S=8)
    owned = [SingleState(Free(), states, k, 3).rows for k in (1, 2, 3)]
    assert sorted(s for block in owned for s in block) == states.rows
    with pytest.raises(InputError, match=r"expert: 4 is not among the 3"):
        SingleState(Free(), states, 4, 3)


def test_reduced_refuses_the_full_chain(tiny):
    with pytest.raises(InputError, match="all 1000"):
        ReducedStates(tiny())


def test_baseline_restricted_to_the_rows_of_reduced_is_the_same(tiny, data):
    net, reduced = tiny(), LatentStates(S=8)
    full = Baseline(net).denoiser.eval()
    small = ReducedStates(net, reduced).denoiser.eval()
    held, ids = data().held_out.images[:16], range(16)
    restricted = full.restrict(reduced)
    assert torch.equal(x0_errors(restricted, held, ids, reduced.rows), x0_errors(small, held, ids, reduced.rows))
    assert torch.equal(DDIM()(restricted, [3, 4]), DDIM()(small, [3, 4]))
    # a seed gives the same initial noise for every table, so that models are compared on the same images
    assert torch.equal(DDIM(1.0, steps=8)(full, [3, 4]), DDIM(1.0)(small, [3, 4]))
    rows = [125 * k for k in range(1, 9)]
    assert torch.equal(x0_errors(full, held, ids, rows), x0_errors(small, held, ids, reduced.rows))
    x = torch.randn(2, 1, 8, 8)
    for s, t in zip(reduced.rows, reduced.index[1:].tolist(), strict=True):
        assert torch.equal(small(x, s), full(x, t))


@pytest.mark.parametrize(
    "make",
    [
        lambda net: Baseline(net(), LatentStates(Cosine(T=50)), lr=0.02),
        lambda net: ReducedStates(net(classes=10), LatentStates(S=4), Eps(), clip_norm=None),
        lambda net: SingleState(net(), LatentStates(S=4), 3, draw="iid", warmup=7),
        lambda net: SingleState(net(), LatentStates(S=8), 2, 4),
    ],
    ids=["baseline", "reduced", "single", "block"],
)
def test_a_checkpoint_returns_its_class_and_weights(make, tiny, data, trainer, tmp_path):
    module = make(tiny)
    run = trainer(6)
    run.fit(module, datamodule=data())
    path = tmp_path / "x.ckpt"
    run.save_checkpoint(path)
    torch.load(path, weights_only=True)
    for cls in (type(module), Diffusion):
        loaded = cls.load_from_checkpoint(path, weights="live")
        assert type(loaded) is type(module)
        assert loaded.rows == module.rows
        assert loaded.states.fingerprint == module.states.fingerprint
        assert (loaded.lr, loaded.clip_norm, loaded.warmup, loaded.draw) == (
            module.lr,
            module.clip_norm,
            module.warmup,
            module.draw,
        )
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(loaded.eval().denoiser(x, loaded.rows[0]), module.eval().denoiser(x, module.rows[0]))
    assert loaded.images_seen == 6 * 32
    other = ReducedStates if not isinstance(module, ReducedStates) else SingleState
    with pytest.raises(InputError, match=f"is no {other.__name__}"):
        other.load_from_checkpoint(path)


def test_the_averaged_weights_are_validated_exported_and_loaded(tiny, data, trainer, tmp_path):
    class Watch(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            self.seen = copy.deepcopy(pl_module.denoiser.state_dict())

        def on_validation_end(self, trainer, pl_module):
            pass

    watch, module = Watch(), ReducedStates(tiny(), LatentStates(S=4), lr=0.01, warmup=1)
    averages, decay = None, 0.7

    class Oracle(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            nonlocal averages
            live = {k: v.detach().double().clone() for k, v in pl_module.denoiser.named_parameters()}
            n = trainer.global_step
            d = 0.0 if n == 1 else min(decay, n / (9 + n))  # (1 + step)/(10 + step), step = n - 1
            averages = live if averages is None else {k: d * averages[k] + (1 - d) * live[k] for k in live}

    run = trainer(20, watch, Oracle(), ema=decay)
    run.fit(module, datamodule=data())
    live = module.denoiser.state_dict()
    card = read_card(tmp_path / "model.safetensors")
    assert (card.weights, card.average, card.steps, card.images_seen) == ("ema", {"decay": decay, "steps": 20}, 20, 640)
    exported = load_expert(tmp_path / "model.safetensors")[0].state_dict()
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = Diffusion.load_from_checkpoint(tmp_path / "x.ckpt").denoiser.state_dict()
    for name, average in averages.items():
        torch.testing.assert_close(exported[name].double(), average, rtol=1e-4, atol=1e-6)
        assert torch.equal(exported[name], loaded[name])
        assert torch.equal(exported[name], watch.seen[name])
    assert any(not torch.equal(live[k], exported[k]) for k in live)


def test_a_checkpoint_is_validated_with_its_average(tiny, data, trainer, tmp_path):
    module = ReducedStates(tiny(), LatentStates(S=4), lr=0.01, warmup=1)
    run = trainer(20, ema=0.97)
    run.fit(module, datamodule=data())
    measured = run.callback_metrics["val/x0_mse"]  # of the average, from the last validation
    run.save_checkpoint(tmp_path / "x.ckpt")
    fresh = ReducedStates(tiny(), LatentStates(S=4))
    again = trainer(1)
    again.validate(fresh, datamodule=data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert again.callback_metrics["val/x0_mse"] == measured
    again.validate(module, datamodule=data(), verbose=False)
    assert again.callback_metrics["val/x0_mse"] != measured  # the live weights


@pytest.mark.parametrize("order", [0, 1])
def test_validation_leaves_the_training_bitwise_unchanged(order, tiny, data, trainer):
    from lightning_tdisent.lit.callbacks.pictures import Pictures
    from lightning_tdisent.lit.callbacks.quality import SampleQuality

    finals = []
    for watched in (False, True):
        L.seed_everything(0, verbose=False)
        module = ReducedStates(tiny(dropout=0.1), LatentStates(S=4))
        extra = [Pictures(8, 2), SampleQuality("digits", 20)] if watched else []
        callbacks = [Recorder(), *extra] if order else [*extra, Recorder()]
        recorder = next(c for c in callbacks if isinstance(c, Recorder))
        trainer(12, *callbacks, val_check_interval=3 if watched else 12).fit(module, datamodule=data())
        finals.append((recorder.losses, module.denoiser.state_dict(), torch.get_rng_state()))
    (losses, weights, state), (watched_losses, watched_weights, watched_state) = finals
    assert torch.equal(state, watched_state)
    assert all(torch.equal(a, b) for a, b in zip(losses, watched_losses, strict=True))
    assert all(torch.equal(weights[k], watched_weights[k]) for k in weights)


def test_an_exception_in_validation_brings_the_live_weights_back(tiny, data, trainer):
    class Broken(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            raise RuntimeError("broken metric")

    class Live(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights = copy.deepcopy(pl_module.denoiser.state_dict())

    live, module = Live(), ReducedStates(tiny(), LatentStates(S=4), lr=0.01, warmup=1)
    with pytest.raises(RuntimeError, match="broken metric"):
        trainer(5, live, Broken()).fit(module, datamodule=data())
    assert all(torch.equal(v, module.denoiser.state_dict()[k]) for k, v in live.weights.items())


def test_a_warm_expert_begins_as_the_shared_model(tiny, data, trainer, tmp_path):
    L.seed_everything(0, verbose=False)
    states = LatentStates(S=4)
    trainer(10).fit(ReducedStates(tiny(), states), datamodule=data())
    shared = load_expert(tmp_path / "model.safetensors")[0]
    x = torch.randn(4, 1, 8, 8)
    module = SingleState(tiny(), states, 1)
    (parent,) = start_warm(module.denoiser, str(tmp_path))
    assert parent["images_seen"] == 320
    module.parents = [parent]
    assert module.card("live").parents == [parent]
    for expert, experts in ((2, 4), (2, 2)):
        module = SingleState(tiny(), LatentStates(S=4), expert, experts, warm_start=str(tmp_path))
        start_warm(module.denoiser, str(tmp_path))
        for s in module.rows:
            torch.testing.assert_close(module.eval().denoiser(x, s), shared(x, s), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="predicts v, this model eps"):
        start_warm(SingleState(tiny(), states, 1, objective=Eps()).denoiser, str(tmp_path))
    with pytest.raises(InputError, match="one network that has indices"):
        start_warm(SingleState(tiny(), LatentStates(S=5), 1).denoiser, str(tmp_path))
    with pytest.raises(InputError, match="another network"):
        start_warm(SingleState(tiny(channels=[8, 24]), states, 1).denoiser, str(tmp_path))


def test_resuming_another_model_is_refused(tiny, data, trainer, tmp_path):
    run = trainer(3)
    run.fit(ReducedStates(tiny(), LatentStates(S=4)), datamodule=data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"fingerprint: the checkpoint has \w+, the config \w+"):
        trainer(6).fit(ReducedStates(tiny(), LatentStates(S=5)), datamodule=data(), ckpt_path=tmp_path / "x.ckpt")


def test_a_checkpoint_continues_with_count_and_average(tiny, data, trainer, tmp_path):
    run = trainer(3)
    run.fit(ReducedStates(tiny(), LatentStates(S=4)), datamodule=data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    module = ReducedStates(tiny(), LatentStates(S=4))
    again = trainer(6)
    again.fit(module, datamodule=data(), ckpt_path=tmp_path / "x.ckpt")
    assert module.images_seen == 6 * 32
    assert next(c for c in again.callbacks if isinstance(c, EMA)).updates == 6


def test_data_of_another_shape_or_class_count_is_refused(tiny, data, trainer):
    with pytest.raises(InputError, match=r"shape is \[1, 16, 16\], the images .* have \[1, 8, 8\]"):
        trainer(1).fit(ReducedStates(tiny(shape=[1, 16, 16]), LatentStates(S=4)), datamodule=data())
    with pytest.raises(InputError, match=r"classes is 5, but labels .* from 0 to 9"):
        trainer(1).fit(ReducedStates(tiny(classes=5), LatentStates(S=4)), datamodule=data())


def test_class_conditional_training_drops_labels(tiny, data, trainer):
    module = ReducedStates(tiny(classes=10), LatentStates(S=4), label_drop=0.5)
    trainer(2).fit(module, datamodule=data())
    labels = module.drop_labels(torch.zeros(4000, dtype=torch.long))
    assert set(labels.tolist()) == {0, 10}
    assert 0.45 < (labels == 10).double().mean() < 0.55


def test_the_composite_module_predicts_what_the_denoiser_samples(tiny, tmp_path):
    from lightning_tdisent.lit.datamodule import Seeds

    states, files = LatentStates(S=2), []
    for k in (1, 2):
        torch.manual_seed(k)
        module = SingleState(tiny(), states, k)
        from lightning_tdisent.models.expert import save_expert

        files.append(tmp_path / f"{k}.safetensors")
        save_expert(files[-1], module.denoiser, module.card("live"))
    folder = compose(files, tmp_path / "all")
    module = Composite(str(folder))
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path)
    predicted = torch.cat(trainer.predict(module, datamodule=Seeds(5, 2, 2)))
    from lightning_tdisent.sampling.sample import sample

    assert torch.equal(predicted, torch.cat(list(sample(load_model(folder), DDIM(), range(2, 7), 2))))
    with pytest.raises(InputError, match="not trained"):
        module.configure_optimizers()


def test_the_losses_logged_are_the_means_per_state(tiny, data, trainer, tmp_path):
    memory, recorder = Memory(), Recorder()
    run = trainer(20, recorder, logger=memory)
    run.fit(ReducedStates(tiny(), LatentStates(S=4)), datamodule=data())
    losses, rows = torch.stack(recorder.losses[10:]).flatten(), torch.stack(recorder.rows[10:]).flatten()
    for s, t in zip((1, 2, 3, 4), (250, 500, 750, 1000), strict=True):
        assert memory.values[640][f"train_loss/t{t:04d}"] == pytest.approx(losses[rows == s].mean().item(), rel=1e-5)
    assert memory.values[640]["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert LossPerState(2).bins == 2


def test_objective_default_is_v(tiny):
    assert isinstance(Baseline(tiny()).objective, V)
    assert isinstance(Baseline(tiny()).denoiser, Denoiser)


def test_dropout_is_found_in_any_layer(tiny):
    """Networks that draw from the global generator are detected for any name of the dropout argument."""
    for p, random in ((0.0, False), (0.1, True)):
        network = tiny()
        network.regulariser = torch.nn.Sequential(torch.nn.Dropout2d(p))
        assert ReducedStates(network, LatentStates(S=4)).network_is_random is random
    assert ReducedStates(tiny(dropout=0.1), LatentStates(S=4)).network_is_random


class Noisy(Network):
    """Draw random numbers in training mode if ``noise`` is not 0; count calls and keep batch statistics."""

    def __init__(self, shape: list[int], noise: float, conditioning: str | None = None) -> None:
        super().__init__(shape, None, conditioning)
        self.noise, self.calls, self.norm, self.dropout = noise, 0, torch.nn.BatchNorm2d(shape[0]), torch.ones(3)

    def forward(self, x, index=None, label=None):
        self.calls += 1
        return self.norm(x + self.noise * torch.randn_like(x) if self.training and self.noise else x)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_random_draws_of_a_network_are_detected_with_a_copy(noise):
    module = ReducedStates(network := Noisy([1, 8, 8], noise), LatentStates(S=4))
    network.train()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert module.network_is_random is (noise > 0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert (network.calls, network.training) == (0, True)
