"""What conditional models are given: files that operators read, own pictures and masks, known pixels put back."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_tdisent.cli import main
from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Edges, Grey, Inpainting, Operator, SuperResolution, masks
from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.schedules import Geometric
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.spec import build, changed, identity, spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.observations import Observations
from lightning_tdisent.images import from_uint8
from lightning_tdisent.models.card import read_card
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver


class MaskFile(Operator):
    """A mask in a file."""

    def __init__(self, mask: str) -> None:
        self.mask, self.values = mask, torch.from_numpy(np.load(mask))

    def kernel(self, shape, item):
        return self.values[None, None]

    def observe(self, x0, item):
        return x0 * self.values


@pytest.fixture
def conditional(unet):
    """A conditional denoiser of 8x8 digits with random weights."""

    def make(operator, **condition):
        states = ComponentStates([1, 8, 8], observation=Observation(operator, **condition), S=4)
        return Denoiser(unet(shape=states.shape_at(1)), V(), states).eval()

    return make


@pytest.fixture
def own(tmp_path, conditional, write):
    """A file of weights whose operator reads mask.npy."""
    path = tmp_path / "mask.npy"
    np.save(path, np.eye(8, dtype=np.float32))
    denoiser = conditional(MaskFile(str(path)))
    return write("own", denoiser), path, denoiser


def test_a_file_is_part_of_the_part_that_reads_it(own, tmp_path):
    weights, path, denoiser = own
    described = spec(denoiser.states.observation.operator)
    assert list(described["files"]) == [str(path)]
    other = tmp_path / "elsewhere.npy"
    other.write_bytes(path.read_bytes())
    moved = ComponentStates([1, 8, 8], observation=Observation(MaskFile(str(other))), S=4)
    assert moved.fingerprint == denoiser.states.fingerprint  # by content, not by path
    assert identity(spec(moved)) == identity(spec(denoiser.states))
    np.save(path, 1 - np.eye(8, dtype=np.float32))
    assert changed(described)
    assert spec(denoiser.states.observation.operator) == described  # as it was read
    again = ComponentStates([1, 8, 8], observation=Observation(MaskFile(str(path))), S=4)
    assert again.fingerprint != denoiser.states.fingerprint
    with pytest.raises(InputError, match=r"mask\.npy: .*MaskFile was made with a file of sha256 .*put that file back"):
        build(described, Operator)
    assert read_card(weights).fingerprint == denoiser.states.fingerprint


def test_a_word_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fresh").write_text("no", encoding="utf-8")
    assert "files" not in str(spec(Observation(Inpainting(), draw="fresh")))


@pytest.mark.parametrize("change", ["another", "gone"])
def test_a_changed_file_is_refused_by_every_command(own, tmp_path, write, conditional, capsys, change):
    weights, path, denoiser = own
    rows = [write(f"part{k}", Denoiser(denoiser.network, V(), denoiser.states, [2 * k + 1, 2 * k + 2])) for k in (0, 1)]
    commands = [
        ["sample", weights, "--out", tmp_path / "images", "--observe", "data/digits"],
        ["evaluate", weights, "--data", "data/digits", "--protocol", "digits", "-n", 8, "--out", tmp_path / "e"],
        ["compose", *rows, "--out", tmp_path / "composite"],
        ["export", weights, "--out", tmp_path / "exported"],
    ]
    if change == "another":
        np.save(path, 1 - np.eye(8, dtype=np.float32))
    else:
        path.unlink()
    for command in commands:
        assert main([str(word) for word in command]) == 2
        said = capsys.readouterr().err
        assert "mask.npy" in said
        assert "put that file back" in said
        assert "Traceback" not in said
    assert not (tmp_path / "composite").exists()


def test_a_training_whose_file_changes_keeps_its_weights_and_their_card(own, card_of):
    """The card says the content that was read: whoever puts that file back can load the weights."""
    _, path, denoiser = own
    before = card_of(denoiser)
    np.save(path, 1 - np.eye(8, dtype=np.float32))
    assert card_of(denoiser) == before


def test_a_kernel_that_was_changed_is_refused(tmp_path, conditional):
    states = conditional(Inpainting(0.25)).states
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    Observations.of(Inpainting(0.25), images, torch.arange(4)).save(tmp_path / "seen.safetensors")
    Observations.load(tmp_path / "seen.safetensors").check(states)
    tensors = load_file(tmp_path / "seen.safetensors")
    tensors["kernel"] = tensors["kernel"].roll(1, 0)
    save_file(tensors, tmp_path / "other.safetensors", {"operator": json.dumps(spec(Inpainting(0.25)))})
    with pytest.raises(InputError, match=r"the stored kernel.*is not the one that Inpainting"):
        Observations.load(tmp_path / "other.safetensors").check(states)


def picture(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path)))[None]


@pytest.fixture
def drawn(tmp_path, capsys):
    """Draw with a file of weights: what was said, and the folder of images; or the refusal."""
    count = iter(range(99))

    def run(weights, *words, code=0):
        out = tmp_path / f"drawn{next(count)}"
        capsys.readouterr()
        assert main(["sample", str(weights), "--out", str(out), *map(str, words)]) == code, capsys.readouterr()
        said = capsys.readouterr()
        return (out, said.out) if code == 0 else said.err

    return run


def test_an_own_picture_and_mask(tmp_path, conditional, write, drawn):
    """White pixels of the mask are known; with --put-back they come out as they went in."""
    weights = write("hole", conditional(Inpainting(0.25)))
    image = picture(tmp_path / "mine.png", torch.arange(64).reshape(8, 8) * 4)
    hole = torch.full((8, 8), 255)
    hole[2:5, 3:7] = 0
    mask = picture(tmp_path / "mask.png", hole)
    out, said = drawn(weights, "--seeds", "5:8", "--observe", image, "--mask", mask)
    assert "item 0 of" in said
    assert "white pixels are known, 81% of all" in said
    seen = Observations.load(out / "observations.safetensors")
    assert seen.own_mask
    assert torch.equal(seen.kernel, (hole == 255).float().expand(3, 1, 8, 8))
    assert torch.equal(seen.y, from_uint8(pixels(image)) * seen.kernel)
    again, _ = drawn(weights, "--seeds", "5:8", "--observe", out / "observations.safetensors")
    back, said = drawn(weights, "--seeds", "5:8", "--observe", image, "--mask", mask, "--put-back", "--sampler", "dpm")
    assert "put back at every step" in said
    for seed in (5, 6, 7):
        name = f"{seed:06d}.png"
        assert torch.equal(pixels(out / name), pixels(again / name))
        assert torch.equal(pixels(back / name)[0][hole == 255], pixels(image)[0][hole == 255])
        assert not torch.equal(pixels(out / name)[0][hole == 255], pixels(image)[0][hole == 255])


def test_compose_says_how_to_sample_with_observations(tmp_path, unet, write, capsys):
    states = ComponentStates([1, 8, 8], observation=Observation(Inpainting()), S=2)
    files = [
        write(f"e{s}", Denoiser(unet(s, shape=states.shape_at(1), conditioning="none"), V(), states, [s]).eval())
        for s in (1, 2)
    ]
    assert main(["compose", *map(str, files), "--out", str(tmp_path / "all")]) == 0
    assert "--observe DATA" in capsys.readouterr().out


def test_a_folder_of_pictures_is_observed_in_turn(tmp_path, conditional, write, drawn):
    weights = write("sr", conditional(SuperResolution(2)))
    folder = tmp_path / "mine"
    folder.mkdir()
    for k, name in enumerate(("b.png", "a.png", "c.PNG")):
        picture(folder / name, torch.full((8, 8), 40 * k))
    (folder / "notes.md").write_text("mine", encoding="utf-8")
    out, said = drawn(weights, "--seeds", "0:5", "--observe", folder)
    assert "items 0, 1, 2, in turn" in said
    seen = Observations.load(out / "observations.safetensors")
    assert seen.original[:, 0, 0, 0].tolist() == [40, 0, 80, 40, 0]
    assert seen.item.tolist() == [0, 1, 2, 0, 1]
    out, said = drawn(weights, "--seeds", "0:2", "--observe", folder, "--items", "1:3")
    assert "items 1 to 2" in said
    assert Observations.load(out / "observations.safetensors").original[:, 0, 0, 0].tolist() == [0, 80]


def test_items_of_a_data_set_follow_the_seeds(digits, conditional, write, drawn):
    weights, images = write("hole", conditional(Inpainting(0.25))), load(digits, "test", 1).images
    for words, items, line in (
        (["--seeds", "64:68"], [64, 65, 66, 67], "items 64 to 67 of data/digits, for seeds 64 to 67"),
        (["--seeds", "64:68", "--items", "7:9"], [7, 8, 7, 8], "items 7, 8, in turn"),
        (["--seeds", "295:299"], [295, 296, 0, 1], "items 295, 296, 0, 1 of"),  # there are 297
    ):
        out, said = drawn(weights, *words, "--observe", "data/digits")
        seen = Observations.load(out / "observations.safetensors")
        assert seen.item.tolist() == items
        assert torch.equal(seen.original, images[items])
        assert line in said


def test_what_cannot_be_observed_is_refused_in_one_line(tmp_path, conditional, unet, states, write, drawn):
    hole, sr = write("hole", conditional(Inpainting(0.25))), write("sr", conditional(SuperResolution(2)))
    plain = write("plain", Denoiser(unet(), V(), states))
    image, mask = picture(tmp_path / "a.png", torch.zeros(8, 8)), picture(tmp_path / "m.png", torch.eye(8) * 255)
    large, grey = picture(tmp_path / "l.png", torch.zeros(9, 8)), picture(tmp_path / "g.png", torch.eye(8) * 200)
    white, black = picture(tmp_path / "w.png", torch.full((8, 8), 255)), picture(tmp_path / "b.png", torch.zeros(8, 8))
    holes = np.zeros((8, 8, 4), np.uint8)
    holes[:4, :, 3] = 255
    Image.fromarray(holes).save(alpha := tmp_path / "alpha.png")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    picture(mixed / "a.png", torch.zeros(8, 8))
    (mixed / "test-0000.tar").write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for weights, words, said in (
        (hole, ["--observe", large], "l.png: an image of 8 x 9 pixels; the model makes 8 x 8 pixels"),
        (hole, ["--observe", image, "--mask", grey], "8 of 64 pixels are neither black .0. nor white"),
        (hole, ["--observe", image, "--mask", white], "all of it is white, nothing is left to generate"),
        (hole, ["--observe", image, "--mask", black], "all of it is black"),
        (hole, ["--observe", image, "--mask", alpha], "alpha.png: all pixels have one colour, and only their opacity"),
        (hole, ["--observe", image, "--mask", large], "l.png: an image of 8 x 9 pixels"),
        (hole, ["--observe", image, "--mask", tmp_path / "none.png"], "none.png: no such file"),
        (hole, ["--observe", image, "--items", "0:2"], "item 1 is not one of the 1 items of"),
        (hole, ["--observe", image, "--items", "2"], "--items 2: expected FIRST:END"),
        (hole, ["--observe", mixed], "holds images .a.png ... and shards"),
        (hole, ["--observe", tmp_path / "broken.png"], "broken.png cannot be decoded"),
        (hole, ["--observe", tmp_path / "none"], "none"),
        (hole, ["--mask", mask], "--mask: belong to --observe"),
        (hole, ["--put-back"], "--put-back: belong to --observe"),
        (sr, ["--observe", image, "--mask", mask], "SuperResolution has no masks"),
        (sr, ["--observe", image, "--put-back"], "--put-back: SuperResolution has no masks"),
        (plain, ["--observe", image], "--observe is for conditional models"),
    ):
        err = drawn(weights, *words, code=2)
        assert re.search(said, err), (said, err)
        assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(0.5, steps=2), Ancestral(), DPMSolver()])
@pytest.mark.parametrize("curve", [None, Geometric(sigma_max=1.0)])
def test_known_pixels_follow_the_noise_of_their_row(conditional, sampler, curve):
    """At row r they are a_r y + b_r z with the sampler's noise of (seed, row), and y itself at the end."""
    model, seeds = conditional(Inpainting(0.25), schedule=curve), [3, 9]
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = Observations.of(Inpainting(0.25), images, torch.arange(2))
    known = seen.kernel == 1
    states = model.states
    free = list(sampler.walk(model, seeds, given=seen.y))
    for (s, x, _), (_, y, _) in zip(sampler.walk(model, seeds, given=seen.y, known=seen.kernel), free, strict=True):
        z = seed_noise(seeds, int(states.index[s]), [2, 8, 8]) if s else torch.zeros(2, 2, 8, 8)
        wanted = noise(states, torch.cat([seen.y, seen.y], 1), s, z)[:, :1]
        assert torch.equal(x[:, :1][known], wanted[known])
        assert torch.equal(x[:, 1:], y[:, 1:])
    out = torch.cat(list(sample(model, sampler, seeds, given=seen.y, known=seen.kernel)))
    assert torch.equal(out[known], images[known])


def test_known_pixels_of_several_components_are_refused(unet):
    states = ComponentStates([1, 8, 8], space=Haar(1), observation=Observation(Inpainting()), S=4)
    model = Denoiser(unet(shape=(2, 8, 8)), V(), states, [1, 2]).eval()
    with pytest.raises(InputError, match="the image has 2 components"):
        next(DDIM().walk(model, [0], given=torch.zeros(1, 1, 8, 8), known=torch.ones(1, 1, 8, 8)))


def test_which_operators_have_masks(own):
    item = torch.arange(3)
    assert torch.equal(masks(Inpainting(), [3, 8, 8], item), Inpainting().kernel([3, 8, 8], item))
    assert torch.equal(masks(own[2].states.observation.operator, [1, 8, 8], item), torch.eye(8).expand(3, 1, 8, 8))
    assert all(masks(operator, [3, 8, 8], item) is None for operator in (Grey(), Edges(), SuperResolution(2)))
