"""Engines: run the jobs of a fleet on a cluster, each with the command that a user could run by hand.

An engine is a function ``launch(jobs, command, logs, **options) -> failures``. It returns when every job has ended,
with one line for each job that is not done. An engine does not depend on training code. The command holds the lease of
the job, resumes from its newest good checkpoint, and reports the result as its exit status:

    0                 done, now or earlier
    1, 2              halted or refused: the last line of the log has the reason; a retry would not help
    130, 138, 143     stopped by SIGINT (Ctrl-C), SIGUSR1 or SIGTERM: a checkpoint is saved; run it again
    anything else     died (70: unexpected error, 75: disk or network): run it again from its checkpoint, at most
                      ``retries`` times

As in a shell, the status for a signal is 128 + its number. The folders and logs are on a disk that all machines share.
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

# If SLURM_NTASKS is set, Lightning assumes that srun started the process (SLURMEnvironment.detect, 2.6.6). It would
# then requeue the job by itself, share hpc_ckpt files among experts, and take SLURM_PROCID for its rank.
SRUN = ("SLURM_NTASKS", "SLURM_PROCID")
# if srun is installed, Lightning warns processes that were not started by it
NO_SRUN_WARNING = "ignore:The `srun` command is available on your system but is not used"
IMPORTABLE = (
    "lightning_tdisent and the modules of --import must be importable on every node, by the Python that runs its jobs: "
    "install them there"
)
LOST = 256  # stands for the exit status if the process that ran the command was lost before it could report one
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Job(Protocol):
    """Properties of a job that engines use."""

    @property
    def name(self) -> str:
        """Name of the job and of its log."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the jobs that must be done first; a job that is not in the launch counts as done."""


def fate(status: int) -> Fate:
    """Return the meaning of an exit status of the command; a negative status is a signal, as in `subprocess`.

    ``told`` means stopped by a signal, to be run again.
    """
    status = 128 - status if status < 0 else status
    if status in (1, 2):
        return "refused"
    return {0: "done", 130: "told", 138: "told", 143: "told"}.get(status, "died")  # type: ignore[return-value]


def words(status: int) -> str:
    """Return an exit status as text, with the name of the signal if it stands for one."""
    if status == LOST:
        return "no exit status"
    number = -status if status < 0 else status - 128
    name = signal.strsignal(number) if 0 < number < signal.NSIG else None
    return f"signal {number} ({name})" if name else f"status {status}"


def reason(status: int, log: Path, last: str, tries: int = 1) -> str:
    """Return a line on a job that is not done: the reason, and the path of its log.

    status: exit status. log: path of the log. last: last line of the log. tries: number of attempts.
    """
    if fate(status) == "refused":
        said = re.sub(r"^(error|- [\w.-]+): ", "", last)
        return f"{said or f'ended with {words(status)}'}{_remedy(last)} (see {log})"
    again = "; launch it again to resume it from its checkpoint"
    return f"died {tries} times, now with {words(status)}{cause(last)} (see {log}){again}"


def cause(last: str) -> str:
    """Return ``: LAST LINE`` with a remedy if one is known, to be appended to the description of an end."""
    return f": {last}{_remedy(last)}" if last else ""


def _remedy(last: str) -> str:
    return f". {IMPORTABLE}" if "No module named" in last else ""


def last_line(log: Path, since: int = 0) -> str:
    """Return the last line of a log that is neither empty nor a header of an attempt.

    since: number of bytes at the start of the log to ignore.
    """
    try:
        with log.open("rb") as stream:
            stream.seek(max(since, log.stat().st_size - 4096))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("== ")), "")


def environment(cpus: float) -> dict[str, str]:
    """Return this process's environment variables, adapted to a command that uses ``cpus`` cores and not srun."""
    out = {key: value for key, value in os.environ.items() if key not in SRUN}
    out["PYTHONUNBUFFERED"] = "1"  # so that the last line of the log is the last one printed
    out["OMP_NUM_THREADS"] = str(max(1, int(cpus)))
    out["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), NO_SRUN_WARNING]))
    return out


def resources(cpus: float, gpus: float, memory: str | None) -> int | None:
    """Return ``memory`` (such as 16G, in powers of 1024) in bytes, None for no limit.

    Raises InputError for invalid memory, less than one core, or a negative number of GPUs.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)i?B?", memory.strip(), re.IGNORECASE) if memory is not None else None
    least = (("cpus", cpus, 1), ("gpus", gpus, 0))
    wrong = [f"{name} {value}: at least {low}" for name, value, low in least if value < low]
    if memory is not None and (found is None or float(found[1]) == 0):
        wrong.append(f"memory {memory!r}: expected a number with K, M, G or T, such as 16G")
    if wrong:
        raise InputError("resources of a job: " + "; ".join(wrong))
    return int(float(found[1]) * UNITS[found[2].upper()]) if found else None


def named(jobs: Sequence[Job]) -> str:
    """Return the names of jobs for a message, abbreviated if there are more than four."""
    names = [job.name for job in jobs]
    if len(names) > 4:
        names = [*names[:2], "..", f"{names[-1]} ({len(names)} jobs)"]
    return ", ".join(names)


def not_started(job: Job, failed: dict[str, str]) -> str:
    """Return the reason why a job was not run: the jobs that it needs and that failed."""
    return f"not started, it needs {', '.join(n for n in job.needs if n in failed) or ', '.join(job.needs)}"
