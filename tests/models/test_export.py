import json
import math
import os
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from lightning_tdisent.diffusion.objectives import X0, Eps, V
from lightning_tdisent.diffusion.schedules import Cosine, FlowMatching, Linear, Sigmoid
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.cost import flops, training_cost
from lightning_tdisent.models.export import Experts, betas, export, pipeline, standard
from lightning_tdisent.models.merge import merge
from lightning_tdisent.networks.dit import DiT
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sampler import DDIM, DPMSolver


@pytest.fixture
def experts(model):
    return [model(rows=[s], seed=s, conditioning="none") for s in (1, 2, 3, 4)]


@pytest.fixture
def composite(experts, write, tmp_path):
    return compose([write(f"e{e.rows[0]}", e, seconds=2.0 * e.rows[0]) for e in experts], tmp_path / "composite")


def refusal(call, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    return str(caught.value)


# safetensors and JSON


def test_the_readme_of_a_partial_expert_says_to_compose_it(model, write, tmp_path):
    whole = (export(write("all", model(seed=3)), tmp_path / "a") / "README.md").read_text(encoding="utf-8")
    assert "images = next(sample(model, DDIM(), seeds=range(16)))" in whole
    assert "`python -m lightning_tdisent sample FOLDER --out images`" in whole
    one = (export(write("one", model(rows=[2])), tmp_path / "b") / "README.md").read_text(encoding="utf-8")
    assert "Compose it with the experts of the other rows" in one
    assert "sample FOLDER" not in one
    assert "next(sample(" not in one


def test_one_network_is_exported_bit_for_bit(model, write, tmp_path):
    source = write("one", model(seed=3))
    for given, name in ((source, "a"), (tmp_path / "a", "b")):
        out = export(given, tmp_path / name)
        assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        assert (out / "model.safetensors").read_bytes() == source.read_bytes()
    loaded = load_model(tmp_path / "b")
    cards = loaded.cards
    assert cards == [read_card(source)]
    assert torch.equal(DDIM()(loaded, [1, 2]), DDIM()(model(seed=3), [1, 2]))
    assert all(name.startswith("network.net.") for name in loaded.state_dict())
    assert (tmp_path / "a" / "config.json").read_text(encoding="utf-8") == (tmp_path / "b" / "config.json").read_text(
        encoding="utf-8"
    )


def test_a_composite_is_exported_bit_for_bit(experts, composite, tmp_path):
    out = export(composite, tmp_path / "out")
    files = [f"rows_000{s}.safetensors" for s in (1, 2, 3, 4)]
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "composite.json", "config.json", *files]
    shutil.rmtree(composite)
    loaded = load_model(out)
    assert torch.equal(DDIM()(loaded, [5]), DDIM()(CompositeDenoiser(experts), [5]))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["files"] == {name: sha256(out / name) for name in files}
    assert [e["rows"] for e in config["experts"]] == [[1], [2], [3], [4]]


def strict(text: str):
    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_the_table_in_the_json_is_that_of_the_formula(unet, write, tmp_path):
    """Products of 1 - beta with plain floats, and the rescaling to a zero at the end by its definition."""
    T, S = 1000, 5
    beta = [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]
    bar = [1.0]
    for b in beta:
        bar.append(bar[-1] * (1 - b))
    root = [math.sqrt(x) for x in bar]
    root = [(a - root[T]) * root[1] / (root[1] - root[T]) for a in root]
    states = LatentStates(Linear(zero_terminal=True), S=S)
    out = export(write("zero", Denoiser(unet(), V(), states, [2])), tmp_path / "out")
    config = strict((out / "config.json").read_text(encoding="utf-8"))
    assert [(r["row"], r["index"]) for r in config["table"]] == [(k, 200 * k) for k in range(1, S + 1)]
    for row in config["table"]:
        a = root[row["index"]]
        assert row["signal"] == pytest.approx([a], abs=1e-12)
        assert row["noise"] == pytest.approx([math.sqrt(1 - a * a)], abs=1e-12)
        assert row["log_snr"] == (pytest.approx([math.log(a * a / (1 - a * a))]) if row["row"] < S else [None])
    facts = ["shape", "classes", "image_range", "prediction", "T", "S", "fingerprint"]
    assert [config[f] for f in facts] == [[1, 8, 8], None, [-1.0, 1.0], "v", T, S, states.fingerprint]
    assert config["experts"][0]["rows"] == [2]


