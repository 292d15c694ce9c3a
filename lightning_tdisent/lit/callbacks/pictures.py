"""Pictures during training from fixed seeds and images, made by the same code as those of reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.errors import InputError, NotFinite, check_number
from lightning_tdisent.evaluation.observations import observed
from lightning_tdisent.evaluation.pictures import estimate_strip, forward_strip, reverse_strip, save_png, shown
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.images import grid, to_uint8, zoomed
from lightning_tdisent.lit.inference import DenoiserModule
from lightning_tdisent.lit.loggers import log_picture
from lightning_tdisent.lit.preflight import Rehearsed
from lightning_tdisent.lit.prior import PriorModule
from lightning_tdisent.runs import PICTURES
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import probe_rows


class Pictures(Rehearsed):
    """Draw pictures at each validation.

    These are a grid of samples, the forward strip of held-out images and the reverse strip of samples. They are logged
    to TensorBoard and written as PNG to ``pictures/`` of the run folder, by rank 0. A model that owns only some rows
    cannot sample; its grid, ``estimate``, shows x0_hat from its highest row. The samples of a prior are the states that
    chains start from. A conditional model receives observations of held-out images. Nothing is drawn of latents,
    because their decoder is not available. Pictures that are not finite are left out, with a warning that names where
    the values stopped being finite.

    samples: number of images in the grid.
    strips: number of images in each strip.
    first_seed: the first seed; the others follow it.
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
        """Draw and log the pictures."""
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
        caption = f"Each line: a held-out image, and its noisy state at {_listed(denoiser.states, rows)}."
        self._show(trainer, "forward_strip", strip.flatten(0, 1), caption, strip.shape[1])
        seeds = range(self.first_seed, self.first_seed + self.samples)
        if isinstance(pl_module, PriorModule):
            states = pl_module.prior.sample(seeds, int(denoiser.states.index[rows[-1]]))
            refuse_non_finite("the prior", {"its samples": states})
            caption = f"States of seeds {seeds[0]}..{seeds[-1]}, from which chains start at row {rows[-1]}."
            self._show(trainer, "samples", to_uint8(shown(denoiser.states, states, rows[-1])), caption)
        elif pl_module.whole:
            given = observed(denoiser.states, data.images, len(seeds))
            images = torch.cat(list(sample(denoiser, pl_module.sampler, seeds, given=given))).cpu()
            caption = f"Samples of seeds {seeds[0]}..{seeds[-1]} by {type(pl_module.sampler).__name__}."
            self._show(trainer, "samples", images, caption)
            some = None if given is None else given[: self.strips]
            strip, shown_rows = reverse_strip(denoiser, pl_module.sampler, seeds[: self.strips], given=some)
            caption = (
                f"Each line: the states of a sample from noise to image, at {_listed(denoiser.states, shown_rows)}."
            )
            self._show(trainer, "reverse_strip", strip.flatten(0, 1), caption, strip.shape[1])
        else:
            triple = estimate_strip(denoiser, data.images[: self.strips], rows[-1])
            caption = f"Each line: a held-out image, its noisy state at row {rows[-1]}, and x0_hat of that state."
            self._show(trainer, "estimate", triple.flatten(0, 1), caption, 3)

    def rehearse(self, trainer: L.Trainer, module: DenoiserModule, images: Tensor | None) -> None:
        """Draw the pictures of two images without logging or writing them."""
        denoiser, rows = module.denoiser, module.rows
        if not trainer.is_global_zero or denoiser.shape[0] not in (1, 3):
            return
        data = trainer.datamodule.held_out
        forward_strip(denoiser, data.images[:2], rows[-1:])
        if isinstance(module, PriorModule):
            states = module.prior.sample(range(2), int(denoiser.states.index[rows[-1]]))
            images = to_uint8(shown(denoiser.states, states, rows[-1]))
        if images is None:
            images = estimate_strip(denoiser, data.images[:2], rows[-1]).flatten(0, 1)
        grid(images.cpu())

    def passes(self, trainer: L.Trainer, module: DenoiserModule) -> int:
        """Return the images of the samples, once for each step of the sampler."""
        if isinstance(module, PriorModule) or not module.whole:
            return self.strips
        return (self.samples + self.strips) * len(module.sampler.rows(module.denoiser.states))

    def _show(self, trainer: L.Trainer, name: str, images: Tensor, caption: str, columns: int = 16) -> None:
        step = trainer.global_step
        if trainer.loggers:
            seen: Any = trainer.lightning_module.images_seen
            log_picture(trainer.loggers, name, grid(zoomed(images), columns), caption, seen)
        save_png(grid(images, columns), Path(trainer.default_root_dir) / PICTURES / f"{name}_{step:07d}.png")


def _listed(states: Table, rows: Sequence[int]) -> str:
    """Return rows with their times: ``rows 1 (t=0031), 8 (t=0249)``; row 0 is the image."""
    return "rows " + ", ".join(f"{s} (t={int(states.index[s]):04d})" if s else "0 (image)" for s in rows)


class WriteImages(BasePredictionWriter):
    """Write the images of `predict` to ``images/SEED.png`` of its folder, which must not contain images yet."""

    def __init__(self) -> None:
        super().__init__("batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Raise InputError on all ranks if the folder already contains images."""
        folder = Path(trainer.default_root_dir) / "images"
        if trainer.strategy.broadcast(any(folder.glob("*.png"))):
            raise InputError(f"predict: {folder} already holds images; choose another --run")

    def write_on_batch_end(  # noqa: D102
        self, trainer: L.Trainer, pl_module: Any, prediction: Tensor, batch_indices: Any, batch: list[int], *_: Any
    ) -> None:
        for seed, image in zip(batch, prediction.cpu(), strict=True):
            save_png(image, Path(trainer.default_root_dir) / "images" / f"{seed:06d}.png")

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the folder of the images."""
        if trainer.is_global_zero:
            print(f"images: {Path(trainer.default_root_dir) / 'images'}")
