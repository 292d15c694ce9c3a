"""The Ray engine on real clusters: nodes, workers and launchers are killed. Runs with `make test-ray`."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trainings
from trainings import REAL, STAND_IN, Job, alive, parent, real_command, saved_step, until

from lightning_tdisent.cli import describe, fits
from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.engines import ray as engine
from lightning_tdisent.fleet.state import FleetWork
from lightning_tdisent.fleet.work import Session, work_through

if not os.environ.get("CLUSTER"):
    pytest.skip("starts clusters of Ray: make test-ray", allow_module_level=True)
try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    if os.environ["CLUSTER"] == "required":
        raise
    pytest.skip('Ray is not installed: pip install -e ".[ray]"', allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's own pipes


class Trainings(trainings.Trainings):
    def launch(self, jobs, **options):
        return engine.launch(jobs, self.command, self.folder / "logs", say=self.said.append, **options)

    def nodes(self, name):
        return re.findall(r"Ray's node (\w+)", (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cluster():
    """Start and connect to a cluster of a head without cores and two nodes that appear to be started by srun."""
    os.environ["SLURM_NTASKS"] = "1"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    here = {
        "place1": nodes.add_node(num_cpus=2),
        "place2": nodes.add_node(num_cpus=2, resources={"room": 2, "place2": 1}),
    }
    nodes.wait_for_nodes()
    del os.environ["SLURM_NTASKS"]
    nodes.connect()
    yield nodes, here
    ray.shutdown()
    nodes.shutdown()


def test_deaths_are_retried_refusals_are_not_and_needs_are_met(cluster, tmp_path):
    t = Trainings(tmp_path, dies=["die 7", "die 8"], bad=["refuse"], hopeless=["die 1"] * 3)
    jobs = [
        Job("late", ("dies", "fine")),
        Job("dies"),
        Job("fine"),
        Job("bad"),
        Job("after", ("bad",)),
        Job("hopeless"),
    ]
    failed = t.launch(jobs, retries=2)
    assert set(failed) == {"bad", "after", "hopeless"}
    assert failed["bad"] == f"lr 1e9 is no rate (see {tmp_path}/logs/bad.log)"
    assert failed["after"] == "not started, it needs bad"
    assert failed["hopeless"].startswith("died 3 times, now with signal 9 (Killed): buffered")
    assert [(first, last) for _, first, last in t.done_steps("dies")] == [(1, 7), (6, 8), (6, 12)]
    assert [(first, last) for _, first, last in t.done_steps("late")] == [(1, 12)]
    assert [len(t.lines(name, "starts")) for name in ("bad", "after", "hopeless", "fine")] == [1, 0, 3, 1]
    begun = (tmp_path / "late" / "starts").stat().st_ctime_ns
    assert all(begun > (tmp_path / name / "ends").stat().st_mtime_ns for name in ("dies", "fine"))
    assert sum("is started again" in line for line in t.said) == 4
    again = [line for line in t.said if line.startswith("dies: died on ")]
    assert re.fullmatch(r"dies: died on .* with signal 9 \(Killed\): .+; is started again, 1 of 2", again[0])


def test_jobs_are_placed_where_the_resource_is(cluster, tmp_path):
    _, here = cluster
    t = Trainings(tmp_path, 2)
    assert t.launch([Job("a"), Job("b")], resources={"room": 1}) == {}
    assert {*t.nodes("a"), *t.nodes("b")} == {here["place2"].node_id}
    assert t.said == []


def test_jobs_run_at_the_same_time_if_resources_allow_with_their_threads(cluster, tmp_path):
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "mine = Path(sys.argv[1], str(os.getpid())); mine.touch(); time.sleep(.3)\n"
        "print(len(list(Path(sys.argv[1]).iterdir())), os.environ['OMP_NUM_THREADS'],\n"
        "      [os.environ.get(n) for n in ('CUDA_VISIBLE_DEVICES', 'SLURM_NTASKS')], Path.cwd()); mine.unlink()"
    )
    room = tmp_path / "room"
    room.mkdir()
    jobs = [Job(f"j{k}") for k in range(5)]
    command = [sys.executable, "-c", program, str(room)]
    assert engine.launch(jobs, lambda job: command, tmp_path / "logs", cpus=2) == {}
    said = [
        (tmp_path / "logs" / f"{job.name}.log").read_text(encoding="utf-8").split("\n")[1].split(maxsplit=1)
        for job in jobs
    ]
    assert max(int(together) for together, _ in said) == 2  # nodes of two cores each
    assert {rest for _, rest in said} == {f"2 ['', None] {Path.cwd()}"}


def test_jobs_of_a_lost_node_resume_elsewhere_from_their_checkpoints(cluster, tmp_path):
    nodes, here = cluster
    doomed = nodes.add_node(num_cpus=2, resources={"room": 2})
    nodes.wait_for_nodes()
    t, lost = Trainings(tmp_path, 200, 0.03), []
    jobs = [Job(f"expert_{k}") for k in range(4)]

    def kill():
        until(lambda: all(len(t.lines(job.name, "steps")) > 20 for job in jobs))
        lost.extend(job.name for job in jobs if t.nodes(job.name) == [doomed.node_id])
        nodes.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    failed = t.launch(jobs, resources={"room": 1})
    killer.join()
    assert failed == {}
    assert len(lost) == 2
    for job in jobs:
        starts = t.done_steps(job.name)
        assert starts[0][1] == 1
        assert starts[-1][2] == 200
        assert len(starts) == (2 if job.name in lost else 1)
        assert t.nodes(job.name)[-1] == here["place2"].node_id
        assert not any(alive(process) for process, _, _ in starts)


LOST_NODE = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lightning_tdisent.fleet.engines import ray as engine

if __name__ == "__main__":
    engine._ray([])  # before any other import of Ray, as in `fleet run`
    from ray.cluster_utils import Cluster
    from trainings import Job, Trainings, until

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    doomed = nodes.add_node(num_cpus=1)
    t = Trainings(Path(sys.argv[2]), 60, 0.03)

    def kill():
        until(lambda: all(len(t.lines(name, "steps")) > 20 for name in "ab"))
        nodes.remove_node(doomed, allow_graceful=False)

    threading.Thread(target=kill).start()
    said = []
    jobs = [Job("a"), Job("b")]
    failed = engine.launch(jobs, t.command, t.folder / "logs", address=nodes.address, say=said.append)
    nodes.shutdown()
    assert failed == {}, failed
    assert [line for line in said if "NodeDiedError" in line and line.endswith("; is started again, 1 of 3")], said
"""


