"""Compute the error of a denoiser at each row of its table, on held-out images and fixed noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tdisent.data.shards import ImageSet
from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.distributed import all_gather, rank_and_world
from lightning_tdisent.images import unit_range
from lightning_tdisent.sampling.denoiser import DenoiserProtocol

HELD_OUT = 1 << 20  # streams of held-out noise, far from the indices that key the sampler's


@torch.no_grad()
def state_errors(
    denoise: DenoiserProtocol, images: Tensor, ids: Sequence[int], rows: Sequence[int], label: Tensor | None = None
) -> Tensor:
    """Mean squared errors of x0_hat and of eps_hat per row and image, (2, R, B) float64.

    images: uint8 (B, C, H, W), or x0 itself, float; noise is keyed by (image id, original index). The error of eps is
    SNR(s) times that of x0, component by component; of a state that finer components have left, x0 is the image at
    its resolution. What is given counts in neither. At a row without signal (`has_signal`) every model says eps
    exactly, since it is x / b: the error of eps tells nothing there, and is NaN.
    """
    states, device = denoise.states, next(iter(denoise.parameters())).device
    x0 = unit_range(images).to(device)
    index, item = states.index.tolist(), torch.as_tensor(ids, device=device)
    out = torch.empty(2, len(rows), len(images), dtype=torch.float64)
    for k, s in enumerate(rows):
        z0 = states.encode(x0, item, level := states.levels[s])
        eps = seed_noise(ids, HELD_OUT + index[s], z0.shape[1:]).to(device)
        error = denoise(noise(states, z0, s, eps), s, label) - z0
        out[0, k] = states.decode(error, level).double().square().mean((1, 2, 3)).cpu()
        if states.K == 1:
            out[1, k] = out[0, k] * float(states.log_snr[s].exp()) if has_signal(states, s) else torch.nan
        else:
            a, b = states.coefficients(s, error)
            own = (error * (a / b))[:, : x0.shape[1]]
            out[1, k] = own.double().square().mean((1, 2, 3)).cpu()
    return out


def has_signal(states: Table, s: int) -> bool:
    """Whether any component of the data is left in the state of row s; not at a terminal SNR of zero."""
    return not bool(states.log_snr[s, : states.image_columns].isneginf().all())


def x0_errors(
    denoise: DenoiserProtocol, images: Tensor, ids: Sequence[int], rows: Sequence[int], label: Tensor | None = None
) -> Tensor:
    """The first of `state_errors`, (R, B)."""
    return state_errors(denoise, images, ids, rows, label)[0]


def held_out_errors(model: DenoiserProtocol, held_out: ImageSet, rows: Sequence[int], batch_size: int) -> Tensor:
    """Mean errors of x0 and eps per row, (2, R), with the true labels where a model takes some; ranks share batches."""
    (rank, world), batches = rank_and_world(), torch.arange(len(held_out)).split(batch_size)
    device = next(iter(model.parameters())).device
    mine: dict[int, list[Tensor]] = {k: [] for k in range(len(batches))[rank::world]}
    for s in rows:  # an expert that is not in memory is brought once
        for k, found in mine.items():
            i = batches[k]
            label = held_out.labels[i].to(device) if model.classes else None
            found.append(state_errors(model, held_out.images[i], i.tolist(), [s], label).sum(2))
    sums = {k: torch.cat(v, 1) for part in all_gather(mine) for k, v in part.items()}
    return torch.stack([sums[k] for k in range(len(batches))]).sum(0) / len(held_out)
