"""`Expert`: a trained denoiser with its card, in one safetensors file that says everything about itself."""

import dataclasses
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_tdisent.diffusion.objectives import Objective
from lightning_tdisent.diffusion.spec import build, changed, rebuild, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import sha256 as sha256
from lightning_tdisent.files import write_whole
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.networks.rebuild import faithful, without_weights
from lightning_tdisent.sampling.checkpoint import load
from lightning_tdisent.sampling.denoiser import Denoiser

SCHEMA = 2
PARENT = ("network", "images_seen", "seconds", "validation")  # what a child's card keeps
BLANK = "0" * 64  # stands in a file where its own SHA-256 goes, while that is computed


@dataclasses.dataclass(frozen=True)
class Card:
    """What a file of weights holds and how it came about; everything is plain JSON.

    module, network, states, objective: class paths with constructor arguments; fingerprint: hash of the table;
    rows: rows owned; image_range: values the network was trained on; data: digest of the training images;
    weights: ``ema``, ``live``, or ``start`` where a warm start was better than what training made of it; average: its
    decay or relative length sigma_rel, the steps averaged, and the steps ``before`` them that it continues;
    images_seen, steps, seconds: cost of the training; parents: the same, with network and sha256, of the files it
    started warm from and of theirs; seed; errors: held-out error of x0_hat of the start and of the average (or live
    weights), where they were compared; validation: ``passes``, images passed through the network while
    validating, and ``seconds`` of it; rounds: images_seen and seconds at the end of each round of an adaptive budget.
    """

    module: str
    network: dict[str, Any]
    states: dict[str, Any]
    objective: dict[str, Any]
    fingerprint: str
    rows: list[int]
    image_range: list[float]
    data: str
    weights: str
    average: dict[str, float] | None
    images_seen: int
    steps: int
    seconds: float
    seed: int
    version: str
    parents: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    schema: int = SCHEMA
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    rounds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The weights that the training exports, ``ema`` or ``live``, even where its start was better."""
        return next((name for name in self.errors if name != "start"), self.weights)

    @property
    def shape(self) -> list[int]:
        """(C, H, W) of the images."""
        shape: list[int] = self.states["init_args"].get("shape") or self.network["init_args"]["shape"]
        return shape

    @classmethod
    def of(cls, denoiser: Denoiser, **facts: Any) -> "Card":
        """Card of a denoiser, with the facts of its training; refuses a table that a schedule cannot rebuild."""
        states = spec(denoiser.states)
        # a file that has changed since it was read is for whoever loads the weights to refuse: they are worth keeping
        if not changed(states) and build(states, LatentStates).fingerprint != denoiser.states.fingerprint:
            raise InputError(f"{denoiser.states} is no table of its schedule and cannot be described in a file")
        return cls(
            network=spec(denoiser.network),
            states=states,
            objective=spec(denoiser.objective),
            fingerprint=denoiser.states.fingerprint,
            rows=denoiser.rows,
            image_range=[-1.0, 1.0],
            **facts,
        )

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> "Card":
        """Card from its JSON; refuses another schema or missing fields, but for those that older files do not have."""
        fields = {f.name for f in dataclasses.fields(cls)}
        newer = {"errors", "validation", "rounds"}
        if not isinstance(data, dict):
            raise InputError(f"{where}: its card is a {type(data).__name__}, not an object")
        if data.get("schema") != SCHEMA or set(data) | newer != fields:
            odd = sorted((set(data) | newer) ^ fields)
            raise InputError(f"{where}: card of schema {data.get('schema')}, this version reads {SCHEMA}; odd: {odd}")
        return cls(**data)

    def build(self, where: str) -> Denoiser:
        """Build the denoiser without its weights (on the meta device) and check the table against the fingerprint."""
        if lines := changed([self.states, self.network, self.objective]):
            raise InputError(f"{where}: {'; '.join(lines)}")
        states = build(self.states, LatentStates)
        if states.fingerprint != self.fingerprint:
            raise InputError(
                f"{where}: the table rebuilt from its description has fingerprint {states.fingerprint}, the file was "
                f"trained with {self.fingerprint}. The schedule code has changed since."
            )
        return Denoiser(without_weights(self.network), build(self.objective, Objective), states, self.rows)


def rebuilt(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser that a file of this one would give back, with the same tensors as weights.

    Raises InputError, naming the part and what differs, unless network, table, objective and operator compute the
    same from what the file would say of them. See `networks.rebuild.faithful`.
    """
    network, objective, states = faithful(denoiser.network), rebuild(denoiser.objective), rebuild(denoiser.states)
    if states.fingerprint != denoiser.states.fingerprint:
        raise InputError(f"{denoiser.states} is no table of its schedule and cannot be described in a file")
    states.to(denoiser.weights.device)
    other = Denoiser(network, objective, states, denoiser.rows)
    other.weights = other.weights.to(denoiser.weights.device)
    generator = torch.Generator().manual_seed(1)
    x0, item = 2 * torch.rand(2, *denoiser.shape, generator=generator) - 1, torch.arange(2)
    x0, item = x0.to(denoiser.weights.device), item.to(denoiser.weights.device)
    z, again = denoiser.components(x0, item), other.components(x0, item)
    if z.shape != again.shape or not torch.allclose(z, again):
        raise InputError(
            f"{type(denoiser.states).__name__}: the table built from what a file would say of it makes other states of "
            "an image: its operator or basis is random, or has arguments that are no attributes"
        )
    s = torch.tensor([denoiser.rows[0], denoiser.rows[-1]], device=x0.device)
    a, b = states.coefficients(s, z)
    eps = torch.randn(z.shape, generator=generator).to(z)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    parts = ((d.weights, d.objective) for d in (denoiser, other))
    mine, theirs = ((weights, o.target(z, eps, a, b), o.x0(eps, z, a, b)) for weights, o in parts)
    if not all(torch.allclose(m, t, equal_nan=True) for m, t in zip(mine, theirs, strict=True)):
        raise InputError(
            f"{type(objective).__name__}: the objective built from what a file would say of it has other weights or "
            "targets: keep every argument of it, and of its weight, as an attribute of the same name"
        )
    return other


