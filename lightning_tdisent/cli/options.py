"""The one language of all commands: options ``--key value``, dotted keys ``--key.sub value``, and files ``--config``.

`fit`, `validate`, `test` and `predict` are parsed by LightningCLI and speak the same language.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_tdisent.errors import InputError, closest, nearest

GLOBAL = ("config", "print_config", "imports")  # options that no file sets
TEXTS = ("option",)  # parts whose values stay text, for another program
PROSE = ("title", "notes")  # keys of files whose values on the command line are text, whatever they look like
HIDDEN = (*GLOBAL, "run", "command", "fleet_command", "data_command", "commands", "dotted", "assigned")


class Parser(argparse.ArgumentParser):
    """Parser of one command, whose errors are one line, and whose options files may set.

    parts: options that take dotted keys, such as ``sampler`` for ``--sampler.steps 4``.
    keys: module with the ``KEYS`` of the YAML that the command reads, each of which is an option; else empty.
    """

    def __init__(self, prog: str, parts: Sequence[str] = (), keys: str = "", **options: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **options)
        self.parts, self.keys = tuple(parts), keys
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -3:5 and -1,1 are values, not options

    def error(self, message: str) -> NoReturn:
        """Raise the message as an `InputError`."""
        message = re.sub(r"^argument ([^:]*/)?(-[^:]*|[^:]*):", r"\2:", message)
        raise InputError(f"{self.prog.rpartition('lightning_tdisent ')[2]}: {message}")

    def refuse(self, word: str) -> NoReturn:
        """Raise InputError for a word that is no option, with the closest option."""
        if not word.startswith("-"):
            hint = " The YAML is named with --config FILE" if self.keys else ""
            raise InputError(f"{word}: one argument too many.{hint}", value=word)
        option = word.partition("=")[0]
        every = [*self.known(), *(f"--{key}" for key in (*self.parts, *self.keys_of_files()))]
        close = closest(option.partition(".")[0], every, 0.6)
        hint = f" Did you mean {close!r}?" if close else ""
        raise InputError(f"{option}: no such option.{hint}", key=option, nearest=close)

    def known(self) -> list[str]:
        """Return the long options of this command."""
        return [word for action in self._actions for word in action.option_strings if word.startswith("--")]

    def keys_of_files(self) -> tuple[str, ...]:
        """Return the keys of the YAML that this command reads, each of which is an option, too."""
        import importlib

        return tuple(importlib.import_module(self.keys).KEYS) if self.keys else ()


def parse(root: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; values of ``--config`` files are defaults of options that are not given.

    The result has, beside the options, ``dotted``: values by the name of the part and the key, for options with parts;
    and ``assigned``: (key, value) pairs of the command line, in order, for commands that read a YAML with keys of its
    own. Raises InputError for unknown options and keys, with the closest valid one, and for values that do not fit.
    """
    leaf, words = _leaf(root, argv)
    dotted: dict[str, dict[str, Any]] = {part: {} for part in leaf.parts}
    assigned: list[tuple[str, Any]] = []
    off = set[str]()
    rest, files = _split(leaf, words, dotted, assigned, off)
    if not leaf.keys:
        given = {word.partition("=")[0] for word in rest}
        said = {action.dest for action in leaf._actions if given & set(action.option_strings)}
        _set_defaults(leaf, files, dotted, off | said)
    begin = [*argv[: len(argv) - len(words)], *rest]
    found, extra = root.parse_known_args(begin, argparse.Namespace(dotted=dotted, assigned=assigned))
    if extra:
        leaf.refuse(extra[0])
    if getattr(found, "print_config", False) and not leaf.keys:
        import yaml

        print(yaml.safe_dump(effective(found), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return found


def effective(found: argparse.Namespace) -> dict[str, Any]:
    """Return the values of all options as the content of a file for ``--config``."""
    from lightning_tdisent.fleet.keys import assign

    values = {key: _plain(value) for key, value in vars(found).items() if key not in HIDDEN}
    for part, more in found.dotted.items():
        if more:
            values[part] = assign({part: values.get(part)}, [(f"{part}.{k}", v) for k, v in more.items()])[part]
    return {key: value for key, value in values.items() if value is not None}


def print_merged(found: argparse.Namespace) -> None:
    """Print the content of the files of a command that reads a YAML with keys of its own, with the options in it."""
    import yaml

    from lightning_tdisent.fleet.keys import read_yaml

    if not found.config:
        raise InputError("--print_config: name the YAML with --config FILE")
    extra = [(name, _plain(value)) for name in ("out", "seed") if (value := getattr(found, name)) is not None]
    content = read_yaml(found.config, secrets=False, assigned=[*found.assigned, *extra], absolute=True)
    print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120), end="")


