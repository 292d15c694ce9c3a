"""Cost of reading shards: the loader against bare decoding of the same images, and against plain webdataset.

What is compared, one core each, in images per second of process time:

- bare: a loop over the JPEGs of a set, already in memory: simplejpeg, torch's antialiased bicubic on uint8, centre
  crop. Nothing is read, checked, shuffled or batched.
- loader: `Shuffled` over `Shards` with an index, no worker processes: one read per sample in a new permutation, CRC-32
  compared as in a first epoch, decoded, cropped, batched as uint8.
- unverified: the same without the CRC-32 comparison, to measure its cost; streamed: `Streamed` over the same shards.
- webdataset: ``WebDataset(...).decode("pil")``, ADM's crop by Pillow (box, bicubic), batches of uint8.

How. The images are copied into plain tars in a temporary folder, which then stay in the page cache. All variants go
through the set batch by batch, in turn; the order is reversed every round. Bare loop and loader take the same images in
the same order, so that their ratio is the median over pairs of equal batches; the others have different orders and are
compared by their sums. The resize is compared with Pillow's, pixel by pixel. Memory: resident set of the loader after
epochs 2 and 12. For a set that fits into memory: the time to take a batch of 128 of 50,000 images 32 x 32 in memory (or
on the device) against a training step of a U-Net on it.

The set is ``$TDISENT_DATA/imagenet-sample`` (or data/imagenet-sample); without it, photographs are generated.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--quick] [--images FOLDER] [--device cuda]
"""

import argparse
import io
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from _machine import add_sizes, describe, lines, of_size, quartiles
from PIL import Image
from torch.nn.functional import interpolate

from lightning_tdisent.data.decode import Decoder, adm_crop, decode_image
from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.data.index import path_of
from lightning_tdisent.data.orders import Shuffled, Streamed
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.shards import Policy, Shards
from lightning_tdisent.data.tars import find
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.networks.unet import UNet

SIZE, BATCH, PER_SHARD = 256, 20, 50


