import math

import numpy as np
import pytest
import torch

from lightning_tdisent.diffusion.rng import draw_rows, key, mix32, seed_noise
from lightning_tdisent.errors import InputError

WORD = 1 << 32


def undo_mix32(word: int) -> int:
    """Inverse of the finaliser: odd factors have inverses modulo 2^32, and x ^ x >> k is undone from the top."""
    word ^= word >> 16
    word = word * pow(0xC2B2AE35, -1, WORD) % WORD
    word ^= word >> 13 ^ word >> 26
    word = word * pow(0x85EBCA6B, -1, WORD) % WORD
    return word ^ word >> 16


# fmix32 of the reference MurmurHash3
@pytest.mark.parametrize(("word", "mixed"), [(0, 0), (1, 0x514E28B7), (2, 0x30F4C306), (0xFFFFFFFF, 0x81F16F39)])
def test_mix32_of_known_words(word, mixed):
    assert mix32(word) == mixed


def test_mix32_is_a_bijection():
    words = [*range(20_000), *range(WORD - 20_000, WORD), *range(0, WORD, WORD // 20_011)]
    assert all(undo_mix32(mix32(w)) == w for w in words)
    assert len({mix32(w) for w in set(words)}) == len(set(words))


def test_mix32_changes_half_the_bits():
    flips = [(mix32(w) ^ mix32(w ^ 1 << bit)).bit_count() for w in range(0, 40_000, 97) for bit in range(32)]
    assert sum(flips) / len(flips) == pytest.approx(16, abs=0.2)


def test_fifty_thousand_seeds_have_distinct_keys_in_every_stream():
    for stream in (0, 1, 31, 32, 1000, 1 << 20):
        assert len({key(stream, seed) for seed in range(50_000)}) == 50_000
    assert len({key(stream, 7) for stream in range(5_000)}) == 5_000


def test_the_order_of_the_parts_counts():
    assert key(1, 2) != key(2, 1)
    assert 0 <= key(1, 2) < WORD


def test_seed_noise_depends_on_seed_and_stream_alone():
    shape = (3, 5, 4)
    alone = {seed: seed_noise([seed], 9, shape)[0] for seed in (0, 1, 17, 400, WORD - 1)}
    for seeds in ([0, 1, 17, 400, WORD - 1], [400, 0], [17, 17, 1], range(410), [5, WORD - 1, 6]):
        batch = seed_noise(list(seeds), 9, shape)
        assert batch.shape == (len(seeds), *shape)
        assert batch.dtype == torch.float32
        for i, seed in enumerate(seeds):
            if seed in alone:
                assert torch.equal(batch[i], alone[seed])
    for seed, row in alone.items():
        assert not torch.equal(seed_noise([seed], 10, shape)[0], row)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1, 8, 8), (3, 32, 32)])
def test_seed_noise_is_a_function(shape):
    assert torch.equal(seed_noise([3, 4], 1, shape), seed_noise([3, 4], 1, shape))
    assert not torch.equal(*seed_noise([3, 4], 1, shape))


def test_no_two_of_many_images_share_their_noise():
    first = seed_noise(range(20_000), 32, (2,))
    assert len({tuple(row) for row in first.tolist()}) == 20_000


def test_seed_noise_is_standard_normal():
    x = seed_noise(range(4000), 5, (1, 5, 5)).double().flatten()
    n = len(x)
    assert abs(x.mean().item()) * math.sqrt(n) < 4
    assert abs(x.var().item() - 1) / math.sqrt(2 / n) < 4
    assert abs(x.pow(3).mean().item()) / math.sqrt(15 / n) < 4
    assert abs(x.pow(4).mean().item() - 3) / math.sqrt(96 / n) < 4


def test_neighbouring_seeds_and_streams_are_uncorrelated():
    for one, two in (
        (seed_noise(range(4000), 1, (16,)), seed_noise(range(1, 4001), 1, (16,))),
        (seed_noise(range(4000), 1, (16,)), seed_noise(range(4000), 2, (16,))),
    ):
        assert abs((one * two).mean().item()) * math.sqrt(64_000) < 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64])
def test_seeds_of_numpy_and_torch_are_seeds(dtype):
    seeds = [0, 1, 17, 2**31 - 1]
    assert torch.equal(seed_noise(np.array(seeds, dtype), 9, (3, 2)), seed_noise(seeds, 9, (3, 2)))
    assert torch.equal(seed_noise(torch.tensor(seeds), 9, (3, 2)), seed_noise(seeds, 9, (3, 2)))
    with pytest.raises(InputError, match=r"image seeds are integers, got (np.float64\()?1.5"):
        seed_noise(np.array([1.5]), 9, (3, 2))


