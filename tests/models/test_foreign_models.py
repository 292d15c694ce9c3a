"""Models of other classes are used through `DenoiserProtocol` alone, whatever other attributes they have."""

import pytest
import torch

from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.evaluation.bits import Bits
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.truncated import TruncatedModel
from lightning_tdisent.priors.gaussian import Gaussian
from lightning_tdisent.priors.prior import StandardNormal
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.errors_by_row import held_out_errors
from lightning_tdisent.sampling.guidance import Extras, Guided
from lightning_tdisent.sampling.likelihood import ode_likelihood, variational_bound
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM

NAMES = [name for name in vars(Extras) if not name.startswith("_")]


def called(*_, **__):
    raise AssertionError("this is somebody else's")


ODD = [called, torch.ones(2), "stream", Gaussian([1, 8, 8]), 3]


class Own:
    """Any object with a table, a shape, classes, and x0_hat."""

    def __init__(self, inner):
        self.inner, self.states, self.shape, self.classes = inner, inner.states, inner.shape, inner.classes
        self.at, self.parameters = inner.at, inner.parameters

    def __call__(self, x, s, label=None):
        return self.inner(x, s, label)


class Child(Denoiser):
    """Of our class, with names of a subclass that it is not."""


def marked(model, odd):
    for name in NAMES:
        object.__setattr__(model, name, odd)
    return model


def images_of(model, label=None, **options):
    return torch.cat(list(sample(model, DDIM(), range(20), label=label, **options)))


def numbers(model):
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    held = ImageSet(images, torch.zeros(4, dtype=torch.long), "")
    bound = variational_bound(model, images, range(4)).total
    return bound, ode_likelihood(model, images, range(4)).total, held_out_errors(model, held, [1, 4], 4), held


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", [Own, Child])
def test_models_may_use_any_name(kind, odd, toy, states):
    net = toy([1, 8, 8])
    inner = Denoiser(net, V(), states)
    mine = marked(Own(inner) if kind is Own else Child(net, V(), states), odd)
    assert NAMES == ["residency", "prior", "filled", "differs", "expect", "start", "check_label"]
    assert torch.equal(images_of(mine), images_of(inner))
    assert torch.equal(images_of(mine, by_state=True), images_of(inner))
    expected, found = numbers(inner), numbers(mine)
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3], strict=True))
    held = found[3]
    assert Bits(4).measure(mine, held, held, 4) == Bits(4).measure(inner, held, held, 4)
    cut, other = (TruncatedModel(model, StandardNormal(), 3) for model in (inner, mine))
    assert (other.residency, other.filled, other.differs) == (None, {}, {})
    assert torch.equal(images_of(cut), images_of(other))


@pytest.mark.parametrize("odd", ODD)
def test_guided_models_may_use_any_name(odd, toy, states):
    inner, label = Denoiser(toy([1, 8, 8], classes=3), V(), states), torch.arange(20) % 3
    mine = marked(Own(inner), odd)
    assert torch.equal(images_of(Guided(mine, 2.0), label), images_of(Guided(inner, 2.0), label))
    started = [TruncatedModel(model, StandardNormal(), 3) for model in (inner, mine)]
    one, other = (images_of(Guided(model, 2.0), label) for model in started)
    assert torch.equal(one, other)


def test_a_truncated_composite_has_the_extras_of_the_composite(toy, states):
    class Watched(CompositeDenoiser):
        path = None

        def expect(self, rows):
            self.path = list(rows)

    experts = [Denoiser(toy([1, 8, 8], gain=0.1 * s, classes=2), V(), states, [s]) for s in (1, 2, 4)]
    composite = Watched(experts, "nearest")
    cut = TruncatedModel(composite, StandardNormal(), 3)
    assert (cut.residency, cut.filled, cut.differs) == ("resident", {3: "row 2"}, {})
    with pytest.raises(AttributeError):
        cut.rows  # noqa: B018
    for model in (cut, Guided(cut, 2.0)):
        composite.path = None
        images_of(model)
        assert composite.path == [3, 2, 1]
