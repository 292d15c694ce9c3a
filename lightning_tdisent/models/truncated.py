"""Truncated models: sampling starts at a row of the table from a prior fitted there (2206.05173)."""

import dataclasses
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
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
from lightning_tdisent.diffusion.process import first_state
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.spec import build, rebuild, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.diffusion.table import TERMINAL_BOUND, Table, signal
from lightning_tdisent.digests import digest, sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.images import from_uint8
from lightning_tdisent.models.card import Card, read_card
from lightning_tdisent.models.compose import find_files, holds_weights, load_model
from lightning_tdisent.models.residency import Residency
from lightning_tdisent.priors.prior import Prior, StandardNormal
from lightning_tdisent.runs import PRIOR
from lightning_tdisent.sampling.denoiser import Denoiser, DenoiserProtocol
from lightning_tdisent.sampling.guidance import Extras, extras
from lightning_tdisent.sampling.sampler import DDIM
from lightning_tdisent.schemas import Kinds, from_json, is_count, is_number, is_part, is_text

SCHEMA = 1
FITTING = 3 << 20  # first noise stream of fitting priors
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
        fitted.notes.append(_ALL_CLASSES)
    return prior, fitted


_ALL_CLASSES = "fitted to images of all classes, so that every class starts alike; prior --label K fits one to class K"


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
        return "" if own else f"the prior was {_ALL_CLASSES}"

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
) -> tuple[TruncatedModel, list[Card]]:
    """Load a model as `load_model` does, truncated at the row of a prior.

    start: file or folder of a prior; or ``cut:ROW`` (a row, or a fraction of the rows) for N(0, I) at that row.

    Returns the model and the cards of its experts. Raises InputError for a prior of another row, table, shape or data.
    """
    kind, _, text = start.partition(":")
    if kind == "cut" and text:
        try:
            row: int | float = int(text) if text.isdigit() else float(text)
        except ValueError:
            raise InputError(f"{start}: expected cut:ROW with a row, or a share of the rows such as 0.6") from None
        model, cards = load_model(source, residency, fill, row)
        return TruncatedModel(model, StandardNormal(), row), cards
    prior, card = load_prior(start)
    model, cards = load_model(source, residency, fill, card.row)
    refuse_other_data(f"{start}: the prior was fitted to the data", card.data, str(source), cards)
    return TruncatedModel(model, prior, card.row, card).eval(), cards


def signal_note(model: Any) -> str:
    """Return a note if sampling starts from pure noise at a row that still has signal, else an empty string."""
    states = model.states
    end = signal(states.log_snr[-1, : states.image_columns])
    if isinstance(model, TruncatedModel) or end <= TERMINAL_BOUND:
        return ""
    cure = "; fit a prior at that row (the command prior)" if states.K == 1 else ""
    return f"its table ends at row {states.S} with {end:.2g} of the signal, but samples start from N(0, I){cure}"


