"""Paths, YAML within bounds, and atomic file writes: write to a temporary file, fsync, rename."""

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
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Any

from lightning_tdisent.digests import digest
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.processes import began, host

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")  # $NAME and ${NAME}
_PREFIX = re.compile(r"(?:-{1,2}[\w.* ,-]+=)?(?:shared:)?")  # before the path: --set.data.path=~/d
URL = re.compile(r"[A-Za-z][\w+.-]+:{1,2}/|[A-Za-z][\w+.-]+::")  # also after Path has reduced // to /
PROSE = ("title", "notes")  # keys of YAML files whose text is not a path
PATHS = ("path", "run", "warm_start", "index", "mask", "source", "weights", "file", "folder")  # keys of paths
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{16}\.tmp$")  # of `temporary`: host, pid, start
_DAY = 86400.0
_REMOVE = "nothing is written through a link. Remove it, or choose another folder"

Guard = Callable[[bool], None]  # (quick) -> raises `Lost`; if quick, avoids reads from a disk or network
_guards: dict[str, list[Guard]] = {}  # by folder: called before each write below it


def expand(text: str, where: str = "", braces: bool = True) -> str:
    """Return a path with its leading ``~`` and each ``$NAME`` and ``${NAME}`` replaced.

    Raises InputError if one of them has no value. A path that exists is returned unchanged, and so is the leading part
    of a path that exists. A URL ``file://PATH`` is replaced by its path.

    where: the option, or the file and key, for the message. braces: replace ``${NAME}``; if false, leave it to
    OmegaConf.
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
    """Return a command of this program, quoted for a shell."""
    return f"python -m lightning_tdisent {shlex.join(map(str, words))}"


def _url_in(text: str) -> str:
    """Return the URL in ``text``, with the second slash restored if Path removed it; empty if it is not a URL."""
    if not URL.match(text):
        return ""
    return text if "://" in text else text.replace(":/", "://", 1)


def input_path(path: str | Path, option: str) -> Path:
    """Return the path of an input file or folder. Raises InputError for a URL and for what `check_name` refuses."""
    check_name(str(path), option)
    if (url := _url_in(str(path))) and not url.startswith("file:"):
        raise InputError(f"{option}: {url}: is read from a disk of this machine; copy it here, and name the copy")
    return Path(path)


def output_path(path: str | Path, option: str = "out") -> Path:
    """Return the path of an output file or folder.

    Raises InputError for a URL, which would otherwise create a local folder called ``s3:``, and for a name refused by
    `check_name`. option: the option or key that named it, for the message.
    """
    text = str(path).removeprefix("file://")
    check_name(text, option)
    if url := _url_in(text):
        raise InputError(
            f"{option}: {url}: this output is written to a disk of this machine, not to a URL. Name a local folder or "
            "file, and copy the output when it is complete"
        )
    return Path(text)


def expand_words(words: Sequence[str], braces: bool = True) -> list[str]:
    """Expand the paths in the words of a command line, which ``--option=`` may precede.

    ``${..}`` is left to OmegaConf in the values of dotted options such as ``--set.data.path``, and everywhere if
    ``braces`` is false.
    """
    out, before = list[str](), ""
    for word in words:
        match = _PREFIX.match(word)
        prefix = match[0] if match else ""
        option = prefix.partition("=")[0] if "=" in prefix else before
        out.append(prefix + expand(word[len(prefix) :], option.lstrip("-"), braces and "." not in option))
        before = word if word.startswith("--") else ""
    return out


def expand_all(data: Any, where: str = "", key: str = "") -> Any:
    """Expand the paths among the values of nested dicts and lists (returns a copy) and namespaces (in place).

    Values under a key of `PROSE` are not paths. where: the file or command that the data come from, for messages.
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
    """Return nested dicts and lists with relative paths made absolute, for use from another working folder.

    A path is a string under one of the keys `PATHS`, or under a key that ends with ``_path``, ``_dir`` or ``_file``.
    Paths that do not exist stay as they are.
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
    """Return whether a name has no control characters, line or paragraph separators, or lone surrogates (not UTF-8)."""
    return name.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)


def check_name(path: str | Path, where: str = "") -> None:
    """Raise InputError for a path that is not `is_plain`, or that this process would not encode as UTF-8.

    where: the option, or the file and key, for the message.
    """
    text, place = os.fspath(path), f"{where}: " if where else ""
    if not is_plain(text):
        raise InputError(
            f"{place}{text!a}: a path is UTF-8 without control characters such as a line break. Rename it, or choose "
            "another path"
        )
    if not text.isascii():
        check_utf8_mode(f"{place}{text!a}")


def check_utf8_mode(what: str) -> None:
    """Raise InputError if Python's file system encoding is not UTF-8; what: the non-ASCII name or file concerned."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise InputError(
            f"{what}: files and their names are UTF-8, but this Python takes them for {encoding}. Start it with "
            "-X utf8, or set PYTHONUTF8=1"
        )


MOST_TEXT = 4 << 20  # maximum bytes of a YAML file
MOST_NODES, DEEPEST = 100_000, 100  # maximum values in it with aliases expanded, and levels of nesting


