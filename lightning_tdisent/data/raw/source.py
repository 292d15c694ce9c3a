"""The interface of raw data sets, and what all kinds share: options, names, hashes, the files of a split."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from lightning_tdisent.data import splits
from lightning_tdisent.data.tars import expand_braces
from lightning_tdisent.digests import digest_of
from lightning_tdisent.errors import InputError

ARCHIVES = {
    "cifar-10-python.tar.gz": "unpack it with `tar xf cifar-10-python.tar.gz`",
    "ILSVRC2012_img_train.tar": "unpack it, and the tars of the classes in it, into ILSVRC/Data/CLS-LOC/train",
    "ILSVRC2012_img_val.tar": "unpack it into ILSVRC/Data/CLS-LOC/val",
}
# Names of the columns or fields of parquet files, metadata files and KEY.json that hold a class or a caption. The first
# name that is present is used.
ROLES = {
    "label": ("label", "labels", "cls", "class", "fine_label", "class_id"),
    "text": ("text", "caption", "prompt", "captions"),
}


@dataclass(frozen=True)
class Ask:
    """Options for opening a raw data set.

    split: name of the split, or a pattern of shards or parquet files. skip: resolved path of a folder that is not read.
    columns: columns of parquet files by role (``image``, ``label``, ``text``); an empty name leaves the role out.
    labels: ``folders`` uses the names of folders as classes, ``none`` reads no classes, ``auto`` prefers tables of
    labels to folders. links: follow links that leave the source.
    """

    split: str
    skip: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Literal["auto", "folders", "none"] = "auto"
    links: bool = False

    def skips(self, folder: Path) -> bool:
        """Return whether this folder is the one to skip, or contains nothing else (hidden files do not count)."""
        if self.skip is None or not self.skip.is_relative_to(here := folder.resolve()):
            return False
        return here == self.skip or all(self.skips(f) if f.is_dir() else is_hidden(f.name) for f in folder.iterdir())

    @property
    def pattern(self) -> bool:
        """Return whether the split is a pattern of file names."""
        return bool(re.search(r"[*?\[{]", self.split)) or self.split.endswith((".tar", ".tar.gz", ".parquet"))


@dataclass(frozen=True)
class Item:
    """One raw sample: where it came from, and its undecoded files by extension (``jpg``, ``cls``, ``txt``, ..).

    caption: name of the file with the caption, for messages. bad: why the sample cannot be used; empty if it can.
    """

    name: str
    members: dict[str, bytes]
    caption: str = ""
    bad: str = ""


class Source(Protocol):
    """A raw data set. It can be pickled, to be sent to other processes."""

    @property
    def kind(self) -> str:
        """Name of the kind of data set: one of `KINDS`, or ``toy``."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes by number; empty if the names are unknown."""

    @property
    def shuffled(self) -> bool | None:
        """True if `prepare` shuffles by default, as the raw order may be by class; None: it can only read in order."""

    @property
    def notes(self) -> list[str]:
        """Lines that name what was read as a split, class or caption, and what was not read."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def fingerprint(self) -> str:
        """Return a hash of the names and sizes, or of the content, of everything that would be read."""


def some(names: Iterable[str], most: int = 5) -> str:
    """Return the first ``most`` names, for a message; "nothing" if there are none."""
    names = list(names)
    more = f", .. ({len(names):,} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def class_table(classes: list[str]) -> str:
    """Return the numbers and names of classes, for a message: all if at most 40, else the first ten and the last."""
    rows = [f"{number} {name}" for number, name in enumerate(classes) if name]
    return ", ".join(rows) if len(rows) <= 40 else f"{', '.join(rows[:10])}, .., {rows[-1]} ({len(rows):,} in all)"


def unread(names: Iterable[str]) -> list[str]:
    """Return a line that counts unread files by extension, with the first name of each; an empty list for no files."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for name in names:
        kind = PurePosixPath(name).suffix.lower() or "without extension"
        first.setdefault(kind, name)
        count[kind] += 1
    parts = [f"{n:,} {kind} ({first[kind]}{', ..' if n > 1 else ''})" for kind, n in count.most_common()]
    return [f"not read: {some(parts, 12)}"] if parts else []


def names_in(path: Path, ask: Ask | None = None) -> list[str]:
    """Return the sorted names in a folder, without hidden ones and the folder to skip. Of a file, return its name."""
    return [e.name for e in _entries(path, ask)] if path.is_dir() else [path.name]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was created by an operating system."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def subfolders(folder: Path, ask: Ask) -> list[str]:
    """Return the sorted names of the subfolders of a folder, without hidden ones and the folder to skip."""
    return [e.name for e in _entries(folder, ask) if is_folder(e)]


