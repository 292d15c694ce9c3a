"""Average the weights of neighbouring experts, so that a few networks replace many in deployment.

Experts that were initialised with the same weights may be averaged to one network for all their rows (2410.06664 merges
fine-tuned ranges of steps in this way). It needs no training; `Merged.errors` has the loss in quality.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

import lightning_tdisent
from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.process import noise, transition
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.spec import filled
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import output_path
from lightning_tdisent.images import from_uint8
from lightning_tdisent.models.agreement import refuse_unfit
from lightning_tdisent.models.card import PARENT, Card, read_card
from lightning_tdisent.models.compose import compose, refuse_taken
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.errors_by_row import HELD_OUT, x0_errors

Weights = dict[str, Tensor]


class Merged(NamedTuple):
    """One network of a merged composite.

    rows: rows owned.
    members: files that it is an average of.
    weights: their weights.
    errors: `step_error` over its rows, of the members and of the average; None without data.
    """

    rows: list[int]
    members: list[Path]
    weights: list[float]
    errors: tuple[float, float] | None


class Images(NamedTuple):
    """Images as model input: x0 float (N, C, H, W), ids that key their noise, label int64 (N,) or None."""

    x0: Tensor
    ids: list[int]
    label: Tensor | None

    def batches(self, size: int) -> "Iterator[Images]":
        """Yield batches of at most ``size`` images."""
        for i in range(0, len(self.ids), size):
            some = slice(i, i + size)
            yield Images(self.x0[some], self.ids[some], None if self.label is None else self.label[some])


def step_weights(states: Table) -> Tensor:
    """Return the effect of an error of x0_hat at row s on the next state: c0_s^2 of x_{s-1} = c0 x0_hat + cx x_s.

    c0 is DDIM's (2010.02502, eq. 12) for variance-preserving states, so that errors of all rows have one unit. Returns
    (S+1,) float64: 0 at row 0, the mean over several columns.
    """
    steps = [transition(states, s, s - 1, 0.0).x0 / states.on_cpu["scale"][s - 1] for s in states.rows]
    return torch.stack([torch.zeros((), dtype=torch.float64), *(c0.square().mean() for c0 in steps)])


def step_error(denoiser: Denoiser, images: Images, batch_size: int = 250) -> float:
    """Return sum_s c0_s^2 mean |x0_hat - x0|^2 over the rows owned: the error that its sampling steps add."""
    total = torch.zeros(len(denoiser.rows), dtype=torch.float64)
    for x0, ids, label in images.batches(batch_size):
        total += x0_errors(denoiser, x0, ids, denoiser.rows, label).sum(1)
    return float(step_weights(denoiser.states)[denoiser.rows] @ total) / len(images.ids)


def average(members: Sequence[Weights], weights: Sequence[float]) -> Weights:
    """Return sum_i w_i theta_i, computed in float64 and rounded to the dtype of theta.

    Integer tensors are those of the first member. Raises InputError unless there is a weight per member and sum_i w_i =
    1.
    """
    if abs(sum(weights) - 1) > 1e-9 or len(weights) != len(members):
        raise InputError(f"weights of an average must sum to 1, one for each of {len(members)}, got {list(weights)}")
    out = {}
    for name, first in members[0].items():
        if first.is_floating_point():
            total = torch.zeros_like(first, dtype=torch.float64)
            for weight, member in zip(weights, members, strict=True):
                total += weight * member[name].double()
            first = total.to(first.dtype)
        out[name] = first
    return out


def search_weights(
    members: Sequence[Denoiser], images: Images, batch_size: int = 250, evaluations: int = 60
) -> tuple[list[float], int]:
    """Return the weights of the average with the least `step_error` over the members' rows, and the images passed.

    The weights are >= 0 and sum to 1. L-BFGS on the logits of a softmax, from equal weights, with the same noise in
    every evaluation; the best evaluation is returned.
    """
    model, n = _joined(members), len(images.ids)
    own = [dict(member.named_parameters()) for member in members]
    stacked = {name: torch.stack([parameters[name].detach() for parameters in own]) for name in own[0]}
    scale, index = step_weights(model.states).tolist(), model.states.index.tolist()
    logits = torch.zeros(len(members), dtype=torch.float64, device=images.x0.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], 1.0, evaluations, evaluations, 1e-9, 1e-12, line_search_fn="strong_wolfe")
    tried: list[tuple[float, list[float]]] = []

    def evaluate() -> float:
        optimizer.zero_grad()
        share = logits.softmax(0)
        mixed = {name: torch.tensordot(share.to(value.dtype), value, 1) for name, value in stacked.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in mixed.items()}
        total = 0.0
        for s, (x0, ids, label) in itertools.product(model.rows, list(images.batches(batch_size))):
            x = noise(model.states, x0, s, seed_noise(ids, HELD_OUT + index[s], x0.shape[1:]).to(x0))
            error = (functional_call(model, leaves, (x, s, label)) - x0).double().square().mean((1, 2, 3)).sum()
            (scale[s] / n * error).backward()
            total += scale[s] / n * float(error.detach())
        used = [name for name in mixed if leaves[name].grad is not None]
        # relative to the first error, so that tolerances have the same meaning for every model
        unit = (tried[0][0] if tried else total) or 1.0
        torch.autograd.backward([mixed[n] for n in used], [leaves[n].grad / unit for n in used])
        tried.append((total, share.detach().tolist()))
        return total / unit

    optimizer.step(evaluate)
    return min(tried)[1], len(tried) * n * len(model.rows)


def costs_of_blocks(
    files: Sequence[Path], given: Sequence[float], images: Images, device: str, batch_size: int
) -> tuple[list[list[float]], int]:
    """Return `step_error` of the average of experts i..j at [i][j - i], and a third of the images passed.

    A third, since these passes have no backward pass, and costs are counted as three forward passes per image.
    """
    cost, passed = list[list[float]](), 0
    for i in range(len(files)):
        cost.append([])
        mean, weight, rows = Weights(), 0.0, list[int]()
        for file, more in zip(files[i:], given[i:], strict=True):
            one = load_expert(file)[0]
            rows, weight = sorted([*rows, *one.rows]), weight + more
            share = more / weight if weight > 0 else 1.0  # a running mean, so that only three networks are in memory
            mean = average([mean, one.state_dict()], [1 - share, share]) if mean else one.state_dict()
            model = Denoiser(one.network, one.objective, one.states, rows)
            model.load_state_dict(mean)
            cost[-1].append(step_error(model.to(device).eval(), images, batch_size) if weight > 0 else float("inf"))
            passed += len(images.ids) * len(rows)
    return cost, -(-passed // 3)


def best_blocks(cost: Sequence[Sequence[float]], k: int) -> list[int]:
    """Return sizes of k contiguous blocks of 0..n-1 with the least sum of cost[i][j - i - 1] over blocks i..j-1.

    By dynamic programming over the end of the last block: O(k n^2).
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # of 0..j-1; each round adds a block
    for _ in range(k):
        best = {
            j: min((best[i][0] + cost[i][j - i - 1], [*best[i][1], j - i]) for i in best if i < j)
            for j in range(min(best) + 1, len(cost) + 1)
        }
    return best[len(cost)][1]


