"""Operators of conditional models: checks before a training, and an operator that reads a file."""

import pytest
import torch
from torch.nn import functional as F

from lightning_tdisent.diffusion.operators import Edges, Grey, Inpainting, Operator, SuperResolution, probe
from lightning_tdisent.errors import InputError


class Blur(Operator):
    def observe(self, x0, item):
        return F.avg_pool2d(x0, 3, 1, 1, count_include_pad=False)


class RandomAtEachCall(Operator):
    def observe(self, x0, item):
        return x0 * (torch.rand_like(x0[:, :1]) > 0.5)


class RandomByPlace(Operator):
    def observe(self, x0, item):
        return x0 * torch.rand(len(x0), 1, 1, 1, generator=torch.Generator().manual_seed(len(x0)))


class OutOfRange(Operator):
    def observe(self, x0, item):
        return 127.5 * (x0 + 1)


class NotFinite(Operator):
    def observe(self, x0, item):
        return x0.log()


class NoChannels(Operator):
    def observe(self, x0, item):
        return x0.mean(1, keepdim=True)


class ChannelsOfNothing(NoChannels):
    def channels(self, channels):
        return None


class Small(Operator):
    def observe(self, x0, item):
        return x0[..., ::2, ::2]


class InPlace(Operator):
    def observe(self, x0, item):
        return x0.mul_(0.5)


class Bytes(Operator):
    def observe(self, x0, item):
        return ((x0 + 1) * 127.5).to(torch.uint8)


class Forgets(Blur):
    def __init__(self, strength: int = 3) -> None:
        pass


class NoKernel(Blur):
    def kernel(self, shape, item):
        return None


@pytest.mark.parametrize("operator", [Inpainting(), SuperResolution(2), Edges(), Grey(), Blur()])
def test_valid_operators_are_accepted_and_the_global_generator_is_unchanged(operator):
    before = torch.random.get_rng_state()
    probe(operator, [3, 8, 8])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        (RandomAtEachCall(), "another observation at a second call"),
        (RandomByPlace(), "of an image alone than in a batch"),
        (OutOfRange(), "values from 0 to 255"),
        (NotFinite(), "values from nan to nan"),
        (NoChannels(), r"makes \[4, 1, 8, 8\] of images \[4, 3, 8, 8\], \[4, 3, 8, 8\] is wanted"),
        (ChannelsOfNothing(), r"channels\(3\) returns None"),
        (Small(), r"makes \[4, 3, 4, 4\]"),
        (InPlace(), "changes its input"),
        (Bytes(), "returns torch.uint8"),
        (Forgets(), r"constructor arguments \['strength'\]"),
        (NoKernel(), "kernel: masks"),
        (SuperResolution(3), "8x8 is not divisible by factor 3"),
    ],
)
def test_what_cannot_be_sampled_is_named(operator, said):
    with pytest.raises(InputError, match=said):
        probe(operator, [3, 8, 8])
