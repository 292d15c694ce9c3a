import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_tdisent.diffusion.objectives import X0, Eps, MinSNR, V
from lightning_tdisent.diffusion.schedules import Cosine
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.models.card import Card, read_card
from lightning_tdisent.models.compose import find_files
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.networks.dit import DiT
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sampler import DDIM


def header(content: bytes) -> dict:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length])


@pytest.mark.parametrize("conditioning", ["state", "none", None])
@pytest.mark.parametrize("classes", [None, 3])
def test_a_file_gives_back_the_same_expert(model, write, card_of, classes, conditioning):
    one = model(Eps(MinSNR(2.0)), rows=[2, 3], classes=classes, conditioning=conditioning)
    path = write("expert", one)
    again, card = load_expert(path)
    assert card == read_card(path) == card_of(one)
    assert again.rows == card.rows == [2, 3]
    assert card.fingerprint == one.states.fingerprint == again.states.fingerprint
    assert card.image_range == [-1.0, 1.0]
    assert not any(m.training for m in again.modules())
    assert isinstance(again.objective, Eps)
    assert again.objective.weight.gamma == 2.0
    assert torch.equal(again.weights, one.weights)
    mine, theirs = one.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name])
        assert theirs[name].dtype == value.dtype
        assert not theirs[name].is_meta
    assert all(p.requires_grad for p in again.parameters())
    x, label = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), None
    if classes:
        label = torch.tensor([0, 3])
    with torch.no_grad():
        for s in (2, 3):
            assert torch.equal(again(x, s, label), one(x, s, label))
        assert torch.equal(again.loss(x, torch.tensor([2, 3]), x, label), one.loss(x, torch.tensor([2, 3]), x, label))


@pytest.mark.parametrize("classes", [None, 3])
def test_the_buffers_of_a_transformer_are_restored(states, write, classes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DiT([1, 8, 8], patch=4, depth=1, heads=2, head=8, classes=classes)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.2 * torch.randn_like(p))
    one = Denoiser(net, V(), states).eval()
    again, _ = load_expert(write("dit", one))
    assert torch.equal(DDIM()(again, [1, 2]), DDIM()(one, [1, 2]))


def test_a_table_of_listed_rows_is_kept(toy, unet, write):
    few = LatentStates(Cosine()).restrict([17, 500, 1000])
    again, card = load_expert(write("few", Denoiser(unet(), X0(), few, [3])))
    assert again.states.index.tolist() == [0, 17, 500, 1000]
    assert torch.equal(again.states.log_snr, few.log_snr)
    assert card.states["init_args"]["indices"] == [17, 500, 1000]


def test_other_weights_than_the_live_ones_can_be_written(model, card_of, tmp_path):
    live, ema = model(seed=1), model(seed=2)
    path = tmp_path / "deep" / "er" / "expert.safetensors"
    before = {k: v.clone() for k, v in live.state_dict().items()}
    save_expert(path, live, card_of(live), ema.state_dict())
    again, _ = load_expert(path)
    assert all(torch.equal(v, ema.state_dict()[k]) for k, v in again.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in live.state_dict().items())


def test_the_header_contains_the_card(model, write):
    one = model(rows=[4])
    head = header(write("expert", one).read_bytes())
    card = json.loads(head["__metadata__"]["card"])
    assert card["schema"] == 2
    assert card["rows"] == [4]
    assert card["fingerprint"] == one.states.fingerprint
    assert card["data"] == "d1g1t5"
    assert card["weights"] == "ema"
    assert card["objective"]["class_path"] == "lightning_tdisent.diffusion.objectives.V"
    assert card["network"]["init_args"]["channels"] == [8]
    assert set(head) - {"__metadata__"} == set(one.state_dict())


def test_the_same_expert_gives_the_same_bytes(model, write):
    assert write("one", model()).read_bytes() == write("two", model()).read_bytes()


def test_reading_a_card_reads_no_weights(model, write, spoil, card_of):
    one = model()
    path = spoil(write("expert", one))
    assert read_card(path) == card_of(one)
    with pytest.raises(InputError, match=r"expert\.safetensors: damaged: sha256"):
        load_expert(path)


HUGE = struct.pack("<Q", 1 << 62)
BARE = json.dumps({"__metadata__": {"format": "pt"}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"these are no weights, but a line of text\n",
        HUGE + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 50) + b'{"__metadata__": {"card"',
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", len(BARE)) + BARE,
    ],
    ids=["empty", "three", "text", "huge", "large", "truncated", "no card", "list", "not utf-8", "other safetensors"],
)
def test_a_file_that_is_not_an_expert_is_refused(tmp_path, content):
    path = tmp_path / "thing.safetensors"
    path.write_bytes(content)
    for reader in (read_card, load_expert):
        with pytest.raises(InputError, match=r"thing\.safetensors: not an expert"):
            reader(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors: no such file"):
        read_card(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match=tmp_path.name):
        read_card(tmp_path)


def test_every_truncation_is_refused(model, write, tmp_path):
    content = write("expert", model()).read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0]
    path = tmp_path / "short.safetensors"
    for length in (0, 4, 8, 9, head // 2, head - 1, head, head + 1, len(content) - 4, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"short\.safetensors"):
            load_expert(path)


def test_any_flipped_bit_is_found(model, write):
    path = write("expert", model())
    content = path.read_bytes()
    for bit in torch.randperm(8 * len(content), generator=torch.Generator().manual_seed(0))[:300].tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"expert\.safetensors"):
            load_expert(path)
    path.write_bytes(content)
    load_expert(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(schema=1), ["schema 1", "reads 2"]),
        (lambda c: c.update(mood="good"), ["mood"]),
        (lambda c: c.pop("rows") and None, ["rows"]),
        (lambda c: c.update(fingerprint="0123456789abcdef"), ["0123456789abcdef", "fingerprint"]),
        (lambda c: c["states"]["init_args"].update(S=5), ["fingerprint"]),
        (lambda c: c.update(rows=[9]), ["[9]", "1..4"]),
        (lambda c: c["network"]["init_args"].update(channels=[16]), ["weights do not fit"]),
        (lambda c: c["network"]["init_args"].update(classes=3), ["weights do not fit"]),
        (lambda c: c["network"]["init_args"].update(widths=[16]), ["UNet", "widths"]),
        (lambda c: [1, 2], ["forged.safetensors"]),
        (lambda c: "a card", ["forged.safetensors"]),
        (lambda c: c["network"].pop("init_args") and None, []),
    ],
    ids=["schema", "odd", "missing", "fingerprint", "S", "rows", "width", "classes", "argument", "list", "str", "spec"],
)
def test_a_card_that_does_not_fit_is_refused(model, forge, change, words):
    path = forge(model(), change)
    with pytest.raises(InputError) as refusal:
        load_expert(path)
    for word in words:
        assert word in str(refusal.value)


