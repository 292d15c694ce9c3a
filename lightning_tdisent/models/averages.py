"""Weight averages over training of any length, reconstructed afterwards from stored snapshots (2312.02696, EDM2)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import output_path
from lightning_tdisent.models.card import Card, read_card
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.runs import AVERAGES, snapshots_in

LONGEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean over the whole training


def gamma(sigma_rel: float) -> float:
    """Return the exponent of the power-function profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t].

    Its standard deviation relative to its length t is sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))
    (2312.02696, section 3.1): 0.05 gives 16.97, 0.10 gives 6.94.

    sigma_rel: in (0, 12^-1/2]; raises InputError for other values.
    """
    if not 0 < sigma_rel <= LONGEST:
        raise InputError(f"sigma_rel must lie in (0, {LONGEST:.4f}], the plain mean, got {sigma_rel}")
    # (g + 2)^2 (g + 3) = (g + 1) / sigma^2, a cubic with one root >= 0
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def overlap(t: np.ndarray, g: np.ndarray, u: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Return the inner products of two power-function profiles, elementwise, float64.

    The profile of exponent g ends at t, that of exponent h at u: (g + 1)(h + 1) / (g + h + 1) m^(g + h + 1) / (t^(g +
    1) u^(h + 1)) with m = min(t, u) (2312.02696, appendix C), written with the ratio of the two ends so that no power
    overflows.
    """
    low = np.minimum(t, u)
    ratio = (low / np.maximum(t, u)) ** (np.where(t <= u, h, g) + 1)
    return np.asarray((g + 1) * (h + 1) / (g + h + 1) * ratio / low)


def coefficients(snapshots: Sequence[tuple[int, float]], step: int, exponent: float) -> tuple[np.ndarray, float]:
    """Return weights x of snapshots for which sum_i x_i p_i is nearest to the profile p of (step, exponent).

    Least squares with A_ij = <p_i, p_j>, b_i = <p_i, p> (2312.02696, appendix C), subject to sum_i x_i = 1, so that the
    average of constant weights is these weights.

    snapshots: (step, gamma) of each snapshot.

    Returns x (float64) and the relative error |sum_i x_i p_i - p| / |p| of the profile.
    """
    t, g = (np.array(column, dtype=np.float64) for column in zip(*snapshots, strict=True))
    a = overlap(t[:, None], g[:, None], t[None], g[None])
    goal_t, goal_g = np.array(step, dtype=np.float64), np.array(exponent, dtype=np.float64)
    b, norm = overlap(t, g, goal_t, goal_g), float(overlap(goal_t, goal_g, goal_t, goal_g))
    scale = a.diagonal() ** -0.5  # normalise the profiles: early ones are tall and narrow
    sides = np.stack([b * scale, scale], 1)
    free, shift = scale * np.linalg.lstsq(a * scale[:, None] * scale, sides, rcond=None)[0].T
    x = free + shift * (1 - free.sum()) / shift.sum()  # the unconstrained solution, moved along A^-1 1 to sum 1
    return x, max(0.0, 1 + (x @ a @ x - 2 * x @ b) / norm) ** 0.5


def reconstruct(run: Path, sigma_rel: float, out: Path, step: int | None = None) -> float:
    """Write the average of length sigma_rel that ends at a step, from the snapshots of a run.

    run: the run folder.
    sigma_rel: relative length, in (0, 12^-1/2].
    out: the .safetensors file to write.
    step: training step at which the average ends; the last one if not given. Snapshots must have been taken there.

    Returns the relative error of the profile. Raises InputError if there are no snapshots, none at that step, or
    snapshots of several runs.
    """
    out, files = output_path(out), [*snapshots_in(run)]
    if not files:
        raise InputError(
            f"{run / AVERAGES} holds no snapshots: they are written by fit with --ema.lengths '[0.05, 0.1]'"
        )
    cards = [read_card(file) for file in files]
    ends = [_end(card, file) for card, file in zip(cards, files, strict=True)]
    before = int((cards[0].average or {}).get("before", 0))  # steps of the average that a warm start continues
    step = max(end for end, _ in ends) if step is None else step + before
    if step not in {end for end, _ in ends}:
        taken = ", ".join(map(str, sorted({end - before for end, _ in ends})))
        raise InputError(f"--step {step - before}: snapshots were taken at {taken}")
    used = [(file, card, end) for file, card, end in zip(files, cards, ends, strict=True) if end[0] <= step]
    kinds = {(c.fingerprint, str(c.network), str(c.objective), str(c.rows), c.data) for _, c, _ in used}
    if len(kinds) > 1:
        raise InputError(f"{run / AVERAGES} mixes snapshots of several runs: {sorted(kinds)}")
    x, error = coefficients([end for *_, end in used], step, gamma(sigma_rel))
    total: dict[str, Tensor] = {}
    for weight, (file, _, _) in zip(x, used, strict=True):
        denoiser, _ = load_expert(file)
        for name, tensor in denoiser.named_parameters():
            part = tensor.detach().double() * weight
            total[name] = total[name] + part if name in total else part
    file, last = next((file, card) for file, card, end in used if end[0] == step)
    denoiser, _ = load_expert(file)  # for its buffers
    with torch.no_grad():
        for name, tensor in denoiser.named_parameters():
            tensor.copy_(total[name])
    own = step - before
    average = {"sigma_rel": sigma_rel, "steps": own, **({"before": before} if before else {}), "error": round(error, 6)}
    card = dataclasses.replace(last, average=average)
    save_expert(out, denoiser, card)
    return error


def _end(card: Card, file: Path) -> tuple[int, float]:
    if not card.average or not {"sigma_rel", "steps"} <= set(card.average):
        raise InputError(f"{file}: not a snapshot of a power-function average: it holds {card.weights} {card.average}")
    return int(card.average["steps"] + card.average.get("before", 0)), gamma(card.average["sigma_rel"])
