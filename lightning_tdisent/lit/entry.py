"""The commands fit, validate, test and predict: LightningCLI with the modules of this package.

Configs are merged from left to right, and `${...}` sees overrides on the command line. An error in them is reported in
one message whose last line names the file, the key and the closest valid word.
"""

import contextlib
import logging
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import lightning.pytorch as L
import yaml
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

# imported so that a config can use the short names of their classes
from lightning_tdisent.diffusion import components, objectives, operators, schedules, spaces  # noqa: F401
from lightning_tdisent.diffusion.spec import said
from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.files import absolute_paths, expand_all, output_path, refuse_link, typed
from lightning_tdisent.lit import datamodule, inference, modules, prior  # noqa: F401
from lightning_tdisent.lit.callbacks import pictures, quality  # noqa: F401
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO, resolve
from lightning_tdisent.lit.command_line import LINE, UNRESOLVED, Parser, check_yaml, config_files, configs_first
from lightning_tdisent.lit.explain import HERE, explain_interpolation
from lightning_tdisent.lit.loggers import MetricsFile, TensorBoard
from lightning_tdisent.lit.resume import (
    check_config,
    find_checkpoint,
    refuse_other_data,
    refuse_other_runs,
    what_is_trained,
)
from lightning_tdisent.lit.saved_config import SaveConfig, without_secrets
from lightning_tdisent.models import model_prior  # noqa: F401
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.checkpoint import facts
from lightning_tdisent.models.prior_files import read_prior_card
from lightning_tdisent.networks import dit, unet  # noqa: F401
from lightning_tdisent.priors import flow, gaussian, mixture  # noqa: F401
from lightning_tdisent.processes import imported
from lightning_tdisent.runs import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    PRIOR,
    WEIGHTS,
    RunFolder,
    checkpoints_in,
    held,
    new_identity,
)
from lightning_tdisent.sampling import sampler  # noqa: F401

# of the running command, per thread: the locks it holds until it ends
LOCKS: ContextVar[contextlib.ExitStack] = ContextVar("LOCKS")


