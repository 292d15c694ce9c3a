"""Run jobs as SLURM job arrays with plain sbatch; each array task is one job.

The batch script starts the command of the job and forwards the signals that SLURM sends. Near the time limit
(`--signal`), and if the job is preempted with a grace time, the command saves and exits, and the task is requeued. A
command that died is started again by the same script. The script writes the exit status to a file next to the logs, so
that SLURM accounting is not needed. A launch may be interrupted and repeated: tasks that are still in the queue are
watched, not submitted again.
"""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.files import write_whole
from lightning_tdisent.fleet import engines
from lightning_tdisent.fleet.engines import Command, Job
from lightning_tdisent.fleet.store import Store, dump_json, read_json

LARGEST = 1000  # maximum number of jobs in an array, from SLURM's default of MaxArraySize
OURS = "array dependency error job-name kill-on-invalid-dep no-requeue open-mode output parsable requeue signal wrap"
GONE = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"}
SCRIPT = r"""#!/bin/bash
# Each task of this array is one job of a fleet; its command below can be run by hand.
logs={logs}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
log=$logs/$name.log
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID  # one task's SLURM_JOB_ID equals the array's id
unset {srun}  # otherwise Lightning assumes that srun started the command
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS={threads} PYTHONWARNINGS="${{PYTHONWARNINGS:+$PYTHONWARNINGS,}}"{warning}
tell() {{ told=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null; }}
trap tell TERM USR1
tries=0
while :; do
    tries=$((tries + 1))
    echo "== $(date -u '+%F %T')Z $name on $SLURMD_NODENAME, SLURM job $task," \
        "restart ${{SLURM_RESTART_COUNT:-0}}, try $tries" >>"$log"
    [ -z "$told" ] || {{ status=143; break; }}
    "${{command[@]}}" </dev/null >>"$log" 2>&1 &
    child=$!
    [ -z "$told" ] || kill -TERM "$child"
    while :; do  # a signal interrupts wait, not the command
        wait "$child"
        kill -0 "$child" 2>/dev/null || break
    done
    wait "$child"
    status=$?
    child=
    case $status in 0 | 1 | 2 | 130 | 138 | 143) break ;; esac
    [ -z "$told" ] || {{ status=143; break; }}
    [ "$tries" -le {retries} ] || break
done
case $status in
130 | 138 | 143)
    # still running: near its time limit, or in the grace time of a preemption. Otherwise SLURM has decided already
    case $(squeue -h -j "$task" -o %T) in RUNNING | SIGNALING) scontrol requeue "$task" ;; esac ;;
*)
    echo "$SLURM_ARRAY_JOB_ID $status $tries" >"$logs/.$name.ended.$task"
    mv "$logs/.$name.ended.$task" "$logs/$name.ended" ;;
esac
exit $status
"""


@dataclass
class Submission:
    """Jobs in the queue.

    logs: folder of the logs.
    tasks: array and task number of each job.
    added: arrays that this submission added.
    """

    logs: Path
    tasks: dict[str, tuple[str, int]] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """A line on how to watch and cancel the jobs."""
        ids = ",".join(dict.fromkeys(array for array, _ in self.tasks.values()))
        new = f"submitted as {','.join(self.added)}" if self.added else "already in the queue"
        cancel = f"scancel {ids.replace(',', ' ')}"
        return f"jobs: {len(self.tasks)}, {new}. Watch: squeue -r -j {ids}; cancel: {cancel}; logs: {self.logs}"