@pytest.mark.parametrize("seed", [-1, WORD, 1 << 40])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(InputError, match=str(seed)):
        seed_noise([0, seed], 1, (2,))


def counts(rows: torch.Tensor, n: int, seed: int, balanced: bool = True) -> list[int]:
    drawn = draw_rows(rows, n, torch.Generator().manual_seed(seed), balanced)
    assert drawn.shape == (n,)
    assert drawn.dtype == torch.int64
    assert set(drawn.tolist()) <= set(rows.tolist())
    return [int((drawn == s).sum()) for s in rows]


@pytest.mark.parametrize(("R", "n"), [(1, 8), (4, 4), (8, 64), (32, 32), (32, 256), (10, 30), (7, 49)])
def test_balanced_counts_are_exact_where_they_can_be(R, n):
    rows = torch.arange(1, R + 1)
    for seed in range(50):
        assert counts(rows, n, seed) == [n // R] * R


@pytest.mark.parametrize(("R", "n"), [(5, 6), (5, 14), (32, 48), (10, 28), (10, 19), (1000, 128), (10, 7), (3, 1)])
def test_balanced_counts_are_within_one_otherwise(R, n):
    rows = torch.arange(1, R + 1)
    for seed in range(200):
        assert all(abs(c - n / R) < 1 for c in counts(rows, n, seed)), (seed, counts(rows, n, seed))


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("R", "n"), [(5, 6), (6, 4), (7, 16)])
def test_the_marginal_is_uniform(R, n, balanced):
    rows, runs = torch.arange(1, R + 1) * 10, 4000
    total = torch.tensor([counts(rows, n, seed, balanced) for seed in range(runs)]).sum(0).double()
    expected = n * runs / R
    chi_square = ((total - expected).square() / expected).sum().item()
    # the 0.999 quantile of chi-square with 6 degrees of freedom is 22.5; strata only make the sum smaller
    assert chi_square < 22.5


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("R", "n"), [(8, 8), (4, 12), (5, 7)])
def test_row_and_place_are_independent(R, n, balanced):
    rows, runs, generator = torch.arange(R), 6000, torch.Generator().manual_seed(0)
    table = torch.zeros(n, R)
    for _ in range(runs):
        table[range(n), draw_rows(rows, n, generator, balanced)] += 1
    expected = runs / R
    chi_square = ((table - expected).square() / expected).sum(1) / (R - 1)  # of each place
    # 0.999 quantiles of chi-square over its freedom: 5.4 (R = 4), 4.6 (5), 3.5 (8); tied to places it is in the 1000s
    assert chi_square.max() < 5.4
    assert chi_square.mean() == pytest.approx(1, abs=0.6)


def test_one_row_draws_no_order():
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert draw_rows(torch.tensor([5]), 4, one).tolist() == [5] * 4
    torch.rand(1, generator=two, dtype=torch.float64)
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=two))


def test_independent_draws_are_not_balanced():
    rows = torch.arange(1, 9)
    runs = [counts(rows, 64, seed, balanced=False) for seed in range(500)]
    table = torch.tensor(runs).double()
    assert table.mean(0).tolist() == pytest.approx([8.0] * 8, abs=0.5)
    # a binomial count has variance 64/8 * 7/8 = 7
    assert table.var(0).mean().item() == pytest.approx(7.0, rel=0.1)


def test_drawing_rows_follows_the_generator():
    rows = torch.tensor([3, 5, 9])
    one, two, three = (draw_rows(rows, 7, torch.Generator().manual_seed(k)) for k in (0, 0, 1))
    assert torch.equal(one, two)
    assert any(not torch.equal(one, draw_rows(rows, 7, torch.Generator().manual_seed(k))) for k in range(1, 9))
    assert rows.tolist() == [3, 5, 9]
    assert len(three) == 7


def test_the_global_generator_is_not_used():
    before = torch.get_rng_state()
    seed_noise(range(5), 3, (1, 4, 4))
    for balanced in (True, False):
        draw_rows(torch.arange(1, 5), 9, torch.Generator().manual_seed(0), balanced)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    one = seed_noise([1], 1, (4,))
    torch.manual_seed(2)
    assert torch.equal(seed_noise([1], 1, (4,)), one)
