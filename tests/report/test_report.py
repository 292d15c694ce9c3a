import dataclasses
import io
import json
import math
import os
import re
from statistics import stdev

import pytest
import torch
from rich.console import Console

from lightning_tdisent.cli import main
from lightning_tdisent.cli.terminal import wide_console
from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Inpainting, SuperResolution
from lightning_tdisent.diffusion.schedules import Linear
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation import evaluate as evaluating
from lightning_tdisent.evaluation.evaluate import Contender, _Common, evaluate
from lightning_tdisent.evaluation.pictures import save_png
from lightning_tdisent.evaluation.provenance import facts
from lightning_tdisent.evaluation.real_images import real_images
from lightning_tdisent.images import grid
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.metrics.features import SmallClassifier, load_features
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.models.cost import training_cost
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.report.page import nearest, write_report
from lightning_tdisent.report.table import WideTable, costs, notes, table, tables
from lightning_tdisent.sampling.errors_by_row import state_errors, x0_errors
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM
from lightning_tdisent.studies.results import Study
from lightning_tdisent.studies.seeds import pool


@pytest.fixture
def model(tmp_path):
    def make(name, seed=0, **states):
        torch.manual_seed(seed)
        net = UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4)
        module = ReducedStates(net, LatentStates(**states))
        module.images_seen, module.seconds = 1000, 2.0
        path = tmp_path / name / "model.safetensors"
        save_expert(path, module.denoiser, module.card("ema", {"decay": 0.9}))
        return path.parent

    return make


