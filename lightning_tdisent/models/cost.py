"""The cost of models in images, floating point operations and seconds."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_tdisent.diffusion.bounds import Bounded
from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.models.card import Card
from lightning_tdisent.networks.network import Network

TRAINING = ("network", "images_seen", "seconds")


def flops(network: Network) -> int:
    """Return the floating point operations of a forward pass of one image."""
    # the counter does not support the attention kernel that a CPU uses otherwise
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(*network.example())
    return int(counter.get_total_flops())


def training_cost(cards: Sequence[Card]) -> dict[str, float]:
    """Return the cost of all trainings behind these cards, and of the longest chain of them.

    A training that several experts started from counts once. Members of a weight average were trained in parallel, so a
    chain contains the longest of them. In an adaptive budget each round waits for its longest job, so the longest jobs
    of the rounds are summed. Training takes 3 x forward x images seen operations: a forward pass, and two of its cost
    for the backward pass. Validation is counted separately, one forward pass for each image passed through a network.
    """
    parents = {p["sha256"]: p for card in cards for p in card.parents}
    known = [[p[k] for k in TRAINING] for p in parents.values()]
    own = [dataclasses.asdict(card) for card in cards]  # a shared model that fills rows may also be a parent
    runs = [*parents.values(), *(run for run in own if [run[k] for k in TRAINING] not in known)]
    of_network = {json.dumps(run["network"], sort_keys=True): 0.0 for run in runs}
    for text in of_network:
        with Bounded("a start of these weights", 1 << 24, 1000):  # no file limits the size of a parent's network
            network = build(json.loads(text), Network)
        of_network[text] = float(flops(network.eval()))
    each = [of_network[json.dumps(run["network"], sort_keys=True)] for run in runs]
    trained = sum(3 * one * run["images_seen"] for one, run in zip(each, runs, strict=True))
    validated = sum(one * _validation(run, "passes") for one, run in zip(each, runs, strict=True))
    return {
        "images_seen": sum(run["images_seen"] for run in runs),
        "images_seen_longest": _longest(cards, "images_seen"),
        "training_flops": trained,
        "training_seconds": sum(run["seconds"] for run in runs),
        "training_seconds_longest": _longest(cards, "seconds"),
        "validation_flops": validated,
        "validation_seconds": sum(_validation(run, "seconds") for run in runs),
        "total_flops": trained + validated,
    }


def with_prior(cost: dict[str, float], prior: nn.Module, images_seen: int, seconds: float) -> dict[str, float]:
    """Return a cost with that of a prior added, which was trained in parallel on ``images_seen`` images.

    seconds: its training time.
    """
    if not images_seen:
        return cost
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        prior.log_prob(torch.zeros(1, *prior.shape))  # type: ignore[operator, misc]
    trained = 3.0 * counter.get_total_flops() * images_seen
    more = {"images_seen": images_seen, "training_flops": trained, "training_seconds": seconds, "total_flops": trained}
    longest = {"images_seen_longest": images_seen, "training_seconds_longest": seconds}
    summed = {key: cost[key] + value for key, value in more.items()}
    return cost | summed | {key: max(cost[key], value) for key, value in longest.items()}


def _validation(run: dict[str, Any], what: str) -> float:
    return float(run.get("validation", {}).get(what, 0))  # older cards have no validation


def _longest(cards: Sequence[Card], what: str) -> float:
    """Return the longest chain that ends at one of these cards, plus the longest job of each round after the first."""
    chains, later = [], dict[int, list[float]]()
    for card in map(dataclasses.asdict, cards):
        members = [p for p in card["parents"] if "weight" in p]
        before = sum(p[what] for p in card["parents"] if "weight" not in p) + (card[what] if members else 0)
        firsts = []
        for run in members or [card]:
            ends = sorted((int(k), end[what]) for k, end in (run.get("rounds") or {}).items())
            firsts.append(ends[0][1] if ends else run[what])
            for (_, end), (number, after) in itertools.pairwise(ends):
                later.setdefault(number, []).append(after - end)
        chains.append(before + max(firsts))
    total: float = max(chains) + sum(max(of_round) for of_round in later.values())
    return total
