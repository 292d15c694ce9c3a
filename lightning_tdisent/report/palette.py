"""One colour and one label for each model through all figures of a page."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLOURS = ["#3b6fb6", "#d1495b", "#2e9e6b", "#b07aa1", "#e0a030", "#66656f", "#17a2b8", "#8c564b"]


def group_of(run: str) -> str:
    """Return the model that a training belongs to: NAME for NAME/expert_001 of a fleet and NAME_001 of experts."""
    return re.sub(r"(/shared|/expert_\d+|_\d{3,})$", "", run)


class Palette:
    """Colours and labels by the source of a row, which several rows share if a model is sampled in several ways.

    rows: of the models. runs: names of the trainings; a model is labelled as its training is.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], runs: Iterable[str] = ()) -> None:
        groups = [*dict.fromkeys(map(group_of, runs))]
        names: dict[str, list[str]] = {}
        for row in rows:
            names.setdefault(row["source"], []).append(row["name"])
        heads = {source: {name.partition(",")[0] for name in own} for source, own in names.items()}
        self._labels = {}
        for source, own in names.items():
            run = Path(source).name.removesuffix("_composite")
            others = [h for other, found in heads.items() if other != source for h in found]
            head = next(iter(heads[source]))
            plain = len(heads[source]) == 1 and head not in others
            self._labels[source] = run if run in groups else head if plain else own[0]
        order = dict.fromkeys([*self._labels.values(), *groups])
        self._colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(order)}

    def label(self, row: dict[str, Any]) -> str:
        """Return the label of a row's model."""
        return self._labels[row["source"]]

    def colour(self, row: dict[str, Any]) -> str:
        """Return the colour of a row's model."""
        return self._colours[self._labels[row["source"]]]

    def of_group(self, group: str) -> str:
        """Return the colour of the model that trainings belong to."""
        return self._colours[group]
