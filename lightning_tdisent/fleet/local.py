"""Independent jobs on this machine: some processes, each working through jobs as soon as what they wait for is done."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_tdisent.errors import InputError

Report = Callable[[int, int], None]
Target = Callable[[list[str], Report], None]


@dataclass(frozen=True)
class Job:
    """A command line with the folder it fills, its steps for the progress bar, and the names of jobs it needs."""

    name: str
    argv: list[str]
    folder: Path
    needs: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether a whole training has left its weights."""
        return (self.folder / "model.safetensors").exists()


def _serve(pipe: Connection, target: Target, threads: int) -> None:
    """Work through jobs from the pipe; runs in a process of its own, whose output goes to the job's log.txt."""
    import torch

    torch.set_num_threads(threads)
    while (job := _next(pipe)) is not None:
        job.folder.mkdir(parents=True, exist_ok=True)
        error = None
        with (job.folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                target(job.argv, lambda step, steps: _tell(pipe, step, steps))
            except InputError as refusal:
                error = str(refusal)
            except SystemExit as end:
                if end.code and end.code not in (0, 1, 2):  # a signal: whoever sent it wants the process gone
                    raise
                error = f"ended with status {end.code}" if end.code else None
            except KeyboardInterrupt:
                return
            except BaseException:
                error = traceback.format_exc()
                print(error, file=log)
        pipe.send(("end", error, 0))


def _tell(pipe: Connection, step: int, steps: int) -> None:
    """Report a step; if nobody listens any more, go as one who was told to: with a checkpoint."""
    try:
        pipe.send(("step", step, steps))
    except OSError:
        signal.raise_signal(signal.SIGTERM)


def _next(pipe: Connection) -> Job | None:
    """Next job; None when told to end, or when nobody is left to tell."""
    try:
        job: Job | None = pipe.recv()
        return job
    except (EOFError, KeyboardInterrupt):
        return None


def run(jobs: Sequence[Job], target: Target, workers: int = 0, show: bool = True) -> None:
    """Run all jobs that are not done; a failed one stops what needs it, the rest go on, then all failures are named.

    target: called in a fresh process with a job's argv and a progress report; must be importable. workers: processes
    at a time, one per core if 0; each takes its share of the cores as torch threads. Refuses failed jobs at the end.
    """
    cores = len(os.sched_getaffinity(0))
    workers = min(workers or cores, len(jobs)) or 1
    names = [job.name for job in jobs]
    for job in jobs:
        unknown = set(job.needs) - set(names)
        if unknown:
            raise InputError(f"{job.name} needs {sorted(unknown)}, which are not among the jobs {names}")
    waiting = [job for job in jobs if not job.done]
    failed: dict[str, str] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    with _told_to_go(), Progress(*columns, disable=not show) as bar:
        whole = bar.add_task("all jobs", total=len(jobs), completed=len(jobs) - len(waiting))
        pool = [_Worker(context, target, max(1, cores // workers)) for _ in range(min(workers, len(waiting)))]
        try:
            while waiting or any(w.job for w in pool):
                for worker in (w for w in pool if w.job is None):
                    if todo := next(_ready(waiting, jobs, failed), None):
                        waiting.remove(todo)
                        worker.start(todo, bar.add_task(todo.name, total=None))
                if not any(w.job for w in pool):
                    break
                for pipe in wait([w.pipe for w in pool if w.job]):
                    worker = next(w for w in pool if w.pipe is pipe)
                    kind, value, steps = worker.receive()
                    if kind == "step":
                        bar.update(worker.task, completed=value, total=steps)
                        continue
                    assert worker.job
                    if value is not None:
                        failed[worker.job.name] = (
                            f"{str(value).strip().splitlines()[-1]} (see {worker.job.folder}/log.txt)"
                        )
                    bar.remove_task(worker.task)
                    bar.advance(whole)
                    worker.job = None
                    if not worker.process.is_alive():
                        pool[pool.index(worker)] = _Worker(context, target, max(1, cores // workers))
        finally:
            for worker in pool:
                worker.release()
            for worker in pool:
                worker.join()
    if failed or waiting:
        lines = [f"  - {name}: {why}" for name, why in failed.items()]
        lines += [f"  - {job.name}: not started, it needs {', '.join(job.needs)}" for job in waiting]
        raise InputError(f"{len(lines)} of {len(jobs)} jobs are not done:\n" + "\n".join(lines))


@contextmanager
def _told_to_go() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into an exit with 143, so that the workers are told as well."""

    def leave(*_: Any) -> None:
        raise SystemExit(143)

    numbers = (signal.SIGTERM, signal.SIGUSR1) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready(waiting: Sequence[Job], jobs: Sequence[Job], failed: dict[str, str]) -> Iterator[Job]:
    done = {job.name for job in jobs if job.done and job.name not in failed}
    return (job for job in waiting if done.issuperset(job.needs))


class _Worker:
    """A process and the job it has."""

    def __init__(self, context: multiprocessing.context.SpawnContext, target: Target, threads: int) -> None:
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_serve, args=(end, target, threads), daemon=True)
        self.process.start()
        end.close()
        self.job: Job | None = None

    def start(self, job: Job, task: TaskID) -> None:
        self.job, self.task = job, task
        self.pipe.send(job)

    def receive(self) -> tuple[str, Any, int]:
        """Next message; a process that died has ended its job."""
        try:
            message: tuple[str, Any, int] = self.pipe.recv()
            return message
        except EOFError:
            self.process.join()
            return ("end", f"its process died with status {self.process.exitcode}", 0)

    def release(self) -> None:
        """Tell the process to end, at once if it has a job."""
        self.pipe.close()
        if self.job:
            self.process.terminate()

    def join(self) -> None:
        """Wait for its end, which may take a checkpoint, but not for ever."""
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
