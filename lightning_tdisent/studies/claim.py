"""The plan of a study as its folder keeps it: what was trained stays as it was, what is measured may change."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_tdisent.artifacts import check_schema, differences, parse_json
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.kept import CONFIGS, edits, write_copies
from lightning_tdisent.fleet.plan import config_digest
from lightning_tdisent.studies.sweep import overrides_of, unrolled

FILE, SCHEMA = "plan.json", 2
SAID = ("seed", "runs", "priors", "out", "title", "notes")  # keys whose changes are looked at elsewhere, or are no news


@dataclass(frozen=True)
class Plan:
    """Jobs and fleets with their folders, composites to make of experts, and the evaluation as plain data.

    runs: by name the folder that contenders find its weights in; members: the names of its jobs; fleets: by name the
    YAML of a fleet, and keys of it that this study has otherwise; priors: by the folder that each is fitted into its
    model, where it starts, and its class path with arguments; configs: by key (its path relative to the YAML) where
    each config lies and what it says; content: what `FILE` keeps.
    """

    out: Path
    jobs: list[Job]
    runs: dict[str, Path]
    members: dict[str, list[str]]
    composites: dict[str, Path]
    fleets: dict[str, tuple[Path, dict[str, Any]]]
    priors: dict[Path, tuple[str, int | float, dict[str, Any]]]
    seed: int
    evaluation: dict[str, Any]
    content: dict[str, Any]
    configs: dict[str, tuple[Path, bytes]]

    @property
    def begun(self) -> bool:
        """True if a training of the study in the folder has begun."""
        before = kept(self.out)
        runs = before["study"]["runs"] if before else {}
        singles = [name for name, run in runs.items() if "fleet" not in run]
        leases = [self.out / "leases", *(self.out / name / "leases" for name in runs)]
        return any((self.out / name).exists() for name in singles) or any(place.exists() for place in leases)

    def compare(self) -> list[str]:
        """Refuse a folder with other trainings; returns what of its study is measured or said otherwise by now."""
        before = kept(self.out)
        if before is None:
            if self.out.exists() and any(p.name != CONFIGS for p in self.out.iterdir()):
                raise InputError(f"{self.out} is not empty and holds no study; choose another --out")
            return []
        differ = trained_otherwise(before, self.content)
        for key, entry in before["configs"].items():
            copy = self.out / entry["copy"] if isinstance(entry, dict) else None  # plans of old have a digest alone
            digest = entry["sha256"] if isinstance(entry, dict) else entry
            if copy and copy.exists() and config_digest(copy.read_bytes()) != digest:
                differ.append(f"{copy}: has been changed since it was copied")
            if key not in self.configs or config_digest(mine := self.configs[key][1]) == digest:
                continue
            found = edits(copy.read_bytes(), mine) if copy and copy.exists() else ["not what it was"]
            differ += [f"{self.configs[key][0]}: {line}" for line in found]
        if differ and self.begun:
            raise InputError(
                f"{self.out} holds another study ({'; '.join(differ)}). Trainings that have begun stay as they are: "
                "put that back, choose another --out, or remove the folder"
            )
        if differ:
            return [f"planned anew, since no training has begun: {line}" for line in differ]
        then, now = ({k: v for k, v in c["study"].items() if k not in SAID} for c in (before, self.content))
        return differences(then, now)

    def claim(self) -> "Plan":
        """Take the folder, or go on in it; returns the plan whose jobs read the copies of configs that it keeps.

        The plan is written after the copies, since it says that they are there.
        """
        self.compare()
        copies = {self.content["configs"][key]["copy"]: content for key, (_, content) in self.configs.items()}
        before = kept(self.out)
        if before is not None and self.begun:  # files that were edited in their comments alone
            for key, entry in before["configs"].items():
                if isinstance(entry, dict) and (self.out / entry["copy"]).exists() and key in self.configs:
                    copies[entry["copy"]] = (self.out / entry["copy"]).read_bytes()
                    self.content["configs"][key] = entry
        write_copies(self.out, copies)
        write_whole(self.out / FILE, json.dumps(self.content, indent=1).encode())
        place = {str(self.configs[key][0]): self.out / entry["copy"] for key, entry in self.content["configs"].items()}
        jobs = []
        for job in self.jobs:
            words = [str(place[w]) if option == "--config" else w for option, w in pairwise(["", *job.argv])]
            jobs.append(replace(job, argv=words))
        return replace(self, jobs=jobs)


def kept(folder: Path) -> dict[str, Any] | None:
    """Return what a study's folder keeps of its plan, None if there is none."""
    try:
        content = parse_json((folder / FILE).read_bytes())
        check_schema(content, str(folder / FILE), SCHEMA, oldest=1, absent=1)
        if isinstance(content["study"]["runs"], dict) and isinstance(content["configs"], dict):
            configs = {os.path.normpath(key): entry for key, entry in content["configs"].items()}
            return {"seed": 0, "overrides": [], **content, "configs": configs}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{folder / FILE}: damaged: not the plan of a study. Choose another --out, or remove {folder}")


