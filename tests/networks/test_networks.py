import json

import pytest
import torch
from torch import Tensor

from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.dit import DiT
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet

SHAPES = {
    "unet": lambda **k: UNet([1, 8, 8], channels=[8, 16], layers=1, attention=[1], groups=4, **k),
    "dit": lambda **k: DiT([1, 8, 8], patch=4, depth=2, heads=2, head=8, **k),
}
KINDS = pytest.mark.parametrize("kind", SHAPES)
CLASSES = pytest.mark.parametrize("classes", [None, 3])


def make(kind: str, seed: int = 0, **args: object) -> Network:
    """Return a network with only random parameters, since zeros at initialisation would hide what they multiply."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SHAPES[kind](**args)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return net.eval()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def index(t: int, n: int = 3) -> Tensor:
    return torch.full((n,), t)


def size(net: Network) -> int:
    return sum(p.numel() for p in net.parameters())


@KINDS
@CLASSES
@torch.no_grad()
def test_the_output_depends_on_the_state_unless_told_not_to(kind, classes):
    label = None if classes is None else torch.tensor([0, 1, 2])
    seeing = make(kind, classes=classes, conditioning="state")
    assert (seeing(images(), index(3), label) - seeing(images(), index(700), label)).abs().max() > 1e-3
    blind = make(kind, classes=classes, conditioning="none")
    out = blind(images(), index(3), label)
    assert out.std() > 0.01
    for t in (None, index(1), index(1000), torch.tensor([5, 600, 1])):
        assert torch.equal(blind(images(), t, label), out)
    # the default is state
    default = make(kind, classes=classes)
    assert torch.equal(default(images(), index(3), label), seeing(images(), index(3), label))


@KINDS
@CLASSES
def test_a_time_agnostic_network_has_nothing_of_the_embedding(kind, classes):
    seeing, blind = make(kind, classes=classes), make(kind, classes=classes, conditioning="none")
    assert size(blind) < size(seeing)
    words = ["time_embedding", "timestep_embedder"] + ["time_emb_proj", "norm1.linear.weight"] * (classes is None)
    for word in words:
        assert not any(word in name for name in blind.state_dict()), word
    assert any("time_embedding" in name or "timestep_embedder" in name for name in seeing.state_dict())
    assert any("norm1.linear" in name or "time_emb_proj" in name for name in seeing.state_dict())


# counted by hand: a time MLP of widths 8 -> 32 -> 32, and a projection of it in each residual block of width 8 or 16
def test_parameters_that_a_time_agnostic_unet_saves():
    saved = size(make("unet")) - size(make("unet", conditioning="none"))
    mlp = (8 * 32 + 32) + (32 * 32 + 32)
    # one block of width 8 and one of 16 down, two of 16 in the middle, two of 16 and two of 8 up
    projections = [8, 16, 16, 16, 16, 16, 8, 8]
    assert saved == mlp + sum(32 * width + width for width in projections)
    with_classes = size(make("unet", classes=3)) - size(make("unet", classes=3, conditioning="none"))
    assert with_classes == mlp


def test_parameters_that_a_time_agnostic_dit_saves():
    mlp = (256 * 16 + 16) + (16 * 16 + 16)
    assert size(make("dit", classes=3)) - size(make("dit", classes=3, conditioning="none")) == 2 * mlp
    saved = size(make("dit")) - size(make("dit", conditioning="none"))
    assert saved == 2 * (mlp + 16 * 6 * 16) + 16 * 2 * 16


@KINDS
@CLASSES
@pytest.mark.parametrize("conditioning", ["state", "none"])
def test_every_parameter_learns(kind, classes, conditioning):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SHAPES[kind](classes=classes, conditioning=conditioning)
    label = None if classes is None else torch.tensor([0, 1, 2, 3])
    target = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    # the gates of a transformer are initialised to zero and open with the first steps
    for _ in range(3):
        optimizer.zero_grad()
        (net(images(4), torch.tensor([1, 50, 300, 1000]), label) - target).square().mean().backward()
        optimizer.step()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


@KINDS
@CLASSES
@torch.no_grad()
def test_at_index_says_what_the_network_says_there(kind, classes):
    net = make(kind, classes=classes)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    labels = [None] if classes is None else [None, torch.tensor([0, 1, 2]), torch.tensor([3, 0, 3])]
    for t in (1, 300, 992):
        there = net.at_time(t).eval()
        assert not there.sees_state
        assert size(there) < size(net)
        for label in labels:
            expected = net(images(), index(t), label)
            assert torch.allclose(there(images(), None, label), expected, rtol=1e-5, atol=1e-5)
            for other in {1, 300, 992} - {t}:
                assert (there(images(), None, label) - net(images(), index(other), label)).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@KINDS
@CLASSES
@torch.no_grad()
def test_at_index_keeps_the_precision_of_the_network(kind, classes):
    net = make(kind, classes=classes).double()
    there = net.at_time(300)
    x = images().double()
    assert (there(x) - net(x, index(300))).abs().max() < 1e-5


@KINDS
@CLASSES
@pytest.mark.parametrize("conditioning", ["state", "none"])
@torch.no_grad()
def test_weights_in_bfloat16(kind, classes, conditioning):
    net = make(kind, classes=classes, conditioning=conditioning)
    expected = net(images(), index(300))
    found = net.to(torch.bfloat16)(images().bfloat16(), index(300))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.03 * expected.abs().max()


@KINDS
def test_time_agnostic_is_the_same_network_without_the_state(kind):
    blind = make(kind, classes=3).time_agnostic()
    expected = spec(make(kind, classes=3, conditioning="none"))
    assert spec(blind) == expected


@KINDS
@pytest.mark.parametrize("conditioning", ["state", "none"])
@torch.no_grad()
def test_labels_change_the_output_and_the_null_label_is_the_default(kind, conditioning):
    net = make(kind, classes=3, conditioning=conditioning)
    outs = [net(images(), index(300), torch.full((3,), c)) for c in range(4)]
    for i in range(4):
        for j in range(i):
            assert (outs[i] - outs[j]).abs().max() > 1e-3
    assert torch.equal(net(images(), index(300)), outs[3])
    mixed = net(images(), index(300), torch.tensor([2, 0, 3]))
    for i, c in enumerate([2, 0, 3]):
        assert torch.allclose(mixed[i], outs[c][i], atol=1e-5)


@KINDS
@CLASSES
@torch.no_grad()
def test_each_sample_is_its_own(kind, classes):
    net = make(kind, classes=classes)
    label, t = None if classes is None else torch.tensor([0, 1, 2]), torch.tensor([1, 300, 992])
    together = net(images(), t, label)
    for i in range(3):
        one = net(images()[i : i + 1], t[i : i + 1], None if label is None else label[i : i + 1])
        assert torch.allclose(together[i : i + 1], one, atol=1e-5)


@KINDS
def test_no_label_is_dropped_behind_the_back(kind):
    net = make(kind, classes=3).train()
    before = torch.get_rng_state()
    with torch.no_grad():
        outs = [net(images(), index(300), torch.tensor([0, 1, 2])) for _ in range(20)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert torch.equal(torch.get_rng_state(), before)


@KINDS
@CLASSES
@torch.no_grad()
def test_inputs_are_left_alone(kind, classes):
    x, t, label = images(), index(300), None if classes is None else torch.tensor([0, 1, 2])
    make(kind, classes=classes)(x, t, label)
    assert torch.equal(x, images())
    assert torch.equal(t, index(300))
    assert label is None or label.tolist() == [0, 1, 2]


@KINDS
@CLASSES
@pytest.mark.parametrize("conditioning", ["state", "none", None])
@torch.no_grad()
def test_built_again_from_json_with_the_same_weights(kind, classes, conditioning):
    net = make(kind, classes=classes, conditioning=conditioning)
    again = build(json.loads(json.dumps(spec(net))), Network).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(images(), index(300)), net(images(), index(300)))


def test_a_network_that_cannot_fold_its_embedding_says_so():
    class Plain(Network):
        pass

    with pytest.raises(InputError, match="Plain has no at_time"):
        Plain([1, 8, 8], None, None).at_time(3)


@KINDS
def test_inputs_that_do_not_fit_are_refused(kind):
    with pytest.raises(InputError, match="conditioned on the state"):
        make(kind)(images())
    with pytest.raises(InputError, match="unconditional network"):
        make(kind)(images(), index(3), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: UNet([8, 8], [8]), [r"[8, 8]"]),
        (lambda: UNet([1, 0, 8], [8]), ["[1, 0, 8]"]),
        (lambda: DiT([1, 8, 8], classes=0), ["classes", "0"]),
        (lambda: UNet([1, 8, 8], [8], classes=-2), ["classes", "-2"]),
        (lambda: UNet([1, 8, 8], [8], conditioning="time"), ["conditioning", "'time'"]),
        (lambda: DiT([1, 8, 8], conditioning="maybe"), ["conditioning", "'maybe'"]),
        (lambda: UNet([1, 6, 8], [8, 8, 8]), ["6x8", "divisible by 4"]),
        (lambda: UNet([1, 8, 6], [8, 8, 8]), ["8x6", "divisible by 4"]),
        (lambda: UNet([1, 8, 8], [8, 12]), ["groups: 8", "[8, 12]"]),
        (lambda: UNet([1, 8, 8], [8, 8], attention=[2]), ["[2]", "0..1"]),
        (lambda: DiT([1, 8, 4]), ["8x4", "patch=2"]),
        (lambda: DiT([1, 9, 9], patch=2), ["9x9", "patch=2"]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make_one, words):
    with pytest.raises(InputError) as refusal:
        make_one()
    for word in words:
        assert word in str(refusal.value)


class Plain(Network):
    """A network that needs no class and is never told whether to use the time."""

    def __init__(self, shape, width=8):
        super().__init__(shape)
        self.width = width
        self.net = torch.nn.Conv2d(shape[0], shape[0], 3, padding=1)

    def forward(self, x, time=None, label=None):
        return self.net(x)


def test_a_network_of_ones_own_needs_no_classes_and_no_conditioning_unless_it_is_an_expert():
    network = Plain([1, 8, 8])
    assert (network.classes, network.conditioning, network.sees_state) == (None, None, True)
    with pytest.raises(InputError, match="Plain has no argument conditioning, and an expert of one state is not told"):
        network.time_agnostic()
