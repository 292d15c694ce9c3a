"""Existing shards of WebDataset, whose samples go through with all their members."""

import functools
import gzip
import hashlib
import json
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_tdisent.errors import InputError
from lightning_tdisent.streaming.decode import IMAGES
from lightning_tdisent.streaming.index import Index
from lightning_tdisent.streaming.raw.beside import fields_of
from lightning_tdisent.streaming.raw.source import Ask, Item, files_of, hashed, names_in, some
from lightning_tdisent.streaming.scan import build
from lightning_tdisent.streaming.tars import SUFFIXES, refuse_unfinished


@dataclass(frozen=True, eq=False)
class Tars:
    """Samples of shards, read where their headers say; gzipped ones in order only, as one is unzipped as it is read."""

    files: list[Path]
    index: Index
    shuffled: bool | None
    kind: str = "webdataset"
    classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Item:
        file, regions = self.files[self.index.place(i)[0]], self.index.regions
        assert regions is not None
        size = int(regions.size[i])
        try:
            with nullcontext(_unzipped(file)) if file.suffix == ".gz" else file.open("rb") as stream:
                stream.seek(int(regions.begin[i]))
                region = stream.read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{file} cannot be read: {error}") from None
        if len(region) != size:
            raise InputError(f"{file} ends within {self.index.name(i)}. Has it changed?")
        name = f"{file.name}/{self.index.key(i)}"
        return Item(name, _with_json(self.index.members(i, region), name))

    def fingerprint(self) -> str:
        """Hash of the names, sizes and keys of the shards, and of the sizes of all members."""
        regions = self.index.regions
        assert regions is not None
        sizes = hashlib.sha256(regions.member_size.tobytes() + regions.member_kind.tobytes()).hexdigest()
        rows = [f"{s.name}\0{s.bytes}\0{s.keys}" for s in self.index.shards]
        return hashed([*rows, *self.index.extensions, sizes])


@functools.lru_cache(maxsize=1)  # kept open: going on is cheap, starting anew is not
def _unzipped(file: Path) -> gzip.GzipFile:
    return gzip.GzipFile(file)


def _with_json(members: dict[str, bytes], where: str) -> dict[str, bytes]:
    """Return the members with a class and a caption from KEY.json, where there is no KEY.cls, no KEY.txt.

    The json stays as it is. A label that is no number is left; `_notes` says so.
    """
    if "txt" not in members and "caption" in members:
        members = {"txt" if extension == "caption" else extension: content for extension, content in members.items()}
    if "json" not in members or ("cls" in members and "txt" in members):
        return members
    try:
        label, text, _ = fields_of(json.loads(members["json"]), f"{where}.json")
    except (ValueError, RecursionError):  # no table of a sample
        return members
    more = {}
    if "cls" not in members and type(label) is int and label >= 0:
        more["cls"] = str(label).encode()
    if "txt" not in members and text is not None:
        more["txt"] = text.encode()
    return {**members, **more}


def _notes(source: Tars) -> list[str]:
    """Return lines on the members of the first sample and of all: what is read, what is kept as it is."""
    kinds = source.index.extensions
    left = {k: v for k, v in source.index.unread.items() if not k.startswith("members ")}  # these are kept here
    kept = [e for e in kinds if e not in (*IMAGES, "cls", "txt", "caption", "json")]
    out = [f"not read: {kind} ({count:,}, first {first})" for kind, (count, first) in sorted(left.items())]
    out += [f"members kept as they are, not read: {some(kept, 12)}"] if kept else []
    if "json" not in kinds or not len(source):
        return out
    members = source[0].members
    try:
        label, text, others = fields_of(json.loads(members["json"]), "KEY.json")
    except (KeyError, ValueError, RecursionError):
        return [*out, "not read: KEY.json (it holds no table of a sample)"]
    given = [
        what
        for what, extension, value in (
            ("the class", "cls", type(label) is int),
            ("the caption", "txt", text is not None),
        )
        if value and extension not in kinds and not (extension == "txt" and "caption" in kinds)
    ]
    if given:
        out.append(f"KEY.json: gives {' and '.join(given)} (of the first sample)")
    if label is not None and type(label) is not int:
        out.append(f"not read: the label {str(label)[:40]!r} of KEY.json (of the first sample), which is no number")
    return [*out, f"not read of KEY.json: {some(others, 12)}"] if others else out


def find_tars(path: Path, ask: Ask) -> tuple[list[Path], list[str]] | None:
    """Return the shards of a split, and notes on the others."""
    found = files_of(path, ask, SUFFIXES)
    if found and path.is_dir():
        folder = found[0][0].parent
        refuse_unfinished(str(folder), names_in(folder), [file.name for file in found[0]], ask.split)
    return found


def open_tars(found: tuple[list[Path], list[str]], ask: Ask) -> Tars:
    """Open shards with an index of their own: it is made of their headers, whatever lies beside them."""
    _unzipped.cache_clear()  # of files that may have been replaced since
    files, notes = found
    shuffled = None if any(file.suffix == ".gz" for file in files) else False
    source = Tars(files, build(files, hashed=False), shuffled)
    return replace(source, notes=[*notes, *_notes(source)])
