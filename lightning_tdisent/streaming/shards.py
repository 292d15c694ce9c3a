"""WebDataset shards of images: found, digested, decoded, in memory or streamed in a reproducible order.

A shard is a plain or gzipped tar of ``KEY.png`` (or jpg, webp) and ``KEY.cls`` (a class number); nothing is unpacked
to disk, no pickle is read and no ``pipe:`` is opened.
"""

import hashlib
import io
import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from lightning_tdisent.diffusion.rng import key
from lightning_tdisent.errors import InputError

IMAGES = ("png", "jpg", "jpeg", "webp")
Sample = dict[str, Tensor]


def find(path: str | Path, split: str) -> list[Path]:
    """Shards ``{split}-*.tar`` or ``.tar.gz`` of a folder, sorted; refuses a folder without any."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"data.path: {folder} is not a folder. data/README.md says how to prepare each data set.")
    try:
        files = sorted(
            f for f in folder.iterdir() if f.name.startswith(f"{split}-") and f.name.endswith((".tar", ".tar.gz"))
        )
        names = sorted(f.name for f in folder.iterdir())
        for file in files:
            file.open("rb").close()
    except OSError as error:
        raise InputError(f"data.path: {folder} cannot be read: {error}") from None
    if not files:
        raise InputError(
            f"data.path: {folder} holds no shards {split}-*.tar(.gz); it holds {', '.join(names[:5]) or 'nothing'}. "
            "data/README.md says how to prepare each data set."
        )
    return files


def digest(files: list[Path]) -> str:
    """Short hash of the names and bytes of the shards: which data a model has seen."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def decode(sample: dict[str, Any], channels: int) -> Sample:
    """Decode one sample to ``image`` uint8 (C, H, W) and ``label`` int64 (-1 where the shard has none)."""
    where = f"{sample['__url__']!s}: sample {sample['__key__']!s}"
    found = [sample[e] for e in IMAGES if e in sample]
    if len(found) != 1:
        raise InputError(f"{where} has {len(found)} images ({'/'.join(IMAGES)}), expected one")
    try:
        with Image.open(io.BytesIO(found[0])) as image:
            pixels = np.array(image.convert({1: "L", 3: "RGB"}[channels]))
        label = int(sample["cls"]) if "cls" in sample else -1
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where} cannot be decoded: {error}") from None
    return {
        "image": torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1),
        "label": torch.tensor(label),
    }


def _raw(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Undecoded samples; shards are opened here, so that no URL is ever interpreted."""

    def opened() -> Iterator[dict[str, object]]:
        for file in files:
            with file.open("rb") as stream:
                yield {"url": str(file), "stream": stream}

    try:
        yield from group_by_keys(tar_file_expander(opened()))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"a shard of {files[0].parent} is damaged: {error}") from None


def count(file: Path) -> int:
    """Samples of a shard, from the headers of its members."""
    last, n = None, 0
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                stem = re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name)  # a sample's member to webdataset
                if member.isfile() and stem and stem[1] != last:
                    last, n = stem[1], n + 1
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"a shard of {file.parent} is damaged: {error}") from None
    return n


@dataclass(frozen=True)
class ImageSet:
    """Decoded images (N, C, H, W) uint8 with labels (N,) int64, and the digest of the shards they came from."""

    images: Tensor
    labels: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.images)


def load(path: str | Path, split: str, channels: int, limit: int | None = None) -> ImageSet:
    """Decode a whole split, or its first ``limit`` samples, into memory."""
    files = find(path, split)
    samples = []
    for sample in _raw(files):
        samples.append(decode(sample, channels))
        if len(samples) == limit:
            break
    if not samples:
        raise InputError(f"the shards {split}-* of {path} are empty")
    sizes = {tuple(s["image"].shape) for s in samples}
    if len(sizes) > 1:
        raise InputError(f"the images of {path} differ in size: {sorted(sizes)[:4]}; prepare them at one size")
    images = torch.stack([s["image"] for s in samples])
    return ImageSet(images, torch.stack([s["label"] for s in samples]), digest(files))


class _Ordered(IterableDataset[Sample]):
    """An endless row of batches, a function of (seed, number of the batch) alone, for any number of ranks and workers.

    The samples of an epoch are cut into global batches of world x batch_size; a last incomplete one is left out, so
    that every rank takes the same number of steps, ``len`` of them an epoch. Set ``first``, the number of the first
    batch handed out counted from the start of the run, to go on anywhere. Batches have ``image``, ``label`` and
    ``id``, the position in the split.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.batch_size, self.seed, self.rank, self.world, self.first = batch_size, seed, rank, world, 0
        self.batches = samples // (batch_size * world)
        if not self.batches:
            raise InputError(
                f"data.batch_size: {batch_size} on {world} rank(s) is more than the {samples} training images"
            )

    def __len__(self) -> int:
        return self.batches

    def _order(self, n: int, epoch: int) -> Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(key(self.seed, epoch)))


