"""The experts of a plan: what a line of it says, and what lines may not say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_tdisent.errors import InputError, is_whole
from lightning_tdisent.fleet.kept import CONFIGS
from lightning_tdisent.fleet.keys import ANY, COUNT, SEED, known, refuse_kind
from lightning_tdisent.fleet.names import clashes, fault
from lightning_tdisent.models.agreement import ownership

FILE = "plan.yaml"
SHARED = "shared"
BEGUN = "begun"
IDENTITY = "fleet.json"  # id of a fleet in an object store, whose runs are trained in a local folder
# names in a fleet's folder that an expert must not have
FOLDERS = (SHARED, FILE, IDENTITY, BEGUN, CONFIGS, "scratch", "done", "failed", "leases", "logs", "rounds", "start")
RESERVED = {
    "run": "--out",
    "seed_everything": "seed",
    "trainer.max_steps": "images",
    "data.batch_size": "batch",
    "model.warm_start": "start",
    **dict.fromkeys(("model.rows", "model.expert", "model.experts"), "rows"),
}  # config keys that the plan sets, and the key of the plan that sets each
EXPERT_KEYS = dict.fromkeys(("name", "rows", "images", "batch", "seed", "start", "set", "cost", "parts"), ANY)


@dataclass(frozen=True)
class Facts:
    """Properties of the training that a ``fit`` command line defines: table, batch, network, training options.

    module: full name of the module class.
    fingerprint: fingerprint of the table.
    S: number of rows of the table, without row 0.
    index: index t of rows 1..S.
    log_snr: log-SNR of rows 1..S, first column of the table.
    batch: images per batch.
    weights: number of parameters.
    flops: FLOPs of a forward pass of one image.
    decay: learning rate schedule.
    max_steps: optimizer steps.
    validate: optimizer steps between validations, 0 if validation follows epochs.
    fits: description of network and prediction; equal if one training can start from the other's weights.
    sizes: numbers of consecutive rows that one network can serve; empty: one block of all rows.
    K: columns of the table.
    accumulate: batches per optimizer step and device (gradient accumulation).
    world: number of devices; an optimizer step has accumulate x world batches.
    devices: trainer.devices of the config; ``auto`` for all available devices.
    sees_state: whether the network is conditioned on the state, so that it cannot start from weights for other rows.
    """

    module: str
    fingerprint: str
    S: int
    index: list[int]
    log_snr: list[float]
    batch: int
    weights: int
    flops: float
    decay: str
    max_steps: int
    validate: float
    fits: str
    sizes: list[int] = field(default_factory=list)
    K: int = 1
    accumulate: int = 1
    world: int = 1
    devices: Any = 1
    sees_state: bool = False

    @property
    def parts(self) -> int:
        """Batches per optimizer step."""
        return self.accumulate * self.world


Describe = Callable[[list[str]], Facts]


@dataclass(frozen=True)
class Planned:
    """One expert of a plan.

    name: name of the expert and of its folder.
    rows: rows that it owns, ascending.
    images: images to train on.
    batch: images per batch.
    seed: seed of its training.
    start: initial weights: ``scratch``, ``shared``, the name of another expert, or a file or run folder.
    set: further config keys.
    cost: cost of one image relative to an image of the largest expert network; budgets are counted in this unit.
    parts: batches per optimizer step; more than 1 with gradient accumulation or several devices.
    """

    name: str
    rows: list[int]
    images: int
    batch: int
    seed: int
    start: str = "scratch"
    set: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0
    parts: int = 1

    @property
    def step(self) -> int:
        """Images per optimizer step."""
        return self.batch * self.parts


def refuse_unfit(experts: Sequence[Planned], S: int, shared: bool, where: str) -> None:
    """Raise InputError, with all problems, for experts that do not form a valid plan.

    Every row 1..S must be owned exactly once, names must differ, starts must exist and not be circular, and each expert
    must have at least the images of one optimizer step. shared: whether the plan has a shared model. where: prefix of
    the message.
    """
    names = [e.name for e in experts]
    unowned, wrong = ownership(names, [e.rows for e in experts], S)
    problems = [f"row {s} is owned by no expert" for s in unowned] + wrong
    problems += [f"two experts are called {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += clashes([(name, "expert") for name in dict.fromkeys(names)])
    starts = {e.name: e.start for e in experts}
    for e in experts:
        if e.start == SHARED and not shared:
            problems.append(f"{e.name} starts from the shared model, but the plan has none")
        seen, at = {e.name}, e.start
        while at in starts:
            if at in seen:
                problems.append(f"{e.name} starts from {e.start}, which waits for {e.name}")
                break
            seen.add(at)
            at = starts[at]
        if e.images < e.step:
            what = f"{e.parts} batches of {e.batch}" if e.parts > 1 else f"one batch of {e.batch}"
            problems.append(f"{e.name}: {e.images} images are less than {what}, so that nothing would be trained")
    if problems:
        raise InputError(f"{where}: this plan cannot be run:\n" + "\n".join(f"  - {p}" for p in problems))


def parse_expert(entry: Any, where: str) -> Planned:
    """Return the expert of a line of a plan. Raises InputError, with all problems, for a line that is not valid."""
    known(entry, EXPERT_KEYS, where, required=("name", "rows", "images", "batch", "seed", "start"))
    wrong = []
    for key, kind in (("images", COUNT), ("batch", COUNT), ("seed", SEED)):
        try:
            refuse_kind(entry[key], kind, key)
        except InputError as error:
            wrong.append(str(error))
    rows = entry["rows"]
    if not isinstance(rows, list) or not rows or not all(is_whole(s) for s in rows) or sorted(set(rows)) != rows:
        wrong.append(f"rows: {rows!r} (expected ascending row numbers)")
    name = entry["name"]
    if invalid := fault(name, FOLDERS, "._-+") or ("numbers stand for expert_NNN" if name.isdigit() else None):
        wrong.append(f"name: {name!r} ({invalid})")
    refuse_cost(entry, f"{where} ({name})")
    if not isinstance(entry["start"], str):
        wrong.append(f"start: {entry['start']!r}")
    if not isinstance(entry.get("set", {}), dict):
        wrong.append(f"set: {entry['set']!r} (expected a mapping of config keys)")
    if not is_whole(entry.get("parts", 1)) or entry.get("parts", 1) < 1:
        wrong.append(f"parts: {entry['parts']!r} (expected the batches per step, at least 1)")
    if wrong:
        raise InputError(f"{where} ({name}): {'; '.join(wrong)}")
    refuse_reserved(entry.get("set"), f"{where} ({name}): set")
    return Planned(**entry)


def whole_steps(entry: dict[str, Any], where: str) -> int:
    """Return the images of a shared model rounded down to whole optimizer steps; raise InputError for less than one."""
    images, batch, parts = entry["images"], entry["batch"], entry.get("parts", 1)
    step = batch * parts
    if not is_whole(images) or images < step:
        least = f"{parts} batches" if parts > 1 else "one batch"
        raise InputError(f"{where}: expected at least {least} of {batch} images, got {images!r}")
    return int(images // step * step)


def refuse_cost(entry: dict[str, Any], where: str) -> None:
    """Raise InputError unless ``cost`` is a finite number above 0 (relative to the largest expert network)."""
    cost = entry.get("cost", 1.0)
    if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 < cost < float("inf"):
        raise InputError(f"{where}: cost: expected a number above 0 (the largest network has cost 1), got {cost!r}")


def refuse_reserved(data: Any, where: str) -> None:
    """Raise InputError for settings that are not a mapping, and for keys that the plan itself sets."""
    if data is not None and not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping of config keys, got {data!r}")
    if invalid := [key for key in data or {} if key.replace(".init_args", "") in RESERVED]:
        instead = RESERVED[invalid[0].replace(".init_args", "")]
        raise InputError(f"{where}: {', '.join(invalid)}: set by the plan itself; change {instead} instead")
