"""Damage is found and named; forbidden content is refused; unusable samples are skipped and counted.

The file is long because there are many kinds of damage, and because all trials of one bit share one corpus.
"""

import gzip
import io
import itertools
import mmap
import re
import signal
import tarfile
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from making import STOP, opened, save_index, write
from PIL import Image

from lightning_tdisent.data.decode import BadSample, Decoder, decode_image
from lightning_tdisent.data.index import Index, path_of
from lightning_tdisent.data.orders import Shuffled, Streamed
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.shards import Policy, Shards, load
from lightning_tdisent.data.tars import MAX_MEMBER, find, hash_file
from lightning_tdisent.data.verify import verify
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.datamodule import ImageShards, ResumableLoader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # 2 cores are enough


def png(seed, size=6):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)).save(out, "png")
    return out.getvalue()


# One flipped bit


FORMS = (9, tarfile.PAX_FORMAT), (1, tarfile.USTAR_FORMAT), (14, tarfile.GNU_FORMAT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return {packed: (shards, indices with and without samples, {shard: [(first byte of a sample, key)]})}."""
    out = {}
    for packed in (False, True):
        folder, begins, first = tmp_path_factory.mktemp("packed" if packed else "plain"), {}, 0
        for shard, (count, form) in enumerate(FORMS):
            members = [("folder", None)]
            for number in range(first, first + count):
                key = f"{number:04d}" if number % 5 else f"{number:04d}" + "long" * 40
                members += [(f"{key}.png", png(number)), (f"{key}.cls", b"%d" % number), (f"{key}.txt", b"caption")]
            file = write(folder / f"train-{shard}.tar", members, form)
            with tarfile.open(file) as tar:  # keys and offsets by Python's tarfile
                places = [(m.offset, m.name.partition(".")[0]) for m in tar if m.isfile()]
            begins[file.name] = [min(p for p in places if p[1] == key) for key in dict.fromkeys(k for _, k in places)]
            first += count
            if packed:
                (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
                file.unlink()
        urls = find(folder, "train")
        out[packed] = urls, build(urls), build(urls, regions=False), begins
    return out


@contextmanager
def flipped(url, at, bit):
    with open(url, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as content:
        content[at] ^= 1 << bit
        try:
            yield
        finally:
            content[at] ^= 1 << bit


def single(shards):
    """Read all samples in a shuffled order, eight at a time."""
    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(1)).tolist()
    for begin in range(0, len(order), 8):
        shards.batch(order[begin : begin + 8])


def one_after_the_other(shards):
    for number, members in shards:
        shards.use(number, members)


def in_memory(shards):
    shards.decoded()


def an_epoch(shards):
    """Read an epoch: 12 batches, all 24 samples."""
    batches = Streamed(shards, 2, 0, buffer=4)
    for _ in itertools.islice(batches, len(batches)):
        pass


@pytest.mark.parametrize(
    ("read", "packed", "listed", "trials"),
    [
        (single, False, True, 300),
        (one_after_the_other, False, True, 150),
        (in_memory, False, True, 150),
        (one_after_the_other, True, True, 100),
        (in_memory, True, True, 100),
        (in_memory, False, False, 100),
        (in_memory, True, False, 100),
        # beyond the 1000
        (an_epoch, False, True, 50),
        (an_epoch, True, True, 50),
        (an_epoch, False, False, 50),
        (an_epoch, True, False, 50),
    ],
)
def test_one_flipped_bit_anywhere_is_found_and_named(read, packed, listed, trials, corpus):
    urls, with_samples, without, begins = corpus[packed]
    index = with_samples if listed else without
    rng = np.random.default_rng([*read.__name__.encode(), packed, listed])
    read(Shards(urls, index, Decoder(1)))  # without errors: the shards are not damaged
    sizes = [row.bytes for row in index.shards]
    messages, places = [], []
    for _ in range(trials):
        at, shard = int(rng.integers(sum(sizes))), 0
        while at >= sizes[shard]:
            at, shard = at - sizes[shard], shard + 1
        with flipped(urls[shard], at, int(rng.integers(8))):
            try:
                read(Shards(urls, index, Decoder(1)))
            except InputError as error:
                messages.append(str(error))
                places.append((index.shards[shard].name, at))
    assert len(messages) == trials
    for message, (name, at) in zip(messages, places, strict=True):
        if listed and not packed:
            keys = [key for begin, key in begins[name] if begin <= at] or [begins[name][0][1]]
            assert f"/{name}: sample {keys[-1]} (bytes" in message
        assert name in message


@pytest.mark.parametrize("packed", [False, True])
def test_skipping_a_flipped_bit_loses_its_sample_and_lets_no_wrong_image_through(packed, corpus):
    urls, index, _, begins = corpus[packed]
    images = Shards(urls, index, Decoder(1)).decoded().images
    rng, counted = np.random.default_rng(7), 0
    for _ in range(100):
        at = int(rng.integers(index.shards[2].bytes))
        with flipped(urls[2], at, int(rng.integers(8))):
            shards = Shards(urls, index, Decoder(1), Policy("skip", 1.0))
            kept = [shards.use(*place) for place in shards.stream(2)]
            counted += shards.lost
            assert shards.lost == kept.count(None)
            assert all(torch.equal(sample["image"], images[sample["id"]]) for sample in kept if sample)
            if not packed:
                inside = [n for n, (begin, _) in enumerate(begins["train-2.tar"]) if begin <= at]
                assert [n for n, sample in enumerate(kept) if sample is None] == [inside[-1] if inside else 0]
    assert counted == 100 or packed


@pytest.mark.parametrize("packed", [False, True])
def test_skipping_still_verifies_a_shard_without_listed_samples(packed, corpus, capsys):
    """The single hash of the shard shows that it has changed, but not where."""
    urls, _, index, _ = corpus[packed]
    with flipped(urls[0], 4 if packed else -1, 0):  # gzip time stamp, end of padding: all still decodes
        shards = Shards(urls, index, Decoder(1), Policy("skip", 0.5))
        data = shards.decoded()
    assert "train-0.tar" in capsys.readouterr().err
    assert 1 <= shards.lost <= 9
    assert data.labels.tolist()[-15:] == list(range(9, 24))


@pytest.mark.parametrize("policy", [STOP, Policy("skip", 0.5)])
def test_a_shard_of_which_the_last_samples_are_left_out_is_verified_too(policy, shards, capsys):
    """10 samples in batches of 4: the last two are never used. A label is changed, so that all samples still decode."""
    for file in sorted(shards.glob("*.tar"))[1:]:
        file.unlink()
    save_index(shards, regions=False)
    (file,) = shards.glob("*.tar")
    with tarfile.open(file) as tar:
        at = tar.getmember("0000.cls").offset_data
    batches, said = Streamed(opened(shards, policy), 4, 0, buffer=4), ""
    with flipped(file, at, 0):
        try:
            for _ in itertools.islice(batches, 3 * len(batches)):
                pass
        except InputError as error:
            said = str(error)
    assert "train-0000.tar" in said + capsys.readouterr().err


def test_samples_are_verified_once_and_not_at_all_if_not_requested(corpus):
    urls, index, _, begins = corpus[False]
    place = (urls[0], begins["train-0.tar"][3][0] + 329, 0)  # device number in the header of sample 3: harmless
    verified, trusting = (Shards(urls, index, Decoder(1), Policy(verify=verify)) for verify in (True, False))
    before = verified.batch([3])
    with flipped(*place):
        assert torch.equal(verified.batch([3])["image"], before["image"])
        assert torch.equal(trusting.batch([3])["image"], before["image"])
        with pytest.raises(BadSample, match=r"sample 0003"):
            Shards(urls, index, Decoder(1)).batch([3])
    verified.batch(range(24))
    assert (verified.known == 1).all()
    assert (trusting.known == 0).all()


# Cut off


@pytest.mark.parametrize("packed", [False, True])
def test_a_shard_cut_off_anywhere_is_found(packed, corpus, tmp_path):
    urls, index, rows, _ = corpus[packed]
    images = Shards(urls, index, Decoder(1)).decoded().images
    folder = tmp_path / "cut"
    folder.mkdir()
    names = [url.rpartition("/")[2] for url in urls]
    contents = [open_bytes(url) for url in urls]
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
    file = folder / names[2]
    rng, found = np.random.default_rng(3), 0
    for _ in range(50):
        length = int(rng.integers(len(contents[2])))
        file.write_bytes(contents[2][:length])
        for listed in (index, rows):
            listed.save(path_of(folder, "train"))
            with pytest.raises(InputError, match=f"{names[2]} has {length:,} bytes, but its index says"):
                opened(folder)
            with pytest.raises(InputError, match=names[2]):  # also if sizes are not compared
                Shards([str(folder / name) for name in names], listed, Decoder(1)).decoded()
            shards = opened(folder, Policy("skip", 1.0))
            kept = [sample for place in shards if (sample := shards.use(*place))]
            assert len(kept) + shards.lost == 24
            assert all(torch.equal(sample["image"], images[sample["id"]]) for sample in kept)
            if listed is index and not packed:
                r = index.regions
                lost = [n for n in range(10, 24) if int(r.begin[n] + r.size[n]) > length]
                assert (shards.known == 2).nonzero().flatten().tolist() == lost != []
        found += 1
    assert found == 50


@pytest.mark.parametrize("packed", [False, True])
def test_without_an_index_a_shard_cut_off_before_its_end_mark_is_found(packed, corpus):
    urls, *_ = corpus[packed]
    content = open_bytes(urls[2])
    tar = gzip.decompress(content) if packed else content
    end = len(content) if packed else len(tar.rstrip(b"\0")) // 512 * 512 + 512 + 511  # the end mark has 512 zeros
    rng, cut = np.random.default_rng(4), f"{urls[2]}.cut.tar{'.gz' if packed else ''}"
    for length in [0, 1, 511, 512, 513, end, *(int(rng.integers(end)) for _ in range(44))]:
        with open(cut, "wb") as stream:
            stream.write(content[: length - (length == len(content))])
        with pytest.raises(InputError, match=r"train-2.tar.*(damaged|cut off)"):
            build([cut], hashed=False)


def open_bytes(url):
    with open(url, "rb") as stream:
        return stream.read()


# Content that no shard should have

TWICE = [("a.png", b"1"), ("a.cls", b"1"), ("b.png", b"2"), ("b.cls", b"2")]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("/a.png", b"1")], r"member /a.png \(byte 0\) has an absolute name"),
        ([("/etc/README", b"1")], "absolute name"),
        *(
            ([(name, b"1")], "has an absolute name, or one with '..'")
            for name in ("../a.png", "x/../../a.png", "x/..", "..", "./../a.cls")
        ),
        *(
            ([("a.png", b"1"), ("b.png", ord(kind))], r"member b.png \(byte 1024\) is a link, a device or the like")
            for kind in "123467S"
        ),
        ([("a.png", b"1"), ("LICENSE", ord("2"))], r"member LICENSE \(byte 1024\) is a link"),
        ([*TWICE, ("b.cls", b"3")], "b.cls is there twice, at bytes 3584 and 4608"),
        ([*TWICE, ("b.CLS", b"3")], "b.CLS is there twice"),
        ([*TWICE, ("a.txt", b"3")], "a is there twice, at bytes 0 and 4096; its members must follow .*--sort=name"),
        ([*TWICE, ("a.png", b"1")], "the sample a is there twice"),
    ],
)
def test_members_that_no_shard_should_contain_are_refused(members, message, packed, tmp_path):
    file = write(tmp_path / "train-0.tar", members)
    if packed:
        (tmp_path / "train-0.tar.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    for options in ({}, {"hashed": False}, {"regions": False}):
        with pytest.raises(InputError, match=f"train-0.tar.*{message}"):
            build(find(tmp_path, "train"), **options)
    with pytest.raises(InputError, match=message):
        load(tmp_path, "train", 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_files_that_are_not_read_are_counted_and_named(packed, regions, tmp_path):
    """Pickles, hidden files below folders, files that belong to no sample, and members with other extensions."""
    members = [
        ("._set", b"x"), ("set/.DS_Store", b"x"), ("README.md", b"x"), ("LICENSE", b"x"),
        ("set/._0.png", b"x"), ("set/0.png", png(0)), ("set/0.cls", b"3"), ("set/0.PYD", b"x"), ("set/0.json", b"{}"),
        ("__MACOSX/set/._0.png", b"x"), ("volume", ord("V")),
        ("set/1.png", png(1)), ("set/1.cls", b"4"), ("set/1.x.pickle", b"x"), ("set/1.256.png", b"x"),
        ("set/1.json", b"{}"),
        (".cache/2.png", b"x"), ("Thumbs.db", b"x"), ("classes.txt", b"ant\nbee\n"),
    ]  # fmt: skip
    file = write(tmp_path / "train-0.tar", members)
    if packed:
        (tmp_path / "train-0.tar.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    name = find(tmp_path, "train")[0].rpartition("/")[2]
    expected = {
        "hidden files": (5, f"{name}/._set"),
        "files without an extension": (1, f"{name}/LICENSE"),
        "files of no sample": (3, f"{name}/README.md"),
        "pickles KEY.pyd": (1, f"{name}/set/0.PYD"),
        "pickles KEY.x.pickle": (1, f"{name}/set/1.x.pickle"),
        "members KEY.json": (2, f"{name}/set/0.json"),
        "members KEY.256.png": (1, f"{name}/set/1.256.png"),
    }
    index = save_index(tmp_path, regions=regions)
    assert index.unread == Index.load(path_of(tmp_path, "train")).unread == expected
    assert build(find(tmp_path, "train"), hashed=False).unread == expected
    assert index.notes[1] == f"not read: files without an extension (1, first {name}/LICENSE)"
    assert (len(index), index.unusable) == (2, (0, ""))
    data = opened(tmp_path).decoded()
    assert data.labels.tolist() == [3, 4]
    assert torch.equal(data.images[1], decode_image(png(1), 1, None, "a"))


@pytest.mark.parametrize("packed", [False, True])
def test_joined_tars_are_refused_wherever_they_are_read(packed, tmp_path):
    """Tar readers stop at the first end mark, so the second half would be lost silently."""
    parts = []
    for number in range(2):
        file = write(tmp_path / "part", [(f"{number}{k}.png", png(k)) for k in range(4)])
        content = file.read_bytes()
        parts.append(gzip.compress(content) if packed else content)
    file.unlink()
    shard = tmp_path / f"train-0.tar{'.gz' if packed else ''}"
    shard.write_bytes(b"".join(parts))
    message = rf"{shard.name} continues after its end mark \(byte 4608\) with another tar.*`tar --concatenate`"
    for options in ({}, {"hashed": False}, {"regions": False}):
        with pytest.raises(InputError, match=message):
            build(find(tmp_path, "train"), **options)
    with pytest.raises(InputError, match=message):
        opened(tmp_path)
    # an index of an earlier version, in which data after the end mark belonged to the last sample
    shard.write_bytes(parts[0])
    index = build(find(tmp_path, "train"))
    shard.write_bytes(b"".join(parts))
    row = replace(index.shards[0], bytes=shard.stat().st_size, sha256=hash_file(str(shard))[1])
    replace(index, shards=(row,)).save(path_of(tmp_path, "train"))
    (line,) = verify(tmp_path, "train")[1]
    assert "continues after its end mark" in line


@pytest.mark.parametrize(
    ("content", "good"),
    [(b"0", True), (b" 7\n", True), (b"-1", True), (b"2147483647", True), (b"-2", False), (b"cat", False), (b"", False),
     (b"2147483648", False), (b"1.0", False)],
)  # fmt: skip
def test_an_unusable_class_is_reported_by_index_and_verify(content, good, tmp_path):
    write(tmp_path / "train-0.tar", [("a.png", png(0)), ("a.cls", b"1"), ("b.png", png(1)), ("b.cls", content)])
    for regions in (True, False):
        index = save_index(tmp_path, regions=regions)
        lines = verify(tmp_path, "train")[1]
        if good:
            assert (index.unusable, index.notes, lines) == ((0, ""), [], [])
        else:
            said = f"train-0.tar: sample b (byte 2048): the class {content!r} is not a number from 0 to 2,147,483,647"
            assert index.unusable == (1, said)
            assert lines == [f"{tmp_path}/{said}"]
        if good:
            opened(tmp_path).decoded()
        else:
            with pytest.raises(BadSample, match="is not a number from 0 to"):
                opened(tmp_path).decoded()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["input.jpg", "outputs.txt"], "has 0 images (png/.*), expected one; it has input.jpg, outputs.txt (the ext"),
        (["v2.png", "v2.cls"], "it has v2.cls, v2.png (the extension begins at the first dot, so KEY"),
        (["png", "jpg", "cls"], "has 2 images (png, jpg), expected one: remove the others"),
    ],
)
def test_a_sample_without_exactly_one_image_is_reported_with_its_members(members, message, tmp_path):
    write(tmp_path / "train-0.tar", [(f"a.{kind}", png(0) if "g" in kind else b"1") for kind in members])
    message = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(message, save_index(tmp_path).unusable[1])
    with pytest.raises(BadSample, match=message):
        opened(tmp_path).decoded()


@pytest.mark.parametrize("kind", [b"1", b"2"])
def test_a_link_that_replaces_a_file_is_refused_while_streaming(kind, tmp_path):
    """The headers are checked again if the samples are not listed."""
    file = write(tmp_path / "train-0.tar", [("a.png", png(0)), ("a.cls", b"1")])
    save_index(tmp_path, regions=False)
    content = bytearray(file.read_bytes())
    content[156:157] = kind
    header = tarfile.TarInfo.frombuf(sum_again(content[:512]), "utf-8", "strict")
    assert header.type == kind
    file.write_bytes(sum_again(content[:512]) + content[512:])
    for policy in (Policy(verify=False), Policy()):
        with pytest.raises(InputError, match=r"train-0.tar"):
            opened(tmp_path, policy).decoded()


def sum_again(header):
    """Return a tar header with a corrected checksum."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def header(name, size, kind=b"0"):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [MAX_MEMBER + 1, 2**33, 2**60, 2**70])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K"])
