"""Going on with a run: the same command, from the newest good checkpoint of its folder, or a refusal that says why."""

import contextlib
import os
import socket
from pathlib import Path
from typing import Any, TextIO

import yaml

from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.checkpoints import Manifest, newest

# what a run is: a change here makes another run. The rest (limits, logging, devices, paths) may change on the way;
# the data's digest, the table and the images in a step are compared with those of the checkpoint when it is loaded
FIXED = ("model", "data", "ema", "seed_everything", "trainer.precision", "trainer.accumulate_grad_batches",
         "trainer.limit_train_batches", "trainer.overfit_batches")  # fmt: skip
FREE = (
    "model.init_args.sampler",
    *(f"data.init_args.{name}" for name in ("path", "workers", "val", "val_limit", "batch_size")),
)


def going_on(folder: Path, config: dict[str, Any]) -> tuple[Path | None, Manifest]:
    """Newest good checkpoint of a run folder, None if none was written yet; names the bad ones it passes over.

    Raises InputError if the run in the folder has another config, or if all its checkpoints are bad.
    """
    try:
        theirs = _flat(yaml.safe_load((folder / "config.yaml").read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / 'config.yaml'}: cannot be read: {' '.join(str(error).split())}") from None
    mine = _flat(config)
    differ = [k for k in sorted(mine.keys() | theirs.keys()) if _fixed(k) and mine.get(k) != theirs.get(k)]
    if differ:
        lines = "\n".join(f"  - {k}: {theirs.get(k)} there, {mine.get(k)} now" for k in differ)
        raise InputError(
            f"run: {folder} holds a run of another config:\n{lines}\nChoose another folder with --run (and start it "
            f"from this one's weights with --ckpt_path {folder}/checkpoints/step-N.ckpt), or give the config of old"
        )
    path, manifest, bad = newest(folder / "checkpoints")
    if bad and path is None:
        raise InputError(
            f"run: {folder} cannot go on, no checkpoint is good:\n"
            + "\n".join(f"  - {why}" for why in bad)
            + f"\nRemove {folder / 'checkpoints'} to begin anew, or choose another folder with --run"
        )
    for why in bad:
        print(f"passed over: {why}")
    return path, manifest


def lock(folder: Path) -> TextIO | None:
    """Hold a run folder as long as the file returned is open; refuses one that another process holds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise InputError(f"run: {folder} cannot be written: {error.strerror}. Choose another --run") from None
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"run: {folder} is in use by {holder}. Wait for it, or choose another --run") from None
    except (ImportError, OSError):  # not every system, nor every file system, has locks
        return file
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def _fixed(key: str) -> bool:
    return _under(key, FIXED) and not _under(key, FREE)


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {name: data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
