"""Jobs as tasks of a Ray cluster, on whichever of its nodes has the cores, GPUs and memory that one asks for.

A task starts the job's command and waits for it. The command's life is that of its task (see `tied`): when the worker
or the launcher dies, or the launch is interrupted, it saves and ends. What died is started again where there is room.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.files import open_own
from lightning_tdisent.fleet import engines
from lightning_tdisent.fleet.engines import Command, Job, tied

Result = tuple[int, str, str]  # status, last line of the log, host
TOLERANCE = 10.0  # seconds for Ray's own part of ending a task
COLOUR = re.compile(r"\x1b\[[\d;]*m")
PROBE = """
import sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
"""


def launch(
    jobs: Sequence[Job],
    command: Command,
    logs: Path,
    *,
    retries: int = 3,
    cpus: float = 1,
    gpus: float = 0,
    memory: str | None = None,
    resources: Mapping[str, float] | None = None,
    address: str | None = None,
    grace: float = 60.0,
    patience: float = 60.0,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run jobs on the cluster at ``address`` until each is done or has failed; returns the failures with their reasons.

    address: HOST:PORT of `ray start --head`, "auto" for the one on this machine, or None for $RAY_ADDRESS, and without
    that a Ray of this launch alone with this machine's cores and GPUs. resources: custom ones of `ray start
    --resources`, which place jobs on the nodes that have them; a fraction of a GPU is shared with other jobs. retries:
    how often a job is started again whose command, worker or node died. grace: seconds for a command that is told to go
    to save. patience: seconds for a cluster to answer. Interrupted, it tells all commands to go and waits for that.
    Raises InputError if Ray is not installed or not reached, and for what the cluster can never give.
    """
    size = engines.resources(cpus, gpus, memory)
    ray = _ray(jobs)
    logs = logs.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    ask: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(resources or {})}
    ask |= {"memory": size} if size else {}
    names, waiting, running = {job.name for job in jobs}, list(jobs), dict[Future[Result], tuple[Job, Any]]()
    done, failed, tries = set[str](), dict[str, str](), dict.fromkeys(names, 0)
    with _cluster(ray, address, jobs, patience) as grows:
        _room(ray, ask, jobs, grows, say)
        task = ray.remote(max_retries=0, **ask)(_work)  # deaths are counted below, whoever died
        try:
            while waiting or running:
                for job in [job for job in waiting if done.issuperset(names.intersection(job.needs))]:
                    waiting.remove(job)
                    tries[job.name] += 1
                    ref = task.remote(job.name, command(job), str(Path.cwd()), str(logs), cpus, gpus, grace)
                    running[ref.future()] = job, ref
                if not running:
                    break
                # not by ray.wait, in which a SystemExit of a signal's handler becomes another one, of status 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, _ = running.pop(future)
                    status, last, host = _result(ray, future)
                    fate, said = engines.fate(status), engines.words(status)
                    if fate == "done":
                        done.add(job.name)
                    elif fate == "told":
                        say(f"{job.name}: was told to go on {host}, is started again")
                        tries[job.name] -= 1
                        waiting.append(job)
                    elif fate == "died" and tries[job.name] <= retries:
                        said += engines.cause(last)
                        say(f"{job.name}: died on {host} with {said}; is started again, {tries[job.name]} of {retries}")
                        waiting.append(job)
                    else:
                        failed[job.name] = engines.reason(status, logs / f"{job.name}.log", last, tries[job.name])
        finally:
            for _, ref in running.values():
                ray.cancel(ref)
            wait(running, grace + TOLERANCE)
    for job in waiting:
        failed[job.name] = engines.not_started(job, failed)
    return failed


def _work(
    name: str, words: list[str], folder: str, logs: str, cpus: float, gpus: float, grace: float
) -> tuple[int, str, str]:
    """Run a command on this node; returns its status, the last line of its log, and the host."""
    import ray

    log, host = Path(logs) / f"{name}.log", socket.gethostname()
    missing = [place for place in (folder, logs) if not Path(place).is_dir()]
    if missing:
        return 2, f"{host} has no folder {missing[0]}: all nodes must share it under one name", host
    try:
        stream = open_own(log)
    except InputError as error:
        return error.code, str(error), host
    with stream:
        start, node = stream.tell(), f"Ray's node {ray.get_runtime_context().get_node_id()}"
        stream.write(f"== {datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {name} on {host}, {node}\n".encode())
        stream.flush()
        tie = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", tied.__file__, str(grace), *words],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            cwd=folder,
            env=engines.environment(cpus)
            | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),  # else they are Ray's choice
            start_new_session=True,  # Ctrl-C in a terminal is the launcher's
        )
        assert tie.stdin
        try:
            while tie.poll() is None:  # Ray cancels between two lines of Python, never within a call
                time.sleep(0.2)
        finally:  # cancelled: let go, and keep the resources until the command has ended
            tie.stdin.close()
            status = tie.wait()
    return status, engines.last_line(log, start), host


