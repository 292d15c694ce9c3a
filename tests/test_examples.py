"""Every example runs in a few steps and writes the pictures that it says; the README shows the first one."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from lightning_tdisent import load_model
from lightning_tdisent.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SIZE = (16 * 9 + 1, 4 * 9 + 1)  # of a picture of 64 digits
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, digits, monkeypatch):
    """Run in an empty folder with the data, and train for a few steps."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    for name, value in {"STEPS": "4", "MPLBACKEND": "Agg", "PL_GLOBAL_SEED": "0", "PL_SEED_WORKERS": "0"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(name):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def size_of(file):
    with Image.open(file) as image:
        return image.size


def test_train_and_sample():
    run("train_and_sample.py")
    assert size_of("digits.png") == SIZE


def test_own_network_is_read_by_the_commands_too(elsewhere, monkeypatch):
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    run("own_network.py")
    model = load_model("runs/own_network")
    (card,) = model.cards
    assert (card.network["class_path"], card.steps, card.weights) == ("own_network.Pyramid", 4, "ema")
    assert model.rows == [*range(1, 9)]
    assert size_of("own_network.png") == SIZE
    words = ["sample", "runs/own_network", "--import", "own_network", "--seeds", "0:1", "--sampler", "dpm"]
    assert main([*words, "--out", "images"]) == 0
    with Image.open("own_network.png") as many, Image.open("images/000000.png") as one:
        assert one.tobytes() == many.crop((1, 1, 9, 9)).tobytes()


def test_compose_by_hand(capsys):
    run("compose_by_hand.py")
    assert "4 experts, 1,024 images seen by all of them" in capsys.readouterr().out
    model = load_model("runs/by_hand/composite")
    cards = model.cards
    assert [card.rows for card in cards] == [[1], [2], [3], [4]]
    assert [expert.rows for expert in model.experts] == [[1], [2], [3], [4]]
    assert size_of("by_hand.png") == SIZE


def cells(kind):
    content = json.loads((EXAMPLES / "digits.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_the_notebook():
    space = {"__name__": "notebook"}
    for cell in cells("code"):
        exec(compile("".join(cell["source"]), "digits.ipynb", "exec"), space)  # noqa: S102
    assert space["images"].shape == (64, 1, 8, 8)
    assert space["module"].images_seen == 4 * 64


def test_the_notebook_is_small_and_its_outputs_are_pictures():
    assert (EXAMPLES / "digits.ipynb").stat().st_size < 150_000
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_the_readme_shows_the_first_example():
    shown = re.search(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    script = (EXAMPLES / "train_and_sample.py").read_text(encoding="utf-8").split('"""\n', 1)[1]
    default = re.search(r'steps = int\(os.environ.get\("STEPS", "(\d+)"\)\)\n', script)
    script = script.replace("import os\n\n", "").replace(default[0], "").replace("=steps", f"={default[1]}")
    assert shown.strip() == script.strip()


def test_every_example_is_listed():
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")}
