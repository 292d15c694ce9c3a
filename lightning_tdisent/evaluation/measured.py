"""Store the rows of an evaluation one by one, to resume one that was interrupted or got further contenders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_tdisent.digests import digest_of_data
from lightning_tdisent.distributed import all_gather, rank_and_world, shared_errors
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.schemas import check_schema, parse_json

FOLDER, SCHEMA = "measured", 1  # files without a schema have schema 1


class Measured:
    """Rows and their first images, by a key of everything that they depend on; rank 0 reads and writes.

    used: names of the files that were asked for; reused: number of them that existed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[str] = set()
        self.reused = 0

    def _file(self, key: dict[str, Any]) -> Path:
        name = digest_of_data(key)[:24]
        self.used.add(f"{name}.safetensors")
        return self.folder / f"{name}.safetensors"

    def get(self, key: dict[str, Any]) -> tuple[dict[str, Any], Tensor] | None:
        """Return a row and its images on all ranks (collective), None if they are not stored or cannot be read.

        Raises InputError for a file of a newer version.
        """
        path, found = self._file(key), None
        newer: InputError | None = None
        if rank_and_world()[0] == 0:
            try:
                with safe_open(path, "pt") as file:
                    about = parse_json(file.metadata()["row"])
                    check_schema(about, str(path), SCHEMA, absent=1)
                    found = (about["row"], file.get_tensor("images")) if about["key"] == key else None
            except InputError as error:
                newer = error
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
                found = None
        with shared_errors():
            if newer is not None:
                raise newer
        out: tuple[dict[str, Any], Tensor] | None = all_gather(found)[0]
        self.reused += out is not None
        return out

    def put(self, key: dict[str, Any], row: dict[str, Any], images: Tensor) -> None:
        """Store a row, unless it was refused."""
        if rank_and_world()[0] == 0 and "refused" not in row:
            content = json.dumps({"schema": SCHEMA, "key": key, "row": row})
            images = images if len(images) else torch.empty(0, dtype=torch.uint8)
            write_whole(self._file(key), save({"images": images.cpu().contiguous()}, {"row": content}))

    def prune(self) -> None:
        """Remove the files that were not asked for."""
        for path in self.folder.glob("*.safetensors"):
            if path.name not in self.used:
                path.unlink()
