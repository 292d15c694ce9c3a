"""Peak signal-to-noise ratio of generated images and their originals."""

import torch
from torch import Tensor

from lightning_tdisent.metrics.metric import Column, Pair, PairedMetric

PERFECT = 100.0  # dB of an image without error, and the most that any image counts


class PSNR(PairedMetric):
    """10 log10(255^2 / mean square error) of an image in decibels, at most 100, averaged over images."""

    name = "psnr"
    asked_by = "computed for every conditional model"
    columns = (Column("psnr", "peak signal-to-noise ratio, dB", "higher", with_features=False),)

    def of_images(self, pair: Pair) -> Tensor:
        """Return decibels, float64 (B,)."""
        error = (pair.images.double() - pair.originals.double()).square().flatten(1).mean(1)
        return (10 * torch.log10(255**2 / error)).clamp_max(PERFECT)