class CLI(LightningCLI):
    """LightningCLI with a run folder, and with the callbacks that every run has."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options other than model, data and trainer."""
        parser.add_argument("--run", type=str, default="runs/unnamed", help="run folder, for all output of this run")
        parser.add_argument(
            "--resume", type=Literal["auto", "never"], default="auto", help="fit: resume the run in the run folder"
        )
        parser.add_argument(
            "--id", type=str | None, help="identity of the run, created with it and stored in its config.yaml"
        )
        parser.add_argument("--round", type=int, default=0, help="round of an adaptive budget, set by the fleet")
        for name, callback in (("ema", EMA), ("losses", LossPerState), ("guard", Guard), ("checkpoint", Checkpoint)):
            parser.add_lightning_class_args(callback, name)

    def _set_seed(self) -> None:
        """Seed all generators; refuse a seed that Lightning would replace, or that NumPy does not accept."""
        seed = self._get(self.config, "seed_everything")
        if seed is not False:
            check_number("seed_everything", seed, most=2**32 - 1, whole=True)
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Expand paths and choose the checkpoint before anything is built; checkpoints are read as data only."""
        config = expand_all(self.config[self.subcommand], str(self.subcommand))
        if config.trainer.default_root_dir is not None:
            raise InputError(f"trainer.default_root_dir: {config.trainer.default_root_dir}: give the folder as --run")
        if "weights_only" in config:
            config.weights_only = True
        if config.trainer.enable_checkpointing is False:
            if self.subcommand == "fit":
                raise InputError(
                    "trainer.enable_checkpointing: false is not possible, since runs are resumed from their "
                    "checkpoints. Leave it out; checkpoint.keep: 1 keeps one, trainer.fast_dev_run: true writes none"
                )
            config.trainer.enable_checkpointing = None
        if config.get("ckpt_path") is not None:
            config.ckpt_path = str(resolve(config.ckpt_path))
        if self.subcommand == "fit":
            self._enter_run_folder(config)
        elif (
            output_path(config.run, "--run") / CONFIG
        ).exists():  # other commands than fit write to a subfolder of the run
            self.trained = config.run
            config.run = str(Path(config.run) / str(self.subcommand))

    trained: str | None = None  # if the command is not fit: the run folder that its config belongs to

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Use the newest checkpoint of the run if none is given; refuse to evaluate an untrained network."""
        out: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict" and isinstance(self.datamodule, datamodule.ImageShards):
            self.datamodule.predict_dataloader()  # raises an error that names the right data module
        if subcommand != "fit" and isinstance(self.model, modules.Diffusion) and out.get("ckpt_path") is None:
            folder = Path(self.trained or self._get(self.config_init, "run"))
            path = find_checkpoint(folder)[0]
            if path is None:
                exported = folder / self.model.file
                words = shlex.join(["--model", "Composite", "--model.path", str(folder)])
                usable = exported.exists() and self.model.file == WEIGHTS
                instead = f"; or use {exported}: {words}" if usable else ""
                raise InputError(
                    f"{subcommand}: {folder} holds no checkpoint, and an untrained network says nothing. Give its "
                    f"weights: --ckpt_path CHECKPOINT or RUN FOLDER{instead}"
                )
            print(f"weights: {path}")
            out["ckpt_path"] = str(path)
            if isinstance(io := self.trainer.strategy.checkpoint_io, DurableIO):
                io.newest = path
        return out

    def _parse_ckpt_path(self) -> None:
        """Do nothing: a checkpoint neither names code nor changes the config."""

    purge_step: int | None = None
    ended: int | None = None  # step at which a run that is resumed had ended

    def _enter_run_folder(self, config: Any) -> None:
        """Hold the run folder and choose the checkpoint to resume from; refuse the folder of another run."""
        if config.run in ("null", "None", "~"):
            raise InputError(f"--run {config.run}: a run folder is required; ./{config.run} is one of this name")
        folder, asked = output_path(config.run, "--run"), config.ckpt_path and Path(config.ckpt_path)
        if config.trainer.fast_dev_run:  # reads and writes no checkpoint
            return
        if any(word == "--id" or word.startswith("--id=") for word in LINE.get()[0]):
            raise InputError("--id: cannot be set; it is created with a run and stored in its config.yaml")
        place = LOCKS.get().enter_context(RunFolder(folder, tidy=True)) if rank_zero_only.rank == 0 else None
        if not (folder / CONFIG).exists():
            if there := checkpoints_in(folder / CHECKPOINTS):
                raise InputError(
                    f"run: {folder} has {len(there)} checkpoints but no config.yaml that describes them. Put it back, "
                    f"remove {what_is_trained(folder)}, or choose another --run"
                )
            if place is not None:
                place.name(new_identity())
            return
        if config.resume == "never":
            raise InputError(f"run: {folder} already holds a run. Choose another folder with --run, or remove it")
        if asked and not asked.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"--ckpt_path {asked} does not belong to {folder}, which already holds a run; choose another --run"
            )
        mine = absolute_paths(yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False)))
        mine = without_secrets(mine)
        theirs = check_config(folder, mine)
        run = str(theirs.get("id") or new_identity())  # configs of older versions have no id
        refuse_other_runs(folder, run)
        if place is not None:
            place.name(run)
        path, manifest, bad = (asked, facts(asked), list[str]()) if asked else find_checkpoint(folder)
        step, limit = manifest.get("step", 0), config.trainer.max_steps
        if path is None and (exported := _exported_steps(folder, run)) is not None:
            why = _why_ended(exported, mine["trainer"], theirs["trainer"])
            if not why:
                raise InputError(
                    f"run: {folder} has weights of step {exported:,} and no checkpoint to resume from. Choose another "
                    "--run, which may start from it (model.warm_start), or remove the weights to train it again"
                )
            if rank_zero_only.rank == 0:
                print(f"{folder}: {why} in another folder, since its checkpoints were removed")
            raise SystemExit(0)
        if path is not None and _exported_steps(folder, run) == step:
            self.ended = step
            if why := _why_ended(step, mine["trainer"], theirs["trainer"]):
                refuse_other_data(folder, manifest, theirs, mine)
                if rank_zero_only.rank == 0:
                    print(f"{folder}: {why} to resume")
                raise SystemExit(0)
        if not 0 < limit <= step:  # points logged after the checkpoint are purged and logged again
            self.purge_step = manifest.get("images_seen", 0)
        config.ckpt_path = path and str(path)
        if rank_zero_only.rank == 0:
            print("".join(f"passed over: {why}\n" for why in bad), end="")
            seen = f"from step {step:,} ({manifest['images_seen']:,} images seen), {path}" if path else None
            print(f"going on with {folder} {seen or 'from the beginning: it has no checkpoint yet'}")
            for later in [p for p in checkpoints_in(folder / CHECKPOINTS) if asked and p.name > asked.name]:
                print(f"rolled back: {later} will be removed with the next checkpoint")

    def before_fit(self) -> None:
        """Set the module's round of an adaptive budget."""
        if self.config.fit.round:
            self.model.round = self.config.fit.round

    def instantiate_classes(self) -> None:
        """Build all parts; report in one line an argument that a constructor refuses, or a missing package."""
        try:
            super().instantiate_classes()
        except (InputError, MisconfigurationException, OmegaConfBaseException, OSError, MemoryError):
            raise
        except Exception as error:
            causes = list(_causes(error))
            if any(isinstance(cause, InputError) for cause in causes):
                raise
            named = re.search(r"given class_path '([\w.]+)'", str(error))
            hint = " (use dict_kwargs only for a class with **kwargs)" if "unexpected keyword" in str(error) else ""
            where = f"{named[1]}: " if named else ""
            raise InputError(f"the config cannot be built: {where}{said(causes[-1])}{hint}") from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with its logger and checkpoints in the run folder."""
        run, options = self._get(self.config_init, "run"), self._get(self.config_init, "trainer")
        if options["logger"] in (None, True):
            place = held(run)
            suffix = f".{place.run}" if place and place.run else ""
            logger: Any = TensorBoard(
                run, "", "", default_hp_metric=False, purge_step=self.purge_step, filename_suffix=suffix
            )
        else:
            logger = options["logger"] or []
        loggers = list(logger) if isinstance(logger, list) else [logger]
        if self.subcommand == "fit":
            refuse_link(Path(run) / METRICS)
            loggers.append(MetricsFile(run, self.purge_step if (Path(run) / CONFIG).exists() else -1))
        kwargs.setdefault("logger", loggers)
        if not options["profiler"]:
            kwargs.setdefault("profiler", Unprofiled())
        plugins = options["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs.setdefault("plugins", [*plugins, DurableIO()])
        kwargs.setdefault("default_root_dir", run)
        callbacks = options["callbacks"] or []
        self._choose_progress(callbacks if isinstance(callbacks, list) else [callbacks], options["enable_progress_bar"])
        kwargs.setdefault("enable_progress_bar", None)  # decided above; Lightning refuses false with any `ProgressBar`
        return super().instantiate_trainer(**kwargs)

    def _choose_progress(self, callbacks: list[L.Callback], shown: bool | None) -> None:
        """Let `StepProgress` write its log only if progress is disabled; remove it if the user gives another bar.

        A `StepProgress` that reports to a worker draws nothing and is kept.
        """
        ours = self.trainer_defaults["callbacks"]
        drawn = [c for c in ours if isinstance(c, StepProgress) and c.report is None]
        if any(isinstance(callback, ProgressBar) for callback in callbacks):
            self.trainer_defaults["callbacks"] = [c for c in ours if c not in drawn]
            return
        if "verbose" in (options := self.config_init[self.subcommand]):
            options.verbose = False  # `StepProgress` prints the metrics
        if shown is False:
            for callback in drawn:
                callback.shown = False


def _why_ended(step: int, mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Return why a run that has ended would train no further with these trainer options, None if it may."""
    if 0 < mine["max_steps"] <= step:
        return f"all {step} steps are done; give a larger --trainer.max_steps"
    if all(theirs.get(k) == mine.get(k) for k in ("max_steps", "max_epochs", "max_time", "callbacks")):
        epochs = f"trainer.max_epochs ({mine['max_epochs']}), " if mine["max_epochs"] != -1 else ""
        return f"ended at step {step} by {epochs}trainer.max_time or a callback such as EarlyStopping; change that"
    return None


