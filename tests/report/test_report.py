import dataclasses
import json
import re

import pytest
import torch

from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.report.evaluate import Contender, evaluate, table, training_cost
from lightning_tdisent.report.page import nearest, write_report
from lightning_tdisent.report.study import Study
from lightning_tdisent.sampling.evaluation import grid, x0_errors
from lightning_tdisent.sampling.expert import load_expert, save_expert
from lightning_tdisent.sampling.sampler import DDIM
from lightning_tdisent.streaming.shards import load


@pytest.fixture
def model(tmp_path):
    def make(name, **states):
        torch.manual_seed(0)
        net = UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4)
        module = ReducedStates(net, LatentStates(**states))
        module.images_seen, module.seconds = 1000, 2.0
        path = tmp_path / name / "model.safetensors"
        save_expert(path, module.denoiser, module.card("ema", 0.9))
        return path.parent

    return make


@pytest.fixture
def sets(digits):
    return load(digits, "train", 1), load(digits, "test", 1)


def test_rows_say_what_was_measured(model, sets):
    few, other = model("few", S=4), model("native", S=4, kind="native", terminal_bound=1.0)
    contenders = [Contender("few", few, DDIM()), Contender("native", other, DDIM(steps=2))]
    rows, images = evaluate(contenders, *sets, "digits", 20, first_seed=5, batch_size=7)
    first, native, real = rows
    denoiser = load_expert(few / "model.safetensors")[0]
    errors = x0_errors(denoiser, sets[1].images, range(297), [1, 2, 3, 4]).mean(1)
    assert list(first["x0_mse"].values()) == pytest.approx(errors.tolist())
    assert list(first["eps_mse"].values()) == pytest.approx((errors * denoiser.states.log_snr[1:, 0].exp()).tolist())
    assert "eps_mse" not in native  # other noise levels at the same indices
    assert (first["steps"], native["steps"]) == (4, 2)
    assert first["protocol"] == native["protocol"] != real["protocol"]
    assert (first["images_seen"], first["training_seconds"]) == (1000, 2.0)
    assert real["fd_digits"] < first["fd_digits"]
    assert images["few"].shape == (20, 1, 8, 8)
    text = table(rows)
    assert len({len(row) for row in text}) == 1
    assert text[3][0] == "297 real images, held out"


def test_cost_counts_every_expert_and_a_shared_start_once(model):
    _, card = load_expert(model("few", S=4) / "model.safetensors")
    one = training_cost([card])
    # the first convolution alone: 2 x 9 x 1 x 8 x 64 per image, three times, 1000 images
    assert one["training_flops"] > 3 * 1000 * 2 * 9 * 8 * 64
    assert training_cost([card, card])["training_flops"] == 2 * one["training_flops"]
    parent = {"sha256": "a", "network": card.network, "images_seen": 500, "seconds": 7.0}
    warm = dataclasses.replace(card, parents=[parent])
    both = training_cost([warm, warm])
    assert both["images_seen"] == 1000 + 1000 + 500
    assert both["images_seen_longest"] == 1500
    assert both["training_flops"] == 2.5 * one["training_flops"]
    assert (both["training_seconds"], both["training_seconds_longest"]) == (11.0, 9.0)


def test_the_wrong_features_and_steps_are_refused_before_any_work(model, sets):
    with pytest.raises(InputError, match="5 steps on a table of 4"):
        evaluate([Contender("few", model("few", S=4), DDIM(steps=5))], *sets, "digits", 20)
    with pytest.raises(InputError, match="features 'mnist' take"):
        evaluate([Contender("x", model("x", S=4), DDIM())], *sets, "mnist", 20)
    with pytest.raises(InputError, match="two images at least"):
        evaluate([Contender("y", model("y", S=4), DDIM())], *sets, "digits", 1)


def test_a_page_never_mixes_protocols(model, sets, tmp_path):
    contender = Contender("few", model("few", S=4), DDIM())
    rows = [{"protocol": "a", "source": "x"}, {"protocol": "b", "source": "y"}]
    with pytest.raises(InputError, match=r"must not mix protocols.*\['a', 'b'\]"):
        write_report(tmp_path / "r.html", "t", rows, {}, [contender], sets[1])


def test_a_study_is_kept_and_shown_again(model, digits, tmp_path):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    folder = model("few", S=4)
    contenders = [{"name": "few & <fair>", "source": str(folder), "sampler": spec}]
    study = Study(str(tmp_path / "s"), "A title", contenders, str(digits), "digits", n=20)
    study.evaluate()
    page = Study.load(tmp_path / "s").write_report().read_text()
    assert "few &amp; &lt;fair&gt;" in page
    results = json.loads((tmp_path / "s" / "results.json").read_text())
    assert f"{results[0]['fd_digits']:.3f}" in page
    assert results[0]["protocol"] in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # one file that needs no other
    with pytest.raises(InputError, match="keeps no finished study"):
        Study.load(tmp_path)


def test_grid_and_nearest_are_what_they_say():
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 2, 2) * 50
    tiles = grid(images, 2)
    assert tiles.shape == (1, 7, 7)
    assert tiles[0, 1:3, 4:6].eq(50).all()
    assert tiles[0, 4:6, 1:3].eq(100).all()
    assert tiles[0, 0].eq(128).all()
    training = torch.tensor([0, 90, 200], dtype=torch.uint8)[:, None, None, None].expand(3, 1, 2, 2)
    assert nearest(images, training)[:, 0, 0, 0].tolist() == [0, 90, 90]
