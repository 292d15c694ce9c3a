"""The plan of a fleet: a file with a line for each training, to be read, compared and edited (`draft` writes it).

The file is long because every mistake that an edit can bring is looked for before anything is trained.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_tdisent.artifacts import check_schema, parse_json
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import load_yaml, repeated_keys, typed
from lightning_tdisent.fleet.budget import Budget
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.kept import CONFIGS
from lightning_tdisent.fleet.keys import ANY, COUNT, LIST, MAPPING, SEED, SETTINGS, TEXT, known, refuse_kind
from lightning_tdisent.fleet.names import clashes, fault
from lightning_tdisent.fleet.store import Store, read_json

SCHEMA = 1
FILE = "plan.yaml"
SHARED = "shared"
DEVICES = "trainer.devices"  # one, unless the plan sets another number, however many a machine has
BEGUN = "begun"
FIRST = ("name", "rows", "images", "batch", "seed")  # keys that every line has had from the first version on
IDENTITY = "fleet.json"  # of a fleet in an object store, whose runs lie elsewhere
# what lies in a fleet's folder, and is the name of no expert
FOLDERS = (SHARED, FILE, IDENTITY, BEGUN, CONFIGS, "scratch", "done", "failed", "leases", "logs", "rounds", "start")
RESERVED = {
    "run": "--out",
    "seed_everything": "seed",
    "trainer.max_steps": "images",
    "data.batch_size": "batch",
    "model.warm_start": "start",
    **dict.fromkeys(("model.rows", "model.expert", "model.experts"), "rows"),
}  # config keys that a plan decides, and by what of it
POINTS = 3  # of a curve that is to be continued
SHARED_KEYS = {"configs": ANY, "images": ANY, "batch": COUNT, "set": SETTINGS, "cost": ANY, "parts": COUNT}
PLAN_KEYS = {"schema": ANY, "title": TEXT, "seed": SEED, "table": MAPPING, "budget": ANY, "configs": MAPPING,
             "set": SETTINGS, "shared": MAPPING, "experts": ANY}  # fmt: skip
TABLE_KEYS = {"fingerprint": ANY, "S": COUNT, "index": LIST, "log_snr": LIST}
EXPERT_KEYS = dict.fromkeys(("name", "rows", "images", "batch", "seed", "start", "set", "cost", "parts"), ANY)
HEADER = """\
# The plan of a fleet: every line below `experts` is one training. Edit rows, batch, seed, start or set of an expert as
# long as it has not begun, and images of any; `python -m lightning_tdisent fleet plan FOLDER` checks the whole.
# start: scratch, shared (the run above), the name of another expert, or a file or run folder with weights.
"""


@dataclass(frozen=True)
class Facts:
    """What a command line of ``fit`` amounts to: table, batch, network, how it is trained.

    log_snr: of rows 1..S, first column; flops: of a forward pass of one image; decay: course of the learning rate;
    validate: steps from one validation to the next, 0 if that goes by epochs; fits: network and prediction, which are
    equal where one may start from another's weights; sizes: of the runs of rows that one network can answer for, all if
    not given; K: columns of the table; accumulate, world: batches of ``batch`` images in an optimizer step, by
    accumulation and on devices; devices: as the config has it, ``auto`` for all that are there; sees_state: whether the
    network is told the state, and so cannot start from the weights of another.
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
        """Batches of an optimizer step."""
        return self.accumulate * self.world


Describe = Callable[[list[str]], Facts]


