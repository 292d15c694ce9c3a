"""Keep copies of the files that a folder was made from, and name the keys in which two versions differ."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_tdisent.files import write_whole

CONFIGS = "configs"  # folder of the copies


def copy_name(stem: str, taken: Collection[str]) -> str:
    """Return a free name for the copy of a config, relative to the folder that keeps it."""
    while (name := f"{CONFIGS}/{stem}.yaml") in taken:
        stem += "_"
    return name


def differences(theirs: Any, mine: Any) -> list[str]:
    """Return a line ``KEY: X there, Y now`` for each key in which plain data differs."""
    a, b = dict(_flat(theirs)), dict(_flat(mine))
    # as text: 1 is not true, and NaN is NaN
    texts = [{key: json.dumps(value, default=str) for key, value in data.items()} for data in (a, b)]
    return [f"{k}: {_said(a, k)} there, {_said(b, k)} now" for k in {**a, **b} if texts[0].get(k) != texts[1].get(k)]


def edits(theirs: bytes, mine: bytes) -> list[str]:
    """Return the keys in which two YAML files differ; none if they differ in comments or layout alone."""
    try:
        return differences(yaml.safe_load(theirs), yaml.safe_load(mine))
    except yaml.YAMLError as error:
        return [f"not valid YAML: {' '.join(str(error).split())}"]


def write_copies(folder: Path, copies: dict[str, bytes]) -> None:
    """Write copies under their names, each whole or not at all."""
    for name, content in copies.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            write_whole(folder / name, content)


def _said(data: dict[str, Any], key: str) -> str:
    return repr(data[key]) if key in data else "nothing"


def _flat(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = None
    if isinstance(data, dict):
        items = [(f"{name}.{k}" if name else str(k), v) for k, v in data.items()]
    elif isinstance(data, list) and any(isinstance(v, (dict, list)) for v in data):
        items = [(f"{name}[{k}]", v) for k, v in enumerate(data)]
    if not items:
        if name or data:
            yield name, data
        return
    for key, value in items:
        yield from _flat(value, key)