def submit(
    jobs: Sequence[Job],
    command: Command,
    logs: Path,
    *,
    retries: int = 3,
    cpus: int = 1,
    gpus: int = 0,
    memory: str | None = None,
    at_once: int | None = None,
    grace: int = 60,
    sbatch: Mapping[str, str] | None = None,
) -> Submission:
    """Submit jobs to the queue, except those still in the queue from an earlier submission; do not wait for them.

    Jobs with the same needs form one array. It waits (`afterok`) for the jobs that they need, and is cancelled if one
    of these fails.

    jobs: the jobs.
    command: returns the command of a job.
    logs: folder of the logs, shared by all nodes.
    retries: how often a command that died is started again.
    cpus: cores per job, on one node.
    gpus: GPUs per job.
    memory: memory per job, such as 16G.
    at_once: maximum number of tasks of an array that run at the same time.
    grace: seconds before the time limit at which a job is signalled to save and is requeued (SLURM may signal up to a
        minute earlier).
    sbatch: further options of sbatch without leading dashes, such as partition, account, time, constraint.

    Raises InputError if SLURM is not installed or not reachable, or refuses a job; everything that this call has
    submitted is then cancelled.
    """
    size, options = engines.resources(cpus, gpus, memory), dict(sbatch or {})
    if gpus != int(gpus) or cpus != int(cpus):
        raise InputError(f"engine slurm: cpus {cpus:g}, gpus {gpus:g}: SLURM allocates whole numbers only")
    wrong = [key for key in options if key in OURS.split() or not re.fullmatch(r"[a-z][a-z-]*", key)]
    if wrong:
        raise InputError(
            f"engine slurm: sbatch options {', '.join(wrong)}: invalid, or set by the fleet itself ({OURS})"
        )
    logs = logs.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    record = logs / "slurm.json"
    out, states = Submission(logs), dict[tuple[str, int], tuple[str, str]]()
    known: dict[str, list[str]]
    known = read_json(Store(logs), record.name) or {}
    if known:
        states = _queue_states(list(known), jobs)
    known = {array: names for array, names in known.items() if any((array, k) in states for k in range(len(names)))}
    for array, names in known.items():
        for k, name in enumerate(names):
            if states.get((array, k), ("COMPLETED",))[0] not in GONE:
                out.tasks[name] = array, k
    waiting = [job for job in jobs if job.name not in out.tasks]
    all_names = {job.name for job in jobs}
    fixed = ["--parsable", "--requeue", "--open-mode=append", f"--signal=B:USR1@{grace}", "--kill-on-invalid-dep=yes"]
    fixed += ["--nodes=1", "--ntasks=1", f"--cpus-per-task={int(cpus)}", f"--job-name={logs.parent.name or 'fleet'}"]
    fixed += [f"--gres=gpu:{int(gpus)}"] if gpus else []
    fixed += [f"--mem={max(1, size // 2**20)}M"] if size else []
    fixed += [f"--output={str(logs).replace('%', '%%')}/slurm_%A_%a.log"]
    fixed += [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]
    try:
        while waiting:
            ready = [job for job in waiting if all(n in out.tasks or n not in all_names for n in job.needs)]
            if not ready:  # circular needs: these jobs are not started, and `watch` reports them
                break
            group = [job for job in ready if set(job.needs) == set(ready[0].needs)][:LARGEST]
            waiting = [job for job in waiting if job not in group]
            words = [*fixed, f"--array=0-{len(group) - 1}" + (f"%{at_once}" if at_once else "")]
            if needs := [out.tasks[n] for n in group[0].needs if n in out.tasks]:
                words.append("--dependency=" + ",".join(f"afterok:{array}_{k}" for array, k in needs))
            script = _script(group, command, logs, cpus, retries)
            array = _run_slurm(["sbatch", *words], group, script).strip().split(";")[0]
            out.added.append(array)
            out.tasks |= {job.name: (array, k) for k, job in enumerate(group)}
            known[array] = [job.name for job in group]
            write_whole(record, dump_json(known, indent=1))
    except BaseException:
        cancel(out)
        raise
    return out


def _script(jobs: Sequence[Job], command: Command, logs: Path, cpus: float, retries: int) -> str:
    cases = [f"{k}) name={shlex.quote(j.name)}; command=({shlex.join(command(j))}) ;;" for k, j in enumerate(jobs)]
    return SCRIPT.format(
        logs=shlex.quote(str(logs)),
        cases="\n".join(cases),
        srun=" ".join(engines.SRUN),
        threads=int(cpus),
        warning=shlex.quote(engines.NO_SRUN_WARNING),
        retries=retries,
    )


def cancel(submission: Submission) -> None:
    """Cancel the arrays that this submission has added; running commands save first."""
    if submission.added:
        subprocess.run(["scancel", *submission.added], check=False)  # noqa: S603, S607


