"""Closed forms, what torch-fidelity and torchmetrics say of the same features, and what may never change a number."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import CASES, NEIGHBOURS, RECORDED, features

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics import distances
from lightning_tdisent.metrics.accumulators import FeatureMoments
from lightning_tdisent.metrics.distances import (
    Moments,
    frechet,
    frechet_bias,
    frechet_infinity,
    kernel_distance,
    precision_recall,
)

SAID = json.loads(RECORDED.read_text(encoding="utf-8"))["features"]


def normal(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(mean, covariance, n=10**9):
    return Moments(n, torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64))


def rotation(d, seed):
    return torch.linalg.qr(normal(d, d, seed))[0]


@pytest.mark.parametrize("case", CASES)
def test_the_distance_is_torch_fidelitys_and_torchmetrics(case):
    fake, real, _ = features(case)
    mine = frechet(Moments.of(real), Moments.of(fake))
    assert mine == pytest.approx(SAID[case]["torch_fidelity"]["fid_float64"], rel=1e-7)
    assert mine == pytest.approx(SAID[case]["torchmetrics"]["fid"], rel=1e-7)


@pytest.mark.parametrize("case", [c for c in CASES if c != "unequal_16"])
def test_the_kernel_distance_is_torch_fidelitys(case):
    fake, real, _ = features(case)
    assert kernel_distance(real, fake) == pytest.approx(SAID[case]["torch_fidelity"]["kid_all_float64"], rel=1e-12)


@pytest.mark.parametrize("k", NEIGHBOURS)
@pytest.mark.parametrize("case", CASES)
def test_precision_and_recall_are_torch_fidelitys(case, k):
    fake, real, _ = features(case)
    said = SAID[case]["torch_fidelity"][f"prc_{k}_float64"]
    mine = precision_recall(real, fake, k)
    assert (mine["precision"], mine["recall"]) == pytest.approx((said["precision"], said["recall"]), abs=1e-7)


def test_density_and_coverage_are_their_definitions():
    fake, real, _ = features("unequal_16")
    k, mine = 3, precision_recall(real, fake, 3)
    far = np.linalg.norm(real.double().numpy()[:, None] - real.double().numpy()[None], axis=2)
    reach = np.sort(far, 1)[:, k]
    inside = np.linalg.norm(real.double().numpy()[:, None] - fake.double().numpy()[None], axis=2) < reach[:, None]
    assert mine["density"] == pytest.approx(inside.sum() / (k * len(fake)))
    assert mine["coverage"] == pytest.approx(inside.any(1).mean())


def clovaai(real, fake, k):
    """Density and coverage as in the code of 2002.09797's authors, precision and recall as in that of 1904.06991's."""

    def between(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    own, other = (np.partition(between(x, x), k, axis=1)[:, k] for x in (real, fake))
    far = between(real, fake)
    return {
        "precision": (far <= own[:, None]).any(0).mean(),
        "recall": (far <= other[None]).any(1).mean(),
        "density": (far < own[:, None]).sum(0).mean() / k,
        "coverage": (far.min(1) < own).mean(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0, 10_000])
def test_ties_are_counted_as_the_authors_do(k, shift):
    draw = torch.Generator().manual_seed(k)
    real, fake = (torch.randint(0, 4, (n, 3), generator=draw).double() + shift for n in (60, 90))  # many are equal
    mine = precision_recall(real, fake, k)
    assert mine == pytest.approx(clovaai(real.numpy(), fake.numpy(), k), abs=1e-15)
    line = torch.arange(10.0)[:, None] + shift  # of itself: the neighbours at distance 1 are on the sphere, not inside
    assert precision_recall(line, line, 1) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    apart = precision_recall(line, line + 1, 1)
    assert apart == {"precision": 1, "recall": 1, "density": 0.9, "coverage": 0.9}


@pytest.mark.parametrize("deviation", [1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("ranks", [1, 3])
def test_large_means_cost_no_digits(deviation, ranks):
    d, mean = 24, 1e4
    mix = normal(d, d, 9) * deviation
    real, fake = normal(500, d) @ mix + mean, normal(400, d, 1) @ mix * 1.1 + mean + deviation
    metric = FeatureMoments(d, 400)
    parts = [FeatureMoments(d) for _ in range(ranks + 1)]  # one of them without images
    for rank, part in enumerate(parts[:ranks]):
        for batch in fake[rank::ranks].split(70):
            part.update(batch)
        part.update(batch[:0])
    metric.update(fake[:0])
    for name in ("n", "shift", "total", "outer"):  # what synchronising does
        setattr(metric, name, torch.stack([getattr(part, name) for part in parts]))
    found = frechet(Moments.of(real), metric.compute())

    def two_pass(f):
        f = f.numpy().astype(np.longdouble)
        centred = f - f.mean(0)
        return f.mean(0), (centred.T @ centred / (len(f) - 1)).astype(np.float64)

    (m1, c1), (m2, c2) = two_pass(real), two_pass(fake)
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()
    expected = float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * root)
    assert found == pytest.approx(expected, rel=1e-6)
    small = frechet(Moments.of(real - mean), Moments.of(fake - mean))
    assert found == pytest.approx(small, rel=1e-6)  # which float64 features at 1e4 allow


@pytest.mark.parametrize("d", [1, 2, 3, 17, 64])
def test_independent_gaussians_have_the_closed_form(d):
    a, b = torch.linspace(0.1, 3, d).double(), torch.linspace(2, 0.5, d).double()
    mean = torch.linspace(-1, 1, d).double()
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    turn = rotation(d, 1)  # of both: commuting covariances, the distance stays
    one = gaussian(torch.zeros(d), turn @ a.diag() @ turn.T)
    assert frechet(one, gaussian(turn @ mean, turn @ b.diag() @ turn.T)) == pytest.approx(float(expected), rel=1e-11)


def test_correlated_gaussians_have_the_closed_form_of_two_dimensions():
    # tr (C1 C2)^(1/2) of 2 x 2 matrices is sqrt(tr C1 C2 + 2 sqrt(det C1 C2))
    one, two = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    product = one @ two
    trace = (product.trace() + 2 * torch.det(product).sqrt()).sqrt()
    expected = 0.25 + one.trace() + two.trace() - 2 * trace
    found = frechet(gaussian([0.0, 0.5], one), gaussian([0.0, 0.0], two))
    assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(400, 32), (65, 64), (64, 64), (20, 64), (3000, 256)])
def test_a_set_is_at_no_distance_from_itself(n, d):
    f = normal(n, d) @ normal(d, d, 1) * torch.logspace(-4, 1, d).double()
    m = Moments.of(f)
    assert abs(frechet(m, m)) < 1e-6
    assert abs(frechet(m, Moments.of(f.flip(0)))) < 1e-6
    nothing = {"precision": 1, "recall": 1, "coverage": 1}
    assert {k: v for k, v in precision_recall(f, f, 3).items() if k != "density"} == nothing


def test_both_ways_to_the_trace_agree(monkeypatch):
    one, two = Moments.of(normal(900, 40) @ normal(40, 40, 2)), Moments.of(normal(900, 40, 3) + 0.3)
    fast = frechet(one, two)
    monkeypatch.setattr(distances, "_trace_by_cholesky", lambda *_: None)
    assert frechet(one, two) == pytest.approx(fast, rel=1e-11)


def test_features_that_are_always_zero_change_nothing():
    a, b = normal(300, 10), normal(300, 10, 1) * 2
    wide = [torch.cat([f, torch.zeros(300, 5).double()], 1) for f in (a, b)]
    assert frechet(*map(Moments.of, wide)) == pytest.approx(frechet(Moments.of(a), Moments.of(b)), rel=1e-12)


@given(st.integers(1, 6), st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
def test_the_distance_is_symmetric_and_not_negative(d, n, m, seed):
    one, two = Moments.of(normal(n, d, seed)), Moments.of(normal(m, d, seed + 1) * 3 + 1)
    assert frechet(one, two) == pytest.approx(frechet(two, one), rel=1e-9, abs=1e-9)
    assert frechet(one, two) > -1e-9


@given(st.integers(0, 2**31))
def test_no_order_changes_a_number(seed):
    real, fake = normal(60, 5, seed), normal(50, 5, seed + 1) + 0.5
    turn = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    assert kernel_distance(real, fake[turn]) == pytest.approx(kernel_distance(real, fake), rel=1e-10, abs=1e-12)
    assert precision_recall(real, fake[turn], 3) == precision_recall(real, fake, 3)
    assert frechet(Moments.of(real), Moments.of(fake[turn])) == pytest.approx(
        frechet(Moments.of(real), Moments.of(fake)), rel=1e-11
    )


def test_chunks_change_nothing(monkeypatch):
    real, fake = normal(70, 4), normal(90, 4, 1)
    whole = kernel_distance(real, fake), precision_recall(real, fake, 4)
    monkeypatch.setattr(distances, "CHUNK", 7)
    assert precision_recall(real, fake, 4) == whole[1]
    assert kernel_distance(real, fake) == pytest.approx(whole[0], rel=1e-12)


def test_the_kernel_distance_is_unbiased():
    draws = torch.tensor([kernel_distance(normal(30, 3, 2 * i), normal(40, 3, 2 * i + 1)) for i in range(400)])
    assert abs(draws.mean()) < 3 * draws.std() / 20
    assert draws.min() < 0  # as an unbiased estimate of 0 must be
    # one dimension, x ~ N(0, 1), y ~ N(m, 1): k = (xy + 1)^3, E k(x,x') + E k(y,y') - 2 E k(x,y)
    m = 0.7
    mean = lambda a, b, c: 1 + 3 * a + 3 * b + c  # noqa: E731 (E (xy)^1, ^2, ^3 of independent x, y)
    second, third = 1 + m**2, 3 * m + m**3
    expected = mean(0, 1, 0) + mean(m**2, second**2, third**2) - 2 * mean(0, second, 0)
    draws = torch.tensor([kernel_distance(normal(60, 1, 2 * i), normal(60, 1, 2 * i + 1) + m) for i in range(600)])
    assert abs(draws.mean() - expected) < 3 * draws.std() / 600**0.5


def test_precision_and_recall_of_known_mixtures():
    far = torch.tensor([100.0, 0.0]).double()
    a, b, c = normal(300, 2), normal(300, 2, 1) + far, normal(300, 2, 2) - far
    fresh = [normal(300, 2, 3), normal(300, 2, 4) + far]
    both = precision_recall(torch.cat([a, b]), torch.cat(fresh), 5)
    assert both["precision"] > 0.9
    assert both["recall"] > 0.9
    assert both["coverage"] > 0.9
    assert both["density"] == pytest.approx(1, abs=0.1)
    dropped = precision_recall(torch.cat([a, b]), normal(600, 2, 5), 5)  # one of two modes is never made
    assert dropped["precision"] > 0.9
    assert dropped["recall"] == pytest.approx(0.5, abs=0.05)
    assert dropped["coverage"] == pytest.approx(0.5, abs=0.05)
    invented = precision_recall(a, torch.cat([fresh[0], c]), 5)  # one of two modes is not real
    assert invented["precision"] == pytest.approx(0.5, abs=0.05)
    assert invented["recall"] > 0.9


@pytest.mark.parametrize(("n", "n_real", "d"), [(100, 10**6, 16), (40, 500, 64), (1000, 1000, 64), (3000, 10**5, 8)])
def test_the_bias_is_what_two_samples_of_one_distribution_are_apart(n, n_real, d):
    scale = torch.logspace(-1, 1, d).double()
    real = gaussian(torch.zeros(d), scale.square().diag())

    def two(i):
        if n_real > 10**4:
            return frechet(real, Moments.of(normal(n, d, i) * scale))
        return frechet(Moments.of(normal(n_real, d, 10**6 + i) * scale), Moments.of(normal(n, d, i) * scale))

    found = torch.tensor([two(i) for i in range(30)])
    guess = torch.tensor([frechet_bias(scale.square().diag(), n, n_real, seed) for seed in range(30)])
    error = (found.var() / 30 + guess.var() / 30).sqrt()
    assert abs(found.mean() - guess.mean()) < 4 * error + 0.01 * found.mean()


def test_the_bias_shrinks_with_the_images():
    values = [frechet_bias(torch.eye(512).double(), n, 50_000) for n in (500, 2048, 10_000, 50_000)]
    assert values == sorted(values, reverse=True)
    assert values[0] / values[2] > 15


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_extrapolated_distance_has_no_bias_and_an_honest_error(shift):
    d, n, turn = 16, 400, normal(16, 16, 9) / 4
    real = gaussian(torch.zeros(d), torch.eye(d))
    covariance = turn.T @ turn + 0.1 * torch.eye(d)
    lower = torch.linalg.cholesky(covariance)
    truth = frechet(real, gaussian(torch.full((d,), shift), covariance))
    sets = [normal(n, d, i) @ lower.T + shift for i in range(100)]
    values, errors = torch.tensor([frechet_infinity(real, f) for f in sets]).T.double()
    plain = torch.tensor([frechet(real, Moments.of(f)) for f in sets]).double()
    assert abs(values.mean() - truth) < 3 * values.std() / 10
    if shift < 1:
        assert plain.mean() - truth > 5 * plain.std() / 10  # which the plain one does have
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.2)
    inside = (abs(values - truth) < 1.96 * errors).double().mean()
    assert inside > 0.88


@pytest.mark.parametrize("classes", [1, 2, 7, 10])
def test_the_extrapolated_distance_does_not_depend_on_classes_that_come_in_turn(classes):
    """Labels are seed modulo classes: every other image would be of half of the classes alone."""
    d, n = 8, 2000
    means = 2 * normal(classes, d, 5)
    real = gaussian(means.mean(0), torch.eye(d) + (means - means.mean(0)).T @ (means - means.mean(0)) / classes)
    sets = [normal(n, d, i) + means[torch.arange(n) % classes] for i in range(30)]
    values = torch.tensor([frechet_infinity(real, f)[0] for f in sets])
    plain = torch.tensor([frechet(real, Moments.of(f)) for f in sets])
    # classes of equal shares have less bias than draws of them, by the spread of their means over n
    assert abs(values.mean()) < plain.mean() + 3 * values.std() / 30**0.5
    assert abs(values.mean()) < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments.of(normal(1, 3)), "at least two images.*got 1"),
        (lambda: kernel_distance(normal(5, 3), normal(1, 3)), "at least two images.*got 1"),
        (lambda: Moments.of(torch.full((9, 3), 2.5)), "all 9 images are the same"),
        (lambda: Moments.of(torch.zeros(9, 3)), "all 9 images are the same"),
        (
            lambda: Moments.of(torch.tensor([[1.0, 2], [3, float("nan")]])),
            "1 of 2 features are NaN or infinite.*2 images",
        ),
        (lambda: kernel_distance(normal(5, 3), torch.full((4, 3), float("inf"))), "features of 4 of 4 images are NaN"),
        (lambda: precision_recall(normal(5, 3), normal(3, 3), 3), "3 neighbours: more than 3 images.*got 3"),
        (
            lambda: frechet_infinity(Moments.of(normal(99, 3)), normal(29, 3)),
            "3 features need 30 images.*got 29",
        ),
    ],
)
def test_what_is_no_distribution_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_moments_called_as_a_function_add_up():
    features = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    metric, whole = FeatureMoments(3), FeatureMoments(3)
    for part in features.split(10):
        metric(part)
    whole.update(features)
    assert int(metric.compute().n) == 30
    assert torch.allclose(metric.compute().mean, whole.compute().mean)


@pytest.mark.parametrize("noise", [0.0, 2e-7])
def test_images_that_are_there_ten_times_have_balls_of_nothing_in_any_order(noise):
    """Radii are 0: closed balls hold the copies, open ones nothing. noise: of float32 features of one image."""
    torch.manual_seed(0)
    some = torch.randn(100, 64, dtype=torch.float64) + 30
    real = some.repeat(10, 1)
    fake = real.flip(0)
    real, fake = (x * (1 + noise * torch.rand_like(x)) for x in (real, fake))
    assert precision_recall(real, fake, 3) == {"precision": 1, "recall": 1, "density": 0, "coverage": 0}


def test_a_set_against_itself_has_the_values_of_explicit_differences():
    f = torch.randn(1500, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    distance = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
    reach = distance.kthvalue(4, dim=1).values
    density = float((distance < reach).sum()) / (3 * len(f))
    turn = torch.randperm(len(f), generator=torch.Generator().manual_seed(1))
    for fake in (f, f[turn]):
        assert precision_recall(f, fake, 3) == {"precision": 1, "recall": 1, "density": density, "coverage": 1}
