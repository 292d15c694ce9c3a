import math

import pytest
import torch
from torch import Tensor

from lightning_tdisent.diffusion.objectives import P2, X0, Constant, Eps, Likelihood, MinSNR, V
from lightning_tdisent.diffusion.schedules import Cosine, Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.guidance import Guided
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM

KINDS = {"eps": Eps, "x0": X0, "v": V}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(states: LatentStates, s: int) -> tuple[float, float]:
    """(a, b) from the betas, by plain arithmetic."""
    ab = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(int(states.index[s])))
    return math.sqrt(ab), math.sqrt(1 - ab)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_by_hand(kind, toy, states):
    net = toy([2, 3, 3]).double()
    denoise, x = Denoiser(net, KINDS[kind](), states), draw(4, 2, 3, 3)
    for s in (1, 2, 4):
        net.seen.clear()
        found = denoise(x, s)
        assert net.seen[0].tolist() == [250 * s] * 4
        a, b = row(states, s)
        raw = net(x, torch.full((4,), 250 * s))
        expected = {"eps": (x - b * raw) / a, "x0": raw, "v": a * x - b * raw}[kind]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_time_agnostic_network_gets_no_index(toy, states):
    net = toy([1, 2, 2], conditioning="none")
    denoise, x = Denoiser(net, V(), states), draw(2, 1, 2, 2).float()
    denoise(x, 3)
    denoise.loss(x, torch.tensor([1, 3]), x)
    assert net.seen == [None, None]


def test_a_network_that_trains_is_in_eval_mode_for_an_estimate_alone(states):
    """As `trainer.fit` leaves it: dropout would make the image of a seed another one at each call."""
    denoise = Denoiser(UNet([1, 8, 8], [8], 1, groups=4, dropout=0.5), V(), states).train()
    denoise.network.net.conv_in.eval()
    one, other = (torch.cat(list(sample(denoise, DDIM(), range(4)))) for _ in range(2))
    assert torch.equal(one, other)
    modes = [module.training for module in denoise.modules()]
    assert modes.count(False) == 1
    x, s = draw(4, 1, 8, 8).float(), torch.tensor([1, 2, 3, 4])
    assert not torch.equal(denoise.loss(x, s, x), denoise.loss(x, s, x))  # a training drops
    assert torch.equal(one, torch.cat(list(sample(denoise.eval(), DDIM(), range(4)))))


