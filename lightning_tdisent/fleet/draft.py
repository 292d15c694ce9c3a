"""Expand the YAML file of a fleet into its plan, which lists one training per expert."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_tdisent.diffusion.table import split_rows
from lightning_tdisent.errors import InputError, is_whole, nearest
from lightning_tdisent.files import typed
from lightning_tdisent.fleet.budget import Budget
from lightning_tdisent.fleet.kept import CONFIGS, copy_name, edits
from lightning_tdisent.fleet.keys import (
    ANY,
    COUNT,
    SEED,
    SETTINGS,
    TEXT,
    Assigned,
    known,
    merged,
    read_yaml,
    refuse_kind,
)
from lightning_tdisent.fleet.plan import DEVICES, SHARED_KEYS, Fleet, config_digest, flow, word_of
from lightning_tdisent.fleet.planned import (
    FILE,
    IDENTITY,
    SHARED,
    Describe,
    Facts,
    Planned,
    refuse_reserved,
    refuse_unfit,
    whole_steps,
)
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.runs import new_identity

PREVIOUS = "plan.previous.yaml"  # the plan that the current one replaced before any training started
KEYS = {"title": TEXT, "out": TEXT, "seed": SEED, "configs": ANY, "set": SETTINGS, "experts": ANY, "rows": ANY,
        "for_rows": ANY, "start": "text or a mapping", "budget": ANY, "batch": COUNT}  # fmt: skip
STARTS = "scratch, common, neighbour, {shared: {configs: .., images: ..}}, or a file or run folder with weights"
Copies = dict[str, tuple[bytes, Path]]  # name of the copy of a config -> its content and the path of the original


def draft(
    config: str | Path | Sequence[Path], describe: Describe, out: str | Path | None = None, seed: int | None = None,
    assigned: Assigned = (), changes: dict[str, Any] | None = None, begun: bool = False,
    check: Callable[[Fleet], Any] | None = None,
) -> Fleet:  # fmt: skip
    """Expand the YAML file of a fleet into a plan; write the plan and copies of all configs.

    config: YAML file of the fleet; of several, each is merged into those before it, and the first is where paths begin.
    describe: returns the facts of a ``fit`` command line.
    out: folder or URL of the fleet; by default ``out`` of the YAML, or ``runs/NAME``.
    seed: seed of all trainings; by default ``seed`` of the YAML, or 0.
    assigned: dotted keys of the YAML and their values, which replace those of the files; see `keys.assign`.
    changes: top-level keys that replace those of the YAML; its ``set`` is updated, not replaced.
    begun: whether work that contains this fleet, such as a study, has started. A different plan in the folder is
        replaced only if neither that work nor any expert has started.
    check: called with the fleet after its plan is written. If it raises InputError, the previous files are restored.
    Raises InputError for an invalid YAML file or config, and if the folder holds other files or a different plan that
        has started.
    """
    files = [Path(config)] if isinstance(config, (str, Path)) else config
    file = files[0]
    data = read_yaml(files, assigned=assigned)
    if isinstance(data, dict) and changes:
        data = merged(data, changes)
    data = known(data, KEYS, str(file), required=("configs", "budget"))
    store = Store(out or data.get("out") or f"runs/{file.stem}")
    if store.remote:
        store.check()
    seed = data.get("seed", 0) if seed is None else seed
    refuse_kind(seed, SEED, "--seed")
    for where, found in (("set", data.get("set")), *((f"for_rows.{k}", v) for k, v in _items(data.get("for_rows")))):
        refuse_reserved(found, f"{file}: {where}")
    common = dict(data.get("set") or {})
    configs, copies = _read_configs(file, data["configs"], "configs", {})
    shared = None
    if isinstance(data.get("start"), dict):
        known(data["start"], {SHARED: ANY}, f"{file}: start", required=(SHARED,))
        where = f"{file}: start.{SHARED}"
        shared = known(data["start"][SHARED], SHARED_KEYS, where, required=("configs", "images"))
        refuse_reserved(shared.get("set"), f"{file}: start.{SHARED}.set")
        shared["configs"], more = _read_configs(file, shared["configs"], f"start.{SHARED}.configs", copies)
        copies |= more

    def facts_of(names: Sequence[str], settings: dict[str, Any]) -> Facts:
        words = [word for name in names for word in ("--config", str(copies[name][1]))]
        words += [w for key, value in settings.items() for w in (f"--{key}", word_of(value))]
        try:
            return describe(["fit", *words, "--run", f"{store}/nothing"])
        except InputError as error:
            files = ", ".join(str(copies[name][1]) for name in names)
            raise error.within(f"{file}: configs {files}") from None

    facts = facts_of(list(configs), common)
    if facts.devices not in ("auto", "-1", -1, "1", 1):
        common.setdefault(DEVICES, facts.devices)
    if not facts.module.endswith("SingleState"):
        raise InputError(f"{file}: configs define a {facts.module}, but an expert must be a SingleState")
    blocks = _blocks(data, facts.sizes or [facts.S], str(file))
    specials = _for_rows(data.get("for_rows") or {}, blocks, facts.S, str(file))
    batch = int(data.get("batch") or facts.batch)
    kinds: dict[str, Facts] = {}
    for rows, more in zip(blocks, specials, strict=True):
        if flow(more) not in kinds:
            kinds[flow(more)] = facts_of(list(configs), {DEVICES: 1, **common, "model.rows": rows, **more})
    largest = max(kind.flops for kind in kinds.values())
    costs = [float(f"{kinds[flow(more)].flops / largest:.4g}") for more in specials]
    parts = [kinds[flow(more)].parts for more in specials]
    if shared:
        of_shared = facts_of(list(shared["configs"]), {DEVICES: 1, **common, **shared.get("set", {})})
        shared["batch"] = int(shared.get("batch") or of_shared.batch)
        if of_shared.parts > 1:
            shared["parts"] = of_shared.parts
        shared["images"] = whole_steps(shared, f"{file}: start.{SHARED}.images")
        if of_shared.flops != largest:
            shared["cost"] = float(f"{of_shared.flops / largest:.4g}")
    budget = Budget.of(data["budget"], f"{file}: budget")
    free = budget.images - (shared["images"] * shared.get("cost", 1.0) if shared else 0)
    step = batch * math.lcm(*parts)
    images = budget.split(free, step, [[facts.log_snr[s - 1] for s in rows] for rows in blocks], costs, str(file))
    start = data.get("start", "common")
    names = [f"expert_{k:03d}" for k in range(1, len(blocks) + 1)]
    refuse_kind(seed + len(blocks) - 1, SEED, f"{file}: seed of {names[-1]}")
    experts = []
    for k, (name, rows) in enumerate(zip(names, blocks, strict=True)):
        begin = SHARED if shared else "scratch" if start == "common" else str(start)
        if any(key.startswith("model.network") for key in specials[k]):
            begin = "scratch"  # weights of a different network do not fit
        elif start == "neighbour":  # a chain: the expert of the noisiest rows is trained first
            begin = names[k + 1] if k + 1 < len(names) else "scratch"
        elif begin not in ("scratch", SHARED):
            begin = _resolve_start(file, begin)
        own = seed + k if start == "scratch" else seed
        experts.append(Planned(name, rows, images[k], batch, own, begin, specials[k], costs[k], parts[k]))
    table = {"fingerprint": facts.fingerprint, "S": facts.S, "index": facts.index}
    table["log_snr"] = [float(f"{L:.8g}") for L in facts.log_snr]
    fleet = Fleet(
        store, str(data.get("title", file.stem)), seed, table, budget, configs,
        common, shared, experts,
    )  # fmt: skip
    refuse_unfit(experts, facts.S, shared is not None, str(file))
    before = {name: store.read(name) for name in (FILE, PREVIOUS, IDENTITY, *copies)}
    _write_plan(fleet, {name: content for name, (content, _) in copies.items()}, begun)
    try:
        if check is not None:
            check(fleet)
    except InputError:
        for name, content in before.items():
            if content is None:
                store.remove(name)
            elif store.read(name) != content:
                store.write(name, content)
        for folder in () if store.remote else (store.path(CONFIGS), store.path("")):
            with contextlib.suppress(OSError):  # rmdir removes only empty folders
                folder.rmdir()
        raise
    return fleet


def _write_plan(fleet: Fleet, copies: dict[str, bytes], begun: bool) -> None:
    """Write the configs and the plan.

    The plan is written last: its presence means that the configs are complete. Refuses a folder with other files or
    with a different plan that has started.
    """
    fleet.store.check()
    text = fleet.text().encode()
    there = fleet.store.read(FILE)
    if there is None and (others := _other_names(fleet.store)):
        raise InputError(
            f"{fleet.store} is not empty and holds no plan of a fleet (it has {', '.join(others[:5])}); choose another "
            "--out"
        )
    differ = [] if there is None else edits(there, text)
    if differ and (begun or fleet.store.names("leases")):
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise InputError(
            f"{fleet.store} holds another plan, which has started ({'; '.join(differ[:5])}{more}). Show it with "
            f"{typed('fleet', 'plan', str(fleet.store))}, edit {FILE} there, or choose another --out"
        )
    if there is not None and not differ and all(fleet.store.read(name) == content for name, content in copies.items()):
        return
    if differ and there is not None:
        fleet.store.write(PREVIOUS, there)
        print(f"{fleet.store}: its plan has not started; it is replaced, and kept as {PREVIOUS}. Differences:")
        print("\n".join(f"  - {line}" for line in differ))
    for name, content in copies.items():
        fleet.store.write(name, content)
    if fleet.store.remote:
        fleet.store.create(IDENTITY, json.dumps({"schema": 1, "id": new_identity()}).encode())
    fleet.store.write(FILE, text)


def _other_names(store: Store) -> list[str]:
    """Return the names in the place of a new fleet, except the copies of configs, which are written before the plan."""
    if store.remote:
        return store.names("")
    return sorted(p.name for p in Path(store.where).iterdir() if p.name != CONFIGS and not p.name.startswith("."))


def _blocks(data: dict[str, Any], sizes: Sequence[int], file: str) -> list[list[int]]:
    S = sum(sizes)
    if data.get("rows") is not None and data.get("experts") is not None:
        raise InputError(f"{file}: experts and rows are both given; give one of them")
    if data.get("rows") is not None:
        rows = data["rows"]
        good = isinstance(rows, list) and all(isinstance(b, list) and all(is_whole(s) for s in b) for b in rows)
        if not good:
            raise InputError(f"{file}: rows: expected a list of lists of row numbers, got {rows!r}")
        if far := sorted({s for block in rows for s in block} - {*range(1, S + 1)}):
            raise InputError(f"{file}: rows: {far} are not among 1..{S}")
        return [sorted(block) for block in rows]
    owners = S if data.get("experts") is None else data["experts"]
    try:
        return split_rows(sizes, owners)
    except (InputError, TypeError) as error:
        raise InputError(
            f"{file}: {error if isinstance(error, InputError) else f'experts: expected a number, got {owners!r}'}"
        ) from None


def _for_rows(data: Any, blocks: Sequence[Sequence[int]], S: int, file: str) -> list[dict[str, Any]]:
    """Return each expert's additional settings: those of each range of ``for_rows`` that contains all its rows."""
    if not isinstance(data, dict):
        raise InputError(f"{file}: for_rows: expected a mapping of FIRST..LAST to config keys, got {data!r}")
    out: list[dict[str, Any]] = [{} for _ in blocks]
    set_by: list[dict[str, str]] = [{} for _ in blocks]  # range that set each key
    for key, chosen in data.items():
        first, _, last = str(key).partition("..")
        if not first.isdigit() or not (last or first).isdigit() or not 1 <= int(first) <= int(last or first) <= S:
            raise InputError(f"{file}: for_rows: {key!r} is not a range FIRST..LAST within 1..{S}")
        if not isinstance(chosen, dict):
            raise InputError(f"{file}: for_rows.{key}: expected a mapping of config keys, got {chosen!r}")
        span = range(int(first), int(last or first) + 1)
        for k, rows in enumerate(blocks):
            inside = [s in span for s in rows]
            if any(inside) and not all(inside):
                raise InputError(f"{file}: for_rows: {key} contains only some of the rows {list(rows)} of one expert")
            if all(inside):
                for name in chosen:
                    if name in out[k] and out[k][name] != chosen[name]:
                        raise InputError(
                            f"{file}: for_rows: {name} of rows {list(rows)} is {out[k][name]!r} in {set_by[k][name]} "
                            f"and {chosen[name]!r} in {key}; set it in only one range"
                        )
                out[k] |= chosen
                set_by[k] |= dict.fromkeys(chosen, str(key))
    return out


