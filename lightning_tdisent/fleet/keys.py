"""Read the YAML files of studies, fleets and plans; check their keys and the type of each value."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_tdisent.errors import InputError, is_whole, nearest
from lightning_tdisent.files import compose_yaml, expand_all

ANY, TEXT, LIST, MAPPING = "", "text", "a list", "a mapping"
SETTINGS, WHOLE, COUNT = "a mapping of config keys", "an integer", "an integer of at least 1"
SEED = "an integer in [0, 2^32)"


_KINDS: dict[str, Callable[[Any], bool]] = {
    ANY: lambda value: True,
    TEXT: lambda value: isinstance(value, str),
    LIST: lambda value: isinstance(value, list),
    MAPPING: lambda value: isinstance(value, dict),
    "a mapping of names to settings": lambda value: isinstance(value, dict),
    SETTINGS: lambda value: isinstance(value, dict),
    WHOLE: is_whole,
    COUNT: lambda value: is_whole(value) and value >= 1,
    SEED: lambda value: is_whole(value) and 0 <= value < 1 << 32,
}


def refuse_kind(value: Any, kind: str, where: str) -> None:
    """Raise InputError unless a value is of the given kind; several kinds are joined by `` or ``."""
    if not any(_KINDS[one](value) for one in kind.split(" or ")):
        quotes = "; write it in quotes" if kind == TEXT and isinstance(value, (int, float)) else ""
        raise InputError(f"{where}: expected {kind}, got {value!r}{quotes}")


def known(data: Any, keys: Mapping[str, str], where: str, required: Sequence[str] = ()) -> dict[str, Any]:
    """Return a mapping without its null keys; required keys are kept.

    Raises InputError if ``data`` is not a mapping, has a key that is not in ``keys``, lacks a required key, or has a
    value that is not of the kind of its key.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping with the keys {', '.join(keys)}, got {data!r}")
    for key in data:
        if key not in keys:
            raise InputError(f"{where}: unknown key {key!r}.{nearest(str(key), list(keys))} Known: {', '.join(keys)}")
    missing = [key for key in required if key not in data]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} is missing")
    for key, value in data.items():
        if value is not None or key in required:
            refuse_kind(value, keys[key], f"{where}: {key}")
    return {key: value for key, value in data.items() if value is not None or key in required}


def _restore_env(resolved: Any, given: Any, keep: bool) -> Any:
    """Restore unresolved ``${oc.env:..}`` values in resolved data.

    They are restored below ``set`` and ``for_rows``, and everywhere if ``keep`` is true.
    """
    if isinstance(given, str):
        return given if keep and "${oc.env" in given else resolved
    if isinstance(given, dict):
        return {k: _restore_env(v, given[k], keep or k in ("set", "for_rows")) for k, v in resolved.items()}
    return (
        [_restore_env(*pair, keep) for pair in zip(resolved, given, strict=True)]
        if isinstance(given, list)
        else resolved
    )


def read_yaml(file: Path, secrets: bool = True) -> Any:
    """Return the content of a YAML file with ``${...}``, ``~`` and ``$NAME`` replaced.

    Settings of trainings (below ``set`` and ``for_rows``) keep ``${oc.env:NAME}``, which `fit` resolves. With
    ``secrets`` false every value that refers to an environment variable stays unresolved, so that the content of the
    variable is not written to files.
    """
    try:
        compose_yaml(file.read_bytes())
        loaded = OmegaConf.load(file)
        given = OmegaConf.to_container(loaded)
        return expand_all(_restore_env(OmegaConf.to_container(loaded, resolve=True), given, not secrets), str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid: {' '.join(str(error).split())}") from None
