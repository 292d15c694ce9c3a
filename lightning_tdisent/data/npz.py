"""Read the sample files of ADM's evaluation suite: .npz with images in ``arr_0`` and optional labels in ``arr_1``."""

import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_tdisent.data.tars import hash_file
from lightning_tdisent.errors import InputError

_READ_ERRORS = (OSError, ValueError, EOFError, TypeError, AttributeError, KeyError, MemoryError, NotImplementedError,
               OverflowError, RecursionError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)  # fmt: skip
MOST_EXPANDED = 1 << 30  # maximum bytes of an array that is compressed to less than a hundredth of its size


def is_npz(path: str | Path | None) -> bool:
    """Return whether a path names an .npz file."""
    return str(path).endswith(".npz")


def read_npz(path: str | Path) -> tuple[Tensor, Tensor, str]:
    """Return images uint8 (N, C, H, W), labels int64 (N,), -1 if the file has none, and a short hash of the file.

    Nothing is unpickled. Raises `InputError` for other shapes and types, and for files that hold statistics only.
    """
    expected = "expected arr_0: uint8 (N, H, W, C) with C 1 or 3"
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            _check_sizes(file.zip)
            if "arr_0" not in file.files:
                raise InputError(f"{path} holds {', '.join(file.files) or 'nothing'}; {expected}")
            images, labels = file["arr_0"], file["arr_1"] if "arr_1" in file.files else None
        digest = hash_file(str(path))[1][:16]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except _READ_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}; {expected}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise InputError(f"{path}: arr_0 is {images.dtype} of shape {images.shape}; {expected}")
    if labels is None:
        labels = np.full(len(images), -1)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
        raise InputError(
            f"{path}: arr_1 is {labels.dtype} of shape {labels.shape}; expected a whole number for each of the "
            f"{len(images):,} images"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)), digest


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Raise `ValueError`, before memory is allocated, for arrays whose declared size cannot be trusted.

    These are arrays whose header does not match their size in the archive, and arrays that would expand too much.
    """
    for entry in archive.infolist():
        if entry.filename not in ("arr_0.npy", "arr_1.npy"):
            continue
        if entry.file_size > max(MOST_EXPANDED, 100 * entry.compress_size):
            raise ValueError(f"{entry.filename}: {entry.compress_size:,} bytes would become {entry.file_size:,}")
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            if not dtype.hasobject and stream.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
                raise ValueError(f"{entry.filename}: its header says {shape}, but it has {entry.file_size:,} bytes")
