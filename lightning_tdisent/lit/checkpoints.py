"""Write checkpoints atomically, verify them, and find the newest good one.

Lightning and torch create and read the content. This module adds durability: a checkpoint is written to a temporary
file next to its target, flushed to the disk, read back and renamed. It counts only once its manifest is written.
"""

import datetime
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_tdisent.digests import digest_of
from lightning_tdisent.errors import Halted, InputError, Lost
from lightning_tdisent.files import ask_guards, sync_folder, temporary, write_whole
from lightning_tdisent.files import remove_orphans as remove_orphans
from lightning_tdisent.models.checkpoint import (
    SCHEMA,
    TEMPORARY,
    Manifest,
    check_of,
    load,
    local,
    manifest_of,
    non_finite,
    verify,
)
from lightning_tdisent.runs import CHECKPOINTS, NEWEST, checkpoints_in

PIECE = 2**26  # bytes written, and read back, at a time; one read returns at most 2 GB
FACTS = ("images_seen", "fingerprint", "rows", "module", "data", "version")  # card fields repeated in the manifest


class DurableIO(TorchCheckpointIO):
    """Checkpoint plugin for Lightning whose files are either complete or absent.

    Saving writes a temporary file next to the target, calls fsync, reads the file back, renames it and calls fsync on
    the folder. The manifest (sha256, bytes, schema, step, images seen, table fingerprint, rows) and the folder's
    ``newest.json`` follow in the same way. Values that are not finite are not saved.

    Raises Halted if the checkpoint could not be written, and InputError for a checkpoint that is remote, damaged, not
    finite, or contains more than data.

    newest: path of the checkpoint that was chosen as the newest of its folder. If a training that is still running
        removes this file before it is read, the checkpoint that is then the newest is read instead.
    """

    newest: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint and its manifest; a failure leaves checkpoints at other paths untouched."""
        if storage_options is not None:
            raise TypeError("storage_options: checkpoints are local files")
        path, step = local(path), checkpoint.get("global_step", 0)
        if bad := non_finite(checkpoint):
            raise Halted(
                f"{path}: not saved at step {step}: {', '.join(bad[:3])} ({len(bad)} in all) hold values that are not "
                "finite. The previous checkpoint is untouched."
            )
        try:
            ask_guards(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, path)
        except Lost:
            raise
        except (OSError, RuntimeError, Halted) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch's writer hides the OSError
            if not isinstance(cause, OSError):
                raise
            raise Halted(
                f"{path}: the checkpoint of step {step} cannot be written: {cause.strerror or cause}. Training stops, "
                "since later work could be lost. Fix the cause, and run the same command to resume from the previous "
                "checkpoint."
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Verify a checkpoint and return its content; it is always read with ``weights_only=True``."""
        while True:
            try:
                content = load(path, map_location)
                break
            except InputError:
                if Path(path) != self.newest or Path(path).exists() or (found := newest(self.newest.parent)[0]) is None:
                    raise
                print(f"weights: {found}, since {path} was removed in the meantime")
                path = self.newest = found
        if Path(path).name == TEMPORARY:
            return content
        if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
            raise InputError(f"{path}: not a checkpoint of a training")
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the manifest, then the checkpoint."""
        path = local(path)
        ask_guards(path)
        manifest_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _refuse_to_load(cls: type, checkpoint_path: str | Path, *_: Any, **__: Any) -> Any:
    load(checkpoint_path)
    raise InputError(f"{checkpoint_path}: checkpoints do not contain a {cls.__name__}")


# replaces Lightning's ``load_from_checkpoint``, which would fetch remote files and call code that the file names
refuse_to_load: Any = classmethod(_refuse_to_load)


def newest(folder: Path) -> tuple[Path | None, Manifest, list[str]]:
    """Return the newest good checkpoint of a folder, its manifest, and for each newer one the reason it is not good.

    If no checkpoint is good, return None and an empty manifest. A training that is still running may remove a
    checkpoint that has just been listed; the folder is then listed again.
    """
    while True:
        bad, gone = list[str](), False
        for path in reversed(checkpoints_in(folder)):
            try:
                return path, verify(path), bad
            except InputError as error:
                gone |= not path.exists()
                bad.append(str(error))
        if not gone:
            return None, {}, bad


def resolve(path: str) -> Path:
    """Return the checkpoint that ``--ckpt_path`` names.

    path: a checkpoint, or a run folder, whose newest good checkpoint is returned; bad ones passed over are printed.
    """
    found = local(path)
    if path and found.is_dir():
        place = found if checkpoints_in(found) else found / CHECKPOINTS
        good, _, bad = newest(place)
        if good is None:
            raise InputError("\n".join([f"--ckpt_path {path}: holds no good checkpoint", *bad]))
        print("".join(f"passed over: {why}\n" for why in bad), end="")
        return good
    if not path or not found.is_file():
        raise InputError(f"--ckpt_path {path}: no such file. Give a checkpoint, or a run folder for its newest one")
    return found


def refuse_other_run(trainer: L.Trainer, files: Sequence[Path]) -> None:
    """Raise InputError if a new run would remove files of an earlier run from the trainer's folder.

    A trainer continues the run of its folder if it resumes from a checkpoint inside that folder (``ckpt_path``), or if
    it has already trained (``fit`` called again).
    """
    folder, resumed = Path(trainer.default_root_dir), trainer.ckpt_path
    if not files or trainer.global_step > 0:
        return
    if resumed is None or not Path(resumed).resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{folder}: holds {files[-1].relative_to(folder)} ({len(files)} such files) of an earlier training, which "
            f"this one would remove: it starts from {resumed or 'step 0'}. Resume that run (ckpt_path: a "
            "checkpoint of this folder), choose another folder (--run, or default_root_dir in Python), or remove "
            "the files"
        )


class _VerifiedFile:
    """Writable file that a second thread reads back and hashes while it is being written.

    Each piece read back is compared with the piece written by a checksum (a sum of its words). Computing SHA-256 on
    both sides would cost more than the rest of a save.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._pieces = path.open("x+b", buffering=0), SimpleQueue[tuple[int, int]]()

    def __enter__(self) -> Self:
        self._reader = ThreadPoolExecutor(1)
        self._hash = self._reader.submit(self._read_back)
        return self

    def __exit__(self, *_: Any) -> None:
        self._pieces.put((0, 0))
        self._reader.shutdown()
        self._file.close()

    def write(self, data: Any) -> int:
        data = memoryview(data)
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            left = size = len(piece)
            while left:
                left -= self._file.write(piece[size - left :])
            self._pieces.put((size, _checksum(piece)))
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> str:
        """Flush to the disk and return the SHA-256; raise OSError if the bytes read back differ from those written."""
        self._pieces.put((0, 0))
        os.fsync(self._file.fileno())
        return self._hash.result()

    def _read_back(self) -> str:
        return digest_of(self._pieces_back())

    def _pieces_back(self) -> Iterator[bytes]:
        at = 0
        while (piece := self._pieces.get())[0]:
            size, total = piece
            back = os.pread(self._file.fileno(), size, at)
            if len(back) != size or _checksum(back) != total:
                raise OSError(None, f"bytes {at} to {at + size} read back differ from those written")
            yield back
            at += size


