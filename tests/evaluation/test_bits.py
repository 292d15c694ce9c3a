import json

import pytest
import torch

from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.bits import Bits
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.models.model_prior import ModelPrior
from lightning_tdisent.models.truncated import TruncatedModel
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.errors_by_row import x0_errors
from lightning_tdisent.sampling.likelihood import variational_bound


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ReducedStates(UNet([1, 8, 8], [8, 16], 1, classes=10, groups=4), LatentStates(S=4)).denoiser.eval()


def test_variances_come_from_training_images_and_labels_reach_the_network(model, digits):
    held_out, training = load(digits, "test", 1), load(digits, "train", 1)
    found = Bits(n=12).measure(model, held_out, training, batch_size=5)
    errors = torch.zeros(5, dtype=torch.float64)
    each = [training.images[:12], range(12), [1, 2, 3, 4], training.labels[:12]]
    errors[1:] = x0_errors(model, *each).mean(1)
    terms = variational_bound(model, held_out.images[:12], range(12), held_out.labels[:12], errors=errors)
    assert found["bpd"] == pytest.approx(terms.bpd[0], rel=1e-6)
    assert (found["bpd_low"], found["bpd_high"]) == pytest.approx(
        (terms.bpd[0] - terms.bpd[1], sum(terms.bpd)), rel=1e-5
    )
    others = variational_bound(model, held_out.images[:12], range(12), held_out.labels[:12].flip(0), errors=errors)
    assert others.bpd[0] != pytest.approx(terms.bpd[0], rel=1e-7)
    assert "discrete decoder, 12 held-out images, variances by 12 training images" in found["bpd_how"]
    assert json.dumps(found, allow_nan=False)
    more = Bits(n=5000).measure(model, held_out, training, batch_size=250)
    assert "297 held-out images, variances by 1500 training images" in more["bpd_how"]


def test_what_has_no_density_or_too_few_rows_says_so_and_costs_nothing_else(model, digits):
    held_out = load(digits, "test", 1, 12)
    started = TruncatedModel(model, ModelPrior("nowhere"), 2)
    assert Bits(n=9).measure(started, held_out, held_out, 5)["bpd_refused"] == "ModelPrior has no density"
    both = Bits(n=9, ode=True).measure(model, held_out, held_out, 5)
    assert "bpd_ode integrates from row to row, and needs at least 100 rows; there are 4" in both["bpd_refused"]
    assert "bpd_ode" not in both
    assert both["bpd"] > 0


@pytest.mark.parametrize(
    "wrong", [{"n": 1}, {"n": -3}, {"n": 2.5}, {"probes": 0}, {"decoder": "foo"}, {"nn": 3}, True, ["n"], None]
)
def test_wrong_bits_are_refused(wrong):
    with pytest.raises(InputError, match="bits: "):
        Bits.of_mapping(wrong)
