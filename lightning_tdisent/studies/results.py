"""Evaluate the contenders of a study, store the results in its folder, and write the report."""

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lightning_tdisent.data.decode import side_of
from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.data.npz import is_npz
from lightning_tdisent.data.shards import load
from lightning_tdisent.data.tars import find
from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.digests import sha256
from lightning_tdisent.distributed import rank_and_world
from lightning_tdisent.errors import InputError, is_whole
from lightning_tdisent.evaluation.bits import ODE_ROWS, Bits
from lightning_tdisent.evaluation.conditional import DRAWS, refuse_number
from lightning_tdisent.evaluation.drawn import start_digest
from lightning_tdisent.evaluation.evaluate import REAL, Contender, evaluate
from lightning_tdisent.evaluation.measured import FOLDER as MEASURED
from lightning_tdisent.evaluation.measured import Measured
from lightning_tdisent.evaluation.observations import Observations
from lightning_tdisent.evaluation.real_images import real_images, refuse_trained
from lightning_tdisent.files import output_path, write_whole
from lightning_tdisent.metrics.features import foreign_features, load_features
from lightning_tdisent.metrics.lpips import LPIPS, load_lpips
from lightning_tdisent.metrics.metric import PairedMetric
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.models.card import Card, read_card
from lightning_tdisent.models.compose import find_files, holds_weights
from lightning_tdisent.models.residency import Residency
from lightning_tdisent.progress import Progress
from lightning_tdisent.report.page import write_report
from lightning_tdisent.report.table import WideTable, notes, refuse_texts, terminal_tables
from lightning_tdisent.report.verdict import verdicts
from lightning_tdisent.sampling.sampler import Sampler
from lightning_tdisent.schemas import check_schema, parse_json

FILE, RESULTS, SAMPLES = "study.json", "results.json", "samples.safetensors"
SCHEMA = 2  # of `FILE`; covers `RESULTS` and `SAMPLES` as well
HELD_OUT = 1000  # default number of held-out images
BOARDS = "fleets.html"  # status of the study's fleets at the end of their training
NEAREST = 500_000_000  # maximum bytes of real images that the report searches for copies


