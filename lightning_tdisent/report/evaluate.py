"""Models side by side: one row of numbers each, from the same seeds, on the same held-out images."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.quality import Protocol, Quality
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.composite import load_model
from lightning_tdisent.sampling.denoiser import Denoises
from lightning_tdisent.sampling.evaluation import x0_errors
from lightning_tdisent.sampling.expert import Card
from lightning_tdisent.sampling.sampler import Sampler, probe_rows, sample
from lightning_tdisent.streaming.shards import ImageSet


@dataclasses.dataclass
class Contender:
    """A name in the table, the weights behind it, and the sampler that draws its images."""

    name: str
    source: Path
    sampler: Sampler


def _flops(network: Network, card_like: dict[str, Any]) -> float:
    index = torch.ones(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *network.shape), index)
    return 3.0 * counter.get_total_flops() * int(card_like["images_seen"])


def training_cost(cards: Sequence[Card]) -> dict[str, float]:
    """Cost of all trainings behind these cards, and of the longest chain of them.

    A shared model that several experts started from counts once. Floating point operations are 3 x forward x images
    seen: a forward pass and two of its cost for the backward one.
    """
    parents = {p["sha256"]: p for card in cards for p in card.parents}
    runs = [*parents.values(), *(dataclasses.asdict(card) for card in cards)]
    chains = [[*card.parents, dataclasses.asdict(card)] for card in cards]
    return {
        "images_seen": sum(run["images_seen"] for run in runs),
        "images_seen_longest": max(sum(run["images_seen"] for run in chain) for chain in chains),
        "training_flops": sum(_flops(build(run["network"], Network).eval(), run) for run in runs),
        "training_seconds": sum(run["seconds"] for run in runs),
        "training_seconds_longest": max(sum(run["seconds"] for run in chain) for chain in chains),
    }


def evaluate(
    contenders: Sequence[Contender],
    reference: ImageSet,
    held_out: ImageSet,
    features: str,
    n: int,
    first_seed: int = 0,
    batch_size: int = 250,
    device: str = "cpu",
    keep: int = 64,
    progress: Any = None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return one row of numbers per contender, and its first ``keep`` images.

    reference: the real images that distances are taken to; held_out: those of the errors per state. n images are
    generated with seeds first_seed .. + n - 1, the same for all. Errors are taken at the rows of the contender with
    the fewest rows, for every contender that has those rows at the same values. A last row scores the held-out
    images themselves, as if a model had made them: what a perfect one would reach with so few.
    """
    if n < 2:
        raise InputError(f"n: two images at least make a distribution, got {n}")
    loaded = [load_model(c.source) for c in contenders]
    quality = Quality(features)
    for contender, (model, _) in zip(contenders, loaded, strict=True):
        if model.shape != quality.shape:
            raise InputError(
                f"{contender.source} makes images {model.shape}, the features {features!r} take {quality.shape}"
            )
        contender.sampler.rows(model.states)  # refuses more steps than rows, before any work
    quality.to(torch.device(device)).add_real(reference.images)
    protocol = Protocol(features, n, first_seed, reference.digest, len(reference))
    few = min((model.states for model, _ in loaded), key=lambda states: states.S)
    common = probe_rows(few.rows, 32)
    levels = few.log_snr[common].clone()  # a model moves to the device with its table
    indices = [int(few.index[s]) for s in common]
    rows, images = [], {}
    for contender, (model, cards) in zip(contenders, loaded, strict=True):
        model.to(device)
        quality.reset()
        start, first = time.perf_counter(), []
        for batch in sample(model, contender.sampler, range(first_seed, first_seed + n), batch_size):
            quality.add(batch)
            first.append(batch)
            if progress:
                progress(contender.name, len(batch))
        seconds = time.perf_counter() - start
        images[contender.name] = torch.cat(first)[:keep]
        here = {t: s for s, t in enumerate(model.states.index.tolist())}
        errors: dict[str, dict[str, float]] = {}
        at = [here[t] for t in indices if t in here]
        if len(at) == len(common) and torch.allclose(model.states.log_snr[at].cpu(), levels):
            x0 = _held_out_errors(model, held_out, at, batch_size)
            eps = x0 * model.states.log_snr[at].exp().mean(1).cpu()
            errors = {
                "x0_mse": dict(zip(map(str, indices), x0.tolist(), strict=True)),
                "eps_mse": dict(zip(map(str, indices), eps.tolist(), strict=True)),
            }
        rows.append(
            {
                "name": contender.name,
                "networks": len(cards),
                "weights": sum(p.numel() for p in model.parameters()),
                "rows": model.states.S,
                "steps": len(contender.sampler.rows(model.states)),
                **quality.compute(),
                **errors,
                **training_cost(cards),
                "sampling_seconds_per_image": seconds / n,
                "weights_kind": cards[0].weights,
                "training_data": cards[0].data,
                "table": cards[0].fingerprint,
                "sampler": repr_sampler(contender.sampler),
                "protocol": protocol.hash,
                "protocol_fields": dataclasses.asdict(protocol),
                "source": str(contender.source),
            }
        )
    quality.reset()
    quality.add(held_out.images)
    protocol = dataclasses.replace(protocol, n=len(held_out), first_seed=-1)
    floor = {"name": f"{len(held_out)} real images, held out", **quality.compute(), "protocol": protocol.hash}
    return rows + [floor], images


