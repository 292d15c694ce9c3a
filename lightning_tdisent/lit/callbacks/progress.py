"""Show progress on one line, in steps of the whole run."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_tdisent.lit.callbacks.losses import LossPerState

Report = Callable[[int, int, dict[str, float]], None]


class StepProgress(ProgressBar):
    """Show steps done, images per second and time left, or pass them to ``report`` if it is given.

    The clock is read every 10 steps, and no tensor is read.

    report: called with the step, the number of steps, and a dict of numbers: images seen (``images``), images per
        second (``rate``), the last logged training loss (``loss``) and the last held-out error (``x0_mse``).
    """

    def __init__(self, report: Report | None = None) -> None:
        super().__init__()
        self.report, self._bar = report, None
        self._numbers: dict[str, float] = {}

    def disable(self) -> None:
        """Show nothing; Lightning calls this on ranks other than 0."""
        self.report = lambda step, steps, numbers: None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print what is trained, and open the progress line."""
        if self.report is None:
            weights = sum(p.numel() for p in pl_module.parameters())
            states = pl_module.denoiser.states
            print(
                f"{type(pl_module).__name__}: {weights:,} weights, rows {pl_module.rows[0]}..{pl_module.rows[-1]} of "
                f"{states.S} (T={states.schedule.T}, table {states.fingerprint}), run folder {trainer.default_root_dir}"
            )
            text = TextColumn("{task.description}")
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._task = self._bar.add_task("training", total=trainer.max_steps if trainer.max_steps > 0 else None)
            self._bar.start()
        self._first = (time.perf_counter(), pl_module.images_seen)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:  # noqa: D102
        step = trainer.global_step
        if step % 10 and step != trainer.max_steps:
            return
        start, seen = self._first
        rate = (pl_module.images_seen - seen) / max(1e-9, time.perf_counter() - start)
        if self.report is not None:
            for callback in trainer.callbacks:
                if isinstance(callback, LossPerState) and "train/loss" in (values := callback.last[1]):
                    self._numbers["loss"] = values["train/loss"]
            self._numbers |= {"images": pl_module.images_seen, "rate": rate}
            self.report(step, trainer.max_steps, self._numbers)
        elif self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"training, {rate:,.0f} images/s")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: D102
        if self._bar is not None:
            self._bar.update(self._task, description="validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: D102
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            for name, value in sorted(trainer.callback_metrics.items()):
                print(f"{name}  {float(value):.6g}")
        if self.report is not None and "val/x0_mse" in trainer.callback_metrics:
            self._numbers["x0_mse"] = float(trainer.callback_metrics["val/x0_mse"])
        numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "quality/"))}
        if self._bar is not None and numbers:
            self._bar.print(f"step {trainer.global_step}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

    on_test_end = on_validation_end

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:  # noqa: D102
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:  # noqa: D102
        self.on_train_end(trainer, pl_module)
