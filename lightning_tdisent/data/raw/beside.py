"""Labels and captions stored next to the images of a folder, in the common conventions.

| file | used by | gives |
|---|---|---|
| ``dataset.json`` at the top | StyleGAN's and EDM's dataset_tool | ``{"labels": [[name, class], ..]}``, or a mapping |
| ``metadata.jsonl``, ``metadata.csv`` in any folder | ``datasets``' imagefolder | a row per ``file_name`` |
| ``KEY.json`` | img2dataset | caption and label of ``KEY.png`` |
| ``KEY.cls`` | unpacked shards | class of ``KEY.png`` |
| ``KEY.txt``, ``KEY.caption``, ``KEY.png.txt`` | trainers of text-to-image models | caption of ``KEY.png`` |

A ``dataset.json``, ``metadata.jsonl`` or ``metadata.csv`` may also be in a folder above that of the split, up to the
source. Fields are recognised by the names in `ROLES`. Caption files (the last row) are only read with their image.
"""

import csv
import json
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tdisent.data.decode import parse_class
from lightning_tdisent.data.raw.source import ROLES, role_of, some
from lightning_tdisent.errors import InputError

CAPTIONS = ("txt", "caption")
NO_CLASS = (None, "", -1, "-1")


@dataclass
class Beside:
    """Labels and captions of images, by the name of the image.

    wanted: whether labels are read. texts: captions. files: names of caption files, which are still to be read.
    tables: names of the files that gave labels. no_classes: whether one of the tables says that there are no classes.
    used: names of all files that were read or will be. notes: lines on what was read and what was not.
    """

    wanted: bool = True
    labels: dict[str, int | str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    no_classes: bool = False
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A table of labels or captions: its path, and its name relative to the root of the images.

    The names of images in it are relative to its folder. If that folder is below the root, ``folder`` is its path
    relative to the root; if it is above, ``below`` is the path of the root relative to it.
    """

    file: Path
    name: str
    folder: str = ""
    below: str = ""


def is_table(name: str) -> bool:
    """Return whether a file with this name may be a table of labels or captions."""
    return name == "dataset.json" or name.lower() in ("metadata.jsonl", "metadata.csv")


def look_beside(
    root: Path, names: Mapping[str, int], images: list[str], labels: bool = True, above: Iterable[Path] = ()
) -> Beside:
    """Collect the captions and, if ``labels``, the labels of the images below a folder.

    names: all files below ``root``; images: those that are images. above: tables that are not among the names, in the
    root or in folders above it. Raises `InputError` for a table that is damaged or names no existing file, for labels
    that conflict, are out of range or not of one type, and if only some of the images have a label.
    """
    out, known = Beside(wanted=labels), set(images)
    own = ["dataset.json", *sorted(n for n in names if "metadata." in n.lower() and is_table(n.rpartition("/")[2]))]
    tables = [Table(root / n, n, folder=n.rpartition("/")[0]) for n in own if n in names]
    for file in above:
        tables.append(Table(file, os.path.relpath(file, root), below=root.relative_to(file.parent).as_posix()))
    for table in tables:
        (_dataset_json if table.file.name == "dataset.json" else _metadata)(table, known, out)
        if table.name not in names and table.name not in out.used:
            out.notes.append(f"not read: {table.name}")
    _members(root, names, images, out)
    _caption_files(names, images, out)
    for name, label in out.labels.items():
        if isinstance(label, int) and parse_class(str(label).encode()) == -1:
            raise InputError(f"{root / name}: its label {label} (of {some(out.tables)}) is outside 0 to 2^31 - 1")
    kinds = Counter(type(label) for label in out.labels.values())
    if len(kinds) > 1:
        word = next(label for label in out.labels.values() if isinstance(label, str))
        raise InputError(
            f"{root}: the labels of {some(out.tables)} are numbers and names ({word!r}). Use one kind only"
        )
    if out.labels and (missing := sorted(known.difference(out.labels))):
        raise InputError(
            f"{root}: {some(out.tables)} gives {len(out.labels):,} of {len(known):,} images a label, but not "
            f"{missing[0]}. Label all of them, or use --labels none or --labels folders"
        )
    return out


def _dataset_json(table: Table, known: set[str], out: Beside) -> None:
    content, file = read_json(table.file), table.file
    rows = content.get("labels", ()) if isinstance(content, dict) else ()
    if isinstance(rows, dict):
        rows = [[name, value] for name, value in rows.items()]
    if rows == () or not isinstance(rows, list | None):
        return  # another kind of dataset.json, which is reported as a file that is not read
    out.used.add(table.name)
    if rows is None:
        out.no_classes = True
        out.notes.append(f"classes: {table.name} says that there are none")
        return
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
            raise InputError(f"{file}: labels: {str(row)[:60]} is not a pair of a name and a class")
    image_of = _match_images(table, [name for name, _ in rows], known, out, refuse=out.wanted)
    for name, value in rows:
        if name in image_of:
            _label(file, table.name, image_of[name], value, known, out)
    strange, others = sum(name not in image_of for name, _ in rows), sorted(set(content) - {"labels"})
    out.notes += [f"not read of {table.name}: {some(others)}"] if others else []
    if strange:
        out.notes.append(f"{table.name}: {strange:,} of its {len(rows):,} labels are of files that do not exist")


def _match_images(table: Table, given: list[str], known: set[str], out: Beside, refuse: bool) -> dict[str, str]:
    """Return the images that a table names: {name in the table: name of the image}.

    A name that differs from that of an image only in upper and lower case, or in the Unicode form, counts if it can
    mean one image only. If no name has been found so far, and the table is not above the root, the last part of a name
    (without its folders) is compared in the same way. refuse: raise `InputError` if the table names no existing file.
    """
    paths = {name: posixpath.normpath(posixpath.join(table.folder, name.replace("\\", "/"))) for name in given}
    there = {posixpath.normpath(posixpath.join(table.below, image)): image for image in known}
    found = {name: there[path] for name, path in paths.items() if path in there}
    for said, part in (("ignoring case and Unicode form", False), ("the last parts of the names", True)):
        if part and (found or table.below):
            break
        taken = set(found.values())
        images = _once((_folded(path, part), image) for path, image in there.items() if image not in taken)
        names = _once((_folded(path, part), name) for name, path in paths.items() if name not in found)
        more = {names[key]: images[key] for key in names.keys() & images.keys()}
        if more:
            name = min(more)
            out.notes.append(f"{table.name}: {len(more):,} images found by {said} ({name} is {more[name]})")
        found |= more
    if refuse and given and known and not found and not any((table.file.parent / path).exists() for path in given):
        raise InputError(
            f"{table.file}: none of the {len(paths):,} files that it names ({given[0]}, ..) exists; the images are "
            f"{some(sorted(known), 2)}. Correct the names, or move the file away"
        )
    return found


def _folded(path: str, part: bool) -> str:
    """Return a path, or its last component if ``part``, in one Unicode form and with case folded."""
    return unicodedata.normalize("NFC", path.rpartition("/")[2] if part else path).casefold()


def _once(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the pairs, as a dict, whose key occurs only once."""
    pairs = list(pairs)
    count = Counter(key for key, _ in pairs)
    return {key: value for key, value in pairs if count[key] == 1}


def _label(file: Path, table: str, name: str, value: Any, known: set[str], out: Beside) -> None:
    """Store the label that a table gives an image. Raises `InputError` if it is no class, or if two tables differ."""
    if isinstance(value, str):
        value = int(value) if value.strip().isascii() and value.strip().isdecimal() else value.strip()
    if not out.wanted or name not in known or (isinstance(value, int | str | None) and value in NO_CLASS):
        return
    if type(value) not in (int, str):
        raise InputError(
            f"{file}: the label of {name} is {str(value)[:60]}, expected a number or the name of a class. "
            "Correct it, or use --labels none"
        )
    if out.labels.setdefault(name, value) != value:
        raise InputError(f"{file}: {name} has the label {value}, but {out.labels[name]} in {some(out.tables)}")
    if table not in out.tables:
        out.tables.append(table)


def _metadata(table: Table, known: set[str], out: Beside) -> None:
    file, name, rows = table.file, table.name, []
    for number, row in enumerate(_rows(file)):
        if "file_name" not in row:
            if number:
                raise InputError(f"{file}: row {number + 1} has no file_name")
            out.notes.append(f"not read: {name} (it has no column file_name, but {some(map(str, row))})")
            out.used.add(name)
            return
        rows.append((str(row["file_name"]), row))
    roles = [(role_of(row, "label"), role_of(row, "text")) for _, row in rows]
    refuse = any((label and out.wanted) or text for label, text in roles)
    image_of = _match_images(table, [given for given, _ in rows], known, out, refuse)
    for (given, row), (label, text) in zip(rows, roles, strict=True):
        if given not in image_of:
            continue
        if label:
            _label(file, name, image_of[given], row[label], known, out)
        caption = _first(row[text]) if text else None
        if caption is not None:
            out.texts.setdefault(image_of[given], caption)
    out.used.add(name)
    lost = [given for given, _ in rows if given not in image_of]
    label, text = roles[-1] if roles else (None, None)
    read = [f"{role} from {column}" for role, column in (("classes", label), ("captions", text)) if column]
    what = " and ".join(read) or "no column for a class or a caption"
    out.notes.append(f"{name}: {len(rows) - len(lost):,} rows, {what}")
    used = {"file_name", *(column for columns in roles for column in columns)}
    other = {str(key) for _, row in rows for key in row if key not in used}
    out.notes += [f"not read of {name}: {some(sorted(other), 12)}"] if other else []
    out.notes += [f"{name}: {len(lost):,} rows are of files that do not exist ({lost[0]})"] if lost else []


def _rows(file: Path) -> Iterator[dict[Any, Any]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            if file.suffix.lower() == ".csv":
                yield from csv.DictReader(stream, strict=True)
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{file}: line {number} is not an object: {line[:60].strip()}")
                    yield row
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start}). Save it as UTF-8") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def read_json(file: Path) -> Any:
    """Return the content of a JSON file; raises `InputError` if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}. Correct it, or move it away") from None


def _first(value: Any) -> str | None:
    """Return a caption, or the first one of a list of captions; None if there is none."""
    value = next(iter(value), None) if isinstance(value, list) else value
    return value if isinstance(value, str) else None


def fields_of(table: Any, where: str) -> tuple[Any, str | None, list[str]]:
    """Return the label and the caption in the JSON object of one image, and the names of the fields that are not read.

    Raises `InputError` if ``table`` is no object. where: its file, for the message.
    """
    if not isinstance(table, dict):
        raise InputError(f"{where} holds {type(table).__name__}, expected an object with a caption or a label")
    label, text = role_of(table, "label"), role_of(table, "text")
    others = [str(key) for key in table if key not in (label, text)]
    return (table[label] if label else None), (_first(table[text]) if text else None), others


def _members(root: Path, names: Mapping[str, int], images: list[str], out: Beside) -> None:
    """Read the KEY.json and KEY.cls of each image that has them."""
    if not any(name.endswith((".json", ".cls")) for name in names):
        return
    others, read, known = Counter[str](), 0, set(images)
    parsed: dict[str, tuple[Any, str | None] | None] = {}  # label and caption by stem: a.jpg and a.png share a.json
    for image in images:
        stem = image.rpartition(".")[0]
        if f"{stem}.cls" in names:
            content = (root / f"{stem}.cls").read_text(errors="replace", encoding="utf-8")
            _label(root / f"{stem}.cls", "KEY.cls", image, content, known, out)
            out.used.add(f"{stem}.cls")
        if f"{stem}.json" not in names or (stem not in parsed and f"{stem}.json" in out.used):
            continue
        file = root / f"{stem}.json"
        if stem not in parsed:
            table = read_json(file)
            parsed[stem] = None
            if isinstance(table, dict):  # otherwise it is reported as a file that is not read
                label, text, more = fields_of(table, str(file))
                parsed[stem] = label, text
                out.used.add(f"{stem}.json")
                others.update(more)
        if (given := parsed[stem]) is not None:
            label, text = given
            _label(file, "KEY.json", image, label, known, out)
            if text is not None:
                out.texts.setdefault(image, text)
            read += 1
    if read:
        out.notes.append(f"KEY.json: read of {read:,} images for {' or '.join((ROLES['label'][0], ROLES['text'][1]))}")
        out.notes += [f"not read of KEY.json: {some(sorted(others), 12)}"] if others else []


def _caption_files(names: Mapping[str, int], images: Iterable[str], out: Beside) -> None:
    """Find the caption files of images: KEY.txt, KEY.caption, KEY.png.txt, KEY.png.caption; extensions in any case."""
    parts = ((n, *n.rpartition(".")[::2]) for n in names)
    there = {f"{stem}.{end.lower()}": n for n, stem, end in parts if end.lower() in CAPTIONS}
    if not there:
        return
    beaten = 0
    for image in images:
        stems = image.rpartition(".")[0], image
        found = next((there[f"{s}.{e}"] for s in stems for e in CAPTIONS if f"{s}.{e}" in there), None)
        if found:
            out.files[image] = found
            out.used.add(found)
            beaten += out.texts.pop(image, None) is not None
    if beaten:
        out.notes.append(f"captions: {beaten:,} images have a caption file and a row of a table; the file is used")
