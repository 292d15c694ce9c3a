"""Tables of several columns: components of an image, or an observation beside it, that diffuse at their own speeds.

All of "Non-Uniform Diffusion Models" (2207.09786) is such a table: multi-scale models, whose finer components reach
pure noise first and leave the tensor, and the conditional estimators CDE, CDiffE, CMDE and VS-CMDE, whose observation y
is one more component. Log-SNR -inf: finished; +inf: does not diffuse.

The file is long because all that a table of one column does trivially is answered for here (see `LatentStates`).
"""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tdisent.diffusion.bases import Basis, Pixels
from lightning_tdisent.diffusion.operators import Operator
from lightning_tdisent.diffusion.process import grown, noise, posterior, scale
from lightning_tdisent.diffusion.schedules import Geometric, LogLinear, NoiseSchedule
from lightning_tdisent.diffusion.spec import Part, identity, spec
from lightning_tdisent.diffusion.states import CONDITION, TERMINAL_BOUND, LatentStates
from lightning_tdisent.errors import InputError, check_shape


class Condition(Part):
    """An observation y beside the image, a component with a curve of its own and the role of a condition.

    operator: makes y of an image. schedule: its curve over the same T levels; not given, y is clean (+inf): the
    estimator CDE. The image's own makes CDiffE, a slower one CMDE (2207.09786, section 4). draw: what a sampler puts in
    its place at a row, ``fresh`` a y_s + b eps at each, or ``bridge``, one path from q(y_r | y_s, y_0). weight: of its
    part of the loss, which is that of its own row otherwise; 0 trains the image alone, the mean taken over it alone.
    anneal: for so many steps of a training the largest sigma of y falls from ``anneal_from`` (if not given, the
    image's) to that of ``schedule``, 1/sigma linearly: VS-CMDE.
    """

    def __init__(
        self,
        operator: Operator,
        schedule: NoiseSchedule | None = None,
        draw: Literal["fresh", "bridge"] = "fresh",
        weight: float = 1.0,
        anneal: int = 0,
        anneal_from: float | None = None,
    ) -> None:
        if draw not in ("fresh", "bridge"):
            raise InputError(f"condition.draw: fresh or bridge, got {draw!r}")
        if not 0 <= weight < math.inf:
            raise InputError(f"condition.weight: 0 or above, got {weight}")
        if anneal < 0:
            raise InputError(f"condition.anneal: a number of steps, got {anneal}")
        if anneal and not isinstance(schedule, Geometric):
            raise InputError(f"condition.anneal: {anneal} steps want condition.schedule: Geometric, it is {schedule!r}")
        if anneal_from is not None and not 0 < anneal_from < math.inf:
            raise InputError(f"condition.anneal_from: a sigma above 0, got {anneal_from}")
        self.operator, self.schedule, self.draw, self.weight = operator, schedule, draw, weight
        self.anneal, self.anneal_from = anneal, anneal_from
        spec(operator)  # takes the digests of its files while they are what it has read


