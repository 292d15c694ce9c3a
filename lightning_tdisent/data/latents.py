"""Encode images as latents with an autoencoder of diffusers, loaded from a local folder."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_tdisent.data.decode import MODES
from lightning_tdisent.digests import digest_of
from lightning_tdisent.errors import InputError
from lightning_tdisent.images import from_uint8


class LatentEncoder:
    """An AutoencoderKL that encodes images as the mean and standard deviation of their latents.

    Latents are normalised as in diffusers' models: ``shift_factor`` of the autoencoder is subtracted, and the result is
    multiplied by ``scaling_factor``, which gives about unit variance. Its ``decode`` takes
    ``z / scaling_factor + shift_factor``. Attributes: ``mode``, the Pillow mode of the images; ``record``, everything
    that the latents depend on. Raises `InputError` for a device or a folder that cannot be used.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from diffusers import AutoencoderKL

        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
            if kind != "AutoencoderKL":
                raise TypeError(f"it holds the model {kind}")
            vae = AutoencoderKL.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            files = "config.json, diffusion_pytorch_model.safetensors"
            raise InputError(f"vae: {folder} is not the folder of an AutoencoderKL ({files}): {said}") from None
        self.vae = vae.float().eval().to(self.device)
        config = self.vae.config
        if config.in_channels not in MODES:
            raise InputError(f"vae: {folder} takes images of {config.in_channels} channels, not 1 or 3")
        self.mode = MODES[config.in_channels]
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.size: tuple[int, int] | None = None  # height and width of all images
        weights = digest_of(
            f"{name} {tuple(tensor.shape)} ".encode() + tensor.cpu().numpy().tobytes()
            for name, tensor in sorted(self.vae.state_dict().items())
        )
        self.record = {
            "scaling_factor": config.scaling_factor,
            "shift_factor": getattr(config, "shift_factor", None),
            "channels": config.latent_channels,
            "factor": self.factor,
            "weights": weights,
            "device": self.device.type,
        }

    def encode(self, images: Sequence[np.ndarray[Any, Any]], names: Sequence[str]) -> list[bytes]:
        """Encode images, and return the content of a .npy file for each.

        A file holds float16 (2, 2, C, h, w): [original, flipped] x [mean, standard deviation]. ``images`` are uint8
        (H, W) or (H, W, 3), all of the same size, also in all calls; ``names`` are for messages. Raises `InputError`
        for images of another size, for a size that is not divisible by ``factor``, and for latents that are not finite
        in float16.
        """
        for image, name in zip(images, names, strict=True):
            height, width = image.shape[:2]
            self.size = self.size or (height, width)
            what = f"{name} has {height} x {width} pixels"
            if (height, width) != self.size:
                raise InputError(
                    f"{what}, others have {self.size[0]} x {self.size[1]}; all latents must have one size: choose it "
                    "with --size"
                )
            if height % self.factor or width % self.factor:
                raise InputError(f"{what}, not a multiple of {self.factor}, as the autoencoder requires")
        pixels = torch.from_numpy(np.stack([image.reshape(*image.shape[:2], -1) for image in images])).to(self.device)
        pixels = from_uint8(pixels.permute(0, 3, 1, 2))
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            found = [self.vae.encode(x.contiguous()).latent_dist for x in (pixels, pixels.flip(-1))]
        scale, shift = self.record["scaling_factor"], self.record["shift_factor"] or 0.0
        both = torch.stack([torch.stack([(d.mean - shift) * scale, d.std * scale], 1) for d in found], 1)
        out = []
        for name, latent in zip(names, both.half().cpu().numpy(), strict=True):
            if not np.isfinite(latent).all():
                raise InputError(f"{name} has a latent that is not finite in float16; is this the right autoencoder?")
            content = io.BytesIO()
            np.save(content, latent, allow_pickle=False)
            out.append(content.getvalue())
        return out
