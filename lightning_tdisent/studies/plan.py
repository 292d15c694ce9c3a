"""Expand the YAML file of a study into independent jobs, composites, and contenders to evaluate."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_tdisent.diffusion.spec import SomePart, build, class_path
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.diffusion.table import row_of
from lightning_tdisent.errors import InputError, is_whole, nearest
from lightning_tdisent.files import output_path
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.kept import CONFIGS, copy_name
from lightning_tdisent.fleet.keys import (
    ANY,
    MAPPING,
    SEED,
    SETTINGS,
    TEXT,
    WHOLE,
    Assigned,
    known,
    read_yaml,
    refuse_kind,
)
from lightning_tdisent.fleet.names import clashes, fault
from lightning_tdisent.fleet.plan import config_digest
from lightning_tdisent.priors.prior import Prior
from lightning_tdisent.sampling.sampler import Sampler
from lightning_tdisent.studies.claim import FILE, SCHEMA, Plan, kept
from lightning_tdisent.studies.sweep import row_or_share, unrolled

KEYS = {
    **dict.fromkeys(("title", "out", "data", "split", "reference", "weights", "notes"), TEXT),
    **dict.fromkeys(("runs", "priors", "contenders"), "a mapping of names to settings"),
    **dict.fromkeys(("n", "n_held_out"), WHOLE),
    **dict.fromkeys(("seed", "first_seed"), SEED),
    "protocol": "text or a mapping",
    "bits": MAPPING,
    "diffusion_time": ANY,
}
RUN_KEYS = dict.fromkeys(("configs", "experts", "warm_start", "set"), ANY)
FLEET_KEYS = {"fleet": TEXT, "budget": "an integer or a mapping", "start": "text or a mapping", "set": SETTINGS}
PRIOR_KEYS = dict.fromkeys(("run", "at", "prior"), ANY)
CONTENDER_KEYS = dict.fromkeys(("run", "sampler", "prior"), ANY)
PART_KEYS = {"class_path": TEXT, "init_args": MAPPING}
RESERVED = (FILE, CONFIGS, "priors", "leases", "failed", "logs", "measured", "observations", "study.json",
            "results.json", "samples.safetensors", "report.html", "fleets.html")  # fmt: skip
DECIDED = {
    "run": "out",
    "seed_everything": "seed",
    "model.warm_start": "warm_start",
    **dict.fromkeys(("model.expert", "model.experts"), "experts"),
}  # config keys that the study sets, and the key of the study that sets each


def plan(
    config: str | Path | Sequence[Path], out: str | Path | None = None, seed: int | None = None, assigned: Assigned = ()
) -> Plan:
    """Read the YAML file of a study and return its plan; nothing is written.

    config: YAML file of the study; of several, each is merged into those before it, and the first is where paths begin.
    out: folder of the study; by default ``out`` of the YAML, or ``runs/NAME``.
    seed: seed of all trainings; by default ``seed`` of the YAML, or 0.
    assigned: dotted keys of the YAML and their values, which replace those of the files; see `keys.assign`.

    Raises InputError for unknown keys, invalid names or values, references to unknown runs, and missing configs.
    """
    files = [Path(config)] if isinstance(config, (str, Path)) else config
    if not files:
        raise InputError("study: name the YAML with --config FILE")
    file = files[0]
    study = known(read_yaml(files, assigned=assigned), KEYS, str(file), required=("runs", "data", "protocol"))
    written = read_yaml(files, secrets=False, assigned=assigned)
    written = {key: value for key, value in written.items() if value is not None}
    if not study["runs"]:
        raise InputError(f"{file}: runs: at least one run is required")
    study = unrolled(study, str(file))
    if not study["contenders"]:
        raise InputError(f"{file}: contenders, or diffusion_time, is missing")
    folder = output_path(out or study.get("out") or f"runs/{file.stem}", "--out" if out else f"{file}: out")
    seed = study.get("seed", 0) if seed is None else seed
    refuse_kind(seed, SEED, "--seed")
    _refuse_names(study, str(file))
    configs: dict[str, tuple[Path, bytes]] = {}
    jobs: list[Job] = []
    composites: dict[str, Path] = {}
    runs: dict[str, Path] = {}
    members: dict[str, list[str]] = {}
    fleets: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, run in study["runs"].items():
        runs[name], members[name] = folder / name, []
        if "fleet" in run:
            known(run, FLEET_KEYS, f"{file}: runs.{name}")
            fleets[name] = (
                _add_config(file, run["fleet"], f"runs.{name}.fleet", configs),
                {key: run[key] for key in ("budget", "start", "set") if run.get(key)},
            )
            _add_fleet_configs(file, str(run["fleet"]), fleets[name], configs)
            runs[name] = composites[name] = folder / f"{name}_composite"
            continue
        argv = ["fit"]
        for entry in run["configs"]:
            argv += ["--config", str(_add_config(file, entry, f"runs.{name}.configs", configs))]
        chosen = run.get("set") or {}
        decided = DECIDED if run.get("experts") is None else {**DECIDED, "model.rows": "experts"}
        if invalid := [key for key in chosen if key.replace(".init_args", "") in decided]:
            instead = decided[invalid[0].replace(".init_args", "")]
            raise InputError(f"{file}: runs.{name}: set: {invalid[0]}: set by the study; change {instead} instead")
        for key, value in {**chosen, "seed_everything": seed}.items():
            argv += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        needs: tuple[str, ...] = ()
        if warm := str(run.get("warm_start") or ""):
            if not members.get(warm) or warm in composites:
                singles = [m for m in members if m not in composites and m != name]
                raise InputError(
                    f"{file}: runs.{name}.warm_start: {warm!r} is not an earlier run of a single network."
                    f"{nearest(warm, singles)}"
                )
            needs, argv = tuple(members[warm]), [*argv, "--model.warm_start", str(folder / warm)]
        count = run.get("experts")
        if count is None:
            jobs.append(Job(name, [*argv, "--run", str(folder / name)], folder / name, needs))
            members[name] = [name]
            continue
        runs[name] = composites[name] = folder / f"{name}_composite"
        members[name] = [f"{name}_{k:03d}" for k in range(1, count + 1)]
        for k, label in enumerate(members[name], 1):
            place = folder / name / f"expert_{k:03d}"
            words = [*argv, "--model.expert", str(k), "--model.experts", str(count), "--run", str(place)]
            jobs.append(Job(label, words, place, needs))
    priors: dict[Path, tuple[str, int | float, dict[str, Any]]] = {}
    for name, entry in study["priors"].items():
        known(entry, PRIOR_KEYS, f"{file}: priors.{name}", required=tuple(PRIOR_KEYS))
        if str(entry["run"]) not in runs:
            raise InputError(f"{file}: priors.{name}.run: no run {entry['run']!r}.{nearest(str(entry['run']), runs)}")
        part, prior = part_of(entry["prior"], "Gaussian", Prior, f"{file}: priors.{name}.prior")
        at = row_or_share(entry["at"], f"{file}: priors.{name}.at")
        if prior.learned:
            raise InputError(f"{file}: priors.{name}: {part['class_path']} is trained: make it a run with PriorModule")
        priors[folder / "priors" / name] = (str(runs[str(entry["run"])]), at, part)
    contenders = []
    for name, entry in study["contenders"].items():
        where = f"{file}: contenders.{name}"
        known(entry, CONTENDER_KEYS, where, required=("run",))
        if str(entry["run"]) not in runs:
            raise InputError(f"{where}.run: no run {entry['run']!r}.{nearest(str(entry['run']), runs)}")
        source = str(runs[str(entry["run"])])
        part, _ = part_of(entry.get("sampler"), "DDIM", Sampler, f"{where}.sampler")
        contenders.append({"name": name, "source": source, "sampler": part})
        if start := str(entry.get("prior") or ""):
            if start.startswith("cut:"):
                row_or_share(start[4:], f"{where}.prior: {start}")
                contenders[-1]["prior"] = start
                continue
            if start not in study["priors"] and start not in [m for m in runs if m not in composites]:
                options = [*study["priors"], *(m for m in runs if m not in composites)]
                raise InputError(f"{where}.prior: no prior {start!r}.{nearest(start, options)}")
            contenders[-1]["prior"] = str(folder / "priors" / start if start in study["priors"] else runs[start])
    evaluation = {
        "out": str(folder),
        "title": study.get("title", file.stem),
        "notes": study.get("notes", ""),
        "contenders": contenders,
        "data": study["data"],
        "split": study.get("split", "test"),
        "reference": study.get("reference", "train"),
        "protocol": study["protocol"],
        "weights": study.get("weights"),
        "n": study.get("n"),
        "n_held_out": study.get("n_held_out"),
        "first_seed": study.get("first_seed"),
        "bits": study.get("bits"),
        "runs": {job.name: str(job.folder) for job in jobs},
    }
    before = (kept(folder) or {"configs": {}})["configs"]
    copies = {key: entry["copy"] for key, entry in before.items() if isinstance(entry, dict)}
    for key, (path, _) in configs.items():
        copies.setdefault(key, copy_name(path.stem, copies.values()))
    entries = {key: {"copy": copies[key], "sha256": config_digest(text)} for key, (_, text) in configs.items()}
    content = {"schema": SCHEMA, "study": written, "seed": seed, "configs": entries}
    content = json.loads(json.dumps(content))
    return Plan(folder, jobs, runs, members, composites, fleets, priors, seed, evaluation, content, configs)


def _refuse_names(study: dict[str, Any], file: str) -> None:
    """Raise InputError, with all problems, for names that are invalid or collide, and for runs with invalid values."""
    problems, claims = [], []
    for key in ("runs", "priors", "contenders"):
        for name in study[key]:
            if invalid := fault(name, RESERVED if key == "runs" else ()):
                problems.append(f"{key}: {name!r}: {invalid}")
            if key != "contenders":
                claims.append((str(name), f"{key}.{name}"))
    for name, run in study["runs"].items():
        where = f"runs.{name}"
        if isinstance(run, dict) and "fleet" in run:
            claims.append((f"{name}_composite", where))
            continue
        known(run, RUN_KEYS, f"{file}: {where}", required=("configs",))
        if not isinstance(run["configs"], list) or not run["configs"]:
            problems.append(f"{where}.configs: expected a list of YAML files, got {run['configs']!r}")
        if not isinstance(run.get("set") or {}, dict):
            problems.append(f"{where}.set: expected a mapping of config keys, got {run['set']!r}")
        count = run.get("experts")
        if count is None:
            continue
        if not is_whole(count) or count < 1:
            problems.append(f"{where}.experts: expected an integer of at least 1, got {count!r}")
            continue
        claims += [(f"{name}_{k:03d}", f"{where}.experts") for k in range(1, count + 1)]
        claims.append((f"{name}_composite", where))
    problems += clashes(claims) + clashes([(str(name), "contenders") for name in study["contenders"]])
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise InputError(f"{file}: invalid names or settings:\n{lines}", where=file, problems=problems)


def _add_fleet_configs(
    file: Path, entry: str, fleet: tuple[Path, dict[str, Any]], configs: dict[str, tuple[Path, bytes]]
) -> None:
    """Add the configs named by a fleet's YAML file, so that later edits of them are detected; `draft` checks them."""
    path, changes = fleet
    data = read_yaml(path)
    data = data | changes if isinstance(data, dict) else {}
    start = data.get("start")
    shared = start.get("shared") if isinstance(start, dict) else None
    for named in (data.get("configs"), shared.get("configs") if isinstance(shared, dict) else None):
        for name in named if isinstance(named, list) else []:
            if (path.parent / str(name)).is_file():
                _add_config(file, Path(entry).parent / str(name), entry, configs)


