import configparser
import re
import subprocess
import sys
from importlib.metadata import distributions, entry_points
from pathlib import Path

import pytest

import lightning_tdisent
from lightning_tdisent.cli import parser

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "lightning", "diffusers", "torchmetrics", "webdataset", "matplotlib", "numpy", "rich", "yaml")


def modules_after(code: str) -> set[str]:
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_import_and_help_load_nothing_heavy():
    assert modules_after("import lightning_tdisent").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "argv", [["--help"], *([c, "--help"] for c in ("sample", "compose", "evaluate", "report", "study"))]
)
def test_help_loads_nothing_heavy(argv):
    loaded = modules_after(f"from lightning_tdisent.cli import main; main({argv!r})")
    assert loaded.isdisjoint(HEAVY)


def test_the_console_command_is_the_module():
    ((_, script),) = [(e.name, e) for e in entry_points(group="console_scripts") if e.name == "tdisent"]
    assert script.value == "lightning_tdisent.__main__:command"
    words = [str(Path(sys.executable).with_name("tdisent")), "--version"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == lightning_tdisent.__version__


def test_every_command_has_help():
    text = parser().format_help()
    for command in ("fit", "validate", "test", "predict", "sample", "compose", "evaluate", "report", "study"):
        assert f"\n    {command} " in text


def test_every_public_name_resolves():
    for name in lightning_tdisent.__all__:
        assert getattr(lightning_tdisent, name) is not None
    with pytest.raises(AttributeError, match="Baselin"):
        lightning_tdisent.Baselin  # noqa: B018


def test_torchvision_is_not_installed():
    # with a CPU torch its import breaks torchmetrics and lightning
    assert "torchvision" not in {d.metadata["Name"].lower() for d in distributions()}


def test_constraints_fit_the_ranges_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==") for line in (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    wanted = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line for text in wanted for line in text.splitlines() if line and not line.startswith("#")]
    for requirement in map(Requirement, lines):
        if requirement.name == "lightning_tdisent":
            continue
        version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} does not admit the pinned {version}"
    lightning = next(r for r in map(Requirement, lines) if r.name == "lightning").specifier
    assert not any(lightning.contains(bad) for bad in ("2.6.2", "2.6.3", "2.6.5"))


UNSAFE = r"import pickle|pickle\.load|weights_only=False|load_state_dict\(.*strict=False"
UNSAFE += r"|(?<![\w.])eval\(|extractall|shell=True"


def test_no_unsafe_calls_in_the_package():
    for file in (ROOT / "lightning_tdisent").rglob("*.py"):
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if re.search(UNSAFE, line)]
        if file.name == "arrays.py":  # CIFAR-10 is distributed as pickles; this Unpickler resolves no class
            found.remove("import pickle")
            assert "class _BytesOnly(pickle.Unpickler)" in file.read_text(encoding="utf-8")
        assert not found, f"{file}: {found}"
    assert re.search(UNSAFE, "x = eval(text)")
    assert not re.search(UNSAFE, "model.eval()")
