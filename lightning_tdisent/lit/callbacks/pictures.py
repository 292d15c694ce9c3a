"""Pictures during training, from fixed seeds and images, by the code that also makes the report's."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tdisent.errors import InputError, NotFinite, check_number
from lightning_tdisent.evaluation.observations import observed
from lightning_tdisent.evaluation.pictures import estimate_strip, forward_strip, reverse_strip, save_png
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.images import grid, to_uint8
from lightning_tdisent.lit.inference import DenoiserModule
from lightning_tdisent.lit.preflight import Rehearsed
from lightning_tdisent.lit.prior import PriorModule
from lightning_tdisent.runs import PICTURES
from lightning_tdisent.sampling.sampler import probe_rows, sample


class Pictures(Rehearsed):
    """At each validation: a grid of samples, the forward strip of held-out images, the reverse strip of samples.

    samples: images of the grid, seeds first_seed ..; strips: images of each strip. Rank 0 draws them. A model that
    owns only some rows cannot sample: its grid shows x0_hat from its highest row, under ``estimate``; the samples of a
    prior are the states that chains start from; a conditional model is given what is observed of held-out images. Also
    written as PNG under ``pictures/`` of the run folder. Of latents nothing is drawn: their decoder is no part of it.
    Pictures that are not finite are left out, with a warning that says where they began not to be.
    """

    def __init__(self, samples: int = 64, strips: int = 6, first_seed: int = 0) -> None:
        check_number("Pictures.samples", samples, 1, whole=True)
        check_number("Pictures.strips", strips, 1, whole=True)
        check_number("Pictures.first_seed", first_seed, most=2**32 - max(samples, strips), whole=True)
        self.samples, self.strips, self.first_seed = samples, strips, first_seed

    def setup(self, trainer: L.Trainer, pl_module: DenoiserModule, stage: str) -> None:
        """Refuse a trainer without held-out images."""
        if stage != "predict":
            pl_module.needed_shards("Pictures")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: DenoiserModule) -> None:
        """Draw and log."""
        if not trainer.is_global_zero or pl_module.denoiser.shape[0] not in (1, 3):
            return
        try:
            self._draw(trainer, pl_module)
        except NotFinite as error:
            rank_zero_warn(f"no picture of samples at step {trainer.global_step}: {error}")

    def _draw(self, trainer: L.Trainer, pl_module: DenoiserModule) -> None:
        denoiser, data = pl_module.denoiser, trainer.datamodule.held_out
        rows = probe_rows(pl_module.rows)
        strip = forward_strip(denoiser, data.images[: self.strips], rows)
        self._show(trainer, "forward_strip", strip.flatten(0, 1), strip.shape[1])
        seeds = range(self.first_seed, self.first_seed + self.samples)
        if isinstance(pl_module, PriorModule):
            states = pl_module.prior.sample(seeds, int(denoiser.states.index[rows[-1]]))
            refuse_non_finite("the prior", {"its samples": states})
            self._show(trainer, "samples", to_uint8(states))
        elif pl_module.whole:
            given = observed(denoiser.states, data.images, len(seeds))
            self._show(
                trainer, "samples", torch.cat(list(sample(denoiser, pl_module.sampler, seeds, given=given))).cpu()
            )
            some = None if given is None else given[: self.strips]
            strip, _ = reverse_strip(denoiser, pl_module.sampler, seeds[: self.strips], given=some)
            self._show(trainer, "reverse_strip", strip.flatten(0, 1), strip.shape[1])
        else:
            triple = estimate_strip(denoiser, data.images[: self.strips], rows[-1])
            self._show(trainer, "estimate", triple.flatten(0, 1), 3)

    def rehearse(self, trainer: L.Trainer, module: DenoiserModule, images: Tensor | None) -> None:
        """Draw what there is of two images, and show it nowhere."""
        denoiser, rows = module.denoiser, module.rows
        if not trainer.is_global_zero or denoiser.shape[0] not in (1, 3):
            return
        data = trainer.datamodule.held_out
        forward_strip(denoiser, data.images[:2], rows[-1:])
        if isinstance(module, PriorModule):
            images = to_uint8(module.prior.sample(range(2), int(denoiser.states.index[rows[-1]])))
        if images is None:
            images = estimate_strip(denoiser, data.images[:2], rows[-1]).flatten(0, 1)
        grid(images.cpu())

    def _show(self, trainer: L.Trainer, name: str, images: Tensor, columns: int = 16) -> None:
        picture, step = grid(images, columns), trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture, trainer.lightning_module.images_seen)
        save_png(picture, Path(trainer.default_root_dir) / PICTURES / f"{name}_{step:07d}.png")


class WriteImages(BasePredictionWriter):
    """Write the images of `predict` as ``images/SEED.png`` of its folder, which must not hold any yet."""

    def __init__(self) -> None:
        super().__init__("batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse to mix these images with others, on all ranks."""
        folder = Path(trainer.default_root_dir) / "images"
        if trainer.strategy.broadcast(any(folder.glob("*.png"))):
            raise InputError(f"predict: {folder} already holds images; choose another --run")

    def write_on_batch_end(  # noqa: D102
        self, trainer: L.Trainer, pl_module: Any, prediction: Tensor, batch_indices: Any, batch: list[int], *_: Any
    ) -> None:
        for seed, image in zip(batch, prediction.cpu(), strict=True):
            save_png(image, Path(trainer.default_root_dir) / "images" / f"{seed:06d}.png")

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say where they are."""
        if trainer.is_global_zero:
            print(f"images: {Path(trainer.default_root_dir) / 'images'}")
