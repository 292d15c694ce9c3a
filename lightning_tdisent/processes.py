"""Count the cores that this process may use, and identify it so that others can tell later whether it still runs."""

import os
import socket
from pathlib import Path
from typing import Any

IMPORTED = "TDISENT_IMPORT"  # environment variable: the modules of --import, for worker processes


def imported() -> list[str]:
    """Return the modules that this command, or the parent process, imported with --import."""
    return [name for name in os.environ.get(IMPORTED, "").split(",") if name]


def cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def threads() -> int:
    """Return the number of threads that this process should use: $OMP_NUM_THREADS if it is set, else all its cores."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(given)) if given.isdigit() else cores()


def me() -> dict[str, Any]:
    """Return host, process id and start time (clock ticks since boot) of this process, by which others can find it."""
    return {"host": host(), "pid": os.getpid(), "began": began(os.getpid())}


def host() -> str:
    """Return ``NAME/ID``: the host name, and an ID of the current boot and the process namespace (empty if unknown).

    Containers on one machine may share its name but see different processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()[:8]
        boot += os.readlink("/proc/self/ns/pid").strip("pid:")
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def began(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot, or None if no such process runs.

    Returns 0 where the system does not report start times.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if after_name[0] in (b"Z", b"X") else int(after_name[19])
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
