"""Append the metrics of a training to a file of its run folder, and read them: one JSON object per line."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from lightning_tdisent.files import ask_guards, open_own, write_whole
from lightning_tdisent.runs import METRICS

X = "images_seen"


def append(folder: Path, images_seen: int, values: dict[str, float]) -> None:
    """Append one point to ``metrics.jsonl``.

    Raises OSError if that fails, and Lost if this process no longer holds the folder.
    """
    file = folder / METRICS
    ask_guards(file, quick=True)
    line = json.dumps({X: images_seen, **values}).encode() + b"\n"
    with open_own(file) as stream:
        if end := stream.seek(0, os.SEEK_END):
            stream.seek(end - 1)
            line = line if stream.read(1) == b"\n" else b"\n" + line  # after a line that a full disk has cut off
        if stream.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut(folder: Path, images_seen: int) -> None:
    """Remove the points beyond ``images_seen`` and broken lines, as after a training that goes on from a checkpoint."""
    file = folder / METRICS
    if file.exists():
        kept = [point for point in _points(file) if point[X] <= images_seen]
        write_whole(file, "".join(json.dumps(point) + "\n" for point in kept).encode())


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (images seen, value) of each metric in ``metrics.jsonl``, sorted; of a repeated point the last."""
    found: dict[str, dict[int, float]] = {}
    for point in _points(folder / METRICS):
        for name, value in point.items():
            if name != X:
                found.setdefault(name, {})[point[X]] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def _points(file: Path) -> list[dict[str, Any]]:
    """Return the points of a file, without lines that were cut off while they were written."""
    out = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(point, dict) and isinstance(point.get(X), int):
            out.append(point)
    return out