class Role(NamedTuple):
    """Role of a run in a study: its training.

    kind: ``model`` (of images), ``prior``, or empty for neither.
    name: name of its class.
    states: its table, if it has one; the table of a prior ends at the row of the prior.
    """

    kind: str
    name: str
    states: LatentStates | None


def refuse_roles(todo: Plan, roles: dict[str, Role]) -> bool:
    """Raise InputError, with all problems, for runs that the study uses for a purpose that they do not fit.

    roles: roles by names of runs. Returns True if a contender is conditional.
    """
    by_folder = {str(place): name for name, place in todo.runs.items()}
    contenders = {
        c["name"]: (by_folder[c["source"]], by_folder.get(c.get("prior"))) for c in todo.evaluation["contenders"]
    }
    fitted = {place.name: by_folder[source] for place, (source, _, _) in todo.priors.items()}
    uses = [(f"contenders.{name}.run", run, "model") for name, (run, _) in contenders.items()]
    uses += [(f"contenders.{name}.prior", run, "prior") for name, (_, run) in contenders.items() if run]
    uses += [(f"priors.{name}.run", run, "model") for name, run in fitted.items()]
    warm = [
        (name, str(run["warm_start"])) for name, run in todo.content["study"]["runs"].items() if run.get("warm_start")
    ]
    uses += [(f"runs.{name}.warm_start", start, "model") for name, start in warm]
    problems = [
        f"runs.{name}: its config defines a {role.name}, which is neither a model of images nor a prior"
        for name, role in roles.items()
        if not role.kind
    ]
    problems += [
        f"{where}: {run} trains a {roles[run].kind} ({roles[run].name}), but a {kind} is required"
        for where, run, kind in uses
        if roles[run].kind not in ("", kind)
    ]
    tables = {run: role.states for run, role in roles.items() if role.kind == "model" and role.states is not None}
    one_column = [(f"priors.{name}.run", run, "priors are fitted only on") for name, run in fitted.items()]
    cut_off = {c["name"] for c in todo.evaluation["contenders"] if str(c.get("prior")).startswith("cut:")}
    one_column += [
        (f"contenders.{name}.prior", contenders[name][0], "a chain is cut only on") for name in sorted(cut_off)
    ]
    if todo.evaluation["bits"] is not None:  # defined for columns that are channels, not for columns of components
        measured = [(name, run) for name, (run, _) in contenders.items() if run in tables and tables[run].image_shape]
        one_column += [(f"contenders.{name}", run, "bits are measured only on") for name, run in measured]
    problems += [
        f"{where}: {run} has a table of {tables[run].K} columns, but {what} tables of one column"
        for where, run, what in one_column
        if run in tables and tables[run].K > 1
    ]
    for name, (run, start) in contenders.items():
        cut = roles[start].states if start and roles[start].kind == "prior" else None
        if cut is not None and run in tables and not _is_truncation(tables[run], cut):
            problems.append(f"contenders.{name}.prior: {start} is at row {cut.S} of a table that differs from {run}'s")
    if problems:
        raise InputError("this study cannot be run:\n" + "\n".join(f"  - {p}" for p in problems))
    return any(tables[run].observation is not None for run, _ in contenders.values())


