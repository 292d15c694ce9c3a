"""Engines: what runs the jobs of a fleet on many machines, each by the command that a person can run by hand.

An engine is a function ``launch(jobs, command, logs, **options) -> failures``: it returns when every job has ended,
with one line for each that is not done. It knows nothing of training. The command keeps the job's lease, goes on from
its newest good checkpoint, and says by its exit status how it ended:

    0                 done, now or before
    1, 2              halted or refused: the last line of its log says why; trying again would not help
    130, 138, 143     told to go (Ctrl-C, SIGUSR1, SIGTERM): saved, to be run again
    anything else     died (70: of an error that nobody foresaw, 75: of a disk or a network): run again, from its
                      checkpoint, as often as ``retries`` says

A signal is counted as a shell does, 128 + its number. The folders and the logs are on a disk that all machines share.
"""

import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from lightning_tdisent.errors import InputError

Command = Callable[["Job"], list[str]]
Fate = Literal["done", "refused", "told", "died"]

# Lightning takes a process that has SLURM_NTASKS for one of srun's (SLURMEnvironment.detect, 2.6.6): it would leave the
# requeueing of the job to itself and share hpc_ckpt files among experts. SLURM_PROCID would be its rank.
SRUN = ("SLURM_NTASKS", "SLURM_PROCID")
# and where srun is installed it warns whoever does not use it
NO_SRUN_WARNING = "ignore:The `srun` command is available on your system but is not used"
IMPORTABLE = (
    "lightning_tdisent, and what --import names, must be importable on every node, by the Python that runs its jobs: "
    "install it there"
)
LOST = 256  # in place of an exit status, where whoever ran the command was lost before it could tell one
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Job(Protocol):
    """What an engine knows of a job: its name, which is also that of its log, and the names of those it needs."""

    @property
    def name(self) -> str:
        """Name of the job and of its log."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Jobs that must be done before; one that is not among those launched counts as done."""


def fate(status: int) -> Fate:
    """What an exit status of the command means; negative ones are signals, as `subprocess` has them."""
    status = 128 - status if status < 0 else status
    if status in (1, 2):
        return "refused"
    return {0: "done", 130: "told", 138: "told", 143: "told"}.get(status, "died")  # type: ignore[return-value]


def words(status: int) -> str:
    """An exit status as one says it."""
    if status == LOST:
        return "no exit status"
    number = -status if status < 0 else status - 128
    name = signal.strsignal(number) if 0 < number < signal.NSIG else None
    return f"signal {number} ({name})" if name else f"status {status}"


def reason(status: int, log: Path, last: str, tries: int = 1) -> str:
    """One line on a job that is not done: the last one of its log, and where to read more."""
    if fate(status) == "refused":
        said = re.sub(r"^(error|- [\w.-]+): ", "", last)
        return f"{said or f'ended with {words(status)}'}{_remedy(last)} (see {log})"
    again = "; launched again, it goes on from there"
    return f"died {tries} times, now with {words(status)}{cause(last)} (see {log}){again}"


def cause(last: str) -> str:
    """Return what follows the words for an end: the last line that was said, and the remedy where one is known."""
    return f": {last}{_remedy(last)}" if last else ""


def _remedy(last: str) -> str:
    return f". {IMPORTABLE}" if "No module named" in last else ""


def last_line(log: Path, since: int = 0) -> str:
    """Last line of a log that says something, of what was written after its first ``since`` bytes."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(since, log.stat().st_size - 4096))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("== ")), "")


def environment(cpus: float) -> dict[str, str]:
    """This process's variables for a command that has ``cpus`` cores and was not started by srun."""
    out = {key: value for key, value in os.environ.items() if key not in SRUN}
    out["PYTHONUNBUFFERED"] = "1"  # so that the last line of the log is the last that was said
    out["OMP_NUM_THREADS"] = str(max(1, int(cpus)))
    out["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), NO_SRUN_WARNING]))
    return out


def resources(cpus: float, gpus: float, memory: str | None) -> int | None:
    """Bytes of ``memory`` (such as 16G, in powers of 1024), None for no limit; refuses what cannot be meant."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)i?B?", memory.strip(), re.IGNORECASE) if memory is not None else None
    least = (("cpus", cpus, 1), ("gpus", gpus, 0))
    wrong = [f"{name} {value}: at least {low}" for name, value, low in least if value < low]
    if memory is not None and (found is None or float(found[1]) == 0):
        wrong.append(f"memory {memory!r}: a number with K, M, G or T, such as 16G")
    if wrong:
        raise InputError("resources of a job: " + "; ".join(wrong))
    return int(float(found[1]) * UNITS[found[2].upper()]) if found else None


def named(jobs: Sequence[Job]) -> str:
    """Names of jobs for a message."""
    names = [job.name for job in jobs]
    if len(names) > 4:
        names = [*names[:2], "..", f"{names[-1]} ({len(names)} jobs)"]
    return ", ".join(names)


def not_started(job: Job, failed: dict[str, str]) -> str:
    """Why a job whose needs were not met was not run."""
    return f"not started, it needs {', '.join(n for n in job.needs if n in failed) or ', '.join(job.needs)}"
