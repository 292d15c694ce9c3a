"""Sampling speed of a multi-scale model with a network for each of four scales, against one with as many weights.

Multi-scale: Haar components of 3x128x128 images. The finest component is pure noise, and dropped, after a quarter of
the levels, the next one after half of them, and so on. A chain takes equally many steps at 16, 32, 64 and 128 pixels;
each scale has its own U-Net, and a `CompositeDenoiser` combines the four. Uniform: the same schedule for all pixels,
one U-Net at 128. Both have the same number of weights within 2 %, the same number of steps and of images in a batch,
the same sampler (DDIM, eta 0, clipped), float32, and random weights, which cost as much as trained ones. Complete
chains of both, from noise to image, follow one another in one process, in alternating order; the speedup is taken pair
by pair from wall time. The table shows where a chain spends its time. On a CPU it uses the time of the main thread,
which other load on the machine disturbs less, and so does a second ratio.

The networks have the widths of the published ones with equal weights (2207.09786; 103.88 M and 102.87 M in the
authors' U-Net, whose resampling blocks have weights and whose embedding scales as well as shifts): 128 times
(1, 1, 2, 3, 4) against (.5, 1, 1, 1.5, 2), (.5, 1, 1.5, 2), (.5, 1, 2) and (1, 2), self-attention where a side is an
eighth or less of its network's, 64 channels per head. There are 2 residual blocks per resolution in the uniform model,
and 2, 2, 3 and 5 in the scales, where the published model has 2, 2, 2 and 4: these numbers make the weights equal in
this project's U-Net.

Published: 4.4 times faster at 128x128 in wall time (abstract), without a program that measures it; 7.07 times by the
operations of the published networks. Of that, a factor of 3.01 is the geometry of equal networks at all four scales.

    OMP_NUM_THREADS=1 python benchmarks/multiscale.py [--quick] [--device cuda] [--channels-last]
"""

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from _machine import add_sizes, describe, of_size, quartiles, timed
from torch import Tensor

from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.diffusion.schedules import LogLinear
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.cost import flops
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sampler import DDIM

LEVELS = 3
Shape = tuple[tuple[float, ...], int, list[int]]  # widths over the base width, layers, resolutions with attention
UNIFORM: Shape = ((1, 1, 2, 3, 4), 2, [3, 4])
SCALES: list[Shape] = [  # from fine to coarse
    ((0.5, 1, 1, 1.5, 2), 2, [3, 4]),
    ((0.5, 1, 1.5, 2), 2, [3]),
    ((0.5, 1, 2), 3, []),
    ((1, 2), 5, []),
]
PUBLISHED = {"uniform": 103.88, "multi-scale": 102.87}  # millions of weights