def _result(ray: Any, future: Future[Result]) -> Result:
    """Return the result of a task; if it failed, or its worker or node was lost, a death with the cause in Ray's words.

    The error of a task that failed, also before it began, is a traceback, whose last line is the cause; the others
    begin with it.
    """
    try:
        return future.result()
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in COLOUR.sub("", str(error)).splitlines() if line.strip()]
        if lines and isinstance(error, ray.exceptions.RayTaskError):
            said = lines[-1]
        else:
            first = ". ".join(lines[0].split(". ")[:2]) if lines else "no more is known"  # then come its remedies
            said = f"{type(error).__name__}: {first}"
        return engines.LOST, said, "a worker of Ray"


def _ray(jobs: Sequence[Job]) -> Any:
    """The module, which is a large download that only this engine needs.

    It is told to print nothing of its own: of a lost node it would print the end of that node's log (20 lines), which
    `log_to_driver` does not change (2.60). What was lost is said by `launch`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _variable("RAY_DEDUP_LOGS_SKIP_REGEX", "."):  # read on import: no line that matches is printed
            import ray
    except ImportError:
        raise Unavailable(
            f'engine ray: Ray is not installed; pip install "lightning_tdisent[ray]", or take another engine for '
            f"{engines.named(jobs)}"
        ) from None
    return ray


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable that has no value yet."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None, jobs: Sequence[Job], patience: float) -> Iterator[bool]:
    """Connect, unless the caller is connected already, and leave; gives whether nodes may join later."""
    if ray.is_initialized():
        if address:
            raise InputError(f"engine ray: address {address}: this process is connected to a cluster; leave it out")
        yield True
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        _reach(address, jobs, patience)
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    for number, handler in before.items():  # Ray's would leave with status 15, and without the caller
        signal.signal(number, handler)
    try:
        yield address != "local"
    finally:
        ray.shutdown()


def _reach(address: str, jobs: Sequence[Job], patience: float) -> None:
    """Refuse an address where no cluster answers.

    `ray.init` tries for two minutes and then ends the process (2.60), so that a process of its own tries first.
    """
    why = None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), min(10.0, patience)).close()
        except OSError as error:
            why = error.strerror or str(error)
    if why is None:
        try:
            probe = subprocess.run(  # noqa: S603
                [sys.executable, "-c", PROBE, address],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=patience,
                check=False,
            )
            lines = [line for line in probe.stderr.splitlines() if line.strip()]
            why = (lines[-1] if lines else f"status {probe.returncode}") if probe.returncode else None
        except subprocess.TimeoutExpired:
            why = f"no answer in {patience:g} s"
    if why is not None:
        raise InputError(
            f"engine ray: no cluster at {address} ({why}), so that {engines.named(jobs)} cannot be started. On its "
            "head node `ray status` must answer, and its port (6379) be open from here; or start one with `ray start "
            "--head`, or leave the address out to use this machine"
        )


def _room(ray: Any, ask: Mapping[str, Any], jobs: Sequence[Job], grows: bool, say: Callable[[str], None]) -> None:
    """Refuse what no node has; where nodes may join, say that one is waited for."""
    need = {"CPU": ask["num_cpus"], "GPU": ask["num_gpus"], "memory": ask.get("memory", 0), **ask["resources"]}
    need = {key: value for key, value in need.items() if value}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(key, 0) >= value for key, value in need.items()) for node in nodes):
        return
    wants = ", ".join(f"{key} {value:g}" for key, value in need.items())
    most = ", ".join(f"{key} {max(node.get(key, 0) for node in nodes):g}" for key in need)
    text = f"engine ray: {engines.named(jobs)} want {wants} on one node; the most that a node has is {most}"
    if not grows:
        raise InputError(f"{text}. Ask for less, or give the address of a cluster")
    say(f"{text}. Waiting for a node that has it; Ctrl-C to stop")
