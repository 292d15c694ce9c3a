"""Workers on this machine: some processes that take one job after another, watched and replaced when they die."""

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
from lightning_tdisent.fleet.status import LiveBoard, tiles
from lightning_tdisent.fleet.work import Session, failures, work_through


def run(
    work: Work, train: Train, workers: int = 0, session: Session | None = None, show: bool = True,
    gpus: Sequence[str] | None = None, title: str = "", threads: int = 1,
) -> None:  # fmt: skip
    """Do all jobs that are not done; a failed one stops what needs it, the rest go on, then all failures are named.

    train: called in a fresh process with the jobs' command lines and progress reports; must be importable. workers:
    processes at a time; if 0 one per GPU, or per core where there is none. gpus: names for CUDA_VISIBLE_DEVICES, all
    that this process may use if None: each worker sees its own alone, in turn. threads: of torch in each, its share of
    the cores if 0; small networks are fastest with one, and another number gives other last bits. Raises InputError for
    failed jobs at the end.
    """
    session, jobs = session or Session(), work.jobs()
    names = [job.name for job in jobs]
    for job in jobs:
        unknown = set(job.needs) - set(names)
        if unknown:
            raise InputError(f"{job.name} needs {sorted(unknown)}, which are not among the jobs {names}")
    cores = len(os.sched_getaffinity(0))
    gpus = visible_gpus() if gpus is None else gpus
    count = workers or len(gpus) or cores
    count = max(1, min(count, len(session.only) or len(jobs)))
    context = multiprocessing.get_context("spawn")

    def start(number: int) -> multiprocessing.process.BaseProcess:
        mine = {"OMP_NUM_THREADS": str(threads or max(1, cores // count))}  # before torch is imported there
        if gpus:
            mine["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        process = context.Process(target=_serve, args=(work, train, session, os.getpid()))
        with _environment(mine):
            process.start()
        return process

    live = Live(refresh_per_second=2, transient=True)
    show = show and live.console.is_terminal
    with told_to_go():
        pool, starts = [start(k) for k in range(count)], count
        try:
            if show:
                live.start()
            while running := [p for p in pool if p.exitcode != 0]:
                wait([p.sentinel for p in running], timeout=1.0)
                with contextlib.suppress(OSError, InputError):  # it is to be looked at, no more
                    if show:
                        live.update(LiveBoard(tiles(work), title))
                for k, process in enumerate(pool):
                    if process.exitcode:
                        starts += 1
                        if process.exitcode == 2 or starts > session.deaths * (len(jobs) + 1):
                            raise Halted(
                                f"a worker ended with status {process.exitcode} after {starts} in all; see above"
                            )
                        pool[k] = start(k)  # which takes up what that one had
        finally:
            if show:
                live.stop()
            for process in pool:
                process.terminate()
            for process in pool:
                process.join(60)  # which may take a checkpoint
                if process.is_alive():
                    process.kill()
                    process.join()
    refuse_undone(work, session)


def visible_gpus() -> list[str]:
    """Names of all GPUs that this process may use, for CUDA_VISIBLE_DEVICES of others."""
    import torch

    count, told = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(k) for k in range(count)] if told is None else told.split(",")[:count]


def refuse_undone(work: Work, session: Session) -> None:
    """Name every job that this session was to do and has not done, with its reason."""
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


def _serve(work: Work, train: Train, session: Session, parent: int) -> None:
    """Be a worker; a process of its own, that goes when its parent has gone."""
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    try:
        work_through(work, train, session)
    except InputError as error:  # of no job, but of the plan or the place
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave_with(parent: int) -> None:
    """Go as one who was told to, with a checkpoint, when nobody is there any more who would replace this process."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def told_to_go() -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and SIGHUP into an exit with 143, so that the workers are told as well."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    numbers = [signal.SIGTERM, signal.SIGUSR1] if threading.current_thread() is threading.main_thread() else []
    if numbers and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup asks for
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
