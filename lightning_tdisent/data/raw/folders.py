"""Image files in folders: flat, one folder per class, or ILSVRC (ImageNet-1k) as Kaggle distributes it."""

import contextlib
import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lightning_tdisent.data import splits
from lightning_tdisent.data.decode import IMAGES, canonical
from lightning_tdisent.data.raw.beside import is_table, look_beside
from lightning_tdisent.data.raw.source import (
    Ask,
    Item,
    hashed,
    is_folder,
    is_hidden,
    names_in,
    some,
    subfolders,
    unread,
)
from lightning_tdisent.errors import InputError

_ENDINGS = tuple(f".{extension}" for extension in IMAGES)
_SOLUTION = "LOC_val_solution.csv"
Root = tuple[str, Path]  # name of the class folder that a folder of the split is in, "" if none; that folder itself


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder, in arrays, because millions of names are sent to every process that reads some.

    names: paths relative to ``root``, in bytes. labels: class numbers, -1 for none. captions: the caption of image i is
    in a file with the stem of its name and the ending ``endings[captions[i]]``, -1 for none. texts: captions that have
    no file of their own, by number of the image. content: the fingerprint.
    """

    kind: str
    root: Path
    names: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    captions: np.ndarray[Any, Any]
    classes: list[str]
    content: str
    endings: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shuffled: bool = True

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Item:
        name, label, caption = os.fsdecode(self.names[i]), self.labels[i], ""
        file = self.root / name
        if file.is_symlink() and not file.exists():
            return Item(name, {}, bad=f"is a link to {os.readlink(file)}, which is not there")
        try:
            members = {canonical(file.suffix[1:].lower()): file.read_bytes()}
            if label >= 0:
                members["cls"] = str(label).encode()
            if self.captions[i] >= 0:
                caption = name.rpartition(".")[0] + self.endings[self.captions[i]]
                members["txt"] = (self.root / caption).read_bytes()
            elif i in self.texts:
                members["txt"] = self.texts[i].encode()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error}. Has the folder changed?") from None
        return Item(name, members, caption)

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes, classes and captions of all files."""
        return self.content


def _is_image(name: str) -> bool:
    return name.lower().endswith(_ENDINGS) and not is_hidden(name)


def _walk(
    folder: Path, bound: Path | None, ask: Ask, prefix: str = "", above: tuple[Path, ...] = ()
) -> Iterator[tuple[str, int]]:
    """Yield the name and size of every file below a folder, with names relative to it and after ``prefix``.

    Raises `InputError` for a link to something outside ``bound`` (None: all links are followed), and for a link to a
    folder above itself.
    """
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder above itself, {real}")
    with os.scandir(folder) as found:
        entries = [e for e in found if not is_hidden(e.name)]
    for entry in entries:
        if entry.is_symlink():
            _refuse_link(Path(entry.path), bound)
        if not is_folder(entry):
            there = not entry.is_symlink() or os.path.exists(entry.path)  # a broken link becomes a bad sample
            yield prefix + entry.name, entry.stat(follow_symlinks=there).st_size
        elif not ask.skips(Path(entry.path)):
            yield from _walk(Path(entry.path), bound, ask, f"{prefix}{entry.name}/", (*above, real))


def _refuse_link(path: Path, bound: Path | None) -> None:
    target = Path(os.path.realpath(path))
    if bound is not None and not target.is_relative_to(bound):
        raise InputError(f"{path} is a link that leaves {bound}, to {target}. Use --follow-links to read it")


def find_folder(path: Path, ask: Ask) -> Path | None:
    """Return ``path`` if an image, or a link to a folder, is in it or below it, else None. Stop at the first one."""
    for place, folders, names in os.walk(path):
        folders[:] = [f for f in folders if not is_hidden(f) and not ask.skips(Path(place, f))]
        if any(map(_is_image, names)) or any(Path(place, f).is_symlink() for f in folders):
            return path
    return None


