"""Truncated models: sampling starts at a row of the table from a prior fitted there (2206.05173)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.process import first_state
from lightning_tdisent.diffusion.table import TERMINAL_BOUND, signal
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.card import Card
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.models.prior_files import ALL_CLASSES, PriorCard, load_prior, refuse_other_data
from lightning_tdisent.models.residency import Residency
from lightning_tdisent.priors.prior import Prior, StandardNormal
from lightning_tdisent.sampling.denoiser import Denoiser, DenoiserProtocol
from lightning_tdisent.sampling.guidance import Extras, extras


class TruncatedModel(Extras, nn.Module):
    """A model whose sampling starts at a row of its table, from a prior; a denoiser on the rows up to it.

    denoiser: the model. Experts of the rows above are never called.
    prior: the distribution at the row.
    row: the row, or a fraction of the rows.
    card: card of the prior, None for N(0, I).

    Raises InputError for a prior that was fitted at another row, table or shape.
    """

    def __init__(
        self, denoiser: DenoiserProtocol, prior: Prior, row: int | float, card: PriorCard | None = None
    ) -> None:
        super().__init__()
        self.denoiser, self.states = denoiser, denoiser.states.truncate(row)
        self.shape, self.classes, self.card = denoiser.shape, denoiser.classes, card
        if prior.shape is not None and list(prior.shape) != list(denoiser.shape):
            raise InputError(f"the prior makes {prior.shape}, the model {denoiser.shape}")
        if prior.shape is None:
            prior.shape = list(denoiser.shape)
        if card is not None and card.fingerprint != self.states.fingerprint:
            L = self.states.log_snr[-1].tolist()
            raise InputError(
                f"the prior was fitted at row {card.row} (index {card.index}, log-SNR {card.log_snr}) of a table that "
                f"ends there with fingerprint {card.fingerprint}; the model's, cut at row {self.states.S} (index "
                f"{int(self.states.index[-1])}, log-SNR {L}), has {self.states.fingerprint}"
            )
        self._prior = (prior,)  # in a tuple, so that it is no submodule: it samples on the CPU whatever the device

    @property
    def prior(self) -> Prior:  # type: ignore[override]
        """The prior that sampling starts from."""
        return self._prior[0]

    residency = property(lambda self: extras(self.denoiser).residency)
    filled = property(lambda self: extras(self.denoiser).filled)
    differs = property(lambda self: extras(self.denoiser).differs)

    def __repr__(self) -> str:
        return f"TruncatedModel({self.denoiser!r}, from row {self.states.S}, {type(self.prior).__name__})"

    @property
    def cards(self) -> list[Card]:
        """Cards of the files of the model."""
        return getattr(self.denoiser, "cards", [])

    def expect(self, rows: Sequence[int]) -> None:
        """Pass the rows that will be evaluated to the model, which prepares for them."""
        extras(self.denoiser).expect(rows)

    def check_label(self, label: int | Tensor | None) -> str:
        """Raise InputError for another class than the prior's; return a note on the prior, or an empty string.

        label: the class of all images or, int64 (B,), of each; None for all classes in turn.
        """
        if self.card is None or self.classes is None:
            return ""
        labels = [None] if label is None else torch.as_tensor(label).flatten().tolist()
        if self.card.label is not None and (odd := [k for k in labels if k != self.card.label]):
            asked = "all classes are drawn in turn" if odd[0] is None else f"class {odd[0]} is asked for"
            raise InputError(
                f"the prior was fitted to class {self.card.label} alone, {asked}: sample with label {self.card.label} "
                "for all images, or give a prior of all classes, which evaluate and study require"
            )
        own = self.card.label is not None or isinstance(self.prior, StandardNormal)
        return "" if own else f"the prior was {ALL_CLASSES}"

    def start(self, seeds: Sequence[int], label: Tensor | None = None) -> Tensor:
        """Return x at the last row for these seeds, drawn from the prior; see `check_label` for errors."""
        self.check_label(label)
        x = self.prior.sample(seeds, int(self.states.index[-1]))
        return first_state(self.states, x) if isinstance(self.prior, StandardNormal) else x

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over all weights of the model, which need not be a module."""
        return iter(self.denoiser.parameters())  # type: ignore[arg-type]

    def forward(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """Return x0_hat of the model at row s; raises InputError for a row above the truncation."""
        if s > self.states.S:
            raise InputError(f"row {s} is above the truncation: sampling starts at row {self.states.S}")
        return self.denoiser(x, s, label)

    def at(self, s: int) -> Denoiser:
        """Return the owner of row s."""
        return self.denoiser.at(s)

    def __getattr__(self, name: str) -> Any:
        if name in ("rows", "objective", "network"):  # attributes of the model inside, if it has them
            return getattr(self.denoiser, name)
        return super().__getattr__(name)


def load_truncated(
    source: str | Path, start: str, residency: Residency = "resident", fill: str | None = None
) -> TruncatedModel:
    """Load a model as `load_model` does, truncated at the row of a prior.

    start: file or folder of a prior; or ``cut:ROW`` (a row, or a fraction of the rows) for N(0, I) at that row.

    Raises InputError for a prior of another row, table, shape or data.
    """
    kind, _, text = start.partition(":")
    if kind == "cut" and text:
        try:
            row: int | float = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise InputError(f"{start}: expected cut:ROW with a row, or a share of the rows such as 0.6") from None
        return TruncatedModel(load_model(source, residency, fill, row), StandardNormal(), row)
    prior, card = load_prior(start)
    model = load_model(source, residency, fill, card.row)
    refuse_other_data(f"{start}: the prior was fitted to the data", card.data, str(source), model.cards)
    return TruncatedModel(model, prior, card.row, card).eval()


def signal_note(model: Any) -> str:
    """Return a note if sampling starts from pure noise at a row that still has signal, else an empty string."""
    states = model.states
    end = signal(states.log_snr[-1, : states.image_columns])
    if isinstance(model, TruncatedModel) or end <= TERMINAL_BOUND:
        return ""
    cure = "; fit a prior at that row (the command prior)" if states.K == 1 else ""
    return f"its table ends at row {states.S} with {end:.2g} of the signal, but samples start from N(0, I){cure}"
