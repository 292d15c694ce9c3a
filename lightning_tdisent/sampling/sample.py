"""`sample`: generate the images of many seeds, batch by batch."""

import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent import processes
from lightning_tdisent.distributed import rank_and_world
from lightning_tdisent.errors import InputError
from lightning_tdisent.images import to_uint8
from lightning_tdisent.sampling.denoiser import DenoiserProtocol
from lightning_tdisent.sampling.guidance import extras
from lightning_tdisent.sampling.inputs import check_given, check_label, check_seeds
from lightning_tdisent.sampling.sampler import Sampler

VALUES, LEAST, MOST = 25_000, 16, 128  # of a block on a CPU: values it should have, and bounds of its images
IN_FLIGHT = 1 << 32  # bytes of unfinished images that `sample` advances row by row at a time
TOGETHER = 8  # blocks advanced row by row on a CPU with all experts in memory: its caches hold one expert, not all


def block_size(shape: Sequence[int]) -> int:
    """Return the batch size on a CPU for images of (C, H, W): a power of 2 from `LEAST` to `MOST`.

    Kernels round differently for other batch sizes, so that it may depend on nothing but the shape. Small images need
    large blocks, in which the cost of a call counts less; large ones are fastest in blocks that fit the caches.
    """
    return min(MOST, 1 << math.ceil(math.log2(max(LEAST, VALUES / math.prod(shape)))))