class ModelPrior(Prior):
    """Prior that draws images from another model and adds noise up to the row (2205.12524, 2202.09671).

    It has no density.

    source: a run, a file of weights or a composite, sampled with DDIM; or the folder of a diffusers AutoencoderKL,
        whose latents are drawn from N(0, I).
    steps: number of DDIM steps; all rows if not given.
    shape: (C, H, W) of the images.
    sha256: digest of the source's weights, set by the fit; a prior that is loaded raises InputError if the source has
        other weights.
    clip: bound of the source's estimates of x_0, None for no bound, which latents require.
    """

    has_density = False
    levels: Tensor

    def __init__(
        self, source: str, steps: int | None = None, shape: Sequence[int] | None = None, sha256: str | None = None,
        clip: float | None = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(shape)
        self.source, self.steps, self.sha256, self.clip = source, steps, sha256, clip
        self.register_buffer("levels", torch.zeros(2, dtype=torch.float64))
        self._source: tuple[Any, ...] = ()  # in a tuple, so that it is no submodule: its weights are in other files

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """Store a and b, and check the source.

        Raises InputError for a source that requires classes or an observation, makes images of another shape or has
        another sha256, and for data outside [-clip, clip].
        """
        super().fit(x0, a, b, eps)
        self.levels = torch.tensor([a, b], dtype=torch.float64)
        found = _digest(self.source)
        self._source = self._source or _open_source(self.source)
        if self.sha256 not in (None, found):
            raise InputError(f"ModelPrior: sha256 {self.sha256} was given, {self.source} has {found}; leave it out")
        self.sha256 = found
        model, latent = self._source
        if latent is None and (model.classes or model.states.observation is not None):  # an autoencoder has neither
            what = "classes" if model.classes else "an observation"
            raise InputError(f"ModelPrior: {self.source} requires {what}, which a prior does not have")
        if self.clip is not None and (most := float(x0.abs().max())) > self.clip:
            raise InputError(
                f"ModelPrior: the data go up to {most:.3g}, clip is {self.clip:g}; give clip: null for latents"
            )
        made = list(self._images(range(2)).shape[1:])
        if made != self.shape:
            raise InputError(f"ModelPrior: {self.source} makes {made}, the data is {self.shape}")
        return []

    def log_prob(self, x: Tensor) -> Tensor:
        """Raise InputError: there is no density."""
        raise InputError("ModelPrior has no density: no likelihood can be computed with it")

    @torch.inference_mode()
    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """Return a x_0 + b eps with x_0 from the source and the noise of the whole chain, (len(seeds), C, H, W)."""
        assert self.shape is not None
        a, b = self.levels.tolist()
        x: Tensor = a * self._images(seeds) + b * seed_noise(seeds, stream, self.shape)
        return x

    def _images(self, seeds: Iterable[int]) -> Tensor:
        if not self._source:
            if self.sha256 is not None and (found := _digest(self.source)) != self.sha256:
                raise InputError(
                    f"ModelPrior: the weights of {self.source} have the sha256 {found[:12]}.., it was fitted with "
                    f"{self.sha256[:12]}..; put them back, or fit the prior again"
                )
            self._source = _open_source(self.source)
        model, latent = self._source
        each = []
        for seed in seeds:  # one at a time: in a batch the last bits would depend on the other images
            shape = latent or model.states.shape_at(model.states.S, model.shape)
            noise = seed_noise([seed], FITTING, shape)  # another stream than the noise added at the row
            if latent is None:
                start = first_state(model.states, noise)
                *_, (_, x, _) = DDIM(steps=self.steps, clip=self.clip).walk(model, [seed], start=start)
                each.append(model.states.decode(x.float()).cpu())
                continue
            z = noise / model.config.scaling_factor + (getattr(model.config, "shift_factor", None) or 0.0)
            each.append(model.decode(z).sample.clamp(-1, 1))
        return torch.cat(each)

    @property
    def cards(self) -> list[Card]:
        """Cards of the source; an autoencoder has none, so its cost is unknown."""
        return [] if _autoencoder(self.source) else [read_card(file) for file in find_files(self.source)]

    @property
    def evaluations(self) -> int:
        """Number of network evaluations per image."""
        self._source = self._source or _open_source(self.source)
        model, latent = self._source
        return 1 if latent is not None else len(DDIM(steps=self.steps).rows(model.states))


def _autoencoder(source: str) -> bool:
    return (Path(source) / "config.json").is_file() and not holds_weights(Path(source))


def _digest(source: str) -> str:
    """Return the SHA-256 of the weights of a source: of the file, or of the digests of several files."""
    files = sorted(Path(source).glob("*.safetensors")) if _autoencoder(source) else find_files(source)
    digests = [sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else digest(*digests)


def _open_source(source: str) -> tuple[Any, list[int] | None]:
    """Return a denoiser and None, or a diffusers autoencoder and the shape of its latents."""
    config = Path(source) / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "AutoencoderKL":
        from diffusers import AutoencoderKL

        autoencoder = AutoencoderKL.from_pretrained(source, local_files_only=True, use_safetensors=True).eval()
        side = autoencoder.config.sample_size // 2 ** (len(autoencoder.config.block_out_channels) - 1)
        return autoencoder, [autoencoder.config.latent_channels, side, side]
    return load_model(source)[0], None
