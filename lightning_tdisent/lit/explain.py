"""Rewrite jsonargparse's nested error messages as one line: file, line, key, the error and the closest valid word."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import lightning.pytorch as L
import yaml

from lightning_tdisent.diffusion.spec import Part, arguments
from lightning_tdisent.errors import nearest
from lightning_tdisent.files import compose_yaml

# folder that the paths of config files are relative to; the parser changes the current folder
HERE: ContextVar[Path] = ContextVar("HERE", default=Path())


def explain(message: str, argv: Sequence[str], files: Sequence[Path], parser: jsonargparse.ArgumentParser) -> str:
    """Return one line for a parser's message; the message on one line if its form is unknown.

    argv: the command line. files: its config files. parser: the parser that reported the error.
    """
    helps = [word for word in argv if word.startswith("--") and word.endswith(".help")]
    if helps and "expected one argument" in message:
        return (
            f"command line: {helps[0]} shows the arguments of a class: name it, before it the classes that it is part "
            f"of, and no --config, as in --model ReducedStates {helps[0]} CLASS"
        )
    if match := re.search(r"unrecognized arguments: (.*)", message):
        word = match[1].split()[0]
        return f"command line: {word}: no such option.{_suggestion(word, argv, _options(parser))}"
    if match := re.search(r"Subcommand '(\w+)' does not accept option '([^']+)'", message):
        sub = {option.lstrip("-") for option in _options(parser)}
        return f"{place(match[2], argv, files)}: {match[1]} has no option {match[2]!r}.{nearest(match[2], sub)}"
    path = re.findall(r'Parser key "([^"]+)"', message)
    where = ".".join(path)
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        owner = re.findall(r"given class_path '([^']+)'", message)
        key = match[1].split(".init_args")[0]
        allowed = arguments(_resolve(owner[-1])) if owner else sorted(_options(parser))
        name = owner[-1].rpartition(".")[2] if owner else "the program"
        takes = f" {name} takes: {', '.join(allowed)}." if owner else ""
        return f"{place(f'{where}.{key}', argv, files)}: {name} has no option {key!r}.{nearest(key, allowed)}{takes}"
    if line := _no_such_class(message):
        return f"{place(where, argv, files)}: {line}"
    if match := re.search(r'Key "?\'?([\w.]+)"?\'? is required|"?([\w.]+)"? is required|required: ([\w.]+)', message):
        key = next(g for g in match.groups() if g).replace(".init_args", "")
        return f"{place(where, argv, files)}: the option {key} is required but not given"
    expected = re.findall(r"Expected a <class '([^']+)'>", message)
    value = re.search(r"Got value: (.*)|Given value: (?!NestedArg)(.*)", message)
    if expected and value:
        if choice := re.search(r"Expected a typing.Literal(\[[^\]]*\])", message):
            expected = [choice[1], *expected]
        kind = " or ".join(dict.fromkeys(e.replace("NoneType", "null") for e in _innermost(expected)))
        return f"{place(where, argv, files)}: expected {kind}, got {next(g for g in value.groups() if g)!r}"
    return f"{place(where, argv, files)}: " + " ".join(message.split())


def explain_interpolation(message: str, files: Sequence[Path]) -> str:
    """Return one line for a ``${...}`` that cannot be resolved, with the file and line that use it."""
    name = re.search(r"'([^']+)' not found|\$\{([^}]+)\}", message)
    wanted = next((g for g in name.groups() if g), "").lstrip(".") if name else ""
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if f"${{{wanted}" in line:
                key = line.partition(":")[0].strip(" -")
                return f"{file}:{number}: {key}: ${{{wanted}}} is not an option of this run"
    return message.splitlines()[0]


def _suggestion(word: str, argv: Sequence[str], options: set[str]) -> str:
    """Return a suggestion for an unknown option: one that ends in it, as --model.lr for --lr, or the closest one."""
    first, dot, rest = word.partition("=")[0].lstrip("-").partition(".")
    every = options.union(
        *({f"--model.{key}" for key in arguments(cls)} for cls in _classes(L.LightningModule)),
        *({f"--data.{key}" for key in arguments(cls)} for cls in _classes(L.LightningDataModule)),
    )
    close = get_close_matches(first, {option.rpartition(".")[2] for option in every}, 1, 0.85)
    given = {one.partition("=")[0] for one in argv}
    found = [option for option in every if option.endswith(f".{close[0]}")] if close else []
    found = [option for option in found if option + dot + rest not in given]
    found.sort(key=lambda option: (not option.startswith(("--model.", "--data.")), option))
    return f" Did you mean {found[0] + dot + rest!r}?" if found else nearest(word, every, 0.75)


def _innermost(expected: list[str]) -> list[str]:
    plain = [e for e in expected if "." not in e]
    return plain[: plain.index("NoneType") + 1] if "NoneType" in plain else plain or expected[:1]


def _resolve(path: str) -> type:
    module, _, name = path.rpartition(".")
    cls = getattr(__import__(module, fromlist=[name]), name)
    assert isinstance(cls, type)
    return cls


def _options(parser: jsonargparse.ArgumentParser) -> set[str]:
    found = {option for action in parser._actions for option in action.option_strings}
    for sub in getattr(parser._subparsers, "_group_actions", []) if parser._subparsers else []:
        for choice in (sub.choices or {}).values():
            found |= _options(choice)
    return found


def _no_such_class(message: str) -> str | None:
    """Return what is wrong with the name of a class, and the closest valid one; None if that is not the error."""
    forms = (
        r"dot import path string: (?P<path>\S+)",
        r"given class_path '(?P<path>[^']+)':\s+(?P<why>(?:module '[^']*' has no attribute|No module named) '[^']*')",
        r"Import path (?P<path>\S+ )?does not correspond to a subclass of (?P<base>\w+)",
    )
    if (match := next(filter(None, (re.search(form, message) for form in forms)), None)) is None:
        return None
    found, base = match.groupdict(), _expected_base(message[: match.start()])
    given = re.search(r"Given value: (\S+)", message[match.end() :])
    path = (found["path"] or (given[1] if given else "the value")).strip()
    names = sorted({cls.__name__ for cls in _classes(base)})
    why = found.get("why") or ""
    if "No module" in why and not path.startswith(f"{__package__.partition('.')[0]}."):
        return f"there is no class {path!r} ({why}). Your own modules must be in a folder on PYTHONPATH"
    near = nearest(path.rpartition(".")[2], names)
    choices = f" There are: {', '.join(names)}" if base and not near else ""
    return (f"{path} is no {found['base']}." if found.get("base") else f"there is no class {path!r}.") + near + choices


def _expected_base(before: str) -> type | None:
    """Return the base class that is expected where a message ends: the last type named, or the argument's type."""
    types = list(re.finditer(r"Subtypes: \[(?:list\[)?(?:<class ')?([\w.]+)", before))
    keys = list(re.finditer(r'Parser key "([\w.]+)"', before))
    owners = re.findall(r"given class_path '([^']+)'", before)
    if types and (not keys or types[-1].start() > keys[-1].start()):
        return _resolve(types[-1][1])
    if not (keys and owners):
        return None
    for cls in _resolve(owners[-1]).__mro__:
        hint = get_type_hints(vars(cls)["__init__"]).get(keys[-1][1]) if "__init__" in vars(cls) else None
        if isinstance(hint, type):
            return hint
    return None