def merge(
    experts: Sequence[str | Path],
    out: str | Path,
    k: int,
    weights: Literal["uniform", "images", "search"] | Sequence[float] = "uniform",
    blocks: Literal["equal", "search"] | Sequence[int] = "equal",
    data: ImageSet | None = None,
    device: str = "cpu",
    batch_size: int = 250,
) -> list[Merged]:
    """Write a composite of k < n networks, each the average of a contiguous block of n experts, whose rows it owns.

    weights: within a block ``uniform``, proportional to the ``images`` each has seen, found on ``data`` by ``search``
        (`search_weights`), or numbers, one per expert in the order of rows.
    blocks: of ``equal`` size, the sizes themselves, or by ``search`` those with the least sum of `step_error` on
        ``data``, for averages with the weights above (equal ones if these are searched).
    data: images for the searches and the errors.

    Raises InputError, before any weights are read, for experts whose networks or initial weights differ.
    """
    out, files = output_path(out), sorted(map(Path, experts), key=lambda file: read_card(file).rows)
    cards = [read_card(file) for file in files]
    if "shape" in cards[0].states["init_args"]:
        raise InputError("experts of components cannot be merged: their errors have no common unit")
    known = all(card.initial or card.warm_from for card in cards)  # older files have the seed alone
    refuse_unfit([str(file) for file in files], [_facts(card, known) for card in cards])
    refuse_taken(out)
    given = _given(weights, cards)
    if not 1 <= k <= min(len(files) - 1, sum(w > 0 for w in given)):
        raise InputError(f"--merge {k}: fewer networks than {len(files)} experts, each with an expert of weight > 0")
    if data is None and "search" in (weights, blocks):
        raise InputError("a search needs images: give --merge-data")
    for file in files:  # before any search
        read_card(file, verify=True)
    images = None if data is None else _images(data, cards[0], device)
    sizes, passed, start = _sizes(blocks, len(files), k), 0, time.perf_counter()
    if blocks == "search" and images:
        cost, passed = costs_of_blocks(files, given, images, device, batch_size)
        sizes = best_blocks(cost, k)
    parts = [slice(lo, hi) for lo, hi in itertools.pairwise(itertools.accumulate(sizes, initial=0))]
    if idle := [f"{files[part][0]} .. {files[part][-1]}" for part in parts if not sum(given[part]) > 0]:
        raise InputError(f"--merge-weights: all weights are 0 in the blocks {'; '.join(idle)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    merged, written = list[Merged](), list[Path]()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        for part in parts:
            members = [load_expert(f)[0].to(device) for f in files[part]]
            share = [w / sum(given[part]) for w in given[part]]
            if weights == "search" and images and len(members) > 1:
                share, more = search_weights(members, images, batch_size)
                passed += more
            apart = sum(step_error(member, images, batch_size) for member in members) if images else 0.0
            model = _joined(members)
            model.load_state_dict(average([member.state_dict() for member in members], share))
            errors = (apart, step_error(model, images, batch_size)) if images else None
            seconds = round(time.perf_counter() - start, 3) if passed else 0.0
            card = _card(model, cards[part], [sha256(f) for f in files[part]], share, passed, seconds)
            written.append(Path(folder) / f"{len(written):04d}.safetensors")
            save_expert(written[-1], model, card)
            merged.append(Merged(model.rows, files[part], share, errors))
            passed, start = 0, time.perf_counter()
        compose(written, out)
    return merged


def _facts(card: Card, known: bool) -> dict[str, Any]:
    """Return the fields in which experts to be merged must agree.

    known: compare hashes of the random initial weights instead of seeds.
    """
    random = f"random, of hash {card.initial}" if known else f"random, of seed {card.seed}"
    return {
        "rows": card.rows,
        "S": card.states["init_args"]["S"],
        "table": card.fingerprint,
        "parametrisation": card.objective["class_path"].rpartition(".")[2],
        "image range": card.image_range,
        "training data": card.data,
        "weights": card.kind,
        "network": filled(card.network),
        "its initial weights": f"those of {card.warm_from}" if card.warm_from else random,
    }


def _given(weights: Any, cards: Sequence[Card]) -> list[float]:
    """Return the weight of every expert relative to the others of its block, before any search."""
    if weights == "images":
        return [float(card.images_seen) for card in cards]
    if weights in ("uniform", "search"):
        return [1.0] * len(cards)
    given = [] if isinstance(weights, str) else [float(w) for w in weights]
    if len(given) != len(cards) or not all(0 <= w < float("inf") for w in given):
        raise InputError(
            f"--merge-weights {weights}: uniform, images, search, or a number >= 0 for each of {len(cards)} experts in "
            "the order of rows"
        )
    return given


def _sizes(blocks: Any, n: int, k: int) -> list[int]:
    """Return the number of experts in each block."""
    if blocks in ("equal", "search"):
        return [hi - lo for lo, hi in itertools.pairwise(round(j * n / k) for j in range(k + 1))]
    sizes = [0] if isinstance(blocks, str) else [int(size) for size in blocks]
    if len(sizes) != k or sum(sizes) != n or min(sizes) < 1:
        raise InputError(f"--merge-blocks {blocks}: equal, search, or {k} numbers of experts whose sum is {n}")
    return sizes


def _images(data: ImageSet, card: Card, device: str) -> Images:
    """Return the images of a data set as input of a model with this card; of latents their means."""
    network = card.network["init_args"]
    batch = data.batch(torch.arange(len(data)))
    x0 = from_uint8(batch["image"]) if "image" in batch else batch["latent"][:, 0].float()
    if list(x0.shape[1:]) != network["shape"]:
        raise InputError(f"--merge-data: its images are {list(x0.shape[1:])}, the experts make {network['shape']}")
    classes, label = network.get("classes"), batch["label"]
    if classes and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise InputError(
            f"--merge-data: its labels run from {int(label.min())} to {int(label.max())} (-1: none), the experts have "
            f"classes 0 to {classes - 1}"
        )
    return Images(x0.to(device), batch["id"].tolist(), label.to(device) if classes else None)


def _joined(members: Sequence[Denoiser]) -> Denoiser:
    """Return the first member's network as a denoiser of the rows of all members."""
    first = members[0]
    rows = sorted(s for member in members for s in member.rows)
    return Denoiser(first.network, first.objective, first.states, rows).to(next(first.parameters()).device).eval()


def _card(
    model: Denoiser, cards: Sequence[Card], digests: Sequence[str], share: Sequence[float], passed: int, seconds: float
) -> Card:
    """Return the card of an average.

    Its parents are those of the members, each once, and the members themselves with rows and weight.
    """
    parents = {p["sha256"]: p for card in cards for p in card.parents}
    for digest, card, weight in zip(digests, cards, share, strict=True):
        cost = {name: getattr(card, name) for name in (*PARENT, "rounds")}
        parents[digest] = {"sha256": digest, **cost, "rows": card.rows, "weight": weight}
    return Card.of(
        model,
        module=f"{__name__}.merge",
        data=cards[0].data,
        weights=cards[0].kind,
        average=cards[0].average if all(card.average == cards[0].average for card in cards) else None,
        images_seen=passed,
        steps=0,
        seconds=seconds,
        seed=cards[0].seed,
        label_drop=min((card.label_drop for card in cards if card.label_drop is not None), default=None),
        version=lightning_tdisent.__version__,
        parents=list(parents.values()),
    )
