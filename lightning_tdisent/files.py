"""Names of files, and files that are seen under their names when all of them is on the disk, or never."""

import argparse
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lightning_tdisent.errors import Halted, InputError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")  # $NAME and ${NAME}
_PREFIX = re.compile(r"(?:-{1,2}[\w.-]+=)?([\w.*-]+=)?(?:shared:)?")  # of a word such as --set data.path=~/d
PROSE = ("title", "notes")  # keys of YAML files whose text is no path
PATHS = ("path", "run", "warm_start", "index", "mask", "source", "weights", "file", "folder")  # keys that name files


def expand(text: str, where: str = "", braces: bool = True) -> str:
    """Return a path with its leading ``~`` and each ``$NAME`` and ``${NAME}`` replaced.

    Raises InputError if one of them has no value. The name of something that exists is returned as it is, and so is
    the part of a path that exists. A URL ``file://PATH`` is the path itself. where: the option or the file and key, for
    the message. braces: whether ``${NAME}`` is a variable, and not left to OmegaConf.
    """
    text = text.removeprefix("file://")
    if not (text.startswith("~") or _VARIABLE.search(text)) or os.path.lexists(text):
        return text
    place, there = f"{where}: " if where else "", "" if text.startswith("~") else text
    while there and not os.path.lexists(there):
        there = there.rpartition("/")[0]

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if match[2] and not braces:
            return match[0]
        if name not in os.environ:
            raise InputError(f"{place}{text}: the environment variable {name} is not set")
        return os.environ[name]

    found = there + _VARIABLE.sub(value, text[len(there) :])
    found = found if there else os.path.expanduser(found)
    if found.startswith(("~/", "~\\")) or found == "~" or (found.startswith("~") and "/" in found):
        raise InputError(f"{place}{text}: there is no home folder {found.partition('/')[0]}")
    return found


def expand_word(word: str, braces: bool = True) -> str:
    """Expand the path in a word of a command line, which may follow ``--option=``, ``key=`` or both.

    The ``${..}`` of ``key=`` is OmegaConf's, and so are all unless ``braces``.
    """
    match = _PREFIX.match(word)
    prefix, key = (match[0], match[1]) if match else ("", None)
    where = prefix.rstrip("=").rpartition("=")[2] or ""
    return prefix + expand(word[len(prefix) :], where, braces and not key)


def expand_all(data: Any, where: str = "", key: str = "") -> Any:
    """Expand the paths among the values of nested dicts and lists (a copy), and of namespaces (in place).

    What stands under a key of `PROSE` is no path. where: the file or command that the data come from, for messages.
    """
    if isinstance(data, str):
        return expand(data, f"{where}: {key}".strip(": "))
    if isinstance(data, list):
        return [expand_all(value, where, key) for value in data]
    if isinstance(data, argparse.Namespace):
        vars(data).update(expand_all(vars(data), where, key))
        return data
    if isinstance(data, dict):
        return {k: v if k in PROSE else expand_all(v, where, f"{key}.{k}" if key else str(k)) for k, v in data.items()}
    return data


def absolute_paths(data: Any, key: str = "") -> Any:
    """Return nested dicts and lists with the relative paths of what exists made absolute, for use from elsewhere.

    A path is a string under one of the keys `PATHS`, or under one that ends with ``_path``, ``_dir`` or ``_file``.
    """
    if isinstance(data, dict):
        return {k: absolute_paths(v, str(k)) for k, v in data.items()}
    if isinstance(data, list):
        return [absolute_paths(v, key) for v in data]
    named = key in PATHS or key.endswith(("_path", "_dir", "_file"))
    return os.path.abspath(data) if named and isinstance(data, str) and data and os.path.exists(data) else data


def repeated_keys(text: str | bytes) -> list[str]:
    """Return the keys that a mapping of YAML has twice, as ``line N: KEY``: a parser takes the last in silence."""
    import yaml  # not for the help

    out, seen = list[tuple[int, str]](), set[int]()
    nodes: list[Any] = [yaml.compose(text)]
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            names = [str(key.value) for key, _ in node.value]
            out += [
                (key.start_mark.line + 1, names[i]) for i, (key, _) in enumerate(node.value) if names[i] in names[:i]
            ]
            nodes += [value for _, value in node.value]
    return [f"line {line}: {name}" for line, name in sorted(out)]


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a file beside its target, which is fsynced and renamed over it at the end; raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file, and its folder if need be; raises `Halted`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as stream:
            stream.write(content)
    except OSError as error:
        raise Halted(f"{path}: cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