class Echo(Network):
    """A network that returns its input, to measure the cost of a chain without a network."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__(shape, None, None)
        self.weight = torch.nn.Parameter(torch.zeros(1))  # gives states their device and dtype

    def forward(self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """Return x."""
        return x


def unet(shape: list[int], widths: Shape, base: int) -> UNet:
    """Return a U-Net of these widths, with 32 groups and 64 channels per head for a base width of 128."""
    factors, layers, attention = widths
    channels = [round(base * f) for f in factors]
    return UNet(shape, channels, layers, attention, head=base // 2, groups=base // 4)


class Model:
    """Networks on a table, and the times of their chains and calls."""

    def __init__(self, states: LatentStates, networks: Sequence[Network]) -> None:
        rows = states.blocks_of_rows
        self.networks, self.steps = networks, [len(block) for block in rows]
        parts = [Denoiser(n, V(), states, block) for n, block in zip(networks, rows, strict=True)]
        self.denoiser: Any = parts[0] if len(parts) == 1 else CompositeDenoiser(parts)
        self.denoiser.eval()
        self.weights = [sum(p.numel() for p in n.parameters()) for n in networks]
        self.flops: list[int] = []
        self.chains: list[float] = []
        self.own: list[float] = []
        self.calls: list[list[float]] = [[] for _ in networks]

    def prepare(self, device: torch.device, batch: int, channels_last: bool) -> None:
        """Count operations, move to the device, and call every network once, since the first call chooses kernels."""
        if channels_last:
            self.denoiser.to(memory_format=torch.channels_last)
        self.flops = [flops(n) for n in self.networks]
        self.denoiser.to(device)
        if device.type == "cpu" and batch == 1:
            return  # counting the operations has called them
        with torch.inference_mode():
            for n in self.networks:
                n(torch.zeros(batch, *n.shape, device=device), torch.ones(batch, dtype=torch.long, device=device))

    @property
    def operations(self) -> float:
        """Average operations of the networks per image and step."""
        return sum(n * f for n, f in zip(self.steps, self.flops, strict=True)) / sum(self.steps)

    def chain(self, batch: int) -> None:
        """Draw a batch; record its seconds and those of every network call."""
        device = next(iter(self.denoiser.parameters())).device
        begun: list[tuple[int, Any]] = []
        ended: list[Any] = []
        hooks = [network.register_forward_hook(lambda *_: ended.append(mark(device))) for network in self.networks]
        hooks += [
            network.register_forward_pre_hook(lambda *_, k=k: begun.append((k, mark(device))))
            for k, network in enumerate(self.networks)
        ]

        def work() -> None:
            DDIM()(self.denoiser, range(batch))
            finish(device)

        finish(device)
        begin = time.thread_time()
        self.chains.append(timed(work))
        self.own.append(time.thread_time() - begin if device.type == "cpu" else self.chains[-1])
        for hook in hooks:
            hook.remove()
        for (k, begin), end in zip(begun, ended, strict=True):
            self.calls[k].append(between(begin, end))

    @property
    def share(self) -> float:
        """Share of the time of the chains that is spent in the networks."""
        return sum(map(sum, self.calls)) / sum(self.own)

    @property
    def inside(self) -> float:
        """Seconds that a chain spends in its networks, from the median call of each."""
        return sum(n * median(calls) for n, calls in zip(self.steps, self.calls, strict=True))

    def table(self, name: str, batch: int) -> None:
        """Print one line per network, and one for all if there are several."""
        for network, n, weights, f, calls in zip(
            self.networks, self.steps, self.weights, self.flops, self.calls, strict=True
        ):
            line(f"{name} {network.shape[-1]}", n, weights, f * batch, median(calls))
        if len(self.networks) > 1:
            steps = sum(self.steps)
            line(f"{name}, all", steps, sum(self.weights), self.operations * batch, self.inside / steps)


def mark(device: torch.device) -> Any:
    """Return the time of the thread, or an event recorded on the GPU stream."""
    if device.type == "cpu":
        return time.thread_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Return the seconds between two marks."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3


def finish(device: torch.device) -> None:
    """Wait for a GPU to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def line(name: str, steps: int, weights: int, operations: float, seconds: float) -> None:
    """Print one line of the table."""
    print(
        f"  {name:18s}{steps:6d}{weights / 1e6:12.2f}{operations / 1e9:13.2f}{seconds * 1e3:12.1f}"
        f"{operations / seconds / 1e9:12.1f}"
    )


