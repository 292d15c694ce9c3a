"""Indices against the file, zlib, tarfile and webdataset; mismatched indices; shards that a split or pattern selects.

The file is long because it also makes the unusual tars and the damaged indices.
"""

import gzip
import hashlib
import io
import itertools
import os
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset as wds
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from making import opened, same, save_index, write
from PIL import Image

from lightning_tdisent.data import tars
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.index import Index, Shard, path_of
from lightning_tdisent.data.orders import Streamed
from lightning_tdisent.data.scan import build, join, scan
from lightning_tdisent.data.shards import Policy, Shards, load
from lightning_tdisent.data.tars import find
from lightning_tdisent.errors import Halted, InputError


def by_webdataset(file):
    """Return [(key, {extension: content})] as webdataset reads a shard."""
    with open(file, "rb") as stream:
        members = wds.tariterators.tar_file_expander([{"url": str(file), "stream": stream}])
        return [
            (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
            for sample in wds.tariterators.group_by_keys(members)
        ]


# Regions

WORD = st.text("abcdeé-_ 0", min_size=1, max_size=6)
SAMPLE = st.tuples(
    st.lists(WORD, max_size=2),  # folders
    st.one_of(WORD, st.integers(90, 300).map(lambda n: "k" * n)),  # over 100 bytes: stored in an extra header
    st.dictionaries(st.sampled_from(["png", "txt", "a.b", "JPG"]), st.binary(max_size=1100), min_size=1),
)
OTHER = st.sampled_from(
    [("folder", None), ("README", b"x" * 700), (".hidden", b"y"), ("a/LICENSE", b""), (".d/x", b"")]
)


@st.composite
def shard(draw):
    """Draw the members of a shard, and those of them that belong to a sample."""
    members = []
    for number, (folders, key, content) in enumerate(draw(st.lists(SAMPLE, max_size=5))):
        members += draw(st.lists(OTHER, max_size=2))
        key = "/".join([*folders, f"{key}{number}"])
        for extension, value in content.items():
            members.append((f"{key}.{extension}", value))
            members += draw(st.lists(OTHER, max_size=1))
    return members


@settings(max_examples=50, deadline=None)
@given(
    contents=st.lists(shard(), min_size=1, max_size=3),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    packed=st.booleans(),
)
def test_regions_tile_the_tar_and_contain_what_webdataset_reads(contents, form, packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    parts, expected = [], []
    for number, members in enumerate(contents):
        # different keys and bytes in every shard, so that they can be joined
        members = [("empty" * (number + 1), b""), *((f"{number}/{n}" if "." in n[1:] else n, c) for n, c in members)]
        file = write(folder / f"t-{number}.tar", members, form)
        raw, url = file.read_bytes(), str(file)
        if packed:
            url = f"{file}.gz"
            Path(url).write_bytes(gzip.compress(raw, 1))
        index, r = (one := scan(url)), one.regions
        parts.append(index)
        read = [sample for sample in by_webdataset(file) if sample[1].keys() != {"txt"}]  # a lone text is no sample
        expected += [(url.rpartition("/")[2], key, content) for key, content in read]

        stored = Path(url).read_bytes()
        row = index.shards[0]
        assert (row.name, row.bytes, row.samples) == (url.rpartition("/")[2], len(stored), len(read))
        assert row.sha256 == hashlib.sha256(stored).hexdigest()
        ends = r.begin + r.size
        if read:
            assert r.begin[0] == 0
            assert ends[-1] == len(raw)
        assert np.array_equal(r.begin[1:], ends[:-1])
        for n, (key, content) in enumerate(read):
            region = raw[r.begin[n] : ends[n]]
            assert r.crc[n] == zlib.crc32(region)
            assert (index.key(n), index.members(n, region)) == (key, content)

    whole = join(parts)
    assert len(whole) == len(expected)
    for n, (name, key, content) in enumerate(expected):
        place, number = whole.place(n)
        assert whole.shards[place].name == name
        assert number + sum(part.shards[0].samples for part in parts[:place]) == n
        assert whole.key(n) == key
        assert whole.name(n).startswith(f"{name}: sample {key} (bytes ")
        tar = gzip.decompress((folder / name).read_bytes()) if packed else (folder / name).read_bytes()
        begin = int(whole.regions.begin[n])
        assert whole.members(n, tar[begin : begin + int(whole.regions.size[n])]) == content
    assert set(whole.extensions) == {kind for *_, content in expected for kind in content}
    whole.save(folder / "i.safetensors")
    assert same(Index.load(folder / "i.safetensors"), whole)
    for number in range(len(contents)):  # `Shards` returns the same
        shards = Shards([str(folder / row.name) for row in whole.shards], whole, Decoder(1))
        streamed = [(whole.key(n), members) for n, members in shards.stream(number)]
        assert streamed == [(key, c) for name, key, c in expected if name == whole.shards[number].name]


def test_a_leading_dot_and_slash_is_not_part_of_the_key(tmp_path):
    index = scan(str(write(tmp_path / "t-0.tar", [("./", None), ("./a.png", b"1"), ("./b/c.PNG", b"2")])))
    assert [index.key(n) for n in range(2)] == ["a", "b/c"]
    assert index.extensions == ("png",)


def test_an_index_made_from_headers_has_the_same_offsets(shards):
    read, quick = build(find(shards, "train")), build(find(shards, "train"), hashed=False)
    assert (read.hashed, quick.hashed) == (True, False)
    assert len(quick.regions.crc) == 0
    r = replace(quick.regions, crc=read.regions.crc, images=read.regions.images)
    assert same(replace(quick, shards=read.shards, regions=r), read)


def test_an_index_made_by_two_processes_is_the_same(shards):
    seen = []
    assert same(build(find(shards, "train"), 2, lambda *n: seen.append(n)), build(find(shards, "train")))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("at", ["local", "memory://index-round-trip"])
def test_what_is_saved_is_loaded(regions, at, shards, tmp_path):
    file = f"{at if '://' in at else tmp_path}/train.index.safetensors"
    index = build(find(shards, "train"), regions=regions)
    index.save(file)
    again = Index.load(file)
    assert same(again, index)
    assert again.digest == index.digest
    assert len(again) == 30
    assert again.starts.tolist() == [0, 10, 17, 30]
    assert not list(tmp_path.glob(".*"))


def test_an_index_that_cannot_be_written_leaves_the_old_one(shards, monkeypatch):
    before = save_index(shards)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Halted, match=r"train.index.safetensors: cannot be written: No space left on device"):
        save_index(shards, regions=False)
    assert same(Index.load(path_of(shards, "train")), before)
    assert not list(shards.glob(".*"))
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", full)
    with pytest.raises(Halted, match=r"memory://full/i: cannot be written: No space left on device"):
        before.save("memory://full/i")


def test_the_digest_is_a_hash_of_names_and_bytes(shards):
    index = build(find(shards, "train"))
    total = hashlib.sha256()
    for file in sorted(shards.glob("*.tar")):
        total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    assert index.digest == total.hexdigest()[:16] == build(find(shards, "train"), regions=False).digest
    before = opened(shards).digest  # computed from the files
    index.save(path_of(shards, "train"))
    assert opened(shards).digest == before == index.digest


def test_names_that_are_not_utf8_and_too_many_kinds_are_refused(tmp_path):
    file = write(tmp_path / "a-0.tar", [("caf\udce9.png", b"1")])
    with pytest.raises(InputError, match=r"a-0.tar"):
        build([file])
    one, two = (
        write(tmp_path / f"b-{n}.tar", [(f"{n}.{n}x{i}", b"1") for i in range(200)], tarfile.USTAR_FORMAT)
        for n in (0, 1)
    )
    with pytest.raises(InputError, match=r"400 kinds"):
        build([one, two])
    many = write(tmp_path / "c-0.tar", [(f"k.x{i}", b"1") for i in range(300)], tarfile.USTAR_FORMAT)
    with pytest.raises(InputError, match=r"300 kinds of members"):
        build([many])


# Damaged and mismatched indices


def test_any_flipped_bit_of_an_index_is_found(shards):
    rng = np.random.default_rng(0)
    found = 0
    for regions in (True, False):
        file = shards / "train.index.safetensors"
        save_index(shards, regions=regions)
        content = file.read_bytes()
        for _ in range(100):
            at = int(rng.integers(len(content)))
            changed = bytearray(content)
            changed[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            with pytest.raises(InputError, match=r"train.index.safetensors"):
                opened(shards)
            found += 1
    assert found == 200


def test_the_ends_of_the_header_of_an_index_bit_by_bit(shards):
    """A flipped bit in lengths, names, types or offsets might leave a readable file."""
    save_index(shards)
    file = shards / "train.index.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for at in (*range(min(200, end)), *range(end - 16, end + 16)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(InputError):
                Index.load(file)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_cut_off_index_is_refused(keep, shards):
    save_index(shards)
    file = shards / "train.index.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"train.index.safetensors is damaged .* data index"):
        opened(shards)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("begin", lambda a: a.astype(np.int32), "wrong type of begin"),
        ("crc", lambda a: a.astype(np.int64), "wrong type of crc"),
        ("keys", lambda a: a[None], "wrong type of keys"),
        ("size", lambda a: a[1:], "wrong length of size"),
        ("first", lambda a: a[1:], "wrong length of first"),
        ("crc", lambda a: a[1:], "wrong length of crc"),
        ("crc", lambda a: a[:0], "wrong length of crc"),
        *(
            (name, change, "its numbers are inconsistent")
            for name, change in (
                ("first", lambda a: a[::-1].copy()),
                ("first", lambda a: a + 1),
                ("begin", lambda a: a - 1),
                ("size", lambda a: -a),
                ("size", lambda a: a + 2**40),
                ("member_begin", lambda a: a - 2**20),
                ("member_begin", lambda a: a + 2**20),
                ("member_size", lambda a: -a),
                ("member_size", lambda a: a + 2**20),
                ("member_kind", lambda a: a + np.uint8(9)),
                ("key_end", lambda a: a[::-1].copy()),
                ("key_end", lambda a: a + 1),
                ("keys", lambda a: a | np.uint8(128)),
            )
        ),
    ],
)
def test_an_index_with_impossible_numbers_is_refused_whatever_its_hash(name, change, said, shards):
    index = build(find(shards, "train"))
    changed = replace(index, regions=replace(index.regions, **{name: change(getattr(index.regions, name))}))
    changed.save(path_of(shards, "train"))
    with pytest.raises(InputError, match=rf"train.index.safetensors is damaged \({said}\)"):
        opened(shards)


