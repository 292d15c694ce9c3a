"""Metrics as data: what is registered, and one that a user adds, from the page that shows how, to the report."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_tdisent.cli import main
from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.metrics import metric, registry
from lightning_tdisent.metrics.accumulators import FeatureMoments
from lightning_tdisent.metrics.distances import Moments
from lightning_tdisent.metrics.features import load_features
from lightning_tdisent.metrics.metric import Column, Pair, PairedMetric, SetMetric
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.models.expert import save_expert
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.report.figures import _distance, read_curves
from lightning_tdisent.report.page import html_cells, html_table, legend
from lightning_tdisent.report.table import directions, notes, table, tables

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


pytestmark = pytest.mark.usefixtures("own_metrics")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write the page's example as a module of this name, which can be imported."""

    def write(name, **changes):
        blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        (code,) = [block for block in blocks if "class MeanDistance" in block]
        for old, new in changes.items():
            assert old in code
            code = code.replace(old, new)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop(name, None)
        return f"{name}.MeanDistance"

    yield write
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    out = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = ReducedStates(UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4), LatentStates(S=3))
        save_expert(tmp_path / f"model{seed}" / "model.safetensors", module.denoiser, module.card("live"))
        out.append(str(tmp_path / f"model{seed}"))
    return out


def marked(page):
    """Texts of the marked cells, by the heads of their columns, of a table of HTML."""
    heads = re.findall(r'<th scope="col">(.*?)</th>', page)
    body = page.partition("<tbody>")[2]
    rows = [
        re.findall(r"<t[dh](?: scope=\"row\")?( class=best)?>(.*?)</t[dh]>", row) for row in body.split("</tr>")[:-1]
    ]
    return {head: [row[i][1] for row in rows if row[i][0]] for i, head in enumerate(heads)}


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_metric_of_ones_own_is_one_file(own, models, digits, tmp_path, capsys, better):
    name, out = f"own_{better}", tmp_path / "out"
    path = own(name, lower=better)
    words = ["evaluate", *models, "--data", str(digits), "--protocol", "digits", "-n", "40", "--out", str(out)]
    assert main([*words, "--metrics", f"fd,{path}", "--import", name]) == 0, capsys.readouterr().err
    assert "mean_distance" in capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert rows[0]["protocol_fields"]["metrics"] == ["fd", path]
    assert rows[0]["protocol_fields"]["norm_order"] == 2
    # the number is that of its formula, also of the real images, which have the last row
    network, real = load_features("digits"), load(digits, "train", 1).images
    held_out = load(digits, "test", 1).images
    means = [Moments.of(network(images).features).mean for images in (real, held_out)]
    assert rows[-1]["mean_distance_digits"] == pytest.approx(float((means[0] - means[1]).norm()), rel=1e-9)
    # the table marks the better model
    alike = next(alike for _, alike in tables(rows) if len(alike) == 2)
    values = [row["mean_distance_digits"] for row in alike]
    best = f"{(min if better == 'lower' else max)(values):.3f}"
    arrow = {"lower": "↓", "higher": "↑"}[better]
    assert f"mean_distance_digits {arrow}" in marked(html_table(alike))
    pooled = [{**row, "mean_distance_digits_sd": 1e-9, "repeats": 3} for row in alike]
    assert [text.partition(" ")[0][:4] for text in marked(html_table(pooled))[f"mean_distance_digits {arrow}"]] == [
        best[:4]
    ]
    assert table(alike)[0][4:6] == ("fd_digits", "mean_distance_digits")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"<td>{best}</td>" in page  # one training has no interval, and no mark
    assert "mean_distance_digits: distance of mean features." in page


