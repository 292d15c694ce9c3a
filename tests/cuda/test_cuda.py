"""What only a GPU shows: copies beside computations, its own kernels and memory, and fits and fleets that use it."""

import gc
import json
import os
import warnings
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.entry import run
from lightning_tdisent.lit.together import together
from lightning_tdisent.models.card import Card, read_card
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.expert import save_expert
from lightning_tdisent.models.residency import WeightSlot
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver

if not torch.cuda.is_available():
    WHY = "needs a GPU: torch.cuda.is_available() is false (make test-cuda)"
    if os.environ.get("CUDA") == "required":
        pytest.fail(WHY, pytrace=False)
    pytest.skip(WHY, allow_module_level=True)

# looked at once, when cuBLAS is first used, and asked for by trainer.deterministic
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# a warning of torch or Lightning about a GPU is shown, and no failure
pytestmark = pytest.mark.filterwarnings("default")

SEEDS = range(7, 47)
BATCH = 16  # two full batches, and one of 8
FACTS = {"module": "SingleState", "data": "none", "weights": "live", "average": None, "images_seen": 0, "steps": 0,
         "seconds": 0.0, "seed": 0, "version": "0"}  # fmt: skip


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 is float32, sums have one order, and the next test finds torch as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A composite of four experts of 5 million weights each."""
    out, states = tmp_path_factory.mktemp("experts"), LatentStates(S=4)
    for s in states.rows:
        torch.manual_seed(s)
        network = UNet([3, 8, 8], channels=[96, 192], layers=1, conditioning="none")
        expert = Denoiser(network, V(), states, [s])
        save_expert(out / f"{s}.safetensors", expert, Card.of(expert, **FACTS))
    return compose(sorted(out.glob("*.safetensors")), out / "composite")


def load(folder, residency="resident", device="cuda"):
    return load_model(folder, residency).to(device)


def images(model, solver, **options):
    return torch.cat(list(sample(model, solver, SEEDS, BATCH, **options)))


@pytest.mark.parametrize("solver", [DDIM(), Ancestral(), DPMSolver()], ids=["ddim", "ancestral", "dpm"])
def test_images_are_bitwise_the_same_wherever_the_experts_are(folder, solver):
    expected = images(load(folder), solver)
    assert (expected.device.type, len(expected)) == ("cuda", 40)
    assert expected.float().std() > 10
    for residency in ("offload", "stream"):
        offloaded = load(folder, residency)
        assert torch.equal(images(offloaded, solver), expected)
        assert torch.equal(images(offloaded, solver, by_state=False), expected)


@pytest.mark.parametrize(("residency", "ahead"), [("offload", 0.25), ("offload", 1.0), ("stream", 0.25)])
def test_experts_that_pass_are_asked_from_one_stream_and_then_another(folder, residency, ahead, monkeypatch):
    monkeypatch.setattr(WeightSlot.__init__, "__defaults__", (ahead,))
    resident, offloaded = load(folder), load(folder, residency)
    x, asked = torch.randn(BATCH, 3, 8, 8, device="cuda"), [4, 3, 2, 1, 4, 3, 1, 2, 2, 4, 1]
    with torch.inference_mode():
        expected = [resident(x, s) for s in asked]
        offloaded(x, 1)  # all is allocated
        offloaded.expect([4, 3, 2, 1])
        streams, found = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()], []
        torch.cuda.synchronize()
        for n, s in enumerate(asked):
            with torch.cuda.stream(streams[n % 3]):
                torch.cuda._sleep(20_000_000)  # some 10 ms, for the next call to come too early
                found.append(offloaded(x, s))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])


def peak(folder, residency):
    """Bytes that a composite and its images take on the device at most, beside what was there before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    images(load(folder, residency), DDIM())
    return torch.cuda.max_memory_allocated() - before


def test_experts_that_pass_take_the_memory_of_one(folder):
    one = sum(p.numel() * p.element_size() for p in load_model(folder).at(1).parameters())
    assert one > 4 * 5e6
    images(load(folder), DDIM())  # what libraries allocate once
    resident, offload, stream = (peak(folder, residency) for residency in ("resident", "offload", "stream"))
    others = resident - 4 * one  # activations, and what kernels need: the same in all three
    print(f"bytes: an expert {one}, peak resident {resident}, offload {offload}, stream {stream}, others {others}")
    assert others >= 0
    assert max(offload, stream) - others < 0.5 * 4 * one


@pytest.mark.parametrize("solver", [DDIM(), Ancestral()], ids=["ddim", "ancestral"])
def test_noise_is_that_of_the_cpu_and_images_are_within_two_grey_levels(folder, solver):
    here, there = load(folder, device="cpu"), load(folder)
    with torch.inference_mode():
        (_, x, _), (_, y, _) = next(solver.walk(here, SEEDS)), next(solver.walk(there, SEEDS))
    assert (x.device.type, y.device.type) == ("cpu", "cuda")
    assert torch.equal(x, y.cpu())
    off = (images(here, solver).int() - images(there, solver).cpu().int()).abs()
    assert (off <= 2).float().mean() >= 0.99


def argv(folder, steps, **options):
    """Command line of a fit of one of the digits' experts on the GPU."""
    trainer = {"accelerator": "gpu", "devices": 1, "val_check_interval": 15, "log_every_n_steps": 10}
    options = {f"trainer.{k}": v for k, v in trainer.items()} | {"trainer.max_steps": steps, "run": folder} | options
    return ["fit", "--config", "experiments/digits/experts8.yaml", *(f"--{k}={v}" for k, v in options.items())]


