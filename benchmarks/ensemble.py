"""Eight small experts in one process: `together`, in lockstep and stacked, against the same fits run sequentially.

What is compared. Three groups of the same eight command lines, experts 1..8 of the digits (the U-Net of 145,217
weights, time-agnostic), batch 8 each, with everything that a ``fit`` run has: EMA, losses per state, guard,
TensorBoard, clipping, AdamW. No validation and no checkpoint falls into the timed steps. ``sequential`` takes a block
of steps of one expert, then of the next, as eight separate runs would; ``lockstep`` takes one step of each in turn;
``stacked`` computes losses and gradients of all eight at once (`networks.stacked`). The cost of a separate process per
run (import of torch and lightning, decoding, seconds each) is left out, in favour of sequential.

How. All 24 fits live in one process during the whole measurement, and exactly one of them runs at any time. A round is
a block of BLOCK steps of all eight experts in each variant, one variant right after the other. Reported are
milliseconds of wall and CPU time per expert-step, and the median over rounds of the ratios within a round. Afterwards
the exported weights are compared: lockstep with sequential bit for bit, and stacked by its relative distance. On a CUDA
device blocks end with a synchronisation.

    OMP_NUM_THREADS=1 python benchmarks/ensemble.py [--quick] [--device cuda]
"""

import argparse
import logging
import tempfile
import threading
import time
import warnings
from pathlib import Path
from statistics import median

import lightning.pytorch as L
import torch
from _machine import add_sizes, describe, of_size, quartiles
from safetensors.torch import load_file

from lightning_tdisent.lit import together as module
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.together import Group, together

ROOT = Path(__file__).parents[1]
BLOCK, WARM = 10, 10
WAYS = ("sequential", "lockstep", "stacked")


class InTurn(Group):
    """Group that switches to the next expert after a block of steps, not after each step."""

    def pass_on(self, number: int) -> None:
        """Switch to the next expert at the end of a block only."""
        if self.steps.get(number, 0) % BLOCK == 0:
            super().pass_on(number)
        self.steps[number] = self.steps.get(number, 0) + 1

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.steps: dict[int, int] = {}


class Rounds:
    """Run one variant at a time, in turns of one block, and record wall and CPU time of every block."""

    def __init__(self, count: int, cuda: bool) -> None:
        self.count, self.cuda = count, cuda
        self.turns = {way: threading.Semaphore(0) for way in WAYS}
        self.times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        self.over = threading.Event()

    def clock(self) -> tuple[float, float]:
        """Return wall and CPU time, after synchronising the device."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def wait(self, way: str) -> None:
        """Wait for this variant's turn, then start the clock."""
        self.turns[way].acquire()
        self.begin = self.clock()

    def end(self, way: str, step: int) -> None:
        """Record the block and let the next variant run. After the last block all variants may finish in any order."""
        if step > WARM:
            wall, cpu = self.clock()
            self.times[way].append((wall - self.begin[0], cpu - self.begin[1]))
        if len(self.times[WAYS[-1]]) == self.count:
            self.over.set()
        self.turns[WAYS[(WAYS.index(way) + 1) % len(WAYS)]].release()
        if len(self.times[way]) == self.count:
            self.over.wait()
        else:
            self.wait(way)