def test_the_table_in_the_json_has_the_times_of_a_flow_matching_path(unet, write, tmp_path):
    states = LatentStates(FlowMatching(shift=3.0), S=4)
    out = export(write("flow", Denoiser(unet(), V(), states)), tmp_path / "out")
    table = strict((out / "config.json").read_text(encoding="utf-8"))["table"]
    assert [row["index"] for row in table] == [250, 500, 750, 1000]
    assert [row["time"] for row in table] == pytest.approx([500, 750, 900, 1000])
    assert all(row["time"] == pytest.approx(1000 * row["noise"][0]) for row in table)


def test_the_readme_says_what_it_is_and_what_it_cost(composite, tmp_path):
    merge(sorted(composite.glob("*.safetensors")), tmp_path / "merged", 2)
    text = (export(tmp_path / "merged", tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    head, body = text.split("---\n")[1:3]
    assert "library_name: lightning_tdisent\npipeline_tag: unconditional-image-generation\n" in head
    for words in (
        "2 (UNet), averages of 4 experts",
        "1..2, 3..4 of 1..4, of a chain of T = 1000",
        "v, for x_0 in [-1.0, 1.0]",
        "digest d1g1t5",
        "2,560 in all, 640 by the longest",
        " operations, 20 s",
        "| validation | 0 operations, 0 s |",
        "load_model",
    ):
        assert words in body, words


class Product(Network):
    """One product with a matrix of 64 x 64."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__(shape, None, "none")
        self.matrix = torch.nn.Parameter(torch.zeros(64, 64))

    def forward(self, x, index=None, label=None):
        return (x.flatten(1) @ self.matrix).view_as(x)


def test_a_training_takes_three_forward_passes_of_every_image(card_of, states):
    card = card_of(Denoiser(Product([1, 8, 8]), V(), states), images_seen=5)
    assert training_cost([card])["training_flops"] == 3 * 5 * (2 * 64 * 64)


@pytest.mark.parametrize(("classes", "conditioning"), [(None, "state"), (3, "state"), (None, "none"), (3, "none")])
def test_a_network_is_called_with_all_that_it_sees_and_nothing_else(classes, conditioning):
    """forward(x, index, label) without defaults, as README writes it: its cost is counted, and it is exported."""

    class Strict(Network):
        def __init__(self, shape):
            super().__init__(shape, classes, conditioning)
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

        def forward(self, x, index, label):
            assert (index is not None) == (conditioning == "state")
            assert (label is not None) == (classes is not None)
            return x @ self.weight

    network = Strict([1, 2, 2])
    assert flops(network) == 2 * 2 * 2 * 2

    x, index, label = network.example(3)
    assert (x.shape, None if label is None else label.tolist()) == ((3, 1, 2, 2), [0, 0, 3] if classes else None)
    assert index is None or index.tolist() == [1, 1, 1]


def test_attention_is_counted():
    class Attends(Network):
        def __init__(self, shape, classes=None, conditioning="none"):
            super().__init__(shape, classes, conditioning)

        def forward(self, x, index=None, label=None):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    n, d = 8, 16
    assert flops(Attends([2, n, d])) == 2 * (2 * n * n * d + 2 * n * n * d)  # heads: of Q K^T, and of that with V


def test_the_cost_of_averages_counts_every_training_once(card_of, model):
    network = card_of(model()).network

    def run(name, images, **more):
        return {"sha256": name, "network": network, "images_seen": images, "seconds": images / 10, **more}

    plain = card_of(model(), images_seen=7, seconds=0.7)
    one = card_of(
        model(), images_seen=1, seconds=0.1, parents=[run("w", 100), run("a", 10, weight=0.5), run("b", 30, weight=0.5)]
    )
    two = card_of(model(), images_seen=0, seconds=0.0, parents=[run("w", 100), run("c", 20, weight=1.0)])
    cost = training_cost([one, two])
    assert cost["images_seen"] == 100 + 10 + 30 + 20 + 1
    assert cost["images_seen_longest"] == 100 + 30 + 1
    assert isinstance(cost["images_seen_longest"], int)
    assert cost["training_seconds"] == pytest.approx(16.1)
    assert cost["training_seconds_longest"] == pytest.approx(13.1)
    assert cost["training_flops"] == pytest.approx(training_cost([plain])["training_flops"] * 161 / 7)
    assert training_cost([plain])["images_seen_longest"] == 7


# diffusers


def drawn(pipe, steps, n=2, **options):
    """Images of a pipeline, and the noise that it starts from."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images = pipe(n, generator, num_inference_steps=steps, output_type="pt", **options).images
    return images, randn_tensor((n, *images.shape[1:]), generator=torch.Generator().manual_seed(1))


def ours(model, start, steps):
    """Images of the project's sampler from that noise, and the largest x0_hat before it is clipped."""
    seeds = list(range(len(start)))
    with torch.no_grad():
        *_, (_, x, _) = DDIM(steps=steps).walk(model, seeds, start=start)
        last = max(
            float(x0.abs().max())
            for _, _, x0 in DDIM(steps=steps, clip=None).walk(model, seeds, start=start)
            if x0 is not None
        )
    return (x / 2 + 0.5).clamp(0, 1), last


def dit(seed, **args):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiT([1, 8, 8], patch=4, depth=1, heads=2, head=8, **args)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return net.eval()


def models(kind, objective, states, unet):
    if kind == "sees the state":
        return Denoiser(unet(conditioning="state"), objective, states)
    if kind == "time-agnostic":
        return Denoiser(unet(conditioning="none"), objective, states)
    if kind == "transformer":
        return Denoiser(dit(0), objective, states)
    if kind == "experts":
        return CompositeDenoiser([Denoiser(unet(s, conditioning="none"), objective, states, [s]) for s in states.rows])
    nets = unet(1, conditioning="state"), dit(2, conditioning="none")
    return CompositeDenoiser(
        [Denoiser(nets[0], objective, states, [1, 3]), Denoiser(nets[1], objective, states, [2, 4])]
    )


@pytest.mark.parametrize("objective", [V(), Eps(), X0()], ids=["v", "eps", "x0"])
@pytest.mark.parametrize("kind", ["sees the state", "time-agnostic", "transformer", "experts", "blocks of two kinds"])
def test_a_pipeline_draws_the_same_images_as_our_sampler(unet, states, tmp_path, kind, objective):
    model = models(kind, objective, states, unet).eval()
    pipeline(model).save_pretrained(tmp_path / "pipe")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe.unet) is (UNet2DModel if kind in ("sees the state", "time-agnostic") else Experts)
    for steps in (4, 2):
        images, start = drawn(pipe, steps, use_clipped_model_output=True)
        expected, largest = ours(model, start, steps)
        assert expected.std() > 0.05
        # the scheduler computes in float32 what the table has in float64; eps is divided by a_S = 0.006 on top
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-5 if isinstance(objective, Eps) else 5e-6)
        assert largest > 1 or isinstance(objective, X0)


