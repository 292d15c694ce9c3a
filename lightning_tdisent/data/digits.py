"""Write the 1,797 digit scans of scikit-learn (8x8, grey; UCI ML repository, CC BY 4.0) as WebDataset shards."""

import io
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from lightning_tdisent.errors import Unavailable
from lightning_tdisent.files import whole

SPLITS = {"train": slice(None, 1500), "test": slice(1500, None)}


def shard(folder: Path, split: str) -> Path:
    """Return the path of the shard of a split."""
    return folder / f"{split}-0000.tar"


def write(folder: Path) -> None:
    """Write train-0000.tar (1,500 scans) and test-0000.tar (297), always the same bytes.

    The scans are scaled from 0..16 to 0..255 and shuffled with seed 0. Raises Unavailable without scikit-learn, which
    carries them.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unavailable(
            "the digit scans come with scikit-learn, which is not installed: pip install 'lightning_tdisent[digits]'"
        ) from None
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in SPLITS.items():
        with whole(shard(folder, split)) as stream, wds.TarWriter(stream, mtime=0) as tar:
            for i in order[part]:
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "png")
                tar.write({"__key__": f"{i:06d}", "png": png.getvalue(), "cls": str(labels[i]).encode()})
        print(f"{shard(folder, split)}: {len(order[part])} scans")
