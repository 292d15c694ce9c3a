"""Numbers of conditional generation against torchmetrics, closed forms and numpy; the same over any split; errors."""

import hashlib
import math
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_tdisent.diffusion.operators import Edges, Grey, Inpainting, SuperResolution
from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.metrics import diversity
from lightning_tdisent.metrics.features import load_features
from lightning_tdisent.metrics.lpips import BACKBONES, LPIPS, load_lpips
from lightning_tdisent.metrics.network import Extracted, FeatureNetwork
from lightning_tdisent.metrics.paired import PairedQuality
from lightning_tdisent.metrics.ssim import ssim_sigma

SHAPE = (1, 12, 12)


class Means(FeatureNetwork):
    """Means of the rows' quarters: features that can be worked out by hand."""

    name, num_features = "means", 4

    def extract(self, images):
        return Extracted(images.float().mean((1, 3)).unflatten(1, (4, -1)).mean(2))


def drawn(n, seed=0, shape=SHAPE, low=0, high=256):
    return torch.randint(low, high, (n, *shape), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def observed(operator, images, item):
    return operator.observe(images.float() / 127.5 - 1, item)


def case(items=6, draws=3, operator=None, shape=SHAPE, seed=0):
    """Operator, images of all draws of all items, and what goes with them."""
    operator = operator or Inpainting(0.25, seed=3)
    item, draw = (part.flatten() for part in torch.meshgrid(torch.arange(items), torch.arange(draws), indexing="ij"))
    originals = drawn(items, seed + 1, shape)[item]
    return operator, drawn(items * draws, seed, shape), originals, observed(operator, originals, item), item, draw


def measured(operator, images, originals, observations, item, draw, network=None, **kwargs):
    quality = PairedQuality(operator, int(draw.max()) + 1, int(item.max()) + 1, network, **kwargs)
    if network is not None:
        quality.reference(originals, observations)
    quality.add(images, originals, observations, item, draw)
    return quality.compute()


# --- each number ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 16, 11), (3, 32, 32)])
def test_psnr_and_ssim_are_torchmetrics(shape):
    from torchmetrics.image import (
        PeakSignalNoiseRatio,
        StructuralSimilarityIndexMeasure,
    )  # after our package's __init__

    operator, images, originals, *rest = case(4, 2, shape=shape)
    images = (originals.int() + drawn(8, 5, shape, 0, 60).int() - 30).clamp(0, 255).to(torch.uint8)
    found = measured(operator, images, originals, *rest)
    psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3), reduction="elementwise_mean")
    ssim = StructuralSimilarityIndexMeasure(data_range=255.0)
    psnr.update(images.float(), originals.float())
    ssim.update(images.double(), originals.double())
    assert found["psnr"] == pytest.approx(float(psnr.compute()), rel=1e-6)
    assert found["ssim"] == pytest.approx(float(ssim.compute()), rel=1e-6)


def test_a_constant_offset_and_a_perfect_image_have_closed_forms():
    operator, _, _, _, item, draw = case(2, 1)
    originals = torch.full((2, *SHAPE), 100, dtype=torch.uint8)
    images = originals + torch.tensor([0, 20], dtype=torch.uint8)[:, None, None, None]
    found = measured(operator, images, originals, observed(operator, originals, item), item, draw)
    assert found["psnr"] == pytest.approx((100 + 20 * np.log10(255 / 20)) / 2, rel=1e-12)  # the mean of decibels
    c1 = 2.55**2
    assert found["ssim"] == pytest.approx((1 + (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)) / 2, rel=1e-9)


@pytest.mark.parametrize(("side", "window"), [(64, 11), (11, 11), (10, 9), (8, 7), (5, 5), (4, 3), (2, 1), (1, 1)])
def test_windows_of_small_images_fit_them(side, window):
    assert int(3.5 * ssim_sigma(side) + 0.5) * 2 + 1 == window
    assert (ssim_sigma(side) == 1.5) == (side >= 11)
    shape = (1, max(side, 2), side + 3)
    operator, images, *rest = case(2, 2, Edges(), shape)
    assert measured(operator, images, *rest)["ssim"] < 0.9
    assert measured(operator, rest[0], *rest)["ssim"] == pytest.approx(1)


