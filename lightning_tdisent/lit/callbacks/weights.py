"""The averaged weights: kept while training, seen by everything that validates, written at the end."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.sampling.expert import save_expert


class EMA(L.Callback):
    """Exponential moving average of the network's weights, diffusers' `EMAModel` with its count in Python.

    decay: after warm-up min(decay, (1 + n)/(10 + n)); its half-life should be a few percent of the run.
    Validation, metrics and pictures see the average; the live weights come back bitwise, also after an exception.
    (Lightning's own averaging asks the device for its count at every step and swaps back before the end of the
    validation epoch.)
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema.decay must lie in [0, 1), got {decay}")
        self.decay, self.average, self._live = decay, None, None
        self._restored: dict[str, Any] | None = None

    def _parameters(self, module: Diffusion) -> list[torch.nn.Parameter]:
        return list(module.denoiser.parameters())

    def on_fit_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Start from the weights as they are, or as they were saved."""
        self._walked = parameters = self._parameters(pl_module)
        self.average = EMAModel(parameters, decay=self.decay, foreach=True)
        if self._restored is not None:
            self.average.optimization_step = self._restored["step"]
            self.average.shadow_params = [w.clone() for w in self._restored["weights"].values()]
            self._restored = None
        self.average.to(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Move the average once per optimizer step."""
        if trainer.global_step > self.average.optimization_step:
            self.average.step(self._walked)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Show the average."""
        if self.average is not None and trainer.state.fn == "fit":
            parameters = self._parameters(pl_module)
            self._live = [p.detach().clone() for p in parameters]
            self.average.copy_to(parameters)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Bring the live weights back."""
        if self._live is not None:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters(pl_module), self._live)
            self._live = None

    def on_exception(self, trainer: L.Trainer, pl_module: Diffusion, exception: BaseException) -> None:
        """Bring the live weights back before anything is saved."""
        self.on_validation_end(trainer, pl_module)

    def weights(self, module: Diffusion) -> dict[str, Tensor]:
        """The averaged weights by the denoiser's names."""
        names = [name for name, _ in module.denoiser.named_parameters()]
        return dict(zip(names, self.average.shadow_params, strict=True))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Diffusion, checkpoint: dict[str, Any]) -> None:
        """Store the average beside the live weights."""
        if self.average is not None:
            step, weights = self.average.optimization_step, self.weights(pl_module)
            checkpoint["ema"] = {"decay": self.decay, "step": step, "weights": weights}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Diffusion, checkpoint: dict[str, Any]) -> None:
        """Keep the stored average until the fit starts."""
        self._restored = checkpoint.get("ema")


class Export(L.Callback):
    """Write ``model.safetensors`` into the run folder when training ends: averaged weights and the card."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Write once, on rank 0, and only after a whole training."""
        if trainer.interrupted or not trainer.is_global_zero:
            return
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
        weights = ema.weights(pl_module) if ema else None
        if weights is not None:  # buffers, where a network has any, are not averaged
            weights = {**pl_module.denoiser.state_dict(), **weights}
        card = pl_module.card("ema" if ema else "live", ema.decay if ema else None)
        save_expert(Path(trainer.default_root_dir) / "model.safetensors", pl_module.denoiser, card, weights)
