"""Raw data sets as they are published, read item by item: image folders, ILSVRC, MNIST, CIFAR-10, parquet, tars.

`find_source` looks at a path and says what it is. Each kind is one function at the end of this file, in `KINDS`;
all of them hand out undecoded bytes, so that `prepare` decides what an image becomes. Nothing is unpacked or run: the
pickles of CIFAR-10 go through a reader that knows arrays of bytes and nothing else. The file is long because the
seven formats have nothing in common but `Source`.
"""

import bisect
import csv
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.streaming.index import Index, build
from lightning_tdisent.streaming.tars import SUFFIXES

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
SPLITS = ("train", "val", "valid", "validation", "test")
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One raw sample: where it came from, and its files by extension (``jpg``, ``cls``, ``txt``, ..), undecoded."""

    name: str
    members: dict[str, bytes]


class Source(Protocol):
    """A raw data set with cheap random access, which can be sent to other processes."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes by number; empty if they are not known."""

    @property
    def shuffled(self) -> bool:
        """Whether `prepare` shuffles by default: the raw order may be sorted by class."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def fingerprint(self) -> str:
        """Hash of the names and sizes, or of the content, of all that would be read."""


def image_type(content: bytes) -> str | None:
    """Extension by the first bytes of an image file; None if they are of none of `IMAGES`."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((extension for start, extension in _SIGNATURES.items() if content.startswith(start)), None)


def find_source(path: str | Path, split: str, kind: str = "auto") -> Source:
    """Open a raw data set; ``kind`` is one of `KINDS`, or ``auto`` to recognise it.

    Raises `InputError` if it is none, more than one, damaged, or has no such split.
    """
    path = Path(path)
    if kind not in ("auto", *KINDS):
        raise InputError(f"kind: {kind!r} is not known; it is one of auto, {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if not path.exists():
        raise InputError(f"{path} does not exist. Name the folder or file of the raw data set")
    try:
        for name, advice in _ARCHIVES.items():
            if path.name == name or (path.is_dir() and _listed(path) == [name]):
                raise InputError(f"{path} is an archive that is not opened here: {advice}")
        if kind != "auto":
            source = KINDS[kind].open(path, split)
        else:
            found = [name for name, k in KINDS.items() if k.recognise(path, split)]
            if "ilsvrc" in found:  # its images are in folders, too
                found = ["ilsvrc"]
            if len(found) != 1:
                looked = "; ".join(f"{name}: {k.looks_for}" for name, k in KINDS.items())
                raise InputError(
                    f"{path} can be read as {' and '.join(found)}. Say which, with kind"
                    if found
                    else f"{path} is no data set that is known here; it holds {_some(_listed(path))}. "
                    f"Looked for {looked}"
                )
            source = KINDS[found[0]].open(path, split)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not len(source):
        raise InputError(f"{path}: the split {split!r} of this {source.kind} data set is empty")
    return source


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names, for a message."""
    names = list(names)
    more = f", .. ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def _listed(path: Path) -> list[str]:
    """Names in a folder, or of a file, without hidden ones."""
    return sorted(f.name for f in path.iterdir() if not f.name.startswith(".")) if path.is_dir() else [path.name]


def _hashed(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode(errors="surrogateescape") + b"\0")
    return total.hexdigest()[:16]


def _of_split(path: Path, split: str, endings: tuple[str, ...], join: str) -> list[Path]:
    """Files of a split: named ``{split}{join}*``, else all if no name speaks of another split; a file is itself."""
    if path.is_file():
        return [path] if path.name.endswith(endings) else []
    names = [n for n in _listed(path) if n.endswith(endings) and n not in _ARCHIVES]
    files = [path / n for n in names if (path / n).is_file()]
    mine = [f for f in files if f.name.startswith(split + join)]
    others = sorted({s for s in SPLITS for f in files if re.match(rf"{s}\b", f.name)} - {split})
    if files and not mine and others:
        raise InputError(f"{path} has no files {split}{join}*{endings[0]}, but others of {', '.join(others)}. Name one")
    return mine or files


# Image folders and ILSVRC


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder, in arrays: millions of names go to every process that reads some of them.

    ``names`` are the paths below the root, one after the other, ``ends`` where each ends, ``labels`` the class numbers
    or -1, ``captions`` whether there is one.
    """

    kind: str
    root: Path
    names: bytes
    ends: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    captions: np.ndarray[Any, Any]
    classes: list[str]
    content: str
    shuffled: bool = True

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, i: int) -> str:
        """Path below the root."""
        return os.fsdecode(self.names[self.ends[i - 1] if i else 0 : self.ends[i]])

    def __getitem__(self, i: int) -> Item:
        name, label = self.name(i), self.labels[i]
        file = self.root / name
        extension = file.suffix[1:].lower()
        try:
            members = {"jpg" if extension == "jpeg" else extension: file.read_bytes()}
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