@pytest.fixture
def sets(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    return real_images(digits, "train", 1), load(digits, "test", 1)


def measured(contenders, sets, protocol="digits", **fields):
    protocol = Protocol.preset(protocol, **{"n": 20, **fields})
    return evaluate(contenders, protocol, load_features(protocol.features), *sets, batch_size=7)


def test_the_error_of_eps_is_left_out_where_no_signal_is(model, sets, tmp_path):
    dark = model("dark", schedule=Linear(zero_terminal=True), S=4, spacing="trailing")
    (row, _), _ = measured([Contender("dark", dark, DDIM())], sets)
    assert list(row["x0_mse"]) == ["250", "500", "750", "1000"]
    assert list(row["eps_mse"]) == ["250", "500", "750"]
    assert min(row["eps_mse"].values()) > 0
    last = load_expert(dark / "model.safetensors")[0]
    x0, eps = state_errors(last, sets[1].images[:3], range(3), [3, 4])
    assert eps[0].isfinite().all()
    assert eps[1].isnan().all()
    assert x0.isfinite().all()
    mean = sum(row["eps_mse"].values()) / 3
    assert f"{mean:.4f}" in {cell for line in table([row]) for cell in line}


def test_rows_say_what_was_measured(model, sets):
    few, other = model("few", S=4), model("native", S=4, kind="native", terminal_bound=1.0)
    contenders = [Contender("few", few, DDIM()), Contender("native", other, DDIM(steps=2))]
    rows, images = measured(contenders, sets, first_seed=5)
    first, native, real = rows
    denoiser = load_expert(few / "model.safetensors")[0]
    errors = x0_errors(denoiser, sets[1].images, range(297), [1, 2, 3, 4]).mean(1)
    assert list(first["x0_mse"].values()) == pytest.approx(errors.tolist())
    assert list(first["eps_mse"].values()) == pytest.approx((errors * denoiser.states.log_snr[1:, 0].exp()).tolist())
    assert "eps_mse" not in native  # other noise levels at the same indices
    assert (first["nfe"], native["nfe"]) == (4, 2)
    assert first["protocol"] == native["protocol"] != real["protocol"]
    assert (first["n"], real["n"]) == (20, 297)
    assert (first["ranks"], first["sampling_seconds_per_image"] > 0, first["peak_memory_bytes"] > 1e7) == (1, 1, 1)
    assert (first["images_seen"], first["training_seconds"]) == (1000, 2.0)
    assert real["fd_digits"] < first["fd_digits"]
    assert images["few"].shape == (20, 1, 8, 8)
    (line, models), (_, alone) = tables(rows)  # numbers of different protocols are in no table together
    assert ([r["name"] for r in models], alone) == (["few", "native"], [real])
    assert first["protocol"] in line
    assert "seeds 5..24" in line
    text = table(models)
    assert len({len(row) for row in text}) == 1
    assert text[0][:4] == ("model", "sampler", "states", "NFE")
    assert text[1][4] == f"{first['fd_digits']:.3f}"
    assert costs(rows)[1][3] == "1,000"
    (start,), (few, enough) = ([n for n in notes(rows) if ("of the signal" in n) == k] for k in (True, False))
    assert start.startswith("native: its table ends at row 4 with 0.98 of the signal, but samples start from N(0, I)")
    assert "fd_digits of n=20: 64 features' covariance has no full rank; its bias is about" in few
    assert "fd_digits of n=297: about 2.4" in enough
    assert (f"(protocol {first['protocol']})" in few, f"(protocol {real['protocol']})" in enough) == (True, True)
    assert "for 297 real images, held out" in enough
    assert notes([{**real, "fd_digits": 1000.0}]) == []
    with pytest.raises(InputError, match="must not mix protocols"):
        table(rows)


def test_files_of_images_have_the_numbers_of_the_seeds_that_made_them(model, sets, tmp_path, digits):
    folder = model("few", S=4)
    denoiser = load_expert(folder / "model.safetensors")[0]
    for seed, image in enumerate(torch.cat(list(sample(denoiser, DDIM(), range(20))))):
        save_png(image, tmp_path / "pictures" / f"{seed:06d}.png")
    contenders = [
        Contender("model", folder, DDIM()),
        Contender("files", tmp_path / "pictures", None),
        Contender("shards", digits, None, "train"),
    ]
    (first, files, shards, _), images = measured(contenders, sets, score_splits=2)
    for name in ("fd_digits", "is_digits", "is_std_digits", "kid_digits", "recall_digits"):
        assert files[name] == pytest.approx(first[name], rel=1e-12)
    assert torch.equal(images["files"], images["model"])
    assert first["protocol"] != files["protocol"]  # seeds say more than files
    assert abs(shards["fd_digits"]) < 1e-6  # the reference itself
    assert (shards["n"], shards["precision_digits"]) == (1500, 1)


def test_a_second_evaluation_passes_no_real_image_through_the_network(model, sets, tmp_path, monkeypatch):
    contenders, seen = [Contender("few", model("few", S=4), DDIM())], []
    first, _ = measured(contenders, sets)
    inner = SmallClassifier.extract
    monkeypatch.setattr(SmallClassifier, "extract", lambda self, x: seen.append(len(x)) or inner(self, x))
    again, _ = measured(contenders, sets)
    assert sum(seen) == 32  # 20 generated ones in two blocks
    assert again[1] == first[1]
    (file,) = (tmp_path / "cache" / "numbers").iterdir()
    file.write_text(file.read_text(encoding="utf-8").replace('"n": 297', '"n": 298'), encoding="utf-8")
    assert measured(contenders, sets)[0][1] == first[1]
    assert sum(seen) == 32 + 32 + 304


def test_one_that_cannot_be_measured_costs_no_other(model, sets, tmp_path):
    torch.manual_seed(0)
    module = ReducedStates(UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4), LatentStates(S=4))
    for p in module.denoiser.parameters():
        p.data.fill_(1e20)  # finite, but not what the network makes of it
    save_expert(tmp_path / "broken" / "model.safetensors", module.denoiser, module.card("ema", {"decay": 0.9}))
    contenders = [Contender("broken", tmp_path / "broken", DDIM()), Contender("good", model("few", S=4), DDIM())]
    (broken, good, _), _ = measured(contenders, sets)
    assert "x0_hat at row 4 is not finite" in broken["refused"]
    assert f"broken: {broken['refused']}" in notes([broken, good])
    assert good["fd_digits"] > 0
    assert table([broken, good])[1][4] == ""


def test_cost_counts_every_expert_and_a_shared_start_once(model):
    _, card = load_expert(model("few", S=4) / "model.safetensors")
    one = training_cost([card])
    # the first convolution alone: 2 x 9 x 1 x 8 x 64 per image, three times, 1000 images
    assert one["training_flops"] > 3 * 1000 * 2 * 9 * 8 * 64
    assert training_cost([card, card])["training_flops"] == 2 * one["training_flops"]
    parent = {"sha256": "a", "network": card.network, "images_seen": 500, "seconds": 7.0}
    warm = dataclasses.replace(card, parents=[parent])
    both = training_cost([warm, warm])
    assert both["images_seen"] == 1000 + 1000 + 500
    assert both["images_seen_longest"] == 1500
    assert both["training_flops"] == 2.5 * one["training_flops"]
    assert (both["training_seconds"], both["training_seconds_longest"]) == (11.0, 9.0)
    shared = dataclasses.replace(card, images_seen=500, seconds=7.0)  # the start, which fills rows as well
    assert training_cost([warm, shared])["images_seen"] == 1500


