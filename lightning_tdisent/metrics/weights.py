"""Locate, check and download the weights of feature networks that are not shipped.

Nothing is downloaded unless `fetch` is called, and no file is read as tensors before its SHA-256 has been checked:
numbers computed with other weights would be another metric under the same name.
"""

import io
import os
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tdisent.digests import digest, digest_of
from lightning_tdisent.errors import Halted, InputError, Unavailable, nearest
from lightning_tdisent.files import expand, whole

_COMMAND = "python -m lightning_tdisent fetch"
_CHUNK = 1 << 20
_PATIENCE = 30.0  # seconds without a byte

Progress = Callable[[int, int | None], None]


class Known(NamedTuple):
    """A file of weights: where it is published, what it must be, and its name in the cache."""

    url: str
    sha256: str
    file: str
    megabytes: int


# Apache-2.0, converted by torch-fidelity from TensorFlow's inception-2015-12-05 graph, the network of the FID paper
# (1706.08500); pytorch-fid publishes the same file. Its name contains the first eight digits of the digest; several
# unrelated public repositories pin the same 64 digits, under either publisher's name.
KNOWN = {
    "inception": Known(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "weights-inception-2015-12-05-6726825d.pth",
        96,
    )
}


def cache_folder() -> Path:
    """Return the cache folder: $TDISENT_CACHE, else ~/.cache/lightning_tdisent; it need not exist.

    Raises InputError if $TDISENT_CACHE is a URL, or if it is not set and the user has no home folder.
    """
    if named := os.environ.get("TDISENT_CACHE"):
        named = expand(named, "TDISENT_CACHE")
        if "://" in named:
            raise InputError(f"TDISENT_CACHE: {named}: must be a folder on this machine, not a URL")
        return Path(named)
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise InputError("there is no home folder for the cache. Set TDISENT_CACHE to a folder")
    return Path(home) / ".cache" / "lightning_tdisent"


def locate(name: str, path: str | Path | None = None, sha256: str | None = None) -> Path:
    """Return the file of the weights called ``name``, ``path`` or else the one in the cache, with its SHA-256 checked.

    sha256: the digest that the file must have, the known one if None. Raises `Unavailable` if the file does not exist,
    `InputError` if it has another digest.
    """
    known, file = _known(name), _where(name, path)
    _refuse_another(f"{name}: {file}", digest_of(_chunks(name, str(file))), sha256 or known.sha256)
    return file


def load(name: str, path: str | Path | None = None, sha256: str | None = None) -> dict[str, Tensor]:
    """Return the tensors in the file that `locate` finds, on the CPU; the bytes that were checked are those read.

    Raises `Unavailable` if the file does not exist, `InputError` if it has another digest or holds more than tensors.
    """
    known, file = _known(name), _where(name, path)
    content = b"".join(_chunks(name, str(file)))
    _refuse_another(f"{name}: {file}", digest(content), sha256 or known.sha256)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of the readers of two formats
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: {file} cannot be read as tensors alone: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{name}: {file} holds a {type(state).__name__}, not tensors by name")
    return state


def fetch(
    name: str, source: str | Path | None = None, expected: str | None = None, progress: Progress | None = None
) -> Path:
    """Copy weights into the cache, from their publisher or from ``source``, and return the file.

    source: a file, or an http(s) URL of a mirror; expected: SHA-256, the known one if None; progress: called with the
    number of bytes so far and the total, None if unknown. The file gets its name when it is complete on disk and its
    digest has been checked; an existing file with the digest is kept. Raises `InputError` if the source cannot be read
    or has another digest, `Halted` if the cache cannot be written.
    """
    known = _known(name)
    wanted = expected or known.sha256
    target = cache_folder() / known.file
    if target.is_file():
        try:
            return locate(name, sha256=wanted)
        except InputError:
            pass  # replaced below
    source = str(source or known.url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as stream:

            def written() -> Iterator[bytes]:
                for chunk in _chunks(name, source, progress):
                    stream.write(chunk)
                    yield chunk

            _refuse_another(f"{name}: {source}", digest_of(written()), wanted)
    except OSError as error:
        raise Halted(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def _known(name: str) -> Known:
    if name not in KNOWN:
        raise InputError(f"there are no weights called {name!r}.{nearest(name, KNOWN)} Choose from {', '.join(KNOWN)}")
    return KNOWN[name]


def _where(name: str, path: str | Path | None) -> Path:
    known = KNOWN[name]
    file = Path(expand(str(path))) if path else cache_folder() / known.file
    if not file.is_file():
        if path:
            raise Unavailable(
                f"{name}: no weights at {file}. Give another file, or none to use the one of {_COMMAND} {name}"
            )
        raise Unavailable(
            f"{name}: no weights at {file}. Get them ({known.megabytes} MB) with: {_COMMAND} {name}; or give a file "
            "that you have by --weights FILE (weights: of a study or of SampleQuality)"
        )
    return file


def _refuse_another(what: str, found: str, wanted: str) -> None:
    if found != wanted.lower():
        raise InputError(f"{what} has SHA-256 {found}, expected {wanted}: it is another file, or damaged")


def _chunks(name: str, source: str, progress: Progress | None = None) -> Iterator[bytes]:
    """Yield all bytes of a file or URL; raises `InputError`, never an OSError, if they cannot be read."""
    online = source.startswith(("http://", "https://"))
    if not online and "://" in source:
        raise InputError(f"{name}: {source}: weights are fetched only from http(s) URLs and files")
    try:
        if online:
            stream = urllib.request.urlopen(source, timeout=_PATIENCE)  # noqa: S310  the scheme is checked above
            length = stream.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
        else:
            path = Path(expand(source))
            stream, total = path.open("rb"), path.stat().st_size
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(_unreadable(name, source, error)) from None
    done = 0
    with stream:
        while True:
            try:
                chunk = stream.read(_CHUNK)
            except (OSError, HTTPException) as error:
                raise InputError(_unreadable(name, source, error)) from None
            if not chunk:
                return
            done += len(chunk)
            if progress is not None:
                progress(done, total)
            yield chunk


def _unreadable(name: str, source: str, error: Exception) -> str:
    cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    said = f"{name}: {source} cannot be read: {cause}"
    if source.startswith("http"):
        said += f". Without a network, copy the file to this machine, then: {_COMMAND} {name} --source FILE"
    return said
