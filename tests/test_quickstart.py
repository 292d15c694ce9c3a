"""The first study from an installed wheel, in a folder that holds nothing."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SINGLE = ("max_steps=2", "val_check_interval=1", "limit_val_batches=1", "callbacks=[]")
FEW = [f"--runs.{run}.set.trainer.{option}" for run in ("baseline", "reduced", "experts") for option in SINGLE]
FEW += [
    f"--runs.fleet.{key}"
    for key in (
        "budget.images=1024", "budget.rule=uniform", "start.shared.images=128",
        "start.shared.set.trainer.val_check_interval=1", "set.trainer.val_check_interval=1",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy so that nothing is written here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and ("/" not in name or name.startswith(("lightning_tdisent/", "experiments/"))):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(build, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_has_the_configs_of_the_experiments_and_their_bytes(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {n: archive.read(n) for n in archive.namelist() if "/experiments/" in n}
    here = {f"lightning_tdisent/{f.relative_to(ROOT)}": f.read_bytes() for f in (ROOT / "experiments").rglob("*.yaml")}
    assert found == here


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", site, wheel]
    subprocess.run(install, check=True)
    words = [sys.executable, "-m", "lightning_tdisent", "quickstart", *FEW]
    place = {"cwd": work, "env": {**os.environ, "PYTHONPATH": str(site)}}
    done = subprocess.run(words, **place, capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout  # the config of the wheel, not of a checkout
    assert sorted(p.name for p in work.iterdir()) == ["data", "runs"]
    rows = json.loads((work / "runs/quickstart/results.json").read_text(encoding="utf-8"))
    assert [row["networks"] for row in rows[:5]] == [1, 1, 1, 8, 8]
    assert (work / "runs/quickstart/report.html").stat().st_size > 10_000
