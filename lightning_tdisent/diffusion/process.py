"""The forward process and one reverse step, elementwise in the table of latent states.

Shapes: x0 in [-1, 1] and eps ~ N(0, I) are (B, C, H, W). Rows are ints, or int64 tensors of shape (B,).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tdisent.diffusion.table import Coefficient, Table
from lightning_tdisent.errors import InputError


def noise(states: Table, x0: Tensor, s: int | Tensor, eps: Tensor) -> Tensor:
    """Return x_s = a_s x_0 + b_s eps (2006.11239, eq. 4)."""
    a, b = states.coefficients(s, x0)
    return a * x0 + b * eps


class Terms(NamedTuple):
    """Coefficients of a reverse step (see `step`): floats, or (K,) float64 on the CPU."""

    x0: Coefficient
    x: Coefficient
    z: Coefficient = 0.0
    before: Coefficient = 0.0


def nonzero(c: Coefficient) -> bool:
    """Return whether a coefficient contributes to a step: whether any of its values is not 0."""
    return bool(c.any()) if isinstance(c, Tensor) else c != 0


def transition(states: Table, s: int, r: int, eta: float) -> Terms:
    """Return the coefficients of x_r = c0 x0_hat + cx x_s + cz z for r < s (DDIM, 2010.02502, eq. 12 and 16).

    With (a, b) at s, (c, d) at r and q = (a d) / (b c), the square root of SNR(s) / SNR(r), for any positive pairs:
    cz = eta d sqrt(1 - q^2), cx = sqrt(d^2 - cz^2) / b, c0 = c - a cx. eta 0 is deterministic, eta 1 the ancestral
    posterior of DDPM.
    """
    if not 0 <= r < s <= states.S:
        raise InputError(f"a reverse step goes from a row s to a row r < s within 0..{states.S}, got s={s}, r={r}")
    (a, b), (c, d) = ((states.on_cpu["a"][row], states.on_cpu["b"][row]) for row in (s, r))
    q = a * d / (b * c)
    cz = eta * d * (1 - q.square()).clamp_min(0).sqrt()
    cx = d / b * (1 - eta * eta + (eta * q).square()).sqrt()
    noise_free, dropped = b == 0, c == 0  # noise-free in both rows; a component dropped at r is in neither state
    cx = cx.where(~noise_free & ~dropped, 1.0)
    c0 = (c - a * cx).where(~noise_free & ~dropped, 0.0)
    cz = cz.where(~noise_free & ~dropped, 0.0)
    return Terms(c0, cx, cz)


def step(
    states: Table, c: Terms, x: Tensor, x0_hat: Tensor, before: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """Return x_r = c.x0 x0_hat + c.x x_s + c.before x0_hat_before + c.z z: the reverse step of every sampler.

    c: from `transition` for DDIM and ancestral steps.
    x0_hat: the estimate at row s.
    before: the estimate of the previous step, None at the first one; it may be of a smaller state than x.
    z: noise ~ N(0, I), which may be of a larger state than x; raises InputError if it is missing and c.z is not 0.
    """
    out = states.multiplier(c.x0, x) * x0_hat + states.multiplier(c.x, x) * x
    if before is not None and nonzero(c.before):
        out = out + states.multiplier(c.before, x) * padded(before, x.shape)
    if nonzero(c.z):
        if z is None:
            raise InputError("this step adds fresh noise: pass z")
        part = z if z.shape == x.shape else z[..., : x.shape[-2], : x.shape[-1]]
        out = out + states.multiplier(c.z, x) * part
    return out


def padded(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad a state with zeros to the height and width of a larger one."""
    return F.pad(x, (0, shape[-1] - x.shape[-1], 0, shape[-2] - x.shape[-2])) if x.shape[-2:] != shape[-2:] else x


def posterior(states: Table, x0: Tensor, x: Tensor, s: int, r: int) -> tuple[Tensor, Coefficient]:
    """Return the mean and the variance of q(x_r | x_s, x_0) (2006.11239, eq. 6 and 7, for any r < s and any table)."""
    c = transition(states, s, r, 1.0)
    mean = states.multiplier(c.x0, x) * x0 + states.multiplier(c.x, x) * x
    return mean, states.multiplier(c.z * c.z, x)


def first_state(states: Table, z: Tensor, y: Tensor | None = None) -> Tensor:
    """Return the state at row S from noise z ~ N(0, I): n z with n = sqrt(a^2 + b^2).

    y: observation (B, C', H, W) of a conditional model, which is drawn for row S into its channels.
    """
    x = states.multiplier(states.on_cpu["scale"][states.S], z) * z
    return x if y is None else observed(states, x, z, states.S, None, y)


def arrive(states: Table, out: Tensor, z: Tensor | None, s: int, r: int, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return the state at row r, from the result ``out`` of the step from x at row s.

    Components that are dropped at s but not at r are added as noise z, which is required if `needs_noise` returns True;
    the channels of an observation y are drawn for r.
    """
    if states.levels[s] > states.levels[r]:
        assert z is not None
        new = (states.multiplier(states.on_cpu["scale"][r], z) * z).clone()
        new[..., : out.shape[-2], : out.shape[-1]] = out
        out = new
    return out if y is None else observed(states, out, z, r, (x, s), y)


def needs_noise(states: Table, s: int, r: int) -> bool:
    """Return whether `arrive` needs noise at row r for a step from row s."""
    y = states.on_cpu["log_snr"][r, states.image_columns :]
    return states.levels[s] > states.levels[r] or bool(y.isfinite().any())


def observed(
    states: Table, x: Tensor, z: Tensor | None, r: int, before: tuple[Tensor, int] | None, y: Tensor
) -> Tensor:
    """Return state x of row r with its observation channels drawn for that row.

    z: noise of row r; None: y is noise-free.
    before: state and row that the step came from, None at the start.
    y: the noise-free observation (B, C', H, W).
    """
    assert states.observation is not None
    c, level = x.shape[1] - y.shape[1], states.levels[r]
    y0 = states.space.encode(torch.cat([torch.zeros(len(y), c, *y.shape[2:]).to(y), y], 1), level)
    if z is None:
        new = y0
    elif before is not None and states.observation.draw == "bridge":
        # components that are new at r have no value in the state before: 0
        mean, variance = posterior(states, y0, padded(before[0], x.shape), before[1], r)
        new = mean + variance**0.5 * z
    else:
        new = noise(states, y0, r, z)
    return torch.cat([x[:, :c], new[:, c:]], 1)
