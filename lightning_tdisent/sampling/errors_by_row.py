"""Compute the error of a denoiser at each row of its table, on held-out images and fixed noise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.distributed import all_gather, rank_and_world
from lightning_tdisent.images import unit_range
from lightning_tdisent.sampling.denoiser import DenoiserProtocol

HELD_OUT = 1 << 20  # first noise stream of held-out errors; the sampler's streams are indices, far below


@torch.no_grad()
def state_errors(
    denoise: DenoiserProtocol, images: Tensor, ids: Sequence[int], rows: Sequence[int], label: Tensor | None = None
) -> Tensor:
    """Return mean squared errors of x0_hat and of eps_hat per row and image, (2, R, B) float64.

    images: uint8 (B, C, H, W), or x_0 itself as floats.
    ids: one per image; noise is keyed by (image id, original index).
    rows: R rows of the table.
    label: int64 (B,), or None.

    The error of eps is SNR(s) times that of x0, component by component. Where finer components have been dropped, x0 is
    the image at the resolution of the state. The channels of an observation count in neither. At a row without signal
    (see `has_signal`) the error of eps is NaN: every model predicts eps exactly there, since it is x / b.
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
    """Return whether any component of the data is left in the state of row s: False at a terminal SNR of zero."""
    return not bool(states.log_snr[s, : states.image_columns].isneginf().all())


def x0_errors(
    denoise: DenoiserProtocol, images: Tensor, ids: Sequence[int], rows: Sequence[int], label: Tensor | None = None
) -> Tensor:
    """Return the mean squared errors of x0_hat per row and image, (R, B) float64: the first of `state_errors`."""
    return state_errors(denoise, images, ids, rows, label)[0]


def held_out_errors(
    model: DenoiserProtocol,
    held_out: ImageSet,
    rows: Sequence[int],
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return mean errors of x0 and eps per row, (2, R), with the true labels if the model has classes.

    progress: called with the number of images of each batch at each row.

    The batches are shared among the ranks; the result is the same on every rank (collective).
    """
    (rank, world), batches = rank_and_world(), torch.arange(len(held_out)).split(batch_size)
    device = next(iter(model.parameters())).device
    mine: dict[int, list[Tensor]] = {k: [] for k in range(len(batches))[rank::world]}
    for s in rows:  # rows in the outer loop: an expert that is not resident is loaded once
        for k, found in mine.items():
            i = batches[k]
            label = held_out.labels[i].to(device) if model.classes else None
            found.append(state_errors(model, held_out.images[i], i.tolist(), [s], label).sum(2))
            if progress:
                progress(len(i))
    sums = {k: torch.cat(v, 1) for part in all_gather(mine) for k, v in part.items()}
    return torch.stack([sums[k] for k in range(len(batches))]).sum(0) / len(held_out)
