"""Endless batches of a split. Each batch is a function of (seed, batch number) alone, for any ranks and workers.

The samples of an epoch are divided into global batches of world x batch_size, and each rank takes its slice of every
global batch. The last incomplete batch is dropped, so that all ranks take the same number of steps. The position of a
run is a single integer (``Batches.first``).
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_tdisent.data.decode import BadSample, Members
from lightning_tdisent.data.image_set import ImageSet, Sample
from lightning_tdisent.data.shards import Shards
from lightning_tdisent.diffusion.rng import key
from lightning_tdisent.errors import InputError

FLIP = 1  # keys of the random draws other than the order
WINDOW = 2
TURN = 3


class Batches(IterableDataset[Sample]):
    """Base class of the two orders. ``len`` is the number of batches per epoch.

    To resume anywhere, set ``first``: the number of the first batch to return, counted from the start of the run.
    Raises `InputError` if there are fewer samples than a global batch has.
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
        """Return how many of the requested worker processes can be used."""
        return asked

    def parts(self, workers: int) -> int:
        """Return the number of parts of a batch, each of which is made by a different worker."""
        return 1

    def state(self) -> dict[str, int]:
        """Return what the order depends on besides the seed. A run must resume with the same values."""
        return {"samples": self.samples, "images": self.batch_size * self.world}

    def _worker(self) -> tuple[int, int]:
        """Return the number of this worker process and the number of workers; (0, 1) outside a worker."""
        worker = get_worker_info()
        return (worker.id, worker.num_workers) if worker else (0, 1)

    def _generator(self, *keys: int) -> torch.Generator:
        return torch.Generator().manual_seed(key(self.seed, *keys))

    def _flips(self, n: int, *keys: int) -> Tensor | None:
        return torch.randint(2, (n,), generator=self._generator(*keys)).bool() if self.flip else None


class Shuffled(Batches):
    """Batches in a new permutation of all samples in every epoch, from memory or by reading single samples of shards.

    Worker w of W makes the batches w, w + W, .. If ``device`` is given, an `ImageSet` is kept on that device, so that
    no batch has to be copied. Raises `InputError` for shards of which single samples cannot be read.
    """

    def __init__(
        self, source: ImageSet | Shards, batch_size: int, seed: int, rank: int = 0, world: int = 1, flip: bool = False,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__(len(source), batch_size, seed, rank, world, flip)
        if isinstance(source, Shards) and not source.random_access:
            packed = any(url.endswith(".gz") for url in source.urls)
            cure = (
                "unpack the shards (gunzip) and make their index again"
                if packed
                else f"make the index again: {source.again}"
            )
            what = ".tar.gz shards" if packed else "shards whose index does not list samples"
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
        """Yield the sample numbers of each batch of this worker, and which of them to mirror (None: no mirroring)."""
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
    """Batches of shards that are read sequentially: gzipped shards, or a corpus with too many samples to list.

    In each epoch, the shards are permuted by (seed, epoch), joined end to end to a ring, and the ring is cut into equal
    lanes: as many as there are shards, or places in a global batch if those are fewer. Each batch takes its share of
    every lane, lane after lane. Within a lane, the samples of a window are permuted; the windows of all lanes together
    have ``buffer`` samples (at least 16 global batches). Therefore each rank and worker reads only the lanes of its own
    places in the batch, and has to read one window to resume. If there are fewer lanes than ranks x workers, several
    of them read the same lane.

    Each worker makes its part of every batch; the parts are concatenated in the order of the workers.
    """

    def __init__(
        self, source: Shards, batch_size: int, seed: int, rank: int = 0, world: int = 1, flip: bool = False,
        buffer: int = 10_000,
    ) -> None:  # fmt: skip
        super().__init__(len(source), batch_size, seed, rank, world, flip)
        self.source, self.buffer = source, buffer
        whole = batch_size * world
        lanes = min(len(source.urls), whole)
        self.lanes = [whole * lane // lanes for lane in range(lanes + 1)]  # first place of each lane in a global batch

    def workers(self, asked: int) -> int:
        """Return ``asked``, limited to one worker per image of a batch."""
        return min(asked, self.batch_size)

    def state(self) -> dict[str, int]:
        """Return what `Batches.state` returns, and the number of shards and the size of the buffer."""
        return {**super().state(), "shards": len(self.source.urls), "buffer": self.buffer}

    def parts(self, workers: int) -> int:
        """Return one part per worker."""
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
        """Yield the samples of a lane at the places begin .. end - 1 of each batch of an epoch, from batch start on.

        A sample is (number, members, whether to mirror it).
        """
        place, each = self.lanes[lane], self.lanes[lane + 1] - self.lanes[lane]
        low, high = max(begin - place, 0), min(end - place, each)
        steps = max(16, self.buffer // self.lanes[-1])  # batches per window
        first = start // steps * steps
        stream = self._rotated(epoch, lane, first * each)
        for window in range(first, len(self), steps):
            size = (min(window + steps, len(self)) - window) * each
            order = torch.randperm(size, generator=self._generator(epoch, WINDOW, lane, window)).tolist()
            flips = self._flips(size, epoch, FLIP, lane, window)
            kept: dict[int, tuple[int, Members | BadSample, bool]] = {}
            for position in order:  # the position in the window of each sample, in the order in which they are read
                number, members = next(stream)
                batch, at = divmod(position, each)
                if low <= at < high and window + batch >= start:
                    kept[position] = (number, members, flips is not None and bool(flips[position]))
            for batch in range(max(start - window, 0), size // each):
                yield [kept.pop(batch * each + at) for at in range(low, high)]

    def _rotated(self, epoch: int, lane: int, taken: int) -> Iterator[tuple[int, Members | BadSample]]:
        """Yield the samples of a lane, from its taken-th sample on.

        In each epoch, the ring begins at a random sample, and a lane at a random sample of its share of the ring.
        Therefore different samples share a batch in each epoch, at different times, and different ones are left over.
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
        """Yield the samples of the shards of an epoch, joined end to end, from a position on."""
        order = torch.randperm(len(self.source.urls), generator=self._generator(epoch)).numpy()
        counts = np.diff(self.source.index.starts)[order]
        ends = np.cumsum(counts)
        at = int(np.searchsorted(ends, position, "right"))
        start = position - int(ends[at] - counts[at]) if at < len(order) else 0
        yield from self.source.stream_shards(order[at:].tolist(), start)
