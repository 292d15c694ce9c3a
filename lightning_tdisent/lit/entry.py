"""fit, validate, test and predict: LightningCLI over the modules of this package.

Configs compose left to right, `${...}` follows overrides on the command line, and a mistake is answered with one
message whose last line names file, key and the nearest allowed word.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

# imported so that a YAML may name them by their short names
from lightning_tdisent.diffusion import bases, components, objectives, operators, schedules  # noqa: F401
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.files import write_whole
from lightning_tdisent.lit import datamodule, inference, modules, prior  # noqa: F401
from lightning_tdisent.lit.callbacks import pictures, quality  # noqa: F401
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO, resolve, steps, verify
from lightning_tdisent.lit.explain import explain, explain_interpolation
from lightning_tdisent.lit.resume import check_config, find_checkpoint, lock
from lightning_tdisent.networks import dit, unet  # noqa: F401
from lightning_tdisent.priors import flow, gaussian, mixture  # noqa: F401
from lightning_tdisent.sampling import sampler, start  # noqa: F401
from lightning_tdisent.sampling.expert import read_card

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
        parser.add_argument(
            "--resume", type=Literal["auto", "never"], default="auto", help="fit: go on with the run in that folder"
        )
        for name, callback in (("ema", EMA), ("losses", LossPerState), ("guard", Guard), ("checkpoint", Checkpoint)):
            parser.add_lightning_class_args(callback, name)

    def before_instantiate_classes(self) -> None:
        """Choose the checkpoint to go on from, before anything is built; checkpoints are data and never more."""
        config = self.config[self.subcommand]
        if "weights_only" in config:
            config.weights_only = True
        if config.get("ckpt_path") is not None:
            config.ckpt_path = str(resolve(config.ckpt_path))
        if self.subcommand == "fit":
            self._enter(config)

    def _parse_ckpt_path(self) -> None:
        """Nothing in a checkpoint names code or changes the config."""

    purge_step: int | None = None
    locks = contextlib.ExitStack()

    def _enter(self, config: Any) -> None:
        folder, asked = Path(config.run), config.ckpt_path and Path(config.ckpt_path)
        if config.trainer.fast_dev_run:  # a rehearsal, which neither reads nor writes
            return
        if rank_zero_only.rank == 0:
            self.locks.enter_context(lock(folder))
        if not (folder / "config.yaml").exists():
            if there := steps(folder / "checkpoints"):
                raise InputError(
                    f"run: {folder} has {len(there)} checkpoints but no config.yaml to say of what. Put it back, "
                    f"remove {folder / 'checkpoints'}, or choose another --run"
                )
            return
        if config.resume == "never":
            raise InputError(f"run: {folder} already holds a run. Choose another folder with --run, or remove it")
        if asked and not asked.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--ckpt_path {asked} is not of {folder}, which already holds a run; choose another --run")
        mine = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
        theirs = check_config(folder, mine)
        path, manifest, bad = (asked, verify(asked), list[str]()) if asked else find_checkpoint(folder)
        limits, step, limit = ("max_steps", "max_epochs"), manifest.get("step", 0), config.trainer.max_steps
        ended = path is not None and _exported(folder) == step
        if ended and (0 < limit <= step or all(theirs["trainer"][k] == mine["trainer"][k] for k in limits)):
            if rank_zero_only.rank == 0:
                print(f"{folder}: all {step} steps are done; give a larger --trainer.max_steps to go on")
            raise SystemExit(0)
        if not 0 < limit <= step:  # curves that run beyond the checkpoint are drawn again
            self.purge_step = manifest.get("images_seen", 0)
        config.ckpt_path = path and str(path)
        if rank_zero_only.rank == 0:
            print("".join(f"passed over: {why}\n" for why in bad), end="")
            seen = f"from step {step:,} ({manifest['images_seen']:,} images seen), {path}" if path else None
            print(f"going on with {folder} {seen or 'from the beginning: it has no checkpoint yet'}")
            for later in [p for p in steps(folder / "checkpoints") if asked and p.name > asked.name]:
                print(f"rolled back: {later} goes with the next checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Point logger and checkpoints to the run folder."""
        run, options = self._get(self.config_init, "run"), self._get(self.config_init, "trainer")
        if options["logger"] in (None, True):
            logger = TensorBoardLogger(run, "", "", default_hp_metric=False, purge_step=self.purge_step)
            kwargs.setdefault("logger", logger)
        if not options["profiler"]:
            kwargs.setdefault("profiler", Unprofiled())
        plugins = options["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs.setdefault("plugins", [*plugins, DurableIO()])
        kwargs.setdefault("default_root_dir", run)
        return super().instantiate_trainer(**kwargs)


def _exported(folder: Path) -> int | None:
    """Steps behind the weights that a finished training left in its folder, None if there are none."""
    if (model := folder / modules.Diffusion.file).exists():
        return read_card(model).steps
    return start.read_prior_card(folder).steps if (folder / start.FILE).exists() else None


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


class SaveConfig(SaveConfigCallback):
    """The resolved config as ``config.yaml`` of the run folder, on rank 0, for `fit` alone."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused must not claim its folder."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write before the first step."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            config = self.config.clone()
            config.ckpt_path = None  # the run goes on from its newest, not from where it went on this time
            text = self.parser.dump(config, skip_none=False)
            write_whole(Path(trainer.default_root_dir) / "config.yaml", text.encode())


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
        with contextlib.ExitStack() as CLI.locks:  # the folder is free again when the command ends, however it does
            return _cli(argv, always, cls or CLI)
    except MisconfigurationException as error:
        raise InputError(str(error)) from None
    except OmegaConfBaseException as error:
        raise InputError(explain_interpolation(str(error), files)) from None
    except ValueError as error:  # a part refused its arguments: jsonargparse wraps that in its own words
        refusal = next((cause for cause in _causes(error) if isinstance(cause, InputError)), None)
        if refusal is None:
            raise
        raise refusal from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into 1
            raise KeyboardInterrupt from None
        raise


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
        ".*`srun` command is available.*",  # a run of one process needs none
    ):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|torch|lightning")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers|torch|lightning|jsonargparse")
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed", "pytorch.trainer.connectors"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)


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
