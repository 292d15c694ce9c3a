"""Log the training loss per state; it is summed on the device and read only at log points."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_tdisent.errors import check_number
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.lit.preflight import Logs
from lightning_tdisent.sampling.sampler import probe_rows


class LossPerState(Logs):
    """Log ``train/loss``, the mean loss per state, and the norm of the gradient.

    ``train/lr`` is the learning rate of the next step, ``train/epoch`` the number of passes over the training data, and
    ``train/images_per_second`` the speed since the last log point, without validations and pictures.

    Between two log points nothing is copied from the device, and ``self.log``, which takes half a millisecond per
    step, is not used. These curves contain only the finite losses of rank 0; validation is exact over all ranks. The
    x-axis is images seen. A resumed run continues the sums of its checkpoint. On a single rank callbacks can monitor
    these values: ``EarlyStopping("train/loss", ..)``.

    bins: largest number of curves; more states are grouped into this many bins.
    """

    def __init__(self, bins: int = 8) -> None:
        check_number("losses.bins", bins, 1, whole=True)
        self.bins = bins
        self.last: tuple[int, dict[str, float]] = (0, {})
        self.sums = torch.zeros(2, 0)
        self._restored: dict[str, Any] | None = None
        self._since, self._paused = (0.0, 0), 0.0
        self.lacking = False  # whether the module returns no losses per sample

    def _named(self, module: Diffusion) -> list[str]:
        return [f"train_loss/t{int(module.states.index[s]):04d}" for s in probe_rows(module.rows, self.bins)]

    def logged_by(self, trainer: L.Trainer, module: Diffusion) -> list[str]:
        """Return the names of the metrics that callbacks can monitor."""
        return ["train/loss", "train/gradient_norm", *self._named(module)] if trainer.world_size == 1 else []

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Name the bins, reset or restore the sums, and define one TensorBoard chart with the curves of all states."""
        ends = torch.tensor(probe_rows(pl_module.rows, self.bins))
        # row -> index of its bin
        self.bin_of = torch.searchsorted(ends, torch.arange(int(ends[-1]) + 1)).to(pl_module.device)
        self.names = self._named(pl_module)
        self.logged = trainer.global_step
        self._since = time.perf_counter(), pl_module.images_seen
        self.sums = torch.zeros(2, len(ends), device=pl_module.device)
        if self._restored is not None and self._restored["sums"].shape == self.sums.shape:  # ``bins`` may have changed
            self.sums, self.last = self._restored["sums"].to(pl_module.device), self._restored["last"]
            self._restored = None
            if self.last[0] == pl_module.images_seen:  # the point at the checkpoint was purged with all later ones
                self._log(trainer, *self.last)
        if isinstance(trainer.logger, TensorBoardLogger) and len(self.names) > 1:
            charts = {kind: ["Multiline", [f"{kind}/t.*"]] for kind in ("train_loss", "val_eps_mse", "val_x0_mse")}
            trainer.logger.experiment.add_custom_scalars({"by state": charts})

    def on_validation_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:  # noqa: D102
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Leave the time of the validation out of the speed."""
        self._since = self._since[0] + time.perf_counter() - self._paused, self._since[1]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Diffusion, outputs: dict[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        """Add the losses to the sums; at a log point read, log and reset them.

        Print a note at the first step if a ``training_step`` of the user returns no losses per sample.
        """
        if not outputs.keys() >= {"losses", "row"}:
            if trainer.is_global_zero and not self.lacking:
                self.lacking = True
                print(
                    f"note: {type(pl_module).__name__}.training_step returns no 'losses' and 'row' per sample: "
                    "neither train/loss nor losses per state are logged",
                    file=sys.stderr,
                )
            return
        finite = outputs["losses"].isfinite()
        bins = self.bin_of[outputs["row"]]
        self.sums[0].index_add_(0, bins, outputs["losses"].where(finite, 0))
        self.sums[1].index_add_(0, bins, finite.float())
        step = trainer.global_step
        every = trainer.log_every_n_steps or math.inf  # 0: nothing is logged
        if step == self.logged or step % every or not trainer.is_global_zero:
            return
        self.logged = step  # once per step, also with accumulated gradients
        total, count = self.sums.tolist()
        self.sums.zero_()
        values = {name: t / n for name, t, n in zip(self.names, total, count, strict=True) if n}
        if any(count):
            values["train/loss"] = sum(total) / sum(count)
        if not pl_module.skipped:
            values["train/gradient_norm"] = float(pl_module.gradient_norm)
        values |= {f"train/lr{i or ''}": float(lr) for i, lr in enumerate(_learning_rates(trainer))}
        values["train/epoch"] = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        now, (then, seen) = time.perf_counter(), self._since
        self._since = now, pl_module.images_seen
        speed = {"train/images_per_second": (pl_module.images_seen - seen) / max(1e-9, now - then)}
        self._log(trainer, pl_module.images_seen, values, speed)

    def _log(
        self, trainer: L.Trainer, images_seen: int, values: dict[str, float], speed: dict[str, float] | None = None
    ) -> None:
        """Log values; the speed is not kept in `last`, which checkpoints hold, since it differs from run to run."""
        self.last = (images_seen, values)
        if trainer.world_size == 1:  # a monitored value must be equal on all ranks
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values | (speed or {}), images_seen)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log point, and the values logged there."""
        return {"sums": self.sums.cpu(), "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the stored sums until training starts."""
        self._restored = state_dict


def _learning_rates(trainer: L.Trainer) -> list[float]:
    return [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
