"""Where the weights of feature networks that are not shipped lie, and how they get there.

Nothing is downloaded unless `fetch` is called, and no file is read for its tensors before its SHA-256 is the one that
is known: a number made with other weights would be of another metric under the same name.
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
# (1706.08500); pytorch-fid publishes the same file. Its name holds the first eight digits of the digest; all 64 are
# those that several unrelated public repositories pin for it, under either publisher's name.
KNOWN = {
    "inception": Known(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "weights-inception-2015-12-05-6726825d.pth",
        96,
    )
}


def cache_folder() -> Path:
    """Return the folder of fetched weights: $TDISENT_CACHE, else ~/.cache/lightning_tdisent; it need not exist.

    Raises InputError without $TDISENT_CACHE for a user who has no home folder.
    """
    if named := os.environ.get("TDISENT_CACHE"):
        named = expand(named, "TDISENT_CACHE")
        if "://" in named:
            raise InputError(f"TDISENT_CACHE: {named}: name a folder of this machine, and not a URL")
        return Path(named)
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise InputError("there is no home folder for the cache. Set TDISENT_CACHE in the environment to a folder")
    return Path(home) / ".cache" / "lightning_tdisent"


def locate(name: str, path: str | Path | None = None, sha256: str | None = None) -> Path:
    """The file of the weights called ``name``: ``path``, else that in the cache, with its SHA-256 checked.

    sha256: the digest that it must have, of a file of one's own; the known one otherwise. Raises `InputError` if the
    file is not there or is another one.
    """
    known, file = _known(name), _where(name, path)
    _refuse_another(f"{name}: {file}", digest_of(_chunks(name, str(file))), sha256 or known.sha256)
    return file


def load(name: str, path: str | Path | None = None, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in the file that `locate` finds, on the CPU; what was checked is what is read.

    Raises `InputError` if the file is not there, is another one, or holds anything besides tensors.
    """
    known, file = _known(name), _where(name, path)
    content = b"".join(_chunks(name, str(file)))
    _refuse_another(f"{name}: {file}", digest(content), sha256 or known.sha256)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever its readers of two formats run into
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: {file} cannot be read as tensors alone: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{name}: {file} holds a {type(state).__name__}, not tensors by name")
    return state


def fetch(
    name: str, source: str | Path | None = None, expected: str | None = None, progress: Progress | None = None
) -> Path:
    """Bring weights into the cache, from where they are published or from ``source``, and return the file.

    source: a file, or an http(s) URL, of a mirror; expected: SHA-256, the known one if None; progress: called with
    the bytes so far and all of them, None if unknown. The file gets its name once all of it is on the disk and has
    the digest; one that is there and has it is left alone. Raises `InputError` if the source cannot be read or is
    another file, `Halted` if the cache cannot be written.
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
        raise InputError(f"no weights are known as {name!r}; there are {', '.join(KNOWN)}.{nearest(name, KNOWN)}")
    return KNOWN[name]


def _where(name: str, path: str | Path | None) -> Path:
    known = KNOWN[name]
    file = Path(expand(str(path))) if path else cache_folder() / known.file
    if not file.is_file():
        if path:
            raise Unavailable(
                f"{name}: no weights at {file}. Name another file, or none for the one of {_COMMAND} {name}"
            )
        raise Unavailable(
            f"{name}: no weights at {file}. Get them ({known.megabytes} MB) with: {_COMMAND} {name}; or name a file "
            "that you have with --weights FILE (weights of a study or of SampleQuality)"
        )
    return file


def _refuse_another(what: str, found: str, wanted: str) -> None:
    if found != wanted.lower():
        raise InputError(f"{what} has SHA-256 {found}, expected {wanted}: it is another file or a damaged one")


def _chunks(name: str, source: str, progress: Progress | None = None) -> Iterator[bytes]:
    """All bytes of a file or URL; whatever keeps them from being read is an `InputError`, never an OSError."""
    online = source.startswith(("http://", "https://"))
    if not online and "://" in source:
        raise InputError(f"{name}: {source}: weights are fetched from http(s) URLs and files only")
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
        said += f". Without a network, copy the file here by other means, then: {_COMMAND} {name} --source FILE"
    return said