def _exported_steps(folder: Path, run: str) -> int | None:
    """Return the number of steps of the weights that a finished training exported, None if there are none."""
    card: Any
    if (file := folder / WEIGHTS).exists():
        card = read_card(file)
    elif (file := folder / PRIOR).exists():
        card = read_prior_card(folder)
    else:
        return None
    if card.run not in ("", run):  # cards of older versions do not name the run
        raise InputError(
            f"run: {folder} belongs to run {run}, but its {file.name} to run {card.run}. Move that file away"
        )
    return int(card.steps)


class Parsed(CLI):
    """CLI that builds everything and does not run the command."""

    def before_instantiate_classes(self) -> None:
        """Expand paths; the run folder is not checked."""
        expand_all(self.config[self.subcommand], str(self.subcommand))

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Unprofiled(PassThroughProfiler):
    """Profiler without effect, which avoids creating a generator fifty times per step as the default does."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Do nothing."""
        return self._nothing


def parse(argv: Sequence[str]) -> CLI:
    """Build the module, data and trainer of a command line, without running it."""
    return run(argv, cls=Parsed)


def run(argv: Sequence[str], callbacks: Sequence[L.Callback] = (), cls: type["CLI"] | None = None) -> CLI:
    """Run fit, validate, test or predict on a command line, and return the CLI with its trainer and module.

    argv: the command and its options. callbacks: added to the trainer in place of the progress line. cls: the CLI
    class. Raises InputError for an invalid config or command line.
    """
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _silence_warnings()
    files = config_files(argv)
    for file in files:
        check_yaml(file)
    argv = configs_first(argv)
    HERE.set(Path.cwd())
    LINE.set((argv, files))
    UNRESOLVED.set("")
    always: list[L.Callback] = [Export(), *(callbacks or [StepProgress()])]
    if argv[0] == "predict":
        always.append(pictures.WriteImages())
    try:
        with contextlib.ExitStack() as locks:  # releases the run folder when the command ends, also by an exception
            LOCKS.set(locks)
            cli = _cli(argv, always, cls or CLI)
            if argv[0] == "fit" and cls is None:
                _report_end(cli, quiet=bool(callbacks))
            return cli
    except MisconfigurationException as error:
        raise InputError(str(error)) from None
    except OmegaConfBaseException as error:
        raise InputError(explain_interpolation(str(error), files)) from None
    except ValueError as error:  # a constructor refused its arguments; jsonargparse wraps the InputError
        refusal = next((cause for cause in _causes(error) if isinstance(cause, InputError)), None)
        if refusal is None:
            raise
        raise refusal from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into an exit with code 1
            raise KeyboardInterrupt from None
        raise


