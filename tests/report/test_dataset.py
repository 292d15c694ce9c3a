"""What is said of a split against what was written into it."""

import io

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from lightning_tdisent.report.dataset import draw, look, table


def npy(seed, channels):
    out = io.BytesIO()
    np.save(out, np.random.default_rng(seed).normal(size=(2, 2, channels, 8, 8)).astype(np.float16))
    return {"latent.npy": out.getvalue()}


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return {"png": out.getvalue(), "cls": b"2"}


def written(folder, samples):
    with wds.TarWriter(str(folder / "train-0000.tar"), mtime=0) as shard:
        for number, members in enumerate(samples):
            shard.write({"__key__": f"{number:04d}", **members})
    return look(folder, "train")


def curves(found):
    """Of the histogram: {name: heights}; and how many pictures there are."""
    sheet, histogram = [part.axes for part in draw(found).subfigs]
    assert all(not axes.axison for axes in sheet)
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in histogram[0].lines}
    return lines, sum(bool(axes.images) for axes in sheet)


def values(found):
    """The rows of the table that are of values."""
    return [cell for cell in table(found).columns[0].cells if cell.startswith("values")]


@pytest.mark.parametrize("coloured", [False, True])
def test_equal_channels_are_one_grey_one(coloured, tmp_path):
    pixels = [np.full((4, 4, 3), (n, n, n + 100 * coloured), np.uint8) for n in range(80)]
    found = written(tmp_path, map(png, pixels))
    names = ["red", "green", "blue"] if coloured else ["grey"]
    assert found.values.shape == (len(names), 256)
    lines, pictures = curves(found)
    assert list(lines) == names
    for n, name in enumerate(names):
        first = 100 if name == "blue" else 0
        assert np.flatnonzero(found.values[n]).tolist() == list(range(first, first + 80))
        assert lines[name][first : first + 80] == pytest.approx(1 / 80)
    assert pictures == 72  # the sheet is full
    assert values(found) == [f"values, {name}" for name in names]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_every_channel_of_latents_has_its_curve(channels, tmp_path):
    """Also where there are more of them than colours."""
    found = written(tmp_path, (npy(n, channels) for n in range(3)))
    lines, pictures = curves(found)
    assert list(lines) == [f"channel {n}" for n in range(channels)]
    expected = np.random.default_rng(1).normal(size=(2, 2, channels, 8, 8)).astype(np.float16)[0, 0]
    assert np.array_equal(found.samples[1]["latent"][0, 0].numpy(), expected)
    assert pictures == 3


def test_where_nothing_can_be_decoded_nothing_is_drawn(tmp_path):
    found = written(tmp_path, [{"png": b"no image"}] * 2)
    assert len(found.bad) == 2
    assert curves(found) == ({}, 0)
    assert len(found.samples) == len(found.values) == 0
    assert values(found) == []
