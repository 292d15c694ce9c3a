import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.cli import main
from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.objectives import X0, V
from lightning_tdisent.diffusion.process import noise, step, transition
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.schedules import Cosine
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.images import from_uint8
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.models.merge import (
    Images,
    average,
    best_blocks,
    costs_of_blocks,
    merge,
    search_weights,
    step_error,
    step_weights,
)
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.errors_by_row import HELD_OUT, x0_errors
from lightning_tdisent.sampling.sampler import DDIM

SHAPE = [1, 2, 2]


class PerPixel(Network):
    """raw = gain x, a gain per pixel, and one more per class: errors are quadratic in the weights."""

    def __init__(self, shape: list[int], classes: int | None = None) -> None:
        super().__init__(shape, classes, "none")
        self.gain = torch.nn.Parameter(torch.zeros(shape))
        self.shift = torch.nn.Parameter(torch.zeros((classes or 0) + 1))

    def forward(self, x, index=None, label=None):
        label = self.labels(x, label)
        out = self.gain * x
        return out if label is None else out + self.shift[label][:, None, None, None]


@pytest.fixture
def pixels(states):
    """An expert with the given gains."""

    def make(gain, rows, classes=None, objective=None):
        one = Denoiser(PerPixel(SHAPE, classes), objective or X0(), states, rows).eval()
        with torch.no_grad():
            one.network.gain.copy_(torch.as_tensor(gain).expand(SHAPE))
        return one

    return make


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    return ImageSet(
        torch.randint(0, 256, (20, *SHAPE), generator=g, dtype=torch.uint8), torch.arange(20) % 3, "held0ut"
    )


def prepared(data: ImageSet) -> Images:
    return Images(from_uint8(data.images), list(range(len(data))), None)


def best_gain(states, x0, rows, objective=None):
    """The gain of least x0 error over these rows, weighted as the sampler does; noise as held-out.

    x0_hat = gain x, or a x - b gain x if gain x is v: least squares per pixel either way.
    """
    up, down = 0.0, 0.0
    for s in rows:
        eps = seed_noise(range(len(x0)), HELD_OUT + int(states.index[s]), x0.shape[1:])
        x = noise(states, x0, s, eps).double()
        a, b = states.coefficients(s)
        factor, goal = (b * x, a * x - x0) if isinstance(objective, V) else (x, x0)
        weight = step_weights(states)[s]
        up, down = up + weight * (factor * goal).sum(0), down + weight * factor.square().sum(0)
    return up / down


@pytest.fixture
def files(model, write):
    """Four experts with weights of their own."""
    return [write(f"e{s}", model(rows=[s], seed=s, conditioning="none"), images_seen=100 * s) for s in (1, 2, 3, 4)]


def weights_of(path):
    return {k: v.double().numpy() for k, v in load_expert(path)[0].state_dict().items()}


# the average


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(0, 2**16))
def test_an_average_is_the_weighted_sum(raw, seed):
    g = torch.Generator().manual_seed(seed)
    members = [{"a": torch.randn(3, 2, generator=g), "n": torch.tensor(i)} for i in range(len(raw))]
    share = [w / sum(raw) for w in raw]
    found = average(members, share)
    expected = sum(w * m["a"].double().numpy() for w, m in zip(share, members, strict=True))
    np.testing.assert_allclose(found["a"].double(), expected, rtol=2**-23, atol=1e-9)
    assert found["a"].dtype == torch.float32
    assert found["n"] == 0


@pytest.mark.parametrize("share", [[0.5, 0.6], [1.0], [0.2, 0.3, 0.5]])
def test_weights_that_are_no_average_are_refused(share):
    with pytest.raises(InputError, match="must sum to 1, one for each of 2"):
        average([{"a": torch.ones(1)}, {"a": torch.ones(1)}], share)


