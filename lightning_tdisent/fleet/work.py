"""The loop of a worker: take a job that no other worker holds, train it, take the next.

It is the same however the worker was started. Workers coordinate only through the files of the fleet.
"""

import contextlib
import io
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning_tdisent.errors import NAMED, Busy, Halted, InputError, Lost, Newer
from lightning_tdisent.files import guarded, open_own
from lightning_tdisent.fleet import lease
from lightning_tdisent.fleet.job import Job, Train
from lightning_tdisent.fleet.lease import TTL, Lease, Watch
from lightning_tdisent.fleet.mirror import Mirror
from lightning_tdisent.fleet.state import Work
from lightning_tdisent.fleet.store import dump_json, read_json
from lightning_tdisent.processes import me
from lightning_tdisent.runs import LOG, busy

FAILED = "failed"
POLL = 1.0  # seconds between attempts to take a job


@dataclass
class Session:
    """Options of one launch of workers. A job that fails is not tried again by any worker of the same session.

    only: names of the jobs to train, all if empty.
    ttl: seconds without a heartbeat after which a worker is considered dead.
    deaths: consecutive deaths of a job's process without a newer checkpoint after which the job is given up.
    together: number of jobs that a worker trains at the same time.
    quiet: write the output of trainings to log.txt in their folders.
    name: random name of the session, under which failures are recorded.
    said: failure reasons found by this process, kept even if they cannot be written to the store.
    """

    only: Sequence[str] = ()
    ttl: float = TTL
    deaths: int = 5
    together: int = 1
    quiet: bool = True
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    said: dict[str, str] = field(default_factory=dict)


def failures(work: Work) -> dict[str, dict[str, Any]]:
    """Return the recorded failure of each job whose last attempt failed."""
    out = {}
    for name in work.store.names(FAILED):
        try:
            content = read_json(work.store, f"{FAILED}/{name}")
        except Newer:
            raise
        except InputError:  # truncated on a full disk: ignore it
            continue
        if content is not None and isinstance(content.get("sessions"), list):
            out[name.removesuffix(".json")] = content
    return out


def work_through(work: Work, train: Train, session: Session) -> dict[str, str]:
    """Train jobs until none is left for this session; return the jobs that are not done, with reasons.

    Raises SystemExit after a stop signal, once the current training is saved, and Halted if the store keeps failing for
    longer than the ttl of a lease. Shorter failures (network, full disk) are waited for.
    """
    watch, since = Watch(), None
    work.store.wait_for(session.ttl / lease.BEATS)
    while True:
        begin = time.monotonic()
        try:
            if (left := _poll_once(work, train, session, watch)) is not None:
                return left
            since = None
        except OSError as error:
            now = time.monotonic()
            if since is None or now - begin > session.ttl:  # no request takes as long: a training ran in between
                since = now
            if now - since > session.ttl:
                raise Halted(
                    f"{work.store}: has been failing for {session.ttl:.0f} s: {error}. Run the fleet again"
                ) from None
            time.sleep(min(POLL, session.ttl / 4))