@dataclass(frozen=True)
class Planned:
    """One expert: rows it owns, images it is to see, images of a batch, seed, start, and what else its config sets.

    cost: of one image, in those of the experts' largest network, in which a budget counts; parts: batches of an
    optimizer step, if gradients are accumulated or several devices train it.
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
        """Images of an optimizer step."""
        return self.batch * self.parts


@dataclass(frozen=True)
class Fleet:
    """A plan and where it is kept; experts own every row 1..S exactly once."""

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
        """The folder in which runs are trained: the fleet's own, or a local one where that is a store."""
        return self.scratch if self.scratch is not None else Path(self.store.where)

    @property
    def config_files(self) -> dict[str, str]:
        """Copies of all configs in the folder, with their digests."""
        return {**self.configs, **(self.shared["configs"] if self.shared else {})}

    @property
    def shared_cost(self) -> float:
        """Images of the shared model, in those of the experts' largest network."""
        return self.shared["images"] * self.shared.get("cost", 1.0) if self.shared else 0.0

    @property
    def names(self) -> list[str]:
        """Names of all jobs."""
        return [*([SHARED] if self.shared else []), *(e.name for e in self.experts)]

    def identity(self) -> str:
        """Return what tells this fleet from another one that was planned at its URL before; empty for early plans."""
        try:
            found = parse_json(self.store.read(IDENTITY) or b"{}")
            return str(found.get("id", ""))
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{self.store}/{IDENTITY}: cannot be read: {error}") from None

    def folder(self, name: str) -> str:
        """Run folder of a job, relative to the fleet's; that of the shared model is not among the experts'."""
        return f"start/{name}" if name == SHARED else name

    def jobs(self, images: dict[str, int] | None = None, number: int = 0) -> list[Job]:
        """Return all trainings, with other numbers of images where given, in a round of an adaptive budget."""
        out = []
        if self.shared:
            out.append(self._job(SHARED, list(self.shared["configs"]), self.shared, self.seed, {}, ()))
        for e in self.experts:
            words: dict[str, Any] = {"model.rows": e.rows} | ({"round": number} if number else {})
            needs: tuple[str, ...] = ()
            if e.seed != self.seed:
                words["data.seed"] = self.seed  # the same images for all, so that they are decoded once
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
        """As written."""
        plain = [("cost", 1.0), ("parts", 1)]
        experts = [{k: v for k, v in vars(e).items() if v != {} and (k, v) not in plain} for e in self.experts]
        out = {"schema": SCHEMA, "title": self.title, "seed": self.seed, "table": self.table}
        out |= {"budget": self.budget.content(), "configs": self.configs, "set": self.set, "shared": self.shared}
        return {**out, "experts": experts}

    def text(self) -> str:
        """The file: a line for each expert."""
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
        """Read the plan of a folder or URL, as it was written or edited; every mistake in it is named."""
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
        if twice := repeated_keys(text):
            raise InputError(f"{file}: {'; '.join(twice)}: a key that this mapping has already")
        if isinstance(data, dict):
            check_schema(data, file, SCHEMA)
        data = known(data, PLAN_KEYS, file, required=[k for k in PLAN_KEYS if k not in ("set", "shared", "title")])
        entries = data["experts"]
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{file}: experts: expected a list of experts, got {entries!r}")
        known(data["table"], TABLE_KEYS, f"{file}: table", required=("fingerprint", "S", "log_snr"))
        refuse_reserved(data.get("set"), f"{file}: set")
        experts = [_expert(entry, f"{file}: experts[{i}]") for i, entry in enumerate(entries)]
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
                f"{file}: {'; '.join(problems)}. Configs of a fleet stay as they were planned: put them back, say what "
                "is to differ under set, or plan anew in another folder"
            )
        return fleet

    def check(self, describe: Describe, names: Sequence[str] = ()) -> list[Facts]:
        """Facts of these jobs, all if none are named; refuses what its config cannot train, or with another table."""
        out: dict[str, Facts] = {}
        away = [e for e in self.experts if e.start not in ("scratch", *self.names) and not Path(e.start).exists()]
        if lost := [f"{e.name}: start: {e.start}" for e in away if not names or e.name in names]:
            raise InputError(f"{'; '.join(lost)}: no such file or folder on this machine")
        for job in [job for job in self.jobs() if not names or job.name in names]:
            try:
                facts = describe(job.argv)
            except InputError as error:
                raise InputError(f"{job.name}: {error}") from None
            parts = {e.name: e.parts for e in self.experts}.get(job.name, (self.shared or {}).get("parts", 1))
            if facts.parts != parts:
                raise InputError(
                    f"{job.name}: a step of its config has {facts.parts} batches (trainer.accumulate_grad_batches x "
                    f"devices), its line in the plan counts parts: {parts}. Make both agree: set trainer.devices and "
                    "trainer.accumulate_grad_batches, or write parts into the line"
                )
            want = self.table["fingerprint"]
            if job.name != SHARED and facts.fingerprint != want:
                raise InputError(
                    f"{job.name}: its config gives a table of fingerprint {facts.fingerprint}, the plan has {want}; "
                    "all experts of a fleet share one table"
                )
            if self.budget.rule == "adaptive" and facts.decay != "constant" and job.name != SHARED:
                raise InputError(
                    f"{job.name}: model.decay is {facts.decay}, whose course needs the end to be known; an adaptive "
                    "budget wants model.decay: constant (and ema.lengths: [0.1], which averages as long as it trains)"
                )
            if self.budget.rule == "adaptive" and facts.K > 1:
                raise InputError(
                    f"{job.name}: an adaptive budget knows what errors do to an image in tables of one column, this "
                    f"has {facts.K}; choose budget.rule: uniform, taper, snr or explicit"
                )
            if self.budget.rule == "adaptive" and job.name != SHARED and not facts.validate:
                raise InputError(
                    f"{job.name}: an adaptive budget follows its curve: set trainer.val_check_interval to a number of "
                    "steps, and trainer.check_val_every_n_epoch to null"
                )
            if self.budget.rule == "adaptive" and job.name != SHARED and facts.max_steps < POINTS * facts.validate:
                raise InputError(
                    f"{job.name}: an adaptive budget follows its curve, and wants {POINTS} validations at least in its "
                    f"first {facts.max_steps} steps; there is one every {facts.validate:g} (trainer.val_check_interval)"
                )
            out[job.name] = facts
        if misfits := [
            f"{e.name} ({out[e.name].fits}) starts from {e.start} ({out[e.start].fits})"
            for e in self.experts
            if {e.name, e.start} <= out.keys() and out[e.name].fits != out[e.start].fits
        ]:
            raise InputError("weights of another network or prediction do not fit: " + "; ".join(misfits))
        rows = {e.name: e.rows for e in self.experts}
        if strange := [
            f"{e.name} (rows {e.rows}) starts from {e.start} (rows {rows[e.start]})"
            for e in self.experts
            if {e.name, e.start} <= out.keys() & rows.keys() and not {*e.rows} <= {*rows[e.start]}
            if out[e.name].sees_state or out[e.start].sees_state
        ]:
            raise InputError(
                f"{'; '.join(strange)}: only a time-agnostic expert may start as one of another state, if that is "
                "time-agnostic, too. Give each expert one row and leave model.network.conditioning unset, or choose "
                "another start"
            )
        return list(out.values())

    def begun(self, name: str) -> dict[str, Any]:
        """What stays of an expert's line once it has begun: all but its images."""
        line = next((vars(e) for e in self.experts if e.name == name), dict(self.shared or {}))
        return {k: v for k, v in line.items() if k != "images"} | {"common": self.set}

    def refuse_late(self, names: Sequence[str] = ()) -> None:
        """Refuse edits of experts that have begun; names: of these alone, of all if empty."""
        late = []
        for file in self.store.names(BEGUN):
            name = file.removesuffix(".json")
            if names and name not in names:
                continue
            if name not in self.names:
                late.append(f"{name}: is gone from the plan")
                continue
            absent = {k: v for k, v in vars(Planned("", [], 0, 0, 0)).items() if k not in FIRST}  # in older lines
            then = absent | (read_json(self.store, f"{BEGUN}/{file}") or {})
            now = absent | json.loads(json.dumps(self.begun(name)))
            differ = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
            said = {"common": "set (of all)"}
            late += [f"{name}: {said.get(k, k)} was {then.get(k)} when it began, and is {now.get(k)}" for k in differ]
        if late:
            raise InputError(
                f"{self.store}/{FILE}: experts that have begun stay as they are, but for images:\n"
                + "\n".join(f"  - {line}" for line in late)
                + "\nPut the lines back; or, to train it anew, remove the expert's folder and its files in "
                f"{self.store}/{BEGUN} and, in an object store, {self.store}/done"
            )


