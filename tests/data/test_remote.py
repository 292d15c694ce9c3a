"""Byte ranges are fetched ahead: concurrently, in order, within limits, and neighbours as one request."""

import asyncio
import io
import itertools
import random
import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
import webdataset as wds
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from making import opened, save_index
from PIL import Image

from lightning_tdisent.data import remote
from lightning_tdisent.data.decode import BadSample, Decoder
from lightning_tdisent.data.index import path_of
from lightning_tdisent.data.orders import Shuffled, Streamed
from lightning_tdisent.data.remote import MAX_AHEAD, MAX_GAP, MAX_JOINED, Fetch, fetched, joined
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.shards import Policy, Shards
from lightning_tdisent.lit.datamodule import ResumableLoader


class Late(AsyncFileSystem):
    """Objects in memory. Each answer takes ``delay`` seconds, so that concurrent requests can be counted."""

    protocol = "late"
    cachable = False
    objects, delay, asked = {}, 0.0, []
    now = most = bytes = most_bytes = cancelled = failing = 0

    async def _cat_file(self, path, start=None, end=None, **_):
        one = type(self)
        content = one.objects.get(path := self._strip_protocol(path), b"")
        start, end = start or 0, len(content) if end is None else end
        one.asked.append((path, start, end))
        if path not in one.objects:
            raise FileNotFoundError(path)
        one.now, one.bytes = one.now + 1, one.bytes + end - start
        one.most, one.most_bytes = max(one.most, one.now), max(one.most_bytes, one.bytes)
        try:
            await asyncio.sleep(one.delay)
            if one.failing:
                one.failing -= 1
                raise ConnectionResetError("by peer")
            return content[start:end]
        except asyncio.CancelledError:
            one.cancelled += 1
            raise
        finally:
            one.now, one.bytes = one.now - 1, one.bytes - (end - start)

    async def _info(self, path, **_):
        return {"name": path, "size": len(self.objects[self._strip_protocol(path)]), "type": "file"}

    async def _ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        names = sorted(name for name in self.objects if name.rpartition("/")[0] == path)
        return [await self._info(name) for name in names] if detail else names


@pytest.fixture
def late(shards):
    """Index the shards and copy them to a store with late answers."""
    fsspec.register_implementation("late", Late, clobber=True)
    save_index(shards)
    Late.objects = {f"set/{file.name}": file.read_bytes() for file in shards.iterdir() if file.is_file()}
    Late.delay, Late.asked, Late.now, Late.most, Late.bytes, Late.most_bytes, Late.cancelled = 0.0, [], 0, 0, 0, 0, 0
    return "late://set"


def numbers(n):
    """Make n objects of 1,000 bytes each; return groups of one range."""
    fsspec.register_implementation("late", Late, clobber=True)
    Late.objects = {f"set/{i}": bytes([i % 256]) * 1000 for i in range(n)}
    Late.asked, Late.now, Late.most, Late.bytes, Late.most_bytes, Late.cancelled = [], 0, 0, 0, 0, 0
    return [[(f"late://set/{i}", 0, 1000)] for i in range(n)]


@pytest.mark.parametrize("order", [Shuffled, Streamed])
def test_samples_fetched_ahead_have_the_order_of_local_files(order, shards, late):
    local, there = opened(shards), opened(late)
    random.seed(0)
    Late.delay = 0.003
    for first in (0, 5):
        runs = [order(source, 4, 1, flip=True) for source in (local, there)]
        for run in runs:
            run.first = first
        for a, b in itertools.islice(zip(*runs, strict=True), 12):
            assert a["id"].tolist() == b["id"].tolist()
            assert torch.equal(a["image"], b["image"])
    assert torch.equal(local.decoded().images, there.decoded().images)
    assert [n for n, _ in there.stream_shards([1, 2], 3)] == [n for n, _ in local.stream_shards([1, 2], 3)]


def test_a_batch_waits_for_one_answer_while_the_next_ones_are_fetched(late):
    there = opened(late)
    Late.delay, Late.asked = 0.1, []
    begin = time.perf_counter()
    for _ in itertools.islice(Shuffled(there, 4, 1), 8):
        pass
    assert time.perf_counter() - begin < 8 * 0.1 / 2  # 32 samples, one after the other, would take 3.2 s
    assert Late.most > 4