def _poll_once(work: Work, train: Train, session: Session, watch: Watch) -> dict[str, str] | None:
    """Train some jobs, or wait a little; return None, or, if nothing is left, the jobs not done with reasons."""
    number = work.round()  # read before the jobs, which may belong to a later round if another worker decides one now
    jobs = {job.name: job for job in work.jobs()}
    unknown = [name for name in session.only if name not in jobs]
    if unknown:
        raise InputError(f"--only {', '.join(unknown)}: no such expert; there are {', '.join(jobs)}")
    found = {n: str(f["reason"]) for n, f in failures(work).items() if session.name in f["sessions"]}
    reasons = {n: why for n, why in {**session.said, **found}.items() if n in jobs}
    undone = {name: job for name, job in jobs.items() if not _done(work, job, reasons, session)}
    mine = [n for n in undone if n not in reasons and (not session.only or n in session.only)]
    if not mine:
        if not undone and work.more(number):
            return None
        return {n: reasons.get(n, "not asked for") for n in undone if not session.only or n in session.only}
    blocked = {n for n in undone if n in reasons or (session.only and n not in session.only)}
    while more := {n for n in undone if n not in blocked and set(jobs[n].needs) & blocked}:
        blocked |= more
    free = [n for n in mine if n not in blocked]
    if not free:
        needed = {n: [need for need in jobs[n].needs if need in undone] for n in mine}
        return reasons | {n: f"not started, it needs {', '.join(needs)}" for n, needs in needed.items()}
    ready = [jobs[n] for n in free if not any(need in undone for need in jobs[n].needs)]
    chosen: list[_HeldJob] = []
    for job in sorted(ready, key=lambda job: -(job.images or 0)):
        if holder := busy(job.folder):  # not a failure: wait for the holder, and do not take the lease
            if not _held_by_worker(work, job.name, session.ttl):
                said = f"{job.name}: {job.folder} is in use by {holder}, whose end is waited for"
                _print_once(f"{job.name} in use", said)
        elif held := lease.take(work.store, job.name, watch, session.ttl, work.saved(job)):
            chosen.append(_HeldJob(job, held))
        if len(chosen) == session.together:
            break
    if chosen:
        _train(work, chosen, train, session)
    else:
        if list(session.only) == free and len(free) == 1:
            _print_holder(work, free[0], session)
        time.sleep(min(POLL, session.ttl / 4))
    return None


def _done(work: Work, job: Job, reasons: dict[str, str], session: Session) -> bool:
    try:
        return work.done(job)
    except InputError as error:
        if job.name not in reasons:
            _record_failure(work, job, str(error), False, session)
            reasons[job.name] = str(error)
        return False


def _record_failure(work: Work, job: Job, reason: str, crashed: bool, session: Session) -> None:
    print(f"{job.name}: {reason}", file=sys.stderr)
    session.said[job.name] = reason
    with contextlib.suppress(OSError):  # e.g. full disk; the reason is already printed and in ``session.said``
        before = failures(work).get(job.name, {"sessions": []})["sessions"]
        content = {"reason": reason, "sessions": [*before, session.name], "crashed": crashed, "when": time.time()}
        content |= me()
        work.store.write(f"{FAILED}/{job.name}.json", dump_json(content))


_printed: set[str] = set()


def _held_by_worker(work: Work, name: str, ttl: float) -> bool:
    """Return True if a worker of this fleet holds a job and sends heartbeats, so that its folder is rightly in use."""
    _, content = lease.current(work.store, name)
    return content is not None and not content.get("released") and time.time() - content.get("written", 0) < ttl


def _print_holder(work: Work, name: str, session: Session) -> None:
    """Print once which process holds the only requested job, and after how long it is considered dead."""
    _, content = lease.current(work.store, name)
    if content:
        ago = time.time() - content.get("written", 0)
        _print_once(
            name,
            f"{name} is held by process {content.get('pid')} on {str(content.get('host')).partition('/')[0]} (last "
            f"heartbeat {max(0, ago):.0f} s ago); waiting until it ends, or sends none for {session.ttl:.0f} s",
        )


def _print_once(name: str, text: str) -> None:
    if name not in _printed:
        _printed.add(name)
        print(text, file=sys.stderr)


@dataclass
class _HeldJob:
    """A job that this worker holds, with its lease and its mirror, if any."""

    job: Job
    lease: Lease
    mirror: Mirror | None = None

    def report(self, step: int, steps: int, numbers: dict[str, float]) -> None:
        """Pass progress to the next heartbeat."""
        self.lease.progress.update(step=step, steps=steps, **numbers)

    @property
    def log(self) -> Path:
        return self.job.folder / LOG


