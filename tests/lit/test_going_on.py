"""Resuming from a checkpoint in a plain script: what the training restores, and what it refuses to change."""

import re

import lightning.pytorch as L
import pytest
import torch

from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO, load
from lightning_tdisent.models.card import read_card
from lightning_tdisent.runs import checkpoints_in


class Watch(L.Callback):
    """Record the ids and losses of every batch, and save a checkpoint after a given step."""

    def __init__(self, save=None, path=None):
        self.steps, self.at, self.path = [], save, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append((batch["id"].tolist(), outputs["losses"].tolist()))
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def fit(make, data, tmp_path, monkeypatch):
    """Return a function that trains as a script in a new process, with a given seed or none."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    path, fresh = tmp_path / "a.ckpt", iter(range(1000, 2000))

    def run(steps, *callbacks, seed=None, resume=False, save=None, shards=None, model=None, **options):
        module = make(**(model or {}))
        torch.manual_seed(next(fresh))  # the random seed of a new process
        if seed is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
            torch.manual_seed(seed)
        watch = Watch(save, path)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options = {"limit_val_batches": 0, "enable_model_summary": False, "accelerator": "cpu", **quiet, **options}
        trainer = L.Trainer(max_steps=steps, callbacks=[watch, *callbacks], default_root_dir=tmp_path, **options)
        shards = data(val_limit=64, **(shards or {}))
        trainer.fit(module, datamodule=shards, ckpt_path=path if resume else None, weights_only=True)
        return watch.steps, module

    return run


@pytest.mark.parametrize("older", [False, True])
def test_a_script_without_a_seed_resumes_with_its_first_order_and_noise(older, fit, tmp_path, capsys):
    unbroken, whole = fit(6, save=3)
    if older:  # as older versions wrote checkpoints
        content = load(tmp_path / "a.ckpt")
        del content["training"]
        for name in ("seed", "flip"):
            del content["loops"]["fit_loop"]["state_dict"]["combined_loader"][0][name]
        torch.save(content, tmp_path / "a.ckpt")
    resumed, module = fit(6, resume=True)
    assert resumed == unbroken[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(), strict=True))
    assert module.seed == whole.seed == 1000
    assert "so it is 1000" in capsys.readouterr().out


def test_another_seed_is_refused_naming_both_and_the_same_is_accepted(fit):
    unbroken, _ = fit(5, seed=4, save=3)
    with pytest.raises(InputError, match=r"started with seed 4, this process has 7: .*Give seed_everything 4"):
        fit(5, seed=7, resume=True)
    assert fit(5, seed=4, resume=True)[0] == unbroken[3:]


def test_another_order_of_the_data_is_refused(data, fit):
    fit(4, save=3, shards={"seed": 5, "flip": True})
    with pytest.raises(InputError, match=r"data\.seed: .* order of seed 5, this run has seed 6\. Set data\.seed 5"):
        fit(5, resume=True, shards={"seed": 6, "flip": True})
    with pytest.raises(InputError, match=r"data\.flip: the checkpoint was trained with True, this run has False"):
        fit(5, resume=True, shards={"seed": 5})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches: the checkpoint has 1, this run 2"),
        ({"precision": "bf16-mixed"}, "trainer.precision: the checkpoint has 32-true, this run bf16-mixed"),
        ({"limit_train_batches": 9}, "trainer.limit_train_batches: the checkpoint has 1.0, this run 9"),
        ({"model": {"clip_norm": 0.001}}, "model.clip_norm: the checkpoint has 1.0, this run 0.001"),
        ({"model": {"clip_norm": None}}, "model.clip_norm: the checkpoint has 1.0, this run None"),
        ({"model": {"draw": "iid"}}, "model.draw: the checkpoint has balanced, this run iid"),
        ({"model": {"label_drop": 0.5}}, "model.label_drop: the checkpoint has 0.1, this run 0.5"),
    ],
)
def test_what_changes_the_training_is_refused_with_both_values(options, said, fit):
    fit(1, save=1)
    with pytest.raises(InputError, match=said):
        fit(2, resume=True, **options)


def test_learning_rate_and_schedule_may_change_with_a_note(fit, capsys):
    fit(1, save=1)
    new = {"lr": 0.02, "warmup": 0, "decay": "cosine", "weight_decay": 0.1}
    steps, module = fit(2, resume=True, model=new)
    assert len(steps) == 1
    assert module.lr == 0.02
    said = capsys.readouterr().err
    assert re.search(r"note: from here on model.lr is 0.02; the checkpoint was trained with 0.0\d+", said)
    assert "note: from here on model.decay is cosine" in said


def test_averages_are_not_lost_or_started_silently(fit, capsys):
    fit(1, EMA(0.9), save=1)
    with pytest.raises(InputError, match=r"ema: the checkpoint has averages \[{'decay': 0.9}\], this trainer no EMA"):
        fit(2, resume=True)
    fit(1, save=1)
    capsys.readouterr()
    fit(2, EMA(0.9), resume=True)
    assert "ema: the checkpoint has no averages; they start from its weights, at step 1" in capsys.readouterr().out


def test_the_same_trainer_continues_with_its_seed(make, data, tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    watch = Watch()
    trainer = L.Trainer(
        max_steps=2, callbacks=[watch], default_root_dir=tmp_path, accelerator="cpu", limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # with dropout each step seeds the global generator
    module, shards = make(net=lambda: tiny(dropout=0.1)), data(val_limit=64)
    trainer.fit(module, datamodule=shards)
    seed = module.seed
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, datamodule=shards)
    assert module.seed == seed
    ids = [i for step, _ in watch.steps for i in step]
    assert len(set(ids)) == len(ids) == 4 * 32


@pytest.mark.parametrize("warm", [False, True])
def test_an_export_made_again_of_a_finished_run_has_the_cost_that_was_paid(warm, make, data, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    folder, options = tmp_path / "run", {}
    if warm:
        options = {"warm_start": str(tmp_path / "start.safetensors")}
        make().export(tmp_path / "start.safetensors")

    def fit(steps, path=None):
        callbacks = [EMA(0.9), Export(), Checkpoint()]
        trainer = L.Trainer(
            max_steps=steps, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            callbacks=callbacks, plugins=[DurableIO()], default_root_dir=folder, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1,
        )  # fmt: skip
        trainer.fit(make(**options), datamodule=data(val_limit=64), ckpt_path=path, weights_only=True)
        return read_card(folder / "model.safetensors")

    whole = fit(4)
    exported = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    path = checkpoints_in(folder / "checkpoints")[-1]
    assert fit(4, path) == whole
    assert (folder / "model.safetensors").read_bytes() == exported
    assert whole.validation["passes"] == (2 + warm) * 64 * 4  # at steps 2 and 4, and of a warm start
    further = fit(6, path)  # a run resumed at step 4 repeats the validation of that step
    assert further.validation["passes"] == (3 + warm) * 64 * 4
