"""Leases: ensure that only one worker trains a job, and that another worker resumes the job if the first one dies.

A lease is a file ``leases/JOB.N.json``; the file with the largest N is in force. To take a job, a worker creates the
file with the next N, which only one worker can do. The holder rewrites the file every few seconds (heartbeat) with its
progress. A lease is dead if the process of its holder has ended (known only on the same machine), or if the file has
not changed for ``ttl`` seconds by the observer's own clock. The clocks of machines therefore need not agree; an
observer waits ``ttl`` seconds once for each dead worker.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning_tdisent.errors import InputError, Lost
from lightning_tdisent.fleet.store import SCHEMA, Store, dump_json
from lightning_tdisent.processes import began, host, me
from lightning_tdisent.schemas import check_schema, parse_json

FOLDER = "leases"
TTL = 60.0
BEATS = 6  # heartbeats per ttl of a lease

Content = dict[str, Any]


def current(store: Store, job: str, names: Sequence[str] | None = None) -> tuple[int, Content | None]:
    """Return the number and content of the lease in force, (0, None) if the job never had one.

    A lease that is not valid JSON has an empty content. names: file names of all leases, if they are already listed.
    """
    prefix = f"{job}."
    numbers = [
        int(name[len(prefix) : -5])
        for name in (store.names(FOLDER) if names is None else names)
        if name.startswith(prefix) and name.endswith(".json") and name[len(prefix) : -5].isdigit()
    ]
    if not numbers:
        return 0, None
    content = store.read(_name(job, max(numbers)))
    try:
        data = parse_json(content or b"null")
    except ValueError:
        data = None
    data = data if isinstance(data, dict) else {}
    check_schema(data, f"{store}/{_name(job, max(numbers))}", SCHEMA, absent=1)
    return max(numbers), {key: value for key, value in data.items() if key != "schema"}


def _name(job: str, number: int) -> str:
    return f"{FOLDER}/{job}.{number:05d}.json"


def gone(content: Content) -> bool:
    """Return True if the holder released the lease, or was a process of this machine that has ended."""
    if content.get("released"):
        return True
    if content.get("host") != host() or not isinstance(content.get("pid"), int):
        return False
    return began(content["pid"]) != content.get("began")


def awake() -> float:
    """Return seconds of a clock that also runs while the machine is suspended, if the system has one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Watch:
    """Distinguish dead leases from live ones, using only the clock of this process.

    clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}
        self.asked: set[str] = set()  # tokens of attempts to take a lease whose outcome is not known

    def dead(self, job: str, number: int, content: Content) -> bool:
        """Return True if the lease is known to have no holder: `gone`, or no heartbeat for longer than its ttl."""
        if gone(content):
            return True
        beat, now = content.get("beat"), self.clock()
        before, since = self._seen.setdefault((job, number), (beat, now))
        if before != beat:
            self._seen[job, number] = (beat, now)
            return False
        return bool(now - since > content.get("ttl", TTL))


class Lease:
    """Hold a job until it is released, its heartbeat stops, or another worker takes it.

    ``number`` increases from holder to holder. `check` compares it with the newest number before every write of the job
    (`files.guarded`), so that a holder that was stopped, suspended or disconnected for longer than ``ttl`` writes
    nothing when it resumes. Each heartbeat writes ``progress``, a dict of plain numbers. ``deaths`` is the number of
    consecutive previous holders that died without saving a newer checkpoint. ``lost`` is the reason why the job is no
    longer held, or empty. A thread sends the heartbeats, `BEATS` per ``ttl``.

    store: where the lease is kept.
    job: name of the job.
    number: number of the lease that this process has created.
    content: content of the lease.
    ttl: seconds without a heartbeat after which other workers take the lease for dead.
    clock: returns the time in seconds; it must run while the machine is suspended.
    """

    def __init__(
        self, store: Store, job: str, number: int, content: Content, ttl: float, clock: Callable[[], float] = awake
    ) -> None:
        self.store, self.job, self.number, self.ttl = store, job, number, ttl
        self.progress: Content = {}
        self.deaths: int = content["deaths"]
        self.lost = ""
        self._clock, self._content, self._end = clock, content, threading.Event()
        self._last_beat = clock()  # start of the last successful heartbeat; nobody can take the job until ttl after it
        self._thread = threading.Thread(target=self._beat, name=f"lease of {job}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Return True if this process still holds the job; reads the newest lease from the store."""
        number, content = current(self.store, self.job)
        return not self.lost and number == self.number and (content or {}).get("token") == self._content.get("token")

    def check(self, quick: bool = False) -> None:
        """Raise Lost unless the job is held.

        If the store does not answer, the job counts as held until ``ttl`` seconds after the last heartbeat. quick: do
        not ask the store within ``ttl`` seconds of the last heartbeat.
        """
        if not quick or self._clock() - self._last_beat > self.ttl:
            self._refresh()
        if self.lost:
            raise Lost(f"{self.job}: {self.lost}; this worker stops training it, and has saved nothing since then")

    def _refresh(self) -> bool:
        """Update ``lost`` from the store; return False if the store does not answer."""
        try:
            if not self.lost and not self.held:
                self.lost = "another worker holds its lease by now"
        except (OSError, InputError) as error:
            if self._clock() - self._last_beat > self.ttl:
                self.lost = f"{self.store} has not been reached for {self.ttl:.0f} s ({error})"
            return False
        return True

    def _write(self, **more: Any) -> None:
        self._content |= {"beat": self._content["beat"] + 1, "written": time.time(), **self.progress, **more}
        self.store.write(_name(self.job, self.number), dump_json(self._content))

    def _beat(self) -> None:
        while not self.lost and not self._end.wait(self.ttl / BEATS):
            begun = self._clock()
            if self._refresh() and not self.lost:
                with contextlib.suppress(OSError, InputError):  # the next heartbeat may succeed
                    self._write()
                    self._last_beat = begun

    def release(self) -> None:
        """Stop the heartbeat, and mark the lease as released."""
        self._end.set()
        self._thread.join(self.ttl)  # with a time limit, since a store may hang
        try:
            if self.held:
                self._write(released=True)
        except OSError:
            pass  # the lease expires after ttl seconds