def test_a_class_outside_the_package_is_refused_without_importing_it(model, forge, tmp_path, monkeypatch):
    (tmp_path / "somebodys_network.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for place in ("network", "objective", "states"):
        path = forge(model(), lambda c, place=place: c[place].update(class_path="somebodys_network.Net"))
        with pytest.raises(InputError, match=r"somebodys_network\.Net.*--import somebodys_network"):
            load_expert(path)
    assert "somebodys_network" not in sys.modules


def test_a_class_that_is_no_part_is_refused_and_not_called(model, forge, tmp_path, monkeypatch):
    called = tmp_path / "called"
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: called.touch())
    monkeypatch.setattr(os, "system", lambda *_: called.touch())
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(called)]}}
    system = {"class_path": "os.system", "init_args": {"command": f"touch {called}"}}
    for attack in (popen, system):
        for change in (
            lambda c, a=attack: c.update(network=a),
            lambda c, a=attack: c.update(states=a),
            lambda c, a=attack: c.update(objective=a),
            lambda c, a=attack: c["objective"]["init_args"].update(weight=a),
            lambda c, a=attack: c["states"]["init_args"].update(schedule=a),
        ):
            with pytest.raises(InputError, match=r"(Popen|system) is no "):
                load_expert(forge(model(), change))
    assert not called.exists()


def test_a_class_of_the_reader_is_taken_once_it_is_imported(toy, states, write, monkeypatch):
    monkeypatch.setattr(toy, "__module__", "readers_network")
    one = Denoiser(toy([1, 4, 4], gain=0.4), V(), states)
    with monkeypatch.context() as while_writing:
        while_writing.setitem(sys.modules, "readers_network", SimpleNamespace(Toy=toy))
        path = write("toy", one)
    with pytest.raises(InputError, match=r"readers_network\.Toy.*not loaded"):
        load_expert(path)
    monkeypatch.setitem(sys.modules, "readers_network", SimpleNamespace(Toy=toy))
    again, _ = load_expert(path)
    assert type(again.network) is toy
    assert torch.equal(DDIM()(again, [1]), DDIM()(one, [1]))


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    assert path.read_bytes() == b"old"

    def power_cut(_: int) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power_cut)
        with pytest.raises(Halted, match="power cut"):
            write_whole(path, b"new content")
    assert path.read_bytes() == b"old"
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sha256_of_a_known_string(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == expected


def test_a_card_is_plain_json(model, card_of):
    card = card_of(model(), seed=7)
    data = json.loads(json.dumps(dataclasses.asdict(card)))
    assert Card.from_json(data, "here") == card
    assert card.seed == 7


def test_a_checkpoint_of_a_training_is_read_with_its_average(tmp_path, digits):
    path = _trained(tmp_path, digits)
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    denoiser, card = load_expert(checkpoint)
    exported, other = load_expert(path)
    assert card.weights == "ema"
    assert {k: v for k, v in vars(card).items() if k != "seconds"} == {
        k: v for k, v in vars(other).items() if k != "seconds"
    }
    state = exported.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in denoiser.state_dict().items())
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged: sha256 .*its manifest says"):
        load_expert(checkpoint)
    with pytest.raises(InputError, match=r"other.ckpt: no such checkpoint"):
        read_card(tmp_path / "other.ckpt")


def _trained(tmp_path, digits):
    from lightning_tdisent.cli import main

    words = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.callbacks", "[]"]
    config = ["--config", "experiments/digits/reduced8.yaml", "--data.path", str(digits)]
    assert main(["fit", *config, *words, "--run", str(tmp_path / "run")]) == 0
    return tmp_path / "run" / "model.safetensors"


def test_weights_of_another_run_in_a_run_folder_are_refused(model, card_of, tmp_path):
    one, other = tmp_path / "runs" / "r1", tmp_path / "runs" / "r2"
    for seed, (folder, run) in enumerate(((one, "a" * 16), (other, "b" * 16))):
        denoiser = model(seed=seed)
        save_expert(folder / "model.safetensors", denoiser, card_of(denoiser, run=run))
        (folder / "config.yaml").write_text(f"model: 1\nid: {run}\n", encoding="utf-8")
    assert find_files(one) == [one / "model.safetensors"]
    assert Job("one", [], one).card.run == "a" * 16
    shutil.copy(other / "model.safetensors", one)
    for look in (lambda: find_files(one), lambda: find_files(tmp_path / "runs"), lambda: Job("one", [], one).card):
        with pytest.raises(InputError, match=r"model.safetensors is of run b{16}, .*r1 is the folder of run a{16}"):
            look()
