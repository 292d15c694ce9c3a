"""Classifier-free guidance, and optional features of models."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.priors.prior import Prior
from lightning_tdisent.sampling.denoiser import DenoiserProtocol


class Guided:
    """Classifier-free guidance: x0_u + scale (x0_c - x0_u), both from the owner of the row (2207.12598, eq. 6).

    The formula of the paper is for eps; it holds for x0 too, since at one row x0_hat is affine in eps_hat. Each step
    costs two network evaluations.

    denoiser: a class-conditional model.
    scale: the paper's 1 + w; 1 is the plain conditional model, 0 the unconditional one.

    Raises InputError for a model without classes, and a scale that is not finite.
    """

    def __init__(self, denoiser: DenoiserProtocol, scale: float) -> None:
        if denoiser.classes is None:
            raise InputError("guidance needs a class-conditional model: set classes: on its network")
        if not math.isfinite(scale):
            raise InputError(f"guidance: scale must be finite, got {scale}")
        self.denoiser, self.scale = denoiser, scale
        self.states, self.shape, self.classes = denoiser.states, denoiser.shape, denoiser.classes
        self.at, self.parameters = denoiser.at, denoiser.parameters

    def __call__(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """Return x0_hat with guidance at row s; raises InputError without labels."""
        if label is None:
            raise InputError("guidance needs labels")
        assert self.classes is not None
        both = torch.cat([label, torch.full_like(label, self.classes)])
        cond, uncond = self.denoiser(torch.cat([x, x]), s, both).chunk(2)
        return uncond + self.scale * (cond - uncond)


class Extras:
    """Base class of models with more features than `DenoiserProtocol`, with the values for models that lack them.

    Only subclasses are asked for these features: a model of another class may use the same names for anything (see
    `extras`).

    residency: where the experts of a composite are kept, None for one network.
    prior: the distribution that sampling starts from, None for N(0, I).
    filled: rows of a preview that no expert owns, with what is used there instead.
    differs: values of the fields in which experts differ.
    """

    residency: str | None = None
    prior: Prior | None = None
    filled: dict[int, str] = {}  # shared by all instances: assign a new dict, never change it in place
    differs: dict[str, list[str]] = {}

    def expect(self, rows: Sequence[int]) -> None:
        """Prepare for the rows that will be evaluated, in this order."""

    def start(self, seeds: Sequence[int], label: Tensor | None = None) -> Tensor | None:
        """Return x at the last row for these seeds, None if it is the noise of the table."""
        return None

    def check_label(self, label: int | Tensor | None) -> str:
        """Raise InputError for a label that does not fit the prior; return a note on the prior, or an empty string."""
        return ""


def extras(denoise: DenoiserProtocol) -> Extras:
    """Return the extras of a model; of a `Guided` model those of the model inside."""
    while isinstance(denoise, Guided):
        denoise = denoise.denoiser
    return denoise if isinstance(denoise, Extras) else Extras()