def open_folder(path: Path, ask: Ask) -> Files:
    """Open the images of a split: those in folders named after it, or all if no folder and no file names a split."""
    if ask.pattern:
        raise InputError(f"{path}: --split {ask.split} is a pattern, but this is a folder of images. Name a split")
    roots, notes = _roots(path, ask)
    train: list[Root] = []
    if splits.canonical(ask.split) != "train":
        with contextlib.suppress(InputError):  # there is no training split to take the class numbers from
            train = _roots(path, replace(ask, split="train"))[0]
    return _by_folder("folder", path, roots, train, ask, notes)


def _is_split_name(name: str) -> bool:
    """Return whether a name consists of nothing but a split's name, such as Train, validation or val2017."""
    return len(splits.named(name)) == 1 and splits.canonical(re.sub(r"[\W\d_]+$", "", name)) in splits.SYNONYMS


def _roots(path: Path, ask: Ask) -> tuple[list[Root], list[str]]:
    """Return the folders of a split at or below a folder, and notes on the other splits.

    These are the folder that is named after the split; or that folder within the only subfolder (images/train); or
    those in each class folder (cat/train, dog/train). If no folder names a split, it is ``path`` itself.
    """
    inner = subfolders(path, ask)
    if named := _split_folders(path, inner, ask):
        exact = [n for n in named if n == ask.split] or [n for n in named if n.lower() == ask.split.lower()]
        mine = exact or splits.of_split(named, ask.split, str(path))
        mine = [n for n in mine if len(mine) == 1 or find_folder(path / n, ask)]
        if not mine:
            raise InputError(f"{path} has no folder {ask.split!r}, but has {some(named)}. Name one of these")
        if len(mine) > 1:
            raise InputError(f"{path} has several folders of {ask.split}: {some(mine)}. Name one of them as the split")
        left = [n for n in names_in(path, ask) if n not in named and not is_table(n)]
        return [("", path / mine[0])], _split_notes(ask, mine, named, left)
    if inner and not any(map(_is_image, names_in(path, ask))):
        if len(inner) > 1:
            return _in_classes(path, inner, ask)
        roots, notes = _roots(path / inner[0], ask)
        if notes:
            return roots, notes
    return [("", path)], []


def _split_folders(path: Path, inner: list[str], ask: Ask) -> list[str]:
    """Return those of the folders ``inner`` of a folder that are splits; an empty list if all of them are classes.

    Next to folders of images that name no split, a folder of a single split may also be a class (car, bus, train).
    Raises `InputError` for that. If the split is a later word of the folder's name (bullet train), it is a class.
    """
    named = [n for n in inner if n == ask.split or splits.named(n)]
    others = [n for n in inner if n not in named]
    if len(splits.found(filter(_is_split_name, named))) > 1 or (
        ask.split in named and splits.canonical(ask.split) not in splits.SYNONYMS
    ):
        return named
    with_images = [n for n in others if find_folder(path / n, ask)] if named else []
    if not with_images or ask.labels == "folders":
        return [] if with_images else named
    found = splits.found(named)
    first = [n for n in named if _is_split_name(n) or splits.named(re.findall(r"[^\W_]+", n)[0])]
    if first or len(found) > 1 or splits.canonical(ask.split) not in found:
        raise _ambiguous(path, named, with_images)
    return []


def _ambiguous(path: Path, named: list[str], others: list[str]) -> InputError:
    return InputError(
        f"{path} has folders of splits ({some(named, 3)}) next to folders of images of no split ({some(others, 3)}). "
        "Rename them, name one of them as the source, or use --labels folders if all of them are classes"
    )