def _entries(folder: Path, ask: Ask | None) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden ones and the folder to skip. No file is opened."""
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if not is_hidden(e.name)), key=lambda e: e.name)
    if ask is None or ask.skip is None:
        return entries
    return [e for e in entries if not (is_folder(e) and ask.skips(Path(e.path)))]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link that cannot be followed is not."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry.path).is_dir())


def hashed(parts: Iterable[str]) -> str:
    """Return a short hash of texts, each of which is terminated by a zero byte."""
    return digest_of((part + "\0").encode(errors="surrogateescape") for part in parts)[:16]


def files_of(path: Path, ask: Ask, endings: tuple[str, ...]) -> tuple[list[Path], list[str]] | None:
    """Return the files of a split and notes on the other files; None if there are no files with these endings.

    Searches the folder itself; if it has no such files, its subfolders that are named after splits; if there are none,
    the subfolder ``data`` or the only subfolder. Files are selected by `splits.of_split` or by a pattern. If ``path``
    is a file, it is returned whatever its name says of splits.
    """
    if path.is_file():
        return ([path], []) if path.name.endswith(endings) else None
    names = [n for n in names_in(path, ask) if n.endswith(endings) and n not in ARCHIVES and (path / n).is_file()]
    if names:
        chosen = _matching(names, ask.split, path) if ask.pattern else splits.of_split(names, ask.split, str(path))
        others = sorted(splits.found(names))
        if not chosen:
            has = f"others of {', '.join(others)}" if others else f"others: {some(names)}"
            raise InputError(
                f"{path} has no files {ask.split}*{endings[0]}, but {has}. Name one, or a pattern of files"
            )
        return [path / n for n in chosen], _split_notes(ask.split, chosen, names, "files")
    inner = subfolders(path, ask)
    named = [n for n in inner if n == ask.split or splits.named(n)]
    if not named:
        only = [n for n in inner if n == "data"] or (inner if len(inner) == 1 else [])
        return files_of(path / only[0], ask, endings) if only else None
    if ask.pattern:  # the first folder with files that match
        return next(filter(None, (files_of(path / n, ask, endings) for n in named)), None)
    holding = [n for n in named if files_of(path / n, replace(ask, split="*"), endings)]
    if not holding:
        return None
    chosen = [n for n in holding if n == ask.split] or splits.of_split(holding, ask.split, str(path))
    if not chosen or not splits.found(holding):
        raise InputError(f"{path} has no folder {ask.split!r}, but has {some(holding)}. Name one of these")
    if len(chosen) > 1:
        raise InputError(f"{path} has several folders of {ask.split}: {some(chosen)}. Name one of them as the split")
    inside = files_of(path / chosen[0], ask, endings)
    assert inside is not None
    return inside[0], [*_split_notes(ask.split, chosen, holding, "folders"), *inside[1]]


def _split_notes(split: str, chosen: list[str], names: list[str], what: str) -> list[str]:
    """Return notes on which files or folders belong to which split."""
    found = splits.found(names)
    if not found:
        return [f"split {split}: no name has the word of a split, so all {len(names):,} {what} are used"]
    by_split = ", ".join(f"{name} ({some(own, 2)})" for name, own in sorted(found.items()))
    left = sorted(set(names) - set(chosen) - set(itertools.chain(*found.values())))
    return [f"split {split}: {len(chosen):,} of {len(names):,} {what}; splits found: {by_split}", *unread(left)]


def _matching(names: list[str], pattern: str, where: Path) -> list[str]:
    """Return the names that match a pattern of braces and wildcards.

    Raises `InputError` if braces name a file that does not exist.
    """
    wanted = expand_braces(pattern, f"{where}: --split {pattern}")
    globs = [w for w in wanted if re.search(r"[*?\[]", w)]
    exact = set(wanted).difference(globs)
    if missing := sorted(exact.difference(names)):
        raise InputError(
            f"{where} has {len(exact) - len(missing)} of the {len(exact)} files of {pattern}; {missing[0]} is missing"
        )
    return [name for name in names if name in exact or any(fnmatch(name, glob) for glob in globs)]


def role_of(fields: Iterable[Any], role: str) -> str | None:
    """Return the first name of a role in `ROLES` that is among these fields; None if none is."""
    fields = set(fields)
    return next((name for name in ROLES[role] if name in fields), None)