def test_copies_merge_to_the_shared_network_bit_for_bit(model, write, tmp_path):
    shared = model(conditioning="state")
    copies = [write(f"e{s}", Denoiser(shared.network, V(), shared.states, [s])) for s in (1, 2, 3, 4)]
    for k in (1, 2, 3):
        merge(copies, tmp_path / f"m{k}", k)
        loaded = load_model(tmp_path / f"m{k}")
        cards = loaded.cards
        assert len(cards) == k
        assert torch.equal(DDIM()(loaded, [1, 2]), DDIM()(shared, [1, 2]))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, {(1, 2): [0.5, 0.5], (3, 4): [0.5, 0.5]}),
        ({"weights": "images"}, {(1, 2): [1 / 3, 2 / 3], (3, 4): [3 / 7, 4 / 7]}),
        ({"weights": [1, 3, 0, 2]}, {(1, 2): [0.25, 0.75], (3, 4): [0.0, 1.0]}),
        ({"blocks": [1, 3]}, {(1,): [1.0], (2, 3, 4): [1 / 3] * 3}),
        ({"blocks": [3, 1], "weights": "images"}, {(1, 2, 3): [1 / 6, 2 / 6, 3 / 6], (4,): [1.0]}),
    ],
)
def test_each_block_is_owned_by_the_average_of_its_experts(files, tmp_path, options, share):
    found = merge(files[::-1], tmp_path / "m", 2, **options)
    loaded = load_model(tmp_path / "m")
    cards = loaded.cards
    assert isinstance(loaded, CompositeDenoiser)
    assert [tuple(c.rows) for c in cards] == list(share)
    assert [tuple(m.rows) for m in found] == list(share)
    for block, card, one in zip(share, cards, found, strict=True):
        members = [files[s - 1] for s in block]
        assert one.members == members
        assert one.weights == pytest.approx(share[block])
        assert one.errors is None
        assert [p["weight"] for p in card.parents] == one.weights
        assert [p["sha256"] for p in card.parents] == [sha256(f) for f in members]
        assert [p["rows"] for p in card.parents] == [[s] for s in block]
        assert [p["images_seen"] for p in card.parents] == [100 * s for s in block]
        assert (card.images_seen, card.steps, card.seconds) == (0, 0, 0.0)
        parts = [weights_of(f) for f in members]
        for s in block:
            for name, value in loaded.at(s).state_dict().items():
                expected = sum(w * part[name] for w, part in zip(share[block], parts, strict=True))
                np.testing.assert_allclose(value, expected, rtol=2**-23, atol=1e-9)
    if options.get("weights") == [1, 3, 0, 2]:
        assert all(
            torch.equal(v, load_expert(files[3])[0].state_dict()[n]) for n, v in loaded.at(3).state_dict().items()
        )


def test_merging_twice_gives_the_same_bytes_and_leaves_nothing_else(files, tmp_path):
    for name in ("a", "b"):
        merge(files, tmp_path / "deep" / name, 2)
    here = sorted(p.relative_to(tmp_path / "deep") for p in (tmp_path / "deep").rglob("*") if p.is_file())
    names = ["composite.json", "rows_0001-0002.safetensors", "rows_0003-0004.safetensors"]
    assert [str(p) for p in here] == [f"{folder}/{name}" for folder in ("a", "b") for name in names]
    assert all((tmp_path / "deep/a" / n).read_bytes() == (tmp_path / "deep/b" / n).read_bytes() for n in names)


def test_experts_of_blocks_that_see_the_state_merge(model, write, tmp_path):
    blocks = [model(rows=r, seed=r[0], conditioning="state") for r in ([1, 2], [3], [4])]
    files = [write(f"b{b.rows[0]}", b) for b in blocks]
    merge(files, tmp_path / "m", 2, blocks=[2, 1])
    loaded = load_model(tmp_path / "m")
    assert loaded.at(1) is loaded.at(3)
    assert loaded.at(1).rows == [1, 2, 3]
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(
        loaded.at(1).network(x, torch.tensor([250, 250])), loaded.at(1).network(x, torch.tensor([500, 500]))
    )
    assert torch.equal(loaded(x, 4), blocks[2](x, 4))


