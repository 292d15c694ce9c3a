"""Data sets that fit in memory: MNIST (IDX files) and CIFAR-10 (pickles, read without executing anything in them)."""

import gzip
import io
import math
import pickle
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_tdisent.data import splits
from lightning_tdisent.data.raw.source import Ask, Item, hashed, names_in, some
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError

Array = np.ndarray[Any, Any]
_MNIST = {"train": "train", "test": "t10k"}
_CIFAR = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images uint8 (N, H, W) or (N, H, W, 3) with class numbers (N,). Items are encoded as PNG."""

    kind: str
    images: Array
    labels: Array
    names: list[str]
    classes: list[str]
    notes: list[str] = field(default_factory=list)
    shuffled: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Item:
        png = io.BytesIO()
        Image.fromarray(self.images[i]).save(png, "png")
        return Item(self.names[i], {"png": png.getvalue(), "cls": str(self.labels[i]).encode()})

    def fingerprint(self) -> str:
        """Return a hash of all pixels, class numbers and names."""
        total = digest(np.ascontiguousarray(self.images).tobytes(), self.labels.astype("<i8").tobytes())
        return hashed([total, str(self.images.shape), *self.classes, *self.names])


def find_mnist(path: Path, ask: Ask) -> Path | None:
    """Return the folder with images of either split: ``path``, or where torchvision puts them below it; else None."""
    folders = (path, path / "raw", path / "MNIST" / "raw")
    return next((f for f in folders for prefix in _MNIST.values() if _idx(f, f"{prefix}-images", 3)), None)


def _idx(folder: Path, name: str, dimensions: int) -> Path | None:
    """Return an IDX file, None if there is none. Both spellings (``-idx``, ``.idx``) are in use, gzipped or not."""
    files = (folder / f"{name}{mark}idx{dimensions}-ubyte{packed}" for packed in ("", ".gz") for mark in "-.")
    return next(filter(Path.is_file, files), None)


def open_mnist(folder: Path, ask: Ask) -> Arrays:
    """Read the images and labels of a split.

    Raises `InputError` for an unknown split, for missing files, and for files that do not match their headers.
    """
    split = splits.canonical(ask.split)
    if split not in _MNIST:
        raise InputError(f"{folder}: MNIST has the splits {' and '.join(_MNIST)}, not {ask.split!r}")
    arrays = []
    for what, dimensions in (("images", 3), ("labels", 1)):
        file = _idx(folder, f"{_MNIST[split]}-{what}", dimensions)
        if file is None:
            name = f"{_MNIST[split]}-images-idx3-ubyte, {_MNIST[split]}-labels-idx1-ubyte"
            raise InputError(f"{folder} has no {what} of {name}(.gz); it holds {some(names_in(folder))}")
        arrays.append(_read_idx(file, dimensions))
    images, labels = arrays
    if len(images) != len(labels):
        raise InputError(f"{folder}: {len(images):,} images, but {len(labels):,} labels")
    return Arrays("mnist", images, labels, [f"{split}/{i:05d}" for i in range(len(images))], [])


LARGEST = 1 << 30  # maximum bytes of an IDX file, unzipped: 1.3 million images of 28 x 28


def _read_idx(file: Path, dimensions: int) -> Array:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file} is damaged: {error}") from None
    if len(content) > LARGEST:
        raise InputError(f"{file} has more than {LARGEST:,} bytes, which no set of digits has")
    magic = struct.pack(">I", 0x800 + dimensions)  # type unsigned byte, number of dimensions
    if content[:4] != magic:
        raise InputError(f"{file} begins with {content[:4].hex() or 'nothing'}, not with the IDX {magic.hex()}")
    begin = 4 + 4 * dimensions
    if len(content) < begin:
        raise InputError(f"{file} is damaged: it ends within its header, after {len(content)} bytes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if 0 in shape[1:] or len(content) - begin != math.prod(shape):
        has = f"asks for {math.prod(shape):,} bytes, but it has {len(content) - begin:,}"
        raise InputError(f"{file} is damaged: it claims the shape {shape}, which {has}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


class _Stub:
    """Placeholder for a numpy array or its dtype in a pickle. It keeps the arguments and the state of the original."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes as {encoding!r}, not as latin1")
    return text.encode("latin1")


