"""What models cost, in images, floating point operations and seconds."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.expert import Card

TRAINING = ("network", "images_seen", "seconds")


def flops(network: Network) -> int:
    """Floating point operations of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *network.shape), torch.ones(1, dtype=torch.long))
    return int(counter.get_total_flops())


def training_cost(cards: Sequence[Card]) -> dict[str, float]:
    """Cost of all trainings behind these cards, and of the longest chain of them.

    What several experts started from counts once; members of an average were trained side by side, so that a chain has
    the longest of them. Floating point operations are 3 x forward x images seen: a forward pass and two of its cost
    for the backward one.
    """
    parents = {p["sha256"]: p for card in cards for p in card.parents}
    known = [[p[k] for k in TRAINING] for p in parents.values()]
    own = [dataclasses.asdict(card) for card in cards]  # a shared model that fills rows may be a start as well
    runs = [*parents.values(), *(run for run in own if [run[k] for k in TRAINING] not in known)]
    return {
        "images_seen": sum(run["images_seen"] for run in runs),
        "images_seen_longest": max(_chain(card, "images_seen") for card in cards),
        "training_flops": sum(3.0 * flops(build(run["network"], Network).eval()) * run["images_seen"] for run in runs),
        "training_seconds": sum(run["seconds"] for run in runs),
        "training_seconds_longest": max(_chain(card, "seconds") for card in cards),
    }


def with_prior(cost: dict[str, float], prior: nn.Module, images_seen: int, seconds: float) -> dict[str, float]:
    """The same with a prior that was trained beside, on so many images."""
    if not images_seen:
        return cost
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prior.log_prob(torch.zeros(1, *prior.shape))  # type: ignore[operator, misc]
    trained = 3.0 * counter.get_total_flops() * images_seen
    more = {"images_seen": images_seen, "training_flops": trained, "training_seconds": seconds}
    longest = {"images_seen_longest": images_seen, "training_seconds_longest": seconds}
    summed = {key: cost[key] + value for key, value in more.items()}
    return cost | summed | {key: max(cost[key], value) for key, value in longest.items()}


def _chain(card: Card, what: str) -> float:
    """Of one card and what came before it, but for what was trained beside the longest of that."""
    before: float = sum(p[what] for p in card.parents if "weight" not in p)
    return before + max((p[what] for p in card.parents if "weight" in p), default=0) + getattr(card, what)