def take(
    store: Store,
    job: str,
    watch: Watch,
    ttl: float = TTL,
    saved: int = 0,
) -> Lease | None:
    """Take the lease of a job; return None if another worker holds it or takes it first.

    store: where leases are kept.
    job: name of the job.
    watch: decides whether the current lease is dead.
    ttl: seconds without a heartbeat after which the new lease counts as dead.
    saved: step of the job's newest checkpoint. A previous holder that died with a newer step than the holder before it
        resets the count of consecutive deaths.
    """
    number, before = current(store, job)
    # an earlier attempt of this process created this lease, but was disconnected before the answer arrived
    if before is not None and before.get("token") in watch.asked:
        watch.asked.discard(before["token"])
        return Lease(store, job, number, before, ttl)
    if before is not None and not watch.dead(job, number, before):
        return None
    deaths, token = 0, secrets.token_hex(8)
    if before and not before.get("released"):
        deaths = 1 + (before.get("deaths", 0) if saved <= before.get("saved", 0) else 0)
    content = {**me(), "token": token, "beat": 0, "ttl": ttl, "written": time.time(), "saved": saved, "deaths": deaths}
    watch.asked.add(token)
    created = store.create(_name(job, number + 1), dump_json(content))
    newest, found = current(store, job)
    watch.asked.discard(token)
    # The token decides, not ``created``: a client that repeats its request is told that the file exists already.
    if newest != number + 1 or (found or {}).get("token") != token:
        if created:  # with an outdated listing: a lease with a larger number exists
            store.remove(_name(job, number + 1))
        return None
    if number:
        store.remove(_name(job, number))
    return Lease(store, job, number + 1, content, ttl)
