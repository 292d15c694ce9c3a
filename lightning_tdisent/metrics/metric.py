"""Base classes of metrics: columns in results, requirements, fields of the protocol, and computation."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from lightning_tdisent.diffusion.spec import Part, spec
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError

if TYPE_CHECKING:
    from lightning_tdisent.metrics.accumulators import Accumulator
    from lightning_tdisent.metrics.protocol import Protocol
    from lightning_tdisent.metrics.reference import Reference

Better = Literal["lower", "higher"]
Needs = Literal["features", "spatial", "logits", "pairs", "likelihood"]
INCEPTION = "inception"  # features of the literature, in which metrics have the literature's names
KNOWN: dict[str, type["Metric"]] = {}  # metrics whose modules are imported, by name, in the order of their definition


@dataclass(frozen=True)
class Column:
    """A number of a metric: its key in the rows of results, and its column in tables.

    name: of the number; label: what it is, in words; better: which direction is better, None if neither is;
    with_features: whether the key ends with the name of the feature network; inception: name in Inception's features,
    ``name`` if empty; distance: whether figures may show it as the distance to the real images; parts: what else the
    metric says about this number, under the key ``NAME_PART``: ``low`` and ``high`` (ends of a 95 % interval), ``std``,
    ``bias`` (value that a perfect model would reach on as few images), ``terms``, ``images`` (values of each image).
    """

    name: str
    label: str
    better: Better | None = None
    with_features: bool = True
    inception: str = ""
    distance: bool = False
    parts: tuple[str, ...] = ()

    def key(self, features: str = "", part: str = "") -> str:
        """Return the key in the rows of a protocol with these features; without features, the name in the code."""
        named = features if self.with_features and features != INCEPTION else ""
        name = self.inception if features == INCEPTION and self.inception else self.name
        return "_".join(word for word in (name, part, named) if word)

    def names(self, features: str = "") -> dict[str, str]:
        """Return the keys of the number and its parts, by their names in the code."""
        return {self.key("", part): self.key(features, part) for part in ("", *self.parts)}


class Metric(Part):
    """Base class of all metrics; a subclass with a ``name`` is registered when its module is imported.

    The arguments of a metric's constructor, all of which have defaults, are its fields of the protocol: `Protocol`
    records their values next to the number. Each is kept as an attribute of its name.

    name: what users ask for; columns: its numbers; needs: an output of the feature network (`Extracted`), pairs of
    generated and held-out images, or the likelihood of a model; asked_by: how users ask for it if not by the
    ``metrics`` of a protocol; in_every_hash: whether its fields are part of every protocol's hash, even if it is not
    asked for: only those of metrics of version 0.1.0 are, whose hashes must not change. Fields of other metrics are
    part of the hash of protocols that ask for them, where they differ from their defaults.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    needs: ClassVar[Needs]
    asked_by: ClassVar[str] = ""
    in_every_hash: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Register the class under its name; raises InputError if another class has it, or it is not an identifier."""
        super().__init_subclass__()
        if "name" not in vars(cls):
            return
        if not cls.name.isidentifier():
            raise InputError(f"{cls.path()}: name: letters, digits and underscores only, got {cls.name!r}")
        other = KNOWN.get(cls.name, cls)
        if other.path() != cls.path():
            raise InputError(
                f"{cls.path()}: the metric {other.path()} already has the name {cls.name!r}; choose another"
            )
        KNOWN[cls.name] = cls

    @classmethod
    def path(cls) -> str:
        """Return the class path."""
        return f"{cls.__module__}.{cls.__qualname__}"

    @classmethod
    def fields(cls) -> dict[str, Any]:
        """Return the names of its fields of the protocol, with their defaults."""
        defaults: dict[str, Any] = spec(cls())["init_args"]
        return defaults

    @classmethod
    def source(cls) -> str:
        """Return the SHA-256 of the file that defines it, empty if there is none."""
        try:
            return sha256(sys.modules[cls.__module__].__file__ or "")
        except (OSError, AttributeError, KeyError):
            return ""

    def check(self, protocol: "Protocol") -> None:
        """Raise InputError for values of its fields that do not suit the protocol."""

    def fitted(self, n: int) -> Self:
        """Return the metric with defaults that suit n images; applied to fields that the user has not set."""
        return self


class SetMetric(Metric, ABC):
    """A metric between a set of generated images and the real ones, computed from outputs of a feature network.

    accumulator: class of what is accumulated over batches and ranks from the output that ``needs`` names. Metrics with
    the same accumulator, needs and options share one.
    """

    needs: ClassVar[Needs] = "features"
    accumulator: ClassVar[type["Accumulator"]]

    def options(self, n: int) -> dict[str, Any]:
        """Return the arguments of the accumulator for n images, other than its width and n."""
        return {}

    def least(self, width: int) -> int:
        """Return the least number of generated images, for features of this width."""
        return 2

    def bias(self, real: "Reference", n: int) -> float | None:
        """Return the part ``bias`` of its first column for n images, None if it has none."""
        return None

    @abstractmethod
    def compute(self, real: "Reference", fake: Any) -> dict[str, float]:
        """Return its numbers by their names in ``columns``, other parts than ``bias`` as ``NAME_PART``.

        real: statistics of the real images; fake: what the accumulator computes from the generated images. Both are on
        the same device.
        """


class Pair(NamedTuple):
    """Generated images and the held-out ones they belong to, uint8 (B, C, H, W), and what is known of both.

    observations: y of the held-out images, observed: A of the generated ones, float64 (B, C', H, W) in [-1, 1].
    """

    images: Tensor
    originals: Tensor
    observations: Tensor
    observed: Tensor


class PairedMetric(Metric, ABC):
    """A metric of each generated image and its original, averaged over the images of a conditional model."""

    needs: ClassVar[Needs] = "pairs"

    @abstractmethod
    def of_images(self, pair: Pair) -> Tensor:
        """Return a value for each image, float64 (B,)."""

    def finish(self, mean: float) -> float:
        """Return the metric from the mean over all images."""
        return mean

    def to(self, device: torch.device | str) -> None:
        """Move what it computes with to a device."""
