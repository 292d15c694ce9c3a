"""Leases: who trains which job, so that two workers never train the same one, and a dead worker's is taken up.

A lease is a file ``leases/JOB.N.json``; the one with the largest N holds. Whoever wants the job creates the next N,
which only one can; its holder rewrites it every few seconds, with its progress. A lease is dead when its process is
gone (on the same machine), or when the file has not changed for ``ttl`` seconds of the watcher's own clock: the clocks
of machines need not agree, and a watcher of a dead worker waits that long once.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lightning_tdisent.artifacts import check_schema, parse_json
from lightning_tdisent.errors import InputError, Lost
from lightning_tdisent.fleet.store import SCHEMA, Store, dump_json
from lightning_tdisent.processes import began, host, me

FOLDER = "leases"
TTL = 60.0
BEATS = 6  # in the life of a lease

Content = dict[str, Any]


def current(store: Store, job: str, names: Sequence[str] | None = None) -> tuple[int, Content | None]:
    """Number and content of the lease that holds; (0, None) if there never was one. names: of all leases, if listed."""
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
    """Whether the holder is known to be gone: it gave the lease back, or was a process of this machine that ended."""
    if content.get("released"):
        return True
    if content.get("host") != host() or not isinstance(content.get("pid"), int):
        return False
    return began(content["pid"]) != content.get("began")


def awake() -> float:
    """Return seconds of a clock that goes on while the machine is suspended, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Watch:
    """Tells dead leases from live ones, by its own clock alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}
        self.asked: set[str] = set()  # tokens of takings of which it is not known whether they succeeded

    def dead(self, job: str, number: int, content: Content) -> bool:
        """Whether nobody holds it any more, as far as can be known by now."""
        if gone(content):
            return True
        beat, now = content.get("beat"), self.clock()
        before, since = self._seen.setdefault((job, number), (beat, now))
        if before != beat:
            self._seen[job, number] = (beat, now)
            return False
        return now - since > content.get("ttl", TTL)


class Lease:
    """A job that this process holds, until it lets go, stops beating, or another worker takes it.

    ``number`` only grows from holder to holder. `check` compares it with the newest one: every write of the job asks it
    (`files.guarded`), so that a holder that was stopped, suspended or cut off for longer than ``ttl`` comes back, and
    writes nothing. ``progress`` (a dict of plain numbers) travels with every beat; ``deaths`` counts the holders before
    this one that died in a row without getting further.
    """

    def __init__(
        self, store: Store, job: str, number: int, content: Content, ttl: float, clock: Callable[[], float] = awake
    ) -> None:
        self.store, self.job, self.number, self.ttl = store, job, number, ttl
        self.progress: Content = {}
        self.deaths: int = content["deaths"]
        self.lost = ""  # why it is no longer held
        self._clock, self._content, self._end = clock, content, threading.Event()
        self._good = clock()  # start of the last beat that arrived: nobody can take the job for a ttl from then
        self._thread = threading.Thread(target=self._beat, name=f"lease of {job}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Whether no other worker has taken the job meanwhile."""
        number, content = current(self.store, self.job)
        return not self.lost and number == self.number and (content or {}).get("token") == self._content.get("token")

    def check(self, quick: bool = False) -> None:
        """Raise Lost unless the job is held; quick: unless it is known not to be.

        A store that does not answer is believed for as long as the lease lives.
        """
        if not quick or self._clock() - self._good > self.ttl:
            self._ask()
        if self.lost:
            raise Lost(f"{self.job}: {self.lost}; this worker lets go of it, and has saved nothing since")

    def _ask(self) -> bool:
        """Ask the store who holds the job; False if it does not answer."""
        try:
            if not self.lost and not self.held:
                self.lost = "another worker holds its lease by now"
        except (OSError, InputError) as error:
            if self._clock() - self._good > self.ttl:
                self.lost = f"{self.store} has not been reached for {self.ttl:.0f} s ({error})"
            return False
        return True

    def _write(self, **more: Any) -> None:
        self._content |= {"beat": self._content["beat"] + 1, "written": time.time(), **self.progress, **more}
        self.store.write(_name(self.job, self.number), dump_json(self._content))

    def _beat(self) -> None:
        while not self.lost and not self._end.wait(self.ttl / BEATS):
            begun = self._clock()
            if self._ask() and not self.lost:
                with contextlib.suppress(OSError, InputError):  # the next one may arrive
                    self._write()
                    self._good = begun

    def release(self) -> None:
        """Stop beating, and give the job back."""
        self._end.set()
        self._thread.join(self.ttl)  # a store may hang
        try:
            if self.held:
                self._write(released=True)
        except OSError:
            pass  # it dies of age


def take(
    store: Store,
    job: str,
    watch: Watch,
    ttl: float = TTL,
    saved: int = 0,
) -> Lease | None:
    """Take the lease of a job if nobody holds it; None if somebody does, or has been faster.

    saved: step of the job's newest checkpoint, by which its holders' deaths are judged.
    """
    number, before = current(store, job)
    if before is not None and before.get("token") in watch.asked:  # it was cut off before it heard that it got this
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
    if newest != number + 1 or (found or {}).get("token") != token:  # by another one; a put that was repeated is mine
        if created:  # a listing of old had let us create a number that was gone already
            store.remove(_name(job, number + 1))
        return None
    if number:
        store.remove(_name(job, number))
    return Lease(store, job, number + 1, content, ttl)