def test_ssim_of_digits_is_torchmetrics_in_a_window_of_seven():
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    operator, images, originals, *rest = case(3, 2, shape=(1, 8, 8))
    ssim = StructuralSimilarityIndexMeasure(data_range=255.0, sigma=3 / 3.5)
    ssim.update(images.double(), originals.double())
    assert measured(operator, images, originals, *rest)["ssim"] == pytest.approx(float(ssim.compute()), rel=1e-6)


def test_images_that_agree_with_their_observation_are_consistent():
    operator, images, originals, observations, item, draw = case(20)
    seen = operator.kernel(list(SHAPE), item).bool()
    found = measured(operator, torch.where(seen, originals, images), originals, observations, item, draw)
    assert found["consistency"] < 1e-5
    assert found["diversity"] > 1
    wrong = operator.kernel(list(SHAPE), (item + 1) % 20).bool()  # of another item's mask
    assert (
        measured(operator, torch.where(wrong, originals, images), originals, observations, item, draw)["consistency"]
        > 10
    )


@pytest.mark.parametrize("operator", [SuperResolution(4), Inpainting(0.25)])
def test_images_that_do_not_agree_have_a_known_inconsistency(operator):
    operator, _, originals, _, item, draw = case(4, 3, operator)
    originals = originals // 2
    observations = observed(operator, originals, item)
    offset = torch.tensor([0, 3, 12])[draw][:, None, None, None]
    found = measured(operator, (originals + offset).to(torch.uint8), originals, observations, item, draw)
    share = 1.0 if isinstance(operator, SuperResolution) else 0.75  # of the image that is seen
    assert found["consistency"] == pytest.approx((share * (0 + 9 + 144) / 3) ** 0.5, rel=1e-5)  # a root over all images


def test_the_stored_observation_is_what_counts():
    operator, _, originals, observations, item, draw = case(50, 1, SuperResolution(2))
    stored = ((observations + 1) * 127.5).round() / 127.5 - 1
    found = measured(operator, originals, originals, stored, item, draw)
    assert found["consistency"] == pytest.approx(
        float(((observations - stored) * 127.5).square().mean().sqrt()), rel=1e-4
    )
    assert 0.2 < found["consistency"] < 0.4


def test_diversity_is_the_deviation_over_draws():
    operator, images, *rest = case(5, 4)
    deviation = images.view(5, 4, *SHAPE).double().std(1, unbiased=False)
    assert measured(operator, images, *rest)["diversity"] == pytest.approx(float(deviation.mean()), rel=1e-12)


def test_diversity_of_two_constants_and_of_a_gaussian():
    operator, _, originals, observations, item, draw = case(4, 2)
    two = torch.where(draw == 0, 90, 110)[:, None, None, None].expand(-1, *SHAPE).to(torch.uint8)
    found = measured(operator, two, originals, observations, item, draw)
    assert found["diversity"] == pytest.approx(10, rel=1e-12)  # whatever differs between items
    operator, _, originals, observations, item, draw = case(100, 4)
    noise = torch.randn(400, *SHAPE, generator=torch.Generator().manual_seed(0))
    images = (128 + 8 * noise + 60 * (item % 2)[:, None, None, None]).clamp(0, 255).round().to(torch.uint8)
    found = measured(operator, images, originals, observations, item, draw)
    chi = 2**0.5 * math.gamma(2) / math.gamma(1.5)  # of 3 degrees of freedom, on average
    assert found["diversity"] == pytest.approx((64 + 1 / 12) ** 0.5 * chi / 4**0.5, rel=0.01)  # 1/12 is of the rounding


