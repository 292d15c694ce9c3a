"""Numbers and pictures of any denoiser. Callbacks during training and the commands afterwards run this same code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.sampling.denoiser import Denoises
from lightning_tdisent.sampling.sampler import Sampler, from_uint8, probe_rows, sample, to_uint8

HELD_OUT = 1 << 20  # streams of held-out noise, far from the indices that key the sampler's


class Scores(Protocol):
    """What generated images are added to: `metrics.quality.Quality`."""

    def add(self, images: Tensor) -> None:
        """Add uint8 images."""

    def compute(self) -> dict[str, float]:
        """Return the numbers over all ranks."""

    def reset(self) -> None:
        """Forget the images."""


@torch.no_grad()
def x0_errors(
    denoise: Denoises, images: Tensor, ids: Sequence[int], rows: Sequence[int], label: Tensor | None = None
) -> Tensor:
    """Mean squared error of x0_hat per row and image, (R, B) float64, on noise keyed by (image id, original index).

    images: uint8 (B, C, H, W), or x0 itself, float (B, C, H, W). Times SNR(s) it is the error of eps, over b_s^2 the
    error of v.
    """
    device = next(iter(denoise.parameters())).device
    x0 = (images.float() if images.is_floating_point() else from_uint8(images)).to(device)
    index = denoise.states.index.tolist()
    out = torch.empty(len(rows), len(images), dtype=torch.float64)
    for k, s in enumerate(rows):
        eps = seed_noise(ids, HELD_OUT + index[s], x0.shape[1:]).to(device)
        error = denoise(noise(denoise.states, x0, s, eps), s, label) - x0
        out[k] = error.double().square().mean((1, 2, 3)).cpu()
    return out


def score(
    denoise: Denoises,
    sampler: Sampler,
    scores: Scores,
    n: int,
    first_seed: int = 0,
    batch_size: int = 250,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Generate the images of seeds first_seed .. + n - 1, this rank's share of them, and return the numbers over all.

    Exactly n images enter, whatever the number of ranks; image i depends on its seed alone.
    """
    scores.reset()
    seeds = range(first_seed, first_seed + n)[rank::world]
    for images in sample(denoise, sampler, seeds, batch_size):
        scores.add(images)
    return scores.compute()


@torch.no_grad()
def forward_strip(denoise: Denoises, images: Tensor, rows: Sequence[int], ids: Sequence[int]) -> Tensor:
    """x_0 and x_s at the given rows, each image on one noise: uint8 (B, 1 + R, C, H, W)."""
    x0 = from_uint8(images)
    eps = seed_noise(ids, HELD_OUT, x0.shape[1:])
    strip = [x0, *(noise(denoise.states, x0, s, eps.to(x0)) for s in rows)]
    return to_uint8(torch.stack(strip, 1))


@torch.inference_mode()
def reverse_strip(
    denoise: Denoises, sampler: Sampler, seeds: Sequence[int], columns: int = 9
) -> tuple[Tensor, list[int]]:
    """x_s on the way from noise to image: uint8 (B, columns, C, H, W) and the rows shown, S first, 0 last."""
    keep = {*probe_rows(sampler.rows(denoise.states)[::-1], columns - 1), 0}
    shown = [(s, to_uint8(x).cpu()) for s, x, _ in sampler.walk(denoise, seeds) if s in keep]
    return torch.stack([x for _, x in shown], 1), [s for s, _ in shown]


def grid(images: Tensor, columns: int = 16, gap: int = 1) -> Tensor:
    """Tile uint8 images (B, C, H, W) into one (C, rows (H+gap) + gap, columns (W+gap) + gap) on mid-grey."""
    n, c, h, w = images.shape
    columns = min(columns, n)
    out = torch.full((c, -(-n // columns) * (h + gap) + gap, columns * (w + gap) + gap), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = image
    return out


def save_png(picture: Tensor, path: Path) -> None:
    """Write a uint8 picture (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = picture.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)
