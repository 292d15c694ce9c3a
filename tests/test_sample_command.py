"""The command sample: images are written as they are drawn, and the same command resumes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.evaluation import pictures
from lightning_tdisent.models.compose import short_names


@pytest.fixture
def weights(write, model):
    return str(write("m", model()))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def sampled(weights, out, *words):
    return main(["sample", weights, "--out", str(out), "--seeds", "0:40", "--device", "cpu", *words])


def test_what_was_drawn_before_an_interruption_is_kept_and_completed(weights, tmp_path, monkeypatch, capsys):
    assert sampled(weights, whole := tmp_path / "whole") == 0
    real, saved = pictures.save_png, []

    def interrupted(picture, path):
        if len(saved) == 20:
            raise KeyboardInterrupt
        saved.append(path)
        real(picture, path)

    broken = tmp_path / "broken"
    monkeypatch.setattr(pictures, "save_png", interrupted)
    assert sampled(weights, broken) == 130
    monkeypatch.undo()
    assert len(files(broken)) == 20
    (broken / "000003.png").write_bytes((broken / "000003.png").read_bytes()[:-9])  # a file that lost its end
    capsys.readouterr()
    assert sampled(weights, broken) == 0
    assert f"going on with {broken}: 19 of 40 images are there" in capsys.readouterr().out
    assert files(broken) == files(whole)
    assert (tmp_path / "broken.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert sampled(weights, broken) == 0
    assert "40 of 40 images are there" in capsys.readouterr().out


def test_more_seeds_are_added_to_a_folder(weights, tmp_path):
    assert sampled(weights, tmp_path / "a") == 0
    assert sampled(weights, tmp_path / "a", "--seeds", "30:50") == 0
    assert len(files(tmp_path / "a")) == 50


@pytest.mark.parametrize(
    ("words", "what"),
    [(["--sampler", "ancestral"], "sampler"), (["--steps", "2"], "sampler"), (["--prior", "cut:2"], "prior")],
)
def test_images_of_something_else_are_refused(words, what, weights, tmp_path, capsys):
    assert sampled(weights, tmp_path / "a") == 0
    before = files(tmp_path / "a")
    assert sampled(weights, tmp_path / "a", *words) == 2
    assert f"drawn with other {what};" in capsys.readouterr().err
    assert files(tmp_path / "a") == before


def test_other_weights_unknown_images_and_a_damaged_record_are_refused(weights, write, model, tmp_path, capsys):
    assert sampled(weights, tmp_path / "a") == 0
    assert sampled(str(write("other", model(seed=5))), tmp_path / "a") == 2
    assert "drawn with other weights;" in capsys.readouterr().err
    record = tmp_path / "a" / "drawn.json"
    content = json.loads(record.read_bytes())
    for text, said in ((json.dumps(content | {"schema": 99}), "version"), ("{", "damaged"), ("[]", "damaged")):
        record.write_text(text, encoding="utf-8")
        assert sampled(weights, tmp_path / "a") == 2
        assert said in capsys.readouterr().err
    record.unlink()
    assert sampled(weights, tmp_path / "a") == 2
    assert "already holds images" in capsys.readouterr().err


def test_the_grid_enlarges_small_images_by_a_whole_factor(weights, tmp_path):
    assert sampled(weights, tmp_path / "a", "--seeds", "0:2") == 0
    small = np.array(Image.open(tmp_path / "a" / "000001.png"))
    grid = np.array(Image.open(tmp_path / "a.png"))
    assert grid.shape == (50, 99)  # 2 images of 48 pixels, 1 pixel around each
    assert np.array_equal(grid[1:49, 50:98], small.repeat(6, 0).repeat(6, 1))


def test_received_files_of_any_name_are_a_model(write, model, tmp_path, capsys):
    for s in (1, 2, 3, 4):
        write(f"from machine {s}", model(rows=[s], seed=s))
    (tmp_path / "train.index.safetensors").write_bytes(b"no card")
    assert main(["compose", str(tmp_path), "--out", str(tmp_path / "composite")]) == 0
    assert sampled(str(tmp_path), tmp_path / "loose") == 0
    assert sampled(str(tmp_path / "composite"), tmp_path / "composed") == 0
    assert files(tmp_path / "loose") == files(tmp_path / "composed")


def test_a_run_has_its_own_sampler_and_unfinished_its_newest_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    words = [
        "--config",
        "experiments/digits/reduced8.yaml",
        "--trainer.callbacks",
        "[]",
        "--trainer.accelerator",
        "cpu",
    ]
    small = ["--model.network.channels", "[8,16]", "--model.network.groups", "4", "--data.val_limit", "20"]
    steps = ["--trainer.max_steps", "4", "--checkpoint.every", "2"]
    assert main(["fit", *words, *small, *steps, "--run", str(run)]) == 0
    capsys.readouterr()
    assert sampled(str(run), tmp_path / "own") == 0
    assert "sampler: DPMSolver, clip 1.0, every row (of the run;" in capsys.readouterr().out
    assert sampled(str(run), tmp_path / "other", "--sampler", "ddim") == 0
    assert "sampler: DDIM, eta 0.0, clip 1.0, every row\n" in capsys.readouterr().out
    assert files(tmp_path / "own") != files(tmp_path / "other")
    assert sampled(str(run), tmp_path / "few", "--steps", "3") == 0
    assert "sampler: DPMSolver, steps 3, clip 1.0 (of the run;" in capsys.readouterr().out
    assert sampled(str(run / "model.safetensors"), tmp_path / "file") == 0
    assert files(tmp_path / "file") == files(tmp_path / "own")
    (run / "model.safetensors").unlink()
    capsys.readouterr()
    assert sampled(str(run), tmp_path / "unfinished") == 0
    said = capsys.readouterr()
    newest = run / "checkpoints" / "step-000000004.ckpt"
    assert f"{run} is not finished: its newest checkpoint is used, {newest}" in said.err
    assert "sampler: DPMSolver" in said.out
    assert files(tmp_path / "unfinished") == files(tmp_path / "own")
    argv = ["evaluate", str(run), "--data", "data/digits", "--protocol", "digits", "-n", "70", "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "e")]) == 0
    row = json.loads((tmp_path / "e" / "results.json").read_bytes())[0]
    assert (row["name"], row["networks"]) == ("run", 1)


def test_models_are_named_by_the_last_parts_that_differ():
    paths = [Path("runs/a/seed0/model.safetensors"), Path("runs/b/seed0"), Path("runs/b/one.safetensors")]
    assert short_names(paths) == ["a/seed0", "b/seed0", "b/one.safetensors"]
    assert short_names(paths[:1]) == ["seed0"]
    assert short_names([Path("runs/x"), Path("runs/x")]) == ["runs/x", "runs/x"]


def test_a_config_that_is_not_of_a_run_names_no_sampler(weights, tmp_path, capsys):
    for k, text in enumerate(("[1, 2]", "model: UNet", "model: {init_args: null}", "")):
        place = tmp_path / f"place {k}"
        place.mkdir()
        (place / "other.safetensors").write_bytes(Path(weights).read_bytes())
        (place / "config.yaml").write_text(text, encoding="utf-8")
        assert sampled(str(place), tmp_path / f"images {k}") == 0
        assert "sampler: DDIM, eta 0.0, clip 1.0, every row (default)" in capsys.readouterr().out
