"""Names of files, and files that are seen under their names when all of them is on the disk, or never."""

import argparse
import contextlib
import errno
import os
import re
import secrets
import shlex
import shutil
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any

from lightning_tdisent.digests import digest
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.processes import began, host

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")  # $NAME and ${NAME}
_PREFIX = re.compile(r"(?:-{1,2}[\w.-]+=)?([\w.*-]+=)?(?:shared:)?")  # of a word such as --set data.path=~/d
URL = re.compile(r"[A-Za-z][\w+.-]+:{1,2}/|[A-Za-z][\w+.-]+::")  # also one that a Path has taken a slash of
PROSE = ("title", "notes")  # keys of YAML files whose text is no path
PATHS = ("path", "run", "warm_start", "index", "mask", "source", "weights", "file", "folder")  # keys that name files
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{16}\.tmp$")  # of `temporary`: host, pid, start
_DAY = 86400.0
_REMOVE = "nothing is written through a link. Remove it, or choose another folder"

Guard = Callable[[bool], None]  # raises `Lost`; given true, it only says what it knows without asking a disk or network
_guards: dict[str, list[Guard]] = {}  # by folder: what is asked before each write below it


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


def typed(*words: str | Path) -> str:
    """Return a command of this program as it is typed into a shell."""
    return f"python -m lightning_tdisent {shlex.join(map(str, words))}"


def _url_in(text: str) -> str:
    """Return the URL that a path is, with the slash that a Path takes of it; empty for a path."""
    if not URL.match(text):
        return ""
    return text if "://" in text else text.replace(":/", "://", 1)


def input_path(path: str | Path, option: str) -> Path:
    """Return the path of a file or folder that is read; raise InputError for a URL and for a name that is not plain."""
    check_name(str(path), option)
    if (url := _url_in(str(path))) and not url.startswith("file:"):
        raise InputError(f"{option}: {url}: is read from a disk of this machine; copy it here, and name the copy")
    return Path(path)


def output_path(path: str | Path, option: str = "out") -> Path:
    """Return the path of an output; raise InputError for a URL, which would become a folder called ``s3:`` here.

    Raises it for a name that is not plain, too (`check_name`). option: the option or key that named it.
    """
    text = str(path).removeprefix("file://")
    check_name(text, option)
    if url := _url_in(text):
        raise InputError(
            f"{option}: {url}: this output is written to a disk of this machine, not to a URL. Name a local folder or "
            "file, and copy it when it is whole"
        )
    return Path(text)


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
        text = expand(data, f"{where}: {key}".strip(": "))
        if _names_file(key.rpartition(".")[2]):
            check_name(text, f"{where}: {key}".strip(": "))
        return text
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
    named = _names_file(key) and isinstance(data, str) and data and os.path.exists(data)
    return os.path.abspath(data) if named else data


def _names_file(key: str) -> bool:
    return key in PATHS or key.endswith(("_path", "_dir", "_file"))


def is_plain(name: str) -> bool:
    """Return whether a name is UTF-8 and one line: without control characters, line separators and lone surrogates."""
    return name.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)


def check_name(path: str | Path, where: str = "") -> None:
    """Raise InputError for a path that is not `is_plain`, or that this process would give to the system otherwise.

    where: the option or the file and key, for the message.
    """
    text, place = os.fspath(path), f"{where}: " if where else ""
    if not is_plain(text):
        raise InputError(
            f"{place}{text!a}: a path is UTF-8 without control characters such as a line break. Rename it, or choose "
            "another one"
        )
    if not text.isascii():
        check_utf8_mode(f"{place}{text!a}")


