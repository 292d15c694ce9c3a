"""Host cost of one training step: `fit` as this project runs it, against a bare PyTorch loop with the same work.

What is compared. The project's side is one `Trainer.fit` with everything that a ``fit`` run has: `ReducedStates`
(S = 8), `EMA`, `LossPerState`, `Export`, `StepProgress`, `Guard`, `Checkpoint`, the resident `ImageShards`, TensorBoard
and ``log_every_n_steps`` 50; no validation and no checkpoint falls into the timed steps. The bare side is a plain loop
over the same batches in the same order: generator seeded per step, balanced rows, `Denoiser.loss`, backward, clipping
by norm, fused AdamW, LambdaLR, diffusers' `EMAModel` with foreach, loss written to TensorBoard every 50 steps. Both
start with the same weights; the table says whether they also end with the same weights bit for bit, and the same
averages to 1e-5.

How. One fit lasts for the whole measurement. A callback reads the clock at the end of every batch; after each block of
25 steps it runs a block of 25 bare steps inside the hook, outside the project's time. A pair is two adjacent blocks;
both are one epoch long (an epoch of the digits has 22 steps) and every second pair contains a log point. The median
over pairs is reported. Two networks: a 1x1 convolution, where nearly everything is overhead, and the U-Net of the
digits. On a CUDA device blocks end with a synchronisation.

Synchronisations are counted in 49 further steps strictly between two log points, on both sides: scalars read
(``aten::_local_scalar_dense``, called by ``item``, ``bool`` and ``float``), operators whose output shape depends on
data (``nonzero``, ``masked_select``, ...), and calls of ``tolist``, ``cpu`` and ``numpy``, which the profiler cannot
see. The result is the project's count minus the bare count: on the CPU, fused AdamW reads one step counter per
parameter on both sides. On a CUDA device torch's sync debug mode counts instead, and every place is printed; it warns
rather than raises, so that one run finds them all.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--quick] [--device cuda]
"""

import argparse
import copy
import io
import logging
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from _machine import add_sizes, describe, of_size, quartiles
from diffusers.training_utils import EMAModel
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.tensorboard import SummaryWriter

from lightning_tdisent.data.orders import Shuffled
from lightning_tdisent.diffusion.rng import draw_rows, key
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO
from lightning_tdisent.lit.datamodule import ImageShards
from lightning_tdisent.lit.entry import Unprofiled
from lightning_tdisent.lit.modules import Diffusion, ReducedStates
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet

BATCH, BLOCK, LOG, SEED, DECAY = 64, 25, 50, 0, 0.999  # a block of steps is one epoch
SCALAR = "aten::_local_scalar_dense"
SHAPED = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave")
COPIES = ("tolist", "cpu", "numpy", "__array__")


class Tiny(Network):
    """One 1x1 convolution: almost no computation, so that the time is overhead."""

    def __init__(self, shape: list[int], classes: int | None = None, conditioning: Any = None) -> None:
        super().__init__(shape, classes, conditioning)
        self.conv = nn.Conv2d(shape[0], shape[0], 1)

    def forward(self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """Convolve x; ignore the time."""
        return self.conv(x)


NETWORKS: dict[str, Callable[[], Network]] = {
    "tiny": lambda: Tiny([1, 8, 8]),
    "unet": lambda: UNet([1, 8, 8], channels=[16, 32], layers=1),
}


class Reads(TorchFunctionMode):
    """Count the Python calls that copy a whole tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Syncs:
    """Count synchronisations between `start` and `stop`, which may be in different calls of a hook."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        """Start counting."""
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.reads, self.caught = Reads(), warnings.catch_warnings(record=True)
        self.profiler.start()
        self.reads.__enter__()
        self.warned = self.caught.__enter__()
        warnings.simplefilter("always")
        if self.cuda:
            torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> dict[str, int]:
        """Stop counting, and return the counts by kind."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")
        said = [w for w in self.warned or [] if "synchronizing CUDA operation" in str(w.message)]
        self.caught.__exit__(None, None, None)
        self.reads.__exit__(None, None, None)
        self.profiler.stop()
        assert self.profiler.profiler is not None
        # the raw events: building the tree of `profiler.events()` takes seconds
        seen = Counter(e.name() for e in self.profiler.profiler.kineto_results.events())
        counts = {"scalars": seen[SCALAR], "shaped": sum(seen[name] for name in SHAPED)}
        if not self.cuda:
            return counts | {"copies": self.reads.counts.total()}
        for w in {f"{w.filename}:{w.lineno}": w for w in said}.values():
            print(f"  synchronises: {w.filename}:{w.lineno}: {w.message}")
        return {"cuda": len(said)}  # torch counts them; reading a CPU tensor does not synchronise


