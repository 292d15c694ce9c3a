"""Storage of a fleet's state: files of a shared folder, or objects in a store that fsspec can open.

Leases and checkpoints require three properties: writes are atomic; if several processes create the same name, exactly
one succeeds; a listing includes everything written before it.
"""

import asyncio
import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from lightning_tdisent.data.remote import file_system, store_errors
from lightning_tdisent.errors import Halted, InputError, Lost
from lightning_tdisent.files import URL, Guard, expand, temporary, whole
from lightning_tdisent.schemas import check_schema, parse_json

SCHEMA = 1  # of the JSON files in a store: leases, failed, done, begun, rounds, curves
PATIENCE = 10.0  # default timeout of a request in seconds: a sixth of a lease's ttl, to notice a silent network early
SHORTEST, LONGEST = 2.0, 30.0  # limits of the timeout; the shortest allows for opening a connection
SLOWEST = 2**18  # bytes per second; a slower transfer times out
CARELESS = (
    "this store cannot create a file only if it is not there (a conditional put, If-None-Match), so two workers could "
    "train one expert; use a shared folder, or a store that can, such as s3:// of AWS, gs:// or az://"
)


class Store:
    """Read and write files under one folder or URL; file names are relative paths with slashes.

    ``patience`` is the timeout of a request to an object store in seconds; see `wait_for`.

    where: folder or URL.

    Raises OSError for errors that may be temporary (network down, timeout, disk full), Lost if the folder was removed
    since it was first used (it is not created again), and InputError for a URL that cannot be opened.
    """

    def __init__(self, where: str | Path) -> None:
        where = expand(str(where))
        self.where, self.remote = where.rstrip("/"), "://" in where
        if not self.remote and URL.match(where):
            raise InputError(f"{where}: not a URL: it has lost a slash, as in a pathlib.Path. Pass it as a string")
        self.patience = PATIENCE
        self._fs: Any = None
        self._existed = False  # whether the folder has existed; if it has, it is not created again

    def wait_for(self, seconds: float) -> None:
        """Set the timeout of requests to an object store, limited to `SHORTEST`..`LONGEST` seconds."""
        self.patience = min(max(seconds, SHORTEST), LONGEST)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fs": None}  # a connection belongs to one process

    def __str__(self) -> str:
        return self.where

    @property
    def fs(self) -> Any:
        """The fsspec file system of the URL, opened on first use."""
        if self._fs is None:
            self._fs, _ = file_system(self.where, key="")
        return self._fs

    def _request(self, method: str, *args: Any, size: int = 0, check: Guard | None = None, **options: Any) -> Any:
        """Call a method of the file system; raise TimeoutError if an asynchronous store does not answer in time.

        size: bytes to transfer, which extend the timeout. check: called every second while waiting; an exception that
        it raises cancels the request. File systems that are not asynchronous use the timeouts of their own clients.
        """
        with store_errors():
            if not isinstance(self.fs, AsyncFileSystem):
                return getattr(self.fs, method)(*args, **options)
            limit = self.patience + size / SLOWEST
            end = time.monotonic() + limit
            request = asyncio.run_coroutine_threadsafe(getattr(self.fs, f"_{method}")(*args, **options), self.fs.loop)
            try:
                while not wait([request], max(0.0, min(1.0, end - time.monotonic()))).done:
                    if check is not None:
                        check(True)
                    if time.monotonic() > end:
                        raise TimeoutError(errno.ETIMEDOUT, f"no answer from {self.where} in {limit:.0f} s")
                return request.result()
            finally:
                request.cancel()

    def path(self, name: str) -> Path:
        """Return the path of a file; only for a store that is a folder."""
        self._existed = self._existed or Path(self.where).is_dir()
        return Path(self.where) / name

    def _target(self, name: str) -> Path:
        """Return the path of a file and create its folder; raise Lost if the folder of the store was removed."""
        target = self.path(name)
        if self._existed and not Path(self.where).is_dir():
            raise Lost(f"{self.where}: no longer exists: it was removed or moved while it was in use")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._existed = True
        return target

    def _url(self, name: str) -> str:
        return f"{self.where}/{name}" if name else self.where

    def read(self, name: str, large: bool = False, check: Guard | None = None) -> bytes | None:
        """Return the content of a file, None if it does not exist.

        large: extend the timeout in proportion to the size of the file. check: called while waiting; an exception that
        it raises cancels the request.
        """
        try:
            if self.remote:
                size = self._request("info", self._url(name))["size"] if large else 0
                content: bytes = self._request("cat_file", self._url(name), size=size, check=check)
                return content
            return self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes, check: Guard | None = None) -> None:
        """Write a file atomically.

        check: called while the content is sent to an object store; an exception that it raises cancels the request.
        """
        if self.remote:
            self._request("pipe_file", self._url(name), content, size=len(content), check=check)
            return
        with whole(self._target(name)) as stream:
            stream.write(content)

    def create(self, name: str, content: bytes) -> bool:
        """Create a file; return False if it exists already."""
        if self.remote:
            try:
                self._request("pipe_file", self._url(name), content, mode="create")
            except FileExistsError:
                return False
            return True
        target = self._target(name)
        temp = temporary(target)
        try:
            with temp.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(temp, target)  # the only exclusive creation that is atomic on NFS as well
        except FileExistsError:
            return False
        finally:
            temp.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.remote:
            with contextlib.suppress(FileNotFoundError):
                self._request("rm_file", self._url(name))
        else:
            self.path(name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in a folder, without unfinished ones.

        Empty if the folder does not exist.
        """
        if self.remote:
            self.fs.invalidate_cache()
            try:
                entries = self._request("ls", self._url(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "file")
        try:
            return sorted(p.name for p in self.path(folder).iterdir() if p.is_file() and not p.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def check(self) -> None:
        """Check that the store can be written, and that a file can be created only once; call it before any work.

        A file is created twice, and the second attempt must fail, because some stores ignore the condition. Raises
        Halted if the store cannot be written, and InputError if it does not support exclusive creation.
        """
        if self.remote:
            self._refuse_private()
        name, first, second = f".writable-{uuid.uuid4().hex}", uuid.uuid4().bytes, uuid.uuid4().bytes
        try:
            # a client that repeats its own request is told that the file exists; then the content decides
            created = self.create(name, first) or self.read(name) == first
            again = created and self.create(name, second)
            content = self.read(name)
            self.remove(name)
        except OSError as error:
            raise Halted(f"{self.where}: cannot be written: {error.strerror or error}") from None
        if not created:
            raise Halted(f"{self.where}: reports that a file with a new random name already exists")
        if again or content != first:
            raise InputError(f"{self.where}: {CARELESS}")

    def _refuse_private(self) -> None:
        """Refuse stores that other processes cannot see, and those known not to create files exclusively."""
        if "::" in self.where:
            raise InputError(
                f"{self.where}: others would not see what is cached here; name the store alone, without ::"
            )
        if isinstance(self.fs, MemoryFileSystem):
            raise InputError(
                f"{self.where}: is the memory of one process, which its workers do not see; use a shared folder, or a "
                "store such as s3:// or gs://"
            )
        if not isinstance(self.fs, AsyncFileSystem) and type(self.fs).pipe_file is fsspec.AbstractFileSystem.pipe_file:
            raise InputError(f"{self.where}: {CARELESS}")


def read_json(store: Store, name: str, required: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return the content of a JSON file without its schema, None if the file does not exist.

    Raises InputError with the name of the file if it is truncated, not a JSON object, or lacks a required key.
    """
    content = store.read(name)
    if content is None:
        return None
    try:
        data = parse_json(content)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise InputError(f"{store}/{name}: damaged: not a JSON object. Remove it, and run the fleet again")
    check_schema(data, f"{store}/{name}", SCHEMA, absent=1)  # the first versions wrote no schema
    if missing := [key for key in required if key not in data]:
        raise InputError(
            f"{store}/{name}: damaged: {', '.join(missing)} is missing. Remove it, and run the fleet again"
        )
    return {key: value for key, value in data.items() if key != "schema"}


def dump_json(data: dict[str, Any], indent: int | None = None) -> bytes:
    """Return data as the content of a JSON file for `read_json`."""
    return json.dumps({"schema": SCHEMA, **data}, indent=indent).encode()