def test_the_wrong_features_and_steps_are_refused_before_any_work(model, sets):
    with pytest.raises(InputError, match="5 steps on a table of 4"):
        measured([Contender("few", model("few", S=4), DDIM(steps=5))], sets)
    with pytest.raises(InputError, match="features 'mnist' take"):
        measured([Contender("x", model("x", S=4), DDIM())], sets, "mnist")
    with pytest.raises(InputError, match="at least two images"):
        measured([Contender("y", model("y", S=4), DDIM())], sets, n=1)
    with pytest.raises(InputError, match="does not exist"):
        measured([Contender("y", "nowhere", None)], sets)


def test_a_page_of_files_alone_has_a_table_per_protocol(sets, tmp_path, digits):
    contenders = [Contender("a", digits, None, "train")]
    rows, images = measured(contenders, sets)
    page = write_report(tmp_path / "r.html", "t", rows, images, contenders, sets[1]).read_text(encoding="utf-8")
    assert page.count("<table>") == 2
    assert all(row["protocol"] in page for row in rows)
    assert "a: fd_digits is 0, these are the images of the reference itself" in notes(rows)
    assert not [line for line in notes(rows) if "bias" in line and "for a" in line]
    study = Study(
        str(tmp_path / "s"), "t", [{"name": "a", "source": str(digits), "sampler": None}], str(digits), "digits"
    )
    study.split, study.n = "train", 20
    study.bits = {"bound": True}
    with pytest.raises(InputError, match="bits per dimension are those of a model"):
        study.check()
    study.bits = None
    study.evaluate()
    assert "note: a: all of its 1,500 images are measured; n = 20 is of models" in study.lines()


def test_a_study_is_kept_and_shown_again(model, sets, digits, tmp_path):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    folder = model("few", S=4)
    contenders = [{"name": "few & <fair>", "source": str(folder), "sampler": spec}]
    study = Study(str(tmp_path / "s"), "A title", contenders, str(digits), "digits", n=20)
    study.evaluate()
    page = Study.load(tmp_path / "s").write_report().read_text(encoding="utf-8")
    assert "few &amp; &lt;fair&gt;" in page
    results = json.loads((tmp_path / "s" / "results.json").read_text(encoding="utf-8"))
    assert f"{results[0]['fd_digits']:.3f}" in page
    assert results[0]["protocol"] in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # one file that needs no other
    with pytest.raises(InputError, match="keeps no finished study"):
        Study.load(tmp_path)


def test_a_page_says_how_its_numbers_were_measured_not_how_it_was_written(model, sets, digits, tmp_path, monkeypatch):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    contenders = [{"name": "one", "source": str(model("few", S=4)), "sampler": spec}]
    study = Study(str(tmp_path / "s"), "t", contenders, str(digits), "digits", n=20, notes="a < b & <b>c</b>")
    monkeypatch.setattr("sys.argv", ["tdisent", "evaluate", "a folder"])
    study.evaluate()
    monkeypatch.setattr("sys.argv", ["tdisent", "report"])
    row, real = study.rows
    (how,) = facts([row, real])["measured"]
    assert (how["command"], how["held-out images"], how["rows"]) == ("tdisent evaluate 'a folder'", 297, ["one"])
    assert how["machine"]["CPU cores"] == len(os.sched_getaffinity(0))
    assert how["machine"]["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", how["date"])
    page = study.write_report().read_text(encoding="utf-8")
    assert "tdisent evaluate" in page
    assert "tdisent report" not in page
    assert "<p>a &lt; b &amp; &lt;b&gt;c&lt;/b&gt;</p>" in page
    del row["measured"]  # as older versions left it
    (tmp_path / "s" / "results.json").write_text(json.dumps([row, real]), encoding="utf-8")
    assert "measured by a version that did not record the command" in study.write_report().read_text(encoding="utf-8")


