"""Functions that workers call for a training, given its command line: run it, or describe it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.processes import imported

if TYPE_CHECKING:
    from lightning_tdisent.fleet.job import Report
    from lightning_tdisent.fleet.planned import Facts
    from lightning_tdisent.fleet.state import FleetWork
    from lightning_tdisent.studies.plan import Role


def fits(argvs: Sequence[list[str]], reports: Sequence["Report"], stacked: bool = False) -> list[BaseException | None]:
    """Run `fit` command lines in a worker process; return None or the error of each.

    Several trainings are run in lockstep, see `lit.together`. stacked: compute the steps of equal experts at once.
    """
    from lightning_tdisent.cli.terminal import import_modules
    from lightning_tdisent.lit.callbacks.curve import Curve
    from lightning_tdisent.lit.callbacks.progress import StepProgress
    from lightning_tdisent.lit.entry import run

    import_modules(imported())
    callbacks = [[StepProgress(report, shown=len(argvs) == 1), Curve()] for report in reports]
    if len(argvs) > 1:
        from lightning_tdisent.lit.together import together

        return together(argvs, callbacks, stacked)
    try:
        run(argvs[0], callbacks[0])
    except SystemExit as end:
        if end.code not in (None, 0, 1, 2):  # the process was stopped by a signal and must exit
            raise
        return [end if end.code else None]
    except Exception as error:
        return [error]
    return [None]


def open_fleet(where: str, changes: Mapping[str, Any] | None = None, scratch: Path | None = None) -> "FleetWork":
    """Open the fleet of a folder or URL.

    changes: config keys of its trainings, and their values on this machine; scratch: folder for the runs of a fleet in
    an object store, by default in the cache folder. Raises InputError for ``scratch`` if the fleet is in a folder.
    """
    from dataclasses import replace

    from lightning_tdisent.fleet.mirror import scratch_of
    from lightning_tdisent.fleet.plan import Fleet, word_of
    from lightning_tdisent.fleet.planned import refuse_reserved
    from lightning_tdisent.fleet.state import FleetWork
    from lightning_tdisent.metrics.weights import cache_folder

    refuse_reserved(changes, "--set")
    fleet = Fleet.load(where, [word for key, value in (changes or {}).items() for word in (f"--{key}", word_of(value))])
    if fleet.store.remote:
        fleet = replace(fleet, scratch=scratch_of(fleet.store, fleet.identity(), scratch, cache_folder))
    elif scratch is not None:
        raise InputError(
            f"--scratch {scratch}: is for fleets in an object store; {where} is a folder, in which its runs are "
            "trained. Leave --scratch out"
        )
    return FleetWork(fleet, describe)


def role(argv: list[str]) -> "Role":
    """Return what a `fit` command line trains; raises InputError if its data are not there. Opens no shard."""
    from lightning_tdisent.data.tars import find
    from lightning_tdisent.lit.datamodule import ImageShards
    from lightning_tdisent.lit.entry import parse
    from lightning_tdisent.lit.modules import Diffusion
    from lightning_tdisent.lit.prior import PriorModule
    from lightning_tdisent.studies.plan import Role

    cli = parse(argv)
    module, data = cli.model, cli.datamodule
    if isinstance(data, ImageShards):
        for split in filter(None, (data.train, data.val)):
            find(data.path, split)
    if isinstance(module, PriorModule):
        return Role("prior", type(module).__name__, module.denoiser.states)
    is_model = isinstance(module, Diffusion)
    return Role("model" if is_model else "", type(module).__name__, module.states if is_model else None)


def describe(argv: list[str]) -> "Facts":
    """Return the `Facts` of a `fit` command line. Reads its configs and the card of its warm start; writes nothing."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    from lightning_tdisent.diffusion.spec import spec
    from lightning_tdisent.fleet.plan import flow
    from lightning_tdisent.fleet.planned import Facts
    from lightning_tdisent.lit.entry import parse
    from lightning_tdisent.lit.modules import Diffusion
    from lightning_tdisent.lit.prior import PriorModule
    from lightning_tdisent.models.compose import holds_weights
    from lightning_tdisent.models.cost import flops
    from lightning_tdisent.models.warm import refuse_start

    cli = parse(argv)
    if not isinstance(cli.model, Diffusion) or isinstance(cli.model, PriorModule):
        raise InputError(f"the config makes a {type(cli.model).__name__}, which is not a model of images")
    module, states = cli.model, cli.model.states
    trainer: Any = cli.trainer
    every = trainer.val_check_interval if trainer.check_val_every_n_epoch is None else None
    accumulate = trainer.accumulate_grad_batches
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise InputError(
            "trainer.callbacks: GradientAccumulationScheduler changes the images of a step while it trains, so a fleet "
            "cannot count them; set trainer.accumulate_grad_batches"
        )
    asked = cli.config[cli.subcommand].trainer.devices  # if not configured, a fleet gives each expert one device
    said = asked not in ("auto", "-1", -1)
    if said and trainer.world_size > 1 and not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            f"trainer.devices: {trainer.world_size} devices need processes that repeat the command line, which here "
            "is that of the fleet's worker. Set trainer.strategy: ddp_fork (or ddp_spawn), or trainer.devices: 1"
        )
    if module.warm_start and holds_weights(Path(module.warm_start)):
        refuse_start(module.denoiser, module.warm_start)
    network = spec(module.network)
    words = {k: v for k, v in network["init_args"].items() if k != "conditioning"}  # folded in by a warm start
    return Facts(
        f"{type(module).__module__}.{type(module).__qualname__}",
        states.fingerprint,
        states.S,
        states.index.tolist()[1:],
        states.log_snr[1:, 0].tolist(),
        cli.datamodule.batch_size,
        sum(p.numel() for p in module.parameters()),
        flops(module.network),
        module.decay,
        trainer.max_steps,
        every / accumulate if isinstance(every, int) else 0,
        f"{network['class_path'].rpartition('.')[2]} {flow(words)}, {module.objective.prediction}-prediction",
        [len(block) for block in states.blocks_of_rows],
        states.K,
        accumulate,
        trainer.world_size,
        asked,
        module.network.sees_state,
    )
