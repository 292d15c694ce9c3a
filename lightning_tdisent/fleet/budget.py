"""How many images each expert sees: rules fixed beforehand, and one that follows the curves of their errors.

The sampler's criterion. A DDIM step from row s to r = s - 1 is x_r = c0 x0_hat(x_s) + cx x_s with c0 = c - d a/b,
cx = d/b ((a, b) at s, (c, d) at r). An error of x0_hat at row s, independent of those at other rows and of mean square
e_s per value, becomes c0 times itself at r, and every later row q multiplies it by the step's derivative there,
J_q = c0_q k_q + cx_q, k_q the derivative of x0_hat. Along a principal component of the data with variance v, taken as
Gaussian, k_q = a v / (a^2 v + b^2). So the final image is off by sum_s w_s e_s with the effect

    w_s = mean over components of (c0_s prod_{q < s} J_q)^2,        w_1 = 1,

in which a component counts by its share of the variance: x0_hat has its signal there, and with it its error.

An expert of rows R whose curve is E(n) = sum_{s in R} w_s e_s(n) after n images, each of cost c, gets the next images
if it has the largest -E'(n)/c: where a sum of convex curves is to be least at a given total cost, these are equal.
What no training removes, the variance of x_0 given x_s, is part of E and has no derivative.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lightning_tdisent.errors import InputError, nearest

RULES = ("uniform", "taper", "snr", "explicit", "adaptive")
Curve = list[tuple[int, float]]  # images seen, weighted error
# floor, amplitude, exponent, images that the start was worth, and the error of the start where the curve has it
Fit = tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """Images of all jobs of a fleet together, a shared model's included, and how the experts share them.

    rule: ``uniform`` the same for every row; ``taper`` falls linearly from row 1 to ``end`` of that at row S; ``snr``
    in proportion to a_s = (SNR / (1 + SNR))^(1/2); ``explicit`` in proportion to ``shares``, one per expert;
    ``adaptive`` the ``first`` part of it as ``uniform``, the rest in ``rounds`` by the criterion of this module.
    least: no expert gets less than this part of the mean.
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
            raise InputError(f"rule: {self.rule!r} is none.{nearest(str(self.rule), RULES)} Rules: {', '.join(RULES)}")
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 1:
            raise InputError(f"images: of all jobs together, at least 1, got {self.images!r}")
        for name, low, high in (("least", 0, 1), ("end", 0, 1), ("first", 0.01, 1), ("rounds", 1, 10_000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{name}: must lie in [{low}, {high}], got {value!r}")
        if self.rounds != int(self.rounds):
            raise InputError(f"rounds: a whole number, got {self.rounds}")
        if not all(isinstance(share, (int, float)) and 0 <= share < float("inf") for share in self.shares):
            raise InputError(f"shares: numbers from 0 on, got {list(self.shares)}")
        if bool(self.shares) != (self.rule == "explicit"):
            raise InputError(f"shares: belong to the rule explicit, one number per expert; the rule is {self.rule}")

    @classmethod
    def of(cls, data: Any, where: str) -> "Budget":
        """Budget of a mapping, or of a number of images."""
        data = {"images": data} if isinstance(data, int) and not isinstance(data, bool) else data
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or "images" not in data:
            raise InputError(f"{where}: expected images: N, and maybe {', '.join(names[1:])}; got {data!r}")
        if odd := [key for key in data if key not in names]:
            raise InputError(f"{where}: unknown key {odd[0]!r}.{nearest(str(odd[0]), names)} Known: {', '.join(names)}")
        try:
            shares = data.get("shares") or ()
            return cls(**{**data, "shares": tuple(shares) if isinstance(shares, (list, tuple)) else (shares,)})
        except InputError as error:
            raise InputError(f"{where}.{error}") from None

    def content(self) -> dict[str, Any]:
        """As written: what differs from the defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {f.name: f.default for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v != plain[k]}

    def split(
        self, images: float, batch: int, log_snr: Sequence[Sequence[float]], costs: Sequence[float] = (),
        where: str = "budget",
    ) -> list[int]:  # fmt: skip
        """Images of each expert, whole batches, which cost ``images`` or, where no batch more fits, less.

        log_snr: of the rows of each expert, in order; costs: of an image of each, 1 if not given. An adaptive budget
        splits its first part.
        """
        rows = [L for block in log_snr for L in block]
        if self.rule == "explicit":
            if len(self.shares) != len(log_snr) or min(self.shares) < 0 or not any(self.shares):
                raise InputError(f"{where}: budget.shares: {len(log_snr)} numbers >= 0, one per expert, {self.shares}")
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
                f"the {len(shares)}"
            )
        return [int(n) * batch for n in parts(possible[count - 1])]


def _apportion(shares: np.ndarray, total: int, least: int) -> np.ndarray:
    """Whole numbers >= least of this total in proportion to shares (largest remainders), those at the least apart."""
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
    """Effect w_s of rows 1..S on the sampled image (see the module): what a mean squared error of x0_hat at s does.

    log_snr: of rows 1..S, falling; variances: of the data along its principal components.
    """
    v = np.array(variances, float)
    if not v.size or v.min() < 0 or not v.sum() > 0:
        raise InputError(f"variances of data: numbers >= 0, not all 0, got {variances}")
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
    """Floor f, amplitude A, exponent p and offset m of E(n) = f + A (n + m)^-p, by relative least squares.

    f, A >= 0; p and m are searched on a grid: m is what the weights that it started from were worth. Two points at
    least, at different n. A curve that first rises is fitted from its highest point on, if another one follows. Where
    it has a point at n = 0 no value exceeds that: the start is kept unless training makes it better.
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
            floor, amplitude = _two(basis / e, 1 / e)
            error = float(np.square((floor + amplitude * basis) / e - 1).sum())
            if best is None or error < best[0] - 1e-15:
                best = error, (floor, amplitude * (n[-1] + m) ** p, float(p), float(m), *start)
    assert best is not None
    return best[1]


def _two(basis: np.ndarray, one: np.ndarray) -> tuple[float, float]:
    """Non-negative (floor, amplitude) that bring floor one + amplitude basis nearest to 1."""
    matrix = np.stack([one, basis], 1)
    floor, amplitude = np.linalg.lstsq(matrix, np.ones(len(one)), rcond=None)[0]
    if floor < 0:
        return 0.0, float(basis.sum() / (basis @ basis))
    if amplitude < 0:
        return float(one.sum() / (one @ one)), 0.0
    return float(floor), float(amplitude)


def value(fit: Fit, n: float) -> float:
    """E(n) of a fit."""
    floor, amplitude, p, m, *start = fit
    return float(min([floor + amplitude * (n + m) ** -p, *start]))


def grant(fits: Sequence[Fit], seen: Sequence[int], costs: Sequence[float], unit: int, total: float) -> list[int]:
    """New targets: ``unit`` images at a time go where they lower E most per cost, while cost is left of ``total``.

    seen: images so far; costs: of one image, in units of ``total``. With convex curves this greedy way is optimal. No
    curve is believed beyond twice of what it has seen, as long as there are others that gain anything. Where nobody
    gains anything, images go to whoever has the fewest.
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
