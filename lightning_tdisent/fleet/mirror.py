"""A run folder here and its copy in an object store: all that another worker needs to go on."""

from pathlib import Path

from lightning_tdisent.fleet.store import Store

FOLDERS = ("", "checkpoints", "averages")
LAST = (".ckpt.json", "newest.json", "model.safetensors")  # these say that others are whole


class Mirror:
    """Copies of a run folder's files under a name of a store; files there are whole, and say so in the right order."""

    def __init__(self, store: Store, name: str, folder: Path) -> None:
        self.store, self.name, self.folder = store, name, folder
        self._sent: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Bring what the store has and this folder lacks, or has otherwise."""
        for part in FOLDERS:
            place = f"{self.name}/{part}".rstrip("/")
            for file in self.store.names(place):
                content = self.store.read(f"{place}/{file}")
                target = self.folder / part / file
                if content is not None and not (target.exists() and target.read_bytes() == content):
                    Store(self.folder).write(str(Path(part) / file), content)
        self._sent = self._files()

    def push(self) -> None:
        """Send what has changed since the last time; what is gone here, goes there."""
        here = self._files()
        changed = [name for name, mark in here.items() if self._sent.get(name) != mark]
        for name in sorted(changed, key=lambda name: (name.endswith(LAST), name)):
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
