"""An object store is read like a folder, and failures are handled like those of local files."""

import itertools

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from making import opened, same, save_index, zipped

from lightning_tdisent.data.decode import BadSample
from lightning_tdisent.data.index import Index, path_of
from lightning_tdisent.data.orders import Shuffled, Streamed
from lightning_tdisent.data.remote import is_remote
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.shards import Policy
from lightning_tdisent.data.tars import find
from lightning_tdisent.errors import Halted, InputError

REMOTE = ["memory://{name}", "simplecache::memory://{name}", "file://{folder}"]


@pytest.fixture
def remote(shards, request):
    """Return a function that copies the current shards to where fsspec finds them."""

    def put(form):
        name = request.node.name.replace("/", "-").replace(":", "-").replace("[", "-").replace("]", "")
        if "memory" in form:
            store = fsspec.filesystem("memory")
            if store.exists(f"/{name}"):
                store.rm(f"/{name}", recursive=True)
            for file in shards.iterdir():
                if file.is_file():
                    store.pipe_file(f"/{name}/{file.name}", file.read_bytes())
        return form.format(name=name, folder=shards)

    return put


def test_a_folder_whose_name_has_colons_is_a_folder(shards, tmp_path):
    (folder := tmp_path / "set::of: colons").mkdir()
    for file in shards.glob("*.tar"):
        file.rename(folder / file.name)
    save_index(folder)
    assert opened(folder).decoded().images.shape[0] == 30
    assert [is_remote(url) for url in ("s3://b/k", "zip::s3://b/k.zip", "memory://", str(folder), "./a::b")] == [
        True, True, True, False, False
    ]  # fmt: skip


@pytest.mark.parametrize("form", REMOTE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("regions", [True, False])
def test_an_object_store_reads_as_a_folder(form, packed, regions, shards, remote):
    if packed:
        zipped(shards)
    save_index(shards, regions=regions)
    url, here = remote(form), opened(shards)
    there = opened(url)
    assert len(find(url, "train")) == 3
    assert there.digest == here.digest
    assert there.random_access == here.random_access == (regions and not packed)
    whole, expected = there.decoded(), here.decoded()
    assert torch.equal(whole.images, expected.images)
    assert whole.labels.tolist() == list(range(30))
    assert [n for n, members in there.stream(1, 3)] == [13, 14, 15, 16]
    batch = 1 if form.startswith("memory") else 4  # a file in fsspec's memory has one shared position
    orders = [Streamed(source, batch, 1, buffer=8) for source in (here, there)]
    if regions and not packed:
        orders += [Shuffled(source, 4, 1) for source in (here, there)]
        assert there.batch([29, 0, 12])["label"].tolist() == [29, 0, 12]
    for one, other in zip(orders[::2], orders[1::2], strict=True):
        for a, b in itertools.islice(zip(one, other, strict=True), 9):
            assert a["id"].tolist() == b["id"].tolist()
            assert torch.equal(a["image"], b["image"])


def test_a_batch_is_one_request_for_ranges(shards, remote, monkeypatch):
    save_index(shards)
    there = opened(remote("memory://{name}"))
    asked, read = [], MemoryFileSystem.cat_ranges

    def cat_ranges(self, paths, starts, ends, **options):
        asked.append((len(paths), sum(e - s for s, e in zip(starts, ends, strict=True))))
        return read(self, paths, starts, ends, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", cat_ranges)
    assert there.batch([3, 20, 11])["label"].tolist() == [3, 20, 11]
    assert asked == [(3, int(there.index.regions.size[[3, 20, 11]].sum()))]


class ClientError(Exception):
    """An exception of an object store's client that is not an OSError."""


@pytest.mark.parametrize("times", [1, 1000])
def test_a_failed_request_is_retried_and_then_names_its_samples(times, shards, remote, monkeypatch):
    save_index(shards)
    monkeypatch.setattr("lightning_tdisent.data.remote.PAUSES", (0.0, 0.01))
    url = remote("memory://{name}")
    read, calls = MemoryFileSystem.cat_ranges, itertools.count()

    def cat_ranges(*args, **options):
        if next(calls) < times:
            raise ClientError("SlowDown:\nreduce your rate")
        return read(*args, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", cat_ranges)
    for policy in (Policy(), Policy("skip", 0.1)):
        calls = itertools.count()
        there = opened(url, policy)
        if times == 1:
            assert there.batch([3, 20, 11])["id"].tolist() == [3, 20, 11]
        else:  # a network failure does not make samples bad: none is skipped
            wanted = BadSample if policy.on_bad == "stop" else Halted
            with pytest.raises(wanted, match=r"sample 0003 .* cannot be read.*SlowDown:\s+reduce your rate$"):
                there.batch([3, 20, 11])
            assert next(calls) == 3
        assert there.lost == 0


@pytest.mark.parametrize("form", [form for form in REMOTE if not form.startswith("file:")])  # which is a folder
def test_an_object_store_without_an_index_is_refused_in_one_line(form, remote):
    with pytest.raises(InputError, match=r"train.index.safetensors does not exist, .*data index") as refusal:
        opened(remote(form))
    assert "\n" not in str(refusal.value)


def test_damage_and_loss_in_an_object_store_are_named(shards, remote):
    save_index(shards)
    url = remote("memory://{name}")
    store, path = fsspec.core.url_to_fs(f"{url}/train-0001.tar")
    content = bytearray(store.cat_file(path))
    content[600] ^= 4
    store.pipe_file(path, bytes(content))
    for read in (lambda s: s.batch(range(9, 12)), lambda s: s.decoded()):
        with pytest.raises(BadSample, match=r"train-0001.tar: sample 0010 \(bytes 0 to .* changed since"):
            read(opened(url))
    content[600] ^= 4
    store.pipe_file(path, bytes(content[:5000]))
    begin = (r := opened(url).index.regions).begin[10:17]
    cut = 10 + int((begin + r.size[10:17] > 5000).argmax())
    for read in (lambda s: s.batch(range(10, 17)), lambda s: s.decoded()):
        with pytest.raises(BadSample, match=rf"train-0001.tar: sample 00{cut} .* is cut off after"):
            read(opened(url))
    there = opened(url)
    store.rm(path)
    for read in (lambda: there.batch([12]), lambda: there.decoded()):
        with pytest.raises(BadSample, match=r"train-0001.tar: sample 001[02] .* cannot be read"):
            read()
    with pytest.raises(InputError, match=r"train-0001.tar is only in the index"):
        opened(url)


@pytest.mark.parametrize("url", ["nosuch://bucket/set", "memory://not-there", "file:///not/there", "nosuch::file:///x"])
def test_a_url_that_cannot_be_opened_is_refused_in_one_line(url):
    with pytest.raises(InputError, match=r"data.path: ") as refusal:
        find(url, "train")
    assert "\n" not in str(refusal.value)
    assert url in str(refusal.value)


def test_an_index_saved_to_an_object_store_is_next_to_the_shards(shards, remote):
    url = remote("memory://{name}")
    build(find(url, "train")).save(path_of(url, "train"))
    assert same(Index.load(path_of(url, "train")), build(find(shards, "train")))
    assert opened(url).decoded().labels.tolist() == list(range(30))
