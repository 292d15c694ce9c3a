"""Endless batches of a split, each a function of (seed, number of the batch) alone, for any ranks and workers.

The samples of an epoch are cut into global batches of world x batch_size, of which every rank takes a slice; a last
incomplete one is left out, so that every rank takes the same number of steps. Where a run stands is one integer.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_tdisent.data.decode import BadSample, Members
from lightning_tdisent.data.shards import ImageSet, Sample, Shards
from lightning_tdisent.diffusion.rng import key
from lightning_tdisent.errors import InputError

FLIP = 1  # keys of draws other than the order
WINDOW = 2
TURN = 3


class Batches(IterableDataset[Sample]):
    """What the two orders share. ``len`` is the batches of an epoch.

    Set ``first``, the number of the first batch handed out counted from the start of the run, to go on anywhere.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int, world: int, flip: bool) -> None:
        self.batch_size, self.seed, self.rank, self.world, self.flip = batch_size, seed, rank, world, flip
        self.first, self.samples = 0, samples
        self.batches = samples // (batch_size * world)
        if not self.batches:
            raise InputError(
                f"data.batch_size: {batch_size} on {world} rank(s) is more than the {samples} training images"
            )

    def __len__(self) -> int:
        return self.batches

    def workers(self, asked: int) -> int:
        """How many workers there is something to do for."""
        return asked

    def parts(self, workers: int) -> int:
        """In how many parts, each from a worker of its own, a batch comes."""
        return 1

    def state(self) -> dict[str, int]:
        """What the order depends on besides the seed: a run goes on with the same."""
        return {"samples": self.samples, "images": self.batch_size * self.world}

    def _worker(self) -> tuple[int, int]:
        """Number of this worker process, and how many there are."""
        worker = get_worker_info()
        return (worker.id, worker.num_workers) if worker else (0, 1)

    def _generator(self, *keys: int) -> torch.Generator:
        return torch.Generator().manual_seed(key(self.seed, *keys))

    def _flips(self, n: int, *keys: int) -> Tensor | None:
        return torch.randint(2, (n,), generator=self._generator(*keys)).bool() if self.flip else None