def save_expert(path: str | Path, denoiser: Denoiser, card: Card, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights (the denoiser's own if not given) and card to a .safetensors file; never half-written or NaN.

    The card as written begins with the SHA-256 of the whole file, taken with zeros in its own place. Raises InputError,
    with nothing written, for a network that the file would not give back, or weights of other names or shapes.
    """
    faithful(denoiser.network)
    own = denoiser.state_dict()
    state = weights if weights is not None else own
    if odd := sorted(k for k in own.keys() | state.keys() if k not in own or k not in state
                     or own[k].shape != state[k].shape):  # fmt: skip
        raise InputError(f"{path}: weights that do not fit their network were to be written: {', '.join(odd[:6])}")
    refuse_non_finite(str(path), state)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    content = save(tensors, {"card": json.dumps({"sha256": BLANK, **dataclasses.asdict(card)})})
    write_whole(path, content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1))


def read_card(path: str | Path, verify: bool = False) -> Card:
    """Read the card alone, the header of a .safetensors file; with ``verify`` hash the rest too, and refuse damage."""
    path = Path(path)
    if path.suffix == ".ckpt":
        return _read_checkpoint(path)[0]
    try:
        with path.open("rb") as file:
            size = file.read(8)
            (length,) = struct.unpack("<Q", size)
            if length > 100_000_000:
                raise ValueError("header too long")
            header = file.read(length)
            card = json.loads(json.loads(header)["__metadata__"]["card"])
            named = str(card.pop("sha256", "")) if isinstance(card, dict) else ""
            if verify and named:
                total = hashlib.sha256(size + header.replace(named.encode(), BLANK.encode(), 1))
                while piece := file.read(1 << 20):
                    total.update(piece)
                if (found := total.hexdigest()) != named:
                    raise InputError(f"{path}: damaged: sha256 {found[:12]}.., the file says {named[:12]}..")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an expert written by this project ({type(error).__name__}: {error})") from None
    return Card.from_json(card, str(path))


def load_expert(path: str | Path, verify: bool = True) -> tuple[Denoiser, Card]:
    """Build the denoiser of a .safetensors file with its weights, in eval mode; see `spec.build` for classes.

    Of a training's .ckpt the first of its averages is taken, the live weights if it keeps none. Raises InputError for
    a file whose bytes are not those written, unless ``verify`` is false: it has been looked at. Raises `NotFinite`
    for weights that hold NaN or infinity.
    """
    checkpoint = _read_checkpoint(Path(path)) if Path(path).suffix == ".ckpt" else None
    card = checkpoint[0] if checkpoint else read_card(path, verify)
    denoiser = card.build(str(path))
    try:
        # cloned, and so aligned: results must not depend on the length of the header
        state = checkpoint[1] if checkpoint else {k: v.clone() for k, v in load_file(path).items()}
        denoiser.load_state_dict(state, strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: weights do not fit the network named in the file: {error}") from None
    refuse_non_finite(str(path), state)
    return denoiser.eval(), card


def check_finite(path: str | Path) -> None:
    """Read the tensors of a .safetensors file one by one, and raise `NotFinite` for those with NaN or infinity."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator)
                refuse_non_finite(str(path), {name: file.get_tensor(name)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a .safetensors file of weights ({error})") from None


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Piece(NamedTuple):
    """Where a tensor lies in its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def pieces(path: str | Path) -> list[Piece]:
    """The tensors of a .safetensors file in their order there, from its header alone; raises InputError."""
    try:
        with Path(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
            header.pop("__metadata__", None)
            found = [
                Piece(name, DTYPES[t["dtype"]], tuple(t["shape"]), 8 + length + begin, end - begin)
                for name, t in header.items()
                for begin, end in [t["data_offsets"]]
            ]
            size = file.seek(0, 2)
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a .safetensors file of weights ({type(error).__name__}: {error})") from None
    for piece in found:
        if piece.nbytes != math.prod(piece.shape) * piece.dtype.itemsize or piece.begin + piece.nbytes > size:
            raise InputError(f"{path}: {piece.name} does not lie in the file as its header says")
    return sorted(found, key=lambda piece: piece.begin)


def fitting_pieces(path: str | Path, denoiser: Denoiser) -> list[Piece]:
    """Return the tensors of a file, which must be those of a denoiser by name and shape; no weights are read."""
    found = pieces(path)
    there = {piece.name: list(piece.shape) for piece in found}
    here = {name: list(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    if odd := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        raise InputError(f"{path}: weights do not fit the network named in the file: {', '.join(odd[:8])}")
    return found


def _read_checkpoint(path: Path) -> tuple[Card, dict[str, Tensor]]:
    """Return the card in a training's checkpoint, and the first of its averages, or its live weights."""
    content = load(path)
    if not isinstance(content, dict) or "card" not in content or "state_dict" not in content:
        raise InputError(f"{path}: not a checkpoint of this project: it has no card")
    card, average = content["card"], content.get("ema")
    state = {k.removeprefix("denoiser."): v for k, v in content["state_dict"].items() if k.startswith("denoiser.")}
    if average is not None:
        state |= average["weights"]
        continued = {"before": average["before"]} if average.get("before") else {}
        card |= {"weights": "ema", "average": average["kinds"][0] | {"steps": average["step"]} | continued}
    return Card.from_json(card, str(path)), state