class ComponentStates(LatentStates):
    """Latent states whose components diffuse at different speeds (2207.09786, section 3).

    shape: (C, H, W) of an image. basis: its components, `Pixels` (one) if not given; all over T levels of one clock.
    schedule: curve of the coarsest component, `LogLinear` if not given. ends: share of the T levels after which each,
    coarse to fine, is pure noise and leaves, 1, (K-1)/K .. 1/K if not given: its curve is the schedule's formula for a
    chain of so many levels. curves: or the curves themselves, each as long as its own T. condition: an observation.
    S: rows, shared out evenly over the intervals between two ends, the ends among them; intervals: or their numbers,
    least noise first; indices: or the rows themselves. All T if none is given. terminal_bound: largest signal that a
    component may have left where it ends.
    """

    columns: Tensor

    def __init__(
        self,
        shape: list[int],
        schedule: NoiseSchedule | None = None,
        basis: Basis | None = None,
        ends: list[float] | None = None,
        curves: list[NoiseSchedule] | None = None,
        condition: Condition | None = None,
        S: int | None = None,
        intervals: list[int] | None = None,
        indices: list[int] | None = None,
        terminal_bound: float = TERMINAL_BOUND,
    ) -> None:
        nn.Module.__init__(self)
        check_shape("states.shape", shape)
        self.shape, self.schedule, self.basis = list(shape), schedule or LogLinear(), basis or Pixels()
        self.ends, self.curves, self.condition = ends, curves, condition
        self.intervals, self.indices, self.terminal_bound = intervals, indices, terminal_bound
        self.kind, self.spacing, self.cut = "mapped", "even", None
        if sum(given is not None for given in (intervals, indices)) > 1 or (ends is not None and curves is not None):
            raise InputError("states: give one of intervals and indices, and one of ends and curves")
        made = self._curves()
        chosen = self._choose(S, [len(curve) - 1 for curve in made])
        self.S = len(chosen)
        rows = torch.tensor([0, *chosen])
        table = [torch.full((len(rows),), -math.inf, dtype=torch.float64) for _ in made]
        for column, curve in zip(table, made, strict=True):
            live = rows < len(curve)
            column[live] = curve[rows[live]]
        self._take(torch.stack(table, 1), rows)

    def _curves(self) -> list[Tensor]:
        """Log-SNR of every component of the image at t = 0 .. its end."""
        K, T = self.basis.K, self.schedule.T
        for schedule in (self.schedule, *(self.curves or []), *([self.condition.schedule] if self.condition else [])):
            if schedule is not None and schedule.zero_terminal:
                raise InputError(
                    f"{schedule!r}: in a table of components -inf is where one has left; set zero_terminal: false"
                )
        if self.curves is not None:
            if len(self.curves) != K:
                raise InputError(f"states.curves: {len(self.curves)} for the {K} components of {spec(self.basis)}")
            return [curve.log_snr() for curve in self.curves]
        ends = [1 - k / K for k in range(K)] if self.ends is None else self.ends
        if len(ends) != K or not all(0 < end <= 1 for end in ends):
            raise InputError(f"states.ends: {K} shares of the T levels above 0 and up to 1, coarse to fine, got {ends}")
        return [
            (self.schedule if end == 1 else self.schedule.recomputed(max(1, round(end * T)), rescale=True)).log_snr()
            for end in ends
        ]

    def _choose(self, S: int | None, lengths: list[int]) -> list[int]:
        T = self.schedule.T
        if lengths[0] != T or any(fine > coarse for coarse, fine in pairwise(lengths)):
            raise InputError(
                f"states: components end at levels {lengths} of {T}, coarse to fine; the coarsest must end at {T} and "
                "none after a coarser one, as what is left is an image of lower resolution"
            )
        if self.indices is not None:
            rows = self.indices
            if S is not None and len(rows) != S:
                raise InputError(f"S={S} but {len(rows)} indices are listed; give one of the two")
            if not rows or sorted(set(rows)) != list(rows) or not 1 <= rows[0] <= rows[-1] <= T:
                raise InputError(f"indices must be ascending rows of the chain within 1..{T}, got {rows}")
            if lost := sorted(set(lengths) - set(rows)):
                raise InputError(f"indices: components end at {lost}, which must be among the rows")
            return list(rows)
        cuts = [0, *sorted(set(lengths))]
        if self.intervals is not None:
            counts = self.intervals
            if S is not None and sum(counts) != S:
                raise InputError(f"S={S} but the intervals {counts} have {sum(counts)} rows; give one of the two")
        else:
            S = T if S is None else S
            counts = [S // (len(cuts) - 1) + (k < S % (len(cuts) - 1)) for k in range(len(cuts) - 1)]
            if S == T:
                counts = [hi - lo for lo, hi in pairwise(cuts)]
        room = [hi - lo for lo, hi in pairwise(cuts)]
        if len(counts) != len(room) or any(not 1 <= n <= most for n, most in zip(counts, room, strict=True)):
            raise InputError(
                f"states: {counts} rows for the {len(room)} intervals between levels {cuts}; they have 1 to {room} each"
            )
        chosen = []
        for (lo, hi), n in zip(pairwise(cuts), counts, strict=True):
            chosen += [lo + round((hi - lo) * k / n) for k in range(1, n + 1)]
        return chosen

    def _take(self, table: Tensor, index: Tensor) -> None:
        """Take the columns of the image's components (S+1, K); the condition's are added."""
        self.basis.check(self.shape)
        own, channels = self.basis.K, self.shape[0]
        columns = self.basis.columns(*self.shape[1:])[None]
        if self.condition is not None:
            self.condition.operator.check(self.shape)
            y = self.condition.operator.channels(channels)
            columns = torch.cat([columns.expand(channels, -1, -1), (columns + own).expand(y, -1, -1)])
            table = torch.cat([table, self._observed(table, index, None)], 1)
        self._fill(table, index)
        dead = self.log_snr[:, :own].isneginf().sum(1)
        self._finished: list[int] = dead.tolist()
        self._drawn: list[bool] = self.log_snr[:, own:].isfinite().any(1).tolist()
        self._check_ends(own)
        self.register_buffer("columns", columns, persistent=False)

    def _observed(self, table: Tensor, index: Tensor, sigma_max: float | None) -> Tensor:
        """Columns of y: its curve, finished where the image's component is, or with another largest sigma."""
        assert self.condition is not None
        curve = self.condition.schedule
        if curve is None:
            y = torch.full((len(index),), math.inf, dtype=torch.float64)
        else:
            if curve.T != self.schedule.T:
                raise InputError(f"condition.schedule has T={curve.T} levels, the image's {self.schedule.T}; one clock")
            if sigma_max is not None:
                assert isinstance(curve, Geometric)
                curve = Geometric(curve.T, curve.sigma_min, sigma_max)
            y = curve.log_snr().to(index.device)[index]
        return y[:, None].where(~table.isneginf(), -math.inf)

    def _fill(self, log_snr: Tensor, index: Tensor) -> None:
        if log_snr.isnan().any() or not log_snr[0].isposinf().all():
            raise InputError("a table must be free of NaN and start with the data: log-SNR +inf at row 0")
        before, after = log_snr[:-1], log_snr[1:]
        if (rising := (after >= before) & after.isfinite()).any() or (rising := after > before).any():
            s, k = (int(v) for v in rising.nonzero()[0])
            raise InputError(
                "log-SNR must fall from row to row until a component is finished, which comes once; component "
                f"{k} has {float(before[s, k]):g} at row {s} and {float(after[s, k]):g} at row {s + 1} (index "
                f"{int(index[s + 1])})"
            )
        self._set(log_snr, index)

    def _check_ends(self, own: int) -> None:
        """Every component must be noise where it ends, and none may outlive a coarser one."""
        for k in range(own):
            last = int((~self.log_snr[:, k].isneginf()).sum()) - 1
            coarser = int((~self.log_snr[:, max(0, k - 1)].isneginf()).sum()) - 1
            signal = float(self.a[last, k])
            if signal > self.terminal_bound:
                raise InputError(
                    f"component {k} of {own} (coarse to fine) never dies: at its last row {last} (index "
                    f"{int(self.index[last])}) its signal is {signal:.4g}, above terminal_bound "
                    f"{self.terminal_bound:g}; give its curve more noise at the end"
                )
            if last > coarser:
                raise InputError(f"component {k} lives to row {last}, the coarser {k - 1} to row {coarser} only")
        if self._finished[-1] == own:
            raise InputError(f"no component is left at row {self.S}")

    @classmethod
    def of_table(
        cls, log_snr: Tensor, index: Tensor, schedule: NoiseSchedule, shape: list[int], basis: Basis,
        condition: Condition | None = None, terminal_bound: float = TERMINAL_BOUND,
    ) -> "ComponentStates":  # fmt: skip
        """Return the states of explicit columns (S+1, K) of an image's components, which no file can describe."""
        states = cls.__new__(cls)
        nn.Module.__init__(states)
        states.shape, states.schedule, states.basis, states.condition = list(shape), schedule, basis, condition
        states.ends = states.curves = states.intervals = states.cut = None
        states.S, states.kind, states.spacing, states.indices = len(log_snr) - 1, "mapped", "even", index[1:].tolist()
        states.terminal_bound = terminal_bound
        states._take(log_snr.double(), index.long())
        return states

    def restrict(self, indices: Sequence[int]) -> "ComponentStates":
        """Return the table of these original indices alone; the last row of every interval must be among them."""
        here = self.index[1:].tolist()
        if not indices or set(indices) - set(here):
            missing = sorted(set(indices) - set(here))
            raise InputError(f"indices {missing} are no rows of this table of {self.S} states of T={self.schedule.T}")
        end = float(self.a[self.index.tolist().index(max(indices)), : self.basis.K].max())
        return ComponentStates(
            self.shape, self.schedule, self.basis, self.ends, self.curves, self.condition, indices=sorted(indices),
            terminal_bound=max(self.terminal_bound, end),
        )  # fmt: skip

    def truncate(self, at: int | float) -> "LatentStates":
        """Refuse for several components: what is left would start from no known density."""
        if self.K == 1:
            return super().truncate(at)
        raise InputError("a chain of several components is not cut off: priors are for tables of one column")

    @property
    def layout(self) -> str:
        """What the columns are, for the fingerprint."""
        return self._columns(self.condition)

    @property
    def made_of(self) -> str:
        """Return what a state consists of: its components and its observation, without options of training."""
        return self._columns(self.condition and self.condition.operator)

    def _columns(self, observed: Part | None) -> str:
        parts = [str(identity(spec(part))) for part in (self.basis, observed) if part is not None]
        return CONDITION.join(parts) if self.K > 1 else ""

    @property
    def image_shape(self) -> list[int] | None:
        """(C, H, W) of images."""
        return self.shape

    @property
    def own(self) -> int:
        """Number of the image's components, whose columns come first."""
        return self.basis.K

    @property
    def blocks_of_rows(self) -> list[list[int]]:
        """Rows by what is live there: a network for each."""
        out: list[list[int]] = []
        for s in self.rows:
            if out and self._finished[s] == self._finished[s - 1]:
                out[-1].append(s)
            else:
                out.append([s])
        return out

    def finished(self, rows: Sequence[int]) -> int:
        """How many of the finest components have left at these rows; refuses rows that differ in it."""
        found = sorted({self._finished[s] for s in rows})
        if len(found) > 1:
            shapes = " and ".join(str(self.state_shape(n)) for n in found)
            ends = [block[-1] for block in self.blocks_of_rows]
            raise InputError(
                f"rows {rows[0]}..{rows[-1]} have states of {shapes}: a network is for rows that are alike, the "
                f"intervals that end at rows {ends}; train one for each (SingleState with experts: {len(ends)})"
            )
        return found[0]

    def state_shape(self, finished: int = 0) -> list[int]:
        """(C, H, W) of a state without its finest components, with the observation beside it."""
        c, h, w = self.shape
        extra = self.condition.operator.channels(c) if self.condition else 0
        return [c + extra, h >> finished, w >> finished]

    def shape_at(self, s: int, shape: Sequence[int]) -> list[int]:
        """(C, H, W) of state s."""
        return self.state_shape(self._finished[s])

    def spread(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Values (.., K) by component to (.., C or 1, h, w) for a state of this shape."""
        return values[..., self.columns[:, : shape[-2], : shape[-1]]]

    @property
    def counted(self) -> Tensor:
        """Whether an entry is learned, bool (S+1, K): it has noise, is not finished, and the loss is to have it."""
        alive = self.log_snr.isfinite()
        if self.condition is not None and not self.condition.weight:
            alive[:, self.own :] = False
        return alive

    def reweighted(self, weights: Tensor) -> Tensor:
        """Weights (S+1, K) with the condition's own."""
        if self.condition is None:
            return weights
        return torch.cat([weights[:, : self.own], weights[:, self.own :] * self.condition.weight], 1)

    def components(self, x0: Tensor, item: Tensor | None, finished: int = 0) -> Tensor:
        """State 0 of images x_0 (B, C, H, W): their coefficients, and beside them those of observations of items."""
        if self.condition is not None:
            if item is None:
                raise InputError("what is observed of an image depends on its item number: give one for each")
            x0 = torch.cat([x0, self.condition.operator.observe(x0, item.to(x0.device))], 1)
        return self.basis.forward(self.basis.coarse(x0, finished), finished)

    def to_network(self, x: Tensor, finished: int) -> Tensor:
        """A state as an image of its resolution, by the orthonormal map without scales."""
        return self.basis.isometry.inverse(x, finished)

    def from_network(self, x: Tensor, finished: int) -> Tensor:
        """The inverse of `to_network`."""
        return self.basis.isometry.forward(x, finished)

    def clamp(self, x0: Tensor, bound: float, finished: int) -> Tensor:
        """x0_hat with the pixels of its image within the bound."""
        bound *= 2**finished
        return self.basis.forward(self.basis.inverse(x0, finished).clamp(-bound, bound), finished)

    def picture(self, x: Tensor, finished: int = 0) -> Tensor:
        """A state as an image (B, C, H, W) of full size in its usual range, without the observation."""
        image = self.basis.inverse(x[:, : self.shape[0]], finished) / 2**finished
        return F.interpolate(image, scale_factor=float(2**finished)) if finished else image

    def annealed(self, step: int) -> LatentStates:
        """The table at a step of a training, in which the observation's curve has not reached its end (VS-CMDE).

        1/sigma(n) = 1/sigma_0 + n/M (1/sigma_M - 1/sigma_0) for the largest sigma of y, from the image's to its own.
        """
        c = self.condition
        if c is None or step >= c.anneal:
            return self
        assert isinstance(c.schedule, Geometric)
        begin = c.anneal_from if c.anneal_from is not None else float(torch.exp(-self.log_snr[-1, 0] / 2))
        sigma = 1 / (1 / begin + step / c.anneal * (1 / c.schedule.sigma_max - 1 / begin))
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        own = self.log_snr[:, : self.own]
        other._set(torch.cat([own, self._observed(own, self.index, sigma)], 1), self.index)
        return other

    def needs_noise(self, s: int, r: int) -> bool:
        """Whether components are born at r, or the observation is drawn anew."""
        return self._finished[s] > self._finished[r] or self._drawn[r]

    def begin(self, z: Tensor, given: Tensor | None) -> Tensor:
        """State S of noise z: the image's components are noise, the observation has its own."""
        return self._observe(z, z, self.S, None, given)

    def arrive(self, out: Tensor, z: Tensor | None, s: int, r: int, x: Tensor, given: Tensor | None) -> Tensor:
        """State r from the step that led there from x at s: what is born there is noise, what is given is drawn."""
        if self._finished[s] > self._finished[r]:
            assert z is not None
            born = z.clone()
            born[..., : out.shape[-2], : out.shape[-1]] = out
            out = born
        return self._observe(out, z, r, (x, s), given)

    def _observe(
        self, out: Tensor, z: Tensor | None, r: int, before: tuple[Tensor, int] | None, given: Tensor | None
    ) -> Tensor:
        """Put the observation of row r in its channels."""
        if self.condition is None:
            return out
        assert given is not None
        c, finished = self.shape[0], self._finished[r]
        y0 = torch.cat([torch.zeros(len(given), c, *given.shape[2:]).to(given), given], 1)
        y0 = self.basis.forward(self.basis.coarse(y0, finished), finished)
        if z is None:
            y = y0
        elif before is not None and self.condition.draw == "bridge":
            x, s = before
            mean, variance = posterior(self, y0, grown(x, out.shape), s, r)  # what is born has no past
            y = mean + scale(variance.sqrt(), z)
        else:
            y = noise(self, y0, r, z)
        return torch.cat([out[:, :c], y[:, c:]], 1)
