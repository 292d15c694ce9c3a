"""A network is trained only if loading a file of it gives the same function."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.dit import DiT
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.rebuild import faithful, without_weights
from lightning_tdisent.networks.unet import UNet

SHAPE = [1, 4, 4]


class Plain(Network):
    """A convolution times a gain, written according to the rules for networks."""

    def __init__(self, shape, width=3, gain=1.0, classes=None, conditioning=None):
        super().__init__(shape, classes, conditioning)
        self.width, self.gain = width, gain
        self.first, self.last = nn.Conv2d(shape[0], width, 3, padding=1), nn.Conv2d(width, shape[0], 1)
        nn.init.zeros_(self.last.weight)  # a usual initialisation, which hides the layers before it

    def forward(self, x, index=None, label=None):
        return self.last(self.gain * self.first(x).relu())


class NoAttribute(Plain):
    def __init__(self, shape, width=3, rate=0.1, conditioning=None):
        super().__init__(shape, width, conditioning=conditioning)


class ModuleUnderItsName(Plain):
    def __init__(self, shape, dropout=0.1, conditioning=None):
        super().__init__(shape, conditioning=conditioning)
        self.dropout = nn.Dropout(dropout)


class Doubled(Plain):
    def __init__(self, shape, width=3, conditioning=None):
        super().__init__(shape, 2 * width, conditioning=conditioning)


class Rooted(Plain):
    def __init__(self, shape, gain=4.0, conditioning=None):
        super().__init__(shape, gain=gain**0.5, conditioning=conditioning)


class HiddenGain(Network):
    def __init__(self, shape, conditioning=None, **kwargs):
        super().__init__(shape, None, conditioning)
        self.net = Plain(shape, kwargs.get("width", 3), kwargs.get("gain", 1.0))

    def forward(self, x, index=None, label=None):
        return self.net(x)


class Demanding(HiddenGain):
    def __init__(self, shape, conditioning=None, **kwargs):
        super().__init__(shape, conditioning, gain=kwargs["gain"])


class RandomFeatures(Plain):
    def __init__(self, shape, buffer=False, conditioning=None):
        super().__init__(shape, conditioning=conditioning)
        self.buffer, phase = buffer, torch.randn(shape)
        if buffer:
            self.register_buffer("phase", phase, persistent=False)
        else:
            self.phase = phase

    def forward(self, x, index=None, label=None):
        return super().forward(x + self.phase)


class Later(Plain):
    def forward(self, x, index=None, label=None):
        return super().forward(x) + getattr(self, "offset", 0.0)


class Wide(Plain):
    def forward(self, x, index=None, label=None):
        return torch.cat([super().forward(x)] * 2, 1)


class Mean(Plain):
    def forward(self, x, index=None, label=None):
        return super().forward(x).mean((2, 3), keepdim=True)


class TwoArguments(Plain):
    def forward(self, x, t):
        return super().forward(x)


class Broken(Plain):
    def forward(self, x, index=None, label=None):
        return self.last(x)


class Drawn(Plain):
    def forward(self, x, index=None, label=None):
        return super().forward(x) + np.random.default_rng().standard_normal()


def changed(network, **attributes):
    for name, value in attributes.items():
        setattr(network, name, value)
    return network


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NoAttribute(SHAPE), ["NoAttribute", "'rate'", "self.rate = rate"]),
        (lambda: ModuleUnderItsName(SHAPE), ["ModuleUnderItsName.dropout", "Dropout", "another name"]),
        (lambda: Doubled(SHAPE, 5), ["Doubled", "width is 10", "20", "self.width = width"]),
        (lambda: Rooted(SHAPE), ["Rooted", "gain is 2.0", "1.414", "self.gain = gain"]),
        (lambda: HiddenGain(SHAPE, gain=2.0), ["HiddenGain", "net.gain is 2.0, rebuilt 1.0", "dict_kwargs"]),
        (lambda: HiddenGain(SHAPE, width=7), ["net.first.weight [7, 1, 3, 3], rebuilt [3, 1, 3, 3]", "net.last"]),
        (lambda: Demanding(SHAPE, gain=2.0), ["Demanding", "KeyError: 'gain'", "**kwargs"]),
        (lambda: RandomFeatures(SHAPE), ["RandomFeatures", "the tensor phase", "buffers of the state dict"]),
        (lambda: RandomFeatures(SHAPE, buffer=True), ["RandomFeatures", "the tensor phase"]),
        (lambda: changed(Later(SHAPE), offset=0.5), ["Later", "offset is 0.5, rebuilt None"]),
        (lambda: changed(Plain(SHAPE), extra=nn.Linear(2, 3)), ["extra.bias [3], rebuilt none", "extra.weight"]),
        (lambda: Wide(SHAPE), ["Wide", "[2, 1, 4, 4]", "[2, 2, 4, 4]"]),
        (lambda: Mean(SHAPE), ["Mean", "[2, 1, 4, 4]", "[2, 1, 1, 1]"]),
        (lambda: TwoArguments(SHAPE), ["TwoArguments.forward(x, t)", "forward(x, time, label)"]),
        (lambda: Broken(SHAPE), ["Broken fails for x [2, 1, 4, 4]", "RuntimeError", "test_rebuild.py:"]),
        (lambda: Drawn(SHAPE), ["Drawn", "two calls with one input"]),
    ],
    ids=lambda value: None if callable(value) else value[0],
)
def test_what_no_file_would_give_back_is_refused_by_name(make, words):
    torch.manual_seed(3)
    with pytest.raises(InputError) as refusal:
        faithful(make())
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)


class Drops(Plain):
    """Network with dropout and batch normalisation whose constructor reads tensors."""

    def __init__(self, shape, rate=0.5, classes=None, conditioning=None):
        super().__init__(shape, classes=classes, conditioning=conditioning)
        self.rate, self.drop, self.norm = rate, nn.Dropout(rate), nn.BatchNorm2d(shape[0])
        self.rates = [r.item() for r in torch.linspace(0, rate, 3)]
        self.scale = torch.arange(3).exp()

    def forward(self, x, index=None, label=None):
        return super().forward(self.norm(self.drop(x))) + self.rates[1] * self.scale[2]


class AlwaysDropping(Plain):
    def forward(self, x, index=None, label=None):
        return super().forward(nn.functional.dropout(x, 0.5))


class Noisy(Plain):
    def forward(self, x, index=None, label=None):
        return super().forward(x) + torch.randn_like(x)


class MeanOfBatch(Plain):
    def forward(self, x, index=None, label=None):
        return super().forward(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize(
    ("made", "said"), [(AlwaysDropping, "random"), (Noisy, "random"), (MeanOfBatch, "depends on the other images")]
)
def test_what_is_no_function_of_one_image_is_refused(made, said):
    with pytest.raises(InputError, match=f"{made.__name__}: .*{said}"):
        faithful(made(SHAPE))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plain(SHAPE, 5, 0.3, classes=4),
        lambda: Drops(SHAPE),
        lambda: UNet([1, 8, 8], [8], 1, groups=4, classes=3, dropout=0.3),
        lambda: UNet([1, 8, 8], [8], 1, groups=4, conditioning="none"),
        lambda: DiT([1, 8, 8], depth=1, heads=1, head=8, classes=2, dropout=0.1),
        lambda: Plain(SHAPE).double(),
    ],
    ids=["plain", "drops", "unet", "agnostic", "dit", "double"],
)
def test_what_is_kept_as_given_is_given_back(make):
    network = make().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    other = faithful(network)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert all(m.training for m in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    x = torch.randn(2, *network.shape, dtype=next(network.parameters()).dtype)
    index = torch.tensor([3, 5]) if network.sees_state else None
    with torch.no_grad():
        assert torch.equal(network.eval()(x, index), other.eval()(x, index))


def test_what_a_constructor_computes_has_its_values():
    assert next(without_weights(spec(Plain(SHAPE))).parameters()).is_meta
    drops = without_weights(spec(Drops(SHAPE, rate=0.5)))
    assert drops.rates == [0.0, 0.25, 0.5]
    assert torch.equal(drops.scale, torch.arange(3).exp())
