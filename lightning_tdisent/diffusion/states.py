"""Latent states chosen from the T rows of a noise schedule (2508.14413)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.schedules import Linear, NoiseSchedule
from lightning_tdisent.diffusion.table import TERMINAL_BOUND, Table, round_up, row_of, signal
from lightning_tdisent.errors import InputError


class LatentStates(Table):
    """S latent states chosen from the T rows of a schedule (2508.14413).

    schedule: the full chain; the DDPM linear one if not given.
    S: number of states; all T if not given.
    spacing: which rows of the chain, 1-based: ``even`` k floor(T/S) (31, 62 .. 992 for 32 of 1000, as in the paper),
        ``leading`` 1 + (k-1) floor(T/S), ``trailing`` round(kT/S), ``log_snr`` evenly spaced in log-SNR.
    indices: the rows themselves, ascending in 1..T, instead of S and spacing.
    kind: ``mapped`` looks values up in the T-chain; ``native`` evaluates the formula again for a chain of S levels,
        ``rescaled`` likewise with the betas multiplied by T/S. The last two exist for the ablation.
    terminal_bound: largest fraction of signal a_S / sqrt(a_S^2 + b_S^2) allowed at the last state, where sampling
        starts from pure noise.
    cut: the last row to keep, or a fraction of the rows (see `truncate`), for mapped tables. The attributes `indices`
        and `terminal_bound` are set accordingly.

    Raises InputError for inconsistent arguments, for log-SNRs that do not fall, and for a last signal above the bound.
    """

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        S: int | None = None,
        spacing: Literal["even", "leading", "trailing", "log_snr"] = "even",
        indices: list[int] | None = None,
        kind: Literal["mapped", "native", "rescaled"] = "mapped",
        terminal_bound: float = TERMINAL_BOUND,
        cut: int | float | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule = schedule or Linear()
        self.spacing, self.indices, self.kind, self.terminal_bound = spacing, indices, kind, terminal_bound
        if kind not in ("mapped", "native", "rescaled"):
            raise InputError(f"kind {kind!r}: choose mapped, native or rescaled")
        chosen = _choose(schedule, S, spacing, indices)
        self.cut = None  # `indices` contains its effect, so that a table rebuilt from its arguments is not cut twice
        if cut is not None:
            if kind != "mapped":
                raise InputError(f"cut: {cut} requires kind: mapped, got {kind}")
            chosen = chosen[: row_of(cut, len(chosen))]
            self.indices = chosen
            self.terminal_bound = max(terminal_bound, round_up(signal(schedule.log_snr()[chosen[-1]])))
        rows = index = torch.tensor([0, *chosen])
        if kind != "mapped":
            schedule, rows = schedule.recomputed(len(chosen), rescale=kind == "rescaled"), torch.arange(len(chosen) + 1)
        times = schedule.times()
        time = None if times is None else times[rows]
        self._fill(schedule.log_snr()[rows, None], index, schedule.scale()[rows, None], time)
        self._check_end()

    def _fill(self, log_snr: Tensor, index: Tensor, scale: Tensor | None = None, time: Tensor | None = None) -> None:
        if log_snr.isnan().any() or not log_snr[0].isposinf().all():
            raise InputError("a table must be free of NaN and start with the data: log-SNR +inf at row 0")
        if not (log_snr[1:] < log_snr[:-1]).all():
            s = int((log_snr[1:] >= log_snr[:-1]).any(1).nonzero()[0]) + 1
            raise InputError(
                f"log-SNR must fall from row to row; row {s} (index {int(index[s])}) has {log_snr[s].tolist()} after "
                f"{log_snr[s - 1].tolist()}"
            )
        self._set(log_snr, index, scale, time)

    def _check_end(self) -> None:
        end = signal(self.log_snr[-1])
        if end > self.terminal_bound:
            fix = "a schedule with more noise"
            if self.kind != "mapped":
                fix = "kind: mapped"
            elif self.index[-1] < self.schedule.T:
                end_at = "spacing: trailing, which ends" if self.indices is None else "indices that end"
                fix = f"{end_at} at T, or {fix}"
            raise InputError(
                f"signal left at the last state is {end:.4g}, above terminal_bound {self.terminal_bound:g} "
                f"(S={self.S}, {self.schedule!r}, {self.kind}, index {int(self.index[-1])} of {self.schedule.T}). "
                f"Sampling starts from pure noise there and would come out grey. Use {fix}; or accept it with "
                f"terminal_bound: {round_up(end):g}."
            )

    def restrict(self, indices: Sequence[int]) -> "LatentStates":
        """Return the table with these original indices alone, values unchanged.

        Raises InputError for an index that is not a row of this table.
        """
        here = {int(t): s for s, t in enumerate(self.index.tolist())}
        missing = [t for t in indices if t not in here]
        if missing:
            raise InputError(f"indices {missing} are not rows of this table of {self.S} states of T={self.schedule.T}")
        return self._some([0, *(here[t] for t in sorted(indices))], self.terminal_bound)

    def truncate(self, at: int | float) -> "LatentStates":
        """Return rows 1..at alone, values unchanged; a float up to 1.0 is a fraction of the rows (2206.05173).

        The state at the new last row is not N(0, I), so sampling starts from a `Prior` instead, and the terminal bound
        is raised to the signal there.
        """
        row = row_of(at, self.S)
        return self._some(range(row + 1), max(self.terminal_bound, round_up(signal(self.log_snr[row]))))

    def _some(self, rows: Sequence[int], bound: float) -> "LatentStates":
        rows = [*rows]
        return LatentStates.from_table(
            self.log_snr[rows], self.index[rows], self.schedule, bound, self.scale[rows], self.time[rows]
        )

    @classmethod
    def from_table(
        cls, log_snr: Tensor, index: Tensor, schedule: NoiseSchedule, terminal_bound: float = TERMINAL_BOUND,
        scale: Tensor | None = None, time: Tensor | None = None,
    ) -> "LatentStates":  # fmt: skip
        """Return states with an explicit table (S+1, K) of log-SNRs and these original indices (S+1,).

        scale: sqrt(a^2 + b^2), (S+1, K); 1 if not given.
        time: (S+1,), the time input of networks; the index if not given.
        """
        states = cls.__new__(cls)
        nn.Module.__init__(states)
        states.schedule, states.kind, states.spacing, states.cut = schedule, "mapped", "even", None
        states.indices, states.terminal_bound = index[1:].tolist(), terminal_bound
        states._fill(log_snr.double(), index.long(), scale, time)
        states._check_end()
        return states

    def extra_repr(self) -> str:
        """Return the arguments that determine the rows, for `repr`."""
        return f"S={self.S}, {self.schedule!r}, {self.kind}, {self.spacing}, fingerprint={self.fingerprint}"


def _choose(schedule: NoiseSchedule, S: int | None, spacing: str, indices: list[int] | None) -> list[int]:
    T = schedule.T
    if indices is not None:
        if S is not None and len(indices) != S:
            raise InputError(f"S={S} but {len(indices)} indices are listed; give one of the two")
        if not indices or sorted(set(indices)) != list(indices) or not 1 <= indices[0] <= indices[-1] <= T:
            raise InputError(f"indices must be ascending rows of the chain within 1..{T}, got {indices}")
        return list(indices)
    S = T if S is None else S
    if not 1 <= S <= T:
        raise InputError(f"S={S} states cannot be chosen from a chain of T={T} rows; S must lie in 1..{T}")
    if spacing == "even":
        return [k * (T // S) for k in range(1, S + 1)]
    if spacing == "leading":
        return [1 + k * (T // S) for k in range(S)]
    if spacing == "trailing":
        return [round(k * T / S) for k in range(1, S + 1)]
    if spacing == "log_snr":
        L = schedule.log_snr()[1:]
        if not L.isfinite().all():
            raise InputError(f"spacing log_snr needs a finite log-SNR at T; that of {schedule!r} is -inf")
        want = torch.linspace(float(L[0]), float(L[-1]), S, dtype=torch.float64)
        chosen = [int((L - w).abs().argmin()) + 1 for w in want]
        if S == 1:
            chosen = [T]
        if len(set(chosen)) < S:
            raise InputError(
                f"spacing log_snr picks a row twice at S={S} of T={T}; use fewer states or another spacing"
            )
        return chosen
    raise InputError(f"spacing {spacing!r}: choose even, leading, trailing or log_snr")
