"""The plan of a fleet: a YAML file with one line per training. `draft` writes it; users may read, compare and edit it.

Every mistake that an edit can introduce is checked before anything is trained.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import load_yaml, repeated_keys, typed
from lightning_tdisent.fleet.budget import Budget
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.keys import ANY, COUNT, LIST, MAPPING, SEED, SETTINGS, TEXT, known, refuse_kind
from lightning_tdisent.fleet.planned import (
    BEGUN,
    FILE,
    IDENTITY,
    SHARED,
    Describe,
    Facts,
    Planned,
    parse_expert,
    refuse_cost,
    refuse_reserved,
    refuse_unfit,
    whole_steps,
)
from lightning_tdisent.fleet.store import Store, read_json
from lightning_tdisent.schemas import check_schema, parse_json

SCHEMA = 1


DEVICES = "trainer.devices"  # 1 unless the plan sets it, regardless of the devices of the machine

FIRST = ("name", "rows", "images", "batch", "seed")  # keys that the lines of all versions of plans have

POINTS = 3  # minimum number of points of an error curve that an adaptive budget extrapolates
SHARED_KEYS = {"configs": ANY, "images": ANY, "batch": COUNT, "set": SETTINGS, "cost": ANY, "parts": COUNT}
PLAN_KEYS = {"schema": ANY, "title": TEXT, "seed": SEED, "table": MAPPING, "budget": ANY, "configs": MAPPING,
             "set": SETTINGS, "shared": MAPPING, "experts": ANY}  # fmt: skip
TABLE_KEYS = {"fingerprint": ANY, "S": COUNT, "index": LIST, "log_snr": LIST}

HEADER = """\
# The plan of a fleet. Every line below `experts` is one training. You may edit images of every expert, and rows, batch,
# seed, start and set of experts that have not started. `python -m lightning_tdisent fleet plan FOLDER` checks the plan.
# start: scratch, shared (the run above), the name of another expert, or a file or run folder with weights.
"""


@dataclass(frozen=True)
class Fleet:
    """A plan and its store. The experts own every row 1..S exactly once.

    store: folder or object store of the fleet.
    title: title for status boards.
    seed: seed of the data order, and of the trainings unless an expert has another one.
    table: fingerprint, S, index and log_snr of the table that all experts share.
    budget: budget of images.
    configs: name of each copied config -> its digest.
    set: config keys of all trainings.
    shared: configs, images, batch and settings of a shared model that is trained first, or None.
    experts: the experts.
    extra: further words of each ``fit`` command line, for this machine only.
    scratch: local folder for the runs of a fleet in an object store.
    """

    store: Store
    title: str
    seed: int
    table: dict[str, Any]
    budget: Budget
    configs: dict[str, str]
    set: dict[str, Any]
    shared: dict[str, Any] | None
    experts: list[Planned]
    extra: tuple[str, ...] = ()
    scratch: Path | None = None

    @property
    def root(self) -> Path:
        """Local folder of the runs: the scratch folder if there is one, otherwise the folder of the fleet."""
        return self.scratch if self.scratch is not None else Path(self.store.where)

    @property
    def config_files(self) -> dict[str, str]:
        """Names of the copies of all configs, with their digests."""
        return {**self.configs, **(self.shared["configs"] if self.shared else {})}

    @property
    def shared_cost(self) -> float:
        """Cost of the shared model, counted as images of the largest expert network."""
        return self.shared["images"] * self.shared.get("cost", 1.0) if self.shared else 0.0

    @property
    def names(self) -> list[str]:
        """Names of all jobs: the shared model, if there is one, and the experts."""
        return [*([SHARED] if self.shared else []), *(e.name for e in self.experts)]

    def identity(self) -> str:
        """Return the random id that distinguishes this fleet from earlier fleets at its URL.

        Empty for plans of versions that wrote no id.
        """
        try:
            found = parse_json(self.store.read(IDENTITY) or b"{}")
            return str(found.get("id", ""))
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{self.store}/{IDENTITY}: cannot be read: {error}") from None

    def folder(self, name: str) -> str:
        """Return the run folder of a job relative to the fleet's folder; that of the shared model is in ``start``."""
        return f"start/{name}" if name == SHARED else name

    def jobs(self, images: dict[str, int] | None = None, number: int = 0) -> list[Job]:
        """Return the jobs of all trainings.

        images: images of experts that replace those of the plan. number: round of an adaptive budget.
        """
        out = []
        if self.shared:
            out.append(self._job(SHARED, list(self.shared["configs"]), self.shared, self.seed, {}, ()))
        for e in self.experts:
            words: dict[str, Any] = {"model.rows": e.rows} | ({"round": number} if number else {})
            needs: tuple[str, ...] = ()
            if e.seed != self.seed:
                words["data.seed"] = self.seed  # all experts read the same images, so that they are decoded once
            if e.start in self.names:
                needs = (e.start,)
                words["model.warm_start"] = str(self.root / self.folder(e.start))
            elif e.start != "scratch":
                words["model.warm_start"] = e.start
            entry = {**vars(e), "images": (images or {}).get(e.name, e.images)}
            expect = {"rows": e.rows, "fingerprint": self.table["fingerprint"]}
            out.append(self._job(e.name, list(self.configs), entry, e.seed, words, needs, expect))
        return out

    def _job(
        self, name: str, configs: Sequence[str], entry: dict[str, Any], seed: int, words: dict[str, Any],
        needs: tuple[str, ...], expect: dict[str, Any] | None = None,
    ) -> Job:  # fmt: skip
        folder = self.root / self.folder(name)
        step = entry["batch"] * entry.get("parts", 1)
        steps = entry["images"] // step
        settings = {DEVICES: 1, **self.set, **entry.get("set", {}), **words, "seed_everything": seed}
        settings |= {"data.batch_size": entry["batch"], "trainer.max_steps": steps}
        argv = ["fit"]
        for config in configs:
            argv += ["--config", str(self.root / config)]
        argv += [word for key, value in settings.items() for word in (f"--{key}", word_of(value))]
        argv += [*self.extra, "--run", str(folder)]
        return Job(name, argv, folder, needs, steps * step, expect or {})

    def content(self) -> dict[str, Any]:
        """Return the content of the plan file."""
        plain = [("cost", 1.0), ("parts", 1)]
        experts = [{k: v for k, v in vars(e).items() if v != {} and (k, v) not in plain} for e in self.experts]
        out = {"schema": SCHEMA, "title": self.title, "seed": self.seed, "table": self.table}
        out |= {"budget": self.budget.content(), "configs": self.configs, "set": self.set, "shared": self.shared}
        return {**out, "experts": experts}

    def text(self) -> str:
        """Return the text of the plan file, with one line per expert."""
        content = self.content()
        lines = [HEADER]
        for key, value in content.items():
            if key == "experts":
                lines += ["experts:\n", *(f"- {flow(entry)}\n" for entry in value)]
            elif isinstance(value, dict):
                lines.append(f"{key}: {flow(value)}\n")
            else:
                lines.append(yaml.safe_dump({key: value}, sort_keys=False, width=10**6))
        return "".join(lines)

    @classmethod
    def load(cls, where: str | Path, extra: Sequence[str] = ()) -> "Fleet":
        """Read and check the plan in a folder or at a URL.

        extra: further words of each ``fit`` command line. Raises InputError for an invalid plan, and for configs that
        are missing or differ from their digests.
        """
        store = Store(where)
        file = f"{store}/{FILE}"
        try:
            text = store.read(FILE)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error}") from None
        if text is None:
            make = typed("fleet", "plan", "--config", "FILE", "--out", where)
            raise InputError(f"{file}: there is no plan here; write one with {make}")
        data = load_yaml(text, file)
        if repeated := repeated_keys(text):
            raise InputError(f"{file}: {'; '.join(repeated)}: duplicate key")
        if isinstance(data, dict):
            check_schema(data, file, SCHEMA)
        data = known(data, PLAN_KEYS, file, required=[k for k in PLAN_KEYS if k not in ("set", "shared", "title")])
        entries = data["experts"]
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{file}: experts: expected a list of experts, got {entries!r}")
        known(data["table"], TABLE_KEYS, f"{file}: table", required=("fingerprint", "S", "log_snr"))
        refuse_reserved(data.get("set"), f"{file}: set")
        experts = [parse_expert(entry, f"{file}: experts[{i}]") for i, entry in enumerate(entries)]
        refuse_unfit(experts, data["table"]["S"], bool(data.get("shared")), file)
        if data.get("shared"):
            shared = known(data["shared"], SHARED_KEYS, f"{file}: shared", required=("configs", "images", "batch"))
            refuse_kind(shared["configs"], MAPPING, f"{file}: shared: configs")
            whole_steps(data["shared"], f"{file}: shared.images")
            refuse_cost(data["shared"], f"{file}: shared")
        budget = Budget.of(data["budget"], f"{file}: budget")
        problems = []
        fleet = cls(
            store, str(data.get("title", "")), data["seed"], data["table"], budget, data["configs"],
            data.get("set") or {}, data.get("shared"), experts, tuple(extra),
        )  # fmt: skip
        for name, planned in fleet.config_files.items():
            if (found := store.read(name)) is None or config_digest(found) != planned:
                problems.append(f"{store}/{name} {'is missing' if found is None else 'has been changed'}")
        if problems:
            raise InputError(
                f"{file}: {'; '.join(problems)}. The configs of a fleet must stay as they were planned: restore them, "
                "put your changes under set, or plan another fleet in another folder"
            )
        return fleet

    def check(self, describe: Describe, names: Sequence[str] = ()) -> list[Facts]:
        """Return the facts of the named jobs, of all jobs if none are named.

        Raises InputError for initial weights that do not exist or do not fit, and for a config that cannot be trained,
        has another table or another number of batches per step than the plan, or does not suit an adaptive budget.
        """
        out: dict[str, Facts] = {}
        away = [e for e in self.experts if e.start not in ("scratch", *self.names) and not Path(e.start).exists()]
        if missing_starts := [f"{e.name}: start: {e.start}" for e in away if not names or e.name in names]:
            raise InputError(f"{'; '.join(missing_starts)}: no such file or folder on this machine")
        for job in [job for job in self.jobs() if not names or job.name in names]:
            try:
                facts = describe(job.argv)
            except InputError as error:
                raise error.within(job.name) from None
            parts = {e.name: e.parts for e in self.experts}.get(job.name, (self.shared or {}).get("parts", 1))
            if facts.parts != parts:
                raise InputError(
                    f"{job.name}: a step of its config has {facts.parts} batches (trainer.accumulate_grad_batches x "
                    f"devices), but its line in the plan has parts: {parts}. Make both agree: set trainer.devices and "
                    "trainer.accumulate_grad_batches, or change parts in the line"
                )
            want = self.table["fingerprint"]
            if job.name != SHARED and facts.fingerprint != want:
                raise InputError(
                    f"{job.name}: its config defines a table with fingerprint {facts.fingerprint}, but the plan has "
                    f"{want}; all experts of a fleet share one table"
                )
            if self.budget.rule == "adaptive" and facts.decay != "constant" and job.name != SHARED:
                raise InputError(
                    f"{job.name}: model.decay is {facts.decay}, which requires a known number of steps; with an "
                    "adaptive budget set model.decay: constant (and ema.lengths: [0.1], an average whose length grows "
                    "with the training)"
                )
            if self.budget.rule == "adaptive" and facts.K > 1:
                raise InputError(
                    f"{job.name}: an adaptive budget supports only tables with one column, but this table has "
                    f"{facts.K}; choose budget.rule: uniform, taper, snr or explicit"
                )
            if self.budget.rule == "adaptive" and job.name != SHARED and not facts.validate:
                raise InputError(
                    f"{job.name}: an adaptive budget requires an error curve: set trainer.val_check_interval to a "
                    "number of steps, and trainer.check_val_every_n_epoch to null"
                )
            if self.budget.rule == "adaptive" and job.name != SHARED and facts.max_steps < POINTS * facts.validate:
                raise InputError(
                    f"{job.name}: an adaptive budget requires at least {POINTS} validations in the first "
                    f"{facts.max_steps} steps; there is one every {facts.validate:g} (trainer.val_check_interval)"
                )
            out[job.name] = facts
        if unfit_networks := [
            f"{e.name} ({out[e.name].fits}) starts from {e.start} ({out[e.start].fits})"
            for e in self.experts
            if {e.name, e.start} <= out.keys() and out[e.name].fits != out[e.start].fits
        ]:
            raise InputError(
                "initial weights of another network or prediction do not fit: " + "; ".join(unfit_networks)
            )
        rows = {e.name: e.rows for e in self.experts}
        if unfit_rows := [
            f"{e.name} (rows {e.rows}) starts from {e.start} (rows {rows[e.start]})"
            for e in self.experts
            if {e.name, e.start} <= out.keys() & rows.keys() and not {*e.rows} <= {*rows[e.start]}
            if out[e.name].sees_state or out[e.start].sees_state
        ]:
            raise InputError(
                f"{'; '.join(unfit_rows)}: an expert can start from an expert of other rows only if both are "
                "time-agnostic. Give each expert one row and leave model.network.conditioning unset, or choose another "
                "start"
            )
        return list(out.values())

    def begun(self, name: str) -> dict[str, Any]:
        """Return the settings of a job that must not change once it has started: all except its images."""
        line = next((vars(e) for e in self.experts if e.name == name), dict(self.shared or {}))
        return {k: v for k, v in line.items() if k != "images"} | {"common": self.set}

    def refuse_late(self, names: Sequence[str] = ()) -> None:
        """Raise InputError if jobs that have started were edited or removed; names: jobs to check, all if empty."""
        late = []
        for file in self.store.names(BEGUN):
            name = file.removesuffix(".json")
            if names and name not in names:
                continue
            if name not in self.names:
                late.append(f"{name}: was removed from the plan")
                continue
            # defaults of the keys that older versions did not write
            absent = {k: v for k, v in vars(Planned("", [], 0, 0, 0)).items() if k not in FIRST}
            then = absent | (read_json(self.store, f"{BEGUN}/{file}") or {})
            now = absent | json.loads(json.dumps(self.begun(name)))
            differ = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
            labels = {"common": "set (of all trainings)"}
            late += [
                f"{name}: {labels.get(k, k)} was {then.get(k)} at its start, now it is {now.get(k)}" for k in differ
            ]
        if late:
            raise InputError(
                f"{self.store}/{FILE}: experts that have started must not change, except for their images:\n"
                + "\n".join(f"  - {line}" for line in late)
                + "\nRestore the lines; or, to train an expert from the beginning, remove its folder and its files in "
                f"{self.store}/{BEGUN} and, in an object store, {self.store}/done"
            )


def config_digest(content: bytes) -> str:
    """Return the digest of a config that plans store: the first 16 hexadecimal digits of its SHA-256."""
    return digest(content)[:16]


def word_of(value: Any) -> str:
    """Return a value as a word of the command line: text as it is, other values as YAML."""
    return (
        value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]
    )


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
