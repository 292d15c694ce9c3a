"""The one DataModule: WebDataset shards to batches of uint8 images, for every module of the project."""

import itertools
import signal
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.checkpoints import refuse_to_load
from lightning_tdisent.streaming.shards import ImageSet, Resident, Sample, Streamed, digest, find, load


class ResumableLoader:
    """Goes through the batches of a run, ``len`` an epoch, from wherever the last epoch, or the last process, stopped.

    Its state is the number of batches handed out, which Lightning stores and returns to it; the workers keep running
    from one epoch to the next.
    """

    def __init__(self, dataset: Resident | Streamed, workers: int, start: int = 0, rewind: bool = False) -> None:
        self.source, self.done, self.rewind = dataset, start, rewind
        self.loader = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=_ignore_signals)
        self._stream: Iterator[Sample] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Sample]:
        if self._stream is None or self.rewind:  # for overfit_batches: the same ones in every epoch
            self.source.first = 0 if self.rewind else self.done
            self._stream = iter(self.loader if self.loader.num_workers else self.source)
        try:
            for batch in itertools.islice(self._stream, len(self)):
                self.done += 1
                yield batch
        except InputError as error:  # a worker's comes wrapped in its traceback
            raise InputError(str(error).strip().splitlines()[-1].rpartition("InputError: ")[2]) from None

    def close(self) -> None:
        """Let the workers go."""
        self._stream = None

    def state_dict(self) -> dict[str, int]:
        """Batches handed out, and images in each over all ranks."""
        return {"batches": self.done, "images": self.source.batch_size * self.source.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind them; refuses batches of another size."""
        mine = self.state_dict()["images"]
        if state["images"] != mine:
            raise InputError(
                f"data.batch_size: the checkpoint was trained with {state['images']} images a step over all ranks, "
                f"this run has {mine}; change data.batch_size or trainer.devices so that they agree"
            )
        self.done, self._stream = state["batches"], None


def _ignore_signals(_: int) -> None:
    """A signal to the whole group is for the trainer to heed, which needs its workers until the step is done."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


class Batches:
    """Batches made beforehand; an object of our own, so that Lightning neither counts loaders nor adds a sampler."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class ImageShards(L.LightningDataModule):
    """Images of a folder of shards ``{split}-*.tar(.gz)`` with ``KEY.png|jpg|webp`` and ``KEY.cls``.

    Batches are dicts of ``image`` uint8 (B, C, H, W), ``label`` int64 (B,) and ``id`` int64 (B,), the position in the
    split. The order of an epoch is a function of (seed, epoch) alone, the same for any number of
    ranks and workers; an incomplete last batch is left out of an epoch.

    path: the folder; channels: 1 or 3; batch_size: images per rank and step; train, val: names of the two splits;
    val_limit: held-out images used during training (the first ones); resident: decode once and keep everything in
    memory, for sets that fit; otherwise shards are streamed through a shuffle ``buffer`` by ``workers`` processes;
    seed: of the order, that of the run if not given.
    """

    load_from_checkpoint = refuse_to_load

    def __init__(
        self,
        path: str,
        channels: int = 3,
        batch_size: int = 64,
        train: str = "train",
        val: str = "test",
        val_limit: int | None = 1000,
        resident: bool = True,
        buffer: int = 2000,
        workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise InputError(f"data.channels: images have 1 or 3 channels, got {channels}")
        if batch_size < 1:
            raise InputError(f"data.batch_size: at least 1, got {batch_size}")
        self.path, self.channels, self.batch_size, self.train, self.val = path, channels, batch_size, train, val
        self.val_limit, self.resident, self.buffer = val_limit, resident, buffer
        self.workers, self.seed = workers, seed
        self._loader: ResumableLoader | None = None

    @cached_property
    def held_out(self) -> ImageSet:
        """The held-out images in memory."""
        return load(self.path, self.val, self.channels, self.val_limit)

    @cached_property
    def training(self) -> ImageSet:
        """The training images in memory."""
        return load(self.path, self.train, self.channels)

    @cached_property
    def digest(self) -> str:
        """Hash of the training shards."""
        return digest(find(self.path, self.train))

    def images(self, split: str, limit: int) -> ImageSet:
        """The first images of a split, taken from memory where the training images are kept there."""
        if split == self.train and self.resident:
            whole = self.training
            return ImageSet(whole.images[:limit], whole.labels[:limit], whole.digest)
        return load(self.path, split, self.channels, limit)

    @property
    def image_shape(self) -> list[int]:
        """(C, H, W) of the held-out images."""
        return list(self.held_out.images.shape[1:])

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank."""
        place = self._place()
        seed = self.seed
        if seed is None:
            seed = torch.initial_seed() & 0xFFFFFFFF
            seed = self.trainer.strategy.broadcast(seed) if self.trainer else seed
        dataset: Resident | Streamed
        if self.resident:
            dataset = Resident(self.training, self.batch_size, seed, *place)
        else:
            files = (self.path, self.train, self.channels)
            dataset = Streamed(*files, self.batch_size, seed, self.buffer, *place)
        start, rewind = 0, False
        if self.trainer:
            start = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            rewind = self.trainer.overfit_batches > 0
        self._loader = ResumableLoader(dataset, 0 if self.resident else self.workers, start, rewind)
        return self._loader

    def teardown(self, stage: str) -> None:
        """Let the workers go."""
        if self._loader is not None:
            self._loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Let the workers go."""
        self.teardown("fit")

    def val_dataloader(self) -> Batches:
        """Batches of every world-th held-out image: nothing padded, nothing left out."""
        rank, world = self._place()
        ids = torch.arange(len(self.held_out))[rank::world]
        data = self.held_out
        parts = ids.split(max(self.batch_size, 250))
        return Batches([{"image": data.images[i], "label": data.labels[i], "id": i} for i in parts])

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> Batches:
        """Refuse: `predict` draws from seeds."""
        raise InputError("predict draws images from seeds, not from data: use --data Seeds --data.n 64")


class Seeds(L.LightningDataModule):
    """Seeds first .. first + n - 1 for `predict`, this rank's share of them, in batches."""

    load_from_checkpoint = refuse_to_load

    def __init__(self, n: int = 64, first: int = 0, batch_size: int = 250) -> None:
        super().__init__()
        self.n, self.first, self.batch_size = n, first, batch_size

    def predict_dataloader(self) -> Batches:
        """Lists of seeds."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        seeds = list(range(self.first, self.first + self.n)[rank::world])
        return Batches([seeds[i : i + self.batch_size] for i in range(0, len(seeds), self.batch_size)])