@pytest.mark.parametrize(
    "row", [{"bytes": -1}, {"samples": 1.5}, {"name": 7}, {"sha256": "0" * 63}, {"sha256": "x" * 64}]
)
def test_an_index_with_impossible_shards_is_refused_whatever_its_hash(row, shards):
    index = build(find(shards, "train"), regions=False)
    replace(index, shards=(*index.shards[:2], replace(index.shards[2], **row))).save(path_of(shards, "train"))
    with pytest.raises(InputError, match=r"train.index.safetensors is damaged \(invalid row of the shard "):
        opened(shards)


def test_a_sample_with_too_many_bytes_is_refused(tmp_path, monkeypatch):
    file = write(
        tmp_path / "a-0.tar", [("a.png", b"1"), ("b.png", b"1" * 4000), ("b.txt", b"2" * 4000), ("c.png", b"")]
    )
    assert scan(str(file)).regions.size.tolist()[1] == 2 * (512 + 4096)
    monkeypatch.setattr(tars, "MAX_REGION", 9215)
    with pytest.raises(InputError, match=r"a-0.tar: sample b \(byte 1024\) has 9,216 bytes, more than 9,215"):
        scan(str(file))


def test_an_index_of_another_format_or_that_is_not_a_file_is_refused(shards):
    index = save_index(shards)
    file = shards / "train.index.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"lightning_tdisent.index/2", b"lightning_tdisent.index/9"))
    with pytest.raises(InputError, match=r"schema 9, made by a newer version; this one .* reads 2"):
        opened(shards)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=r"train.index.safetensors"):
        opened(shards)
    with pytest.raises(FileNotFoundError):
        Index.load(shards / "none")
    assert len(index) == 30