@pytest.mark.parametrize("weight", [Constant(), MinSNR(), P2()], ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(kind, weight, toy, states):
    net = toy([2, 3, 3]).double()
    denoise = Denoiser(net, KINDS[kind](weight), states)
    x0, eps, rows = draw(5, 2, 3, 3, seed=1), draw(5, 2, 3, 3, seed=2), [4, 1, 2, 2, 3]
    net.seen.clear()
    found = denoise.loss(x0, torch.tensor(rows), eps)
    assert net.seen[0].tolist() == [1000, 250, 500, 500, 750]
    assert found.shape == (5,)
    assert found.dtype == torch.float32
    for i, s in enumerate(rows):
        a, b = row(states, s)
        snr = (a / b) ** 2
        raw = net((a * x0 + b * eps)[i : i + 1], torch.tensor([250 * s]))[0]
        target = {"eps": eps, "x0": x0, "v": a * eps - b * x0}[kind][i]
        on_x0 = {"MinSNR": min(snr, 5.0), "P2": snr / (1 + snr)}.get(type(weight).__name__)
        on_raw = 1.0 if on_x0 is None else on_x0 * {"eps": 1 / snr, "x0": 1.0, "v": b * b}[kind]
        assert found[i].item() == pytest.approx(on_raw * (raw - target).square().mean().item(), rel=1e-5)


class Says(Network):
    """Says one x0_hat in the words of eps, x0 or v."""

    def __init__(self, shape: list[int], kind: str, states: LatentStates) -> None:
        super().__init__(shape, None, None)
        self.kind, self.states = kind, states

    def forward(self, x: Tensor, index: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        rows = [self.states.index.tolist().index(t) for t in index.tolist()]
        table = torch.tensor([row(self.states, s) for s in rows], dtype=x.dtype)
        a, b = (c[:, None, None, None] for c in table.T)
        x0 = torch.tanh(x) * 0.9
        eps = (x - a * x0) / b
        return {"eps": eps, "x0": x0, "v": a * eps - b * x0}[self.kind]


@pytest.mark.parametrize("weight", [MinSNR(), MinSNR(1.0), P2(), Likelihood()], ids=["5", "1", "P2", "likelihood"])
def test_the_same_error_costs_the_same_in_every_parametrisation(weight):
    states = LatentStates(Linear(), S=10)
    x0, eps, rows = draw(10, 1, 4, 4, seed=1), draw(10, 1, 4, 4, seed=2), torch.arange(1, 11)
    losses = [Denoiser(Says([1, 4, 4], k, states), c(weight), states).loss(x0, rows, eps) for k, c in KINDS.items()]
    assert (losses[0] > 0).all()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=0)


def test_the_loss_is_zero_for_the_right_answer(states):
    class Perfect(Network):
        def forward(self, x: Tensor, index: Tensor | None = None, label: Tensor | None = None) -> Tensor:
            return self.answer

    x0, eps = draw(4, 1, 2, 2, seed=1), draw(4, 1, 2, 2, seed=2)
    net = Perfect([1, 2, 2], None, None)
    for cls in KINDS.values():
        a, b = states.coefficients(torch.arange(1, 5))
        net.answer = cls().target(x0, eps, a, b)
        assert Denoiser(net, cls(), states).loss(x0, torch.arange(1, 5), eps).tolist() == [0.0] * 4


@pytest.mark.parametrize("weight", [Constant(), MinSNR(), P2(), Likelihood()], ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_two_columns_are_two_tables_side_by_side(kind, weight, toy, states):
    shift = torch.tensor([0.0, 2.0, 1.5, 1.0, 0.5], dtype=torch.float64)[:, None]
    tables = [
        LatentStates.from_table(states.log_snr - k * shift, states.index, Linear(), terminal_bound=0.1) for k in (0, 1)
    ]
    both = LatentStates.from_table(torch.cat([t.log_snr for t in tables], 1), states.index, Linear())
    x0, eps, rows = draw(4, 2, 3, 3, seed=1), draw(4, 2, 3, 3, seed=2), torch.tensor([1, 2, 3, 4])
    net = toy([2, 3, 3]).double()
    wide = Denoiser(net, KINDS[kind](weight), both)
    narrow = [Denoiser(net, KINDS[kind](weight), t) for t in tables]
    # the network is elementwise: each channel may be given alone
    halves = [narrow[k].loss(x0[:, k : k + 1], rows, eps[:, k : k + 1]) for k in (0, 1)]
    torch.testing.assert_close(wide.loss(x0, rows, eps), (halves[0] + halves[1]) / 2, rtol=1e-5, atol=0)
    for s in (1, 4):
        expected = torch.cat([narrow[k](x0[:, k : k + 1], s) for k in (0, 1)], 1)
        torch.testing.assert_close(wide(x0, s), expected, rtol=1e-9, atol=1e-9)


def test_only_the_network_has_weights(model):
    denoise = model(X0(MinSNR()))
    assert set(denoise.state_dict()) == {f"network.{k}" for k in denoise.network.state_dict()}
    table = denoise.weights.clone()
    denoise.to(torch.bfloat16)
    assert next(denoise.parameters()).dtype == torch.bfloat16
    assert torch.equal(denoise.weights, table)
    assert denoise.weights.dtype == denoise.states.log_snr.dtype == torch.float64


def test_inputs_are_not_modified(toy, states):
    denoise = Denoiser(toy([1, 2, 2], classes=3).double(), V(MinSNR()), states)
    inputs = [draw(2, 1, 2, 2, seed=1), torch.tensor([1, 4]), draw(2, 1, 2, 2, seed=2), torch.tensor([0, 3])]
    copies = [t.clone() for t in inputs]
    denoise.loss(*inputs)
    denoise(inputs[0], 3, inputs[3])
    assert all(torch.equal(t, c) for t, c in zip(inputs, copies, strict=True))


def test_rows_owned(model):
    assert model().rows == [1, 2, 3, 4]
    some = model(rows=[2, 3])
    assert some.at(3) is some
    with pytest.raises(InputError, match=r"row 4 .*\[2, 3\]"):
        some.at(4)
    x = torch.zeros(1, 1, 8, 8)
    assert torch.equal(some(x, 3), model()(x, 3))
    with pytest.raises(InputError, match=r"row 4 .*\[2, 3\]"):
        some(x, 4)


@pytest.mark.parametrize(("rows", "word"), [([0], r"\[0\].*1\.\.4"), ([3, 5, 7], r"\[5, 7\].*1\.\.4"), ([], r"\[\]")])
def test_rows_outside_the_table_are_refused(model, rows, word):
    with pytest.raises(InputError, match=word):
        model(rows=rows)


def test_eps_with_zero_terminal_signal_is_refused(toy):
    with pytest.raises(InputError, match=r"Eps .*zero terminal"):
        Denoiser(toy([1, 2, 2]), Eps(), LatentStates(Linear(zero_terminal=True), S=4))


def test_restricted_to_fewer_rows_it_says_the_same(toy):
    full, few = LatentStates(Linear(), S=100), LatentStates(Linear(), S=4)
    denoise, x = Denoiser(toy([1, 2, 2]).double(), Eps(), full), draw(3, 1, 2, 2)
    less = denoise.restrict(few)
    assert less.states.S == 4
    assert less.rows == [1, 2, 3, 4]
    for s in range(1, 5):
        assert torch.equal(less(x, s), denoise(x, 25 * s))


@pytest.mark.parametrize(
    "states",
    [
        LatentStates(Cosine(), S=4),
        LatentStates(Linear(), S=4, kind="native", terminal_bound=1.0),
        LatentStates(Linear(), indices=[255, 1000]),
    ],
    ids=["cosine", "native", "no row"],
)
def test_restricting_to_other_values_is_refused(toy, states):
    denoise = Denoiser(toy([1, 2, 2]), V(), LatentStates(Linear(), S=100))
    with pytest.raises(InputError, match=r"not rows of this table|other values"):
        denoise.restrict(states)


def test_guidance_by_hand(toy, states):
    denoise = Denoiser(toy([1, 2, 2], classes=3).double(), Eps(), states)
    x, label = draw(3, 1, 2, 2), torch.tensor([2, 0, 1])
    for s in (1, 4):
        given, free = denoise(x, s, label), denoise(x, s)
        assert (given - free).abs().max() > 0.01
        torch.testing.assert_close(Guided(denoise, 1.0)(x, s, label), given, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(Guided(denoise, 0.0)(x, s, label), free, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(Guided(denoise, 3.5)(x, s, label), free + 3.5 * (given - free))
    assert label.tolist() == [2, 0, 1]


# 2207.12598, eq. 6 is written for eps
def test_guiding_x0_is_guiding_eps(toy, states):
    net = toy([1, 2, 2], classes=3).double()
    x, label, s = draw(3, 1, 2, 2), torch.tensor([2, 0, 1]), 2
    a, b = row(states, s)
    index = torch.full((3,), 500)
    given, free = net(x, index, label), net(x, index, torch.full((3,), 3))
    expected = (x - b * (free + 2.5 * (given - free))) / a
    torch.testing.assert_close(Guided(Denoiser(net, Eps(), states), 2.5)(x, s, label), expected)


def test_guidance_without_classes_or_labels_is_refused(toy, states):
    with pytest.raises(InputError, match="class-conditional"):
        Guided(Denoiser(toy([1, 2, 2]), V(), states), 2.0)
    with pytest.raises(InputError, match="labels"):
        Guided(Denoiser(toy([1, 2, 2], classes=3), V(), states), 2.0)(torch.zeros(1, 1, 2, 2), 1)
