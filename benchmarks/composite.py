"""Cost of composing 32 experts: time per step and memory, compared with one model of the same size.

The experts are 32 copies of one network, each in its own file, so that every variant must draw the same images as that
network alone; the table says whether the images are equal bit for bit. A portion is 32 network calls on 16 images. The
portions of all variants follow one another, each variant going first in turn, and their ratios to the portions of the
single model are taken pair by pair. The single model draws one block of 16 images after the other, in 32 steps. The
composites go from state to state as `sample` does: the resident one with 8 blocks at a time; the streamed one with all
32, after reading the expert of the state from its file. Memory is measured in fresh processes: the peak while drawing
512 images minus the memory before the model was loaded. The memory with offloaded experts is taken relative to that of
one expert for all rows, i.e. one expert and activations. Small images keep the activations smaller than the weights, so
that a second expert in memory would be visible.

On a GPU the experts have 5.4 M weights each, for images of 3x32x32. A portion is a whole run of `sample`: 1,000 images
in batches of 250, from an idle device to an idle device; the runs of all variants follow one another, each going first
in turn. Offloaded and streamed experts are compared with resident ones, since these are the alternatives to choose
from; both go from state to state, as `sample` does, and offloaded ones also batch by batch. The files were just
written, so streaming reads them from the page cache. Memory is the maximum that torch allocates to load a model and to
draw 4 images, few enough for the weights to dominate; and to draw 250. offload_overhead is measured on a GPU only;
there it and stream_overhead are ratios to the resident composite.

    OMP_NUM_THREADS=1 python benchmarks/composite.py [--quick] [--device cuda]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _machine import add_sizes, describe, lines, of_size, quartiles, timed

from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.models.card import Card
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sample import TOGETHER, sample
from lightning_tdisent.sampling.sampler import DDIM

STATES, BLOCK = 32, 16  # experts, and images that are drawn at a time
FEW, BY_BATCH = 4, "offload, batch by batch"  # images, few enough for weights to dominate memory; variant
FACTS: dict[str, Any] = {
    "module": "SingleState", "data": "none", "weights": "live", "average": None, "images_seen": 0, "steps": 0,
    "seconds": 0.0, "seed": 0, "version": "0",
}  # fmt: skip


def write(folder: Path, side: int, channels: list[int], experts: int, colours: int = 1) -> Path:
    """Write a composite of ``experts`` copies of one network, and the network itself as `model.safetensors`."""
    torch.manual_seed(0)
    network = UNet([colours, side, side], channels=channels, layers=1, conditioning="none")
    states = LatentStates(S=experts)
    folder.mkdir()
    files = [folder / f"{s:02d}.safetensors" for s in states.rows]
    for s, file in zip(states.rows, files, strict=True):
        expert = Denoiser(network, V(), states, [s])
        save_expert(file, expert, Card.of(expert, **FACTS))
    whole = Denoiser(network, V(), states)
    save_expert(folder / "model.safetensors", whole, Card.of(whole, **FACTS))
    return compose(files, folder / "composite")


class Steps:
    """Draw images in portions of S network calls, ``together`` blocks at a time, and keep the images.

    S is the number of states. There are S blocks, so one block in all states is a portion, and so are all blocks in
    one state.
    """

    def __init__(self, model: Any, together: int) -> None:
        self.states = S = model.states.S
        walks = [DDIM().walk(model, range(k, k + BLOCK)) for k in range(0, S * BLOCK, BLOCK)]
        for walk in walks:
            next(walk)  # draws the noise
        groups = [walks[k : k + together] for k in range(0, len(walks), together)]
        self.calls = iter([walk for group in groups for _ in range(S) for walk in group])
        self.images: list[torch.Tensor] = []

    def step(self) -> None:
        """Make the next network call."""
        row, x, _ = next(next(self.calls))
        if row == 0:
            self.images.append(x)

    def portion(self) -> float:
        """Make the calls of a portion and return its seconds, with outliers limited.

        A call delayed by other load on the machine counts at most 1.5 times the median call; the first call, which
        reads a file, counts in full.
        """
        first, *rest = [timed(self.step) for _ in range(self.states)]
        limit = 1.5 * median(rest)
        return first + sum(min(seconds, limit) for seconds in rest)


@torch.inference_mode()
def times(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every portion of all variants; print whether their images are equal."""
    one, resident = load_expert(folder / "model.safetensors")[0], load_model(folder / "composite")
    S = one.states.S
    models: dict[str, tuple[Any, int]] = {
        "model": (one, 1),
        "resident": (resident, TOGETHER),
        "stream": (load_model(folder / "composite", "stream"), S),
    }
    if rounds > 1:
        models["resident, block by block"] = (resident, 1)
    found: dict[str, list[float]] = {name: [] for name in models}
    for name, (model, _) in models.items():
        for s in (S, 1):
            model(torch.zeros(BLOCK, *model.shape), s)  # warm-up: the first calls choose kernels
        print(f"  {name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights")
    same = []
    for _ in range(rounds):
        ways = {name: Steps(*how) for name, how in models.items()}
        for k in range(S):
            for name in [*ways][k % len(ways) :] + [*ways][: k % len(ways)]:
                found[name].append(ways[name].portion())
        same += [torch.equal(torch.cat(ways["model"].images), torch.cat(w.images)) for w in ways.values()]
    print(f"  images the same as those of one model: {all(same)}")
    return found