@dataclass(frozen=True)
class _Found:
    """An image file: path below the folder that was walked, size in bytes, size of its caption or -1."""

    name: str
    size: int
    caption: int


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGES and "." in name[1:]


def _walk(folder: Path, bound: Path, above: tuple[Path, ...] = (), prefix: str = "") -> Iterator[_Found]:
    """Image files below a folder; a link is followed only to what lies in ``bound`` and not above itself."""
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder above itself, {real}")
    with os.scandir(folder) as entries:
        here = {e.name: e for e in entries if not e.name.startswith(".")}
    for entry in here.values():
        if entry.is_symlink():
            target = Path(entry.path).resolve()
            if not target.is_relative_to(bound):
                raise InputError(f"{entry.path} is a link that leaves {bound}, to {target}. Copy what it points to")
        if entry.is_dir():
            yield from _walk(Path(entry.path), bound, (*above, real), f"{prefix}{entry.name}/")
        elif _is_image(entry.name):
            caption = here.get(entry.name.rpartition(".")[0] + ".txt")
            yield _Found(prefix + entry.name, entry.stat().st_size, caption.stat().st_size if caption else -1)


def _files(kind: str, root: Path, labelled: Iterable[tuple[_Found, int]], classes: list[str]) -> Files:
    """In the order of their paths, whatever order the file system lists them in."""
    ordered = sorted(labelled, key=lambda pair: pair[0].name)
    content = _hashed([*classes, "", *(f"{f.name}\0{f.size}\0{f.caption}\0{label}" for f, label in ordered)])
    names = [os.fsencode(f.name) for f, _ in ordered]
    return Files(
        kind=kind, root=root, names=b"".join(names), ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        labels=np.array([label for _, label in ordered], np.int32),
        captions=np.array([f.caption >= 0 for f, _ in ordered], bool), classes=classes, content=content,
    )  # fmt: skip


def _subfolders(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if not f.name.startswith(".") and f.is_dir())


def _split_folder(path: Path, split: str) -> Path:
    """``path/split`` if there, else the path itself, unless it holds folders of other splits."""
    if (path / split).is_dir():
        return path / split
    if others := [s for s in SPLITS if (path / s).is_dir()]:
        raise InputError(f"{path} has no folder {split!r}, but has {', '.join(others)}. Name one of these as the split")
    return path


def _has_images(path: Path) -> bool:
    """Whether an image lies in a folder or up to three folders below; looking stops at the first."""
    if not path.is_dir():
        return False
    patterns = ("*", "*/*", "*/*/*", "*/*/*/*")
    return any(_is_image(f.name) for pattern in patterns for f in path.glob(pattern))


def _open_folder(path: Path, split: str) -> Files:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder of images")
    root, bound = _split_folder(path, split), path.resolve()
    if not root.resolve().is_relative_to(bound):
        raise InputError(f"{root} is a link that leaves {bound}, to {root.resolve()}. Name {root.resolve()} itself")
    return _by_folder("folder", root, bound, path / "train" if root != path else root)


