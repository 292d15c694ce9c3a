"""Fixtures of small networks, models and expert files."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_tdisent.diffusion.objectives import Objective, V
from lightning_tdisent.diffusion.schedules import Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.models.card import Card
from lightning_tdisent.models.expert import save_expert
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser


class Toy(Network):
    """An elementwise nonlinear network that records the times it was called with."""

    def __init__(
        self, shape: list[int], classes: int | None = None, conditioning: str | None = None, gain: float = 0.7
    ) -> None:
        super().__init__(shape, classes, conditioning)
        self.gain, self.weight, self.seen = gain, nn.Parameter(torch.tensor(gain)), []

    def forward(self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        self.seen.append(time)
        out = torch.tanh(self.weight * x) + 0.3 * torch.sin(3 * x)
        if self.sees_state:
            out = out + 0.2 * torch.sin(self.times(x, time) / 200.0).to(x.dtype)[:, None, None, None]
        label = self.labels(x, label)
        return out if label is None else out + (0.15 * label.to(x.dtype) - 0.2)[:, None, None, None] * (1 + 0.1 * x)


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def states() -> LatentStates:
    """Return a table of rows 250, 500, 750, 1000."""
    return LatentStates(Linear(), S=4)


@pytest.fixture
def unet() -> Callable[..., UNet]:
    """Return a tiny U-Net whose weights are all random."""

    def make(seed: int = 0, shape: tuple[int, ...] = (1, 8, 8), **args: object) -> UNet:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = UNet(list(shape), channels=[8], groups=2, layers=1, mid_attention=False, **args)
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(0.1 * torch.randn_like(p))
        return net.eval()

    return make


@pytest.fixture
def model(unet, states) -> Callable[..., Denoiser]:
    """Return a denoiser of the tiny U-Net on four rows."""

    def make(objective: Objective | None = None, rows: list[int] | None = None, seed: int = 0, **args: object):
        return Denoiser(unet(seed, **args), objective or V(), states, rows).eval()

    return make


FACTS = {
    "module": "SingleState",
    "data": "d1g1t5",
    "weights": "ema",
    "average": {"decay": 0.99, "steps": 3},
    "images_seen": 640,
    "steps": 10,
    "seconds": 1.5,
    "seed": 0,
    "version": "0.1.0",
}


@pytest.fixture
def card_of() -> Callable[..., Card]:
    """Return a card for a denoiser, with made-up facts of its training."""
    return lambda denoiser, **facts: Card.of(denoiser, **(FACTS | facts))


@pytest.fixture
def write(tmp_path, card_of) -> Callable[..., Path]:
    """Write a denoiser to a file of this name, with changes to its card."""

    def to(name: str, denoiser: Denoiser, **changes: object) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_expert(path, denoiser, dataclasses.replace(card_of(denoiser), **changes))
        return path

    return to


@pytest.fixture
def forge(tmp_path, card_of) -> Callable[..., Path]:
    """Write a file whose card is changed as JSON, as with a text editor."""

    def to(denoiser: Denoiser, change: Callable[[dict], object], name: str = "forged") -> Path:
        card = json.loads(json.dumps(dataclasses.asdict(card_of(denoiser))))
        other = change(card)
        path = tmp_path / f"{name}.safetensors"
        metadata = {"card": json.dumps(card if other is None else other)}
        path.write_bytes(save({k: v.contiguous() for k, v in denoiser.state_dict().items()}, metadata))
        return path

    return to


@pytest.fixture
def spoil() -> Callable[[Path], Path]:
    """Overwrite everything after the header of a file."""

    def weights(path: Path) -> Path:
        content = path.read_bytes()
        head = 8 + struct.unpack("<Q", content[:8])[0]
        path.write_bytes(content[:head] + b"\xff" * 16)
        return path

    return weights
