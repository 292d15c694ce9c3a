"""A run folder here and its copy in an object store: all that another worker needs to go on."""

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_tdisent.artifacts import check_schema, is_count, parse_json
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import Guard, ask_guards, write_whole
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.models.checkpoint import manifest_of
from lightning_tdisent.runs import AVERAGES, CHECKPOINTS, NEWEST, WEIGHTS, identity_in, identity_of

POINTER = f"{CHECKPOINTS}/{NEWEST}"
OWNER = ".fleet.json"  # in a scratch folder: whose runs it has
FOLDERS = ("", CHECKPOINTS, AVERAGES)
Mark = tuple[int, int]  # size and time of a file
UNKNOWN: Mark = (-1, -1)  # of one whose copy may be there, or not


class Mirror:
    """Copies of a run folder's files under a name of a store; its pointer names a checkpoint that is there, whole."""

    def __init__(self, store: Store, name: str, folder: Path) -> None:
        self.store, self.name, self.folder = store, name, folder
        self._sent: dict[str, Mark] = {}

    def pull(self) -> None:
        """Bring what the store has and this folder lacks, or has otherwise.

        Where the last copy did not succeed, and this folder has gone further, its own files stay, and are pushed.
        """
        self._set_aside()
        younger = step_of(Store(self.folder).read(POINTER)) > step_of(self.store.read(f"{self.name}/{POINTER}"))
        for part in FOLDERS:
            place = f"{self.name}/{part}".rstrip("/")
            for file in sorted(self.store.names(place), key=lambda file: POINTER.endswith(f"/{file}")):  # pointer last
                target = self.folder / part / file
                content = self.store.read(f"{place}/{file}", large=True, check=partial(ask_guards, target))
                if content is None:
                    continue
                if not (target.exists() and target.read_bytes() == content):
                    if younger and target.exists():
                        continue
                    Store(self.folder).write(str(Path(part) / file), content)
                name = target.relative_to(self.folder)
                self._sent[str(name)] = self._files()[str(name)]

    def _set_aside(self) -> None:
        """Move this folder away if it is of another run: one that began here, and of which the store has nothing."""
        mine, theirs = identity_of(self.folder), identity_in(self.store.read(f"{self.name}/config.yaml"))
        if mine and theirs and mine != theirs:
            aside = self.folder.with_name(f".{self.folder.name}.{mine}")
            print(f"{self.folder} has run {mine}, the store goes on with {theirs}: moved to {aside}", file=sys.stderr)
            self.folder.rename(aside)

    def push(self, check: Guard) -> None:
        """Send what has changed since the last time; remove there what is gone here.

        The newest checkpoint is sent before its manifest, both before the pointer that names them, and the weights
        last. It is read before anything of it is sent, so that it may be pruned here meanwhile. Nothing is removed
        before the pointer has moved. check: asked before each file and while it is sent; raises Lost where the copy is
        another worker's by now.
        """
        here, newest = self._files(), self._newest()
        rest = [name for name in here if not name.startswith(f"{CHECKPOINTS}/") and name != WEIGHTS]
        for name in [*rest, *newest, *(name for name in here if name == WEIGHTS)]:
            mark, content = newest.get(name) or (here[name], None)
            if self._sent.get(name) == mark:
                continue
            try:
                content = (self.folder / name).read_bytes() if content is None else content
            except FileNotFoundError:  # removed meanwhile
                continue
            check(False)
            self._sent[name] = UNKNOWN
            self.store.write(f"{self.name}/{name}", content, check)
            self._sent[name] = mark
        gone = [name for name in self._sent if name not in here and name not in newest] if newest else []
        for name in sorted(gone, reverse=True):  # a manifest before its checkpoint
            check(False)
            self.store.remove(f"{self.name}/{name}")
            del self._sent[name]

    def _newest(self) -> dict[str, tuple[Mark, bytes]]:
        """Mark and content of the newest checkpoint, its manifest and the pointer to it; empty if there is none."""
        pointer = self.folder / POINTER
        while True:
            try:
                mark, content = _mark(pointer), pointer.read_bytes()
                path = pointer.parent / parse_json(content)["file"]
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                return {}
            out = {}
            try:
                for file in (path, manifest_of(path)):
                    name = str(file.relative_to(self.folder))
                    was = _mark(file)
                    out[name] = was, b"" if self._sent.get(name) == was else file.read_bytes()
                return out | {POINTER: (mark, content)}
            except FileNotFoundError:  # pruned meanwhile: there is a newer one, or the pointer is a lie
                if pointer.read_bytes() == content:
                    return {}

    def _files(self) -> dict[str, Mark]:
        out = {}
        for part in FOLDERS:
            folder = self.folder / part
            for path in folder.iterdir() if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file() and not path.name.startswith("."):
                        out[str(path.relative_to(self.folder))] = _mark(path)
        return out


def _mark(path: Path) -> Mark:
    return path.stat().st_size, path.stat().st_mtime_ns


def step_of(pointer: bytes | None) -> int:
    """Step of the newest checkpoint by the pointer to it, 0 if there is none."""
    try:
        found = parse_json(pointer or b"{}")
    except ValueError:
        return 0
    if not isinstance(found, dict) or not is_count(found.get("step", 0)):
        return 0
    check_schema(found, POINTER, 1, absent=1)
    return int(found.get("step", 0))


def scratch_of(store: Store, identity: str, given: Path | None, cache: Callable[[], Path]) -> Path:
    """Return the folder in which the runs of a fleet in an object store are trained: one of the cache, or that given.

    A given one keeps a note of whose it is. Raises InputError if it holds the runs of another fleet, or of one that was
    planned at this URL before.
    """
    key = digest(str(store), identity)[:16]
    if given is None:
        return cache() / "fleets" / key
    file = given / OWNER
    try:
        found = parse_json(file.read_bytes())
        of, theirs = found["fleet"], found["key"]
    except FileNotFoundError:
        store.check()
        write_whole(file, json.dumps({"schema": 1, "fleet": str(store), "key": key}).encode())
        return given
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged: {error}; name another --scratch, or remove it") from None
    check_schema(found, str(file), 1)
    if theirs != key:
        raise InputError(
            f"--scratch {given}: holds runs of {of}, planned earlier or elsewhere than {store}. Name another folder, "
            "or remove this one"
        )
    return given
