"""Image files in folders: flat, one folder per class, or as ILSVRC (ImageNet-1k) comes from Kaggle."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from lightning_tdisent.errors import InputError
from lightning_tdisent.streaming.decode import IMAGES, canonical
from lightning_tdisent.streaming.raw.source import SPLITS, Item, hashed, some

_ENDINGS = tuple(f".{extension}" for extension in IMAGES)
_SOLUTION = "LOC_val_solution.csv"


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder, in arrays: millions of names go to every process that reads some of them.

    ``names`` are the paths below the root, ``labels`` the class numbers or -1, ``captions`` whether there is one.
    """

    kind: str
    root: Path
    names: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    captions: np.ndarray[Any, Any]
    classes: list[str]
    content: str
    shuffled: bool = True

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Item:
        name, label = os.fsdecode(self.names[i]), self.labels[i]
        file = self.root / name
        extension = file.suffix[1:].lower()
        try:
            members = {canonical(extension): file.read_bytes()}
            if label >= 0:
                members["cls"] = str(label).encode()
            if self.captions[i]:
                members["txt"] = file.with_suffix(".txt").read_bytes()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error}. Has the folder changed?") from None
        return Item(name, members)

    def fingerprint(self) -> str:
        """Hash of the names, sizes and classes of all files."""
        return self.content


class _Found(NamedTuple):
    name: str  # path below the folder that was walked
    size: int
    caption: int  # bytes, -1 if there is none


def _is_image(name: str) -> bool:
    return name.lower().endswith(_ENDINGS) and not name.startswith(".")


def _walk(folder: Path, bound: Path, above: tuple[Path, ...] = (), prefix: str = "") -> Iterator[_Found]:
    """Image files below a folder; a link is followed only to what lies in ``bound`` and not above itself."""
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder above itself, {real}")
    with os.scandir(folder) as entries:
        here = {e.name: e for e in entries if not e.name.startswith(".")}
    for entry in here.values():
        if entry.is_symlink() and not (target := Path(entry.path).resolve()).is_relative_to(bound):
            raise InputError(f"{entry.path} is a link that leaves {bound}, to {target}. Copy what it points to")
        if entry.is_dir():
            yield from _walk(Path(entry.path), bound, (*above, real), f"{prefix}{entry.name}/")
        elif _is_image(entry.name):
            caption = here.get(entry.name.rpartition(".")[0] + ".txt")
            yield _Found(prefix + entry.name, entry.stat().st_size, caption.stat().st_size if caption else -1)


def _subfolders(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if not f.name.startswith(".") and f.is_dir())


def find_folder(path: Path, split: str) -> Path | None:
    """The folder itself if there is an image in it or below; looking stops at the first."""
    return path if any(_is_image(name) for *_, names in os.walk(path) for name in names) else None


def open_folder(path: Path, split: str) -> Files:
    """The images of ``path/split`` if there is one, else of the path, unless it holds folders of other splits."""
    root, bound = path / split, path.resolve()
    if not root.is_dir():
        if others := [s for s in SPLITS if (path / s).is_dir()]:
            raise InputError(f"{path} has no folder {split!r}, but has {', '.join(others)}. Name one of these")
        return _by_folder("folder", path, bound, path)
    if not root.resolve().is_relative_to(bound):
        raise InputError(f"{root} is a link that leaves {bound}, to {root.resolve()}. Name {root.resolve()} itself")
    return _by_folder("folder", root, bound, path / "train")


def _by_folder(kind: str, root: Path, bound: Path, train: Path) -> Files:
    """Images with the number of their class folder among those of the training split, if it is there.

    So a validation split without one of the classes has the numbers of the training split nevertheless.
    """
    found = sorted(_walk(root, bound))  # whatever order the file system lists them in
    flat = [f.name for f in found if "/" not in f.name]
    if flat and len(flat) < len(found):
        raise InputError(
            f"{root} holds both images ({some(flat, 3)}) and folders with images; "
            "it is either class folders or one flat folder. Move one of them away"
        )
    folders = [] if flat else [f.name.partition("/")[0] for f in found]
    used = set(folders)
    trained = _subfolders(train) if used and train.is_dir() else []
    classes = trained or (_subfolders(root) if used else [])
    if (train == root or not trained) and (empty := sorted(set(classes) - used)):
        raise InputError(f"{root}: the class folders {some(empty)} hold no images. Remove them, or fill them")
    if strange := sorted(used - set(classes)):
        raise InputError(f"{root}: the class folders {some(strange)} are not among the {len(classes)} of {train}")
    numbers = {name: i for i, name in enumerate(classes)}
    labels = [numbers[folder] for folder in folders] or [-1] * len(found)
    rows = (f"{f.name}\0{f.size}\0{f.caption}\0{label}" for f, label in zip(found, labels, strict=True))
    names, captions = [os.fsencode(f.name) for f in found], [f.caption >= 0 for f in found]
    return Files(
        kind, root, np.array(names, bytes), np.array(labels, np.int32), np.array(captions, bool), classes,
        hashed([*classes, "", *rows]),
    )  # fmt: skip


def find_ilsvrc(path: Path, split: str) -> Path | None:
    """The folder that holds ``Data/CLS-LOC``."""
    return next((root for root in (path / "ILSVRC", path) if (root / "Data" / "CLS-LOC").is_dir()), None)


def open_ilsvrc(root: Path, split: str) -> Files:
    """Numbered by the sorted names of the class folders of train; a flat validation split by Kaggle's table."""
    data = root / "Data" / "CLS-LOC"
    if split not in ("train", "val") or not (data / split).is_dir():
        there = [s for s in ("train", "val") if (data / s).is_dir()]
        raise InputError(f"{data} has no split {split!r} with classes; it has {' and '.join(there) or 'none'}")
    files = _by_folder("ilsvrc", data / split, root.resolve(), data / "train")
    return files if files.classes or not len(files) else _with_solution(files, root)


def _with_solution(flat: Files, root: Path) -> Files:
    places = [p / _SOLUTION for p in (root, root.parent, flat.root.parent, flat.root)]
    table = next(filter(Path.is_file, places), None)
    if table is None:
        raise InputError(
            f"{flat.root} is flat, and {_SOLUTION} is not beside it. Put Kaggle's into {root}, or sort "
            "its images into class folders; ILSVRC2012_validation_ground_truth.txt numbers the classes in another order"
        )
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise InputError(f"{table} has the columns {some(rows.fieldnames or ())}, not ImageId,PredictionString")
        wnids = {row["ImageId"]: (row["PredictionString"] or "").partition(" ")[0] for row in rows}
    train = flat.root.parent / "train"
    classes = _subfolders(train) if train.is_dir() else sorted(set(wnids.values()))
    if unknown := sorted(set(wnids.values()) - set(classes)):
        raise InputError(f"{table} speaks of the classes {some(unknown)}, which {train} does not have")
    stems = [PurePosixPath(os.fsdecode(name)).stem for name in flat.names]
    if missing := sorted(set(stems) - set(wnids)):
        raise InputError(f"{table} has no class for {some(missing)} of {flat.root}")
    numbers = {name: i for i, name in enumerate(classes)}
    labels = np.array([numbers[wnids[stem]] for stem in stems], np.int32)
    content = hashed([flat.content, *classes, *map(str, labels)])
    return replace(flat, labels=labels, classes=classes, content=content)
