"""Read a training checkpoint: verified against its manifest, as data without code.

This is the only reader of .ckpt files, for resuming, `load_from_checkpoint`, sampling and evaluation.
"""

import functools
import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_tdisent import finite
from lightning_tdisent.digests import digest_of_data, sha256
from lightning_tdisent.distributed import rank_and_world
from lightning_tdisent.errors import InputError, NotFinite
from lightning_tdisent.schemas import check_schema, is_count, is_text, parse_json

SCHEMA = 1
TEMPORARY = ".temp.ckpt"  # suffix of the file in which Lightning's forked ranks return their weights
Manifest = dict[str, Any]


def load(path: str | Path, map_location: Any = "cpu") -> Any:
    """Return the content of a local checkpoint; no code in it is run.

    Its bytes are verified against its manifest. A checkpoint without a manifest, such as one written by Lightning's own
    plugin, is read unverified, and a note is printed on stderr.

    Raises InputError for a missing, damaged or unsafe file, and `NotFinite` for NaN or infinity outside callback
    states.
    """
    path = local(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if manifest_of(path).exists():
        verify(path)
    elif path.name != TEMPORARY:
        _note_unverified(path)
    _refuse_lies(path)
    try:
        content = torch.load(path, map_location, weights_only=True)
    except Exception as error:  # torch.load does not document its exceptions
        asked = re.search(r"GLOBAL (\S+)", str(error))
        said = str(error).split("\n")[0] or type(error).__name__
        why = f"it contains code ({asked[1]}), not only data" if asked else said
        raise InputError(f"{path}: not loaded: {why}") from None
    for name, tensor in finite.tensors(content):
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: not loaded: {name} of shape {list(tensor.shape)} has more values than the file")
    if isinstance(content, dict) and (bad := non_finite(content)):
        raise NotFinite(f"{path}: not loaded: {', '.join(bad[:3])} ({len(bad)} in all) hold values that are not finite")
    return content


def _refuse_lies(path: Path) -> None:
    """Raise InputError for a file that is no torch archive, or whose members would take more memory than its size."""
    try:
        with zipfile.ZipFile(path) as archive:
            members, size = archive.infolist(), path.stat().st_size
    except (OSError, EOFError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not loaded: no checkpoint that torch has written ({error})") from None
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise InputError(f"{path}: not loaded: its members are compressed, or declare wrong sizes")


def non_finite(checkpoint: dict[str, Any]) -> list[str]:
    """Return the names of non-finite values, except in callback states, which may contain an infinite best value."""
    return finite.non_finite({k: v for k, v in checkpoint.items() if k != "callbacks"})


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint; raises InputError if it is missing or damaged."""
    try:
        manifest = parse_json(manifest_of(path).read_bytes())
        check = manifest.pop("check")
    except FileNotFoundError:
        raise InputError(f"{path}: has no manifest: it was cut short, or copied without it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its manifest cannot be read ({type(error).__name__}: {error})") from None
    check_schema(manifest, str(manifest_of(path)), SCHEMA)  # first: a newer schema may have another check
    if check != check_of(manifest):
        raise InputError(f"{path}: its manifest is damaged")
    kinds = {"sha256": is_text, "bytes": is_count, "step": is_count}
    if wrong := [key for key, fits in kinds.items() if not fits(manifest.get(key))]:
        raise InputError(f"{path}: its manifest is damaged: {wrong[0]}: {manifest.get(wrong[0])!r:.80}")
    return dict(manifest)


def verify(path: Path) -> Manifest:
    """Return the manifest of a checkpoint; raises InputError if size or SHA-256 of the file differ from it."""
    manifest = read_manifest(path)
    try:
        size = path.stat().st_size
        if size != manifest["bytes"]:
            raise InputError(f"{path}: damaged: {size} bytes, its manifest says {manifest['bytes']}")
        digest = sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if digest != manifest["sha256"]:
        raise InputError(f"{path}: damaged: sha256 {digest[:12]}.., its manifest says {manifest['sha256'][:12]}..")
    return manifest


def facts(path: Path) -> Manifest:
    """Return step and images seen of a checkpoint, from its manifest, or from its content if it has none."""
    if manifest_of(path).exists():
        return verify(path)
    content = load(path)
    if "card" not in content:
        raise InputError(f"{path}: not a checkpoint of this project: it has no card")
    return {"step": content["global_step"], "images_seen": content["card"]["images_seen"]}


@functools.cache  # print the note once for each file
def _note_unverified(path: Path) -> None:
    if rank_and_world()[0] == 0:
        print(f"note: {path} has no manifest ({manifest_of(path).name}): read unverified", file=sys.stderr)


def check_of(manifest: Manifest) -> str:
    """Return the hash that protects a manifest against damage."""
    return digest_of_data(manifest)[:16]


def manifest_of(path: Path) -> Path:
    """Return the path of a checkpoint's manifest."""
    return path.with_suffix(path.suffix + ".json")


def local(path: str | Path) -> Path:
    """Return a local path; raises InputError for a URL."""
    if "://" in str(path):
        raise InputError(
            f"{path}: checkpoints are local files. Download it, compare its sha256 with its manifest, name the file"
        )
    return Path(path)
