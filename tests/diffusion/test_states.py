import math
import re

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_tdisent.diffusion.schedules import Cosine, Linear, ScaledLinear, Sigmoid
from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError

INF = math.inf


def alpha_bar(states: LatentStates) -> list[float]:
    return states.a[:, 0].square().tolist()


# S = 32 of T = 1000, DDPM linear betas: rows looked up, recomputed with the same betas, recomputed with betas T/S
@pytest.mark.parametrize(
    ("s", "t", "mapped", "native", "rescaled"),
    [
        (1, 31, 0.98771, 0.99990, 0.99687),
        (2, 62, 0.95706, 0.99916, 0.97376),
        (8, 248, 0.52942, 0.98137, 0.53838),
        (16, 496, 0.08181, 0.92414, 0.06302),
        (24, 744, 0.00367, 0.83486, 0.00112),
        (32, 992, 0.00005, 0.72339, 0.00000),
    ],
)
def test_mapped_native_and_rescaled_tables(s, t, mapped, native, rescaled):
    for kind, value in (("mapped", mapped), ("native", native), ("rescaled", rescaled)):
        states = LatentStates(Linear(), S=32, kind=kind, terminal_bound=1.0)
        assert int(states.index[s]) == t
        assert alpha_bar(states)[s] == pytest.approx(value, abs=0.501e-5), kind


def test_mapped_values_are_those_of_the_full_chain_bit_by_bit():
    for schedule in (Linear(), ScaledLinear(), Cosine(), Sigmoid()):
        full, few = LatentStates(schedule, terminal_bound=0.1), LatentStates(schedule, S=32, terminal_bound=0.1)
        assert torch.equal(few.log_snr[1:, 0], full.log_snr[few.index[1:], 0])
        assert full.index.tolist() == list(range(1001))


def test_native_cosine_is_almost_the_mapped_one():
    native = LatentStates(Cosine(), S=32, kind="native")
    mapped = LatentStates(Cosine(), S=32, terminal_bound=0.013)
    assert alpha_bar(native)[1] == pytest.approx(0.99642, abs=0.501e-5)
    assert alpha_bar(mapped)[1] == pytest.approx(0.99647, abs=0.501e-5)


@pytest.mark.parametrize(
    ("S", "first", "last"),
    [(32, 31, 992), (16, 62, 992), (10, 100, 1000), (8, 125, 1000), (4, 250, 1000), (64, 15, 960), (1000, 1, 1000)],
)
def test_even_spacing(S, first, last):
    index = LatentStates(Linear(), S=S, terminal_bound=0.1).index.tolist()
    assert index == [0, *range(first, last + 1, first)]
    assert len(index) == S + 1