def _by_folder(kind: str, root: Path, bound: Path, numbered: Path) -> Files:
    """Images with the number of their class folder; ``numbered`` (train) is where the numbers come from, if there.

    So a validation split without one of the classes has the numbers of the training split nevertheless.
    """
    found = list(_walk(root, bound))
    flat = [f.name for f in found if "/" not in f.name]
    if len(flat) == len(found):
        return _files(kind, root, ((f, -1) for f in found), [])
    if flat:
        raise InputError(
            f"{root} holds both images ({_some(sorted(flat), 3)}) and folders with images; "
            "it is either class folders or one flat folder. Move one of them away"
        )
    used = {f.name.partition("/")[0] for f in found}
    own = numbered == root or not numbered.is_dir() or not _subfolders(numbered)
    classes = _subfolders(root if own else numbered)
    if own and (empty := sorted(set(classes) - used)):
        raise InputError(f"{root}: the class folders {_some(empty)} hold no images. Remove them, or fill them")
    if strange := sorted(used - set(classes)):
        raise InputError(f"{root}: the class folders {_some(strange)} are not among the {len(classes)} of {numbered}")
    numbers = {name: i for i, name in enumerate(classes)}
    return _files(kind, root, ((f, numbers[f.name.partition("/")[0]]) for f in found), classes)


def _ilsvrc(path: Path) -> Path | None:
    """The folder that holds ``Data/CLS-LOC``."""
    return next((root for root in (path / "ILSVRC", path) if (root / "Data" / "CLS-LOC").is_dir()), None)


def _open_ilsvrc(path: Path, split: str) -> Files:
    root = _ilsvrc(path)
    if root is None:
        raise InputError(f"{path} holds no ILSVRC/Data/CLS-LOC; it holds {_some(_listed(path))}")
    data = root / "Data" / "CLS-LOC"
    if split not in ("train", "val") or not (data / split).is_dir():
        there = [s for s in ("train", "val") if (data / s).is_dir()]
        raise InputError(f"{data} has no split {split!r} with classes; it has {' and '.join(there) or 'none'}")
    found = _by_folder("ilsvrc", data / split, path.resolve(), data / "train")
    if found.classes or not len(found):
        return found
    return _with_solution(path, root, found, data)


def _with_solution(path: Path, root: Path, flat: Files, data: Path) -> Files:
    """A flat split with the classes of Kaggle's table; the numbers of the devkit are of another order."""
    places = list(dict.fromkeys([path, root, root.parent, data, flat.root]))
    table = next((p / _SOLUTION for p in places if (p / _SOLUTION).is_file()), None)
    if table is None:
        devkit = next((f for p in places for f in p.glob(f"**/{_DEVKIT}")), None)
        why = f" {devkit} numbers the classes in another order than their sorted names." if devkit else ""
        raise InputError(
            f"{flat.root} is flat, and {_SOLUTION} is not beside it (looked in {_some(map(str, places))}).{why} "
            f"Put {_SOLUTION}, of the Kaggle download, into {root}, or sort the images into class folders"
        )
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise InputError(f"{table} has the columns {_some(rows.fieldnames or ())}, not ImageId,PredictionString")
        labels = {row["ImageId"]: (row["PredictionString"] or "").partition(" ")[0] for row in rows}
    train = data / "train"
    classes = _subfolders(train) if train.is_dir() else sorted(set(labels.values()))
    if unknown := sorted(set(labels.values()) - set(classes)):
        raise InputError(f"{table} speaks of the classes {_some(unknown)}, which {train} does not have")
    stems = [PurePosixPath(flat.name(i)).stem for i in range(len(flat))]
    if missing := sorted(set(stems) - set(labels)):
        raise InputError(f"{table} has no class for {_some(missing)} of {flat.root}")
    numbers = {name: i for i, name in enumerate(classes)}
    chosen = np.array([numbers[labels[stem]] for stem in stems], np.int32)
    content = _hashed([flat.content, *classes, *map(str, chosen)])
    return replace(flat, labels=chosen, classes=classes, content=content)


_SOLUTION, _DEVKIT = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt"


