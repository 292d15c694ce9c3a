"""`sample`: the same images from any number of threads, and the progress that it reports."""

import threading

import pytest
import torch

from lightning_tdisent import processes
from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.errors import NotFinite
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.guidance import Guided
from lightning_tdisent.sampling.sample import block_size, sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral


class Keeping(Network):
    """A network that keeps its input on itself between two lines of `forward`, as some do."""

    def __init__(self, shape):
        super().__init__(shape, None, None)
        self.weight, self.threads = torch.nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, time=None, label=None):
        self.kept = x
        self.threads.append(threading.get_ident())
        torch.linalg.svdvals(torch.ones(60, 60))  # other threads run meanwhile
        return torch.tanh(self.weight * self.kept)


def drawn(model, sampler, n, **options):
    batches = [*sample(model, sampler, range(n), **options)]
    return torch.cat(batches), [len(batch) for batch in batches]


@pytest.mark.parametrize("kind", ["single", "composite", "guided"])
def test_images_are_bitwise_the_same_for_any_number_of_threads(kind, model):
    if kind == "composite":
        made = CompositeDenoiser([model(rows=[s], seed=s) for s in (1, 2, 3, 4)]).eval()
    else:
        made = model(classes=3) if kind == "guided" else model()
    made = Guided(made, 2.0) if kind == "guided" else made
    one, sizes = drawn(made, Ancestral(), 300, threads=1)
    before = torch.get_num_threads()
    for threads in (2, 3, 16):
        other, same = drawn(made, Ancestral(), 300, threads=threads)
        assert torch.equal(one, other)
        assert sizes == same
        assert torch.get_num_threads() == before


def test_a_network_that_keeps_its_input_is_copied_for_each_thread(states):
    network = Keeping([1, 8, 8])
    made = Denoiser(network, V(), states).eval()
    one, _ = drawn(made, DDIM(), 300, threads=1)
    for _ in range(3):
        assert torch.equal(one, drawn(made, DDIM(), 300, threads=4)[0])
    assert set(network.threads) == {threading.get_ident()}  # the model itself was used by no other thread


def test_threads_are_those_of_the_environment_or_all_cores_and_ranks_share_them(states, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert processes.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert processes.threads() == 1
    for other in ("", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", other)
        assert processes.threads() == processes.cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    for world, expected in ((1, 3), (2, 2), (8, 1)):  # of three blocks
        used = []
        monkeypatch.setattr(f"{sample.__module__}.rank_and_world", lambda world=world: (0, world))
        monkeypatch.setattr(f"{sample.__module__}._copies", lambda denoise, count, used=used: used.append(count))
        drawn(Denoiser(Keeping([1, 8, 8]), V(), states).eval(), DDIM(), 300)
        assert used == ([expected] if expected > 1 else [])


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_adds_up_to_the_number_of_images_step_by_step(threads, model):
    told = []
    drawn(model(), DDIM(), 300, threads=threads, progress=told.append)
    assert sum(told) == pytest.approx(300)
    assert len(told) == 3 * 4  # blocks x steps


def test_threads_end_when_an_image_is_not_finite_or_nobody_asks_for_more(states):
    class Spoilt(Keeping):
        def forward(self, x, time=None, label=None):
            return super().forward(x) / (0 if len(self.threads) > 6 else 1)

    made = Denoiser(Spoilt([1, 8, 8]), V(), states).eval()
    with pytest.raises(NotFinite):
        drawn(made, DDIM(), 400, threads=2)
    images = sample(Denoiser(Keeping([1, 8, 8]), V(), states).eval(), DDIM(), range(400), threads=2)
    next(images)
    images.close()
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_a_model_that_cannot_be_copied_is_used_by_one_thread(states):
    class Closed(Keeping):
        def __deepcopy__(self, memo):
            raise TypeError("cannot be copied")

    network = Closed([1, 8, 8])
    made = Denoiser(network, V(), states).eval()
    assert len(drawn(made, DDIM(), 300, threads=4)[0]) == 300
    assert set(network.threads) == {threading.get_ident()}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ([1, 8, 8], 128),
        ([1, 28, 28], 32),
        ([3, 32, 32], 16),
        ([3, 64, 64], 16),
        ([3, 256, 256], 16),
        ([3, 1024, 1024], 16),
    ],
)
def test_a_block_of_any_shape_is_a_power_of_two_between_its_bounds(shape, size):
    assert block_size(shape) == size


def test_images_of_256_pixels_are_drawn(states):
    images = torch.cat(list(sample(Denoiser(Keeping([1, 256, 256]), V(), states).eval(), DDIM(steps=1), range(2))))
    assert images.shape == (2, 1, 256, 256)
