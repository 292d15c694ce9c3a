"""The documentation: its Python runs, its YAML parses, what it names exists, docstrings become what they should."""

import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from lightning_tdisent.cli import parser

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *sorted(ROOT.glob("e*/README.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


WITH_PYTHON = [page for page in PAGES if page.parent == ROOT / "docs" and blocks(page, "python")]


@pytest.fixture
def conf():
    """The functions of docs/conf.py."""
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
@pytest.mark.usefixtures("own_metrics")
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, digits, monkeypatch):
    """As one module, whose classes can be built again, with 2 steps for each training."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page, "python"):
        code = re.sub(r"(\b(?:max_steps|steps)=)\d+", r"\g<1>2", block)
        exec(compile(code, str(page), "exec"), vars(module))  # noqa: S102


def test_python_is_on_the_pages_that_promise_it():
    assert {"concepts", "extending", "quickstart-python"} <= {page.stem for page in WITH_PYTHON}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)
    for target in re.findall(r"\]\(([^)\s#,]+)[^),]*\)", text):
        if "://" not in target and not target.startswith("_api/"):  # which is generated
            assert (page.parent / target).exists(), target
    for file in re.findall(
        r"(?<![\w/])(?:experiments|examples|tests|benchmarks|docs|data)/[\w/.-]+\.(?:yaml|py|md|png)", text
    ):
        assert (ROOT / file).exists(), file
    commands = parser().get_default("commands")
    for name in re.findall(r"^    (?:tdisent|python -m lightning_tdisent) (\w+)", text, re.MULTILINE):
        assert name in commands


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=lambda page: page.stem)
def test_every_page_is_in_the_table_of_contents(page):
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    tables = "\n".join(re.findall(r"^```{toctree}\n(.*?)^```", index, re.DOTALL | re.MULTILINE))
    listed = re.findall(r"^([\w-]+)$", tables, re.MULTILINE)
    assert page.stem == "index" or page.stem in listed


def test_links_are_adapted_to_where_a_page_is_in_the_site(conf):
    def seen(text, folder, to):
        return conf.adapted(text, ROOT / folder, ROOT / to)

    assert seen("[a](../experiments/README.md#x)", "docs", "docs") == "[a](_copied/results.md#x)"
    assert seen("![a](digits/fleets.png)", "experiments", "docs/_copied") == "![a](../../experiments/digits/fleets.png)"
    assert seen("[a](docs/fleet.md)", ".", "docs/_copied") == "[a](../fleet.md)"
    assert seen("[a](https://b.c/d.md)", ".", "docs") == "[a](https://b.c/d.md)"
    assert seen("[a](experiments)", ".", "docs") == "a"


@pytest.mark.parametrize(
    ("docstring", "rst"),
    [
        ("Return |x|*.", ["Return \\|x\\|\\*."]),
        ("See `UNet`.", ["See :py:obj:`UNet <lightning_tdisent.UNet>`."]),
        ("See `rows` and ``S``.", ["See ``rows`` and ``S``."]),
        ("1.", ["\\1."]),
        ("T: levels, at\n    least 1. S: rows; other: not an argument.", [
            "- **T**: levels, at least 1.", "- **S**: rows; other: not an argument."
        ]),
        ("As in\n\n    a = b", ["As in", "", "::", "", "    a = b"]),
    ],
)  # fmt: skip
def test_docstrings_become_paragraphs_and_lists_of_arguments(docstring, rst, conf):
    def documented(T, S):
        pass

    lines = docstring.splitlines()
    conf.convert_docstring(None, "function", "documented", documented, None, lines)
    while lines[-1] == "":
        lines.pop()
    assert lines == rst


def test_arguments_of_a_base_are_described_with_those_of_a_class(conf):
    from lightning_tdisent import DDIM, SingleState

    for cls, own, inherited in ((DDIM, None, "steps"), (SingleState, "expert", "clip_norm")):
        lines = inspect.cleandoc(cls.__doc__).splitlines()
        conf.convert_docstring(None, "class", cls.__name__, cls, None, lines)
        names = re.findall(r"(?m)^- \*\*([\w\\, ]+)\*\*", "\n".join(lines))
        names = [name for item in names for name in item.replace("\\", "").split(", ")]
        assert inherited in names
        assert own is None or names.index(own) < names.index(inherited)
        assert len(names) == len(set(names))
