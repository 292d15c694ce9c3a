"""Warm starts: curves begin at the start, the average continues, and the export is never worse than the start."""

import dataclasses
import json

import lightning.pytorch as L
import pytest
import torch
from watching import Watch, same

from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.lit.callbacks.curve import Curve
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.modules import ReducedStates, SingleState
from lightning_tdisent.models.averages import gamma
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.sampling.errors_by_row import x0_errors


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Return a folder for the run that the experts of this file start from."""
    return tmp_path_factory.mktemp("start")


@pytest.fixture
def warm(tiny, fit, start, tmp_path):
    """Return a function that trains an expert of some rows from a shared model of 24 steps, in a new folder."""
    if not (start / "model.safetensors").exists():
        L.seed_everything(0, verbose=False)
        fit(ReducedStates(tiny(), LatentStates(S=4), lr=0.01, warmup=3), 24, default_root_dir=start)

    def run(rows, steps, *callbacks, lr=0.01, folder="run", ema=None, **options):
        torch.manual_seed(options.pop("seed", 7))
        module = SingleState(tiny(), LatentStates(S=4), rows=rows, lr=lr, warmup=0, warm_start=str(start))
        fit(module, steps, *callbacks, ema=ema, default_root_dir=tmp_path / folder, **options)
        return module, tmp_path / folder

    return run


def held_out(path, data):
    """Return the mean error of a file's weights over its rows, measured independently of the training."""
    denoiser, card = load_expert(path / "model.safetensors")
    images = data().held_out
    return float(x0_errors(denoiser, images.images, range(len(images)), card.rows).mean())


def points(folder):
    return json.loads((folder / "curve.json").read_text(encoding="utf-8"))["points"]


@pytest.mark.parametrize("lr", [1e-4, 0.003, 0.05])
@pytest.mark.parametrize("rows", [[1], [2], [3], [4], [2, 3]])
def test_what_is_exported_is_never_worse_than_the_start(warm, start, data, rows, lr):
    _, folder = warm(rows, 6, Curve(), lr=lr, val_check_interval=4)
    card = read_card(folder / "model.safetensors")
    errors = held_out(folder, data)
    assert errors == pytest.approx(min(card.errors.values()), rel=1e-5)
    assert card.weights == min(card.errors, key=card.errors.get)
    assert errors <= card.errors["start"] * (1 + 1e-9)
    found = points(folder)
    assert [n for n, _ in found] == [0, 128, 192]
    assert sum(found[0][1]) / len(rows) == pytest.approx(card.errors["start"], rel=1e-12)
    assert sum(found[-1][1]) / len(rows) == pytest.approx(card.errors["ema"], rel=1e-12)
    shared, _ = load_expert(start / "model.safetensors")
    images = data().held_out
    truth = x0_errors(shared, images.images, range(len(images)), rows).mean(1).tolist()
    assert found[0][1] == pytest.approx(truth, rel=1e-4)  # the embedding of the row is folded in


@pytest.mark.parametrize("lr", [1.0, 1e30])  # with 1e30 the outputs and the error are NaN
def test_a_training_that_gets_worse_exports_its_start(warm, start, data, lr):
    _, folder = warm([3], 5, lr=lr)
    kept, card = load_expert(folder / "model.safetensors")
    assert (card.weights, card.kind, card.steps, card.images_seen) == ("start", "ema", 5, 160)
    assert card.average == {"decay": 0.9, "steps": 0, "before": 6}
    _, unmoved = warm([3], 1, lr=1e-30, folder="unmoved")
    assert same(kept.state_dict(), load_expert(unmoved / "model.safetensors")[0].state_dict())


def test_experts_that_kept_their_start_are_composed_with_those_that_did_not(warm, tmp_path):
    kinds = []
    for row, lr in ((1, 0.003), (2, 1.0), (3, 1.0), (4, 0.003)):
        _, folder = warm([row], 4, lr=lr, folder=f"fleet/expert_{row}")
        kinds.append(read_card(folder / "model.safetensors").weights)
    assert set(kinds) == {"ema", "start"}
    assert load_model(tmp_path / "fleet").states.S == 4


@pytest.mark.parametrize("options", [{"decay": 0.95}, {"lengths": [0.1]}], ids=["decay", "lengths"])
def test_the_average_continues_that_of_the_start(warm, options):
    watch, ema = Watch(), EMA(**options)
    _, folder = warm([1], 9, watch, ema=ema)
    assert ema.before == 24 // 4  # steps that the shared model has taken at this row
    average = watch.live[0].double()
    for n, live in enumerate(watch.live[1:], 1 + ema.before):
        beta = (1 - 1 / n) ** (gamma(0.1) + 1) if ema.lengths else min(0.95, n / (9 + n))
        average = beta * average + (1 - beta) * live.double()
    torch.testing.assert_close(ema.averages[0].double(), average, rtol=0, atol=1e-6)
    assert read_card(folder / "model.safetensors").average["before"] == ema.before


def test_measuring_the_start_changes_nothing(warm):
    plain, watched = Watch(), Watch()
    one, _ = warm([2], 4, plain, limit_val_batches=0)
    other, _ = warm([2], 4, watched, Curve(), folder="other", val_check_interval=1)
    assert same(plain.live, watched.live)
    assert same(plain.averages, watched.averages)
    assert one.training == other.training
    assert not other.denoiser.network._forward_pre_hooks


def test_a_resumed_warm_run_knows_its_start(warm):
    whole, cut = EMA(0.9), EMA(0.9)
    _, folder = warm([1], 6, Curve(), ema=whole)
    module, part = warm([1], 3, Curve(), folder="part")
    trainer = module.trainer
    trainer.save_checkpoint(part / "x.ckpt")
    _, part = warm([1], 6, Curve(), folder="part", ema=cut, ckpt_path=part / "x.ckpt")
    assert same(whole.averages, cut.averages)
    assert same(whole.start, cut.start)
    one, other = (read_card(f / "model.safetensors") for f in (folder, part))
    assert one.errors == other.errors
    assert (one.weights, one.average) == (other.weights, other.average)
    assert points(part)[0] == points(folder)[0]
    assert [n for n, _ in points(part)] == [0, 96, 192]


def test_a_fit_from_scratch_begins_its_curve_before_the_first_step(make, fit, data, tmp_path):
    module, before = make(), make()
    fit(module, 4, Curve(), val_check_interval=2)
    images = data().held_out
    truth = x0_errors(before.denoiser, images.images, range(len(images)), [1, 2, 3, 4]).mean(1).tolist()
    assert points(tmp_path)[0] == [0, pytest.approx(truth, rel=1e-6)]
    card = read_card(tmp_path / "model.safetensors")
    assert (card.weights, card.errors) == ("ema", {})
    assert card.validation["passes"] == 3 * 4 * len(images)  # before, in the middle and at the end; one pass per row
    assert card.validation["seconds"] > 0


def test_a_card_of_an_older_version_is_read(make, tmp_path):
    module = make()
    card = module.card("ema", {"decay": 0.9, "steps": 3})
    old = {k: v for k, v in dataclasses.asdict(card).items() if k not in ("errors", "rounds", "validation")}
    assert type(card).from_json(old, "here") == dataclasses.replace(card, validation={})
    save_expert(tmp_path / "x.safetensors", module.denoiser, card)
    assert read_card(tmp_path / "x.safetensors") == card
