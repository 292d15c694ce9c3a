"""Code shared by the engines, and their scripts without a cluster; test_ray and test_slurm use real clusters."""

import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import Job, Trainings, alive, until

from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet import engines
from lightning_tdisent.fleet.engines import ray, slurm, tied

JOBS = [Job("a"), Job("b"), Job("c", ("a", "b"))]


def test_an_exit_status_decides_whether_to_retry():
    said = {
        status: engines.fate(status) for status in (0, 1, 2, 3, 130, 138, 143, 137, 139, 255, -2, -10, -15, -9, -11)
    }
    by = {fate: {s for s, f in said.items() if f == fate} for fate in said.values()}
    assert by == {
        "done": {0},
        "refused": {1, 2},
        "told": {130, 138, 143, -2, -10, -15},
        "died": {3, 137, 139, 255, -9, -11},
    }


def test_the_reason_is_the_last_line_of_the_last_attempt(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("== first\nerror: old\n", encoding="utf-8")
    since = log.stat().st_size
    assert engines.last_line(log, since) == ""
    with log.open("a", encoding="utf-8") as file:
        file.write("== second\nmuch\nerror: no such data\n\n")
    assert engines.last_line(log, since) == "error: no such data"
    assert engines.reason(2, log, "error: no such data") == f"no such data (see {log})"
    assert engines.reason(2, log, "- expert_001: data.path: none") == f"data.path: none (see {log})"
    assert engines.reason(1, log, "") == f"ended with status 1 (see {log})"
    assert engines.reason(137, log, "step 7", 4).startswith("died 4 times, now with signal 9 (Killed): step 7 (see ")
    assert engines.last_line(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("text", "size"), [("16G", 2**34), ("1.5M", 1572864), ("100", 100), ("2gb", 2**31), ("1TiB", 2**40), (None, None)]
)
def test_memory_units_are_powers_of_1024(text, size):
    assert engines.resources(1, 0.5, text) == size


def test_all_invalid_resources_are_named():
    with pytest.raises(InputError, match=r"cpus 0: at least 1; gpus -1: at least 0; memory '16 apples'"):
        engines.resources(0, -1, "16 apples")
    with pytest.raises(InputError, match=r"memory '0G'"):
        engines.resources(1, 0, "0G")


def test_the_command_s_environment_hides_srun_from_lightning(monkeypatch, tmp_path):
    from lightning.fabric.plugins.environments import SLURMEnvironment

    (tmp_path / "srun").write_text("", encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_NTASKS", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:mine")
    assert SLURMEnvironment.detect()
    env = engines.environment(4)
    assert "SLURM_PROCID" not in env
    assert env["SLURM_JOB_ID"] == "1"
    assert (env["OMP_NUM_THREADS"], env["PYTHONWARNINGS"].split(",")[0]) == ("4", "ignore:mine")
    monkeypatch.delenv("SLURM_NTASKS")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert not SLURMEnvironment.detect()
    assert str(heard[0].message).startswith(engines.NO_SRUN_WARNING.removeprefix("ignore:"))


def test_a_missing_ray_or_slurm_is_reported_with_the_jobs_and_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "lightning_tdisent\[ray\]".* for a, b, c'):
        ray.launch(JOBS, lambda job: [], tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"sbatch is not installed on this machine. Launch a, b from a login node"):
        slurm.submit(JOBS, lambda job: [], tmp_path)


def test_invalid_slurm_options_are_refused_before_anything_is_submitted(tmp_path):
    for options, why in (
        ({"gpus": 0.5}, "gpus 0.5: SLURM allocates whole numbers"),
        ({"sbatch": {"array": "1-9", "Time": "1", "partition": "x"}}, "sbatch options array, Time"),
        ({"memory": "much"}, "memory 'much'"),
    ):
        with pytest.raises(InputError, match=why):
            slurm.submit(JOBS, lambda job: [], tmp_path, **options)


# tied.py, the process between an engine's worker and the command


def tie(folder, *words, seconds=5.0):
    command = [sys.executable, "-I", tied.__file__, str(seconds), *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)


@pytest.mark.parametrize("how", ["let go", "SIGTERM", "SIGUSR1", "SIGKILL"])
def test_a_tied_command_saves_and_ends_with_its_holder(how, tmp_path):
    t = Trainings(tmp_path, 1000, 0.01)
    process = tie(tmp_path, *t.command(Job("a")))
    until(lambda: t.lines("a", "steps"))
    if how == "let go":
        process.stdin.close()
        process.stdin = None
    else:
        process.send_signal(getattr(signal, how))
    process.communicate()
    assert process.returncode == (-9 if how == "SIGKILL" else 143)
    until(lambda: t.lines("a", "ends"))
    assert t.lines("a", "ends") == [(143, t.lines("a", "steps")[-1][0])]


def test_a_tied_command_that_ignores_sigterm_is_killed_with_all_its_processes(tmp_path):
    script = "trap '' TERM; sleep 600 & echo $! $$ >begun.new; mv begun.new begun; wait"
    process = tie(tmp_path, "bash", "-c", script, seconds=0.2)
    until((tmp_path / "begun").exists)
    children = [int(word) for word in (tmp_path / "begun").read_text(encoding="utf-8").split()]
    began = time.monotonic()
    process.communicate()
    assert 0.2 <= time.monotonic() - began < 5
    assert process.returncode == 128 + 9
    until(lambda: not any(alive(child) for child in children))


def test_the_exit_status_is_that_of_the_tied_command(tmp_path):
    for script, status in (("exit 7", 7), ("kill -SEGV $$", 139), ("sleep 600 & echo $! >left", 0)):
        process = tie(tmp_path, "bash", "-c", script)
        assert process.wait(20) == status
        process.communicate()
    left = int((tmp_path / "left").read_text(encoding="utf-8"))
    until(lambda: not alive(left))
    process = tie(tmp_path, "/no/such/program")
    assert b"/no/such/program cannot be started" in process.communicate()[1]
    assert process.returncode == 2


# the batch script, which SLURM's daemons would run


@pytest.fixture
def batch(tmp_path):
    """Return a function that runs one task of the script with fake SLURM commands.

    `squeue` prints the given state, `scontrol` records its arguments.
    """
    bin_folder, logs = tmp_path / "bin", tmp_path / "logs"
    bin_folder.mkdir()
    logs.mkdir()
    for name, line in (("squeue", 'echo "$STATE"'), ("scontrol", f'echo "$@" >>{tmp_path}/asked')):
        (bin_folder / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (bin_folder / name).chmod(0o755)

    def run(command, jobs, k, state="RUNNING", retries=2, act=None):
        script = slurm._script(jobs, command, logs, 1, retries)
        task = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": str(k), "SLURM_JOB_ID": "40", "SLURM_NTASKS": "1"}
        env = {**os.environ, **task, "PATH": f"{bin_folder}:{os.environ['PATH']}", "STATE": state}
        process = subprocess.Popen(["bash", "-c", script], env=env)
        if act:
            act(process)
        return process.wait(30)

    run.logs, run.asked = logs, tmp_path / "asked"
    return run


@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", True), ("SIGNALING", True), ("COMPLETING", False), ("", False)]
)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signalled_task_is_requeued_unless_slurm_has_decided(number, state, requeued, batch, tmp_path):
    t = Trainings(tmp_path, 1000, 0.01)

    def tell(process):
        until(lambda: t.lines("b", "steps"))
        process.send_signal(number)
        process.send_signal(number)

    assert batch(t.command, JOBS, 1, state, act=tell) == 143
    assert t.lines("b", "ends") == [(143, t.lines("b", "steps")[-1][0])]
    assert batch.asked.exists() == requeued
    if requeued:
        assert batch.asked.read_text(encoding="utf-8") == "requeue 40_1\n"
    assert not (batch.logs / "b.ended").exists()


def test_a_task_retries_a_command_that_died_and_records_its_status(batch, tmp_path):
    t = Trainings(tmp_path, 4, 0.0, a=["die 2"] * 3, b=["refuse"], c=["die 2", "die 3"])
    assert [batch(t.command, JOBS, k) for k in range(3)] == [137, 2, 0]
    assert [(batch.logs / f"{name}.ended").read_text(encoding="utf-8") for name in "abc"] == [
        "40 137 3\n",
        "40 2 1\n",
        "40 0 3\n",
    ]
    assert slurm._ended(batch.logs / "a.ended", "40") == (137, 3)
    assert slurm._ended(batch.logs / "a.ended", "41") == (None, 0)
    assert engines.last_line(batch.logs / "b.log") == "error: lr 1e9 is no rate"
    assert not batch.asked.exists()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=9), max_size=4))
