"""Strips of images that show the forward and reverse process of a denoiser, and PNG files."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.files import output_path, whole
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.images import from_uint8, to_uint8
from lightning_tdisent.sampling.denoiser import DenoiserProtocol
from lightning_tdisent.sampling.errors_by_row import HELD_OUT
from lightning_tdisent.sampling.sampler import Sampler, probe_rows


@torch.no_grad()
def forward_strip(denoise: DenoiserProtocol, images: Tensor, rows: Sequence[int]) -> Tensor:
    """Return x_0 and x_s at the given rows, image i with noise i of the held-out images: uint8 (B, 1 + R, C, H, W)."""
    x0 = from_uint8(images)
    strip = [x0, *(_noisy(denoise, x0, s)[1] for s in rows)]
    return to_uint8(torch.stack(strip, 1))


def shown(states: Table, x: Tensor, s: int) -> Tensor:
    """Return states of row s as images (B, C, H, W) in the range of the variance-preserving state."""
    return states.decode(states.normalised(s, x)[0], states.levels[s])


def _noisy(denoise: DenoiserProtocol, x0: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Return x_s of the first held-out images, and x_s as an image."""
    states, level, ids = denoise.states, denoise.states.levels[s], range(len(x0))
    z0 = states.encode(x0.to(states.a.device), torch.as_tensor(ids), level)
    eps = seed_noise(ids, HELD_OUT, states.shape_at(1, x0.shape[1:]))[..., : z0.shape[-2], : z0.shape[-1]]
    x = noise(states, z0, s, eps.to(z0))
    return x, shown(states, x, s).cpu()


@torch.no_grad()
def estimate_strip(denoise: DenoiserProtocol, images: Tensor, s: int) -> Tensor:
    """Return x_0, x_s and x0_hat of x_s: uint8 (B, 3, C, H, W); raises NotFinite if x0_hat is not finite."""
    x0 = from_uint8(images)
    x, noisy = _noisy(denoise, x0, s)
    estimate = denoise(x.to(next(iter(denoise.parameters())).device), s).cpu()
    refuse_non_finite("the model", {f"x0_hat at row {s}": estimate})
    return to_uint8(torch.stack([x0, noisy, denoise.states.decode(estimate, denoise.states.levels[s])], 1))


@torch.inference_mode()
def reverse_strip(
    denoise: DenoiserProtocol, sampler: Sampler, seeds: Sequence[int], columns: int = 9, given: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """Return x_s from noise to image, uint8 (B, columns, C, H, W), and the rows shown, S first, 0 last."""
    keep = {*probe_rows(sampler.rows(denoise.states)[::-1], columns - 1), 0}
    states = denoise.states
    walk = sampler.walk(denoise, seeds, given=given)
    strip = [(s, to_uint8(shown(states, x, s)).cpu()) for s, x, _ in walk if s in keep]
    return torch.stack([x for _, x in strip], 1), [s for s, _ in strip]


def captioned(picture: Tensor, caption: str) -> Tensor:
    """Return a uint8 picture (C, H, W) of one or three channels with lines of text below it, RGB, at least 480 wide."""
    picture = picture.expand(3, -1, -1)
    width = max(480, picture.shape[2])
    font, text = ImageFont.load_default(size=18), "\n".join(textwrap.wrap(caption, width // 9))
    below = Image.new("RGB", (width, 23 * (text.count("\n") + 1) + 8), "white")
    ImageDraw.Draw(below).multiline_text((2, 2), text, fill="black", font=font)
    out = torch.full((3, picture.shape[1] + below.height, width), 255, dtype=torch.uint8)
    out[:, : picture.shape[1], : picture.shape[2]] = picture
    out[:, picture.shape[1] :] = torch.from_numpy(np.array(below)).permute(2, 0, 1)
    return out


def png(picture: Tensor) -> bytes:
    """Return a uint8 picture (C, H, W) of one or three channels as a PNG file."""
    array, buffer = picture.permute(1, 2, 0).numpy(), io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "png")
    return buffer.getvalue()


def read_png(path: Path) -> Tensor:
    """Return a picture written by `save_png`, uint8 (C, H, W)."""
    with Image.open(path) as image:
        array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def save_png(picture: Tensor, path: Path) -> None:
    """Write a uint8 picture (C, H, W) as a PNG file; the file gets its name when it is complete."""
    path = output_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, sync=False) as stream:
        stream.write(png(picture))