def watch(
    submission: Submission,
    jobs: Sequence[Job],
    *,
    every: float = 15.0,
    patience: float = 900.0,
    lag: float = 60.0,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Wait until no job is in the queue; return the reasons of the failures by names of jobs.

    submission: the jobs in the queue.
    jobs: all jobs of the launch.
    every: seconds between queries.
    patience: seconds for which the controller may fail to answer.
    lag: seconds that the status file of a task may take to appear on this machine after the task has left the queue.
    say: prints the numbers of jobs in each state, whenever they change.
    """
    here, failed, left, text = dict(submission.tasks), dict[str, str](), dict[str, float](), ""
    heard = time.monotonic()
    while here:
        try:
            states = _queue_states(list({array for array, _ in here.values()}), jobs)
            heard = time.monotonic()
        except InputError:
            if time.monotonic() - heard > patience:
                raise
            time.sleep(every)
            continue
        counts: dict[str, int] = {}
        for name, (array, k) in list(here.items()):
            state, why = states.get((array, k), ("", ""))
            if state and state not in GONE:
                key = f"{state.lower()} ({why})" if why not in ("None", "") else state.lower()
                counts[key] = counts.get(key, 0) + 1
                continue
            status, tries = _ended(submission.logs / f"{name}.ended", array)
            gone = time.monotonic() - left.setdefault(name, time.monotonic())
            if status is None and state not in ("CANCELLED", "COMPLETED") and gone < lag:
                continue
            del here[name]
            log = submission.logs / f"{name}.log"
            if status is not None and engines.fate(status) != "done":
                failed[name] = engines.reason(status, log, engines.last_line(log), tries)
            elif status is None and state != "COMPLETED":
                own = submission.logs / f"slurm_{array}_{k}.log"  # log of the batch script itself
                how = f"left the queue as {state or 'UNKNOWN'}" + f" ({why})" * (why not in ("None", ""))
                how += f" before it was done{engines.cause(engines.last_line(own))}"
                failed[name] = f"{how} (see {log} and {own}); launch it again to resume it from its checkpoint"
        now = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        if now and now != text:
            say(f"slurm: {now}")
            text = now
        if here:
            time.sleep(every)
    for job in jobs:
        if job.name not in submission.tasks or (job.name in failed and any(need in failed for need in job.needs)):
            failed[job.name] = engines.not_started(job, failed)
    return failed


def launch(
    jobs: Sequence[Job],
    command: Command,
    logs: Path,
    *,
    every: float = 15.0,
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, str]:
    """Submit jobs and wait for them (`submit`, `watch`); if interrupted, cancel what this call has submitted.

    every: seconds between queries. say: prints a message. options: further options of `submit`.
    """
    submission = submit(jobs, command, logs, **options)
    say(submission.words)
    try:
        return watch(submission, jobs, every=every, say=say)
    except (KeyboardInterrupt, SystemExit):
        cancel(submission)
        raise


def _ended(file: Path, array: str) -> tuple[int | None, int]:
    """Return the exit status and attempts that a task of the array has recorded.

    The status is None if there is no record, or only one of an earlier array.
    """
    try:
        mine, status, tries = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None, 0
    return (int(status), int(tries)) if mine == array else (None, 0)


def _queue_states(arrays: Sequence[str], jobs: Sequence[Job]) -> dict[tuple[str, int], tuple[str, str]]:
    """Return state and reason of each (array, task) that SLURM still knows."""
    try:
        text = _run_slurm(["squeue", "-h", "-r", "-t", "all", "-j", ",".join(arrays), "-o", "%F|%K|%T|%r"], jobs)
    except InputError as error:
        if "Invalid job id" in str(error):  # SLURM no longer knows any of them
            return {}
        raise
    rows = (line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3)
    return {(array, int(task)): (state, why) for array, task, state, why in rows if task.isdigit()}


def _run_slurm(words: list[str], jobs: Sequence[Job], script: str | None = None) -> str:
    """Run a SLURM command and return its output.

    Raises InputError with SLURM's message if it fails or does not answer, and Unavailable if it is not installed.
    """
    if shutil.which(words[0]) is None:
        raise Unavailable(
            f"engine slurm: {words[0]} is not installed on this machine. Launch {engines.named(jobs)} from a login "
            "node of the cluster, or with another engine"
        )
    try:
        done = subprocess.run(  # noqa: S603
            words, input=script, capture_output=True, encoding="utf-8", errors="replace", timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"engine slurm: {words[0]} did not answer within 120 s ({engines.named(jobs)})") from None
    if done.returncode:
        said = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise InputError(
            f"engine slurm: {words[0]} refused {engines.named(jobs)}: {said or f'status {done.returncode}'}. `sinfo` "
            "shows whether the controller answers and which partitions exist"
        )
    return done.stdout