def test_a_long_chain_draws_the_same(unet, tmp_path):
    model = Denoiser(unet(), Eps(), LatentStates(Linear()))
    images, start = drawn(pipeline(model), 10, use_clipped_model_output=True)
    torch.testing.assert_close(images, ours(model, start, 10)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("conditioning", ["state", "none"])
def test_a_standard_unet_has_the_same_output_bit_for_bit(unet, conditioning):
    states = LatentStates(Linear(), indices=[7, 300, 1000])
    mine = UNet([1, 8, 8], channels=[8, 12], groups=2, layers=1, attention=[1], conditioning=conditioning).eval()
    theirs, x = standard(mine, states), torch.randn(3, 1, 8, 8)
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    with torch.no_grad():
        for s, t in ((1, 7), (2, 300), (3, 1000)):
            expected = mine(x, torch.full((3,), t))
            assert torch.equal(theirs(x, s - 1).sample, expected)
            assert torch.equal(theirs(x, torch.tensor(s - 1)).sample, expected)
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Sigmoid(), Linear(zero_terminal=True)])
@pytest.mark.parametrize("S", [4, 1000])
def test_the_scheduler_has_the_table(schedule, S, unet):
    states = LatentStates(schedule, S=S)
    found = pipeline(Denoiser(unet(), V(), states)).scheduler.alphas_cumprod.double()
    exact = states.a[:, 0].square()
    assert float(((found - exact[1:]).abs() / exact[:-1]).max()) < 1e-7
    assert all(0 < b <= 1 for b in betas(states))


