"""Read the real images that a model is compared with: shards, .npz files and folders of images."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.npz import is_npz, read_npz
from lightning_tdisent.data.raw import Item, find_source
from lightning_tdisent.data.shards import Shards, load, refuse_shared
from lightning_tdisent.data.splits import canonical
from lightning_tdisent.errors import InputError


@dataclass(frozen=True)
class RealImages:
    """Real images by number: take gives those of int64 (B,) as uint8 (B, C, H, W); digest: of their files."""

    digest: str
    n: int
    take: Callable[[Tensor], Tensor]


def real_images(path: str | Path, split: str, channels: int, size: int | None = None) -> RealImages:
    """Images of a split, or of an .npz, decoded when they are taken, on all cores where single ones can be read."""
    if is_npz(path):
        held = load(path, split, channels)
        return RealImages(held.digest, len(held), lambda numbers: held.images[numbers])
    shards = Shards.open(path, split, Decoder(channels, size))
    whole: list[Tensor] = []

    def some(numbers: Tensor) -> Tensor:
        batch = shards.batch(numbers.tolist())
        if "image" not in batch:
            raise InputError(f"{path}: holds latents, whose decoder is no part of an evaluation; name shards of images")
        return batch["image"]

    def take(numbers: Tensor) -> Tensor:
        if shards.random_access:
            return _spread(some, numbers)
        if not whole:
            whole.append(shards.decoded().images)
        return whole[0][numbers]

    return RealImages(shards.digest, len(shards), take)


def refuse_trained(held_out: tuple[str, str], reference: tuple[str, str], trained: Mapping[str, str | None]) -> None:
    """Refuse held-out images that are those of the reference, or that a model was trained on.

    held_out, reference: data and split; trained: digests of the data of models by their names. A split that is asked
    for by the same name as the reference, or by that of training images, is what was asked for. Of an .npz nothing
    but its format is checked.
    """
    for path in {path for path, _ in (held_out, reference) if is_npz(path)}:
        read_npz(path)
    path, split = held_out
    if is_npz(path):
        return
    shards = Shards.open(path, split, Decoder())
    if canonical(split) != canonical(reference[1]) and not is_npz(reference[0]):
        remedy = "Name other splits with --split and --reference (also keys of a study), or their shards by patterns"
        refuse_shared(shards, Shards.open(*reference, Decoder()), f"{split}, {reference[1]}", remedy)
    mine = [name for name, digest in trained.items() if digest == shards.digest]
    if mine and canonical(split) != "train":
        raise InputError(
            f"{mine[0]} was trained on the images of {split} in {path} (data digest {shards.digest}), which are to be "
            "held out. Name other images"
        )
    for name in mine:
        print(f"note: {name} was trained on the images of {split}, whose errors are no held-out ones", file=sys.stderr)


def image_files(path: str | Path, split: str, shape: Sequence[int]) -> RealImages:
    """Images of (C, H, W) = shape in a folder, an .npz or any data set that `data prepare` reads, in their order.

    Raises InputError if there are fewer than two, or the first has another size; `take` does for any other.
    """
    if is_npz(path):
        found = real_images(path, split, shape[0])
        size = list(found.take(torch.arange(1)).shape[1:])
        if found.n < 2 or size != list(shape):
            raise InputError(f"{path} has {found.n} images of {size}, expected two or more of {list(shape)}")
        return found
    try:
        source, decoder = find_source(path, split, labels="none"), Decoder(shape[0])
    except InputError as error:
        if not re.search(r" --[a-z]", str(error)):
            raise
        raise InputError(
            f"{error} (an option of data prepare; here name the folder of the images alone, or prepare them first)"
        ) from None
    if len(source) < 2:
        raise InputError(f"{path}: two images at least make a distribution, it has {len(source)}")

    def decoded(item: Item) -> Tensor:
        image: Tensor = decoder(item.members, f"{path}/{item.name}")["image"]
        if list(image.shape) != list(shape):
            raise InputError(f"{path}/{item.name} is an image of {list(image.shape)}, the real ones are {list(shape)}")
        return image

    def take(numbers: Tensor) -> Tensor:
        items = [source[n] for n in numbers.tolist()]  # by one thread: a source may have one open file
        return _spread(lambda part: torch.stack([decoded(items[k]) for k in part.tolist()]), torch.arange(len(items)))

    decoded(source[0])
    return RealImages(source.fingerprint(), len(source), take)


def _spread(take: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
    """What it takes of these numbers, by a thread on each core; none is left, as processes may be forked later."""
    parts = numbers.split(32)
    if len(parts) == 1:
        return take(numbers)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.cat(list(pool.map(take, parts)))