def _train(work: Work, chosen: Sequence[_HeldJob], train: Train, session: Session) -> None:
    """Train jobs in this process while holding their leases; record a job's failure without stopping the others."""
    with contextlib.ExitStack() as leases:
        for held in chosen:
            leases.callback(held.lease.release)
        ready = []
        for held in chosen:
            leases.enter_context(guarded(held.job.folder, held.lease.check))
            error = _exception_of(partial(_begin, work, held, session))
            if isinstance(error, OSError) and not isinstance(error, NAMED):  # concerns the store, not the job
                raise error
            if isinstance(error, Lost):
                print(f"{error}", file=sys.stderr)
            elif error is not None:
                _record_failure(work, held.job, *_failure_reason(error, held), session)
            elif not work.done(held.job):  # the previous holder may have completed it
                ready.append(held)
        if not ready:
            return
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(_log(ready[0], session.quiet))
            for held in ready[1:]:
                with open_own(held.log) as log:
                    log.write(
                        f"trained together with {ready[0].job.name}: see {ready[0].log}\n".encode(errors="replace")
                    )
            for held in ready:
                contexts.enter_context(_mirrored(held.mirror, held.lease))
            ends = train([held.job.argv for held in ready], [held.report for held in ready])
        unrecorded: Exception | None = None
        for held, end in zip(ready, ends, strict=True):
            ended = _exception_of(partial(_conclude, work, held)) if end is None else None
            if isinstance(ended, OSError):  # trained, but this could not be recorded; a later attempt records it
                unrecorded = ended
            elif isinstance(reason := end or ended, (Busy, Lost)):  # not a failure: another process has the job
                print(f"{held.job.name}: {reason}", file=sys.stderr)
            elif reason:
                _record_failure(work, held.job, *_failure_reason(reason, held), session)
        if unrecorded is not None:
            raise unrecorded


def _exception_of(act: Callable[[], None]) -> Exception | None:
    try:
        act()
    except Exception as error:
        return error
    return None


def _begin(work: Work, held: _HeldJob, session: Session) -> None:
    job = held.job
    if held.lease.deaths >= session.deaths:
        raise InputError(
            f"its process died {held.lease.deaths} times in a row without saving anything beyond step "
            f"{work.saved(job)} (see {held.log})"
        )
    held.lease.check()  # so that the folder of a fleet that was moved is not created again
    job.folder.mkdir(parents=True, exist_ok=True)
    if session.quiet:
        open_own(held.log).close()  # raises InputError for a link, before any work
    held.mirror = work.begin(job)


def _conclude(work: Work, held: _HeldJob) -> None:
    """Upload the results and mark the job as done; raise InputError if its training ended early."""
    if held.mirror is not None:
        held.mirror.push(held.lease.check)
    held.lease.check()
    if held.mirror is not None and (card := held.job.card):
        content = {"images_seen": card.images_seen, "rows": card.rows, "fingerprint": card.fingerprint}
        work.store.write(f"done/{held.job.name}.json", dump_json(content))
    if not work.done(held.job):
        raise InputError(f"its training ended before it had seen all its images (see {held.log})")
    work.store.remove(f"{FAILED}/{held.job.name}.json")


def _failure_reason(error: BaseException, held: _HeldJob) -> tuple[str, bool]:
    """Return the failure reason, and whether the error was unexpected, so that a retry elsewhere may succeed.

    The traceback of an unexpected error is appended to the log of the job.
    """
    if isinstance(error, InputError):
        return str(error), False
    if isinstance(error, SystemExit):
        return f"ended with status {error.code} (see {held.log})", False
    with contextlib.suppress(OSError, InputError), open_own(held.log) as log:
        log.write("".join(traceback.format_exception(error)).encode(errors="replace"))
    return f"{type(error).__name__}: {error} (see {held.log})", True


@contextlib.contextmanager
def _mirrored(mirror: Mirror | None, held: Lease) -> Iterator[None]:
    """Upload the run folder from a thread during the training, and once more at the end."""
    if mirror is None:
        yield
        return
    end = threading.Event()

    def copy() -> None:
        while not end.wait(held.ttl / lease.BEATS):
            with contextlib.suppress(OSError, Lost):  # the next upload includes it
                mirror.push(held.check)

    thread = threading.Thread(target=copy, name=f"copy of {held.job}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        try:
            mirror.push(held.check)
        except Lost:  # another worker writes the copy by now
            pass
        except OSError as error:
            print(f"{held.job}: its copy in {mirror.store} is not up to date: {error}", file=sys.stderr)


@contextlib.contextmanager
def _log(held: _HeldJob, quiet: bool) -> Iterator[None]:
    if not quiet:
        yield
        return
    with _Log(held.log) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


class _Log(io.TextIOBase):
    """Text stream that appends to a log file and ignores OSError, such as a full disk."""

    def __init__(self, path: Path) -> None:
        self._file = open_own(path)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text.encode(errors="replace"))
        return len(text)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()
