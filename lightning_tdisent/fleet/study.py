"""A study: one YAML expanded into independent jobs, composites, and what is compared at the end."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.diffusion.states import row_of
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.files import write_whole
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.plan import Describe, known, read_yaml
from lightning_tdisent.priors.prior import Prior

KEYS = (
    "title",
    "out",
    "seed",
    "runs",
    "priors",
    "contenders",
    "diffusion_time",
    "bits",
    "data",
    "split",
    "reference",
    "protocol",
    "weights",
    "n",
    "first_seed",
    "notes",
)
RUN_KEYS = ("configs", "experts", "warm_start", "set")
FLEET_KEYS = ("fleet", "budget", "start", "set")
PRIOR_KEYS = ("run", "at", "prior")
TIME_KEYS = ("run", "sampler", "cuts", "priors")


@dataclass(frozen=True)
class Plan:
    """Jobs and fleets with their folders, composites to make of experts, and the evaluation as plain data.

    fleets: by name the YAML of a fleet, and keys of it that this study has otherwise; priors: by the folder that each
    is fitted into its model, where it starts, and its class path with arguments.
    """

    out: Path
    jobs: list[Job]
    composites: dict[str, Path]
    fleets: dict[str, tuple[Path, dict[str, Any]]]
    priors: dict[Path, tuple[str, int | float, dict[str, Any]]]
    seed: int
    evaluation: dict[str, Any]
    content: dict[str, Any]

    def claim(self) -> None:
        """Take the folder, or go on in it; refuse one that holds another plan."""
        mine, file = json.loads(json.dumps(self.content)), self.out / "plan.json"
        if file.exists():
            theirs = json.loads(file.read_text())
            differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            if differ:
                detail = "; ".join(f"{k}: {theirs.get(k)} there, {mine.get(k)} now" for k in differ)
                raise InputError(f"{self.out} holds another study ({detail}). Choose another --out, or remove it.")
        elif self.out.exists() and any(self.out.iterdir()):
            raise InputError(f"{self.out} is not empty and holds no study; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(mine, indent=1).encode())


def plan(
    config: str | Path, out: str | Path | None = None, seed: int | None = None, overrides: Sequence[str] = ()
) -> Plan:
    """Read a study's YAML; every config it names must exist, every key must be known."""
    file = Path(config)
    written = read_yaml(file)
    known(written, KEYS, str(file), required=("runs", "data", "protocol"))
    study = _unrolled(written, str(file))
    if not study["contenders"]:
        raise InputError(f"{file}: contenders, or diffusion_time, is missing")
    folder = Path(out or study.get("out") or f"runs/{file.stem}")
    seed = int(study.get("seed", 0)) if seed is None else seed
    extra = _overrides(overrides, study["runs"])
    jobs: list[Job] = []
    composites: dict[str, Path] = {}
    members: dict[str, list[str]] = {}
    digests = {}
    if not isinstance(study["runs"], dict) or not isinstance(study["contenders"], dict):
        raise InputError(f"{file}: runs and contenders are mappings of a name to its settings")
    fleets: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, run in study["runs"].items():
        if isinstance(run, dict) and "fleet" in run:
            known(run, FLEET_KEYS, f"{file}: runs.{name}")
            path = _config(file, run["fleet"], f"runs.{name}.fleet")
            digests[str(run["fleet"])] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            changes = {key: run[key] for key in ("budget", "start") if key in run}
            settings = {**(run.get("set") or {}), **extra.get(name, {})}
            fleets[name] = (path, changes | ({"set": settings} if settings else {}))
            composites[name], members[name] = folder / f"{name}_composite", []
            continue
        known(run, RUN_KEYS, f"{file}: runs.{name}", required=("configs",))
        argv = ["fit"]
        for entry in run["configs"]:
            path = _config(file, entry, f"runs.{name}.configs")
            digests[str(entry)] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            argv += ["--config", str(path)]
        for key, value in {**(run.get("set") or {}), **extra.get(name, {}), "seed_everything": seed}.items():
            argv += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        needs: tuple[str, ...] = ()
        if warm := run.get("warm_start"):
            if not members.get(warm):
                raise InputError(
                    f"{file}: runs.{name}.warm_start: {warm!r} is no run above it.{nearest(warm, members)}"
                )
            needs, argv = tuple(members[warm]), [*argv, "--model.warm_start", str(folder / warm)]
        count = run.get("experts")
        if count is None:
            jobs.append(Job(name, [*argv, "--run", str(folder / name)], folder / name, needs))
            members[name] = [name]
            continue
        composites[name] = folder / f"{name}_composite"
        members[name] = [f"{name}_{k:03d}" for k in range(1, count + 1)]
        for k, label in enumerate(members[name], 1):
            place = folder / name / f"expert_{k:03d}"
            words = [*argv, "--model.expert", str(k), "--model.experts", str(count), "--run", str(place)]
            jobs.append(Job(label, words, place, needs))
    priors: dict[Path, tuple[str, int | float, dict[str, Any]]] = {}
    for name, entry in study["priors"].items():
        known(entry, PRIOR_KEYS, f"{file}: priors.{name}", required=PRIOR_KEYS)
        if entry["run"] not in members:
            raise InputError(f"{file}: priors.{name}.run: no run {entry['run']!r}.{nearest(entry['run'], members)}")
        source = composites.get(entry["run"], folder / entry["run"])
        part = _part(entry["prior"], "Gaussian")
        at = row_or_share(entry["at"], f"{file}: priors.{name}.at")
        if build(part, Prior).learned:
            raise InputError(f"{file}: priors.{name}: {part['class_path']} is trained: make it a run with PriorModule")
        priors[folder / "priors" / name] = (str(source), at, part)
    contenders = []
    for name, entry in study["contenders"].items():
        known(entry, ("run", "sampler", "prior"), f"{file}: contenders.{name}", required=("run",))
        if entry["run"] not in members:
            raise InputError(f"{file}: contenders.{name}.run: no run {entry['run']!r}.{nearest(entry['run'], members)}")
        source = composites.get(entry["run"], folder / entry["run"])
        contenders.append({"name": name, "source": str(source), "sampler": _part(entry.get("sampler"), "DDIM")})
        if start := entry.get("prior"):
            if start not in study["priors"] and start not in members and not str(start).startswith("cut:"):
                options = [*study["priors"], *members]
                raise InputError(f"{file}: contenders.{name}.prior: no prior {start!r}.{nearest(start, options)}")
            if str(start).startswith("cut:"):
                row_or_share(start[4:], f"{file}: contenders.{name}.prior: {start}")
            fitted = folder / "priors" / start if start in study["priors"] else folder / str(start)
            contenders[-1]["prior"] = start if str(start).startswith("cut:") else str(fitted)
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
        "first_seed": study.get("first_seed"),
        "bits": study.get("bits"),
        "runs": {job.name: str(job.folder) for job in jobs},
    }
    content = {"study": written, "seed": seed, "overrides": list(overrides), "configs": digests}
    return Plan(folder, jobs, composites, fleets, priors, seed, evaluation, content)


