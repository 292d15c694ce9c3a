"""`CompositeDenoiser`: experts behind the interface of one denoiser."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.table import Coefficient, Table
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.agreement import differing, facts_of, refuse_unfit
from lightning_tdisent.models.residency import OffloadedExpert, Residency
from lightning_tdisent.sampling.denoiser import Denoiser, described
from lightning_tdisent.sampling.guidance import Extras


class CompositeDenoiser(Extras, nn.Module):
    """Denoiser that calls at every row the expert that owns it: composite(x, s) = experts[owner(s)](x, s).

    experts: denoisers with one table, image shape and number of classes, which own every row exactly once.
    fill: rows may be missing, for a preview. A denoiser on the same table that owns them is called there. With
        ``nearest`` the owner of the row r of the nearest log-SNR is called, by x0_hat_s(x) = x0_hat_r(sqrt(a_r / a_s)
        x). `filled` lists these rows.
    allow: fields of `ALLOWED` in which experts may differ; `differs` has the values where they do.
    upto: the last row that is ever used, if the chain starts below S; rows above need no owner.

    Why this scaling: along a principal axis of centred data, of variance v, the ideal estimate at row s is w_s x / a_s
    with w = a^2 v / (a^2 v + b^2), and that of row r at (a_r / a_s)^g x is w_r (a_s / a_r)^(1 - g) x / a_s. To first
    order in d = log(a_s / a_r) it is off by w_s d (1 - g - 2 / (a_s^2 v + b_s^2)) x / a_s: strong axes require g = 1,
    the right signal; those of variance 1 g = -1. Images have both, and g = 1/2 lies between 0 and 1, the best values
    for digits and for large images. Interpreting the raw output with (a_s, b_s) instead passes noise along weak axes.

    Raises InputError for experts that do not fit.
    """

    def __init__(
        self,
        experts: Sequence[Denoiser],
        fill: Denoiser | Literal["nearest"] | None = None,
        allow: Sequence[str] = (),
        upto: int | None = None,
    ) -> None:
        super().__init__()
        facts = [facts_of(e) for e in experts]
        missing = refuse_unfit([f"expert {i}" for i in range(len(experts))], facts, fill is not None, allow, upto)
        self.differs = differing(facts, allow)
        self.states: Table = experts[0].states
        self.shape, self.classes = experts[0].shape, experts[0].classes
        self._owner = {s: (expert, s) for expert in experts for s in expert.rows}
        self.filled: dict[int, str] = {}
        if isinstance(fill, Denoiser) and missing:
            _refuse_filler(fill, experts[0], missing)
            experts = [*experts, fill]
            self._owner |= {s: (fill, s) for s in missing}
            self.filled = dict.fromkeys(missing, "shared")
        elif missing:
            nearest = {s: _nearest(self.states, s, _alike(self.states, s, self._owner)) for s in missing}
            self._owner |= {s: self._owner[r] for s, r in nearest.items()}
            self.filled = {s: f"row {r}" for s, r in nearest.items()}
        self.experts = nn.ModuleList(experts)
        self._slot = experts[0].slot if isinstance(experts[0], OffloadedExpert) else None
        self.cards: list[Any] = []  # of the files that it was loaded from
        self._path: list[int] = []
        self._then: dict[int, OffloadedExpert | None] = {}

    def __repr__(self) -> str:
        return f"CompositeDenoiser({len(self.experts)} experts, {described(self, self.states.rows)})"

    @property
    def residency(self) -> Residency:  # type: ignore[override]
        """Placement of the experts' weights: ``resident``, ``offload`` or ``stream``."""
        return self._slot.residency if self._slot else "resident"

    def expect(self, rows: Sequence[int]) -> None:
        """Announce the rows that will be evaluated, in this order, so that the next expert is prefetched."""
        if self._slot is None or rows == self._path:
            return
        self._path, self._then, then, before = list(rows), {}, None, None
        for s in reversed(rows):
            expert: Any = self.at(s)
            if before is not None and before is not expert:
                then = before
            self._then[s], before = then, expert

    def at(self, s: int) -> Denoiser:
        """Return the owner of row s, or the denoiser that is used in its place."""
        if s not in self._owner:
            raise InputError(f"row {s} is not among the latent rows 1..{self.states.S}")
        return self._owner[s][0]

    def forward(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """Return x0_hat of the owner of row s for a batch of states (B, C, H, W)."""
        expert = self.at(s)
        row = self._owner[s][1]
        if self._slot is not None:
            assert isinstance(expert, OffloadedExpert)
            self._slot.load(expert, self._then.get(s))
        if row != s:
            x = _stretch(self.states, row, s, x) * x
        out: Tensor = expert(x, row, label)
        return out

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """Iterate over all weights; of experts that are not loaded these are meta tensors."""
        if self._slot is None:
            return super().parameters(recurse)
        if self._slot.loaded is None:
            self._slot.load(self.at(self._path[0] if self._path else max(self._owner)))  # type: ignore[arg-type]
        return self._slot.parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._slot is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        self._slot.move(fn)
        self.states._apply(fn)
        for expert in self.experts:
            expert.weights = expert.weights.to(self._slot.device)
        return self


def _nearest(states: Table, s: int, rows: Sequence[int]) -> int:
    """Return the row of the nearest log-SNR, summed over all columns; of two, the one with more noise."""
    log_snr = states.log_snr.clamp(-40, 40)
    return min(rows, key=lambda r: (float((log_snr[r] - log_snr[s]).abs().sum()), -r))


def _alike(states: Table, s: int, rows: Iterable[int]) -> list[int]:
    """Return those rows whose states have the shape of state s; raises InputError if there are none."""
    if not (out := [r for r in rows if states.levels[r] == states.levels[s]]):
        raise InputError(f"row {s} cannot be filled: no expert owns a row whose states have its shape")
    return out


def _stretch(states: Table, row: int, s: int, x: Tensor) -> Coefficient:
    """Return the factor that `CompositeDenoiser` applies to states of row s before another row's expert sees them.

    sqrt(a_row / a_s) for variance-preserving states, 1 where either has no signal, converted to the scales of this
    table.
    """
    a, n = states.on_cpu["a"], states.on_cpu["scale"]
    ratio = (a[row] / n[row]) / (a[s] / n[s])
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
    return states.multiplier(ratio * n[row] / n[s], x)


def _refuse_filler(filler: Denoiser, expert: Denoiser, rows: Sequence[int]) -> None:
    """Raise InputError for a denoiser that cannot serve these rows of an expert's table."""
    mine, theirs = ({k: facts_of(d)[k] for k in ("table", "network input")} for d in (expert, filler))
    if mine != theirs or not set(rows) <= set(filler.rows):
        raise InputError(
            f"what fills rows {list(rows)} must own them, it has {filler.rows}; and be as the experts: {mine}, it is "
            f"{theirs}"
        )
