"""Reference numbers that a change of structure must not change.

`golden.json` has them, with the processor and versions they were computed with: on the same ones they are compared bit
for bit, elsewhere up to rounding. `GOLDEN=write pytest -p no:xdist tests/golden` writes new ones; the section Numerics
of CHANGELOG gives the reason for each change.
"""

import base64
import json
import math
import os
import re
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch as L
import PIL
import pytest
import torch
import yaml
from safetensors.torch import load_file

import lightning_tdisent
from lightning_tdisent.cli import main
from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import P2, X0, Eps, Likelihood, MinSNR, V
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Inpainting, SuperResolution
from lightning_tdisent.diffusion.schedules import Cosine, Geometric, Linear, LogLinear, ScaledLinear, Sigmoid
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.datamodule import ImageShards
from lightning_tdisent.lit.modules import Baseline, ReducedStates, SingleState
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.expert import save_expert
from lightning_tdisent.networks.dit import DiT
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.guidance import Guided
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver

FILE = Path(__file__).with_name("golden.json")


def processor():
    """Return the model name of the processor, if the system has it: sums depend on it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.findall(r"^(?:model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE)
    return " ".join(dict.fromkeys(found))


WRITE = os.environ.get("GOLDEN") == "write"
MADE_WITH = {
    "torch": torch.__version__,
    "instructions": torch.backends.cpu.get_cpu_capability(),
    "processor": processor(),
    "versions": [lightning_tdisent.__version__, PIL.__version__, version("simplejpeg")],
}
SHAPE = [1, 8, 8]
SEEDS = range(100, 108)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


class Golden:
    """The stored numbers; a test passes the numbers it computed, and a difference raises an error with both values."""

    def __init__(self):
        self.kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
        self.exact = self.kept.get("made with") == MADE_WITH

    def check(self, name, value):
        """Compare a number, a list of numbers, a text, or images uint8 (N, C, H, W), one line of base64 each."""
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.uint8
            value = [base64.b64encode(image.numpy().tobytes()).decode() for image in value]
        if WRITE:
            self.kept |= {"made with": MADE_WITH, name: value}
            FILE.write_text(json.dumps(self.kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        kept = self.kept[name]
        if self.exact or WRITE or isinstance(value, str):
            assert value == kept
        elif name.startswith(("weights", "fleet")):  # Adam moves a weight whose gradient is nearly 0 either way
            assert value == pytest.approx(kept, rel=0.05, abs=0.3)
        elif isinstance(value, list) and isinstance(value[0], str):
            one, other = (torch.tensor([[*base64.b64decode(line)] for line in lines]) for lines in (value, kept))
            away = (one - other).abs()
            assert away.max() <= 2
            assert (away > 0).double().mean() < 0.01
        else:
            assert value == pytest.approx(kept, rel=1e-3)


@pytest.fixture(scope="module")
def golden():
    return Golden()


def projection(tensors):
    """Return one float64 that depends on every value of named tensors."""
    total = 0.0
    for name in sorted(tensors):
        values = tensors[name].double().flatten()
        total += float(values @ torch.cos(torch.arange(len(values), dtype=torch.float64)))
    return total


def net(cls=UNet, seed=0, **options):
    """Return a network of 13 k weights, all of them random, none zero."""
    kinds = {
        UNet: {"channels": [8, 16], "groups": 4, "layers": 1, "mid_attention": False},
        DiT: {"depth": 2, "heads": 2, "head": 8},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = cls(**{"shape": SHAPE, **kinds[cls], **options})
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return made


TABLES = {
    "linear": lambda: LatentStates(),
    "linear, 32 even": lambda: LatentStates(S=32),
    "linear, 8 trailing": lambda: LatentStates(S=8, spacing="trailing"),
    "linear, 10 leading": lambda: LatentStates(S=10, spacing="leading", terminal_bound=0.1),
    "linear, 8 by log-SNR": lambda: LatentStates(S=8, spacing="log_snr"),
    "linear, native": lambda: LatentStates(S=32, kind="native", terminal_bound=1.0),
    "linear, rescaled": lambda: LatentStates(S=32, kind="rescaled"),
    "linear, rows": lambda: LatentStates(indices=[1, 10, 100, 1000]),
    "linear, cut": lambda: LatentStates(S=10, cut=6),
    "scaled linear": lambda: LatentStates(ScaledLinear(), S=20, terminal_bound=0.1),
    "cosine": lambda: LatentStates(Cosine(), S=20),
    "sigmoid": lambda: LatentStates(Sigmoid(), S=20),
    "log-linear": lambda: LatentStates(LogLinear(), S=20),
    "geometric": lambda: LatentStates(Geometric(), S=20),
    "zero terminal SNR": lambda: LatentStates(Linear(zero_terminal=True), S=4, spacing="trailing"),
    "three scales": lambda: ComponentStates([3, 16, 16], space=Haar(2), S=30),
    "conditional": lambda: conditional(),
}


def conditional(operator=None, **options):
    """Return a table with an observation that diffuses, too (CMDE)."""
    return ComponentStates(SHAPE, observation=Observation(operator or Inpainting(), LogLinear()), S=8, **options)


def scales():
    return ComponentStates(SHAPE, space=Haar(2), S=12)


def module(cls=ReducedStates, states=None, network=None, **options):
    torch.manual_seed(7)
    return cls(network or net(), states or LatentStates(S=4), **{"lr": 0.01, "warmup": 3, **options})


class Losses(L.Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.found.append(float(outputs["loss"]))


def fit(module, folder, digits, steps=3, **data):
    """Train a few steps as the library does, and return the losses."""
    L.seed_everything(0, verbose=False)
    losses = Losses()
    callbacks = [losses, EMA(0.9), Export()]
    trainer = L.Trainer(**QUIET, max_steps=steps, max_epochs=-1, callbacks=callbacks, default_root_dir=folder)
    trainer.fit(module, datamodule=ImageShards(path=str(digits), channels=1, batch_size=32, **data))
    return losses.found


@pytest.mark.parametrize("name", TABLES)
def test_tables(golden, name):
    states = TABLES[name]()
    golden.check(f"fingerprint: {name}", states.fingerprint)
    live = states.log_snr[1:].clamp(-30, 30)
    golden.check(f"log-SNR: {name}", projection({"": live}))


TRAININGS = {
    "eps": lambda: module(objective=Eps()),
    "v": lambda: module(),
    "x0, min-SNR": lambda: module(objective=X0(MinSNR())),
    "eps, P2": lambda: module(objective=Eps(P2())),
    "v, likelihood": lambda: module(objective=V(Likelihood())),
    "T = 1000": lambda: module(Baseline, LatentStates()),
    "T = 1000, iid": lambda: module(Baseline, LatentStates(), draw="iid"),
    "classes": lambda: module(network=net(classes=10)),
    "time-agnostic": lambda: module(network=net(conditioning="none")),
    "dropout": lambda: module(network=net(dropout=0.2)),
    "DiT": lambda: module(network=net(DiT)),
    "expert": lambda: module(SingleState, expert=2),
    "three scales": lambda: module(SingleState, scales(), expert=1, experts=3),
    "conditional": lambda: module(Baseline, conditional()),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings(golden, name, digits, tmp_path):
    golden.check(f"losses: {name}", fit(TRAININGS[name](), tmp_path, digits))
    golden.check(f"weights: {name}", projection(load_file(tmp_path / "model.safetensors")))


SAMPLERS = {
    "DDIM": DDIM(),
    "DDIM, eta 0.5": DDIM(0.5),
    "DDIM, unclipped": DDIM(clip=None),
    "ancestral": Ancestral(),
    "DPM-Solver++": DPMSolver(),
    "DPM-Solver++, 5 steps": DPMSolver(steps=5),
}
MODELS = {
    "eps": lambda: Denoiser(net(), Eps(), LatentStates(S=8)),
    "v": lambda: Denoiser(net(), V(), LatentStates(S=8)),
    "zero terminal SNR": lambda: Denoiser(net(), X0(), TABLES["zero terminal SNR"]()),
    "three scales": lambda: in_three_scales(scales()),
}


def in_three_scales(states):
    """Return a denoiser of three networks, one for each resolution."""
    blocks = [range(1, 5), range(5, 9), range(9, 13)]
    nets = [net(shape=states.shape_at(block[0], SHAPE), seed=k) for k, block in enumerate(blocks)]
    return CompositeDenoiser([Denoiser(n, V(), states, [*block]) for n, block in zip(nets, blocks, strict=True)])


PAIRS = [(m, s) for m in MODELS for s in SAMPLERS if (m, s) != ("zero terminal SNR", "DPM-Solver++, 5 steps")]


@pytest.mark.parametrize(("model", "sampler"), PAIRS)  # that table has 4 rows
def test_samples(golden, model, sampler):
    images = torch.cat([*sample(MODELS[model]().eval(), SAMPLERS[sampler], SEEDS)])
    golden.check(f"images: {model}, {sampler}", images)


def test_guidance(golden):
    model = Denoiser(net(classes=10), V(), LatentStates(S=8)).eval()
    for scale in (1.0, 3.0):
        guided = Guided(model, scale)
        golden.check(f"images: guidance {scale:g}", torch.cat([*sample(guided, DPMSolver(), SEEDS)]))


@pytest.mark.parametrize("operator", [Inpainting(), SuperResolution(2)], ids=["inpainting", "super-resolution"])
def test_observations(golden, operator, digits):
    states = conditional(operator)
    model = Denoiser(net(shape=[2, 8, 8]), V(), states).eval()
    images = ImageShards(path=str(digits), channels=1)
    images.setup("validate")
    y = operator.observe(from_uint8(images.held_out.images[:8]), torch.arange(8))
    for name in ("DDIM", "ancestral"):
        found = torch.cat([*sample(model, SAMPLERS[name], SEEDS, given=y)])
        golden.check(f"images: {type(operator).__name__}, {name}", found)


@pytest.fixture(scope="module")
def composite(tmp_path_factory, digits):
    """Four experts of three steps each, composed."""
    folder = tmp_path_factory.mktemp("composite")
    for row in range(1, 5):
        fit(module(SingleState, network=net(seed=row, conditioning="none"), expert=row), folder / str(row), digits)
    return compose([folder / str(row) for row in range(1, 5)], folder / "composite")


def test_composites(golden, composite):
    model = load_model(composite)
    for name in ("DDIM", "ancestral", "DPM-Solver++"):
        golden.check(f"images: composite, {name}", torch.cat([*sample(model, SAMPLERS[name], SEEDS)]))


def test_evaluation(golden, composite, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    metrics = "fd,kid,is,prdc,bpd"
    words = ["evaluate", str(composite), "--data", str(digits), "--protocol", "digits", "-n", "100"]
    assert main([*words, "--metrics", metrics, "--out", str(tmp_path / "page")]) == 0
    row, real = json.loads((tmp_path / "page" / "results.json").read_text(encoding="utf-8"))
    assert math.isfinite(row["fd_digits"])
    for name, value in sorted(row.items()):
        if isinstance(value, float) and "seconds" not in name:
            golden.check(f"evaluation: {name}", value)
    golden.check("evaluation: errors of x0", [*row["x0_mse"].values()])
    golden.check("evaluation: FD of real images", real["fd_digits"])
    if golden.exact or WRITE:  # its hash is of the versions, too
        golden.check("evaluation: protocol", row["protocol"])


FLEET = {
    "experts": 2,
    "configs": ["expert.yaml"],
    "start": {"shared": {"configs": ["shared.yaml"], "images": 32}},
    "budget": {"images": 160, "rule": "taper"},
    "seed": 3,
}


def test_a_fleet(golden, digits, tmp_path):
    network = {"class_path": "UNet", "init_args": {"shape": SHAPE, "channels": [8], "layers": 1, "groups": 4}}
    trainer = {"max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    data = {"class_path": "ImageShards", "init_args": {"path": str(digits), "channels": 1, "batch_size": 8}}
    for name, cls in (("expert", "SingleState"), ("shared", "ReducedStates")):
        args = {"network": network, "states": {"S": 4}, "lr": 0.01, "warmup": 2}
        config = {
            "seed_everything": 3,
            "trainer": {**trainer, "num_sanity_val_steps": 0, "limit_val_batches": 1, "accelerator": "cpu"},
            "model": {"class_path": cls, "init_args": args},
            "data": data,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(FLEET), encoding="utf-8")
    out = tmp_path / "fleet"
    assert main(["fleet", "plan", "--config", str(tmp_path / "fleet.yaml"), "--out", str(out)]) == 0
    for job in ("shared", "1", "2"):
        assert main(["fleet", "run", str(out), "--only", job]) == 0
    files = sorted(out.rglob("model.safetensors"))
    assert len(files) == 3
    for file in files:
        golden.check(f"fleet: {file.parent.relative_to(out)}", projection(load_file(file)))


def test_files_made_elsewhere_give_the_same_images(golden, tmp_path):
    """A round trip through a file moves nothing."""
    made = module()
    save_expert(tmp_path / "model.safetensors", made.denoiser, made.card("live"))
    again = load_model(tmp_path)
    first = torch.cat([*sample(made.denoiser.eval(), DDIM(), SEEDS)])
    assert torch.equal(first, torch.cat([*sample(again, DDIM(), SEEDS)]))
    golden.check("images: from a file", first)


def test_another_number_is_refused(golden):
    for name, other in (("losses: v", [0.1, 0.2, 0.3]), ("fingerprint: linear", "0"), ("evaluation: fd_digits", 1.0)):
        if not WRITE:
            with pytest.raises(AssertionError):
                golden.check(name, other)
