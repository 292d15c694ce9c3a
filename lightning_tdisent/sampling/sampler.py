"""The reverse loop over the rows of one table, and the solvers that take its steps.

Image i is a function of (model, sampler, seed i) alone: noise comes from `rng.seed_noise`, keyed by the image's seed
and the original index at which it enters. So a seed starts from the same noise in every table of a schedule.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent.diffusion.process import (
    Terms,
    arrive,
    first_state,
    needs_noise,
    noise,
    nonzero,
    step,
    transition,
)
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.errors import InputError, NotFinite, check_number
from lightning_tdisent.sampling.denoiser import DenoiserProtocol
from lightning_tdisent.sampling.guidance import extras
from lightning_tdisent.sampling.inputs import check_given, check_known, check_label, check_seeds


def probe_rows(rows: Sequence[int], n: int = 8) -> list[int]:
    """Return at most n of the rows, evenly spaced; the last one is always included."""
    n = min(n, len(rows))
    return [rows[-(-len(rows) * (k + 1) // n) - 1] for k in range(n)]


class Sampler(Part, ABC):
    """Base class of solvers on the rows of a table.

    steps: number of network evaluations, at least 1, at evenly spaced rows of the model's table; all rows if not given.
    clip: bound of x0_hat at every step, above 0: 1 for images in [-1, 1], None (no bound) for latents and for
        exactness.
    """

    def __init__(self, steps: int | None = None, clip: float | None = 1.0) -> None:
        if steps is not None:
            check_number("sampler.steps", steps, 1, whole=True)
        if clip is not None and not clip > 0:
            raise InputError(f"sampler.clip: must be a positive bound of x0_hat, or null for none, got {clip}")
        self.steps, self.clip = steps, clip

    def rows(self, states: Table) -> list[int]:
        """Return the rows visited, S first; raises InputError for more steps than the table has rows.

        Each resolution of a multi-scale table gets at least one step.
        """
        if self.steps is not None and self.steps > states.S:
            raise InputError(f"sampler.steps: {self.steps} steps on a table of {states.S} rows; at most {states.S}")
        blocks = states.blocks_of_rows
        if len(blocks) == 1 or self.steps is None:
            return probe_rows(states.rows, self.steps or states.S)[::-1]
        if self.steps < len(blocks):
            raise InputError(f"sampler.steps: must be at least 1 for each of {len(blocks)} scales, got {self.steps}")
        return [s for block, n in zip(blocks, _shares(self.steps, [len(b) for b in blocks]), strict=True)
                for s in probe_rows(block, n)][::-1]  # fmt: skip

    def check(self, states: Table) -> None:
        """Raise InputError for a table on which this sampler cannot be used."""
        self.plan(states, [*self.rows(states), 0])

    @abstractmethod
    def plan(self, states: Table, rows: Sequence[int]) -> list[Terms]:
        """Return the coefficients of every step along rows S..0."""

    def walk(
        self,
        denoise: DenoiserProtocol,
        seeds: Sequence[int],
        label: Tensor | None = None,
        start: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield (row, x, x0_hat of the step that led there), from (S, noise, None) to (0, image, image).

        seeds: one per image.
        label: int64 (B,), or one integer for all images, or None.
        start: x at row S; if not given that of a `TruncatedModel`, else noise N(0, I) of the seeds.
        given: observations (B, C', H, W) for a conditional model.
        known: masks (B, 1, H, W) of the pixels that the observation y shows unchanged. At every row r these pixels are
            replaced by a_r y + b_r z, at the end by y itself.
        rows: rows to visit, S first; those of the method `rows` if not given.

        States are those of the table, which `Table.decode` turns into images; components that are dropped are not part
        of them.

        Raises `NotFinite` in place of the image if the start, an x0_hat before clipping, or the image is not finite.
        """
        seeds = check_seeds(seeds)
        label = check_label(denoise, label, len(seeds))
        states, shape = denoise.states, denoise.shape
        path = [*(rows or self.rows(states)), 0]
        more = extras(denoise)
        more.expect(path[:-1])
        parameter = next(iter(denoise.parameters()))
        label = None if label is None else label.to(parameter.device)
        index = states.index.tolist()

        def draw(r: int) -> Tensor:
            return seed_noise(seeds, index[r], states.shape_at(r, shape)).to(parameter.device, parameter.dtype)

        given = check_given(states, given, len(seeds))
        given = None if given is None else given.to(parameter.device, parameter.dtype)
        known = check_known(states, known, given)
        if start is None:
            start = more.start(seeds, label)
        x = first_state(states, draw(path[0]), given) if start is None else start
        x = x.to(parameter.device, parameter.dtype)
        if known is not None:
            x = _put_back(states, x, path[0], draw(path[0]), given, known)
        before: Tensor | None = None
        sums = [_total(x)]
        yield path[0], x, None
        for (s, r), c in zip(pairwise(path), self.plan(states, path), strict=True):
            x0 = denoise(x, s, label)
            sums.append(_total(x0))
            if self.clip is not None:
                x0 = states.space.clamp(x0, self.clip, states.levels[s])
            z = draw(r) if nonzero(c.z) or needs_noise(states, s, r) else None
            x, before = arrive(states, step(states, c, x, x0, before, z), z, s, r, x, given), x0
            if known is not None:
                x = _put_back(states, x, r, draw(r) if r else torch.zeros_like(x), given, known)
            if r == 0:
                _refuse_non_finite([*sums, _total(x)], path, seeds)
            yield r, x, x0

    @torch.inference_mode()
    def __call__(
        self, denoise: DenoiserProtocol, seeds: Sequence[int], label: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        """Return the final images (B, C, H, W), at row 0, of these seeds, as floats."""
        for _, x, _ in self.walk(denoise, seeds, label, given=given):  # noqa: B007
            pass
        return denoise.states.decode(x)


def _total(x: Tensor) -> Tensor:
    """Return the sum of each image, (B,): not finite if one of its values is not.

    The host does not wait for the device.
    """
    return x.flatten(1).sum(1, dtype=torch.float32)


def _refuse_non_finite(sums: Sequence[Tensor], path: Sequence[int], seeds: Sequence[int]) -> None:
    """Raise `NotFinite` if a sum is not finite, naming the first row and the seeds concerned.

    sums: of each image at the start, of every x0_hat, and of the final images, each (B,).
    """
    finite = torch.stack([*sums]).isfinite()
    if finite.all():
        return
    first = int((~finite).any(1).nonzero()[0])
    what = ["the start at", *["x0_hat at"] * (len(path) - 1), "the image after"][first]
    row = [path[0], *path[:-1], path[-2]][first]
    bad = sorted({seed for seed, good in zip(seeds, finite.all(0).tolist(), strict=True) if not good})
    named = ", ".join(map(str, bad[:5])) + (", .." if len(bad) > 5 else "")
    raise NotFinite(
        f"{what} row {row} is not finite (NaN or infinity) for {len(bad)} of {len({*seeds})} images, seeds {named}: "
        "the number type overflowed, the guidance scale is too large, or the network is damaged. Sample in float32, or "
        "with less guidance"
    )


def _put_back(states: Table, x: Tensor, r: int, z: Tensor, given: Tensor | None, known: Tensor) -> Tensor:
    """Return state r with a_r y + b_r z where pixels y of the image are known."""
    assert given is not None
    c = given.shape[1]
    there = noise(states, torch.cat([given, x[:, c:]], 1), r, z)[:, :c]
    return torch.cat([torch.where(known > 0, there, x[:, :c]), x[:, c:]], 1)


def _shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Return parts of a total in proportion to sizes, each at least 1 and at most its size."""
    parts = [1] * len(sizes)
    for _ in range(total - len(sizes)):
        room = [k for k, size in enumerate(sizes) if parts[k] < size]
        parts[min(room, key=lambda k: (parts[k] + 0.5) / sizes[k])] += 1
    return parts


class DDIM(Sampler):
    """The solver of `process.transition` (2010.02502, eq. 12): eta 0 is deterministic, eta 1 is ancestral sampling.

    eta: in [0, 1].
    """

    def __init__(self, eta: float = 0.0, steps: int | None = None, clip: float | None = 1.0) -> None:
        super().__init__(steps, clip)
        if not 0 <= eta <= 1:
            raise InputError(f"eta must lie in [0, 1], got {eta}")
        self.eta = eta

    def plan(self, states: Table, rows: Sequence[int]) -> list[Terms]:
        """Return the coefficients of `process.transition` for each step."""
        return [transition(states, s, r, self.eta) for s, r in pairwise(rows)]


class Ancestral(DDIM):
    """The DDPM chain: every step draws from the posterior q(x_r | x_s, x0_hat) (2006.11239, Algorithm 2)."""

    def __init__(self, steps: int | None = None, clip: float | None = 1.0) -> None:
        super().__init__(1.0, steps, clip)


class DPMSolver(Sampler):
    """DPM-Solver++(2M): second order in half log-SNR, using the previous estimate (2211.01095, Algorithm 2).

    x_r = (d/b) x_s - c (e^{-h} - 1) D, D = (1 + 1/(2q)) x0_hat - 1/(2q) x0_before, h = lambda_r - lambda_s, q =
    h_before/h. The first step and the last, whose h is infinite, are of first order. From a row without signal (zero
    terminal SNR) h is infinite, too: x_r = c x0_hat + (d/b) x_s; the next step has q = inf, D = x0_hat.
    """

    def plan(self, states: Table, rows: Sequence[int]) -> list[Terms]:
        """Return the coefficients of the formula above for each step."""
        out: list[Terms] = []
        a, b, half = states.on_cpu["a"], states.on_cpu["b"], states.on_cpu["log_snr"] / 2
        before: Tensor | None = None
        for s, r in pairwise(rows):
            h = half[r] - half[s]
            cx, c0 = b[r] / b[s], -a[r] * torch.expm1(-h)
            c_before = torch.zeros_like(c0)
            if before is not None and r > 0:
                q = before / h
                c0, c_before = c0 * (1 + 1 / (2 * q)), -c0 / (2 * q)
            before = h
            if states.K > 1:  # inf - inf, for components that are dropped or free of noise
                c0, cx, c_before = (torch.nan_to_num(c, 0.0, 0.0, 0.0) for c in (c0, cx, c_before))
            out.append(Terms(x0=c0, x=cx, before=c_before))
        return out


def refuse_unowned(name: str, denoise: Any, sampler: Sampler) -> None:
    """Raise InputError, before any work, for a model that lacks rows which a sampler visits; name: of the model."""
    owned = getattr(denoise, "rows", None)  # only of one network: a composite has all rows or is a preview
    if owned is not None and (lost := sorted(set(sampler.rows(denoise.states)) - set(owned))):
        raise InputError(
            f"{name}: its network has rows {owned} of 1..{denoise.states.S}, the sampler asks it at row {lost[-1]}; "
            "compose it with the experts of the other rows"
        )
