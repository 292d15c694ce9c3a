"""The command `quickstart`: the first study, from an installed package alone."""

import argparse
from pathlib import Path

from lightning_tdisent.cli.models import run_study
from lightning_tdisent.cli.terminal import Commands, command
from lightning_tdisent.errors import InputError

CONFIG = "digits/quickstart.yaml"
DATA = Path("data/digits")  # as the configs name it


def add_commands(commands: Commands) -> None:
    """Add the command."""
    q = command(
        commands, "quickstart", quickstart, "train, compose, sample and evaluate on real digit scans: 6 minutes"
    )
    q.add_argument("--out", type=Path, help="folder (default: runs/quickstart)")
    q.add_argument("--seed", type=int, help="seed of all trainings (default: 0)")
    q.add_argument("--workers", type=int, default=0, help="processes at a time (default: one per GPU, or core)")
    q.add_argument("--set", action="append", default=[], metavar="RUN.KEY=VALUE", dest="overrides",
                   help="override for a run's fit, e.g. '*.trainer.max_steps=200'")  # fmt: skip


def quickstart(a: argparse.Namespace) -> None:
    """Write the digit shards to data/digits of the current folder if they are not there, and run the study."""
    from lightning_tdisent.data.digits import SPLITS, shard, write

    config = _experiments() / CONFIG
    if not all(shard(DATA, split).exists() for split in SPLITS):
        write(DATA)
    print(f"study {config}")
    run_study(argparse.Namespace(config=config, out=a.out, seed=a.seed, workers=a.workers, overrides=a.overrides))


def _experiments() -> Path:
    """Return the folder of the experiments: in the installed package, or in the checkout that holds it."""
    package = Path(__file__).parents[1]
    for folder in (package / "experiments", package.parent / "experiments"):
        if (folder / CONFIG).exists():
            return folder
    raise InputError(f"{package}: the configs of the experiments are missing; install the package again")
