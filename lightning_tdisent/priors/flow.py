"""A normalising flow of the package normflows: a density learned by gradients."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.priors.prior import Prior, normal_log_prob


class Flow(Prior):
    """Glow (1807.03039), the auxiliary of 2206.05173 for CIFAR-10: log p(x) = log q(z) + log |det dz/dx|, z = f(x).

    levels: number of scales, 0 to 16. At each level the image is squeezed by two; at each level except the last, half
    of the channels are split off. Sides must be divisible by 2^levels. With 0 levels the flow acts on the flat vector,
    for data without spatial structure. blocks: number of blocks in each level, each of an ActNorm, an invertible linear
    map of the channels and an affine coupling; hidden: channels inside the network of a coupling.

    q is a Gaussian with a mean and a variance for each value. The coupling networks of a new flow return zeros;
    `initialise` sets its ActNorms from data. Without ``shape`` no module is created before `build`.
    """

    learned = True

    def __init__(self, shape: Sequence[int] | None = None, levels: int = 2, blocks: int = 4, hidden: int = 64) -> None:
        super().__init__(shape)
        self.levels, self.blocks, self.hidden = levels, blocks, hidden
        if not 0 <= levels <= 16 or min(blocks, hidden) < 1:
            raise InputError(
                f"prior Flow: levels {levels} must be 0 to 16, blocks {blocks} and hidden {hidden} at least 1"
            )
        self.flow: Any = None
        if shape is not None:
            self.build(shape)

    def build(self, shape: Sequence[int]) -> None:
        """Create the modules for x of shape (C, H, W).

        Raises InputError for sides that cannot be squeezed, and Unavailable without normflows.
        """
        self.shape = list(shape)
        C, H, W = self.shape
        if self.levels == 0 and self.size < 2:
            raise InputError(f"prior Flow: couplings need at least 2 values, the shape {self.shape} has {self.size}")
        if H % 2**self.levels or W % 2**self.levels:
            raise InputError(
                f"prior Flow: {self.levels} levels need sides that are divisible by {2**self.levels}, the shape is "
                f"{self.shape}; set levels to {_most(H, W)} or less"
            )
        try:
            import normflows
        except ImportError:
            raise Unavailable("prior Flow needs normflows: pip install 'lightning_tdisent[prior]'") from None
        make = normflows.flows
        levels, merges, latents = [], [], []
        for i in range(self.levels):  # coarsest first; all channels not split off before pass through it
            c = C * 2 ** (self.levels + 1 - i)
            # without the LU form of the linear map, which uses a deprecated function of torch
            glow = [make.GlowBlock(c, self.hidden, scale_map="sigmoid", use_lu=False) for _ in range(self.blocks)]
            levels.append([*glow, make.Squeeze()])
            side = 2 ** (self.levels - i)
            latents.append([c // 2 if i else c, H // side, W // side])
            merges += [make.Merge()] if i else []
        if self.levels == 0:
            latents.append([self.size])
            levels.append([part for _ in range(self.blocks) for part in self._vector_block(normflows)])
        self.latents = latents
        base = [normflows.distributions.DiagGaussian(latent) for latent in latents]
        self.flow = normflows.MultiscaleFlow(base, levels, merges, class_cond=False)
        self._set_initialised(True)

    def _vector_block(self, normflows: Any) -> list[nn.Module]:
        """Return the modules of one block for flat vectors, the counterpart of a Glow block."""
        make, D = normflows.flows, self.size
        network = normflows.nets.MLP([(D + 1) // 2, self.hidden, self.hidden, 2 * (D // 2)], init_zeros=True)
        linear = make.mixing.InvertibleAffine(D, use_lu=False)
        return [make.AffineCouplingBlock(network, scale_map="sigmoid"), linear, make.ActNorm(D)]

    def _norms(self) -> list[Any]:
        return [m for m in self.modules() if hasattr(m, "data_dep_init_done")]

    def _set_initialised(self, done: bool) -> None:
        for norm in self._norms():
            norm.data_dep_init_done.fill_(float(done))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise every ActNorm with the mean and variance of its input for x (B, C, H, W) (1807.03039, 3.1)."""
        norms, kept = self._norms(), [(m.s.data, m.t.data) for m in self._norms()]
        self._set_initialised(False)
        self.to_latents(x)
        for norm, (s, t) in zip(norms, kept, strict=True):  # in place: optimizers and averages refer to these
            norm.s.data, norm.t.data = s.copy_(norm.s), t.copy_(norm.t)
            norm.data_dep_init_done = norm.data_dep_init_done.to(s)
        self._set_initialised(True)

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """Raise InputError: a flow is trained, not fitted."""
        raise InputError("prior Flow is trained, not fitted: use the command fit with lightning_tdisent.PriorModule")

    def to_latents(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return latents of x (B, C, H, W), coarsest first, and log |det dz/dx| (B,), in the dtype of the weights."""
        self._refuse_unbuilt()
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.flow.q0[0].loc.dtype)
            found: tuple[list[Tensor], Tensor] = self.flow.inverse_and_log_det(x if self.levels else x.flatten(1))
            return found

    def to_state(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the x (B, C, H, W) of latents, and log |det dx/dz| (B,)."""
        self._refuse_unbuilt()
        x, log_det = self.flow.forward_and_log_det(list(latents))
        return x.unflatten(1, self.shape or ()) if self.levels == 0 else x, log_det

    def log_prob(self, x: Tensor) -> Tensor:
        """See the class. Differentiable with respect to x and the parameters."""
        latents, log_det = self.to_latents(x)
        out = log_det.double()
        for z, q in zip(latents, self.flow.q0, strict=True):
            log_scale = q.log_scale.flatten().double()
            out = out + normal_log_prob((z.double() - q.loc).flatten(1), (2 * log_scale).exp())
        return out

    @torch.no_grad()
    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """Return f^-1 of the noise of the full chain, split into the latents.

        Images are computed one at a time, since in a batch their last bits would depend on the other images.
        """
        self._refuse_unbuilt()
        base, sizes = self.flow.q0, [math.prod(latent) for latent in self.latents]
        images = []
        for seed in seeds:
            noise = seed_noise([seed], stream, [self.size]).to(base[0].loc)
            parts = noise.split(sizes, 1)
            latents = [q.loc + q.log_scale.exp() * z.view(q.loc.shape) for q, z in zip(base, parts, strict=True)]
            images.append(self.to_state(latents)[0].float().cpu())
        return torch.cat(images) if images else torch.empty(0, *(self.shape or ()))

    def _refuse_unbuilt(self) -> None:
        if self.flow is None:
            raise InputError("prior Flow has no shape yet: pass shape, (C, H, W), or call build")


def _most(H: int, W: int) -> int:
    """Return how many times both sides can be halved."""
    both = math.gcd(H, W)
    return (both & -both).bit_length() - 1
