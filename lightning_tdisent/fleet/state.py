"""Jobs and where their state is kept: a fixed list beside its folders, or the plan of a fleet and its store."""

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
from lightning_tdisent.fleet.plan import BEGUN, FILE, SHARED, Describe, Fleet
from lightning_tdisent.fleet.store import Store, dump_json, read_json
from lightning_tdisent.runs import CURVE, WEIGHTS


class Work(Protocol):
    """Jobs and the place where their state is kept."""

    @property
    def store(self) -> Store:
        """Where it is kept."""

    def jobs(self) -> list[Job]:
        """All jobs as they stand now."""

    def done(self, job: Job) -> bool:
        """Whether a job is finished; refuses foreign weights in its folder."""

    def begin(self, job: Job) -> Mirror | None:
        """Prepare a job's folder; what keeps a copy of it, if one is kept."""

    def saved(self, job: Job) -> int:
        """Step of its newest checkpoint, 0 if it has none."""

    def round(self) -> int:
        """Which round of its jobs this is."""

    def more(self, number: int) -> bool:
        """Whether, all jobs of a round being done, there is something new to do."""

    def last(self) -> bool:
        """Whether nothing comes after the jobs of this round."""

    def foreseen(self) -> dict[str, float]:
        """Errors of x0_hat that the plan foresees at the end of jobs, where it does."""

    def curve(self, job: Job) -> dict[str, Any] | None:
        """The curve of a job, where it has written one."""


@dataclass(frozen=True)
class Jobs:
    """A fixed list of jobs, trained where they are."""

    store: Store
    listed: list[Job]

    def jobs(self) -> list[Job]:
        """The list."""
        return self.listed

    def done(self, job: Job) -> bool:
        """See `Job.done`."""
        return job.done

    def begin(self, job: Job) -> Mirror | None:
        """Nothing to prepare."""
        return None

    def saved(self, job: Job) -> int:
        """By the pointer beside it."""
        return step_of(Store(job.folder).read(POINTER))

    def round(self) -> int:
        """The only one."""
        return 0

    def more(self, number: int) -> bool:
        """Never."""
        return False

    def last(self) -> bool:
        """Always."""
        return True

    def foreseen(self) -> dict[str, float]:
        """None."""
        return {}

    def curve(self, job: Job) -> dict[str, Any] | None:
        """Read it from the job's folder."""
        return read_json(Store(job.folder), CURVE)


@dataclass(frozen=True)
class FleetWork:
    """The jobs of a fleet; of one in an object store a copy of each run folder is kept there."""

    fleet: Fleet
    describe: Describe

    @property
    def store(self) -> Store:
        """Of the fleet."""
        return self.fleet.store

    def jobs(self) -> list[Job]:
        """With the images that the last round granted; after the first one all have begun, and need nobody."""
        number, images = rounds.targets(self.fleet)
        jobs = self.fleet.jobs(images, number)
        return [replace(job, needs=()) for job in jobs] if number else jobs

    def done(self, job: Job) -> bool:
        """Whether its images have been seen, by the weights or, in a store, by what their trainer said of them."""
        if not self.store.remote:
            return job.done
        said = read_json(self.store, f"done/{job.name}.json")
        if said is None:
            return False
        wrong = [f"{k} {said.get(k)}, not {v}" for k, v in job.expect.items() if said.get(k) != v]
        if wrong:
            raise InputError(
                f"{job.name}: what {self.store} has of it is of another training: it has {', '.join(wrong)}"
            )
        return int(said["images_seen"]) >= (job.images or 0)

    def begin(self, job: Job) -> Mirror | None:
        """Bring configs, the weights it starts from, and what there is of its run; refuse a config that has changed."""
        mirror = None
        self.fetch_configs()
        if self.store.remote:
            for name in job.needs:
                weights = f"{self.fleet.folder(name)}/{WEIGHTS}"
                content = self.store.read(weights, large=True, check=partial(ask_guards, job.weights))
                if content is None:
                    raise InputError(f"{job.name} starts from {name}, whose {self.store}/{weights} is gone")
                Store(self.fleet.root).write(weights, content)
            mirror = Mirror(self.store, self.fleet.folder(job.name), job.folder)
            mirror.pull()
        self.fleet.check(self.describe, [job.name])
        self.store.create(f"{BEGUN}/{job.name}.json", dump_json(self.fleet.begun(job.name)))
        return mirror

    def fetch_configs(self) -> None:
        """Bring the configs of a fleet in a store to this machine."""
        if self.store.remote:
            for config in self.fleet.config_files:
                Store(self.fleet.root).write(config, self.store.read(config) or b"")

    def saved(self, job: Job) -> int:
        """By the pointer beside it."""
        return step_of(self.store.read(f"{self.fleet.folder(job.name)}/{POINTER}"))

    def refuse_fewer(self, names: Sequence[str] = ()) -> None:
        """Refuse images of jobs (all if none are named) that are fewer than these have seen already."""
        step = {e.name: e.step for e in self.fleet.experts}
        if shared := self.fleet.shared:
            step[SHARED] = shared["batch"] * shared.get("parts", 1)
        wrong = []
        for job in [job for job in self.jobs() if not names or job.name in names]:
            seen = self.saved(job) * step[job.name]
            with contextlib.suppress(InputError):  # foreign or damaged weights fail their own job, and no other
                said = read_json(self.store, f"done/{job.name}.json") if self.store.remote else None
                card = None if self.store.remote else job.card
                seen = max(seen, card.images_seen if card else int((said or {}).get("images_seen", 0)))
            if seen > (job.images or 0):
                wrong.append(f"{job.name}: images: {job.images:,} in the plan, {seen:,} seen already")
        if wrong:
            raise InputError(
                f"{self.store}/{FILE}: {'; '.join(wrong)}. Images may be raised, not lowered below what was seen; to "
                "train with fewer, plan another fleet"
            )

    def round(self) -> int:
        """Of an adaptive budget."""
        return rounds.targets(self.fleet)[0]

    def more(self, number: int) -> bool:
        """Whether an adaptive budget has another round."""
        return rounds.advance(self.fleet, number)

    def last(self) -> bool:
        """Whether its budget is spent when the targets of now are reached."""
        return rounds.last(self.fleet)

    def weights(self, place: Path) -> tuple[list[Path], list[str]]:
        """Files of the experts' weights, brought to a folder from a store; and who has not seen all its images."""
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
        """See `rounds.curve`."""
        return rounds.curve(self.fleet, job.name)

    def foreseen(self) -> dict[str, float]:
        """By the fits of the last round of an adaptive budget."""
        _, decided = rounds.newest(self.fleet)
        if decided is None:
            return {}
        weight = {e.name: sum(decided["effects"][s - 1] for s in e.rows) for e in self.fleet.experts}
        return {name: error / weight[name] for name, error in decided["predicted"].items()}
