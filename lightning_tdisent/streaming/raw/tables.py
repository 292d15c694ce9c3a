"""Rows of parquet files, as Hugging Face's hub has them: an image, and a class or a caption."""

import bisect
import functools
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.streaming.decode import image_type
from lightning_tdisent.streaming.raw.source import Item, files_of, hashed, some

_COLUMNS = {
    "image": ("image", "img", "jpg"),
    "label": ("label", "labels", "cls", "fine_label"),
    "text": ("text", "caption", "prompt"),
}


@dataclass(frozen=True, eq=False)
class Parquet:
    """Rows of parquet files; a row group is read when a row of it is asked for, and the last two are kept.

    So reading in order is quick, and reading at random is not: it is not shuffled by default. ``groups`` are numbers of
    a file and of a row group in it, ``ends`` the number of rows up to the end of each.
    """

    files: list[Path]
    columns: dict[str, str]
    groups: list[tuple[int, int]]
    ends: list[int]
    classes: list[str]
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
        if label is not None and label >= 0:  # -1 is how test sets without classes are written
            members["cls"] = str(label).encode()
        if text is not None:
            members["txt"] = text.encode()
        return Item(f"{file.name}/{i:08d}/{path.name}", members)

    def fingerprint(self) -> str:
        """Hash of the names, sizes and row groups of the files."""
        sizes = [f"{f.name}\0{f.stat().st_size}" for f in self.files]
        return hashed([*sizes, *(f"{g}\0{e}" for g, e in zip(self.groups, self.ends, strict=True)), *self.classes])


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


def find_parquet(path: Path, split: str) -> list[Path]:
    """The files of a split."""
    return files_of(path, split, (".parquet",))


def open_parquet(files: list[Path], split: str) -> Parquet:
    """Files with the same columns; raises `InputError` for others, and if none of them is an image."""
    _row_group.cache_clear()  # of files that may have been replaced since
    arrow = _pyarrow()
    first: Any = None
    groups, ends, rows = [], [], 0
    for n, file in enumerate(files):
        try:
            about = arrow.parquet.read_metadata(file)
            schema = about.schema.to_arrow_schema()
        except (OSError, arrow.ArrowException) as error:
            raise InputError(f"{file} is no parquet file that can be read: {error}") from None
        first = first or schema
        if not schema.equals(first):
            raise InputError(f"{file.name} has other columns ({some(schema.names)}) than {files[0].name}: {first}")
        for k in range(about.num_row_groups):
            rows += about.row_group(k).num_rows
            groups.append((n, k))
            ends.append(rows)
    return Parquet(files, _columns(files[0], first, arrow.types), groups, ends, _class_names(first))


def _columns(file: Path, schema: Any, types: Any) -> dict[str, str]:
    """Which column plays which role; its type is checked."""

    def image(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(f.name == "bytes" and image(f.type) for f in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    def text(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    bytes_ = "bytes, or a struct with a field of bytes"
    tests = {"image": (image, bytes_), "label": (types.is_integer, "an integer"), "text": (text, "a string")}
    roles = {role: name for role, names in _COLUMNS.items() for name in reversed(names) if name in schema.names}
    if "image" not in roles:
        raise InputError(f"{file} has no column {', '.join(_COLUMNS['image'])}; it has {some(schema.names, 12)}")
    for role, name in roles.items():
        check, expected = tests[role]
        if not check(schema.field(name).type):
            raise InputError(f"{file}: the column {name} is {schema.field(name).type}, expected {expected}")
    return roles


def _class_names(schema: Any) -> list[str]:
    """Names of the classes where Hugging Face's ``datasets`` wrote them into the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = next(features[name]["names"] for name in _COLUMNS["label"] if name in features)
    except (TypeError, KeyError, ValueError, StopIteration):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