@pytest.mark.parametrize("indexed", [True, False])
def test_spread_samples_are_evenly_spaced_and_keep_their_numbers(digits, tmp_path, indexed):
    shutil.copyfile(digits / "train-0000.tar", tmp_path / "train-0000.tar")
    if indexed:
        build([str(tmp_path / "train-0000.tar")], 1).save(path_of(tmp_path, "train"))
    there = Shards.open(tmp_path, "train", Decoder(1))
    some, whole = there.decoded(4, spread=True), there.decoded()
    assert some.batch(torch.arange(4))["id"].tolist() == [0, 375, 750, 1125]
    assert torch.equal(some.images, whole.images[[0, 375, 750, 1125]])
    assert torch.equal(some.labels, whole.labels[[0, 375, 750, 1125]])
    assert torch.equal(there.decoded(2000, spread=True).images, whole.images)


def test_the_message_names_a_remote_folder_as_it_was_given(shards):
    fsspec.filesystem("memory").pipe_file("/bad-index/train.index.safetensors", b"")
    fsspec.filesystem("memory").pipe_file("/bad-index/train-0.tar", b"")
    with pytest.raises(InputError, match=r"data index memory://bad-index --split train$"):
        Shards.open("memory://bad-index", "train", Decoder(1))


def test_an_index_that_does_not_match_is_refused_with_the_shard(shards):
    save_index(shards)
    content = (shards / "train-0001.tar").read_bytes()
    (shards / "train-0003.tar").write_bytes(content)
    with pytest.raises(
        InputError, match=r"lists 3 shards, but the folder holds 4: train-0003.tar is only in the folder"
    ):
        opened(shards)
    (shards / "train-0003.tar").unlink()
    (shards / "train-0001.tar").unlink()
    with pytest.raises(
        InputError, match=r"lists 3 shards, but the folder holds 2: train-0001.tar is only in the index"
    ):
        opened(shards)
    (shards / "train-0001.tar").write_bytes(content + bytes(512))
    size = len(content)
    with pytest.raises(
        InputError, match=rf"train-0001.tar has {size + 512:,} bytes, but its index says {size:,}.*data"
    ):
        opened(shards)
    assert len(opened(shards, Policy("skip"))) == 30  # every sample of the index is there
    (shards / "train-0001.tar").write_bytes(content)
    assert len(opened(shards)) == 30


