"""SHA-256 digests of files, bytes and plain data, in hexadecimal, and a 64-bit hash of bytes."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file. Raises OSError if it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: bytes | str) -> str:
    """Return the SHA-256 of the concatenated parts: bytes as they are, text encoded in UTF-8."""
    return digest_of(part.encode(errors="surrogateescape") if isinstance(part, str) else part for part in parts)


def digest_of(pieces: Iterable[Any]) -> str:
    """Return the SHA-256 of the concatenated pieces (objects with a buffer of bytes), without keeping any in memory."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def digest_of_data(data: Any) -> str:
    """Return the SHA-256 of plain data, taken of its JSON with sorted keys."""
    return digest(json.dumps(data, sort_keys=True))


def key64(content: bytes | memoryview) -> int:
    """Return 64 bits of BLAKE2b of some bytes, never 0.

    A CRC-32 distinguishes PNG files poorly, since they contain CRC-32 checksums of their own chunks.
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1
