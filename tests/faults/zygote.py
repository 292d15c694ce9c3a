"""A process that has imported everything, and forks a process for each command it is asked to run.

Imports take six of the nine seconds of a small command. Requests and replies are lines of JSON on stdin and stdout. If
a request is given as its argument, this file handles it in the new process itself.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path


def become(ask):
    """Handle a request in this process: a command line, or a function of this module or of ``faulty``."""
    os.environ.update(ask.get("env", {}))
    time.tzset()
    if "LOCAL_RANK" in os.environ:  # Lightning reads it on import
        from lightning.pytorch.utilities.rank_zero import rank_zero_only

        rank_zero_only.rank = int(os.environ["LOCAL_RANK"])
    if ask.get("modules"):
        sys.path.insert(0, ask["modules"])
    if ask.get("enter"):
        enter(ask["enter"])
    if ask.get("fsize"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (ask["fsize"], ask["fsize"]))
    if ask.get("drop"):
        drop_rights()
    if ask.get("nobody"):
        become_nobody()
    if "call" in ask:
        function = globals().get(ask["call"]) or getattr(importlib.import_module("faulty"), ask["call"])
        function(*ask["args"])
        return 0
    from lightning_tdisent.cli import main

    return main(ask["argv"])


def drop_rights():
    """Give up root's right to ignore permission bits; does nothing for other users."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(ctypes.CDLL(None, use_errno=True).capset(header, none))


def become_nobody():
    """Become a user without an entry in the user database and without variables, as in many containers."""
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    check(libc.unshare(0x10000000))  # users
    Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
    Path("/proc/self/uid_map").write_text(f"12345 {user} 1", encoding="utf-8")
    Path("/proc/self/gid_map").write_text(f"12345 {group} 1", encoding="utf-8")
    for name in set(os.environ) - {"PATH", "PYTHONPATH", "TMPDIR", "OMP_NUM_THREADS"}:
        del os.environ[name]


def commands(*lines):
    """Run commands one after the other, and print the exit code of each."""
    from lightning_tdisent.cli import main

    for words in lines:
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code or 0
        print(f"CODE {' '.join(words[:2])}: {code}", flush=True)


def small_disk(place, size):
    """Mount an empty disk of ``size`` bytes for this process and those that `enter` it, and wait to be killed."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    check(libc.unshare(0x20000 if user == 0 else 0x10020000))  # new mount namespace, and user namespace if not root
    if user:
        Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="utf-8")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="utf-8")
    check(libc.mount(None, b"/", None, 0x44000, None))  # the mount below is private
    check(libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()))
    print("mounted", flush=True)
    time.sleep(24 * 3600)  # longer than any test


def enter(pid):
    """Enter the mount namespace of another process."""
    libc, here = ctypes.CDLL(None, use_errno=True), Path.cwd()
    for kind in ("user", "mnt") if os.getuid() else ("mnt",):
        handle = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        check(libc.setns(handle, 0))
        os.close(handle)
    os.chdir(here)


def check(result):
    """Raise OSError for a failed system call."""
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def redirect(ask):
    """Start a new session, with files for stdout and stderr."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(ask[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)


def wait(pid, seconds):
    """Return the exit code of a child, negative for a signal; None if it still runs after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def serve():
    """Answer requests until stdin ends."""
    for module in ("faulty", "lightning_tdisent.lit.entry", "torch.utils.tensorboard"):
        importlib.import_module(module)
    gc.freeze()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with os.fdopen(os.dup(0), encoding="utf-8") as requests:
        for line in requests:
            ask = json.loads(line)
            if "wait" in ask:
                answer = {"code": wait(ask["wait"], ask["seconds"])}
            else:
                answer = {"pid": os.fork()}
                if not answer["pid"]:
                    redirect(ask)
                    leave(ask)
            print(json.dumps(answer), file=replies, flush=True)


def leave(ask):
    """Handle a request and exit as Python does, but without the 1.5 s it needs to finalise all modules."""
    try:
        code = become(ask)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    if len(sys.argv) > 1:
        sys.exit(become(json.loads(sys.argv[1])))
    serve()
