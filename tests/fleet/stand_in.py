"""Stand-in for a training in tests of engines: steps, checkpoints, signals and exit statuses, without a model.

python stand_in.py FOLDER STEPS SECONDS [FATES..]: the Nth start has the Nth fate: "refuse", "die STEP", "go".
It writes to the folder: "steps" (step, process), "kept" (the checkpoint, saved at every fifth step and on a signal),
and "ends" (exit status, step).
"""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

EVERY = 5


def main(folder, steps, seconds, *fates):
    folder.mkdir(parents=True, exist_ok=True)
    starts = folder / "starts"
    with starts.open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    fate = dict(enumerate(fates, 1)).get(len(starts.read_text(encoding="utf-8").splitlines()), "go")
    lock = (folder / "lock").open("w", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX)  # stands for the lease: a second process waits for the first
    told = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: told.append(n))
    print("buffered, and written before what stands on stderr")
    if fate == "refuse":
        print("error: lr 1e9 is no rate", file=sys.stderr)
        return 2
    kept = folder / "kept"
    step = int(kept.read_text(encoding="utf-8")) if kept.exists() else 0
    while step < steps and not told:
        time.sleep(seconds)
        step += 1
        with (folder / "steps").open("a", encoding="utf-8") as file:
            file.write(f"{step} {os.getpid()}\n")
        if fate == f"die {step}":
            os.kill(os.getpid(), signal.SIGKILL)
        if step % EVERY == 0 or told or step == steps:
            kept.with_name("new").write_text(str(step), encoding="utf-8")
            kept.with_name("new").replace(kept)
    status = 143 if step < steps else 0
    with (folder / "ends").open("a", encoding="utf-8") as file:
        file.write(f"{status} {step}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
