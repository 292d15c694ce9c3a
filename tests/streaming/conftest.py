import io

import pytest
import webdataset as wds
from PIL import Image


@pytest.fixture
def shards(tmp_path):
    """Three shards of 10, 7 and 13 images whose pixels are their number, which is their label too."""
    number = 0
    for k, count in enumerate((10, 7, 13)):
        with wds.TarWriter(str(tmp_path / f"train-{k:04d}.tar"), mtime=0) as shard:
            for _ in range(count):
                png = io.BytesIO()
                Image.new("L", (4, 4), number).save(png, "png")
                shard.write({"__key__": f"{number:04d}", "png": png.getvalue(), "cls": str(number).encode()})
                number += 1
    return tmp_path


@pytest.fixture
def tilted_shards(shards):
    """The same, darker on the left by one."""
    number = 0
    for file, count in zip(sorted(shards.glob("*.tar")), (10, 7, 13), strict=True):
        with wds.TarWriter(str(file), mtime=0) as shard:
            for _ in range(count):
                image = Image.new("L", (4, 4), number + 1)
                image.paste(number, (0, 0, 1, 4))
                png = io.BytesIO()
                image.save(png, "png")
                shard.write({"__key__": f"{number:04d}", "png": png.getvalue(), "cls": str(number).encode()})
                number += 1
    return shards
