"""Every benchmark runs at a toy size and prints the results that benchmarks/README.md documents for it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("[!_]*.py"))


def documented(script):
    """Return the names of the results in the section of a script: those with ``...`` in place of a value."""
    sections = re.split(r"(?m)^## ", (FOLDER / "README.md").read_text(encoding="utf-8"))
    (section,) = [text for text in sections if text.startswith(f"{script}: ")]
    return [name for line in re.findall(r"(?m)^    RESULT (.*)", section) for name in re.findall(r"(\w+)=\.\.\.", line)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_runs_and_ends_with_the_documented_results(script, tmp_path):
    command = [sys.executable, str(script), "--toy"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"RESULT( \w+=[-+.\w]+)+", last)
    values = dict(pair.split("=") for pair in last.split()[1:])
    assert [*values] == documented(script.name)
    assert all(float(value) > -1 for value in values.values())  # not NaN
    assert "hardware: " in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_readme_has_a_section_for_each_script_and_for_no_other():
    named = re.findall(r"(?m)^## (\w+\.py):", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(named) == [script.name for script in SCRIPTS]
