"""Read the YAML files of studies, fleets and plans; check their keys and the type of each value."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_tdisent.errors import InputError, closest, is_whole, nearest
from lightning_tdisent.files import compose_yaml, expand_all, load_yaml

ANY, TEXT, LIST, MAPPING = "", "text", "a list", "a mapping"
SETTINGS, WHOLE, COUNT = "a mapping of config keys", "an integer", "an integer of at least 1"
SEED = "an integer in [0, 2^32)"
NAMED = ("runs", "priors", "contenders")  # keys of a study whose keys are names
Assigned = Sequence[tuple[str, Any]]  # dotted keys of the command line and their values, in order


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
        raise InputError(f"{where}: expected {kind}, got {value!r}{quotes}", where=where, value=value, expected=kind)


def known(data: Any, keys: Mapping[str, str], where: str, required: Sequence[str] = ()) -> dict[str, Any]:
    """Return a mapping without its null keys; required keys are kept.

    Raises InputError if ``data`` is not a mapping, has a key that is not in ``keys``, lacks a required key, or has a
    value that is not of the kind of its key.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping with the keys {', '.join(keys)}, got {data!r}")
    for key in data:
        if key not in keys:
            close = nearest(str(key), keys)
            raise InputError(
                f"{where}: unknown key {key!r}.{close} Known: {', '.join(keys)}", where=where, key=str(key),
                nearest=closest(str(key), keys),
            )  # fmt: skip
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


def merged(before: Any, value: Any) -> Any:
    """Return two nested mappings as one, in which the values of the second count; other values are replaced."""
    if not isinstance(before, dict) or not isinstance(value, dict):
        return value
    return {**before, **{key: merged(before.get(key), inner) for key, inner in value.items()}}


def _relative_to(folder: Path, data: Any) -> Any:
    """Return data in which the configs of runs and fleets are absolute paths, given relative to ``folder``."""
    if isinstance(data, list):
        return [_relative_to(folder, value) for value in data]
    if not isinstance(data, dict):
        return data
    out = {key: _relative_to(folder, value) for key, value in data.items()}

    def joined(name: Any) -> Any:  # ~ and $NAME are not replaced yet
        return str(folder / name) if isinstance(name, str) and not name.startswith(("~", "$")) else name

    if isinstance(names := out.get("configs"), list):
        out["configs"] = [joined(name) for name in names]
    if "fleet" in out:
        out["fleet"] = joined(out["fleet"])
    return out


def _with_times_quoted(text: str) -> str:
    """Return YAML in which plain numbers in base 60, such as 10:20, are quoted: they are meant as text."""
    places = []
    nodes = [compose_yaml(text)]
    while nodes:
        node = nodes.pop()
        if (
            isinstance(node, yaml.ScalarNode)
            and not node.style
            and re.fullmatch(r"[-+]?\d+(:\d+)+(\.\d*)?", node.value)
        ):
            places.append((node.start_mark.index, node.end_mark.index))
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [one for pair in node.value for one in pair]
    for begin, end in sorted(set(places), reverse=True):
        text = f"{text[:begin]}'{text[begin:end]}'{text[end:]}"
    return text


def read_yaml(
    files: Path | Sequence[Path], secrets: bool = True, assigned: Assigned = (), absolute: bool = False
) -> Any:
    """Return the content of a YAML file with ``${...}``, ``~`` and ``$NAME`` replaced.

    Of several files, each is merged into those before it. assigned: see `assign`; set before ``${...}`` is replaced.
    Configs that a file names are relative to its folder: those of files in another folder than the first, or of all
    files if ``absolute``, become absolute paths.

    Settings of trainings (below ``set`` and ``for_rows``) keep ``${oc.env:NAME}``, which `fit` resolves. With
    ``secrets`` false every value that refers to an environment variable stays unresolved, so that the content of the
    variable is not written to files.
    """
    files = [files] if isinstance(files, Path) else files
    contents = []
    for file in files:
        try:
            compose_yaml(file.read_bytes())
            one: Any = OmegaConf.create(_with_times_quoted(file.read_text(encoding="utf-8")))
            if absolute or file.parent.resolve() != files[0].parent.resolve():
                one = OmegaConf.create(_relative_to(file.parent.resolve(), OmegaConf.to_container(one)))
            contents.append(one)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not valid: {' '.join(str(error).split())}") from None
    try:
        loaded: Any = OmegaConf.merge(*contents) if len(contents) > 1 else contents[0]
        if assigned:
            data: Any = OmegaConf.to_container(loaded)
            loaded = OmegaConf.create(assign(data, assigned) if isinstance(data, dict) else data)
        given = OmegaConf.to_container(loaded)
        return expand_all(_restore_env(OmegaConf.to_container(loaded, resolve=True), given, not secrets), str(file))
    except (OmegaConfBaseException, TypeError) as error:
        raise InputError(f"{', '.join(map(str, files))}: not valid: {' '.join(str(error).split())}") from None


def value_of(text: str, where: str) -> Any:
    """Return the value of an option: JSON or YAML 1.2, in which 1e-3 is a number, and 00:12:00 and 010 are text."""
    try:
        value = json.loads(text)
    except ValueError:
        value = load_yaml(text, where)
    if isinstance(value, (int, float)) and re.search(r":|^[-+]?0\d", text):
        return text
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value) and value == text:
        return float(value)
    return value


def assign(data: Mapping[str, Any], assigned: Assigned) -> dict[str, Any]:
    """Return nested data in which dotted keys have new values.

    A key may contain dots itself; the longest that exists is taken. Keys below ``set`` and below a range of
    ``for_rows`` are config keys, dots and all. The key ``*`` of ``runs`` stands for each of them. A class path, or the
    preset of a protocol, becomes a mapping when a key below it is set; a key of a part that is neither ``class_path``
    nor ``init_args`` is one of its arguments.
    """
    out: dict[str, Any] = _copied(data)
    for key, value in assigned:
        _assign(out, "", key, value, key)
    return out


def _copied(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _copied(value) for key, value in data.items()}
    return [_copied(one) for one in data] if isinstance(data, list) else data


def _assign(node: dict[str, Any], parent: str, path: str, value: Any, key: str) -> None:
    if parent == "runs" and path.startswith("*."):
        for name in node:
            _assign(node, parent, f"{name}{path[1:]}", value, key)
        return
    names = {str(name): name for name in node}
    first = max((name for name in names if path == name or path.startswith(f"{name}.")), key=len, default="")
    if not first:
        if parent in NAMED:
            raise InputError(f"--{key}: there is no such key in {parent}, which has {', '.join(names)}")
        if parent == "set":
            first = path
        elif parent == "for_rows" and (match := re.match(r"\d+(\.\.\d+)?(?=\.)", path)):
            first = match[0]
        elif "class_path" in node and path.partition(".")[0] not in ("class_path", "init_args", "dict_kwargs"):
            path, first = f"init_args.{path}", "init_args"
        else:
            first = path.partition(".")[0]
    name, rest = names.get(first, first), path[len(first) + 1 :]
    if not rest:
        node[name] = value
        return
    inner = node.get(name)
    if isinstance(inner, str):
        inner = {"preset": inner} if first == "protocol" else {"class_path": inner}
    if inner is None:
        inner = {}
    if not isinstance(inner, dict):
        raise InputError(f"--{key}: {first} is {inner!r}, which has no keys")
    node[name] = inner
    _assign(inner, "set" if parent == "for_rows" else first, rest, value, key)