def test_no_more_than_allowed_is_fetched_ahead():
    groups = numbers(100)
    Late.delay = 0.02
    stream = fetched(iter(groups), most=3000)
    for number in range(30):
        assert next(stream) == [bytes([number]) * 1000]
        time.sleep(0.001)
    assert Late.most_bytes <= 3000
    stream = fetched(iter(groups), most=10**9)
    next(stream)
    time.sleep(0.1)
    assert len(Late.asked) <= 33 + MAX_AHEAD + 1
    stream = fetched(iter(groups), most=1)  # one group is always fetched ahead
    Late.asked = []
    next(stream)
    time.sleep(0.1)
    assert len(Late.asked) == 2


def test_requests_that_are_no_longer_needed_are_cancelled():
    Late.delay = 0.0
    stream = fetched(iter(numbers(50)))
    next(stream)
    Late.delay = 30
    next(stream)
    until = time.monotonic() + 10
    while len(Late.asked) < MAX_AHEAD + 2 and time.monotonic() < until:  # the last one with the long delay
        time.sleep(0.01)
    stream.close()
    until = time.monotonic() + 10
    while Late.now and time.monotonic() < until:
        time.sleep(0.01)
    assert Late.now == 0
    assert Late.cancelled > 0


def test_every_group_is_fetched_once_and_no_groups_give_nothing():
    assert list(fetched(iter([]))) == []
    Late.delay = 0.0
    groups = numbers(40)
    assert [one[0][:1] for one in fetched(groups)] == [bytes([i]) for i in range(40)]
    assert len(Late.asked) == 40


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4 * MAX_JOINED), st.integers(0, MAX_JOINED)), max_size=20)
)
def test_joined_ranges_contain_the_requested_ranges(ranges):
    out, places = joined(ranges)
    assert len(places) == len(ranges)
    for (url, begin, size), (number, at) in zip(ranges, places, strict=True):
        there, first, length = out[number]
        assert there == url
        assert first + at == begin
        assert at + size <= length
    assert len(out) <= len(ranges)
    assert sum(size for *_, size in out) <= sum(size for *_, size in ranges) + MAX_GAP * len(ranges)
    assert all(size <= MAX_JOINED for *_, size in out)


def test_neighbouring_ranges_are_one_request(late):
    there = opened(late)
    Late.asked = []
    found = there.batch([4, 3, 20, 5])
    assert found["label"].tolist() == [4, 3, 20, 5]
    r = there.index.regions
    shards = [there.index.place(n)[0] for n in (3, 5, 20)]
    assert shards[0] == shards[1] != shards[2]
    assert sorted((begin, end) for _, begin, end in Late.asked) == sorted(
        [(int(r.begin[3]), int(r.begin[5] + r.size[5])), (int(r.begin[20]), int(r.begin[20] + r.size[20]))]
    )


def test_a_server_that_ignores_ranges_is_named(late, monkeypatch):
    there = opened(late)

    async def whole(self, path, start=None, end=None, **_):
        return self.objects[self._strip_protocol(path)]

    monkeypatch.setattr(Late, "_cat_file", whole)
    with pytest.raises(
        BadSample, match=r"cannot be read: InputError: got .* bytes instead of .*; does the server ignore"
    ):
        there.batch([3])


def test_a_synchronous_file_system_is_read_when_its_turn_comes(monkeypatch):
    store, asked = fsspec.filesystem("memory"), []
    for i in range(5):
        store.pipe_file(f"/ranges/{i}", bytes([i]) * 10)
    read = MemoryFileSystem.cat_ranges

    def cat_ranges(self, paths, *args, **options):
        asked.append(paths)
        return read(self, paths, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", cat_ranges)
    stream = fetched([[(f"memory://ranges/{i}", 2, 3)] for i in range(5)])
    assert next(stream) == [bytes([0]) * 3]
    assert len(asked) == 1
    assert [one for (one,) in stream] == [bytes([i]) * 3 for i in range(1, 5)]


def test_s3_gets_as_many_connections_as_are_used_concurrently(monkeypatch):
    pytest.importorskip("s3fs")
    system, _ = remote.file_system("s3://bucket/key")
    assert system.config_kwargs["max_pool_connections"] == remote.CONNECTIONS
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"max_pool_connections": 7, "read_timeout": 3}})
    system, _ = remote.file_system("s3://another/key")
    assert system.config_kwargs == {"max_pool_connections": 7, "read_timeout": 3}