def compose_yaml(text: str | bytes) -> Any:
    """Return the root node of YAML.

    Raises yaml.YAMLError for text that cannot be parsed, and for more than `MOST_TEXT` bytes, `MOST_NODES` values
    (aliases expanded) or `DEEPEST` levels.
    """
    import yaml  # here, so that --help does not import it

    if len(text) > MOST_TEXT:
        raise yaml.YAMLError(f"has {len(text):,} bytes, at most {MOST_TEXT:,} are read")
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (RecursionError, UnicodeDecodeError, ValueError) as error:
        raise yaml.YAMLError(f"cannot be parsed: {str(error)[:200] or type(error).__name__}") from None
    sizes = dict[int, int]()  # by id of a node: number of nodes in it, itself included

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
    """Return the data in YAML.

    Raises InputError for text that is not valid or exceeds the bounds of `compose_yaml`; where: name of the file, for
    the message.
    """
    import yaml

    try:
        compose_yaml(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: cannot be read: not valid YAML: {' '.join(str(error).split())[:400]}") from None


def repeated_keys(text: str | bytes) -> list[str]:
    """Return the keys that a YAML mapping repeats, as ``line N: KEY``. A parser would silently use the last one."""
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
    """Call ``check`` before each write below ``folder`` inside the context; it raises `Lost` to forbid the write."""
    checks = _guards.setdefault(os.path.abspath(folder), [])
    checks.append(check)
    try:
        yield
    finally:
        checks.remove(check)


def ask_guards(path: str | Path, quick: bool = False) -> None:
    """Call the guards of all folders above ``path``; they raise `Lost` if it may not be written or removed any more.

    quick: use the check that is cheap enough for every training step and sufficient to stop the training soon.
    """
    for folder in Path(os.path.abspath(path)).parents:
        for check in list(_guards.get(str(folder), ())):
            check(quick)


@contextlib.contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yield a stream to a temporary file that replaces ``path`` atomically on success. Raises OSError.

    An existing file or link at ``path`` is replaced, never written to. sync: fsync the file and its folder, so that it
    survives a power loss. The guards of the folder are called before the file is opened and before it is renamed.
    """
    output_path(path)
    ask_guards(path)
    unfinished = temporary(path)
    try:
        with unfinished.open("xb") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        ask_guards(path)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file atomically, and create its folder if needed. Raises `Halted` if it cannot be written."""
    path = output_path(path)  # check it before creating its folder
    try:
        ask_guards(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as stream:
            stream.write(content)
    except OSError as error:
        raise Halted(f"{path}: cannot be written: {error.strerror or error}") from error


def temporary(path: Path) -> Path:
    """Return a new unguessable path in the folder of ``path``: ``.NAME.HOST-PID-BEGAN-RANDOM.tmp``.

    Open it with mode ``x``, which does not follow links. `remove_orphans` removes it once this process has ended.
    """
    check_name(path)
    owner = f"{_host_mark()}-{os.getpid()}-{began(os.getpid())}"
    return path.with_name(f".{path.name[:40]}.{owner}-{secrets.token_hex(8)}.tmp")  # at most 255 bytes


def remove_orphans(folder: Path, name: str = "*") -> None:
    """Remove the `temporary` files and folders that no process will finish, of files whose names match ``name``.

    Those created by a process of this machine are removed once the process has ended. Others are removed when they are
    a day old by the clock of their file system.
    """
    now: float | None = None
    for orphan in folder.glob(f".{name}.tmp"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            owner = _TEMPORARY.search(orphan.name)
            if owner and owner[1] == _host_mark():
                if str(began(int(owner[2]))) == owner[3]:
                    continue
            else:
                now = _file_system_time(folder) if now is None else now
                if now - orphan.lstat().st_mtime < _DAY:
                    continue
            if orphan.is_dir() and not orphan.is_symlink():
                shutil.rmtree(orphan, ignore_errors=True)
            else:
                orphan.unlink()


def _host_mark() -> str:
    return digest(host())[:8]


def _file_system_time(folder: Path) -> float:
    """Return the current time by the clock of the file system of a folder. Raises OSError if nothing can be written."""
    probe = temporary(folder / "clock")
    try:
        with probe.open("xb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError if files cannot be created in a folder."""
    _file_system_time(folder)


def refuse_unwritable(folder: Path, remedy: str) -> None:
    """Raise InputError for a folder that cannot be created or written to; call it before any work is done.

    remedy: what the user should do, for the message. A full disk is not refused: the next write reports it, and
    existing work in the folder may be resumed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}") from None


def refuse_link(path: Path) -> None:
    """Raise InputError if ``path``, which is to be written, is a symbolic link."""
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link to {os.readlink(path)}; {_REMOVE}") from None


def open_own(path: Path) -> FileIO:
    """Open a file for reading and appending, such as a lock or a log; create it if it does not exist.

    Raises InputError for a symbolic link and for a file with several hard links, since the data would be written to a
    file in another place. Raises OSError if it cannot be opened.
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
    """Raise InputError, and close the file, if it has several hard links or is not a regular file."""
    found = os.fstat(stream.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return
    stream.close()
    kind = f"a file of {found.st_nlink} names (hard links)" if stat.S_ISREG(found.st_mode) else "not a plain file"
    raise InputError(f"{path}: is {kind}; {_REMOVE}")


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that the file names in it survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
