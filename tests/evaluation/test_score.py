"""Images of seeds and their numbers: the same for any ranks and batches; real images from shards and files."""

import gzip
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.distributed import shared_errors
from lightning_tdisent.errors import InputError, NotFinite
from lightning_tdisent.evaluation.pictures import save_png
from lightning_tdisent.evaluation.real_images import RealImages, image_files, real_images
from lightning_tdisent.evaluation.score import compute, open_quality, score
from lightning_tdisent.metrics.accumulators import FeatureMoments
from lightning_tdisent.metrics.distances import Moments
from lightning_tdisent.metrics.features import load_features
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sample import block_size, sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral

N = 50
METRICS = ("fd", "is", "kid", "prdc")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def denoiser(unet, states):
    return Denoiser(unet(), V(), states).eval()


def digit_quality(digits, n=N, **changes):
    real = real_images(digits, "train", 1)
    protocol = Protocol.preset("digits", **{"n": n, "metrics": METRICS, "first_seed": 7, **changes})
    return open_quality(protocol, load_features("digits"), real, [1, 8, 8])


@pytest.mark.parametrize("sampler", [DDIM(), Ancestral()])
def test_images_are_bitwise_the_same_in_any_batch(denoiser, sampler):
    seeds, seen = range(3, 67), set()
    denoiser.network.register_forward_pre_hook(lambda _, inputs: seen.add(len(inputs[0])))
    whole = torch.cat(list(sample(denoiser, sampler, seeds)))
    for size in (1, 7, 64):
        assert torch.equal(torch.cat(list(sample(denoiser, sampler, seeds, size))), whole)
    one_by_one = torch.cat([torch.cat(list(sample(denoiser, sampler, [seed]))) for seed in seeds[:20]])
    assert torch.equal(one_by_one, whole[:20])
    shares = [torch.cat(list(sample(denoiser, sampler, seeds[r::4]))) for r in range(4)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)
    assert seen == {block_size([1, 8, 8])}  # which is why: kernels round otherwise for other numbers of images


def counted(name, calls):
    inner = getattr(dist, name)

    def call(*args, **options):
        calls.append(name)
        return inner(*args, **options)

    return call


def share(rank, world, batch, denoiser, digits, folder):
    os.environ["TDISENT_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store_{world}", rank=rank, world_size=world)
    calls = []
    for name in ("all_gather", "all_gather_object", "barrier", "all_reduce", "broadcast"):
        setattr(dist, name, counted(name, calls))
    quality = digit_quality(digits)
    scored = score(denoiser, DDIM(), quality, batch, keep=9, progress=lambda n: calls.append(n))
    sums = quality.accumulators[FeatureMoments, "features", "{}"]
    state = {k: getattr(sums, k) for k in ("n", "shift", "total", "outer")}
    steps = [i for i, c in enumerate(calls) if isinstance(c, float)]
    quiet = all(isinstance(c, float) for c in calls[steps[0] : steps[-1] + 1])
    kept = {
        "numbers": scored.numbers,
        "images": scored.images,
        "generated": round(sum(c for c in calls if isinstance(c, float)), 6),
    }
    torch.save((scored.values, state, kept, quiet), folder / f"{world}_{batch}_{rank}.pt")
    dist.destroy_process_group()


def test_sums_and_numbers_are_the_same_for_any_ranks_and_batches(denoiser, digits, cache):
    context, found = mp.get_context("fork"), {}
    for world, batch in ((1, 64), (1, 1), (2, 64), (4, 1)):
        args = [(r, world, batch, denoiser, digits, cache) for r in range(world)]
        processes = [context.Process(target=share, args=a) for a in args]
        for p in processes:
            p.start()
        for p in processes:
            p.join(120)
        assert [p.exitcode for p in processes] == [0] * world
        (cache / f"store_{world}").unlink(missing_ok=True)
        parts = [torch.load(cache / f"{world}_{batch}_{r}.pt", weights_only=True) for r in range(world)]
        assert all(values == parts[0][0] for values, *_ in parts)  # every rank has the numbers of all
        assert all(quiet for *_, quiet in parts)  # and nobody waited for another while images were made
        stacked = (torch.stack([state[k] for _, state, *_ in parts]) for k in ("n", "shift", "total", "outer"))
        sums = Moments.of_sums(*stacked)
        assert sums.n == N == sum(kept["generated"] for _, _, kept, _ in parts)
        order = torch.cat([kept["numbers"] for _, _, kept, _ in parts]).argsort()
        found[world, batch] = parts[0][0], sums, torch.cat([kept["images"] for _, _, kept, _ in parts])[order]
    values, sums, images = found[1, 64]
    assert len(values) == 8
    assert len(images) == 9
    for other, other_sums, other_images in found.values():
        assert other == pytest.approx(values, rel=1e-9)
        assert torch.equal(other_images, images)
        torch.testing.assert_close(other_sums.mean, sums.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other_sums.covariance, sums.covariance, rtol=1e-9, atol=1e-12)


