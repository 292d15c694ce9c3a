"""Write the held-out error of every row over images seen to a file, for a fleet's budget and status board."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from lightning_tdisent.files import write_whole
from lightning_tdisent.images import unit_range
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.runs import CURVE
from lightning_tdisent.sampling.denoiser import Denoiser


class Curve(L.Callback):
    """Write ``curve.json`` into the run folder: [images seen, error of x0_hat at each row owned], from 0 images on.

    A point is added before the first step, at each validation, and at the end of a training that started warm. If the
    model owns more than 8 rows, only some are measured; each other row has the error of the next measured row. The
    file also contains ``variances``, those of the held-out data along its principal components. A resumed run
    continues the curve of its checkpoint.
    """

    def __init__(self) -> None:
        self.points: list[tuple[int, list[float]]] = []
        self.variances: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Start a new curve with a point at 0 images, unless the run is resumed."""
        if not trainer.global_step and not trainer.fast_dev_run and isinstance(pl_module.denoiser, Denoiser):
            self.points, self.variances = [], []
            pl_module.start_errors()
            self._add(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Add a point to the curve."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run:
            self._add(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Add a last point to a training that started warm; its weights are compared with those of the start there."""
        for callback in trainer.callbacks:
            if isinstance(callback, EMA) and callback.start_error is not None and not trainer.fast_dev_run:
                callback.measure(trainer, pl_module)
                self._add(trainer, pl_module)

    def _add(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        errors = pl_module.row_errors()
        if pl_module.measured[0] != pl_module.images_seen or not errors:  # the training of a prior has no errors
            return
        if self.points and self.points[-1][0] == pl_module.images_seen:
            self.points.pop()
        self.points.append((pl_module.images_seen, errors))
        if not self.variances:
            self.variances = _variances(pl_module.needed_shards("Curve").held_out.images)
        if trainer.is_global_zero:
            content = {"schema": 1, "points": self.points, "variances": self.variances}
            write_whole(Path(trainer.default_root_dir) / CURVE, json.dumps(content).encode())

    def state_dict(self) -> dict[str, Any]:
        """Return the points of the curve."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the points of the curve."""
        self.points = [(int(n), list(errors)) for n, errors in state_dict["points"]]


def _variances(images: torch.Tensor, most: int = 1000) -> list[float]:
    """Return the variances of images (or of the means of latents) along their principal components.

    They are sorted from the largest down and rounded to 6 digits. At most the first ``most`` images are used.
    """
    images = images[:most]
    x = unit_range(images[:, 0] if images.is_floating_point() else images).flatten(1)
    gram = (x - x.mean(0)) @ (x - x.mean(0)).T if len(x) < x.shape[1] else torch.cov(x.T, correction=0) * len(x)
    found = torch.linalg.eigvalsh(gram.double()).clamp_min(0).flip(0) / len(x)
    return [float(f"{v:.6g}") for v in found.tolist() if v > 1e-9 * float(found[0])]
