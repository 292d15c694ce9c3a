"""Fit priors to images at a row of a table, and keep them in files (2206.05173)."""

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_tdisent
from lightning_tdisent.artifacts import sealed, unsealed
from lightning_tdisent.data.decode import Decoder, side_of
from lightning_tdisent.data.shards import Shards
from lightning_tdisent.diffusion.bounds import Bounded
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.spec import build, rebuild, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.images import from_uint8
from lightning_tdisent.models.card import Card, read_card
from lightning_tdisent.models.compose import find_files
from lightning_tdisent.models.model_prior import FITTING
from lightning_tdisent.priors.prior import Prior, StandardNormal
from lightning_tdisent.runs import PRIOR
from lightning_tdisent.schemas import Kinds, from_json, is_count, is_number, is_part, is_text

SCHEMA = 1
_KINDS: Kinds = {
    "prior": is_part,
    **dict.fromkeys(("fingerprint", "data", "version", "run"), is_text),
    **dict.fromkeys(("row", "index", "n", "images_seen", "steps"), is_count),
    "log_snr": lambda value: isinstance(value, list) and all(isinstance(v, (int, float)) for v in value),
    "seconds": is_number,
    "notes": lambda value: isinstance(value, list) and all(map(is_text, value)),
    "label": lambda value: value is None or is_count(value),
}  # a check for the value of each field of a card


@dataclasses.dataclass(frozen=True)
class PriorCard:
    """Card of a prior: its fit, as plain JSON.

    prior: class path with arguments.
    fingerprint: hash of the table, truncated at the row.
    row, index, log_snr: where the prior was fitted.
    data: digest of the images.
    n: number of images.
    images_seen, steps, seconds: cost of a training, 0 if none was needed.
    notes: caveats of the fit.
    label: class of all the images, None for all classes.
    run: identity of the training, if there was one.
    version: version of this package.
    schema: version of this format.
    """

    prior: dict[str, Any]
    fingerprint: str
    row: int
    index: int
    log_snr: list[float]
    data: str
    n: int
    images_seen: int = 0
    steps: int = 0
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)
    label: int | None = None
    run: str = ""
    version: str = lightning_tdisent.__version__
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, data: Any, where: str) -> "PriorCard":
        """Return a card from its JSON; missing fields that have a default get it, since older files lack them.

        Raises InputError for another schema, missing or unknown fields, and values of a wrong type.
        """
        return from_json(cls, data, where, SCHEMA, _KINDS)

    @classmethod
    def of(cls, prior: Prior, states: Table, row: int, **facts: Any) -> "PriorCard":
        """Return the card of a prior at a row of a table; facts: the other fields."""
        cut = states.truncate(row)
        where: dict[str, Any] = {"row": row, "index": int(cut.index[row]), "log_snr": cut.log_snr[row].tolist()}
        return cls(prior=spec(prior), fingerprint=cut.fingerprint, **where, **facts)


def fit_prior(prior: Prior, states: Table, row: int, images: Tensor, data: str, label: int | None = None) -> PriorCard:
    """Fit a prior at a row of a table to images, and return its card.

    images: uint8, or x_0 as floats, (N, C, H, W); all are used.
    data: digest of the images.
    label: their class, None for all classes.

    Raises InputError for a prior that is trained by gradient descent, and for tables of several columns.
    """
    if prior.learned:
        raise InputError(f"{type(prior).__name__} is trained: fit with lightning_tdisent.PriorModule")
    if states.K > 1:
        raise InputError(f"priors are fitted at rows of tables of one column, this one has {states.K}")
    cut = states.truncate(row)
    a, b = (float(c) for c in cut.coefficients(row))
    x0 = images if images.is_floating_point() else from_uint8(images)
    stream = FITTING + int(cut.index[row])
    eps = seed_noise(range(len(x0)), stream, x0.shape[1:]) if prior.wants_noise else None
    notes = prior.fit(x0, a, b, eps)
    return PriorCard.of(prior, states, row, data=data, n=len(x0), notes=notes, label=label)