def refuse_unfit(experts: Sequence[Planned], S: int, shared: bool, where: str) -> None:
    """Refuse experts that do not own the rows 1..S exactly once, or whose names or starts do not fit together."""
    problems = []
    owners: dict[int, list[str]] = {s: [] for s in range(1, S + 1)}
    for e in experts:
        for s in e.rows:
            owners.setdefault(s, []).append(e.name)
    problems += [f"row {s} is owned by no expert" for s, who in owners.items() if not who]
    problems += [f"row {s} is owned by {' and '.join(who)}" for s, who in owners.items() if len(who) > 1]
    problems += [
        f"row {s} of {' and '.join(who)} is not among 1..{S}" for s, who in owners.items() if who and not 1 <= s <= S
    ]
    names = [e.name for e in experts]
    problems += [f"two experts are called {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += clashes([(name, "expert") for name in dict.fromkeys(names)])
    starts = {e.name: e.start for e in experts}
    for e in experts:
        if e.start == SHARED and not shared:
            problems.append(f"{e.name} starts from the shared model, of which the plan has none")
        seen, at = {e.name}, e.start
        while at in starts:
            if at in seen:
                problems.append(f"{e.name} starts from {e.start}, which waits for {e.name}")
                break
            seen.add(at)
            at = starts[at]
        if e.images < e.step:
            what = f"{e.parts} batches of {e.batch}" if e.parts > 1 else f"one batch of {e.batch}"
            problems.append(f"{e.name}: {e.images} images are less than {what}, and train nothing")
    if problems:
        raise InputError(f"{where}: this plan cannot be run:\n" + "\n".join(f"  - {p}" for p in problems))


def _expert(entry: Any, where: str) -> Planned:
    known(entry, EXPERT_KEYS, where, required=("name", "rows", "images", "batch", "seed", "start"))
    wrong = []
    for key, kind in (("images", COUNT), ("batch", COUNT), ("seed", SEED)):
        try:
            refuse_kind(entry[key], kind, key)
        except InputError as error:
            wrong.append(str(error))
    rows = entry["rows"]
    if not isinstance(rows, list) or not rows or not all(isinstance(s, int) for s in rows) or sorted(set(rows)) != rows:
        wrong.append(f"rows: {rows!r} (ascending row numbers)")
    name = entry["name"]
    if odd := fault(name, FOLDERS, "._-+") or ("numbers stand for expert_NNN" if name.isdigit() else None):
        wrong.append(f"name: {name!r} ({odd})")
    refuse_cost(entry, f"{where} ({name})")
    if not isinstance(entry["start"], str):
        wrong.append(f"start: {entry['start']!r}")
    if not isinstance(entry.get("set", {}), dict):
        wrong.append(f"set: {entry['set']!r} (a mapping of config keys)")
    if not isinstance(entry.get("parts", 1), int) or entry.get("parts", 1) < 1:
        wrong.append(f"parts: {entry['parts']!r} (batches of a step, at least 1)")
    if wrong:
        raise InputError(f"{where} ({name}): {'; '.join(wrong)}")
    refuse_reserved(entry.get("set"), f"{where} ({name}): set")
    return Planned(**entry)


def whole_steps(entry: dict[str, Any], where: str) -> int:
    """Return the images of a shared model rounded down to whole optimizer steps; refuse fewer than one step."""
    images, batch, parts = entry["images"], entry["batch"], entry.get("parts", 1)
    step = batch * parts
    if isinstance(images, bool) or not isinstance(images, int) or images < step:
        least = f"{parts} batches" if parts > 1 else "one batch"
        raise InputError(f"{where}: at least {least} of {batch} images, got {images!r}")
    return int(images // step * step)


def refuse_cost(entry: dict[str, Any], where: str) -> None:
    """Refuse what is no cost of an image, in those of the experts' largest network."""
    cost = entry.get("cost", 1.0)
    if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0 < cost < float("inf"):
        raise InputError(f"{where}: cost: {cost!r} is no number above 0 (of an image, in those of the largest network)")


def config_digest(content: bytes) -> str:
    """Return the hash of a config by which a plan knows it."""
    return digest(content)[:16]


def word_of(value: Any) -> str:
    """A value as the command line takes it."""
    return (
        value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]
    )


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()


def words(overrides: Sequence[str]) -> list[str]:
    """Options of ``fit`` for words KEY=VALUE."""
    return [word for key, value in settings(overrides) for word in (f"--{key}", word_of(value))]


def settings(pairs: Sequence[str], option: str = "--set") -> list[tuple[str, Any]]:
    """Keys and values of words KEY=VALUE."""
    for word in pairs:
        key, _, value = word.partition("=")
        if not key or not value:
            raise InputError(f"{option} {word}: expected KEY=VALUE")
    try:
        return [(word.partition("=")[0], _value(word.partition("=")[2])) for word in pairs]
    except yaml.YAMLError as error:
        raise InputError(f"{option}: not valid: {' '.join(str(error).split())}") from None


def _value(text: str) -> Any:
    """What a word means in YAML; numbers in base 60 and 8, such as the time 00:12:00:00, are words."""
    value = yaml.safe_load(text)
    return text if isinstance(value, (int, float)) and re.search(r":|^[-+]?0\d", text) else value


def refuse_reserved(data: Any, where: str) -> None:
    """Refuse settings that are no mapping, or of keys that the plan itself decides."""
    if data is not None and not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping of config keys, got {data!r}")
    if odd := [key for key in data or {} if key in RESERVED]:
        raise InputError(f"{where}: {', '.join(odd)}: the plan says it itself, by {RESERVED[odd[0]]}")
