"""Sums and lists of features over batches and ranks, as `torchmetrics.Metric`: what metrics are computed from."""

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.distances import Moments


class Accumulator(Metric, ABC):
    """Statistic of one output of a feature network, accumulated over batches and ranks.

    width: d of the output; expected: number of images that must have been added over all ranks, any number if None.
    """

    full_state_update = False

    def __init__(self, width: int, expected: int | None = None) -> None:
        super().__init__()
        self.width, self.expected = width, expected

    @abstractmethod
    def update(self, values: Tensor, numbers: Tensor) -> None:
        """Add the output (B, d) for the images with these numbers, int64 (B,) in 0..n-1."""

    @abstractmethod
    def compute(self) -> Any:
        """Return what was accumulated over all ranks."""

    def check_count(self, found: int) -> None:
        """Raise InputError if another number of images was added than expected."""
        if self.expected is not None and found != self.expected:
            raise InputError(f"{found:,} images were measured, the protocol says {self.expected:,}")


class FeatureMoments(Accumulator):
    """Mean and covariance of features, from float64 sums about a shift: the first features of each rank."""

    full_state_update = True
    n: Tensor
    shift: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, width: int, expected: int | None = None) -> None:
        super().__init__(width, expected)
        for name, shape in (("n", ()), ("shift", (width,)), ("total", (width,)), ("outer", (width, width))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), None)  # ranks are stacked, merged in compute

    def update(self, values: Tensor, numbers: Tensor | None = None) -> None:
        """Add features (B, d); the order of images makes no difference."""
        f = values.double()
        if not len(f):
            return
        self.shift = torch.where(self.n > 0, self.shift, f[0])
        f = f - self.shift
        self.n += len(f)
        self.total += f.sum(0)
        self.outer.addmm_(f.T, f)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another instance, e.g. of another rank; update neither afterwards."""
        other = incoming_state if isinstance(incoming_state, dict) else vars(incoming_state)
        for name, default in self._defaults.items():
            shape = (-1, *torch.as_tensor(default).shape)
            setattr(self, name, torch.cat([getattr(self, name).view(shape), other[name].view(shape)]))

    def compute(self) -> Moments:
        """Return the moments of the features of all ranks; raises InputError if they are not a distribution."""
        self.check_count(int(self.n.sum()))
        d = self.width
        return Moments.of_sums(
            self.n.view(-1), self.shift.view(-1, d), self.total.view(-1, d), self.outer.view(-1, d, d)
        )


class FeatureList(Accumulator):
    """The features themselves, in the order of the image numbers."""

    features: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, width: int, expected: int | None = None) -> None:
        super().__init__(width, expected)
        self.add_state("features", [], "cat")
        self.add_state("numbers", [], "cat")

    def update(self, values: Tensor, numbers: Tensor) -> None:
        """Add features (B, d) of the images with these numbers, int64 (B,)."""
        self.features.append(values)
        self.numbers.append(numbers.to(values.device))

    def compute(self) -> Tensor:
        """Return the features (n, d) of all ranks."""
        features, numbers = (torch.cat(x) if isinstance(x, list) else x for x in (self.features, self.numbers))
        self.check_count(len(numbers.unique()))
        return features[numbers.argsort()]


class RowSums(Metric):
    """Sums of what is added to each row, float64."""

    full_state_update = False
    rows: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__(compute_with_cache=False)
        self.add_state("rows", torch.zeros(*shape, dtype=torch.float64), "sum")

    def update(self, numbers: Tensor, values: Tensor) -> None:
        """Add values (B, ..) to the rows with these numbers, int64 (B,)."""
        self.rows.index_add_(0, numbers, values)

    def compute(self) -> Tensor:
        """Return all rows."""
        return self.rows


def computed(metric: Metric) -> Any:
    """Synchronise over ranks and compute (collective); the metric stays usable after an InputError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was called before the ``update``.*")  # more ranks than images
        try:
            return metric.compute()
        except InputError:
            if metric._is_synced:  # torchmetrics stays synced after an error
                metric.unsync()
            raise
