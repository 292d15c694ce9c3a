"""Write the 1,797 digit scans that come with this package (8x8, grey) as WebDataset shards.

They are the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning
Repository, CC BY 4.0), as scikit-learn distributes it.
"""

import io
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from lightning_tdisent.files import whole

SHIPPED = Path(__file__).parent / "shipped" / "digits.npz"  # images uint8 (1797, 8, 8) 0..16, labels uint8 (1797,)
SPLITS = {"train": slice(None, 1500), "test": slice(1500, None)}


def shard(folder: Path, split: str) -> Path:
    """Return the path of the shard of a split."""
    return folder / f"{split}-0000.tar"


def write(folder: Path) -> None:
    """Write train-0000.tar (1,500 scans) and test-0000.tar (297), always the same bytes.

    The scans are scaled from 0..16 to 0..255 and shuffled with seed 0.
    """
    with np.load(SHIPPED, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    images = np.round(images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in SPLITS.items():
        with whole(shard(folder, split)) as stream, wds.TarWriter(stream, mtime=0) as tar:
            for i in order[part]:
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "png")
                tar.write({"__key__": f"{i:06d}", "png": png.getvalue(), "cls": str(labels[i]).encode()})
        print(f"{shard(folder, split)}: {len(order[part])} scans")
