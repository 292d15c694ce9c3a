"""Sphinx configuration; `make docs` builds the site offline into `docs/_build`.

Pages are Markdown (MyST). The API pages are made from the docstrings of the public names. Markdown files outside of
`docs` that belong to the site are copied into it, and links between all of them are adapted.
"""

import inspect
import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import lightning_tdisent  # noqa: E402

project = "lightning_tdisent"
author = "the developers of lightning_tdisent"
copyright = f"{author}; Apache-2.0"
version = release = lightning_tdisent.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
highlight_language = "none"
html_theme = "furo"
html_title = "lightning_tdisent"
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # of Lightning's and torch's hooks, whose text refers to their own sites
python_maximum_signature_line_length = 88

# --- API pages: a page for each room of the package -----------------------------------------------------------------

API = DOCS / "_api"
TITLES = {
    "diffusion": "Tables, schedules and objectives",
    "networks": "Networks",
    "priors": "Priors",
    "sampling": "Denoisers, samplers and likelihoods",
    "models": "Experts, composites and truncated models",
    "lit": "Lightning modules, data and callbacks",
    "metrics": "Protocols",
    "images": "Images",
    "errors": "Errors",
}
# documented with their full names, since they are not exported by the package itself
ALSO = {
    "diffusion.process": "noise Terms transition step posterior",
    "lit.callbacks.checkpoint": "Checkpoint",
    "lit.callbacks.guard": "Guard",
    "lit.callbacks.pictures": "Pictures",
    "lit.callbacks.quality": "SampleQuality",
    "lit.callbacks.weights": "EMA Export",
    "metrics.protocol": "Protocol",
    "images": "to_uint8 from_uint8 grid",
    "errors": "InputError Halted NotFinite Unavailable",
}


def write(path, text):
    """Write a generated page, if it has changed: Sphinx reads again what is newer."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_api(_):
    """Write a page for each room, with its public names in the order of ``lightning_tdisent._HOMES``."""
    rooms = {}
    for homes, full in ((lightning_tdisent._HOMES, False), (ALSO, True)):
        for home, names in homes.items():
            rooms.setdefault(home.split(".")[0], []).extend(
                f"{home}.{name}" if full else name for name in names.split()
            )
    for room, names in rooms.items():
        lines = [f"# {TITLES.get(room, room)}", ""]
        for name in names:
            full = f"lightning_tdisent.{name}"
            directive = "autoclass" if inspect.isclass(resolve(full)) else "autofunction"
            options = ["   :members:", "   :show-inheritance:"] if directive == "autoclass" else []
            lines += ["```{eval-rst}", f".. {directive}:: {full}", *options, "```", ""]
        write(API / f"{room}.md", "\n".join(lines))
    for old in {path.stem for path in API.glob("*.md")} - rooms.keys():
        (API / f"{old}.md").unlink()


def resolve(path):
    """Return the object of a dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def skip_hooks(app, what, name, obj, skip, options):
    """Leave out methods that Lightning calls: they are no part of what a user calls."""
    from lightning.pytorch import Callback, LightningModule
    from torch.nn import Module

    return skip or name in {*dir(LightningModule), *dir(Callback)} - {*dir(Module)}


# --- docstrings, which are plain text with `code`, to reStructuredText ----------------------------------------------

CODE = re.compile(r"(``.+?``|`[^`]+`)")


def convert_docstring(app, what, name, obj, options, lines):
    """Replace the lines of a docstring: paragraphs, literal blocks, and arguments as a list, those of bases as well."""
    known, described, out = parameters(obj), set(), []
    for text in texts("\n".join(lines)):
        if text.startswith("    "):
            out += ["::", "", *text.splitlines(), ""]
            continue
        first, items = arguments_in(text, known)
        out += [guard(escape(first)), ""] if first else []
        out += [*(bullet(*item) for item in items), ""] if items else []
        described |= {label for label, _ in items}
    for base in obj.__mro__[1:] if inspect.isclass(obj) else ():
        if base.__module__.startswith("lightning_tdisent"):
            items = [
                item
                for text in texts(inspect.cleandoc(base.__doc__ or ""))
                for item in arguments_in(text, parameters(base))[1]
            ]
            new = [item for item in items if item[0] not in described and {*item[0].split(", ")} <= known]
            out += [f"Of ``{base.__name__}``:", "", *(bullet(*item) for item in new), ""] if new else []
            described |= {label for label, _ in new}
    lines[:] = out


