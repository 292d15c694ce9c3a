"""What a raw data set is, and what its kinds share: types of images, names, hashes, the files of a split."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightning_tdisent.errors import InputError

SPLITS = ("train", "val", "valid", "validation", "test")
ARCHIVES = {
    "cifar-10-python.tar.gz": "unpack it with `tar xf cifar-10-python.tar.gz`",
    "ILSVRC2012_img_train.tar": "unpack it, and the tars of the classes in it, into ILSVRC/Data/CLS-LOC/train",
    "ILSVRC2012_img_val.tar": "unpack it into ILSVRC/Data/CLS-LOC/val",
}


@dataclass(frozen=True)
class Item:
    """One raw sample: where it came from, and its files by extension (``jpg``, ``cls``, ``txt``, ..), undecoded."""

    name: str
    members: dict[str, bytes]


class Source(Protocol):
    """A raw data set, which can be sent to other processes."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes by number; empty if they are not known."""

    @property
    def shuffled(self) -> bool | None:
        """Whether `prepare` shuffles by default, as the raw order may be sorted by class; None: it is read in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def fingerprint(self) -> str:
        """Hash of the names and sizes, or of the content, of all that would be read."""


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names, for a message."""
    names = list(names)
    more = f", .. ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def names_in(path: Path) -> list[str]:
    """Sorted names in a folder without hidden ones, or the name of a file."""
    return sorted(f.name for f in path.iterdir() if not f.name.startswith(".")) if path.is_dir() else [path.name]


def hashed(parts: Iterable[str]) -> str:
    """Short hash of some texts, each with its end."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode(errors="surrogateescape") + b"\0")
    return total.hexdigest()[:16]


def files_of(path: Path, split: str, endings: tuple[str, ...]) -> list[Path]:
    """Files named after a split, in a folder, its ``data`` or its folder of the split, else all, if none names another.

    A file is itself, whatever its name.
    """
    if path.is_file():
        return [path] if path.name.endswith(endings) else []

    def naming(split: str) -> list[Path]:
        return [f for f in files if re.match(rf"{re.escape(split)}(?![A-Za-z])", f.name)]

    for folder in filter(Path.is_dir, (path, path / split, path / "data")):
        if files := [folder / n for n in names_in(folder) if n.endswith(endings) and n not in ARCHIVES]:
            mine, others = naming(split), sorted(s for s in SPLITS if naming(s))
            if others and not mine:
                has = f"others of {', '.join(others)}"
                raise InputError(f"{folder} has no files {split}*{endings[0]}, but {has}. Name one")
            return mine or files
    return []
