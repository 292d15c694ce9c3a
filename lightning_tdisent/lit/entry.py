"""fit, validate, test and predict: LightningCLI over the modules of this package.

Configs compose left to right, `${...}` follows overrides on the command line, and a mistake is answered with one
message whose last line names file, key and the nearest allowed word.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import lightning.pytorch as L
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import PassThroughProfiler
from omegaconf.errors import OmegaConfBaseException

# imported so that a YAML may name them by their short names
from lightning_tdisent.diffusion import objectives, schedules  # noqa: F401
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.lit import datamodule, inference, modules  # noqa: F401
from lightning_tdisent.lit.callbacks import pictures, quality  # noqa: F401
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.explain import explain, explain_interpolation
from lightning_tdisent.networks import dit, unet  # noqa: F401
from lightning_tdisent.sampling import sampler  # noqa: F401

COMMANDS = ("fit", "validate", "test", "predict")


class Parser(LightningArgumentParser):
    """Answers a mistake with the message alone, made readable by `explain`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the explained message as an `InputError`."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise InputError(explain(str(message), self.argv, self.files, self)) from None

    argv: Sequence[str] = ()
    files: Sequence[Path] = ()


class CLI(LightningCLI):
    """Adds the run folder and the callbacks that every run has."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside model, data and trainer."""
        parser.add_argument("--run", type=str, default="runs/unnamed", help="folder of this run: everything goes there")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(LossPerState, "losses")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{step}"})

    def before_instantiate_classes(self) -> None:
        """Refuse a folder that holds another run, before anything is built, and checkpoints that are more than data."""
        config = self.config[self.subcommand]
        if "weights_only" in config:
            config.weights_only = True  # a checkpoint is data: nothing in it is ever run
        folder, resumed = Path(config.run).resolve(), config.get("ckpt_path")
        own = resumed and Path(resumed).resolve().is_relative_to(folder)
        if self.subcommand == "fit" and (folder / "config.yaml").exists() and not own:
            last = Path(config.run) / "checkpoints" / "last.ckpt"
            going_on = f", or go on from its checkpoint with --ckpt_path {last}" if last.exists() else ""
            raise InputError(
                f"run: {config.run} already holds a run. Choose another folder with --run, or remove it{going_on}"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Point logger and checkpoints to the run folder."""
        run = self._get(self.config_init, "run")
        if self._get(self.config_init, "trainer")["logger"] in (None, True):
            kwargs.setdefault("logger", TensorBoardLogger(run, name="", version="", default_hp_metric=False))
        if not self._get(self.config_init, "trainer")["profiler"]:
            kwargs.setdefault("profiler", Unprofiled())
        kwargs.setdefault("default_root_dir", run)
        return super().instantiate_trainer(**kwargs)


class Parsed(CLI):
    """Stops where the command would begin."""

    def before_instantiate_classes(self) -> None:
        """Any folder will do."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Unprofiled(PassThroughProfiler):
    """Profiles nothing, without building a generator fifty times a step."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Do nothing."""
        return self._nothing


class Checkpoint(ModelCheckpoint):
    """Lightning's, without writing out its own name anew six times a step."""

    @functools.cached_property
    def state_key(self) -> str:
        """The name under which a checkpoint keeps this callback."""
        return super().state_key


class SaveConfig(SaveConfigCallback):
    """The resolved config as ``config.yaml`` of the run folder, on rank 0, for `fit` alone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused must not claim its folder."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write before the first step."""
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False)
            (folder / "config.yaml").write_text(text)


def parse(argv: Sequence[str]) -> CLI:
    """Build the module, data and trainer of a command line, without running it."""
    return run(argv, cls=Parsed)


def run(argv: Sequence[str], callbacks: Sequence[L.Callback] = (), cls: type["CLI"] | None = None) -> CLI:
    """Run one of Lightning's commands on a command line; callbacks take the place of the progress line."""
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _quiet()
    files = _config_files(argv)
    for file in files:
        _check_yaml(file)
    Parser.argv, Parser.files = argv, files
    always: list[L.Callback] = [Export(), *(callbacks or [StepProgress()])]
    if argv[0] == "predict":
        always.append(pictures.WriteImages())
    try:
        return _cli(argv, always, cls or CLI)
    except OmegaConfBaseException as error:
        raise InputError(explain_interpolation(str(error), files)) from None
    except ValueError as error:  # a part refused its arguments: jsonargparse wraps that in its own words
        refusal = next((cause for cause in _causes(error) if isinstance(cause, InputError)), None)
        if refusal is None:
            raise
        raise InputError(str(refusal)) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cli(argv: Sequence[str], always: list[L.Callback], cls: type[CLI]) -> CLI:
    return cls(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        save_config_callback=SaveConfig,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={"callbacks": always, "enable_model_summary": False},
        parser_kwargs={"parser_mode": "omegaconf+", "prog": "python -m lightning_tdisent"},
        args=list(argv),
    )


def _quiet() -> None:
    """Drop messages that say nothing a user could act on."""
    for text in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*is smaller than the logging interval.*",  # steps are counted over epochs
        ".*LightningCLI's args parameter.*",
        ".*Couldn't infer the batch indices.*",  # seeds are their own names
        ".*The dirpath has changed from.*",  # a checkpoint validated from another folder
    ):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|torch|lightning")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers|torch|lightning|jsonargparse")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _config_files(argv: Sequence[str]) -> list[Path]:
    out = []
    for i, word in enumerate(argv):
        if word in ("--config", "-c") and i + 1 < len(argv):
            out.append(Path(argv[i + 1]))
        elif word.startswith("--config="):
            out.append(Path(word.partition("=")[2]))
    return out


def _check_yaml(file: Path) -> None:
    try:
        yaml.compose(file.read_text())
    except FileNotFoundError:
        near = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise InputError(f"--config {file}: no such file.{nearest(str(file), near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