def _is_truncation(states: LatentStates, cut: LatentStates) -> bool:
    """Return True if ``states`` truncated at the last row of ``cut`` equals ``cut``."""
    return states.K == 1 and cut.S <= states.S and states.truncate(cut.S).fingerprint == cut.fingerprint


def refuse_samplers(todo: Plan, roles: dict[str, Role]) -> None:
    """Raise InputError for contenders whose sampler does not fit the table of their run; roles: by names of runs."""
    by_folder, problems = {str(place): name for name, place in todo.runs.items()}, []
    for contender in todo.evaluation["contenders"]:
        states, start = roles[by_folder[contender["source"]]].states, contender.get("prior")
        try:
            if start in by_folder:  # a run that trains a prior; its table ends at the row of the prior
                states = roles[by_folder[start]].states
            elif start is not None and states is not None:
                at = row_or_share(start[4:], start) if start.startswith("cut:") else todo.priors[Path(start)][1]
                states = states.truncate(at)
            if states is not None:
                build(contender["sampler"], Sampler).check(states)
        except InputError as error:
            problems.append(f"contenders.{contender['name']}: {error}")
    if problems:
        raise InputError("; ".join(problems))


def refuse_cuts(todo: Plan, describe: Callable[[list[str]], Any], fleets: dict[str, int]) -> None:
    """Raise InputError for priors and truncated chains at rows that their model does not have, before any training.

    describe: returns the table of a ``fit`` command line, or another object with its number of rows ``S``. fleets:
    number of rows by names of fleets.
    """
    rows = {str(todo.composites[name]): S for name, S in fleets.items()}
    starts = [(source, at) for source, at, _ in todo.priors.values()]
    cuts = [(c["source"], c["prior"][4:]) for c in todo.evaluation["contenders"] if "cut:" in c.get("prior", "")]
    for source, at in [*starts, *((source, row_or_share(text, source)) for source, text in cuts)]:
        for name in [name for name, place in todo.runs.items() if str(place) == source and source not in rows]:
            rows[source] = describe(next(job for job in todo.jobs if job.name in todo.members[name]).argv).S
        try:
            row_of(at, rows[source])
        except InputError as error:
            raise error.within(source) from None