def test_numbers_of_a_metric_that_is_not_imported_are_named(own, models, digits, tmp_path, capsys):
    path, out = own("own_once"), tmp_path / "out"
    words = ["evaluate", models[0], "--data", str(digits), "--protocol", "digits", "-n", "40", "--out", str(out)]
    assert main([*words, "--metrics", f"fd,{path}", "--import", "own_once"]) == 0
    del metric.KNOWN["mean_distance"], sys.modules["own_once"]
    assert main(["report", str(out)]) == 2
    assert "--import own_once" in capsys.readouterr().err
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert f"numbers of {path} are not shown: its module is not imported; give --import MODULE" in notes(rows)
    assert "mean_distance_digits" not in table(rows[:1])[0]
    assert "fd_digits" in table(rows[:1])[0]
    assert main([*words[:-1], str(tmp_path / "b"), "--metrics", "fd,unknown.Metric"]) == 2
    assert "--import unknown" in capsys.readouterr().err


def test_a_changed_file_is_measured_again(own, models, digits, tmp_path):
    """Rows and the numbers of real images are kept; the code of a metric of one's own is part of their keys."""
    words = ["evaluate", models[0], "--data", str(digits), "--protocol", "digits", "-n", "40", "--held-out", "40"]
    found = []
    for k, factor in enumerate((1, 3)):
        path = own("own_changed", **{"float((": f"{factor} * float(("})
        out = tmp_path / f"out{k}"
        assert main([*words, "--out", str(out), "--metrics", path, "--import", "own_changed"]) == 0
        rows = json.loads((out / "results.json").read_text(encoding="utf-8"))
        found.append([row["mean_distance_digits"] for row in rows])
    assert found[1] == pytest.approx([3 * value for value in found[0]], rel=1e-9)


def test_a_training_logs_a_metric_of_ones_own(own, tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    own("mean_distance")
    found = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in found if "SampleQuality" in block]
    (tmp_path / "quality.yaml").write_text(text, encoding="utf-8")
    configs = ["experiments/digits/reduced8.yaml", "experiments/ablate/smoke.yaml", tmp_path / "quality.yaml"]
    words = [word for config in configs for word in ("--config", str(config))]
    assert main(["fit", *words, "--import", "mean_distance", "--run", str(tmp_path / "run")]) == 0
    assert [tag for tag in read_curves(tmp_path / "run") if tag.split("/")[:2] == ["quality", "mean_distance_digits"]]
    assert "norm_order: 1" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


