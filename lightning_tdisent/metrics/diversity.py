"""Diversity of the draws for one observation."""

import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.accumulators import RowSums
from lightning_tdisent.metrics.metric import Column, Metric

LIMIT = 1 << 30  # bytes of the sums over draws; torchmetrics keeps them twice, and each rank's twice to add them up


class Diversity(Metric):
    """Standard deviation over an item's draws in grey levels, averaged over pixels, channels and items.

    It divides by draws (torch.std in 2207.09786's code divides by draws - 1), and needs two draws at least.
    """

    name = "diversity"
    needs = "pairs"
    asked_by = "computed for every conditional model"
    columns = (Column("diversity", "standard deviation over draws, grey levels", with_features=False),)

    @staticmethod
    def sums(items: int, shape: list[int]) -> RowSums:
        """Return what is accumulated, for each item the sums of x and x^2 over its draws; refuse what does not fit."""
        size = 16 * items * shape[0] * shape[1] * shape[2]
        if size > LIMIT:
            raise InputError(
                f"diversity: sums of {items:,} items of {shape} are {size / 2**30:.3g} GiB, at most "
                f"{LIMIT / 2**30:.3g} are kept: take fewer items"
            )
        return RowSums(items, 2, *shape)

    @staticmethod
    def add(sums: RowSums, item: Tensor, images: Tensor) -> None:
        """Add images, uint8 (B, C, H, W), of the items with these numbers."""
        x = images.double()
        sums.update(item, torch.stack([x, x.square()], 1))

    @staticmethod
    def compute(rows: Tensor, draws: int) -> float:
        """Return the diversity from all rows (items, 2, C, H, W); sums are integers below 2^53: no order matters."""
        total = 0.0
        for first, second in (part.unbind(1) for part in rows.split(64)):
            total += float((draws * second - first.square()).sqrt().sum())
        return total / draws / rows[:, 0].numel()
