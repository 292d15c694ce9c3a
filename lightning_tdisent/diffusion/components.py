"""Tables of several columns: components of an image that diffuse at different speeds, and an observation next to them.

All methods of "Non-Uniform Diffusion Models" (2207.09786) are such tables: multi-scale models, whose finer components
reach pure noise first and are dropped from the state, and the conditional estimators CDE, CDiffE, CMDE and VS-CMDE,
whose observation y is one more component. Log-SNR -inf: the component is dropped; +inf: it is free of noise.
"""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.schedules import LogLinear, NoiseSchedule
from lightning_tdisent.diffusion.spaces import Pixels, Space
from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.diffusion.table import TERMINAL_BOUND, Table
from lightning_tdisent.errors import InputError, check_shape


class ComponentStates(LatentStates):
    """Latent states whose components diffuse at different speeds (2207.09786, section 3).

    All components have curves over the T levels of one chain. The rows are all T levels unless S, intervals or indices
    is given.

    shape: (C, H, W) of an image.
    schedule: curve of the coarsest component; `LogLinear` if not given.
    space: splits an image into components; `Pixels` (one component) if not given.
    ends: per component, coarse to fine, the fraction of the T levels after which it is pure noise and is dropped; 1,
        (K-1)/K .. 1/K if not given. Its curve is the schedule's formula for a chain of that many levels.
    curves: instead of ends, the curve of each component; each is as long as its own T.
    observation: the observation of the image, if the model is conditional.
    S: number of rows, distributed evenly over the intervals between two successive ends; the ends are always rows.
    intervals: the number of rows in each interval, lowest noise first.
    indices: the rows themselves, ascending positions 1..T.
    terminal_bound: largest signal that a component may have where it ends.

    Raises InputError for inconsistent arguments, and for schedules with zero terminal SNR or that are not variance
    preserving.
    """

    columns: Tensor

    def __init__(
        self,
        shape: list[int],
        schedule: NoiseSchedule | None = None,
        space: Space | None = None,
        ends: list[float] | None = None,
        curves: list[NoiseSchedule] | None = None,
        observation: Observation | None = None,
        S: int | None = None,
        intervals: list[int] | None = None,
        indices: list[int] | None = None,
        terminal_bound: float = TERMINAL_BOUND,
    ) -> None:
        nn.Module.__init__(self)
        check_shape("states.shape", shape)
        self.shape, self.schedule, self.space = list(shape), schedule or LogLinear(), space or Pixels()
        self.ends, self.curves, self.observation = ends, curves, observation
        self.intervals, self.indices, self.terminal_bound = intervals, indices, terminal_bound
        self.kind, self.spacing, self.cut = "mapped", "even", None
        if sum(given is not None for given in (intervals, indices)) > 1 or (ends is not None and curves is not None):
            raise InputError("states: give one of intervals and indices, and one of ends and curves")
        made = self._curves()
        chosen = self._choose(S, [len(curve) - 1 for curve in made])
        rows = torch.tensor([0, *chosen])
        table = [torch.full((len(rows),), -math.inf, dtype=torch.float64) for _ in made]
        for column, curve in zip(table, made, strict=True):
            live = rows < len(curve)
            column[live] = curve[rows[live]]
        self._take(torch.stack(table, 1), rows)

    def _curves(self) -> list[Tensor]:
        """Return the log-SNR of every component of the image at t = 0 .. its end."""
        K, T = self.space.K, self.schedule.T
        y = self.observation.schedule if self.observation else None
        for schedule in (self.schedule, *(self.curves or []), *([y] if y else [])):
            if schedule.log_snr()[-1].isneginf():
                raise InputError(
                    f"{schedule!r}: in a table of components log-SNR -inf is where one has been dropped; use a "
                    "schedule that keeps some signal (zero_terminal: false)"
                )
            if not bool((schedule.scale() == 1).all()):
                raise InputError(f"{schedule!r}: tables of components are variance preserving, this schedule is not")
        if self.curves is not None:
            if len(self.curves) != K:
                raise InputError(f"states.curves: {len(self.curves)} for the {K} components of {spec(self.space)}")
            return [curve.log_snr() for curve in self.curves]
        ends = [1 - k / K for k in range(K)] if self.ends is None else self.ends
        if len(ends) != K or not all(0 < end <= 1 for end in ends):
            raise InputError(f"states.ends: expected {K} fractions of T in (0, 1], coarse to fine, got {ends}")
        return [
            (self.schedule if end == 1 else self.schedule.recomputed(max(1, round(end * T)), rescale=True)).log_snr()
            for end in ends
        ]

    def _choose(self, S: int | None, lengths: list[int]) -> list[int]:
        T = self.schedule.T
        if lengths[0] != T or any(fine > coarse for coarse, fine in pairwise(lengths)):
            raise InputError(
                f"states: components end at levels {lengths} of {T}, coarse to fine; the coarsest must end at {T} and "
                "none after a coarser one, since the remaining components must form an image of lower resolution"
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
        """Store the columns of the image's components, (S+1, K), and add those of the observation."""
        self.image_shape = self.shape
        self.space.check(self.shape)
        own, channels = self.space.K, self.shape[0]
        columns = self.space.columns(*self.shape[1:])[None]
        if (y := self.observation) is not None:
            y.operator.check(self.shape)
            columns = torch.cat(
                [columns.expand(channels, -1, -1), (columns + own).expand(y.channels(channels), -1, -1)]
            )
            table = torch.cat([table, y.log_snr(table, index, self.schedule.T)], 1)
        self._fill(table, index)
        self._check_ends(own)
        self.register_buffer("columns", columns, persistent=False)

    def _fill(self, log_snr: Tensor, index: Tensor, scale: Tensor | None = None, time: Tensor | None = None) -> None:
        if log_snr.isnan().any() or not log_snr[0].isposinf().all():
            raise InputError("a table must be free of NaN and start with the data: log-SNR +inf at row 0")
        before, after = log_snr[:-1], log_snr[1:]
        if (rising := (after >= before) & after.isfinite()).any() or (rising := after > before).any():
            s, k = (int(v) for v in rising.nonzero()[0])
            raise InputError(
                "log-SNR must fall from row to row until a component is dropped, which happens once; component "
                f"{k} has {float(before[s, k]):g} at row {s} and {float(after[s, k]):g} at row {s + 1} (index "
                f"{int(index[s + 1])})"
            )
        self._set(log_snr, index, scale, time)

    def _check_ends(self, own: int) -> None:
        """Raise InputError if a component has signal left where it ends, or ends after a coarser one."""
        for k in range(own):
            last = int((~self.log_snr[:, k].isneginf()).sum()) - 1
            coarser = int((~self.log_snr[:, max(0, k - 1)].isneginf()).sum()) - 1
            signal = float(self.a[last, k])
            if signal > self.terminal_bound:
                raise InputError(
                    f"component {k} of {own} (coarse to fine) does not reach pure noise: at its last row {last} (index "
                    f"{int(self.index[last])}) its signal is {signal:.4g}, above terminal_bound "
                    f"{self.terminal_bound:g}; give its curve more noise at the end"
                )
            if last > coarser:
                raise InputError(f"component {k} ends at row {last}, the coarser component {k - 1} at row {coarser}")
        if bool(self.log_snr[-1, :own].isneginf().all()):
            raise InputError(f"no component is left at row {self.S}")

    @classmethod
    def of_table(
        cls, log_snr: Tensor, index: Tensor, schedule: NoiseSchedule, shape: list[int], space: Space,
        observation: Observation | None = None, terminal_bound: float = TERMINAL_BOUND,
    ) -> "ComponentStates":  # fmt: skip
        """Return states with explicit log-SNR columns (S+1, K) of an image's components; no file can describe them."""
        states = cls.__new__(cls)
        nn.Module.__init__(states)
        states.shape, states.schedule, states.space, states.observation = list(shape), schedule, space, observation
        states.ends = states.curves = states.intervals = states.cut = None
        states.kind, states.spacing, states.indices = "mapped", "even", index[1:].tolist()
        states.terminal_bound = terminal_bound
        states._take(log_snr.double(), index.long())
        return states

    def restrict(self, indices: Sequence[int]) -> "ComponentStates":
        """Return the table with these original indices alone; the last row of every interval must be among them.

        Raises InputError for an index that is not a row of this table.
        """
        here = self.index[1:].tolist()
        if not indices or set(indices) - set(here):
            missing = sorted(set(indices) - set(here))
            raise InputError(f"indices {missing} are not rows of this table of {self.S} states of T={self.schedule.T}")
        end = float(self.a[self.index.tolist().index(max(indices)), : self.space.K].max())
        return ComponentStates(
            self.shape, self.schedule, self.space, self.ends, self.curves, self.observation, indices=sorted(indices),
            terminal_bound=max(self.terminal_bound, end),
        )  # fmt: skip

    def truncate(self, at: int | float) -> LatentStates:
        """Return rows 1..at of a table of one component.

        Raises InputError for several components: the density of the state at which sampling would start is not known.
        """
        if self.K == 1:
            return super().truncate(at)
        raise InputError("a table of several components cannot be truncated: priors are for tables of one column")


def annealed(states: Table, step: int) -> Table:
    """Return the table of a training step, on which the curve of the observation may depend (VS-CMDE).

    1/sigma(n) = 1/sigma_0 + n/M (1/sigma_M - 1/sigma_0) for the largest sigma of y at step n of M =
    `Observation.anneal`, from sigma_0, ``anneal_from`` or the image's, to sigma_M, that of the observation's schedule.
    """
    y = states.observation
    if y is None or step >= y.anneal:
        return states
    sigma = y.sigma_at(step, float(torch.exp(-states.log_snr[-1, 0] / 2)))
    other = copy.copy(states)
    other._buffers = dict(states._buffers)
    image = states.log_snr[:, : states.image_columns]
    column = y.log_snr(image, states.index, states.schedule.T, sigma)
    other._set(torch.cat([image, column], 1), states.index)
    return other