def test_shards_are_read_in_the_order_of_their_index(shards):
    urls = find(shards, "train")
    build([urls[2], urls[0], urls[1]]).save(path_of(shards, "train"))
    assert opened(shards).decoded().labels.tolist() == [*range(17, 30), *range(10), *range(10, 17)]


def test_empty_shards_are_read_like_others(shards):
    for number in (3, 4):
        write(shards / f"train-000{number}.tar", [])
    index = save_index(shards)
    assert index.starts.tolist() == [0, 10, 17, 30, 30, 30]
    data = opened(shards)
    assert data.decoded().labels.tolist() == list(range(30))
    assert sum(len(batch["id"]) for batch in itertools.islice(Streamed(data, 4, 0), 7)) == 28


def test_an_empty_split_is_refused(tmp_path):
    write(tmp_path / "train-0.tar", [])
    with pytest.raises(InputError, match=r"the shards train-\* of .* are empty"):
        opened(tmp_path)
    save_index(tmp_path)
    with pytest.raises(InputError, match=r"the shards train-\* of .* are empty"):
        opened(tmp_path)


# Repeated keys and shards, missing classes


def test_a_shard_and_its_gzipped_copy_are_refused(shards):
    (shards / "train-0001.tar.gz").write_bytes(gzip.compress((shards / "train-0001.tar").read_bytes()))
    with pytest.raises(InputError, match=r"holds train-0001.tar and train-0001.tar.gz: remove one of them"):
        find(shards, "train")


