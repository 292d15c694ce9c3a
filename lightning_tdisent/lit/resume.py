"""Going on with a run: the same command, from the newest good checkpoint of its folder, or a refusal that says why."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import absolute_paths
from lightning_tdisent.lit.checkpoints import Manifest, newest

# what a run is: a change here makes another run. The rest (limits, logging, devices, paths) may change on the way;
# the data's digest, the table and the images in a step are compared with those of the checkpoint when it is loaded
FIXED = ("model", "data", "ema", "seed_everything", "trainer.precision", "trainer.accumulate_grad_batches",
         "trainer.limit_train_batches", "trainer.overfit_batches")  # fmt: skip
FREE = (
    "model.init_args.sampler",
    "model.init_args.warm_start",  # a path, and over when it has been taken; the card keeps what it was
    *(f"data.init_args.{name}" for name in ("path", "index", "workers", "val", "val_limit", "batch_size")),
    *(f"data.init_args.{name}" for name in ("verify", "on_bad_shard", "bad_ceiling")),
)


def check_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Config of the run in a folder; refuses a config that differs from it in what makes a run what it is."""
    try:
        old = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / 'config.yaml'}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(old, dict):
        raise InputError(f"{folder / 'config.yaml'}: holds no config. Put it back, or choose another --run")
    mine, theirs = _flat(absolute_paths(config)), _flat(absolute_paths(old))
    differ = [k for k in sorted(mine.keys() | theirs.keys()) if _fixed(k) and mine.get(k) != theirs.get(k)]
    if differ:
        lines = "\n".join(f"  - {k}: {theirs.get(k)} there, {mine.get(k)} now" for k in differ)
        raise InputError(
            f"run: {folder} holds a run of another config:\n{lines}\nGive the config of old, or choose another folder "
            f"with --run; --ckpt_path {folder} beside that begins there with this one's weights and optimizer"
        )
    return old


def find_checkpoint(folder: Path) -> tuple[Path | None, Manifest, list[str]]:
    """Newest good checkpoint of a run folder, None if none was written yet, and why newer ones were passed over.

    Raises InputError if all its checkpoints are bad.
    """
    path, manifest, bad = newest(folder / "checkpoints")
    if bad and path is None:
        raise InputError(
            f"run: {folder} cannot go on, no checkpoint is good:\n"
            + "\n".join(f"  - {why}" for why in bad)
            + f"\nRemove {folder / 'checkpoints'} to begin anew, or choose another folder with --run"
        )
    return path, manifest, bad


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from the run folder; refuses one that another process holds."""
    file, empty = folder / ".lock", not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+b", buffering=0)
    except OSError as error:
        raise InputError(f"run: {folder} cannot be written: {error.strerror}. Choose another --run") from None
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.register_at_fork(after_in_child=handle.close)  # a worker of the loader must not hold it, too
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().decode(errors="replace").strip() or "another process"
            raise InputError(f"run: {folder} is in use by {holder}. Wait for it, or choose another --run") from None
        except (ImportError, OSError):  # not every system, nor every file system, has locks
            pass
        try:
            if (free := shutil.disk_usage(folder).free) < 1_000_000:
                raise InputError(f"run: {folder} has {free:,} bytes free. Make room, or choose another --run")
            yield
        finally:
            if empty and not (folder / "config.yaml").exists():  # refused before it began
                for litter in (file, folder / "hparams.yaml", *folder.glob("events.out.tfevents.*")):
                    litter.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # unless something else is in there
                    (folder / "checkpoints").rmdir()
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _fixed(key: str) -> bool:
    return _under(key, FIXED) and not _under(key, FREE)


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {name: data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
