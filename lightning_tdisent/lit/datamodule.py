"""The data modules: batches of uint8 images (or latents) from WebDataset shards, and seeds for `predict`."""

import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.held_out import note_classes, refuse_shared
from lightning_tdisent.data.image_set import ImageSet, Sample
from lightning_tdisent.data.orders import Shuffled, Streamed
from lightning_tdisent.data.remote import is_remote
from lightning_tdisent.data.shards import Policy, Shards
from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.files import expand
from lightning_tdisent.lit.checkpoints import refuse_to_load
from lightning_tdisent.lit.shared import Shared

FIRST = 1000  # training images that are looked at where there are no held-out ones
MAX_LOOKED_AT = 100_000  # classes of a data set that is not resident are read before training up to this many samples


class ResumableLoader:
    """Iterate over the training batches of a run, resuming where the last epoch, or the last process, stopped.

    One iteration is one epoch of ``len(loader)`` batches. The state is the number of batches handed out, which
    Lightning stores in checkpoints and restores. Workers keep running from one epoch to the next.

    dataset: the order of the batches.
    workers: number of worker processes, 0 to read in this process.
    start: number of the first batch, counted from the start of the run.
    rewind: give the same batches, from number 0, in every epoch (for ``overfit_batches``).
    group: batches per optimizer step. An epoch is rounded up to whole groups, because Lightning makes an optimizer
        step at the end of an epoch with however many batches there are.

    If the attribute ``shared`` is set, it is called with the number of a batch and returns the batches from there on.
    """

    def __init__(
        self, dataset: Shuffled | Streamed, workers: int, start: int = 0, rewind: bool = False, group: int = 1
    ) -> None:
        self.source, self.done, self.rewind, self.group = dataset, start, rewind, group
        self.shared: Callable[[int], Iterator[Sample]] | None = None
        workers = dataset.workers(workers)
        self.parts = dataset.parts(workers)
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_ignore_signals,
            pin_memory=workers > 0 and torch.cuda.is_available(),
        )
        self._stream: Iterator[Sample] | None = None
        self._workers: Any = None

    def __len__(self) -> int:
        return -(-len(self.source) // self.group) * self.group

    def __iter__(self) -> Iterator[Sample]:
        if self._stream is None and self.shared is not None:
            self._stream = self.shared(self.done)
        elif self._stream is None or self.rewind:
            self.source.first = 0 if self.rewind else self.done
            self._stream = self._open() if self.parts == 1 else self._concatenated(self._open())
        try:
            for batch in itertools.islice(self._stream, len(self)):
                self.done += 1
                yield batch
        except InputError as error:
            self.close()
            said = str(error).strip()  # an error of a worker comes with its traceback
            if said.startswith("Caught "):
                said = re.sub(r"^lightning_tdisent\.[\w.]+: ", "", said.splitlines()[-1])
            raise InputError(said) from None

    def _concatenated(self, stream: Iterator[Sample]) -> Iterator[Sample]:
        """Yield whole batches, each concatenated from the parts that the workers make."""
        while True:
            parts = list(itertools.islice(stream, self.parts))
            yield {name: _joined([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """Shut down the workers."""
        self._stream = None
        if self._workers is not None:  # otherwise a reference cycle may keep them alive for 20 s after an error
            self._workers._shutdown_workers()
            self._workers = None

    def _open(self) -> Iterator[Sample]:
        self.close()
        if not self.loader.num_workers:
            return iter(self.source)
        workers: Iterator[dict[str, Any]] = iter(self.loader)
        self._workers = workers
        return workers

    def state_dict(self) -> dict[str, int]:
        """Return the batches handed out, the images in each over all ranks, and what the order depends on."""
        return {"batches": self.done, "seed": self.source.seed, "flip": self.source.flip, **self.source.state()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the stored batches; raise InputError if the size or the order of batches differs."""
        mine = self.state_dict()
        if (seed := state.get("seed", mine["seed"])) != mine["seed"]:
            raise InputError(
                f"data.seed: the checkpoint was trained with the image order of seed {seed}, this run has seed "
                f"{mine['seed']}. Set data.seed {seed}, or seed_everything {seed} if data.seed is not given"
            )
        if (flip := state.get("flip", mine["flip"])) != mine["flip"]:
            raise InputError(f"data.flip: the checkpoint was trained with {flip}, this run has {mine['flip']}")
        if state["images"] != mine["images"]:
            raise InputError(
                f"data.batch_size: the checkpoint was trained with {state['images']} images a step over all ranks, "
                f"this run has {mine['images']}; change data.batch_size or trainer.devices so that they agree"
            )
        known = ("batches", "images", "seed", "flip")
        order, here = ({k: v for k, v in data.items() if k not in known} for data in (state, mine))
        if order and order != here:
            raise InputError(
                f"data: the checkpoint was trained with the image order of {order}, this run has that of {here}; use "
                "the same shards, data.resident, data.access and data.buffer"
            )
        self.done, self._stream = state["batches"], None


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], torch.Tensor) else list(itertools.chain(*values))


def _ignore_signals(_: int) -> None:
    """Ignore SIGUSR1 and SIGINT in a worker, and end it 10 seconds after SIGTERM.

    The trainer handles a signal that is sent to the whole process group, and needs its workers until the step is done.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


class FixedBatches:
    """Loader over a list of batches. Not a `DataLoader`, so that Lightning neither counts it nor adds a sampler."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class ImageShards(L.LightningDataModule):
    """Images, or pre-encoded latents, from a folder of shards ``{split}-*.tar(.gz)``, local or in an object store.

    Batches are dicts of ``image`` uint8 (B, C, H, W) or ``latent`` float16 (B, 2, C, h, w), ``label`` int64 (B,),
    ``id`` int64 (B,) (the position in the split), and ``caption`` if the samples have captions. The order of an epoch
    is a function of (seed, epoch) alone, the same for any number of ranks and workers. An incomplete last batch is
    left out.

    path: folder of the shards, a local path or the URL of an object store.
    channels: channels of the images, 1 or 3.
    size: side that images are cropped and resized to, as in ADM; images keep their size if not given.
    batch_size: images per rank and step.
    train, val: names of the training split and of the held-out split, or patterns of their shards. Without a held-out
        split (null) nothing is validated.
    val_limit: number of held-out images used during training (the first ones), null for all.
    flip: mirror a random half of the training images.
    resident: decode the training images once and keep them in memory (true) or on the device (``device``), for data
        sets that fit; if false, ``workers`` processes read samples during training.
    access: how to read samples if not resident, ``random`` (single samples in a new permutation every epoch),
        ``sequential`` (shards from end to end, for .tar.gz and for an index without samples) or ``auto`` (random where
        the shards allow it).
    buffer: size of the shuffle buffer of sequential access, in samples.
    workers: number of processes that read samples if not resident, 0 for the main process.
    verify: compare every sample with the index when it is first read.
    on_bad_shard: ``stop`` at a damaged sample, or ``skip`` it.
    bad_ceiling: largest share of the samples that may be skipped.
    seed: seed of the order, that of the run if not given (a resumed run has the seed it began with).
    index: folder of the index files if it is not that of the shards (``data index --out``).
    """

    load_from_checkpoint = refuse_to_load

    def __init__(
        self,
        path: str | os.PathLike[str],
        channels: int = 3,
        size: int | None = None,
        batch_size: int = 64,
        train: str = "train",
        val: str | None = "test",
        val_limit: int | None = 1000,
        flip: bool = False,
        resident: bool | Literal["device"] = True,
        access: Literal["auto", "random", "sequential"] = "auto",
        buffer: int = 10_000,
        workers: int = 0,
        verify: bool = True,
        on_bad_shard: Literal["stop", "skip"] = "stop",
        bad_ceiling: float = 1e-3,
        seed: int | None = None,
        index: str | None = None,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise InputError.of_value("data.channels", channels, "images have 1 or 3 channels")
        for name, value, low in (("batch_size", batch_size, 1), ("buffer", buffer, 1), ("workers", workers, 0)):
            check_number(f"data.{name}", value, low, whole=True)
        for name, limit in (("size", size), ("val_limit", val_limit)):
            if limit is not None:
                check_number(f"data.{name}", limit, 1, whole=True)
        for name, text in (("path", path), ("train", train), ("val", val)):
            if (not (name == "val" and text is None) and not isinstance(text, str | os.PathLike)) or not str(text):
                raise InputError.of_value(f"data.{name}", repr(text), "expected text")
        for name, flag in (("verify", verify), ("flip", flip)):
            if not isinstance(flag, bool):
                raise InputError.of_value(f"data.{name}", repr(flag), "expected true or false")
        if resident not in (True, False, "device"):
            raise InputError.of_value("data.resident", resident, "expected true, false or device")
        if access not in ("auto", "random", "sequential"):
            raise InputError.of_value("data.access", access, "expected auto, random or sequential")
        self.path, self.batch_size, self.train, self.val = expand(str(path), "data.path"), batch_size, train, val
        self.val_limit, self.resident, self.buffer, self.access = val_limit, resident, buffer, access
        self.workers, self.seed, self.flip = workers, seed, flip
        self.index = index and expand(index, "data.index")
        if index is not None and index.endswith(".safetensors"):
            raise InputError(
                f"data.index: {index} is a file; name its folder (data index --out), which has the index of each split"
            )
        self.decoder, self.policy = Decoder(channels, size), Policy(on_bad_shard, bad_ceiling, verify)
        self.run_seed: int | None = None  # seed of the training, set by the module
        self._loader: ResumableLoader | None = None
        self._shared: Shared | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy or another process, without the trainer, the loader and its workers."""
        return {**vars(self), "trainer": None, "_loader": None, "_shared": None}

    def share(self, shared: Shared) -> None:
        """Share open shards, decoded images and batches with the equal data modules of this process.

        Call it after `setup`. Nothing is shared if samples are read during training and damaged ones may be skipped:
        each data module then counts its own skipped samples.
        """
        self._shared = shared
        if self._can_share:
            self.shards = shared.once(("shards", *self._training_key), lambda: self.shards)

    @property
    def _can_share(self) -> bool:
        return bool(self.resident) or self.policy.on_bad == "stop"

    def _make_once(self, what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        return make() if self._shared is None else self._shared.once(what, make)

    @property
    def _training_key(self) -> tuple[Any, ...]:
        return (self.path, self.train, self.shards.decoder, self.policy, self.index)

    @cached_property
    def held_out(self) -> ImageSet:
        """The held-out images in memory; raises InputError for a damaged one, and if there is no held-out split."""
        if self.val is None:
            raise InputError("data.val: null: there are no held-out images, which are needed here; name a split")
        what = (self.path, self.val, self.decoder, Policy(verify=self.policy.verify), self.index)
        images: ImageSet = self._make_once((*what, self.val_limit), lambda: Shards.open(*what).decoded(self.val_limit))
        return images

    @cached_property
    def examples(self) -> ImageSet:
        """The held-out images, or without a held-out split the first training images."""
        return self.held_out if self.val is not None else self.images(self.train, self.val_limit or FIRST)

    @cached_property
    def shards(self) -> Shards:
        """The training shards."""
        return Shards.open(self.path, self.train, self.decoder, self.policy, self.index)

    @cached_property
    def training(self) -> ImageSet:
        """The training images in memory."""
        images: ImageSet = self._make_once(self._training_key, self.shards.decoded)
        return images

    @property
    def digest(self) -> str:
        """Hash of the training shards."""
        return self.shards.digest

    @property
    def lost(self) -> int:
        """Number of training samples skipped so far by this process and its workers."""
        return self.shards.lost if "shards" in vars(self) else 0

    def images(self, split: str, limit: int) -> ImageSet:
        """Return the first ``limit`` images of a split, from the resident training images if possible."""
        if split == self.train and self.resident:
            whole = self.training
            return ImageSet(whole.images[:limit], whole.labels[:limit], whole.digest)
        return Shards.open(self.path, split, self.decoder, self.policy, self.index).decoded(limit)

    @property
    def image_shape(self) -> list[int]:
        """(C, H, W) of the images or latents."""
        return list(self.examples.images.shape[-3:])

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def setup(self, stage: str) -> None:
        """Refuse held-out images that are also trained on, and have labels checked against the network's classes."""
        self.run_seed = None
        if self.val is None and self.trainer and stage in ("validate", "test"):
            raise InputError(f"data.val: null: {stage} needs a held-out split; name one")
        if self.val is None and self.trainer and stage == "fit" and self.trainer.limit_val_batches:
            self.trainer.limit_val_batches = 0
            if self._rank_and_world()[0] == 0:
                print("note: data.val: null: nothing is validated, and no pictures are drawn", file=sys.stderr)
        if stage == "fit" and not (self.trainer and self.trainer.overfit_batches):
            opened = {self.train: self.shards}
            if self.val is not None:
                what = f"data.train {self.train}, data.val {self.val}"
                opened[self.val] = Shards.open(self.path, self.val, self.decoder, self.policy, self.index)
                remedy = "Choose other splits, or select their shards by patterns"
                refuse_shared(opened[self.val], self.shards, what, remedy)
            for split, shards in opened.items():
                # whoever makes an index is shown its notes then
                if not shards.index.hashed and self._rank_and_world()[0] == 0:
                    print("".join(f"note: {split}: {line}\n" for line in shards.index.notes), end="", file=sys.stderr)
        from lightning_tdisent.lit.inference import DenoiserModule  # imported here because it imports this module

        module = self.trainer.lightning_module if self.trainer else None
        decoder = replace(self.decoder, classes=module.classes if isinstance(module, DenoiserModule) else None)
        if stage == "fit" and decoder != self.shards.decoder:
            self.shards.decoder = decoder
            vars(self).pop("training", None)  # images that were decoded for another network
        local = not is_remote(self.path) and (self.resident or len(self.shards) <= MAX_LOOKED_AT)
        if stage == "fit" and decoder.classes is not None and local:
            what = f"the {len(self.shards):,} training images of {self.path}"
            note_classes("model.network.classes", self.shards.classes(), what, decoder.classes)

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of this rank's training batches."""
        seed = self.run_seed if self.seed is None else self.seed
        if seed is None:
            seed = torch.initial_seed() & 0xFFFFFFFF
            seed = self.trainer.strategy.broadcast(seed) if self.trainer else seed
        options: dict[str, Any] = {"seed": seed, "flip": self.flip}
        options["rank"], options["world"] = self._rank_and_world()
        dataset: Shuffled | Streamed
        if self.resident:
            device = self.trainer.strategy.root_device if self.trainer and self.resident == "device" else None
            data = self.training
            if device is not None:
                data = self._make_once((*self._training_key, device), lambda: self.training.to(device))
            dataset = Shuffled(data, self.batch_size, device=device, **options)
        elif self.access == "random" or (self.access == "auto" and self.shards.random_access):
            dataset = Shuffled(self.shards, self.batch_size, **options)
        else:
            dataset = Streamed(self.shards, self.batch_size, buffer=self.buffer, **options)
        start, rewind = 0, False
        if self.trainer:
            start = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
            rewind = self.trainer.overfit_batches > 0
        workers = 0 if self.resident else self.workers
        self._loader = ResumableLoader(dataset, workers, start, rewind, self._group_size(len(dataset)))
        if (store := self._shared) is not None and not rewind and self._can_share:
            order = (type(dataset), *self._training_key, self.resident, self.buffer, self.batch_size, *options.values())
            self._loader.shared = lambda n: store.batches(
                order, n, id(self), partial(ResumableLoader, dataset, workers)
            )
        return self._loader

    def _group_size(self, batches: int) -> int:
        """Return the batches per optimizer step; refuse limits that leave fewer for the last step of an epoch."""
        group = self.trainer.accumulate_grad_batches if self.trainer else 1
        if group == 1 or self.trainer.fast_dev_run:
            return group
        limit = self.trainer.limit_train_batches
        epoch = limit if isinstance(limit, int) else int(-(-batches // group) * group * limit)
        if epoch % group and epoch < -(-batches // group) * group:
            name = "overfit_batches" if self.trainer.overfit_batches else "limit_train_batches"
            raise InputError(
                f"trainer.{name}: {limit} makes an epoch of {epoch} batches, which trainer.accumulate_grad_batches "
                f"{group} does not divide: its last step would see fewer images. Choose a multiple of {group}"
            )
        return group

    def teardown(self, stage: str) -> None:
        """Shut down the workers, and release what is shared."""
        if self._loader is not None:
            self._loader.close()
        if self._shared is not None:
            self._shared.leave(id(self))

    def on_exception(self, exception: BaseException) -> None:
        """Shut down the workers, and release what is shared."""
        self.teardown("fit")

    def val_dataloader(self) -> FixedBatches:
        """Return batches of this rank's held-out images: every world-th image, none padded or left out."""
        if self.val is None:
            return FixedBatches([])
        rank, world = self._rank_and_world()
        ids = torch.arange(len(self.held_out))[rank::world]
        data = self.held_out
        parts = ids.split(max(self.batch_size, 250))
        return FixedBatches([data.batch(i) for i in parts])

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> FixedBatches:
        """Raise InputError: `predict` draws images from seeds."""
        raise InputError("predict draws images from seeds, not from data: use --data Seeds --data.n 64")


class Seeds(L.LightningDataModule):
    """Seeds ``first`` .. ``first + n - 1`` for `predict`: batches of this rank's share.

    n: number of seeds, at most 2^32.
    first: the first seed.
    batch_size: seeds per batch.
    """

    load_from_checkpoint = refuse_to_load

    def __init__(self, n: int = 64, first: int = 0, batch_size: int = 250) -> None:
        super().__init__()
        check_number("data.n", n, 1, most=2**32, whole=True)
        check_number("data.first", first, most=2**32 - n, whole=True)
        check_number("data.batch_size", batch_size, 1, whole=True)
        self.n, self.first, self.batch_size = n, first, batch_size

    def predict_dataloader(self) -> FixedBatches:
        """Return batches that are lists of seeds."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        seeds = list(range(self.first, self.first + self.n)[rank::world])
        return FixedBatches([seeds[i : i + self.batch_size] for i in range(0, len(seeds), self.batch_size)])
