"""Leases: who trains which job, so that two workers never train the same one, and a dead worker's is taken up.

A lease is a file ``leases/JOB.N.json``; the one with the largest N holds. Whoever wants the job creates the next N,
which only one can; its holder rewrites it every few seconds, with its progress. A lease is dead when its process is
gone (on the same machine), or when the file has not changed for ``ttl`` seconds of the watcher's own clock: the clocks
of machines need not agree, and a watcher of a dead worker waits that long once.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.store import Store

FOLDER = "leases"
TTL = 60.0
BEATS = 6  # in the life of a lease

Content = dict[str, Any]


def me() -> Content:
    """This process, as others can look for it: host, number, and when it began in the host's ticks."""
    return {"host": _host(), "pid": os.getpid(), "began": _began(os.getpid())}


def _host() -> str:
    try:  # containers of one machine may share its name, but see other processes
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        boot += os.readlink("/proc/self/ns/pid").strip("pid:")
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def _began(pid: int) -> int | None:
    """Start of a process in ticks since boot, 0 where the system does not say, None if there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after_name[0] in "ZX" else int(after_name[19])
    except OSError:
        pass
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


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
        data = json.loads(content or b"null")
    except ValueError:
        data = None
    return max(numbers), data if isinstance(data, dict) else {}


def _name(job: str, number: int) -> str:
    return f"{FOLDER}/{job}.{number:05d}.json"


def gone(content: Content) -> bool:
    """Whether the holder is known to be gone: it gave the lease back, or was a process of this machine that ended."""
    if content.get("released"):
        return True
    if content.get("host") != _host() or not isinstance(content.get("pid"), int):
        return False
    return _began(content["pid"]) != content.get("began")


class Watch:
    """Tells dead leases from live ones, by its own clock alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._seen: dict[tuple[str, int], tuple[Any, float]] = {}

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
    """A job that this process holds, until it lets go or stops beating.

    ``progress`` (a dict of plain numbers) travels with every beat; ``deaths`` counts the holders before this one that
    died in a row without getting further. ``lost`` is called once, from the beating thread,
    when another worker has taken the job, or the store could not be reached for as long as the lease lives.
    """

    def __init__(
        self, store: Store, job: str, number: int, content: Content, lost: Callable[[str], None], ttl: float
    ) -> None:
        self.store, self.job, self.number, self.ttl = store, job, number, ttl
        self.progress: Content = {}
        self.deaths: int = content["deaths"]
        self._content, self._lost, self._end = content, lost, threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {job}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Whether no other worker has taken the job meanwhile."""
        return current(self.store, self.job)[0] == self.number

    def _write(self, **more: Any) -> None:
        self._content |= {"beat": self._content["beat"] + 1, "written": time.time(), **self.progress, **more}
        self.store.write(_name(self.job, self.number), json.dumps(self._content).encode())

    def _beat(self) -> None:
        good = time.monotonic()
        while not self._end.wait(self.ttl / BEATS):
            try:
                if not self.held:
                    return self._lost(f"{self.job}: another worker holds its lease by now")
                self._write()
                good = time.monotonic()
            except (OSError, InputError) as error:
                if time.monotonic() - good > self.ttl:
                    return self._lost(f"{self.job}: {self.store} cannot be reached for {self.ttl:.0f} s: {error}")
        return None

    def release(self) -> None:
        """Stop beating, and give the job back."""
        self._end.set()
        self._thread.join()
        try:
            if self.held:
                self._write(released=True)
        except OSError:
            pass  # it dies of age


def take(
    store: Store,
    job: str,
    watch: Watch,
    lost: Callable[[str], None] = lambda why: None,
    ttl: float = TTL,
    saved: int = 0,
) -> Lease | None:
    """Take the lease of a job if nobody holds it; None if somebody does, or has been faster.

    saved: step of the job's newest checkpoint, by which its holders' deaths are judged.
    """
    number, before = current(store, job)
    if before is not None and not watch.dead(job, number, before):
        return None
    deaths = 0
    if before and not before.get("released"):
        deaths = 1 + (before.get("deaths", 0) if saved <= before.get("saved", 0) else 0)
    content = {**me(), "beat": 0, "ttl": ttl, "written": time.time(), "saved": saved, "deaths": deaths}
    if not store.create(_name(job, number + 1), json.dumps(content).encode()):
        return None
    newest, _ = current(store, job)
    if newest != number + 1:  # a listing of old had let us create a number that was gone already
        store.remove(_name(job, number + 1))
        return None
    if number:
        store.remove(_name(job, number))
    return Lease(store, job, number + 1, content, lost, ttl)
