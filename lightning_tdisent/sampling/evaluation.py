"""Numbers of any denoiser, and the real images they are compared with: during training and in the commands after it."""

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.distributed import all_gather, rank_and_world
from lightning_tdisent.errors import InputError, NotFinite
from lightning_tdisent.images import unit_range
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.quality import Quality
from lightning_tdisent.metrics.reference import reference
from lightning_tdisent.sampling.denoiser import Denoises
from lightning_tdisent.sampling.sampler import Sampler, sample
from lightning_tdisent.streaming.decode import Decoder
from lightning_tdisent.streaming.npz import is_npz, read_npz
from lightning_tdisent.streaming.raw import Item, find_source
from lightning_tdisent.streaming.shards import ImageSet, Shards, load, refuse_shared
from lightning_tdisent.streaming.splits import canonical

HELD_OUT = 1 << 20  # streams of held-out noise, far from the indices that key the sampler's


@torch.no_grad()
def state_errors(
    denoise: Denoises, images: Tensor, ids: Sequence[int], rows: Sequence[int], label: Tensor | None = None
) -> Tensor:
    """Mean squared errors of x0_hat and of eps_hat per row and image, (2, R, B) float64.

    images: uint8 (B, C, H, W), or x0 itself, float; noise is keyed by (image id, original index). The error of eps is
    SNR(s) times that of x0, component by component; of a state that finer components have left, x0 is the image at
    its resolution. What is given counts in neither. At a row without signal (`has_signal`) every model says eps
    exactly, since it is x / b: the error of eps tells nothing there, and is NaN.
    """
    states, device = denoise.states, next(iter(denoise.parameters())).device
    x0 = unit_range(images).to(device)
    index, item = states.index.tolist(), torch.as_tensor(ids, device=device)
    out = torch.empty(2, len(rows), len(images), dtype=torch.float64)
    for k, s in enumerate(rows):
        z0 = states.components(x0, item, finished := states.finished([s]))
        eps = seed_noise(ids, HELD_OUT + index[s], z0.shape[1:]).to(device)
        error = denoise(noise(states, z0, s, eps), s, label) - z0
        out[0, k] = states.picture(error, finished).double().square().mean((1, 2, 3)).cpu()
        if states.K == 1:
            out[1, k] = out[0, k] * float(states.log_snr[s].exp()) if has_signal(states, s) else torch.nan
        else:
            a, b = states.coefficients(s, error)
            own = (error * (a / b))[:, : x0.shape[1]]
            out[1, k] = own.double().square().mean((1, 2, 3)).cpu()
    return out


def has_signal(states: LatentStates, s: int) -> bool:
    """Whether any component of the data is left in the state of row s; not at a terminal SNR of zero."""
    return not bool(states.log_snr[s, : states.own].isneginf().all())


def x0_errors(
    denoise: Denoises, images: Tensor, ids: Sequence[int], rows: Sequence[int], label: Tensor | None = None
) -> Tensor:
    """The first of `state_errors`, (R, B)."""
    return state_errors(denoise, images, ids, rows, label)[0]


def held_out_errors(model: Denoises, held_out: ImageSet, rows: Sequence[int], batch_size: int) -> Tensor:
    """Mean errors of x0 and eps per row, (2, R), with the true labels where a model takes some; ranks share batches."""
    (rank, world), batches = rank_and_world(), torch.arange(len(held_out)).split(batch_size)
    device = next(iter(model.parameters())).device
    mine: dict[int, list[Tensor]] = {k: [] for k in range(len(batches))[rank::world]}
    for s in rows:  # an expert that is not in memory is brought once
        for k, found in mine.items():
            i = batches[k]
            label = held_out.labels[i].to(device) if model.classes else None
            found.append(state_errors(model, held_out.images[i], i.tolist(), [s], label).sum(2))
    sums = {k: torch.cat(v, 1) for part in all_gather(mine) for k, v in part.items()}
    return torch.stack([sums[k] for k in range(len(batches))]).sum(0) / len(held_out)


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


def open_quality(
    protocol: Protocol,
    network: FeatureNetwork,
    real: RealImages,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Quality:
    """`Quality` of images of (C, H, W) = shape against real ones; their statistics are computed if need be."""
    if network.shape is not None and list(shape) != list(network.shape):
        raise InputError(
            f"the features {protocol.features!r} take images of {network.shape}, these are {list(shape)}; choose "
            "another protocol"
        )
    full = protocol.resolved(network, real.digest, real.n, shape)
    return Quality(full, network, reference(full, network, real.take, device)).to(torch.device(device))


class Scored(NamedTuple):
    """Numbers over all ranks, or why there are none; of this rank seconds of sampling, first images, their numbers."""

    values: dict[str, float] | InputError
    seconds: float
    numbers: Tensor
    images: Tensor


def score(
    denoise: Denoises,
    sampler: Sampler,
    quality: Quality,
    batch_size: int = 250,
    keep: int = 0,
    progress: Callable[[int], None] | None = None,
    given: Tensor | None = None,
    also: Callable[[Tensor, Tensor], None] | None = None,
) -> Scored:
    """Generate the images of the protocol's seeds, this rank's share of them, and return the numbers over all ranks.

    Exactly n images enter, whatever the number of ranks; image i depends on its seed alone, and no rank waits for
    another before all have theirs. On a GPU their features are taken beside the sampling of the next ones. given:
    observations for a conditional model, one for each of the n; also: what else wants images and their numbers. Where
    an image is not finite on any rank, the values of all ranks are that `NotFinite`, and no images are kept.
    """
    (rank, world), n, first = rank_and_world(), quality.protocol.n, quality.protocol.first_seed
    assert first is not None
    if given is not None and n < world:
        raise InputError(f"n={n}: fewer images than the {world} ranks that are to draw them")
    device = next(iter(denoise.parameters())).device
    numbers = torch.arange(n)[rank::world]
    there = numbers.to(device)  # once: copying them batch by batch would make the host wait
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None
    clock = _Clock(device)
    kept: list[Tensor] = []
    quality.reset()
    mine = None if given is None else given[numbers]
    images = iter(sample(denoise, sampler, (first + numbers).tolist(), batch_size, given=mine))
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
        if progress:
            progress(len(batch))
    if beside is not None:
        torch.cuda.current_stream(device).wait_stream(beside)
    if failures := [said for said in all_gather(failure) if said]:
        empty = torch.empty(0, *denoise.shape, dtype=torch.uint8)
        return Scored(NotFinite(failures[0]), clock.seconds, numbers[:0], empty)
    first_images = torch.cat(kept) if kept else torch.empty(0, *denoise.shape, dtype=torch.uint8)
    return Scored(compute(quality), clock.seconds, numbers[numbers < keep], first_images)


def compute(quality: Quality) -> dict[str, float] | InputError:
    """The numbers, or why there are none: one model's failure must not cost those of the others."""
    try:
        return quality.compute()
    except InputError as error:
        return error


class _Clock:
    """Seconds spent inside, on a GPU by its own events, which nobody waits for until the end.

    There they are those of sampling beside the features of the batch before.
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
        return self.spent + sum(start.elapsed_time(end) for start, end in self.events) / 1000
