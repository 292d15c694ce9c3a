"""`Denoiser`: (x, s) -> x0_hat. Baseline, expert and composite are all denoisers; samplers know nothing else."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.objectives import Objective
from lightning_tdisent.diffusion.process import noise, scale
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.network import Network


class Denoises(Protocol):
    """What a sampler needs: a table, an image shape, and x0_hat at one row of the table for a whole batch."""

    states: LatentStates
    shape: list[int]
    classes: int | None

    def __call__(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """Return x0_hat (B, C, H, W) for x at row s in 1..S."""

    def at(self, s: int) -> "Denoiser":
        """Return the denoiser of one network that answers for row s."""

    def parameters(self) -> Iterable[Tensor]:
        """All weights."""


class Denoiser(nn.Module):
    """A network, what its output means, and the rows of the table it was trained for.

    rows: the rows owned, ascending in 1..S; all if not given. Only the network has weights, so a state dict is the
    network's with the prefix ``network.``.
    """

    weights: Tensor

    def __init__(
        self, network: Network, objective: Objective, states: LatentStates, rows: list[int] | None = None
    ) -> None:
        super().__init__()
        objective.check(states)
        self.rows = states.rows if rows is None else list(rows)
        strange = sorted(set(self.rows) - set(states.rows))
        if strange or not self.rows:
            raise InputError(f"rows {strange or '[]'} are not among the latent rows 1..{states.S}")
        self.network, self.objective, self.states = network, objective, states
        self.register_buffer("weights", objective.weights(states), persistent=False)
        self.shape, self.classes = network.shape, network.classes
        self._index: list[int] = states.index.tolist()
        self._owned = frozenset(self.rows)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        weights = self.weights
        super()._apply(fn, recurse)
        self.weights = weights.to(self.weights.device)  # as the table: follows devices, never dtypes
        return self

    def at(self, s: int) -> "Denoiser":
        """Return self, refusing a row this denoiser does not own."""
        if s not in self._owned:
            raise InputError(
                f"row {s} is not owned by this denoiser, which has rows {_short(self.rows)}; "
                "compose it with the experts of the other rows"
            )
        return self

    def forward(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """x0_hat at row s, which must be owned, for the whole batch."""
        self.at(s)
        a, b = self.states.coefficients(s)
        index = None
        if self.network.sees_state:
            index = torch.full((len(x),), self._index[s], device=x.device)
        return self.objective.x0(self.network(x, index, label), x, a, b)

    def loss(self, x0: Tensor, s: Tensor, eps: Tensor, label: Tensor | None = None) -> Tensor:
        """weight(s) mean (raw(x_s) - target)^2, one number per sample (2508.14413, eq. 4 with eps and Constant).

        x0 in [-1, 1] and eps (B, C, H, W), s int64 (B,) rows owned; returns float32 (B,).
        """
        a, b = (c.to(x0.dtype) for c in self.states.coefficients(s))  # type: ignore[union-attr]
        x = noise(self.states, x0, s, eps)
        raw = self.network(x, self.states.index[s] if self.network.sees_state else None, label)
        error = (raw - self.objective.target(x0, eps, a, b)).float().square()
        weight = self.weights[s][..., None, None]
        return scale(weight, error).mean((1, 2, 3))

    def restrict(self, states: LatentStates) -> "Denoiser":
        """Return the same network on a table whose rows are rows of this one with the same values."""
        here = self.states.restrict(states.index[1:].tolist())
        if here.fingerprint != states.fingerprint:
            raise InputError(
                f"the table asked for ({states.fingerprint}) has other values at its indices than this model's "
                f"({here.fingerprint}); both must come from one schedule and be mapped"
            )
        return Denoiser(self.network, self.objective, states)


def _short(rows: list[int]) -> str:
    return f"{rows[0]}..{rows[-1]}" if len(rows) > 4 else str(rows)


class Guided:
    """Classifier-free guidance: x0_u + scale (x0_c - x0_u), both from the owner of the row (2207.12598, eq. 6).

    The formula of eps holds for x0 as it stands, since at one row x0_hat is affine in eps_hat. scale, their 1 + w, is
    1 for the plain conditional model and 0 for the unconditional one; it costs two network evaluations a step.
    """

    def __init__(self, denoiser: Denoises, scale: float) -> None:
        if denoiser.classes is None:
            raise InputError("guidance needs a class-conditional model: set classes: on its network")
        self.denoiser, self.scale = denoiser, scale
        self.states, self.shape, self.classes = denoiser.states, denoiser.shape, denoiser.classes
        self.at, self.parameters = denoiser.at, denoiser.parameters

    def __call__(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """x0_hat with guidance; needs labels."""
        if label is None:
            raise InputError("guidance needs labels")
        assert self.classes is not None
        both = torch.cat([label, torch.full_like(label, self.classes)])
        cond, uncond = self.denoiser(torch.cat([x, x]), s, both).chunk(2)
        return uncond + self.scale * (cond - uncond)
