"""`Protocol`: everything an evaluation number depends on besides the model, and its short hash."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Self, get_args, get_origin, get_type_hints

from lightning_tdisent import __version__
from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.digests import digest_of_data
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.metrics import registry
from lightning_tdisent.metrics.metric import Metric, Needs
from lightning_tdisent.metrics.network import FeatureNetwork

_INCEPTION: dict[str, Any] = {"features": "inception", "n": 50_000, "score_splits": 10}
_SMALL: dict[str, Any] = {"metrics": ("fd", "is", "kid", "prdc"), "neighbours": 5}
PRESETS: dict[str, dict[str, Any]] = {
    # 2105.05233, its evaluator: resize inside TensorFlow's graph, parts of 5,000 in their order, 3 neighbours
    "adm": {**_INCEPTION, "resize": "tf1", "metrics": ("fd", "sfd", "is", "prdc"), "score_part": 5000},
    # 2104.11222: antialiased bicubic resize in float
    "clean": {**_INCEPTION, "resize": "pil_bicubic", "metrics": ("fd", "kid")},
    # its command line: parts of a seeded permutation
    "torch-fidelity": {**_INCEPTION, "resize": "tf1", "metrics": ("fd", "is", "kid")},
    # since 1.8 its FrechetInceptionDistance antialiases, which no published FID did
    "torchmetrics": {**_INCEPTION, "resize": "torch_antialias", "metrics": ("fd", "is", "kid")},
    # 2306.04675: FD in DINOv2's features
    "dinov2": {"features": "dinov2", "n": 50_000, "metrics": ("fd", "kid")},
    "digits": {**_SMALL, "features": "digits"},
    "mnist": {**_SMALL, "features": "mnist"},
    "cifar10": {**_SMALL, "features": "cifar10"},
    # an untrained network: shows that a curve moves, for images of any kind, offline
    "random": {**_SMALL, "features": "random", "metrics": ("fd", "kid")},
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Conditions of a comparison with real images: two numbers are comparable if their protocols have one hash.

    features: feature network; resize: how it brings images to its size, dtype: of its arithmetic (None: its default).
    n: number of generated images, of seeds first_seed .. + n - 1 (None: they come from files). split, n_real: real
    images, evenly spaced in that split, all of it if None. metrics: names or class paths of those computed (not in the
    hash: no number depends on the others). kept: real images whose features metrics may use one by one, evenly spaced.
    settings: fields of metrics, by name; those left out have their defaults. `resolved` sets the other fields.
    """

    features: str
    n: int = 1000
    first_seed: int | None = 0
    split: str = "train"
    n_real: int | None = None
    metrics: tuple[str, ...] = ("fd", "is")
    resize: str | None = None
    dtype: str | None = None
    kept: int = 10_000
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_range: str = "uint8, rounded"
    labels: str = "seed modulo classes"
    moments: str = "float64, centred"
    shape: tuple[int, ...] = ()
    n_split: int = 0
    weights_sha256: str = ""
    real: str = ""
    versions: str = ""

    def __post_init__(self) -> None:
        classes = _asked(self.metrics)
        object.__setattr__(self, "metrics", tuple(map(registry.named, classes)))
        object.__setattr__(self, "settings", _complete(_recorded(classes), self.settings))
        if self.first_seed is not None and not 0 <= self.first_seed <= (1 << 32) - self.n:
            raise InputError(
                f"first_seed: image seeds must lie in [0, 2^32), got {self.first_seed} and the next {self.n}"
            )
        for name in ("n", "n_real", "kept"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise InputError(f"{name}: at least two images are required, got {value}")
        for metric in self.chosen:
            metric.check(self)

    @classmethod
    def preset(cls, name: str | Mapping[str, Any], **changes: Any) -> Self:
        """Return a named protocol with some fields changed; None leaves a field as the preset has it.

        name: of `PRESETS`, or a mapping of ``preset`` and changed fields, as YAML files have it. Fields of metrics are
        changed like any other. Raises InputError.
        """
        if not isinstance(name, str):
            changes = {
                **{k: v for k, v in name.items() if k != "preset"},
                **{k: v for k, v in changes.items() if v is not None},
            }
            name = str(name.get("preset", ""))
        if name not in PRESETS:
            raise InputError(
                f"protocol: there is no {name!r}.{nearest(name, PRESETS)} Choose from {', '.join(PRESETS)}"
            )
        given = {k: v for k, v in changes.items() if v is not None}
        wanted = PRESETS[name] | given
        _check_type("metrics", wanted.setdefault("metrics", cls.metrics), tuple)
        recorded = _recorded(_asked(wanted["metrics"]))
        hints = {k: v for k, v in get_type_hints(cls).items() if k != "settings"}
        for metric in recorded:
            hints |= {k: get_type_hints(metric.__init__).get(k, Any) for k in metric.fields()}
        for key, value in given.items():
            if key not in hints:
                raise InputError(
                    f"protocol: there is no field {key!r}.{nearest(key, hints)} Fields: {', '.join(hints)}"
                )
            _check_type(key, value, hints[key])
        core = {k: wanted.pop(k) for k in get_type_hints(cls) if k in wanted}
        settings = _fitted(recorded, _complete(recorded, wanted), core.get("n", cls.n))
        return cls(**core, settings=settings | {k: v for k, v in given.items() if k in settings})

    def limited(self, metrics: Sequence[str]) -> Self:
        """Return the same for some of its metrics."""
        fields = {k for cls in _recorded(_asked(metrics)) for k in cls.fields()}
        settings = {k: v for k, v in self.settings.items() if k in fields}
        return dataclasses.replace(self, metrics=tuple(metrics), settings=settings)

    def of_files(self, n: int) -> Self:
        """Return the same for n images that come from files."""
        settings = _fitted(_recorded(_asked(self.metrics)), self.settings, n)
        return dataclasses.replace(self, n=n, first_seed=None, labels="", settings=settings)

    @functools.cached_property
    def chosen(self) -> tuple[Metric, ...]:
        """The metrics, in the order of tables."""
        classes = _asked(self.metrics)
        return tuple(_made(cls, self.settings) for cls in registry.known() if cls in classes)

    def needs(self, what: Needs) -> bool:
        """Return whether a metric needs this."""
        return any(metric.needs == what for metric in self.chosen)

    @property
    def sources(self) -> dict[str, str]:
        """SHA-256 of the files that define metrics of other packages; the version covers those of this one."""
        return {m.path(): m.source() for m in self.chosen if m.name not in registry.BUILT_IN}

    def resolved(self, network: FeatureNetwork, digest: str, n_real: int, shape: Sequence[int]) -> Self:
        """Return the same with what this network, these real images of (C, H, W) and these libraries add."""
        for name in ("resize", "dtype"):
            asked, has = getattr(self, name), getattr(network, name)
            if asked not in (None, has):
                raise InputError(f"{name}: {self.features} has {has!r} alone, got {asked!r}")
        # torch computes, the others decode the real images
        packages = {p: version(p) for p in ("torch", "pillow", "simplejpeg", *network.packages)}
        versions = {"lightning_tdisent": __version__} | {k: v.split("+")[0] for k, v in packages.items()}
        return dataclasses.replace(
            self,
            n_real=min(n_real, self.n_real or n_real),
            n_split=n_real,
            dtype=network.dtype,
            shape=tuple(shape),
            resize=network.resize,
            weights_sha256=network.weights_sha256,
            real=digest,
            versions=", ".join(f"{k} {v}" for k, v in sorted(versions.items())),
        )

    @property
    def hash(self) -> str:
        """Eight hex digits; numbers with different hashes must not share a table or a curve."""
        left = {"metrics"}
        for cls in (type(metric) for metric in self.chosen if not metric.in_every_hash):
            left |= {k for k, default in cls.fields().items() if self.settings[k] == default}
        return digest_of_data({k: v for k, v in self.fields.items() if k not in left})[:8]

    @property
    def reference(self) -> str:
        """Hash of all that the statistics of the real images depend on: not of what is compared with them."""
        names = "features n_real n_split split resize dtype shape kept image_range moments weights_sha256 real versions"
        return digest_of_data({k: self.fields[k] for k in names.split()} | {"spatial": self.needs("spatial")})[:8]

    @property
    def fields(self) -> dict[str, Any]:
        """All of it as plain data, in one mapping."""
        core = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "settings"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in core.items()} | dict(self.settings)

    @property
    def line(self) -> str:
        """One line for people."""
        seeds = "files" if self.first_seed is None else f"seeds {self.first_seed}..{self.first_seed + self.n - 1}"
        return (
            f"protocol {self.hash}: {self.features} features, n={self.n} ({seeds}) against {self.n_real} of "
            f"{self.split} ({self.real[:12]})"
        )


