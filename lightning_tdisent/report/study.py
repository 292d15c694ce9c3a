"""A finished comparison on disk: what was compared, the numbers, the first samples, and the page made of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.metrics.features import load_features
from lightning_tdisent.report.evaluate import Contender, evaluate, table
from lightning_tdisent.report.page import write_report
from lightning_tdisent.sampling.composite import find_files
from lightning_tdisent.sampling.expert import read_card
from lightning_tdisent.sampling.sampler import Sampler
from lightning_tdisent.streaming.shards import ImageSet, load
from lightning_tdisent.streaming.tars import find


@dataclass
class Study:
    """Contenders, the real images they are measured on, and the folder that keeps the results.

    split: held-out images, its first n_held_out, for the errors per state; reference: those of the distances.
    contenders: dicts of name, source (a run, composite or file) and sampler (class path and arguments); runs: folders
    with event files for the curves; the other fields as in `report.evaluate`.
    """

    out: str
    title: str
    contenders: list[dict[str, Any]]
    data: str
    features: str
    split: str = "test"
    reference: str = "train"
    n_held_out: int = 1000
    n: int = 1000
    first_seed: int = 0
    batch_size: int = 250
    device: str = "cpu"
    notes: str = ""
    runs: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        return Path(self.out)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the study that a folder keeps."""
        try:
            return cls(**json.loads((Path(folder) / "study.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder} keeps no finished study ({error}); run study or evaluate with --out {folder} first"
            ) from None

    def check(self) -> None:
        """Refuse, before anything is trained, what could only fail after it."""
        names = [c["name"] for c in self.contenders]
        if len(set(names)) < len(names):
            raise InputError(f"contenders must have different names, got {names}")
        self._contenders()
        load_features(self.features)
        for split in (self.split, self.reference, "train"):
            find(self.data, split)

    def _contenders(self) -> list[Contender]:
        return [Contender(c["name"], Path(c["source"]), build(c["sampler"], Sampler)) for c in self.contenders]

    def _real(self, split: str, limit: int | None = None) -> ImageSet:
        channels = read_card(find_files(self.contenders[0]["source"])[0]).network["init_args"]["shape"][0]
        return load(self.data, split, channels, limit)

    def evaluate(self) -> None:
        """Measure every contender and keep the results."""
        contenders = self._contenders()
        with Progress(transient=True) as bar:
            tasks = {c.name: bar.add_task(f"sampling {c.name}", total=self.n) for c in contenders}
            splits = self._real(self.reference), self._real(self.split, self.n_held_out)
            rows, images = evaluate(
                contenders, *splits, self.features, self.n, self.first_seed, self.batch_size, self.device,
                progress=lambda name, count: bar.advance(tasks[name], count),
            )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "results.json", json.dumps(rows, indent=1).encode())
        save_file({k: v.contiguous() for k, v in images.items()}, self.folder / "samples.safetensors")
        write_whole(self.folder / "study.json", json.dumps(vars(self), indent=1).encode())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The numbers kept."""
        rows: list[dict[str, Any]] = json.loads((self.folder / "results.json").read_text())
        return rows

    def _images(self) -> dict[str, Tensor]:
        kept = load_file(self.folder / "samples.safetensors")
        return {c["name"]: kept[c["name"]] for c in self.contenders}

    def rich_table(self) -> Table:
        """The table for the terminal."""
        head, *body = table(self.rows)
        out = Table(title=self.title, show_lines=False)
        for i, name in enumerate(head):
            out.add_column(name, justify="left" if i == 0 else "right")
        for row in body:
            out.add_row(*row)
        return out

    def write_report(self) -> Path:
        """Write report.html."""
        return write_report(
            self.folder / "report.html",
            self.title,
            self.rows,
            self._images(),
            self._contenders(),
            self._real(self.split, self.n_held_out),
            self._real(self.reference).images,
            {name: Path(folder) for name, folder in self.runs.items()},
            self.notes,
        )
