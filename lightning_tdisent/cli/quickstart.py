"""The command `quickstart`: the first study, from an installed package alone."""

import argparse
import sys
from pathlib import Path

from lightning_tdisent.cli.evaluations import run_study, study_options
from lightning_tdisent.cli.terminal import Commands, command
from lightning_tdisent.errors import InputError

CONFIG = "digits/quickstart.yaml"
DATA = Path("data/digits")  # as the configs name it


def add_commands(commands: Commands) -> None:
    """Add the command."""
    q = command(
        commands, "quickstart", quickstart, "train, compose, sample and evaluate on real digit scans: 4 minutes",
        keys="lightning_tdisent.studies.plan",
    )  # fmt: skip
    study_options(q)


def quickstart(a: argparse.Namespace) -> None:
    """Write the digit shards to data/digits of the current folder if they are not there, and run the study."""
    from lightning_tdisent.data.digits import SPLITS, shard, write

    config = experiments() / CONFIG
    if not a.print_config and not all(shard(DATA, split).exists() for split in SPLITS):
        write(DATA)
    print(f"study --config {config}", file=sys.stderr if a.print_config else sys.stdout)
    a.config = [config, *a.config]
    run_study(a)


def experiments() -> Path:
    """Return the folder of the experiments: in the installed package, or in the checkout that holds it."""
    package = Path(__file__).parents[1]
    for folder in (package / "experiments", package.parent / "experiments"):
        if (folder / CONFIG).exists():
            return folder
    raise InputError(f"{package}: the configs of the experiments are missing; install the package again")