def test_a_pipeline_folder_is_whole_and_describes_itself(composite, tmp_path):
    out = export(composite, tmp_path / "out", "diffusers")
    config = strict((out / "config.json").read_text(encoding="utf-8"))
    assert config["files"] == {
        "unet/diffusion_pytorch_model.safetensors": sha256(out / "unet/diffusion_pytorch_model.safetensors")
    }
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: diffusers" in text
    assert "import lightning_tdisent.models.export" in text
    assert "num_inference_steps=4, use_clipped_model_output=True" in text
    assert list(out.rglob("*.py")) == list(out.rglob("*.bin")) == []


def test_a_folder_that_was_changed_is_refused(composite, tmp_path):
    out = export(composite, tmp_path / "out", "diffusers")
    file = out / "unet" / "config.json"
    good = file.read_text(encoding="utf-8")
    for change, words in (
        (lambda c: c["owner"].append(0), "4 networks cannot own 4 rows as [0, 1, 2, 3, 0]"),
        (lambda c: c["owner"].__setitem__(1, 0), "4 networks cannot own 4 rows as [0, 0, 2, 3]"),
        (lambda c: c["networks"][0].__setitem__("class_path", "subprocess.Popen"), "subprocess.Popen is no Network"),
    ):
        config = json.loads(good)
        change(config)
        file.write_text(json.dumps(config), encoding="utf-8")
        assert words in refusal(DiffusionPipeline.from_pretrained, out)


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_a_folder_in_use_is_refused(composite, tmp_path, form):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thing").touch()
    for place in (tmp_path / "used", tmp_path / "used" / "thing"):
        assert f"{place} is there already" in refusal(export, composite, place, form)
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thing"]


def test_models_that_a_pipeline_cannot_sample_are_refused_with_all_reasons(model, write, tmp_path):
    text = refusal(export, write("odd", model(rows=[2, 3], shape=(4, 8, 8), classes=5)), tmp_path / "out", "diffusers")
    for words in ("it has classes", "it makes [4, 8, 8]", "it owns rows [2, 3] of 1..4 only"):
        assert words in text
    preview = CompositeDenoiser([model(rows=[1, 4])], "nearest")
    assert (
        refusal(pipeline, preview) == "cannot be exported as a diffusers pipeline: it is a preview without rows [2, 3]"
    )

    class Own(V):
        prediction = "velocity"

    assert "diffusers does not know velocity" in refusal(pipeline, Denoiser(model().network, Own(), model().states))
    assert "--format onnx: safetensors or diffusers" in refusal(export, tmp_path, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no weights here"):
        export(tmp_path / "nothing", tmp_path / "out")


def looped(pipe, name, steps, n=64):
    """Images of the loop that the README shows, with a scheduler of diffusers."""
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * float(scheduler.init_noise_sigma)
    start, generator = x, {"generator": torch.Generator().manual_seed(1)} if name.startswith("DDPM") else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(scheduler.scale_model_input(x, t), t).sample, t, x, **generator).prev_sample
    return x, start


class OfGaussians(Network):
    """The v that belongs to E[x_0 | x] of x_0 ~ N(0.3, 0.05), pixel by pixel, at the rows of a table."""

    table = LatentStates(Linear(), S=50, spacing="trailing")

    def __init__(self, shape, classes=None, conditioning="state"):
        super().__init__(shape, classes, conditioning)
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, index=None, label=None):
        s = self.table.index.tolist().index(int(index[0]))
        a, b = (float(c) for c in self.table.coefficients(s))
        x0 = 0.3 + a * 0.05 / (a * a * 0.05 + b * b) * (x - a * 0.3)
        return (a * x - x0) / b


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM", "DPMSolverMultistep", "UniPCMultistep"])
def test_the_schedulers_that_the_readme_names_draw_the_data(scheduler):
    """Mean 0.3, and variance 0.05 but for the error of 50 steps, which makes it smaller."""
    pipe = pipeline(Denoiser(OfGaussians([1, 8, 8]), V(), OfGaussians.table).eval())
    x, _ = looped(pipe, f"{scheduler}Scheduler", 50)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.01)
    assert 0.03 < float(x.var()) < 0.05