def test_damaged_results_are_named(model, sets, digits, tmp_path, capsys):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    contenders = [{"name": "one", "source": str(model("few", S=4)), "sampler": spec}]
    folder = tmp_path / "s"
    Study(str(folder), "t", contenders, str(digits), "digits", n=20).evaluate()
    for name, texts in {
        "results.json": ("", "{}", "[1]", '[{"name": "one"}]', "[]"),
        "study.json": ("", "[]", "{", '{"title": "t", "contenders": [{}], "data": "d", "protocol": "digits"}'),
        "samples.safetensors": ("", "xx" * 20),
    }.items():
        whole = (folder / name).read_bytes()
        for text in texts:
            (folder / name).write_text(text, encoding="utf-8")
            assert main(["report", str(folder)]) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"error: {folder / name}: damaged or gone (")
            assert said.count("\n") == 1
        (folder / name).write_bytes(whole)
    rows = json.loads((folder / "results.json").read_bytes())
    for change, said in (({"training_flops": "1e12"}, "training_flops: expected a number, got '1e12'"),
                         ({"x0_mse": {"250": "0.1"}}, "x0_mse[250]: expected a number, got '0.1'")):  # fmt: skip
        (folder / "results.json").write_text(json.dumps([rows[0] | change, *rows[1:]]), encoding="utf-8")
        assert main(["report", str(folder)]) == 2
        assert f"one: {said}" in capsys.readouterr().err
    (folder / "results.json").write_text(json.dumps(rows), encoding="utf-8")
    assert main(["report", str(folder)]) == 0


def test_the_row_of_real_images_keeps_its_name(digits):
    part = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    contenders = [{"name": "297 real images, held out", "source": "nowhere", "sampler": part}]
    with pytest.raises(InputError, match="'297 real images, held out' is the name of the row of the real images"):
        Study("s", "t", contenders, str(digits), "digits").check()


def test_errors_in_other_units_are_not_put_together():
    tables = [ComponentStates([1, 8, 8], space=Haar(1, scales), S=4) for scales in ([2.0, 0.25], [1.0, 1.0])]
    assert torch.equal(tables[0].log_snr, tables[1].log_snr)
    assert [len(_Common.of(tables[:1]).rows(table)) for table in tables] == [4, 0]
    conditional = ComponentStates([1, 8, 8], observation=Observation(Inpainting(0.25)), S=4)
    other = ComponentStates([1, 8, 8], observation=Observation(SuperResolution(4)), S=4)
    assert len(_Common.of([conditional]).rows(other)) == 4  # of the image alone, which is the same


@pytest.mark.parametrize("width", [40, 80, 120, 400])
def test_no_number_of_a_table_is_cut_in_a_narrow_terminal(width):
    names = ("model", *(f"metric_{k}" for k in range(14)))
    rows = [(name, *(f"{k}.{k:05d}" for k in range(14))) for name in ("a model, 10 steps", "b")]
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, color_system=None).print(WideTable("title", [names, *rows]))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in stream.getvalue()
    assert all(f" {k}.{k:05d} " in stream.getvalue() for k in range(14))
    assert sum(line.startswith(("│ model ", "┃ model ")) for line in lines) == (2 if width == 40 else 1)  # pieces
    assert any("a model, 10 steps" in line for line in lines) == (width == 400)


def test_a_long_list_is_not_turned_and_a_wide_table_of_many_is_split_between_models():
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    console.print(WideTable("jobs", [("job", "state"), *((f"expert {k}", "done") for k in range(9))]))
    assert stream.getvalue().count(" done ") == 9
    assert not any(line.count(" done ") > 1 for line in stream.getvalue().splitlines())
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    many = [("model", *(f"metric {i}" for i in range(30))), *((f"model {k}", *["12.345"] * 30) for k in range(7))]
    console.print(WideTable("models", many))
    lines = stream.getvalue().splitlines()
    assert sum("metric 29" in line for line in lines) == 2  # two pieces of at most six models
    assert max(map(len, lines)) <= 80
    assert stream.getvalue().count("12.345") == 7 * 30


@pytest.mark.parametrize("width", [20, 80])
def test_a_table_without_rows_is_its_head(width):
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=True, color_system=None).print(WideTable("t", [("model", "fd")]))
    assert all(f" {name} " in stream.getvalue() for name in ("model", "fd"))


def test_a_name_that_leaves_no_room_is_folded_and_its_numbers_are_not():
    stream, name = io.StringIO(), "/a/very/long/folder/" * 6
    table = [("model", "fd", "名"), (name, "1234.567", "8.9")]
    Console(file=stream, width=60, force_terminal=True, color_system=None).print(WideTable("", table))
    assert " 1234.567 " in stream.getvalue()
    assert " 8.9 " in stream.getvalue()
    assert "…" not in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= 60