def test_a_score_is_that_of_its_images(denoiser, digits, cache):
    quality = digit_quality(digits)
    scored = score(denoiser, DDIM(), quality, keep=N)
    assert torch.equal(scored.images, torch.cat(list(sample(denoiser, DDIM(), range(7, 7 + N)))))
    assert scored.seconds > 0
    quality.reset()
    quality.add(scored.images, torch.arange(N))
    assert quality.compute() == pytest.approx(scored.values, rel=1e-12)
    other = score(denoiser, DDIM(), digit_quality(digits, first_seed=1000)).values
    assert other["fd_digits"] != scored.values["fd_digits"]


def test_a_score_that_cannot_be_says_why(denoiser, digits, cache):
    for p in denoiser.parameters():
        p.data.fill_(float("nan"))
    scored = score(denoiser, DDIM(), digit_quality(digits))
    assert isinstance(scored.values, NotFinite)
    assert "for 50 of 50 images, seeds 7, 8, 9, 10, 11, .." in str(scored.values)
    assert (len(scored.numbers), len(scored.images)) == (0, 0)


class Spoilt(torch.nn.Module):
    """x0_hat = 0, but NaN on one rank."""

    classes, shape = None, [1, 8, 8]

    def __init__(self, states, rank):
        super().__init__()
        self.states, self.rank, self.weight = states, rank, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, s, label=None):
        return torch.full_like(x, float("nan") if dist.get_rank() == self.rank else 0.0)