def test_a_member_over_the_limit_is_refused_before_it_is_read(size, kind, tmp_path):
    """This includes headers for long names: reading a name of 8 GB would need as much memory."""
    file = tmp_path / "train-0.tar"
    file.write_bytes(header("a.png", 4) + b"abcd".ljust(512, b"\0") + header("a.cls", size, kind) + bytes(2048))
    with pytest.raises(InputError, match=r"train-0.tar"):
        build([file], hashed=False)


@pytest.mark.parametrize("name", ["README", "a.png"])
@pytest.mark.parametrize("size", [-512, -1024, -1])
def test_a_negative_size_is_refused(name, size, tmp_path):
    """It would send the reader back, in an endless loop."""
    file = tmp_path / "train-0.tar"
    file.write_bytes(header("b.txt", 4) + b"abcd".ljust(512, b"\0") + header(name, size) + bytes(2048))

    class Late(BaseException):
        pass

    def late(*_):
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(InputError, match=r"train-0.tar"):
            build([file], hashed=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_sparse_member_is_refused(tmp_path):
    """Its size differs from that of its stored bytes, so its content cannot be cut from the region of its sample."""
    member = tarfile.TarInfo("a.txt")
    member.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.txt", "GNU.sparse.realsize": "3000",
    }  # fmt: skip
    body = b"1\n2990\n10\n".ljust(512, b"\0") + b"0123456789"
    member.size = len(body)
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        tar.addfile(member, io.BytesIO(body))
    with pytest.raises(InputError, match=r"train-0.tar"):
        build(find(tmp_path, "train"), hashed=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "content",
    [b"", b"no tar at all", b"\0" * 100, b"x" * 2048, gzip.compress(b"x" * 5000)],
    ids=["empty", "text", "zeros", "letters", "gzip"],
)
def test_a_file_that_is_not_a_tar_is_refused(content, packed, tmp_path):
    file = tmp_path / f"train-0.tar{'.gz' if packed else ''}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"train-0.tar.* is damaged"):
        build([file])