def test_a_copy_of_a_shard_is_refused(shards):
    (shards / "train-0003.tar").write_bytes((shards / "train-0001.tar").read_bytes())
    for regions in (True, False):
        with pytest.raises(InputError, match=r"train-0001.tar and train-0003.tar are the same, byte for byte"):
            build(find(shards, "train"), regions=regions)


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("where", ["one shard", "two shards"])
def test_a_sample_without_its_label_is_refused(where, regions, shards):
    files = find(shards, "train")
    if where == "one shard":
        files = [str(write(shards / "x-0.tar", [("a.png", b"1"), ("a.cls", b"1"), ("b.png", b"2")]))]
    else:
        files.append(str(write(shards / "x-0.tar", [("b.png", b"2"), ("c.png", b"2")])))
    with pytest.raises(InputError, match=r"have no class"):
        build(files, regions=regions)


def test_the_sample_without_a_label_is_named_and_no_labels_at_all_are_fine(shards):
    file = write(shards / "x-0.tar", [("a.png", b"1"), ("a.cls", b"1"), ("b.png", b"2"), ("c.png", b"3")])
    with pytest.raises(InputError, match=r"2 of 3 samples have no class \(KEY.cls\), first x-0.tar: sample b \("):
        build([file])
    assert len(build([write(shards / "y-0.tar", [("a.png", b"1"), ("b.png", b"2")])])) == 2


# Names of shards


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("pipe:cat x", "train"),
        ("pipe:touch ran #", "train"),
        (".", "pipe:cat x-0.tar"),
        ("simplecache::pipe:cat x", "train"),
        ("-", "train"),
    ],
)
def test_commands_are_refused(path, split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"pipe: runs a command|no folder|is not a folder"):
        find(path, split)
    with pytest.raises(InputError):
        load(path, split, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train-{0000..0001}{.tar", "train-{0000..0001}.tar}", "[", "{a..b", "train-{}.tar"])
def test_unusual_patterns_find_shards_or_are_refused(split, shards):
    try:
        urls = find(shards, split)
    except InputError as error:
        said = str(error)
    else:
        said = urls[0]
    assert said.removeprefix("data.path: ").startswith(str(shards))


def test_the_index_of_a_pattern_has_its_own_name(shards):
    file = path_of(f"{shards}/", "train-{0001..0002}.tar")
    assert file == f"{shards}/train-_0001..0002_.tar.index.safetensors"
    build(find(shards, "train-{0001..0002}.tar")).save(file)
    some = Shards.open(shards, "train-{0001..0002}.tar", Decoder(1))
    assert some.index.hashed
    assert some.decoded().labels.tolist() == list(range(10, 30))


def test_an_index_without_samples_names_samples_by_number():
    index = Index((Shard("a.tar", 1, "", 3, ""), Shard("b.tar", 1, "", 2, "")), (), None)
    assert [index.name(n) for n in (0, 2, 3)] == ["a.tar: sample 0", "a.tar: sample 2", "b.tar: sample 0"]


@pytest.mark.parametrize(
    ("one", "two", "shared"),
    [("ab--", "bc-", 1), ("--", "--", 0), ("a-", "--", 0), ("--", "a", 0), ("aab", "ac", 2)],
)
def test_samples_without_an_image_are_not_shared(one, two, shared, tmp_path):
    for name, images in (("one", one), ("two", two)):
        with wds.TarWriter(str(tmp_path / f"{name}.tar"), encoder=False) as tar:
            for k, content in enumerate(images):
                tar.write({"__key__": f"{k}", ("txt" if content == "-" else "png"): content.encode()})
    assert scan(str(tmp_path / "one.tar")).shared(scan(str(tmp_path / "two.tar"))) == shared


def test_images_of_one_size_have_different_keys(tmp_path):
    """The chunks of a PNG end with their own CRC-32, so the CRC-32 of a PNG says little more than its length."""
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 8, 8), dtype=np.uint8)
    for name, part in (("one", pixels[:1000]), ("two", pixels[999:])):
        with wds.TarWriter(str(tmp_path / f"{name}.tar"), encoder=False) as tar:
            for k, image in enumerate(part):
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, "png", compress_level=0)
                tar.write({"__key__": f"{k:04d}", "png": stream.getvalue()})
    one, two = (scan(str(tmp_path / f"{name}.tar")) for name in ("one", "two"))
    assert len(np.unique(np.concatenate([one.regions.images, two.regions.images]))) == 2000
    assert one.shared(two) == two.shared(one) == 1