def _in_classes(path: Path, inner: list[str], ask: Ask) -> tuple[list[Root], list[str]]:
    """Return the folders of a split that are in class folders (cat/train, dog/train), or the folder itself."""
    below = {n: subfolders(path / n, ask) for n in inner}
    below = {
        n: list(filter(_is_split_name, _split_folders(path / n, d, ask))) if any(map(_is_split_name, d)) else []
        for n, d in below.items()
    }
    found = sorted(splits.found(d for names in below.values() for d in names))
    others = [n for n in inner if not below[n] and len(found) == 1 and find_folder(path / n, ask)]
    if not found or (others and ask.labels == "folders"):
        return [("", path)], []
    if others:
        raise _ambiguous(path, [f"{n}/{d}" for n in inner for d in below[n]], others)
    chosen = [(n, path / n / d) for n in inner for d in below[n] if splits.canonical(ask.split) in splits.named(d)]
    chosen = [(n, folder) for n, folder in chosen if find_folder(folder, ask)]
    if not chosen:
        raise InputError(
            f"{path}: no folder below it is of the split {ask.split!r}; there are {some(found)}. Name one of these"
        )
    if len({n for n, _ in chosen}) < len(chosen):
        raise InputError(f"{path}: a folder has several folders of {ask.split}. Name one of them as the split")
    left = sorted(set(inner).difference(n for n, _ in chosen))
    names = [str(folder.relative_to(path)) for _, folder in chosen]
    return ([("", chosen[0][1])] if len(chosen) == 1 else chosen), _split_notes(ask, names, found, left)


def _split_notes(ask: Ask, mine: list[str], found: list[str], left: list[str]) -> list[str]:
    beside = [f"not read: {some(left)} (next to the folders of splits)"] if left else []
    return [f"split {ask.split}: {some(mine)}; splits found: {some(found)}", *beside]


def _by_folder(kind: str, path: Path, roots: list[Root], train: list[Root], ask: Ask, notes: list[str]) -> Files:
    """Return the images of the folders ``roots``, with labels from a table, or from their class folders.

    Class folders are numbered as in the training split, if there is one (``train``, its folders).
    """
    bound = None if ask.links else path.resolve()
    sizes: dict[str, int] = {}
    base = roots[0][1] if not roots[0][0] else path
    for _, folder in roots:
        if folder.is_symlink() and folder != path:
            _refuse_link(folder, bound)
        prefix = "" if folder == base else f"{folder.relative_to(base).as_posix()}/"
        sizes |= sorted(_walk(folder, bound, ask, prefix))  # file systems list files in any order
    images, seen = _of_split([n for n in sizes if _is_image(n)], ask, base)
    places = [*([base] if roots[0][0] else []), *list(base.parents)[: len(base.relative_to(path).parts)]]
    above = [place / n for place in reversed(places) for n in names_in(place, ask) if is_table(n)]
    above = [file for file in above if file.is_file()]
    for file in above:
        _refuse_link(file, bound)
    beside = look_beside(base, sizes, images, ask.labels == "auto", above)
    if beside.labels:
        labels, classes, line = _labels_by_table(beside.labels, images, path, train, ask)
        line = f"classes: labels of {some(beside.tables)}{line}"
    elif ask.labels == "none" or beside.no_classes:
        labels, classes, line = [-1] * len(images), [], ""
    else:
        labels, classes, line = _labels_by_folder(images, base, roots, train, ask)
    captioned = [beside.files.get(n, "") for n in images]
    ends = [c.removeprefix(n.rpartition(".")[0]) for n, c in zip(images, captioned, strict=True)]
    number = {end: k for k, end in enumerate(sorted(set(filter(None, ends))))}
    rows = (
        f"{n}\0{sizes[n]}\0{sizes[c] if c else -1}\0{label}"
        for n, c, label in zip(images, captioned, labels, strict=True)
    )
    texts = {i: beside.texts[n] for i, n in enumerate(images) if n in beside.texts}
    more = [f"{i}\0{text}" for i, text in texts.items()]
    with_caption = sum(map(bool, captioned)) + len(texts)
    if with_caption:
        lack = f"; {len(images) - with_caption:,} have none" if with_caption < len(images) else ""
        notes = [*notes, f"captions: for {with_caption:,} of {len(images):,} images{lack}"]
    rest = unread(sorted(set(sizes).difference(images, beside.used)))
    return Files(
        kind, base, np.array([os.fsencode(n) for n in images], bytes), np.array(labels, np.int32),
        np.array([number.get(e, -1) for e in ends], np.int16), classes, hashed([*classes, "", *rows, *more]),
        list(number), texts, [*notes, *seen, *([line] if line else []), *beside.notes, *rest],
    )  # fmt: skip