class Resident(_Ordered):
    """Batches of an `ImageSet` in memory: a permutation of (seed, epoch), one gather a step, no workers needed."""

    def __init__(self, data: ImageSet, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(len(data), batch_size, seed, rank, world)
        self.data = data

    def __iter__(self) -> Iterator[Sample]:
        epoch, start = divmod(self.first, len(self))
        while True:
            order = self._order(len(self.data), epoch)
            for batch in range(start, len(self)):
                first = (batch * self.world + self.rank) * self.batch_size
                chosen = order[first : first + self.batch_size]
                yield {"image": self.data.images[chosen], "label": self.data.labels[chosen], "id": chosen}
            epoch, start = epoch + 1, 0


class Streamed(_Ordered):
    """Batches read from shards as they come, for sets larger than memory.

    Shards in an order of (seed, epoch), then a shuffle buffer of undecoded samples with the same key. Every rank and
    worker reads every shard and decodes its own share only: exact, at the price of reading the bytes more than once;
    going on inside an epoch reads, without decoding, what lies before.
    """

    def __init__(
        self, path: str | Path, split: str, channels: int, batch_size: int, seed: int, buffer: int = 2000,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.files, self.channels, self.buffer = find(path, split), channels, buffer
        counts = [count(file) for file in self.files]
        self.offsets = [sum(counts[:i]) for i in range(len(counts))]
        super().__init__(sum(counts), batch_size, seed, rank, world)

    def _samples(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Undecoded samples of an epoch in its order, each with its position in the split."""

        def numbered() -> Iterator[dict[str, Any]]:
            for i in self._order(len(self.files), epoch).tolist():
                for n, sample in enumerate(_raw([self.files[i]]), self.offsets[i]):
                    yield {**sample, "id": n}

        stream = numbered()
        return wds.detshuffle(self.buffer, seed=self.seed, epoch=epoch - 1).run(stream) if self.buffer > 1 else stream

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        size, whole = self.batch_size, self.batch_size * self.world
        epoch, start = divmod(self.first, len(self))
        turn = 0
        while True:
            stream = self._samples(epoch)
            for block in range(len(self)):
                mine = block >= start and turn % parts == part
                turn += block >= start
                kept = list(itertools.islice(stream, whole))[self.rank * size : (self.rank + 1) * size]
                if len(kept) < size:
                    raise InputError(
                        f"the shards of {self.files[0].parent} have changed: fewer samples than at the start"
                    )
                if mine:
                    yield self._batch(kept)
            epoch, start = epoch + 1, 0

    def _batch(self, kept: list[dict[str, Any]]) -> Sample:
        samples = [{**decode(s, self.channels), "id": torch.tensor(s["id"])} for s in kept]
        sizes = {tuple(s["image"].shape) for s in samples}
        if len(sizes) > 1:
            raise InputError(f"the images of {self.files[0].parent} differ in size: {sorted(sizes)[:4]}")
        return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}