def test_a_failed_range_does_not_affect_the_others_of_its_group():
    groups = numbers(3)
    Late.delay = 0.0
    ranges = [groups[0][0], ("late://set/none", 0, 5), groups[2][0]]
    found = Fetch(ranges).result()
    assert found[0] == bytes([0]) * 1000
    assert isinstance(found[1], FileNotFoundError)
    assert len(Late.asked) == 3  # a missing file is not requested again
    assert found[2] == bytes([2]) * 1000


@pytest.fixture
def served(shards):
    """Index the shards and serve them by a server that keeps connections open."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 2**16

        def do_GET(self):
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not found:
                super().do_GET()
                return
            content = Path(self.translate_path(self.path)).read_bytes()[int(found[1]) : int(found[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    save_index(shards)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_process_can_read_while_and_after_its_workers_read(served, shards):
    """Workers are forked, and must not close the connections of their parent."""
    local, there = opened(shards), opened(served)
    answers = []

    def read():
        for _ in range(4):
            loader = ResumableLoader(Shuffled(there, 4, 1), 2)
            stream = iter(loader)
            ids = [next(stream)["id"].tolist() for _ in range(3)]
            answers.append((ids, there.batch([3, 20, 11])["label"].tolist()))
            loader.close()
            answers.append(torch.equal(opened(served).decoded().images, local.decoded().images))

    thread = threading.Thread(target=read, daemon=True)  # it may hang
    thread.start()
    thread.join(60)
    ids = [batch["id"].tolist() for batch in itertools.islice(Shuffled(local, 4, 1), 3)]
    assert answers == [(ids, [3, 20, 11]), True] * 4


def test_requests_cut_by_a_short_outage_are_retried_and_are_not_damage(late):
    for policy in (Policy(), Policy("skip", 0.1)):
        there = opened(late, policy)
        Late.failing, ids = 4, []
        for batch in itertools.islice(Shuffled(there, 4, 1), 7):
            ids.append(batch["id"].tolist())
        assert Late.failing == 0
        assert ids == [batch["id"].tolist() for batch in itertools.islice(Shuffled(opened(late), 4, 1), 7)]
        assert there.lost == 0


def test_a_network_that_does_not_answer_is_a_timeout(late, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    there = opened(late)
    Late.delay = 60
    begin = time.perf_counter()
    with pytest.raises(BadSample, match=r"sample 0003 .* cannot be read: TimeoutError: .*no answer in 0 s"):
        there.batch([3])
    assert time.perf_counter() - begin < 10
    Late.delay = 0.0


def test_captions_of_some_samples_are_returned_for_any_number_of_workers(tmp_path):
    with wds.TarWriter(str(tmp_path / "train-0000.tar"), encoder=False) as tar:
        for k in range(64):
            stream = io.BytesIO()
            Image.new("L", (4, 4), k).save(stream, "png")
            tar.write({"__key__": f"{k:04d}", "png": stream.getvalue()} | ({"txt": b"%d" % k} if k % 8 == 0 else {}))
    build([tmp_path / "train-0000.tar"]).save(path_of(tmp_path, "train"))
    there = Shards.open(tmp_path, "train", Decoder(1))
    seen = []
    for workers in (0, 2):
        loader = ResumableLoader(Streamed(there, 4, 1, buffer=8), workers)
        batches = list(itertools.islice(iter(loader), 12))
        seen.append([(b["id"].tolist(), b["caption"]) for b in batches])
        loader.close()
    assert seen[0] == seen[1]
    assert all(c == (str(i) if i % 8 == 0 else "") for ids, said in seen[0] for i, c in zip(ids, said, strict=True))