class Bare:
    """The same work as `fit` without Lightning, on a copy of the module's denoiser."""

    def __init__(self, module: Diffusion, data: Shuffled, writer: SummaryWriter) -> None:
        self.denoiser, self.data, self.writer = copy.deepcopy(module.denoiser), data, writer
        self.device, self.clip_norm, self.warmup = module.device, module.clip_norm, module.warmup
        self.parameters = list(self.denoiser.parameters())
        self.rows = torch.tensor(self.denoiser.rows, device=self.device)
        self.generator = torch.Generator(self.device)
        options = {"weight_decay": module.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.parameters, module.lr, **options)
        rate = lambda step: min(1.0, (step + 1) / self.warmup)  # noqa: E731
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.average = EMAModel(self.parameters, decay=DECAY, foreach=True)
        self.average.to(self.device)
        self.step, self.batches = 0, iter(self.data)

    def run(self, steps: int) -> None:
        """Train for ``steps`` steps."""
        for _ in range(steps):
            batch = next(self.batches)
            self.generator.manual_seed(key(SEED, 0, self.step))
            x0 = from_uint8(batch["image"].to(self.device, non_blocking=True))
            s = draw_rows(self.rows, len(x0), self.generator)
            eps = torch.randn(x0.shape, generator=self.generator, device=self.device)
            loss = self.denoiser.loss(x0, s, eps).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.average.step(self.parameters)
            self.step += 1
            if self.step % LOG == 0:
                self.writer.add_scalar("train/loss", loss.item(), self.step)


@dataclass
class Times:
    """Wall and CPU seconds of every block of both sides, and wall seconds of every step of the project's side."""

    project: list[tuple[float, float]] = field(default_factory=list)
    bare: list[tuple[float, float]] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)

    @property
    def over(self) -> list[float]:
        """Milliseconds per step more than the bare loop, one value per pair."""
        return [(p[0] - b[0]) / BLOCK * 1e3 for p, b in zip(self.project, self.bare, strict=True)]

    @property
    def cpu_over(self) -> list[float]:
        """The same in CPU time of the process, which other load on the machine affects less."""
        return [(p[1] - b[1]) / BLOCK * 1e3 for p, b in zip(self.project, self.bare, strict=True)]

    @property
    def ratio(self) -> list[float]:
        """Ratio of project to bare, one value per pair."""
        return [p[0] / b[0] for p, b in zip(self.project, self.bare, strict=True)]

    def added(self, at: Callable[[int], bool]) -> float:
        """Return the median milliseconds of the steps chosen by ``at`` minus that of the other steps."""
        chosen, rest = ([t for k, t in self.steps if at(k) == is_one] for is_one in (True, False))
        return (median(chosen) - median(rest)) * 1e3


