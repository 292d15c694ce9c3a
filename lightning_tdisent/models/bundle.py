"""Pack a composite folder into one .zip file, byte for byte, and unpack it."""

import atexit
import functools
import re
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import expand, whole

NAMES = re.compile(r"composite\.json|rows_[\d-]+\.safetensors")


def pack(folder: Path, out: Path) -> None:
    """Write the files of a composite folder to one .zip file, uncompressed since weights do not compress."""
    with whole(out) as stream, zipfile.ZipFile(stream, "w") as bundle:
        for file in sorted(folder.iterdir()):
            with file.open("rb") as source, bundle.open(zipfile.ZipInfo(file.name), "w", force_zip64=True) as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


def unpacked(source: str | Path) -> Path:
    """Return a folder with the content of a .zip written by `pack`; any other path is returned as it is.

    The folder is temporary and is removed when the process ends. ``~``, variables and ``file://`` are expanded
    (`files.expand`). The completeness of the composite is not checked here but by its manifest.

    Raises InputError for a .zip that contains anything but a composite, and for the URL of a store.
    """
    text = expand(str(source))
    if "://" in text:
        raise InputError(f"{text}: weights are read from local files; copy them here, and name the file or folder")
    source = Path(text)
    if source.suffix != ".zip" or not source.is_file():
        return source
    return _unpack(source.resolve(), source.stat().st_mtime_ns)


@functools.cache
def _unpack(path: Path, stamp: int) -> Path:
    place = tempfile.TemporaryDirectory(prefix="composite-")
    atexit.register(place.cleanup)
    try:
        with zipfile.ZipFile(path) as bundle:
            if odd := [name for name in bundle.namelist() if not NAMES.fullmatch(name)]:
                raise InputError(f"{path}: not a composite in one file: {odd[0]!r} does not belong to one")
            if "composite.json" not in bundle.namelist() or len(set(bundle.namelist())) < len(bundle.namelist()):
                raise InputError(f"{path}: not a composite in one file: its members are {bundle.namelist()}")
            for entry in bundle.infolist():  # `pack` neither compresses nor encrypts
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise InputError(f"{path}: not a composite in one file: {entry.filename} is not stored plainly")
            size = sum(entry.file_size for entry in bundle.infolist())
            if size > path.stat().st_size:  # members that overlap, or declare wrong sizes
                raise InputError(f"{path}: not a composite in one file: it has fewer than the {size:,} bytes it lists")
            for name in bundle.namelist():
                with bundle.open(name) as source, (Path(place.name) / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    except InputError:
        raise
    except (
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(f"{path}: not a composite in one file ({error})") from None
    return Path(place.name)
