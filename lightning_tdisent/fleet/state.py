"""Jobs and their state: a fixed list with local run folders, or the plan of a fleet with its store."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import ask_guards
from lightning_tdisent.fleet import rounds
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.mirror import POINTER, Mirror, step_of
from lightning_tdisent.fleet.plan import Fleet
from lightning_tdisent.fleet.planned import BEGUN, FILE, SHARED, Describe
from lightning_tdisent.fleet.store import Store, dump_json, read_json
from lightning_tdisent.runs import CURVE, WEIGHTS


class Work(Protocol):
    """Interface of a set of jobs and the store of their state."""

    @property
    def store(self) -> Store:
        """Store of the state."""

    def jobs(self) -> list[Job]:
        """Return all jobs of the current round."""

    def done(self, job: Job) -> bool:
        """Return True if a job is finished; raise InputError for weights of another training in its folder."""

    def begin(self, job: Job) -> Mirror | None:
        """Prepare the folder of a job; return the mirror that copies it to a store, if any."""

    def saved(self, job: Job) -> int:
        """Return the step of the newest checkpoint of a job, 0 if it has none."""

    def round(self) -> int:
        """Return the number of the current round."""

    def more(self, number: int) -> bool:
        """Start the round after ``number``, whose jobs are all done; return False if there is none."""

    def last(self) -> bool:
        """Return True if no round follows the current one."""

    def foreseen(self) -> dict[str, float]:
        """Return predicted errors of x0_hat at the end of the round, by names of jobs; empty if there are none."""

    def curve(self, job: Job) -> dict[str, Any] | None:
        """Return the error curve of a job, None if it has not written one."""


@dataclass(frozen=True)
class Jobs:
    """A fixed list of jobs in a single round, trained in their own local folders."""

    store: Store
    listed: list[Job]

    def jobs(self) -> list[Job]:
        """Return the list."""
        return self.listed

    def done(self, job: Job) -> bool:
        """See `Job.done`."""
        return job.done

    def begin(self, job: Job) -> Mirror | None:
        """Do nothing: there is nothing to prepare, and no mirror."""
        return None

    def saved(self, job: Job) -> int:
        """Return the step of the newest checkpoint from the pointer in the job's folder."""
        return step_of(Store(job.folder).read(POINTER))

    def round(self) -> int:
        """Return 0, the only round."""
        return 0

    def more(self, number: int) -> bool:
        """Return False: there is only one round."""
        return False

    def last(self) -> bool:
        """Return True: there is only one round."""
        return True

    def foreseen(self) -> dict[str, float]:
        """Return no predictions."""
        return {}

    def curve(self, job: Job) -> dict[str, Any] | None:
        """Return the error curve in the job's folder, None if there is none."""
        return read_json(Store(job.folder), CURVE, ("points",))


