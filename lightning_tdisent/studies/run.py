"""Run a study: train what its plan lists, compose, fit priors; the evaluation of it comes after."""

import contextlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.fleet import local
from lightning_tdisent.fleet.draft import draft
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.state import FleetWork, Jobs, Work
from lightning_tdisent.fleet.status import page, tiles
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.models.compose import discard_damaged, find_files, holds_weights, recompose, refuse_damaged
from lightning_tdisent.runs import PRIOR
from lightning_tdisent.studies.claim import Plan
from lightning_tdisent.studies.plan import Role, refuse_cuts, refuse_roles, refuse_samplers
from lightning_tdisent.studies.results import BOARDS, FILE, Study


def train(
    todo: Plan, config: Path, fits: Any, describe: Any, role: Callable[[list[str]], Role],
    fit_prior: Callable[[str, int | float, dict[str, Any], str, Path], None], workers: int,
) -> Study:  # fmt: skip
    """Check the whole study, train its jobs and fleets, compose its experts and fit its priors; return the evaluation.

    config: YAML of the study, for messages. fits, describe: run, and describe, the trainings of command lines. role:
    what a command line trains. fit_prior: fit a prior of (model, row, part, data) into a folder. workers: number of
    processes, 0 for one per GPU or core. Raises InputError before any work for whatever can be refused then.
    """
    for line in todo.compare():
        print(f"{todo.out}: {line}")
    refuse_damaged([place for name in todo.runs if holds_weights(place := todo.out / name)])
    for folder in todo.composites.values():
        if discard_damaged(folder):
            print(f"{folder}: a file of it is damaged; it is composed anew from its experts")
    study = Study(**todo.evaluation)
    study.check()
    roles = {job.name: _role(job, str(config), role) for job in todo.jobs}
    todo, begun = todo.claim(), todo.begun
    fleets = {}
    for name, (file, changes) in todo.fleets.items():
        fleet = draft(
            file, describe, todo.out / name, todo.seed, changes=changes, begun=begun,
            check=lambda fleet: fleet.check(describe),
        )  # fmt: skip
        fleets[name] = FleetWork(fleet, describe)
        study.runs |= {f"{name}/{job}": str(todo.out / name / fleet.folder(job)) for job in fleet.names}
    runs = {name: roles[labels[0]] for name, labels in todo.members.items() if labels}
    runs |= {name: role(work.fleet.jobs()[-1].argv) for name, work in fleets.items()}
    study.check(conditional=refuse_roles(todo, runs))
    states = {tuple(job.argv): roles[job.name].states for job in todo.jobs}
    refuse_cuts(todo, lambda argv: states[tuple(argv)], {name: work.fleet.table["S"] for name, work in fleets.items()})
    refuse_samplers(todo, runs)
    jobs = Jobs(Store(todo.out), todo.jobs)
    works: list[Work] = [jobs, *fleets.values()]
    undone = [job for work in works for job in work.jobs() if not work.done(job)]
    if undone:
        study.workers = local.at_once(workers, len(undone))
    elif (todo.out / FILE).exists():
        with contextlib.suppress(InputError):  # damaged; it is written again
            study.workers = Study.load(todo.out).workers
    if todo.jobs:
        local.run(jobs, fits, workers, title=study.title)
    for name, work in fleets.items():
        local.run(work, fits, workers, title=f"{study.title}, {name}")
    if fleets:
        boards = "".join(page(tiles(work), name) for name, work in fleets.items())
        write_whole(todo.out / BOARDS, boards.encode())
    for name, folder in todo.composites.items():
        if recompose(find_files(todo.out / name), folder):
            print(f"{folder}: composed again, since the weights of {name} have changed")
    for folder, (source, at, part) in todo.priors.items():
        if not (folder / PRIOR).exists():
            fit_prior(source, at, part, study.data, folder)
    return study


def _role(job: Job, config: str, role: Callable[[list[str]], Role]) -> Role:
    """Return what a job of a study trains. Raises InputError naming the job and its configs if they are refused."""
    try:
        return role(job.argv)
    except InputError as error:
        files = ", ".join(word for option, word in pairwise(job.argv) if option == "--config")
        raise error.within(f"{config}: runs: {job.name} ({files})") from None