def row_or_share(value: Any, where: str) -> int | float:
    """A row, or a share of the rows as a float, from a number or its text."""
    try:
        number = float(value)
        if isinstance(value, bool) or not 0 < number < float("inf"):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"{where}: a row from 1 on, or a share of the rows such as 0.6, got {value!r}") from None
    return int(number) if number.is_integer() and "." not in str(value) else number


def refuse_cuts(todo: Plan, describe: Describe, fleets: dict[str, int]) -> None:
    """Refuse starts at rows that a model does not have, before it is trained; fleets: their rows by name."""
    rows = {str(todo.composites[name]): S for name, S in fleets.items()}
    starts = [(source, at) for source, at, _ in todo.priors.values()]
    cuts = [(c["source"], c["prior"][4:]) for c in todo.evaluation["contenders"] if "cut:" in c.get("prior", "")]
    for source, at in [*starts, *((source, row_or_share(text, source)) for source, text in cuts)]:
        for job in todo.jobs:
            own = source in (str(job.folder), str(todo.composites.get(job.folder.parent.name)))
            if own and source not in rows:
                rows[source] = describe(job.argv).S
        try:
            row_of(at, rows[source])
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def _unrolled(study: dict[str, Any], file: str) -> dict[str, Any]:
    """With contenders and priors of a sweep over the cut: each row, from N(0, I) and from each prior (2206.05173)."""
    study = {**study, "priors": study.get("priors") or {}, "contenders": study.get("contenders") or {}}
    for key in ("priors", "contenders"):
        if not isinstance(study[key], dict):
            raise InputError(f"{file}: {key}: a mapping of a name to its settings, got {study[key]!r}")
        study[key] = dict(study[key])
    if (sweep := study.get("diffusion_time")) is None:
        return study
    known(sweep, TIME_KEYS, f"{file}: diffusion_time", required=("run", "cuts"))
    if not isinstance(sweep["cuts"], list) or not sweep["cuts"] or not isinstance(sweep.get("priors", {}), dict):
        raise InputError(f"{file}: diffusion_time: cuts is a list of rows, priors a mapping of a name to its class")
    common = {"run": sweep["run"], "sampler": sweep.get("sampler")}
    study["contenders"].setdefault("whole chain", common)
    study.setdefault("bits", {})
    for cut in sweep["cuts"]:
        study["contenders"][f"cut {cut}, N(0, I)"] = {**common, "prior": f"cut:{cut}"}
        for name, prior in sweep.get("priors", {}).items():
            study["priors"][f"{name}_{cut}"] = {"run": sweep["run"], "at": cut, "prior": prior}
            study["contenders"][f"cut {cut}, {name}"] = {**common, "prior": f"{name}_{cut}"}
    return study


def _part(entry: Any, default: str) -> dict[str, Any]:
    """Class path and arguments of a part given as a name, a short or a full class path, or nothing."""
    entry = {"class_path": entry} if isinstance(entry, str) else {"class_path": default} if entry is None else entry
    known(entry, ("class_path", "init_args"), default, required=("class_path",))
    path = entry["class_path"]
    return {"class_path": path if "." in path else f"lightning_tdisent.{path}", "init_args": entry.get("init_args", {})}


def _config(file: Path, entry: Any, where: str) -> Path:
    path = file.parent / str(entry)
    if not path.is_file():
        near = nearest(str(entry), [p.name for p in file.parent.glob("*.yaml")])
        raise InputError(f"{file}: {where}: {path} is no file.{near}")
    return path


def _overrides(words: Sequence[str], runs: dict[str, Any]) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {name: {} for name in runs}
    for word in words:
        target, _, value = word.partition("=")
        name, _, key = target.partition(".")
        if not value or not key or (name != "*" and name not in runs):
            raise InputError(f"--set {word}: expected RUN.KEY=VALUE with RUN one of *, {', '.join(runs)}")
        for run in runs if name == "*" else [name]:
            out[run][key] = value
    return out
