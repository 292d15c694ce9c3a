"""Mirror a local run folder to an object store, so that another worker can resume the run."""

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import Guard, ask_guards, write_whole
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.models.checkpoint import manifest_of
from lightning_tdisent.runs import AVERAGES, CHECKPOINTS, NEWEST, WEIGHTS, identity_in, identity_of
from lightning_tdisent.schemas import check_schema, is_count, parse_json

POINTER = f"{CHECKPOINTS}/{NEWEST}"
OWNER = ".fleet.json"  # in a scratch folder: names the fleet whose runs it holds
FOLDERS = ("", CHECKPOINTS, AVERAGES)
Mark = tuple[int, int]  # size in bytes and modification time in ns of a file
UNKNOWN: Mark = (-1, -1)  # the transfer of the file was started, and may have failed


class Mirror:
    """Copy the files of a run folder to a store.

    The pointer in the store always names a checkpoint that is complete there.

    store: store of the fleet.
    name: prefix of the copies in the store.
    folder: local run folder.
    """

    def __init__(self, store: Store, name: str, folder: Path) -> None:
        self.store, self.name, self.folder = store, name, folder
        self._sent: dict[str, Mark] = {}

    def pull(self) -> None:
        """Download the files that are missing in the local folder or differ from the store.

        If the newest local checkpoint is newer than that of the store, because the last upload failed, existing local
        files are kept, and the next `push` uploads them.
        """
        self._move_foreign_run()
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

    def _move_foreign_run(self) -> None:
        """Rename the local folder if it holds a different run than the store."""
        mine, theirs = identity_of(self.folder), identity_in(self.store.read(f"{self.name}/config.yaml"))
        if mine and theirs and mine != theirs:
            aside = self.folder.with_name(f".{self.folder.name}.{mine}")
            print(f"{self.folder} holds run {mine}, but the store run {theirs}: moved to {aside}", file=sys.stderr)
            self.folder.rename(aside)

    def push(self, check: Guard) -> None:
        """Upload the files that changed since the last call, and remove those that were deleted locally.

        Order: other files, then the newest checkpoint, its manifest and the pointer to it, then the weights. The
        checkpoint and its manifest are read before they are uploaded, so that the training may prune them meanwhile.
        Files are removed only after the pointer is uploaded.

        check: called before each file and while it is sent; raises Lost if another worker holds the job by now.
        """
        here, newest = self._files(), self._newest()
        rest = [name for name in here if not name.startswith(f"{CHECKPOINTS}/") and name != WEIGHTS]
        for name in [*rest, *newest, *(name for name in here if name == WEIGHTS)]:
            mark, content = newest.get(name) or (here[name], None)
            if self._sent.get(name) == mark:
                continue
            try:
                content = (self.folder / name).read_bytes() if content is None else content
            except FileNotFoundError:  # deleted since it was listed
                continue
            check(False)
            self._sent[name] = UNKNOWN
            self.store.write(f"{self.name}/{name}", content, check)
            self._sent[name] = mark
        gone = [name for name in self._sent if name not in here and name not in newest] if newest else []
        for name in sorted(gone, reverse=True):  # this order removes a manifest before its checkpoint
            check(False)
            self.store.remove(f"{self.name}/{name}")
            del self._sent[name]

    def _newest(self) -> dict[str, tuple[Mark, bytes]]:
        """Return mark and content of the newest checkpoint, its manifest and the pointer to it, in this order.

        Empty if there is no complete checkpoint. The content of a file that is already in the store is empty.
        """
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
            except FileNotFoundError:  # pruned: the pointer has moved to a newer checkpoint, or it is wrong
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
    """Return the step of the newest checkpoint from the content of its pointer, 0 if there is none."""
    try:
        found = parse_json(pointer or b"{}")
    except ValueError:
        return 0
    if not isinstance(found, dict) or not is_count(found.get("step", 0)):
        return 0
    check_schema(found, POINTER, 1, absent=1)
    return int(found.get("step", 0))


def scratch_of(store: Store, identity: str, given: Path | None, cache: Callable[[], Path]) -> Path:
    """Return the local folder for the runs of a fleet in an object store.

    store: store of the fleet.
    identity: id of the fleet.
    given: folder chosen by the user, or None to use a folder of the cache. The file `OWNER` in it names the fleet.
    cache: returns the cache folder.

    Raises InputError if ``given`` holds the runs of another fleet, including one planned earlier at the same URL.
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
        raise InputError(f"{file}: damaged: {error}; choose another --scratch, or remove it") from None
    check_schema(found, str(file), 1)
    if theirs != key:
        raise InputError(
            f"--scratch {given}: holds runs of {of}, planned earlier or elsewhere than {store}. Choose another folder, "
            "or remove this one"
        )
    return given
