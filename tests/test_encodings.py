"""Text is UTF-8 in any locale: every call that opens a text file or pipe names its encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for part in ("lightning_tdisent", "tests", "benchmarks", "data", "experiments", "examples")
           for path in sorted((ROOT / part).rglob("*.py"))]  # fmt: skip
FORMATS = ("tarfile", "zipfile", "Image", "Shards", "os")  # modules whose open does not open text


def is_text(mode: ast.expr | None) -> bool:
    """Return whether a mode opens text. A mode that is not a constant may be anything, and counts as bytes."""
    return mode is None or (
        isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwax+t")
    )


def unnamed(tree: ast.AST) -> list[int]:
    """Return the lines of calls that, by their arguments, read or write text in the encoding of the locale."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {word.arg: word.value for word in call.keywords}
        if "encoding" in given or None in given:
            continue
        function, words, of = call.func, call.args, ""
        name = getattr(function, "id", "")
        if isinstance(function, ast.Attribute):
            name, of = function.attr, getattr(function.value, "id", "")
        if name == "fdopen" or (name == "open" and (of == "io" or isinstance(function, ast.Name))):
            words = words[1:]  # the arguments after the file
        opens = name in ("open", "fdopen") and (name == "fdopen" or of not in FORMATS)
        if (
            (opens and is_text(given.get("mode", words[0] if words else None)))
            or (name == "read_text" and not words)
            or (name == "write_text" and len(words) < 2)
            or {"text", "universal_newlines"} & given.keys()
        ):
            lines.append(call.lineno)
    return lines


def test_the_check_sees_what_it_is_for():
    bad = ["open(p)", "p.open()", "p.open('a')", "open(p, 'w')", "p.read_text()", "p.write_text(s)",
           "run(w, text=True)",
           "os.fdopen(3)", "io.open(p)", "open(p, mode='r')"]  # fmt: skip
    good = ["open(p, 'rb')", "p.open('xb')", "tarfile.open(p)", "p.read_text(encoding='utf-8')", "Image.open(p)",
            "open(p, encoding='utf-8')", "p.read_bytes()", "run(w, encoding='utf-8')", "os.open(p, 0)",
            "bundle.open(name)", "system.open(path, 'rb')", "os.fdopen(3, 'rb')"]  # fmt: skip
    assert [word for word in bad + good if unnamed(ast.parse(word))] == bad


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_names_its_encoding(path):
    assert unnamed(ast.parse(path.read_bytes())) == []
