"""The table that every method of this project is made of.

Rows are latent states 0..S (0 is the data), columns are K components of the data (K = 1: all of it), an entry is the
log-SNR L. With a = sqrt(sigmoid(L)) and b = sqrt(sigmoid(-L)) a state is x_s = a_s x_0 + b_s eps. float64 throughout.

The file is long because tables of components (`components`) answer for more, and the questions stand here.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.schedules import Linear, NoiseSchedule
from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError

Coefficient = float | Tensor


TERMINAL_BOUND = 0.01  # of the signal at a last row from which sampling starts as from pure noise
CONDITION = " | "  # in a layout, before what a condition adds


class LatentStates(Part, nn.Module):
    """S latent states chosen from the T rows of a schedule (2508.14413).

    schedule: the full chain; the DDPM linear one if not given.
    S: number of states; all T if not given.
    spacing: which rows of the chain, 1-based: ``even`` k floor(T/S) (31, 62 .. 992 for 32 of 1000: the paper's),
        ``leading`` 1 + (k-1) floor(T/S), ``trailing`` round(kT/S), ``log_snr`` evenly spaced in log-SNR.
    indices: the rows themselves, ascending, instead of S and spacing.
    kind: ``mapped`` looks values up in the T-chain; ``native`` evaluates the formula again for a chain of S levels,
        ``rescaled`` likewise with the betas times T/S. The last two exist for the ablation.
    cut: the last row kept, or a share of the rows (see `truncate`), of a mapped table: `indices` and the bound follow.
    terminal_bound: largest signal coefficient a_S allowed at the last state, where sampling starts from pure noise.

    Attributes: ``log_snr``, ``a``, ``b`` (S+1, K) float64; ``index`` (S+1,) int64, the original index in the T-chain.
    The buffers follow devices but never dtypes: ``module.to(torch.bfloat16)`` leaves the table as it is.
    """

    log_snr: Tensor
    a: Tensor
    b: Tensor
    index: Tensor

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
        self.cut = None  # it is in the indices: a table that is built again has them already
        if cut is not None:
            if kind != "mapped":
                raise InputError(f"cut {cut} is for mapped tables, this one is {kind}")
            chosen = chosen[: row_of(cut, len(chosen))]
            self.indices = chosen
            end = float(torch.sigmoid(schedule.log_snr()[chosen[-1]]).sqrt())
            self.terminal_bound = max(terminal_bound, _round_up(end) if end > 0 else 0.0)
        self.S = len(chosen)
        if kind == "mapped":
            table = schedule.log_snr()[torch.tensor([0, *chosen])]
        else:
            table = schedule.recomputed(self.S, rescale=kind == "rescaled").log_snr()
        self._fill(table[:, None], torch.tensor([0, *chosen]))
        self._check_end()

    def _fill(self, log_snr: Tensor, index: Tensor) -> None:
        if log_snr.isnan().any() or not log_snr[0].isposinf().all():
            raise InputError("a table must be free of NaN and start with the data: log-SNR +inf at row 0")
        if not (log_snr[1:] < log_snr[:-1]).all():
            s = int((log_snr[1:] >= log_snr[:-1]).any(1).nonzero()[0]) + 1
            raise InputError(
                f"log-SNR must fall from row to row; row {s} (index {int(index[s])}) has {log_snr[s].tolist()} after "
                f"{log_snr[s - 1].tolist()}"
            )
        self._set(log_snr, index)

    def _set(self, log_snr: Tensor, index: Tensor) -> None:
        for name, value in {
            "log_snr": log_snr,
            "a": torch.sigmoid(log_snr).sqrt(),
            "b": torch.sigmoid(-log_snr).sqrt(),
            "index": index,
        }.items():
            self.register_buffer(name, value, persistent=False)
        one = zip(self.a[:, 0], self.b[:, 0], strict=True) if self.K == 1 else ()
        self._rows = [(float(a), float(b)) for a, b in one]

    def _check_end(self) -> None:
        end = float(self.a[-1].max())
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
                f"terminal_bound: {_round_up(end):g}."
            )

    @property
    def K(self) -> int:
        """Number of columns."""
        return self.log_snr.shape[1]

    @property
    def rows(self) -> list[int]:
        """The latent rows 1..S."""
        return list(range(1, self.S + 1))

    @property
    def fingerprint(self) -> str:
        """Hash of the table to 8 significant digits: machines differ in the last bits of a logarithm."""
        rows = zip(self.index.tolist(), self.log_snr.tolist(), strict=True)
        text = ";".join(f"{t}:" + ",".join(f"{L:.8g}" for L in row) for t, row in rows) + self.layout
        return digest(text)[:16]

    def coefficients(self, s: int | Tensor, x: Tensor | None = None) -> tuple[Coefficient, Coefficient]:
        """Return (a_s, b_s): two Python floats for one row of a K = 1 table, else tensors that multiply states.

        s: a row 0..S, or int64 rows of shape (B,); x: the state they are for, (B, C, H, W), whose dtype they have;
        float64 (.., K, 1, 1), K = 1 or C, if not given.
        """
        if isinstance(s, int) and self.K == 1:
            return self._rows[s]
        a, b = self.a[s], self.b[s]
        if x is None:
            if self.image_shape is not None:
                raise InputError("coefficients of components multiply a state: say which")
            return a[..., None, None], b[..., None, None]
        return self.spread(a.to(x.dtype), x.shape), self.spread(b.to(x.dtype), x.shape)

    # What follows is trivial for tables of one column, or one a channel; `components.ComponentStates` has the rest.
    condition: Any = None

    @property
    def image_shape(self) -> list[int] | None:
        """(C, H, W) of images, where states are of other shapes."""
        return None

    @property
    def own(self) -> int:
        """Number of the columns that are the image's, and no condition's."""
        return self.K

    @property
    def layout(self) -> str:
        """What the columns are, for the fingerprint."""
        return ""

    @property
    def made_of(self) -> str:
        """Return what a state consists of: its components and its observation, without options of training."""
        return ""

    def spread(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Values (.., K) by component to what multiplies a state (B, C, H, W) of this shape."""
        return values[..., None, None]

    @property
    def counted(self) -> Tensor:
        """Whether an entry is learned, bool (S+1, K)."""
        return torch.ones_like(self.log_snr, dtype=torch.bool)

    def reweighted(self, weights: Tensor) -> Tensor:
        """Weights (S+1, K) of the losses, where components have some of their own."""
        return weights

    @property
    def blocks_of_rows(self) -> list[list[int]]:
        """Rows whose states are alike, so that one network can answer for them: all."""
        return [self.rows]

    def finished(self, rows: Sequence[int]) -> int:
        """How many components are finished at these rows, and have left their states."""
        return 0

    def shape_at(self, s: int, shape: Sequence[int]) -> list[int]:
        """(C, H, W) of state s of images of this shape."""
        return list(shape)

    def components(self, x0: Tensor, item: Tensor | None, finished: int = 0) -> Tensor:
        """State 0 of images x_0 (B, C, H, W), the items int64 (B,) of their data set."""
        return x0

    def to_network(self, x: Tensor, finished: int) -> Tensor:
        """A state as a network sees it."""
        return x

    def from_network(self, x: Tensor, finished: int) -> Tensor:
        """What a network says, as a state."""
        return x

    def clamp(self, x0: Tensor, bound: float, finished: int) -> Tensor:
        """x0_hat within the bound."""
        return x0.clamp(-bound, bound)

    def picture(self, x: Tensor, finished: int = 0) -> Tensor:
        """A state as an image (B, C, H, W)."""
        return x

    def annealed(self, step: int) -> "LatentStates":
        """The table that a step of a training uses."""
        return self

    def needs_noise(self, s: int, r: int) -> bool:
        """Whether arriving at r from s takes noise besides that of the step."""
        return False

    def begin(self, z: Tensor, given: Tensor | None) -> Tensor:
        """State S of noise z."""
        return z

    def arrive(self, out: Tensor, z: Tensor | None, s: int, r: int, x: Tensor, given: Tensor | None) -> Tensor:
        """State r of the step that led there from x at s."""
        return out

    def blocks(self, owners: int) -> list[list[int]]:
        """Owner map: rows 1..S split into contiguous blocks, sizes as equal as possible, low noise first."""
        return split_rows([len(block) for block in self.blocks_of_rows], owners)

    def restrict(self, indices: Sequence[int]) -> "LatentStates":
        """Return the table of these original indices alone, values unchanged; refuses an index that is no row here."""
        here = {int(t): s for s, t in enumerate(self.index.tolist())}
        missing = [t for t in indices if t not in here]
        if missing:
            raise InputError(f"indices {missing} are no rows of this table of {self.S} states of T={self.schedule.T}")
        rows = [0, *(here[t] for t in sorted(indices))]
        return LatentStates.from_table(self.log_snr[rows], self.index[rows], self.schedule, self.terminal_bound)

    def truncate(self, at: int | float) -> "LatentStates":
        """Return rows 1..at alone, values unchanged; a float up to 1.0 is a share of the rows (2206.05173).

        What sampling starts from there is no N(0, I) any more: a `Prior` takes its place. The terminal bound goes.
        """
        row = row_of(at, self.S)
        kept, end = row + 1, float(self.a[row].max())
        bound = max(self.terminal_bound, _round_up(end) if end > 0 else 0.0)
        return LatentStates.from_table(self.log_snr[:kept], self.index[:kept], self.schedule, bound)

    @classmethod
    def from_table(
        cls, log_snr: Tensor, index: Tensor, schedule: NoiseSchedule, terminal_bound: float = TERMINAL_BOUND
    ) -> "LatentStates":
        """Return the states of an explicit table (S+1, K) of log-SNRs with these original indices (S+1,)."""
        states = cls.__new__(cls)
        nn.Module.__init__(states)
        states.schedule, states.S, states.kind = schedule, len(log_snr) - 1, "mapped"
        states.spacing, states.indices, states.terminal_bound = "even", index[1:].tolist(), terminal_bound
        states.cut = None
        states._fill(log_snr.double(), index.long())
        states._check_end()
        return states

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0, device=self.a.device)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        return self

    def extra_repr(self) -> str:
        """Show where the rows come from."""
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
            raise InputError("spacing log_snr needs a finite log-SNR at T; zero_terminal makes it -inf")
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