FIELDS = (0, 20), (124, 12), (124, 4), (156, 1), (345, 20), (512, 30)  # names, size, type, content


def test_random_bytes_do_not_crash(corpus, tmp_path):
    """Overwrite spans of a good shard, and correct the checksums of its headers, so that the reader continues."""
    urls, *_ = corpus[False]
    rng, sound = np.random.default_rng(5), open_bytes(urls[0])
    headers = [at for at in range(0, len(sound), 512) if sound[at + 257 : at + 262] == b"ustar"]
    file, refused = tmp_path / "train-0.tar", 0
    for _ in range(300):
        content, at = bytearray(sound), int(rng.choice(headers))
        begin, size = FIELDS[int(rng.integers(len(FIELDS)))]
        content[at + begin : at + begin + size] = rng.bytes(size)
        content[at : at + 512] = sum_again(content[at : at + 512])
        file.write_bytes(content)
        try:
            Shards([str(file)], build([file], hashed=False), Decoder(1), Policy("skip", 1.0)).decoded()
        except InputError:
            refused += 1
    assert refused > 100


# Policy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_bad": "ignore"}, "data.on_bad_shard: stop or skip, got ignore"),
        ({"on_bad": "Skip"}, "data.on_bad_shard"),
        ({"ceiling": -0.1}, "data.bad_ceiling: a share of the samples, 0 to 1, got -0.1"),
        ({"ceiling": 1.5}, "data.bad_ceiling"),
        ({"ceiling": float("nan")}, "data.bad_ceiling"),
        ({"ceiling": float("inf")}, "data.bad_ceiling"),
    ],
)
def test_a_policy_of_other_values_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Policy(**values)
    names = {"on_bad": "on_bad_shard", "ceiling": "bad_ceiling"}
    with pytest.raises(InputError, match=message):
        ImageShards(".", **{names[name]: value for name, value in values.items()})


