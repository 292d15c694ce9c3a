"""Split a budget of training images among experts: by a fixed rule, or adaptively from their error curves.

Criterion of the adaptive rule. A DDIM step from row s to r = s - 1 is x_r = c0 x0_hat(x_s) + cx x_s with
c0 = c - d a/b, cx = d/b ((a, b) at s, (c, d) at r). Let the error of x0_hat at row s have mean square e_s per value and
be independent of the errors at other rows. At row r it is multiplied by c0. Every later row q multiplies it by the
derivative of its own step, J_q = c0_q k_q + cx_q, where k_q is the derivative of x0_hat. Along a principal component
of the data with variance v, assumed to be Gaussian, k_q = a v / (a^2 v + b^2). The mean squared error of the final
image is therefore sum_s w_s e_s with the effect

    w_s = mean over components of (c0_s prod_{q < s} J_q)^2,        w_1 = 1.

The mean weights each component by its share of the variance, because the signal of x0_hat, and with it its error, is
distributed in this way.

Let an expert own the rows R, with the curve E(n) = sum_{s in R} w_s e_s(n) after n images of cost c each. The next
images go to the expert with the largest -E'(n)/c: a sum of convex curves is minimal at a given total cost where these
values are equal. The irreducible error, the variance of x_0 given x_s, is part of E, but its derivative is zero.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lightning_tdisent.errors import InputError, is_whole, nearest

RULES = ("uniform", "taper", "snr", "explicit", "adaptive")
Curve = list[tuple[int, float]]  # (images seen, weighted error)
# floor, amplitude, exponent, offset (images that the initial weights are worth) and, if the curve has a point at
# n = 0, the error of the initial weights
Fit = tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """Total number of images for all jobs of a fleet, including a shared model, and the rule that splits it.

    images: total images, at least 1.
    rule: ``uniform``: the same number for every row. ``taper``: falls linearly from row 1 to ``end`` times that
        number at row S. ``snr``: in proportion to a_s = (SNR / (1 + SNR))^(1/2). ``explicit``: in proportion to
        ``shares``. ``adaptive``: the fraction ``first`` of the budget as in ``uniform``, the rest in ``rounds``
        rounds by the criterion of this module.
    least: smallest number of images of an expert, as a fraction of the mean, in [0, 1].
    end: for ``taper``: value at row S relative to row 1, in [0, 1].
    shares: for ``explicit``: one non-negative number per expert.
    first: for ``adaptive``: fraction of the budget spent before the first decision, in [0.01, 1].
    rounds: for ``adaptive``: number of later rounds, from 1 to 10,000.
    Raises InputError for an unknown rule or a value out of range.
    """

    images: int
    rule: str = "uniform"
    least: float = 0.125
    end: float = 0.125
    shares: tuple[float, ...] = ()
    first: float = 0.5
    rounds: int = 4

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"rule: unknown {self.rule!r}.{nearest(str(self.rule), RULES)} Known: {', '.join(RULES)}")
        if not is_whole(self.images) or self.images < 1:
            raise InputError(f"images: expected the images of all jobs, an integer of at least 1, got {self.images!r}")
        for name, low, high in (("least", 0, 1), ("end", 0, 1), ("first", 0.01, 1), ("rounds", 1, 10_000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{name}: must lie in [{low}, {high}], got {value!r}")
        if self.rounds != int(self.rounds):
            raise InputError(f"rounds: expected an integer, got {self.rounds}")
        if not all(isinstance(share, (int, float)) and 0 <= share < float("inf") for share in self.shares):
            raise InputError(f"shares: expected finite numbers of at least 0, got {list(self.shares)}")
        if bool(self.shares) != (self.rule == "explicit"):
            raise InputError(
                "shares: give one number per expert with the rule explicit, and none with other rules; the rule is "
                f"{self.rule}"
            )

    @classmethod
    def of(cls, data: Any, where: str) -> "Budget":
        """Create a budget from a mapping or from a number of images; ``where`` is named in error messages."""
        data = {"images": data} if is_whole(data) else data
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or "images" not in data:
            raise InputError(
                f"{where}: expected a number of images, or a mapping with images and optionally "
                f"{', '.join(names[1:])}; got {data!r}"
            )
        if unknown := [key for key in data if key not in names]:
            raise InputError(
                f"{where}: unknown key {unknown[0]!r}.{nearest(str(unknown[0]), names)} Known: {', '.join(names)}"
            )
        try:
            shares = data.get("shares") or ()
            return cls(**{**data, "shares": tuple(shares) if isinstance(shares, (list, tuple)) else (shares,)})
        except InputError as error:
            raise InputError(f"{where}.{error}") from None

    def content(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as they are written to a plan."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {f.name: f.default for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v != plain[k]}

    def split(
        self, images: float, batch: int, log_snr: Sequence[Sequence[float]], costs: Sequence[float] = (),
        where: str = "budget",
    ) -> list[int]:  # fmt: skip
        """Return the number of images of each expert.

        Each number is a multiple of ``batch``. The total cost is at most ``images``, and another batch would exceed it.
        With the rule ``adaptive`` only the first part of the budget is split.

        images: images for the experts, in images of cost 1.
        batch: images per optimizer step.
        log_snr: log-SNR of the rows of each expert, in the order of the experts.
        costs: cost per image of each expert; 1 if not given.
        where: prefix of error messages.
        Raises InputError if ``shares`` do not fit the experts, or the budget is less than one batch per expert.
        """
        rows = [L for block in log_snr for L in block]
        if self.rule == "explicit":
            if len(self.shares) != len(log_snr) or min(self.shares) < 0 or not any(self.shares):
                raise InputError(
                    f"{where}: budget.shares: expected {len(log_snr)} numbers >= 0, one per expert and not all 0, got "
                    f"{self.shares}"
                )
            shares = np.array(self.shares, float)
        else:
            if self.rule == "taper":
                place = np.linspace(0, 1, len(rows)) if len(rows) > 1 else np.zeros(1)
                of_row = dict(zip(sorted(rows, reverse=True), 1 + (self.end - 1) * place, strict=True))
            elif self.rule == "snr":
                of_row = {L: float(1 / (1 + np.exp(-L))) ** 0.5 for L in rows}
            else:
                of_row = dict.fromkeys(rows, 1.0)
            shares = np.array([sum(of_row[L] for L in block) for block in log_snr])
        if self.rule == "adaptive":
            images *= self.first
        cost = np.array(costs or [1.0] * len(shares), float)

        def parts(batches: int) -> np.ndarray:
            return _apportion(shares, batches, max(1, int(self.least * batches / len(shares))))

        def spent(batches: int) -> float:
            return float(cost @ parts(batches)) * batch

        possible = range(len(shares), int(images / batch / cost.min()) + 2)
        count = bisect_right(possible, images * (1 + 1e-12), key=spent)
        if not count:
            raise InputError(
                f"{where}: budget.images: {images} images for the experts are less than a batch of {batch} for each of "
                f"the {len(shares)} experts"
            )
        return [int(n) * batch for n in parts(possible[count - 1])]


def _apportion(shares: np.ndarray, total: int, least: int) -> np.ndarray:
    """Return integers >= ``least`` with the sum ``total``, in proportion to ``shares`` (largest remainders).

    Entries that would fall below ``least`` are set to it; the remainder is split among the other entries.
    """
    held = np.zeros(len(shares), bool)
    while True:
        free = total - least * int(held.sum())
        weight = np.where(held, 0, shares)
        exact = np.where(held, least, free * weight / max(weight.sum(), 1e-300))
        low = ~held & (exact < least)
        if not low.any():
            break
        held |= low
    out = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - out), kind="stable")
    out[order[: total - int(out.sum())]] += 1
    return out


def effects(log_snr: Sequence[float], variances: Sequence[float]) -> list[float]:
    """Return the effects w_s of rows 1..S: weights of the mean squared errors of x0_hat in the error of the sample.

    The module docstring defines w_s.

    log_snr: log-SNR of rows 1..S, decreasing.
    variances: variances of the data along its principal components; non-negative, not all zero.
    Raises InputError for invalid variances.
    """
    v = np.array(variances, float)
    if not v.size or v.min() < 0 or not v.sum() > 0:
        raise InputError(f"variances of the data: expected numbers >= 0, not all 0, got {variances}")
    L = np.array(log_snr, float)
    a = np.concatenate([[1.0], np.sqrt(1 / (1 + np.exp(-L)))])
    b = np.concatenate([[0.0], np.sqrt(1 / (1 + np.exp(L)))])
    out, later = [], np.ones(len(v))
    for s in range(1, len(a)):
        c0, cx = a[s - 1] - b[s - 1] * a[s] / b[s], b[s - 1] / b[s]
        out.append(float(v @ (c0 * later) ** 2 / v.sum()))
        later *= c0 * a[s] * v / (a[s] ** 2 * v + b[s] ** 2) + cx
    return out


def fit_curve(curve: Curve) -> Fit:
    """Fit E(n) = f + A (n + m)^-p by relative least squares; return floor f, amplitude A, exponent p and offset m.

    f and A are non-negative; p and m are chosen from a grid. m is the number of images that the initial weights are
    worth. A curve that first rises is fitted from its highest point onwards, if at least one point follows. If the
    curve has a point at n = 0, its error is the last element of the result, and `value` never exceeds it, because the
    initial weights are kept unless training improves them.

    curve: at least two points at different n.
    """
    n, e = (np.array(values, float) for values in zip(*sorted(set(curve)), strict=True))
    start = [float(e[0])] if n[0] == 0 else []
    top = int(np.argmax(e))
    if top < len(n) - 1:
        n, e = n[top:], e[top:]
    best: tuple[float, Fit] | None = None
    for m in n[-1] * np.array([0, 0.03, 0.1, 0.3, 1, 3, 10]):
        if n[0] + m <= 0:
            continue
        for p in np.geomspace(0.1, 3, 30):
            basis = (n + m) ** -p * (n[-1] + m) ** p
            floor, amplitude = _fit_linear(basis / e, 1 / e)
            error = float(np.square((floor + amplitude * basis) / e - 1).sum())
            if best is None or error < best[0] - 1e-15:
                best = error, (floor, amplitude * (n[-1] + m) ** p, float(p), float(m), *start)
    assert best is not None
    return best[1]


def _fit_linear(basis: np.ndarray, one: np.ndarray) -> tuple[float, float]:
    """Return non-negative (floor, amplitude) that minimise the squares of floor * one + amplitude * basis - 1."""
    matrix = np.stack([one, basis], 1)
    floor, amplitude = np.linalg.lstsq(matrix, np.ones(len(one)), rcond=None)[0]
    if floor < 0:
        return 0.0, float(basis.sum() / (basis @ basis))
    if amplitude < 0:
        return float(one.sum() / (one @ one)), 0.0
    return float(floor), float(amplitude)


def value(fit: Fit, n: float) -> float:
    """Return E(n) of a fit of `fit_curve`."""
    floor, amplitude, p, m, *start = fit
    return float(min([floor + amplitude * (n + m) ** -p, *start]))


def grant(fits: Sequence[Fit], seen: Sequence[int], costs: Sequence[float], unit: int, total: float) -> list[int]:
    """Return new target numbers of images: grant ``unit`` images at a time to the expert that gains most per cost.

    The gain is the decrease of E. Granting stops when the rest of ``total`` does not pay for another unit. For convex
    curves this greedy allocation is optimal. A fit is not extrapolated beyond twice the images seen while other experts
    gain anything. If no expert gains anything, the unit goes to the expert with the fewest images.

    fits: one fit per expert.
    seen: images that each expert has seen.
    costs: cost of one image of each expert, in the unit of ``total``.
    unit: images granted at a time.
    total: cost to spend.
    """
    target, left = list(seen), total
    while able := [k for k, cost in enumerate(costs) if cost * unit <= left + 1e-9]:
        gains = {k: (value(fits[k], target[k]) - value(fits[k], target[k] + unit)) / (costs[k] * unit) for k in able}
        gaining = [k for k in able if gains[k] > 0]
        known = [k for k in gaining if target[k] + unit <= 2 * seen[k]]
        k = max(known or gaining, key=gains.__getitem__, default=min(able, key=target.__getitem__))
        target[k] += unit
        left -= costs[k] * unit
    return target