@dataclass(frozen=True)
class FleetWork:
    """The jobs of a fleet. If the fleet is in an object store, each run folder is mirrored there.

    fleet: plan and store.
    describe: returns the facts of a ``fit`` command line.
    """

    fleet: Fleet
    describe: Describe

    @property
    def store(self) -> Store:
        """Store of the fleet."""
        return self.fleet.store

    def jobs(self) -> list[Job]:
        """Return all jobs with the images granted for the current round.

        After the first round every job has started from its initial weights, so that it needs no other job.
        """
        number, images = rounds.targets(self.fleet)
        jobs = self.fleet.jobs(images, number)
        return [replace(job, needs=()) for job in jobs] if number else jobs

    def done(self, job: Job) -> bool:
        """Return True if a job has seen all its images: from its weights or, in an object store, its ``done`` file.

        Raises InputError for weights of another training.
        """
        if not self.store.remote:
            return job.done
        said = read_json(self.store, f"done/{job.name}.json", ("images_seen",))
        if said is None:
            return False
        wrong = [f"{k} {said.get(k)}, not {v}" for k, v in job.expect.items() if said.get(k) != v]
        if wrong:
            raise InputError(
                f"{job.name}: its results in {self.store} belong to another training: they have {', '.join(wrong)}"
            )
        return int(said["images_seen"]) >= (job.images or 0)

    def begin(self, job: Job) -> Mirror | None:
        """Check the config of a job and record that it has started.

        If the fleet is in an object store, first download the configs, the weights that the job starts from, and its
        run folder; return the mirror of that folder. Raises InputError if the weights are missing or `Fleet.check`
        refuses the job.
        """
        mirror = None
        self.fetch_configs()
        if self.store.remote:
            for name in job.needs:
                weights = f"{self.fleet.folder(name)}/{WEIGHTS}"
                content = self.store.read(weights, large=True, check=partial(ask_guards, job.weights))
                if content is None:
                    raise InputError(f"{job.name} starts from {name}, but {self.store}/{weights} does not exist")
                Store(self.fleet.root).write(weights, content)
            mirror = Mirror(self.store, self.fleet.folder(job.name), job.folder)
            mirror.pull()
        self.fleet.check(self.describe, [job.name])
        self.store.create(f"{BEGUN}/{job.name}.json", dump_json(self.fleet.begun(job.name)))
        return mirror

    def fetch_configs(self) -> None:
        """Download the configs if the fleet is in an object store."""
        if self.store.remote:
            for config in self.fleet.config_files:
                Store(self.fleet.root).write(config, self.store.read(config) or b"")

    def saved(self, job: Job) -> int:
        """Return the step of the newest checkpoint from the pointer in the store."""
        return step_of(self.store.read(f"{self.fleet.folder(job.name)}/{POINTER}"))

    def refuse_fewer(self, names: Sequence[str] = ()) -> None:
        """Raise InputError for jobs whose planned images are fewer than they have seen; names: jobs, all if empty."""
        step = {e.name: e.step for e in self.fleet.experts}
        if shared := self.fleet.shared:
            step[SHARED] = shared["batch"] * shared.get("parts", 1)
        wrong = []
        for job in [job for job in self.jobs() if not names or job.name in names]:
            seen = self.saved(job) * step[job.name]
            with contextlib.suppress(InputError):  # foreign or damaged weights are reported by their own job
                said = read_json(self.store, f"done/{job.name}.json") if self.store.remote else None
                card = None if self.store.remote else job.card
                seen = max(seen, card.images_seen if card else int((said or {}).get("images_seen", 0)))
            if seen > (job.images or 0):
                wrong.append(f"{job.name}: images: {job.images:,} in the plan, {seen:,} seen already")
        if wrong:
            raise InputError(
                f"{self.store}/{FILE}: {'; '.join(wrong)}. Images may be increased, but not reduced below the number "
                "already seen; to train with fewer, plan another fleet"
            )

    def round(self) -> int:
        """Return the number of the current round of an adaptive budget, 0 for other budgets."""
        return rounds.targets(self.fleet)[0]

    def more(self, number: int) -> bool:
        """Decide the round after ``number`` of an adaptive budget; return False if there is none."""
        return rounds.advance(self.fleet, number)

    def last(self) -> bool:
        """Return True if the budget is spent once the current targets are reached."""
        return rounds.last(self.fleet)

    def weights(self, place: Path) -> tuple[list[Path], list[str]]:
        """Return the weight files of the experts, and a line for each expert that has not seen all its images.

        place: folder to which the files are downloaded if the fleet is in an object store.
        """
        files, unfinished = list[Path](), list[str]()
        for job in self.jobs():
            if job.name == SHARED:
                continue
            if self.store.remote:
                job = replace(job, folder=place / job.name)
                if content := self.store.read(f"{self.fleet.folder(job.name)}/{WEIGHTS}", large=True):
                    Store(job.folder).write(WEIGHTS, content)
            card, images = job.card, job.images or 0
            if card is not None:
                files.append(job.weights)
            if card is None or card.images_seen < images:
                unfinished.append(f"{job.name}, {f'{card.images_seen:,}' if card else 'none'} of {images:,} images")
        return files, unfinished

    def curve(self, job: Job) -> dict[str, Any] | None:
        """Return the error curve of a job from the store; see `rounds.curve`."""
        return rounds.curve(self.fleet, job.name)

    def foreseen(self) -> dict[str, float]:
        """Return the errors that the last decision of an adaptive budget predicts, by names of experts.

        The error of an expert is the mean over its rows, weighted by their effects.
        """
        _, decided = rounds.newest(self.fleet)
        if decided is None:
            return {}
        weight = {e.name: sum(decided["effects"][s - 1] for s in e.rows) for e in self.fleet.experts}
        return {name: error / weight[name] for name, error in decided["predicted"].items()}