@dataclass
class Study:
    """An evaluation of several contenders, and the folder of its results.

    out: folder of the results.
    title: title of the report.
    contenders: mappings with name, source, sampler (class path and arguments; None if the source holds images) and
        optionally prior.
    data: data set with the real images: a folder of shards, or an .npz file.
    protocol: name of a preset, or a mapping of ``preset`` and the fields of `Protocol` that differ.
    weights: weights of the protocol's feature network, if they are not shipped.
    split: split with the held-out images, for the errors per state and for observations of conditional models.
    reference: split, or .npz file, that distances are measured to; by default that of the protocol.
    n_held_out: number of held-out images, the first of ``split``. If None, `HELD_OUT`, or more if the conditional
        models need more for n images.
    n: images drawn of each model; by default that of the protocol.
    first_seed: first seed of the images; by default that of the protocol.
    batch_size: images drawn at a time.
    device: torch device.
    residency: where composites keep the weights of their experts; see `load_model`.
    fill: replacement for missing experts of composites; see `load_model`.
    notes: plain text for the report, below the title.
    bits: fields of `Bits` if bits per dimension are to be measured.
    lpips: weights of LPIPS, or "" for the default, if conditional models are to be measured with it.
    runs: name of a training -> its run folder, for the training curves.
    workers: number of worker processes of the last training, on which the seconds of its jobs depend.
    """

    out: str
    title: str
    contenders: list[dict[str, Any]]
    data: str
    protocol: str | dict[str, Any]
    weights: str | None = None
    split: str = "test"
    reference: str | None = None
    n_held_out: int | None = None
    n: int | None = None
    first_seed: int | None = None
    batch_size: int = 250
    device: str = "cpu"
    residency: Residency = "resident"
    fill: str | None = None
    notes: str = ""
    bits: dict[str, Any] | None = None
    lpips: str | None = None
    runs: dict[str, str] = field(default_factory=dict)
    workers: int | None = None

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return output_path(self.out)

    @property
    def trained_by(self) -> str:
        """Sentence on the number of workers, empty if the study has trained nothing."""
        words = f"{self.workers} worker process{'es' * (self.workers > 1)}" if self.workers else ""
        return words and f"Trained by {words} on one machine."

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the study in a folder, which may have been moved since it was written.

        Paths below the folder are resolved relative to its current place, even if they exist at the old place as well.
        Raises InputError if the folder has no finished study, or a damaged one.
        """
        folder = Path(folder)
        try:
            kept = parse_json((folder / FILE).read_bytes())
            schema = check_schema(kept, str(folder / FILE), SCHEMA, oldest=1, absent=1)
            old = kept.pop("out", "")
            kept.pop("schema", None)
            for contender in kept["contenders"]:
                for key in ("source", "prior"):
                    if contender.get(key) and not contender[key].startswith("cut:"):
                        contender[key] = _current_path(contender[key], folder, schema, old)
            kept["runs"] = {
                name: _current_path(place, folder, schema, old) for name, place in kept.get("runs", {}).items()
            }
            study = cls(**{**kept, "out": str(folder)})
            texts = (study.title, study.notes, study.data, study.split, *(c["name"] for c in study.contenders))
            if not all(isinstance(text, str) for text in texts) or not all("sampler" in c for c in study.contenders):
                raise ValueError("values of wrong types")
            return study
        except OSError as error:
            raise InputError(
                f"{folder} keeps no finished study ({error}); first run study or evaluate with --out {folder}"
            ) from None
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(folder / FILE, error) from None

    def check(self, conditional: bool | None = None) -> None:
        """Raise InputError for a study whose evaluation cannot succeed; call it before training.

        conditional: whether models that are still to be trained are conditional; None if that is not known.
        """
        names = [c["name"] for c in self.contenders]
        if len(set(names)) < len(names):
            raise InputError(f"contenders must have different names, got {names}")
        if taken := [name for name in names if name.strip().endswith(REAL)]:
            raise InputError(f"contenders: {taken[0]!r} is the name of the row of the real images; choose another")
        limit = self.n_held_out
        if limit is not None and (not is_whole(limit) or limit < 2):
            raise InputError(f"n_held_out: a whole number from 2 on, got {limit!r}")
        self._contenders()
        if self.bits is not None and not any(c["sampler"] for c in self.contenders):
            raise InputError("bits per dimension are those of a model, but all contenders are folders of images")
        if self.bits is not None:
            Bits.of_mapping(self.bits)
            if is_npz(self.data):
                raise InputError(f"bits: {self.data}: training images are needed too; give a folder of shards as data")
            find(self.data, "train")
        _ = self._network, self._lpips
        trained = {name: card.data for name, card in self._cards.items()}
        refuse_trained((self.data, self.split), self._reference, trained)
        for path, split in {(self.data, self.split), self._reference}:
            if not is_npz(path):
                find(path, split)
        few = [name for name, card in self._cards.items() if build(card.states, LatentStates).S < ODE_ROWS]
        if self.bits is not None and Bits.of_mapping(self.bits).ode and few and len(few) == len(self._cards):
            raise InputError(
                f"bpd_ode integrates from row to row, and needs {ODE_ROWS} of them; no model here has as many. Take bpd"
            )
        if conditional or self._conditional:
            refuse_number(self._protocol.n, min(self._held_out(True), self._n_held_out_available))
            return
        pairs = [m.name for m in (*self._protocol.chosen, *self._lpips) if isinstance(m, PairedMetric)]
        untrained = [c["name"] for c in self.contenders if c["sampler"] and c["name"] not in self._cards]
        if pairs and not (conditional is None and untrained):
            raise InputError(
                f"metrics: {', '.join(pairs)}: compare each image with the one that it was drawn for, but no model "
                "here is conditional; leave it out"
            )

    @property
    def _conditional(self) -> bool:
        """True if a contender whose weights exist is conditional."""
        return any(build(card.states, LatentStates).observation is not None for card in self._cards.values())

    @property
    def _cards(self) -> dict[str, Card]:
        """Card of the first weight file of each contender that is a model and whose weights exist."""
        models = [c for c in self._contenders() if c.sampler is not None and holds_weights(c.source)]
        return {c.name: read_card(find_files(c.source)[0]) for c in models}

    def _held_out(self, conditional: bool) -> int:
        """Return the number of held-out images to use; the data set may have fewer."""
        return self.n_held_out or max(HELD_OUT, self._protocol.n // DRAWS if conditional else 0)

    @property
    def _n_held_out_available(self) -> int:
        return real_images(self.data, self.split, *self._size()).n

    @functools.cached_property
    def _lpips(self) -> list[LPIPS]:
        return [] if self.lpips is None else [LPIPS(load_lpips(self.lpips))]

    @property
    def _protocol(self) -> Protocol:
        split = Path(self.reference).name if self.reference and is_npz(self.reference) else self.reference
        return Protocol.preset(self.protocol, n=self.n, first_seed=self.first_seed, split=split)

    @functools.cached_property
    def _network(self) -> FeatureNetwork:
        p = self._protocol
        return load_features(p.features, self.weights, p.resize, p.dtype, self._channels)

    @property
    def _reference(self) -> tuple[str, str]:
        """Data set and split that distances are measured to."""
        return (str(self.reference) if is_npz(self.reference) else self.data, self._protocol.split)

    def _contenders(self) -> list[Contender]:
        return [
            Contender(
                c["name"],
                Path(c["source"]),
                build(c["sampler"], Sampler) if c["sampler"] else None,
                self.split,
                self.residency,
                self.fill,
                c.get("prior"),
            )
            for c in self.contenders
        ]

    @property
    def _model_shape(self) -> list[int] | None:
        for c in self._contenders():
            if c.sampler is not None and holds_weights(c.source):
                return read_card(find_files(c.source)[0]).shape
        return None

    @property
    def _channels(self) -> int:
        """Channels of the images: those of the first model, or if there is none, those of the protocol's features."""
        return self._model_shape[0] if self._model_shape else 1 if self._protocol.features in ("digits", "mnist") else 3

    def _size(self) -> tuple[int, int | None]:
        """Return the channels of the images, and their side length if it is known and the images are square."""
        shape = self._model_shape or self._network.shape
        return (shape[0], side_of(shape)) if shape else (self._channels, None)

    def _load_real(self, split: str, limit: int | None = None) -> ImageSet:
        channels, size = self._size()
        return load(self.data, split, channels, limit, size)

    def _bits(self) -> tuple[Bits, ImageSet] | None:
        if self.bits is None:
            return None
        bits = Bits.of_mapping(self.bits)
        return bits, self._load_real("train", bits.n)

    def evaluate(self) -> None:
        """Measure all contenders, except those whose stored numbers are still valid, and write the results (rank 0)."""
        contenders, protocol, (channels, size) = self._contenders(), self._protocol, self._size()
        self.n_held_out = self._held_out(self._conditional)
        observations = dict[str, Observations]()
        first = rank_and_world()[0] == 0
        measured = Measured(self.folder / MEASURED)
        with Progress("measure", unit="images", shown=first) as progress:
            rows, images = evaluate(
                contenders, protocol, self._network, real_images(*self._reference, channels, size),
                self._load_real(self.split, self.n_held_out), self.batch_size, self.device,
                progress=progress, bits=self._bits(),
                observations=observations, further=self._lpips, measured=measured,
            )  # fmt: skip
        if not first:
            return
        if measured.reused:
            print(f"{measured.reused} of {len(contenders)} contenders had been measured; their numbers are reused")
        (self.folder / FILE).unlink(missing_ok=True)  # written again once all other files are of this evaluation
        for line in self._changed_contenders(rows):
            print(line)
        for row in rows:
            if "source" in row:
                row["source"] = self._stored_path(row["source"])
        write_whole(self.folder / RESULTS, json.dumps(rows, indent=1).encode())
        for path in (self.folder / "observations").glob("*.safetensors"):
            path.unlink()
        for name, some in observations.items():
            some.save(self._observations_file(name))
        write_whole(self.folder / SAMPLES, save({k: v.contiguous() for k, v in images.items()}))
        write_whole(self.folder / FILE, json.dumps(self._content(), indent=1).encode())
        measured.prune()

    def _changed_contenders(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Return a line for each contender whose weights or images have changed since the last evaluation."""
        try:
            before = {row["name"]: row for row in self.rows}
        except InputError:  # no earlier results, or damaged ones
            return []
        keys = ("sha256", "images")
        changed = [r for r in rows if any(before.get(r["name"], r).get(k, r.get(k)) != r.get(k) for k in keys)]
        return [
            f"{row['name']}: {row['source']} holds other weights or images than were measured before; it is measured "
            "again under this name"
            for row in changed
            if "source" in row
        ]

    def _content(self) -> dict[str, Any]:
        """Return the content of `FILE`; paths below the folder are relative to it, other paths are absolute."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "out"}
        kept["contenders"] = [
            {
                k: self._stored_path(v) if k in ("source", "prior") and not v.startswith("cut:") else v
                for k, v in c.items()
            }
            for c in self.contenders
        ]
        kept["runs"] = {name: self._stored_path(folder) for name, folder in self.runs.items()}
        for key in ("data", "weights", "lpips", "reference"):
            if kept[key] and Path(kept[key]).exists():
                kept[key] = os.path.abspath(kept[key])
        if (kept["fill"] or "").startswith("shared:"):
            kept["fill"] = f"shared:{os.path.abspath(kept['fill'].removeprefix('shared:'))}"
        return {"schema": SCHEMA, **kept}

    def _stored_path(self, path: str) -> str:
        place = os.path.abspath(path)
        below = Path(place).is_relative_to(os.path.abspath(self.folder))
        return os.path.relpath(place, os.path.abspath(self.folder)) if below else place

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Stored results, one row per contender; raises InputError if they are missing or damaged."""
        file = self.folder / RESULTS
        try:
            rows: list[dict[str, Any]] = parse_json(file.read_bytes())
            if not rows or not all(isinstance(row[key], str) for row in rows for key in ("name", "protocol_line")):
                raise ValueError("a row has no name or protocol")
            if not all(isinstance(row["protocol_fields"], dict) and row["protocol"] for row in rows):
                raise ValueError("a row has no protocol")
            refuse_texts(rows)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(file, error) from None
        return rows

    def _observations_file(self, name: str) -> Path:
        """Return the file with the observations of a conditional contender."""
        number = [c["name"] for c in self.contenders].index(name)
        text = "".join(c if c.isalnum() else "_" for c in name)
        return self.folder / "observations" / f"{number:02d}_{text}.safetensors"

    def _saved_observations(self) -> dict[str, Observations]:
        names = [c["name"] for c in self.contenders]
        return {name: Observations.load(file) for name in names if (file := self._observations_file(name)).exists()}

    def images(self) -> dict[str, Tensor]:
        """Return the first images of each contender, by name."""
        file = self.folder / SAMPLES
        try:
            kept = load_file(file)
        except (OSError, SafetensorError) as error:
            raise _damaged(file, error) from None
        return {c["name"]: kept[c["name"]] for c in self.contenders if c["name"] in kept}

    def refuse_gone(self) -> None:
        """Raise InputError, with all problems, for contenders whose weights or prior are missing or have changed."""
        rows, problems = {row["name"]: row for row in self.rows}, []
        for c in [c for c in self._contenders() if c.sampler is not None and c.name in rows]:
            start = Path(c.prior) if c.prior and not c.prior.startswith("cut:") else None
            gone = [str(path) for path in (c.source, start) if path and not path.exists()]
            problems += [f"{c.name}: {path} is gone" for path in gone]
            if gone:
                continue
            row, now = rows[c.name], [sha256(file) for file in find_files(c.source)]
            if row.get("sha256", now) != now:
                problems.append(f"{c.name}: {c.source} holds other weights than were measured")
            if start and row.get("prior_sha256", digest := start_digest(c.prior)) != digest:
                problems.append(f"{c.name}: {start} holds a different prior than the one measured")
        if problems:
            raise InputError(
                f"{self.folder}: its report cannot be written:\n"
                + "\n".join(f"  - {line}" for line in problems)
                + "\nRestore them, run study again, or evaluate into another folder"
            )

    def lines(self) -> list[WideTable | str]:
        """Return the output for the terminal: a table per protocol, the costs of the models, and notes."""
        remarks = notes(self.rows)
        path, reference = self._reference
        if path == self.data and (self.split == reference or is_npz(path)):
            what = path if is_npz(path) else self.split
            remarks.append(f"the reference and the held-out images are both of {what}: their distance has no meaning")
        remarks += foreign_features(self._protocol.features, self.data)
        if self.n is not None:
            others = {
                r["name"]: r["n"] for r in self.rows if "networks" not in r and "source" in r and r["n"] != self.n
            }
            remarks += [
                f"{name}: all of its {n:,} images are measured; n = {self.n:,} is of models"
                for name, n in others.items()
            ]
        if (there := self._n_held_out_available) > (taken := self.n_held_out or HELD_OUT):
            remarks.append(f"held-out images: the first {taken:,} of the {there:,} of {self.split} (n_held_out)")
        return [self.title, *verdicts(self.rows), *terminal_tables(self.rows), *(f"note: {line}" for line in remarks)]

    def write_report(self) -> Path:
        """Write report.html and return its path.

        Raises InputError for contenders that are missing or have changed. Missing folders of training curves are named
        in the notes of the report.
        """
        self.refuse_gone()
        held_out = self._load_real(self.split, self._held_out(self._conditional))
        gone = [name for name, folder in self.runs.items() if not Path(folder).is_dir()]
        lost = f" No training curves of {', '.join(gone)}: their folders do not exist." if gone else ""
        channels, size = self._size()
        return write_report(
            self.folder / "report.html",
            self.title,
            self.rows,
            self.images(),
            self._contenders(),
            held_out,
            load(*self._reference, channels, NEAREST // held_out.images[0].numel(), size).images,
            {name: Path(folder) for name, folder in self.runs.items() if name not in gone},
            " ".join(filter(None, (self.notes, self.trained_by, lost.strip()))),
            observations=self._saved_observations(),
            boards=boards.read_text(encoding="utf-8") if (boards := self.folder / BOARDS).exists() else "",
        )


def _damaged(file: Path, error: Exception) -> InputError:
    """Return the InputError for a results file that cannot be read."""
    what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return InputError(f"{file}: damaged or gone ({what}); restore it, run study again, or evaluate into another folder")


def _current_path(path: str, folder: Path, schema: int, old: str) -> str:
    """Return the current path of a stored path.

    path: the stored path. folder: current folder of the study. schema: schema of `FILE`; in schema 1 paths are relative
    to the working directory. old: folder of the study when it was written, for schema 1.
    """
    if schema == 1 and not (old and Path(path).is_relative_to(old)):
        return path
    return str(folder / (Path(path).relative_to(old) if schema == 1 else path))