def test_names_are_wrapped_between_words_and_small_numbers_have_three_digits(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert wide_console().width == 200  # no number is cut where there is no terminal
    name = "a rather long name of a contender, 1000000000 steps"
    Console(width=60).print(WideTable("t", [("model", "sampler", "states", "NFE"), (name, "DDIM", "10", "10")]))
    lines = capsys.readouterr().out.splitlines()
    assert all(any(f" {word} " in line for line in lines) for word in name.split())
    assert max(map(len, lines)) <= 60
    title = "protocol 08fe7f29: digits features, n=16 (files) against 1500 of train (88f25eaa6d04)"
    wide_console().print(WideTable(title, [("model", "fd"), ("a", "1")]))
    assert capsys.readouterr().out.splitlines()[0].rstrip() == title
    flops = {"training_flops": 1.2345e9, "validation_flops": 98765e12, "total_flops": 0.0}
    (_, row) = costs([{"name": "x", "networks": 1, **flops}])
    assert row[2:5] == ("0.00123", "98,800", "0")


def test_a_sweep_over_the_cut_is_drawn_and_its_best_start_named(model, sets, digits, tmp_path):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    source = str(model("few", S=4))
    contenders = [{"name": "whole chain", "source": source, "sampler": spec}]
    contenders += [
        {"name": f"cut {k}, N(0, I)", "source": source, "sampler": spec, "prior": f"cut:{k}"} for k in (2, 3)
    ]
    study = Study(str(tmp_path / "s"), "A study", contenders, str(digits), "digits", n=20, bits={"n": 12, "ode": True})
    study.evaluate()
    whole, *cut = [row for row in study.rows if "bpd" in row]
    assert [row["cut"] for row in cut] == [2, 3]
    assert [row["nfe"] for row in (whole, *cut)] == [4, 2, 3]
    for row in (whole, *cut):
        parts = row["bpd_terms"]
        assert row["bpd"] == pytest.approx(parts["decoder"] + parts["prior"] + sum(parts["rows"].values()))
        assert row["bpd"] == pytest.approx(sum(row["bpd_images"]) / 12)
        assert parts["rows"] == pytest.approx({k: whole["bpd_terms"]["rows"][k] for k in parts["rows"]})
    assert cut[0]["bpd_terms"]["prior"] > cut[1]["bpd_terms"]["prior"] > whole["bpd_terms"]["prior"]
    best = min(cut, key=lambda row: row["bpd"])
    assert any(
        line.startswith(f"fewest bits per dimension: {best['name']}, {best['bpd']:.4f}") for line in notes(study.rows)
    )
    page = study.write_report().read_text(encoding="utf-8")
    for text in ("How much diffusion time is enough", "Terms of the bits per dimension", f"{best['bpd']:.3f} ["):
        assert text in page


def test_repeats_of_a_study_are_means_with_their_spread(model, sets, digits, tmp_path, capsys):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    folders = [tmp_path / f"seed{k}" for k in range(3)]
    for k, folder in enumerate(folders):
        source = str(model(f"few{k}", seed=k, S=4))
        contenders = [{"name": n, "source": source, "sampler": spec} for n in ("a", "a, more")]
        Study(str(folder), "A study", contenders, str(digits), "digits", n=20).evaluate()
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows[0] |= {"fd_digits": 4.0 + k, "images_seen": 1000 + k, "seeds": [k]}
        rows[1] |= {"seeds": [k]}
        rows[1]["training_flops"] = 3 * rows[0]["training_flops"]
        (folder / "results.json").write_text(json.dumps(rows), encoding="utf-8")
    moved = tmp_path / "moved"
    folders[2].rename(moved)
    pooled = pool([Study.load(f).rows for f in (*folders[:2], moved)])
    assert (pooled[0]["fd_digits"], pooled[0]["fd_digits_sd"], pooled[0]["images_seen"]) == (5.0, 1.0, 1001)
    assert table(pooled[:2])[1][4] == "5.0 ± 1.0"
    states = [Study.load(f).rows[0]["eps_mse"] for f in (*folders[:2], moved)]
    assert pooled[0]["eps_mse"] == pytest.approx({k: sum(e[k] for e in states) / 3 for k in states[0]})
    assert main(["report", *map(str, (*folders[:2], moved)), "--out", str(tmp_path / "all.html")]) == 0
    assert "Means and standard deviations of 3 trainings" in (
        page := (tmp_path / "all.html").read_text(encoding="utf-8")
    )
    assert page.count("data:image/svg") == 3
    assert page.count('<p class="how">Measured 20') == 1
    assert "did not record the command" not in page
    assert page.count("a row for each training, the same seeds") == 4  # of two models, caption and alternative text
    assert "5.0 ± 1.0" in (said := capsys.readouterr().out)
    for text in ("fd_digits of n=20: 64 features", "How these numbers were obtained", "&quot;seeds&quot;: [\n     2\n"):
        assert text in page
    assert "note: fd_digits of n=20: 64 features" in said
    assert page.count("peak memory MB") == page.count("training TFLOP") == 1
    assert f"&quot;{moved}&quot;: {{" in page
    eps = [sum(e.values()) / 4 for e in states]
    assert pooled[0]["eps_mse_sd"] == pytest.approx(stdev(eps))
    assert table(pooled[:1])[1][-1].endswith(f" ± {stdev(eps):.{1 - math.floor(math.log10(stdev(eps)))}f}")
    peaks = [Study.load(f).rows[0]["peak_memory_bytes"] for f in (*folders[:2], moved)]
    assert pooled[0]["peak_memory_bytes"] == round(sum(peaks) / 3)
    pages = {"x.txt": "name a file that ends with .html", "": "name a file that ends with .html"}
    for name, line in pages.items():
        assert main(["report", *map(str, folders[:2]), "--out", str(tmp_path / name)]) == 2
        assert line in capsys.readouterr().err
    assert main(["report", str(folders[0]), str(moved)]) == 2
    assert "--out FILE.html is required for several folders" in capsys.readouterr().err
    rows[1]["name"] = "other"
    (moved / "results.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(InputError, match=r"(?s)not one study with other seeds:.*repeat 2 has 'other' besides"):
        pool([Study.load(f).rows for f in (folders[0], moved)])


def test_what_are_no_repeats_is_refused_with_all_that_differs(model, sets, digits, tmp_path, capsys):
    def evaluated(name, seed, sampler="DDIM", init_args=None):
        part = {"class_path": f"lightning_tdisent.{sampler}", "init_args": init_args or {}}
        source = str(model(f"m{name}", seed=seed, S=4))
        contenders = [{"name": "a", "source": source, "sampler": part}]
        Study(str(tmp_path / name), "A study", contenders, str(digits), "digits", n=20).evaluate()
        rows = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        rows[0]["seeds"] = [seed]
        (tmp_path / name / "results.json").write_text(json.dumps(rows), encoding="utf-8")
        return rows

    def changed(recipe, key, value):
        return [recipe[0] | {key: value}, *recipe[1:]]

    first, again = evaluated("s0", 0), evaluated("s1", 1)
    assert pool([first, again])[0]["fd_digits_sd"] > 0
    # of an adaptive fleet: each training decides for itself how long an expert is averaged, and which keep their start
    kinds = [{"sigma_rel": 0.1, "steps": n, "before": 75} for n in (3, 9)]
    recipes = [[again[0]["recipe"][0] | {"average": kind} for kind in some] for some in (kinds, kinds[1:])]
    one = [{**first[0], "recipe": recipes[0], "weights_kind": "ema, start"}, first[1]]
    assert pool([one, [{**again[0], "recipe": recipes[1], "weights_kind": "ema"}, again[1]]])[0]["fd_digits_sd"] > 0
    with pytest.raises(InputError, match=r"recipe\[0\].average.sigma_rel: 0.1 in repeat 1, 0.2 in repeat 2"):
        pool([one, [{**again[0], "recipe": changed(recipes[1], "average", {"sigma_rel": 0.2})}, again[1]]])
    for other, lines in (
        (evaluated("other", 2, "DPMSolver", {"steps": 2}), ["a: sampler: 'DDIM(", "a: nfe: 4 in repeat 1, 2 in"]),
        ([{**again[0], "table": "ab"}, again[1]], [f"a: table: '{first[0]['table']}' in repeat 1, 'ab' in repeat 2"]),
        ([{**again[0], "sha256": first[0]["sha256"]}, again[1]], ["a: the same weights in repeat 1 and repeat 2"]),
        ([{**again[0], "sha256": ["x"], "seeds": [0]}, again[1]], ["a: the same seed in repeat 1 and repeat 2"]),
        ([{**again[0], "images_seen": 2000}, again[1]], ["a: images_seen: 1000 in repeat 1, 2000 in repeat 2"]),
        ([{**again[0], "prior": "Gaussian"}, again[1]], ["a: prior: None in repeat 1, 'Gaussian' in repeat 2"]),
        ([again[0], {**again[1], "images": "ab"}], ["297 real images, held out: images: "]),
        (
            [{**again[0], "recipe": changed(again[0]["recipe"], "network", {"class_path": "x"})}, again[1]],
            ["a: recipe[0].network.class_path: 'lightning_tdisent.networks.unet.UNet' in repeat 1, 'x' in repeat 2"],
        ),
        ([{**again[0], "weights_kind": "live"}, again[1]], ["a: weights_kind: 'ema' in repeat 1, 'live' in repeat 2"]),
    ):
        with pytest.raises(InputError) as refusal:
            pool([first, other])
        assert all(line in str(refusal.value) for line in lines), str(refusal.value)
    batches = [[{**rows[0], "images_a_step": [n]}, rows[1]] for rows, n in ((first, 64), (again, 128))]
    with pytest.raises(InputError, match=r"a: images_a_step: \[64\] in repeat 1, \[128\] in repeat 2"):
        pool(batches)
    bits = {"bpd": 3.0, "bpd_low": 2.9, "bpd_high": 3.1, "bpd_how": "how"}
    third = [{**again[0], "sha256": ["x"], "seeds": [2], "bpd_refused": "not finite"}, again[1]]
    pooled = pool([[first[0] | bits, first[1]], [again[0] | bits | {"bpd": 4.0}, again[1]], third])[0]
    assert not [key for key in pooled if key.startswith("bpd")]
    assert "bpd, bpd_high, bpd_how, bpd_low" in pooled["not_pooled"]
    assert "repeat 3: not finite" in pooled["not_pooled"]
    half = {"kid_digits": 0.5}
    for some in ([first, [again[0] | half, again[1]]], [[first[0] | half, first[1]], again]):
        without = [[{k: v for k, v in row.items() if k != "kid_digits" or v == 0.5} for row in rows] for rows in some]
        pooled = pool(without)[0]
        assert "kid_digits" not in pooled
        assert "kid_digits left out" in pooled["not_pooled"]
    lone = {k: v for k, v in again[0].items() if k not in ("x0_mse", "eps_mse")}
    pooled = pool([first, [lone, again[1]]])[0]
    assert not {"x0_mse", "eps_mse", "eps_mse_sd"} & pooled.keys()
    assert any("eps_mse" in line for line in notes([pooled]))
    folders = [str(tmp_path / name) for name in ("s0", "other")]
    assert main(["report", *folders, "--out", str(tmp_path / "all.html")]) == 2
    assert f"nfe: 4 in {folders[0]}, 2 in {folders[1]}" in capsys.readouterr().err
    assert not (tmp_path / "all.html").exists()


def test_a_moved_study_reads_its_own_parts_alone(model, sets, digits, tmp_path, monkeypatch):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    folder, outside = tmp_path / "here" / "s", model("outside", seed=5, S=4)
    monkeypatch.chdir(tmp_path)
    inside = model("here/s/run", S=4).relative_to(tmp_path)
    contenders = [{"name": n, "source": str(p), "sampler": spec} for n, p in (("in", inside), ("out", outside))]
    study = Study("here/s", "A title", contenders, str(digits), "digits", n=20, runs={"in": str(inside)})
    study.evaluate()
    kept = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert [c["source"] for c in kept["contenders"]] == ["run", str(outside)]
    assert kept["runs"] == {"in": "run"}
    assert [row.get("source") for row in study.rows] == ["run", str(outside), None]
    moved = tmp_path / "moved"
    folder.rename(moved)
    model("here/s/run", seed=9, S=4)  # another run at the old place
    monkeypatch.chdir("/")
    found = Study.load(moved)
    assert [str(c.source) for c in found._contenders()] == [str(moved / "run"), str(outside)]
    assert found.runs == {"in": str(moved / "run")}
    page = found.write_report().read_text(encoding="utf-8")
    old = {**kept, "out": str(folder), "runs": {"in": str(folder / "run")}}  # as versions before kept it
    old["contenders"] = [{**c, "source": str(folder / c["source"])} for c in kept["contenders"]]
    (moved / "study.json").write_text(json.dumps({k: v for k, v in old.items() if k != "schema"}), encoding="utf-8")
    assert [str(c.source) for c in Study.load(moved)._contenders()] == [str(moved / "run"), str(outside)]
    model("outside", seed=6, S=4)
    (moved / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as refusal:
        Study.load(moved).write_report()
    assert f"in: {moved / 'run'} is gone" in str(refusal.value)
    assert f"out: {outside} holds other weights than were measured" in str(refusal.value)
    assert (moved / "report.html").read_text(encoding="utf-8") == page


def test_an_evaluation_goes_on_with_what_is_missing(model, sets, digits, tmp_path, monkeypatch, capsys):
    spec = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    contenders = [{"name": str(k), "source": str(model(f"few{k}", seed=k, S=4)), "sampler": spec} for k in range(3)]

    def study(count, **more):
        fields = {"title": "t", "n": 20, **more}
        return Study(str(tmp_path / "s"), contenders=contenders[:count], data=str(digits), protocol="digits", **fields)

    seen = []
    measure = evaluating._of_model
    monkeypatch.setattr(evaluating, "_of_model", lambda c, *rest: seen.append(c.name) or measure(c, *rest))
    study(2).evaluate()
    first = study(2).rows
    (tmp_path / "s" / "study.json").unlink()
    study(3).evaluate()  # with a contender more
    assert seen == ["0", "1", "2"]
    assert study(3).rows[:2] == first[:2]
    assert "2 of 3 contenders had been measured" in capsys.readouterr().out
    contenders[0]["name"] = "renamed"  # what it is called is no part of what was measured
    study(3, title="other").evaluate()
    assert seen == ["0", "1", "2"]
    assert study(3).rows[0] == {**first[0], "name": "renamed"}
    model("few1", seed=7, S=4)  # other weights at the same place
    study(3).evaluate()
    assert seen == ["0", "1", "2", "1"]
    said = capsys.readouterr().out
    assert f"1: {tmp_path / 'few1'} holds other weights or images than were measured before; it is measured" in said
    assert said.count("measured before") == 1
    study(1, n=24).evaluate()
    assert seen[4:] == ["renamed"]
    assert len(list((tmp_path / "s" / "measured").iterdir())) == 1

    def interrupt(c, *rest):
        if c.name == "2":
            raise KeyboardInterrupt
        return measure(c, *rest)

    monkeypatch.setattr(evaluating, "_of_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        study(3, n=28).evaluate()
    assert len(list((tmp_path / "s" / "measured").iterdir())) == 3


def test_a_conditional_study_wants_enough_held_out_images_before_it_trains(digits, tmp_path):
    def check(conditional=True, **fields):
        part = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
        contenders = [{"name": "a", "source": str(tmp_path / "not_trained"), "sampler": part}]
        Study(str(tmp_path / "s"), "t", contenders, str(digits), "digits", **fields).check(conditional)

    check(n=1188)  # four draws of each of 297
    check(False, n=50)
    with pytest.raises(
        InputError,
        match="n=50: a conditional model draws 4 images for each held-out one, so that n is a multiple of 4",
    ):
        check(n=50)
    with pytest.raises(InputError, match=r"n=1192: 4 draws of 298 held-out images; there are 297. Lower n to 1188"):
        check(n=1192)
    with pytest.raises(InputError, match=r"4 draws of 25 held-out images; there are 20. Lower n to 80, .*n_held_out"):
        check(n=100, n_held_out=20)
    with pytest.raises(InputError, match="n_held_out: a whole number from 2 on, got 0"):
        check(False, n_held_out=0)


def test_held_out_images_follow_the_draws_or_what_is_asked_for(model, sets, digits, tmp_path):
    part = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    contenders = [{"name": "a", "source": str(model("few", S=4)), "sampler": part}]
    study = Study(str(tmp_path / "s"), "t", contenders, str(digits), "digits", n=20, n_held_out=30)
    study.evaluate()
    assert study.rows[1]["name"] == "30 real images, held out"
    assert "note: held-out images: the first 30 of the 297 of test (n_held_out)" in study.lines()
    assert Study.load(tmp_path / "s").n_held_out == 30
    assert [Study("s", "t", [], "d", "digits", n=n)._held_out(c) for n, c in ((8000, True), (8000, False))] == [
        2000,
        1000,
    ]


@pytest.mark.parametrize("n", [2, 4])
def test_a_page_of_few_held_out_images_is_written(model, sets, digits, tmp_path, n):
    part = {"class_path": "lightning_tdisent.DDIM", "init_args": {}}
    contenders = [{"name": "a", "source": str(model("few", S=4)), "sampler": part}]
    study = Study(str(tmp_path / "s"), "t", contenders, str(digits), "digits", n=20, n_held_out=n)
    study.evaluate()
    assert "Forward: x_0" in study.write_report().read_text(encoding="utf-8")


def test_grid_and_nearest_are_what_they_say():
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 2, 2) * 50
    tiles = grid(images, 2)
    assert tiles.shape == (1, 7, 7)
    assert tiles[0, 1:3, 4:6].eq(50).all()
    assert tiles[0, 4:6, 1:3].eq(100).all()
    assert tiles[0, 0].eq(128).all()
    training = torch.tensor([0, 90, 200], dtype=torch.uint8)[:, None, None, None].expand(3, 1, 2, 2)
    assert nearest(images, training)[:, 0, 0, 0].tolist() == [0, 90, 90]
