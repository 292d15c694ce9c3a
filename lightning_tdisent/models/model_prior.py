"""`ModelPrior`: another model, whose images are noised to a row, as a prior."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent.diffusion.process import first_state
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.digests import digest, sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.card import Card, read_card
from lightning_tdisent.models.compose import find_files, holds_weights, load_model
from lightning_tdisent.priors.prior import Prior
from lightning_tdisent.sampling.sampler import DDIM

FITTING = 3 << 20  # first noise stream of fitting priors


class ModelPrior(Prior):
    """Prior that draws images from another model and adds noise up to the row (2205.12524, 2202.09671).

    It has no density.

    source: a run, a file of weights or a composite, sampled with DDIM; or the folder of a diffusers AutoencoderKL,
        whose latents are drawn from N(0, I).
    steps: number of DDIM steps; all rows if not given.
    shape: (C, H, W) of the images.
    sha256: digest of the source's weights, set by the fit; a prior that is loaded raises InputError if the source has
        other weights.
    clip: bound of the source's estimates of x_0, None for no bound, which latents require.
    """

    has_density = False
    levels: Tensor

    def __init__(
        self, source: str, steps: int | None = None, shape: Sequence[int] | None = None, sha256: str | None = None,
        clip: float | None = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(shape)
        self.source, self.steps, self.sha256, self.clip = source, steps, sha256, clip
        self.register_buffer("levels", torch.zeros(2, dtype=torch.float64))
        self._source: tuple[Any, ...] = ()  # in a tuple, so that it is no submodule: its weights are in other files

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """Store a and b, and check the source.

        Raises InputError for a source that requires classes or an observation, makes images of another shape or has
        another sha256, and for data outside [-clip, clip].
        """
        super().fit(x0, a, b, eps)
        self.levels = torch.tensor([a, b], dtype=torch.float64)
        found = _digest(self.source)
        self._source = self._source or _open_source(self.source)
        if self.sha256 not in (None, found):
            raise InputError(f"ModelPrior: sha256 {self.sha256} was given, {self.source} has {found}; leave it out")
        self.sha256 = found
        model, latent = self._source
        if latent is None and (model.classes or model.states.observation is not None):  # an autoencoder has neither
            what = "classes" if model.classes else "an observation"
            raise InputError(f"ModelPrior: {self.source} requires {what}, which a prior does not have")
        if self.clip is not None and (most := float(x0.abs().max())) > self.clip:
            raise InputError(
                f"ModelPrior: the data go up to {most:.3g}, clip is {self.clip:g}; give clip: null for latents"
            )
        made = list(self._images(range(2)).shape[1:])
        if made != self.shape:
            raise InputError(f"ModelPrior: {self.source} makes {made}, the data is {self.shape}")
        return []

    def log_prob(self, x: Tensor) -> Tensor:
        """Raise InputError: there is no density."""
        raise InputError("ModelPrior has no density: no likelihood can be computed with it")

    @torch.inference_mode()
    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """Return a x_0 + b eps with x_0 from the source and the noise of the whole chain, (len(seeds), C, H, W)."""
        assert self.shape is not None
        a, b = self.levels.tolist()
        x: Tensor = a * self._images(seeds) + b * seed_noise(seeds, stream, self.shape)
        return x

    def _images(self, seeds: Iterable[int]) -> Tensor:
        if not self._source:
            if self.sha256 is not None and (found := _digest(self.source)) != self.sha256:
                raise InputError(
                    f"ModelPrior: the weights of {self.source} have the sha256 {found[:12]}.., it was fitted with "
                    f"{self.sha256[:12]}..; put them back, or fit the prior again"
                )
            self._source = _open_source(self.source)
        model, latent = self._source
        each = []
        for seed in seeds:  # one at a time: in a batch the last bits would depend on the other images
            shape = latent or model.states.shape_at(model.states.S, model.shape)
            noise = seed_noise([seed], FITTING, shape)  # another stream than the noise added at the row
            if latent is None:
                start = first_state(model.states, noise)
                *_, (_, x, _) = DDIM(steps=self.steps, clip=self.clip).walk(model, [seed], start=start)
                each.append(model.states.decode(x.float()).cpu())
                continue
            z = noise / model.config.scaling_factor + (getattr(model.config, "shift_factor", None) or 0.0)
            each.append(model.decode(z).sample.clamp(-1, 1))
        return torch.cat(each)

    @property
    def cards(self) -> list[Card]:
        """Cards of the source; an autoencoder has none, so its cost is unknown."""
        return [] if _autoencoder(self.source) else [read_card(file) for file in find_files(self.source)]

    @property
    def evaluations(self) -> int:
        """Number of network evaluations per image."""
        self._source = self._source or _open_source(self.source)
        model, latent = self._source
        return 1 if latent is not None else len(DDIM(steps=self.steps).rows(model.states))


def _autoencoder(source: str) -> bool:
    return (Path(source) / "config.json").is_file() and not holds_weights(Path(source))


def _digest(source: str) -> str:
    """Return the SHA-256 of the weights of a source: of the file, or of the digests of several files."""
    files = sorted(Path(source).glob("*.safetensors")) if _autoencoder(source) else find_files(source)
    digests = [sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else digest(*digests)


def _open_source(source: str) -> tuple[Any, list[int] | None]:
    """Return a denoiser and None, or a diffusers autoencoder and the shape of its latents."""
    config = Path(source) / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "AutoencoderKL":
        from diffusers import AutoencoderKL

        autoencoder = AutoencoderKL.from_pretrained(source, local_files_only=True, use_safetensors=True).eval()
        side = autoencoder.config.sample_size // 2 ** (len(autoencoder.config.block_out_channels) - 1)
        return autoencoder, [autoencoder.config.latent_channels, side, side]
    return load_model(source), None