def test_a_lost_node_is_reported_without_the_output_of_ray(tmp_path):
    script = tmp_path / "launch.py"
    script.write_text(LOST_NODE, encoding="utf-8")
    words = [sys.executable, script, Path(__file__).parent, tmp_path]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "raylet" not in done.stdout + done.stderr


def test_a_package_missing_on_a_node_is_reported(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engine._work, "__module__", "not_on_any_node")
    monkeypatch.setitem(sys.modules, "not_on_any_node", engine)
    t = Trainings(tmp_path)
    failed = t.launch([Job("a")], retries=1)
    assert re.match(
        r"died 2 times, now with no exit status: ModuleNotFoundError: No module named 'not_on_any_node'\. "
        r"lightning_tdisent and the modules of --import must be importable on every node",
        failed["a"],
    )
    assert "a worker of Ray with no exit status: ModuleNotFoundError" in t.said[0]


def test_a_real_fleet_that_loses_a_node_equals_the_uninterrupted_one(cluster, planned, same_weights, tmp_path):
    nodes, _ = cluster
    whole, broken = planned(**REAL), planned(**REAL)
    assert work_through(FleetWork(whole, describe), fits, Session()) == {}
    doomed = nodes.add_node(num_cpus=1, resources={"room": 1})
    nodes.wait_for_nodes()
    jobs, lost = broken.jobs(), []

    def kill():
        until(lambda: all(saved_step(broken, name) >= 10 for name in ("expert_001", "expert_002")))
        for name in ("expert_001", "expert_002"):
            if doomed.node_id in (tmp_path / "logs" / f"{name}.log").read_text(encoding="utf-8"):
                lost.append(name)
        nodes.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    hold = ray.remote(num_cpus=0, max_retries=0, resources={"room": 1, "place2": 1})(lambda: time.sleep(600)).remote()
    failed = engine.launch(jobs, real_command(broken), tmp_path / "logs", resources={"room": 1}, say=print)
    killer.join()
    ray.cancel(hold, force=True)
    assert failed == {}
    assert len(lost) == 1
    assert "going on with" in (tmp_path / "logs" / f"{lost[0]}.log").read_text(encoding="utf-8")
    for unbroken, job in zip(whole.jobs(), jobs, strict=True):
        same_weights(unbroken.folder, job.folder)