def test_what_was_merged_can_be_merged_again_and_started_from(files, tmp_path):
    merge(files, tmp_path / "two", 2)
    merge(sorted((tmp_path / "two").glob("*.safetensors")), tmp_path / "one", 1)
    loaded = load_model(tmp_path / "one")
    cards = loaded.cards
    assert loaded.rows == [1, 2, 3, 4]
    parts = [weights_of(f) for f in files]
    for name, value in loaded.state_dict().items():
        np.testing.assert_allclose(value, sum(p[name] for p in parts) / 4, rtol=1e-6, atol=1e-8)
    assert sum(p["images_seen"] for p in cards[0].parents) == 1000
    assert len(cards[0].parents) == 6


# what it costs, and the search


def test_step_weights_are_what_a_step_makes_of_an_error(states):
    found = step_weights(states)
    x, x0, e = (torch.randn(1, 1, 2, 2, dtype=torch.float64) for _ in range(3))
    for s in states.rows:
        c = transition(states, s, s - 1, 0.0)
        moved = step(states, c, x, x0 + e) - step(states, c, x, x0)
        torch.testing.assert_close(moved.square(), found[s] * e.square())
    assert found[0] == 0
    assert found[1] == 1


def test_step_error_is_the_weighted_error_of_the_rows_owned_with_labels(pixels, states):
    one = pixels(0.5, [2, 4], classes=3)
    with torch.no_grad():
        one.network.shift.copy_(torch.tensor([0.1, -0.4, 0.7, 2.0]))
    g = torch.Generator().manual_seed(1)
    x0, label = torch.rand(7, *SHAPE, generator=g), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    errors = x0_errors(one, x0, list(range(7)), [2, 4], label).mean(1)
    expected = float(step_weights(states)[[2, 4]] @ errors)
    for size in (2, 250):
        assert step_error(one, Images(x0, list(range(7)), label), size) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.data())
def test_best_blocks_equals_exhaustive_search(n, data):
    k = data.draw(st.integers(1, n))
    number = st.one_of(st.floats(0, 10), st.just(math.inf))
    cost = [[data.draw(number) for _ in range(n - i)] for i in range(n)]

    def total(sizes):
        starts = itertools.accumulate(sizes, initial=0)
        return sum(cost[i][size - 1] for i, size in zip(starts, sizes, strict=False))

    every = [s for s in itertools.product(range(1, n + 1), repeat=k) if sum(s) == n]
    found = best_blocks(cost, k)
    assert tuple(found) in every
    assert total(found) == pytest.approx(min(map(total, every)))


@pytest.mark.parametrize("share", [[0.2, 0.5, 0.3], [0.05, 0.05, 0.9]])
@pytest.mark.parametrize("objective", [X0(), V()], ids=["x0", "v"])
def test_the_search_finds_the_weights_of_the_least_error(pixels, states, images, share, objective):
    """Errors are quadratic in the gains; members are laid so that the best gains are this average of them."""
    data, g = prepared(images), torch.Generator().manual_seed(3)
    goal = best_gain(states, data.x0, [1, 2, 4], objective)
    one, two = (goal + 0.3 * torch.randn(SHAPE, generator=g) for _ in range(2))
    three = (goal - share[0] * one - share[1] * two) / share[2]
    members = [pixels(gain, [s], objective=objective) for gain, s in ((one, 1), (two, 2), (three, 4))]
    results = [search_weights(members, data, size) for size in (250, 7)]
    for found, passed in results:
        assert found == pytest.approx(share, abs=2e-3)
        assert passed % (3 * len(images.images)) == 0
        assert 2 <= passed // (3 * len(images.images)) <= 61
    assert all(
        torch.equal(m.network.gain, pixels(gain, [1]).network.gain)
        for m, gain in zip(members, (one, two, three), strict=True)
    )


def test_the_search_goes_to_the_best_expert_if_that_is_best(pixels, states, images):
    data = prepared(images)
    goal = best_gain(states, data.x0, [1, 2])
    found, _ = search_weights([pixels(goal + 0.2, [1]), pixels(goal, [2])], data)
    assert found[1] > 0.995


