"""Bits per dimension of a model, beside its other numbers in a row."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.ranks import gather, place
from lightning_tdisent.sampling.denoiser import Denoises
from lightning_tdisent.sampling.evaluation import held_out_errors
from lightning_tdisent.sampling.likelihood import Decoder, Terms, bound, concatenate, flow_bound
from lightning_tdisent.streaming.shards import ImageSet


@dataclasses.dataclass(frozen=True)
class Bits:
    """Bits per dimension of held-out images, as keys of a row.

    training: images for the errors that the variances are chosen by; n: of each; bound, ode: which of the two; decoder:
    see `likelihood`; probes: of the ODE's trace.
    """

    training: ImageSet
    n: int = 256
    bound: bool = True
    ode: bool = False
    decoder: Decoder = "discrete"
    probes: int = 1

    def of(self, model: Denoises, held_out: ImageSet, batch_size: int) -> dict[str, Any]:
        """bpd, bpd_low, bpd_high (95 %), bpd_terms, bpd_images, and the same for bpd_ode; the same on all ranks."""
        rows = model.states.rows
        errors = torch.zeros(model.states.S + 1, dtype=torch.float64)
        errors[1:] = held_out_errors(model, _first(self.training, self.n), rows, batch_size)
        out: dict[str, Any] = {}
        for name, wanted in (("bpd", self.bound), ("bpd_ode", self.ode)):
            if not wanted:
                continue
            try:
                terms = self._terms(model, _first(held_out, self.n), batch_size, errors, name == "bpd_ode")
            except InputError as error:
                out["refused"] = str(error)
                continue
            mean, half = terms.bpd
            width = float(terms.bits(torch.zeros(()), whole=True))
            shares = {
                "decoder": float(terms.bits(terms.decoder).mean()) + width,
                "prior": float(terms.bits(terms.prior).mean()),
                "rows": dict(zip(map(str, terms.names), terms.bits(terms.rows).mean(1).tolist(), strict=True)),
            }
            out |= {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half, f"{name}_terms": shares}
            out |= {f"{name}_images": terms.bits(terms.total, whole=True).tolist()}
        probes = f", {self.probes} probes of the ODE" if self.ode else ""
        out["bpd_how"] = (
            f"{self.decoder} decoder, {self.n} held-out images, variances by {self.n} training images{probes}"
        )
        return out

    def _terms(self, model: Denoises, images: ImageSet, batch_size: int, errors: Tensor, ode: bool) -> Terms:
        (rank, world), batches = place(), torch.arange(len(images)).split(batch_size)
        device = next(iter(model.parameters())).device
        mine: dict[int, Terms] = {}
        for k in range(len(batches))[rank::world]:
            i = batches[k]
            label = images.labels[i].to(device) if model.classes else None
            batch = (model, images.images[i], i.tolist(), label, self.decoder)
            mine[k] = flow_bound(*batch, self.probes, errors) if ode else bound(*batch, errors=errors)
        parts = {k: terms for part in gather(mine) for k, terms in part.items()}
        return concatenate([parts[k] for k in range(len(batches))])


def _first(images: ImageSet, n: int) -> ImageSet:
    return dataclasses.replace(images, images=images.images[:n], labels=images.labels[:n])
