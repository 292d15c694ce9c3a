"""When a checkpoint is made: every so often, before the end, and at once when the process is told to go."""

import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint

from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.checkpoints import refuse_other_run, remove_orphans, steps
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.lit.preflight import trying
from lightning_tdisent.ranks import shared_errors

STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
SAVE, TERMINATE, INTERRUPT = 1, 2, 3


class Preempted(SystemExit):
    """Training was told to go, and went: its code is that of a process ended by SIGTERM (143), or Ctrl-C (130)."""


class Checkpoint(LightningCheckpoint):
    """Save ``checkpoints/step-N.ckpt`` of the run folder, and let no signal lose work.

    every: steps between two checkpoints, null for none by count; minutes: longest time between two; keep: how many
    stay. One is also made at the end. SIGTERM, SIGUSR1 and Ctrl-C on any rank end the step in hand (on a single rank
    also a validation), save on all ranks at the same step, and exit with 143 (130 for Ctrl-C, which given twice stops
    at once). Use it with the `DurableIO` plugin, which verifies a new checkpoint before an old one goes.
    Raises InputError before training if the folder cannot be written, has no room for keep + 1 of them, or holds
    checkpoints of a run that this one does not continue: they would be removed.
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

    def _preflight(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Make sure that checkpoints can be written, before anything is spent."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_orphans(self.folder)
            (self.folder / ".writable").write_bytes(b"")
            (self.folder / ".writable").unlink()
        except OSError as error:
            raise InputError(f"run: {self.folder} cannot be written: {error.strerror}. Choose another --run") from None
        refuse_other_run(trainer, steps(self.folder))
        averages = [len(c.kinds) + bool(c.start) for c in trainer.callbacks if isinstance(c, EMA)]
        copies = 3 + sum(averages)  # the weights and AdamW's two
        size = copies * sum(p.numel() * p.element_size() for p in pl_module.denoiser.parameters())
        there = sum(path.stat().st_size for path in steps(self.folder)[-self.keep :])
        need, free = (self.keep + 1) * size - there, shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"run: {self.folder} has {free / 1e6:,.0f} MB free, but {self.keep + 1} checkpoints of "
                f"{size / 1e6:,.0f} MB need {need / 1e6:,.0f} MB more. Make room, choose another --run, or lower "
                "checkpoint.keep"
            )

    def setup(self, trainer: L.Trainer, pl_module: Diffusion, stage: str) -> None:
        """Listen to signals from here on: there is much to do before the first step."""
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._before: dict[int, Any] = {number: signal.getsignal(number) for number in STATUS}
            self._listen(trainer)

    def _listen(self, trainer: L.Trainer) -> None:
        for number in STATUS:
            signal.signal(number, lambda n, frame: self._on_signal(trainer, n, frame))

    def teardown(self, trainer: L.Trainer, pl_module: Diffusion, stage: str) -> None:
        """Stop listening."""
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Look at the folder before the run claims it."""
        self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if trainer.fast_dev_run:
            return
        with shared_errors():
            if trainer.is_global_zero:
                self._preflight(trainer, pl_module)
            with trying("a checkpoint"):
                self._rehearse(trainer)

    def _rehearse(self, trainer: L.Trainer) -> None:
        """Write a checkpoint in a folder beside the others, read it back and remove it."""
        content = trainer._checkpoint_connector.dump_checkpoint(False)
        if not trainer.is_global_zero:
            return
        folder = self.folder / ".preflight"
        try:
            trainer.strategy.checkpoint_io.save_checkpoint(content, folder / _name(0))
            trainer.strategy.checkpoint_io.load_checkpoint(folder / _name(0))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Listen to signals, and let the ranks agree beside the device's queue instead of in it."""
        self._clock, self._seen = time.monotonic(), trainer.global_step
        self.saved = trainer.global_step if trainer.ckpt_path else None
        self._first, self._mine = _name(trainer.global_step), list[str]()
        if threading.current_thread() is threading.main_thread():
            self._listen(trainer)  # instead of Lightning, which has come between
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            places: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(places, (str(trainer.ckpt_path), trainer.global_step), group=self._group)
            if len(set(places)) > 1:
                raise InputError(f"run: the ranks would go on from different checkpoints, by rank: {places}")
            # Lightning asks the device at every batch whether rank 0 was told to go; the vote below replaces that
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _on_signal(self, trainer: L.Trainer, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._stop == INTERRUPT:
            raise KeyboardInterrupt
        if trainer.state.status != "running" and not self._stop:  # training has ended by an exception
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        first = not self._stop
        self.tell(number)
        if first and trainer.validating and trainer.world_size == 1:
            self._exit(trainer)

    def tell(self, number: int) -> None:
        """Tell a fit that has no signals, since it is not in the main thread, to save and go as if it had got this."""
        self._stop = INTERRUPT if number == signal.SIGINT else TERMINATE

    def _exit(self, trainer: L.Trainer) -> None:
        # Lightning kills the first rank of a node as soon as another one ends with a code that is not 0
        raise Preempted(0 if trainer.local_rank else 130 if self._stop == INTERRUPT else 143)

    def _wanted(self) -> int:
        return self._stop or (SAVE if time.monotonic() - self._clock > 60 * self.minutes else 0)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Ask all ranks, while the step computes, whether one of them wants a checkpoint."""
        if self._group is not None:
            self._request.fill_(self._wanted())
            self._vote = dist.all_reduce(self._request, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Save if it is time, and go if told to, once the optimizer has stepped."""
        wish = self._wanted()
        if self._group is not None:
            self._vote.wait()
            wish = int(self._request)
        step = trainer.global_step
        if step == self._seen:  # in the middle of accumulated gradients
            return
        self._seen = step
        last = step == trainer.max_steps  # saved after its validation, unless there is no time for that
        if wish >= TERMINATE or ((wish or (self.every and step % self.every == 0)) and not last):
            self.save(trainer)
        if wish >= TERMINATE:
            self._stop = wish
            self._exit(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Do not begin to validate, or go on with it, when told to go."""
        if self._stop and trainer.validating and trainer.world_size == 1:
            self._exit(trainer)

    on_validation_batch_end = on_validation_start

    def save(self, trainer: L.Trainer, ended: bool = False) -> None:
        """Write one checkpoint of this step, then remove those beyond ``keep``; ended: its epoch has been counted."""
        self._clock = time.monotonic()
        if trainer.global_step == self.saved or trainer.fast_dev_run:
            return
        for logger in trainer.loggers:  # the curves up to here must not be younger than the weights
            logger.save()
        name = _name(trainer.global_step)
        self._epoch_counted = ended
        try:
            trainer.save_checkpoint(self.folder / name)
        finally:
            self._epoch_counted = None
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            self._mine.append(name)
            there = steps(self.folder)
            left = [p for p in there if p.name > self._first and p.name not in self._mine]  # bad, or of a past undone
            for path in left + [p for p in there if p not in left][: -self.keep]:
                trainer.strategy.checkpoint_io.remove_checkpoint(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Save the end."""
        self.save(trainer, ended=True)

    def on_exception(self, trainer: L.Trainer, pl_module: Diffusion, exception: BaseException) -> None:
        """Save what a signal in a validation would have lost; the live weights are back by now."""
        if isinstance(exception, Preempted):
            if trainer.world_size == 1:
                self.save(trainer)
            if trainer.is_global_zero:
                print(f"\ntold to go after step {trainer.global_step}; the same command goes on", file=sys.stderr)
        elif trainer.world_size > 1 and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # ranks that this one started would wait for it

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Diffusion, checkpoint: dict[str, Any]) -> None:
        """Describe the checkpoint as made right after its optimizer step, wherever in the loop it was made.

        Lightning then does what comes after that step, such as a validation that is due, again and whole.
        """
        if self._epoch_counted is None:  # somebody else's
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


def _name(step: int) -> str:
    return f"step-{step:09d}.ckpt"
