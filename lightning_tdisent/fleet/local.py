"""Run jobs in worker processes on this machine, and replace workers that die."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait

from rich.live import Live

from lightning_tdisent.errors import Crashed, Halted, InputError
from lightning_tdisent.fleet.job import Train
from lightning_tdisent.fleet.state import Work
from lightning_tdisent.fleet.status import Board, summary, tiles
from lightning_tdisent.fleet.work import Session, failures, work_through
from lightning_tdisent.processes import cores
from lightning_tdisent.progress import EVERY


def run(
    work: Work, train: Train, workers: int = 0, session: Session | None = None, show: bool = True,
    gpus: Sequence[str] | None = None, title: str = "", threads: int = 1,
) -> None:  # fmt: skip
    """Run all jobs that are not done.

    If a job fails, the jobs that need it are not started, and all others are still run.

    work: the jobs and their state.
    train: called in a worker process with command lines and progress callbacks; must be importable by name.
    workers: number of processes; if 0, one per GPU, or one per core if there is no GPU.
    session: options of this launch.
    show: show the status: a live board if the output is a terminal, otherwise a line every 30 seconds on stderr.
    gpus: values for CUDA_VISIBLE_DEVICES, assigned to the workers in turn, one each; if None, all GPUs that this
        process may use.
    title: title of the board.
    threads: torch threads per worker; if 0, the cores divided by the number of workers. Small networks are fastest
        with one thread. Results with different numbers of threads differ in the last bits.

    Raises InputError at the end that lists all jobs that are not done, and Halted if a worker ends with status 2 or
    workers die too often.
    """
    session, jobs = session or Session(), work.jobs()
    names = [job.name for job in jobs]
    for job in jobs:
        unknown = set(job.needs) - set(names)
        if unknown:
            raise InputError(f"{job.name} needs {sorted(unknown)}, which are not among the jobs {names}")
    gpus = visible_gpus() if gpus is None else gpus
    count = at_once(workers, len(session.only) or len(jobs), gpus)
    context = multiprocessing.get_context("spawn")

    def start(number: int) -> multiprocessing.process.BaseProcess:
        mine = {"OMP_NUM_THREADS": str(threads or max(1, cores() // count))}  # torch reads it when it is imported
        if gpus:
            mine["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        process = context.Process(target=_run_worker, args=(work, train, session, os.getpid()))
        with _environment(mine):
            process.start()
        return process

    live = Live(refresh_per_second=2, transient=True)
    on_terminal = live.console.is_terminal
    with told_to_go():
        pool, starts, said = [start(k) for k in range(count)], count, time.monotonic()
        try:
            if show and on_terminal:
                live.start()
            while running := [p for p in pool if p.exitcode != 0]:
                wait([p.sentinel for p in running], timeout=1.0)
                with contextlib.suppress(OSError, InputError):  # display only; ignore errors
                    if show and on_terminal:
                        live.update(Board(tiles(work), title))
                    elif show and time.monotonic() - said >= EVERY:
                        said = time.monotonic()
                        print(summary(tiles(work)), file=sys.stderr, flush=True)
                for k, process in enumerate(pool):
                    if process.exitcode:
                        starts += 1
                        if process.exitcode == 2 or starts > session.deaths * (len(jobs) + 1):
                            raise Halted(
                                f"a worker ended with status {process.exitcode} ({starts} were started); see above"
                            )
                        pool[k] = start(k)  # the new worker resumes the job of the dead one
        finally:
            live.stop()
            for process in pool:
                process.terminate()
            for process in pool:
                process.join(60)  # the worker may have to save a checkpoint
                if process.is_alive():
                    process.kill()
                    process.join()
    refuse_undone(work, session)


def at_once(workers: int, jobs: int, gpus: Sequence[str] | None = None) -> int:
    """Return the number of worker processes for ``workers``; 0 is one per GPU, or per core if there is no GPU."""
    gpus = visible_gpus() if gpus is None else gpus
    return max(1, min(workers or len(gpus) or cores(), jobs))


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as values for CUDA_VISIBLE_DEVICES of its workers."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(k) for k in range(count)] if visible is None else visible.split(",")[:count]


def refuse_undone(work: Work, session: Session) -> None:
    """Raise InputError that lists each job of this session that is not done, with the reason.

    The error is Crashed if the training of a job ended with an unexpected error.
    """
    found = {name: f for name, f in failures(work).items() if session.name in f["sessions"]}
    failed = {**session.said, **{name: str(f["reason"]) for name, f in found.items()}}
    crashed = any(f.get("crashed") for f in found.values())
    jobs = {job.name: job for job in work.jobs()}
    lines, undone = [], []
    for name, job in jobs.items():
        if session.only and name not in session.only:
            continue
        if name in failed:
            lines.append(f"  - {name}: " + "\n    ".join(failed[name].strip().splitlines()))
        elif not work.done(job):
            needs = [need for need in job.needs if not work.done(jobs[need])]
            undone.append(f"  - {name}: " + (f"not started, it needs {', '.join(needs)}" if needs else "not done"))
    if lines or undone:
        kind = Crashed if crashed else InputError
        raise kind(f"{len(lines + undone)} of {len(jobs)} jobs are not done:\n" + "\n".join(lines + undone))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run_worker(work: Work, train: Train, session: Session, parent: int) -> None:
    """Run a worker in this process; it exits when its parent process ends."""
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    try:
        work_through(work, train, session)
    except InputError as error:  # concerns the plan or the store, not a single job
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _exit_with_parent(parent: int) -> None:
    """Send SIGTERM to this process when its parent has ended, so that it saves a checkpoint and exits."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def told_to_go() -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and SIGHUP into SystemExit(143), so that the workers are stopped as well.

    Does nothing outside the main thread.
    """

    def leave(*_: object) -> None:
        raise SystemExit(143)

    numbers = [signal.SIGTERM, signal.SIGUSR1] if threading.current_thread() is threading.main_thread() else []
    if numbers and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup sets SIG_IGN
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