def test_fields_of_a_metric_are_recorded_and_change_the_hash_where_they_are_not_the_default(own):
    path = own("own_fields")
    __import__("own_fields")
    base = Protocol.preset("digits", metrics=["fd"])
    with_it = Protocol.preset({"preset": "digits", "metrics": ["fd", path]})
    other = Protocol.preset({"preset": "digits", "metrics": ["fd", path], "norm_order": 1})
    assert with_it.hash == base.hash != other.hash
    assert with_it.reference == other.reference == base.reference
    assert other.fields["norm_order"] == 1
    assert Protocol.preset("digits", metrics=["mean_distance"]).metrics == (path,)  # by its name, too, once imported
    for changes, message in (
        ({"metrics": ["fd"], "norm_order": 1}, "no field 'norm_order'"),
        ({"metrics": [path], "norm_order": "x"}, "norm_order: expected a whole number, got 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            Protocol.preset("digits", **changes)


def test_names_of_metrics_numbers_and_fields_are_taken_once():
    with pytest.raises(InputError, match="FrechetDistance already has the name 'fd'"):
        type("Mine", (SetMetric,), {"name": "fd", "columns": ()})
    with pytest.raises(InputError, match=r"letters, digits and underscores only, got 'a.b'"):
        type("Mine", (SetMetric,), {"name": "a.b", "columns": ()})
    mine = type("Mine", (SetMetric,), {"name": "mine", "columns": (Column("fd_bias", ""),)})
    with pytest.raises(InputError, match="FrechetDistance has a number called 'fd_bias', too"):
        registry.known()
    del metric.KNOWN["mine"]

    def init(self, kept=1):
        self.kept = kept

    parts = {"name": "mine", "columns": (), "__init__": init, "compute": None, "__module__": __name__}
    mine = type("Mine", (SetMetric,), parts)
    with pytest.raises(InputError, match=r"Mine: the protocol already has a field 'kept'"):
        Protocol("digits", metrics=(mine.name,))


def test_a_number_that_no_column_declares_is_refused():
    from test_quality import Flat, drawn, quality_of

    class Undeclared(SetMetric):
        name = "undeclared"
        accumulator = FeatureMoments
        columns = (Column("declared", "", "lower"),)

        def compute(self, real, fake):
            return {"other": 1.0}

    quality = quality_of(drawn(30), Flat(), n=20, metrics=("undeclared",))
    quality.add(drawn(20, 1), torch.arange(20))
    with pytest.raises(InputError, match=r"Undeclared: computes \['other'\], its columns have \['declared'\]"):
        quality.compute()


def test_a_metric_of_pairs_of_ones_own_is_measured_if_it_is_asked_for():
    from test_paired import case, measured
    from test_quality import Flat, drawn, quality_of

    class Largest(PairedMetric):
        name = "largest"
        columns = (Column("largest", "largest error", "lower", with_features=False),)

        def of_images(self, pair: Pair):
            return (pair.images.double() - pair.originals.double()).abs().flatten(1).amax(1)

    operator, images, originals, *rest = case()
    expected = float((images.double() - originals.double()).abs().flatten(1).amax(1).mean())
    assert measured(operator, images, originals, *rest, further=[Largest()])["largest"] == pytest.approx(expected)
    (chosen,) = Protocol.preset("digits", metrics=["fd", "largest"]).chosen[1:]
    assert isinstance(chosen, Largest)
    with pytest.raises(InputError, match=r"metrics: none of .*Largest compares sets of images; add fd"):
        quality_of(drawn(30), Flat(), n=20, metrics=("largest",))


def test_every_metric_says_what_its_numbers_are():
    for cls in registry.known():
        assert cls.columns
        assert cls.__doc__
        for column in cls.columns:
            assert column.label
            assert column.better in ("lower", "higher") or column.name == "diversity"
    assert registry.choices() == ["fd", "sfd", "is", "kid", "prdc", "fd_infinity"]


def test_best_values_are_those_of_their_direction():
    fields = {"protocol_fields": {"features": "digits"}, "protocol": "p", "source": "s"}
    rows = [
        {"name": "a", "fd_digits": 2.0, "is_digits": 3.0, "psnr": 9.0, "diversity": 1.0, **fields},
        {"name": "b", "fd_digits": 1.0, "is_digits": 2.0, "psnr": 8.0, "diversity": 2.0, **fields},
        {"name": "real", "fd_digits": 1.0, "is_digits": 9.0, **{k: v for k, v in fields.items() if k != "source"}},
    ]
    for row in rows[:2]:  # of three trainings each, with a small spread
        row |= {"repeats": 3, **{f"{key}_sd": 0.01 for key in ("fd_digits", "is_digits", "psnr", "diversity")}}
    found = marked(html_table(rows))
    assert {name: [text.partition(" ")[0] for text in texts] for name, texts in found.items()} == {
        "model": [], "fd_digits ↓": ["1.000"], "is_digits ↑": ["3.000"], "psnr ↑": ["9.000"], "diversity": []
    }  # fmt: skip
    assert directions(rows) == {"fd_digits": "lower", "is_digits": "higher", "psnr": "higher", "eps-MSE": "lower"}
    assert "fd_digits: Frechet distance. is_digits: Inception Score." in legend(rows)
    assert _distance(rows) == "fd_digits"
    assert _distance([{"kid_digits": 1.0, **fields}]) == "kid_digits"
    assert _distance([{"is_digits": 1.0, **fields}]) is None
    assert "class=best" not in html_cells([("model", "fd"), ("a", "1"), ("b", "2")])


def test_the_page_of_evaluation_lists_every_metric_number_and_field():
    text = PAGE.with_name("evaluation.md").read_text(encoding="utf-8")
    for cls in registry.known():
        constants = {"balls", "halves"}
        names = {column.name for column in cls.columns} | (set() if cls.asked_by else {cls.name, *cls.fields()})
        assert not [name for name in names - constants if f"`{name}`" not in text], cls