@pytest.fixture
def gains(pixels, write, states, images):
    """Files of four experts: the first good for row 1 alone, the others about equal and good for rows 2..4."""
    x0 = from_uint8(images.images)
    first, rest = best_gain(states, x0, [1]), best_gain(states, x0, [2, 3, 4])
    experts = [pixels(first, [1]), *(pixels(rest + off, [s]) for s, off in ((2, 0.01), (3, 0.0), (4, -0.01)))]
    return [write(f"g{e.rows[0]}", e) for e in experts]


def test_the_cost_of_a_block_is_that_of_its_average(gains, images):
    data, weights = prepared(images), [0.0, 1.0, 3.0, 2.0]
    experts = [load_expert(f)[0] for f in gains]
    cost, _ = costs_of_blocks(gains, weights, data, "cpu", 250)
    assert cost[0][0] == math.inf
    for i, j in itertools.combinations(range(5), 2):
        if (i, j) != (0, 1):
            states, share = [e.state_dict() for e in experts[i:j]], weights[i:j]
            one = Denoiser(PerPixel(SHAPE), X0(), experts[0].states, list(range(i + 1, j + 1)))
            one.load_state_dict(average(states, [w / sum(share) for w in share]))
            assert cost[i][j - i - 1] == pytest.approx(step_error(one, data), rel=1e-6)


def test_blocks_are_searched_and_errors_reported(gains, images, tmp_path, states):
    equal = merge(gains, tmp_path / "equal", 2, data=images)
    found = merge(gains, tmp_path / "found", 2, blocks="search", data=images)
    assert [m.rows for m in equal] == [[1, 2], [3, 4]]
    assert [m.rows for m in found] == [[1], [2, 3, 4]]
    data = prepared(images)
    for folder, result in (("equal", equal), ("found", found)):
        loaded = load_model(tmp_path / folder)
        cards = loaded.cards
        assert len(cards) == len(result)
        for one in result:
            before = sum(step_error(load_expert(f)[0], data) for f in one.members)
            assert one.errors == pytest.approx((before, step_error(loaded.at(one.rows[0]), data)), rel=1e-12)
        assert cards[1].images_seen == 0
    assert found[0].errors[0] == found[0].errors[1]
    assert sum(m.errors[1] for m in found) < sum(m.errors[1] for m in equal)
    # 10 averages of 1 to 4 rows, 20 in all, of 20 images; forward passes count a third
    assert load_model(tmp_path / "found").cards[0].images_seen == math.ceil(20 * 20 / 3)
    assert load_model(tmp_path / "equal").cards[0].images_seen == 0


def test_searched_weights_are_no_worse_than_equal_ones_and_counted(gains, images, tmp_path):
    equal = merge(gains, tmp_path / "equal", 1, data=images)
    found = merge(gains, tmp_path / "found", 1, weights="search", data=images)
    assert found[0].errors[1] < equal[0].errors[1]
    assert sum(found[0].weights) == pytest.approx(1)
    cards = load_model(tmp_path / "found").cards
    assert cards[0].images_seen > 0
    assert cards[0].images_seen % (4 * len(images)) == 0
    assert cards[0].seconds > 0


def test_latents_are_taken_at_their_means(pixels, write, tmp_path):
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 2, 2, *SHAPE, generator=g).half()
    files = [write(f"l{s}", pixels(0.1 * s, [s])) for s in (1, 2, 3, 4)]
    found = merge(files, tmp_path / "m", 1, data=ImageSet(latents, torch.zeros(5, dtype=torch.int64), "d"))
    plain = Images(latents[:, 0, 0].float(), list(range(5)), None)
    assert found[0].errors[0] == pytest.approx(sum(step_error(load_expert(f)[0], plain) for f in files))


# refusals


def refusal(*args, **options) -> str:
    with pytest.raises(InputError) as caught:
        merge(*args, **options)
    return str(caught.value)


