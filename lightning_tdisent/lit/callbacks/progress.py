"""Show the progress of a training in steps of the whole run, and write it to the log of the run folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar

from lightning_tdisent.files import open_own
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.progress import Progress
from lightning_tdisent.runs import LOG

Report = Callable[[int, int, dict[str, float]], None]


class StepProgress(ProgressBar):
    """Show steps done, loss, learning rate, images per second and time left.

    On a terminal this is a bar, elsewhere a line every 30 seconds. The lines are also appended to ``log.txt`` of the
    run folder. The clock is read every 10 steps, and no tensor is read.

    report: called with the step, the number of steps, and a dict of numbers: images seen (``images``), images per
        second (``rate``), the last logged training loss (``loss``) and the last held-out error (``x0_mse``).
    shown: False writes the log only.
    """

    def __init__(self, report: Report | None = None, shown: bool = True) -> None:
        super().__init__()
        self.report, self.shown, self._enabled = report, shown, True
        self._progress: Progress | None = None
        self._numbers: dict[str, float] = {}
        self._words = ""

    def disable(self) -> None:
        """Show, write and report nothing; Lightning calls this on ranks other than 0."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say what is trained, and open the progress line; raises InputError if the log is a link."""
        self._first = time.perf_counter(), pl_module.images_seen
        if not self._enabled:
            return
        log = None if trainer.fast_dev_run else Path(trainer.default_root_dir) / LOG
        if log is not None:
            open_own(log).close()
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        self._progress = Progress("step", steps, trainer.global_step, log=log, shown=self.shown)
        self._progress.start()
        weights, states = sum(p.numel() for p in pl_module.parameters()), pl_module.denoiser.states
        self._progress.say(
            f"{type(pl_module).__name__}: {weights:,} weights, rows {pl_module.rows[0]}..{pl_module.rows[-1]} of "
            f"{states.S} (T={states.schedule.T}, table {states.fingerprint}), run folder {trainer.default_root_dir}"
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:  # noqa: D102
        step = trainer.global_step
        if (step % 10 and step != trainer.max_steps) or not self._enabled:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, LossPerState) and "train/loss" in (values := callback.last[1]):
                self._numbers["loss"] = values["train/loss"]
        start, seen = self._first
        rate = (pl_module.images_seen - seen) / max(1e-9, time.perf_counter() - start)
        self._numbers |= {"images": pl_module.images_seen, "rate": rate}
        if self.report is not None:
            self.report(step, trainer.max_steps, self._numbers)
        if self._progress is not None:
            words = [f"loss {self._numbers['loss']:.4g}"] if "loss" in self._numbers else []
            words += [f"lr {group['lr']:.3g}" for o in trainer.optimizers[:1] for group in o.param_groups[:1]]
            self._words = "  ".join([*words, f"{rate:,.0f} images/s"])
            self._progress.update(step, extra=self._words)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: D102
        if self._progress is not None:
            self._progress.update(self._progress.done, extra="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: D102
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            for name, value in sorted(trainer.callback_metrics.items()):
                print(f"{name}  {float(value):.6g}")
        if "val/x0_mse" in trainer.callback_metrics:
            self._numbers["x0_mse"] = float(trainer.callback_metrics["val/x0_mse"])
        numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "quality/"))}
        if self._progress is not None:
            self._progress.update(self._progress.done, extra=self._words)
        if self._progress is not None and numbers:
            listed = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            self._progress.say(f"step {trainer.global_step:,}: {listed}")

    on_test_end = on_validation_end

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: D102
        if self._progress is not None:
            self._progress.append(self._progress.line)
            self._progress.close()
            self._progress = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the progress line, and append the reason to the log."""
        if self._progress is not None:
            self._progress.append(f"stopped: {type(exception).__name__}: {exception}")
        self.on_train_end(trainer, pl_module)
