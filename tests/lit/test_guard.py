import copy
import sys
from datetime import timedelta

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.utils import clip_grad_norm_
from watching import Memory, Poison, Unfused, Watch, same, vector

from lightning_tdisent.diffusion.rng import draw_rows, key
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.modules import ReducedStates


def reports(text):
    """Return the lines of the guard in stderr."""
    return [line for line in text.splitlines() if line.startswith("step ")]


def replay(module, watch, skip=(), fused=True, decay=0.9):
    """Repeat the training of the recorded batches in plain torch without the steps ``skip``.

    Return its weights and average.
    """
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
def test_the_guard_skips_bad_steps_and_changes_nothing_else(make, fit, cls, clip_norm, bad, capsys):
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
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(make, fit, kind, step, cls, capsys):
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
    for gradient in poison.gradients:  # only the loss was not finite
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


def test_a_good_step_resets_the_count_of_bad_steps_in_a_row(make, fit):
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
            batch["x0"] = batch["image"] * float("nan")

    memory = Memory()
    fit(make(), 2, All(), logger=memory, log_every_n_steps=2)
    assert memory.values[64]["train/skipped_steps"] == 2.0
    assert [name for name in memory.values[64] if "loss" in name] == []


class Ranks(Watch):
    """Save what this rank saw to a file."""

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