def photographs(folder: Path, made_up: int = 0) -> list[bytes]:
    """Return the JPEGs of a set, or generated ones of 500 x 375: smooth shapes and some grain.

    made_up: number to generate instead of reading the set; 200 are generated if there is no set.
    """
    if folder.is_dir() and not made_up:
        shards = Shards.open(folder, "train", Decoder())
        return [members["jpg"] for _, members in shards if isinstance(members, dict)]
    rng, out = np.random.default_rng(0), []
    for _ in range(made_up or 200):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = rng.normal(0, 12, (375, 500, 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        out.append(simplejpeg.encode_jpeg(pixels, quality=92))
    return out


def write(jpegs: list[bytes], folder: Path, per_shard: int = PER_SHARD) -> None:
    """Write shards of ``per_shard`` images each, with an index."""
    for number in range(0, len(jpegs), per_shard):
        with wds.TarWriter(str(folder / f"train-{number // per_shard:04d}.tar"), mtime=0) as shard:
            for key, content in enumerate(jpegs[number : number + per_shard], number):
                shard.write({"__key__": f"{key:08d}", "jpg": content, "cls": b"0"})
    build(find(folder, "train")).save(path_of(folder, "train"))


def bare(jpegs: list[bytes]) -> None:
    """Decode and resize images; do nothing else."""
    for content in jpegs:
        array = simplejpeg.decode_jpeg(content)
        while min(array.shape[:2]) >= 2 * SIZE:  # as in ADM; a plain bicubic resize gives another image
            image = Image.fromarray(array)
            even = image.width % 2 == image.height % 2 == 0
            half = (
                image.reduce(2) if even else image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
            )
            array = np.array(half)
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
        height, width = pixels.shape[-2:]
        scale = SIZE / min(height, width)
        sides = round(height * scale), round(width * scale)
        whole = interpolate(pixels, sides, mode="bicubic", antialias=True)
        top, left = (sides[0] - SIZE) // 2, (sides[1] - SIZE) // 2
        whole[0, :, top : top + SIZE, left : left + SIZE].contiguous()


def bare_batches(jpegs: list[bytes]) -> Iterator[None]:
    """Decode the same images as `ours` in the same order."""
    images = ImageSet(torch.zeros(len(jpegs), 1, 1, 1), torch.zeros(len(jpegs)), "")
    for batch in Shuffled(images, BATCH, seed=0):
        yield bare([jpegs[number] for number in batch["id"].tolist()])


def ours(order: type[Shuffled] | type[Streamed], folder: Path, verify: bool) -> Iterator[None]:
    """Read batches with the loader; every epoch is verified like a first epoch."""
    shards = Shards.open(folder, "train", Decoder(3, SIZE), Policy(verify=verify))
    batches = order(shards, BATCH, seed=0)
    for number, batch in enumerate(batches):
        assert batch["image"].shape == (BATCH, 3, SIZE, SIZE)
        if (number + 1) % len(batches) == 0:
            shards.known.zero_()
        yield


def plain(folder: Path) -> Iterator[None]:
    """Read batches with the pipeline of webdataset's documentation and ADM's crop."""

    def pixels(sample: tuple[Image.Image, int]) -> tuple[np.ndarray, int]:
        return np.asarray(adm_crop(sample[0].convert("RGB"), SIZE)).transpose(2, 0, 1), sample[1]

    urls = sorted(str(file) for file in folder.glob("*.tar"))
    data = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(100, seed=0).decode("pil")
    for images, _ in data.to_tuple("jpg", "cls").map(pixels).repeat().batched(BATCH):
        assert torch.from_numpy(np.ascontiguousarray(images)).shape == (BATCH, 3, SIZE, SIZE)
        yield


def resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    found = [line.split()[1] for line in lines("/proc/self/status") if line.startswith("VmRSS")]
    return int(found[0]) / 1024 if found else float("nan")


def memory(folder: Path) -> tuple[float, float]:
    """Return the resident memory (MB) after epochs 2 and 12."""
    batches = Shuffled(Shards.open(folder, "train", Decoder(3, SIZE)), BATCH, seed=0)
    stream = iter(batches)
    for _ in itertools.islice(stream, 2 * len(batches)):
        pass
    early = resident_mb()
    for _ in itertools.islice(stream, 10 * len(batches)):
        pass
    return early, resident_mb()


def in_memory(device: str, steps: int, n: int) -> tuple[float, float]:
    """Return the seconds to take a batch of 128 of n images 32 x 32, and of a training step of a small U-Net on it."""
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(n, dtype=torch.int64), "")
    stream = iter(Shuffled(data, 128, seed=0, device=torch.device(device)))
    module = ReducedStates(UNet([3, 32, 32], [16, 32], layers=1, mid_attention=False), LatentStates(S=8)).to(device)
    optimizer = torch.optim.AdamW(module.denoiser.parameters())
    taken: list[float] = []
    trained: list[float] = []

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(steps + 1):
        begin = now()
        batches = list(itertools.islice(stream, 20))
        taken.append((now() - begin) / 20)
        x0 = from_uint8(batches[0]["image"])
        begin = now()
        s = torch.randint(1, 9, (len(x0),), device=device)
        module.denoiser.loss(x0, s, torch.randn_like(x0), None).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.append(now() - begin)
    return median(taken[1:]), median(trained[1:])


def error(jpegs: list[bytes]) -> float:
    """Return the mean absolute difference of our crop and Pillow's over all pixels, in grey levels."""

    def gap(content: bytes) -> float:
        exact = np.asarray(adm_crop(Image.open(io.BytesIO(content)).convert("RGB"), SIZE)).transpose(2, 0, 1)
        return float(np.abs(decode_image(content, 3, SIZE, "").numpy().astype(int) - exact).mean())

    return float(np.mean([gap(content) for content in jpegs]))


def seconds(passes: dict[str, Iterator[None]], rounds: int) -> dict[str, list[float]]:
    """Return the process time of every batch of all passes; the first round is not counted."""
    out: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name in list(passes)[:: 1 if number % 2 else -1]:
            begin = time.process_time()
            next(passes[name])
            if number:
                out[name].append(time.process_time() - begin)
    return out


def main() -> None:
    """Measure and print the result line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, "fewer passes: under a minute on two cores")
    parser.add_argument("--images", type=Path, default=Path(os.environ.get("TDISENT_DATA", "data")) / "imagenet-sample")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    describe(
        "webdataset", "simplejpeg", "pillow", GPU=torch.cuda.get_device_name() if args.device == "cuda" else "none"
    )
    jpegs = photographs(args.images, of_size(args, BATCH, 0, 0))
    size = sum(map(len, jpegs)) / len(jpegs) / 1e3
    source = args.images if args.images.is_dir() and not args.toy else "a generator"
    print(f"images: {len(jpegs)} from {source}, {size:.0f} kB on average")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(jpegs, folder)
        passes = {
            "bare": bare_batches(jpegs),
            "loader": ours(Shuffled, folder, verify=True),
            "unverified": ours(Shuffled, folder, verify=False),
            "streamed": ours(Streamed, folder, verify=True),
            "webdataset": plain(folder),
        }
        found = seconds(passes, of_size(args, 2, 50, 600))
        early, late = memory(folder)
    n = of_size(args, 1_000, 50_000, 50_000)
    taken, trained = in_memory(args.device, of_size(args, 1, 2, 20), n)
    off = error(jpegs)
    rate = {name: [BATCH / value for value in values] for name, values in found.items()}
    against_bare = [a / b for a, b in zip(found["bare"], found["loader"], strict=True)]
    cost = [a / b - 1 for a, b in zip(found["loader"], found["unverified"], strict=True)]
    total = {name: sum(values) for name, values in found.items()}
    print(f"\nimages/s and core, {len(against_bare)} batches of {BATCH}, median [quartiles]; overall")
    for name, values in rate.items():
        print(f"  {name:12s} {quartiles(values)}; {BATCH * len(values) / total[name]:.1f}")
    print(
        f"loader / bare {quartiles(against_bare)}; overall {total['bare'] / total['loader']:.3f}\n"
        f"streamed / bare {total['bare'] / total['streamed']:.3f}\n"
        f"verification, share of the time {quartiles(cost)}\n"
        f"crop against Pillow's: {off:.3f} grey levels on average\n"
        f"memory: {early:.0f} MB after 2 epochs, {late:.0f} MB after 12\n"
        f"in memory, 128 of {n:,} images 32 x 32: {taken * 1e3:.3f} ms of a step of {trained * 1e3:.1f} ms"
    )
    print(
        f"\nRESULT loader_vs_decode={median(against_bare):.3f} "
        f"loader_vs_webdataset={total['webdataset'] / total['loader']:.2f} verify_cost={median(cost):.4f} "
        f"in_memory_share={taken / trained:.4f} "
        f"resize_error={off:.3f}"
    )


if __name__ == "__main__":
    main()
