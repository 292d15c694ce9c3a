"""Evaluate models side by side: one row of numbers each, from the same seeds and on the same held-out images."""

import contextlib
import dataclasses
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tdisent.data.held_out import note_classes
from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.diffusion.table import OBSERVED, Table
from lightning_tdisent.digests import digest, sha256
from lightning_tdisent.distributed import all_gather, rank_and_world, shared_errors
from lightning_tdisent.errors import InputError, NotFinite
from lightning_tdisent.evaluation.bits import Bits
from lightning_tdisent.evaluation.conditional import Given
from lightning_tdisent.evaluation.drawn import drawn_from, start_digest
from lightning_tdisent.evaluation.measured import Measured
from lightning_tdisent.evaluation.observations import Observations
from lightning_tdisent.evaluation.provenance import provenance
from lightning_tdisent.evaluation.real_images import RealImages, image_files
from lightning_tdisent.evaluation.score import compute, open_quality, score
from lightning_tdisent.metrics.lpips import LPIPS
from lightning_tdisent.metrics.metric import PairedMetric
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.quality import Quality
from lightning_tdisent.metrics.reference import remembered
from lightning_tdisent.models.card import Card
from lightning_tdisent.models.compose import find_files, load_model
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.cost import training_cost, with_prior
from lightning_tdisent.models.model_prior import ModelPrior
from lightning_tdisent.models.residency import Residency
from lightning_tdisent.models.truncated import TruncatedModel, load_truncated, signal_note
from lightning_tdisent.progress import Progress
from lightning_tdisent.sampling.denoiser import Denoiser, DenoiserProtocol
from lightning_tdisent.sampling.errors_by_row import has_signal, held_out_errors
from lightning_tdisent.sampling.guidance import extras
from lightning_tdisent.sampling.likelihood import refuse_components
from lightning_tdisent.sampling.sampler import Sampler, probe_rows, refuse_unowned

REAL = "real images, held out"  # the name of the last row ends with it


@dataclasses.dataclass
class Contender:
    """A model, or a set of images, in an evaluation.

    name: in the table; source: weights, or, without a sampler, images: a folder of them, or ``split`` of a data set;
    sampler: generates the images; residency, fill: of a composite, see `load_model`; prior: where the chain starts,
    see `load_truncated`.
    """

    name: str
    source: Path
    sampler: Sampler | None
    split: str = "test"
    residency: Residency = "resident"
    fill: str | None = None
    prior: str | None = None

    def load(self) -> Denoiser | CompositeDenoiser | TruncatedModel:
        """Return the model."""
        if self.prior is not None:
            return load_truncated(self.source, self.prior, self.residency, self.fill)
        return load_model(self.source, self.residency, self.fill)