def sample(
    denoise: DenoiserProtocol,
    sampler: Sampler,
    seeds: Sequence[int],
    batch_size: int = 250,
    label: Tensor | None = None,
    by_state: bool | None = None,
    given: Tensor | None = None,
    known: Tensor | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Tensor]:
    """Yield uint8 images (B, C, H, W) on the model's device, batch by batch, in the order of the seeds.

    denoise: a model of images of 1 or 3 channels.
    seeds: one integer in [0, 2^32) per image.
    batch_size: images per batch, at least 1. On a CPU a batch has `block_size` images regardless, the last one padded,
        so that an image is the same bit for bit whatever the other seeds are.
    label: int64, one per seed, or one for all. If not given, a class-conditional model draws class (seed modulo number
        of classes).
    by_state: advance all batches by one row before any of them advances by the next, so that each network is loaded
        once for any number of images. If not given, this is done where the experts of a composite are not all on the
        device; where they are, on a CPU, it is done for `TOGETHER` blocks at a time.
    given: observations (B, C', H, W) for a conditional model.
    known: masks (B, 1, H, W), see `Sampler.walk`.
    threads: blocks that are drawn at the same time on a CPU, each by a thread of its own with a copy of the modules;
        the images are the same for any number. If not given, this rank's share of `processes.threads`. Models whose
        experts are not all in memory use one.
    progress: called after each step of each batch with the share of images that it has finished; these add up to the
        number of images.

    With by_state nothing is yielded before the last step, and x and x0_hat of all images stay on the device: twice 600
    MB for 50,000 images of 3x32x32 in float32. More than `IN_FLIGHT` bytes of them are processed in parts. The images
    are the same in both cases.

    Raises InputError for inputs that do not fit the model.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: at least 1, got {batch_size}")
    if denoise.shape[0] not in (1, 3):
        raise InputError(
            f"the model makes latents of {denoise.shape}, not images: call its sampler with clip None, and decode what "
            "it returns with the autoencoder (z / scaling_factor + shift_factor)"
        )
    sampler.check(denoise.states)
    seeds = check_seeds(seeds)
    label = check_label(denoise, label, len(seeds))
    given = check_given(denoise.states, given, len(seeds))
    if label is None and denoise.classes:
        if given is not None:
            raise InputError("a class-conditional model with observations needs a label for each of them (--label)")
        label = torch.tensor([seed % denoise.classes for seed in seeds])
    residency = extras(denoise).residency
    parameter = next(iter(denoise.parameters()))
    on_cpu = parameter.device.type == "cpu"
    size = block_size(denoise.shape) if on_cpu else batch_size
    together = 1
    if by_state or (by_state is None and residency not in (None, "resident")):
        together = max(1, IN_FLIGHT // (2 * parameter.itemsize * math.prod(denoise.shape) * size))
    elif by_state is None and residency and on_cpu:
        together = TOGETHER
    batches = [range(i, min(i + size, len(seeds))) for i in range(0, len(seeds), size)]
    if not on_cpu or by_state or residency not in (None, "resident") or torch.is_autocast_enabled("cpu"):
        threads = 1  # a thread would not inherit autocast
    own = processes.threads() // rank_and_world()[1]  # ranks share the cores
    threads = max(1, min(own if threads is None else threads, len(batches)))
    together = max(1, min(together, -(-len(batches) // threads)))
    done = _Shares(progress, len(sampler.rows(denoise.states)))

    def images_of(model: DenoiserProtocol, part: Sequence[range]) -> Iterator[Tensor]:
        places = [[*b, *[b[-1]] * (size - len(b))] if on_cpu else [*b] for b in part]
        walks = []
        for p in places:
            seen: dict[str, Any] = {n: some[p] for n, some in (("given", given), ("known", known)) if some is not None}
            walks.append(sampler.walk(model, [seeds[i] for i in p], None if label is None else label[p], **seen))
        for batch, x in zip(part, _in_step(walks, [len(batch) for batch in part], done), strict=True):
            yield to_uint8(model.states.decode(x[: len(batch)]))

    parts = [batches[k : k + together] for k in range(0, len(batches), together)]
    if threads > 1 and (copies := _copies(denoise, threads)):
        yield from _threaded(copies, images_of, parts, done)
        return
    for part in parts:
        yield from images_of(denoise, part)


def _copies(denoise: DenoiserProtocol, count: int) -> list[DenoiserProtocol]:
    """Return copies of a model's modules that share their weights; none if they cannot be copied.

    A thread needs its own: a module may keep something on itself from one line of `forward` to the next.
    """
    weights = {id(p): p for p in denoise.parameters()}
    try:
        return [copy.deepcopy(denoise, dict(weights)) for _ in range(count)]
    except Exception:  # whatever a module's own __deepcopy__ or __getstate__ raises
        return []


class _Shares:
    """Report the steps of batches as shares of finished images, from any thread; `stop` ends all of them."""

    def __init__(self, progress: Callable[[float], None] | None, steps: int) -> None:
        self._progress, self._steps, self._lock, self.stopped = progress, steps, threading.Lock(), False

    def stepped(self, images: int) -> None:
        """Count a step of a batch of images; raises CancelledError after `stop`."""
        if self.stopped:
            raise CancelledError
        if self._progress is not None:
            with self._lock:
                self._progress(images / self._steps)

    def stop(self) -> None:
        """End all threads at their next step."""
        self.stopped = True


def _threaded(
    copies: list[DenoiserProtocol],
    images_of: Callable[[DenoiserProtocol, Sequence[range]], Iterator[Tensor]],
    parts: Sequence[Sequence[range]],
    done: _Shares,
) -> Iterator[Tensor]:
    """Yield the images of all parts in their order, drawn by one thread for each copy, with one torch thread each."""
    threads = len(copies)

    def draw(part: Sequence[range]) -> list[Tensor]:
        model = copies.pop()
        try:
            return [*images_of(model, part)]
        finally:
            copies.append(model)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque[Future[list[Tensor]]]()
        try:
            left = iter(parts)
            waiting.extend(pool.submit(draw, part) for part in islice(left, threads + 1))
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(draw, part) for part in islice(left, 1))
        finally:
            done.stop()
            for future in waiting:
                future.cancel()
            torch.set_num_threads(before)


def _in_step(
    walks: list[Iterator[tuple[int, Tensor, Tensor | None]]], sizes: Sequence[int], done: _Shares
) -> Iterator[Tensor]:
    """Yield the images at the end of walks along the same rows, which all advance row by row together."""
    row, first = None, True
    while row != 0:
        for walk, size in zip(walks, sizes, strict=True):
            with torch.inference_mode():
                row, x, _ = next(walk)
            if not first:  # the first state of a walk is its start
                done.stepped(size)
            if row == 0:
                yield x
        first = False
