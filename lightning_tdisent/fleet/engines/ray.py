"""Run jobs as tasks of a Ray cluster, on any node that has the requested cores, GPUs and memory.

A task starts the command of its job and waits for it. The command ends with its task (see `tied`): if the worker or the
launcher dies, or the launch is interrupted, the command saves and exits. A job that died is started again on any node
with free resources.
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

Result = tuple[int, str, str]  # (status, last line of the log, host)
TOLERANCE = 10.0  # seconds that Ray itself may take to end a task
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
    """Run jobs on a Ray cluster until each is done or has failed; return the reasons of the failures by names of jobs.

    If the launch is interrupted, it stops all commands and waits until they have saved.

    jobs: the jobs.
    command: returns the command of a job.
    logs: folder of the logs, shared by all nodes.
    retries: how often a job is started again after its command, worker or node has died.
    cpus: cores per job.
    gpus: GPUs per job; a fraction shares a GPU with other jobs.
    memory: memory per job, such as 16G.
    resources: custom resources of `ray start --resources`; a job runs only on nodes that have them.
    address: HOST:PORT of `ray start --head`, or "auto" for the cluster on this machine. None: $RAY_ADDRESS, or if it is
        not set, a temporary Ray instance with the cores and GPUs of this machine.
    grace: seconds that a stopped command may take to save.
    patience: seconds that the cluster may take to answer.
    say: prints a message.

    Raises InputError if Ray is not installed, if the cluster is not reachable, and if it can never provide the
    requested resources.
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
        _check_resources(ray, ask, jobs, grows, say)
        task = ray.remote(max_retries=0, **ask)(_work)  # retries are counted below, whichever process died
        try:
            while waiting or running:
                for job in [job for job in waiting if done.issuperset(names.intersection(job.needs))]:
                    waiting.remove(job)
                    tries[job.name] += 1
                    ref = task.remote(job.name, command(job), str(Path.cwd()), str(logs), cpus, gpus, grace)
                    running[ref.future()] = job, ref
                if not running:
                    break
                # not ray.wait, which would replace the SystemExit of a signal handler by one with status 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, _ = running.pop(future)
                    status, last, host = _result(ray, future)
                    fate, said = engines.fate(status), engines.words(status)
                    if fate == "done":
                        done.add(job.name)
                    elif fate == "told":
                        say(f"{job.name}: was stopped by a signal on {host}; is started again")
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
    """Run a command on this node; return its exit status, the last line of its log, and the host name."""
    import ray

    log, host = Path(logs) / f"{name}.log", socket.gethostname()
    missing = [place for place in (folder, logs) if not Path(place).is_dir()]
    if missing:
        return 2, f"{host} has no folder {missing[0]}: all nodes must share it under the same path", host
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
            | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),  # with GPUs, Ray sets the variable
            start_new_session=True,  # Ctrl-C in a terminal must reach only the launcher
        )
        assert tie.stdin
        try:
            while tie.poll() is None:  # poll, because Ray can cancel between two lines of Python, not during a call
                time.sleep(0.2)
        finally:  # if cancelled: stop the command, and keep the resources until it has ended
            tie.stdin.close()
            status = tie.wait()
    return status, engines.last_line(log, start), host


def _result(ray: Any, future: Future[Result]) -> Result:
    """Return the result of a task, or `engines.LOST` with Ray's message if the task failed or its worker was lost.

    If a task failed, even before it started, Ray's message is a traceback whose last line is the cause. Other messages
    of Ray start with the cause.
    """
    try:
        return future.result()
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in COLOUR.sub("", str(error)).splitlines() if line.strip()]
        if lines and isinstance(error, ray.exceptions.RayTaskError):
            said = lines[-1]
        else:
            # two sentences; Ray's advice follows them
            first = ". ".join(lines[0].split(". ")[:2]) if lines else "no details"
            said = f"{type(error).__name__}: {first}"
        return engines.LOST, said, "a worker of Ray"


def _ray(jobs: Sequence[Job]) -> Any:
    """Import and return Ray, an optional dependency; raise Unavailable if it is not installed.

    Ray's own output is suppressed: for a lost node it would print the last 20 lines of that node's log, even with
    ``log_to_driver=False`` (2.60). `launch` reports what was lost.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _default_variable("RAY_DEDUP_LOGS_SKIP_REGEX", "."):  # read on import; lines that match are not printed
            import ray
    except ImportError:
        raise Unavailable(
            f'engine ray: Ray is not installed; pip install "lightning_tdisent[ray]", or use another engine for '
            f"{engines.named(jobs)}"
        ) from None
    return ray


@contextlib.contextmanager
def _default_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the context, unless it is already set."""
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
    """Connect to a cluster, unless this process is connected already; disconnect at the end.

    Yields True if nodes may join the cluster later.
    """
    if ray.is_initialized():
        if address:
            raise InputError(f"engine ray: address {address}: this process is connected to a cluster already; omit it")
        yield True
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        _check_reachable(address, jobs, patience)
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    for number, handler in before.items():  # Ray's handlers would exit with status 15 and bypass the caller
        signal.signal(number, handler)
    try:
        yield address != "local"
    finally:
        ray.shutdown()


def _check_reachable(address: str, jobs: Sequence[Job], patience: float) -> None:
    """Raise InputError if no cluster answers at an address.

    `ray.init` tries for two minutes and then ends the process (2.60). Therefore a child process tries first.
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
            f"engine ray: no cluster answers at {address} ({why}), so that {engines.named(jobs)} cannot be started. "
            "Check that `ray status` works on its head node, and that its port (6379) is reachable from here; or start "
            "a cluster with `ray start --head`, or omit the address to use this machine"
        )


def _check_resources(
    ray: Any, ask: Mapping[str, Any], jobs: Sequence[Job], grows: bool, say: Callable[[str], None]
) -> None:
    """Raise InputError if no node has the requested resources; if nodes may join (``grows``), only print a message."""
    need = {"CPU": ask["num_cpus"], "GPU": ask["num_gpus"], "memory": ask.get("memory", 0), **ask["resources"]}
    need = {key: value for key, value in need.items() if value}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(key, 0) >= value for key, value in need.items()) for node in nodes):
        return
    wants = ", ".join(f"{key} {value:g}" for key, value in need.items())
    most = ", ".join(f"{key} {max(node.get(key, 0) for node in nodes):g}" for key in need)
    text = f"engine ray: {engines.named(jobs)}: each job needs {wants} on one node; the most that a node has is {most}"
    if not grows:
        raise InputError(f"{text}. Request less, or give the address of a cluster")
    say(f"{text}. Waiting for such a node to join the cluster; press Ctrl-C to stop")