@pytest.fixture
def damaged(shards):
    """Index the 30 samples, then change a byte of samples 3, 11 and 12 that does not affect the image."""
    index = save_index(shards)
    for number in (3, 11, 12):
        place = index.place(number)[0]
        file = shards / index.shards[place].name
        content = bytearray(file.read_bytes())
        content[int(index.regions.begin[number]) + 329] ^= 1
        file.write_bytes(content)
    return shards


def test_stop_raises_at_the_first_bad_sample(damaged):
    shards = opened(damaged)
    assert shards.batch([0, 1, 2])["id"].tolist() == [0, 1, 2]
    for read in (lambda: shards.batch([2, 3, 4]), shards.decoded):
        with pytest.raises(BadSample, match=r"train-0000.tar: sample 0003 \(bytes 6144 to 8191\) has changed since"):
            read()


def test_a_skipped_sample_is_replaced_by_the_next_one_of_the_split(damaged, capsys):
    shards = opened(damaged, Policy("skip", 3 / 30))
    for numbers, expected in (
        ([2, 3, 4], [2, 4, 4]),
        ([3, 4], [4, 4]),
        ([3, 11, 7], [4, 13, 7]),
        ([10, 11, 12, 13], [10, 13, 13, 13]),
        ([9, 12], [9, 13]),
        ([3, 20, 12, 5, 11], [4, 20, 13, 5, 13]),
    ):
        batch = shards.batch(numbers)
        assert batch["id"].tolist() == batch["label"].tolist() == expected
        assert batch["image"][:, 0, 0, 0].tolist() == expected
    assert shards.lost == 3
    lines = capsys.readouterr().err.splitlines()
    names = ("0000.tar: sample 0003", "0001.tar: sample 0011", "0001.tar: sample 0012")
    assert [line.split(" (")[0] for line in lines] == [f"skipped: {damaged}/train-{name}" for name in names]
    data = shards.decoded()
    assert data.labels.tolist() == [n for n in range(30) if n not in (3, 11, 12)]
    assert capsys.readouterr().err == ""  # each bad sample is counted once
    assert shards.decoded(4).labels.tolist() == [0, 1, 2, 4]


