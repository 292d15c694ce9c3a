"""Files in object stores and on servers, by fsspec: errors become OSErrors, and byte ranges are fetched ahead."""

import asyncio
import errno
import io
import os
import re
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

CONNECTIONS = 64  # of a process to one store; the default of the S3 client is 10
MAX_AHEAD = 16  # maximum number of groups of ranges that are fetched while one is used
BYTES_AHEAD = 16 * 2**20  # no further group is started while those ahead have this many bytes; one is always ahead
MAX_GAP = 16 * 2**10  # maximum bytes between two ranges that are fetched as one
MAX_JOINED = 8 * 2**20  # maximum bytes of such a joined range
PATIENCE = 60.0  # seconds that a group of ranges may take, in addition to its bytes / SLOWEST
SLOWEST = 100_000  # bytes per second
PAUSES = (0.5, 2.0, 8.0)  # seconds before each retry of a failed request
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # errors that are not retried

_file_systems: dict[int, Any] = {}  # file systems by their id, so that none is finalised (see `file_system`)

Range = tuple[str, int, int]  # URL, first byte, number of bytes
Content = bytes | Exception


def is_remote(url: str) -> bool:
    """Return whether fsspec has to open a folder or file: its name begins with a protocol, ``s3://`` or ``zip::``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", url) is not None


def file_system(url: str, key: str = "data.path: ") -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it. Raises `InputError`; its message begins with ``key``.

    fsspec caches one file system of each kind per process. This function keeps a reference to each, so that none is
    ever finalised. Otherwise a forked process, such as a loader's worker, would drop the file systems of its parent;
    their finalisers would close the connections in the event loop that both processes share, and the parent would wait
    forever for its next answer.
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
        _file_systems[id(system)] = system
    return system, path


@contextmanager
def store_errors() -> Iterator[None]:
    """Convert any exception that the client of an object store raises to an OSError (an InputError stays as it is)."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


class _File(io.RawIOBase):
    """A file in an object store that raises OSErrors only."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with store_errors():
            return bytes(self.file.read(size))

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        with store_errors():
            return int(self.file.seek(place, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def close(self) -> None:
        self.file.close()
        super().close()


def open_remote(url: str) -> IO[bytes]:
    """Open a remote file for reading. Raises OSError."""
    system, path = file_system(url)
    with store_errors():
        return cast(IO[bytes], _File(system.open(path, "rb")))


def joined(ranges: Sequence[Range]) -> tuple[list[Range], list[tuple[int, int]]]:
    """Join neighbouring ranges to larger ones.

    Returns the joined ranges and, for each of ``ranges``, the number of its joined range and its offset in that.
    """
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
    """A group of ranges that is being fetched: all requests run at the same time, and neighbouring ranges share one.

    ``result`` waits for them. A file system that is not asynchronous is only read when ``result`` is called.
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
        """Fetch all ranges. Unlike fsspec's own ``cat_ranges``, cancelling this cancels its requests."""
        requests = (self._system._cat_file(path, start=begin, end=end) for path, begin, end in asked)
        return await asyncio.gather(*requests, return_exceptions=True)

    def _wait(self, asked: Sequence[Range]) -> list[Any]:
        """Return, for each range, its content or the exception that was raised for it."""
        try:
            if self._request is None:
                found: list[Content] = self._system.cat_ranges(*map(list, zip(*asked, strict=True)), on_error="return")
                return found
            limit = PATIENCE + sum(end - begin for _, begin, end in asked) / SLOWEST
            try:
                found = self._request.result(limit)
            except FutureTimeout:
                self._request.cancel()
                raise TimeoutError(errno.ETIMEDOUT, f"no answer in {limit:.0f} s") from None
            return [self._checked(whole, place) for whole, place in zip(found, asked, strict=True)]
        except Exception as error:  # the whole request failed; clients raise their own types of exceptions
            return [error] * len(asked)

    def _checked(self, whole: Any, place: Range) -> Any:
        _, begin, end = place
        if isinstance(whole, bytes) and len(whole) > end - begin:
            return InputError(
                f"got {len(whole):,} bytes instead of {end - begin:,}; does the server ignore requests for a range of "
                "bytes?"
            )
        return whole

    def result(self) -> list[Content]:
        """Return, for each range, its content or its exception, after retries of what may be transient."""
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
        """Cancel the requests that are in progress."""
        if self._request is not None:
            self._request.cancel()


def may_pass(error: Any) -> bool:
    """Return whether the result of a request is an error that may be transient, such as one of the network."""
    return isinstance(error, Exception) and not isinstance(error, (*FINAL, InputError))


def fetched(groups: Iterable[Sequence[Range]], most: int = BYTES_AHEAD) -> Iterator[list[Content]]:
    """Yield the contents of groups of ranges, in order, while the next groups are fetched.

    Besides the group that is used, one group is always fetched ahead. Further ones are, up to `MAX_AHEAD` groups, while
    those ahead have fewer than ``most`` bytes.
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
