"""Convert raw items to samples that can be stored, in several processes, in order."""

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lightning_tdisent.data.decode import (
    IMAGES,
    BadSample,
    Span,
    adm_crop,
    class_of,
    depth,
    image_type,
    open_image,
    parse_caption,
    picked,
    to_mode,
)
from lightning_tdisent.data.raw.source import Item, Source
from lightning_tdisent.data.tars import MAX_MEMBER

ENCODE: dict[str, dict[str, Any]] = {
    "png": {"format": "png"},
    "jpg": {"format": "jpeg", "quality": 95, "subsampling": 0},
    "webp": {"format": "webp", "lossless": True},
}
GREY = ("1", "L", "LA", "La", "I", "F")


@dataclass(frozen=True)
class Made:
    """A converted sample: its members and, if they are still to be encoded as a latent, its pixels (H, W[, 3]).

    number: position in the final order. name: where it came from, as one line of UTF-8. depth: type of its values
    (`decode.depth`).
    """

    number: int
    name: str
    members: dict[str, bytes]
    pixels: Any = None
    depth: str = "8 bits"


@dataclass(frozen=True, order=True)
class Skipped:
    """A sample that was left out: its position in the final order, where it came from, and the reason."""

    number: int
    name: str
    reason: str


Task = tuple[int, np.ndarray[Any, Any]]  # consecutive samples: position of the first, numbers of all in the source
Samples = list[Made | Skipped]


@dataclass(frozen=True)
class Convert:
    """Convert the samples of a task: crop to size x size pixels if ``size`` is given; encode as `ENCODE`, or keep.

    If ``mode`` (a mode of Pillow) is given, return pixels in that mode and do not encode. span: see `to_mode`.
    """

    source: Source
    size: int | None
    encode: str
    mode: str | None = None
    span: Span | None = None

    def __call__(self, task: Task) -> Samples:
        """Return one converted or skipped sample for every number of the task, in order."""
        out: Samples = []
        for number, i in enumerate(task[1].tolist(), task[0]):
            item = self.source[i]
            name = _plain(item.name)
            try:
                out.append(self._made(number, name, item))
            except BadSample as error:
                out.append(Skipped(number, name, _plain(str(error).removeprefix(f"{name} "))))
        return out

    def _made(self, number: int, name: str, item: Item) -> Made:
        if item.bad:
            raise BadSample(f"{name} {item.bad}")
        rest = {extension: content for extension, content in item.members.items() if extension not in IMAGES}
        try:
            content = item.members[picked(item.members)]
        except ValueError as error:
            raise BadSample(f"{name} {error}") from None
        image, pixels = open_image(content, name), None
        try:
            if "cls" in rest and class_of(rest["cls"]) == -1:  # some test sets mark missing classes by -1
                del rest["cls"]
        except ValueError as error:
            raise BadSample(f"{name} cannot be used: {error}") from None
        if "txt" in rest:
            try:
                rest["txt"] = parse_caption(rest["txt"]).encode()
            except ValueError as error:
                raise BadSample(
                    f"{name} has a caption{f' in {item.caption}' * bool(item.caption)} that is {error}"
                ) from None
        try:
            if self.mode:
                members, pixels = rest, self._pixels(image, self.mode, name)
            else:
                members = {**self._encoded(image, content, name), **rest}
        except BadSample:
            raise
        except (OSError, ValueError) as error:  # a mode or size that the format does not support
            raise BadSample(f"{name} cannot be used: {error}") from None
        if large := [f"{e} of {len(c):,}" for e, c in members.items() if len(c) > MAX_MEMBER]:
            raise BadSample(f"{name} cannot be stored: {large[0]} bytes, more than {MAX_MEMBER:,}")
        return Made(number, name, members, pixels, depth(image))

    def _encoded(self, image: Image.Image, content: bytes, name: str) -> dict[str, bytes]:
        """Return {extension: content} of the image: the original bytes, or pixels encoded again without metadata."""
        kind = image_type(content)
        kept = kind if kind in ENCODE else "png"
        rescaled = self.span is not None and depth(image) != "8 bits"
        if self.encode == "keep" and kind == kept and self._fits(image) and not rescaled:
            return {kept: content}
        target = kept if self.encode == "keep" else self.encode
        grey = image.mode in GREY or image.mode.startswith("I;16")
        out = io.BytesIO()
        pixels = self._pixels(image, "L" if grey else "RGB", name)
        Image.fromarray(pixels).save(out, **ENCODE[target])  # from an array: without colour profile and comments
        return {target: out.getvalue()}

    def _pixels(self, image: Image.Image, mode: str, name: str) -> np.ndarray[Any, Any]:
        image = to_mode(image, mode, self.span, name)
        return np.asarray(image if self._fits(image) else adm_crop(image, self.size or 0, name))

    def _fits(self, image: Image.Image) -> bool:
        return self.size is None or image.size == (self.size, self.size)


def _plain(text: str) -> str:
    """Return a file's name as one printable line of UTF-8."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)


_worker: list[Convert] = []  # the converter of this worker process; empty in the main process


def _init_worker(convert: Convert) -> None:
    """Initialise a worker process: ignore Ctrl-C, which the parent handles; exit with the parent, even if killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker[:] = [convert]


def _convert_in_worker(task: Task) -> Samples:
    return _worker[0](task)


@contextlib.contextmanager
def in_order(convert: Convert, tasks: Sequence[Task], jobs: int) -> Iterator[Iterator[tuple[int, Samples]]]:
    """Yield an iterator over (first position, samples) of each task, in order; a few tasks are converted ahead.

    With fewer than 2 ``jobs``, tasks are converted in this process, and none ahead.
    """
    if jobs < 2:
        yield ((task[0], convert(task)) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # torch is imported once, not once per process
    pool = ProcessPoolExecutor(jobs, context, _init_worker, (convert,))

    def results() -> Iterator[tuple[int, Samples]]:
        ahead: deque[Future[Samples]] = deque()
        for n, (first, _) in enumerate(tasks):
            ahead.extend(pool.submit(_convert_in_worker, task) for task in tasks[n + len(ahead) : n + 2 * jobs + 1])
            yield first, ahead.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
