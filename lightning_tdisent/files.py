"""Files that are seen under their names when all of them is on the disk, or never."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lightning_tdisent.errors import Halted


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a file beside its target, which is fsynced and renamed over it at the end; raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file, and its folder if need be; raises `Halted`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as stream:
            stream.write(content)
    except OSError as error:
        raise Halted(f"{path}: cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
