"""Describe components as plain data: their class path and constructor arguments, from which they can be built again.

The convention that makes this work without decorators: a part keeps every constructor argument as an attribute of the
same name. An argument that is the path of a file (a mask, a table) is stored with the SHA-256 of the file: with other
content it is another part.
"""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError, closest, nearest

PACKAGE = __package__.split(".")[0]
# old module paths in files of earlier versions, and the modules of today
MOVED = {
    f"{PACKAGE}.sampling.start": f"{PACKAGE}.models.prior_files",
    f"{PACKAGE}.diffusion.bases": f"{PACKAGE}.diffusion.spaces",
}
# old class paths, and old argument names by class, in files of earlier versions
RENAMED = {
    f"{PACKAGE}.diffusion.components.Condition": f"{PACKAGE}.diffusion.observation.Observation",
    f"{PACKAGE}.sampling.start.Implicit": f"{PACKAGE}.models.model_prior.ModelPrior",
    f"{PACKAGE}.Implicit": f"{PACKAGE}.models.model_prior.ModelPrior",
}
ARGUMENTS = {f"{PACKAGE}.diffusion.components.ComponentStates": {"basis": "space", "condition": "observation"}}
_PLAIN = (str, int, float, bool, type(None))
_DIGESTS = "_Part__digests"  # attribute of a part: the mangled name of a private attribute of `Part`


class Part:
    """Base class for components that configs and checkpoints can name.

    These are schedules, tables, objectives, weights, networks, samplers and others.

    names_files: whether the content of files named by arguments belongs to the identity of the part.
    """

    names_files = True


SomePart = TypeVar("SomePart", bound=Part)


def spec(part: Part) -> dict[str, Any]:
    """Return ``{"class_path": .., "init_args": {..}}`` of a part, with JSON-like values at all depths.

    If arguments name files, ``"files": {path: SHA-256}`` is added, with the digests at the time of the first call for
    this part. Raises InputError for an argument that is not an attribute, or whose value is no plain data.
    """
    cls = type(part)
    names = arguments(cls)
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise InputError(
            f"{cls.__module__}.{cls.__qualname__} does not keep its constructor arguments {missing} as attributes; "
            "a checkpoint could not say what it holds. Add e.g. "
            f"self.{missing[0]} = {missing[0]} to __init__."
        )
    init_args = {name: _plain(getattr(part, name), f"{cls.__name__}.{name}") for name in names}
    out: dict[str, Any] = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}
    if part.names_files and (files := _files(part, init_args)):
        out["files"] = files
    return out


def identity(data: Any) -> Any:
    """Return a `spec` with the digests of files in place of their paths: equal wherever the files are."""
    if isinstance(data, dict) and "files" in data:
        named = _renamed(data["init_args"], data["files"])
        data = {"class_path": data["class_path"], "init_args": named}
    if isinstance(data, dict):
        return {key: identity(value) for key, value in data.items()}
    return [identity(value) for value in data] if isinstance(data, list) else data


def changed(data: Any) -> list[str]:
    """Return a line for every file of a `spec` that is missing or whose content has changed since it was described."""
    if isinstance(data, list):
        return [line for value in data for line in changed(value)]
    if not isinstance(data, dict):
        return []
    lines = []
    for path, digest in data.get("files", {}).items() if "class_path" in data else ():
        found = _sha256(path) if Path(path).is_file() else None
        if found != digest:
            there = f"its sha256 is {found[:12]}.." if found else "there is no such file"
            lines.append(
                f"{path}: {data['class_path']} was made with a file of sha256 {digest[:12]}.. there, now {there}; put "
                "that file back"
            )
    return lines + [line for value in data.values() for line in changed(value)]


def _built(value: Any) -> Any:
    """Return an argument with the parts described in it built, at any depth of lists and mappings."""
    if isinstance(value, list):
        return [_built(one) for one in value]
    if isinstance(value, dict):
        return build(value, Part) if "class_path" in value else {key: _built(one) for key, one in value.items()}
    return value


def _files(part: Part, init_args: dict[str, Any]) -> dict[str, str]:
    """Return the digests of the files named by arguments.

    Each is computed once per part, after the part has read the file.
    """
    known = vars(part).get(_DIGESTS, {})
    for text in _strings(init_args):
        named = bool(Path(text).suffix) or os.sep in text
        if text not in known and named and len(text) < 4096 and "\0" not in text and Path(text).is_file():
            known = vars(part).setdefault(_DIGESTS, {})
            known[text] = _sha256(text)
    return dict(known)


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in the arguments of one part, without those of parts inside it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict) and "class_path" not in value:
        for one in value.values():
            yield from _strings(one)


