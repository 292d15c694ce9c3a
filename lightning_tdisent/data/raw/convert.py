"""Raw items to samples that can be stored, by several processes, in order."""

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
    """What became of a raw sample: its members, and its pixels (H, W[, 3]) if they are still to become a latent.

    ``number`` is that in the final order, ``name`` where it came from, as one line of UTF-8, ``depth`` the type of its
    values, as `decode.depth` says it.
    """

    number: int
    name: str
    members: dict[str, bytes]
    pixels: Any = None
    depth: str = "8 bits"


@dataclass(frozen=True, order=True)
class Skipped:
    """A sample that was left out: its number in the final order, where it came from, and why."""

    number: int
    name: str
    reason: str


Task = tuple[int, np.ndarray[Any, Any]]  # neighbours in the final order: first number, and all numbers in the source
Samples = list[Made | Skipped]


@dataclass(frozen=True)
class Convert:
    """The samples of a task: cropped to size x size pixels if there is a size, and encoded as `ENCODE` or kept.

    Where there is a ``mode``, the pixels are of that mode and not encoded. ``span`` is that of `to_mode`.
    """

    source: Source
    size: int | None
    encode: str
    mode: str | None = None
    span: Span | None = None

    def __call__(self, task: Task) -> Samples:
        """One for every number, in order."""
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
            if "cls" in rest and class_of(rest["cls"]) == -1:  # how test sets without classes are written
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
        except (OSError, ValueError) as error:  # a mode or size that no format has
            raise BadSample(f"{name} cannot be used: {error}") from None
        if large := [f"{e} of {len(c):,}" for e, c in members.items() if len(c) > MAX_MEMBER]:
            raise BadSample(f"{name} cannot be stored: {large[0]} bytes, more than {MAX_MEMBER:,}")
        return Made(number, name, members, pixels, depth(image))

    def _encoded(self, image: Image.Image, content: bytes, name: str) -> dict[str, bytes]:
        """The image by its extension: the bytes that came, or new ones without anything but pixels."""
        kind = image_type(content)
        kept = kind if kind in ENCODE else "png"
        rescaled = self.span is not None and depth(image) != "8 bits"
        if self.encode == "keep" and kind == kept and self._fits(image) and not rescaled:
            return {kept: content}
        target = kept if self.encode == "keep" else self.encode
        grey = image.mode in GREY or image.mode.startswith("I;16")
        out = io.BytesIO()
        pixels = self._pixels(image, "L" if grey else "RGB", name)
        Image.fromarray(pixels).save(out, **ENCODE[target])  # from an array: no profile, no comment
        return {target: out.getvalue()}

    def _pixels(self, image: Image.Image, mode: str, name: str) -> np.ndarray[Any, Any]:
        image = to_mode(image, mode, self.span, name)
        return np.asarray(image if self._fits(image) else adm_crop(image, self.size or 0, name))

    def _fits(self, image: Image.Image) -> bool:
        return self.size is None or image.size == (self.size, self.size)


def _plain(text: str) -> str:
    """As one line of UTF-8, whatever a file's name is."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)


_worker: list[Convert] = []  # what this process converts with, if it is one of those that do


def _start(convert: Convert) -> None:
    """Make a process ready: it leaves Ctrl-C to its parent, and ends with it, even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker[:] = [convert]


def _work(task: Task) -> Samples:
    return _worker[0](task)


@contextlib.contextmanager
def in_order(convert: Convert, tasks: Sequence[Task], jobs: int) -> Iterator[Iterator[tuple[int, Samples]]]:
    """First number and samples of every task in their order, a few of them worked on ahead."""
    if jobs < 2:
        yield ((task[0], convert(task)) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # torch is imported once, not once per process
    pool = ProcessPoolExecutor(jobs, context, _start, (convert,))

    def results() -> Iterator[tuple[int, Samples]]:
        ahead: deque[Future[Samples]] = deque()
        for n, (first, _) in enumerate(tasks):
            ahead.extend(pool.submit(_work, task) for task in tasks[n + len(ahead) : n + 2 * jobs + 1])
            yield first, ahead.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
