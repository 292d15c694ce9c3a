"""Predict the time and compute of a fleet before it runs: a discrete-event simulation of N workers with failures."""

import heapq
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.errors import InputError, check_number, closest, nearest
from lightning_tdisent.fleet.job import Job, Report, Train
from lightning_tdisent.fleet.status import duration
from lightning_tdisent.fleet.store import Store

if TYPE_CHECKING:
    from lightning_tdisent.fleet.plan import Fleet
    from lightning_tdisent.fleet.planned import Facts

PROCESS = 450e6  # bytes of memory of a worker with Lightning and torch on a CPU, before it trains anything
PER_WEIGHT = 20  # bytes per parameter in training: value, gradient, two moments of AdamW, average
REHEARSED = (16, 64)  # steps of the short and of the long rehearsal
VALIDATIONS = 4  # in the rehearsal that measures them
DEATHS = 5  # consecutive deaths without a checkpoint after which a job is given up; equal to `work.Session.deaths`


@dataclass(frozen=True)
class Pool:
    """A number of equal workers and their speed.

    workers: number of workers.
    speed: images per second of one worker, for the fleet's largest network.
    start: seconds until a new process can train.
    job: seconds of a training in addition to its steps and validations.
    validation: seconds of one validation.
    checkpoint: seconds between checkpoints; 0: no progress is ever lost.
    failures: failures of one worker per hour.
    seed: seed of the random failure times.
    """

    workers: int
    speed: float
    start: float = 10.0
    job: float = 2.0
    validation: float = 0.0
    checkpoint: float = 300.0
    failures: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> tuple["Pool", set[str]]:
        """Return the pool of some values, such as workers and speed, with their names. Raises InputError."""
        names = [f.name for f in fields(cls)]
        for key, value in given.items():
            if key not in names:
                raise InputError(
                    f"--simulate.{key}: no such option.{nearest(key, names)} Known: {', '.join(names)}",
                    key=f"--simulate.{key}", nearest=closest(key, names),
                )  # fmt: skip
            check_number(
                f"--simulate.{key}", value, least=1 if key == "workers" else 0, above=key == "speed",
                whole=key in ("workers", "seed"),
            )  # fmt: skip
        if "workers" not in given:
            raise InputError("--simulate: give the number of workers")
        return cls(**{"speed": 1.0, **given}), set(given)


@dataclass(frozen=True)
class Load:
    """One job of the simulation; ``images`` are counted as images of the largest network."""

    name: str
    images: float
    needs: tuple[str, ...] = ()
    validations: int = 0
    round: int = 0


@dataclass(frozen=True)
class Forecast:
    """Result of a simulation.

    wall: seconds from the start of the first process to the last image.
    busy: seconds that all workers together train.
    images: images trained, without repetitions.
    repeated: images trained again after failures.
    failures: number of failures.
    order: names of the jobs in the order in which they end.
    given_up: names of the jobs that died too often in a row.
    """

    wall: float
    busy: float
    images: float
    repeated: float
    failures: int
    order: list[str]
    given_up: list[str]


def simulate(loads: Sequence[Load], pool: Pool) -> Forecast:
    """Simulate the jobs on the workers in the order of `work_through`: the longest ready job first.

    A job waits for the jobs it needs, and for all jobs of earlier rounds. A worker that fails loses the progress of its
    job since the last checkpoint, and is available again after ``pool.start`` seconds.
    """
    chance = random.Random(pool.seed)  # noqa: S311
    of = {load.name: load for load in loads}
    todo = {n: pool.job + load.validations * pool.validation + load.images / pool.speed for n, load in of.items()}
    waiting, ended = set(of), dict[str, float]()
    free = [(pool.start, k) for k in range(pool.workers)]  # (time from which it is free, worker)
    running: list[tuple[float, int, str, float, bool]] = []  # (end, worker, job, begin, whether the job is done then)
    busy = repeated = 0.0
    failures, now, deaths, given_up = 0, 0.0, dict.fromkeys(of, 0), list[str]()
    while len(ended) < len(of):
        rounds = [of[n].round for n in of if n not in ended]
        ready = [n for n in waiting if of[n].round == min(rounds) and all(need in ended for need in of[n].needs)]
        for name in sorted(ready, key=lambda n: (-todo[n], n)):
            if not free or free[0][0] > now:
                break
            _, worker = heapq.heappop(free)
            waiting.remove(name)
            lives = chance.expovariate(pool.failures / 3600) if pool.failures else float("inf")
            heapq.heappush(running, (now + min(lives, todo[name]), worker, name, now, lives >= todo[name]))
        coming = [free[0][0]] if free and free[0][0] > now else []
        now = min(coming + ([running[0][0]] if running else []))
        while running and running[0][0] <= now:
            end, worker, name, begin, well = heapq.heappop(running)
            busy += end - begin
            if well:
                ended[name] = end
                heapq.heappush(free, (end, worker))
                continue
            failures += 1
            saved = (end - begin - pool.job) // pool.checkpoint * pool.checkpoint if pool.checkpoint else end - begin
            saved = max(0.0, saved)
            repeated += end - begin - saved
            todo[name] -= saved
            deaths[name] = 0 if saved else deaths[name] + 1
            if deaths[name] < DEATHS:
                waiting.add(name)
            else:
                ended[name] = end
                given_up.append(name)
            heapq.heappush(free, (end + pool.start, worker))
    images, order = sum(load.images for load in loads), sorted(of, key=lambda n: ended[n])
    return Forecast(max(ended.values()), busy, images, repeated * pool.speed, failures, order, given_up)


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