def compare(folder: Path, side: int, channels: list[int], rounds: int, S: int = STATES) -> dict[str, float]:
    """Return the median ratio of each composite's time to that of one model, for S experts."""
    print(f"\n{S} experts, {S * BLOCK} images of {side}x{side}, channels {channels}")
    found = times(write(folder, side, channels, S).parent, rounds)
    print(f"  a step of one model: {median(found['model']) / S * 1e3:.2f} ms")
    out = {}
    for way in [*found][1:]:
        ratios = [a / b for a, b in zip(found[way], found["model"], strict=True)]
        out[way] = median(ratios)
        print(f"  {way} over one model: {quartiles(ratios)} of {len(ratios)} pairs")
    return out


def kilobytes(key: str) -> int:
    """Return the value of a line in /proc/self/status, in kB."""
    return next(int(line.split()[1]) for line in lines("/proc/self/status") if line.startswith(key))


def peak(folder: Path, residency: str) -> float:
    """Return the peak of private memory (MB) for loading and drawing, in this process, which must be fresh."""
    small = Denoiser(UNet([1, 8, 8], channels=[8, 16], layers=1, groups=4), V(), LatentStates(S=2)).eval()
    draw: Callable[[Any], list[torch.Tensor]] = lambda model: list(sample(model, DDIM(steps=2), range(STATES * BLOCK)))  # noqa: E731
    draw(small)  # memory that libraries allocate once
    before, mapped = kilobytes("VmRSS"), kilobytes("RssFile")
    model = (
        load_expert(folder / "model.safetensors")[0]
        if residency == "one"
        else load_model(folder / "composite", "offload")
    )
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak, to measure that of drawing
    draw(model)
    return (kilobytes("VmHWM") - before - (kilobytes("RssFile") - mapped)) / 1024


def load(folder: Path, way: str, device: str) -> Any:
    """Return the single model for all rows, or the composite with its experts resident, offloaded or streamed."""
    if way == "model":
        return load_expert(folder / "model.safetensors")[0].to(device)
    return load_model(folder / "composite", way).to(device)  # type: ignore[arg-type]


def draw(model: Any, images: int, batch: int, by_state: bool | None = None) -> tuple[float, torch.Tensor]:
    """Return the seconds of a whole run on a GPU, and its images."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    found = torch.cat(list(sample(model, DDIM(), range(images), batch, by_state=by_state)))
    torch.cuda.synchronize()
    return time.perf_counter() - begin, found


def load_all(folder: Path, device: str, batch: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the models of all variants, and the peak memory (MB) of each for drawing FEW images, then a batch."""
    models: dict[str, Any] = {}
    peaks: dict[str, list[float]] = {}
    for n in (FEW, batch):
        draw(load(folder, "model", device), n, batch)  # memory that libraries allocate once
    for way in ("model", "resident", "offload", "stream"):
        gc.collect()
        before, peaks[way] = torch.cuda.memory_allocated(), []
        torch.cuda.reset_peak_memory_stats()
        models[way] = load(folder, way, device)
        for n in (FEW, batch):
            draw(models[way], n, batch)
            peaks[way].append((torch.cuda.max_memory_allocated() - before) / 2**20)
    return models, peaks


