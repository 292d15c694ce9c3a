"""Generate the images of a protocol's seeds and compute their metrics, on all ranks."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tdisent.distributed import all_gather, rank_and_world
from lightning_tdisent.errors import InputError, NotFinite
from lightning_tdisent.evaluation.real_images import RealImages
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.quality import Quality
from lightning_tdisent.metrics.reference import reference
from lightning_tdisent.sampling.denoiser import DenoiserProtocol
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import Sampler


def open_quality(
    protocol: Protocol,
    network: FeatureNetwork,
    real: RealImages,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Quality:
    """Return the `Quality` of images of (C, H, W) = shape against real ones (collective).

    The statistics of the real images are computed unless the cache has them. Raises InputError if the features take
    images of another shape.
    """
    if network.shape is not None and list(shape) != list(network.shape):
        raise InputError(
            f"the features {protocol.features!r} take images of {network.shape}, these are {list(shape)}; choose "
            "another protocol"
        )
    full = protocol.resolved(network, real.digest, real.n, shape)
    return Quality(full, network, reference(full, network, real.take, device)).to(torch.device(device))


class Scored(NamedTuple):
    """Result of `score`: the numbers over all ranks, or the error instead; for this rank, seconds and first images.

    seconds: spent on sampling; numbers, images: image numbers int64 (k,) and first images uint8 (k, C, H, W).
    """

    values: dict[str, float] | InputError
    seconds: float
    numbers: Tensor
    images: Tensor


def score(
    denoise: DenoiserProtocol,
    sampler: Sampler,
    quality: Quality,
    batch_size: int = 250,
    keep: int = 0,
    progress: Callable[[float], None] | None = None,
    given: Tensor | None = None,
    also: Callable[[Tensor, Tensor], None] | None = None,
) -> Scored:
    """Generate this rank's images of the protocol's seeds, and return the numbers over all ranks (collective).

    Exactly n images are measured for any number of ranks; image i depends only on its seed, and no rank waits for
    another until all have generated their images. On a GPU, features are extracted while the next images are sampled.
    If an image is not finite on any rank, the values of all ranks are that `NotFinite`, and no images are returned.

    batch_size: images at a time.
    keep: number of first images that are returned.
    progress: see `sample`.
    given: observations for a conditional model, one for each of the n images.
    also: called with each batch of images and their numbers.
    """
    (rank, world), n, first = rank_and_world(), quality.protocol.n, quality.protocol.first_seed
    assert first is not None
    if given is not None and n < world:
        raise InputError(f"n={n}: fewer images than ranks ({world})")
    device = next(iter(denoise.parameters())).device
    numbers = torch.arange(n)[rank::world]
    there = numbers.to(device)  # copied once: copies of each batch would synchronise with the host
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None
    clock = _Clock(device)
    kept: list[Tensor] = []
    quality.reset()
    mine = None if given is None else given[numbers]
    seeds = (first + numbers).tolist()
    images = iter(sample(denoise, sampler, seeds, batch_size, given=mine, progress=progress))
    done, failure = 0, ""
    while done < len(numbers) and not failure:
        try:
            with clock:
                batch = next(images)
        except NotFinite as error:
            failure = str(error)
            continue
        here = there[done : done + len(batch)]
        if beside is None:
            quality.add(batch, here)
            if also:
                also(batch, here)
        else:
            beside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(beside):
                quality.add(batch, here)
                if also:
                    also(batch, here)
            batch.record_stream(beside)
        if some := int((numbers[done : done + len(batch)] < keep).sum()):
            kept.append(batch[:some].cpu())
        done += len(batch)
    if beside is not None:
        torch.cuda.current_stream(device).wait_stream(beside)
    if failures := [said for said in all_gather(failure) if said]:
        empty = torch.empty(0, *denoise.shape, dtype=torch.uint8)
        return Scored(NotFinite(failures[0]), clock.seconds, numbers[:0], empty)
    first_images = torch.cat(kept) if kept else torch.empty(0, *denoise.shape, dtype=torch.uint8)
    return Scored(compute(quality), clock.seconds, numbers[numbers < keep], first_images)


def compute(quality: Quality) -> dict[str, float] | InputError:
    """Return the numbers, or the InputError instead: an error of one model must not prevent the rows of others."""
    try:
        return quality.compute()
    except InputError as error:
        return error


class _Clock:
    """Context manager that sums the seconds spent inside.

    On a GPU it records events, which are read at the end: the time of sampling while features of the batch before are
    extracted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda, self.spent, self.events = device, device.type == "cuda", 0.0, list[Any]()

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if self.cuda:
            self.events.append((self.start, end))
        else:
            self.spent += end - self.start

    @property
    def seconds(self) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return self.spent + sum((float(start.elapsed_time(end)) for start, end in self.events), 0.0) / 1000