def texts(docstring):
    """Return the paragraphs of a dedented docstring, each as one line, and its indented blocks as they are."""
    blocks = re.split(r"\n(?:[ \t]*\n)+", docstring)
    indented = [all(row.startswith("    ") for row in block.splitlines()) for block in blocks]
    joined = [block if code else " ".join(block.split()) for block, code in zip(blocks, indented, strict=True)]
    return [text for text in joined if text]


def parameters(obj):
    """Return the names of the arguments of a function, or of a constructor, through ``**kwargs`` to its bases."""
    functions = (
        [vars(base)["__init__"] for base in obj.__mro__ if "__init__" in vars(base)] if inspect.isclass(obj) else [obj]
    )
    names = set()
    for function in functions:
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            break
        found = inspect.signature(function).parameters
        names |= {*found}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
            break
    return names - {"self", "cls"}


def arguments_in(text, known):
    """Return what a paragraph says first, and the arguments that it describes as ``name: ..``, each (names, text)."""
    parts, start = [], 0
    for match in re.finditer(r"(?:^|(?<=[.;] ))(\w+(?:, \w+)*): ", text):
        if {*match[1].split(", ")} <= known:
            parts.append(text[start : match.start()])
            start = match.start()
    first, *items = [part.strip() for part in (*parts, text[start:])]
    return first, [tuple(item.removesuffix(";").split(": ", 1)) for item in items]


def bullet(names, text):
    """Return an argument as a line of a list."""
    return f"- **{escape(names)}**: {escape(text)}"


def guard(text):
    """Escape what would begin a list: ``1.`` or ``-``."""
    return re.sub(r"^(?=\w{1,5}[.)](?: |$)|[-+*] )", r"\\", text)


def escape(text):
    """Return a line of plain text with `code` as reStructuredText; public names become links."""
    parts, out = CODE.split(text), ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            out += re.sub(r"([\\*_|`])", r"\\\1", part)
            continue
        code = part.strip("`")
        linked = not part.startswith("``") and code.split(".")[0] in lightning_tdisent._NAMES
        role = f":py:obj:`{code} <lightning_tdisent.{code}>`" if linked else f"``{code}``"
        before, after = parts[i - 1][-1:].isalnum(), parts[i + 1][:1].isalnum()
        out += "\\ " * before + role + "\\ " * after
    return out


# --- Markdown outside of docs, and links ------------------------------------------------------------------------------

COPIES = DOCS / "_copied"
OUTSIDE = {
    "readme": "README.md",
    "examples": "examples/README.md",
    "results": "experiments/README.md",
    "data": "data/README.md",
    "benchmarks": "benchmarks/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
}
PAGES = {(ROOT / file).resolve(): COPIES / f"{page}.md" for page, file in OUTSIDE.items()}
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def copy_outside(_):
    """Copy the Markdown files that belong to the site."""
    for page, file in OUTSIDE.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        write(COPIES / f"{page}.md", adapted(text, (ROOT / file).parent, COPIES))


def adapted(text, folder, to):
    """Return Markdown with its relative links, seen from ``folder``, as they are seen from ``to`` in the site."""

    def replace(match):
        mark, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (folder / target).resolve()
        if ":" in target:
            return match[0]
        if path.is_dir():
            return words
        return f"{mark}[{words}]({os.path.relpath(PAGES.get(path, path), to)}{anchor})"

    return LINK.sub(replace, text)


def adapt_source(app, page, source):
    """Adapt the links of a page of docs to files outside of it."""
    folder = (DOCS / page).parent
    if folder not in (COPIES, API):
        source[0] = adapted(source[0], folder, folder)


def setup(app):
    """Connect the functions above."""
    app.connect("builder-inited", write_api)
    app.connect("builder-inited", copy_outside)
    app.connect("source-read", adapt_source)
    app.connect("autodoc-skip-member", skip_hooks)
    app.connect("autodoc-process-docstring", convert_docstring, priority=100)