def part_entry(value: Any, option: str) -> Any:
    """Return the value of an option that names a part: a name, or a mapping given in a file or as text."""
    from lightning_tdisent.fleet.keys import value_of

    return value_of(value, option) if isinstance(value, str) and value.lstrip().startswith("{") else value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _leaf(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Parser, Sequence[str]]:
    """Return the parser of the command that a command line names, and the words after the command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and argv and argv[0] in action.choices:
            return _leaf(action.choices[argv[0]], argv[1:])
    assert isinstance(parser, Parser)
    return parser, argv


def _split(
    leaf: Parser,
    words: Sequence[str],
    dotted: dict[str, dict[str, Any]],
    assigned: list[tuple[str, Any]],
    off: set[str],
) -> tuple[list[str], list[Path]]:
    """Take dotted keys, and keys of the YAML that a command reads, out of a command line; return the rest and files."""
    options = {word: action for action in leaf._actions for word in action.option_strings if word.startswith("--")}
    rest, files = list[str](), list[Path]()
    queue = list(words)
    while queue:
        word = queue.pop(0)
        option, equals, text = word.partition("=")
        if isinstance(action := options.get(option), argparse._StoreTrueAction | argparse.BooleanOptionalAction):
            said = text if equals else queue[0] if queue and queue[0] in ("true", "false") else "true"
            if said not in ("true", "false"):
                raise InputError(f"{option}: expected true or false, got {said!r}", key=option, value=said)
            queue = queue[not equals and bool(queue) and queue[0] == said :]
            if said == "true":
                rest.append(option)
            elif isinstance(action, argparse.BooleanOptionalAction):
                rest.append(f"--no-{option[2:]}")
            else:
                off.add(action.dest)
            continue
        name = option[2:] if option.startswith("--") else ""
        first = name.partition(".")[0]
        if not name or (option in options and option != "--config"):
            rest.append(word)
            continue
        if option != "--config" and not _takes(leaf, first, name):
            leaf.refuse(word)
        from lightning_tdisent.files import input_path  # imported here: --help must not wait for it
        from lightning_tdisent.fleet.keys import value_of

        text = text if equals else queue.pop(0) if queue else ""
        if not text or (not equals and text.startswith("--")):
            raise InputError(f"{option}: expected a value")
        if option == "--config":
            files.append(input_path(Path(text), "--config"))
            rest += ["--config", text]
        elif name == f"{first}.class_path" and first in leaf.parts:
            rest += [f"--{first}", text]
        elif first in leaf.parts:
            key = name[len(first) + 1 :].removeprefix("init_args.")
            dotted[first][key] = text if first in TEXTS else value_of(text, option)
        else:
            assigned.append((name, text if name in PROSE else value_of(text, option)))
    return rest, files


def _takes(leaf: Parser, first: str, name: str) -> bool:
    """Return whether ``--name`` sets a key of a part, or of the YAML that the command reads."""
    return name != first if first in leaf.parts else first in leaf.keys_of_files()


def _set_defaults(leaf: Parser, files: Sequence[Path], dotted: dict[str, dict[str, Any]], given: set[str]) -> None:
    """Make the values of files the defaults of a command's options; check them as if they were given as options.

    given: options of the command line, which count more: a list is not extended.
    """
    if not files:
        return
    from lightning_tdisent.fleet.keys import merged, read_yaml

    actions = {action.dest: action for action in leaf._actions if action.dest not in (*HIDDEN, "help")}
    known = [*actions, *(part for part in leaf.parts if part not in actions)]
    found: dict[str, tuple[Any, str]] = {}
    for file in files:
        data = read_yaml(file)
        if not isinstance(data, dict):
            raise InputError(f"{file}: expected a mapping of the options of this command, got {data!r}")
        for key, value in data.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise InputError(
                    f"{file}: unknown key {key!r}.{nearest(name, known)} Known: {', '.join(known)}", where=str(file),
                    key=str(key), nearest=closest(name, known),
                )  # fmt: skip
            found[name] = merged(found.get(name, (None, ""))[0], value), f"{file}: {key}"
    for name, (value, where) in found.items():
        if name not in actions:
            if not isinstance(value, dict):
                raise InputError(f"{where}: expected a mapping, got {value!r}")
            dotted[name] = {**value, **dotted[name]}
            continue
        if name in leaf.parts and isinstance(value, dict) and "preset" not in value:
            # keys beside the class are its arguments, and without a class those of the default, as --sampler.steps 4
            own = {key: value[key] for key in ("class_path", "init_args") if key in value}
            more = {key: value[key] for key in value if key not in own}
            if "class_path" not in own:
                own, more = {}, {**own.get("init_args", {}), **more}
            dotted[name], value = {**more, **dotted[name]}, own or None
        if value is not None:
            action = actions[name]
            part = name in leaf.parts and isinstance(value, dict)
            value = value if part else _converted(leaf, action, value, where)
            action.default = action.default if name in given else value
            action.required = False
            if not action.option_strings:  # a positional argument
                action.nargs = "*" if action.nargs == "+" else "?"


def _converted(leaf: Parser, action: argparse.Action, value: Any, where: str) -> Any:
    """Return a file's value as the option itself would parse it."""
    if isinstance(action, (argparse._StoreTrueAction, argparse.BooleanOptionalAction)):
        if not isinstance(value, bool):
            raise InputError(f"{where}: expected true or false, got {value!r}")
        return value
    many = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    if isinstance(value, list) and action.type is None and not many:  # as --metrics fd,kid
        value = ",".join(map(str, value))
    if isinstance(value, (dict, bool)) or (isinstance(value, list) and not many):
        raise InputError(f"{where}: expected one value, got {value!r}")
    try:
        out = [leaf._get_value(action, str(one)) for one in (value if isinstance(value, list) else [value])]
        for one in out:
            leaf._check_value(action, one)
    except argparse.ArgumentError as error:
        raise InputError(f"{where}: {error.message}") from None
    return out if many else out[0]