# every list written out by hand from the definition of the spacing
@pytest.mark.parametrize(
    ("spacing", "T", "S", "expected"),
    [
        ("even", 1000, 10, [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]),
        ("even", 10, 4, [2, 4, 6, 8]),
        ("even", 10, 10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("even", 10, 1, [10]),
        ("leading", 1000, 4, [1, 251, 501, 751]),
        ("leading", 10, 3, [1, 4, 7]),
        ("trailing", 1000, 4, [250, 500, 750, 1000]),
        ("trailing", 10, 3, [3, 7, 10]),
        ("trailing", 1000, 16, [62, 125, 188, 250, 312, 375, 438, 500, 562, 625, 688, 750, 812, 875, 938, 1000]),
        ("trailing", 10, 1, [10]),
    ],
)
def test_spacings(spacing, T, S, expected):
    states = LatentStates(Linear(T=T, beta_end=0.5), S=S, spacing=spacing, terminal_bound=1.0)
    assert states.index.tolist() == [0, *expected]
    assert states.S == S
    assert states.rows == list(range(1, S + 1))


@pytest.mark.parametrize(("T", "S"), [(1000, 32), (1000, 50), (1000, 7), (999, 10), (5, 2), (25, 10), (7, 2)])
def test_trailing_is_the_spacing_of_diffusers(T, S):
    theirs = DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    theirs.set_timesteps(S)
    states = LatentStates(Linear(T=T, beta_end=0.5), S=S, spacing="trailing", terminal_bound=1.0)
    assert states.index.tolist()[:0:-1] == [t + 1 for t in theirs.timesteps.tolist()]


def test_log_snr_spacing_takes_the_nearest_row_to_each_of_equal_steps():
    chain = LatentStates(Linear()).log_snr[1:, 0].tolist()
    states = LatentStates(Linear(), S=12, spacing="log_snr")
    chosen = states.index[1:].tolist()
    width = (chain[0] - chain[-1]) / 11
    assert (chosen[0], chosen[-1]) == (1, 1000)
    for k, t in enumerate(chosen):
        want = chain[0] - k * width
        assert t == 1 + min(range(1000), key=lambda i: abs(chain[i] - want))
    assert LatentStates(Linear(), S=1, spacing="log_snr").index.tolist() == [0, 1000]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_table_falls_strictly_and_is_variance_preserving(data):
    schedule = data.draw(st.sampled_from([Linear(), ScaledLinear(), Cosine(), Sigmoid(), Linear(zero_terminal=True)]))
    S = data.draw(st.integers(1, 1000))
    spacing = data.draw(st.sampled_from(["even", "leading", "trailing"]))
    kind = data.draw(st.sampled_from(["mapped", "mapped", "native"]))
    if schedule.zero_terminal and kind == "native" and S == 1:
        return  # a chain of one level has no level left to rescale to
    states = LatentStates(schedule, S=S, spacing=spacing, kind=kind, terminal_bound=1.0)
    ab = states.a[:, 0].square()
    assert ab[0] == 1
    assert states.b[0] == 0
    assert (ab[1:] < ab[:-1]).all()
    assert (states.log_snr[1:] < states.log_snr[:-1]).all()
    assert (states.index[1:] > states.index[:-1]).all()
    assert torch.allclose(ab + states.b[:, 0].square(), torch.ones_like(ab), rtol=0, atol=4e-15)


@given(S=st.integers(1, 200), data=st.data())
@settings(deadline=None)
def test_blocks_are_a_partition(S, data):
    owners = data.draw(st.integers(1, S))
    blocks = LatentStates(Linear(), S=S, terminal_bound=1.0).blocks(owners)
    assert len(blocks) == owners
    assert [s for block in blocks for s in block] == list(range(1, S + 1))
    sizes = {len(block) for block in blocks}
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_blocks_by_hand():
    states = LatentStates(Linear(), S=8)
    assert states.blocks(1) == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert states.blocks(4) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert states.blocks(8) == [[1], [2], [3], [4], [5], [6], [7], [8]]
    assert states.blocks(3) == [[1, 2, 3], [4, 5], [6, 7, 8]]


@pytest.mark.parametrize("owners", [0, 9, -1])
def test_blocks_refuse_more_owners_than_rows(owners):
    with pytest.raises(InputError, match=rf"{owners} owners .* 8 rows"):
        LatentStates(Linear(), S=8).blocks(owners)


def test_zero_terminal_table():
    states = LatentStates(Linear(zero_terminal=True), S=10)
    assert states.log_snr[-1].item() == -INF
    assert states.a[-1].item() == 0.0
    assert states.b[-1].item() == 1.0
    assert states.coefficients(10) == (0.0, 1.0)


def test_coefficients_of_one_row_and_of_many_agree():
    states = LatentStates(Linear(), S=32)
    rows = torch.tensor([0, 5, 32, 5])
    a, b = states.coefficients(rows)
    assert a.shape == b.shape == (4, 1, 1, 1)
    assert a.dtype == torch.float64
    for i, s in enumerate(rows.tolist()):
        assert (a[i].item(), b[i].item()) == states.coefficients(s)
    assert states.coefficients(0) == (1.0, 0.0)
    assert states.coefficients(32)[0] ** 2 == pytest.approx(4.741e-5, rel=1e-3)


def test_fingerprint_is_equal_iff_the_table_is():
    tables = {
        "even": LatentStates(Linear(), S=10),
        "trailing": LatentStates(Linear(), S=10, spacing="trailing"),
        "listed": LatentStates(Linear(), indices=list(range(100, 1001, 100))),
        "restricted": LatentStates(Linear()).restrict(range(100, 1001, 100)),
        "explicit": LatentStates.from_table(
            LatentStates(Linear(), S=10).log_snr, LatentStates(Linear(), S=10).index, Cosine()
        ),
        "leading": LatentStates(Linear(), S=10, spacing="leading", terminal_bound=1.0),
        "native": LatentStates(Linear(), S=10, kind="native", terminal_bound=1.0),
        "rescaled": LatentStates(Linear(beta_end=0.009), S=10, kind="rescaled", terminal_bound=1.0),
        "zero": LatentStates(Linear(zero_terminal=True), S=10),
        "cosine": LatentStates(Cosine(), S=10),
        "S=8": LatentStates(Linear(), S=8),
        "beta_end": LatentStates(Linear(beta_end=0.0200001), S=10),
    }
    for one, a in tables.items():
        for two, b in tables.items():
            same = torch.equal(a.index, b.index) and torch.equal(a.log_snr, b.log_snr)
            assert (a.fingerprint == b.fingerprint) == same, (one, two)
    assert len({t.fingerprint for t in tables.values()}) == 8


def test_fingerprint_sees_the_index_as_well_as_the_values():
    L, index = LatentStates(Linear(), S=4).log_snr, torch.tensor([0, 1, 2, 3, 4])
    one = LatentStates.from_table(L, index, Linear())
    two = LatentStates.from_table(L, index * 2, Linear())
    assert one.fingerprint != two.fingerprint


def test_fingerprint_forgives_the_last_bits():
    states = LatentStates(Linear(), S=32)
    shaken = states.log_snr * (1 + 1e-14)
    assert LatentStates.from_table(shaken, states.index, Linear()).fingerprint == states.fingerprint


def test_fingerprint_survives_the_trip_through_a_spec():
    for states in (
        LatentStates(Linear(), S=32),
        LatentStates(Cosine(max_beta=0.99), S=7, spacing="log_snr", terminal_bound=0.5),
        LatentStates(Sigmoid(), indices=[3, 500, 1000]),
        LatentStates(Linear(), S=32, kind="native", terminal_bound=0.9),
        LatentStates(Linear()).restrict([1000, 250]),
    ):
        assert build(spec(states), LatentStates).fingerprint == states.fingerprint


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()])
def test_the_table_never_changes_its_dtype(move):
    module = nn.Module()
    module.states, module.net = LatentStates(Linear(), S=32), nn.Linear(2, 2).double()
    before = {k: v.clone() for k, v in module.states.named_buffers()}
    fingerprint, rows = module.states.fingerprint, [module.states.coefficients(s) for s in range(33)]
    assert move(module) is module
    assert module.net.weight.dtype != torch.float64
    for name, value in module.states.named_buffers():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert set(before) == {"log_snr", "a", "b", "index", "scale"}
    assert module.states.fingerprint == fingerprint
    assert [module.states.coefficients(s) for s in range(33)] == rows