def evaluate(
    contenders: Sequence[Contender],
    protocol: Protocol,
    network: FeatureNetwork,
    real: RealImages,
    held_out: ImageSet,
    batch_size: int = 250,
    device: str = "cpu",
    keep: int = 64,
    progress: Progress | None = None,
    bits: tuple[Bits, ImageSet] | None = None,
    observations: dict[str, Observations] | None = None,
    further: Sequence[PairedMetric] = (),
    measured: Measured | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return one row of numbers per contender, and its first ``keep`` images; the same on all ranks (collective).

    A model generates the images of the protocol's seeds; image files are measured as they are. Errors are measured at
    the rows of the model with the fewest rows, for every model that has those rows with the same values. The last row
    scores the held-out images as if a model had generated them: what a perfect model would reach with so few. If a
    metric refuses its input, the row has the reason under ``refused``.

    real: the images that distances are computed to.
    held_out: images for the errors per state.
    batch_size: images at a time.
    progress: shows what is measured.
    bits: how to measure bits per dimension, None not to, and training images.
    observations: gets the observations of each conditional model (see `Given`) by its name.
    further: metrics of conditional models besides those that are always computed.
    measured: stored rows; one is reused if everything that it depends on is equal.

    Raises InputError, before any work, for models and images that cannot be compared.
    """
    loaded = [c.load() if c.sampler else None for c in contenders]
    shape = list(held_out.images.shape[1:])
    for contender, model in zip(contenders, loaded, strict=True):
        if model is not None and contender.sampler is not None:
            if model.shape != shape:
                raise InputError(f"{contender.source} generates images of {model.shape}, the real ones are {shape}")
            contender.sampler.check(model.states)
            refuse_unowned(contender.name, model, contender.sampler)
            _check_labels(contender.name, model, held_out)
            if isinstance(model, TruncatedModel):
                model.check_label(None)  # refuses a prior of one class
            if bits:
                refuse_components(model.states, str(contender.source))
    files = {c.name: image_files(c.source, c.split, shape) for c in contenders if c.sampler is None}
    progress = progress or Progress("measure", shown=False)

    def take(numbers: Tensor) -> Tensor:
        progress.advance(len(numbers))
        return real.take(numbers)

    progress.begin("features of the real images", protocol.n_real or real.n)
    quality = open_quality(protocol, network, dataclasses.replace(real, take=take), shape, device)
    qualities = {}
    for name, found in files.items():
        try:
            qualities[name] = quality.of(found.n)
        except InputError as error:
            raise error.within(f"{name} ({found.n:,} images)") from None
    models = [model for model in loaded if model is not None]
    common = _Common.of([m.states for m in models if not isinstance(m, TruncatedModel)] or [m.states for m in models])
    given = {
        c.name: Given(model, held_out, quality, further=further)
        for c, model in zip(contenders, loaded, strict=True)
        if model is not None and model.states.observation is not None
    }
    pairs: dict[str, Metric] = {}
    rows, images = [], dict[str, Tensor]()
    common_key = {
        "held out": [held_out.digest, len(held_out)],
        "errors": [common.indices, common.log_snr.tolist()],
        "bits": [dataclasses.asdict(bits[0]), bits[1].digest, len(bits[1])] if bits else None,
        "lpips": any(isinstance(metric, LPIPS) for metric in further),
        "keep": keep,
        **({"sources": protocol.sources} if protocol.sources else {}),
    }
    for contender, model in zip(contenders, loaded, strict=True):
        found_quality = qualities[contender.name] if model is None else quality
        key = {"protocol": found_quality.protocol.fields, **common_key, **_identity(contender, files)}
        if (own := given.get(contender.name)) is not None:
            key["given"] = digest(own.observations.y.numpy().tobytes())
            if observations is not None:
                observations[contender.name] = own.observations
        if measured is not None and (known := measured.get(key)) is not None:
            row, first = known
        elif model is None:
            found = files[contender.name]
            progress.begin(f"{contender.name}: images", found.n / rank_and_world()[1])
            row, first = _of_files(found, found_quality, keep, progress.advance)
            row["measured"] = provenance(len(held_out))
        else:
            if own is not None:
                own.reference(real, pairs)
            row, first = _of_model(contender, model, quality, held_out, common, batch_size, device, keep, progress, own)
            if bits:
                progress.begin(f"{contender.name}: bits per dimension")
                row |= bits[0].measure(model.to(device), held_out, bits[1], batch_size, progress.advance)
            row["measured"] = provenance(len(held_out))
            model.cpu()
        if measured is not None:
            measured.put(key, row, first)
        images |= {contender.name: first} if len(first) else {}
        rows.append({"name": contender.name, **row, "source": str(contender.source)})
    held = RealImages(held_out.digest, len(held_out), lambda numbers: held_out.images[numbers])
    perfect = quality.of(held.n, fewer=True)
    sources = perfect.protocol.sources.values()
    name = "-".join((held.digest, perfect.protocol.hash, *perfect.protocol.metrics, *(s[:12] for s in sources)))
    floor = remembered(name, lambda: _of_files(held, perfect, 0)[0])
    return [*rows, {"name": f"{len(held_out)} {REAL}", **floor}], images


def _identity(contender: Contender, files: dict[str, RealImages]) -> dict[str, Any]:
    """Return the digests of a contender's weights, start and sampler, or of its images; without names and paths."""
    if contender.sampler is None:
        return {"images": files[contender.name].digest}
    return {**drawn_from(contender.source, contender.fill, contender.prior), "sampler": spec(contender.sampler)}


@dataclasses.dataclass
class _Common:
    """Noise levels at which the errors of all models are measured: those of the table with the fewest rows."""

    indices: list[int]
    log_snr: Tensor
    layout: str = ""

    @classmethod
    def of(cls, tables: Sequence[Table]) -> "_Common":
        if not tables:
            return cls([], torch.empty(0))
        few = min(tables, key=lambda states: states.S)
        rows = probe_rows(few.rows, 32)
        log_snr = few.log_snr[rows, : few.image_columns].clone()  # a copy: the model's moves to its device
        return cls([int(few.index[s]) for s in rows], log_snr, _units(few))

    def rows(self, states: Table) -> list[int]:
        """Return those rows of a table; an empty list unless it has all of them with the same values."""
        here = {t: s for s, t in enumerate(states.index.tolist())}
        at = [here[t] for t in self.indices if t in here]
        here_too = states.log_snr[at, : states.image_columns].cpu()
        same = here_too.shape == self.log_snr.shape and torch.allclose(here_too, self.log_snr)
        return at if same and _units(states) == self.layout else []


def _units(states: Table) -> str:
    """Return a description of the image's columns: errors of different ones are in different units."""
    return states.made_of.partition(OBSERVED)[0] if states.image_columns > 1 else ""


def _of_model(
    contender: Contender,
    model: Any,
    quality: Quality,
    held_out: ImageSet,
    common: _Common,
    batch_size: int,
    device: str,
    keep: int,
    progress: Progress,
    given: Given | None = None,
) -> tuple[dict[str, Any], Tensor]:
    sampler, cards = contender.sampler, model.cards
    assert sampler is not None
    model.to(device)
    _reset_peak(device)
    start = time.perf_counter()
    seen, also = (given.given, given.add) if given else (None, None)
    progress.begin(f"{contender.name}: images", quality.protocol.n / rank_and_world()[1])
    scored = score(model, sampler, quality, batch_size, keep, progress.advance, seen, also)
    parts = all_gather((scored.numbers, scored.images, scored.seconds, _peak(device)))
    images, order = torch.cat([p[1] for p in parts]), torch.cat([p[0] for p in parts]).argsort()
    errors: dict[str, dict[str, float]] = {}
    if at := common.rows(model.states):
        progress.begin(f"{contender.name}: held-out errors", len(at) * len(held_out) / rank_and_world()[1])
        x0, eps = held_out_errors(model, held_out, at, batch_size, progress.advance)
        names = [str(t) for t in common.indices]
        lit = [k for k, t in enumerate(at) if has_signal(model.states, t)]
        errors = {"x0_mse": dict(zip(names, x0.tolist(), strict=True))}
        errors |= {"eps_mse": {names[k]: float(eps[k]) for k in lit}} if lit else {}
        if not x0.isfinite().all() and not isinstance(scored.values, InputError):
            bad = ", ".join(name for name, e in zip(names, x0.tolist(), strict=True) if not math.isfinite(e))
            scored = scored._replace(values=NotFinite(f"held-out errors are not finite at index {bad}"))
        errors = errors if x0.isfinite().all() else {}
    implicit = model.prior if isinstance(model, TruncatedModel) and isinstance(model.prior, ModelPrior) else None
    more = implicit.evaluations if implicit else 0  # network evaluations of the start
    row = {
        "networks": len(cards),
        "weights": sum(p.numel() for p in model.parameters()),
        "rows": model.states.S,
        "nfe": len(sampler.rows(model.states)) + more,
        **_numbers(scored.values, quality),
        **(given.numbers() if given and not isinstance(scored.values, NotFinite) else {}),
        **errors,
        **_cost(model, cards),
        "sampling_seconds_per_image": sum(p[2] for p in parts) / quality.protocol.n,
        "evaluation_seconds": time.perf_counter() - start,
        "peak_memory_bytes": max(p[3] for p in parts),
        "ranks": len(parts),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "weights_kind": ", ".join(sorted({card.weights for card in cards})),
        "training_data": cards[0].data,
        "table": cards[0].fingerprint,
        "sampler": repr_sampler(sampler),
        "sha256": [sha256(file) for file in find_files(contender.source)],
        "recipe": _recipe(cards),
        "images_a_step": sorted({round(card.images_seen / card.steps) for card in cards if card.steps}),
        "seeds": sorted({card.seed for card in cards}),
        **({"prior": type(model.prior).__name__, "cut": model.states.S} if isinstance(model, TruncatedModel) else {}),
        **({"start_note": note} if (note := _start_note(model)) else {}),
        **({"prior_sha256": start_digest(contender.prior)} if isinstance(model, TruncatedModel) else {}),
        **({"preview": extras(model).filled} if extras(model).filled else {}),
        **({"differs": extras(model).differs} if extras(model).differs else {}),
    }
    model.cpu()  # so that it does not count for the peak memory of the next one
    return row, images[order]


def _start_note(model: Any) -> str:
    return model.check_label(None) if isinstance(model, TruncatedModel) else signal_note(model)


def _recipe(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """Return the kinds of networks and trainings of a model, each once; equal for repeats of a training."""
    kinds: dict[str, dict[str, Any]] = {}
    for card in cards:
        kind = {k: getattr(card, k) for k in ("module", "network", "objective", "average")}
        kind["warm"] = len(card.parents)
        kinds.setdefault(json.dumps(kind, sort_keys=True), kind)
    return [kinds[key] for key in sorted(kinds)]


def _cost(model: Any, cards: Sequence[Card]) -> dict[str, float]:
    source = model.prior.cards if isinstance(model, TruncatedModel) and isinstance(model.prior, ModelPrior) else []
    cost = training_cost([*cards, *(card for card in source if card not in cards)])
    if isinstance(model, TruncatedModel) and model.card is not None:
        return with_prior(cost, model.prior, model.card.images_seen, model.card.seconds)
    return cost


def _of_files(
    files: RealImages, quality: Quality, keep: int, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Return the row of given images, and the first of them; each rank measures its share (collective)."""
    rank, world = rank_and_world()
    try:
        with shared_errors():
            for numbers in torch.arange(files.n)[rank::world].split(250):
                if len(numbers):
                    quality.add(files.take(numbers), numbers)
                    if progress:
                        progress(len(numbers))
            first = files.take(torch.arange(min(keep, files.n)))
    except InputError as error:
        return _numbers(error, quality), torch.empty(0, dtype=torch.uint8)
    return {**_numbers(compute(quality), quality), "images": files.digest}, first


def _numbers(values: dict[str, float] | InputError, quality: Quality) -> dict[str, Any]:
    refused = {"refused": str(values)} if isinstance(values, InputError) else values
    protocol = quality.protocol
    return {
        **refused,
        "n": protocol.n,
        "num_features": quality.network.num_features,
        "protocol": protocol.hash,
        "protocol_fields": protocol.fields,
        "protocol_line": protocol.line,
    }


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux only
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak(device: str) -> int:
    """Return the peak memory in bytes since `_reset_peak`, of the device or of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _check_labels(name: str, model: DenoiserProtocol, held_out: ImageSet) -> None:
    """Raise InputError for labels that a model does not know; print its classes that a large set of images lacks."""
    if model.classes and not 0 <= int(held_out.labels.min()) <= int(held_out.labels.max()) < model.classes:
        raise InputError(f"the model has {model.classes} classes; the held-out images have other labels, or none")
    if model.classes and len(held_out) >= 10 * model.classes:  # fewer images may lack classes by chance
        where = f"the {len(held_out):,} held-out images"
        note_classes(f"network.classes of {name}", held_out.labels, where, model.classes)


def repr_sampler(sampler: Sampler) -> str:
    """Return the name of a sampler with its options."""
    return f"{type(sampler).__name__}({', '.join(f'{k}={v}' for k, v in vars(sampler).items())})"
