"""Disk space of runs: which run folders there are, and which of their files are no longer needed."""

import os
from collections.abc import Iterator
from pathlib import Path

from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.checkpoint import facts
from lightning_tdisent.runs import CHECKPOINTS, CONFIG, NEWEST, WEIGHTS, busy, checkpoints_in


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield the run folders at or below a folder, in the order of their names."""
    for place, names, files in os.walk(folder):
        names.sort()
        if CONFIG in files:
            names.clear()
            yield Path(place)


def removable(run: Path) -> tuple[list[Path], str]:
    """Return the checkpoints of a finished run with their manifests, or no files and the reason.

    A run is finished if its weights are of the step of its newest checkpoint, and no process holds it.
    """
    if holder := busy(run):
        return [], holder
    checkpoints = checkpoints_in(run / CHECKPOINTS)
    if not checkpoints:
        return [], "it has no checkpoints"
    if not (run / WEIGHTS).exists():
        return [], "it is not finished"
    if read_card(run / WEIGHTS).steps != facts(checkpoints[-1]).get("step"):
        return [], "it is not finished: its weights are of another step than its newest checkpoint"
    manifests = [path.with_name(f"{path.name}.json") for path in checkpoints]
    return [path for path in (*checkpoints, *manifests, run / CHECKPOINTS / NEWEST) if path.exists()], ""
