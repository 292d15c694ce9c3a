import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.budget import Budget, effects, fit_curve, grant, value
from lightning_tdisent.sampling.sampler import DDIM


def rows_of(S):
    return LatentStates(S=S).log_snr[1:, 0].tolist()


def blocks_of(S, experts):
    L, cut = rows_of(S), [round(k * S / experts) for k in range(experts + 1)]
    return [L[a:b] for a, b in pairwise(cut)]


@settings(max_examples=60, deadline=None)
@given(
    S=st.integers(1, 40), share=st.floats(0, 1), batch=st.integers(1, 64), more=st.integers(0, 5000),
    rule=st.sampled_from(["uniform", "taper", "snr", "adaptive"]), least=st.floats(0, 1), end=st.floats(0, 1),
)  # fmt: skip
def test_a_budget_is_spent_to_the_last_batch_and_every_expert_gets_images(S, share, batch, more, rule, least, end):
    experts = max(1, round(share * S))
    images = 2 * experts * batch + more
    budget = Budget(images, rule, least, end)
    out = budget.split(images, batch, blocks_of(S, experts))
    spent = images // 2 if rule == "adaptive" else images
    assert sum(out) == spent // batch * batch
    assert all(n % batch == 0 and n >= batch for n in out)
    assert min(out) >= int(least * (spent // batch) / experts) * batch


@given(
    costs=st.lists(st.floats(0.01, 1), min_size=2, max_size=12),
    rule=st.sampled_from(["uniform", "taper", "snr"]),
    images=st.integers(2_000, 100_000),
    least=st.sampled_from([0, 0.125, 1]),
)
def test_images_of_different_costs_do_not_exceed_the_budget(costs, rule, images, least):
    blocks = blocks_of(len(costs), len(costs))
    found = Budget(images, rule, least=least).split(images, 8, blocks, costs)
    spent = sum(n * c for n, c in zip(found, costs, strict=True))
    assert images - 8 * len(costs) < spent <= images * (1 + 1e-9)
    if rule == "uniform":
        assert max(found) - min(found) <= 8


def test_the_rules_split_images_by_their_formulas():
    L = rows_of(8)
    one_each = [[x] for x in L]
    assert Budget(8000).split(8000, 10, one_each) == [1000] * 8
    taper = Budget(9000, "taper", least=0, end=0.125).split(9000, 1, one_each)
    assert taper == [round(2000 * (1 - 0.125 * k)) for k in range(8)]
    snr = Budget(10**6, "snr", least=0).split(10**6, 1, one_each)
    a = LatentStates(S=8).a[1:, 0].numpy()
    assert np.allclose(snr, 1e6 * a / a.sum(), atol=1)
    assert Budget(700, "explicit", shares=(4, 2, 1), least=0).split(700, 10, one_each[:3]) == [400, 200, 100]
    assert Budget(900, least=0).split(900, 10, [L[:2], L[2:3]]) == [600, 300]  # rows count equally


def test_experts_at_the_minimum_leave_the_others_in_proportion():
    out = Budget(1000, "explicit", shares=(6, 3, 0, 0), least=0.5).split(1000, 1, [[1.0], [0.0], [-1.0], [-2.0]])
    assert out == [500, 250, 125, 125]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"images": 0}, "images: expected the images of all jobs, an integer of at least 1, got 0"),
        ({"images": 10, "rule": "tapir"}, "rule: unknown 'tapir'. Did you mean 'taper'"),
        ({"images": 10, "rul": "taper"}, "unknown key 'rul'. Did you mean 'rule'"),
        ({"rule": "taper"}, "expected a number of images, or a mapping"),
        ({"images": 10, "least": 2}, r"budget.least: must lie in \[0, 1\], got 2"),
        ({"images": 10, "rule": "explicit"}, "shares: give one number per expert with the rule explicit"),
        ({"images": 10, "shares": [1]}, "shares: give one number per expert with the rule explicit"),
    ],
)
def test_a_wrong_budget_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        Budget.of(data, "budget")


def test_a_budget_too_small_for_a_batch_each_is_refused():
    with pytest.raises(InputError, match="less than a batch of 64 for each of the 8"):
        Budget(500).split(500, 64, [[x] for x in rows_of(8)])
    with pytest.raises(InputError, match="3 numbers >= 0, one per expert"):
        Budget(100, "explicit", shares=(1, 2)).split(100, 1, [[1.0], [0.0], [-1.0]])


class Gaussian:
    """The exact denoiser of N(0, diag(variances)), with an added error at one row."""

    def __init__(self, states, variances, row, error):
        self.states, self.v, self.row, self.error = states, variances, row, error
        self.shape, self.classes = [1, 1, len(variances)], None

    def parameters(self):
        return iter([torch.zeros((), dtype=torch.float64)])

    def __call__(self, x, s, label=None):
        a, b = self.states.coefficients(s)
        out = a * self.v / (a * a * self.v + b * b) * x
        return out + self.error if s == self.row else out


