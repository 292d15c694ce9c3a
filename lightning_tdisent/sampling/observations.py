"""What conditional models are given: observations of images, kept in one file with what they were made by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_tdisent.diffusion.operators import Operator
from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.sampling.sampler import from_uint8

FILE = "observations.safetensors"


@dataclass(frozen=True)
class Observations:
    """Observations y float (N, C', H, W) in [-1, 1] of items int64 (N,), the originals uint8 (N, C, H, W), and by what.

    operator: its class path and arguments; kernel: its masks (N, 1, H, W), or the one kernel of all.
    """

    y: Tensor
    item: Tensor
    original: Tensor
    kernel: Tensor
    operator: dict[str, Any]

    @classmethod
    def of(cls, operator: Operator, images: Tensor, item: Tensor) -> "Observations":
        """Those of images uint8 (N, C, H, W) with these item numbers."""
        y = operator.observe(from_uint8(images), item)
        return cls(y, item, images, operator.kernel(list(images.shape[1:]), item), spec(operator))

    def __len__(self) -> int:
        return len(self.y)

    def take(self, numbers: Sequence[int] | Tensor) -> "Observations":
        """Some of them."""
        at = torch.as_tensor(numbers, dtype=torch.int64)
        kernel = self.kernel[at] if self.kernel.shape == (len(self.y), 1, *self.y.shape[2:]) else self.kernel
        return Observations(self.y[at], self.item[at], self.original[at], kernel, self.operator)

    def check(self, states: LatentStates, where: str = "observations") -> None:
        """Refuse those of another operator or image size than a model's, and masks of other items."""
        if states.condition is None or states.image_shape is None:
            raise InputError(f"{where}: the model is unconditional, and takes none")
        operator: Operator = states.condition.operator
        if (mine := spec(operator)) != self.operator:
            raise InputError(f"{where}: made by {self.operator}, the model was trained for {mine}")
        c, *sides = states.image_shape
        asked = {"original": [c, *sides], "y": [operator.channels(c), *sides], "item": []}
        found = {name: list(getattr(self, name).shape) for name in asked}
        n = found["y"][0] if found["y"] else 0
        if odd := [f"{name} {found[name]}" for name in asked if found[name] != [n, *asked[name]]]:
            raise InputError(
                f"{where}: {', '.join(odd)}, the model makes {states.image_shape} and wants as many of each"
            )
        if not n or self.original.dtype != torch.uint8 or self.item.dtype != torch.int64:
            kinds = f"{self.original.dtype} and {self.item.dtype}"
            raise InputError(
                f"{where}: {n} observations, of originals and items in {kinds}; uint8 and int64 are wanted"
            )
        operator.refuse_others(from_uint8(self.original), self.y, self.item, where)

    def save(self, path: str | Path) -> None:
        """Write them to a .safetensors file; never half-written."""
        tensors = {k: getattr(self, k).cpu().contiguous() for k in ("y", "item", "original", "kernel")}
        write_whole(path, save(tensors, {"operator": json.dumps(self.operator)}))

    @classmethod
    def load(cls, path: str | Path) -> "Observations":
        """Read a file; refuses what `save` has not written."""
        try:
            with safe_open(path, "pt") as file:
                operator = json.loads((file.metadata() or {})["operator"])
            tensors = load_file(path)
            return cls(**{k: tensors[k] for k in ("y", "item", "original", "kernel")}, operator=operator)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no observations of this project ({type(error).__name__}: {error})") from None


def observed(states: LatentStates, images: Tensor, n: int) -> Tensor | None:
    """Observations (n, C', H, W) of images uint8, in turn, for a conditional model; None for any other."""
    if states.condition is None:
        return None
    item = torch.arange(n) % len(images)
    y: Tensor = states.condition.operator.observe(from_uint8(images[item]), item)
    return y
