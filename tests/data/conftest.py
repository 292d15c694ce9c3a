import io

import pytest
import webdataset as wds
from making import put
from PIL import Image


@pytest.fixture
def shards(tmp_path):
    """Write three shards of 10, 7 and 13 images. The pixels and the label of an image are its number."""
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
    """Write the same shards with the left column of each image darker by one, so that mirroring shows."""
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


@pytest.fixture
def parquet(tmp_path):
    """Write rows as Hugging Face's datasets does: (image bytes or None, label, text), three rows per row group."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(name, rows, classes=("no", "yes"), **other):
        features = {"label": {"names": list(classes), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        columns = {
            "image": arrow.array([{"bytes": b, "path": f"{i}.png"} if b else None for i, (b, _, _) in enumerate(rows)]),
            "label": arrow.array([label for _, label, _ in rows], arrow.int64()),
            "text": arrow.array([text for *_, text in rows], arrow.string()),
            **other,
        }
        table = arrow.table({k: v for k, v in columns.items() if v is not None})
        import json

        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        file = put(tmp_path / name)
        pq.write_table(table, file, row_group_size=3)
        return file

    return write
