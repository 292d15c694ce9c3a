"""Multi-scale and conditional models as fleets of one expert per scale or row: train, compose, sample, evaluate."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_tdisent.cli import describe, main
from lightning_tdisent.diffusion.operators import Edges, Inpainting, Operator
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.observations import Observations
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.compose import load_model

HAAR = {"class_path": "Haar", "init_args": {"levels": 1, "scales": [1.44, 0.515]}}
SCALES = {"class_path": "ComponentStates", "init_args": {"shape": [1, 8, 8], "space": HAAR, "S": 4}}
SMALL = {"3..4": {"model.network.channels": [8]}}  # 4x4 pixels


def y(**condition):
    return {"operator": {"class_path": "Inpainting", "init_args": {"share": 0.25}}, **condition}


def conditional(**condition):
    return {"class_path": "ComponentStates", "init_args": {"shape": [1, 8, 8], "observation": y(**condition), "S": 4}}


SLOW = {"class_path": "Geometric", "init_args": {"sigma_max": 1.0}}


def by_hand(configs, folder, *words, config="expert"):
    argv = ["fit", "--config", configs / f"{config}.yaml", "--run", folder, *words]
    assert main([str(word) for word in argv]) == 0


def test_a_multi_scale_model_is_a_fleet(planned, configs, tmp_path, same_weights, capsys):
    """Train one expert per scale, each with its own network: bitwise equal by hand and by a worker; then sample."""
    fleet = planned(experts=2, for_rows=SMALL, set={"model.states": SCALES}, budget=160)
    assert [e.rows for e in fleet.experts] == [[1, 2], [3, 4]]
    assert 0 < fleet.experts[1].cost < 0.5  # an image of 4x4 pixels
    assert main(["fleet", "run", str(fleet.root), "--workers", "1", "--together", "2"]) == 0
    cards = [read_card(fleet.root / e.name / "model.safetensors") for e in fleet.experts]
    assert [card.network["init_args"]["shape"] for card in cards] == [[1, 8, 8], [1, 4, 4]]
    assert [card.shape for card in cards] == [[1, 8, 8]] * 2
    for e in fleet.experts:
        steps = ["--trainer.max_steps", e.images // 8, "--model.rows", e.rows]
        states = ["--model.states", json.dumps(SCALES)]
        network = ["--model.network.channels", "[8]"] if e.set else []
        by_hand(configs, tmp_path / e.name, *states, *network, *steps)
        same_weights(fleet.root / e.name, tmp_path / e.name)
    out = tmp_path / "composite"
    assert main(["compose", str(fleet.root), "--out", str(out)]) == 0
    for residency in ("resident", "stream"):
        words = ["sample", str(out), "--seeds", "0:5", "--sampler", "ancestral", "--residency", residency]
        assert main([*words, "--out", str(tmp_path / residency)]) == 0
    for k in range(5):
        one, two = ((tmp_path / r / f"{k:06d}.png").read_bytes() for r in ("resident", "stream"))
        assert one == two
    assert main(["export", str(out), "--out", str(tmp_path / "export")]) == 0
    assert load_model(tmp_path / "export").states.fingerprint == cards[0].fingerprint
    assert main(["export", str(out), "--out", str(tmp_path / "x"), "--format", "diffusers"]) == 2
    assert "its table has 2 columns" in capsys.readouterr().err


def test_single_states_of_a_multi_scale_table(planned, tmp_path):
    """Train one time-agnostic expert per row, in lockstep and stacked within each scale."""
    fleet = planned(for_rows=SMALL, set={"model.states": SCALES}, budget=4 * 16)
    assert main(["fleet", "run", str(fleet.root), "--workers", "1", "--together", "4", "--stacked"]) == 0
    stacked = [json.loads((fleet.root / e.name / "stacked.json").read_text(encoding="utf-8")) for e in fleet.experts]
    assert [len(s["experts"]) for s in stacked] == [2] * 4  # those of a scale
    assert max(s["relative_difference"] for s in stacked) < 1e-4
    model = load_model(fleet.root)
    cards = model.cards
    assert all(card.network["init_args"]["conditioning"] == "none" for card in cards)
    assert model.shape == [1, 8, 8]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"experts": 3}, r"3 owners cannot share the intervals of \[2, 2\] rows"),
        (
            {"experts": 2, "budget": {"images": 640, "rule": "adaptive"}},
            "only tables with one column, but this table has 2",
        ),
        ({"rows": [[1, 2, 3], [4]]}, r"rows 1..3 have states of \[1, 8, 8\] and \[1, 4, 4\]"),
        ({"experts": 2, "start": {"shared": {"configs": ["shared.yaml"], "images": 16}}}, r"rows 1..4 have states of"),
    ],
)
def test_plans_that_no_network_can_serve_are_refused(planned, settings, why):
    with pytest.raises(InputError, match=why):
        planned(**{"for_rows": {}, "set": {"model.states": SCALES}, "budget": 160, **settings}).check(describe)


@pytest.mark.parametrize("condition", [{}, {"schedule": SLOW}, {"schedule": SLOW, "anneal": 6, "draw": "bridge"}])
def test_a_resumed_conditional_training_equals_an_uninterrupted_one(configs, tmp_path, same_weights, condition):
    """Masks are drawn at every step and depend on the step only: a run in two parts ends with the same weights."""
    states = ["--model.states", json.dumps(conditional(**condition))]
    by_hand(configs, tmp_path / "whole", *states, "--trainer.max_steps", 8, config="shared")
    by_hand(configs, tmp_path / "parts", *states, "--trainer.max_steps", 3, config="shared")
    by_hand(configs, tmp_path / "parts", *states, "--trainer.max_steps", 8, config="shared")
    same_weights(tmp_path / "whole", tmp_path / "parts")
    if condition.get("anneal"):  # annealing changes the table of the first steps
        fixed = ["--model.states", json.dumps(conditional(schedule=SLOW, draw="bridge"))]
        by_hand(configs, tmp_path / "fixed", *fixed, "--trainer.max_steps", 8, config="shared")
        with pytest.raises(AssertionError):
            same_weights(tmp_path / "whole", tmp_path / "fixed")


def test_a_conditional_model_of_two_scales(planned, tmp_path):
    """CMDE on the Haar basis: the observation is decomposed as well."""
    states = {**SCALES, "init_args": {**SCALES["init_args"], "observation": y(schedule=SLOW)}}
    fleet = planned(experts=2, for_rows=SMALL, set={"model.states": states}, budget=64)
    assert main(["fleet", "run", str(fleet.root), "--workers", "1"]) == 0
    cards = [read_card(fleet.root / e.name / "model.safetensors") for e in fleet.experts]
    assert [card.network["init_args"]["shape"] for card in cards] == [[2, 8, 8], [2, 4, 4]]
    out = tmp_path / "images"
    assert main(["sample", str(fleet.root), "--out", str(out), "--seeds", "0:3", "--observe", "data/digits"]) == 0
    assert len(list(out.glob("*.png"))) == 3


@pytest.fixture
def inpainting(configs, tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    by_hand(configs, tmp_path / "cde", "--model.states", json.dumps(conditional()), config="shared")
    return tmp_path / "cde"


def test_a_conditional_model_is_sampled_and_measured(inpainting, tmp_path, capsys):
    words = ["sample", str(inpainting), "--seeds", "0:6", "--sampler", "ancestral"]
    assert main([*words, "--out", str(tmp_path / "a"), "--observe", "data/digits"]) == 0
    kept = tmp_path / "a" / "observations.safetensors"
    seen = Observations.load(kept)
    assert len(seen) == 6
    assert torch.equal(seen.kernel.eq(0), (seen.y == 0) & seen.kernel.eq(0))  # the hole is mid-grey
    assert main([*words, "--out", str(tmp_path / "b"), "--observe", str(kept)]) == 0
    for k in range(6):
        one, two = ((tmp_path / folder / f"{k:06d}.png").read_bytes() for folder in "ab")
        assert one == two
    out = tmp_path / "evaluation"
    argv = ["evaluate", str(inpainting), "--data", "data/digits", "--protocol", "digits", "-n", "48", "--out", str(out)]
    assert main([*argv, "--sampler", "ancestral", "--metrics", "fd"]) == 0
    row = json.loads((out / "results.json").read_text(encoding="utf-8"))[0]
    assert {"psnr", "ssim", "consistency", "diversity", "jfd_digits", "fd_digits"} <= row.keys()
    assert (row["draws"], row["given"]) == (4, "Inpainting(share=0.25, seed=0)")
    modes = {name: (out / name).stat().st_mode for name in ("results.json", "samples.safetensors", "report.html")}
    assert len(set(modes.values())) == 1, modes  # all as the umask says
    said = capsys.readouterr().out
    assert "psnr" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "the original, what was given, and draws from it" in page
    (file,) = (out / "observations").glob("*.safetensors")
    assert len(Observations.load(file)) == 12


def test_two_ranks_measure_a_conditional_model_as_one_does(inpainting, tmp_path):
    argv = ["evaluate", str(inpainting), "--data", "data/digits", "--protocol", "digits", "-n", "12", "--metrics", "fd"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*run, "-m", "lightning_tdisent", *argv, "--out", str(tmp_path / "two")]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", env=os.environ, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / k / "results.json").read_text(encoding="utf-8"))[0] for k in ("one", "two"))
    names = ("psnr", "ssim", "consistency", "diversity", "jfd_digits", "fd_digits")
    assert [one[k] for k in names] == pytest.approx([two[k] for k in names], rel=1e-9)


def test_observations_that_do_not_fit_the_model_are_refused(inpainting, tmp_path, capsys):
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    right = Observations.of(Inpainting(0.25), images, torch.arange(4))
    shifted = Observations(right.y, right.item.roll(1), right.original, right.kernel, right.operator)
    half = Observations.of(Inpainting(0.5), images, torch.arange(4))
    large = Observations.of(Inpainting(0.25), torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.arange(2))
    asked = ["sample", str(inpainting), "--out", str(tmp_path / "i")]
    for k, (seen, why) in enumerate(
        (
            (half, "made by .*'share': 0.5.*trained for .*'share': 0.25"),
            (
                shifted,
                r"item \d differs by up to .* what Inpainting makes of its original.*mask .*of another item",
            ),
            (large, r"original \[2, 1, 16, 16\].*the model makes \[1, 8, 8\]"),
        )
    ):
        seen.save(tmp_path / f"{k}.safetensors")
        assert main([*asked, "--observe", str(tmp_path / f"{k}.safetensors")]) == 2
        assert re.search(why, capsys.readouterr().err), why
    for broken, why in (
        (right.take([]), "0 observations"),
        (replace(right, y=right.y[:2]), r"item \[4\]"),
    ):
        broken.save(tmp_path / "broken.safetensors")
        assert main([*asked, "--observe", str(tmp_path / "broken.safetensors")]) == 2
        assert re.search(why, capsys.readouterr().err), why
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    assert main(asked) == 2
    assert "given an observation (Inpainting)" in capsys.readouterr().err
    for name, why in (("bad.safetensors", "no observations of this project"), ("none.safetensors", "none.safetensors")):
        assert main([*asked, "--observe", str(tmp_path / name)]) == 2
        assert why in capsys.readouterr().err
    argv = ["evaluate", str(inpainting), "--data", "data/digits", "--protocol", "digits", "--out", str(tmp_path / "e")]
    for more, why in (
        (["-n", "50"], "n is a multiple"),
        (["-n", "2000"], "draws of 500 held-out images; there are 297"),
        (["-n", "48", "--metrics", "fd,bpd"], "not measured for tables of components"),
    ):
        assert main([*argv, *more]) == 2
        assert why in capsys.readouterr().err


def test_an_unconditional_model_takes_no_observations(configs, tmp_path, capsys):
    by_hand(configs, tmp_path / "plain", config="shared")
    assert main(["sample", str(tmp_path / "plain"), "--out", str(tmp_path / "i"), "--observe", "data/digits"]) == 2
    assert "--observe is for conditional models" in capsys.readouterr().err


def test_a_stored_mask_belongs_to_its_item():
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    whole = Observations.of(Inpainting(0.25), images, torch.arange(6))
    some = whole.take([4, 1])
    assert torch.equal(some.y, whole.y[[4, 1]])
    assert torch.equal(some.kernel, whole.kernel[[4, 1]])
    assert some.item.tolist() == [4, 1]
    one = Observations.of(Inpainting(0.25), images[:1], torch.arange(1)).take([0, 0, 0])
    assert len(one.kernel) == 3
    edges = Observations.of(Edges(), images[:2], torch.arange(2)).take([1, 0, 1])
    assert edges.kernel.shape == (2, 1, 3, 3)  # Sobel's, not masks


class Stencil(Operator):
    """Operator with a mask that is read from a file."""

    def __init__(self, file: str) -> None:
        self.file, self.values = file, torch.tensor(json.loads(Path(file).read_text(encoding="utf-8")))

    def kernel(self, shape, item):
        return self.values[None, None]

    def observe(self, x0, item):
        return x0 * self.values


def test_a_run_does_not_resume_if_a_file_it_names_has_changed(configs, tmp_path, capsys):
    """The content of an operator's mask file is part of the identity of a run."""
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps(torch.eye(8).tolist()), encoding="utf-8")
    stencil = {"class_path": f"{__name__}.Stencil", "init_args": {"file": str(mask)}}
    states = conditional()
    states["init_args"]["observation"]["operator"] = stencil
    words = ["--model.states", json.dumps(states), "--trainer.max_steps"]
    by_hand(configs, tmp_path / "run", *words, 2, config="shared")
    card = read_card(tmp_path / "run" / "model.safetensors")
    (digest,) = card.states["init_args"]["observation"]["init_args"]["operator"]["files"].values()
    assert digest == hashlib.sha256(mask.read_bytes()).hexdigest()
    before = mask.read_text(encoding="utf-8")
    mask.write_text(json.dumps((1 - torch.eye(8)).tolist()), encoding="utf-8")
    argv = ["fit", "--config", str(configs / "shared.yaml"), "--run", str(tmp_path / "run"), *words, "4"]
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert "this checkpoint belongs to another model" in said
    assert "mask.json" in said
    mask.write_text(before, encoding="utf-8")
    by_hand(configs, tmp_path / "run", *words, 4, config="shared")
    assert read_card(tmp_path / "run" / "model.safetensors").steps == 4