def _asked(names: Iterable[str]) -> list[type[Metric]]:
    """Return the classes of metrics that a protocol names; raises InputError for those that it cannot name."""
    classes = list(dict.fromkeys(map(registry.find, names)))
    if not classes:
        raise InputError(f"metrics: none is asked for; choose from {', '.join(registry.choices())}")
    for cls in classes:
        if cls.asked_by:
            raise InputError(f"metrics: {cls.name} is {cls.asked_by}; leave it out of the protocol's metrics")
    return classes


def _recorded(asked: Sequence[type[Metric]]) -> list[type[Metric]]:
    """Return the metrics whose fields a protocol records: those asked for, and those that are in every hash."""
    return [cls for cls in registry.known() if cls in asked or cls.in_every_hash]


def _complete(recorded: Sequence[type[Metric]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the fields of metrics; raises InputError for fields that none has, or several have."""
    core = {field.name for field in dataclasses.fields(Protocol)}
    out: dict[str, Any] = {}
    for cls in recorded:
        fields = cls.fields()
        if taken := sorted(fields.keys() & (core | out.keys())):
            raise InputError(f"{cls.path()}: the protocol already has a field {taken[0]!r}; rename the argument")
        out |= {k: settings.get(k, default) for k, default in fields.items()}
    if unknown := [k for k in settings if k not in out]:
        raise InputError(
            f"protocol: there is no field {unknown[0]!r}.{nearest(unknown[0], out)} Fields of its metrics: "
            f"{', '.join(out)}"
        )
    return out


def _made(cls: type[Metric], settings: Mapping[str, Any]) -> Metric:
    return cls(**{k: settings[k] for k in cls.fields()})


def _fitted(recorded: Sequence[type[Metric]], settings: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Return the settings as `Metric.fitted` has them for n images."""
    return {k: v for cls in recorded for k, v in spec(_made(cls, settings).fitted(n))["init_args"].items()}


KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
}


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Raise InputError for a value of a YAML file or command line that is not of a field's type."""
    if key == "metrics":
        right, said = isinstance(value, list | tuple) and all(isinstance(m, str) for m in value), "a list of names"
    else:
        kind = next((kind for kind in (hint, *get_args(hint)) if kind in KINDS), None)
        if kind is None or get_origin(hint) is tuple:
            return
        types, said = KINDS[kind]
        right = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise InputError(f"protocol: {key}: expected {said}, got {value!r}")
