"""The held-out error of every row over images seen, as a file: what a fleet's budget and board are made of."""

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
    """Write ``curve.json`` into the run folder: [images seen, error of x0_hat of each row owned], from 0 images on.

    A point is added before the first step, at each validation, and at the end of a training that started warm. Of a
    model with more than 8 rows some are probed, and the others between them have the error of the next probed. Also in
    it: ``variances`` of the held-out data along its principal components. A resumed run goes on with the curve of its
    checkpoint.
    """

    def __init__(self) -> None:
        self.points: list[tuple[int, list[float]]] = []
        self.variances: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Begin a new curve."""
        if not trainer.global_step and not trainer.fast_dev_run and isinstance(pl_module.denoiser, Denoiser):
            self.points, self.variances = [], []
            pl_module.start_errors()
            self._add(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Add a point."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run:
            self._add(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Add the end of a training that started warm, where its weights are compared with those of the start."""
        for callback in trainer.callbacks:
            if isinstance(callback, EMA) and callback.start_error is not None and not trainer.fast_dev_run:
                callback.measure(trainer, pl_module)
                self._add(trainer, pl_module)

    def _add(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        errors = pl_module.row_errors()
        if pl_module.measured[0] != pl_module.images_seen or not errors:  # a prior's training has none
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
        """Return the curve."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.points = [(int(n), list(errors)) for n, errors in state_dict["points"]]


def _variances(images: torch.Tensor, most: int = 1000) -> list[float]:
    """Along the principal components of these images (or the means of latents), largest first, to 6 digits."""
    images = images[:most]
    x = unit_range(images[:, 0] if images.is_floating_point() else images).flatten(1)
    gram = (x - x.mean(0)) @ (x - x.mean(0)).T if len(x) < x.shape[1] else torch.cov(x.T, correction=0) * len(x)
    found = torch.linalg.eigvalsh(gram.double()).clamp_min(0).flip(0) / len(x)
    return [float(f"{v:.6g}") for v in found.tolist() if v > 1e-9 * float(found[0])]
