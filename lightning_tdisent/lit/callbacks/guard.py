"""Report steps skipped because loss or gradient is not finite, and end the run if there are many in a row."""

import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_tdisent.errors import Halted, check_number
from lightning_tdisent.lit.modules import Diffusion


class Guard(L.Callback):
    """Report skipped steps with the responsible samples, and stop after ``patience`` of them in a row.

    The module skips the updates of optimizer and averages itself, on the device. On a GPU the report is one step late,
    so that it does not synchronise the device. Samples that the data module skipped (data.on_bad_shard) are counted
    in ``train/skipped_samples`` for the first rank; every rank names its skipped samples on stderr.

    patience: number of consecutive skipped steps that end the run.
    """

    def __init__(self, patience: int = 10) -> None:
        check_number("guard.patience", patience, 1, whole=True)
        self.patience, self.skipped, self.streak, self.lost = patience, 0, 0, 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._pending: tuple[int, list[tuple[Tensor, Tensor, Tensor]]] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Prepare host memory (pinned for a GPU) that receives the module's flag of a skipped step."""
        self._seen, on_gpu = trainer.global_step, pl_module.device.type == "cuda"
        self._host, self._event = torch.zeros(1, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None
        self._flag = self._host.numpy()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Diffusion, outputs: dict[str, Tensor], batch: Any, *_: Any
    ) -> None:
        """Report the last step whose flag has reached the host, and start to copy the flag of this step."""
        if outputs.keys() >= {"losses", "row"}:  # a user's training_step may return less
            named = outputs if "id" in outputs else batch if isinstance(batch, Mapping) and "id" in batch else {}
            ids = named.get("id", torch.full_like(outputs["row"], -1))
            self._parts.append((outputs["losses"], ids, outputs["row"]))
        if trainer.global_step == self._seen:
            return  # gradients are being accumulated
        self._seen = trainer.global_step
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self._count_samples(trainer, pl_module)
        self._report(trainer, pl_module)
        self._host.copy_(pl_module.skipped, non_blocking=True)
        self._pending, self._parts = (trainer.global_step, self._parts), []
        if self._event is None:
            self._report(trainer, pl_module)
        else:
            self._event.record()

    def on_train_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Report the last step."""
        self._count_samples(trainer, pl_module)
        self._report(trainer, pl_module)

    def _count_samples(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        lost = pl_module.shards.lost if pl_module.shards else 0
        if lost != self.lost:
            self.lost = lost
            for logger in trainer.loggers:
                logger.log_metrics({"train/skipped_samples": float(lost)}, pl_module.images_seen)

    def _report(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        if self._pending is None:
            return
        (step, parts), self._pending = self._pending, None
        if self._event is not None:
            self._event.synchronize()
        if not self._flag[0]:
            self.streak = 0
            return
        self.skipped, self.streak = self.skipped + 1, self.streak + 1
        losses, ids, rows = (torch.cat(part).tolist() for part in zip(*parts, strict=True)) if parts else ([], [], [])
        named = [(i, s) for loss, i, s in zip(losses, ids, rows, strict=True) if not abs(loss) < float("inf")]
        what = "loss" if named else "gradient" if parts else "loss or gradient"
        samples = ", ".join(f"{i} (state {s})" for i, s in named or zip(ids, rows, strict=True))
        what = f"step {step}, rank {trainer.global_rank}: the {what} is not finite, the step was skipped"
        samples = f"Samples: {samples}" if parts else "the training_step does not return its losses and rows"
        sys.stderr.write(f"{what}. {samples}\n")  # one call, since other ranks also write to stderr
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": float(self.skipped)}, pl_module.images_seen)
        if self.streak >= self.patience:
            raise Halted(
                f"{what}, {self.streak} in a row (guard.patience). Look at the samples named above, or lower model.lr"
            )

    def state_dict(self) -> dict[str, int]:
        """Return the counts of skipped steps."""
        return {"skipped": self.skipped, "streak": self.streak}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the counts of skipped steps."""
        self.skipped, self.streak = state_dict["skipped"], state_dict["streak"]
