"""The metrics as `torchmetrics.Metric`: sums and lists that ranks put together, then the functions of `distances`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.distances import Moments, frechet, frechet_infinity, kernel_distance, precision_recall


class FeatureMoments(Metric):
    """Mean and covariance of features from float64 sums about a shift of each rank's own: its first features."""

    full_state_update = True
    n: Tensor
    shift: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, shape in (("n", ()), ("shift", (width,)), ("total", (width,)), ("outer", (width, width))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), None)  # ranks are stacked, and merged below

    def update(self, features: Tensor) -> None:
        """Add features (B, d)."""
        f = features.double()
        if not len(f):
            return
        self.shift = torch.where(self.n > 0, self.shift, f[0])
        f = f - self.shift
        self.n += len(f)
        self.total += f.sum(0)
        self.outer.addmm_(f.T, f)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Join the sums of another metric of this kind, as those of another rank; update neither afterwards."""
        other = incoming_state if isinstance(incoming_state, dict) else vars(incoming_state)
        for name, default in self._defaults.items():
            shape = (-1, *torch.as_tensor(default).shape)
            setattr(self, name, torch.cat([getattr(self, name).view(shape), other[name].view(shape)]))

    def compute(self) -> Any:
        """`Moments` of all ranks' features."""
        d = self.total.shape[-1]
        return Moments.of_sums(
            self.n.view(-1), self.shift.view(-1, d), self.total.view(-1, d), self.outer.view(-1, d, d)
        )


class FrechetDistance(FeatureMoments):
    """`frechet` between a reference and the features added, of whatever network or layer they are.

    expected: images that must have been added, on all ranks together, if given.
    """

    higher_is_better = False

    def __init__(self, reference: Moments, expected: int | None = None, **kwargs: Any) -> None:
        super().__init__(len(reference.mean), **kwargs)
        self.reference, self.expected = reference, expected

    def compute(self) -> Tensor:
        """The distance, float64."""
        _check_count(int(self.n.sum()), self.expected)
        return torch.tensor(frechet(self.reference.to(self.device), super().compute()), dtype=torch.float64)


def _check_count(found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise InputError(f"{found:,} images were measured, the protocol says {expected:,}")


class InceptionScore(Metric):
    """exp E KL(p(y|x) || p(y)) (1606.03498), averaged over parts of the images, from sums: no order matters.

    n: images to come; splits: parts; seed: of the permutation of image numbers that makes the parts, as torch-fidelity
    draws it; None takes them in order.
    """

    full_state_update = False
    higher_is_better = True
    count: Tensor
    p: Tensor
    plogp: Tensor
    part: Tensor

    def __init__(self, classes: int, n: int, splits: int = 1, seed: int | None = 2020, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        order = np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)
        part = np.empty(n, np.int64)
        for k in range(splits):
            part[order[k * n // splits : (k + 1) * n // splits]] = k
        self.expected = n
        self.register_buffer("part", torch.from_numpy(part), persistent=False)
        self.add_state("count", torch.zeros(splits, dtype=torch.float64), "sum")
        self.add_state("p", torch.zeros(splits, classes, dtype=torch.float64), "sum")
        self.add_state("plogp", torch.zeros(splits, dtype=torch.float64), "sum")

    def update(self, logits: Tensor, numbers: Tensor) -> None:
        """Add logits (B, classes) of the images with these numbers, int64 (B,) in 0..n-1."""
        part = self.part[numbers]
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        self.count.index_add_(0, part, torch.ones_like(p[:, 0]))
        self.p.index_add_(0, part, p)
        self.plogp.index_add_(0, part, (p * log_p).sum(1))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean of the parts' scores, and their standard deviation (0 of one part), float64."""
        _check_count(int(self.count.sum()), self.expected)
        if not self.plogp.isfinite().all():
            raise InputError(f"the logits of some of {int(self.count.sum())} images are NaN or infinite")
        mean = self.p / self.count[:, None]
        scores = (self.plogp / self.count - torch.xlogy(mean, mean).sum(1)).exp()
        return scores.mean(), scores.std(correction=0)


class FeatureList(Metric):
    """Features themselves, in the order of the images' numbers; expected: as in `FrechetDistance`."""

    full_state_update = False
    features: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, expected: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.expected = expected
        self.add_state("features", [], "cat")
        self.add_state("numbers", [], "cat")

    def update(self, features: Tensor, numbers: Tensor) -> None:
        """Add features (B, d) of the images with these numbers, int64 (B,)."""
        self.features.append(features)
        self.numbers.append(numbers.to(features.device))

    def compute(self) -> Any:
        """(n, d) of all ranks."""
        features, numbers = (torch.cat(x) if isinstance(x, list) else x for x in (self.features, self.numbers))
        _check_count(len(numbers.unique()), self.expected)
        return features[numbers.argsort()]


class PairMetrics(FeatureList):
    """What looks at pairs of images or takes parts of them: `kernel_distance`, `precision_recall`, `frechet_infinity`.

    real, kept: moments of the real images, and features (k, d) of some; asked: of kid, prdc, fd_infinity,
    which comes with the ends of its 95 % interval.
    """

    def __init__(self, real: Moments, kept: Tensor, asked: Sequence[str], neighbours: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.real, self.kept, self.asked, self.neighbours = real, kept, tuple(asked), neighbours

    def compute(self) -> dict[str, float]:
        """What was asked, by name."""
        features, out = super().compute(), dict[str, float]()
        kept = self.kept.to(features.device)
        if "kid" in self.asked:
            out["kid"] = kernel_distance(kept, features)
        if "prdc" in self.asked:
            out |= precision_recall(kept, features, self.neighbours)
        if "fd_infinity" in self.asked:
            value, error = frechet_infinity(self.real.to(features.device), features)
            low, high = value - 1.96 * error, value + 1.96 * error
            out |= {"fd_infinity": value, "fd_infinity_low": low, "fd_infinity_high": high}
        return out
