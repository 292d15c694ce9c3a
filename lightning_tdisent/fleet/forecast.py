"""Predict the time and compute of a fleet before it runs: its jobs on N equal workers, the longest ready one first."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lightning_tdisent.errors import InputError, check_number, closest, nearest
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.status import duration
from lightning_tdisent.models.card import read_card
from lightning_tdisent.runs import WEIGHTS

if TYPE_CHECKING:
    from lightning_tdisent.fleet.plan import Fleet
    from lightning_tdisent.fleet.planned import Facts
    from lightning_tdisent.fleet.state import FleetWork

PROCESS = 450e6  # bytes of memory of a worker with Lightning and torch on a CPU, before it trains anything
PER_WEIGHT = 20  # bytes per parameter in training: value, gradient, two moments of AdamW, average


@dataclass(frozen=True)
class Pool:
    """A number of equal workers and their speed.

    workers: number of workers.
    speed: images per second of one worker, for the fleet's largest network.
    start: seconds until a new process can train.
    job: seconds of a training in addition to its steps and validations.
    validation: seconds of one validation.
    """

    workers: int
    speed: float
    start: float = 10.0
    job: float = 2.0
    validation: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, Any], measured: Mapping[str, float]) -> "Pool":
        """Return the pool of some values; what they lack is as ``measured``, see `speeds`. Raises InputError."""
        names = [f.name for f in fields(cls)]
        for key, value in given.items():
            if key not in names:
                raise InputError(
                    f"--simulate.{key}: no such option.{nearest(key, names)} Known: {', '.join(names)}",
                    key=f"--simulate.{key}", nearest=closest(key, names),
                )  # fmt: skip
            check_number(
                f"--simulate.{key}", value, least=1 if key == "workers" else 0, above=key == "speed",
                whole=key == "workers",
            )  # fmt: skip
        if "workers" not in given:
            raise InputError("--simulate: give the number of workers")
        values = {**measured, **given}
        if "speed" not in values:
            raise InputError(
                "--simulate: the speed is not known, since no finished job of this fleet is on this machine: give the "
                "images per second of a worker, e.g. --simulate.speed 900, or train one expert first: fleet run FOLDER "
                "--only 1"
            )
        return cls(**values)


def speeds(work: "FleetWork", facts: Sequence["Facts"]) -> dict[str, float]:
    """Return speed and seconds of a validation as the finished jobs of a fleet had them; empty if none is finished."""
    top, images, seconds, validating, count = max(fact.flops for fact in facts), 0.0, 0.0, 0.0, 0
    for job, fact in zip(work.jobs(), facts, strict=True):
        if (file := job.folder / WEIGHTS).exists():
            card = read_card(file)
            images, seconds = images + card.images_seen * fact.flops / top, seconds + card.seconds
            validating += card.validation.get("seconds", 0.0)
            count += _validations(fact, card.steps, job)
    return {"speed": images / seconds, "validation": validating / max(1, count)} if seconds else {}


@dataclass(frozen=True)
class Load:
    """One job; ``images`` are counted as images of the largest network."""

    name: str
    images: float
    needs: tuple[str, ...] = ()
    validations: int = 0
    round: int = 0


@dataclass(frozen=True)
class Forecast:
    """Result of a schedule.

    wall: seconds from the start of the first process to the last image.
    busy: seconds that all workers together train.
    images: images trained.
    order: names of the jobs in the order in which they end.
    """

    wall: float
    busy: float
    images: float
    order: list[str]


def schedule(loads: Sequence[Load], pool: Pool) -> Forecast:
    """Assign the jobs to the workers in the order of `work_through`: the longest ready job first.

    A job waits for the jobs it needs, and for all jobs of earlier rounds.
    """
    of = {load.name: load for load in loads}
    spent = {n: pool.job + load.validations * pool.validation + load.images / pool.speed for n, load in of.items()}
    waiting, ended, running = set(of), dict[str, float](), list[tuple[float, str]]()  # running: (end, job)
    now = pool.start
    while waiting or running:
        first = min(of[n].round for n in of if n not in ended)
        ready = [n for n in waiting if of[n].round == first and all(need in ended for need in of[n].needs)]
        for name in sorted(ready, key=lambda n: (-spent[n], n))[: pool.workers - len(running)]:
            waiting.remove(name)
            heapq.heappush(running, (now + spent[name], name))
        now, name = heapq.heappop(running)
        ended[name] = now
    return Forecast(now, sum(spent.values()), sum(load.images for load in loads), list(ended))


def loads_of(fleet: "Fleet", facts: Sequence["Facts"]) -> list[Load]:
    """Return the loads of a fleet's jobs; later rounds of an adaptive budget are assumed equal for all experts."""
    top = max(fact.flops for fact in facts)
    out = []
    jobs = list(zip(fleet.jobs(), facts, strict=True))
    for job, fact in jobs:
        out.append(
            Load(job.name, (job.images or 0) * fact.flops / top, job.needs, _validations(fact, fact.max_steps, job))
        )
    if fleet.budget.rule == "adaptive":
        spent, count = sum(load.images for load in out), fleet.budget.rounds
        part = (fleet.budget.images - spent) / (count * len(fleet.experts))
        step = {e.name: e.step for e in fleet.experts}
        out += [
            Load(f"{job.name} {k}", part, (), _validations(fact, int(part / step[job.name]), job), k)
            for k in range(1, count + 1)
            for job, fact in jobs
            if job.name in step
        ]
    return out


