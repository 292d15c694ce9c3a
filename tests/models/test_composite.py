import contextlib
import copy
import json
import re
import shutil

import pytest
import torch
from torch import nn

from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import X0, Eps, V
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Inpainting, SuperResolution
from lightning_tdisent.diffusion.schedules import Cosine, Linear
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.models.compose import compose, composite_files, find_files, load_model, recompose
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.models.warm import refuse_start, start_warm
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver


def refusal(call, *args: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    return str(caught.value)


@pytest.fixture
def experts(model):
    return [model(rows=[s], seed=s) for s in (1, 2, 3, 4)]


@pytest.fixture
def files(experts, write):
    return [write(f"e{e.rows[0]}", e) for e in experts]


@pytest.fixture
def folder(files, tmp_path):
    return compose(files, tmp_path / "composite")


def test_a_composite_of_a_study_follows_the_weights_of_its_experts(files, write, model, tmp_path):
    out = tmp_path / "composite"
    assert not recompose(files, out)
    first = {path: path.stat().st_ino for path in out.iterdir()}
    assert not recompose(files, out)  # whole, and of these weights
    assert {path: path.stat().st_ino for path in out.iterdir()} == first
    files[1].unlink()
    write("e2", model(rows=[2], seed=9))  # trained anew
    assert recompose(files, out)
    assert [sha256(path) for path in find_files(out)] == [sha256(path) for path in files]
    (out / "composite.json").unlink()  # killed before the manifest, which is written last
    (out / "rows_0001.safetensors").unlink()  # which is a link to the expert's own file
    (out / "rows_0001.safetensors").write_bytes(b"half")
    assert not recompose(files, out)
    assert [sha256(path) for path in find_files(out)] == [sha256(path) for path in files]


def test_each_row_goes_to_its_owner(model):
    experts = [model(rows=[3, 4], seed=1), model(rows=[1], seed=2), model(rows=[2], seed=3)]
    composite = CompositeDenoiser(experts)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for s, owner in ((1, 1), (2, 2), (3, 0), (4, 0)):
            assert composite.at(s) is experts[owner]
            assert torch.equal(composite(x, s), experts[owner](x, s))
            other = Denoiser(experts[owner - 1].network, V(), composite.states)
            assert not torch.equal(composite(x, s), other(x, s))
    assert composite.shape == [1, 8, 8]
    assert composite.classes is None
    assert composite.states.fingerprint == experts[0].states.fingerprint
    assert len(list(composite.parameters())) == 3 * len(list(experts[0].parameters()))


def test_rows_that_are_missing_or_doubled_are_refused(model):
    text = refusal(CompositeDenoiser, [model(rows=[1, 3]), model(rows=[3])])
    assert "no expert owns rows 2, 4 of 1..4" in text
    assert "row 3 is owned by expert 0 and expert 1" in text
    assert "no expert owns row 4" in refusal(CompositeDenoiser, [model(rows=[1, 2, 3])])
    assert "no experts" in refusal(CompositeDenoiser, [])


def test_experts_in_memory_that_differ_are_refused(model, unet):
    other = LatentStates(Cosine(), S=4)
    good = [model(rows=[s]) for s in (1, 2)]
    odd = [Denoiser(unet(), V(), other, [3]), Denoiser(unet(shape=(1, 16, 16), classes=3), V(), good[0].states, [4])]
    text = refusal(CompositeDenoiser, good + odd)
    for word in ("expert 2", other.fingerprint, good[0].states.fingerprint, "expert 3", "[1, 16, 16]", "[1, 8, 8]"):
        assert word in text
    assert '"classes": 3' in text
    assert '"classes": null' in text


@pytest.mark.parametrize("sampler", [DDIM(), Ancestral()], ids=["ddim", "ancestral"])
def test_composing_and_loading_changes_no_bit(experts, files, folder, sampler):
    before = [f.read_bytes() for f in files]
    loaded = load_model(folder)
    cards = loaded.cards
    assert isinstance(loaded, CompositeDenoiser)
    assert [c.rows for c in cards] == [[1], [2], [3], [4]]
    assert not loaded.training
    for s, expert in enumerate(experts, start=1):
        mine, theirs = expert.state_dict(), loaded.at(s).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    assert torch.equal(sampler(loaded, [1, 2, 3]), sampler(CompositeDenoiser(experts), [1, 2, 3]))
    assert [f.read_bytes() for f in files] == before


def test_the_order_of_the_files_does_not_matter(files, folder, tmp_path):
    other = compose(files[::-1], tmp_path / "other")
    assert (other / "composite.json").read_bytes() == (folder / "composite.json").read_bytes()
    assert torch.equal(DDIM()(load_model(other), [1]), DDIM()(load_model(folder), [1]))


def test_a_composite_works_after_its_source_files_are_removed(files, folder):
    expected = DDIM()(load_model(folder), [1])
    for file in files:
        file.unlink()
    assert torch.equal(DDIM()(load_model(folder), [1]), expected)


def test_the_manifest(experts, folder):
    manifest = json.loads((folder / "composite.json").read_text(encoding="utf-8"))
    assert manifest["fingerprint"] == experts[0].states.fingerprint
    assert [e["rows"] for e in manifest["experts"]] == [[1], [2], [3], [4]]
    assert [e["file"] for e in manifest["experts"]] == [f"rows_000{s}.safetensors" for s in (1, 2, 3, 4)]
    assert composite_files(folder) == [folder / e["file"] for e in manifest["experts"]]


def test_experts_of_several_rows_compose(model, write, tmp_path):
    experts = [model(rows=[1, 4], seed=1), model(rows=[2, 3], seed=2)]
    folder = compose([write("a", experts[0]), write("b", experts[1])], tmp_path / "two")
    assert torch.equal(DDIM()(load_model(folder), [5]), DDIM()(CompositeDenoiser(experts), [5]))


ROWS = 9
TABLE = LatentStates(Linear(), S=ROWS)


@pytest.fixture
def nine(unet):
    def expert(s: int, states: LatentStates = TABLE, objective: type = V, **args: object) -> Denoiser:
        return Denoiser(unet(s, **args), objective(), states, [s])

    return expert


def test_every_offender_is_named_at_once_before_weights_are_read_or_anything_is_written(nine, write, spoil, tmp_path):
    other = LatentStates(Linear(beta_end=0.021), S=ROWS)
    fewer = LatentStates(Linear(), S=10)
    names = {
        "good": write("good", nine(1)),
        "fine": write("fine", nine(2)),
        "range": write("range", nine(3), image_range=[0.0, 1.0]),
        "table": write("table", nine(4, other)),
        "words": write("words", nine(5, objective=Eps)),
        "side": write("side", nine(6, shape=(1, 16, 16))),
        "classes": write("classes", nine(7, classes=5)),
        "data": write("data", nine(8), data="0therd4ta"),
        "live": write("live", nine(8), weights="live"),
        "count": write("count", nine(2, fewer)),
        "spare": write("spare", nine(1)),
        "more": write("more", nine(1)),
    }
    for path in names.values():
        spoil(path)
    out = tmp_path / "out" / "composite"
    for call in (lambda: compose(list(names.values()), out), lambda: compose(list(names.values())[::-1], out)):
        text = refusal(call)
        lines = {name: [line for line in text.split("\n") if f"{path}:" in line] for name, path in names.items()}
        expected = {
            "range": ["image range", "[0.0, 1.0]", "[-1.0, 1.0]"],
            "table": ["table", other.fingerprint, TABLE.fingerprint, "beta_end=0.021,", "beta_end=0.02,"],
            "words": ["parametrisation", '"Eps"', '"V"'],
            "side": ["network input", "[1, 16, 16]", "[1, 8, 8]"],
            "classes": ["network input", '"classes": 5', '"classes": null'],
            "data": ["training data", '"0therd4ta"', '"d1g1t5"'],
            "live": ["weights", '"live"', '"ema"'],
        }
        for name, words in expected.items():
            assert len(lines[name]) == 1, name
            for word in words:
                assert word in lines[name][0], (name, word)
        assert any(" S is 10, the others have 9" in line for line in lines["count"])
        assert any(fewer.fingerprint in line for line in lines["count"])
        assert lines["good"] == lines["fine"] == lines["spare"] == []
        assert "no expert owns row 9 of 1..9" in text
        doubled = [line for line in text.split("\n") if "row 1 is owned by" in line]
        assert len(doubled) == 1
        assert all(str(names[n]) in doubled[0] for n in ("good", "spare", "more"))
        assert any(str(names["fine"]) in line and str(names["count"]) in line for line in text.split("\n"))
        assert "12 experts" in text
    assert not out.parent.exists()


@pytest.mark.parametrize("what", ["compose", "load"])
def test_a_folder_of_runs_is_checked_before_weights_are_read(nine, write, spoil, tmp_path, what):
    for s in (1, 2, 3):
        (tmp_path / "runs" / f"{s}").mkdir(parents=True)
        shutil.move(write(f"{s}", nine(s)), tmp_path / "runs" / f"{s}" / "model.safetensors")
        spoil(tmp_path / "runs" / f"{s}" / "model.safetensors")
    files = find_files(tmp_path / "runs")
    assert len(files) == 3
    call = (load_model, tmp_path / "runs") if what == "load" else (compose, files, tmp_path / "out")
    text = refusal(*call)
    assert "no expert owns rows 4, 5, 6, 7, 8, 9 of 1..9" in text
    assert not (tmp_path / "out").exists()


def test_one_expert_alone_cannot_be_sampled(files, tmp_path):
    run = tmp_path / "runs" / "only"
    run.mkdir(parents=True)
    shutil.copy(files[1], run / "model.safetensors")
    for source in (files[1], run, tmp_path / "runs"):
        assert re.search(r"own.* rows? |row .*own", refusal(lambda s=source: DDIM()(load_model(s), [1])))


def test_files_that_are_no_experts_are_all_named(files, tmp_path):
    empty, text = tmp_path / "empty.safetensors", tmp_path / "text.safetensors"
    empty.touch()
    text.write_text("no weights", encoding="utf-8")
    message = refusal(compose, [*files, empty, text, tmp_path / "gone.safetensors"], tmp_path / "out")
    for word in (f"{empty}: not an expert", f"{text}: not an expert", "gone.safetensors: no such file"):
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", [-1, 0, 9, 400])
def test_one_flipped_bit_in_a_member_is_refused(folder, at):
    member = folder / "rows_0003.safetensors"
    content = bytearray(member.read_bytes())
    content[at] ^= 1
    member.unlink()
    member.write_bytes(content)
    text = refusal(load_model, folder)
    assert f"{member}: sha256 is " in text
    assert "rows_0001" not in text
    manifest = json.loads((folder / "composite.json").read_text(encoding="utf-8"))
    assert manifest["experts"][2]["sha256"] in text


def test_every_damaged_member_is_named(folder):
    (folder / "rows_0002.safetensors").unlink()
    (folder / "rows_0004.safetensors").unlink()
    (folder / "rows_0004.safetensors").write_bytes(b"something else")
    text = refusal(load_model, folder)
    assert "rows_0002.safetensors: missing" in text
    assert "rows_0004.safetensors: sha256 is" in text
    assert "rows_0001" not in text


def test_members_of_two_composites_cannot_be_swapped(folder):
    one, two = folder / "rows_0001.safetensors", folder / "rows_0002.safetensors"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    text = refusal(load_model, folder)
    assert "rows_0001" in text
    assert "rows_0002" in text


@pytest.mark.parametrize(
    "manifest", ["", "{", "{}", "[]", '{"experts": [{}]}', '{"experts": 3}', "null", '{"experts": ["a"]}']
)
def test_an_invalid_manifest_is_refused(tmp_path, manifest):
    (tmp_path / "composite.json").write_text(manifest, encoding="utf-8")
    assert re.search(r"composite.json: (not a composite|damaged: its schema is none)", refusal(load_model, tmp_path))


def test_a_composite_is_not_written_over(files, folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "already holds a composite" in refusal(compose, files, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_with_other_files_is_refused_as_output(files, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(files[0].read_bytes())
    (run / "config.yaml").write_text("", encoding="utf-8")
    before = sorted(p.name for p in run.iterdir())
    assert "holds other files (config.yaml, model.safetensors)" in refusal(compose, files, run)
    assert sorted(p.name for p in run.iterdir()) == before
    one, two = (find_files(compose([run, *files[1:]], tmp_path / name)) for name in ("a", "b"))  # a run, by its folder
    assert (
        [p.read_bytes() for p in one] == [p.read_bytes() for p in two] == [p.read_bytes() for p in find_files(folder)]
    )


# a composite whose manifest got lost is composed again in place
def test_composing_files_where_they_lie_does_not_lose_them(folder):
    (folder / "composite.json").unlink()
    members = sorted(folder.glob("*.safetensors"))
    before = [m.read_bytes() for m in members]
    with contextlib.suppress(InputError):
        compose(members, folder)
    assert [m.read_bytes() for m in members if m.exists()] == before


def test_find_files(files, folder, tmp_path):
    assert find_files(files[0]) == [files[0]]
    assert find_files(str(folder)) == sorted(folder.glob("rows_*.safetensors"))
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(files[0], tmp_path / "runs" / name / "model.safetensors")
    assert find_files(tmp_path / "runs") == [tmp_path / "runs" / n / "model.safetensors" for n in "ab"]
    assert find_files(tmp_path / "runs" / "a") == [tmp_path / "runs" / "a" / "model.safetensors"]
    (tmp_path / "none").mkdir()
    for nothing in (tmp_path / "none", tmp_path / "never"):
        assert str(nothing) in refusal(find_files, nothing)


def test_one_file_that_owns_all_rows_is_a_model(model, write):
    one = model(X0())
    loaded = load_model(write("whole", one))
    (card,) = loaded.cards
    assert isinstance(loaded, Denoiser)
    assert card.rows == [1, 2, 3, 4]
    assert torch.equal(DDIM()(loaded, [1]), DDIM()(one, [1]))


def test_composing_one_whole_model(model, write, tmp_path):
    one = model()
    loaded = load_model(compose([write("whole", one)], tmp_path / "composite"))
    assert torch.equal(DDIM()(loaded, [4]), DDIM()(one, [4]))


def test_a_composite_does_not_modify_its_experts(experts):
    before = copy.deepcopy([e.state_dict() for e in experts])
    DDIM()(CompositeDenoiser(experts), [1])
    for expert, state in zip(experts, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in expert.state_dict().items())


# Previews


class Ideal(Network):
    """v_hat of E[x_0 | x_t] for independent centred Gaussian pixels of these variances, at one pair (a, b)."""

    def __init__(self, shape: list[int], variances: list[float], a: float, b: float, classes=None, conditioning="none"):
        super().__init__(shape, classes, conditioning)
        self.variances, self.a, self.b = variances, a, b
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, index=None, label=None):
        v = torch.tensor(self.variances, dtype=x.dtype).view(self.shape)
        x0 = self.a * v / (self.a**2 * v + self.b**2) * x
        return (self.a * x - x0) / self.b


SPECTRUM = [200 / (1 + k) ** 2 for k in range(64)]  # the power of an image's axes falls with the square of frequency
FINE = LatentStates(Linear(), S=32)


def ideal(s: int) -> Denoiser:
    return Denoiser(Ideal([1, 8, 8], SPECTRUM, *FINE.coefficients(s)), V(), FINE, [s])


def test_filling_with_the_nearest_expert_follows_its_formula_and_beats_the_naive_one():
    rows = [1, 2, *range(4, 33, 4)]
    composite = CompositeDenoiser([ideal(s) for s in rows], "nearest")
    log_snr = FINE.log_snr[:, 0].tolist()
    expected = {s: min(rows, key=lambda r: abs(log_snr[r] - log_snr[s])) for s in range(1, 33) if s not in rows}
    assert composite.filled == {s: f"row {r}" for s, r in expected.items()}
    assert {3: 4, 5: 4, 7: 8, 29: 28}.items() < expected.items()
    v = torch.tensor(SPECTRUM, dtype=torch.float64).view(1, 8, 8)
    excess = dict.fromkeys(("ours", "untouched", "signal", "raw"), 0.0)
    for s, r in expected.items():
        (a, b), (c, d) = FINE.coefficients(s), FINE.coefficients(r)
        w, least = c * c * v / (c * c * v + d * d), float((b * b * v / (a * a * v + b * b)).mean())
        x = (a * a * v + b * b).sqrt()[None]  # one standard deviation along every axis: its square is the mean error
        exact = a * v / (a * a * v + b * b) * x
        expert = composite.at(s)
        assert expert is composite.at(r)
        found = {
            "ours": composite(x, s),
            "untouched": expert(x, r),
            "signal": expert(c / a * x, r),
            "raw": Denoiser(expert.network, V(), FINE)(x, s),
        }
        torch.testing.assert_close(found["ours"], w * (a / c) ** 0.5 * x / a, rtol=1e-9, atol=1e-12)
        excess = {k: excess[k] + float((out - exact).square().mean()) / least for k, out in found.items()}
    assert excess["ours"] < 0.95 * min(excess[k] for k in ("untouched", "signal", "raw"))
    with torch.no_grad():
        for s in rows:
            x = torch.ones(1, 1, 8, 8)
            assert torch.equal(composite(x, s), ideal(s)(x, s))


def test_a_row_without_signal_can_be_missing_or_stand_in(unet):
    for states in (
        LatentStates(Linear(zero_terminal=True), S=4),
        LatentStates.from_table(
            LatentStates(Linear(zero_terminal=True), S=4).log_snr.repeat(1, 2), torch.arange(5), Linear()
        ),
    ):
        for rows, filled in (([1, 2, 3], {4: "row 3"}), ([4], {1: "row 4", 2: "row 4", 3: "row 4"})):
            shape = (2, 8, 8) if states.K == 2 else (1, 8, 8)
            composite = CompositeDenoiser([Denoiser(unet(s, shape), V(), states, [s]) for s in rows], "nearest")
            assert composite.filled == filled
            x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():  # x as it is: the ratio of the signals is 0 or infinite
                assert all(torch.equal(composite(x, s), composite(x, int(r[4:]))) for s, r in filled.items())
                assert all(composite(x, s).isfinite().all() for s in filled)


def test_a_preview_uses_the_shared_model_at_rows_without_an_expert(model, write, tmp_path):
    shared = model(X0(), seed=9)  # another parametrisation: what it says is x0_hat all the same
    experts = [model(rows=[s], seed=s) for s in (1, 3)]
    composite = CompositeDenoiser(experts, shared)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for s, owner in ((1, experts[0]), (2, shared), (3, experts[1]), (4, shared)):
            assert torch.equal(composite(x, s), owner(x, s))
    assert composite.filled == {2: "shared", 4: "shared"}
    assert len(list(composite.parameters())) == 3 * len(list(shared.parameters()))

    big = LatentStates(Linear(), S=8)  # a larger table has the rows, too
    fill = f"shared:{write('shared', Denoiser(shared.network, X0(), big))}"
    files = [write(f"{e.rows[0]}", e) for e in experts]
    folder = compose(files, tmp_path / "preview", fill)
    preview = json.loads((folder / "composite.json").read_text(encoding="utf-8"))["preview"]
    assert preview == {"missing": [2, 4], "fill": fill, "sha256": sha256(fill[7:])}
    expected = DDIM()(composite, [1, 2])
    for residency in ("resident", "offload", "stream"):
        loaded = load_model(folder, residency, fill)
        cards = loaded.cards
        assert loaded.filled == composite.filled
        assert [c.rows for c in cards] == [[1], [3], list(range(1, 9))]
        assert torch.equal(DDIM()(loaded, [1, 2]), expected)


@pytest.mark.parametrize(
    "tables",
    [
        [ComponentStates([1, 8, 8], space=Haar(1, scales), S=4) for scales in ([2.0, 0.25], [1.0, 1.0])],
        [ComponentStates([1, 8, 8], observation=Observation(op), S=4) for op in (Inpainting(0.25), SuperResolution(4))],
        [LatentStates(S=4), ComponentStates([1, 8, 8], space=Haar(1), S=4)],
    ],
)
def test_models_of_other_spaces_are_refused_as_fill_and_as_warm_start(tables, unet, write, tmp_path):
    (mine, theirs), net = tables, lambda t, s: unet(0, t.shape_at(s, [1, 8, 8]))
    for s in (1, 3, 4):
        write(f"experts/{s}/model", Denoiser(net(mine, s), V(), mine, [s]))
    rows = theirs.blocks_of_rows[0] if theirs.K > 1 and theirs.observation is None else theirs.rows
    shared = write("shared", Denoiser(net(theirs, 1), V(), theirs, rows))
    assert "its states are made of [" in refusal(compose, [tmp_path / "experts"], tmp_path / "out", f"shared:{shared}")
    begun = Denoiser(net(mine, 1), V(), mine, [1])
    for call in (start_warm, refuse_start):
        with pytest.raises(InputError, match=r"are made of \[|network"):
            call(begun, str(shared))


def test_a_warm_start_may_differ_in_the_training_of_its_observation(unet, write):
    table, other = (
        ComponentStates([1, 8, 8], observation=Observation(Inpainting(0.25), weight=weight), S=4)
        for weight in (1.0, 0.0)
    )
    shared = write("shared", Denoiser(unet(0, table.shape_at(1)), V(), table))
    begun = Denoiser(unet(1, table.shape_at(1)), V(), other)
    start_warm(begun, str(shared))
    theirs = load_expert(shared)[0].network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in begun.network.state_dict().items())


def test_a_class_conditional_model_with_observations_requires_labels(unet):
    table = ComponentStates([1, 8, 8], observation=Observation(Inpainting(0.25)), S=2)
    with pytest.raises(InputError, match="a model is given a class or an observation, not both"):
        ReducedStates(unet(0, table.shape_at(1), classes=3), table)
    old = Denoiser(unet(0, table.shape_at(1), classes=3), V(), table).eval()
    given = torch.zeros(1, 1, 8, 8)
    with pytest.raises(InputError, match="needs a label for each of them"):
        next(sample(old, DDIM(), [0], given=given))
    assert next(sample(old, DDIM(), [0], label=torch.tensor([1]), given=given)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("residency", ["resident", "offload", "stream"])
def test_a_preview_is_refused_unless_it_is_asked_for(experts, files, tmp_path, residency):
    some = [files[0], files[2]]
    words = "no expert owns rows 2, 4 of 1..4; compose and sample give a preview without them with --fill nearest"
    assert words in refusal(compose, some, tmp_path / "preview")
    folder = compose(some, tmp_path / "preview", "nearest")
    assert words in refusal(load_model, folder, residency)
    loaded = load_model(folder, residency, "nearest")
    cards = loaded.cards
    assert loaded.filled == {2: "row 1", 4: "row 3"}
    assert len(cards) == 2
    made = CompositeDenoiser([experts[0], experts[2]], "nearest")
    assert torch.equal(DPMSolver()(loaded, [5]), DPMSolver()(made, [5]))
    manifest = json.loads((folder / "composite.json").read_text(encoding="utf-8"))
    assert manifest["preview"] == {"missing": [2, 4], "fill": "nearest", "sha256": None}
    one = load_model(files[1], residency, "nearest")
    assert one.filled == {1: "row 2", 3: "row 2", 4: "row 2"}


def test_allowed_differences_are_composed_and_recorded(model, write, tmp_path):
    experts = [model(rows=[s], seed=s, objective=Eps() if s == 1 else V()) for s in (1, 2, 3, 4)]
    files = [write(f"e{e.rows[0]}", e, **({"data": "other"} if e.rows == [2] else {})) for e in experts]
    said = refusal(compose, files, tmp_path / "out")
    assert """: parametrisation is "Eps", the others have "V" (compose --allow-mismatch 'param""" in said
    assert """: training data is "other", the others have""" in said
    assert "training data" in refusal(compose, files, tmp_path / "out", None, ["parametrisation"])
    assert "experts may differ in training data, weights, param" in refusal(compose, files, tmp_path, None, ["table"])
    out = compose(files, tmp_path / "out", allow=["parametrisation", "training data", "weights"])
    for residency in ("resident", "stream"):
        loaded = load_model(out, residency)
        assert loaded.differs["parametrisation"] == ["Eps", "V"]
        assert sorted(loaded.differs) == ["parametrisation", "training data"]
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert all(torch.equal(loaded(x, e.rows[0]), e(x, e.rows[0])) for e in experts)
    assert "parametrisation" in refusal(load_model, _members(out, tmp_path))


def _members(composite, tmp_path):
    """The same files without the manifest that allows it."""
    for k, file in enumerate(composite_files(composite)):
        (tmp_path / "plain" / str(k)).mkdir(parents=True)
        shutil.copy(file, tmp_path / "plain" / str(k) / "model.safetensors")
    return tmp_path / "plain"


def test_a_file_that_is_no_weights_and_a_name_of_an_archive_are_refused(files, tmp_path):
    (tmp_path / "all.zip").write_bytes(b"zip")
    assert "unpack it, and name the folder" in refusal(load_model, tmp_path / "all.zip")
    assert "a composite is a folder; choose a name without .zip" in refusal(compose, files, tmp_path / "new.zip")


def test_a_complete_set_of_experts_ignores_fill(experts, files, folder, tmp_path):
    loaded = load_model(folder, fill="nearest")
    cards = loaded.cards
    assert loaded.filled == {}
    assert len(cards) == 4
    assert torch.equal(DDIM()(loaded, [1]), DDIM()(CompositeDenoiser(experts), [1]))
    again = compose(files, tmp_path / "again", "nearest")
    assert (again / "composite.json").read_bytes() == (folder / "composite.json").read_bytes()
    assert CompositeDenoiser(experts, "nearest").filled == {}


def test_a_model_that_cannot_fill_is_refused_with_all_reasons(model, nine, write, tmp_path):
    files = [write("1", model(rows=[1])), write("3", model(rows=[3]))]
    doubled = [*files, write("again", model(rows=[3]))]
    assert "row 3 is owned by" in refusal(compose, doubled, tmp_path / "out", "nearest")
    for word in ("neares", "shared:", "shared"):
        assert f"fill '{word}'" in refusal(compose, files, tmp_path / "out", word)
    other = Denoiser(model(classes=2).network, V(), LatentStates(Cosine(), S=4), [1, 2])
    text = refusal(compose, files, tmp_path / "out", f"shared:{write('odd', other, data='0ther', weights='live')}")
    for words in (
        "cannot fill rows [2, 4]",
        "network input is {'shape': [1, 8, 8], 'classes': 2}, the experts have {'shape': [1, 8, 8], 'classes': None}",
        "training data is 0ther, the experts have d1g1t5",
        "weights is live, the experts have ema",
        "it owns no states of the original indices 1000",
        "log-SNR at index 500 is",
    ):
        assert words in text
    runs = tmp_path / "runs"
    for k in (1, 2):
        (runs / f"{k}").mkdir(parents=True)
        shutil.copy(files[0], runs / f"{k}" / "model.safetensors")
    assert "2 files are there" in refusal(compose, files, tmp_path / "out", f"shared:{runs}")
    assert not (tmp_path / "out").exists()
    experts = [model(rows=[1]), model(rows=[3])]
    for filler in (model(rows=[2]), model(classes=2), nine(4)):
        assert "what fills rows [2, 4]" in refusal(CompositeDenoiser, experts, filler)


def test_an_expert_starts_warm_as_its_neighbour(model, write, nine):
    source = write("2", model(rows=[2], seed=2, conditioning="none"))
    cold = model(rows=[1], seed=1, conditioning="none")
    (parent,) = start_warm(cold, str(source))
    assert parent["sha256"] == sha256(source)
    assert all(torch.equal(p, q) for p, q in zip(cold.parameters(), load_model(source).parameters(), strict=True))
    seeing, whole = write("seeing", model(rows=[2])), write("whole", model(conditioning="none", seed=3))
    for denoiser, path in ((cold, seeing), (model(rows=[1]), seeing), (model(rows=[1]), source)):
        assert "was trained at indices [500], not at [250]" in refusal(start_warm, denoiser, str(path))
    start_warm(cold, str(whole))  # a time-agnostic network of all states owns this one
    elsewhere = write("elsewhere", nine(2, conditioning="none"))
    assert "must be one network that has indices" in refusal(start_warm, cold, str(elsewhere))
    cosine = model(rows=[2], conditioning="none")
    cosine = write("cosine", Denoiser(cosine.network, V(), LatentStates(Cosine(), S=4), [2]))
    assert "trained with other noise levels" in refusal(start_warm, cold, str(cosine))


def test_a_file_that_would_not_load_is_not_composed(model, write, forge, tmp_path):
    good, bad = write("good", model(rows=[1, 2])), forge(model(rows=[3, 4]), _wider)
    with pytest.raises(InputError, match=r"could be composed, but not loaded:\n.*weights do not fit .*network\.net"):
        compose([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _wider(card):
    card["network"]["init_args"].update(channels=[16])
