"""Marks beyond intervals, the verdict, and one colour and label for each model."""

import pytest

from lightning_tdisent.report.page import html_table, marks, page
from lightning_tdisent.report.palette import Palette
from lightning_tdisent.report.table import directions, terminal_tables
from lightning_tdisent.report.verdict import best, separate, verdict

FIELDS = {"protocol": "p", "protocol_fields": {"features": "digits", "metrics": ["fd", "is"]}, "protocol_line": "p",
          "sampler": "DDIM(eta=0.0)", "rows": 8, "nfe": 8, "networks": 1, "weights": 10}  # fmt: skip


def row(name, fd, score=5.0, flops=10.0, sd=None, n=1, **more):
    numbers = {"fd_digits": fd, "is_digits": score, "training_flops": flops, "validation_flops": 0.0}
    if sd is not None:
        numbers |= {"fd_digits_sd": sd, "is_digits_sd": sd, "repeats": n}
    return {**FIELDS, "name": name, "source": f"out/{name.partition(',')[0]}", **numbers, **more}


@pytest.mark.parametrize(
    ("other", "sd", "n", "apart"),
    [
        (12.0, 0.5, 3, True),  # half the interval: 2.776 sqrt(2 0.25 / 3) = 1.133
        (11.1, 0.5, 3, False),
        (11.2, 0.5, 3, True),
        (11.2, 0.5, 2, False),  # 4.303 sqrt(2 0.25 / 2) = 2.15
        (12.2, 0.5, 2, True),
        (10.5, 0.5, 10, True),  # 2.145 (14 of 18 degrees of freedom) sqrt(2 0.25 / 10) = 0.48
    ],
)
def test_a_difference_counts_beyond_the_interval_of_students_t(other, sd, n, apart):
    assert separate("fd_digits", row("a", 10.0, sd=sd, n=n), row("b", other, sd=sd, n=n)) is apart


def test_the_features_are_named_in_the_title_and_not_again_in_the_columns():
    shown, _ = terminal_tables([row("a", 10.0), row("b", 11.0)])
    assert {"fd", "is"} <= {*shown.text[0]}
    assert shown.title == "p"


def test_numbers_of_one_training_are_not_marked_but_those_with_intervals_of_their_own_are():
    rows = [row("a", 10.0), row("b", 99.0)]
    assert best(rows, directions(rows)) == {}
    assert "class=best" not in html_table(rows)
    assert "not marked" in marks(rows)
    for high, number in ((2.5, {"bpd": 0}), (2.7, {})):
        bits = [
            r | {"bpd": x, "bpd_low": x - 0.05, "bpd_high": h}
            for r, x, h in zip(rows, (2.4, 2.65), (high, 2.7), strict=True)
        ]
        assert best(bits, {"bpd": "lower"}) == number


def test_the_best_of_several_is_marked_where_it_is_better_than_all_others():
    rows = [row("a", 10.0, 5.0, sd=0.1, n=3), row("b", 12.0, 7.0, sd=0.1, n=3), row("c", 12.0, 7.1, sd=0.1, n=3)]
    real = {k: v for k, v in row("real", 1.0, 9.0).items() if k not in ("source", "networks")}
    assert best([*rows, real], directions(rows)) == {"fd_digits": 0}  # the scores of b and c are within the interval
    assert html_table(rows).count("class=best") == 1
    assert "over 3 trainings" in marks(rows)


def test_the_verdict_says_compute_and_what_the_interval_allows():
    rows = [row("baseline", 9.9), row("experts", 21.2, flops=20.0), row("reduced", 7.81)]
    assert verdict(rows) == (
        "By fd_digits, reduced (7.81) is ahead of baseline (9.9) at equal compute; last is experts (21.2) at 2 times "
        "its compute. One training of each: the differences have no interval."
    )
    pooled = [row("a", 10.0, sd=1.0, n=3), row("b", 10.5, sd=1.0, n=3, flops=5.0)]
    assert verdict(pooled) == (
        "By fd_digits, a (10) cannot be told from b (10.5) at 0.5 times its compute. Means of 3 trainings, within the "
        "95 % interval of the difference."
    )
    assert verdict(rows[:1]) == ""
    assert verdict([{**FIELDS, "name": "refused", "source": "x", "refused": "no"}]) == ""


def test_a_model_has_one_colour_and_label_in_all_figures():
    rows = [row("baseline, 100 steps", 1.0), row("baseline, 8 steps", 2.0), row("experts, 8 steps", 3.0)]
    rows[2]["source"] = "out/experts_composite"
    palette = Palette(rows, ["baseline", "reduced", "experts_001", "experts_002"])
    assert [palette.label(r) for r in rows] == ["baseline", "baseline", "experts"]
    assert palette.colour(rows[0]) == palette.colour(rows[1]) == palette.of_group("baseline")
    assert palette.colour(rows[2]) == palette.of_group("experts")
    assert len({palette.of_group(g) for g in ("baseline", "experts", "reduced")}) == 3
    tasks = [row("inpainting, CDE", 1.0, source="out/x"), row("inpainting, CMDE", 2.0, source="out/y")]
    assert [Palette(tasks).label(r) for r in tasks] == ["inpainting, CDE", "inpainting, CMDE"]


def test_a_page_begins_with_the_verdict_and_has_contents():
    rows = [row("a <b>", 10.0), row("c", 12.0)]
    text = page("title", rows, {"Numbers": html_table(rows, "caption"), "Are they copies?": "x"}, rows)
    assert text.index("By fd_digits, a &lt;b&gt; (10) is ahead of c (12)") < text.index("<nav>")
    for anchor in ("numbers", "are-they-copies"):
        assert f'href="#{anchor}"' in text
        assert f'id="{anchor}"' in text
    assert "<caption>caption</caption>" in text
    assert 'scope="row">a &lt;b&gt;' in text
    assert "prefers-color-scheme:dark" in text
