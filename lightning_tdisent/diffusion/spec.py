"""Parts as plain data: any part is named by its class path and constructor arguments, and can be built again.

The convention that makes this work without decorators: a part keeps every constructor argument under its own name.
"""

import importlib
import inspect
import sys
from typing import Any, TypeVar

from lightning_tdisent.errors import InputError, nearest

_PLAIN = (str, int, float, bool, type(None))


class Part:
    """Mark of a class that a checkpoint may name: schedule, table, objective, weight, network, sampler."""


SomePart = TypeVar("SomePart", bound=Part)


def spec(part: Part) -> dict[str, Any]:
    """Return ``{"class_path": .., "init_args": {..}}`` of a part, JSON-like all the way down."""
    cls = type(part)
    names = arguments(cls)
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise InputError(
            f"{cls.__module__}.{cls.__qualname__} does not keep its constructor arguments {missing} as attributes; "
            "a checkpoint could not say what it holds. Add e.g. "
            f"self.{missing[0]} = {missing[0]} to __init__."
        )
    return {
        "class_path": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": {name: _plain(getattr(part, name), f"{cls.__name__}.{name}") for name in names},
    }


def arguments(cls: type) -> list[str]:
    """Names of the constructor's arguments, followed through ``**kwargs`` to the base classes."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            names |= {p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(names)


def _plain(value: object, where: str) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v, where) for k, v in value.items()}
    if isinstance(value, Part):
        return spec(value)
    raise InputError(f"{where} holds a {type(value).__name__}, which a checkpoint cannot name")


def build(data: dict[str, Any], base: type[SomePart]) -> SomePart:
    """Build a part from its `spec` and check that it is a ``base``.

    A class is taken from this package or from a module that is already imported: reading a file never imports code
    that its reader did not name, and no class that is not marked as a `Part` is ever called.
    """
    path, arguments = data.get("class_path"), data.get("init_args")
    if not isinstance(path, str) or not isinstance(arguments, dict):
        raise InputError(f"{data} is no class_path with init_args")
    module_name, _, name = path.rpartition(".")
    if module_name.split(".")[0] == __package__.split(".")[0]:
        try:
            importlib.import_module(module_name)
        except ModuleNotFoundError:
            raise InputError(f"this version has no class {path}") from None
    if module_name not in sys.modules:
        raise InputError(
            f"the file names the class {path}, whose module is not loaded. If you trust it, import it first "
            f"(--import {module_name} on the command line)."
        )
    cls = getattr(sys.modules[module_name], name, None)
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        names = [n for n, c in vars(sys.modules[module_name]).items() if inspect.isclass(c) and issubclass(c, base)]
        raise InputError(f"{path} is no {base.__name__}.{nearest(name, names)}")
    built = {k: build(v, Part) if isinstance(v, dict) and "class_path" in v else v for k, v in arguments.items()}
    try:
        return cls(**built)
    except TypeError as error:
        raise InputError(f"{path} cannot be built from {arguments}: {error}") from error
