"""SHA-256 of files, of pieces of bytes, and of plain data; in hexadecimal digits."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file; raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: bytes | str) -> str:
    """Return the SHA-256 of bytes, and of texts in UTF-8, one after another."""
    return digest_of(part.encode(errors="surrogateescape") if isinstance(part, str) else part for part in parts)


def digest_of(pieces: Iterable[Any]) -> str:
    """Return the SHA-256 of pieces of bytes (anything with a buffer), one after another, none of which is kept."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def digest_of_data(data: Any) -> str:
    """Return the SHA-256 of plain data: of its JSON with sorted keys."""
    return digest(json.dumps(data, sort_keys=True))


def key64(content: bytes | memoryview) -> int:
    """Return 64 bits of BLAKE2b of some bytes, never 0. A CRC-32 sees little of PNGs, which hold their own."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1