def fit_to(
    model: str | Path,
    at: int | float,
    part: dict[str, Any],
    data: str | Path,
    split: str = "train",
    n: int | None = None,
    label: int | None = None,
) -> tuple[Prior, PriorCard]:
    """Fit a prior at a row of a model's table to images of a data set.

    model: name of the model.
    at: the row, or a fraction of the rows.
    part: class path of the prior and its arguments.
    data, split: the data set.
    n: number of images; all if not given.
    label: fit to the images of this class alone, for a class-conditional model.

    Returns the prior and its card. Raises InputError for images that the model was not trained on: `load_truncated`
    would not accept the prior.
    """
    if n is not None and n < 1:
        raise InputError(f"-n {n}: at least 1 image")
    cards = [read_card(file) for file in find_files(model)]
    states, prior, shape = build(cards[0].states, LatentStates), build(part, Prior), cards[0].shape
    classes = cards[0].network["init_args"].get("classes")
    if label is not None and not 0 <= label < (classes or 0):
        raise InputError(f"--label {label}: {model} has {f'classes 0 to {classes - 1}' if classes else 'no classes'}")
    row = states.truncate(at).S
    shards = Shards.open(data, split, Decoder(shape[0], side_of(shape)))
    refuse_other_data(f"{data}, split {split}: its images are the data", shards.digest, str(model), cards)
    found = shards.decoded(n if label is None else None, spread=True)
    chosen = torch.arange(len(found)) if label is None else (found.labels == label).nonzero().flatten()[:n]
    if not len(chosen):
        raise InputError(f"{data}, split {split}: holds no image of class {label}")
    batch = found.batch(chosen)
    images = batch["image"] if "image" in batch else batch["latent"][:, 0].float()  # the means of latents
    if list(images.shape[1:]) != shape:
        raise InputError(f"{data} has images of {list(images.shape[1:])}, {model} makes {shape}")
    fitted = fit_prior(prior, states, row, images, found.digest, label)
    if classes and label is None and fitted.n > 1 and type(prior) is not StandardNormal:
        fitted.notes.append(ALL_CLASSES)
    return prior, fitted


ALL_CLASSES = "fitted to images of all classes, so that every class starts alike; prior --label K fits one to class K"


def refuse_other_data(what: str, digest: str, model: str, cards: Sequence[Card]) -> None:
    """Raise InputError if the digest of a prior's data differs from that of a model's training data, if both are known.

    what, model: names for the message.
    """
    if digest == "unknown":
        return
    if others := sorted({card.data for card in cards} - {digest, "unknown"}):
        raise InputError(
            f"{what} {digest}, {model} was trained on {others[0]}: a prior is fitted to the training images of its "
            "model, to no other split or set"
        )


def save_prior(path: str | Path, prior: Prior, card: PriorCard) -> None:
    """Write a prior and its card to a .safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in prior.state_dict().items()}
    refuse_non_finite(str(path), tensors)
    write_whole(path, sealed(tensors, "prior", dataclasses.asdict(card)))


def prior_file(source: str | Path) -> Path:
    """Return the file of a prior, given the file or its folder."""
    return Path(source) / PRIOR if Path(source).is_dir() else Path(source)


def read_prior_card(source: str | Path, verify: bool = False) -> PriorCard:
    """Return the card of a prior in a file or folder.

    verify: also hash the rest of the file. Raises InputError for a missing or damaged file, and one that is no prior.
    """
    path = prior_file(source)
    try:
        return PriorCard.from_json(unsealed(path, "prior", verify, "fit it again"), str(path))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; fit a prior with the command prior, or with PriorModule") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a prior written by this project ({type(error).__name__}: {error})") from None


def load_prior(source: str | Path) -> tuple[Prior, PriorCard]:
    """Return the prior of a file or folder, in eval mode, and its card; see `spec.build` for allowed classes.

    Raises InputError for a damaged file, and a prior without shape or with a density that is not finite.
    """
    path, card = prior_file(source), read_prior_card(source, verify=True)
    try:
        # cloned out of the memory-mapped file
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged: {error}") from None
    refuse_non_finite(str(path), tensors)
    with Bounded(str(path), max((tensor.numel() for tensor in tensors.values()), default=0), len(tensors)):
        prior = build(card.prior, Prior)
    _fill(prior, tensors, str(path))
    try:
        if prior.shape is None:
            raise InputError(f"{path}: its prior has no shape")
        if prior.has_density and not prior.log_prob(torch.zeros(1, *(prior.shape or []))).isfinite().all():
            raise InputError(f"{path}: its density is not finite")
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{path}: its tensors do not fit each other: {error}") from None
    return prior.eval(), card


def _fill(prior: Prior, tensors: dict[str, Tensor], where: str) -> None:
    """Set the tensors of a prior; buffers get the sizes of the fit. Raises InputError for other names."""
    if missing := prior.state_dict().keys() ^ tensors.keys():
        raise InputError(f"{where}: its tensors do not fit {type(prior).__name__}: {', '.join(sorted(missing)[:6])}")
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        owner = prior.get_submodule(module)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def rebuilt_prior(prior: Prior) -> Prior:
    """Return the prior that would be read from a file of this one, with the same tensors.

    Raises InputError if its density differs.
    """
    other, name = rebuild(prior), type(prior).__name__
    _fill(other, prior.state_dict(), name)
    if prior.has_density:
        tensors = prior.state_dict().values()
        device = next((t.device for t in tensors), torch.device("cpu"))
        other.to(device)
        x = torch.randn(2, *(prior.shape or []), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            mine, theirs = prior.log_prob(x), other.log_prob(x)
        if not torch.allclose(mine, theirs, equal_nan=True):
            raise InputError(
                f"{name}: built from its arguments and tensors it has log-densities {theirs.tolist()}, and not "
                f"{mine.tolist()}: keep every argument as an attribute of its name, and all else in buffers"
            )
    return other.requires_grad_(prior.learned)