def _held_out_errors(model: Denoises, held_out: ImageSet, rows: Sequence[int], batch_size: int) -> Tensor:
    """Mean x0 error per row, with the true labels where the model takes some."""
    if model.classes and not 0 <= int(held_out.labels.min()) <= int(held_out.labels.max()) < model.classes:
        raise InputError(f"the model has {model.classes} classes; the held-out images have other labels, or none")
    parts = torch.arange(len(held_out)).split(batch_size)
    device = next(iter(model.parameters())).device
    errors = [
        x0_errors(model, held_out.images[i], i.tolist(), rows, held_out.labels[i].to(device) if model.classes else None)
        for i in parts
    ]
    return torch.cat(errors, 1).mean(1)


def repr_sampler(sampler: Sampler) -> str:
    """One line naming a sampler and its options."""
    return f"{type(sampler).__name__}({', '.join(f'{k}={v}' for k, v in vars(sampler).items())})"


def _number(name: str, row: dict[str, Any]) -> str:
    return f"{row[name]:.3f}"


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Head and rows of text, for the terminal and the report; total compute always stands beside wall clock."""
    metrics = [k for k in rows[0] if k.startswith(("fd_", "is_"))]

    def mean(errors: dict[str, float]) -> float:
        return sum(errors.values()) / len(errors)

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda r: r["name"],
        "networks": lambda r: str(r["networks"]),
        "weights": lambda r: f"{r['weights']:,}",
        "states": lambda r: str(r["rows"]),
        "steps": lambda r: str(r["steps"]),
        **{m: functools.partial(_number, m) for m in metrics},
        "eps-MSE": lambda r: f"{mean(r['eps_mse']):.4f}",
        "images seen": lambda r: f"{r['images_seen']:,}",
        "by the longest job": lambda r: f"{r['images_seen_longest']:,}",
        "training TFLOP": lambda r: f"{r['training_flops'] / 1e12:.2f}",
        "training s, total": lambda r: f"{r['training_seconds']:.1f}",
        "longest job s": lambda r: f"{r['training_seconds_longest']:.1f}",
        "sampling ms/image": lambda r: f"{1000 * r['sampling_seconds_per_image']:.2f}",
        "protocol": lambda r: r["protocol"],
    }

    def cell(row: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> str:
        try:
            return text(row)
        except KeyError:  # not known of this row: another table, or images that no model made
            return ""

    return [tuple(columns), *(tuple(cell(r, text) for text in columns.values()) for r in rows)]