def _checksum(data: Any) -> int:
    words = len(data) // 8
    return int(np.frombuffer(data, np.uint64, words).sum()) + sum(bytes(data[words * 8 :]))


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    unfinished = temporary(path)
    card = checkpoint.get("card", {})
    try:
        with _VerifiedFile(unfinished) as file:
            torch.save(checkpoint, file)  # type: ignore[arg-type]  # torch only calls write and flush
            digest = file.finish()
        manifest = {
            "schema": SCHEMA,
            "sha256": digest,
            "bytes": unfinished.stat().st_size,
            "step": checkpoint.get("global_step", 0),
            "epoch": checkpoint.get("epoch", 0),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **{k: card[k] for k in ("run", *FACTS) if k in card},
        }
        ask_guards(path)
        manifest_of(path).unlink(missing_ok=True)  # so that no old manifest lies next to a new checkpoint
        unfinished.replace(path)
        sync_folder(path.parent)
        try:
            _write_json(manifest_of(path), {**manifest, "check": check_of(manifest)})
        except Halted:  # a checkpoint without a manifest does not count
            path.unlink(missing_ok=True)
            raise
    finally:
        unfinished.unlink(missing_ok=True)
    _write_json(path.parent / NEWEST, {"schema": 1, "file": path.name, "step": manifest["step"], "sha256": digest})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_whole(path, json.dumps(data, indent=1).encode())
