"""Watchdog: run a command for as long as the other end of this process's standard input is open.

    python tied.py SECONDS WORD..

When the other end is closed, on purpose or because its process was killed, the command gets SIGTERM. If it has not
ended after SECONDS, it is killed with all its processes. The watchdog is a separate process because a process that may
be killed cannot clean up after itself. If the watchdog itself is killed (Ray kills the child processes of its workers),
the command gets SIGTERM by PR_SET_PDEATHSIG on Linux; on other systems it continues alone, and its lease keeps other
workers away. The exit status is that of the command, 128 + N for signal N. The module imports nothing of the package,
so that it starts quickly.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1


def run(seconds: float, words: list[str]) -> int:
    """Run a command until it ends or standard input is closed; return its exit status.

    seconds: time between SIGTERM and SIGKILL. words: the command.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    me = os.getpid()

    def die_with_parent() -> None:
        if prctl:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != me:
                os.kill(os.getpid(), signal.SIGTERM)

    def leave(*_: object) -> None:
        child.terminate()
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def listen() -> None:
        while os.read(0, 1):
            pass
        leave()

    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=die_with_parent)  # noqa: S603
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, leave)
    threading.Thread(target=listen, daemon=True).start()
    status = child.wait()
    end()  # kill child processes that it has left, such as data loaders and ranks
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    try:
        code = run(float(sys.argv[1]), sys.argv[2:])
    except OSError as error:
        print(f"{sys.argv[2]} cannot be started: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    os._exit(code)