def test_experts_with_other_initial_weights_are_refused_all_at_once(model, write, files, spoil, tmp_path, states):
    warm = [{"sha256": "a" * 64, "network": {"class_path": "a.B", "init_args": {}}, "images_seen": 1, "seconds": 1.0}]
    other = LatentStates(Cosine(), S=4)
    odd = {
        "its initial weights": (write("odd1", model(rows=[2], conditioning="none"), seed=7), "seed 7", "seed 0"),
        "network": (
            write("odd2", model(rows=[3], conditioning="none", dropout=0.5)),
            '"dropout": 0.5',
            '"dropout": 0.0',
        ),
        "table": (
            write("odd3", Denoiser(model(conditioning="none").network, V(), other, [4])),
            other.fingerprint,
            states.fingerprint,
        ),
    }
    more = write("odd4", model(rows=[1], conditioning="none"), parents=warm)
    paths = [*files, *(path for path, *_ in odd.values()), more]
    for path in paths:
        spoil(path)
    text = refusal(paths, tmp_path / "out" / "m", 2)
    for field, (path, one, two) in odd.items():
        line = next(x for x in text.split("\n") if f"{path}: {field}" in x)
        assert one in line
        assert two in line
    assert f"{more}: its initial weights is " in text
    assert "those of " + "a" * 64 in text
    assert not (tmp_path / "out").exists()


def test_experts_that_started_warm_from_one_file_merge_whatever_their_seed(model, write, tmp_path):
    def expert(s, source, seed):
        network = {"class_path": "a.B", "init_args": {}}
        parents = [{"sha256": source * 64, "network": network, "images_seen": 1, "seconds": 1.0}]
        return write(f"w{s}{source}", model(rows=[s], seed=s, conditioning="none"), parents=parents, seed=seed)

    files = [expert(s, "a", s) for s in (1, 2, 3, 4)]
    merge(files, tmp_path / "m", 2)
    cards = load_model(tmp_path / "m").cards
    assert [p["sha256"] for p in cards[0].parents] == ["a" * 64, sha256(files[0]), sha256(files[1])]
    merge(sorted((tmp_path / "m").glob("*.safetensors")), tmp_path / "again", 1)
    text = refusal([*files[:3], expert(4, "b", 4)], tmp_path / "n", 2)
    assert "b" * 64 in text
    assert "a" * 64 in text