def _classes(base: type | None) -> Iterator[type]:
    """Yield the public subclasses of a class; without one, of all classes that a config can name."""
    waiting: list[type] = [base] if base else [Part, L.LightningModule, L.LightningDataModule, L.Callback]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        ours = cls.__module__.startswith(("lightning_tdisent", "lightning.pytorch.callbacks"))
        if (base or ours) and not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls


def place(key: str, argv: Sequence[str], files: Sequence[Path]) -> str:
    """Return where a key was set: ``command line: --key``, or ``file:line: key`` of the last config that sets it."""
    if not key:
        return "command line"
    words = [w.partition("=")[0].lstrip("-") for w in argv if w.startswith("--")]
    flat = {w.replace(".init_args", "") for w in words}
    if key in flat or any(w.startswith(f"{key}.") for w in flat):
        return f"command line: --{key}"
    for file in reversed(files):
        line = _line(compose_yaml((HERE.get() / file).read_bytes()), key.split("."))
        if line is not None:
            return f"{file}:{line}: {key}"
    return key


def _line(node: Any, keys: Sequence[str]) -> int | None:
    if not keys:
        return int(node.start_mark.line) + 1
    if isinstance(node, yaml.SequenceNode):
        found = (_line(item, keys) for item in node.value)
        return next((line for line in found if line is not None), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == keys[0]:
            return int(name.start_mark.line) + 1 if len(keys) == 1 else _line(value, keys[1:])
        if name.value in ("init_args", "dict_kwargs") and (line := _line(value, keys)) is not None:
            return line
    return None
