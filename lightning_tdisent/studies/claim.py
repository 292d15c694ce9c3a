"""The plan of a study as stored in its folder. Started trainings must not change; evaluations may."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.kept import CONFIGS, edits, write_copies
from lightning_tdisent.fleet.keys import assign, value_of
from lightning_tdisent.fleet.plan import config_digest
from lightning_tdisent.schemas import check_schema, differences, parse_json
from lightning_tdisent.studies.sweep import unrolled

FILE, SCHEMA = "plan.json", 2
SAID = ("seed", "runs", "priors", "out", "title", "notes")  # keys not compared here: checked elsewhere, or irrelevant


@dataclass(frozen=True)
class Plan:
    """Plan of a study: jobs, fleets, composites of experts, priors, and the evaluation.

    out: folder of the study.
    jobs: training jobs, without those of fleets.
    runs: name of a run -> folder in which contenders find its weights.
    members: name of a run -> names of its jobs.
    composites: name of a run of several experts -> folder of its composite.
    fleets: name of a run -> YAML file of its fleet, and the keys of that file which the study overrides.
    priors: folder of a fitted prior -> folder of its model, row or share of the rows at which it starts, and its class
        path with arguments.
    seed: seed of all trainings.
    evaluation: fields of `results.Study`.
    content: content of the file `FILE`.
    configs: key (path relative to the study's YAML file) -> path and content of a config.
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
        """True if a training of the study in the folder has started."""
        before = kept(self.out)
        runs = before["study"]["runs"] if before else {}
        singles = [name for name, run in runs.items() if "fleet" not in run]
        leases = [self.out / "leases", *(self.out / name / "leases" for name in runs)]
        return any((self.out / name).exists() for name in singles) or any(place.exists() for place in leases)

    def compare(self) -> list[str]:
        """Compare with the study in the folder; return a line for each difference that is allowed.

        Raises InputError if the folder has other content, or if a training that has started would change.
        """
        before = kept(self.out)
        if before is None:
            if self.out.exists() and any(p.name != CONFIGS for p in self.out.iterdir()):
                raise InputError(f"{self.out} is not empty and holds no study; choose another --out")
            return []
        differ = trained_otherwise(before, self.content)
        for key, entry in before["configs"].items():
            copy = self.out / entry["copy"] if isinstance(entry, dict) else None  # older plans have only a digest
            digest = entry["sha256"] if isinstance(entry, dict) else entry
            if copy and copy.exists() and config_digest(copy.read_bytes()) != digest:
                differ.append(f"{copy}: has been changed since it was copied")
            if key not in self.configs or config_digest(mine := self.configs[key][1]) == digest:
                continue
            found = edits(copy.read_bytes(), mine) if copy and copy.exists() else ["changed"]
            differ += [f"{self.configs[key][0]}: {line}" for line in found]
        if differ and self.begun:
            raise InputError(
                f"{self.out} holds another study ({'; '.join(differ)}). Trainings that have started must not change: "
                "undo these changes, choose another --out, or remove the folder"
            )
        if differ:
            return [f"the plan is replaced, since no training has started: {line}" for line in differ]
        then, now = ({k: v for k, v in c["study"].items() if k not in SAID} for c in (before, self.content))
        return differences(then, now)

    def claim(self) -> "Plan":
        """Write the plan and copies of its configs to the folder, and return the plan to run.

        The folder may already hold the same study; it is then continued.

        The jobs of the returned plan read the copies. The plan file is written after the copies: its presence means
        that they are complete.
        """
        self.compare()
        copies = {self.content["configs"][key]["copy"]: content for key, (_, content) in self.configs.items()}
        before = kept(self.out)
        if before is not None and self.begun:  # the configs differ in comments at most: keep the stored copies
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
    """Return the content of the plan file in a study's folder, None if there is none; raise InputError if damaged."""
    try:
        content = parse_json((folder / FILE).read_bytes())
        check_schema(content, str(folder / FILE), SCHEMA, oldest=1, absent=1)
        if isinstance(content["study"]["runs"], dict) and isinstance(content["configs"], dict):
            configs = {os.path.normpath(key): entry for key, entry in content["configs"].items()}
            return {"seed": 0, **content, "configs": configs}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{folder / FILE}: damaged: not the plan of a study. Choose another --out, or remove {folder}")


def trained_otherwise(theirs: dict[str, Any], mine: dict[str, Any], seed: bool = True) -> list[str]:
    """Return a line for each difference between two plans in their trainings and fitted priors.

    Additional runs and priors in ``mine`` are not differences, nor are priors that it lacks. seed: compare the seeds as
    well.
    """
    (a, there), (b, now) = _training_parts(theirs), _training_parts(mine)
    lines = differences({"seed": theirs["seed"]}, {"seed": mine["seed"]}) if seed else []
    lines += differences({"runs": a}, {"runs": {k: v for k, v in b.items() if k in a}})
    both = there.keys() & now.keys()
    then, here = ({"priors": {k: v for k, v in p.items() if k in both}} for p in (there, now))
    return lines + differences(then, here)


def _training_parts(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the runs of a plan and its priors."""
    study, runs = content["study"], content["study"]["runs"]
    for word in content.get("overrides", []):  # RUN.KEY=VALUE, which older versions kept beside the study
        target, _, text = word.partition("=")
        name = max((n for n in ("*", *runs) if target.startswith(f"{n}.")), key=len)
        key = f"{name}.set{target[len(name) :]}"
        runs = assign({"runs": runs}, [(f"runs.{key}", value_of(text, key))])["runs"]
    return json.loads(json.dumps(runs)), json.loads(json.dumps(unrolled(study, "", False)["priors"]))


def refuse_no_repeats(folders: Sequence[Path]) -> None:
    """Raise InputError unless the studies in ``folders`` differ only in the seed, and no two have the same seed.

    Folders without a plan are ignored.
    """
    plans = {folder: found for folder in folders if (found := kept(folder)) is not None}
    lines: list[str] = []
    order = list(plans)
    for k, folder in enumerate(order[1:], 1):
        first, theirs, mine = order[0], plans[order[0]], plans[folder]
        differ = trained_otherwise(theirs, mine, seed=False)
        added = mine["study"]["runs"].keys() - theirs["study"]["runs"].keys()
        differ += [f"runs.{name}: not in the first study" for name in sorted(added)]
        for key in sorted(theirs["configs"].keys() & mine["configs"].keys()):
            a, b = (_text_of(place, plan["configs"][key]) for place, plan in ((first, theirs), (folder, mine)))
            other = edits(a, b) if isinstance(a, bytes) and isinstance(b, bytes) else ["another file"] * (a != b)
            differ += [f"{key}: {line}" for line in other]
        lines += [f"{folder}: {line}" for line in differ]
        same = [str(other) for other in order[:k] if plans[other]["seed"] == mine["seed"]]
        lines += [f"{folder}: has the same seed {mine['seed']} as {', '.join(same)}"] if same else []
    if lines:
        raise InputError(
            f"these are not one study with other seeds; each folder is compared with {order[0]}:\n"
            + "\n".join(f"  - {line}" for line in lines)
        )


def _text_of(folder: Path, entry: Any) -> bytes | str:
    """Return the content of a copied config, or its digest if the folder has no copy."""
    if isinstance(entry, dict) and (folder / entry["copy"]).exists():
        return (folder / str(entry["copy"])).read_bytes()
    return str(entry["sha256"] if isinstance(entry, dict) else entry)