def _validations(fact: "Facts", steps: int, job: Job) -> int:
    """Return the number of validations of a job in a round: one at its start, those of its config, and one at its end.

    The one at the end is made only by warm-started jobs, and only if the config does not validate there.
    """
    every = fact.validate or 1e9
    warm = "--model.warm_start" in job.argv
    return 1 + int(steps // every) + (warm and bool(steps % every))


def footprint(facts: Sequence["Facts"], workers: int, keep: int = 2, averages: int = 1) -> tuple[float, float]:
    """Return the bytes on disk at the end and the peak bytes of memory of all workers, without data and activations.

    Each job leaves ``keep`` checkpoints (weights, two moments of AdamW, ``averages`` averages; all float32) and its
    exported weights.
    """
    disk = sum(4.0 * fact.weights * (keep * (3 + averages) + 1) for fact in facts)
    largest = sorted((fact.weights for fact in facts), reverse=True)[:workers]
    return disk, sum(PROCESS + PER_WEIGHT * weights for weights in largest)


def lines(fleet: "Fleet", facts: Sequence["Facts"], pool: Pool) -> list[tuple[str, str]]:
    """Return the time, compute and space of a fleet on a pool as pairs (label, text)."""
    loads = loads_of(fleet, facts)
    forecast, alone = schedule(loads, pool), schedule(loads, replace(pool, workers=1))
    jobs = fleet.jobs()
    flops = sum(3.0 * fact.flops * (job.images or 0) for job, fact in zip(jobs, facts, strict=True))
    if fleet.budget.rule == "adaptive":
        flops += 3.0 * max(fact.flops for fact in facts) * sum(load.images for load in loads if load.round)
    disk, memory = footprint(facts, pool.workers)
    passes = sum(load.validations for load in loads)
    validating = passes * pool.validation
    share = forecast.busy / (forecast.wall * pool.workers)
    return [
        ("workers", f"{pool.workers} of {pool.speed:,.0f} images/s, {pool.start:.1f} s to start"),
        ("a training", f"{pool.job:.1f} s in addition to its steps, {pool.validation:.2f} s per validation"),
        ("wall clock", f"{duration(forecast.wall)}; one worker alone {duration(alone.wall)}"),
        ("workers' time", f"{duration(forecast.busy)}, {share:.0%} of the wall clock of all workers"),
        ("validations", f"{passes:,}, {duration(validating)}: as long as {validating * pool.speed:,.0f} more images"),
        ("total compute", f"{forecast.images:,.0f} images, {flops / 1e12:,.3g} TFLOP"),
        ("disk", f"{disk / 1e6:,.0f} MB"),
        ("memory, all workers", f"{memory / 1e6:,.0f} MB, without data and activations"),
    ]
