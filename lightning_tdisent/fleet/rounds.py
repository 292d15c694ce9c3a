"""Adaptive budgets: after each round of training, decide from all error curves how many images each expert gets."""

import math
from typing import TYPE_CHECKING, Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.budget import effects, fit_curve, grant, value
from lightning_tdisent.fleet.store import dump_json, read_json
from lightning_tdisent.runs import CURVE

if TYPE_CHECKING:
    from lightning_tdisent.fleet.plan import Fleet

FOLDER = "rounds"


def newest(fleet: "Fleet") -> tuple[int, dict[str, Any] | None]:
    """Return the number and content of the last decision; (0, None) before the first one."""
    numbers = [int(name[:-5]) for name in fleet.store.names(FOLDER) if name.endswith(".json") and name[:-5].isdigit()]
    if not numbers:
        return 0, None
    return max(numbers), read_json(fleet.store, f"{FOLDER}/{max(numbers):04d}.json", ("images",))


def targets(fleet: "Fleet") -> tuple[int, dict[str, int]]:
    """Return the number of the current round and the images that each expert has seen at its end.

    The images are rounded down to whole optimizer steps.
    """
    number, decided = newest(fleet) if fleet.budget.rule == "adaptive" else (0, None)
    images = decided["images"] if decided else {e.name: e.images for e in fleet.experts}
    return number, {e.name: images[e.name] // e.step * e.step for e in fleet.experts}


def advance(fleet: "Fleet", number: int) -> bool:
    """Decide the targets of the round after ``number``, whose targets all experts have reached.

    Return False if there is no further round, and True if one was decided, by this or another worker. The decision
    depends only on the curves, so that every worker would write the same.

    Raises InputError if a curve is missing, has fewer than two points, or is not finite.
    """
    if fleet.budget.rule != "adaptive":
        return False
    now, images = targets(fleet)
    if now != number:
        return True
    left, step = _remaining(fleet, number, images)
    if left < step:
        return False
    curves = {e.name: curve(fleet, e.name) or {} for e in fleet.experts}
    if missing := [name for name, content in curves.items() if not content]:
        where = f"{fleet.store}/{fleet.folder(missing[0])}/{CURVE}"
        raise InputError(f"{missing[0]}: {where} is missing; an adaptive budget needs it")
    weight = effects(fleet.table["log_snr"], curves[fleet.experts[0].name]["variances"])
    fits, curve_of = {}, {}
    for e in fleet.experts:
        points = [
            (n, sum(weight[s - 1] * error for s, error in zip(e.rows, errors, strict=True)))
            for n, errors in curves[e.name]["points"]
            if n <= images[e.name]
        ]
        if bad := [n for n, error in points if not math.isfinite(error)]:
            raise InputError(
                f"{e.name}: its held-out error after {bad[0]:,} images is not finite, so that the budget cannot be "
                "split: the training diverged. Plan a new fleet with a lower model.lr (set: {model.lr: ..})"
            )
        if len({n for n, _ in points}) < 2:
            raise InputError(
                f"{e.name}: its curve has {len(points)} points, but a fit needs at least two. Plan a new fleet that "
                "validates more often (set: {trainer.val_check_interval: ..})"
            )
        fits[e.name], curve_of[e.name] = fit_curve(points), points
    part = left if number == fleet.budget.rounds - 1 else left / (fleet.budget.rounds - number)
    unit = max(1, int(part / (8 * len(fleet.experts))) // step) * step
    names = [e.name for e in fleet.experts]
    granted = grant([fits[n] for n in names], [images[n] for n in names], [e.cost for e in fleet.experts], unit, part)
    new = dict(zip(names, granted, strict=True))
    content = {
        "images": new,
        "effects": weight,
        "fits": fits,
        "predicted": {n: value(fits[n], new[n]) for n in names},
        "curves": curve_of,
    }
    fleet.store.create(f"{FOLDER}/{number + 1:04d}.json", dump_json(content, indent=1))
    return True


def last(fleet: "Fleet") -> bool:
    """Return True if no round follows the current one."""
    left, step = _remaining(fleet, *targets(fleet))
    return fleet.budget.rule != "adaptive" or left < step


def _remaining(fleet: "Fleet", number: int, images: dict[str, int]) -> tuple[float, int]:
    """Return the images left for later rounds, and the least common multiple of the images per step of all experts.

    Images left are counted as images of the largest expert network.
    """
    spent = sum(e.cost * images[e.name] for e in fleet.experts) + fleet.shared_cost
    left = fleet.budget.images - spent if number < fleet.budget.rounds else 0.0
    return left, math.lcm(*(e.step for e in fleet.experts))


def curve(fleet: "Fleet", name: str) -> dict[str, Any] | None:
    """Return the error curve of an expert or of the shared model; None if it has not written one."""
    return read_json(fleet.store, f"{fleet.folder(name)}/{CURVE}", ("points", "variances"))