def main() -> None:
    """Measure and print the result line."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, "one step per scale: under 50 s on two cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="steps of a chain (default: 8, or 128 with cuda)")
    parser.add_argument("--batch", type=int, help="images in a chain (default: 1, or 16 with cuda)")
    parser.add_argument("--size", type=int, help="side of an image (default 128)")
    parser.add_argument("--width", type=int, help="base width (default: the published 128)")
    parser.add_argument("--pairs", type=int, help="pairs of chains (default: 5, or 3 with --quick)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--channels-last", action="store_true", help="memory format of both models")
    args = parser.parse_args()
    if args.steps is not None and args.steps <= LEVELS:
        parser.error(f"--steps: at least one for each of {LEVELS + 1} scales")
    cuda = args.device == "cuda"
    device = torch.device(args.device)
    steps = args.steps or of_size(args, 4, 4, 128 if cuda else 8)
    args.size, args.width = (value or of_size(args, 32, 128, 128) for value in (args.size, args.width))
    batch = args.batch or (16 if cuda else 1)
    pairs = args.pairs or of_size(args, 1, 3, 5)
    torch.set_num_threads(args.threads)
    describe("diffusers", **({"gpu": torch.cuda.get_device_name()} if cuda else {}))

    torch.manual_seed(0)
    shape = [3, args.size, args.size]
    states = ComponentStates(shape, LogLinear(), Haar(LEVELS), S=steps)
    plain = LatentStates(LogLinear(), S=steps, spacing="trailing")
    shapes = [states.shape_at(block[0], shape) for block in states.blocks_of_rows]
    several = Model(states, [unet(at, widths, args.width) for at, widths in zip(shapes, SCALES, strict=True)])
    one = Model(plain, [unet(shape, UNIFORM, args.width)])
    weights = sum(several.weights) / sum(one.weights)
    if abs(weights - 1) > 0.02:
        raise SystemExit(f"the weights of the two differ by more than 2 %: their ratio is {weights:.4f}")
    for model in (several, one):
        model.prepare(device, batch, args.channels_last)
    faster = one.operations / several.operations

    print(
        f"\n{batch} of {args.size}x{args.size}, {steps} steps, {args.device}, channels_last {args.channels_last}, "
        f"base width {args.width}{'' if args.width == 128 else ' (published: 128)'}, up to {pairs} pairs"
    )
    for name, model in (("uniform", one), ("multi-scale", several)):
        print(f"  {name}: {sum(model.weights) / 1e6:.2f} M weights (published: {PUBLISHED[name]} M)")
    print(f"  ready after {time.perf_counter() - began:.0f} s")

    ratios: list[float] = []
    for k in range(pairs):
        if k and args.quick and time.perf_counter() - began + one.chains[-1] + several.chains[-1] > 35:
            print(f"  {k} of {pairs} pairs, because the machine is busy")
            break
        for model in (one, several) if k % 2 == 0 else (several, one):
            model.chain(batch)
        ratios.append(one.chains[-1] / several.chains[-1])
        print(
            f"  pair {k + 1}: uniform {one.chains[-1]:.3f} s, multi-scale {several.chains[-1]:.3f} s, {ratios[-1]:.2f}"
        )
    without = {}
    for name, model, table in (("uniform", one, plain), ("multi-scale", several, states)):
        echo = Model(table, [Echo(n.shape) for n in model.networks])
        echo.denoiser.to(device)
        for _ in range(6):
            echo.chain(batch)
        without[name] = median(echo.own[1:])
    share = without["multi-scale"] / median(several.own)

    print(f"\n  {'network':18s}{'steps':>6s}{'M weights':>12s}{'GFLOP/step':>13s}{'ms/step':>12s}{'GFLOP/s':>12s}")
    one.table("uniform", batch)
    several.table("multi-scale", batch)
    for name, seconds in without.items():
        print(f"  {name + ' without networks':49s}{seconds / steps * 1e3:12.1f}")
    rate = (several.operations / several.inside) / (one.operations / one.inside)
    rest = several.share / one.share
    print(f"\nspeedup, uniform over multi-scale: {quartiles(ratios)} of {len(ratios)} pairs")
    if not cuda:
        print(f"  by thread time: {quartiles([a / b for a, b in zip(one.own, several.own, strict=True)])}")
    print(
        f"  from the table: {faster * rate * rest:.2f} = {faster:.2f} (operations) x {rate:.3f} (operations/s, fewer "
        f"for small images) x {rest:.3f} (time outside networks)\n"
        f"  published: 4.4 by wall time, 7.07 by operations"
    )
    print(
        f"\nRESULT speedup={median(ratios):.3f} flop_speedup={faster:.3f} weights_ratio={weights:.4f} "
        f"haar_share={share:.4f}"
    )


if __name__ == "__main__":
    main()