def _of_split(images: list[str], ask: Ask, root: Path) -> tuple[list[str], list[str]]:
    """Return the images whose names have the word of the split, and notes on it.

    Returns all images, without a note, unless every image names a split and they name several.
    """

    def stem(name: str) -> str:
        return name.rpartition("/")[2].rpartition(".")[0]

    if not all(splits.named(stem(n)) for n in images):
        return images, []
    stems = {n: stem(n) for n in images}
    if len(found := splits.found(stems.values())) < 2:
        return images, []
    mine = set(splits.of_split(stems.values(), ask.split, str(root)))
    there = ", ".join(f"{name} ({len(names):,})" for name, names in sorted(found.items()))
    if not mine:
        raise InputError(
            f"{root}: the images are named after the splits {there}, none after {ask.split!r}. Name one of these"
        )
    chosen = [n for n in images if stems[n] in mine]
    return chosen, [f"split {ask.split}: by the names of the images; splits found: {there}"]


def _labels_by_table(
    given: dict[str, int | str], images: list[str], path: Path, train: list[Root], ask: Ask
) -> tuple[list[int], list[str], str]:
    """Return labels and classes by a table, and text for a note.

    Class names are numbered in sorted order; if there is a training split, in the order of its names.
    """
    if isinstance(next(iter(given.values())), int):
        return [int(given[n]) for n in images], [], ""
    classes = sorted({str(label) for label in given.values()})
    if train:
        classes = _by_folder("folder", path, train, [], replace(ask, split="train"), []).classes or classes
    if strange := sorted({str(label) for label in given.values()}.difference(classes)):
        raise InputError(f"{path}: the classes {some(strange)} are not among the {len(classes)} of the training split")
    number = {name: k for k, name in enumerate(classes)}
    return [number[str(given[n])] for n in images], classes, ", numbered in the order of their names"


def _labels_by_folder(
    images: list[str], base: Path, roots: list[Root], train: list[Root], ask: Ask
) -> tuple[list[int], list[str], str]:
    """Return labels by class folders, the names of the classes, and a note on them."""
    flat = [n for n in images if "/" not in n]
    if flat and len(flat) < len(images):
        raise InputError(
            f"{base} holds both images ({some(flat, 3)}) and folders with images, but must be either class folders or "
            "one flat folder. Move one of them away, or use --labels none"
        )
    if flat or not images:
        return [-1] * len(images), [], ""
    folders = [n.partition("/")[0] for n in images]
    used, own = set(folders), _class_folders(roots, ask)
    trained = _class_folders(train, ask) if train else []
    if strange := sorted(used.difference(trained or own)):
        raise InputError(
            f"{base}: the class folders {some(strange)} are not among the {len(trained)} of {train[0][1]}. "
            "Sort the images into these, or use --labels none"
        )
    empty = sorted(set(own) - used)
    if wrong := [n for n in empty if any(not is_hidden(f) for *_, files in os.walk(base / n) for f in files)]:
        raise InputError(f"{base}: the class folders {some(wrong)} hold no images, but other files. Move them away")
    classes, line = numbered(trained or own, base, ask)
    if deep := next((n for n in images if n.count("/") > 1), ""):
        line += f"; folders in them ({deep.rpartition('/')[0]}) are not classes"
    number = {name: k for k, name in enumerate(classes) if name}
    lack = f"; no images in {some(f'{number[n]} {n}' for n in empty if n in number)}" if empty else ""
    return [number[n] for n in folders], classes, f"classes: {line}{' of the training split' * bool(trained)}{lack}"


def _class_folders(roots: list[Root], ask: Ask) -> list[str]:
    return sorted(name for name, _ in roots) if roots[0][0] else subfolders(roots[0][1], ask)