class Timer(L.Callback):
    """Callback of the last expert of a group; the others are at the same step, or one step apart."""

    def __init__(self, way: str, rounds: Rounds) -> None:
        self.way, self.rounds = way, rounds

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Stop the clock at the end of a block."""
        step = trainer.global_step
        if step % BLOCK == 0 and step <= WARM + self.rounds.count * BLOCK:
            self.rounds.end(self.way, step)


def argv(folder: Path, way: str, expert: int, batch: int, steps: int, device: str) -> list[str]:
    """Return the command line of one fit."""
    options = {
        "trainer.callbacks": "[]",
        "trainer.accelerator": device,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 10 * steps,
        "checkpoint.minutes": 1e6,
        "data.path": ROOT / "data" / "digits",
        "data.batch_size": batch,
        "data.resident": "device" if device == "gpu" else "true",
        "model.expert": expert + 1,
        "run": folder / way / str(expert),
    }
    config = ["--config", str(ROOT / "experiments" / "digits" / "experts8.yaml")]
    return ["fit", *config, *(f"--{name}={value}" for name, value in options.items())]


def distance(one: Path, other: Path, experts: int) -> float:
    """Return the largest relative distance between the exported weights of two variants."""
    off = 0.0
    for k in range(experts):
        a, b = (torch.cat([w.flatten() for _, w in sorted(load_file(p / str(k) / "model.safetensors").items())])
                for p in (one, other))  # fmt: skip
        off = max(off, float((a - b).norm() / b.norm()))
    return off


def main() -> None:
    """Measure and print the result line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, "fewer rounds: under a minute on two cores")
    parser.add_argument("--rounds", type=int, help="number of rounds (default: 60, or 8 with --quick)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--experts", type=int, help="number of experts (default 8)")
    args = parser.parse_args()
    args.experts = args.experts or of_size(args, 2, 8, 8)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cuda = args.device == "cuda"
    describe("lightning", "diffusers", GPU=torch.cuda.get_device_name() if cuda else "none used")
    rounds = Rounds(args.rounds or of_size(args, 1, 8, 60), cuda)
    steps, last = WARM + (rounds.count + 1) * BLOCK, args.experts - 1
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def group(way: str) -> None:
            rounds.wait(way)
            module.Group = InTurn if way == "sequential" else Group  # type: ignore[misc]
            lines = [argv(folder, way, k, args.batch, steps, "gpu" if cuda else "cpu") for k in range(args.experts)]
            own = [
                [StepProgress(lambda *_: None), *([Timer(way, rounds)] if k == last else [])] for k in range(last + 1)
            ]
            failed.extend(f"{way}: {end!r}" for end in together(lines, own, way == "stacked") if end is not None)

        threads = [threading.Thread(target=group, args=(way,), daemon=True) for way in WAYS]
        for thread in threads:
            thread.start()
        rounds.turns[WAYS[0]].release()
        for thread in threads:
            thread.join()
        if failed:
            raise SystemExit("\n".join(failed))
        exact = distance(folder / "lockstep", folder / "sequential", args.experts) == 0
        off = distance(folder / "stacked", folder / "sequential", args.experts)
    each = BLOCK * args.experts / 1e3
    print(f"\n{args.experts} experts, batch {args.batch}: ms per expert-step, rounds of {BLOCK} steps of all experts")
    print("        " + "".join(f"{f'{way} wall':>17} {'cpu':>7}" for way in WAYS))
    for i in range(rounds.count):
        row = [t / each for way in WAYS for t in rounds.times[way][i]]
        print(
            f"  {i + 1:4d}  "
            + "".join(f"{wall:17.3f} {cpu:7.3f}" for wall, cpu in zip(row[::2], row[1::2], strict=True))
        )
    ratios = {}
    for kind, at in (("wall", 0), ("cpu", 1)):
        alone = [t[at] for t in rounds.times["sequential"]]
        for way in WAYS[1:]:
            ratios[way, kind] = [a / t[at] for a, t in zip(alone, rounds.times[way], strict=True)]
            print(f"  sequential over {way}, {kind}: median [quartiles] {quartiles(ratios[way, kind])}")
    print(
        f"  exported weights after {steps} steps: lockstep = sequential bit for bit: {exact}; stacked off by {off:.1e}"
    )
    print(
        f"\nRESULT ensemble_speedup={median(ratios['stacked', 'wall']):.3f} "
        f"lockstep_ratio={median(ratios['lockstep', 'wall']):.3f} "
        f"ensemble_cpu_speedup={median(ratios['stacked', 'cpu']):.3f}"
    )


if __name__ == "__main__":
    main()
