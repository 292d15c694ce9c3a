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
from lightning_tdisent.data.held_out import refuse_shared
from lightning_tdisent.data.npz import is_npz, read_npz
from lightning_tdisent.data.raw import Item, find_source
from lightning_tdisent.data.shards import Shards, load
from lightning_tdisent.data.splits import canonical
from lightning_tdisent.errors import InputError


@dataclass(frozen=True)
class RealImages:
    """A set of n images; digest: of their files; take: maps image numbers int64 (B,) to uint8 (B, C, H, W)."""

    digest: str
    n: int
    take: Callable[[Tensor], Tensor]


def real_images(path: str | Path, split: str, channels: int, size: int | None = None) -> RealImages:
    """Return the images of a split, decoded on all cores when they are taken, or of an .npz file.

    channels: number of channels; size: side that images are cropped and resized to, their own size if None. Shards
    that cannot be read at random are decoded as a whole, at the first call. Raises InputError for shards of latents.
    """
    if is_npz(path):
        held = load(path, split, channels)
        return RealImages(held.digest, len(held), lambda numbers: held.images[numbers])
    shards = Shards.open(path, split, Decoder(channels, size))
    whole: list[Tensor] = []

    def some(numbers: Tensor) -> Tensor:
        batch = shards.batch(numbers.tolist())
        if "image" not in batch:
            raise InputError(f"{path}: holds latents, which an evaluation cannot decode; give shards of images")
        images: Tensor = batch["image"]
        return images

    def take(numbers: Tensor) -> Tensor:
        if shards.random_access:
            return _spread(some, numbers)
        if not whole:
            whole.append(shards.decoded().images)
        return whole[0][numbers]

    return RealImages(shards.digest, len(shards), take)


def refuse_trained(held_out: tuple[str, str], reference: tuple[str, str], trained: Mapping[str, str | None]) -> None:
    """Raise InputError for held-out images that are also in the reference, or that a model was trained on.

    held_out, reference: data and split; trained: digests of the training data by the names of the models. If the
    held-out split has the same name as the reference, or that of the training images, it is accepted as intended, with
    a note for training images. Of an .npz file only the format is checked.
    """
    for path in {path for path, _ in (held_out, reference) if is_npz(path)}:
        read_npz(path)
    path, split = held_out
    if is_npz(path):
        return
    shards = Shards.open(path, split, Decoder())
    if canonical(split) != canonical(reference[1]) and not is_npz(reference[0]):
        remedy = "Give other splits by --split and --reference (also keys of a study), or their shards by patterns"
        refuse_shared(shards, Shards.open(*reference, Decoder()), f"{split}, {reference[1]}", remedy)
    mine = [name for name, digest in trained.items() if digest == shards.digest]
    if mine and canonical(split) != "train":
        raise InputError(
            f"{mine[0]} was trained on the images of {split} in {path} (data digest {shards.digest}), which must be "
            "held out. Give other images"
        )
    for name in mine:
        print(
            f"note: {name} was trained on the images of {split}: its errors are not those of held-out images",
            file=sys.stderr,
        )


def image_files(path: str | Path, split: str, shape: Sequence[int]) -> RealImages:
    """Return the images of (C, H, W) = shape in a folder, an .npz or any data set that `data prepare` reads, in order.

    Raises InputError if there are fewer than two, or the first has another size; `take` raises it for the others.
    """
    if is_npz(path):
        found = real_images(path, split, shape[0])
        size = list(found.take(torch.arange(1)).shape[1:])
        if found.n < 2 or size != list(shape):
            raise InputError(f"{path} has {found.n} images of {size}, expected at least two of {list(shape)}")
        return found
    try:
        source, decoder = find_source(path, split, labels="none"), Decoder(shape[0])
    except InputError as error:
        if not re.search(r" --[a-z]", str(error)):
            raise
        raise InputError(
            f"{error} (an option of data prepare; here give only the folder of the images, or prepare them first)"
        ) from None
    if len(source) < 2:
        raise InputError(f"{path}: at least two images are required, it has {len(source)}")

    def decoded(item: Item) -> Tensor:
        image: Tensor = decoder(item.members, f"{path}/{item.name}")["image"]
        if list(image.shape) != list(shape):
            raise InputError(f"{path}/{item.name} is an image of {list(image.shape)}, the real ones are {list(shape)}")
        return image

    def take(numbers: Tensor) -> Tensor:
        items = [source[n] for n in numbers.tolist()]  # in one thread: a source may have one open file
        return _spread(lambda part: torch.stack([decoded(items[k]) for k in part.tolist()]), torch.arange(len(items)))

    decoded(source[0])
    return RealImages(source.fingerprint(), len(source), take)


def _spread(take: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
    """Return `take` of the numbers, by one thread per core; all threads end, since processes may be forked later."""
    parts = numbers.split(32)
    if len(parts) == 1:
        return take(numbers)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.cat(list(pool.map(take, parts)))
