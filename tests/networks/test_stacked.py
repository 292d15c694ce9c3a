"""A stack of networks gives each network's outputs for its own samples, and each learns only from these."""

import pytest
import torch
from torch import nn

from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.dit import DiT
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.stacked import obstacle, stack
from lightning_tdisent.networks.unet import UNet

U = {"shape": [1, 4, 4], "channels": [4, 8], "layers": 1, "groups": 2, "head": 4}
D = {"shape": [1, 4, 4], "depth": 1, "heads": 2, "head": 4}


class Odd(Network):
    """Layers without a stacked implementation of their own, one with a child, and a strided grouped convolution."""

    def __init__(self, shape, classes=None, conditioning="none"):
        super().__init__(shape, classes, conditioning)
        self.convolution = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2, bias=False)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.normalise = nn.LayerNorm([4, 2, 2])
        self.thin, self.owner = nn.Conv2d(4, 4, 1, groups=2), Owner()
        self.point, self.last = nn.Conv2d(4, 3, 1, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x, index=None, label=None):
        return self.last(self.point(self.owner(self.normalise(self.thin(self.circular(self.convolution(x)))), 2.0)))


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.randn(4, 1, 1)), nn.Linear(2, 2)

    def forward(self, x, factor):
        return self.inner(x * self.scale * factor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(**U, conditioning="none"),
        lambda: UNet(**U, classes=3, attention=[0]),
        lambda: DiT(**D, classes=3),
        lambda: DiT(**D, conditioning="none"),
        lambda: Odd([2, 4, 4]),
    ],
)
def test_outputs_and_gradients_are_those_of_each_alone(make):
    torch.manual_seed(0)
    S, B = 3, 2
    networks = [make().double() for _ in range(S)]
    for network in networks:
        for p in network.parameters():  # some start at zero and would hide the layers before them
            nn.init.normal_(p, std=0.5)
    x = torch.randn(B, S, *networks[0].shape, dtype=torch.float64)
    index = torch.randint(1, 9, (B, S)) if networks[0].sees_state else None
    label = torch.randint(0, 4, (B, S)) if networks[0].classes else None
    stacked, weights = stack(networks)

    def flat(t):
        return t if t is None else t.flatten(0, 1)

    out = stacked(flat(x), flat(index), flat(label))
    cotangent = torch.randn_like(out)
    found = dict(zip(weights, torch.autograd.grad(out, list(weights.values()), cotangent), strict=True))
    out, cotangent = out.unflatten(0, (B, S)), cotangent.unflatten(0, (B, S))
    for k, network in enumerate(networks):
        own = network(x[:, k], *(t if t is None else t[:, k] for t in (index, label)))
        torch.testing.assert_close(out[:, k], own, rtol=1e-9, atol=1e-9)
        own.backward(cotangent[:, k])
        for name, p in network.named_parameters():
            torch.testing.assert_close(found[name][k], p.grad, rtol=1e-9, atol=1e-9, msg=f"{k} {name}")


class Kept(Network):
    """Network whose output starts at zero, which hides its middle layer before the first step."""

    def __init__(self, shape, classes=None, conditioning="none"):
        super().__init__(shape, classes, conditioning)
        self.first, self.last = nn.Conv2d(shape[0], 4, 3, padding=1), nn.Conv2d(4, shape[0], 3, padding=1)
        nn.init.zeros_(self.last.weight)
        self.middle, self.unused = nn.Identity(), None

    def forward(self, x, index=None, label=None):
        return self.last(self.middle(self.first(x)))


def with_middle(layer):
    return lambda net: setattr(net, "middle", layer)


def with_unused(net):
    net.unused = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: None, ""),
        (
            lambda net: setattr(net, "middle", nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
            "depends on the",
        ),
        (
            lambda net: setattr(net, "middle", nn.BatchNorm2d(4, affine=False)),
            "middle.running_mean is a buffer that training changes",
        ),
        (
            lambda net: setattr(net, "middle", nn.InstanceNorm2d(4, track_running_stats=True)),
            "middle.running_mean is a buffer",
        ),
        (with_unused, "unused.weight is not used"),
        (lambda net: net.first.requires_grad_(False), "first.weight is frozen"),
    ],
)
def test_what_stands_against_stacking_is_seen_before_the_first_step(change, said):
    net = Kept([1, 4, 4])
    change(net)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = obstacle(net)
    assert said in found
    assert bool(said) == bool(found)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("make", [lambda: UNet(**U, classes=3), lambda: DiT(**D, classes=3), lambda: Odd([2, 4, 4])])
def test_nothing_stands_against_these(make):
    assert obstacle(make()) == ""


def test_other_makes_are_refused_and_the_networks_left_as_they_were():
    one, other = UNet(**U), UNet(**{**U, "layers": 2})
    with pytest.raises(InputError, match=r"different arguments cannot be stacked.*'layers': 1.*'layers': 2"):
        stack([one, other])
    before = {k: v.clone() for k, v in one.state_dict().items()}
    _, weights = stack([one, one])
    with torch.no_grad():
        next(iter(weights.values())).zero_()
    assert all(torch.equal(before[k], v) for k, v in one.state_dict().items())
    assert all(p.requires_grad for p in one.parameters())
