"""A run folder here and its copy in an object store: all that another worker needs to go on."""

import json
from pathlib import Path

from lightning_tdisent.fleet.store import Store

NEWEST = "checkpoints/newest.json"
FOLDERS = ("", "checkpoints", "averages")
LAST = (".ckpt.json", "newest.json", "model.safetensors")  # in this order: each says that those before are whole


class Mirror:
    """Copies of a run folder's files under a name of a store; files there are whole, and say so in the right order."""

    def __init__(self, store: Store, name: str, folder: Path) -> None:
        self.store, self.name, self.folder = store, name, folder
        self._sent: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Bring what the store has and this folder lacks, or has otherwise.

        Where the last copy did not succeed, and this folder has gone further, its own files stay, and are pushed.
        """
        younger = step_of(Store(self.folder).read(NEWEST)) > step_of(self.store.read(f"{self.name}/{NEWEST}"))
        for part in FOLDERS:
            place = f"{self.name}/{part}".rstrip("/")
            for file in self.store.names(place):
                content = self.store.read(f"{place}/{file}")
                target = self.folder / part / file
                if content is None:
                    continue
                if not (target.exists() and target.read_bytes() == content):
                    if younger and target.exists():
                        continue
                    Store(self.folder).write(str(Path(part) / file), content)
                name = target.relative_to(self.folder)
                self._sent[str(name)] = self._files()[str(name)]

    def push(self) -> None:
        """Send what has changed since the last time; what is gone here, goes there."""
        here = self._files()
        changed = [name for name, mark in here.items() if self._sent.get(name) != mark]
        for name in sorted(changed, key=_rank):
            try:
                self.store.write(f"{self.name}/{name}", (self.folder / name).read_bytes())
            except FileNotFoundError:  # pruned meanwhile
                continue
            self._sent[name] = here[name]
        for name in [name for name in self._sent if name not in here]:
            self.store.remove(f"{self.name}/{name}")
            del self._sent[name]

    def _files(self) -> dict[str, tuple[int, int]]:
        out = {}
        for part in FOLDERS:
            folder = self.folder / part
            for path in folder.iterdir() if folder.is_dir() else ():
                try:
                    if path.is_file() and not path.name.startswith("."):
                        out[str(path.relative_to(self.folder))] = (path.stat().st_size, path.stat().st_mtime_ns)
                except FileNotFoundError:
                    continue
        return out


def _rank(name: str) -> tuple[int, str]:
    return next((k for k, end in enumerate(LAST, 1) if name.endswith(end)), 0), name


def step_of(pointer: bytes | None) -> int:
    """Step of the newest checkpoint by the pointer to it, 0 if there is none."""
    try:
        return int(json.loads(pointer or b"{}").get("step", 0))
    except (ValueError, AttributeError):
        return 0