def _renamed(value: Any, files: dict[str, str]) -> Any:
    if isinstance(value, str):
        return f"sha256:{files[value]}" if value in files else value
    if isinstance(value, list):
        return [_renamed(one, files) for one in value]
    if isinstance(value, dict) and "class_path" not in value:
        return {key: _renamed(one, files) for key, one in value.items()}
    return value


def _sha256(path: str) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def arguments(cls: type) -> list[str]:
    """Return the names of the constructor's arguments, followed through ``**kwargs`` to the base classes."""
    return list(_defaults(cls))


def _defaults(cls: type) -> dict[str, Any]:
    """Return the constructor's arguments and their defaults, followed through ``**kwargs`` to the base classes.

    The default of a required argument is `inspect.Parameter.empty`.
    """
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            found |= {p.name: p.default for p in named if p.name not in found}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return found


# Value of an argument in files that were written before it existed, if the default has changed since:
# {"class path.argument": old default}. Whoever changes a default adds its old value; none has changed so far.
THEN: dict[str, Any] = {}


def defaults_of_then(cls: type) -> dict[str, Any]:
    """Return the values of constructor arguments that a file lacks; required arguments are not included."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    given = {k: v for k, v in _defaults(cls).items() if v is not inspect.Parameter.empty}
    return {k: THEN.get(f"{path}.{k}", list(v) if isinstance(v, tuple) else v) for k, v in given.items()}


def filled(data: Any) -> Any:
    """Return a `spec`, or a config that contains some, with the arguments that an older file lacks.

    They have the values of `defaults_of_then`. Parts whose class is not loaded are unchanged.
    """
    if isinstance(data, list):
        return [filled(value) for value in data]
    if not isinstance(data, dict):
        return data
    data = {key: filled(value) for key, value in data.items()}
    if isinstance(path := data.get("class_path"), str) and isinstance(data.get("init_args", {}), dict):
        module, _, name = path.rpartition(".")
        if inspect.isclass(cls := getattr(sys.modules.get(module), name, None)):
            then = {k: spec(v) if isinstance(v, Part) else v for k, v in defaults_of_then(cls).items()}
            data["init_args"] = {**then, **data.get("init_args", {})}
    return data


def _plain(value: object, where: str) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v, where) for k, v in value.items()}
    if isinstance(value, Part):
        return spec(value)
    cls, _, name = where.partition(".")
    raise InputError(
        f"{where} holds a {type(value).__name__}, which a checkpoint cannot name: the attribute {name} must be the "
        f"argument {name} of {cls} as it was given. Keep what is made of it under another name, such as "
        f"self.{name}_ = {type(value).__name__}(..)"
    )


def rebuild(part: SomePart, make: Callable[[dict[str, Any]], Any] | None = None) -> SomePart:
    """Build a part again from its `spec`, and check that its arguments have the same values.

    make: builds a part from a spec; `build` if not given.

    Raises InputError that names every argument whose attribute has another value in the new part.
    """
    mine, cls = spec(part), type(part)
    try:
        other: SomePart = make(mine) if make else build(mine, cls)
    except (OSError, MemoryError):
        raise
    except InputError as error:
        raise InputError(
            f"a {cls.__name__} cannot be built again from its description: {error}"
            + (_KEYWORDS if isinstance(error.__cause__, Exception) else "")
        ) from error
    except Exception as error:  # a constructor outside this package may raise anything
        raise InputError(
            f"{cls.__name__} cannot be built again from its arguments {mine['init_args']}: {said(error)}{_KEYWORDS}"
        ) from error
    before, after = mine["init_args"], spec(other)["init_args"]
    if changed := [k for k in before if before[k] != after[k]]:
        for k in changed:
            if isinstance(value := getattr(part, k), Part):  # raises a shorter message about the inner part
                rebuild(value)
        listed = "; ".join(f"{k} is {before[k]!r}, and {after[k]!r} in one built with {before[k]!r}" for k in changed)
        raise InputError(
            f"{cls.__name__} does not keep its arguments as they were given: {listed}. Keep each as it is "
            f"(self.{changed[0]} = {changed[0]}), and what is made of it under another name"
        )
    return other


_KEYWORDS = ". Arguments that come through **kwargs, or positional-only ones, are not stored: name them in __init__"


SCRIPT = "__main__"  # module of classes that are defined in a script or notebook


def said(error: BaseException) -> str:
    """Return type, first line and place of an error raised in code outside this package."""
    frames, package = traceback.extract_tb(error.__traceback__), str(Path(__file__).parents[1])
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(package)]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}{place}"


def moved(path: str) -> str:
    """Return the current class path for one written by an earlier version."""
    module, dot, name = path.rpartition(".")
    return RENAMED.get(path, MOVED.get(module, module) + dot + name)


def first_name(data: Any) -> Any:
    """Return a `spec` with the oldest path of each class.

    Fingerprints hash these paths, so they do not change when classes move.
    """
    if isinstance(data, list):
        return [first_name(value) for value in data]
    if not isinstance(data, dict):
        return data
    out = {key: first_name(value) for key, value in data.items()}
    if isinstance(path := out.get("class_path"), str):
        module, dot, name = path.rpartition(".")
        back: dict[str, str] = {}
        for old, new in {**MOVED, **RENAMED}.items():
            back.setdefault(new, old)  # the oldest path is listed first
        out["class_path"] = back.get(path, back.get(module, module) + dot + name)
    return out


def class_path(name: str, base: type[Part], aliases: Mapping[str, str] | None = None) -> str:
    """Return the class path of a class that a config or an option names.

    name: a class path, which is returned as it is; the name of a public class of this package; or the name of any
    other loaded class, such as one of a module given by --import. A class given by its name is derived from ``base``.
    aliases: further names, mapped to names of these kinds. Raises InputError for an unknown name, with the nearest one,
    and for a name that several loaded classes have.
    """
    aliases = aliases or {}
    name = aliases.get(name, name)
    if "." in name:
        return name
    public = getattr(sys.modules[PACKAGE], name, None)
    if inspect.isclass(public) and issubclass(public, base):
        return f"{PACKAGE}.{name}"
    loaded = _loaded(base)
    found = sorted(path for path in loaded if path.rpartition(".")[2] == name)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"several loaded classes are called {name}; give a class path: {', '.join(found)}")
    names = list(dict.fromkeys([*aliases, *sorted(path.rpartition(".")[2] for path in loaded)]))
    raise InputError(
        f"there is no {base.__name__} {name!r}.{nearest(name, names)} There are {', '.join(names)}; for a class of "
        "your own, import its module with --import MODULE",
        value=name,
        nearest=closest(name, names),
    )


def _loaded(base: type[Any]) -> set[str]:
    """Return the class paths of the loaded classes derived from ``base``, except abstract and local classes."""
    paths = set[str]()
    for cls in base.__subclasses__():
        paths |= _loaded(cls)
        reached = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
        if reached and not inspect.isabstract(cls):
            paths.add(f"{cls.__module__}.{cls.__name__}")
    return paths


def build(data: dict[str, Any], base: type[SomePart]) -> SomePart:
    """Build a part from its `spec` and check that it is a ``base``.

    A class is taken from this package or from a module that is already imported: reading a file never imports code that
    its reader did not name, and never calls a class that is not a `Part`.

    Raises InputError for other data, unknown classes, modules that are not loaded, changed files, and constructors that
    fail.
    """
    path, arguments = (data.get("class_path"), data.get("init_args")) if isinstance(data, dict) else (None, None)
    if not isinstance(path, str) or not isinstance(arguments, dict) or not isinstance(data.get("files", {}), dict):
        raise InputError(f"{data!r:.300} is not a class_path with init_args")
    path = moved(path)
    arguments = {ARGUMENTS.get(path, {}).get(name, name): value for name, value in arguments.items()}
    module_name, _, name = path.rpartition(".")
    if module_name.split(".")[0] == PACKAGE:
        try:
            importlib.import_module(module_name)
        except (ModuleNotFoundError, ValueError):
            raise InputError(f"this version has no class {path}") from None
    if module_name not in sys.modules:
        raise InputError(
            f"the class {path} is in a module that is not loaded. If you trust it, import it first "
            f"(--import {module_name} on the command line)."
        )
    cls = getattr(sys.modules[module_name], name, None)
    if cls is None and module_name == SCRIPT:
        raise InputError(
            f"the file names the class {path}, which was defined in a script: no other program finds it. Put {name} "
            "into a module, import it in the script, and train again"
        )
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        names = [n for n, c in vars(sys.modules[module_name]).items() if inspect.isclass(c) and issubclass(c, base)]
        raise InputError(f"{path} is no {base.__name__}.{nearest(name, names)}")
    if lines := changed({"class_path": path, "files": data.get("files", {})}):
        raise InputError("; ".join(lines))
    try:
        return cls(**{name: _built(value) for name, value in arguments.items()})
    except (InputError, OSError, MemoryError):
        raise
    except TypeError as error:
        takes = list(_defaults(cls))
        unknown = [name for name in arguments if name not in takes]
        hint = f".{nearest(unknown[0], takes)} It takes: {', '.join(takes)}" if unknown else ""
        raise InputError(f"{path} cannot be built from {arguments!r:.300}: {error!s:.300}{hint}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} cannot be built from {arguments!r:.300}: {said(error):.300}") from error