def _report_end(cli: CLI, quiet: bool) -> None:
    """Print the path of the weights; raise InputError if a fit resumed a run that had ended and trained no step."""
    trainer, folder = cli.trainer, Path(cli.trainer.default_root_dir)
    if cli.ended is not None and trainer.global_step == cli.ended:
        raise InputError(
            f"run: {folder} had ended at step {cli.ended}, and no step was trained now: trainer.max_epochs, "
            "trainer.max_time or a callback ended it again. Change that to resume"
        )
    if not quiet and trainer.is_global_zero and not trainer.fast_dev_run and (file := folder / cli.model.file).exists():
        print(f"weights of step {trainer.global_step:,}: {file}")
        if cli.model.file == WEIGHTS and cli.model.whole:
            more = [] if cli.model.states.observation is None else ["--observe", "DATA"]
            more += [word for name in imported() for word in ("--import", name)]
            images = folder.with_name(f"{folder.name}_images")
            print(f"draw images: {typed('sample', folder, '--out', images, *more)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # an error raised again may occur in its own chain
        seen.append(error)
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


def _silence_warnings() -> None:
    """Silence messages that a user cannot act on."""
    for text in (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*is smaller than the logging interval.*",  # here steps are counted across epochs
        ".*LightningCLI's args parameter.*",
        ".*Couldn't infer the batch indices.*",  # images are named by their seeds
        ".*The dirpath has changed from.*",  # a checkpoint validated from another folder
        ".*`srun` command is available.*",  # a run of one process does not need it
    ):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|torch|lightning")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers|torch|lightning|jsonargparse")
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed", "pytorch.trainer.connectors"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
