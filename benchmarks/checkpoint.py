"""Cost of a durable checkpoint: `DurableIO.save_checkpoint` against Lightning's `TorchCheckpointIO.save_checkpoint`.

What is compared. Both save the same state of 160 MB, in the form in which training passes it: 30 weights, the two
moments of AdamW for each, and their average, 120 tensors with 40 million values in all, and a few plain values.
Lightning's plugin serialises into memory, writes a temporary file and renames it; nothing is flushed, so a
power loss may lose the checkpoint. `DurableIO` refuses non-finite values, writes a temporary file next to the target,
flushes file and folder to the disk, reads the file back and hashes it, and writes a manifest and a pointer in the same
way.

How. The folder must lie on a disk; in memory a flush costs nothing. Before every timed save, pending writes are flushed
(``os.sync``), and the files of an earlier save are removed. A pair is one save by each side; the order alternates, and
the result is the median of the ratios of all pairs. Lightning's temporary file lies in the same folder, so that its
rename never copies. Loading is `load`: compare the hash with the manifest, then ``torch.load``. The phases are timed
separately, in memory, except for the flushes, which are those inside the timed saves; within a save, serialising,
writing, reading back and hashing overlap.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--quick] [--folder FOLDER]
"""

import argparse
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import add_sizes, describe, lines, of_size, quartiles, timed
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_tdisent.lit.checkpoints import DurableIO, load, non_finite, verify

WEIGHTS, SIZE = 30, 160_000_000


def state(step: int, size: int) -> dict[str, Any]:
    """Return a checkpoint of ``size`` bytes with random values, like that of a fit with AdamW and an average."""
    torch.manual_seed(0)
    each = size // 4 // 4 // WEIGHTS // 256
    names = [f"denoiser.network.blocks.{i}.weight" for i in range(WEIGHTS)]
    weights, first, second, average = ({name: torch.randn(each, 256) for name in names} for _ in range(4))
    moments = {
        i: {"step": torch.tensor(float(step)), "exp_avg": first[name], "exp_avg_sq": second[name]}
        for i, name in enumerate(names)
    }
    return {
        "epoch": 3,
        "global_step": step,
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-3, "params": list(range(WEIGHTS))}]}],
        "ema": {"kinds": [{"decay": 0.999}], "step": step, "weights": average, "others": []},
        "card": {"images_seen": 64 * step, "rows": [1], "fingerprint": "0" * 16},
    }


class Flushes:
    """Sum of the time spent in ``os.fsync``."""

    def __init__(self) -> None:
        self.seconds, self.count = 0.0, 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time the calls made inside the context."""
        real = os.fsync

        def fsync(handle: int) -> None:
            begin = time.perf_counter()
            real(handle)
            self.seconds += time.perf_counter() - begin
            self.count += 1

        os.fsync = fsync
        try:
            yield
        finally:
            os.fsync = real


def kind(folder: Path) -> str:
    """Return the type and the device of the file system that a folder lies on."""
    found = ("", "unknown", "")
    for line in lines("/proc/mounts"):
        device, place, name = line.split()[:3]
        if folder.resolve().is_relative_to(place) and len(place) >= len(found[2]):
            found = (device, name, place)
    return f"{found[1]} on {found[0]}"


def measure(folder: Path, pairs: int, size: int) -> dict[str, list[float]]:
    """Return the seconds of every save, load and flush; a first pair of saves is a warm-up and not counted."""
    checkpoint, tried = state(1000, size), {"durable": DurableIO(), "lightning": TorchCheckpointIO()}
    seconds: dict[str, list[float]] = {name: [] for name in ("durable", "lightning", "flush", "load", "verify")}
    tempfile.tempdir = str(folder)
    for pair in range(-1, pairs):
        for name in sorted(tried, reverse=pair % 2 == 1):
            place, flushes = folder / name, Flushes()
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            os.sync()
            path = place / "step-1.ckpt"
            with flushes.timed():
                took = timed(partial(tried[name].save_checkpoint, checkpoint, path))
            if name == "durable":
                os.sync()
                checked, loaded = timed(partial(verify, path)), timed(partial(load, path))
            if pair >= 0:
                seconds[name].append(took)
                if name == "durable":
                    for key, value in (("flush", flushes.seconds), ("load", loaded), ("verify", checked)):
                        seconds[key].append(value)
    same = load(folder / "durable" / "step-1.ckpt")["ema"]["weights"]
    assert all(torch.equal(same[k], v) for k, v in checkpoint["ema"]["weights"].items())
    return seconds


def phases(size: int) -> dict[str, float]:
    """Return the seconds of the phases of a save, each timed separately and in memory."""
    checkpoint, sink = state(1000, size), io.BytesIO()
    serialise = timed(lambda: torch.save(checkpoint, sink))
    content = sink.getvalue()
    return {
        "check that all is finite": median(timed(lambda: non_finite(checkpoint)) for _ in range(5)),
        "serialise": min(serialise, timed(lambda: torch.save(checkpoint, io.BytesIO()))),
        "hash": median(timed(lambda: hashlib.sha256(content).digest()) for _ in range(3)),
    }


def main() -> None:
    """Measure and print the result line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, "fewer pairs: under a minute on two cores")
    parser.add_argument("--folder", type=Path, default=Path(), help="folder on the disk to measure (default: this one)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    describe("lightning", disk=kind(args.folder))
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.folder) as folder:
        size = of_size(args, SIZE // 100, SIZE, SIZE)
        seconds = measure(Path(folder), of_size(args, 2, 20, 100), size)
        tempfile.tempdir = None
    ratios = [a / b for a, b in zip(seconds["durable"], seconds["lightning"], strict=True)]
    print(f"\n{size / 1e6:.1f} MB in {4 * WEIGHTS} tensors, {len(ratios)} pairs; s, median [quartiles]")
    for name, text in (
        ("durable", "save, DurableIO"),
        ("flush", "  of it in fsync"),
        ("lightning", "save, Lightning's TorchCheckpointIO"),
        ("load", "load and verify"),
        ("verify", "  verify alone"),
    ):
        print(f"  {text:36s} {quartiles(seconds[name])}")
    print(f"  {'ratio of the saves':36s} {quartiles(ratios)}\nphases of a save, each alone, s")
    for text, value in phases(size).items():
        print(f"  {text:36s} {value:.3f}")
    print(
        f"\nRESULT save_ratio={median(ratios):.3f} save_s={median(seconds['durable']):.3f} "
        f"lightning_s={median(seconds['lightning']):.3f} load_s={median(seconds['load']):.3f}"
    )


if __name__ == "__main__":
    main()
