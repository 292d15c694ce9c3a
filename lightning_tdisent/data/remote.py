"""Files of object stores and servers: whatever fsspec opens, its errors as OSErrors, ranges of bytes fetched ahead."""

import asyncio
import errno
import io
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import IO, Any, cast

import fsspec
from fsspec.asyn import AsyncFileSystem

from lightning_tdisent.errors import InputError

CONNECTIONS = 64  # of a process to one store; the client of S3 has 10
MAX_AHEAD = 16  # groups of ranges that are fetched while one is used,
BYTES_AHEAD = 16 * 2**20  # as long as those before are less than this; one always is
MAX_GAP = 16 * 2**10  # bytes between two ranges that are fetched as one
MAX_JOINED = 8 * 2**20  # bytes of such a range
PATIENCE = 60.0  # seconds that a group of ranges may take, besides
SLOWEST = 100_000  # bytes a second
PAUSES = (0.5, 2.0, 8.0)  # seconds before what has failed is asked for again
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # and is not

_kept: dict[int, Any] = {}  # file systems by their id

Range = tuple[str, int, int]  # URL, first byte, number of bytes
Content = bytes | Exception


def is_remote(url: str) -> bool:
    """Return whether a folder or file is to be opened by fsspec."""
    return "://" in url or "::" in url


def file_system(url: str, key: str = "data.path: ") -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path in it; raise InputError, which begins with ``key``.

    fsspec keeps one of each kind per process, and none of these is ever finalised here. A forked process, as a loader's
    worker is, lets go of its parent's, whose finalisers then close the connections in the event loop that both share:
    the parent would wait for its next answer for ever.
    """
    try:
        options = {}
        if fsspec.utils.get_protocol(url) in ("s3", "s3a"):
            configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **configured}
        system, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"{key}{url}: cannot be opened: {error}") from None
    if system.cachable:
        _kept[id(system)] = system
    return system, path


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn whatever the client of an object store raises into an OSError."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


class _File(io.RawIOBase):
    """A file of an object store, whose errors are OSErrors."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with store_errors():
            return self.file.read(size)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        with store_errors():
            return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        super().close()


def open_remote(url: str) -> IO[bytes]:
    """Return an open file for reading; raises OSError."""
    system, path = file_system(url)
    with store_errors():
        return cast(IO[bytes], _File(system.open(path, "rb")))


def joined(ranges: Sequence[Range]) -> tuple[list[Range], list[tuple[int, int]]]:
    """Join neighbouring ranges; return these, and for each of ``ranges`` the number of its own and where it begins."""
    out: list[Range] = []
    places = [(0, 0)] * len(ranges)
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        url, begin, size = ranges[number]
        if out:
            there, first, length = out[-1]
            near = there == url and begin - (first + length) <= MAX_GAP
            if near and begin + size - first <= MAX_JOINED:
                out[-1] = (url, first, max(length, begin + size - first))
                places[number] = (len(out) - 1, begin - first)
                continue
        out.append((url, begin, size))
        places[number] = (len(out) - 1, 0)
    return out, places


class Fetch:
    """A group of ranges under way: all of its requests at the same time, those of near places as one.

    ``result`` waits. File systems that are not asynchronous are asked only then.
    """

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.ranges = ranges
        asked, self._places = joined(ranges)
        self.bytes = sum(size for *_, size in asked)
        opened = {url: file_system(url) for url in dict.fromkeys(url for url, *_ in asked)}
        self._system = opened[asked[0][0]][0]
        self._asked: list[Range] = [(opened[url][1], begin, begin + size) for url, begin, size in asked]
        self._request = self._start(self._asked)

    def _start(self, asked: Sequence[Range]) -> Future[list[Any]] | None:
        if not isinstance(self._system, AsyncFileSystem):
            return None
        return asyncio.run_coroutine_threadsafe(self._all(asked), self._system.loop)

    async def _all(self, asked: Sequence[Range]) -> list[Any]:
        """All ranges; unlike fsspec's own ``cat_ranges`` it ends its requests when it is cancelled."""
        requests = (self._system._cat_file(path, start=begin, end=end) for path, begin, end in asked)
        return await asyncio.gather(*requests, return_exceptions=True)

    def _wait(self, asked: Sequence[Range]) -> list[Any]:
        """Return what came of each range, or was raised for it."""
        try:
            if self._request is None:
                return self._system.cat_ranges(*map(list, zip(*asked, strict=True)), on_error="return")
            limit = PATIENCE + sum(end - begin for _, begin, end in asked) / SLOWEST
            try:
                found = self._request.result(limit)
            except FutureTimeout:
                self._request.cancel()
                raise TimeoutError(errno.ETIMEDOUT, f"no answer in {limit:.0f} s") from None
            return [self._checked(whole, place) for whole, place in zip(found, asked, strict=True)]
        except Exception as error:  # the request as a whole; clients have errors of their own
            return [error] * len(asked)

    def _checked(self, whole: Any, place: Range) -> Any:
        _, begin, end = place
        if isinstance(whole, bytes) and len(whole) > end - begin:
            return InputError(f"{len(whole):,} bytes came where {end - begin:,} were asked for: no ranges here?")
        return whole

    def result(self) -> list[Content]:
        """Return the content of each range, or what was raised for it, after asking again for what may pass."""
        found = self._wait(self._asked)
        for pause in PAUSES:
            failed = [k for k, whole in enumerate(found) if may_pass(whole)]
            if not failed:
                break
            time.sleep(pause)
            again = [self._asked[k] for k in failed]
            self._request = self._start(again)
            for k, whole in zip(failed, self._wait(again), strict=True):
                found[k] = whole
        out: list[Content] = []
        for (number, begin), (*_, size) in zip(self._places, self.ranges, strict=True):
            whole = found[number]
            out.append(whole[begin : begin + size] if isinstance(whole, bytes) else whole)
        return out

    def cancel(self) -> None:
        """Give up what is under way."""
        if self._request is not None:
            self._request.cancel()


def may_pass(error: Any) -> bool:
    """Return whether what a request gave is an error that another time may not be there: of the network, the client."""
    return isinstance(error, Exception) and not isinstance(error, (*FINAL, InputError))


def fetched(groups: Iterable[Sequence[Range]], most: int = BYTES_AHEAD) -> Iterator[list[Content]]:
    """Yield the contents of groups of ranges, in their order; those that follow are under way meanwhile.

    Besides the group that is used, one more is held, and others while they are `MAX_AHEAD` and ``most`` bytes at most.
    """
    ahead: deque[Fetch] = deque()
    groups = iter(groups)
    more = True
    try:
        while True:
            while more and (len(ahead) < 2 or (len(ahead) <= MAX_AHEAD and sum(f.bytes for f in ahead) < most)):
                ranges = next(groups, None)
                more = ranges is not None
                if ranges is not None:
                    ahead.append(Fetch(ranges))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        for fetch in ahead:
            fetch.cancel()
