"""Run a private SLURM cluster on this machine: munged, slurmctld and two nodes of two cores, each with its slurmd.

Requires root on Debian with ``apt-get install slurm-wlm munge``, but no systemd, cgroups, database or network. It
writes only to its own folder. To run it by hand until Ctrl-C: ``python tests/fleet/slurm_cluster.py``.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from lightning_tdisent.fleet.engines import tied

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
CONF = """
ClusterName=fleet
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job is held until its old credential has expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
JobRequeue=0
KillWait=10
SlurmdTimeout=9
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node1} CPUs=2 RealMemory=1024 Gres=gpu:2
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node2} CPUs=2 RealMemory=1024 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=graceful Nodes=ALL PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
GRES = """
AutoDetect=off
NodeName=node[1-2] Name=gpu File=/dev/null
NodeName=node[1-2] Name=gpu File=/dev/zero
"""


def end_with_parent():
    """Send SIGTERM to this process when the test process ends for any reason."""
    ctypes.CDLL(None).prctl(tied.PR_SET_PDEATHSIG, signal.SIGTERM)


class CannotStart(Exception):
    """The cluster cannot be started; the message has the reason."""


class Slurm:
    """The running cluster: its folder, and its daemons by name."""

    def __init__(self, folder):
        self.folder, self.daemons = folder, {}
        self.conf = folder / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.conf)}

    def start(self, name, *words):
        if name in self.daemons:
            self.daemons[name].wait()
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                words,
                env=self.env,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def start_node(self, name):
        self.start(name, "slurmd", "-D", "-N", name)

    def ask(self, *words):
        done = subprocess.run(words, env=self.env, capture_output=True, encoding="utf-8", timeout=60, check=False)
        return done.stdout if done.returncode == 0 else ""

    @property
    def nodes(self):
        """State of each node by its name."""
        return dict(line.split() for line in self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines())

    def until(self, condition, what, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = [self.folder / f"{dead[0] if dead else 'slurmctld'}{end}" for end in (".out", ".log")]
                said = [line for log in logs if log.exists() for line in log.read_text(encoding="utf-8").splitlines()][
                    -5:
                ]
                raise CannotStart(f"{what}: {', '.join(dead)} ended: {said}" if dead else f"{what}: {said}")
            time.sleep(0.1)

    def stop(self):
        self.ask("scancel", "--state=RUNNING", "--full", "--signal=KILL", "--me")
        self.ask("scancel", "--me")
        end = time.monotonic() + 20
        while self.ask("squeue", "-h") and time.monotonic() < end:
            time.sleep(0.1)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running():
    """Start a cluster and yield it once its nodes are idle; stop it at the end. Raises `CannotStart`."""
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        raise CannotStart(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        raise CannotStart("slurmd and munged start as root alone")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # clients of munge need access to its socket
    slurm = Slurm(folder)
    slurm.env["PATH"] = path
    controller, node1, node2 = free_ports(3)
    slurm.conf.write_text(CONF.format(folder=folder, controller=controller, node1=node1, node2=node2), encoding="utf-8")
    (folder / "gres.conf").write_text(GRES, encoding="utf-8")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        slurm.start("munged", "munged", "-F", *(f"--{k}={folder}/munge.{v}" for k, v in names.items()))
        slurm.until((folder / "munge.socket").exists, "munged makes no socket")
        slurm.start("slurmctld", "slurmctld", "-D")
        slurm.until(lambda: "node1" in slurm.ask("sinfo", "-h", "-N"), "slurmctld does not answer")
        for name in ("node1", "node2"):
            slurm.start_node(name)
        slurm.until(lambda: slurm.nodes == dict.fromkeys(("node1", "node2"), "idle"), "no idle nodes")
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with running() as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        signal.pause()
