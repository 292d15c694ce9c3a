"""`Card`: the metadata in a file of weights."""

import contextlib
import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_tdisent.artifacts import unsealed
from lightning_tdisent.diffusion.objectives import Objective
from lightning_tdisent.diffusion.schedules import LONGEST
from lightning_tdisent.diffusion.spec import build, changed, filled, said, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError, check_shape
from lightning_tdisent.models.checkpoint import load
from lightning_tdisent.networks.rebuild import of_file
from lightning_tdisent.runs import AVERAGES, CONFIG, identity_of
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.schemas import Kinds, from_json, is_count, is_number, is_part, is_text

SCHEMA = 2
PARENT = ("network", "images_seen", "seconds", "validation")  # fields of a parent's card kept in a child's card


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
    """Name the file in errors raised inside; values of a wrong type may make constructors fail in any way."""
    try:
        yield
    except InputError as error:
        raise error if str(error).startswith(where) else error.within(where) from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its card does not describe a valid model: {said(error):.300}") from error


RANGE = [-1.0, 1.0]  # value range of training images
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
}  # a check for the value of each field of a card


@dataclasses.dataclass(frozen=True)
class Card:
    """Content and origin of a file of weights; every field is plain JSON.

    module, network, states, objective: class paths with constructor arguments.
    fingerprint: hash of the table.
    rows: rows owned.
    image_range: value range of the training images.
    data: digest of the training images.
    weights: ``ema``, ``live``, or ``start`` if the weights of a warm start were better than the trained ones.
    average: decay or relative length sigma_rel of the average, the ``steps`` averaged, and the steps ``before`` them
        that it continues; None without one.
    images_seen, steps, seconds: cost of the training.
    seed: seed of the training.
    version: version of this package.
    parents: cost, network and sha256 of the files that the training started from, and of their parents.
    schema: version of this format.
    errors: held-out errors of x0_hat of the warm start and of the average (or live weights), if they were compared.
    validation: ``passes``, number of images passed through the network in validation, and ``seconds``, its time.
    rounds: images_seen and seconds at the end of each round of an adaptive budget.
    run: identity of the training run.
    initial: hash of the random initial weights, empty after a warm start.
    label_drop: fraction of labels that training replaced by the null label.

    Older files lack the last three.
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
        """SHA-256 of the file that the training started from, empty if it began with random weights."""
        return next((p["sha256"] for p in reversed(self.parents) if "weight" not in p), "")

    @property
    def kind(self) -> str:
        """The weights that the training exports, ``ema`` or ``live``, even if those of its warm start were better."""
        return next((name for name in self.errors if name != "start"), self.weights)

    @property
    def shape(self) -> list[int]:
        """Shape (C, H, W) of the images."""
        shape: list[int] = self.states["init_args"].get("shape") or self.network["init_args"].get("shape")
        check_shape(f"{self.network['class_path']}: shape", shape)
        return shape

    @classmethod
    def of(cls, denoiser: Denoiser, **facts: Any) -> "Card":
        """Return the card of a denoiser; facts: the fields about its training.

        Raises InputError for a table that cannot be rebuilt from its arguments.
        """
        states = spec(denoiser.states)
        # if a file has changed since it was read, the card is still written: the weights are worth keeping
        if not changed(states) and build(states, LatentStates).fingerprint != denoiser.states.fingerprint:
            raise InputError(f"{denoiser.states} cannot be rebuilt from its schedule and cannot be described in a file")
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
        """Return a card from its JSON; missing fields that have a default get it, since older files lack them.

        Raises InputError for another schema, missing or unknown fields, and values of a wrong type.
        """
        return from_json(cls, data, where, SCHEMA, _KINDS)

    def table(self, where: str) -> LatentStates:
        """Build the table, and check it against the fingerprint and the rows owned.

        where: name of the file, for messages. Raises InputError if they do not agree, for another image range, and for
            changed files.
        """
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
        """Build the denoiser without its weights (on the meta device), with memory limits from the file's tensors.

        where: name of the file, for messages.
        shapes: shapes of the tensors in the file, by name.

        Raises InputError for a network with other tensors.
        """
        states = self.table(where)
        with _from_card(where):
            network, objective = of_file(filled(self.network), shapes, where), build(filled(self.objective), Objective)
            return Denoiser(network, objective, states, self.rows)


def read_card(path: str | Path, verify: bool = False) -> Card:
    """Return the card of a file of weights; of a .safetensors file only the header is read.

    verify: also hash the rest of the file. Raises InputError for a missing or damaged file, and one that is no expert.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        return read_checkpoint(path)[0]
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


def has_card(path: Path) -> bool:
    """Return whether a safetensors file has a card; read from its header alone."""
    try:
        unsealed(path, "card", False, "")
    except (InputError, OSError, struct.error, ValueError, KeyError, TypeError):
        return False
    return True


def refuse_foreign(path: Path, card: Card | None = None) -> None:
    """Raise InputError for weights in a run folder that belong to another run, by the id in its ``config.yaml``.

    Weights of early versions have no id and are accepted.
    """
    own = identity_of(path.parent)
    run = own and (card or read_card(path)).run
    if run and own != run:
        raise InputError(
            f"{path} is of run {run}, {path.parent} is the folder of run {own} (id in its config.yaml). Put the "
            "file elsewhere to use it; the command of the run exports its own weights again"
        )


def read_checkpoint(path: Path) -> tuple[Card, dict[str, Tensor]]:
    """Return the card in a training checkpoint, and its weights: the first of its averages, or the live weights."""
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
