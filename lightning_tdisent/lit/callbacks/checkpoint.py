"""Decide when to save a checkpoint: at intervals, at the end, and when a signal ends the process."""

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from lightning_tdisent.distributed import shared_errors
from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.files import ask_guards, check_writable, temporary
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.checkpoints import refuse_other_run, remove_orphans
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.lit.preflight import trying
from lightning_tdisent.models.checkpoint import manifest_of
from lightning_tdisent.runs import CHECKPOINTS, RunFolder, checkpoint_name, checkpoints_in, held, new_identity

FILES = 4  # files per checkpoint: the checkpoint, its manifest, and the temporary files of both
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 143, signal.SIGINT: 130}
SAVE, TERMINATE, INTERRUPT = 1, 2, 3


class Preempted(SystemExit):
    """A training ended after a signal; the exit code is that of a process ended by SIGTERM (143) or Ctrl-C (130)."""


class _Terminal:
    """Output stream to a terminal that discards its output once the terminal is closed.

    The terminal may close before SIGHUP is handled.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, unless the terminal is closed."""
        self._do(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, unless the terminal is closed."""
        self._do(self.stream.flush)

    def _do(self, what: Callable[[], Any]) -> None:
        try:
            what()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _silence(self.stream.fileno())


def _silence(descriptor: int) -> None:
    """Redirect a file descriptor to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class Checkpoint(LightningCheckpoint):
    """Save ``checkpoints/step-N.ckpt`` in the run folder: at intervals, at the end, and after a signal.

    SIGTERM, SIGUSR1, SIGHUP (the terminal is closed) or Ctrl-C on any rank let the current step finish (on a single
    rank a validation is stopped at once), save on all ranks at the same step, and exit with 143 (130 for Ctrl-C). A
    second Ctrl-C stops immediately. Use this callback with the `DurableIO` plugin, which verifies a new checkpoint
    before an old one is removed. A training that no longer holds its folder (`runs.RunFolder`) raises Lost instead of
    saving.

    Raises InputError before training if the folder is not writable, has no room for ``keep`` + 1 checkpoints, or
    holds checkpoints of a run that this one does not continue, since they would be removed.

    every: steps between two checkpoints, null to save by time only.
    minutes: longest time between two checkpoints, in minutes.
    keep: number of checkpoints to keep.
    """

    def __init__(self, every: int | None = None, minutes: float = 5.0, keep: int = 2) -> None:
        if every is not None:
            check_number("checkpoint.every", every, 1, whole=True)
        check_number("checkpoint.keep", keep, 1, whole=True)
        check_number("checkpoint.minutes", minutes)
        self.every, self.minutes, self.keep = every, minutes, keep
        self.saved: int | None = None
        self._stop, self._request = 0, torch.zeros((), dtype=torch.int64)
        self._group: Any = None
        self._epoch_counted: bool | None = None
        self._held: RunFolder | None = None  # the run folder if this callback holds it, not the command line

    def _preflight(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Raise InputError unless ``keep`` + 1 checkpoints can be written to the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_orphans(self.folder)
            check_writable(self.folder)
        except OSError as error:
            raise InputError(f"run: {self.folder} cannot be written: {error.strerror}. Choose another --run") from None
        found = checkpoints_in(self.folder)
        if self._held is None:  # the command line has checked the run; checkpoints without a manifest do not count
            found = [path for path in found if manifest_of(path).exists()]
        refuse_other_run(trainer, found)
        self._found_at_start = {path.name: _file_identity(path) for path in checkpoints_in(self.folder)}
        averages = [len(c.kinds) + bool(c.start) for c in trainer.callbacks if isinstance(c, EMA)]
        copies = 3 + sum(averages)  # the weights and AdamW's two moments
        size = copies * sum(p.numel() * p.element_size() for p in pl_module.denoiser.parameters())
        there = sum(path.stat().st_size for path in checkpoints_in(self.folder)[-self.keep :])
        need, free = (self.keep + 1) * size - there, shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"run: {self.folder} has {free / 1e6:,.0f} MB free, but {self.keep + 1} checkpoints of "
                f"{size / 1e6:,.0f} MB need {need / 1e6:,.0f} MB more. Make room, choose another --run, or lower "
                "checkpoint.keep"
            )
        if (files := os.statvfs(self.folder)).f_files and files.f_favail < FILES * (self.keep + 1):
            raise InputError(
                f"run: {self.folder}: its file system has room for {files.f_favail} more files (df -i), "
                f"{self.keep + 1} checkpoints need {FILES * (self.keep + 1)}. Remove some, or choose another --run"
            )
        try:
            _reserve(self.folder, [size] * max(0, -(-need // max(size, 1))))
        except OSError as error:
            raise InputError(
                f"run: {self.folder} does not take {self.keep + 1} checkpoints of {size / 1e6:,.0f} MB: "
                f"{error.strerror}. Make room, ask for a larger quota, choose another --run, or lower checkpoint.keep"
            ) from None

    def _hold_folder(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Hold the run folder unless the command line does, and give folder and module the same run identity."""
        root = Path(trainer.default_root_dir)
        place = held(root)
        if place is None:
            place = self._held = RunFolder(root).__enter__()
        if not place.run:
            resumed = trainer.ckpt_path and Path(trainer.ckpt_path).resolve().is_relative_to(root.resolve())
            place.name((pl_module.run if resumed or trainer.global_step else "") or new_identity())
        pl_module.run = place.run

    def _release_folder(self) -> None:
        if self._held is not None:
            self._held.__exit__()
            self._held = None

    def setup(self, trainer: L.Trainer, pl_module: Diffusion, stage: str) -> None:
        """Refuse a second `Checkpoint`, and handle signals from here on, since much is done before the first step."""
        if (n := sum(isinstance(callback, Checkpoint) for callback in trainer.callbacks)) > 1:
            raise InputError(
                f"trainer.callbacks: {n} Checkpoint callbacks, which would remove each other's files. Keep one, and "
                "configure it with checkpoint.every, minutes and keep"
            )
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._before: dict[int, Any] = {number: signal.getsignal(number) for number in heeded()}
            self._install_handlers(trainer)

    def _install_handlers(self, trainer: L.Trainer) -> None:
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        for name in ("stdout", "stderr"):
            if (stream := getattr(sys, name)) is not None and not isinstance(stream, _Terminal) and stream.isatty():
                setattr(sys, name, _Terminal(stream))
        for number in self._before:
            signal.signal(number, lambda n, frame: self._on_signal(trainer, n, frame))

    def teardown(self, trainer: L.Trainer, pl_module: Diffusion, stage: str) -> None:
        """Restore the previous signal handlers and output streams, and release the run folder."""
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            for name in ("stdout", "stderr"):
                if isinstance(stream := getattr(sys, name), _Terminal):
                    setattr(sys, name, stream.stream)
        if stage == "fit":
            self._release_folder()

    def on_fit_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Hold the run folder, check that it has room for checkpoints, and write one as a trial."""
        self.folder = Path(trainer.default_root_dir) / CHECKPOINTS
        if trainer.fast_dev_run:
            return
        with shared_errors():
            if trainer.is_global_zero:
                self._hold_folder(trainer, pl_module)
                self._preflight(trainer, pl_module)
            with trying("a checkpoint"):
                self._try_checkpoint(trainer)

    def _try_checkpoint(self, trainer: L.Trainer) -> None:
        """Write a checkpoint to a temporary folder next to the others, read it back and remove it."""
        content = trainer._checkpoint_connector.dump_checkpoint(False)
        if not trainer.is_global_zero:
            return
        folder = temporary(self.folder / "preflight")
        try:
            trainer.strategy.checkpoint_io.save_checkpoint(content, folder / checkpoint_name(0))
            trainer.strategy.checkpoint_io.load_checkpoint(folder / checkpoint_name(0))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Handle signals, and let the ranks agree through a CPU process group, which does not wait for the device."""
        self._clock, self._seen = time.monotonic(), trainer.global_step
        self.saved = trainer.global_step if trainer.ckpt_path else None
        self._first_name, self._written = checkpoint_name(trainer.global_step), list[str]()
        if threading.current_thread() is threading.main_thread():
            self._install_handlers(trainer)  # again: Lightning has installed its own handlers since `setup`
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            places: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(places, (str(trainer.ckpt_path), trainer.global_step), group=self._group)
            if len(set(places)) > 1:
                raise InputError(f"run: the ranks would resume from different checkpoints, by rank: {places}")
            # Lightning reads a flag of rank 0 from the device at every batch; the vote below replaces this
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _on_signal(self, trainer: L.Trainer, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._stop == INTERRUPT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # writing to a closed terminal would raise
            for terminal in self._terminals:
                _silence(terminal)
        if trainer.state.status != "running" and not self._stop:  # training has ended by an exception
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        first = not self._stop
        self.tell(number)
        if first and trainer.validating and trainer.world_size == 1:
            self._exit(trainer)

    def tell(self, number: int) -> None:
        """Save and exit as after signal ``number``; for fits outside the main thread, which receive no signals."""
        self._stop = INTERRUPT if number == signal.SIGINT else TERMINATE

    def _exit(self, trainer: L.Trainer) -> None:
        # Lightning kills the first rank of a node as soon as another rank exits with a code other than 0
        raise Preempted(0 if trainer.local_rank else 130 if self._stop == INTERRUPT else 143)

    def _local_request(self) -> int:
        return self._stop or (SAVE if time.monotonic() - self._clock > 60 * self.minutes else 0)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Check that the run folder is still held, and start the vote of all ranks on whether to save or stop.

        The vote, an all-reduce on the CPU, runs while the step computes.
        """
        if trainer.is_global_zero:
            ask_guards(self.folder / "step", quick=True)
        if self._group is not None:
            self._request.fill_(self._local_request())
            self._vote = dist.all_reduce(self._request, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """After an optimizer step, save if it is due, and exit if a signal was received."""
        wish = self._local_request()
        if self._group is not None:
            self._vote.wait()
            wish = int(self._request)
        step = trainer.global_step
        if step == self._seen:  # gradients are being accumulated
            return
        self._seen = step
        last = step == trainer.max_steps  # saved at the end of training, after its validation; after a signal, now
        if wish >= TERMINATE or ((wish or (self.every and step % self.every == 0)) and not last):
            self.save(trainer)
        if wish >= TERMINATE:
            self._stop = wish
            self._exit(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Stop a validation on a single rank if a signal was received."""
        if self._stop and trainer.validating and trainer.world_size == 1:
            self._exit(trainer)

    on_validation_batch_end = on_validation_start

    def save(self, trainer: L.Trainer, ended: bool = False) -> None:
        """Write a checkpoint of this step, then remove those beyond ``keep`` and those that a rollback has undone.

        ended: whether the loop has already counted the epoch of this step as processed.
        """
        self._clock = time.monotonic()
        if trainer.global_step == self.saved or trainer.fast_dev_run:
            return
        name = checkpoint_name(trainer.global_step)
        ask_guards(self.folder / name)
        for logger in trainer.loggers:  # flush first, so that no logged point before this checkpoint can be lost
            logger.save()
        self._epoch_counted = ended
        try:
            trainer.save_checkpoint(self.folder / name)
        finally:
            self._epoch_counted = None
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            self._found_at_start.pop(name, None)
            self._written.append(name)
            # later than the first step of this training: bad, or undone by a rollback. Those that had no manifest at
            # the start are kept
            found = self._found_at_start.items()
            undone = [self.folder / n for n, mark in found if n > self._first_name and mark and mark[2]]
            there = [p for p in checkpoints_in(self.folder) if p.name <= name and p not in undone]
            known = [p for p in undone + there[: -self.keep] if p.name in self._written or self._is_unchanged(p)]
            for path in known:
                trainer.strategy.checkpoint_io.remove_checkpoint(path)

    def _is_unchanged(self, path: Path) -> bool:
        """Return whether a checkpoint is the same file as at the start; files written by others are not removed."""
        found = self._found_at_start.get(path.name)
        return found is not None and found == _file_identity(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Stop the clock, then save the last step, so that checkpoint and export name the same seconds."""
        pl_module.stop_clock()
        self.save(trainer, ended=True)

    def on_exception(self, trainer: L.Trainer, pl_module: Diffusion, exception: BaseException) -> None:
        """Save after a signal during a validation; the live weights are restored by now."""
        if isinstance(exception, Preempted):
            if trainer.world_size == 1:
                self.save(trainer)
            if trainer.is_global_zero:
                with contextlib.suppress(OSError):  # stderr may be closed
                    print(
                        f"\nstopped by a signal after step {trainer.global_step}; the same command resumes the run",
                        file=sys.stderr,
                    )
        elif trainer.world_size > 1 and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # otherwise the ranks it started would wait for this one
        self._release_folder()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Diffusion, checkpoint: dict[str, Any]) -> None:
        """Set the loop counters to those right after the optimizer step, wherever in the loop the checkpoint is made.

        On resume Lightning then repeats everything that follows this step, such as a whole validation that is due.
        """
        if self._epoch_counted is None:  # this callback is not the one that saves
            return
        loops = checkpoint["loops"]["fit_loop"]
        for count in map(loops["epoch_loop.batch_progress"].get, ("total", "current")):
            count["completed"] = count["ready"] - 1
        for count in map(loops["epoch_progress"].get, ("total", "current")):
            done = count["processed"] - self._epoch_counted
            count.update(ready=done + 1, started=done + 1, processed=done, completed=done)
        checkpoint["epoch"] = loops["epoch_progress"]["current"]["completed"]
        validation = loops["epoch_loop.val_loop.batch_progress"]
        validation["total"].update(ready=1, started=1, processed=0, completed=0)
        validation["current"].update(ready=0, started=0, processed=0, completed=0)
        validation["is_last_batch"] = False


def heeded() -> list[int]:
    """Return the signals that end a training with a checkpoint; without SIGHUP if it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STATUS if number != signal.SIGHUP or not ignored]


def _file_identity(path: Path) -> tuple[int, int, int] | None:
    """Return (inode, mtime in ns, mtime of the manifest in ns) of a checkpoint, None if it does not exist.

    The last value is 0 if there is no manifest. Another file of the same name has another mark.
    """
    try:
        file, manifest = path.stat(), manifest_of(path)
        return file.st_ino, file.st_mtime_ns, manifest.stat().st_mtime_ns if manifest.exists() else 0
    except OSError:
        return None


def _reserve(folder: Path, sizes: Sequence[int]) -> None:
    """Allocate temporary files of these sizes and release them: no other call tells whether a quota is sufficient.

    Raises OSError if the file system refuses. Does nothing where it cannot allocate without writing.
    """
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return
    with contextlib.ExitStack() as files:
        for size in sizes:
            file = files.enter_context(tempfile.TemporaryFile(dir=folder))
            if fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)):
                number = ctypes.get_errno()
                if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(number, os.strerror(number))
                return
