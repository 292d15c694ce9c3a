"""Files of tensors with a JSON card and their own SHA-256, in the safetensors format."""

import itertools
import json
import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from lightning_tdisent.digests import digest, digest_of
from lightning_tdisent.errors import InputError
from lightning_tdisent.schemas import is_count, parse_json

MOST = 100_000_000  # bytes of a header of safetensors
BLANK = "0" * 64  # stands in a file where its own SHA-256 goes, while that is computed


def sealed(tensors: dict[str, Tensor], key: str, card: dict[str, Any]) -> bytes:
    """Return a .safetensors file with a card in its metadata that begins with the SHA-256 of all; see `unsealed`."""
    content = save(tensors, {key: json.dumps({"sha256": BLANK, **card})})
    return content.replace(BLANK.encode(), digest(content).encode(), 1)


def unsealed(path: Path, key: str, verify: bool, remedy: str) -> Any:
    """Return the card of a .safetensors file without its SHA-256; with ``verify`` hash the rest too, and refuse damage.

    Files of the first versions have none. Raises InputError, OSError, struct.error, ValueError, KeyError or TypeError.
    """
    with path.open("rb") as file:
        size = file.read(8)
        (length,) = struct.unpack("<Q", size)
        if length > min(MOST, os.fstat(file.fileno()).st_size):
            raise ValueError("header too long")
        header = file.read(length)
        card = parse_json(parse_json(header)["__metadata__"][key])
        named = str(card.pop("sha256", "")) if isinstance(card, dict) else ""
        if verify and named:
            begin = size + header.replace(named.encode(), BLANK.encode(), 1)
            found = digest_of(itertools.chain([begin], iter(lambda: file.read(1 << 20), b"")))
            if found != named:
                raise InputError(
                    f"{path}: damaged: sha256 {found[:12]}.., the file says {named[:12]}... Copy it anew; or {remedy}"
                )
    return card


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Piece(NamedTuple):
    """Position of a tensor in its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def pieces(path: str | Path) -> list[Piece]:
    """The tensors of a .safetensors file in their order there, from its header alone; raises InputError."""
    try:
        with Path(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(min(length, MOST)))
            header.pop("__metadata__", None)
            found = [
                Piece(name, DTYPES[t["dtype"]], tuple(t["shape"]), 8 + length + begin, end - begin)
                for name, t in header.items()
                for begin, end in [t["data_offsets"]]
            ]
            size = file.seek(0, 2)
            if not all(is_count(n) for piece in found for n in (piece.begin, piece.nbytes, *piece.shape)):
                raise ValueError("sizes that are no numbers from 0 on")
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a .safetensors file of weights ({type(error).__name__}: {error})") from None
    found.sort(key=lambda piece: (piece.begin, piece.nbytes))
    end = 8 + length
    for piece in found:
        if piece.begin != end or piece.nbytes != math.prod(piece.shape) * piece.dtype.itemsize:
            raise InputError(f"{path}: {piece.name} does not lie in the file as its header says")
        end += piece.nbytes
    if end != size:
        raise InputError(f"{path}: its header says it ends at byte {end:,}, it has {size:,}")
    return found


def shapes_in(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a .safetensors file by name, from its header alone; raises InputError."""
    return {piece.name: piece.shape for piece in pieces(path)}