class Interleave(L.Callback):
    """Callback that times blocks of steps of a fit, runs a block of bare steps after each, and then counts syncs.

    Must be the last callback in the list (Lightning puts only checkpoints after it).
    """

    def __init__(self, warm: int, pairs: int, folder: Path) -> None:
        self.warm, self.pairs, self.folder, self.times = warm, pairs, folder, Times()
        self.syncs: dict[str, dict[str, int]] = {}

    @property
    def steps(self) -> int:
        """Number of steps that the fit must take."""
        return self.warm + self.pairs * BLOCK + LOG

    def clock(self) -> tuple[float, float]:
        """Return wall and CPU time, after synchronising the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Build the bare loop from the current weights."""
        self.device = pl_module.device
        data = Shuffled(trainer.datamodule.training, BATCH, SEED)
        self.bare = Bare(pl_module, data, SummaryWriter(str(self.folder / "bare")))
        self.counter = Syncs(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Read the clock; at the end of a block run a bare block."""
        now, step = time.perf_counter(), trainer.global_step
        timed = step - self.warm
        if 0 < timed <= self.pairs * BLOCK:
            self.times.steps.append((step, now - self.last))
        self.last = now
        if step == self.warm:
            self.bare.run(self.warm)
            self.begin = self.clock()
        elif 0 < timed <= self.pairs * BLOCK and timed % BLOCK == 0:
            middle = self.clock()
            self.bare.run(BLOCK)
            end = self.clock()
            self.times.project.append((middle[0] - self.begin[0], middle[1] - self.begin[1]))
            self.times.bare.append((end[0] - middle[0], end[1] - middle[1]))
            self.begin = self.clock()
        if timed == self.pairs * BLOCK:
            self.counter.start()
        elif step == self.steps - 1:
            self.syncs["project"] = self.counter.stop()
            self.counter.start()
            self.bare.run(LOG - 1)
            self.syncs["bare"] = self.counter.stop()
        elif step == self.steps:
            self.bare.run(1)
            self.equal = self.same(trainer, pl_module)
        self.last = time.perf_counter()

    def same(self, trainer: L.Trainer, module: Diffusion) -> bool:
        """Return whether both sides ended with the same weights and averages."""
        ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
        mine, theirs = list(module.denoiser.parameters()), self.bare.parameters
        averages = zip(ema.weights(module).values(), self.bare.average.shadow_params, strict=True)
        close = all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in averages)
        return close and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def write_shards(folder: Path) -> None:
    """Write shards of random 8x8 images: an epoch of BLOCK batches for training, one held-out batch."""
    rng = np.random.default_rng(0)
    for split, n in (("train", BATCH * BLOCK), ("test", BATCH)):
        with tarfile.open(folder / f"{split}-0000.tar", "w") as tar:
            for i, image in enumerate(rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)):
                file = io.BytesIO()
                Image.fromarray(image).save(file, "bmp")  # small PNGs often share their CRC-32
                for suffix, content in (("bmp", file.getvalue()), ("cls", b"0")):
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def measure(name: str, warm: int, pairs: int, device: str, folder: Path) -> Interleave:
    """Run one fit with its bare counterpart: ``warm`` steps, then ``pairs`` pairs of blocks."""
    L.seed_everything(SEED, verbose=False)
    module = ReducedStates(NETWORKS[name](), LatentStates(S=8))
    run, timer = folder / name, Interleave(warm, pairs, folder / name)
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        max_steps=timer.steps,
        max_epochs=-1,
        logger=TensorBoardLogger(run, name="", version="", default_hp_metric=False),
        callbacks=[  # in the order of `fit`; StepProgress reports as in a fleet job and draws no bar
            Export(),
            StepProgress(report=lambda step, steps, numbers: None),
            EMA(decay=DECAY),
            LossPerState(),
            Guard(),
            Checkpoint(),
            timer,
        ],
        plugins=[DurableIO()],
        profiler=Unprofiled(),
        default_root_dir=run,
        log_every_n_steps=LOG,
        val_check_interval=10 * timer.steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=ImageShards(str(folder), channels=1, batch_size=BATCH, seed=SEED))
    return timer


def show(name: str, timer: Interleave) -> None:
    """Print the table of one network."""
    times = timer.times
    print(f"\n{name}: ms per step, blocks of {BLOCK} steps\n pair  project     bare     over    ratio  cpu over")
    rows = zip(times.project, times.bare, times.over, times.ratio, times.cpu_over, strict=True)
    for i, (project, bare, over, ratio, cpu) in enumerate(rows):
        values = (project[0] / BLOCK * 1e3, bare[0] / BLOCK * 1e3, over, ratio, cpu)
        print(f"{i + 1:5d} {values[0]:8.3f} {values[1]:8.3f} {over:8.3f} {ratio:8.3f}  {cpu:8.3f}")
    print(
        f"  median [quartiles]: over {quartiles(times.over)} ms, ratio {quartiles(times.ratio)}, "
        f"cpu over {quartiles(times.cpu_over)} ms\n"
        f"  within it, ms each time: first step of an epoch {times.added(lambda k: k % BLOCK == 1):+.3f}, "
        f"log point {times.added(lambda k: k % LOG == 0):+.3f}\n"
        f"  same weights and averages as the bare loop after {timer.steps} steps: {timer.equal}"
    )
    for side, counts in timer.syncs.items():
        each = ", ".join(f"{kind} {n / (LOG - 1):.2f}" for kind, n in counts.items())
        print(f"  synchronisations per step, {side}: {each}")


def main() -> None:
    """Measure both networks and print the result line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, "fewer pairs: under a minute on two cores")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    describe("lightning", "diffusers", GPU=torch.cuda.get_device_name() if args.device == "cuda" else "none used")
    timers = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder))
        sizes = of_size(args, ((25, 1), (25, 1)), ((200, 80), (50, 12)), ((200, 600), (50, 60)))
        for name, (warm, pairs) in zip(NETWORKS, sizes, strict=True):
            timers[name] = measure(name, warm, pairs, args.device, Path(folder))
            show(name, timers[name])
    syncs = max(sum(t.syncs["project"].values()) - sum(t.syncs["bare"].values()) for t in timers.values()) / (LOG - 1)
    print(
        f"\nRESULT step_overhead_ms={median(timers['tiny'].times.over):.3f} "
        f"step_ratio={median(timers['unet'].times.ratio):.3f} syncs_per_step={syncs:.2f}"
    )


if __name__ == "__main__":
    main()