def rehearse(fleet: "Fleet", train: Train, workers: int, accumulate: int = 1) -> Pool:
    """Measure a pool on this machine with short trainings of the largest expert in ``workers`` simultaneous processes.

    Each worker runs one training to warm up, then three with few steps, many steps, and validations. Their durations
    give three equations for the time of a step, of a validation, and of the rest of a job. The start time of a process
    is measured separately. accumulate: batches per optimizer step and device.
    """
    from lightning_tdisent.fleet.local import run
    from lightning_tdisent.fleet.state import Jobs

    expert = next(e for e in fleet.experts if e.cost == max(e.cost for e in fleet.experts))
    argv = next(job.argv for job in fleet.jobs() if job.name == expert.name)
    argv = argv[: argv.index("--run")]
    if "--model.warm_start" in argv:  # the initial weights may not exist yet
        at = argv.index("--model.warm_start")
        argv = argv[:at] + argv[at + 2 :]
    few, many = REHEARSED
    plans = {"first": (2, 0), "few": (few, 0), "many": (many, 0), "validated": (few, VALIDATIONS)}
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        place, jobs = Path(name), []
        for k in range(workers):
            before: tuple[str, ...] = ()
            for what, (steps, validations) in plans.items():
                folder = place / f"{what}_{k}"
                words = ["--trainer.max_steps", str(steps), "--run", str(folder)]
                every = steps // validations if validations else steps + 1
                words += ["--trainer.val_check_interval", str(every * accumulate)]
                # limit_val_batches 0 also skips the validation before the first step
                words += [] if validations else ["--trainer.limit_val_batches", "0"]
                jobs.append(Job(f"{what}_{k}", [*argv, *words], folder, before))
                before = (f"{what}_{k}",)
        begun = time.time()
        run(Jobs(Store(place), jobs), _TimedTrain(train), workers, show=False)
        seconds = dict.fromkeys(plans, 0.0)
        start = 0.0
        for job in jobs:
            begin, end = (float(word) for word in (job.folder / "times.txt").read_text(encoding="utf-8").split())
            what = job.name.rpartition("_")[0]
            seconds[what] += (end - begin) / workers
            if what == "first":
                start += (end - begun) / workers
    step = max(1e-6, (seconds["many"] - seconds["few"]) / (many - few))
    rest = max(0.0, seconds["few"] - few * step)
    # + 1: the validation before the first step
    validation = max(0.0, (seconds["validated"] - seconds["few"]) / (VALIDATIONS + 1))
    return Pool(workers, expert.step / step, max(0.0, start - rest - 2 * step), rest, validation)


@dataclass(frozen=True)
class _TimedTrain:
    """Call ``train``, and write its start and end time to ``times.txt`` in the run folder."""

    train: Train

    def __call__(self, argvs: Sequence[list[str]], reports: Sequence[Report]) -> list[BaseException | None]:
        begin = time.time()
        ends = self.train(argvs, reports)
        folder = Path(argvs[0][argvs[0].index("--run") + 1])
        (folder / "times.txt").write_text(f"{begin} {time.time()}", encoding="utf-8")
        return ends


def lines(fleet: "Fleet", facts: Sequence["Facts"], pool: Pool) -> list[tuple[str, str]]:
    """Simulate a fleet on a pool; return the results as pairs (label, text)."""
    loads = loads_of(fleet, facts)
    forecast, alone = simulate(loads, pool), simulate(loads, replace(pool, workers=1, failures=0.0))
    jobs = fleet.jobs()
    flops = sum(3.0 * fact.flops * (job.images or 0) for job, fact in zip(jobs, facts, strict=True))
    if fleet.budget.rule == "adaptive":
        flops += 3.0 * max(fact.flops for fact in facts) * sum(load.images for load in loads if load.round)
    disk, memory = footprint(facts, pool.workers)
    failure_text = f", {forecast.failures} failures" if pool.failures else ""
    if forecast.given_up:
        failure_text += f", {len(forecast.given_up)} jobs given up after {DEATHS} deaths in a row without a checkpoint"
    repeat_text = f" and {forecast.repeated:,.0f} repeated after failures" if forecast.repeated else ""
    passes = sum(load.validations for load in loads)
    validating = passes * pool.validation
    share = forecast.busy / (forecast.wall * pool.workers)
    flops *= 1 + forecast.repeated / forecast.images
    return [
        ("workers", f"{pool.workers} of {pool.speed:,.0f} images/s, {pool.start:.1f} s to start"),
        ("a training", f"{pool.job:.1f} s in addition to its steps, {pool.validation:.2f} s per validation"),
        ("wall clock", f"{duration(forecast.wall)}{failure_text}; one worker alone {duration(alone.wall)}"),
        ("workers' time", f"{duration(forecast.busy)}, {share:.0%} of the wall clock of all workers"),
        ("validations", f"{passes:,}, {duration(validating)}: as long as {validating * pool.speed:,.0f} more images"),
        ("total compute", f"{forecast.images:,.0f} images{repeat_text}, {flops / 1e12:,.3g} TFLOP"),
        ("disk", f"{disk / 1e6:,.0f} MB"),
        ("memory, all workers", f"{memory / 1e6:,.0f} MB, without data and activations"),
    ]  # fmt: skip