def test_a_replacement_is_mirrored_like_the_sample_it_replaces(tilted_shards):
    index = save_index(tilted_shards)
    with flipped(tilted_shards / "train-0000.tar", int(index.regions.begin[3]) + 329, 0):
        shards = opened(tilted_shards, Policy("skip", 0.1))
        batch = shards.batch([2, 3, 4], torch.tensor([False, True, False]))
    assert batch["image"][:, 0, 0].tolist() == [[2, 3, 3, 3], [5, 5, 5, 4], [4, 5, 5, 5]]


def test_one_bad_sample_above_the_ceiling_stops(damaged):
    message = (
        r"3 of 30 samples cannot be used, more than data.bad_ceiling 0.07 allows; the last one: .*train-000[01].tar"
    )
    for read in (lambda s: s.batch(range(30)), lambda s: s.decoded(), lambda s: [*Streamed(s, 3, 0)]):
        shards = opened(damaged, Policy("skip", 0.07))
        with pytest.raises(InputError, match=message):
            read(shards)
        assert shards.lost == 3
    with pytest.raises(InputError, match=r"1 of 30 samples cannot be used, more than data.bad_ceiling 0 allows"):
        opened(damaged, Policy("skip", 0.0)).decoded()


@pytest.mark.parametrize("kind", [Shuffled, Streamed])
def test_workers_count_each_sample_once(kind, damaged, capfd):
    shards = opened(damaged, Policy("skip", 0.1))
    loader = ResumableLoader(kind(shards, 6, 0), 2)
    for _ in range(3):
        ids = [n for batch in loader for n in batch["id"].tolist()]
        assert len(ids) == 30
        assert not {3, 11, 12} & set(ids)
    loader.close()
    assert shards.lost == 3
    assert len([line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]) == 3
    assert int((shards.known == 1).sum()) == 27


