"""Observations of images, the input of conditional models, in one file with the operator that made them."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_tdisent.data.decode import IMAGES, decode_image, open_image
from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.operators import GREY_LEVEL, Operator, masks
from lightning_tdisent.diffusion.spec import identity, spec
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.images import from_uint8
from lightning_tdisent.schemas import check_metadata, parse_json

FILE, SCHEMA = "observations.safetensors", 1


@dataclass(frozen=True)
class Observations:
    """Observations y of originals, and the operator that made them.

    y: float (N, C', H, W) in [-1, 1]; item: item numbers, int64 (N,); original: uint8 (N, C, H, W); kernel: masks of
    the operator (N, 1, H, W), or one kernel for all; operator: its class path and arguments; own_mask: whether the
    masks were given by the user instead of made by the operator.
    """

    y: Tensor
    item: Tensor
    original: Tensor
    kernel: Tensor
    operator: dict[str, Any]
    own_mask: bool = False

    @classmethod
    def of(cls, operator: Operator, images: Tensor, item: Tensor) -> "Observations":
        """Observe images uint8 (N, C, H, W) with these item numbers, int64 (N,)."""
        y = operator.observe(from_uint8(images), item)
        return cls(y, item, images, operator.kernel(list(images.shape[1:]), item), spec(operator))

    def masked(self, mask: Tensor) -> "Observations":
        """Return observations of the same originals through a given mask, (1, H, W), 1 where a pixel is known."""
        kernel = mask.float().expand(len(self), 1, -1, -1)
        return replace(self, y=from_uint8(self.original) * kernel, kernel=kernel, own_mask=True)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, numbers: Sequence[int] | Tensor) -> "Observations":
        """Return the observations at these positions."""
        at = torch.as_tensor(numbers, dtype=torch.int64)
        kernel = self.kernel[at] if self.kernel.shape == (len(self.y), 1, *self.y.shape[2:]) else self.kernel
        return replace(self, y=self.y[at], item=self.item[at], original=self.original[at], kernel=kernel)

    def check(self, states: Table, where: str = "observations") -> None:
        """Raise InputError unless they are of the model's operator and image size, with the masks of their items.

        states: table of the model; where: what messages begin with.
        """
        if states.observation is None or states.image_shape is None:
            raise InputError(f"{where}: the model is unconditional; it takes no observations")
        operator: Operator = states.observation.operator
        if identity(mine := spec(operator)) != identity(self.operator):
            raise InputError(f"{where}: made by {self.operator}, the model was trained for {mine}")
        c, *sides = states.image_shape
        asked = {"original": [c, *sides], "y": [operator.channels(c), *sides], "item": []}
        found = {name: list(getattr(self, name).shape) for name in asked}
        n = found["y"][0] if found["y"] else 0
        if odd := [f"{name} {found[name]}" for name in asked if found[name] != [n, *asked[name]]]:
            raise InputError(
                f"{where}: {', '.join(odd)}; the model makes {states.image_shape}, and needs as many of each"
            )
        if not n or self.original.dtype != torch.uint8 or self.item.dtype != torch.int64:
            kinds = f"{self.original.dtype} and {self.item.dtype}"
            raise InputError(
                f"{where}: {n} observations, originals and items in {kinds}; expected at least one, uint8 and int64"
            )
        if self.own_mask:
            self._check_own_masks(operator, where)
            return
        operator.refuse_others(from_uint8(self.original), self.y, self.item, where)
        kernel = operator.kernel([c, *sides], self.item)
        if kernel.shape != self.kernel.shape or not bool(((kernel - self.kernel).abs() <= 1e-6).all()):
            raise InputError(
                f"{where}: the stored kernel, {list(self.kernel.shape)}, is not the one that {type(operator).__name__} "
                f"has for these items, {list(kernel.shape)}: the file was changed, or its masks are of other items"
            )

    def _check_own_masks(self, operator: Operator, where: str) -> None:
        """Raise InputError unless the user's masks are masks, and y is what they leave of the originals."""
        shape = list(self.original.shape[1:])
        refuse_without_masks(operator, shape, where)
        binary = bool(((self.kernel == 0) | (self.kernel == 1)).all())
        if list(self.kernel.shape) != [len(self), 1, *shape[1:]] or not binary:
            raise InputError(f"{where}: the stored masks must be {[len(self), 1, *shape[1:]]} of 0 and 1")
        if not bool(((from_uint8(self.original) * self.kernel - self.y).abs() <= GREY_LEVEL).all()):
            raise InputError(f"{where}: y is not the originals under the masks: the file was changed")

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file atomically."""
        tensors = {k: getattr(self, k).cpu().contiguous() for k in ("y", "item", "original", "kernel")}
        metadata = {"schema": str(SCHEMA), "operator": json.dumps(self.operator)}
        metadata |= {"mask": "own"} if self.own_mask else {}
        write_whole(path, save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Observations":
        """Read a file that `save` wrote; raises InputError for any other."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                check_metadata(metadata, str(path), SCHEMA)
                operator = parse_json(metadata["operator"])
            tensors = load_file(path)
            return cls(**{k: tensors[k] for k in ("y", "item", "original", "kernel")}, operator=operator,
                       own_mask=metadata.get("mask") == "own")  # fmt: skip
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no observations of this project ({type(error).__name__}: {error})") from None


def observed(states: Table, images: Tensor, n: int) -> Tensor | None:
    """Return n observations (n, C', H, W) of uint8 images, repeated in order, for a conditional model, else None."""
    if states.observation is None:
        return None
    item = torch.arange(n) % len(images)
    y: Tensor = states.observation.operator.observe(from_uint8(images[item]), item)
    return y


def refuse_without_masks(operator: Operator, shape: list[int], where: str) -> None:
    """Raise InputError for an operator whose observations are not the image times a mask."""
    if masks(operator, shape, torch.arange(2)) is None:
        raise InputError(
            f"{where}: {type(operator).__name__} has no masks: unlike those of Inpainting, its observations are not "
            "the image times the (B, 1, H, W) of 0 and 1 that its kernel() returns"
        )


def observe(
    states: Table,
    source: str | Path,
    seeds: Sequence[int],
    items: Sequence[int] | None = None,
    mask: str | Path | None = None,
) -> tuple[Observations, str]:
    """Return an observation for every seed, for a conditional model of this table, and a line that describes them.

    source: a file that `Observations.save` wrote, an image, a folder of images in the order of their names, or a data
    set, whose test split is observed. items: numbers of images in it, repeated in order; by default the numbers of the
    seeds for a data set, else all. mask: a black and white image that replaces the operator's masks; white pixels are
    known. Raises InputError.
    """
    source, shape = Path(source), states.image_shape
    if states.observation is None or shape is None:
        raise InputError("--observe is for conditional models; this one is unconditional")
    operator: Operator = states.observation.operator
    if source.is_file() and source.suffix == ".safetensors":
        if mask is not None:
            raise InputError(f"--mask {mask}: {source} already contains masks; give images to --observe")
        kept = Observations.load(source)
        kept.check(states, str(source))
        chosen = _in_turn(items or range(len(kept)), len(kept), len(seeds), source)
        return kept.take(chosen), _said(chosen, source, seeds)
    own = _mask(Path(mask), shape) if mask is not None else None
    if own is not None:
        refuse_without_masks(operator, shape, f"--mask {mask}")
    if pictures := _pictures(source):
        chosen = _in_turn(items or range(len(pictures)), len(pictures), len(seeds), source)
        images = torch.stack([_picture(file, shape) for file in pictures])
    else:
        c, height, width = shape
        asked = items or seeds
        try:
            images = load(source, "test", c, max(asked) + 1, height if height == width else None).images
        except InputError as error:
            raise InputError(
                f"--observe {source}: of shards, the split test is observed; or give an image or a folder: {error}"
            ) from None
        if list(images.shape[1:]) != shape:
            raise InputError(f"--observe {source}: its images are {list(images.shape[1:])}, the model makes {shape}")
        chosen = _in_turn(items or [seed % len(images) for seed in seeds], len(images), len(seeds), source)
    seen = Observations.of(operator, images[chosen], torch.tensor(chosen))
    seen = seen if own is None else seen.masked(own)
    seen.check(states, str(source))
    known = "" if own is None else f", through {mask}: the white pixels are known, {own.mean():.0%} of all"
    return seen, _said(chosen, source, seeds) + known


def _in_turn(items: Sequence[int], there: int, n: int, source: Path) -> list[int]:
    """Return n item numbers, repeated in order; raises InputError for numbers that do not exist."""
    if odd := [item for item in items if not 0 <= item < there]:
        raise InputError(f"--items: item {odd[0]} is not one of the {there} items of {source}, 0 to {there - 1}")
    return [items[k % len(items)] for k in range(n)]


def _said(chosen: Sequence[int], source: Path, seeds: Sequence[int]) -> str:
    if len(chosen) > 1 and all(b - a == 1 for a, b in itertools.pairwise(chosen)):
        which = f"items {chosen[0]} to {chosen[-1]}"
    else:
        few = list(dict.fromkeys(chosen))
        numbers = ", ".join(map(str, few)) if len(few) <= 4 else f"{few[0]}, {few[1]}, {few[2]} .. {few[-1]}"
        which = f"item{'s' if len(few) > 1 else ''} {numbers}" + (", in turn" if 1 < len(few) < len(chosen) else "")
    return f"observed: {which} of {source}, for seeds {seeds[0]} to {seeds[-1]}"


def _pictures(source: Path) -> list[Path]:
    """Return the image, or the images of a folder in the order of their names; an empty list for a data set."""
    if source.is_file():
        return [source] if source.suffix.lower().removeprefix(".") in IMAGES else []
    if not source.is_dir():
        return []
    files = sorted(file for file in source.iterdir() if file.is_file() and not file.name.startswith("."))
    found = [file for file in files if file.suffix.lower().removeprefix(".") in IMAGES]
    if found and (shards := [file for file in files if ".tar" in file.suffixes]):
        raise InputError(
            f"--observe {source}: holds images ({found[0].name} ..) and shards ({shards[0].name} ..); give one of them"
        )
    return found


def _picture(file: Path, shape: Sequence[int]) -> Tensor:
    """Return an image file as uint8 (C, H, W); raises InputError for another size than the model's."""
    image = decode_image(file.read_bytes(), shape[0], None, file)
    if list(image.shape) != list(shape):
        sides, wanted = (f"{w} x {h} pixels" for h, w in (image.shape[1:], shape[1:]))
        raise InputError(f"{file}: an image of {sides}; the model makes {wanted}: crop or scale it to that size")
    return image


def _mask(file: Path, shape: Sequence[int]) -> Tensor:
    """Return a mask (1, H, W), 1 where an image file is white, 0 where it is black; raises InputError for others."""
    if not file.is_file():
        raise InputError(f"--mask {file}: no such file")
    image = open_image(file.read_bytes(), file)
    if image.has_transparency_data:
        *colours, opacity = np.moveaxis(np.asarray(image.convert("RGBA")), 2, 0)
        if len(np.unique(opacity)) > 1 and all(len(np.unique(colour)) == 1 for colour in colours):
            raise InputError(
                f"--mask {file}: all pixels have one colour, and only their opacity differs ({opacity.min()} to "
                f"{opacity.max()}), which does not define a mask. Save it as black and white without transparency"
            )
    grey = _picture(file, [1, *shape[1:]])
    if other := int(((grey != 0) & (grey != 255)).sum()):
        raise InputError(
            f"--mask {file}: {other} of {grey.numel()} pixels are neither black (0) nor white (255); save it as PNG "
            "with only these two: white is known, black is generated"
        )
    if (share := float(grey.float().mean()) / 255) in (0.0, 1.0):
        raise InputError(f"--mask {file}: all of it is {'white, nothing is left to generate' if share else 'black'}")
    return (grey == 255).float()