def fit(folder, steps, *callbacks, **options):
    cli = run(argv(folder, steps, **options), [StepProgress(lambda *_: None), *callbacks])
    assert cli.trainer.strategy.root_device.type == "cuda"
    return cli


@pytest.mark.parametrize("resident", ["true", "device"])
def test_an_interrupted_run_has_seen_as_many_images_as_an_unbroken_one(resident, tmp_path):
    for name, budgets in (("unbroken", [60]), ("broken", [30, 60])):
        for steps in budgets:
            fit(tmp_path / name, steps, **{"data.resident": resident})
        card = read_card(tmp_path / name / "model.safetensors", verify=True)
        assert (card.steps, card.images_seen, card.weights) == (60, 60 * 64, "ema")
        assert all(w.isfinite().all() for w in load_file(tmp_path / name / "model.safetensors").values())
        losses = EventAccumulator(str(tmp_path / name)).Reload().Scalars("train/loss")
        assert {640 * k for k in range(1, 7)} == {event.step for event in losses}
        assert torch.tensor([event.value for event in losses]).isfinite().all()
        assert len(list((tmp_path / name / "pictures").glob("*.png"))) == 2 * 4


class Spoils(L.Callback):
    """Puts a NaN into the third batch, and keeps all that moves as it is before each."""

    def __init__(self):
        self.kept, self.spoilt = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        assert optimizer.defaults["fused"]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        averages = [average for c in trainer.callbacks if isinstance(c, EMA) for average in c.averages]
        self.kept.append([t.detach().clone() for t in (*pl_module.denoiser.parameters(), *averages, *moments)])
        if trainer.global_step == 2:
            self.spoilt = int(batch["id"][5])
            batch["x0"] = from_uint8(batch["image"])
            batch["x0"][5, 0, 3, 4] = float("nan")


def test_a_loss_that_is_not_finite_moves_nothing(tmp_path, capsys):
    spoils = Spoils()
    cli = fit(tmp_path / "run", 7, spoils)
    pairs = [len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairwise(spoils.kept)]
    assert pairs == [False, False, True, False, False, False]
    assert all(t.device.type == "cuda" and t.isfinite().all() for t in spoils.kept[-1])
    assert next(c for c in cli.trainer.callbacks if isinstance(c, Guard)).skipped == 1
    said = f"step 3, rank 0: the loss is not finite, the step was skipped. Samples: {spoils.spoilt} (state 1)\n"
    assert said in capsys.readouterr().err


class Waits(L.Callback):
    """Has torch tell of every time it waits for the device in steps 12 to 18, between two log points."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 11:
            torch.cuda.set_sync_debug_mode("warn")
        elif trainer.global_step == 19:
            float(pl_module.skipped)  # on purpose: the last one told of
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("resident", ["true", "device"])
def test_between_log_points_nobody_waits_for_the_device(resident, tmp_path):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path / "run", 20, Waits(), **{"data.resident": resident, "trainer.val_check_interval": 1000})
    waits = [f"{w.filename}:{w.lineno}" for w in told if "synchronizing CUDA operation" in str(w.message)]
    assert [Path(place).name.partition(":")[0] for place in waits] == ["test_cuda.py"], "\n".join(waits)


def test_fits_together_are_bitwise_what_they_are_alone(tmp_path):
    experts = (1, 5, 8)
    options = {k: {"model.expert": k, "trainer.deterministic": "true", "trainer.callbacks": "[]"} for k in experts}
    for k in experts:
        fit(tmp_path / "alone" / str(k), 20, **options[k])
    assert together([argv(tmp_path / "group" / str(k), 20, **options[k]) for k in experts]) == [None] * 3
    for k in experts:
        alone, group = (load_file(tmp_path / way / str(k) / "model.safetensors") for way in ("alone", "group"))
        assert alone.keys() == group.keys()
        assert [name for name in alone if not torch.equal(alone[name], group[name])] == []


def test_a_fleet_is_trained_composed_and_sampled_on_a_gpu(cli, digits, tmp_path):
    def go(*words):
        code, said, errors = cli(*words, timeout=300)
        assert code == 0, f"{words}\n{said}\n{errors}"

    network = {"shape": [1, 8, 8], "channels": [8, 16], "layers": 1, "groups": 4}
    model = {"network": {"class_path": "UNet", "init_args": network}, "states": {"S": 3}, "lr": 0.01, "warmup": 2}
    data = {"path": str(digits), "channels": 1, "batch_size": 8}
    trainer = {"accelerator": "gpu", "max_steps": 4, "max_epochs": -1, "val_check_interval": 2,
               "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "log_every_n_steps": 2}  # fmt: skip
    config = {"seed_everything": 3, "trainer": trainer, "model": {"class_path": "SingleState", "init_args": model},
              "data": {"class_path": "ImageShards", "init_args": data}}  # fmt: skip
    (tmp_path / "expert.yaml").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "fleet.yaml").write_text(
        json.dumps({"configs": ["expert.yaml"], "budget": 3 * 32, "seed": 3}), encoding="utf-8"
    )
    fleet, composite, out = tmp_path / "fleet", tmp_path / "composite", tmp_path / "images"
    go("fleet", "plan", "--config", tmp_path / "fleet.yaml", "--out", fleet)
    go("fleet", "run", fleet, "--gpus", "0")
    cards = [read_card(fleet / f"expert_{k:03d}" / "model.safetensors", verify=True) for k in (1, 2, 3)]
    assert [(card.rows, card.steps, card.images_seen) for card in cards] == [([k], 4, 32) for k in (1, 2, 3)]
    go("compose", fleet, "--out", composite)
    go("sample", composite, "--out", out, "--seeds", "0:8", "--device", "cuda")
    assert len(list(out.glob("*.png"))) == 8