def _read_configs(file: Path, names: Any, key: str, taken: Copies) -> tuple[dict[str, str], Copies]:
    """Read configs; return the digest of each by the name of its copy, and the copies with their original paths."""
    if not isinstance(names, list) or not names:
        raise InputError(f"{file}: {key}: expected a list of YAML files, got {names!r}")
    digests: dict[str, str] = {}
    copies: Copies = {}
    for name in names:
        path = file.parent / str(name)
        if not path.is_file():
            near = nearest(str(name), [p.name for p in file.parent.glob("*.yaml")])
            raise InputError(f"{file}: {key}: {path}: no such file.{near}")
        content = path.read_bytes()
        clash = {**copies, **{name: 0 for name, (other, _) in taken.items() if other != content}}
        copy = copy_name(f"{path.parent.resolve().name}_{path.stem}", clash)
        digests[copy], copies[copy] = config_digest(content), (content, path)
    return digests, copies


def _resolve_start(file: Path, start: str) -> str:
    """Return the absolute path of initial weights, given relative to the working directory or to the YAML file."""
    for path in (Path(start), file.parent / start):
        if path.exists():
            return str(path.resolve())
    raise InputError(f"{file}: start: no file or folder {start!r}; give {STARTS}")


def _items(data: Any) -> list[tuple[str, Any]]:
    return list(data.items()) if isinstance(data, dict) else []