def test_one_draw_has_no_diversity_and_no_network_no_distance():
    assert list(measured(*case(4, 1))) == ["psnr", "ssim", "consistency"]
    assert list(measured(*case(30, 2), network=Means())) == ["psnr", "ssim", "consistency", "diversity", "jfd_means"]


def test_the_distance_is_named_after_its_features():
    network = Means()
    network.name = "inception"
    assert "jfid" in measured(*case(30, 1), network=network)
    assert "jfd_digits" in measured(*case(200, 1, shape=(1, 8, 8)), network=load_features("digits"))


def numpys(real, fake):
    m, c = zip(*((x.mean(0), np.cov(x.T)) for x in (real, fake)), strict=True)
    root = np.sqrt(np.linalg.eigvals(c[0] @ c[1]).astype(complex)).real.sum()
    return float(((m[0] - m[1]) ** 2).sum() + np.trace(c[0]) + np.trace(c[1]) - 2 * root)


def pairs(images, shown):
    return np.concatenate([Means().extract(x).features.double().numpy() for x in (shown, images)], 1)


def test_the_joint_distance_is_numpys():
    operator, images, originals, observations, item, draw = case(100, 2)
    shown = ((observations + 1) * 127.5).round().to(torch.uint8)
    found = measured(operator, images // 2, originals, observations, item, draw, network=Means())
    expected = numpys(pairs(originals, shown), pairs(images // 2, shown))
    assert found["jfd_means"] == pytest.approx(expected, rel=1e-9)
    assert abs(measured(operator, originals, originals, observations, item, draw, network=Means())["jfd_means"]) < 1e-6


def test_the_joint_distance_sees_what_the_marginals_do_not():
    operator, _, originals, observations, item, draw = case(200, 1)
    apart = originals.roll(1, 0)  # the same images, each beside another's observation
    assert abs(numpys(pairs(originals, originals)[:, 4:], pairs(apart, apart)[:, 4:])) < 1e-9
    assert measured(operator, apart, originals, observations, item, draw, network=Means())["jfd_means"] > 10


class Channels(Means):
    def __init__(self, channels):
        super().__init__()
        self.shape, self.shown = [channels, 12, 12], []

    def extract(self, images):
        self.shown.append(images)
        return super().extract(images)


class Coloured(Edges):
    """Three channels of grey images: each another shade."""

    def channels(self, channels):
        return 3

    def observe(self, x0, item):
        return torch.cat([x0, x0 / 2, -x0], 1)


def test_observations_are_shown_with_the_channels_of_images():
    operator, images, originals, observations, *rest = case(20, 1, Grey(), (3, 12, 12))
    network = Channels(3)
    measured(operator, images, originals, observations, *rest, network=network)
    grey = ((observations + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(network.shown[0], grey[:16].expand(-1, 3, -1, -1))
    operator, images, originals, observations, *rest = case(20, 1, Coloured())
    network = Channels(1)
    measured(operator, images, originals, observations, *rest, network=network)
    mean = ((originals.double() / 127.5 - 1) / 6 + 1) * 127.5
    assert (network.shown[0] - mean[:16]).abs().max() <= 0.501


def test_a_perceptual_distance_is_averaged_over_images():
    def distance(images, originals):
        assert images.dtype == originals.dtype == torch.uint8
        return (images.float() - originals.float()).abs().amax((1, 2, 3))[:, None, None, None]  # as lpips has it

    operator, images, originals, *rest = case()
    expected = (images.int() - originals.int()).abs().amax((1, 2, 3)).double().mean()
    found = measured(operator, images, originals, *rest, further=[LPIPS(distance)])
    assert found["lpips"] == pytest.approx(float(expected))


# --- any split ------------------------------------------------------------------------------------------------------


def filled(batches, n_items=6, draws=3, real=None):
    quality = PairedQuality(Inpainting(0.25, seed=3), draws, n_items, Means())
    for part in real or []:
        quality.reference(*part)
    for part in batches:
        quality.add(*part)
    return quality


def batches_of(parts, order, size):
    return [tuple(part[rows] for part in parts) for rows in order.split(size)]


def test_order_and_batches_change_nothing():
    _, *parts = case()
    real = [(parts[1], parts[2])]
    whole = filled([parts], real=real).compute()
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    for size in (1, 5, 18):
        again = filled(batches_of(parts, order, size), real=batches_of(parts[1:3], order, size)).compute()
        assert again == pytest.approx(whole, rel=1e-11)
        assert again["diversity"] == whole["diversity"]  # sums of integers


def test_draws_split_over_two_metrics_and_merged_are_the_same():
    _, *parts = case()
    whole = filled([parts], real=[(parts[1], parts[2])]).compute()
    rows = torch.arange(18)
    one, two = (
        filled(batches_of(parts, rows[r::2], 4), real=batches_of(parts[1:3], rows[r::2], 4)) for r in range(2)
    )  # draws 0 and 2 of an item here, draw 1 there
    assert set(one.states) == set(two.states) == {"images", "draws", "real", "pairs"}
    for name, state in one.states.items():
        state.merge_state(two.states[name])
    assert one.compute() == pytest.approx(whole, rel=1e-11)


def rank_of_two(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    _, *parts = case()
    said = []
    for rows in ([range(18), range(0)], [range(0, 18, 2), range(1, 18, 2)], [range(17), range(0)]):
        mine = torch.tensor(list(rows[rank]), dtype=torch.int64)
        batches = batches_of(parts, mine, 5) if len(mine) else []
        quality = filled(batches, real=[b[1:3] for b in batches])
        try:
            said.append(quality.compute())
        except InputError as error:
            said.append(str(error))
    quality = filled(batches_of(parts, torch.arange(18)[rank::2], 5))
    with pytest.raises(InputError, match="jfd: at least two images"):
        quality.compute()
    quality.reference(*(part[rank::2] for part in parts[1:3]))  # and then it goes on
    said.append(quality.compute())
    quality = PairedQuality(Edges(), 1, 9, None)
    side = 12 + rank
    quality.reference(drawn(1, shape=(1, side, side)), torch.zeros(1, 1, side, side))
    with pytest.raises(InputError, match=r"must have one shape, ranks have \(1, 12, 12\) and \(1, 13, 13\)"):
        quality.compute()
    queue.put((rank, said))
    dist.destroy_process_group()


def test_two_ranks_have_the_same_numbers_also_if_one_has_no_image(tmp_path):
    context = mp.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=rank_of_two, args=(r, tmp_path, queue)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert found[0] == found[1]
    _, *parts = case()
    whole = filled([parts], real=[(parts[1], parts[2])]).compute()
    assert found[0][0] == pytest.approx(whole, rel=1e-11)
    assert found[0][1] == found[0][3] == pytest.approx(whole, rel=1e-11)
    assert found[0][2].startswith("17 images were measured, expected 18 (6 items of 3 draws): draw 2 of item 5 was")


def test_what_is_forgotten_and_what_is_kept():
    _, *parts = case()
    quality = filled([parts], real=[(parts[1], parts[2])]).to("cpu")
    whole = quality.compute()
    quality.add(*parts)
    with pytest.raises(InputError, match="36 images were measured"):
        quality.compute()
    quality.reset()
    quality.add(*(part[:0] for part in parts))
    quality.add(*parts)
    assert quality.compute() == whole


# --- errors ---------------------------------------------------------------------------------------------------------


def changed(**given):
    operator, images, originals, observations, item, draw = case()
    parts = {"images": images, "originals": originals, "observations": observations, "item": item, "draw": draw}
    parts |= {k: change(parts[k]) for k, change in given.items()}
    quality = PairedQuality(operator, 3, 6, None)
    quality.add(**parts)
    return quality.compute()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"images": lambda x: x.float()},
            r"images: expected uint8 \(B, C, H, W\), 0 to 255, got torch.float32 .* from 0 to 255",
        ),
        ({"images": lambda x: x[0]}, r"images: expected uint8 \(B, C, H, W\).*got torch.uint8 \(1, 12, 12\)"),
        ({"originals": lambda x: x.float()}, r"originals: expected uint8 \(18, 1, 12, 12\).*torch.float32"),
        ({"originals": lambda x: x[:5]}, r"originals: expected uint8 \(18, 1, 12, 12\).*\(5, 1, 12, 12\)"),
        ({"originals": lambda x: x[..., :11]}, r"originals: .*\(18, 1, 12, 11\)"),
        (
            {"observations": lambda y: y[:, :, :11]},
            r"observations: .* floats \(18, 1, 12, 12\), got .*\(18, 1, 11, 12\)",
        ),
        ({"observations": lambda y: y.expand(-1, 3, -1, -1)}, r"observations: expected floats.*\(18, 3, 12, 12\)"),
        ({"observations": lambda y: (y * 127.5 + 127.5).to(torch.uint8)}, "observations: .* floats .*torch.uint8"),
        ({"observations": lambda y: y * 2}, r"observations: expected finite values in \[-1, 1\], got .* from -2 to 2"),
        ({"observations": lambda y: y / 0}, r"observations: expected finite values .* from nan to nan"),
        ({"item": lambda i: i + 1}, "item: expected numbers from 0 to 5, got 6"),
        ({"item": lambda i: i - 1}, "item: expected numbers from 0 to 5, got -1"),
        ({"draw": lambda d: d + 1}, "draw: expected numbers from 0 to 2, got 3"),
        ({"item": lambda i: i.float()}, r"item: expected an int64 number for each of 18 images, got torch.float32"),
        ({"draw": lambda d: d[:4]}, r"draw: expected an int64 number for each of 18 images, got torch.int64 \(4,\)"),
        (
            {"draw": lambda d: d * 0},
            r"18 images were measured, expected 18 \(6 items of 3 draws\): draw 0 of item 0 was added 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        changed(**given)


def test_the_mask_of_another_item_is_refused_by_name():
    operator, images, originals, observations, item, draw = case(6, 1)
    item[[2, 4]] = item[[4, 2]]
    with pytest.raises(
        InputError, match=r"observation of item 4 differs by up to .*Inpainting.*mask .*of another item"
    ) as e:
        measured(operator, images[:3], originals[:3], observations[:3], item[:3], draw[:3])
    off = (observed(operator, originals[2:3], torch.tensor([4])) - observations[2]).abs().max()
    assert f"up to {float(off):.3g} from" in str(e.value)
    with pytest.raises(InputError, match="of another seed"):
        measured(Inpainting(0.25, seed=4), images, originals, observations, torch.arange(6), draw)


@pytest.mark.parametrize(("off", "fits"), [(1 / 127.5, True), (0.5 / 127.5, True), (1.2 / 127.5, False)])
def test_observations_may_be_rounded(off, fits):
    operator, images, originals, observations, item, draw = case(4, 1)
    observations = (observations + off).clamp(-1, 1)
    if fits:
        measured(operator, images, originals, observations, item, draw)
    else:
        with pytest.raises(InputError, match=r"differs by up to 0.00941 .*rounding by 0.00884 at most"):
            measured(operator, images, originals, observations, item, draw)


def test_images_of_another_shape_than_the_first_are_refused():
    quality = PairedQuality(Edges(), 1, 4, Means())
    quality.reference(drawn(4), torch.zeros(4, 1, 12, 12))
    with pytest.raises(InputError, match=r"first had the shape \[1, 12, 12\], got \[1, 16, 12\]"):
        quality.reference(drawn(4, shape=(1, 16, 12)), torch.zeros(4, 1, 16, 12))
    with pytest.raises(InputError, match="12x10 is not divisible by factor 4"):
        PairedQuality(SuperResolution(4), 1, 4, None).reference(drawn(1, shape=(1, 12, 10)), torch.zeros(1, 1, 12, 10))


def test_sums_that_do_not_fit_are_refused_with_numbers(monkeypatch):
    operator, *parts = case()
    monkeypatch.setattr(diversity, "LIMIT", 16 * 6 * 144 - 1)
    with pytest.raises(InputError, match=r"sums of 6 items of \[1, 12, 12\] are 1.29e-05 GiB, at most 1.29e-05"):
        measured(operator, *parts)
    monkeypatch.setattr(diversity, "LIMIT", 16 * 6 * 144)
    assert "diversity" in measured(operator, *parts)
    with pytest.raises(InputError, match=r"20,000 items of \[3, 256, 256\] are 58.6 GiB"):
        PairedQuality(operator, 2, 20_000, None).reference(drawn(1, shape=(3, 256, 256)), torch.zeros(1, 3, 256, 256))
    PairedQuality(operator, 1, 20_000, None).reference(drawn(1, shape=(3, 256, 256)), torch.zeros(1, 3, 256, 256))


def test_no_distribution_no_items_no_image_are_refused():
    operator, *parts = case()
    with pytest.raises(InputError, match=r"draws, items: at least 1 of each, got 0 and 3"):
        PairedQuality(operator, 0, 3, None)
    with pytest.raises(
        InputError, match=r"0 images were measured, expected 18 \(6 items of 3 draws\): draw 0 of item 0 was added 0"
    ):
        PairedQuality(operator, 3, 6, None).compute()
    quality = filled([parts])
    with pytest.raises(InputError, match=r"jfd: at least two images are required, got 0; real pairs .*reference"):
        quality.compute()
    quality.reference(parts[1], parts[2])  # and then it goes on
    assert "jfd_means" in quality.compute()


# --- LPIPS ----------------------------------------------------------------------------------------------------------


class FakeLPIPS(nn.Module):
    """The shape of the package's module, with one convolution whose number in torchvision is 3."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert pnet_rand  # else it would download
        assert not verbose
        self.net = nn.Module()
        self.net.slice1 = nn.Sequential()
        self.net.slice1.add_module("3", nn.Conv2d(3, 1, 1))

    def forward(self, one, other):
        assert one.shape[1] == 3
        assert float(other.min()) == -1
        layer = self.net.slice1[0]
        return (layer(one) - layer(other)).mean((1, 2, 3), keepdim=True)


def test_lpips_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(Unavailable, match=r"lpips: cannot be imported .*pip install lpips, which brings a torchvision"):
        load_lpips()
    with pytest.raises(InputError, match="no net 'squeeze'; choose from alex, vgg"):
        load_lpips(net="squeeze")


def test_lpips_reads_a_file_that_is_there_and_downloads_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"no file .*checkpoints/alexnet-owt-7be5be79.pth. Get https://download.py"):
        load_lpips()
    with pytest.raises(Unavailable, match=f"no file {tmp_path}/x.pth. Get .*vgg16-397923af.pth"):
        load_lpips(tmp_path / "x.pth", "vgg")
    weights = {
        "features.3.weight": torch.full((1, 3, 1, 1), 2.0),
        "features.3.bias": torch.zeros(1),
        "other": torch.ones(1),
    }
    torch.save(weights, file := tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth has SHA-256 .*, expected 7be5be79..: it is another file"):
        load_lpips(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(BACKBONES, "alex", (f"alexnet-{digest}.pth", 12))
    lpips = load_lpips(file)
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not lpips.train(False).training
    images = torch.full((6, *SHAPE), 51, dtype=torch.uint8)
    operator, _, originals, _, item, draw = case(6, 1)
    originals = originals * 0
    observations = observed(operator, originals, item)
    found = measured(operator, images, originals, observations, item, draw, further=[LPIPS(lpips)])
    assert found["lpips"] == pytest.approx(3 * 2 * 51 / 127.5, rel=1e-6)
    with pytest.raises(InputError, match=r"alex takes 1 or 3 channels and at least 12 pixels a side, got \(1, 8, 8\)"):
        lpips(images[..., :8, :8], images[..., :8, :8])
