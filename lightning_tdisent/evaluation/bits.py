"""Bits per dimension of a model, for its row of results."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.distributed import all_gather, rank_and_world, shared_errors
from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.likelihood import BOUND, HOW, ODE, REFUSED
from lightning_tdisent.sampling.denoiser import DenoiserProtocol
from lightning_tdisent.sampling.errors_by_row import held_out_errors
from lightning_tdisent.sampling.guidance import extras
from lightning_tdisent.sampling.likelihood import Decoder, NLLTerms, concatenate, ode_likelihood, variational_bound

ODE_ROWS = 100  # with fewer, the error of the integration from row to row exceeds 0.01 bits


@dataclasses.dataclass(frozen=True)
class Bits:
    """How bits per dimension are measured.

    n: number of held-out images, and of training images for the errors that determine the variances; bound, ode:
    whether to measure the variational bound and the likelihood by the ODE; decoder: see `sampling.likelihood`; probes:
    number of probes of the ODE's trace. Raises InputError for values out of range.
    """

    n: int = 256
    bound: bool = True
    ode: bool = False
    decoder: Decoder = "discrete"
    probes: int = 1

    def __post_init__(self) -> None:
        wrong = [f"{k} {v!r}" for k, v, low in (("n", self.n, 2), ("probes", self.probes, 1)) if not _whole(v, low)]
        wrong += [f"decoder {self.decoder!r}"] if self.decoder not in get_args(Decoder) else []
        wrong += [f"{k} {v!r}" for k, v in (("bound", self.bound), ("ode", self.ode)) if not isinstance(v, bool)]
        if wrong:
            raise InputError(
                f"bits: {', '.join(wrong)}: n must be a whole number above 1, probes one above 0, bound and ode true "
                f"or false, decoder one of {', '.join(get_args(Decoder))}"
            )

    @classmethod
    def of_mapping(cls, data: Any) -> "Bits":
        """Return the Bits of the key ``bits`` of a study; raises InputError for unknown keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict) or set(data) - set(names):
            raise InputError(f"bits: expected a mapping with keys of {', '.join(names)}, got {data!r}")
        return cls(**data)

    def measure(
        self,
        model: DenoiserProtocol,
        held_out: ImageSet,
        training: ImageSet,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Return keys of a row: bpd, bpd_low, bpd_high (95 %), bpd_terms, bpd_images, those of bpd_ode, or bpd_refused.

        They are the same on all ranks (collective). progress: called with the number of images of each batch.
        """
        held_out, training, S = _first(held_out, self.n), _first(training, self.n), model.states.S
        how = f"{self.decoder} decoder, {len(held_out)} held-out images, variances by {len(training)} training images"
        out: dict[str, Any] = {HOW: how + (f", {self.probes} probes of the ODE's trace" if self.ode else "")}
        prior = extras(model).prior
        if prior is not None and not prior.has_density:
            return out | {REFUSED: f"{type(prior).__name__} has no density"}
        errors = torch.zeros(S + 1, dtype=torch.float64)
        errors[1:] = held_out_errors(model, training, model.states.rows, batch_size, progress)[0]
        for column, wanted in ((BOUND, self.bound), (ODE, self.ode)):
            if not wanted:
                continue
            name = column.name
            if column is ODE and S < ODE_ROWS:
                out[REFUSED] = f"bpd_ode integrates from row to row, and needs at least {ODE_ROWS} rows; there are {S}"
                continue
            try:
                terms = self._terms(model, held_out, batch_size, errors, column is ODE, progress)
            except InputError as error:
                out[REFUSED] = str(error)
                continue
            mean, half = terms.bpd
            if not math.isfinite(mean + half):
                out[REFUSED] = f"{name} is not finite: {mean:g} +- {half:g} over {len(held_out)} images"
                continue
            width = float(terms.bits(torch.zeros(()), whole=True))
            shares = {
                "decoder": float(terms.bits(terms.decoder).mean()) + width,
                "prior": float(terms.bits(terms.prior).mean()),
                "rows": dict(zip(map(str, terms.names), terms.bits(terms.rows).mean(1).tolist(), strict=True)),
            }
            images = terms.bits(terms.total, whole=True).tolist()
            parts = {"": mean, "low": mean - half, "high": mean + half, "terms": shares, "images": images}
            out |= {column.key(part=part): value for part, value in parts.items()}
        return out

    def _terms(
        self,
        model: DenoiserProtocol,
        images: ImageSet,
        batch_size: int,
        errors: Tensor,
        ode: bool,
        progress: Callable[[int], None] | None,
    ) -> NLLTerms:
        (rank, world), batches = rank_and_world(), torch.arange(len(images)).split(batch_size)
        device = next(iter(model.parameters())).device
        mine: dict[int, NLLTerms] = {}
        with shared_errors():
            for k in range(len(batches))[rank::world]:
                i = batches[k]
                label = images.labels[i].to(device) if model.classes else None
                batch = (model, images.images[i], i.tolist(), label, self.decoder)
                mine[k] = (
                    ode_likelihood(*batch, self.probes, errors) if ode else variational_bound(*batch, errors=errors)
                )
                if progress:
                    progress(len(i))
        parts = {k: terms for part in all_gather(mine) for k, terms in part.items()}
        return concatenate([parts[k] for k in range(len(batches))])


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _first(images: ImageSet, n: int) -> ImageSet:
    return dataclasses.replace(images, images=images.images[:n], labels=images.labels[:n])