# MNIST and CIFAR-10


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images (N, H, W) or (N, H, W, 3) uint8 with class numbers (N,) in memory, handed out as PNG."""

    kind: str
    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    names: list[str]
    classes: list[str]
    shuffled: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Item:
        png = io.BytesIO()
        Image.fromarray(self.images[i]).save(png, "png")
        return Item(self.names[i], {"png": png.getvalue(), "cls": str(self.labels[i]).encode()})

    def fingerprint(self) -> str:
        """Hash of all pixels, class numbers and names."""
        total = hashlib.sha256(np.ascontiguousarray(self.images).tobytes() + self.labels.astype("<i8").tobytes())
        return _hashed([total.hexdigest(), str(self.images.shape), *self.classes, *self.names])


_MNIST = {"train": "train", "test": "t10k"}
_LARGEST = 1 << 32


def _idx_file(path: Path, prefix: str, what: str) -> Path | None:
    folders = (path, path / "raw", path / "MNIST" / "raw")
    names = [f"{prefix}-{what}{s}ubyte{z}" for s in ("-", ".") for z in ("", ".gz")]
    names = [n.replace("ubyte", "idx3-ubyte" if what == "images" else "idx1-ubyte") for n in names]
    return next((f / n for f in folders for n in names if (f / n).is_file()), None)


def _read_idx(file: Path, dimensions: int) -> np.ndarray[Any, Any]:
    """An IDX file of bytes, plain or gzipped; its magic number and length are checked before it is believed."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            magic = 0x800 + dimensions  # unsigned bytes, so many dimensions
            if header[:4] != struct.pack(">I", magic):
                raise InputError(f"{file} begins with {header[:4].hex() or 'nothing'}, not with the IDX {magic:08x}")
            if len(header) < 4 + 4 * dimensions:
                raise InputError(f"{file} is damaged: it ends within its header, after {len(header)} bytes")
            shape = struct.unpack_from(f">{dimensions}I", header, 4)
            size = int(np.prod(shape, dtype=object))
            if size > _LARGEST:
                raise InputError(f"{file} claims the shape {shape}, more than {_LARGEST:,} bytes")
            content = stream.read(size + 1)
    except (gzip.BadGzipFile, EOFError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: {error}") from None
    if len(content) != size:
        has = f"only {len(content):,}" if len(content) < size else "more"
        raise InputError(f"{file} is damaged: its shape {shape} asks for {size:,} bytes, but it has {has}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _open_mnist(path: Path, split: str) -> Arrays:
    if split not in _MNIST:
        raise InputError(f"{path}: MNIST has the splits {' and '.join(_MNIST)}, not {split!r}")
    files = [_idx_file(path, _MNIST[split], what) for what in ("images", "labels")]
    if files[0] is None or files[1] is None:
        missing = " and ".join(w for w, f in zip(("images", "labels"), files, strict=True) if f is None)
        raise InputError(
            f"{path} has no {missing} of {_MNIST[split]}-images-idx3-ubyte, {_MNIST[split]}-labels-idx1-ubyte (.gz); "
            f"it holds {_some(_listed(path))}"
        )
    images, labels = _read_idx(files[0], 3), _read_idx(files[1], 1)
    if len(images) != len(labels):
        raise InputError(f"{files[0]} has {len(images):,} images, but {files[1].name} {len(labels):,} labels")
    if 0 in images.shape[1:]:
        raise InputError(f"{files[0]} claims images of {images.shape[1]} x {images.shape[2]} pixels")
    return Arrays("mnist", images, labels, [f"{split}/{i:05d}" for i in range(len(images))], [])


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise InputError(f"a pickle encodes as {encoding!r}, not as latin1")
    return text.encode("latin1")


def _uint8(code: Any, *_: Any) -> np.dtype[Any]:
    if code not in (b"u1", "u1"):
        raise InputError(f"a pickle holds an array of {code!r}, not of bytes (u1)")
    return np.dtype("u1", False, True)  # a copy: the pickle sets its state


def _empty(*_: Any) -> np.ndarray[Any, Any]:
    return np.empty(0, np.uint8)


class _BytesOnly(pickle.Unpickler):
    """Unpickles strings, numbers, lists, dicts and arrays of bytes. No name of a pickle is ever imported."""

    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _empty,
        ("numpy._core.multiarray", "_reconstruct"): _empty,
        ("numpy", "ndarray"): _empty,  # only ever passed to _reconstruct
        ("numpy", "dtype"): _uint8,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        """One of the few names that an array of bytes needs; any other is refused."""
        if (module, name) not in self.known:
            raise InputError(f"a pickle asks for {module}.{name}, which an array of bytes does not need: refused")
        return functools.partial(self.known[module, name])  # a new one each time, as a pickle may write into it

    def persistent_load(self, pid: Any) -> Any:
        """Refused: there is nothing outside the file."""
        raise InputError(f"a pickle asks for the object {pid!r} outside itself: refused")


def _unpickle(file: Path) -> dict[bytes, Any]:
    try:
        with file.open("rb") as stream:
            content = _BytesOnly(stream, encoding="bytes").load()
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{file} is missing; {file.parent} holds {_some(_listed(file.parent))}") from None
    except Exception as error:  # the reader of pickles raises nearly everything on damaged ones
        raise InputError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not the table of a CIFAR-10 batch")
    return content


def _cifar(path: Path) -> Path | None:
    return next((f for f in (path, path / "cifar-10-batches-py") if (f / "batches.meta").is_file()), None)


def _open_cifar(path: Path, split: str) -> Arrays:
    folder = _cifar(path)
    if folder is None:
        raise InputError(f"{path} holds no cifar-10-batches-py with batches.meta; it holds {_some(_listed(path))}")
    parts = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
    if split not in parts:
        raise InputError(f"{path}: CIFAR-10 has the splits train and test, not {split!r}")
    classes = _unpickle(folder / "batches.meta").get(b"label_names")
    if not isinstance(classes, list) or not all(isinstance(name, bytes) for name in classes):
        raise InputError(f"{folder / 'batches.meta'} has no list label_names of names")
    images, labels, names = [], [], []
    for part in parts[split]:
        pixels, numbers, files = _cifar_batch(folder / part, len(classes))
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
        names += [f"{part}/{name}" for name in files]
    text = [name.decode(errors="replace") for name in classes]
    return Arrays("cifar10", np.concatenate(images), np.array(labels, np.int64), names, text)


def _cifar_batch(file: Path, classes: int) -> tuple[np.ndarray[Any, Any], list[int], list[str]]:
    """Pixels (N, 3072) uint8, class numbers and file names of a batch."""
    batch = _unpickle(file)
    pixels, numbers, names = batch.get(b"data"), batch.get(b"labels"), batch.get(b"filenames")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise InputError(f"{file}: data is {found}, not uint8 of (N, 3072)")
    if not isinstance(numbers, list) or len(numbers) != len(pixels):
        has = len(numbers) if isinstance(numbers, list) else "no list of"
        raise InputError(f"{file} has {len(pixels):,} images, but {has} labels")
    if wrong := [n for n in numbers if not isinstance(n, int) or not 0 <= n < classes]:
        raise InputError(f"{file} has the label {wrong[0]!r}, outside 0..{classes - 1}")
    if not isinstance(names, list) or len(names) != len(pixels) or not all(isinstance(n, bytes) for n in names):
        return pixels, numbers, [f"{i:05d}" for i in range(len(pixels))]
    return pixels, numbers, [n.decode(errors="replace") for n in names]


# Parquet


@dataclass(frozen=True, eq=False)
class Parquet:
    """Rows of parquet files; a row group is read when a row of it is asked for, and the last two are kept.

    So reading in order is quick and reading at random is not: it is not shuffled by default.
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
        members: dict[str, bytes] = {}
        table = _row_group(file, group, tuple(self.columns.values()))
        values = {role: table[column][row].as_py() for role, column in self.columns.items()}
        picture: Any = values["image"]
        name = ""
        if isinstance(picture, dict):
            picture, name = picture.get("bytes"), picture.get("path") or ""
            if picture is None and name:
                raise InputError(f"{file}: row {row} of group {group} names the file {name} instead of holding it")
        content = picture or b""
        suffix = PurePosixPath(name).suffix[1:].lower()
        members[image_type(content) or (suffix if suffix in IMAGES else "png")] = content
        label, text = values.get("label"), values.get("text")
        if label is not None and label >= 0:  # -1 is how test sets without classes are written
            members["cls"] = str(label).encode()
        if text is not None:
            members["txt"] = text.encode()
        return Item(f"{file.name}/{i:08d}/{PurePosixPath(name).name}", members)

    def fingerprint(self) -> str:
        """Hash of the names, sizes and row groups of the files."""
        sizes = [f"{f.name}\0{f.stat().st_size}" for f in self.files]
        return _hashed([*sizes, *(f"{g}\0{e}" for g, e in zip(self.groups, self.ends, strict=True)), *self.classes])


_COLUMNS = {
    "image": ("image", "img", "jpg"),
    "label": ("label", "labels", "cls", "fine_label"),
    "text": ("text", "caption", "prompt"),
}


def _pyarrow(module: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError('parquet files need pyarrow: pip install "lightning_tdisent[parquet]"') from None


@functools.lru_cache(maxsize=2)
def _row_group(file: Path, group: int, columns: tuple[str, ...]) -> Any:
    arrow, parquet = _pyarrow("pyarrow"), _pyarrow("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            return opened.read_row_group(group, columns=list(columns), use_threads=False)
    except (OSError, arrow.ArrowException) as error:
        raise InputError(f"{file}: row group {group} cannot be read: {error}") from None


def _parquet_files(path: Path, split: str) -> list[Path]:
    for folder in (path, path / split, path / "data"):
        if folder.exists() and (files := _of_split(folder, split, (".parquet",), "")):
            return files
    return []


def _open_parquet(path: Path, split: str) -> Parquet:
    files = _parquet_files(path, split)
    if not files:
        raise InputError(f"{path} holds no *.parquet; it holds {_some(_listed(path))}")
    arrow, parquet = _pyarrow("pyarrow"), _pyarrow("pyarrow.parquet")
    first: Any = None
    groups, ends, rows = [], [], 0
    for n, file in enumerate(files):
        try:
            with parquet.ParquetFile(file) as opened:
                schema, count = opened.schema_arrow, opened.num_row_groups
                lengths = [opened.metadata.row_group(k).num_rows for k in range(count)]
        except (OSError, arrow.ArrowException) as error:
            raise InputError(f"{file} is no parquet file that can be read: {error}") from None
        first = first or schema
        if not schema.equals(first):
            raise InputError(f"{file.name} has other columns ({_some(schema.names)}) than {files[0].name}: {first}")
        for k, length in enumerate(lengths):
            rows += length
            groups.append((n, k))
            ends.append(rows)
    return Parquet(files, _columns(files[0], first), groups, ends, _class_names(first))


def _columns(file: Path, schema: Any) -> dict[str, str]:
    """Which column plays which role; its type is checked."""
    types = _pyarrow("pyarrow").types

    def image(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(f.name == "bytes" and image(f.type) for f in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    tests: dict[str, tuple[Callable[[Any], bool], str]] = {
        "image": (image, "bytes, or a struct with a field of bytes"),
        "label": (types.is_integer, "an integer"),
        "text": (lambda kind: types.is_string(kind) or types.is_large_string(kind), "a string"),
    }
    roles = {role: name for role, names in _COLUMNS.items() for name in reversed(names) if name in schema.names}
    if "image" not in roles:
        raise InputError(f"{file} has no column {', '.join(_COLUMNS['image'])}; it has {_some(schema.names, 12)}")
    for role, name in roles.items():
        check, expected = tests[role]
        if not check(schema.field(name).type):
            raise InputError(f"{file}: the column {name} is {schema.field(name).type}, expected {expected}")
    return roles


def _class_names(schema: Any) -> list[str]:
    """Names of the classes where Hugging Face's ``datasets`` wrote them into the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        label = next(features[name] for name in _COLUMNS["label"] if name in features)
        names = label["names"]
    except (TypeError, KeyError, ValueError, StopIteration):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


# WebDataset


@dataclass(frozen=True, eq=False)
class Tars:
    """Samples of existing shards, with all their members; a gzipped shard is read from its start to get at a sample."""

    files: list[Path]
    index: Index
    classes: list[str] = field(default_factory=list)
    kind: str = "webdataset"
    shuffled: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Item:
        shard, regions = self.index.place(i)[0], self.index.regions
        assert regions is not None
        begin, size = int(regions.begin[i]), int(regions.size[i])
        try:
            region = _read(self.files[shard], begin, size)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.files[shard]} cannot be read: {error}") from None
        if len(region) != size:
            raise InputError(f"{self.files[shard]} ends within {self.index.name(i)}. Has it changed?")
        return Item(f"{self.files[shard].name}/{self.index.key(i)}", self.index.members(i, region))

    def fingerprint(self) -> str:
        """Hash of the names, sizes and keys of the shards, and of the sizes of all members."""
        regions = self.index.regions
        assert regions is not None
        sizes = hashlib.sha256(regions.member_size.tobytes() + regions.member_kind.tobytes()).hexdigest()
        rows = [f"{s.name}\0{s.bytes}\0{s.keys}" for s in self.index.shards]
        return _hashed([*rows, *self.index.extensions, sizes])


_gzipped: dict[Path, gzip.GzipFile] = {}  # the one that is open in this process: going on is cheap, going back is not


def _read(file: Path, begin: int, size: int) -> bytes:
    """Bytes of the tar of a shard."""
    if file.suffix != ".gz":
        with file.open("rb") as stream:
            stream.seek(begin)
            return stream.read(size)
    if file not in _gzipped:
        for other in list(_gzipped):
            _gzipped.pop(other).close()
        _gzipped[file] = gzip.GzipFile(file)
    _gzipped[file].seek(begin)
    return _gzipped[file].read(size)


def _shard_files(path: Path, split: str) -> list[Path]:
    return _of_split(path, split, SUFFIXES, "-")


def _open_tars(path: Path, split: str) -> Tars:
    files = _shard_files(path, split)
    if not files:
        raise InputError(f"{path} holds no *.tar(.gz); it holds {_some(_listed(path))}")
    return Tars(files, build(files, hashed=False))


# Every kind


@dataclass(frozen=True)
class Kind:
    """How a kind of data set is recognised and opened, and what is looked for, in words."""

    recognise: Callable[[Path, str], bool]
    open: Callable[[Path, str], Source]
    looks_for: str = field(default="")


KINDS: dict[str, Kind] = {
    "ilsvrc": Kind(lambda path, _: _ilsvrc(path) is not None, _open_ilsvrc, "ILSVRC/Data/CLS-LOC"),
    "cifar10": Kind(
        lambda path, _: _cifar(path) is not None, _open_cifar, "cifar-10-batches-py with data_batch_1..5, batches.meta"
    ),
    "mnist": Kind(
        lambda path, _: any(_idx_file(path, prefix, "images") for prefix in _MNIST.values()),
        _open_mnist, "train-images-idx3-ubyte(.gz), t10k-images-idx3-ubyte(.gz)",
    ),
    "parquet": Kind(lambda path, split: bool(_parquet_files(path, split)), _open_parquet, "*.parquet"),
    "webdataset": Kind(lambda path, split: bool(_shard_files(path, split)), _open_tars, "*.tar, *.tar.gz"),
    "folder": Kind(lambda path, _: _has_images(path), _open_folder, f"images ({', '.join(IMAGES)}), in class folders"),
}  # fmt: skip
_ARCHIVES = {
    "cifar-10-python.tar.gz": "unpack it with `tar xf cifar-10-python.tar.gz`",
    "ILSVRC2012_img_train.tar": "unpack it, and the tars of the classes in it, into ILSVRC/Data/CLS-LOC/train",
    "ILSVRC2012_img_val.tar": "unpack it into ILSVRC/Data/CLS-LOC/val",
}
