"""Cost of the metrics: the Frechet distance against torchmetrics, and image quality in a training against the training.

Distance. Two sets of 10,000 features of Inception's width, 2,048, with a spectrum that decays like that of features,
are passed to `FrechetDistance` and to torchmetrics' `FrechetInceptionDistance` (whose network returns its input). Both
keep float64 sums. ``compute`` is then called on both in alternating order, and the result is the median of the ratios
of the pairs. Ours has the moments of the reference, as torchmetrics has the sums of its real images. Their values must
agree.

Training. The reduced model of the digits is trained with its YAML and SampleQuality of n = 1,000; the time of
SampleQuality in a validation is taken relative to the training steps between two validations. The reference is in the
cache, as in any second run. A GPU is used if there is one.

Evaluation. `score` of n images with small features against sampling alone, i.e. the added cost of extracting features
(on a GPU they overlap).

    OMP_NUM_THREADS=1 python benchmarks/metrics.py [--quick] [--device cuda]
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from _machine import add_sizes, describe, of_size, quartiles, timed
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_tdisent.evaluation.real_images import real_images
from lightning_tdisent.evaluation.score import open_quality, score
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.entry import run
from lightning_tdisent.metrics.accumulators import FeatureMoments
from lightning_tdisent.metrics.distances import Moments, frechet
from lightning_tdisent.metrics.features import load_features
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DPMSolver

ROOT = Path(__file__).parents[1]
WIDTH = 2048


class Passed(nn.Module):
    """Feature network that returns its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x


def features(n: int, seed: int, width: int) -> Tensor:
    """Return non-negative features (n, width) whose covariance has eigenvalues that fall as 1/k."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / torch.arange(1, width + 1).sqrt()[:, None]
    return (torch.randn(n, width, generator=generator) @ mixing / 8 + 0.4).relu()


class FrechetDistance(FeatureMoments):
    """The distance of `metrics.frechet_distance` to given moments, with the interface of torchmetrics."""

    def __init__(self, real: Moments) -> None:
        super().__init__(len(real.mean))
        self.real = real

    def compute(self) -> Tensor:  # type: ignore[override]  # noqa: D102
        return torch.tensor(frechet(self.real, super().compute()), dtype=torch.float64)


def distance(n: int, pairs: int, device: str, width: int = WIDTH) -> tuple[float, float, float]:
    """Return the median ratio theirs / ours of compute times, our seconds, and the relative difference of values."""
    real, fake = features(n, 0, width).to(device), features(n, 1, width).to(device)
    ours, theirs = FrechetDistance(Moments.of(real)).to(device), FrechetInceptionDistance(Passed(width)).to(device)
    adding: list[list[float]] = [[], []]
    for part in range(0, n, 500):
        theirs.update(real[part : part + 500], real=True)
        adding[0].append(timed(lambda: ours.update(fake[part : part + 500])))  # noqa: B023
        adding[1].append(timed(lambda: theirs.update(fake[part : part + 500], real=False)))  # noqa: B023
    times: list[list[float]] = [[], []]
    values = [0.0, 0.0]
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            metric = (ours, theirs)[which]
            metric._computed = None
            begin = time.perf_counter()
            values[which] = float(metric.compute())
            times[which].append(time.perf_counter() - begin)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    print(f"compute, {n:,} x {width}: ours {quartiles(times[0])} s, torchmetrics {quartiles(times[1])} s")
    print(f"ratio {quartiles(ratios)}; values {values[0]:.6f} and {values[1]:.6f}")
    print(f"update of 500: ours {quartiles(adding[0])} s, torchmetrics {quartiles(adding[1])} s")
    return median(ratios), median(times[0]), abs(values[0] / values[1] - 1)


def training(steps: int, device: str, n: int = 1000) -> tuple[float, float]:
    """Train and evaluate the digits; return two ratios.

    The first is the time of SampleQuality in a validation over that of the steps between two validations; the second
    the time of `score` over that of sampling alone.
    """
    spent: list[float] = []
    inner = SampleQuality.on_validation_epoch_end

    def watched(self: SampleQuality, *args: object) -> None:
        spent.append(timed(lambda: inner(self, *args)))  # type: ignore[arg-type]

    SampleQuality.on_validation_epoch_end = watched  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TDISENT_CACHE"] = f"{folder}/cache"
        words = (
            f"--trainer.max_steps {steps} --trainer.val_check_interval {steps // 2} --trainer.callbacks+=SampleQuality"
        )
        words += f" --trainer.callbacks.protocol=digits --trainer.callbacks.n={n}"
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(["fit", "--config", "experiments/digits/reduced8.yaml", *words.split(), "--run", f"{folder}/run"])
        model = load_model(f"{folder}/run")
        cards = model.cards
        per_step = cards[0].seconds / steps
        quality = open_quality(
            Protocol.preset("digits", n=n, metrics=("fd", "is", "kid", "prdc")), load_features("digits"),
            real_images("data/digits", "train", 1), [1, 8, 8], device,
        )  # fmt: skip
        model.to(device)
        alone = min(timed(lambda: [images.cpu() for images in sample(model, DPMSolver(), range(n))]) for _ in "ab")
        added = [timed(lambda: score(model, DPMSolver(), quality)) / alone for _ in range(3)]
    interval = 800 * per_step  # validation interval of the YAML
    share = min(spent[1::2]) / interval
    print(f"quality of {n:,} digits: {min(spent[1::2]):.2f} s in a validation, {interval:.1f} s of 800 training steps")
    print(f"score of {n:,} digits: {median(added):.3f} of sampling alone, which takes {alone:.2f} s")
    return share, median(added)


def main() -> None:
    """Measure and print the result line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, "under 50 s on 2 cores")
    parser.add_argument(
        "--device", default="cpu", help="device of distance and evaluation; the training uses a GPU if any"
    )
    arguments = parser.parse_args()
    device = arguments.device
    os.chdir(ROOT)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    describe("torchmetrics", "lightning", "numpy")
    many, width = of_size(arguments, (500, 64), (10_000, WIDTH), (10_000, WIDTH))
    speedup, seconds, apart = distance(many, of_size(arguments, 1, 3, 9), device, width)
    share, added = training(of_size(arguments, 4, 100, 1600), device, of_size(arguments, 128, 1000, 1000))
    print(
        f"RESULT frechet_speedup={speedup:.2f} frechet_s={seconds:.2f} frechet_difference={apart:.1e} "
        f"quality_share={share:.3f} score_ratio={added:.3f}"
    )


if __name__ == "__main__":
    main()