def numbered(names: list[str], base: Path, ask: Ask) -> tuple[list[str], str]:
    """Return the class names by number, and a description for a note.

    names: the sorted names of class folders. If all of them are numbers, these are the class numbers, with "" for
    numbers without a folder; otherwise, or if they are not distinct or too large, the order of the names counts. Raises
    `InputError` for names that look like parts of one set (00000, 00001), unless ``ask.labels`` is ``folders``.
    """
    if not all(n.isascii() and n.isdecimal() for n in names):
        return names, f"the sorted names of {len(names):,} folder{'s' * (len(names) != 1)}"
    if ask.labels != "folders" and len(names[0]) >= 5 and names[0][0] == "0" and len(set(map(len, names))) == 1:
        raise InputError(
            f"{base}: the folders {some(names, 3)} look like parts of one set (as FFHQ, dataset_tool and img2dataset "
            "have them), and no dataset.json gives classes. Use --labels none, or --labels folders"
        )
    by_number = {int(n): n for n in names}
    if len(by_number) < len(names) or max(by_number) >= max(1000, 10 * len(names)):
        return names, f"the sorted names of {len(names):,} folders (too large or not distinct to be class numbers)"
    classes = [by_number.get(k, "") for k in range(max(by_number) + 1)]
    gaps = len(classes) - len(names)
    lack = f"; {gaps:,} numbers from 0 on have no folder" if gaps else ""
    return classes, f"the numbers that name {len(names):,} folders{lack}"


def find_ilsvrc(path: Path, ask: Ask) -> Path | None:
    """Return the folder that contains ``Data/CLS-LOC``, None if there is none."""
    return next((root for root in (path / "ILSVRC", path) if (root / "Data" / "CLS-LOC").is_dir()), None)


def open_ilsvrc(root: Path, ask: Ask) -> Files:
    """Open a split of ILSVRC. Classes are numbered in the order of the names of the class folders of train.

    A split without class folders takes its classes from Kaggle's table ``LOC_val_solution.csv``.
    """
    data, split = root / "Data" / "CLS-LOC", splits.canonical(ask.split)
    if split not in ("train", "val") or not (data / split).is_dir():
        there = [s for s in ("train", "val") if (data / s).is_dir()]
        raise InputError(f"{data} has no split {ask.split!r} with classes; it has {' and '.join(there) or 'none'}")
    train = [("", data / "train")] if split != "train" and (data / "train").is_dir() else []
    files = _by_folder("ilsvrc", root, [("", data / split)], train, ask, [])
    return files if files.classes or not len(files) or ask.labels == "none" else _with_solution(files, root, ask)


def _with_solution(flat: Files, root: Path, ask: Ask) -> Files:
    places = [p / _SOLUTION for p in (root, root.parent, flat.root.parent, flat.root)]
    table = next(filter(Path.is_file, places), None)
    if table is None:
        raise InputError(
            f"{flat.root} has no class folders, and {_SOLUTION} is not next to it. Copy Kaggle's into {root}, or sort "
            "its images into class folders; ILSVRC2012_validation_ground_truth.txt numbers the classes in another order"
        )
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise InputError(f"{table} has the columns {some(rows.fieldnames or ())}, not ImageId,PredictionString")
        wnids = {row["ImageId"]: (row["PredictionString"] or "").partition(" ")[0] for row in rows}
    train = flat.root.parent / "train"
    classes = subfolders(train, ask) if train.is_dir() else sorted(set(wnids.values()))
    if unknown := sorted(set(wnids.values()) - set(classes)):
        raise InputError(f"{table} has the classes {some(unknown)}, which {train} does not have")
    stems = [PurePosixPath(os.fsdecode(name)).stem for name in flat.names]
    if missing := sorted(set(stems) - set(wnids)):
        raise InputError(f"{table} has no class for {some(missing)} of {flat.root}")
    numbers = {name: i for i, name in enumerate(classes)}
    labels = np.array([numbers[wnids[stem]] for stem in stems], np.int32)
    content = hashed([flat.content, *classes, *map(str, labels)])
    return replace(flat, labels=labels, classes=classes, content=content, notes=[f"classes: {table.name}", *flat.notes])
