"""Compare `sample` on a CPU with diffusers' DDIMPipeline: the same network, 128 images, 8 steps.

How. The pipeline draws all images as one batch. `sample` draws them in blocks whose size depends on the shape of an
image alone, so that image i is the same bit for bit whatever is drawn with it; each block takes its noise from its
seeds. Both are timed one right after the other, on one thread, and `sample` once more with a thread for each core.
Reported are medians of the ratios of wall-clock times of a round, for a network of the digits and one of MNIST.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py [--quick]
"""

import argparse
from statistics import median
from typing import Any

import torch
from _machine import add_sizes, describe, of_size, quartiles, timed
from diffusers import DDIMPipeline, DDIMScheduler

from lightning_tdisent import DDIM, Denoiser, Eps, LatentStates, UNet, sample
from lightning_tdisent.processes import cores

IMAGES, STEPS = 128, 8
NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {"shape": [1, 8, 8], "channels": [16, 32], "layers": 1},
    "mnist": {"shape": [1, 28, 28], "channels": [16, 32, 48], "layers": 1},
}


def main() -> None:
    """Run the comparison, and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, "fewer rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    describe("diffusers")
    rounds, n = of_size(args, 1, 3, 9), of_size(args, 20, IMAGES, IMAGES)
    results = {}
    for name, options in NETWORKS.items():
        torch.manual_seed(0)
        network = UNet(**options).eval()
        denoiser = Denoiser(network, Eps(), LatentStates(S=STEPS)).eval()
        pipeline = DDIMPipeline(network.net, DDIMScheduler(num_train_timesteps=1000))
        pipeline.set_progress_bar_config(disable=True)

        def drawn_by_pipeline(pipeline: DDIMPipeline = pipeline) -> None:
            pipeline(batch_size=n, num_inference_steps=STEPS, output_type="np")

        def drawn(threads: int, denoiser: Denoiser = denoiser) -> None:
            list(sample(denoiser, DDIM(), range(n), threads=threads))

        drawn_by_pipeline()
        drawn(1)
        one, many = [], []
        for _ in range(rounds):
            base = timed(drawn_by_pipeline)
            one.append(timed(lambda: drawn(1)) / base)
            many.append(timed(lambda: drawn(cores())) / base)
        print(f"{name}: one thread {quartiles(one)}, {cores()} threads {quartiles(many)} of the pipeline's time")
        results |= {f"pipeline_ratio_{name}": median(one), f"threads_ratio_{name}": median(many)}
    print("RESULT " + " ".join(f"{key}={value:.3f}" for key, value in results.items()))


if __name__ == "__main__":
    main()
