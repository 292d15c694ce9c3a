"""Run a command for as long as somebody holds the other end of this process's standard input.

    python tied.py SECONDS WORD..

When that end closes, because its holder was killed or wants it, the command gets SIGTERM, and if it has not ended
after SECONDS, it is killed with all its processes. A process of its own does this, since one that may be killed can
promise nothing. Should this one be killed instead (Ray kills what its workers have started), then on Linux the command
gets SIGTERM by PR_SET_PDEATHSIG; elsewhere it goes on alone, and its lease keeps others away. The exit status is the
command's, 128 + N for signal N. It imports nothing of the package: it must start at once.
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
    """Run the command to its end, or to that of standard input."""
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
    end()  # loaders and ranks that it has left
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    try:
        code = run(float(sys.argv[1]), sys.argv[2:])
    except OSError as error:
        print(f"{sys.argv[2]} cannot be started: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    os._exit(code)
