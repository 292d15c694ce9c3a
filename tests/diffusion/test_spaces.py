import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.diffusion.spaces import Haar, Pixels
from lightning_tdisent.errors import InputError


def test_known_coefficients():
    x = torch.arange(48.0).reshape(1, 3, 4, 4)
    z = Haar(1).forward(x)
    assert z[0, :, :2, :2].tolist() == [[[5, 9], [21, 25]], [[37, 41], [53, 57]], [[69, 73], [85, 89]]]
    assert (z[..., 2:, :2] == -4).all()  # top against bottom
    assert (z[..., :2, 2:] == -1).all()  # left against right
    assert (z[..., 2:, 2:] == 0).all()  # diagonal
    assert torch.equal(Haar(1).inverse(z), x)


def test_known_coefficients_of_three_levels():
    x = torch.arange(192.0).reshape(1, 3, 8, 8)
    z, column = Haar(3).forward(x), Haar(3).columns(8, 8)
    assert z[0, :, 0, 0].tolist() == [252, 764, 1276]
    assert z[0, 0, 1, 0] == -128
    assert z[0, 0, 0, 1] == -16
    assert z[0, 0, 1, 1] == 0
    for k, down, side in ((2, -32, -4), (3, -8, -1)):
        h = 2 ** (k - 1)
        assert (z[..., h : 2 * h, :h] == down).all()
        assert (z[..., :h, h : 2 * h] == side).all()
        assert (z[..., h : 2 * h, h : 2 * h] == 0).all()
    assert z.square().sum() == x.square().sum() == 2340896
    assert torch.equal(Haar(3).inverse(z), x)
    assert [int((column == k).sum()) for k in range(4)] == [1, 3, 12, 48]


def test_a_constant_image_is_its_average():
    z = Haar(3).forward(torch.ones(1, 1, 8, 8))
    assert z[0, 0, 0, 0] == 8
    assert z.square().sum() == 64


@settings(max_examples=30, deadline=None)
@given(
    levels=st.integers(1, 4),
    channels=st.integers(1, 5),
    high=st.integers(1, 3),
    wide=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_orthonormal_for_any_size(levels, channels, high, wide, seed):
    shape = (2, channels, high * 2**levels, wide * 2**levels)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = Haar(levels)
    basis.check(shape[1:])
    z = basis.forward(x)
    assert torch.allclose(basis.inverse(z), x, atol=1e-12)
    assert float(z.square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-12)


@pytest.mark.parametrize("scales", [None, [4.0, 1.0, 0.5, 0.2]])
def test_a_state_without_the_finest_component_is_a_corner(scales):
    """The coarse image's coefficients are those of the whole without the finest, scales included."""
    x, basis = torch.randn(2, 3, 16, 8, dtype=torch.float64), Haar(3, scales)
    z = basis.forward(x)
    for finished in range(4):
        corner = basis.forward(basis.coarse(x, finished), finished)
        assert torch.allclose(corner, z[..., : 16 >> finished, : 8 >> finished], atol=1e-12)
        assert torch.allclose(basis.inverse(corner, finished), basis.coarse(x, finished), atol=1e-12)


def test_scales_divide_their_own_component():
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    plain, scaled, column = Haar(2).forward(x), Haar(2, [3.0, 2.0, 0.5]).forward(x), Haar(2).columns(8, 8)
    for k, scale in enumerate((3.0, 2.0, 0.5)):
        assert torch.allclose(scaled[..., column == k] * scale, plain[..., column == k], atol=1e-12)
    assert Haar(2, [3.0, 2.0, 0.5]).isometry.scales is None


def test_deviations_make_unit_components():
    images = torch.randn(64, 3, 8, 8).cumsum(-1).cumsum(-2)
    scales = Haar(2).deviations(images)
    assert Haar(2, scales).deviations(images) == scales  # of the data, whatever the basis divides by
    z, column = Haar(2, scales).forward(images), Haar(2).columns(8, 8)
    for k in range(3):
        assert float(z[..., column == k].square().mean().sqrt()) == pytest.approx(1, rel=5e-3)


def test_pixels_are_themselves():
    x = torch.randn(1, 2, 3, 5)
    assert Pixels().forward(x) is x
    assert Pixels().inverse(x) is x
    assert Pixels().K == 1


@pytest.mark.parametrize(("levels", "shape"), [(3, (3, 12, 16)), (1, (1, 7, 8)), (5, (1, 16, 16))])
def test_sides_that_do_not_halve_are_refused(levels, shape):
    with pytest.raises(InputError, match=rf"divisible by {2**levels}, the image has {shape[1]}x{shape[2]}"):
        Haar(levels).check(shape)


@pytest.mark.parametrize("scales", [[1.0], [1.0, 0.0], [1.0, -2.0], [1.0, float("inf")]])
def test_scales_that_cannot_divide_are_refused(scales):
    with pytest.raises(InputError, match="must be as many above 0"):
        Haar(1, scales)


def test_no_levels_are_refused():
    with pytest.raises(InputError, match=r"levels must lie in 1\.\.16"):
        Haar(0)