def test_the_table_is_no_weight():
    states = LatentStates(Linear(), S=32)
    assert not states.state_dict()
    assert not list(states.parameters())


def test_restrict_takes_values_unchanged():
    full = LatentStates(Linear())
    some = full.restrict([992, 31, 496])
    assert some.index.tolist() == [0, 31, 496, 992]
    assert some.S == 3
    assert torch.equal(some.log_snr, full.log_snr[[0, 31, 496, 992]])
    assert torch.equal(some.a, full.a[[0, 31, 496, 992]])
    even = LatentStates(Linear(), S=32)
    assert full.restrict(even.index[1:].tolist()).fingerprint == even.fingerprint
    assert even.restrict(even.index[1:].tolist()).fingerprint == even.fingerprint


def test_restrict_refuses_indices_that_are_not_rows():
    with pytest.raises(InputError, match=r"\[30, 993\] are not rows .* 32 states"):
        LatentStates(Linear(), S=32).restrict([30, 31, 993])


def test_restrict_refuses_a_table_that_ends_in_signal():
    with pytest.raises(InputError, match="terminal_bound"):
        LatentStates(Linear(), S=32).restrict([31, 496])


def test_two_columns_are_kept():
    L = LatentStates(Linear(), S=4).log_snr[:, 0]
    states = LatentStates.from_table(torch.stack([L, L - 1.5], 1), torch.tensor([0, 1, 2, 3, 4]), Linear())
    assert states.K == 2
    a, b = states.coefficients(2)
    assert a.shape == (2, 1, 1)
    assert a.flatten().tolist() == pytest.approx([math.sqrt(1 / (1 + math.exp(-v))) for v in (L[2], L[2] - 1.5)])
    assert (a.square() + b.square()).flatten().tolist() == pytest.approx([1.0, 1.0], rel=1e-15)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"S": 1001}, ["1001", "1000"]),
        ({"S": 0}, ["S=0", "1..1000"]),
        ({"S": -2}, ["S=-2"]),
        ({"indices": [31, 1001]}, ["1001", "1..1000"]),
        ({"indices": [0, 31]}, ["[0, 31]", "1..1000"]),
        ({"indices": [62, 31, 1000]}, ["[62, 31, 1000]", "ascending"]),
        ({"indices": [31, 31, 1000]}, ["[31, 31, 1000]", "ascending"]),
        ({"indices": []}, ["[]"]),
        ({"indices": [31, 1000], "S": 3}, ["S=3", "2 indices"]),
        ({"S": 900, "spacing": "log_snr"}, ["twice", "900", "1000"]),
        ({"S": 32, "spacing": "cubic"}, ["cubic", "trailing"]),
        # betas rise from 0.00625 to 1.25; the first above one is 0.00625 + 12 * 1.24375/15
        ({"S": 16, "kind": "rescaled"}, ["1.001", "outside (0, 1)", "t=13 of 16", "kind: mapped"]),
    ],
)
def test_refused(args, words):
    with pytest.raises(InputError) as refusal:
        LatentStates(Linear(), **args)
    for word in words:
        assert word in str(refusal.value)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="mapd"):
        LatentStates(Linear(), S=32, kind="mapd", terminal_bound=1.0)


