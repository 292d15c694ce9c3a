"""The command evaluate, as its user types it: on several ranks, and with what cannot be."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Inpainting
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation import evaluate as evaluating
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.modules import ReducedStates, SingleState
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.psnr import PSNR
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.networks.unet import UNet


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    module = ReducedStates(UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4), LatentStates(S=4))
    save_expert(tmp_path / "model" / "model.safetensors", module.denoiser, module.card("live"))
    return tmp_path / "model"


def words(*sources, out, n=37, protocol="digits", more=()):
    fixed = ["--data", "data/digits", "--protocol", protocol, "-n", n, "--out", out]
    return [str(word) for word in ("evaluate", *sources, *fixed, *more)]


def test_two_ranks_say_what_one_says(model, tmp_path):
    assert main(["sample", str(model), "--seeds", "0:21", "--out", str(tmp_path / "images")]) == 0
    assert main(words(model, tmp_path / "images", out=tmp_path / "one")) == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*run, "-m", "lightning_tdisent", *words(model, tmp_path / "images", out=tmp_path / "two")]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", env=os.environ, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("what it cost") == 1  # one rank speaks
    one, two = (json.loads((tmp_path / k / "results.json").read_text(encoding="utf-8")) for k in ("one", "two"))
    assert [r["name"] for r in one] == [r["name"] for r in two]
    for a, b in zip(one, two, strict=True):
        assert a["protocol"] == b["protocol"]
        kept = [k for k, v in a.items() if isinstance(v, float) and "second" not in k]
        assert len(kept) >= 8
        assert {k: a[k] for k in kept} == pytest.approx({k: b[k] for k in kept}, rel=1e-9)
    assert one[0]["eps_mse"] == two[0]["eps_mse"]
    assert (one[0]["ranks"], two[0]["ranks"], one[0]["nfe"]) == (1, 2, 4)


def test_results_are_not_written_into_a_run_fleet_or_composite(model, tmp_path, capsys):
    for name in ("plan.yaml", "plan.json", "config.yaml", "composite.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}", encoding="utf-8")
        assert main(words(model, out=tmp_path / name)) == 2
        assert f"({name}); choose another folder" in capsys.readouterr().err
    assert main(words(model, out=model)) == 2
    assert "(model.safetensors); choose another folder" in capsys.readouterr().err


def test_metrics_and_reference_can_be_chosen(model, tmp_path, capsys):
    more = ["--metrics", "kid,fd_infinity", "--reference", "test", "--first-seed", 5]
    assert main(words(model, out=tmp_path / "e", n=640, more=more)) == 0
    row = json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))[0]
    assert {"kid_digits", "fd_infinity_digits", "fd_infinity_low_digits"} <= set(row)
    assert "fd_digits" not in row
    assert (row["protocol_fields"]["split"], row["protocol_fields"]["first_seed"]) == ("test", 5)
    said = capsys.readouterr().out
    assert row["protocol"] in said
    assert "ms/image" in said
    assert "peak memory" in said


def test_classes_of_a_model_that_no_held_out_image_has_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    network = UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4, classes=11)
    module = ReducedStates(network, LatentStates(S=2))
    save_expert(tmp_path / "model.safetensors", module.denoiser, module.card("live"))
    assert main(words(tmp_path / "model.safetensors", out=tmp_path / "out")) == 0
    said = capsys.readouterr().err
    assert "is 11, but the 297 held-out images have none of the classes 10; samples of all classes in turn, as" in said


def test_a_single_expert_is_refused_before_other_models_are_measured(model, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    part = SingleState(UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4), LatentStates(S=4), 3)
    save_expert(tmp_path / "part" / "model.safetensors", part.denoiser, part.card("live"))
    monkeypatch.setattr(evaluating, "score", None)  # which would measure
    assert main(words(model, tmp_path / "part", out=tmp_path / "e")) == 2
    assert "part: its network has rows [3] of 1..4, the sampler asks it at row 4" in capsys.readouterr().err
    words_ = ["sample", str(tmp_path / "part"), "--out", str(tmp_path / "images"), "--seeds", "0:1"]
    assert main(words_) == 2
    assert not (tmp_path / "images").exists()


def test_weights_in_bfloat16_are_measured_as_they_are_sampled(model, tmp_path):
    whole, card = load_expert(model / "model.safetensors")
    save_expert(tmp_path / "half" / "model.safetensors", whole.to(torch.bfloat16), card)
    assert main(words(model, tmp_path / "half", out=tmp_path / "e")) == 0
    one, half, _ = json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))
    for row in one["x0_mse"]:
        assert half["x0_mse"][row] == pytest.approx(one["x0_mse"][row], rel=0.02)
    assert half["x0_mse"] != one["x0_mse"]


def test_a_model_that_cannot_be_measured_is_named_at_the_end(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    module = ReducedStates(UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4), LatentStates(S=4))
    for p in module.denoiser.parameters():
        p.data.fill_(1e20)  # finite, but not what the network makes of it
    save_expert(broken / "model.safetensors", module.denoiser, module.card("live"))
    assert main(words(broken, model, out=tmp_path / "e")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: broken: x0_hat at row 4 is not finite (NaN or infinity) for 37 of 37 images, ")
    assert said.err.count("\n") == 1
    assert "report: " in said.out
    assert "x0_hat at row 4 is not finite" in (tmp_path / "e/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "digit"}, "protocol: there is no 'digit'. Did you mean 'digits'"),
        ({"n": 1}, "n: at least two images are required, got 1"),
        (
            {"protocol": "adm"},
            r"inception: no weights at .*lightning_tdisent fetch inception.*--weights FILE",
        ),
        ({"protocol": "adm", "more": ["--weights", "nothing.pth"]}, "nothing.pth"),
        ({"protocol": "dinov2"}, "dinov2: no weights are given"),
        ({"more": ["--weights", "x"]}, "'digits' has its own"),
        ({"more": ["--metrics", "fd,fids"]}, "metrics: there is no 'fids'. Did you mean"),
        ({"more": ["--metrics", "sfd"]}, "sfd: digits has no features with places"),
        ({"more": ["--metrics", "fd_infinity"]}, "64 features need 640 images at least, got n=37"),
        ({"protocol": "mnist"}, r"features 'mnist' take images of \[1, 28, 28\], these are \[1, 8, 8\]"),
        ({"more": ["--reference", "tests"]}, "tests"),
        ({"more": ["--first-seed", str(2**32)]}, "image seeds must lie in"),
        ({"more": ["--device", "cuda:7"]}, "--device cuda:7"),
        ({"more": ["--metrics", "fd,bpd_ode"]}, "needs 100 of them; no model here has as many. Take bpd"),
    ],
)
def test_what_cannot_be_is_one_line(change, message, model, tmp_path, capsys):
    assert main(words(model, out=tmp_path / "e", **change)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "source: not there. Name run folders"),
        ({}, "source is no data set that is known here; it holds nothing"),
        ({"a.png": b"x"}, "source: at least two images are required, it has 1"),
        ({f"{k}.png": b"x" for k in range(7)}, "0.png"),
        ({"a.txt": b"x"}, "it holds a.txt"),
    ],
)
def test_sources_that_are_none_are_one_line(files, message, model, tmp_path, capsys):
    folder = tmp_path / "source"
    if files is not None:
        folder.mkdir()
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    assert main(words(folder, out=tmp_path / "e")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


def test_fetch_takes_a_file_and_refuses_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.pth").write_bytes(b"not the weights")
    assert main(["fetch", "inception", "--source", str(tmp_path / "other.pth")]) == 2
    assert "expected 6726825d" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.pth"))
    assert main(["fetch", "vgg"]) == 2
    assert "there are no weights called 'vgg'. Choose from inception" in capsys.readouterr().err


def test_three_pictures_and_the_others_are_refused_before_the_model_is_sampled(model, tmp_path, capsys, digits):
    from lightning_tdisent.evaluation.pictures import save_png

    for k in range(3):
        save_png(torch.full((1, 8, 8), 80 * k, dtype=torch.uint8), tmp_path / "few" / f"{k}.png")
    assert main(words(model, tmp_path / "few", out=tmp_path / "e")) == 2
    assert "(3 images): neighbours: 1 to below the number of images, 3, got 5" in capsys.readouterr().err


def test_a_picture_that_cannot_be_decoded_costs_its_row_alone(model, tmp_path, capsys):
    assert main(["sample", str(model), "--seeds", "0:9", "--out", str(tmp_path / "images")]) == 0
    (tmp_path / "images" / "000007.png").write_bytes(b"x")
    assert main(words(tmp_path / "images", model, out=tmp_path / "e")) == 2
    said = capsys.readouterr()
    assert "000007.png cannot be decoded" in said.err.strip().splitlines()[-1]
    files, made, _ = json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))
    assert "000007.png" in files["refused"]
    assert made["fd_digits"] > 0
    assert len(made["sha256"][0]) == 64


def test_metrics_of_pairs_are_refused_if_no_model_is_conditional(model, tmp_path, capsys, monkeypatch):
    chosen = vars(Protocol)["chosen"].func  # a class defined here would be a metric of all later tests
    monkeypatch.setattr(Protocol, "chosen", property(lambda self: (*chosen(self), PSNR())))
    words = ["evaluate", str(model), "--data", "data/digits", "--protocol", "digits", "-n", "37"]
    assert main([*words, "--out", str(tmp_path / "e"), "--metrics", "fd"]) == 2
    said = "metrics: psnr: compare each image with the one that it was drawn for, but no model here is conditional"
    assert said in capsys.readouterr().err
    with pytest.raises(InputError, match=r"SampleQuality: psnr: compare each image .* only evaluate and study"):
        SampleQuality("digits")


def test_held_out_images_that_are_references_or_were_trained_on_are_refused(model, tmp_path, capsys, digits):
    def refused(*more):
        assert main([str(word) for word in more]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    copies = tmp_path / "copies"
    copies.mkdir()
    for split in ("train", "test"):
        (copies / f"{split}-0000.tar").write_bytes((digits / "test-0000.tar").read_bytes())
    fixed = ["evaluate", model, "--protocol", "digits", "-n", 37]
    said = refused(*fixed, "--data", copies, "--out", tmp_path / "a")
    assert "test, train: 297 of 297 held-out samples" in said
    test = load(digits, "test", 1)
    card = dataclasses.replace(read_card(model / "model.safetensors"), data=test.digest)
    save_expert(tmp_path / "seen" / "model.safetensors", load_expert(model / "model.safetensors")[0], card)
    said = refused("evaluate", tmp_path / "seen", *fixed[2:], "--data", digits, "--out", tmp_path / "b")
    assert f"was trained on the images of test in {digits} (data digest {test.digest})" in said
    assert not (tmp_path / "b").exists()
    # what is asked for by its name is given
    assert main([str(w) for w in (*fixed, "--data", digits, "--reference", "test", "--out", tmp_path / "c")]) == 0


def test_images_that_are_no_squares_are_measured_as_they_are(tmp_path, monkeypatch, capsys):
    """24 x 16: evaluate, prior and --observe cropped the real images to 24 x 24, and blamed the data."""
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for split in ("train", "test"):
        with wds.TarWriter(str(data / f"{split}-0000.tar"), mtime=0) as shard:
            for k in range(40):
                png = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (24, 16, 3), np.uint8)).save(png, "png")
                shard.write({"__key__": f"{split}{k}", "png": png.getvalue()})
    net = UNet([3, 24, 16], [8, 16], 1, mid_attention=False, groups=4)
    module = ReducedStates(net, LatentStates(S=3))
    save_expert(tmp_path / "m" / "model.safetensors", module.denoiser, module.card("live"))
    fixed = ["evaluate", tmp_path / "m", "--data", data, "--protocol", "random", "-n", 32, "--out", tmp_path / "e"]
    assert main([str(word) for word in fixed]) == 0, capsys.readouterr().err
    row = json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))[0]
    assert row["protocol_fields"]["shape"] == [3, 24, 16]
    fitted = ["prior", tmp_path / "m", "--at", 2, "--data", data, "--out", tmp_path / "p"]
    assert main([str(word) for word in fitted]) == 0, capsys.readouterr().err
    states = ComponentStates([3, 24, 16], observation=Observation(Inpainting()), S=3)
    net = UNet([6, 24, 16], [8, 16], 1, mid_attention=False, groups=4)
    conditional = ReducedStates(net, states)
    save_expert(tmp_path / "i" / "model.safetensors", conditional.denoiser, conditional.card("live"))
    seen = ["sample", tmp_path / "i", "--observe", data, "--seeds", "0:2", "--out", tmp_path / "o"]
    assert main([str(word) for word in seen]) == 0, capsys.readouterr().err
