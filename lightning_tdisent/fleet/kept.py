"""Keep copies of the files that a folder was made from, and name the keys in which two versions differ."""

from collections.abc import Collection
from pathlib import Path

from lightning_tdisent.artifacts import differences
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import load_yaml, write_whole

CONFIGS = "configs"  # folder of the copies


def copy_name(stem: str, taken: Collection[str]) -> str:
    """Return a free name for the copy of a config, relative to the folder that keeps it."""
    while (name := f"{CONFIGS}/{stem}.yaml") in taken:
        stem += "_"
    return name


def edits(theirs: bytes, mine: bytes) -> list[str]:
    """Return the keys in which two YAML files differ; none if they differ in comments or layout alone."""
    try:
        return differences(load_yaml(theirs, "as it was"), load_yaml(mine, "as it is"))
    except InputError as error:
        return [str(error)]


def write_copies(folder: Path, copies: dict[str, bytes]) -> None:
    """Write copies under their names, each whole or not at all."""
    for name, content in copies.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            write_whole(folder / name, content)
