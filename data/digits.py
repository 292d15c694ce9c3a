"""Write the 1,797 digit scans of scikit-learn (8x8, grey; UCI ML repository, CC BY 4.0) as WebDataset shards.

python data/digits.py [FOLDER]   writes train-0000.tar (1,500 scans) and test-0000.tar (297), always the same bytes.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from lightning_tdisent.files import whole


def write(folder: Path) -> None:
    """Scale the scans from 0..16 to 0..255, shuffle them with seed 0, split them, and write the shards."""
    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in {"train": order[:1500], "test": order[1500:]}.items():
        with whole(folder / f"{split}-0000.tar") as stream, wds.TarWriter(stream, mtime=0) as shard:
            for i in chosen:
                png = io.BytesIO()
                Image.fromarray(images[i]).save(png, "png")
                shard.write({"__key__": f"{i:06d}", "png": png.getvalue(), "cls": str(labels[i]).encode()})
        print(f"{folder / f'{split}-0000.tar'}: {len(chosen)} scans")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "digits")
    write(parser.parse_args().folder)
