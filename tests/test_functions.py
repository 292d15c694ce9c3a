"""Whole commands as functions, and what Python users meet first: names, short texts, a plain Trainer."""

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

import lightning_tdisent as td
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.weights import EMA, Export

ROOT = Path(__file__).parents[1]


def module():
    return td.ReducedStates(
        td.UNet([1, 8, 8], channels=[8], groups=2, layers=1, mid_attention=False), td.LatentStates(S=4)
    )


def data(digits):
    return td.ImageShards(str(digits), channels=1, batch_size=32, val_limit=20)


def test_public_names_are_listed_and_importing_the_package_imports_no_torch():
    assert {"evaluate", "plan_fleet", "run_fleet", "compose", "sample", "load_model", "InputError"} <= {
        *dir(td),
        *td.__all__,
    }
    assert all(getattr(td, name) is not None for name in td.__all__)
    program = "import sys, lightning_tdisent as td; dir(td); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_plain_trainer_averages_exports_and_logs(digits, tmp_path, monkeypatch, capsys):
    """Trained with default arguments in the current folder, with Lightning's logger and checkpoints."""
    monkeypatch.chdir(tmp_path)
    mine = module()
    trainer = L.Trainer(max_steps=12, accelerator="cpu", log_every_n_steps=5, enable_progress_bar=False)
    trainer.fit(mine, data(digits))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert all(kinds.count(kind) == 1 for kind in (Guard, LossPerState, EMA, Export))
    place = Path(trainer.log_dir)
    assert f"weights of step 12: {place / 'model.safetensors'}" in capsys.readouterr().out
    model = td.load_model(place)
    assert (model.cards[0].weights, model.cards[0].steps) == ("ema", 12)
    live = dict(mine.denoiser.named_parameters())
    assert any(not torch.equal(p, live[name]) for name, p in model.named_parameters())
    ckpt = next(place.glob("checkpoints/*.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(td.load_model(ckpt).parameters(), model.parameters(), strict=True))
    assert not list(tmp_path.glob("*.safetensors"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place))
    events.Reload()
    assert "train/loss" in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_callbacks_of_the_user_are_kept_and_a_folder_of_ones_own_gets_the_weights(digits, tmp_path):
    own = EMA(0.5)
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[own], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module(), data(digits))
    assert [c for c in trainer.callbacks if isinstance(c, EMA)] == [own]
    assert td.load_model(tmp_path).cards[0].average == {"decay": 0.5, "steps": 3}


def test_texts_of_models_are_one_line(model, write, tmp_path):
    one = td.load_model(write("m", model(classes=3)))
    weights = sum(p.numel() for p in one.parameters())
    assert repr(one) == f"Denoiser(UNet, rows [1, 2, 3, 4] of 4, images [1, 8, 8], 3 classes, {weights:,} weights)"
    composite = td.CompositeDenoiser([model(rows=[s]) for s in (1, 2, 3, 4)])
    assert repr(composite).startswith("CompositeDenoiser(4 experts, rows ")
    assert "from row 2, StandardNormal" in repr(td.load_truncated(write("n", model()), "cut:2"))


def test_evaluate_is_the_command(model, write, digits, tmp_path, capsys):
    from lightning_tdisent.cli import main

    file = write("m", model())
    rows = td.evaluate({"mine": file}, digits, "digits", n=70, device="cpu", n_held_out=20)
    assert [row["name"] for row in rows] == ["mine", "20 real images, held out"]
    words = ["evaluate", str(file), "--data", str(digits), "--protocol", "digits", "-n", "70", "--held-out", "20"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "e")]) == 0
    assert f"{rows[0]['fd_digits']:.3g}" in capsys.readouterr().out.replace(",", "")
    kept = td.evaluate(file, digits, "digits", td.DDIM(), tmp_path / "kept", n=70, device="cpu", n_held_out=20)
    assert kept[0]["fd_digits"] == rows[0]["fd_digits"]
    assert (tmp_path / "kept" / "report.html").exists()
    with pytest.raises(InputError, match="nowhere: not there"):
        td.evaluate("nowhere", digits, "digits")


def test_a_fleet_is_planned_trained_and_composed(tmp_path, monkeypatch):
    config = tmp_path / "fleet.yaml"
    text = f"configs: [{ROOT / 'experiments/digits/experts8.yaml'}]\nbudget: {{rule: uniform, images: 9000}}\n"
    config.write_text(text, encoding="utf-8")
    fleet = td.plan_fleet(
        config, tmp_path / "fleet", budget__images=64 * 8, set__data__val_limit=20, set__trainer__callbacks=[],
        set__model__network__channels=[8, 16], set__model__network__groups=4,
    )  # fmt: skip
    assert len(fleet.names) == 8
    files = td.run_fleet(fleet, workers=2)
    model = td.load_model(td.compose(files, tmp_path / "composite"))
    assert len(model.cards) == 8
    assert td.run_fleet(tmp_path / "fleet") == files


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_logger_with_one_folder_for_all_trainings_does_not_get_the_weights(digits, tmp_path, monkeypatch):
    from lightning.pytorch.loggers.logger import DummyLogger

    class Shared(DummyLogger):
        save_dir = str(tmp_path / "shared")

    def fit(**place):
        L.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=Shared(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            **place,
        ).fit(module(), data(digits))

    monkeypatch.chdir(tmp_path)
    fit(default_root_dir=tmp_path / "own")
    fit()  # nowhere, which is said
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*.safetensors")] == [Path("own/model.safetensors")]
