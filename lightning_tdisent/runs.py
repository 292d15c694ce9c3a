"""The run folder that a training writes to: its file names, its lock (one process at a time) and its run id."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, BinaryIO, Self

from lightning_tdisent.errors import Busy, InputError, Lost
from lightning_tdisent.files import ask_guards, check_name, guarded, output_path, refuse_link, refuse_shared
from lightning_tdisent.processes import began, host, me

try:
    import fcntl
except ImportError:  # not available on all systems
    fcntl = None  # type: ignore[assignment]

# file and folder names in a run folder
CONFIG, WEIGHTS, PRIOR, CURVE = "config.yaml", "model.safetensors", "prior.safetensors", "curve.json"
METRICS = "metrics.jsonl"  # all that a training logs
CHECKPOINTS, AVERAGES, PICTURES, LOG, LOCK = "checkpoints", "averages", "pictures", "log.txt", ".lock"
NEWEST = "newest.json"  # in the checkpoint folder: names the last checkpoint
_HELD: dict[str, "RunFolder"] = {}


class RunFolder:
    """Context manager that holds a run folder, so that no other process trains in it.

    The file ``.lock`` names the holder: process, host, run, and a random token. `check` compares that token with the
    lock file now at the path, and so detects a folder that was removed, moved or taken by another process; every write
    below the folder calls it (`files.guarded`). On a file system without locks (flock), a second process on this
    machine is refused if the holder's process still runs, and a second process on another machine makes the first one
    stop at its next save.

    run: id of the run in the folder, 16 hexadecimal digits; empty until it is known. tidy: on exit, remove the folder
    if it was created for a run that did not start (no config.yaml). Raises Busy if another process holds the folder,
    and InputError if it cannot be written.
    """

    def __init__(self, path: str | Path, tidy: bool = False) -> None:
        self.path, self.run, self._tidy = Path(os.path.abspath(output_path(path, "run"))), "", tidy
        self._token, self._lost, self._folder = secrets.token_hex(8), False, -1
        self._lock: BinaryIO | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        ask_guards(self.path / LOCK)
        self._tidy = self._tidy and not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            # keep it open, so that its inode number is not reused for another folder
            self._folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, self._folder)
        except OSError as error:
            raise InputError(f"run: {self.path} cannot be written: {error.strerror}. Choose another --run") from None
        _HELD[str(self.path)] = self
        self._stack.enter_context(guarded(self.path, self.check))
        if (free := shutil.disk_usage(self.path).free) < 1_000_000:
            self.__exit__()
            raise InputError(f"run: {self.path} has {free:,} bytes free. Free some space, or choose another --run")
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(Lost, OSError):
            self.check()
            if self._tidy and not (self.path / CONFIG).exists():  # refused before it started
                self._remove_files()
        self._stack.close()
        _HELD.pop(str(self.path), None)
        if self._lock is not None:
            self._lock.close()

    def check(self, quick: bool = False) -> None:
        """Raise Lost unless this process still holds the folder at the path.

        quick: skip reading the lock if the path still refers to the same folder.
        """
        if quick and self._is_same_folder():
            return
        try:
            holder = _read(self.path / LOCK)
        except OSError:  # disk or network failure: nobody has taken a folder that cannot be read
            if self._is_same_folder():
                return
            holder = None
        if holder is not None and holder.get("token") == self._token:
            return
        if holder is None and not self._lost and self._is_same_folder():  # only the lock file was removed
            self._acquire()
            return
        self._lost = True
        now = f"it is held by {_describe(holder)} now" if holder else "it was removed or moved during the training"
        raise Lost(
            f"run: {self.path}: this training{f' (run {self.run})' if self.run else ''} has lost its folder: {now}. "
            "It ends, and writes nothing there; its last checkpoint is in the folder that it had, wherever that is now"
        )

    def name(self, run: str) -> None:
        """Set the id of the run, here and in the lock file."""
        self.run = run
        if self._lock is not None and not self._lock.closed:  # it is closed in a forked process
            self._write(self._lock)

    def _is_same_folder(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._folder))
        except OSError:
            return False

    def _acquire(self) -> None:
        """Open the lock file without following links, and lock it. Raises Busy if another process holds it."""
        file, holder = self.path / LOCK, None
        while True:
            lock = _open(file, os.O_RDWR | os.O_CREAT)
            with contextlib.suppress(OSError):
                holder = _read(file)
            try:
                locked = _flock(lock)
                if not locked and holder and _is_running(holder):
                    raise BlockingIOError
            except BlockingIOError:
                lock.close()
                if holder and holder.get("token") == self._token:
                    return
                if holder and holder.get("pid") == os.getppid() and holder.get("host") == host():
                    self._token, self.run = holder["token"], holder["run"]  # a rank that the holder started
                    return
                raise Busy(
                    f"run: {self.path} is in use by {_describe(holder)}. Wait for it, or choose another --run"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(file), os.fstat(lock.fileno())):
                    break
            lock.close()  # the previous holder has just removed it: open the new file
        if not locked and holder and holder.get("host") != host():
            print(
                f"note: {self.path}: this file system has no locks; last held by {_describe(holder)}. If that "
                "process is still training, it ends at its next save",
                file=sys.stderr,
            )
        self._lock = lock
        os.register_at_fork(after_in_child=lock.close)  # workers of the data loader must not hold it too
        self._write(lock)

    def _write(self, lock: BinaryIO) -> None:
        content = json.dumps({**me(), "run": self.run, "token": self._token}).encode()
        os.pwrite(lock.fileno(), content, 0)
        os.ftruncate(lock.fileno(), len(content))

    def _remove_files(self) -> None:
        for litter in (self.path / LOCK, *self.path.glob("events.out.tfevents.*")):
            litter.unlink(missing_ok=True)
        for folder in (self.path / CHECKPOINTS, self.path):
            with contextlib.suppress(OSError):  # not empty: it holds other files
                folder.rmdir()


def checkpoint_name(step: int) -> str:
    """Return the file name of the checkpoint written after ``step`` steps."""
    return f"step-{step:09d}.ckpt"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder, in increasing order of steps."""
    found = [p for p in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+\.ckpt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def snapshot_name(step: int, length: float) -> str:
    """Return the file name of the snapshot, after ``step`` steps, of the weight average of relative ``length``."""
    return f"step-{step:09d}_{length:g}.safetensors"


def snapshots_in(run: Path) -> dict[Path, int]:
    """Return the snapshots of weight averages in a run folder, mapped to their steps, in increasing order of steps."""
    named = ((re.fullmatch(r"step-(\d+)_.+\.safetensors", p.name), p) for p in (run / AVERAGES).glob("step-*"))
    return dict(sorted(((p, int(name[1])) for name, p in named if name), key=lambda pair: (pair[1], pair[0].name)))


def identity_in(config: bytes | None) -> str:
    """Return the run id in the text of a ``config.yaml``, or an empty string. Nothing else in the text is parsed."""
    match = re.search(rb"(?m)^id: '?([0-9a-f]{16})'?\s*$", config or b"")
    return match[1].decode() if match else ""


def identity_of(folder: Path) -> str:
    """Return the run id of a run folder; empty without a config, and for runs of early versions, which have no id."""
    try:
        return identity_in((folder / CONFIG).read_bytes())
    except OSError:
        return ""


def new_identity() -> str:
    """Return a random run id: 16 hexadecimal digits, the first a letter, so that YAML does not parse it as a number."""
    return secrets.choice("abcdef") + secrets.token_hex(8)[1:]


def held(path: str | Path) -> RunFolder | None:
    """Return the run folder at a path if this process holds it, else None."""
    return _HELD.get(os.path.abspath(path))


def busy(path: str | Path) -> str:
    """Describe the process that holds a run folder; empty if there is none. Does not take the lock."""
    file = Path(path) / LOCK
    try:
        lock = _open(file, os.O_RDWR)
    except (OSError, InputError):
        return ""
    with lock:  # closing the file releases the lock
        holder = None
        with contextlib.suppress(OSError):
            holder = _read(file)
        with contextlib.suppress(BlockingIOError):
            return _describe(holder) if not _flock(lock) and holder and _is_running(holder) else ""
    return _describe(holder)


def _open(file: Path, flags: int) -> BinaryIO:
    """Open a lock file. Raises InputError if it is a link or has several hard links."""
    check_name(file)
    try:
        handle = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError:
        refuse_link(file)
        raise
    lock = os.fdopen(handle, "r+b" if flags & os.O_RDWR else "rb", buffering=0)
    if flags & os.O_RDWR:
        refuse_shared(lock, file)
    return lock


def _flock(lock: BinaryIO) -> bool:
    """Lock a file. Returns False if the file system has no locks; raises BlockingIOError if it is locked already."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """Return the content of a lock file, None if there is no such file.

    Older versions wrote a line of text, which is returned under the key ``said``. Raises OSError for a file that exists
    but cannot be read.
    """
    try:
        with _open(file, os.O_RDONLY) as stream:
            text = stream.read(10_000).decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError, InputError):
        return None
    try:
        content = json.loads(text)
    except ValueError:
        content = {"said": text}
    return content if isinstance(content, dict) and content != {"said": ""} else {}


def _is_running(holder: dict[str, Any]) -> bool:
    """Return whether the holder is a process of this machine that is still running."""
    pid = holder.get("pid")
    return holder.get("host") == host() and isinstance(pid, int) and began(pid) == holder.get("began")


def _describe(holder: dict[str, Any] | None) -> str:
    if not holder or "pid" not in holder:
        return (holder or {}).get("said") or "another process"
    name = str(holder.get("host", "")).partition("/")[0] or socket.gethostname()
    return f"process {holder['pid']} on {name}" + (f" (run {holder['run']})" if holder.get("run") else "")