def check_utf8_mode(what: str) -> None:
    """Raise InputError where Python reads and names files in another encoding than UTF-8; what: not ASCII."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise InputError(
            f"{what}: files and their names are UTF-8, but this Python takes them for {encoding}. Start it with "
            "-X utf8, or set PYTHONUTF8=1"
        )


MOST_TEXT = 4 << 20  # bytes of a file of YAML
MOST_NODES, DEEPEST = 100_000, 100  # values in it, its aliases written out, and levels of nesting


def compose_yaml(text: str | bytes) -> Any:
    """Return the nodes of YAML; raises yaml.YAMLError for aliases that expand without bounds, and for deep nesting."""
    import yaml  # not for the help

    if len(text) > MOST_TEXT:
        raise yaml.YAMLError(f"has {len(text):,} bytes, at most {MOST_TEXT:,} are read")
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (RecursionError, UnicodeDecodeError, ValueError) as error:
        raise yaml.YAMLError(f"cannot be parsed: {str(error)[:200] or type(error).__name__}") from None
    sizes = dict[int, int]()  # of nodes, with all below them

    def size(node: Any, depth: int) -> int:
        if depth > DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {DEEPEST} levels, or an alias within itself")
        if id(node) not in sizes:
            inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
            inner = [] if isinstance(node, yaml.ScalarNode) else inner
            sizes[id(node)] = 1 + sum(size(one, depth + 1) for one in inner)
        return sizes[id(node)]

    if root is not None and (found := size(root, 0)) > MOST_NODES:
        raise yaml.YAMLError(f"has {found:,} values once its aliases are written out, at most {MOST_NODES:,} are read")
    return root


def load_yaml(text: str | bytes, where: str) -> Any:
    """Return the data in YAML; raises InputError for text that is not valid, or expands without bounds."""
    import yaml

    try:
        compose_yaml(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: cannot be read: not valid YAML: {' '.join(str(error).split())[:400]}") from None


def repeated_keys(text: str | bytes) -> list[str]:
    """Return the keys that a mapping of YAML has twice, as ``line N: KEY``: a parser takes the last in silence."""
    import yaml

    out, seen = list[tuple[int, str]](), set[int]()
    nodes: list[Any] = [compose_yaml(text)]
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            names = set[str]()
            for key, value in node.value:
                out += [(key.start_mark.line + 1, str(key.value))] * (str(key.value) in names)
                names.add(str(key.value))
                nodes.append(value)
    return [f"line {line}: {name}" for line, name in sorted(out)]


@contextlib.contextmanager
def guarded(folder: str | Path, check: Guard) -> Iterator[None]:
    """Have ``check`` asked before each write below a folder, within the context; it raises `Lost` to forbid one."""
    checks = _guards.setdefault(os.path.abspath(folder), [])
    checks.append(check)
    try:
        yield
    finally:
        checks.remove(check)


def ask_guards(path: str | Path, quick: bool = False) -> None:
    """Raise what a guard of a folder above a path raises: it may not be written, or removed, any more.

    quick: cheap enough for every step of a training, and enough to end it soon.
    """
    for folder in Path(os.path.abspath(path)).parents:
        for check in list(_guards.get(str(folder), ())):
            check(quick)


@contextlib.contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yield a stream to a temporary file that takes the name ``path`` at the end; raises OSError.

    What has that name before is replaced, also a link, and never written to. sync: whether the file is to survive a
    loss of power. The guards of the folder are asked before the file is opened, and before it takes its name.
    """
    output_path(path)
    ask_guards(path)
    beside = temporary(path)
    try:
        with beside.open("xb") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        ask_guards(path)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file, and its folder if need be; raises `Halted`."""
    path = output_path(path)  # before its folder is made
    try:
        ask_guards(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as stream:
            stream.write(content)
    except OSError as error:
        raise Halted(f"{path}: cannot be written: {error.strerror or error}") from error


def temporary(path: Path) -> Path:
    """Return a new name beside ``path`` that nobody can guess: ``.NAME.HOST-PID-BEGAN-RANDOM.tmp``.

    Create it with mode ``x``, which follows no link. `remove_orphans` removes it once this process has ended.
    """
    check_name(path)
    owner = f"{_host_mark()}-{os.getpid()}-{began(os.getpid())}"
    return path.with_name(f".{path.name[:40]}.{owner}-{secrets.token_hex(8)}.tmp")  # at most 255 bytes


def remove_orphans(folder: Path, name: str = "*") -> None:
    """Remove the `temporary` files and folders that no process will finish, of files whose names match ``name``.

    Those of a process of this machine go when it has ended, and stay while it runs. Others go when they are a day old
    by the clock of their file system.
    """
    now: float | None = None
    for orphan in folder.glob(f".{name}.tmp"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            owner = _TEMPORARY.search(orphan.name)
            if owner and owner[1] == _host_mark():
                if str(began(int(owner[2]))) == owner[3]:
                    continue
            else:
                now = _time_of(folder) if now is None else now
                if now - orphan.lstat().st_mtime < _DAY:
                    continue
            if orphan.is_dir() and not orphan.is_symlink():
                shutil.rmtree(orphan, ignore_errors=True)
            else:
                orphan.unlink()


def _host_mark() -> str:
    return digest(host())[:8]


def _time_of(folder: Path) -> float:
    """Return the time by the clock of a file system; raises OSError where nothing can be written."""
    probe = temporary(folder / "clock")
    try:
        with probe.open("xb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise the OSError that keeps files from being made in a folder."""
    _time_of(folder)


def refuse_unwritable(folder: Path, remedy: str) -> None:
    """Raise InputError, before any work, for a folder that cannot be made or written to; remedy: what to do.

    A disk that is full is no reason: whatever is written next says so, and what is there may be gone on with.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}") from None


def refuse_link(path: Path) -> None:
    """Raise InputError for a symbolic link where a file is to be written."""
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link to {os.readlink(path)}; {_REMOVE}") from None


def open_own(path: Path) -> FileIO:
    """Open a file to read and append to, such as a lock or a log; create it if it is not there.

    Raises InputError for a link and for a file with further names (hard links): what is written would go into a file
    that lies elsewhere. Raises OSError if it cannot be opened.
    """
    check_name(path)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        stream = FileIO(os.open(path, flags, 0o666), "a+")
    except OSError as error:
        refuse_link(path)
        raise error
    refuse_shared(stream, path)
    return stream


def refuse_shared(stream: IO[bytes], path: Path) -> None:
    """Close and refuse an open file that has further names (hard links), or is no plain file."""
    found = os.fstat(stream.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return
    stream.close()
    kind = f"a file of {found.st_nlink} names (hard links)" if stat.S_ISREG(found.st_mode) else "not a plain file"
    raise InputError(f"{path}: is {kind}; {_REMOVE}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
