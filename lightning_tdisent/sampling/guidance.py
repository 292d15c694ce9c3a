"""Classifier-free guidance, and what models offer beyond a denoiser."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.priors.prior import Prior
from lightning_tdisent.sampling.denoiser import DenoiserProtocol


class Guided:
    """Classifier-free guidance: x0_u + scale (x0_c - x0_u), both from the owner of the row (2207.12598, eq. 6).

    The formula of eps holds for x0 as it stands, since at one row x0_hat is affine in eps_hat. scale, their 1 + w, is
    1 for the plain conditional model and 0 for the unconditional one; it costs two network evaluations a step.
    """

    def __init__(self, denoiser: DenoiserProtocol, scale: float) -> None:
        if denoiser.classes is None:
            raise InputError("guidance needs a class-conditional model: set classes: on its network")
        if not math.isfinite(scale):
            raise InputError(f"guidance: a finite scale, got {scale}")
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


class Extras:
    """Base class of models that offer more than `DenoiserProtocol`, with the values of one that does not.

    Only subclasses are asked for these: a model of another class may use the same names for anything (see `extras`).

    residency: where the experts of a composite are, None for one network; prior: where the chain starts, None for
    N(0, I); filled: rows of a preview that nobody owns, and what answers there; differs: values of the fields in which
    experts differ.
    """

    residency: str | None = None
    prior: Prior | None = None
    filled: dict[int, str] = {}  # assigned anew, never changed in place
    differs: dict[str, list[str]] = {}

    def expect(self, rows: Sequence[int]) -> None:
        """Prepare for the rows that will be asked for, in this order."""

    def start(self, seeds: Sequence[int], label: Tensor | None = None) -> Tensor | None:
        """Return x at the last row for these seeds, None for that of the table."""
        return None

    def check_label(self, label: int | Tensor | None) -> str:
        """Refuse a label that the start does not fit; return what must be said of the start, or an empty string."""
        return ""


def extras(denoise: DenoiserProtocol) -> Extras:
    """Return the extras of a model, or of the one that guidance was put around."""
    while isinstance(denoise, Guided):
        denoise = denoise.denoiser
    return denoise if isinstance(denoise, Extras) else Extras()