def test_the_script_passes_the_words_of_a_command_unchanged(tmp_path_factory, words):
    logs = tmp_path_factory.mktemp("it's $HOME {x} %A")
    script = slurm._script([Job("a")], lambda job: ["printf", r"<%s>\n", "{first} `id` \\", *words], logs, 1, 0)
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "1"}
    assert subprocess.run(["bash", "-c", script], env=env, check=False).returncode == 0
    said = (logs / "a.log").read_bytes().split(b"\n", 1)[1].decode()
    assert said == "".join(f"<{word}>\n" for word in ("{first} `id` \\", *words))


MISSING = "/usr/bin/python3: No module named lightning_tdisent"


@pytest.mark.parametrize("status", [1, 137, engines.LOST])
def test_a_package_missing_on_a_node_is_named_with_the_remedy(status, tmp_path):
    said = engines.reason(status, tmp_path / "a.log", MISSING, 4)
    assert "No module named lightning_tdisent. lightning_tdisent and the modules of --import must be importable" in said
    assert "status 25" not in said


class Wrong(Exception):
    """Stands for ray.exceptions.RayError."""


class Failed(Wrong):
    """Stands for ray.exceptions.RayTaskError: a task raised, or could not start."""


TRACEBACK = (
    "\x1b[36mray::_work()\x1b[39m (pid=7, ip=10.0.0.7)\nRuntimeError: The remote function failed to import on the "
    "worker.\n\nTraceback (most recent call last):\nModuleNotFoundError: No module named 'lightning_tdisent'\n"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Failed(TRACEBACK), "ModuleNotFoundError: No module named 'lightning_tdisent'"),
        (Failed("\x1b[36mray::_work()\x1b[39m (pid=7)\nPermissionError: logs"), "PermissionError: logs"),
        (Wrong("The node is dead. Node IP: 10. To see more, do this."), "Wrong: The node is dead. Node IP: 10"),
        (Wrong(""), "Wrong: no details"),
    ],
)  # fmt: skip
def test_a_task_lost_by_ray_is_reported_with_its_cause(error, said):
    future = Future()
    future.set_exception(error)
    module = SimpleNamespace(exceptions=SimpleNamespace(RayError=Wrong, RayTaskError=Failed))
    assert ray._result(module, future) == (engines.LOST, said, "a worker of Ray")
