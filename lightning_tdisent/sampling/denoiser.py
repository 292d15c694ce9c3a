"""`Denoiser`: (x, s) -> x0_hat. Baseline, expert and composite are all denoisers; samplers use no other interface."""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.components import annealed
from lightning_tdisent.diffusion.objectives import Objective
from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.network import Network, evaluating


class DenoiserProtocol(Protocol):
    """Interface that samplers use: a table, an image shape, and x0_hat at one row for a batch of states."""

    states: Table
    shape: list[int]
    classes: int | None

    def __call__(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """Return x0_hat for x at row s in 1..S, both states (B, C, H, W)."""

    def at(self, s: int) -> "Denoiser":
        """Return the denoiser of one network that is used at row s."""

    def parameters(self) -> Iterable[Tensor]:
        """Iterate over all weights."""


class Denoiser(nn.Module):
    """A network with its objective and the rows of the table that it was trained for.

    network: takes states of all rows owned, which must have one shape.
    objective: what the raw output of the network predicts, and its loss weights.
    states: the table.
    rows: the rows owned, ascending in 1..S; all if not given.

    Only the network has weights, so a state dict is the network's with the prefix ``network.``. Raises InputError for
    rows outside the table, states of another shape than the network takes, and tables that the objective does not
    support.
    """

    weights: Tensor
    _now: tuple[Table, Tensor] | None

    def __init__(self, network: Network, objective: Objective, states: Table, rows: list[int] | None = None) -> None:
        super().__init__()
        objective.check(states)
        self.rows = states.rows if rows is None else list(rows)
        strange = sorted(set(self.rows) - set(states.rows))
        if strange or not self.rows:
            raise InputError(f"rows {strange or '[]'} are not among the latent rows 1..{states.S}")
        self.network, self.objective, self.states = network, objective, states
        self._level = states.level(self.rows)
        self.shape, self.classes = states.image_shape or network.shape, network.classes
        if network.shape != (asked := states.shape_at(self.rows[0], network.shape)):
            raise InputError(f"the network takes {network.shape}, states of rows {_short(self.rows)} are {asked}")
        self.register_buffer("weights", objective.weights(states), persistent=False)
        learned = states.spread(states.learned[self.rows[0]], network.shape).expand(network.shape)
        self._per_learned = math.prod(network.shape) / int(learned.sum())  # corrects the mean of a loss
        self.cards: list[Any] = []  # of the files that it was loaded from
        self._now = None
        self._time: list[int] | list[float] = states.time.tolist()
        self._owned = frozenset(self.rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weights = self.weights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weights = weights.to(self.weights.device)  # like the table: follows devices, never dtypes
        return self

    def __repr__(self) -> str:
        return f"Denoiser({type(self.network).__name__}, {described(self, self.rows)})"

    def at(self, s: int) -> "Denoiser":
        """Return self; raise InputError for a row that this denoiser does not own."""
        if s not in self._owned:
            raise InputError(
                f"row {s} is not owned by this denoiser, which has rows {_short(self.rows)}; "
                "compose it with the experts of the other rows"
            )
        return self

    def anneal(self, step: int) -> None:
        """Use the annealed table of a training step in `loss`; see `diffusion.components.annealed`."""
        now = annealed(self.states, step)
        if now is not self.states:
            self._now = (now, self.objective.weights(now).to(self.weights.device))
        else:
            self._now = None

    def forward(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """Return x0_hat at row s for a batch of states (B, C, H, W); the network is in eval mode during the call.

        label: int64 (B,), or None. Raises InputError for a row that is not owned.
        """
        self.at(s)
        dtype = next(iter(self.network.parameters()), x).dtype
        seen = x.to(dtype) if dtype in (torch.float16, torch.bfloat16) else x
        time = None
        if self.network.sees_state:
            time = torch.full((len(x),), self._time[s], device=x.device)
        with evaluating(self.network) if self.network.training else contextlib.nullcontext():
            raw = self._raw(seen, time, label).to(x.dtype)
        return self.objective.x0(raw, *self.states.normalised(s, x))

    def _raw(self, x: Tensor, time: Tensor | None, label: Tensor | None) -> Tensor:
        space = self.states.space
        return space.from_network(self.network(space.to_network(x, self._level), time, label), self._level)

    def encode(self, x0: Tensor, item: Tensor | None = None) -> Tensor:
        """Return state 0 of images (B, C, H, W) at the resolution of the rows owned: see `Table.encode`."""
        return self.states.encode(x0, item, self._level)

    def loss(self, x0: Tensor, s: Tensor, eps: Tensor, label: Tensor | None = None) -> Tensor:
        """Return weight(s) mean (raw(x_s) - target)^2 per sample (2508.14413, eq. 4 with eps and Constant).

        x0: state 0 (B, C, H, W), from `encode`.
        s: int64 (B,), rows owned.
        eps: noise (B, C, H, W).
        label: int64 (B,), or None.

        Returns float32 (B,). The mean is over the learned values: not over components that are dropped or free of
        noise.
        """
        states, weights = self._now or (self.states, self.weights)
        x = noise(states, x0, s, eps)
        raw = self._raw(x, states.time[s] if self.network.sees_state else None, label)
        _, a, b = states.normalised(s, x)
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        error = (raw - self.objective.target(x0, eps, a, b)).float().square()
        weight = states.spread(weights[s].to(error.dtype), error.shape)
        loss = (weight * error).mean((1, 2, 3))
        return loss if self._per_learned == 1 else loss * self._per_learned

    def restrict(self, states: Table) -> "Denoiser":
        """Return the same network on a table whose rows are rows of this one with the same values.

        Raises InputError for a table with other values.
        """
        here = self.states.restrict(states.index[1:].tolist())
        if here.fingerprint != states.fingerprint:
            raise InputError(
                f"the table asked for ({states.fingerprint}) has other values at its indices than this model's "
                f"({here.fingerprint}); both must come from one schedule and be mapped"
            )
        return Denoiser(self.network, self.objective, states)


def described(model: DenoiserProtocol, rows: list[int]) -> str:
    """Return rows, shape, classes and number of weights of a model in a few words."""
    classes = f", {model.classes} classes" if model.classes else ""
    weights = sum(p.numel() for p in model.parameters())
    return f"rows {_short(rows)} of {model.states.S}, images {model.shape}{classes}, {weights:,} weights"


def _short(rows: list[int]) -> str:
    return f"{rows[0]}..{rows[-1]}" if len(rows) > 4 else str(rows)
