"""Figures show every model, under its own name, against the right one."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_tdisent.report import figures
from lightning_tdisent.report.palette import Palette


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Give the figure itself instead of its HTML."""
    monkeypatch.setattr(figures, "drawing", lambda figure, caption: figure)


def row(name, flops, fd, **fields):
    protocol = {"protocol_fields": {"features": "digits"}}
    return {"name": name, "source": name, "fd_digits": fd, "training_flops": flops, **protocol, **fields}


def points(axes):
    """Of every line with a label: its (x, y)."""
    lines = [c.lines[0] for c in axes.containers] if axes.containers else axes.lines
    labels = axes.get_legend_handles_labels()[1]
    return {label: list(zip(*line.get_data(), strict=True)) for label, line in zip(labels, lines, strict=True)}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a, x", 1.0, 5.0), ("a", 1.05, 4.0), ("b", 3.0, 3.0)], {"a, x": [(1, 5)], "a": [(1.05, 4)], "b": [(3, 3)]}),
        ([("a", 1.0, 5.0), ("a, x", 1.05, 4.0), ("b", 3.0, 3.0)], {"a": [(1, 5)], "a, x": [(1.05, 4)], "b": [(3, 3)]}),
        (
            [("a, half", 1.0, 5.0), ("a", 2.0, 4.0), ("a, y", 2.0, 3.0), ("a, twice", 4.0, 2.0)],
            {"a": [(1, 5), (2, 4), (4, 2)], "a, y": [(2, 3)]},
        ),
        (
            [("a, half", 1.0, 5.0), ("a", 1.05, 4.0), ("a, twice", 2.0, 3.0)],
            {"a, ..": [(1, 5), (2, 3)], "a": [(1.05, 4)]},
        ),
    ],
)
def test_every_model_is_a_point_of_quality_against_compute(rows, expected):
    rows = [row(name, flops * 1e12, fd) for name, flops, fd in rows]
    figure = figures.quality_over_compute(rows, Palette(rows))
    assert points(figure.axes[0]) == expected


def test_errors_are_relative_to_the_first_model_and_say_which_that_is():
    rows = [
        row("reduced, half", 1.0, 9.0, x0_mse={"500": 2.0, "1000": 4.0}),
        row("reduced", 2.0, 8.0, x0_mse={"500": 1.0, "1000": 5.0}),
        row("reduced, half, 2 steps", 1.0, 9.0, x0_mse={"500": 2.0, "1000": 4.0}),
    ]
    rows[2]["source"] = rows[0]["source"]  # sampled in another way: no curve of its own, and no other place
    figure = figures.errors_per_state(rows, Palette(rows))
    assert figure.axes[1].get_title() == "the same, % above reduced, half"
    assert points(figure.axes[1]) == {
        "reduced, half": [(500, 0.0), (1000, 0.0)],
        "reduced": [(500, -50.0), (1000, 25.0)],
    }


def test_training_curves_have_a_colour_and_a_label_for_each_run_of_a_study(monkeypatch):
    names = ["reduced", "experts_001", "experts_002", "fleet/shared", "fleet/expert_001", "my/net"]
    monkeypatch.setattr(figures, "read_curves", lambda name: {"train/loss": [(1, len(name)), (2, 1.0)]})
    left = figures.training_curves(dict(zip(names, names, strict=True)), Palette([], names)).axes[0]
    assert left.get_legend_handles_labels()[1] == ["reduced", "experts (2 jobs)", "fleet (2 jobs)", "my/net"]
    colours = [line.get_color() for line in left.lines]
    assert [line.get_ydata()[0] for line in left.lines] == [len(name) for name in names]
    assert colours[1] == colours[2] and colours[3] == colours[4]  # noqa: PT018
    assert len(set(colours)) == 4


def test_curves_of_another_run_in_the_folder_are_left_out(tmp_path):
    def write(run, values, folder=tmp_path):
        writer = SummaryWriter(str(folder), filename_suffix=f".{run}")
        for step, value in enumerate(values):
            writer.add_scalar("train/loss", value, step)
        writer.close()

    write("aaaa000011112222", [1.0, 2.0])
    write("bbbb000011112222", [5.0, 6.0, 7.0])
    whole = figures.read_curves(tmp_path)["train/loss"]
    assert len(whole) >= 3  # nobody says whose the folder is
    (tmp_path / "config.yaml").write_text("id: aaaa000011112222\n", encoding="utf-8")
    assert figures.read_curves(tmp_path) == {"train/loss": [(0, 1.0), (1, 2.0)]}
    write("early", [4.0])  # before runs had identities
    assert 4.0 in [value for _, value in figures.read_curves(tmp_path)["train/loss"]]
    write("aaaa000011112222", [3.0])  # a run that went on has several files
    assert len(figures.read_curves(tmp_path)["train/loss"]) >= 1
    assert all(value < 5 for _, value in figures.read_curves(tmp_path)["train/loss"])