def part_of(
    entry: Any,
    default: str,
    kind: type[SomePart],
    where: str,
    aliases: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], SomePart]:
    """Return the class path with arguments, and the part itself, that an entry of a config or an option describes.

    entry: a name or a class path (see `spec.class_path`, also for ``aliases``), a mapping of ``class_path`` and
    ``init_args``, or None for the class ``default``; more: further arguments, which replace those of the entry. Raises
    InputError that begins with ``where``.
    """
    entry = {"class_path": entry} if isinstance(entry, str) else {"class_path": default} if entry is None else entry
    entry = known(entry, PART_KEYS, where, required=("class_path",))
    try:
        path = class_path(entry["class_path"], kind, aliases)
        part = {"class_path": path, "init_args": {**entry.get("init_args", {}), **(more or {})}}
        return part, build(part, kind)
    except InputError as error:
        raise error.within(where) from None


def _add_config(file: Path, entry: Any, where: str, configs: dict[str, tuple[Path, bytes]]) -> Path:
    """Return the path of a config that a study names, and add it to ``configs``."""
    path = file.parent / str(entry)
    if not path.is_file():
        near = nearest(str(entry), [p.name for p in file.parent.glob("*.yaml")])
        raise InputError(f"{file}: {where}: {path}: no such file.{near}")
    configs.setdefault(os.path.normpath(str(entry)), (path, path.read_bytes()))
    return configs[os.path.normpath(str(entry))][0]