@pytest.mark.parametrize("S", [4, 8, 20])
def test_the_effect_of_a_row_equals_the_effect_of_its_error_in_the_sampler(S):
    states = LatentStates(S=S, spacing="trailing")
    v = torch.tensor([4.0, 1.0, 0.3, 0.01], dtype=torch.float64)
    found, noise = effects(states.log_snr[1:, 0].tolist(), v.tolist()), torch.randn(3, 1, 1, 4).double()
    for row in (1, 2, S // 2, S):
        error = v.sqrt()  # its mean square is distributed over the components like the variance
        images = [
            list(DDIM(clip=None).walk(Gaussian(states, v, row, e), [0, 1, 2], start=noise))[-1][1] for e in (0.0, error)
        ]
        off = (images[1] - images[0]).square().sum() / (3 * error.square().sum())
        assert math.isclose(float(off), found[row - 1], rel_tol=1e-9)
    assert found[0] == 1.0


@settings(max_examples=40, deadline=None)
@given(floor=st.floats(0, 1), amplitude=st.floats(0.1, 50), p=st.floats(0.2, 1.5), m=st.sampled_from([0, 0.3, 1]))
def test_a_curve_of_the_fitted_form_is_extrapolated_accurately(floor, amplitude, p, m):
    def truth(n):
        return floor + amplitude * (n / 1000 + m) ** -p

    fit = fit_curve([(n, truth(n)) for n in range(1000, 9000, 1000)])
    assert math.isclose(value(fit, 5000), truth(5000), rel_tol=0.03)
    gain = truth(8000) - truth(12000)
    assert math.isclose(value(fit, 8000) - value(fit, 12000), gain, rel_tol=0.35, abs_tol=0.01 * truth(8000))


def test_a_flat_or_rising_curve_predicts_no_gain():
    for curve in ([(1, 2.0), (2, 2.0), (3, 2.0)], [(1, 1.0), (2, 1.5), (3, 2.0)]):
        fit = fit_curve(curve)
        assert value(fit, 3) - value(fit, 300) == pytest.approx(0, abs=1e-9)


def test_images_go_where_they_reduce_the_sum_most():
    fits = [(0.5, 100.0, 1.0, 0.0), (0.0, 25.0, 1.0, 0.0), (3.0, 0.0, 1.0, 0.0)]
    out = grant(fits, [100, 100, 100], [1.0, 1.0, 1.0], 1, 100)
    assert sum(out) == 400
    assert out[2] == 100  # it has nothing to gain
    assert out[0] / out[1] == pytest.approx(2, rel=0.02)  # n ~ sqrt(A), from setting A/n^2 equal
    dear = grant(fits, [100, 100, 100], [4.0, 1.0, 1.0], 1, 300)
    assert dear[0] / dear[1] == pytest.approx(1, rel=0.02)  # n ~ sqrt(A/c)
    assert 4 * (dear[0] - 100) + (dear[1] - 100) <= 300


def test_a_curve_is_not_extrapolated_far_while_others_gain():
    steep, flat = (0.0, 1000.0, 0.5, 0.0), (0.0, 1.0, 0.5, 0.0)
    assert grant([steep, flat], [100, 100], [1.0, 1.0], 10, 150) == [200, 150]
    assert grant([steep, flat], [100, 100], [1.0, 1.0], 10, 400)[1] == 200  # then the steep one gets the rest


def test_a_curve_is_fitted_from_its_highest_point_and_never_exceeds_its_start():
    rising = [(0, 1.0), (100, 1.2), (200, 1.3), (300, 1.4)]
    fit = fit_curve(rising)
    assert fit[-1] == 1.0
    assert [value(fit, n) for n in (300, 600, 10_000)] == [1.0] * 3  # the start is kept
    bump = [(0, 1.0), *((n, 0.5 + 80 / (n + 50)) for n in range(50, 500, 50))]
    fit = fit_curve(bump)
    assert value(fit, 50) == 1.0
    assert value(fit, 450) == pytest.approx(bump[-1][1], rel=0.02)
    assert value(fit, 900) == pytest.approx(0.5 + 80 / 950, rel=0.03)


def test_an_expert_without_gain_gets_no_images_while_another_gains():
    # power laws: one steep curve and seven that have converged
    steep, done = (0.0, 1000.0, 0.5, 0.0), (1.0, 0.0, 1.0, 0.0)
    assert grant([steep, *[done] * 7], [100] * 8, [1.0] * 8, 10, 1600) == [1700, *[100] * 7]


def test_without_any_gain_the_budget_is_spent_evenly():
    done = (1.0, 0.0, 1.0, 0.0)
    assert grant([done] * 4, [100, 140, 100, 100], [1.0] * 4, 20, 120) == [140] * 4