class _BytesOnly(pickle.Unpickler):  # noqa: S301  see below
    """Unpickler of strings, numbers, lists, dicts and placeholders of arrays. It never imports a name from a pickle."""

    known = {
        ("numpy.core.multiarray", "_reconstruct"): _Stub,
        ("numpy._core.multiarray", "_reconstruct"): _Stub,
        ("numpy", "ndarray"): _Stub,
        ("numpy", "dtype"): _Stub,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for one of the few names that an array of bytes needs; refuse any other name."""
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array of bytes needs: refused")
        return self.known[module, name]


def _unpickle(file: Path) -> dict[bytes, Any]:
    raw = io.BytesIO(file.read_bytes())
    try:
        content = _BytesOnly(raw, encoding="bytes").load()
    except Exception as error:  # on damaged pickles, the unpickler raises almost any exception
        raise InputError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not the table of a CIFAR-10 batch")
    return content


def find_cifar(path: Path, ask: Ask) -> Path | None:
    """Return the folder that contains ``batches.meta``, None if there is none."""
    return next((f for f in (path, path / "cifar-10-batches-py") if (f / "batches.meta").is_file()), None)


def open_cifar(folder: Path, ask: Ask) -> Arrays:
    """Read all batches of a split. Raises `InputError` for a pickle that contains, or imports, anything else."""
    split = splits.canonical(ask.split)
    if split not in _CIFAR:
        raise InputError(f"{folder}: CIFAR-10 has the splits {' and '.join(_CIFAR)}, not {ask.split!r}")
    classes = _unpickle(folder / "batches.meta").get(b"label_names")
    if not isinstance(classes, list) or not all(isinstance(name, bytes) for name in classes):
        raise InputError(f"{folder / 'batches.meta'} has no list of names label_names")
    images, labels, names = [], [], []
    for part in _CIFAR[split]:
        pixels, numbers, files = _cifar_batch(folder / part, len(classes))
        images.append(pixels.transpose(0, 2, 3, 1))
        labels += numbers
        names += [f"{part}/{name}" for name in files]
    text = [name.decode(errors="replace") for name in classes]
    return Arrays("cifar10", np.concatenate(images), np.array(labels, np.int64), names, text)


def _cifar_batch(file: Path, classes: int) -> tuple[Array, list[int], list[str]]:
    """Return the pixels uint8 (N, 3, 32, 32), class numbers and file names of a batch."""
    batch = _unpickle(file)
    match batch.get(b"data"):
        case _Stub(state=(_, (int(n), 3072), _Stub(args=("u1" | b"u1", *_)), 0, bytes(content))):
            pixels = np.frombuffer(content, np.uint8)
        case _:
            n, pixels = -1, np.empty(0, np.uint8)
    if pixels.size != n * 3072:
        raise InputError(f"{file}: its data is not an array of bytes (N, 3072)")
    numbers, names = batch.get(b"labels"), batch.get(b"filenames")
    if not isinstance(numbers, list) or len(numbers) != n:
        raise InputError(f"{file} has {n:,} images, but {len(numbers) if isinstance(numbers, list) else 0:,} labels")
    if wrong := [k for k in numbers if type(k) is not int or not 0 <= k < classes]:
        raise InputError(f"{file} has the label {wrong[0]!r}, outside 0..{classes - 1}")
    if not isinstance(names, list) or len(names) != n or not all(isinstance(name, bytes) for name in names):
        names = [b"%05d" % i for i in range(n)]
    return pixels.reshape(n, 3, 32, 32), numbers, [name.decode(errors="replace") for name in names]
