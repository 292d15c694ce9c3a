"""Existing WebDataset shards. Their samples are passed through with all members."""

import contextlib
import functools
import gzip
import json
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_tdisent.data import splits
from lightning_tdisent.data.decode import IMAGES
from lightning_tdisent.data.index import Index
from lightning_tdisent.data.raw.beside import fields_of
from lightning_tdisent.data.raw.folders import numbered
from lightning_tdisent.data.raw.source import Ask, Item, files_of, hashed, names_in, some
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.tars import SUFFIXES, refuse_unfinished
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError

Found = tuple[list[Path], list[str], list[Path]]  # shards of the split, notes, shards of the training split


@dataclass(frozen=True, eq=False)
class Tars:
    """Samples of shards, located by the headers of the tars.

    Gzipped shards can only be read in order, as they are unzipped while they are read. labels: class number of every
    sample, -1 for none; None to use the classes in the members.
    """

    files: list[Path]
    index: Index
    shuffled: bool | None
    kind: str = "webdataset"
    classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    labels: list[int] | None = None

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
        members = _with_json(self.index.members(i, region), name)
        if self.labels is not None:
            members = {extension: content for extension, content in members.items() if extension != "cls"}
            members |= {"cls": str(self.labels[i]).encode()} if self.labels[i] >= 0 else {}
        return Item(name, members)

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and keys of the shards, and of the sizes of all members."""
        regions = self.index.regions
        assert regions is not None
        sizes = digest(regions.member_size.tobytes(), regions.member_kind.tobytes())
        rows = [f"{s.name}\0{s.bytes}\0{s.keys}" for s in self.index.shards]
        return hashed([*rows, *self.index.extensions, sizes])


@functools.lru_cache(maxsize=1)  # kept open: unzipping from the current place is cheap, from the start it is not
def _unzipped(file: Path) -> gzip.GzipFile:
    return gzip.GzipFile(file)


def _with_json(members: dict[str, bytes], where: str) -> dict[str, bytes]:
    """Return the members with a class and a caption from KEY.json, unless there is a KEY.cls or a KEY.txt.

    KEY.caption becomes KEY.txt. KEY.json is kept as it is. A label that is not a number is not used; `_notes` reports
    it.
    """
    if "txt" not in members and "caption" in members:
        members = {"txt" if extension == "caption" else extension: content for extension, content in members.items()}
    if "json" not in members or ("cls" in members and "txt" in members):
        return members
    try:
        label, text, _ = fields_of(json.loads(members["json"]), f"{where}.json")
    except (ValueError, RecursionError):  # it is not the JSON object of a sample
        return members
    more = {}
    if "cls" not in members and type(label) is int and label >= 0:
        more["cls"] = str(label).encode()
    if "txt" not in members and text is not None:
        more["txt"] = text.encode()
    return {**members, **more}


def _notes(source: Tars) -> list[str]:
    """Return notes on what is read, what is kept and what is not read: members of all, KEY.json of the first sample."""
    kinds = source.index.extensions
    left = {k: v for k, v in source.index.unread.items() if not k.startswith("members ")}  # members are kept here
    kept = [e for e in kinds if e not in (*IMAGES, "cls", "txt", "caption", "json")]
    out = [f"not read: {kind} ({count:,}, first {first})" for kind, (count, first) in sorted(left.items())]
    out += [f"members kept as they are, not read: {some(kept, 12)}"] if kept else []
    if "json" not in kinds or not len(source):
        return out
    members = source[0].members
    try:
        label, text, others = fields_of(json.loads(members["json"]), "KEY.json")
    except (KeyError, ValueError, RecursionError):
        return [*out, "not read: KEY.json (it does not hold an object)"]
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
        out.append(f"not read: the label {str(label)[:40]!r} of KEY.json (of the first sample), which is not a number")
    return [*out, f"not read of KEY.json: {some(others, 12)}"] if others else out


def find_tars(path: Path, ask: Ask) -> Found | None:
    """Return the shards of a split, notes on other shards, and the shards of the training split; None for no shards.

    Raises `InputError` for shards of a `data prepare` that is not finished.
    """
    found = files_of(path, ask, SUFFIXES)
    if found is None:
        return None
    files, notes = found
    if path.is_dir():
        refuse_unfinished(str(files[0].parent), names_in(files[0].parent), [file.name for file in files], ask.split)
    train = None
    if not ask.pattern and splits.canonical(ask.split) != "train":
        with contextlib.suppress(InputError):  # there is no training split
            train = files_of(path, replace(ask, split="train"), SUFFIXES)
    return files, notes, train[0] if train else []


def open_tars(found: Found, ask: Ask) -> Tars:
    """Open shards with a new index, which is made from their headers, even if there is an index next to them."""
    _unzipped.cache_clear()  # the files may have been replaced since they were opened
    files, notes, train = found
    shuffled = None if any(file.suffix == ".gz" for file in files) else False
    source = Tars(files, build(files, hashed=False), shuffled)
    source = replace(source, notes=[*notes, *_notes(source)])
    if ask.labels == "none":
        return replace(source, labels=[-1] * len(source))
    if ask.labels == "auto" and ("cls" in source.index.extensions or not len(source) or "cls" in source[0].members):
        return source
    return _by_folders(source, train, ask)


def _by_folders(source: Tars, train: list[Path], ask: Ask) -> Tars:
    """Use the folders in the tars as classes, as for an unpacked data set, with the numbers of the training split."""
    folders, where = source.index.folders, source.files[0].parent
    trained = sorted(set(build(train, hashed=False).folders) - {""}) if train else []
    if trained and not folders:  # all images are in one folder: find the class of training among its parts
        parts = (source.index.key(number).split("/")[:-1] for number in range(len(source)))
        folders = [next((part for part in above if part in trained), "") for above in parts]
    own = sorted(set(folders) - {""})
    beside = (number for number, folder in enumerate(folders) if not folder and _has_image(source.index, number))
    flat = next(beside, None)
    if not own or flat is not None:
        if ask.labels == "folders":
            raise InputError(f"{where}: --labels folders, but the images of {source.files[0].name} are not in folders")
        if flat is None:
            return source
        said = f"folders in the tars ({some(own)}) are not classes: {source.index.key(flat)} is in none of them"
        return replace(source, notes=[*source.notes, said])
    if len(found := splits.found(own)) > 1 and ask.labels == "auto":
        raise InputError(
            f"{where}: {source.files[0].name} holds folders of the splits {some(found)} ({some(own, 3)}), but a tar is "
            "of one split. Unpack it and name the folder, or use --labels folders if they are classes, or --labels none"
        )
    if strange := sorted(set(own).difference(trained or own)):
        raise InputError(
            f"{where}: the class folders {some(strange)} are not among the {len(trained)} of {train[0].name}. Sort the "
            "images into these, or use --labels none"
        )
    classes, line = numbered(trained or own, where, ask)
    number = {name: k for k, name in enumerate(classes) if name}
    placed = ((source.index.key(k).rpartition("/")[0], folder) for k, folder in enumerate(folders) if folder)
    if deep := next((place for place, folder in placed if place.rpartition("/")[2] != folder), ""):
        line += f"; folders in them ({deep}) are not classes"
    notes = [*source.notes, f"classes in the tars: {line}{' of the training split' * bool(trained)}"]
    shuffled = None if source.shuffled is None else True  # tars with class folders are sorted by class
    labels = [number.get(folder, -1) for folder in folders]
    return replace(source, classes=classes, labels=labels, notes=notes, shuffled=shuffled)


def _has_image(index: Index, sample: int) -> bool:
    r = index.regions
    assert r is not None
    return any(index.extensions[kind] in IMAGES for kind in r.member_kind[r.first[sample] : r.first[sample + 1]])
