"""Whole commands as functions, for scripts and notebooks: evaluate models, plan and run a fleet."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_tdisent.cli.terminal import default_device
from lightning_tdisent.cli.trainings import describe, fits, open_fleet
from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.draft import draft
from lightning_tdisent.fleet.local import run
from lightning_tdisent.fleet.plan import Fleet
from lightning_tdisent.models.compose import holds_weights, newest_of, short_names
from lightning_tdisent.sampling.sampler import DDIM, Sampler
from lightning_tdisent.studies.results import Study

Source = str | Path


def evaluate(
    models: Source | Sequence[Source] | Mapping[str, Source],
    data: Source,
    protocol: str | Mapping[str, Any],
    sampler: Sampler | None = None,
    out: Source | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Measure models, or folders of images, side by side; return a row of numbers for each, and one of real images.

    models: run folders, files of weights, checkpoints, composites or folders of images; names of the rows may be given
        as a mapping.
    data: folder of shards with the real images.
    protocol: name of a preset, or a mapping of ``preset`` and the fields of `Protocol` that differ.
    sampler: draws the images; by default `DDIM` at every row.
    out: folder for the numbers, a page and what is reused by the next call; by default nothing is kept.
    options: further arguments of `Study`, such as n, split, n_held_out, device, bits.

    Raises InputError, before any work, for models that cannot be compared, and at the end for a model that was not
    measured.
    """
    if isinstance(models, str | Path):
        models = [models]
    if not isinstance(models, Mapping):
        models = dict(zip(short_names([Path(model) for model in models]), models, strict=True))
    if missing := [str(place) for place in models.values() if not Path(place).exists()]:
        raise InputError(f"{', '.join(missing)}: not there")
    part = spec(sampler or DDIM())
    sources = {name: newest_of(Path(place)) for name, place in models.items()}
    contenders = [
        {"name": name, "source": str(place), "sampler": part if holds_weights(place) else None}
        for name, place in sources.items()
    ]
    options.setdefault("device", default_device())
    kind = protocol if isinstance(protocol, str) else dict(protocol)
    with tempfile.TemporaryDirectory(prefix="evaluation-") as place:
        study = Study(str(out or place), "Evaluation", contenders, str(data), kind, **options)
        study.check()
        study.evaluate()
        rows = study.rows
        if out is not None:
            study.write_report()
    if refused := [f"{row['name']}: {row['refused']}" for row in rows if "refused" in row and "source" in row]:
        raise InputError("; ".join(refused))
    return rows


def plan_fleet(config: Source, out: Source | None = None, seed: int | None = None, **keys: Any) -> Fleet:
    """Write the plan of a fleet, and return it.

    config: YAML of the fleet.
    out: its folder; by default that of the YAML.
    seed: of all trainings.
    keys: further keys of the YAML, with ``__`` for a dot: ``budget__images=100_000``.

    Raises InputError, before anything is written, for a fleet that cannot be trained.
    """
    assigned = [(key.replace("__", "."), value) for key, value in keys.items()]
    place = None if out is None else str(out)
    return draft([Path(config)], describe, place, seed, assigned, check=lambda fleet: fleet.check(describe))


def run_fleet(fleet: Fleet | Source, workers: int = 0) -> list[Path]:
    """Train all experts of a fleet that are not done, in processes on this machine; return their files of weights.

    Call it under ``if __name__ == "__main__":`` in a script, since processes import the script again.

    fleet: the plan, or its folder.
    workers: number of processes; 0: one for each GPU, or for each core.

    Raises InputError for a fleet in an object store, and one that lists the experts that are not done.
    """
    work = open_fleet(str(fleet.store) if isinstance(fleet, Fleet) else str(fleet))
    if work.store.remote:
        raise InputError(f"{work.store}: a fleet in an object store is run by the command fleet run")
    run(work, fits, workers, title=work.fleet.title)
    return work.weights(Path())[0]
