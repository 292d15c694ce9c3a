"""The order of samples: equal for any ranks and workers, each once per epoch, shuffled, and resumable anywhere.

The file is long because every way of reading, from memory to gzipped shards, is tested for the same properties.
"""

import itertools
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import opened, save_index, zipped

from lightning_tdisent.data import tars
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.data.index import Index, Shard
from lightning_tdisent.data.orders import Shuffled, Streamed
from lightning_tdisent.data.shards import Shards, load
from lightning_tdisent.data.tars import find
from lightning_tdisent.diffusion.rng import draw_rows, key
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.datamodule import ResumableLoader

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # 2 cores are enough
LAYOUTS = [(1, 0), (1, 4), (2, 2), (4, 1)]


def rows(make, world, workers, first=0, steps=None):
    """Return (label, id, mirrored) of the samples of all ranks' loaders, in the order of the global batches."""
    streams = []
    for rank in range(world):
        dataset = make(rank, world)
        loader = ResumableLoader(dataset, workers, first)
        batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps or len(dataset))
        streams.append(
            [[(*x, y) for *x, y in zip(b["label"].tolist(), b["id"].tolist(), tilted(b), strict=True)] for b in batches]
        )
        loader.close()
    assert len({len(s) for s in streams}) == 1  # every rank takes the same number of steps
    return [row for step in zip(*streams, strict=True) for batch in step for row in batch]


def tilted(batch):
    """Return whether images were mirrored. The images of some tests are darker on the left for this."""
    return (batch["image"][..., 0] > batch["image"][..., -1]).flatten(1).any(1).tolist()


KINDS = ["memory", "single reads", "sequential", "sequential, gzipped", "sequential, no samples listed"]


