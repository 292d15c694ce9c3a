"""Copy the configs that a folder was made from, and list the keys in which two versions of a config differ."""

from collections.abc import Collection
from pathlib import Path

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import load_yaml, write_whole
from lightning_tdisent.schemas import differences

CONFIGS = "configs"  # folder of the copies


def copy_name(stem: str, taken: Collection[str]) -> str:
    """Return a free name for the copy of a config, relative to the folder that keeps it."""
    while (name := f"{CONFIGS}/{stem}.yaml") in taken:
        stem += "_"
    return name


def edits(theirs: bytes, mine: bytes) -> list[str]:
    """Return the keys in which two YAML files differ; an empty list if only comments or layout differ.

    For a file that is not valid YAML, return the error message.
    """
    try:
        return differences(load_yaml(theirs, "as it was"), load_yaml(mine, "as it is"))
    except InputError as error:
        return [str(error)]


def write_copies(folder: Path, copies: dict[str, bytes]) -> None:
    """Write copies under their names, each atomically; skip those that are unchanged."""
    for name, content in copies.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            write_whole(folder / name, content)