def trained_otherwise(theirs: dict[str, Any], mine: dict[str, Any], seed: bool = True) -> list[str]:
    """Return in which keys two plans train or fit otherwise; runs and priors may be added, priors left out.

    seed: whether another seed counts.
    """
    (a, there), (b, now) = _trained(theirs), _trained(mine)
    lines = differences({"seed": theirs["seed"]}, {"seed": mine["seed"]}) if seed else []
    lines += differences({"runs": a}, {"runs": {k: v for k, v in b.items() if k in a}})
    both = there.keys() & now.keys()
    then, here = ({"priors": {k: v for k, v in p.items() if k in both}} for p in (there, now))
    return lines + differences(then, here)


def _trained(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs of a plan, each with what the command line sets for it, and its priors."""
    study = content["study"]
    extra = overrides_of(content["overrides"], study["runs"])
    runs = {name: {**run, **({"--set": extra[name]} if extra[name] else {})} for name, run in study["runs"].items()}
    return json.loads(json.dumps(runs)), json.loads(json.dumps(unrolled(study, "", False)["priors"]))


def refuse_no_repeats(folders: Sequence[Path]) -> None:
    """Refuse to pool studies whose trainings differ in more than the seed, or that share one."""
    plans = {folder: found for folder in folders if (found := kept(folder)) is not None}
    lines: list[str] = []
    order = list(plans)
    for k, folder in enumerate(order[1:], 1):
        first, theirs, mine = order[0], plans[order[0]], plans[folder]
        differ = trained_otherwise(theirs, mine, seed=False)
        added = mine["study"]["runs"].keys() - theirs["study"]["runs"].keys()
        differ += [f"runs.{name}: nothing there, a run now" for name in sorted(added)]
        for key in sorted(theirs["configs"].keys() & mine["configs"].keys()):
            a, b = (_text_of(place, plan["configs"][key]) for place, plan in ((first, theirs), (folder, mine)))
            other = edits(a, b) if isinstance(a, bytes) and isinstance(b, bytes) else ["another file"] * (a != b)
            differ += [f"{key}: {line}" for line in other]
        lines += [f"{folder}: {line}" for line in differ]
        same = [str(other) for other in order[:k] if plans[other]["seed"] == mine["seed"]]
        lines += [f"{folder}: seed {mine['seed']}, as {', '.join(same)}"] if same else []
    if lines:
        raise InputError(
            f"these are not one study with other seeds; {order[0]} is compared with the others:\n"
            + "\n".join(f"  - {line}" for line in lines)
        )


def _text_of(folder: Path, entry: Any) -> bytes | str:
    """The copy of a config, or its digest where a folder has no copy."""
    if isinstance(entry, dict) and (folder / entry["copy"]).exists():
        return (folder / str(entry["copy"])).read_bytes()
    return str(entry["sha256"] if isinstance(entry, dict) else entry)
