"""The SLURM engine on a real SLURM: tasks are requeued, cancelled, preempted or lost. Runs with `make test-slurm`."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import slurm_cluster
import trainings
from trainings import REAL, STAND_IN, Job, alive, parent, real_command, saved_step, until

from lightning_tdisent.cli import describe, fits
from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.engines import slurm as engine
from lightning_tdisent.fleet.state import FleetWork
from lightning_tdisent.fleet.work import Session, work_through

if not os.environ.get("CLUSTER"):
    pytest.skip("starts a SLURM: make test-slurm", allow_module_level=True)


def submitted(logs):
    """Return the names of the tasks of each job array."""
    record = json.loads((logs / "slurm.json").read_text(encoding="utf-8"))
    return {array: names for array, names in record.items() if array != "schema"}


class Trainings(trainings.Trainings):
    @property
    def logs(self):
        return self.folder / "logs"

    def launch(self, jobs, **options):
        return engine.launch(jobs, self.command, self.logs, every=0.3, say=self.said.append, **options)

    def submit(self, jobs, **options):
        return engine.submit(jobs, self.command, self.logs, **options)

    def watch(self, submission, jobs):
        return engine.watch(submission, jobs, every=0.3, lag=5, say=self.said.append)

    def starts(self, name):
        log = (self.logs / f"{name}.log").read_text(encoding="utf-8")
        return [line.split("Z ")[1] for line in log.splitlines() if line.startswith("== ")]

    def task(self, name):
        """Return ARRAY_TASK of a job, the form that scontrol requires."""
        arrays = submitted(self.logs)
        return next(f"{array}_{names.index(name)}" for array, names in arrays.items() if name in names)

    def train_to(self, step, *names):
        until(lambda: all(len(self.lines(name, "steps")) > step for name in names))


@pytest.fixture(scope="module")
def slurm():
    with pytest.MonkeyPatch.context() as patch:
        try:
            with slurm_cluster.running() as cluster:
                patch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
                patch.setenv("PATH", cluster.env["PATH"])
                yield cluster
        except slurm_cluster.CannotStart as reason:
            if os.environ["CLUSTER"] == "required":
                raise
            pytest.skip(f"no SLURM here: {reason}")


@pytest.fixture
def at(tmp_path):
    """Return a function that creates trainings in a folder and runs ``disturb`` in a thread during the launch."""
    threads = []

    def make(*args, disturb=None, **fates):
        t = Trainings(tmp_path, *args, **fates)
        if disturb:
            threads.append(threading.Thread(target=disturb, args=(t,)))
            threads[-1].start()
        return t

    yield make
    for thread in threads:
        thread.join()


def test_requeued_and_cancelled_tasks_resume(slurm, at):
    def disturb(t):
        t.train_to(7, "requeued", "cancelled")
        assert slurm.ask("scontrol", "requeue", t.task("requeued")) == ""
        assert slurm.ask("scancel", t.task("cancelled")) == ""

    t = at(150, 0.02, disturb=disturb)
    jobs = [
        Job("requeued"),
        Job("cancelled"),
        Job("fine"),
        Job("after", ("requeued", "fine")),
        Job("never", ("cancelled",)),
    ]
    failed = t.launch(jobs)
    assert failed["cancelled"].startswith("left the queue as CANCELLED before it was done")
    assert failed["never"] == "not started, it needs cancelled"
    assert len(failed) == 2
    (_, first, saved), (_, again, last) = t.done_steps("requeued")
    assert (first, again, last) == (1, saved + 1, 150)
    assert [s.split(", ")[1:] for s in t.starts("requeued")] == [
        [f"SLURM job {t.task('requeued')}", f"restart {k}", "try 1"] for k in (0, 1)
    ]
    assert t.lines("cancelled", "ends") == [(143, t.lines("cancelled", "steps")[-1][0])]
    assert t.lines("never", "starts") == []
    assert (t.folder / "after" / "starts").stat().st_ctime_ns > (t.folder / "requeued" / "ends").stat().st_mtime_ns
    assert t.launch(jobs) == {}
    (_, _, saved), (_, again, last) = t.done_steps("cancelled")
    assert (again, last) == (saved + 1, 150)
    assert [len(t.lines(job.name, "steps")) for job in jobs] == [150] * 5


def test_deaths_are_retried_refusals_are_not(slurm, at):
    t = at(12, 0.01, dies=["die 7", "die 8"], bad=["refuse"], hopeless=["die 1"] * 3)
    failed = t.launch([Job("dies"), Job("bad"), Job("hopeless"), Job("after", ("bad",))], retries=2)
    assert failed["bad"] == f"lr 1e9 is no rate (see {t.logs}/bad.log)"
    assert failed["hopeless"].startswith("died 3 times, now with signal 9 (Killed): buffered")
    assert failed["after"] == "not started, it needs bad"
    assert len(failed) == 3
    assert [(first, last) for _, first, last in t.done_steps("dies")] == [(1, 7), (6, 8), (6, 12)]
    assert [s.rpartition(" ")[2] for s in t.starts("dies")] == ["1", "2", "3"]


def test_a_task_saves_near_its_time_limit_and_is_requeued(slurm, at):
    t = at(1200, 0.04)
    assert t.launch([Job("long")], grace=45, sbatch={"time": "1"}) == {}
    starts = t.done_steps("long")
    assert len(starts) >= 2
    assert all(again == saved + 1 for (_, _, saved), (_, again, _) in pairwise(starts))
    assert [s.split(", ")[2] for s in t.starts("long")] == [f"restart {k}" for k in range(len(starts))]
    assert "TIME LIMIT" not in "".join(log.read_text(encoding="utf-8") for log in t.logs.glob("slurm_*.log"))


@pytest.mark.parametrize("partition", ["main", "graceful"])
def test_a_preempted_task_saves_at_once_and_is_requeued(partition, slurm, at):
    def disturb(t):
        t.train_to(7, "a", "b")
        urgent = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1"]
        assert slurm.ask("sbatch", *urgent)

    t = at(150, 0.03, disturb=disturb)
    began = time.monotonic()
    assert t.launch([Job("a"), Job("b")], sbatch={"partition": partition}) == {}
    assert time.monotonic() - began < 50  # does not wait for the end of the grace time
    for name in "ab":
        (_, _, saved), (_, again, last) = t.done_steps(name)
        assert (again, last) == (saved + 1, 150)
        assert t.lines(name, "ends") == [(143, saved), (0, 150)]


def test_tasks_of_a_lost_node_resume_elsewhere_from_their_checkpoints(slurm, at):
    """Kill the daemon of a node and all its processes, as in a power failure."""
    where = {}

    def disturb(t):
        t.train_to(12, "a", "b", "c")
        where.update({name: t.starts(name)[0].split()[2].rstrip(",") for name in "abc"})
        slurm.daemons[where["a"]].kill()
        for name in "abc":
            if where[name] == where["a"]:
                ((process,),) = t.lines(name, "starts")
                shell = parent(process)
                for doomed in (parent(shell), shell, process):
                    os.kill(doomed, signal.SIGKILL)

    t = at(400, 0.02, disturb=disturb)
    assert t.launch([Job("a"), Job("b"), Job("c")]) == {}
    slurm.start_node(where["a"])
    slurm.until(
        lambda: slurm.ask("sinfo", "-h", "-o", "%T%D", "-p", "main").split() == ["idle2"], "the node is not back"
    )
    lost = [name for name in "abc" if where[name] == where["a"]]
    assert "a" in lost
    for name in "abc":
        starts = t.done_steps(name)
        assert starts[-1][2] == 400
        assert len(starts) == 1 + (name in lost)
        assert "restart 1" in t.starts(name)[-1] or name not in lost


def test_a_real_fleet_requeued_and_killed_equals_the_uninterrupted_one(slurm, planned, same_weights, tmp_path):
    whole, broken = planned(**REAL), planned(**REAL)
    assert work_through(FleetWork(whole, describe), fits, Session()) == {}
    jobs = broken.jobs()

    def disturb():
        until(lambda: all(saved_step(broken, name) >= 10 for name in ("expert_001", "expert_002")))
        arrays = submitted(tmp_path / "logs")
        array = next(array for array, names in arrays.items() if "expert_001" in names)
        assert slurm.ask("scontrol", "requeue", f"{array}_0") == ""
        lease = max((broken.root / "leases").glob("expert_002.*.json"))
        os.kill(json.loads(lease.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    failed = engine.launch(jobs, real_command(broken), tmp_path / "logs", every=0.3, say=print)
    disturbing.join()
    assert failed == {}
    for unbroken, job in zip(whole.jobs(), jobs, strict=True):
        same_weights(unbroken.folder, job.folder)
        log = (tmp_path / "logs" / f"{job.name}.log").read_text(encoding="utf-8")
        assert log.count("going on with") == (job.name != "shared")
        assert "srun" not in log


def test_the_refusal_of_a_real_command_is_the_reason(slurm, planned, tmp_path):
    fleet = planned(experts=2)
    command = real_command(fleet)
    words = ["--set.data.path", "nowhere"]
    failed = engine.launch(fleet.jobs()[:1], lambda job: command(job) + words, tmp_path / "logs", every=0.3, say=print)
    assert failed["expert_001"].startswith("data.path: nowhere is not a folder.")


def test_an_interrupted_submission_is_continued(slurm, at):
    t = at(120, 0.02)
    jobs = [Job("a"), Job("b"), Job("c"), Job("last", ("a",))]
    first = t.submit(jobs[:2], at_once=1)
    assert [f"{array}_{k}" for array, k in first.tasks.values()] == [t.task("a"), t.task("b")]
    assert f"squeue -r -j {first.added[0]}; cancel: scancel {first.added[0]}" in first.words
    t.train_to(3, "a")
    assert not t.lines("b", "starts")
    second = t.submit(jobs)
    assert second.tasks.items() >= first.tasks.items()
    assert set(second.added).isdisjoint(first.added)
    assert len(second.added) == 2
    assert t.watch(second, jobs) == {}
    assert [len(t.done_steps(job.name)) for job in jobs] == [1] * 4
    third = t.submit(jobs[:1])
    assert third.added
    assert t.watch(third, jobs[:1]) == {}
    assert len(t.lines("a", "steps")) == 120


LAUNCHER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_slurm import Job, Trainings

def leave(*_):
    raise SystemExit(143)

signal.signal(signal.SIGTERM, leave)
Trainings(Path(sys.argv[2]), 2000, 0.03).launch([Job("a"), Job("b", ("a",))])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2), (signal.SIGKILL, -9)])
def test_an_interrupted_launch_cancels_what_it_has_submitted(number, code, slurm, at):
    t = at(2000, 0.03)
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(STAND_IN.parent), str(t.folder)])
    t.train_to(3, "a")
    launcher.send_signal(number)
    assert launcher.wait(30) == code
    if number == signal.SIGKILL:  # the launcher could not cancel: the jobs stay in the queue, and are found again
        assert alive(t.lines("a", "starts")[0][0])
        again = t.submit([Job("a"), Job("b", ("a",))])
        assert again.added == []
        slurm.ask("scancel", *{array for array, _ in again.tasks.values()})
        failed = t.watch(again, [Job("a"), Job("b", ("a",))])
        assert failed["a"].startswith("left the queue as CANCELLED")
        assert failed["b"] == "not started, it needs a"
    until(lambda: t.lines("a", "ends"))
    assert t.lines("a", "ends")[0] == (143, t.lines("a", "steps")[-1][0])
    until(lambda: slurm.ask("squeue", "-h") == "")


def test_the_command_has_its_cores_and_gpu_and_lightning_does_not_detect_srun(slurm, tmp_path):
    program = (
        "import os\n"
        "from lightning.fabric.plugins.environments import SLURMEnvironment\n"
        "import time; time.sleep(.5)\n"
        "print(SLURMEnvironment.detect(), *map(os.environ.get, ['OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES']))"
    )
    command, logs = [sys.executable, "-c", program], tmp_path / "it's %A"
    jobs = [Job("a"), Job("it's $HOME")]
    options = {"every": 0.3, "say": print, "memory": "64M", "sbatch": {"nodelist": "node1"}}
    assert engine.launch(jobs, lambda job: command, logs, gpus=1, **options) == {}
    said = [(logs / f"{job.name}.log").read_text(encoding="utf-8").splitlines()[1:] for job in jobs]
    assert len(list(logs.glob("slurm_*_[01].log"))) == 2
    assert sorted(said) == [["False 1 0"], ["False 1 1"]]
    assert engine.launch(jobs[:1], lambda job: command, logs, cpus=2, **options) == {}
    assert (logs / "a.log").read_text(encoding="utf-8").splitlines()[-1] == "False 2 None"


def test_a_refusal_of_sbatch_leaves_nothing_in_the_queue(slurm, at):
    t = at(2000)
    with pytest.raises(InputError, match=r"sbatch refused a: .*invalid partition specified: nowhere") as refusal:
        t.submit([Job("a")], sbatch={"partition": "nowhere"})
    assert "sinfo" in str(refusal.value)
    big = [Job(f"e{k}") for k in range(engine.LARGEST)]
    with pytest.raises(InputError, match=r"refused last"):
        engine.submit(
            [*big, Job("last", ("e1",))], lambda job: ["x" * 5_000_000] if job.name == "last" else ["x"], t.logs
        )
    until(lambda: slurm.ask("squeue", "-h") == "")


def test_a_controller_that_does_not_answer_is_refused_in_time(at, tmp_path, monkeypatch, slurm):
    conf = slurm.conf.read_text(encoding="utf-8").replace("SlurmctldPort=", "SlurmctldPort=1\n#")
    (tmp_path / "slurm.conf").write_text(conf, encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"sbatch refused a, b: .*Unable to contact slurm controller"):
        at().submit([Job("a"), Job("b")])
    assert time.monotonic() - began < 60
