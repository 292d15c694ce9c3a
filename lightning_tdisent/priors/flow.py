"""A normalising flow: a density that is learned by gradients, of the package normflows."""

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

    levels: scales; at each the image is squeezed by two and half of its channels leave, but at the last. Sides must be
    divisible by 2^levels. 0 levels: a flow of the flat vector, for data without space. blocks: of ActNorm, an
    invertible linear map of the channels and an affine coupling, in each level; hidden: channels inside the network of
    a coupling. q is a Gaussian with a mean and a variance for each value. A new flow couples nothing; `initialise` sets
    its ActNorms by data. Without shape nothing is made before `build`.
    """

    learned = True

    def __init__(self, shape: Sequence[int] | None = None, levels: int = 2, blocks: int = 4, hidden: int = 64) -> None:
        super().__init__(shape)
        self.levels, self.blocks, self.hidden = levels, blocks, hidden
        if not 0 <= levels <= 16 or min(blocks, hidden) < 1:
            raise InputError(
                f"prior Flow: levels {levels} is from 0 to 16, blocks {blocks} and hidden {hidden} 1 at least"
            )
        self.flow: Any = None
        if shape is not None:
            self.build(shape)

    def build(self, shape: Sequence[int]) -> None:
        """Make the modules for x of (C, H, W); refuses sides that cannot be squeezed, and normflows missing."""
        self.shape = list(shape)
        C, H, W = self.shape
        if self.levels == 0 and self.size < 2:
            raise InputError(f"prior Flow: couplings want 2 values at least, the shape {self.shape} has {self.size}")
        if H % 2**self.levels or W % 2**self.levels:
            raise InputError(
                f"prior Flow: {self.levels} levels want sides that are divisible by {2**self.levels}, the shape is "
                f"{self.shape}; set levels to {_most(H, W)} or less"
            )
        try:
            import normflows
        except ImportError:
            raise Unavailable("prior Flow needs normflows: pip install 'lightning_tdisent[prior]'") from None
        make = normflows.flows
        levels, merges, latents = [], [], []
        for i in range(self.levels):  # from the coarsest, which all of x that is left goes through
            c = C * 2 ** (self.levels + 1 - i)
            # not the LU form of the linear map: it is made by a function that torch is about to remove
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
        """What a block of Glow is, for vectors."""
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
        """Let every ActNorm begin with the mean and the variance that x (B, C, H, W) has there (1807.03039, 3.1)."""
        norms, kept = self._norms(), [(m.s.data, m.t.data) for m in self._norms()]
        self._set_initialised(False)
        self.to_latents(x)
        for norm, (s, t) in zip(norms, kept, strict=True):  # in place: optimizers and averages hold these tensors
            norm.s.data, norm.t.data = s.copy_(norm.s), t.copy_(norm.t)
            norm.data_dep_init_done = norm.data_dep_init_done.to(s)
        self._set_initialised(True)

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """Refuse: it is learned."""
        raise InputError("prior Flow is trained: fit with lightning_tdisent.PriorModule")

    def to_latents(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Latents of x (B, C, H, W), the coarsest first, and log |det dz/dx| (B,); in the precision of the weights."""
        self._refuse_unbuilt()
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.flow.q0[0].loc.dtype)
            return self.flow.inverse_and_log_det(x if self.levels else x.flatten(1))

    def to_state(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The x (B, C, H, W) of latents, and log |det dx/dz| (B,)."""
        self._refuse_unbuilt()
        x, log_det = self.flow.forward_and_log_det(list(latents))
        return x.unflatten(1, self.shape or ()) if self.levels == 0 else x, log_det

    def log_prob(self, x: Tensor) -> Tensor:
        """See the class; gradients go through it."""
        latents, log_det = self.to_latents(x)
        out = log_det.double()
        for z, q in zip(latents, self.flow.q0, strict=True):
            log_scale = q.log_scale.flatten().double()
            out = out + normal_log_prob((z.double() - q.loc).flatten(1), (2 * log_scale).exp())
        return out

    @torch.no_grad()
    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """f^-1 of the noise of the whole chain, cut into the latents; one image at a time.

        In a batch the last bits of an image would change with its company.
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
            raise InputError("prior Flow has no shape yet: give it shape, (C, H, W), or call build")


def _most(H: int, W: int) -> int:
    """How often both sides can be halved."""
    both = math.gcd(H, W)
    return (both & -both).bit_length() - 1