@pytest.mark.parametrize(
    ("k", "options", "words"),
    [
        (0, {}, "--merge 0: fewer networks than 4 experts"),
        (4, {}, "--merge 4: fewer networks than 4 experts"),
        (3, {"weights": [1, 0, 0, 1]}, "--merge 3: fewer networks"),
        (2, {"weights": [1, 1, 0, 0]}, "all weights are 0 in the blocks"),
        (2, {"weights": [1, 2, 3]}, "--merge-weights [1, 2, 3]: uniform, images, search, or a number"),
        (2, {"weights": [1, 2, 3, -1]}, "a number >= 0 for each of 4"),
        (2, {"weights": [1, 2, 3, math.nan]}, "a number >= 0 for each of 4"),
        (2, {"weights": "best"}, "--merge-weights best:"),
        (2, {"blocks": [1, 2]}, "--merge-blocks [1, 2]: equal, search, or 2 numbers of experts whose sum is 4"),
        (2, {"blocks": [4, 0]}, "2 numbers of experts whose sum is 4"),
        (2, {"blocks": [2, 1, 1]}, "2 numbers of experts whose sum is 4"),
        (2, {"blocks": "best"}, "--merge-blocks best:"),
        (2, {"blocks": "search"}, "give --merge-data"),
        (2, {"weights": "search"}, "give --merge-data"),
        (2, {"data": True}, "its images are [1, 2, 2], the experts make [1, 8, 8]"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(files, images, tmp_path, k, options, words):
    if "data" in options:
        options = {"data": images}
    assert words in refusal(files, tmp_path / "out" / "m", k, **options)
    assert not (tmp_path / "out").exists()


def test_missing_rows_and_a_folder_in_use_are_refused(files, tmp_path):
    assert "no expert owns row 4" in refusal(files[:3], tmp_path / "m", 2)
    merge(files, tmp_path / "m", 2)
    before = json.loads((tmp_path / "m" / "composite.json").read_text(encoding="utf-8"))
    assert "already holds a composite" in refusal(files, tmp_path / "m", 3)
    assert json.loads((tmp_path / "m" / "composite.json").read_text(encoding="utf-8")) == before


def test_a_damaged_expert_is_refused_and_leaves_nothing(files, spoil, tmp_path):
    spoil(files[3])
    assert "e4.safetensors: damaged" in refusal(files, tmp_path / "out" / "m", 2)
    assert not (tmp_path / "out").exists()


def test_random_weights_are_compared_and_not_the_seed_alone(model, write, tmp_path):
    rows = [1, 2, 3, 4]
    same = [write(f"same{s}", model(rows=[s], conditioning="none"), seed=s, initial="a" * 64) for s in rows]
    merge(same, tmp_path / "m", 2)
    other = write("other", model(rows=[4], conditioning="none"), seed=4, initial="b" * 64)
    assert f"random, of hash {'b' * 64}" in refusal([*same[:3], other], tmp_path / "n", 2)
    older = write("older", model(rows=[4], conditioning="none"), seed=7)  # of which nothing but the seed is known
    equal = [write(f"equal{s}", model(rows=[s], conditioning="none"), seed=7, initial="a" * 64) for s in rows[:3]]
    merge([*equal, older], tmp_path / "o", 2)
    bare = [write(f"bare{s}", model(rows=[s], conditioning="none"), initial="a" * 64, label_drop=0.0) for s in rows]
    merge(bare, tmp_path / "p", 2)
    assert [(card.label_drop, card.warm_from) for card in load_model(tmp_path / "p").cards] == [(0.0, "")] * 2


def test_a_folder_with_other_files_is_refused_before_the_search(gains, images, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("x", encoding="utf-8")
    monkeypatch.setattr("lightning_tdisent.models.merge.search_weights", None)
    assert "holds other files (notes.txt)" in refusal(gains, tmp_path / "m", 2, weights="search", data=images)


def test_images_that_cannot_be_searched_on_are_refused_before_the_work(pixels, write, tmp_path, states):
    labels = torch.tensor([0, 1, -1])
    data = ImageSet(torch.zeros(3, *SHAPE, dtype=torch.uint8), labels, "any")
    files = [write(f"c{s}", pixels(0.5, [s], classes=2)) for s in states.rows]
    with pytest.raises(InputError, match=r"its labels run from -1 to 1 \(-1: none\), the experts have classes 0 to 1"):
        merge(files, tmp_path / "out", 2, "search", data=data)


def test_a_merged_composite_is_exported_and_draws_the_same(files, tmp_path, monkeypatch):
    """compose --merge, then export, then load: bit for bit; a name in use is refused before anything is averaged."""
    merge(files, tmp_path / "merged", 2)
    from lightning_tdisent.models.export import export

    one, two = (load_model(folder) for folder in (tmp_path / "merged", export(tmp_path / "merged", tmp_path / "out")))
    assert torch.equal(DDIM()(one, [0, 1]), DDIM()(two, [0, 1]))
    monkeypatch.setattr("lightning_tdisent.models.merge.average", None)
    with pytest.raises(InputError, match="already holds a composite"):
        merge(files, tmp_path / "merged", 2)
    with pytest.raises(InputError, match="a composite is a folder"):
        merge(files, tmp_path / "merged.zip", 2)


def test_merging_nothing_or_on_no_images_is_refused_in_one_line(files, tmp_path, capsys, digits):
    words = ["compose", *map(str, files), "--merge", "2", "--out", str(tmp_path / "out"), "--merge-data", str(digits)]
    for n in ("0", "-3"):
        assert main([*words, "-n", n]) == 2
        assert capsys.readouterr().err == f"error: -n {n}: at least 1 image\n"
