"""Start, observe and kill processes under test."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lightning_tdisent.lit.checkpoints import newest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FULL = os.environ.get("FAULTS") == "full"
PATIENCE = 4 if FULL else 1  # factor on limits of waits, set for a quiet two-core machine
CONFIG = "experiments/digits/experts8.yaml"
TINY = [
    "--trainer.accelerator=cpu", "--trainer.callbacks=[]", "--trainer.log_every_n_steps=5",
    "--model.network.channels=[8,16]", "--model.network.groups=4", "--model.network.mid_attention=false",
    "--data.batch_size=32", "--data.val_limit=100",
]  # fmt: skip


class Zygote:
    """The process that forks the processes under test."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "zygote.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            cwd=ROOT,
        )

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


class Process:
    """A process under test, forked or new."""

    def __init__(self, zygote, folder, fresh, **ask):
        self.out, self.err, self.code = folder / "out", folder / "err", None
        if fresh:
            plain = set(ask) <= {"argv", "env"}
            words = ["-m", "lightning_tdisent", *ask["argv"]] if plain else [HERE / "zygote.py", json.dumps(ask)]
            path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
            env = {**os.environ, "PYTHONPATH": path, **ask.get("env", {})}
            with self.out.open("wb") as out, self.err.open("wb") as err:
                self.popen = subprocess.Popen(
                    [sys.executable, *words], stdout=out, stderr=err, cwd=ROOT, env=env, start_new_session=True
                )
            self.pid, self.zygote = self.popen.pid, None
        else:
            self.zygote = zygote
            self.pid = zygote.ask(out=str(self.out), err=str(self.err), **ask)["pid"]

    def wait(self, seconds=90):
        """Return the exit code, negative for a signal; fail if it still runs after ``seconds`` times `PATIENCE`."""
        seconds *= PATIENCE
        if self.code is None:
            if self.zygote is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.code = self.popen.wait(seconds)
            else:
                self.code = self.zygote.ask(wait=self.pid, seconds=seconds)["code"]
        assert self.code is not None, f"still running after {seconds} s\n{self.text}"
        return self.code

    def send(self, number):
        os.kill(self.pid, number)

    def end(self, number=signal.SIGKILL):
        """Send a signal to the process, and wait for its end."""
        self.send(number)
        return self.wait()

    @property
    def text(self):
        return "".join(
            f.read_text(errors="replace", encoding="utf-8") if f.exists() else "" for f in (self.out, self.err)
        )

    @property
    def stderr(self):
        return self.err.read_text(encoding="utf-8")


def alive(pid):
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, process=None, seconds=60.0):
    """Wait for a condition; fail if it does not become true in time, or if the process ends before."""
    end = time.monotonic() + seconds * PATIENCE
    while not (result := condition()):
        assert time.monotonic() < end, "never came true"
        assert process is None or alive(process.pid), process.text
        time.sleep(0.002)
    return result


def parts(name, **options):
    """Return the command line options that add a callback of ``faulty``."""
    return [f"--trainer.callbacks+=faulty.{name}", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


def name_of(step):
    return f"step-{step:09d}.ckpt"


def good(run):
    """Return the newest good checkpoint of a run, its step, and why newer ones are not good."""
    path, manifest, bad = newest(run / "checkpoints")
    return path, manifest.get("step", 0), bad


def begun(run):
    """Return a function that returns whether training has begun since this call."""
    file = run / "config.yaml"
    before = file.stat().st_mtime_ns if file.exists() else 0
    return lambda: file.exists() and file.stat().st_mtime_ns != before


def one_line(process):
    """Return the single line in which a command says why it stopped."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.text
    assert process.stderr.endswith(lines[0] + "\n")
    assert "Traceback" not in process.text
    return lines[0]
