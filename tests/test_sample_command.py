"""The command sample: images are written as they are drawn, and the same command resumes."""

import json

import numpy as np
import pytest
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.evaluation import pictures


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
