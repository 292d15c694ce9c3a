"""The recipe of data/README.md for the output of img2dataset: NNNNN.tar, NNNNN.parquet and NNNNN_stats.json."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.data.shards import load
from lightning_tdisent.lit.datamodule import ImageShards

WORDS = ["webdataset", "--split", "train", "--size", "8", "--jobs", "1"]


@pytest.fixture
def downloaded(tmp_path):
    """Write 3 shards of 4 samples with caption and metadata. A failed download leaves a gap in the keys."""
    rng = np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for i in (0, 1, 3, 4):
                key, picture = f"{shard:05d}{i:04d}", io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(picture, "jpeg", quality=95)
                facts = {"caption": f"picture {key}", "key": key, "status": "success", "width": 10, "height": 12}
                members = {
                    "jpg": picture.getvalue(),
                    "json": json.dumps(facts).encode(),
                    "txt": facts["caption"].encode(),
                }
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 5, "successes": 4}), encoding="utf-8")
    return tmp_path


def test_its_shards_are_read_unchanged(downloaded, capsys):
    for split in ("{00000..00001}.tar", "00002.tar"):
        assert main(["data", "index", str(downloaded), "--split", split]) == 0
        assert main(["data", "verify", str(downloaded), "--split", split]) == 0
    said = capsys.readouterr().out
    assert "8 samples in 2 shards" in said
    assert "all 4 samples in 1 shards are good" in said
    data = ImageShards(str(downloaded), size=8, batch_size=4, train="{00000..00001}.tar", val="00002.tar")
    assert data.image_shape == [3, 8, 8]
    assert (len(data.shards), len(data.held_out)) == (8, 4)
    captions = [caption for batch in data.train_dataloader() for caption in batch["caption"]]
    assert sorted(captions) == [f"picture {shard:05d}{i:04d}" for shard in (0, 1) for i in (0, 1, 3, 4)]


def test_its_shards_are_converted_if_the_kind_is_given(downloaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(["data", "prepare", str(downloaded), str(out), "--kind", *WORDS]) == 0
    assert load(out, "train", 3).images.shape == (12, 3, 8, 8)
