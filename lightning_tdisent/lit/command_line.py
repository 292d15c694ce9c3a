"""Words and config files of the command line, and the parser that explains its errors."""

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.files import check_name, check_utf8_mode, repeated_keys
from lightning_tdisent.lit.explain import explain
from lightning_tdisent.lit.resume import check_header
from lightning_tdisent.runs import CHECKPOINTS, CONFIG, PRIOR, WEIGHTS

_RUN_FILES = (CHECKPOINTS, WEIGHTS, PRIOR)  # at least one of these lies next to the config of a run
COMMANDS = ("fit", "validate", "test", "predict")
# of the running command, per thread: its command line and config files
LINE: ContextVar[tuple[Sequence[str], Sequence[Path]]] = ContextVar("LINE", default=((), ()))
UNRESOLVED: ContextVar[str] = ContextVar("UNRESOLVED", default="")  # its config with ${oc.env:..} not yet replaced


class Parser(LightningArgumentParser):
    """Parser whose errors are a single message, rewritten by `explain`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the explained message as an `InputError`."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise InputError(explain(str(message), *LINE.get(), self)) from None

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Parse the arguments, keeping a null inside the value of a nested option.

        jsonargparse passes such a value to the parser of the class as Python's ``None``, which YAML reads as text.
        """
        if getattr(self, "_inner_parser", False) and args is not None:
            args = [self._as_typed(word) if "None" in word else word for word in args]
        return super().parse_args(args, *rest, **options)

    def add_class_arguments(self, class_type: type, *rest: Any, **options: Any) -> list[str]:
        """Add the arguments of a class, with the sentences of its docstring as their help."""
        added: list[str] = super().add_class_arguments(class_type, *rest, **options)
        texts = sentences(class_type)
        for action in self._actions:
            if action.dest in added and not action.help and (text := texts.get(action.dest.rpartition(".")[2])):
                action.help = text.replace("%", "%%").replace("`", "")
        return added

    def dump(self, *args: Any, **options: Any) -> Any:
        """Dump the config; remember the one in which jsonargparse is about to replace ``${oc.env:..}``."""
        text = super().dump(*args, **options)
        if options.get("skip_link_targets") is False and "oc.env" in text:
            UNRESOLVED.set(text)
        return text

    def _as_typed(self, word: str) -> str:
        """Return ``--key=value`` with the value as typed on the command line, if it is the same value."""
        key, _, value = word.partition("=")
        for option, typed in typed_values(LINE.get()[0]):
            if f".{option}".replace(".init_args", "").endswith(f".{key[2:]}".replace(".init_args", "")):
                with contextlib.suppress(yaml.YAMLError):
                    if str(yaml.safe_load(typed)) == value:
                        return f"{key}={typed}"
        return word


@functools.cache
def sentences(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each argument, as ``name: text`` or ``a, b: text``."""
    out: dict[str, str] = {}
    for base in cls.__mro__[:-1]:
        try:
            own = [name for name in inspect.signature(base).parameters if not name.startswith("_")]
        except ValueError:  # of a class that is written in C
            continue
        doc, names = inspect.cleandoc(vars(base).get("__doc__") or ""), "|".join(map(re.escape, own))
        head = rf"(?m)(?:^|(?<=[;.] )|(?<=, ))((?:{names})(?:, (?:{names}))*):\s"
        found = [*re.finditer(head, doc)] if own else []
        for match, after in itertools.zip_longest(found, found[1:]):
            text = doc[match.end() : after.start() if after else None].partition("\n\n")[0]
            for name in match[1].split(", "):
                out.setdefault(name, " ".join(text.split()).rstrip(";,. "))
    return out


def typed_values(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a command line and their values: ``--key value`` and ``--key=value``."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            yield key, value if equals else after


def config_files(argv: Sequence[str]) -> list[Path]:
    """Return the files of ``--config FILE`` and ``--config=FILE``."""
    return [Path(argv[i].partition("=")[2] or argv[i + 1]) for i in _config_positions(argv)]


def _config_positions(argv: Sequence[str]) -> list[int]:
    """Return the positions of the words ``--config FILE`` and ``--config=FILE``."""
    alone = [i for i, word in enumerate(argv[:-1]) if word in ("--config", "-c")]
    return sorted(alone + [i for i, word in enumerate(argv) if word.startswith("--config=")])


def configs_first(argv: Sequence[str]) -> list[str]:
    """Return the command line with all config files first, so that every option overrides them.

    The config stored in a run folder selects that folder as ``--run``, also after the folder was moved.
    """
    configs, taken = [], {0}
    for i in _config_positions(argv):
        joined = argv[i].startswith("--config=")
        file = Path(argv[i].partition("=")[2] if joined else argv[i + 1])
        configs += [f"--config={file}"]
        run = re.search(r"(?m)^id: \S+", file.read_text(encoding="utf-8"))
        if file.name == CONFIG and (run or any((file.parent / name).exists() for name in _RUN_FILES)):
            configs += [f"--run={file.parent}"]
        elif run and not any(re.fullmatch("--run(=.*)?", word) for word in argv):
            raise InputError(f"--config {file}: is the config of a run ({run[0]}); give the folder to use with --run")
        taken |= {i} if joined else {i, i + 1}
    return [*argv[:1], *configs, *(word for i, word in enumerate(argv) if i not in taken)]


def check_yaml(file: Path) -> None:
    """Raise InputError for a config file that is missing, not valid YAML, or repeats a key."""
    check_name(file, "--config")
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise InputError(f"--config {file}: is a pipe or a device, which cannot be read twice; give a file")
    try:
        text = file.read_bytes()
        if not text.isascii():
            check_utf8_mode(f"--config {file}: contains non-ASCII text")  # jsonargparse uses the locale's encoding
        check_header(text, file)
        twice = repeated_keys(text)
    except FileNotFoundError:
        near = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise InputError(f"--config {file}: no such file.{nearest(str(file), near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if twice:
        raise InputError(
            f"{file}: {'; '.join(twice)}: a key that this mapping has already; the earlier value would be lost"
        )
