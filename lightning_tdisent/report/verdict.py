"""Find the values that are better beyond their intervals, and put the comparison of the models into one sentence."""

import math
from collections.abc import Sequence
from typing import Any

from lightning_tdisent.metrics.metric import Better
from lightning_tdisent.metrics.registry import columns_of, features_of
from lightning_tdisent.report.table import tables

# 97.5 % quantiles of Student's t by degrees of freedom; of those between, and above, the last one below is taken
STUDENT = {1: 12.71, 2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228, 14: 2.145, 20: 2.086, 30: 2.042, 60: 2.0}
EQUAL = 0.05  # relative difference below which compute counts as equal


def separate(key: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two rows differ in a number beyond its interval of 95 %; False if there is none.

    The interval is that of the difference of means over repeated trainings; of a single training, the intervals of both
    numbers, where the metric has them.
    """
    n = one.get("repeats", 1)
    if n > 1 and other.get("repeats") == n and f"{key}_sd" in one and f"{key}_sd" in other:
        quantile = STUDENT[max(k for k in STUDENT if k <= 2 * (n - 1))]
        half = quantile * math.sqrt((one[f"{key}_sd"] ** 2 + other[f"{key}_sd"] ** 2) / n)
        return bool(abs(one[key] - other[key]) > half)
    column = columns_of(one).get(key)
    if column is None or not {"low", "high"} <= {*column.parts}:
        return False
    low, high = (column.key(features_of(one), part) for part in ("low", "high"))
    if not all(name in row for name in (low, high) for row in (one, other)):
        return False
    return bool(one[high] < other[low] or other[high] < one[low])


def best(rows: Sequence[dict[str, Any]], directions: dict[str, Better]) -> dict[str, int]:
    """Return, by column, the number of the model that is better than all others beyond the interval."""
    models = [i for i, row in enumerate(rows) if "source" in row]
    out = {}
    for key, better in directions.items():
        own = [i for i in models if isinstance(rows[i].get(key), float)]
        if len(own) < 2:
            continue
        first = (min if better == "lower" else max)(own, key=lambda i: rows[i][key])
        if all(separate(key, rows[first], rows[i]) for i in own if i != first):
            out[key] = first
    return out


def _compute(row: dict[str, Any]) -> float:
    return float(row.get("training_flops", 0.0) + row.get("validation_flops", 0.0))


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the verdict on the models of each protocol that has one."""
    return [text for _, alike in tables(rows) if (text := verdict(alike))]


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Return one sentence on the models by their first distance to real images, with compute and interval; or ``""``.

    rows: of one protocol.
    """
    key = next((k for row in rows for k, column in columns_of(row).items() if column.distance), None)
    models = sorted((row for row in rows if "networks" in row and key in row), key=lambda row: float(row[key or ""]))
    if key is None or len(models) < 2:
        return ""
    first, second, last = models[0], models[1], models[-1]

    def named(row: dict[str, Any]) -> str:
        return f"{row['name']} ({row[key]:.3g})"

    def at(row: dict[str, Any]) -> str:
        mine, theirs = _compute(row), _compute(first)
        if not mine or not theirs:
            return ""
        return " at equal compute" if abs(mine / theirs - 1) <= EQUAL else f" at {mine / theirs:.2g} times its compute"

    n = first.get("repeats", 1)
    apart = separate(key, first, second)
    relation = "is ahead of" if n == 1 or apart else "cannot be told from"
    text = f"By {key}, {named(first)} {relation} {named(second)}{at(second)}"
    if last is not second:
        text += f"; last is {named(last)}{at(last)}"
    if n == 1:
        return text + ". One training of each: the differences have no interval."
    return f"{text}. Means of {n} trainings, {'beyond' if apart else 'within'} the 95 % interval of the difference."
