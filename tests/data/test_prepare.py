"""Prepared shards against the raw samples; no interruption of a run changes a byte of its result.

The file is long because every kind of interruption is followed by resuming, and compared with an undisturbed run.
"""

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.data.decode import adm_crop
from lightning_tdisent.data.index import Index
from lightning_tdisent.data.prepare import Options, prepare
from lightning_tdisent.data.raw import Item, find_source
from lightning_tdisent.data.shards import load
from lightning_tdisent.errors import Halted, InputError


def noise(width=20, height=12, mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    pixels = np.random.default_rng((width, height)).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def coded(image, form="png", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


class Listed:
    """A source of the given items."""

    kind, shuffled, notes = "listed", False, ()

    def __init__(self, *contents, classes=(), **members):
        items = [c if isinstance(c, dict) else {"png": c, **members} for c in contents]
        self.items = [Item(f"at/{i}.x", members) for i, members in enumerate(items)]
        self.classes = list(classes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def fingerprint(self):
        return hashlib.sha256(repr(self.items).encode()).hexdigest()


def read(folder, split="train"):
    """Return the members of all shards in order: {key: {extension: content}}."""
    out: dict[str, dict[str, bytes]] = {}
    for file in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                out.setdefault(stem, {})[extension] = tar.extractfile(member).read()
    return out


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def fingerprints(folder):
    """Return a hash of every file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture
def folder(tmp_path):
    """Write class folders with 30 images of several sizes and formats."""
    for i in range(30):
        form = ("png", "jpeg", "webp")[i % 3]
        file = tmp_path / "raw" / f"c{i % 2}" / f"im.{i:02d} ü.{form}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(coded(noise(16 + i, 40 - i), form))
    return tmp_path / "raw"


# Content of the shards


def test_bytes_are_kept_and_every_image_has_its_label(folder, tmp_path):
    source = find_source(folder, "train")
    summary = prepare(source, "train", tmp_path / "out", Options(samples=12), jobs=0)
    samples = read(tmp_path / "out")
    assert (summary.samples, summary.shards, summary.skipped) == (30, 3, [])
    assert summary.bytes == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.tar"))
    order = np.random.RandomState(0).permutation(30)
    assert len(samples) == 30
    for number, (key, i) in enumerate(zip(samples, order, strict=True)):
        raw = source[int(i)]
        assert samples[key] == raw.members
        label, stem = re.fullmatch(r"c(\d)/(.*)\.\w+", raw.name).groups()
        assert samples[key]["cls"] == label.encode()
        assert key == f"{number:08d}_{re.sub('[^A-Za-z0-9-]', '-', stem)}"
    index = Index.load(tmp_path / "out" / "train.index.safetensors")
    assert [s.samples for s in index.shards] == [12, 12, 6]
    assert [index.key(i) for i in range(30)] == list(samples)
    record = json.loads((tmp_path / "out" / "train.prepare.json").read_text(encoding="utf-8"))
    assert record["classes"] == ["c0", "c1"]
    assert record["fingerprint"] == source.fingerprint()


def test_tar_headers_have_no_user_group_or_time(folder, tmp_path):
    prepare(find_source(folder, "train"), "train", tmp_path / "out", jobs=0)
    with tarfile.open(tmp_path / "out" / "train-0000.tar") as tar:
        assert {(m.uid, m.gid, m.uname, m.gname, m.mode, m.mtime) for m in tar} == {(0, 0, "", "", 0o644, 0)}


@pytest.mark.parametrize("encode", ["png", "webp"])
@pytest.mark.parametrize("size", [None, 9, 20])
def test_pixels_are_those_of_pillow(encode, size, tmp_path):
    images = [noise(20, 12), noise(50, 41), noise(20, 20), noise(13, 60, "L")]
    prepare(Listed(*map(coded, images)), "train", tmp_path, Options(size=size, encode=encode), jobs=0)
    found = [pixels(members[encode]) for members in read(tmp_path).values()]
    for image, array in zip(images, found, strict=True):
        expected = image
        if size is not None:  # center_crop_arr of ADM, step by step
            while min(*expected.size) >= 2 * size:
                expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)
            scale = size / min(*expected.size)
            expected = expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.BICUBIC)
            whole = np.array(expected)
            y, x = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
            expected = Image.fromarray(whole[y : y + size, x : x + size])
        assert np.array_equal(array, np.asarray(expected.convert("RGB" if encode == "webp" else image.mode)))


def test_jpeg_is_of_quality_95_without_subsampling_and_without_a_profile(tmp_path):
    image = noise(16, 16)
    content = coded(image, "png", icc_profile=b"profile" * 30, exif=Image.Exif())
    prepare(Listed(content), "train", tmp_path, Options(encode="jpg"), jobs=0)
    (members,) = read(tmp_path).values()
    assert members == {"jpg": coded(image, "jpeg", quality=95, subsampling=0)}
    assert "icc_profile" not in Image.open(io.BytesIO(members["jpg"])).info


def test_keep_preserves_the_bytes_or_the_format(tmp_path):
    square, wide = noise(8, 8), noise(16, 8)
    contents = [
        {"jpg": coded(square, "jpeg")},  # already has the size: unchanged
        {"jpg": coded(wide, "jpeg")},  # resized: stays a jpg
        {"webp": coded(wide, "webp")},
        {"jpg": coded(wide, "png")},  # a png with another extension
        {"bmp": coded(square, "bmp")},  # a format that shards do not have
        {"tif": coded(wide, "tiff")},
        {"gif": coded(wide.convert("P"), "gif")},
    ]
    prepare(Listed(*contents), "train", tmp_path, Options(size=8), jobs=0)
    found = list(read(tmp_path).values())
    assert [list(m) for m in found] == [["jpg"], ["jpg"], ["webp"], ["png"], ["png"], ["png"], ["png"]]
    assert found[0] == contents[0]
    for members, content in zip(found[2:6], contents[2:6], strict=True):
        original = Image.open(io.BytesIO(next(iter(content.values())))).convert("RGB")
        assert np.array_equal(pixels(next(iter(members.values()))), np.asarray(adm_crop(original, 8)))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    return coded(noise(12, 8), "png", exif=exif), np.rot90(np.asarray(noise(12, 8)), -1)


def animated():
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    return coded(frames[0], "gif", save_all=True, append_images=frames[1:]), np.asarray(frames[0])


def palette():
    image = noise(9, 7).quantize(16)
    return coded(image), np.asarray(image.convert("RGB"))


def grey16():
    wide = np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000
    return coded(Image.fromarray(wide)), np.rint(wide / 257).astype(np.uint8)


def transparent():
    image = noise(9, 7, "RGBA")
    return coded(image), np.asarray(Image.alpha_composite(Image.new("RGBA", (9, 7), "white"), image).convert("RGB"))


def cmyk():
    content = coded(noise(9, 7, "CMYK"), "jpeg")
    return content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def grey_alpha():
    white = Image.new("LA", (9, 7), (200, 255))
    return coded(white), np.full((7, 9), 200, np.uint8)


@pytest.mark.parametrize("make", [turned, animated, palette, grey16, transparent, cmyk, grey_alpha])
def test_every_kind_of_image_becomes_grey_or_rgb(make, tmp_path):
    content, expected = make()
    prepare(Listed(content), "train", tmp_path, Options(encode="png"), jobs=0)
    (members,) = read(tmp_path).values()
    found = Image.open(io.BytesIO(members["png"]))
    assert found.mode == ("L" if expected.ndim == 2 else "RGB")
    assert np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(("kind", "form"), [(np.float32, "tiff"), (np.int32, "tiff"), (np.uint16, "png")])
def test_values_of_a_data_set_are_scaled_by_one_range(kind, form, tmp_path):
    """If each image were scaled by its maximum, a float image of 0.5 would be white; unscaled, it would be black."""
    contents = [coded(Image.fromarray(np.full((4, 4), v, kind)), form) for v in (0, 1, 100)]
    source = Listed(*contents)
    made = prepare(source, "train", tmp_path / "a", Options(range=(0, 102)), jobs=0)
    assert [int(pixels(m["png"]).max()) for m in read(tmp_path / "a").values()] == [0, 2, 250]  # 2.5 is rounded to even
    assert json.loads((tmp_path / "a" / "train.prepare.json").read_text(encoding="utf-8"))["range"] == [0, 102]
    name = {"u": "16 bits", "i": "integers of 32 bits", "f": "floats"}[np.dtype(kind).kind]
    assert made.depths == {name: 3}
    with pytest.raises(InputError, match=r"range: \[0, 102\] there, \[0, 255\] now"):
        prepare(source, "train", tmp_path / "a", Options(range=(0, 255)), jobs=0)
    with pytest.raises(InputError, match=r"at/0.x: .*outside of the range 0 to 0.5"):
        prepare(Listed(*contents[1:]), "train", tmp_path / "b", Options(range=(0, 0.5), bad=0), jobs=0)
    if name == "16 bits":
        assert prepare(source, "train", tmp_path / "c", jobs=0).samples == 3
    else:
        with pytest.raises(
            InputError, match=rf"at/0.x: holds {name}, and the values of black and white are unknown.* --range 0,1"
        ):
            prepare(source, "train", tmp_path / "c", Options(bad=0), jobs=0)
    with pytest.raises(InputError, match=r"range: \(1, 0\) is not two finite numbers"):
        prepare(source, "train", tmp_path / "d", Options(range=(1, 0)), jobs=0)


def test_captions_are_normalised_and_bad_caption_files_are_named(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for k, text in enumerate(["a cat".encode("utf-8-sig"), b"a dog\r\n", b"", "caf\u00e9".encode("cp1252")]):
        (raw / f"{k}.png").write_bytes(coded(noise()))
        (raw / f"{k}.txt").write_bytes(text)
    (raw / "4.png").write_bytes(coded(noise()))
    options = Options(shuffle=False)
    made = prepare(find_source(raw, "train"), "train", tmp_path / "out", options, jobs=0)
    assert [m.get("txt") for m in read(tmp_path / "out").values()] == [b"a cat", b"a dog", b"", None]
    assert made.captions == (3, 1)
    assert [s.reason for s in made.skipped] == ["has a caption in 3.txt that is not UTF-8 (byte 3); save it as UTF-8"]


@pytest.mark.parametrize("label", [b"-2", b"cat", b"1.0", b"3000000000", b""])
def test_labels_that_cannot_be_trained_on_are_refused(label, tmp_path):
    with pytest.raises(InputError, match="is not a number from 0 to 2,147,483,647"):
        prepare(Listed({"png": coded(noise()), "cls": label}), "train", tmp_path, Options(bad=0), jobs=0)


def test_a_label_of_minus_1_means_no_label(tmp_path):
    prepare(Listed({"png": coded(noise()), "cls": b"-1"}), "train", tmp_path, jobs=0)
    assert [list(m) for m in read(tmp_path).values()] == [["png"]]


def test_captions_and_other_members_are_kept(tmp_path):
    members = {"png": coded(noise()), "cls": b"3", "txt": "grün".encode(), "json": b"{}"}
    prepare(Listed(members), "train", tmp_path, jobs=0)
    assert list(read(tmp_path).values()) == [members]


def test_keys_are_unique_and_without_dots(tmp_path):
    source = Listed(*[coded(noise())] * 5)
    names = ["a/b.c.d.png", "a/b.c.d.png", ".", "日本/" + "x" * 99 + ".png", "\udcff\n\t.png"]
    source.items = [Item(name, i.members) for name, i in zip(names, source.items, strict=True)]
    prepare(source, "train", tmp_path, jobs=0)
    assert list(read(tmp_path)) == [
        "00000000_b-c-d", "00000001_b-c-d", "00000002", f"00000003_{'x' * 48}", "00000004_-udcff--",
    ]  # fmt: skip


@pytest.mark.parametrize("shuffle", [None, True, False])
def test_the_order_depends_on_the_seed(shuffle, tmp_path):
    source = Listed(*(coded(noise(8 + i)) for i in range(20)))

    def widths(seed):
        out = tmp_path / f"{seed}"
        prepare(source, "train", out, Options(shuffle=shuffle, seed=seed), jobs=0)
        return [pixels(m["png"]).shape[1] - 8 for m in read(out).values()]

    if shuffle:  # the default of this source is not to shuffle
        assert sorted(widths(1)) == list(range(20))
        assert len({tuple(widths(seed)) for seed in range(3)}) == 3
    else:
        assert widths(0) == widths(1) == list(range(20))


def test_gzipped_shards_are_not_shuffled(folder, tmp_path):
    plain, zipped = tmp_path / "plain", tmp_path / "zipped"
    prepare(find_source(folder, "train"), "train", plain, jobs=0)
    zipped.mkdir()
    (zipped / "train-0000.tar.gz").write_bytes(gzip.compress((plain / "train-0000.tar").read_bytes()))
    with pytest.raises(InputError, match="gzipped shards can only be read in order; gunzip them"):
        prepare(find_source(zipped, "train"), "train", tmp_path / "out", Options(shuffle=True), jobs=0)
    prepare(find_source(zipped, "train"), "train", tmp_path / "out", Options(samples=7), jobs=2)
    assert list(read(tmp_path / "out").values()) == list(read(plain).values())


# Bad samples


def sized(png, width, height):
    """Return a PNG whose header claims another size."""
    header = b"IHDR" + struct.pack(">2I", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_bad_samples_are_left_out_and_named(tmp_path):
    good = coded(noise())
    png = coded(noise(300, 300))
    contents = {
        0: b"",
        1: sized(png, 0, 5),
        3: b"no image",
        5: png[: len(png) // 2],
        7: {"txt": b"no image"},
        8: {"png": good, "jpg": good},
        9: {"png": good, "txt": b"\xff"},
        11: {"png": good, "cls": b"cat"},
        12: sized(png, 12_000, 12_000),
        13: coded(Image.new("L", (1, 60_000))),  # resized, it would have 128 x 7,680,000 pixels
    }
    source = Listed(*(contents.get(i, good) for i in range(15)))
    summary = prepare(source, "train", tmp_path, Options(bad=0.9, samples=4, encode="png", size=128), jobs=0)
    assert summary.samples == len(read(tmp_path)) == 5
    assert [(s.number, s.name) for s in summary.skipped] == [(i, f"at/{i}.x") for i in contents]
    reasons = [s.reason for s in summary.skipped]
    parts = "no bytes", "", "not an image", "truncated", "has 0 images", "has 2 images", "UTF-8", "not a number"
    for reason, part in zip(reasons, (*parts, "12000 x 12000", "bomb"), strict=True):
        assert part in reason
    lines = (tmp_path / "train.skipped.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{s.number:08d}\t{s.name}\t{s.reason}" for s in summary.skipped]
    assert list(read(tmp_path)) == [f"{i:08d}_{i}" for i in range(15) if i not in contents]
    again = prepare(source, "train", tmp_path, Options(bad=0.9, samples=4, encode="png", size=128), jobs=0)
    assert again == summary


@pytest.mark.parametrize(
    ("bad", "n", "allowed"), [(0.0, 40, 0), (0.001, 40, 1), (0.05, 40, 2), (0.1, 40, 4), (1.0, 40, 39)]
)
def test_more_bad_samples_than_allowed_stop_it(bad, n, allowed, tmp_path):
    def written(count):
        out = tmp_path / str(count)
        source = Listed(*(b"" if i % 40 >= 40 - count else coded(noise()) for i in range(n)))
        return prepare(source, "train", out, Options(bad=bad), jobs=0)

    assert len(written(allowed).skipped) == allowed
    if allowed < 39:
        with pytest.raises(
            InputError, match=rf"bad={bad:g} allows {allowed} of 40\. The first is at/{39 - allowed}\.x"
        ):
            written(allowed + 1)
        assert (tmp_path / str(allowed + 1) / "train.skipped.txt").read_text(encoding="utf-8").count(
            "\n"
        ) == allowed + 1
        assert not list((tmp_path / str(allowed + 1)).glob("*.tar"))


def test_it_resumes_after_more_bad_samples_are_allowed(tmp_path):
    source = Listed(*(b"" if i in (3, 15) else coded(noise()) for i in range(20)))
    with pytest.raises(InputError, match="2 of the first 16 samples are bad"):
        prepare(source, "train", tmp_path / "a", Options(samples=10), jobs=0)
    assert [f.name for f in sorted((tmp_path / "a").glob("*.tar"))] == ["train-0000.tar"]
    summary = prepare(source, "train", tmp_path / "a", Options(samples=10, bad=0.1), jobs=0)
    assert [s.number for s in summary.skipped] == [3, 15]
    prepare(source, "train", tmp_path / "b", Options(samples=10, bad=0.1), jobs=0)
    assert fingerprints(tmp_path / "a") == fingerprints(tmp_path / "b")


def test_a_shard_with_bad_samples_only_is_refused(tmp_path):
    source = Listed(coded(noise()), b"", b"")
    with pytest.raises(InputError, match=r"train-0001\.tar would be empty: all of its samples are bad"):
        prepare(source, "train", tmp_path, Options(samples=1, bad=1), jobs=0)


def test_samples_with_and_without_a_class_are_refused(tmp_path):
    good = coded(noise())
    with pytest.raises(InputError, match=r"at/0\.x has a class, but at/2\.x has none"):
        prepare(Listed({"png": good, "cls": b"0"}, {"png": good, "cls": b"1"}, good), "train", tmp_path, jobs=0)


# Resuming


@pytest.mark.parametrize("options", [Options(samples=7, encode="png", size=8), Options(samples=100)])
def test_the_number_of_processes_changes_nothing(options, folder, tmp_path):
    (folder / "c0" / "bad.png").write_bytes(b"bad")
    source = find_source(folder, "train")
    seen = []
    one = prepare(source, "train", tmp_path / "one", options, jobs=0)
    two = prepare(source, "train", tmp_path / "two", options, jobs=2, progress=lambda *at: seen.append(at))
    assert one == two
    assert [s.name for s in one.skipped] == ["c0/bad.png"]
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
    assert seen[0] == (0, 31)
    assert seen[-1] == (31, 31)
    assert seen == sorted(seen)


SLOW = """
import sys, time
from pathlib import Path
from lightning_tdisent.data import prepare as module
from lightning_tdisent.data.raw import find_source

if __name__ == "__main__":
    folder, out, jobs = sys.argv[1:]
    module.prepare(find_source(folder, "train"), "train", out, module.Options(samples=5, encode="png", size=128),
                   int(jobs), lambda done, total: (print(done, flush=True), time.sleep(0.25)))
"""


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_killed_run_resumes_to_the_same_bytes(jobs, folder, tmp_path):
    (folder / "c0" / "bad.png").write_bytes(b"bad")
    source, options = find_source(folder, "train"), Options(samples=5, encode="png", size=128)
    script, out = tmp_path / "slow.py", tmp_path / "killed"
    script.write_text(SLOW, encoding="utf-8")
    command = [sys.executable, str(script), str(folder), str(out), str(jobs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True) as process:
        for line in process.stdout:
            if int(line) >= 15:
                break
        children = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
    assert bool(children) == (jobs > 1)
    shards = sorted(out.glob("*.tar"))
    assert 2 <= len(shards) < 7
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in shards}
    for file in shards:
        with tarfile.open(file) as tar:
            assert len(tar.getnames()) >= 8  # complete
    (out / ".train-0003.tar.tmp").write_bytes(b"litter")
    os.utime(out / ".train-0003.tar.tmp", (1, 1))  # of an unknown process, but old
    wait_for(lambda: not any(map(alive, children)))
    summary = prepare(source, "train", out, options, jobs=0)
    assert summary == prepare(source, "train", tmp_path / "unbroken", options, jobs=0)
    assert fingerprints(out) == fingerprints(tmp_path / "unbroken")
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in shards} == before  # kept, not written again


def descendants(pid):
    """Return the child processes of a process, and their children."""
    found = []
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
        for child in map(int, file.read().split()):
            found += [child, *descendants(child)]
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_lost_shard_is_written_again(folder, tmp_path):
    source, options = find_source(folder, "train"), Options(samples=7)
    prepare(source, "train", tmp_path / "out", options, jobs=0)
    before = fingerprints(tmp_path / "out")
    (tmp_path / "out" / "train-0002.tar").unlink()
    seen = []
    prepare(source, "train", tmp_path / "out", options, jobs=0, progress=lambda *at: seen.append(at))
    assert fingerprints(tmp_path / "out") == before
    assert seen == [(23, 30), (30, 30)]
    written = (tmp_path / "out" / "train.index.safetensors").stat().st_mtime_ns
    prepare(source, "train", tmp_path / "out", options, jobs=0)  # nothing to do
    assert (tmp_path / "out" / "train.index.safetensors").stat().st_mtime_ns == written


def stopped(folder, out, *jobs):
    """Interrupt a run of 5 shards after the third."""
    with full_at(".train-0003.tar.*", 0), pytest.raises(Halted, match=r"cannot be written"):
        prepare(find_source(folder, "train"), "train", out, Options(samples=6, shuffle=False), jobs=0)
    return out


def test_a_shard_that_changed_since_it_was_written_is_named_before_the_index(folder, tmp_path):
    out, options = stopped(folder, tmp_path / "out"), Options(samples=6, shuffle=False)
    lines = (out / "train.sha256").read_text(encoding="utf-8").splitlines()
    shards = [out / f"train-000{k}.tar" for k in range(3)]
    assert [line for line in lines if line[66:] < "train-0003"] == [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in shards
    ]
    content = bytearray(shards[1].read_bytes())
    content[700] ^= 1
    shards[1].write_bytes(content)
    source = find_source(folder, "train")
    for _ in range(2):
        with pytest.raises(InputError, match=r"train-0001.tar changed after being written: .* no index is written"):
            prepare(source, "train", out, options, jobs=0)
    assert not (out / "train.index.safetensors").exists()
    shards[1].unlink()
    prepare(source, "train", out, options, jobs=0)
    prepare(source, "train", tmp_path / "unbroken", options, jobs=0)
    assert fingerprints(out) == fingerprints(tmp_path / "unbroken")


def test_shards_of_an_unfinished_prepare_are_not_read(folder, tmp_path, capsys):
    out, message = stopped(folder, tmp_path / "out"), "the data prepare of train is not finished: 3 of its 5 shards"
    with pytest.raises(InputError, match=message):
        load(out, "train", 3, size=8)
    with pytest.raises(InputError, match=message):  # the same shards, selected by name
        load(out, "train-000{0..2}.tar", 3, size=8)
    with pytest.raises(InputError, match=message):
        find_source(out, "train")
    for command in ("index", "verify", "inspect"):
        assert main(["data", command, str(out)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "train-0003.tar is not. Run the same data prepare command again" in said
    assert main(["data", "index", out.as_uri()]) == 2
    assert message in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "train.prepare.json").write_bytes((out / "train.prepare.json").read_bytes())
    with pytest.raises(InputError, match="not finished: 0 of its 5 shards are there"):
        load(empty, "train", 3)
    for file in out.glob("*.tar"):  # finished, zipped, and next to another split, they are read
        file.unlink()
    prepare(find_source(folder, "train"), "train", out, Options(samples=6, shuffle=False), jobs=0)
    for file in sorted(out.glob("*.tar")):
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    (out / "train.index.safetensors").unlink()
    assert len(load(out, "train", 3, size=8)) == 30


def test_another_run_in_the_same_folder_is_refused_with_all_differences(folder, tmp_path):
    source = find_source(folder, "train")
    prepare(source, "train", tmp_path / "out", Options(samples=7), jobs=0)
    before = fingerprints(tmp_path / "out")
    (folder / "c0" / "new.png").write_bytes(coded(noise()))
    with pytest.raises(InputError) as said:
        prepare(find_source(folder, "train"), "train", tmp_path / "out", Options(samples=7, size=8, seed=1), jobs=0)
    for part in (
        "number: 30 there, 31 now",
        "size: null there, 8 now",
        "seed: 0 there, 1 now",
        "fingerprint: ",
    ):
        assert part in str(said.value)
    assert "samples:" not in str(said.value)
    assert fingerprints(tmp_path / "out") == before
    others = Listed(*(coded(noise(40 + i)) for i in range(20)))
    prepare(others, "val", tmp_path / "out", Options(samples=9), jobs=0)  # another split is another run
    assert len(read(tmp_path / "out", "val")) == 20


def test_shards_of_something_else_are_not_touched(folder, tmp_path):
    source = find_source(folder, "train")
    strange = tmp_path / "train-0007.tar"
    strange.write_bytes(b"something")
    with pytest.raises(InputError, match=r"holds train-0007.tar, but no train.prepare.json"):
        prepare(source, "train", tmp_path, jobs=0)
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["train-0007.tar"]
    strange.unlink()
    prepare(source, "train", tmp_path, jobs=0)
    strange.write_bytes(b"something")
    with pytest.raises(InputError, match=r"holds train-0007.tar, which is not one of the shards of train.prepare.json"):
        prepare(source, "train", tmp_path, jobs=0)
    strange.unlink()
    (tmp_path / "train.prepare.json").write_text('{"format"', encoding="utf-8")
    with pytest.raises(InputError, match=r"train\.prepare\.json is damaged"):
        prepare(source, "train", tmp_path, jobs=0)


def test_two_runs_at_once_are_refused(folder, tmp_path):
    source = find_source(folder, "train")

    def inner(done, total):
        with pytest.raises(InputError, match="another process is preparing train in this folder"):
            prepare(source, "train", tmp_path / "out", jobs=0)

    assert prepare(source, "train", tmp_path / "out", jobs=0, progress=inner).samples == 30


@contextmanager
def full_at(name, time=0):
    """Make the disk full when a file with this name is synced, the first time or a later one."""
    sync, times = os.fsync, itertools.count()

    def full(handle):
        if fnmatch(Path(os.readlink(f"/proc/self/fd/{handle}")).name, name) and next(times) == time:
            raise OSError(28, "No space left on device")
        sync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


SHARDS = [f"train-000{k}.tar" for k in range(4)]


@pytest.mark.parametrize(
    ("name", "time", "left"),
    [
        ("train.prepare.json", 0, ["train.prepare.json"]),
        (".train.skipped.txt.*", 0, ["train.prepare.json"]),
        (".train.sha256.*", 0, ["train.prepare.json", "train.skipped.txt"]),
        (".train-0000.tar.*", 0, ["train.prepare.json", "train.sha256", "train.skipped.txt"]),
        (".train-0001.tar.*", 0, ["train-0000.tar", "train.prepare.json", "train.sha256", "train.skipped.txt"]),
        ("out", 0, ["train.prepare.json", "train.skipped.txt"]),  # sync of the folder: names may be lost, but not files
        ("out", 2, ["train-0000.tar", "train.prepare.json", "train.sha256", "train.skipped.txt"]),
        (".train.index.safetensors.*", 0, [*SHARDS, "train.prepare.json", "train.sha256", "train.skipped.txt"]),
    ],
)
def test_a_full_disk_leaves_complete_files(name, time, left, folder, tmp_path):
    (folder / "c0" / "bad.png").write_bytes(b"bad")
    out, options = tmp_path / "out", Options(samples=9, shuffle=False)
    source = find_source(folder, "train")
    with full_at(name, time), pytest.raises(Halted, match=r"cannot be written: No space left on device"):
        prepare(source, "train", out, options, jobs=0)
    assert sorted(f.name for f in out.iterdir()) == left
    prepare(source, "train", tmp_path / "unbroken", options, jobs=0)
    whole = fingerprints(tmp_path / "unbroken")
    begun = set(left) - {"train.sha256"}  # this file grows with each shard
    assert all(fingerprints(out)[file] == whole[file] for file in begun)
    prepare(source, "train", out, options, jobs=0)
    assert fingerprints(out) == whole


def test_the_list_of_skipped_samples_survives_a_crash(tmp_path):
    """A run that ends while it writes the list of the second shard must keep the list of the finished first shard."""
    source = Listed(*(b"" if i in (3, 15) else coded(noise()) for i in range(20)))
    options = Options(samples=10, bad=0.1)
    with full_at(".train.skipped.txt.*", 1), pytest.raises(Halted, match="No space left"):
        prepare(source, "train", tmp_path / "a", options, jobs=0)
    assert (tmp_path / "a" / "train.skipped.txt").read_text(encoding="utf-8").startswith("00000003\t")
    assert [s.number for s in prepare(source, "train", tmp_path / "a", options, jobs=0).skipped] == [3, 15]
    prepare(source, "train", tmp_path / "b", options, jobs=0)
    assert fingerprints(tmp_path / "a") == fingerprints(tmp_path / "b")


class Dies(Listed):
    """A source whose third item kills the process."""

    def __getitem__(self, i):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_process_that_dies_is_reported(tmp_path):
    with pytest.raises(Halted, match=r"a process that decodes images died .* fewer jobs than 2"):
        prepare(Dies(*[coded(noise())] * 40), "train", tmp_path, jobs=2)
    assert [f.name for f in tmp_path.iterdir()] == ["train.prepare.json"]


def test_all_invalid_options_are_named_at_once(folder, tmp_path):
    options = Options(size=0, encode="jpeg", samples=0, seed=-1, batch_size=0, bad=2)
    with pytest.raises(InputError) as said:
        prepare(find_source(folder, "train"), "tr-ain", tmp_path / "out", options, jobs=-1)
    for name in (
        "split: 'tr-ain'",
        "size: 0",
        "encode: 'jpeg'",
        "samples: 0",
        "seed: -1",
        "batch_size: 0",
        "bad: 2",
        "jobs:",
    ):
        assert name in str(said.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="listed data set is empty"):
        prepare(Listed(), "train", tmp_path, jobs=0)


# Splits


def test_another_split_of_the_same_images_is_refused(folder, tmp_path):
    """No folder name has the word of a split, so each split would get all images."""
    out = tmp_path / "out"
    prepare(find_source(folder, "train"), "train", out, Options(samples=12), jobs=0)
    for options in (Options(samples=12), Options(samples=7, seed=1)):  # in another order, with other keys
        with pytest.raises(InputError, match=r"(12|7) of the first (12|7) images of test are images of train, too"):
            prepare(find_source(folder, "test"), "test", out, options, jobs=0)
    assert not list(out.glob("test-*.tar"))
    prepare(find_source(folder, "test"), "test", tmp_path / "elsewhere", jobs=0)
    assert prepare(find_source(folder, "train"), "train", out, Options(samples=12), jobs=0).samples == 30


@pytest.mark.parametrize(("again", "refused"), [(1, False), (2, True), (60, True)])
def test_more_than_one_percent_of_shared_images_is_refused_at_the_end(again, refused, tmp_path):
    train = [coded(Image.new("L", (2, 2), k)) for k in range(100)]
    test = [coded(Image.new("L", (2, 2), 100 + k)) for k in range(100 - again)] + train[:again]
    prepare(Listed(*train), "train", tmp_path, jobs=0)
    if not refused:
        assert prepare(Listed(*test), "test", tmp_path, Options(samples=20), jobs=0).shared == {"train": again}
        return
    for _ in range(2):  # the same command fails again
        with pytest.raises(
            InputError, match=rf"{again} of the 100 images of test are images of train \(which has 100\), too"
        ):
            prepare(Listed(*test), "test", tmp_path, Options(samples=20), jobs=0)
    assert not (tmp_path / "test.index.safetensors").exists()


# Latents


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=3, sample_size=16, shift_factor=0.25,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder, model.eval()


def test_latents_equal_a_direct_encode(vae, tmp_path):
    folder, model = vae
    images = [noise(16, 16), noise(40, 33), noise(16, 16, "L"), noise(17, 90), noise(19, 22)]
    contents = [{"png": coded(image), "cls": str(i).encode(), "txt": b"t"} for i, image in enumerate(images)]
    options = Options(size=16, vae=folder, batch_size=2)
    summary = prepare(Listed(*contents[:3], b"bad", *contents[3:]), "train", tmp_path, options, jobs=0)
    assert summary.samples == 5
    found = list(read(tmp_path).values())
    for i, (image, members) in enumerate(zip(images, found, strict=True)):
        assert sorted(members) == ["cls", "latent.npy", "txt"]
        assert members["cls"] == str(i).encode()
        latent = np.load(io.BytesIO(members["latent.npy"]), allow_pickle=False)
        assert (latent.dtype, latent.shape) == (np.float16, (2, 2, 3, 8, 8))
        rgb = image.convert("RGB")
        x = torch.from_numpy(np.array(adm_crop(rgb, 16))).permute(2, 0, 1)[None] / 127.5 - 1
        for entry, pixels_ in zip(latent, (x, x.flip(-1)), strict=True):
            with torch.inference_mode():
                expected = model.encode(pixels_).latent_dist
            scaled = ((expected.mean - 0.25) * 0.18215, expected.std * 0.18215)  # normalised as in diffusers' models
            for half, full in zip(entry, scaled, strict=True):
                np.testing.assert_allclose(half.astype(np.float32), full[0].numpy(), rtol=2e-3, atol=4e-4)
        assert np.abs(latent[0].astype(np.float32) - latent[1]).max() > 0.01  # otherwise the flip would prove nothing
    record = json.loads((tmp_path / "train.prepare.json").read_text(encoding="utf-8"))["latents"]
    assert record["scaling_factor"] == 0.18215
    assert record["shift_factor"] == 0.25
    assert (record["channels"], record["factor"], record["batch_size"]) == (3, 2, 2)
    assert re.fullmatch("[0-9a-f]{64}", record["weights"])


def test_latents_are_the_same_after_an_interruption_and_with_processes(vae, tmp_path):
    options = Options(size=16, vae=vae[0], batch_size=4, samples=10)
    source = Listed(*(b"" if i == 11 else coded(noise(16 + i, 20)) for i in range(25)))
    prepare(source, "train", tmp_path / "a", options, jobs=2)
    prepare(source, "train", tmp_path / "b", options, jobs=0)
    (tmp_path / "b" / "train-0001.tar").unlink()
    prepare(source, "train", tmp_path / "b", options, jobs=0)
    assert fingerprints(tmp_path / "a") == fingerprints(tmp_path / "b")


def test_other_weights_are_refused_when_resuming_latents(vae, tmp_path):
    from diffusers import AutoencoderKL

    source, (folder, model) = Listed(coded(noise(16, 16))), vae
    prepare(source, "train", tmp_path / "out", Options(vae=folder), jobs=0)
    changed = AutoencoderKL.from_config(model.config)
    changed.load_state_dict({k: v + 1e-6 for k, v in model.state_dict().items()})
    changed.save_pretrained(tmp_path / "pipeline" / "vae")
    with pytest.raises(InputError, match=r"was begun with another source or other options: latents: .* there, .* now"):
        prepare(source, "train", tmp_path / "out", Options(vae=tmp_path / "pipeline"), jobs=0)


def test_images_that_the_autoencoder_does_not_accept_are_refused(vae, tmp_path):
    source, folder = Listed(coded(noise(16, 16)), coded(noise(18, 16))), vae[0]
    with pytest.raises(InputError, match=r"at/1\.x has 16 x 18 pixels, others have 16 x 16"):
        prepare(source, "train", tmp_path / "a", Options(vae=folder), jobs=0)
    with pytest.raises(InputError, match="15 x 15 pixels, not a multiple of 2"):
        prepare(source, "train", tmp_path / "a", Options(vae=folder, size=15), jobs=0)
    with pytest.raises(InputError, match=r"encode: png and vae: .*give only one of them"):
        prepare(source, "train", tmp_path / "a", Options(vae=folder, encode="png"), jobs=0)
    with pytest.raises(InputError, match="device: 'abacus' cannot be used"):
        prepare(source, "train", tmp_path / "a", Options(vae=folder, device="abacus"), jobs=0)
    with pytest.raises(InputError, match="is not the folder of an AutoencoderKL"):
        prepare(source, "train", tmp_path / "a", Options(vae=tmp_path), jobs=0)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}', encoding="utf-8")
    with pytest.raises(InputError, match="holds the model VQModel"):
        prepare(source, "train", tmp_path / "a", Options(vae=tmp_path), jobs=0)
    assert not list((tmp_path / "a").glob("*.tar"))


# With `Shards`


def test_digits_prepared_from_shards_are_the_same_images(digits, tmp_path):
    options = Options(samples=100, encode="webp", shuffle=False)
    prepare(find_source(digits, "test"), "test", tmp_path, options, jobs=0)
    before, after = load(digits, "test", 1), load(tmp_path, "test", 1)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.labels, before.labels)


def test_a_run_stopped_before_its_first_shard_uses_the_new_options(tmp_path):
    source = Listed(coded(noise(16, 16)))
    prepare(source, "train", tmp_path / "whole", Options(encode="png"), jobs=0)
    prepare(source, "train", tmp_path / "out", Options(encode="webp"), jobs=0)
    for path in (tmp_path / "out").iterdir():
        if path.name != "train.prepare.json":
            path.unlink()
    prepare(source, "train", tmp_path / "out", Options(encode="png"), jobs=0)
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