def test_log_snr_spacing_of_an_infinite_range_is_refused():
    with pytest.raises(InputError, match="zero_terminal"):
        LatentStates(Linear(zero_terminal=True), S=8, spacing="log_snr")


@pytest.mark.parametrize(
    ("schedule", "args", "fix"),
    [
        (Linear(), {"S": 32, "kind": "native"}, "kind: mapped"),
        (Linear(), {"S": 8, "spacing": "leading"}, "spacing: trailing"),
        (Linear(), {"indices": [31, 496]}, "indices that end at T"),
        (Linear(T=100), {"S": 10}, "a schedule with more noise"),
        (ScaledLinear(beta_start=0.00085, beta_end=0.012), {}, "a schedule with more noise"),
    ],
)
def test_signal_at_the_last_state_is_refused_with_a_fix_that_works(schedule, args, fix):
    end = LatentStates(schedule, **args, terminal_bound=1.0).a[-1].item()
    with pytest.raises(InputError) as refusal:
        LatentStates(schedule, **args)
    text = str(refusal.value)
    assert f"{end:.4g}" in text
    assert "0.01" in text
    assert fix in text
    advised = float(re.search(r"terminal_bound: ([0-9.e-]+\d)\.?$", text).group(1))
    assert end <= advised <= 1.15 * end
    LatentStates(schedule, **args, terminal_bound=advised)


def test_the_terminal_bound_is_sharp():
    end = LatentStates(Linear(), S=32).a[-1].item()
    LatentStates(Linear(), S=32, terminal_bound=1.0001 * end)
    with pytest.raises(InputError, match=f"{end:.4g}, above terminal_bound"):
        LatentStates(Linear(), S=32, terminal_bound=0.9999 * end)


def test_native_linear_keeps_85_percent_of_the_signal_coefficient():
    with pytest.raises(InputError, match=re.escape(f"{math.sqrt(0.72339):.4f}")):
        LatentStates(Linear(), S=32, kind="native")


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ([INF, 1.0, 1.0, -20.0], "row 2"),
        ([INF, 1.0, 2.0, -20.0], "row 2"),
        ([INF, INF, -20.0], "row 1"),
        ([INF, -20.0, -INF, -INF], "row 3"),
        ([5.0, 1.0, -20.0], "row 0"),
        ([INF, math.nan, -20.0], "NaN"),
        ([INF, 1.0, math.nan], "NaN"),
    ],
)
def test_a_table_that_does_not_fall_is_refused(table, word):
    with pytest.raises(InputError, match=word):
        LatentStates.from_table(torch.tensor(table)[:, None], torch.arange(len(table)), Linear())


def test_one_column_out_of_two_that_does_not_fall_is_refused():
    table = torch.tensor([[INF, INF], [1.0, 1.0], [-20.0, 1.5]])
    with pytest.raises(InputError, match=r"row 2 .*1\.5"):
        LatentStates.from_table(table, torch.arange(3), Linear())


def test_a_chain_of_one_level_cannot_end_at_zero():
    with pytest.raises(InputError):
        LatentStates(Linear(T=1, zero_terminal=True), terminal_bound=1.0)