def split_rows(sizes: Sequence[int], owners: int) -> list[list[int]]:
    """Owner map of contiguous rows 1.., as equal as possible, for runs of rows of these sizes that are alike.

    One owner a row, or as many in each run: no owner has rows of two. Raises InputError for other numbers.
    """
    S = sum(sizes)
    if not isinstance(owners, int) or not 1 <= owners <= S:
        raise InputError(f"experts: {owners} owners cannot share {S} rows; choose 1..{S}")
    each = [*sizes] if owners == S else [owners // len(sizes)] * len(sizes)
    if sum(each) != owners or any(n > size for n, size in zip(each, sizes, strict=True)):
        raise InputError(
            f"experts: {owners} owners cannot share the intervals of {list(sizes)} rows, as no network is for rows of "
            f"two; choose {S}, or a multiple of {len(sizes)}"
        )
    out, begin = [], 1
    for n, size in zip(each, sizes, strict=True):
        cut = [begin + round(k * size / n) for k in range(n + 1)]
        out += [list(range(lo, hi)) for lo, hi in pairwise(cut)]
        begin += size
    return out


def row_of(at: int | float, S: int) -> int:
    """The row of 1..S that a row, or a share of them in float, means."""
    row = round(at * S) if isinstance(at, float) and abs(at) <= 1 else at
    if isinstance(row, bool) or not isinstance(row, (int, float)) or row not in range(1, S + 1):
        raise InputError(f"a cut at {at} is none of the rows 1..{S}, nor a share of them above 0 and up to 1")
    return int(row)


def _round_up(value: float) -> float:
    """Round up to two significant digits, so that the advice given is enough."""
    scale = 10.0 ** (1 - int(f"{value:e}".split("e")[1]))
    return -(-value * scale // 1) / scale
