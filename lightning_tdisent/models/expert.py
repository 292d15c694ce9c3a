"""`Expert`: a trained denoiser with its card, in one safetensors file that says everything about itself."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_tdisent.artifacts import (
    Kinds,
    check_fields,
    check_schema,
    is_count,
    is_number,
    is_part,
    is_text,
    parse_json,
)
from lightning_tdisent.diffusion.objectives import Objective
from lightning_tdisent.diffusion.schedules import LONGEST
from lightning_tdisent.diffusion.spec import build, changed, filled, rebuild, said, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.digests import digest, digest_of
from lightning_tdisent.errors import InputError, check_shape
from lightning_tdisent.files import write_whole
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.models.checkpoint import load
from lightning_tdisent.networks.rebuild import faithful, of_file
from lightning_tdisent.runs import AVERAGES, CONFIG, identity_of
from lightning_tdisent.sampling.denoiser import Denoiser

SCHEMA = 2
PARENT = ("network", "images_seen", "seconds", "validation")  # what a child's card keeps
MOST = 100_000_000  # bytes of a header of safetensors
BLANK = "0" * 64  # stands in a file where its own SHA-256 goes, while that is computed


def _is_network(value: Any) -> bool:
    classes = value["init_args"].get("classes") if is_part(value) else 0
    return classes is None or (is_count(classes) and classes != 0)


def _is_table(value: Any) -> bool:
    words = value["init_args"] if is_part(value) else {}
    fits = "S" not in words or (is_count(words["S"]) and 1 <= words["S"] <= LONGEST)
    return is_part(value) and fits and ("schedule" not in words or is_part(words["schedule"]))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, (int, float)) for v in value.values())


def _is_parent(value: Any) -> bool:
    cost = isinstance(value, dict) and is_count(value.get("images_seen")) and is_number(value.get("seconds"))
    return cost and isinstance(value.get("sha256"), str) and is_part(value.get("network"))


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value)) and value == sorted({*value}) and value[:1] > [0]


@contextlib.contextmanager
def _from_card(where: str) -> Iterator[None]:
    """Name the file in what is refused inside; parts that were given values of a wrong type may fail anyhow."""
    try:
        yield
    except InputError as error:
        raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its card describes no model: {said(error):.300}") from error


RANGE = [-1.0, 1.0]  # of the images that networks are trained on
_KINDS: Kinds = {
    **dict.fromkeys(("module", "fingerprint", "data", "version", "run", "initial"), is_text),
    "label_drop": lambda value: value is None or is_number(value),
    "network": _is_network,
    "states": _is_table,
    "objective": is_part,
    "rows": _are_rows,
    "image_range": lambda value: isinstance(value, list) and all(isinstance(v, (int, float)) for v in value),
    "weights": lambda value: value in ("ema", "live", "start"),
    "average": lambda value: value is None or _are_numbers(value),
    **dict.fromkeys(("images_seen", "steps", "seed"), is_count),
    "seconds": is_number,
    "parents": lambda value: isinstance(value, list) and all(map(_is_parent, value)),
    **dict.fromkeys(("errors", "validation"), _are_numbers),
    "rounds": lambda value: isinstance(value, dict) and all(map(_are_numbers, value.values())),
}  # what the fields of a card may be


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
    validating, and ``seconds`` of it; rounds: images_seen and seconds at the end of each round of an adaptive budget;
    run: identity of the run that trained them; initial: hash of the random weights it began with, empty after a warm
    start; label_drop: share of labels that training replaced by the null label. Older files lack the last three.
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
    run: str = ""
    initial: str = ""
    label_drop: float | None = None

    @property
    def warm_from(self) -> str:
        """SHA-256 of the file that it started warm from, empty if it began with random weights."""
        return next((p["sha256"] for p in reversed(self.parents) if "weight" not in p), "")

    @property
    def kind(self) -> str:
        """The weights that the training exports, ``ema`` or ``live``, even where its start was better."""
        return next((name for name in self.errors if name != "start"), self.weights)

    @property
    def shape(self) -> list[int]:
        """(C, H, W) of the images."""
        shape: list[int] = self.states["init_args"].get("shape") or self.network["init_args"].get("shape")
        check_shape(f"{self.network['class_path']}: shape", shape)
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
            image_range=RANGE,
            **facts,
        )

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> "Card":
        """Card from its JSON; a field with a default may be absent, as older files lack it, and has its default then.

        Raises InputError for another schema, fields that are missing or unknown, and values of another kind.
        """
        if not isinstance(data, dict):
            raise InputError(f"{where}: its card is a {type(data).__name__}, not an object")
        check_schema(data, where, SCHEMA)
        check_fields(cls, data, where, _KINDS)
        return cls(**data)

    def table(self, where: str) -> LatentStates:
        """Build the table and check it against the fingerprint and the rows owned."""
        if self.image_range != RANGE:
            raise InputError(f"{where}: trained on images in {self.image_range}, this version knows {RANGE} alone")
        if lines := changed([self.states, self.network, self.objective]):
            raise InputError(f"{where}: {'; '.join(lines)}")
        with _from_card(where):
            states = build(filled(self.states), LatentStates)
            if states.fingerprint != self.fingerprint:
                raise InputError(
                    f"the table rebuilt from its description has fingerprint {states.fingerprint}, the file was "
                    f"trained with {self.fingerprint}. The schedule code has changed since."
                )
        if self.rows[-1] > states.S:
            raise InputError(f"{where}: rows {self.rows!r:.100} are not among the latent rows 1..{states.S}")
        return states

    def build(self, where: str, shapes: Mapping[str, Sequence[int]]) -> Denoiser:
        """Build the denoiser without its weights (on the meta device), within the bounds of the file's tensors.

        shapes: of the tensors that the file has; raises InputError for a network that has others.
        """
        states = self.table(where)
        with _from_card(where):
            network, objective = of_file(filled(self.network), shapes, where), build(filled(self.objective), Objective)
            return Denoiser(network, objective, states, self.rows)


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
    z, again = denoiser.encode(x0, item), other.encode(x0, item)
    if z.shape != again.shape or not torch.allclose(z, again):
        raise InputError(
            f"{type(denoiser.states).__name__}: the table built from what a file would say of it makes other states of "
            "an image: its operator or space is random, or has arguments that are no attributes"
        )
    s = torch.tensor([denoiser.rows[0], denoiser.rows[-1]], device=x0.device)
    _, a, b = states.normalised(s, z)
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
    write_whole(path, sealed(tensors, "card", dataclasses.asdict(card)))


def sealed(tensors: dict[str, Tensor], key: str, card: dict[str, Any]) -> bytes:
    """Return a .safetensors file with a card in its metadata that begins with the SHA-256 of all; see `unsealed`."""
    content = save(tensors, {key: json.dumps({"sha256": BLANK, **card})})
    return content.replace(BLANK.encode(), digest(content).encode(), 1)


def unsealed(path: Path, key: str, verify: bool, remedy: str) -> Any:
    """Return the card of a .safetensors file without its SHA-256; with ``verify`` hash the rest too, and refuse damage.

    Files of the first versions have none. Raises InputError, OSError, struct.error, ValueError, KeyError or TypeError.
    """
    with path.open("rb") as file:
        size = file.read(8)
        (length,) = struct.unpack("<Q", size)
        if length > min(MOST, os.fstat(file.fileno()).st_size):
            raise ValueError("header too long")
        header = file.read(length)
        card = parse_json(parse_json(header)["__metadata__"][key])
        named = str(card.pop("sha256", "")) if isinstance(card, dict) else ""
        if verify and named:
            begin = size + header.replace(named.encode(), BLANK.encode(), 1)
            found = digest_of(itertools.chain([begin], iter(lambda: file.read(1 << 20), b"")))
            if found != named:
                raise InputError(
                    f"{path}: damaged: sha256 {found[:12]}.., the file says {named[:12]}... Copy it anew; or {remedy}"
                )
    return card


def weights_digest(network: torch.nn.Module) -> str:
    """Return a hash that tells random weights of one draw from those of another, empty where they are on no device.

    Of the first value of the first 32 that are not constant, to two digits: processors differ in the last bits of what
    one seed draws.
    """
    weights = [w for w in network.parameters() if w.numel() > 1]
    if any(w.is_meta for w in weights):
        return ""
    some = [w for w in weights if float(w.detach().flatten()[0]) != float(w.detach().flatten()[-1])][:32]
    values = " ".join(f"{float(w.detach().flatten()[0]):.1e}" for w in some)
    return digest(values)


def read_card(path: str | Path, verify: bool = False) -> Card:
    """Read the card alone, the header of a .safetensors file; with ``verify`` hash the rest too, and refuse damage."""
    path = Path(path)
    if path.suffix == ".ckpt":
        return _read_checkpoint(path)[0]
    again = "make it again"
    if (path.parent / CONFIG).exists():
        again = "remove it and give the command of its run again, which exports it from the run's checkpoint"
    elif path.parent.name == AVERAGES:
        again = "remove it; average works from the others"
    try:
        card = unsealed(path, "card", verify, again)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an expert written by this project ({type(error).__name__}: {error})") from None
    return Card.from_json(card, str(path))


def refuse_foreign(path: Path, card: Card | None = None) -> None:
    """Refuse weights in a run folder that are of another run, by the id in its ``config.yaml``; early ones say none."""
    own = identity_of(path.parent)
    run = own and (card or read_card(path)).run
    if run and own != run:
        raise InputError(
            f"{path} is of run {run}, {path.parent} is the folder of run {own} (id in its config.yaml). Put the "
            "file elsewhere to use it; the command of its run exports its own again"
        )


def load_expert(path: str | Path, verify: bool = True) -> tuple[Denoiser, Card]:
    """Build the denoiser of a .safetensors file with its weights, in eval mode; see `spec.build` for classes.

    Of a training's .ckpt the first of its averages is taken, the live weights if it keeps none. Raises InputError for
    a file whose bytes are not those written, unless ``verify`` is false: it has been looked at. Raises `NotFinite`
    for weights that hold NaN or infinity.
    """
    checkpoint = _read_checkpoint(Path(path)) if Path(path).suffix == ".ckpt" else None
    card = checkpoint[0] if checkpoint else read_card(path, verify)
    shapes = {k: v.shape for k, v in checkpoint[1].items()} if checkpoint else shapes_in(path)
    denoiser = card.build(str(path), shapes)
    try:
        # cloned, and so aligned: results must not depend on the length of the header
        state = checkpoint[1] if checkpoint else {k: v.clone() for k, v in load_file(path).items()}
        denoiser.load_state_dict(state, strict=True, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
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
            header = parse_json(file.read(min(length, MOST)))
            header.pop("__metadata__", None)
            found = [
                Piece(name, DTYPES[t["dtype"]], tuple(t["shape"]), 8 + length + begin, end - begin)
                for name, t in header.items()
                for begin, end in [t["data_offsets"]]
            ]
            size = file.seek(0, 2)
            if not all(is_count(n) for piece in found for n in (piece.begin, piece.nbytes, *piece.shape)):
                raise ValueError("sizes that are no numbers from 0 on")
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a .safetensors file of weights ({type(error).__name__}: {error})") from None
    found.sort(key=lambda piece: (piece.begin, piece.nbytes))
    end = 8 + length
    for piece in found:
        if piece.begin != end or piece.nbytes != math.prod(piece.shape) * piece.dtype.itemsize:
            raise InputError(f"{path}: {piece.name} does not lie in the file as its header says")
        end += piece.nbytes
    if end != size:
        raise InputError(f"{path}: its header says it ends at byte {end:,}, it has {size:,}")
    return found


def shapes_in(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a .safetensors file by name, from its header alone; raises InputError."""
    return {piece.name: piece.shape for piece in pieces(path)}


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