def spoilt(rank, states, digits, folder):
    torch.set_num_threads(1)
    os.environ["TDISENT_CACHE"] = str(folder / "cache")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    quality = digit_quality(digits, n=20, metrics=("fd",))
    one = score(Spoilt(states, 1), DDIM(), quality, keep=9)
    other = score(Spoilt(states, 2), DDIM(), quality, keep=9)  # the next model is measured as ever
    torch.save([str(one.values), len(one.images), str(other.values), len(other.images)], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_images_that_are_not_finite_on_one_rank_are_refused_on_all(states, digits, cache):
    processes = [mp.get_context("fork").Process(target=spoilt, args=(r, states, digits, cache)) for r in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(100)
    assert [p.exitcode for p in processes] == [0, 0]
    one, two = (torch.load(cache / f"{r}.pt", weights_only=True) for r in range(2))
    assert one[:2] == two[:2]
    assert "for 10 of 10 images, seeds 8, 10, 12, 14, 16, .." in one[0]
    assert one[1] == 0
    assert one[2] == two[2] == "all 20 images are the same to the feature network: images or network are constant"
    assert one[3] + two[3] == 9


def test_real_images_are_decoded_when_they_are_taken(digits):
    real, whole = real_images(digits, "test", 1), load(digits, "test", 1)
    numbers = torch.tensor([5, 0, 296, 17] + list(range(100)))
    assert (real.n, real.digest) == (297, whole.digest)
    assert torch.equal(real.take(numbers), whole.images[numbers])


def test_image_files_are_taken_in_the_order_of_their_names(tmp_path, digits):
    images = load(digits, "test", 1).images[:12]
    for k, image in enumerate(images):
        save_png(image, tmp_path / "pictures" / f"{k:06d}.png")
    found = image_files(tmp_path / "pictures", "train", [1, 8, 8])
    assert found.n == 12
    assert torch.equal(found.take(torch.tensor([3, 1, 11])), images[[3, 1, 11]])
    assert torch.equal(image_files(digits, "test", [1, 8, 8]).take(torch.arange(12)), images)  # shards, too
    with pytest.raises(InputError, match="does not exist"):
        image_files(tmp_path / "nothing", "train", [1, 8, 8])


@pytest.mark.parametrize("form", ["png", "bmp", "tiff", "gif", "ppm", "webp"])
def test_image_files_are_of_any_format_and_in_any_folders(form, tmp_path):
    """In folders as EDM's generate.py --subdirs makes them, which are no classes; with one image beside them."""
    names = ["000000/000001", "001000/001000", "cover"]
    for k, name in enumerate(names):
        file = tmp_path / f"{name}.{form}"
        file.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 10 * k).save(file, **({"lossless": True} if form == "webp" else {}))
    found = image_files(tmp_path, "train", [1, 8, 8])
    assert found.take(torch.arange(3))[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_gzipped_shards_are_read_by_one_thread(tmp_path, digits):
    zipped = tmp_path / "test-0000.tar.gz"
    zipped.write_bytes(gzip.compress((digits / "test-0000.tar").read_bytes()))
    found = image_files(tmp_path, "test", [1, 8, 8])
    assert torch.equal(found.take(torch.arange(297)), load(digits, "test", 1).images)


def test_image_files_of_another_size_are_named(tmp_path):
    for k, side in enumerate((8, 8, 6)):
        save_png(torch.zeros(1, side, 8, dtype=torch.uint8), tmp_path / f"{k}.png")
    found = image_files(tmp_path, "train", [1, 8, 8])
    with pytest.raises(InputError, match=r"2.png is an image of \[1, 6, 8\], the real ones are \[1, 8, 8\]"):
        found.take(torch.arange(3))
    with pytest.raises(InputError, match=r"0.png is an image of \[1, 8, 8\], the real ones are \[1, 9, 9\]"):
        image_files(tmp_path, "train", [1, 9, 9])


def test_images_of_another_shape_are_refused(digits, cache):
    real = real_images(digits, "train", 1)
    with pytest.raises(InputError, match=r"features 'mnist' take images of \[1, 28, 28\], these are \[1, 8, 8\]"):
        open_quality(Protocol.preset("mnist"), load_features("mnist"), real, [1, 8, 8])


def test_a_second_quality_asks_for_no_real_image(digits, cache):
    digit_quality(digits)
    real = real_images(digits, "train", 1)
    never = RealImages(real.digest, real.n, lambda numbers: 1 / 0)
    protocol = Protocol.preset("digits", n=20, metrics=METRICS, first_seed=7)  # another n: the same statistics
    assert open_quality(protocol, load_features("digits"), never, [1, 8, 8]).reference.moments.n == 1500


def refused(rank, digits, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    said = []
    try:
        with shared_errors():
            if rank == 1:
                raise InputError("a picture of rank 1")
    except InputError as error:
        said.append(str(error))
    quality = digit_quality(digits, n=30, metrics=("kid",))
    images = load(digits, "test", 1).images
    for wanted in (20, 30):  # the first time too few
        mine = torch.arange(wanted)[rank::2]
        quality.reset()
        quality.add(images[mine], mine)
        found = compute(quality)
        said.append(str(found) if isinstance(found, InputError) else found)
    torch.save(said, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_refusal_on_one_rank_reaches_all_and_costs_nothing_after_it(digits, cache):
    processes = [mp.get_context("fork").Process(target=refused, args=(r, digits, cache)) for r in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(100)
    assert [p.exitcode for p in processes] == [0, 0]
    one, two = (torch.load(cache / f"{r}.pt", weights_only=True) for r in range(2))
    assert one == two
    assert one[:2] == ["a picture of rank 1", "20 images were measured, the protocol says 30"]
    quality = digit_quality(digits, n=30, metrics=("kid",))
    quality.add(load(digits, "test", 1).images[:30], torch.arange(30))
    assert one[2] == pytest.approx(quality.compute(), rel=1e-9)