def test_dpm_solver_of_diffusers_equals_ours_without_clipping(model):
    own = model()
    x, start = looped(pipeline(own), "DPMSolverMultistepScheduler", 4, 3)
    with torch.no_grad():
        *_, (_, unclipped, _) = DPMSolver(clip=None).walk(own, [0, 1, 2], start=start)
        *_, (_, clipped, _) = DPMSolver().walk(own, [0, 1, 2], start=start)
    torch.testing.assert_close(x, unclipped, rtol=0, atol=1e-4)
    assert float((x - clipped).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["one", "many"])
def test_schedulers_that_do_not_work_are_named(model, experts, tmp_path, write, composite, kind):
    out = export(composite if kind == "many" else write("one", model()), tmp_path / "out", "diffusers")
    text = (out / "README.md").read_text(encoding="utf-8")
    pipe = DiffusionPipeline.from_pretrained(out)
    for name in ("Euler", "EulerAncestral", "Heun", "LMS", "KDPM2"):
        assert f"`{name}DiscreteScheduler`" in text
        with pytest.raises((RuntimeError, InputError)):
            looped(pipe, f"{name}DiscreteScheduler", 4, 2)
    for name in ("DDIM", "DDPM", "DPMSolverMultistep", "UniPCMultistep"):
        assert f"`{name}Scheduler`" in text
        assert looped(pipe, f"{name}Scheduler", 4, 2)[0].isfinite().all()
    code = text.split("loop of your own:")[1].split("- `DDIM")[0].replace("randn(16", "randn(2")
    names = {"pipe": pipe}
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), names)  # noqa: S102  # as a reader would
    assert list(names["images"].shape) == [2, 1, 8, 8]
    if kind == "many":
        for odd in (-1, 4, torch.tensor(1.0), torch.tensor(1.5)):
            assert "takes whole numbers from 0 to 3" in refusal(pipe.unet, torch.zeros(1, 1, 8, 8), odd)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_exported_files_follow_the_umask(model, tmp_path, write, form, umask, mode):
    before = os.umask(umask)
    try:
        out = export(write("one", model()), tmp_path / "out", form)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in out.rglob("*") if file.is_file()} == {mode}


SCRIPT = """
import sys, torch
from diffusers import DiffusionPipeline
one, many, plain = sys.argv[1:]
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "use_clipped_model_output": True, "output_type": "pt"}
    return pipe(2, torch.Generator().manual_seed(1), **options).images
torch.save(draw(DiffusionPipeline.from_pretrained(one)), one + "/drawn.pt")
assert not any(name.startswith("lightning") for name in sys.modules)
try:
    DiffusionPipeline.from_pretrained(many)
except ValueError as error:
    assert "import lightning_tdisent.models.export before" in str(error), error
else:
    raise SystemExit("diffusers imported what a folder named")
import lightning_tdisent.models.export
torch.save(draw(DiffusionPipeline.from_pretrained(many)), many + "/drawn.pt")
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.sampling.sampler import DDIM
torch.save(DDIM()(load_model(plain), [1, 2]), plain + "/drawn.pt")
assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
"""


def test_exported_folders_load_without_lightning(model, write, experts, composite, tmp_path):
    """One network needs diffusers alone, several this package too; nothing is imported because a folder says so."""
    one = model(seed=1)
    folders = (
        export(write("one", one), tmp_path / "one", "diffusers"),
        export(composite, tmp_path / "many", "diffusers"),
        export(composite, tmp_path / "plain"),
    )
    subprocess.run([sys.executable, "-c", SCRIPT, *map(str, folders)], check=True, timeout=120, capture_output=True)
    first, second, third = (torch.load(folder / "drawn.pt") for folder in folders)
    start = randn_tensor((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    many = CompositeDenoiser(experts)
    torch.testing.assert_close(first, ours(one, start, 4)[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(second, ours(many, start, 4)[0], rtol=0, atol=5e-6)
    assert torch.equal(third, DDIM()(many, [1, 2]))