def source(kind, folder):
    """Return a function that makes data sets with ``total`` images per global batch."""
    if kind == "sequential, gzipped":
        zipped(folder)
    if kind == "sequential, no samples listed":
        save_index(folder, regions=False)
    elif kind != "memory":
        save_index(folder)
    data = load(folder, "train", 1) if kind == "memory" else opened(folder)

    def dataset(rank, world, total=4, seed=5):
        if kind in ("memory", "single reads"):
            return Shuffled(data, total // world, seed, rank, world, flip=True)
        return Streamed(data, total // world, seed, rank, world, flip=True, buffer=8)

    return dataset


class Chained:
    """A source that reads shards sequentially, as `Shards` does for a folder."""

    def stream_shards(self, shards, start):
        for shard in shards:
            yield from self.stream(shard, start)
            start = 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_depends_on_seed_and_epoch_only(kind, tilted_shards):
    make = source(kind, tilted_shards)
    one = rows(make, 1, 0, 3 * 7)
    assert len(one) == 28  # 30 = 7 x 4 + 2: the incomplete batch is left out
    assert len({label for label, *_ in one}) == 28
    assert all(label == number for label, number, _ in one)
    assert {mirrored for *_, mirrored in one} == {False, True}
    for world, workers in LAYOUTS:
        assert rows(make, world, workers, 3 * 7) == one, (world, workers)
    assert rows(make, 1, 0, 4 * 7) != one
    assert [label for label, *_ in one] != sorted(label for label, *_ in one)
    other = make(0, 1, seed=6)
    assert rows(lambda *_: other, 1, 0, 3 * 7) != one


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_anywhere(kind, tilted_shards):
    make = source(kind, tilted_shards)
    whole = rows(make, 1, 0, 0, 21)
    for first in (1, 6, 7, 13, 20):
        for workers in (0, 2):
            assert rows(make, 1, workers, first, 21 - first) == whole[4 * first :], (first, workers)


def test_memory_and_single_reads_have_the_same_order(tilted_shards):
    assert rows(source("memory", tilted_shards), 1, 0) == rows(source("single reads", tilted_shards), 2, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_more_ranks_than_shards(kind, tilted_shards):
    make = source(kind, tilted_shards)
    labels = [label for label, *_ in rows(lambda r, w: make(r, w, total=5), 5, 0)]
    assert sorted(labels) == list(range(30))


@pytest.mark.parametrize("kind", ["sequential", "sequential, gzipped"])
def test_one_shard_on_four_ranks(kind, tilted_shards):
    for file in sorted(tilted_shards.glob("*.tar"))[1:]:
        file.unlink()
    make = source(kind, tilted_shards)
    seen = [rows(make, *layout, 2) for layout in LAYOUTS]
    assert len({label for label, *_ in seen[0]}) == 8
    assert all(one == seen[0] for one in seen)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    batch=st.integers(1, 12),
    world=st.integers(1, 4),
    buffer=st.integers(1, 60),
    first=st.integers(0, 100),
    workers=st.integers(1, 5),
)
def test_lanes_divide_any_shards_into_any_batches(counts, batch, world, buffer, first, workers):
    """The parts of all ranks and workers, concatenated, equal those of one process; an epoch has no repetitions."""

    class Source(Chained):
        urls = [str(i) for i in range(len(counts))]
        index = Index(tuple(Shard(str(i), 0, "", n, "") for i, n in enumerate(counts)), (), None)

        def __init__(self):
            self.read = Counter()

        def __len__(self):
            return sum(counts)

        def stream(self, shard, start):
            begin, end = self.index.starts[shard : shard + 2]
            for number in range(begin + start, end):
                self.read[int(number)] += 1
                yield int(number), {}

        def collate(self, numbers, raw, flip):
            return list(numbers)

    if sum(counts) < batch * world:
        return
    whole = Streamed(Source(), batch * world, 3, buffer=buffer)
    whole.first = first
    steps = len(whole) + 2
    expected = list(itertools.islice(whole, steps))
    parts = whole.parts(Streamed(Source(), batch, 3, 0, world).workers(workers))
    made = []
    for rank in range(world):
        for part in range(parts):
            one = Streamed(Source(), batch, 3, rank, world, buffer=buffer)
            one.first = first
            one._worker = lambda place=(part, parts): place
            made.append(list(itertools.islice(one, steps)))
    assert [list(itertools.chain(*step)) for step in zip(*made, strict=True)] == expected
    start = Streamed(Source(), batch * world, 3, buffer=buffer)
    epoch = list(itertools.chain(*itertools.islice(start, len(start))))
    assert len(set(epoch)) == len(epoch) == len(start) * batch * world
    assert max(start.source.read.values()) <= 2  # the last samples of a lane may be read for the window after it


@pytest.mark.parametrize(("ranks", "times"), [(1, 1), (2, 4 / 3), (3, 1), (6, 2)])
def test_each_byte_is_read_once_unless_ranks_share_a_lane(ranks, times, tilted_shards, monkeypatch):
    """There are 3 shards, hence 3 lanes: 2 ranks share the middle lane; of 6 ranks, every two share a lane."""
    save_index(tilted_shards)
    read = []

    class Counted:
        def __init__(self, stream):
            self.stream, self.seek = stream, stream.seek

        def read(self, size):
            read.append(len(content := self.stream.read(size)))
            return content

    @contextmanager
    def open_tar(url):
        with tars.open_tar(url) as stream:
            yield Counted(stream)

    monkeypatch.setattr("lightning_tdisent.data.shards.open_tar", open_tar)
    for rank in range(ranks):
        part = Streamed(opened(tilted_shards), 6 // ranks, 0, rank, ranks, buffer=1)
        list(itertools.islice(part, len(part)))
    size = sum(file.stat().st_size for file in tilted_shards.glob("*.tar"))
    assert len(read) == times * 30
    assert sum(read) == pytest.approx(times * size, rel=0 if times in (1, 2) else 0.1)


class Numbers(Chained):
    """A source of equally long shards. A sample is its own number."""

    def __init__(self, shards, each):
        self.urls = [str(i) for i in range(shards)]
        self.index = Index(tuple(Shard(url, 0, "", each, "") for url in self.urls), (), None)

    def __len__(self):
        return len(self.index)

    def stream(self, shard, start):
        begin, end = self.index.starts[shard : shard + 2].tolist()
        for number in range(begin + start, end):
            yield number, {}

    def collate(self, numbers, raw, flip):
        return torch.tensor(numbers)


@pytest.mark.parametrize(("shards", "batch"), [(1, 50), (4, 64), (8, 64), (64, 64), (100, 256)])
def test_lanes_mix_from_epoch_to_epoch(shards, batch):
    """The position of a sample in an epoch says little about the next epoch, in which other samples share its batch."""
    source = Numbers(shards, 1000)
    run = Streamed(source, batch, 0, buffer=2000)
    epochs = [torch.cat(list(itertools.islice(run_, len(run)))) for run_ in starts(run, 6)]
    when = torch.full((6, len(source)), float("nan"))
    for epoch, numbers in enumerate(epochs):
        when[epoch, numbers] = torch.arange(len(numbers)) / len(numbers)
    pairs = list(itertools.pairwise(when))
    both = [~(a.isnan() | b.isnan()) for a, b in pairs]
    correlation = [
        float(torch.corrcoef(torch.stack([a[k], b[k]]))[0, 1]) for (a, b), k in zip(pairs, both, strict=True)
    ]
    limit = 0.35 if shards > 1 else 0.7  # a single shard is only rotated, not permuted
    assert abs(sum(correlation) / 5) < limit, correlation
    assert (when.isnan().sum(0) <= 2).all()  # samples that one epoch leaves over are in others
    if shards > 1:
        mates = epochs[0].view(-1, batch)
        apart = torch.stack([(when[1][m][:, None] - when[1][m]).abs().nanmean() for m in mates]).mean()
        assert apart > 0.25  # a full shuffle has 1/3


def starts(run, epochs):
    for epoch in range(epochs):
        run.first = epoch * len(run)
        yield run


def test_the_order_of_the_shards_differs_in_every_epoch():
    class Noted(Numbers):
        def stream(self, shard, start):
            self.asked.append(shard)
            return super().stream(shard, start)  # `stream_shards` calls this for each shard

    source, rings = Noted(8, 20), []
    run = Streamed(source, 1, 0)
    for one in starts(run, 5):
        source.asked = []
        list(itertools.islice(one, len(one)))
        rings.append(frozenset((a, b) for a, b in itertools.pairwise(source.asked) if a != b))
    assert all(sorted(b for _, b in ring) == list(range(8)) for ring in rings)  # every shard once
    assert len(set(rings)) == 5


@pytest.mark.parametrize(("buffer", "size"), [(1, 96), (192, 192)])
def test_each_window_has_its_own_permutation(buffer, size):
    """A window (of the buffer, or of 16 batches) has neighbours in the ring; each window has its own permutation."""
    run, seen = Streamed(Numbers(1, 960), 6, 0, buffer=buffer), set()
    for window in torch.cat(list(itertools.islice(run, 2 * len(run)))).view(-1, size):
        there = set(window.tolist())
        (low,) = [n for n in there if (n - 1) % 960 not in there]
        order = (window - low) % 960
        assert sorted(order.tolist()) == list(range(size))
        assert abs(float(torch.corrcoef(torch.stack([order, torch.arange(size)]))[0, 1])) < 0.4  # by chance: 0.1
        seen.add(tuple(order.tolist()))
    assert len(seen) == 2 * 960 // size


def test_no_sample_is_left_out_in_every_epoch():
    run = Streamed(Numbers(1, 30), 4, 0)
    seen = torch.cat(list(itertools.islice(run, 20 * len(run)))).bincount(minlength=30)
    assert seen.min() >= 12


def test_fewer_images_than_a_batch_are_refused_in_both_forms(shards):
    for kind, data in ((Shuffled, load(shards, "train", 1)), (Streamed, opened(shards))):
        with pytest.raises(InputError, match=r"batch_size: 31 .* more than the 30"):
            kind(data, 31, 0)


def test_single_reads_of_gzipped_shards_are_refused(shards):
    zipped(shards)
    with pytest.raises(InputError, match=r"single samples of .tar.gz .* use data.access sequential"):
        Shuffled(opened(shards), 4, 0)


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_copied_on_the_device_and_the_order_is_the_same(shards, world):
    data = load(shards, "train", 1)
    plain = Shuffled(data, 4, 0, world=world, flip=True)
    resident = Shuffled(data, 4, 0, world=world, flip=True, device=torch.device("cpu"))
    for a, b in itertools.islice(zip(plain, resident, strict=True), 9):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_half_of_the_images_are_mirrored_and_which_ones_changes(tmp_path):
    data = torch.zeros(1000, 1, 1, 2, dtype=torch.uint8)
    data[..., 1] = 9
    run = Shuffled(ImageSet(data, torch.arange(1000), ""), 1000, 0, flip=True)
    marks = []
    for batch in itertools.islice(run, 2):
        mark = torch.zeros(1000, dtype=torch.bool)
        mark[batch["id"]] = batch["image"][:, 0, 0, 0] == 9
        marks.append(mark)
    assert all(440 < int(mark.sum()) < 560 for mark in marks)
    assert 440 < int((marks[0] ^ marks[1]).sum()) < 560


def test_a_pattern_selects_shards(shards):
    assert len(find(shards, "train-000[01].tar")) == 2
    assert [url.rpartition("/")[2] for url in find(shards, "train-{0000..0001}.tar")] == [
        "train-0000.tar",
        "train-0001.tar",
    ]
    assert len(find(shards, "*")) == 3
    assert [url.rpartition("/")[2] for url in find(shards, "train-0002.tar")] == ["train-0002.tar"]
    with pytest.raises(
        InputError, match=r"holds 3 of the 5 shards of train-\{0000..0004\}.tar; train-0003.tar is missing"
    ):
        find(shards, "train-{0000..0004}.tar")
    save = Shards.open(shards, "train-{0001..0002}.tar", Decoder(1))
    assert len(save) == 20
    for path in (shards / "*", shards / "train-{0000..0001}.tar", shards / "train-0000.tar"):
        with pytest.raises(InputError, match=r"is not a folder; name the folder there, and the pattern in data.train"):
            find(path, "train")


class Counted(Chained):
    """64 shards of 32 samples. A sample is the number of its shard."""

    urls = range(64)
    index = SimpleNamespace(starts=torch.arange(0, 64 * 32 + 1, 32).numpy())

    def __len__(self):
        return 64 * 32

    def stream(self, shard, start):
        return ((shard, None) for _ in range(start, 32))

    def collate(self, numbers, raw, flips):
        return torch.tensor(numbers)


@pytest.mark.parametrize("world", [1, 2])
def test_every_row_gets_samples_of_all_shards_read_sequentially(world):
    rows, seen = torch.arange(8), torch.zeros(8, 64)
    for rank in range(world):
        order = Streamed(Counted(), 64 // world, 0, rank, world, buffer=1)
        for step, shards in enumerate(itertools.islice(order, len(order))):
            s = draw_rows(rows, len(shards), torch.Generator().manual_seed(key(0, rank, step)))
            seen.index_put_((s, shards), torch.ones(()), accumulate=True)
    assert seen.sum(1).tolist() == [256] * 8  # each row as often as the others
    # a row expects 4 samples of each shard: 64 (1 - 1/e^4) = 62.8 shards; rows tied to places would see 8 to 15
    assert (seen > 0).sum(1).min() >= 58
