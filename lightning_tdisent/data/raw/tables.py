"""Rows of parquet files, as on the Hugging Face hub: an image, and a class or a caption."""

import bisect
import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_tdisent.data import splits
from lightning_tdisent.data.decode import image_type
from lightning_tdisent.data.raw.source import ROLES, Ask, Item, files_of, hashed, some
from lightning_tdisent.errors import InputError, nearest


@dataclass(frozen=True, eq=False)
class Parquet:
    """Rows of parquet files. A row group is read when one of its rows is requested; the last two groups are cached.

    Therefore sequential reading is fast and random access is slow, and the data are not shuffled by default. columns:
    name of the column of each role. groups: (number of a file, number of a row group in it). ends: total number of rows
    up to the end of each group.
    """

    files: list[Path]
    columns: dict[str, str]
    groups: list[tuple[int, int]]
    ends: list[int]
    classes: list[str]
    words: bool = False  # whether the labels are class names, not numbers
    notes: list[str] = field(default_factory=list)
    kind: str = "parquet"
    shuffled: bool = False

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> Item:
        place = bisect.bisect_right(self.ends, i)
        file, group = self.files[self.groups[place][0]], self.groups[place][1]
        row = i - (self.ends[place - 1] if place else 0)
        table = _row_group(file, group, tuple(self.columns.values()))
        values = {role: table[column][row].as_py() for role, column in self.columns.items()}
        image, label, text = values["image"], values.get("label"), values.get("text")
        held = image if isinstance(image, dict) else {"bytes": image}
        content, path = held.get("bytes") or b"", PurePosixPath(held.get("path") or "")
        if not content and path.name:
            raise InputError(f"{file}: row {row} of group {group} names the file {path} instead of holding it")
        members = {image_type(content) or "png": content}
        if isinstance(label, str):
            label = self._numbers[label] if self.words and label != "-1" else int(label)
        if label is not None and label >= 0:  # some test sets mark missing classes by -1
            members["cls"] = str(label).encode()
        text = next(iter(text), None) if isinstance(text, list) else text
        if text is not None:
            members["txt"] = text.encode()
        return Item(f"{file.name}/{i:08d}/{path.name}", members)

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and row groups of the files, the column of each role, and the classes."""
        sizes = [f"{f.name}\0{f.stat().st_size}" for f in self.files]
        groups = [f"{g}\0{e}" for g, e in zip(self.groups, self.ends, strict=True)]
        columns = [f"{role}={name}" for role, name in sorted(self.columns.items())]
        return hashed([*sizes, *groups, *columns, f"words={self.words}", *self.classes])


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError('parquet files need pyarrow: pip install "lightning_tdisent[parquet]"') from None
    return pyarrow


@functools.lru_cache(maxsize=2)
def _row_group(file: Path, group: int, columns: tuple[str, ...]) -> Any:
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(file) as opened:
            return opened.read_row_group(group, columns=list(columns), use_threads=False)
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"{file}: row group {group} cannot be read: {error}") from None


def find_parquet(path: Path, ask: Ask) -> tuple[list[Path], list[str], Path] | None:
    """Return the files of a split, notes on the other files, and the path; None if there are no parquet files."""
    found = files_of(path, ask, (".parquet",))
    return (*found, path) if found else None


def open_parquet(found: tuple[list[Path], list[str], Path], ask: Ask) -> Parquet:
    """Open parquet files, which must have the same columns.

    Raises `InputError` if they have not, if no column holds images, and for columns of other types.
    """
    _row_group.cache_clear()  # the files may have been replaced since they were read
    files, notes, path = found
    arrow = _pyarrow()
    groups, ends, rows = [], [], 0
    roles: dict[str, str] = {}
    kinds: dict[str, str] = {}
    unread: list[str] = []
    names: list[str] | None = None
    for n, file in enumerate(files):
        try:
            about = arrow.parquet.read_metadata(file)
            schema = about.schema.to_arrow_schema()
        except (OSError, arrow.ArrowException) as error:
            raise InputError(f"{file} cannot be read as a parquet file: {error}") from None
        if not n:
            roles = _columns(file, schema, ask.columns)
            kinds = {role: _kind(schema.field(name).type, role, arrow.types) for role, name in roles.items()}
            unread = [name for name in schema.names if name not in roles.values()]
        elif differ := [
            f"{name}: {_kind(schema.field(name).type, role, arrow.types) if name in schema.names else 'none'}, there "
            f"{kinds[role]}"
            for role, name in roles.items()
            if name not in schema.names or _kind(schema.field(name).type, role, arrow.types) != kinds[role]
        ]:
            raise InputError(f"{file.name} has other columns ({'; '.join(differ)}) than {files[0].name}")
        own = _class_names(schema, roles.get("label"))
        if names is not None and own != names:
            raise InputError(f"{file.name} numbers other classes ({some(own)}) than {files[0].name} ({some(names)})")
        names = own
        for k in range(about.num_row_groups):
            rows += about.row_group(k).num_rows
            groups.append((n, k))
            ends.append(rows)
    for role, name in roles.items():
        if kinds[role] not in _KINDS[role]:
            leave = "" if role == "image" else f", or leave it out with --columns {role}="
            raise InputError(
                f"{files[0]}: the column {name} is {kinds[role]}, expected {' or '.join(_KINDS[role])}. Name "
                f"another one with --columns {role}=NAME{leave}"
            )
    classes, words = names or [], kinds.get("label") == "text"
    if words:
        classes = _label_names(path, files, roles["label"], ask)
        if all(word.isascii() and word.isdecimal() for word in classes):
            classes, words = [], False
    said = ", ".join(f"{role} from {name}" for role, name in roles.items())
    said += "; the first caption of each list" if kinds.get("text") == "lists of text" else ""
    said += "; classes are numbered in the order of their names" if words else ""
    told = [*notes, f"columns: {said}", *([f"columns not read: {some(unread, 12)}"] if unread else [])]
    return Parquet(files, roles, groups, ends, classes, words, told)


# The types that a column of each role may have, in the words of `_kind`.
_KINDS = {
    "image": ("bytes", "a struct with a field of bytes"),
    "label": ("an integer", "text"),
    "text": ("text", "lists of text"),
}


def _kind(kind: Any, role: str, types: Any) -> str:
    """Return the name of an arrow type for messages and `_KINDS`, whatever the width of its integers or offsets."""
    if types.is_dictionary(kind):
        return _kind(kind.value_type, role, types)
    if types.is_integer(kind):
        return "an integer"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_struct(kind) and any(f.name == "bytes" and _kind(f.type, role, types) == "bytes" for f in kind):
        return "a struct with a field of bytes"
    if role == "text" and (types.is_list(kind) or types.is_large_list(kind)):
        return f"lists of {_kind(kind.value_type, role, types)}"
    return str(kind)


def _columns(file: Path, schema: Any, chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each role: as chosen (an empty name: no column), else by its usual names."""
    usual = {"image": ("image", "img", "jpg"), **ROLES}
    if strange := sorted(set(chosen) - set(usual)):
        raise InputError(f"--columns: {some(strange)} is not one of {', '.join(usual)}.{nearest(strange[0], usual)}")
    if missing := [f"{role}={name}" for role, name in chosen.items() if name and name not in schema.names]:
        raise InputError(f"{file} has no column for --columns {some(missing)}; it has {some(schema.names, 12)}")
    roles = {role: next((n for n in names if n in schema.names), "") for role, names in usual.items()} | dict(chosen)
    if not roles["image"]:
        raise InputError(
            f"{file} has no column {', '.join(usual['image'])}; it has {some(schema.names, 12)}. Name the one "
            "that holds images with --columns image=NAME"
        )
    return {role: name for role, name in roles.items() if name}


def _class_names(schema: Any, column: str | None) -> list[str]:
    """Return the class names that Hugging Face's ``datasets`` has written into the schema; empty if there are none."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (TypeError, KeyError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _label_names(path: Path, files: list[Path], column: str, ask: Ask) -> list[str]:
    """Return the sorted class names in a column of labels; those of the training split if there is one."""
    own = _distinct(files, column)
    train: set[str] = set()
    if splits.canonical(ask.split) != "train" and path.is_dir():
        with contextlib.suppress(InputError):  # there are no files of a training split
            found = files_of(path, replace(ask, split="train"), (".parquet",))
            train = _distinct(found[0], column) if found else set()
    if train and (strange := sorted(own - train)):
        raise InputError(f"{path}: the classes {some(strange)} of {column} are not among those of the training split")
    return sorted(train or own)


def _distinct(files: list[Path], column: str) -> set[str]:
    arrow = _pyarrow()
    try:
        tables = [arrow.parquet.read_table(file, columns=[column])[column] for file in files]
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"the column {column} cannot be read: {error}") from None
    return {word for values in tables for word in values.unique().to_pylist() if word not in (None, "-1")}