def test_the_command_of_a_killed_worker_saves_and_ends(cluster, tmp_path):
    t = Trainings(tmp_path, 60, 0.03)

    def kill():
        until(lambda: len(t.lines("a", "steps")) > 3)
        ((process,),) = t.lines("a", "starts")
        worker = parent(parent(process))
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert t.launch([Job("a")]) == {}
    killer.join()
    (_, _, saved), (_, first, _) = t.done_steps("a")
    assert first == saved + 1
    assert t.lines("a", "ends") == [(143, saved), (0, 60)]


LAUNCHER = """
import signal, sys
sys.path.insert(0, sys.argv[1])
import os; os.environ["CLUSTER"] = "1"
from pathlib import Path
from test_ray import Job, Trainings

def leave(*_):
    raise SystemExit(143)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    Trainings(Path(sys.argv[2]), 2000, 0.03).launch([Job("a"), Job("b"), Job("c")], address=sys.argv[3] or None)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -2), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("where", ["its own", "the cluster"])
def test_an_interrupted_launch_ends_with_all_its_commands_which_save(where, number, code, cluster, tmp_path):
    address = cluster[0].address if where == "the cluster" else ""
    words = [sys.executable, "-c", LAUNCHER, str(STAND_IN.parent), str(tmp_path), address]
    launcher = subprocess.Popen(words, stderr=subprocess.PIPE, env={**os.environ, "RAY_ADDRESS": ""})
    t = Trainings(tmp_path)
    try:
        until(lambda: len(t.lines("a", "steps")) > 3 and len(t.lines("b", "steps")) > 3)
        launcher.send_signal(number)
        _, said = launcher.communicate(timeout=60)
        assert launcher.returncode == code, said.decode()
    finally:
        launcher.kill()
        launcher.communicate()
    ran = [name for name in "abc" if t.lines(name, "starts")]
    if number == signal.SIGKILL:
        until(lambda: all(t.lines(name, "ends") for name in ran))
    for name in ran:
        ((status, saved),) = t.lines(name, "ends")
        assert status == 143
        assert t.lines(name, "steps")[-1][0] == saved == int((tmp_path / name / "kept").read_text(encoding="utf-8"))
        ((process,),) = t.lines(name, "starts")
        until(lambda process=process: not alive(process))


@pytest.fixture
def disconnected(cluster):
    """Disconnect from the cluster during the test."""
    ray.shutdown()
    yield
    ray.init(address=cluster[0].address)


def test_a_cluster_that_does_not_answer_is_refused_in_time(disconnected, tmp_path):
    jobs = [Job(f"expert_{k:03d}") for k in range(9)]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for patience, why in ((60, "refused"), (4, "no answer in 4 s")):
            began = time.monotonic()
            with pytest.raises(InputError, match=why) as refusal:
                engine.launch(jobs, lambda job: [], tmp_path, address=address, patience=patience)
            assert time.monotonic() - began < 10
            assert address in str(refusal.value)
            assert "expert_000, expert_001, .., expert_008 (9 jobs)" in str(refusal.value)
            server.listen()  # from now on it accepts connections, and does not answer


def test_a_second_connection_is_refused(cluster, tmp_path):
    with pytest.raises(InputError, match=r"address 10\.0\.0\.1:1: this process is connected"):
        engine.launch([Job("a")], lambda job: [], tmp_path, address="10.0.0.1:1")


def test_resources_that_this_machine_cannot_provide_are_refused(disconnected, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        InputError, match=r"a: each job needs CPU 1, GPU 99, special 2 on one node; the most .* CPU \d+, GPU \d+, spe"
    ):
        engine.launch([Job("a")], lambda job: [], tmp_path, gpus=99, resources={"special": 2})
    assert signal.getsignal(signal.SIGTERM) is before
    assert not ray.is_initialized()
