"""Where a fleet keeps its state: files of a shared folder, or objects of a store that fsspec opens.

Three properties are all that leases and checkpoints need of it: a file is seen whole or not at all, of several who
create one name only one succeeds, and who lists sees what was written before.
"""

import contextlib
import inspect
import json
import os
import socket
import uuid
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.files import expand, whole
from lightning_tdisent.streaming.tars import store_errors


class Store:
    """Files under one folder or URL, named by relative paths with slashes.

    Raises OSError for what may pass (a network that is down, a full disk); InputError for a URL that cannot be opened
    or a store that cannot create a file exclusively.
    """

    def __init__(self, where: str | Path) -> None:
        where = expand(str(where))
        self.where, self.remote = where.rstrip("/"), "://" in where
        self._fs: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fs": None}  # a connection belongs to one process

    def __str__(self) -> str:
        return self.where

    @property
    def fs(self) -> Any:
        """The fsspec file system of a URL, opened when first needed."""
        if self._fs is None:
            try:
                self._fs, _ = fsspec.core.url_to_fs(self.where)
            except (ValueError, ImportError) as error:
                raise InputError(f"{self.where}: cannot be opened: {error}") from None
            put = self._fs._pipe_file if isinstance(self._fs, AsyncFileSystem) else type(self._fs).pipe_file
            if put is fsspec.AbstractFileSystem.pipe_file or "mode" not in inspect.signature(put).parameters:
                self._fs = None
                raise InputError(
                    f"{self.where}: this kind of store cannot create a file only if it is not there, so two workers "
                    "could train one expert; use a shared folder, or a store such as s3:// or gs://"
                )
        return self._fs

    def path(self, name: str) -> Path:
        """The file of a name, where the store is a folder."""
        return Path(self.where) / name

    def _url(self, name: str) -> str:
        return f"{self.where}/{name}" if name else self.where

    def read(self, name: str) -> bytes | None:
        """Content of a file, None where there is none."""
        try:
            if self.remote:
                with store_errors():
                    content: bytes = self.fs.cat_file(self._url(name))
                return content
            return self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole."""
        if self.remote:
            with store_errors():
                self.fs.pipe_file(self._url(name), content)
            return
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path(name)) as stream:
            stream.write(content)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; False if somebody has been first."""
        if self.remote:
            try:
                with store_errors():
                    self.fs.pipe_file(self._url(name), content, mode="create")
            except FileExistsError:
                return False
            return True
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{socket.gethostname()}.{uuid.uuid4().hex}.tmp")
        try:
            with beside.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(beside, target)  # the one way to a new name that is atomic on NFS as well
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.remote:
            with contextlib.suppress(FileNotFoundError), store_errors():
                self.fs.rm_file(self._url(name))
        else:
            self.path(name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """Names of the files right in a folder, sorted; those being written are none."""
        if self.remote:
            self.fs.invalidate_cache()
            try:
                with store_errors():
                    found = [entry for entry in self.fs.ls(self._url(folder), detail=True) if entry["type"] == "file"]
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(PurePosixPath(entry["name"]).name for entry in found)
        try:
            return sorted(p.name for p in self.path(folder).iterdir() if p.is_file() and not p.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def check(self) -> None:
        """Refuse a place that cannot be written, before any work."""
        name = f".writable-{uuid.uuid4().hex}"
        try:
            created = self.create(name, b"")
            self.remove(name)
        except OSError as error:
            raise Halted(f"{self.where}: cannot be written: {error.strerror or error}") from None
        if not created:
            raise Halted(f"{self.where}: says of a new name that it is taken")


def read_json(store: Store, name: str) -> dict[str, Any] | None:
    """Content of a file of JSON, None where there is none; refuses what is no object, or cut short, by its name."""
    content = store.read(name)
    if content is None:
        return None
    try:
        data = json.loads(content)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise InputError(f"{store}/{name}: damaged: not an object of JSON. Remove it, and run the fleet again")
    return data