def measure_gpu(
    folder: Path, device: str, seconds: float, side: int = 32, images: int = 1000, batch: int = 250
) -> dict[str, float]:
    """Compare all variants on a GPU for ``seconds``, at least 3 rounds; print and return the results by name."""
    S = STATES
    write(folder, side, [48, 96, 192], S, 3)
    size = (folder / "model.safetensors").stat().st_size / 2**20
    print(f"\n{S} experts of {size:.1f} MB, {images} images of 3x{side}x{side} in batches of {batch}, {S} steps")
    print(f"  convolutions may use TF32: {torch.backends.cudnn.allow_tf32}")
    models, peaks = load_all(folder, device, batch)
    ways = {way: (model, None) for way, model in models.items()} | {BY_BATCH: (models["offload"], False)}
    expected = draw(models["model"], images, batch)[1]
    times: dict[str, list[float]] = {way: [] for way in ways}
    same = dict.fromkeys(ways, True)
    end, k = time.perf_counter() + seconds, 0
    while k < 3 or time.perf_counter() < end:
        for way in [*ways][k % len(ways) :] + [*ways][: k % len(ways)]:
            model, by_state = ways[way]
            spent, found = draw(model, images, batch, by_state)
            times[way].append(spent)
            same[way] &= torch.equal(found, expected)
        k += 1
    print(f"  a run of one model: {quartiles(times['model'])} s; {images / median(times['model']):.0f} images/s")
    ratios = {}
    for way, to in (("resident", "model"), ("offload", "resident"), (BY_BATCH, "resident"), ("stream", "resident")):
        pairs = [a / b for a, b in zip(times[way], times[to], strict=True)]
        ratios[way] = median(pairs)
        print(f"  {way} over {to}: {quartiles(pairs)} of {k} pairs")
    print(f"  images the same as those of one model: {all(same.values())} {same}")
    for i, n in enumerate((FEW, batch)):
        each = ", ".join(f"{way} {mb[i]:.1f}" for way, mb in peaks.items())
        print(f"  peak to draw {n} images, MB: {each}; "
              f"offload over model {peaks['offload'][i] / peaks['model'][i]:.3f}, "
              f"over resident {peaks['offload'][i] / peaks['resident'][i]:.3f}")  # fmt: skip
    return {
        "resident_overhead": ratios["resident"],
        "stream_overhead": ratios["stream"],
        "offload_memory": peaks["offload"][0] / peaks["model"][0],
        "offload_overhead": ratios["offload"],
    }


def main() -> None:
    """Measure and print the result line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, "one round: under a minute on two cores, or a GPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak(Path(args.peak[1]), args.peak[0])))
        return
    if args.device == "cuda":
        describe("safetensors", GPU=torch.cuda.get_device_name())
        with tempfile.TemporaryDirectory() as name:
            results = measure_gpu(Path(name) / "gpu", "cuda", of_size(args, 0, 15, 120))
        print("\nRESULT " + " ".join(f"{name}={value:.3f}" for name, value in results.items()))
        return
    describe("safetensors")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.toy:
            ratios = compare(folder / "small", 4, [8, 16], 1, 4)
        else:
            ratios = compare(folder / "small", 16, [16, 32], of_size(args, 1, 1, 6))
        if not (args.quick or args.toy):
            compare(folder / "wide", 8, [32, 64], 6)
        write(folder / "large", 4, of_size(args, [16, 32], [128, 256], [128, 256]), 4)
        peaks = {"one": list[float](), "offload": list[float]()}
        for _ in range(of_size(args, 1, 1, 5)):
            for way, values in peaks.items():
                command = [
                    sys.executable,
                    __file__,
                    "--threads",
                    str(args.threads),
                    "--peak",
                    way,
                    str(folder / "large"),
                ]
                once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns freed memory; else peaks vary by 10 %
                done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=os.environ | once)  # noqa: S603
                values.append(json.loads(done.stdout))
        size = (folder / "large" / "model.safetensors").stat().st_size / 2**20
        memory = median(peaks["offload"]) / median(peaks["one"])
        print(f"\nan expert of {size:.1f} MB; peak of private memory, MB: {peaks}")
    print(
        f"\nRESULT resident_overhead={ratios['resident']:.3f} stream_overhead={ratios['stream']:.3f} "
        f"offload_memory={memory:.3f}"
    )


if __name__ == "__main__":
    main()