class Shuffled(Batches):
    """Batches in a new permutation of all samples every epoch, from memory or by single reads from shards.

    Worker w of W makes the batches w, w + W, .. A ``device`` keeps an `ImageSet` there, so that nothing is copied.
    """

    def __init__(
        self, source: ImageSet | Shards, batch_size: int, seed: int, rank: int = 0, world: int = 1, flip: bool = False,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__(len(source), batch_size, seed, rank, world, flip)
        if isinstance(source, Shards) and not source.random_access:
            packed = any(url.endswith(".gz") for url in source.urls)
            cure = (
                "unpack the shards (gunzip), and make their index anew" if packed else f"make it anew: {source.again}"
            )
            what = ".tar.gz shards" if packed else "shards whose index has no samples"
            raise InputError(
                f"{source.where}: single samples of {what} cannot be read; use data.access sequential, or {cure}"
            )
        self.source = source.to(device) if isinstance(source, ImageSet) and device is not None else source
        self.device = device

    def __iter__(self) -> Iterator[Sample]:
        source = self.source
        if isinstance(source, ImageSet):
            yield from itertools.starmap(source.batch, self._chosen())
            return
        one, other = itertools.tee((numbers.tolist(), flip) for numbers, flip in self._chosen())
        read = source.read_ahead(numbers for numbers, _ in one)
        for (numbers, flip), raw in zip(other, read, strict=True):
            yield source.collate(numbers, raw, flip)

    def _chosen(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Numbers of the samples of this worker's batches, and which of them are mirrored."""
        part, parts = self._worker()
        number, epoch = self.first + part, -1
        order, flips = torch.empty(0), None
        while True:
            if number // len(self) != epoch:
                epoch = number // len(self)
                order = torch.randperm(self.samples, generator=self._generator(epoch)).to(self.device)
                flips = self._flips(self.samples, epoch, FLIP)
                flips = flips.to(self.device) if flips is not None else None
            begin = (number % len(self) * self.world + self.rank) * self.batch_size
            chosen = order[begin : begin + self.batch_size]
            yield chosen, None if flips is None else flips[chosen]
            number += parts


class Streamed(Batches):
    """Batches of shards that are read from end to end: gzipped ones, or a corpus too large to list its samples.

    An epoch is the shards in a permutation of (seed, epoch), end to end in a ring, cut into as many equal lanes as
    there are shards (or places in a batch, if those are fewer). Every batch takes its share from each lane, lane after
    lane. Within a lane, windows of its share of ``buffer`` samples (at least 16 batches) are permuted. So each rank and
    worker reads the lanes of its own places in the batch only, and to go on somewhere takes one window. Where there are
    fewer lanes than ranks x workers, several read the same one.

    A worker makes its part of every batch; the parts are put together in the order of the workers.
    """

    def __init__(
        self, source: Shards, batch_size: int, seed: int, rank: int = 0, world: int = 1, flip: bool = False,
        buffer: int = 10_000,
    ) -> None:  # fmt: skip
        super().__init__(len(source), batch_size, seed, rank, world, flip)
        self.source, self.buffer = source, buffer
        whole = batch_size * world
        lanes = min(len(source.urls), whole)
        self.lanes = [whole * lane // lanes for lane in range(lanes + 1)]  # places in a batch, where lanes begin

    def workers(self, asked: int) -> int:
        """No more than there are images for."""
        return min(asked, self.batch_size)

    def state(self) -> dict[str, int]:
        """As above, and shards and windows."""
        return {**super().state(), "shards": len(self.source.urls), "buffer": self.buffer}

    def parts(self, workers: int) -> int:
        """One of each worker."""
        return max(1, workers)

    def __iter__(self) -> Iterator[Sample]:
        part, parts = self._worker()
        begin = self.rank * self.batch_size + self.batch_size * part // parts
        end = self.rank * self.batch_size + self.batch_size * (part + 1) // parts
        epoch, start = divmod(self.first, len(self))
        while True:
            lanes = [
                self._lane(epoch, lane, start, begin, end)
                for lane in range(len(self.lanes) - 1)
                if self.lanes[lane] < end and self.lanes[lane + 1] > begin
            ]
            for _ in range(start, len(self)):
                taken = [place for lane in lanes for place in next(lane)]
                numbers, raw, flips = zip(*taken, strict=True)
                yield self.source.collate(numbers, raw, torch.tensor(flips) if self.flip else None)
            epoch, start = epoch + 1, 0

    def _lane(
        self, epoch: int, lane: int, start: int, begin: int, end: int
    ) -> Iterator[list[tuple[int, Members | BadSample, bool]]]:
        """For every batch of an epoch, from the start-th on, what a lane gives to its places begin .. end - 1."""
        place, each = self.lanes[lane], self.lanes[lane + 1] - self.lanes[lane]
        low, high = max(begin - place, 0), min(end - place, each)
        steps = max(16, self.buffer // self.lanes[-1])  # batches that a window lasts
        first = start // steps * steps
        stream = self._turned(epoch, lane, first * each)
        for window in range(first, len(self), steps):
            size = (min(window + steps, len(self)) - window) * each
            order = torch.randperm(size, generator=self._generator(epoch, WINDOW, lane, window)).tolist()
            flips = self._flips(size, epoch, FLIP, lane, window)
            kept: dict[int, tuple[int, Members | BadSample, bool]] = {}
            for position in order:  # of the samples as they are read
                number, members = next(stream)
                batch, at = divmod(position, each)
                if low <= at < high and window + batch >= start:
                    kept[position] = (number, members, flips is not None and bool(flips[position]))
            for batch in range(max(start - window, 0), size // each):
                yield [kept.pop(batch * each + at) for at in range(low, high)]

    def _turned(self, epoch: int, lane: int, taken: int) -> Iterator[tuple[int, Members | BadSample]]:
        """A lane from its taken-th sample on. It begins anywhere in its share of the ring, and the ring anywhere.

        So that in every epoch others meet, at another time, and others are left over.
        """
        begin, end = (n * len(self) for n in self.lanes[lane : lane + 2])

        def draw(n: int, *keys: int) -> int:
            return int(torch.randint(n, (), generator=self._generator(epoch, TURN, *keys)))

        shift, turn = draw(self.samples), draw(end - begin, lane)
        first = (turn + taken) % (end - begin)
        for low, high in ((first, end - begin), (0, turn)) if first >= turn else ((first, turn),):
            position = (shift + begin + low) % self.samples
            ring = itertools.chain(self._samples(epoch, position), self._samples(epoch, 0))
            yield from itertools.islice(ring, high - low)

    def _samples(self, epoch: int, position: int) -> Iterator[tuple[int, Members | BadSample]]:
        """The shards of an epoch end to end, from a position on."""
        order = torch.randperm(len(self.source.urls), generator=self._generator(epoch)).numpy()
        counts = np.diff(self.source.index.starts)[order]
        ends = np.cumsum(counts)
        at = int(np.searchsorted(ends, position, "right"))
        start = position - int(ends[at] - counts[at]) if at < len(order) else 0
        yield from self.source.stream_shards(order[at:].tolist(), start)
