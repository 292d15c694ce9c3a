"""The forward process and one reverse step, elementwise in the table of latent states.

x0 in [-1, 1] and eps ~ N(0, I) have shape (B, C, H, W); rows are ints, or int64 tensors of shape (B,).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tdisent.diffusion.states import Coefficient, LatentStates
from lightning_tdisent.errors import InputError


def scale(c: Coefficient, x: Tensor) -> Tensor:
    """Return c x in the dtype of x, whether c is a float or a float64 tensor."""
    return c.to(x.dtype) * x if isinstance(c, Tensor) else c * x


def spread(states: LatentStates, c: Coefficient, x: Tensor) -> Coefficient:
    """A float as it is, coefficients (K,) as what multiplies a state x."""
    return states.spread(c.to(x.device, x.dtype), x.shape) if isinstance(c, Tensor) else c


def grown(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A state with zeros for the components that it does not have yet, which a larger one of this shape has."""
    return F.pad(x, (0, shape[-1] - x.shape[-1], 0, shape[-2] - x.shape[-2])) if x.shape[-2:] != shape[-2:] else x


def noise(states: LatentStates, x0: Tensor, s: int | Tensor, eps: Tensor) -> Tensor:
    """x_s = a_s x_0 + b_s eps (2006.11239, eq. 4)."""
    a, b = states.coefficients(s, x0)
    return scale(a, x0) + scale(b, eps)


class Terms(NamedTuple):
    """Coefficients of a reverse step (see `step`): floats of a table of one column, else float64 (K,) by component."""

    x0: Coefficient
    x: Coefficient
    z: Coefficient = 0.0
    before: Coefficient = 0.0


def transition(states: LatentStates, s: int, r: int, eta: float) -> Terms:
    """Return the coefficients of x_r = c0 x0_hat + cx x_s + cz z for r < s (DDIM, 2010.02502, eq. 12 and 16).

    With (a, b) at s and (c, d) at r: cz = eta (d/b) sqrt(1 - (a/c)^2), cx = sqrt(d^2 - cz^2)/b, c0 = c - a cx.
    eta 0 is deterministic, eta 1 the ancestral posterior of DDPM. Floats of a table of one column, else float64 (K,),
    by component, for `LatentStates.spread`.
    """
    if not 0 <= r < s <= states.S:
        raise InputError(f"a reverse step goes from a row s to a row r < s within 0..{states.S}, got s={s}, r={r}")
    if states.K == 1:
        (a, b), (c, d) = states._rows[s], states._rows[r]
        fresh = eta * d / b * math.sqrt(max(0.0, 1 - (a / c) ** 2))
        keep = d / b * math.sqrt(1 - eta * eta + (eta * a * d / (b * c)) ** 2)
        return Terms(c - a * keep, keep, fresh)
    at, bt, ct, dt = states.a[s], states.b[s], states.a[r], states.b[r]
    fresh_t = eta * dt / bt * (1 - (at / ct).square()).clamp_min(0).sqrt()
    keep_t = dt / bt * (1 - eta * eta + (eta * at * dt / (bt * ct)).square()).sqrt()
    clean, dead = bt == 0, ct == 0  # does not diffuse yet; finished in both rows, and in no state
    keep_t = keep_t.where(~clean, 1.0).where(~dead, 1.0)
    fresh_t = fresh_t.where(~clean & ~dead, 0.0)
    return Terms((ct - at * keep_t).where(~clean & ~dead, 0.0), keep_t, fresh_t)


def step(
    states: LatentStates, c: Terms, x: Tensor, x0_hat: Tensor, before: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """Return x_r = c.x0 x0_hat + c.x x_s + c.before x0_hat_before + c.z z: the reverse step of every sampler.

    c: of `transition` for DDIM and ancestral steps. before: the estimate of the step before, if there was one and the
    sampler looks at it; z ~ N(0, I), wanted where c.z is not zero. The first may be of a smaller state than x, z of a
    larger one.
    """
    out = scale(spread(states, c.x0, x), x0_hat) + scale(spread(states, c.x, x), x)
    if before is not None and nonzero(c.before):
        out = out + scale(spread(states, c.before, x), grown(before, x.shape))
    if z is None and nonzero(c.z) and bool(torch.as_tensor(c.z).any()):
        raise InputError("this step adds fresh noise: pass z")
    if z is not None and nonzero(c.z):
        z = z if z.shape == x.shape else z[..., : x.shape[-2], : x.shape[-1]]
        out = out + scale(spread(states, c.z, x), z)
    return out


def nonzero(c: Coefficient) -> bool:
    """Return whether a coefficient takes part in a step; one by component does."""
    return isinstance(c, Tensor) or c != 0.0


def posterior(states: LatentStates, x0: Tensor, x: Tensor, s: int, r: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_r | x_s, x_0) (2006.11239, eq. 6 and 7, for any r < s).

    With alpha = a_s^2/a_r^2: mean = a_r (1 - alpha)/b_s^2 x_0 + sqrt(alpha) b_r^2/b_s^2 x_s,
    variance = (1 - alpha) b_r^2/b_s^2, which multiplies a state.
    """
    a, b, c, d = states.a[s], states.b[s], states.a[r], states.b[r]
    ratio, beta = a / c, -torch.expm1(2 * (a / c).log())
    kept, lost = (ratio * (d / b).square(), c * beta / b.square())
    variance = beta * (d / b).square()
    clean = b == 0  # does not diffuse
    kept, lost, variance = kept.where(~clean, 1.0), lost.where(~clean, 0.0), variance.where(~clean, 0.0)
    mean = scale(spread(states, lost, x), x0) + scale(spread(states, kept, x), x)
    return mean, states.spread(variance.to(x.device), x.shape)


def to_x0(kind: str, value: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
    """Return x_0 from eps: (x - b eps)/a; from v: a x - b v, v = a eps - b x_0 (2202.00512, app. D)."""
    if kind == "eps":
        return (x - scale(b, value)) / (a.to(x.dtype) if isinstance(a, Tensor) else a)
    if kind == "v":
        return scale(a, x) - scale(b, value)
    return value


def from_x0(kind: str, x0: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
    """Return eps = (x - a x_0)/b or v = (a x - x_0)/b, the inverse of `to_x0`."""
    divisor = b.to(x.dtype) if isinstance(b, Tensor) else b
    if kind == "eps":
        return (x - scale(a, x0)) / divisor
    if kind == "v":
        return (scale(a, x) - x0) / divisor
    return x0
