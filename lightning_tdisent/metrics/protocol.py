"""`Protocol`: everything an evaluation number depends on besides the model, and its short hash."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Self

from lightning_tdisent import __version__
from lightning_tdisent.digests import digest_of_data
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.metrics.network import FeatureNetwork

METRICS = ("fd", "fd_infinity", "is", "kid", "prdc", "sfd")

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
    # nobody trained it: shows that a curve moves, for images of any kind, offline
    "random": {**_SMALL, "features": "random", "metrics": ("fd", "kid")},
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images are compared with real ones; two numbers are comparable where their protocols' hashes are equal.

    features: feature network; resize: how it brings images to its size, dtype: of its arithmetic (None: its own). n:
    generated images, of seeds first_seed .. + n - 1 (None: they come from files). split, n_real: real images, evenly
    spaced in that split, all of it if None. metrics: those computed (not in the hash: no number depends on the others).
    neighbours: k of precision, recall, density, coverage; kept: real images these and kid look at, evenly spaced.
    score_splits: parts of the images that the Inception Score is taken over, and averaged, by a permutation of
    score_seed; score_part: parts of so many images in their order instead. The rest is filled in by `resolved`.
    """

    features: str
    n: int = 1000
    first_seed: int | None = 0
    split: str = "train"
    n_real: int | None = None
    metrics: tuple[str, ...] = ("fd", "is")
    resize: str | None = None
    dtype: str | None = None
    neighbours: int = 3
    kept: int = 10_000
    score_splits: int = 1
    score_part: int | None = None
    score_seed: int = 2020
    image_range: str = "uint8, rounded"
    labels: str = "seed modulo classes"
    moments: str = "float64, centred"
    balls: str = "closed for precision and recall, open for density and coverage"
    shape: tuple[int, ...] = ()
    n_split: int = 0
    weights_sha256: str = ""
    real: str = ""
    versions: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.metrics:
            raise InputError(f"metrics: none is asked for; choose from {', '.join(METRICS)}")
        if self.first_seed is not None and not 0 <= self.first_seed <= (1 << 32) - self.n:
            raise InputError(
                f"first_seed: image seeds must lie in [0, 2^32), got {self.first_seed} and the next {self.n}"
            )
        for name in self.metrics:
            if name not in METRICS:
                raise InputError(
                    f"metrics: there is no {name!r}.{nearest(name, METRICS)} Choose from {', '.join(METRICS)}"
                )
        for name in ("n", "n_real", "kept"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise InputError(f"{name}: two images at least make a distribution, got {value}")
        if not 1 <= self.score_splits <= self.n:
            raise InputError(f"score_splits: 1 to n = {self.n}, got {self.score_splits}")
        if "prdc" in self.metrics and not 1 <= self.neighbours < min(self.n, self.n_real or self.n, self.kept):
            raise InputError(f"neighbours: 1 to below the number of images, {self.n}, got {self.neighbours}")

    @classmethod
    def preset(cls, name: str | Mapping[str, Any], **changes: Any) -> Self:
        """A named protocol with some fields changed; None leaves a field as the preset has it.

        name: of `PRESETS`, or a mapping of ``preset`` and changed fields, as YAML files have it.
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
        fields = [f.name for f in dataclasses.fields(cls)]
        for key in changes:
            if key not in fields:
                raise InputError(
                    f"protocol: there is no field {key!r}.{nearest(key, fields)} Fields: {', '.join(fields)}"
                )
        given = {k: v for k, v in changes.items() if v is not None}
        whole = ("n", "first_seed", "n_real", "neighbours", "kept", "score_splits", "score_part", "score_seed")
        for key, value in given.items():
            if key in whole and (isinstance(value, bool) or not isinstance(value, int)):
                raise InputError(f"protocol: {key}: expected a whole number, got {value!r}")
            if key == "metrics" and not (isinstance(value, (list, tuple)) and all(isinstance(m, str) for m in value)):
                raise InputError(f"protocol: metrics: expected a list of names, got {value!r}")
            if key in ("features", "split", "resize", "dtype") and not isinstance(value, str):
                raise InputError(f"protocol: {key}: expected text, got {value!r}")
        wanted = PRESETS[name] | given
        if "score_splits" not in given:
            wanted["score_splits"] = _fitting(wanted.get("score_splits", 1), wanted.get("n", cls.n))
        return cls(**wanted)

    def of_files(self, n: int) -> Self:
        """The same for n images that come from files."""
        splits = _fitting(self.score_splits, n)
        return dataclasses.replace(self, n=n, first_seed=None, labels="", score_splits=splits)

    @property
    def parts(self) -> tuple[int, int | None]:
        """Parts of the images that the Inception Score is averaged over, and the seed that makes them."""
        return (-(-self.n // self.score_part), None) if self.score_part else (self.score_splits, self.score_seed)

    def resolved(self, network: FeatureNetwork, digest: str, n_real: int, shape: Sequence[int]) -> Self:
        """The same with what this network, these real images of (C, H, W) and these libraries add."""
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
        return digest_of_data({k: v for k, v in self.fields.items() if k not in ("metrics", "halves")})[:8]

    @property
    def reference(self) -> str:
        """Hash of all that the statistics of the real images depend on: not of what is compared with them."""
        names = "features n_real n_split split resize dtype shape kept image_range moments weights_sha256 real versions"
        return digest_of_data({k: self.fields[k] for k in names.split()} | {"spatial": "sfd" in self.metrics})[:8]

    @property
    def fields(self) -> dict[str, Any]:
        """All of it as plain data."""
        out = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return out | ({"halves": "of a permutation"} if "fd_infinity" in self.metrics else {})

    @property
    def line(self) -> str:
        """One line for people."""
        seeds = "files" if self.first_seed is None else f"seeds {self.first_seed}..{self.first_seed + self.n - 1}"
        return (
            f"protocol {self.hash}: {self.features} features, n={self.n} ({seeds}) against {self.n_real} of "
            f"{self.split} ({self.real[:12]})"
        )


def _fitting(splits: int, n: int) -> int:
    """Parts for the Inception Score of so few images: all in one where a part would have fewer than ten."""
    return splits if n >= 10 * splits else 1
