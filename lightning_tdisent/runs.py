"""The run folder that a training writes to: held by one process at a time, with the identity of its run."""

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
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

# names in a run folder
CONFIG, WEIGHTS, PRIOR, CURVE = "config.yaml", "model.safetensors", "prior.safetensors", "curve.json"
CHECKPOINTS, AVERAGES, PICTURES, LOG, LOCK = "checkpoints", "averages", "pictures", "log.txt", ".lock"
NEWEST = "newest.json"  # in the folder of the checkpoints: which of them is the last one
_HELD: dict[str, "RunFolder"] = {}


class RunFolder:
    """A run folder that this process holds within a ``with``: nobody else trains in it meanwhile.

    The file ``.lock`` names the holder: process, host, run, and a token of its own. `check` compares that token with
    what lies at the path now, so that a folder that was removed, moved or taken by another process is noticed; every
    write below the folder asks it (`files.guarded`). Where the file system has no locks (flock), a second process on
    this machine is refused by the holder's process number, and one on another machine ends the first at its next save.

    run: identity of the run in the folder, 16 hexadecimal digits; empty until it is known. tidy: remove the folder
    again if it was made for a run that did not begin (no config.yaml). Raises Busy where another process holds the
    folder, and InputError for one that cannot be written.
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
            self._take()
            # held open, so that its number is not given to another folder
            self._folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, self._folder)
        except OSError as error:
            raise InputError(f"run: {self.path} cannot be written: {error.strerror}. Choose another --run") from None
        _HELD[str(self.path)] = self
        self._stack.enter_context(guarded(self.path, self.check))
        if (free := shutil.disk_usage(self.path).free) < 1_000_000:
            self.__exit__()
            raise InputError(f"run: {self.path} has {free:,} bytes free. Make room, or choose another --run")
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(Lost, OSError):
            self.check()
            if self._tidy and not (self.path / CONFIG).exists():  # refused before it began
                self._clear()
        self._stack.close()
        _HELD.pop(str(self.path), None)
        if self._lock is not None:
            self._lock.close()

    def check(self, quick: bool = False) -> None:
        """Raise Lost unless this process still holds what lies at the path; quick: or the same folder lies there."""
        if quick and self._same():
            return
        try:
            holder = _read(self.path / LOCK)
        except OSError:  # of the disk or the network: nobody has taken a folder that cannot be read
            if self._same():
                return
            holder = None
        if holder is not None and holder.get("token") == self._token:
            return
        if holder is None and not self._lost and self._same():  # somebody has removed the lock alone
            self._take()
            return
        self._lost = True
        now = f"it is held by {_said(holder)} now" if holder else "it was removed or moved while the training went on"
        raise Lost(
            f"run: {self.path}: this training{f' (run {self.run})' if self.run else ''} has lost its folder: {now}. "
            "It ends, and writes nothing there; its last checkpoint is where the folder has gone"
        )

    def name(self, run: str) -> None:
        """Set the identity of the run, here and in the lock."""
        self.run = run
        if self._lock is not None and not self._lock.closed:  # closed in a process that was forked
            self._write(self._lock)

    def _same(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._folder))
        except OSError:
            return False

    def _take(self) -> None:
        """Open the lock without following links, and lock it."""
        file, holder = self.path / LOCK, None
        while True:
            lock = _open(file, os.O_RDWR | os.O_CREAT)
            with contextlib.suppress(OSError):
                holder = _read(file)
            try:
                locked = _flock(lock)
                if not locked and holder and _runs(holder):
                    raise BlockingIOError
            except BlockingIOError:
                lock.close()
                if holder and holder.get("token") == self._token:
                    return
                if holder and holder.get("pid") == os.getppid() and holder.get("host") == host():
                    self._token, self.run = holder["token"], holder["run"]  # this is a rank that the holder has started
                    return
                raise Busy(
                    f"run: {self.path} is in use by {_said(holder)}. Wait for it, or choose another --run"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(file), os.fstat(lock.fileno())):
                    break
            lock.close()  # whoever held it has just removed it
        if not locked and holder and holder.get("host") != host():
            print(
                f"note: {self.path}: this file system has no locks; last held by {_said(holder)}. If that still "
                "trains, it ends at its next save",
                file=sys.stderr,
            )
        self._lock = lock
        os.register_at_fork(after_in_child=lock.close)  # a worker of the loader must not hold it, too
        self._write(lock)

    def _write(self, lock: BinaryIO) -> None:
        content = json.dumps({**me(), "run": self.run, "token": self._token}).encode()
        os.pwrite(lock.fileno(), content, 0)
        os.ftruncate(lock.fileno(), len(content))

    def _clear(self) -> None:
        for litter in (self.path / LOCK, self.path / "hparams.yaml", *self.path.glob("events.out.tfevents.*")):
            litter.unlink(missing_ok=True)
        for folder in (self.path / CHECKPOINTS, self.path):
            with contextlib.suppress(OSError):  # unless something else is in there
                folder.rmdir()


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after so many steps."""
    return f"step-{step:09d}.ckpt"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    found = [p for p in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+\.ckpt", p.name)]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def snapshot_name(step: int, length: float) -> str:
    """Return the name of the snapshot of an average of this relative length after so many steps."""
    return f"step-{step:09d}_{length:g}.safetensors"


def snapshots_in(run: Path) -> dict[Path, int]:
    """Return the snapshots of averages in a run folder, oldest first, with their steps."""
    named = ((re.fullmatch(r"step-(\d+)_.+\.safetensors", p.name), p) for p in (run / AVERAGES).glob("step-*"))
    return dict(sorted(((p, int(name[1])) for name, p in named if name), key=lambda pair: (pair[1], pair[0].name)))


def identity_in(config: bytes | None) -> str:
    """Return the id that the text of a run's ``config.yaml`` names, empty if none; nothing else of it is parsed."""
    match = re.search(rb"(?m)^id: '?([0-9a-f]{16})'?\s*$", config or b"")
    return match[1].decode() if match else ""


def identity_of(folder: Path) -> str:
    """Return the id of the run whose folder this is, empty for an early version's, and where there is no config."""
    try:
        return identity_in((folder / CONFIG).read_bytes())
    except OSError:
        return ""


def new_identity() -> str:
    """Return 16 hexadecimal digits, the first of them a letter: no reader of YAML takes them for a number."""
    return secrets.choice("abcdef") + secrets.token_hex(8)[1:]


def held(path: str | Path) -> RunFolder | None:
    """Return the run folder at a path if this process holds it."""
    return _HELD.get(os.path.abspath(path))


def busy(path: str | Path) -> str:
    """Return who holds a run folder, an empty text if nobody does or none is there; takes nothing."""
    file = Path(path) / LOCK
    try:
        lock = _open(file, os.O_RDWR)
    except (OSError, InputError):
        return ""
    with lock:  # closing it gives the lock back
        holder = None
        with contextlib.suppress(OSError):
            holder = _read(file)
        with contextlib.suppress(BlockingIOError):
            return _said(holder) if not _flock(lock) and holder and _runs(holder) else ""
    return _said(holder)


def _open(file: Path, flags: int) -> BinaryIO:
    """Open a lock, and no link in its place."""
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
    """Lock a file; False where the file system has no locks, BlockingIOError where another process has it."""
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
    """Return the content of a lock, None if there is none; a lock of older versions is a line of text.

    Raises OSError for one that is there and cannot be read.
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


def _runs(holder: dict[str, Any]) -> bool:
    """Return whether the holder is a process of this machine that still runs."""
    pid = holder.get("pid")
    return holder.get("host") == host() and isinstance(pid, int) and began(pid) == holder.get("began")


def _said(holder: dict[str, Any] | None) -> str:
    if not holder or "pid" not in holder:
        return (holder or {}).get("said") or "another process"
    name = str(holder.get("host", "")).partition("/")[0] or socket.gethostname()
    return f"process {holder['pid']} on {name}" + (f" (run {holder['run']})" if holder.get("run") else "")
