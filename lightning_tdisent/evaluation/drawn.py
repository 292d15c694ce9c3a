"""A folder of drawn images, one file for each seed, with a record of what they were drawn from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import output_path, write_whole
from lightning_tdisent.models.compose import find_files
from lightning_tdisent.models.prior_files import prior_file
from lightning_tdisent.schemas import check_schema, parse_json

FILE, SCHEMA = "drawn.json", 1


def drawn_from(model: Path, fill: str | None, prior: str | None) -> dict[str, Any]:
    """Return the digests of a model's weights, of what fills its missing experts, and of its start."""
    shared = (fill or "").removeprefix("shared:")
    return {
        "weights": [sha256(file) for file in find_files(model)],
        "fill": [fill, [sha256(f) for f in find_files(shared)] if shared not in ("", "nearest") else []],
        "prior": start_digest(prior),
    }


def start_digest(prior: str | None) -> str | None:
    """Return the digest of the file of a prior; of a plain cut, its row."""
    return prior if prior is None or prior.startswith("cut:") else sha256(prior_file(prior))


class Drawn:
    """The images SEED.png in a folder, which a repeated command completes.

    Raises InputError for a folder that holds images without a record of what they were drawn from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = output_path(folder)
        self.begun = (self.folder / FILE).exists()
        if not self.begun and self.folder.exists() and any(self.folder.glob("*.png")):
            raise InputError(f"--out {folder} already holds images; choose another folder")

    def file(self, seed: int) -> Path:
        """Return the file of an image."""
        return self.folder / f"{seed:06d}.png"

    def claim(self, key: dict[str, Any]) -> None:
        """Set what the images are drawn from; raises InputError if the folder has images of something else."""
        self._key = key = json.loads(json.dumps(key))
        if not self.begun:
            return
        where = str(self.folder / FILE)
        try:
            content = parse_json((self.folder / FILE).read_bytes())
            check_schema(content, where, SCHEMA)
            before = dict(content["of"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where}: damaged ({error}); choose another --out") from None
        if other := [name for name in key if before.get(name) != key[name]]:
            raise InputError(
                f"--out {self.folder} holds images drawn with other {', '.join(other)}; choose another folder"
            )

    def begin(self) -> None:
        """Record what the images are drawn from; call it before the first of them is saved."""
        write_whole(self.folder / FILE, json.dumps({"schema": SCHEMA, "of": self._key}, indent=1).encode())
        self.begun = True

    def of(self, seeds: Sequence[int]) -> set[int]:
        """Return the seeds whose images are there and whole."""
        return {seed for seed in seeds if _is_whole(self.file(seed))}


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True