@pytest.mark.parametrize("policy", [Policy(), Policy("skip", 0.07)])
def test_a_worker_that_stops_names_the_sample_in_one_line(policy, damaged):
    loader = ResumableLoader(Shuffled(opened(damaged, policy), 6, 0), 2)
    with pytest.raises(InputError, match=r"train-000[01].tar: sample 00(03|11|12) .* has changed since") as refusal:
        list(itertools.chain(loader, loader))
    loader.close()
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(str(damaged))


@pytest.mark.parametrize(("kind", "workers"), [(Shuffled, 0), (Streamed, 0), (Streamed, 2)])
def test_skipping_works_if_a_part_of_a_batch_is_one_sample(kind, workers, damaged):
    """There is no other sample in the batch, or in a worker's part of it."""
    size = max(workers, 1)
    loader = ResumableLoader(kind(opened(damaged, Policy("skip", 0.1)), size, 0), workers)
    ids = [n for batch in loader for n in batch["id"].tolist()]
    loader.close()
    assert len(ids) == 30
    assert not {3, 11, 12} & set(ids)


def test_the_module_skips_and_counts(damaged):
    data = ImageShards(str(damaged), 1, val="train", on_bad_shard="skip", bad_ceiling=0.1, seed=0, batch_size=4)
    assert data.lost == 0
    assert len(data.training) == 27
    assert data.lost == 3
    assert data.images("train", 5).labels.tolist() == [0, 1, 2, 4, 5]
    with pytest.raises(InputError, match=r"sample 0003"):  # held-out images are never skipped
        data.held_out  # noqa: B018
    unverified = ImageShards(str(damaged), 1, val="train", verify=False)
    assert len(unverified.training) == len(unverified.held_out) == 30


def test_samples_that_cannot_be_decoded_are_skipped(shards):
    for name, content in (("9997.png", b"no image"), ("9997.cls", b"1"), ("9998.png", png(0, 4)), ("9998.cls", b"x")):
        with tarfile.open(shards / "train-0002.tar", "a") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for known in (False, True):  # without and with an index
        data = opened(shards, Policy("skip", 2 / 32))
        assert data.decoded().labels.tolist() == list(range(30))
        assert (data.lost, len(data), data.index.hashed) == (2, 32, known)
        save_index(shards)


def test_a_missing_shard_is_skipped_or_stops(shards):
    save_index(shards)
    keep, stop = opened(shards, Policy("skip", 0.5)), opened(shards)
    (shards / "train-0001.tar").unlink()
    assert keep.decoded().labels.tolist() == [*range(10), *range(17, 30)]
    assert keep.lost == 7
    for read in (stop.decoded, lambda: stop.batch([12])):
        with pytest.raises(BadSample, match=r"train-0001.tar: sample 001[02] .* cannot be read: .*No such file"):
            read()


def test_images_of_two_sizes_in_a_batch_are_refused(shards):
    write(shards / "train-0003.tar", [("9999.png", png(0, 5)), ("9999.cls", b"1")])
    with pytest.raises(
        InputError,
        match=r"differ in size: .*sample 0000 .* has \[1, 4, 4\], .*sample 9999 .* has \[1, 5, 5\]; prepare all",
    ):
        opened(shards).batch([0, 30])
    assert Shards.open(shards, "train", Decoder(1, 4)).batch([0, 30])["image"].shape == (2, 1, 4, 4)


# Memory


@pytest.mark.parametrize("packed", [False, True])
def test_sequential_reading_keeps_one_sample_in_memory(packed, tmp_path):
    """Only a few of 12 MB, and none of 2,400 further headers, which tarfile would keep."""
    peaks = []
    for count, size in ((12, 2**20), (1200, 10), (3600, 10)):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        blob = np.random.default_rng(0).bytes(size)
        file = write(folder / "train-0.tar", [(f"{n}.bin", blob) for n in range(count)], tarfile.USTAR_FORMAT)
        if packed:
            (folder / "train-0.tar.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
            file.unlink()
        save_index(folder, regions=False)
        shards = opened(folder)
        tracemalloc.start()
        try:
            assert sum(len(members["bin"]) == size for _, members in shards.stream(0)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    large, few, many = peaks
    assert large < 6 * 2**20
    assert many < few + 1_200_000  # a header takes over 1 kB, a block that is read 1 MB
