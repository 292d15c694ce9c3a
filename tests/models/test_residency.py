"""Experts that are not all on the device: the same images bit for bit, one read per file, memory for one expert."""

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_tdisent.artifacts import pieces
from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.diffusion.schedules import Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.models import residency
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.residency import OffloadedExpert, WeightSlot
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling import sample as batches
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.errors_by_row import x0_errors
from lightning_tdisent.sampling.guidance import Guided
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver, Sampler

OFFLOADED = pytest.mark.parametrize("residency", ["offload", "stream"])
SEEDS = range(7, 47)  # three blocks on a CPU, the last one not full


class Layered(Network):
    """Elementwise layers of several sizes, with a buffer of each kind: one in the file, one of the constructor."""

    def __init__(
        self, shape: list[int], layers: int = 3, classes: int | None = None, conditioning: str | None = None
    ) -> None:
        super().__init__(shape, classes, conditioning)
        self.layers, wide = layers, [*shape]
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(wide)) for _ in range(layers)])
        self.odd = nn.Parameter(torch.randn(()))
        self.register_buffer("stored", torch.randn(3))
        self.register_buffer("fixed", torch.linspace(0.5, 1.5, wide[-1]), persistent=False)

    def forward(self, x: Tensor, index: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        for gain in self.gains:
            x = torch.tanh(gain * x + self.odd) * self.fixed
        return x + self.stored.sum()


def layered(states: LatentStates, rows: list[int], seed: int, layers: int = 3) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(Layered([1, 4, 4], layers), V(), states, rows).eval()


@pytest.fixture
def folder(model, write, tmp_path):
    """Three experts with classes, of which one owns rows apart."""
    experts = [model(rows=rows, seed=k, classes=3) for k, rows in enumerate([[1, 4], [2], [3]])]
    return compose([write(f"{k}", e) for k, e in enumerate(experts)], tmp_path / "folder")


@pytest.fixture
def reads(monkeypatch):
    """Files and tensors read, in order."""
    found, inner = [], OffloadedExpert.read

    def read(self, memory, chosen, place):
        found.extend((self.path.name, i) for i in chosen)
        inner(self, memory, chosen, place)

    monkeypatch.setattr(OffloadedExpert, "read", read)
    return found


def images(model, solver: Sampler, **options: object) -> Tensor:
    return torch.cat(list(sample(model, solver, SEEDS, **options)))


@OFFLOADED
@pytest.mark.parametrize(
    "solver", [DDIM(), Ancestral(), DPMSolver(), DDIM(eta=0.5, steps=3)], ids=["ddim", "ancestral", "dpm", "fewer"]
)
def test_images_are_bitwise_the_same(folder, solver, residency):
    resident, offloaded = load_model(folder), load_model(folder, residency)
    assert (resident.residency, offloaded.residency) == ("resident", residency)
    expected = images(resident, solver)
    assert len(expected) == 40
    assert expected.float().std() > 10
    assert torch.equal(images(resident, solver, by_state=True), expected)
    assert torch.equal(images(offloaded, solver), expected)
    assert torch.equal(images(offloaded, solver, by_state=False), expected)
    labels = torch.arange(40) % 4
    assert torch.equal(images(offloaded, solver, label=labels), images(resident, solver, label=labels))
    assert torch.equal(images(Guided(offloaded, 2.0), solver), images(Guided(resident, 2.0), solver))


def test_with_all_experts_in_memory_blocks_advance_in_groups(folder, monkeypatch):
    monkeypatch.setattr(batches, "TOGETHER", 2)
    monkeypatch.setattr(batches, "MOST", 16)
    resident, asked = load_model(folder), []
    for owner, expert in zip("ABC", resident.experts, strict=True):
        expert.network.register_forward_pre_hook(lambda _, args, owner=owner: asked.append(owner))
    images(resident, DDIM())  # three blocks
    assert "".join(asked) == "AACCBBAA" + "ACBA"
    asked.clear()
    images(Guided(resident, 2.0), DDIM(), by_state=False)
    assert "".join(asked) == "ACBA" * 3


@OFFLOADED
def test_copies_of_one_network_are_that_network(model, write, tmp_path, residency):
    one = model()
    files = [write(f"{s}", Denoiser(one.network, V(), one.states, [s])) for s in one.states.rows]
    offloaded = load_model(compose(files, tmp_path / "copies"), residency)
    assert torch.equal(images(offloaded, DPMSolver()), images(one, DPMSolver()))


A, B, C = ("rows_0001-0004.safetensors", "rows_0002.safetensors", "rows_0003.safetensors")


@OFFLOADED
def test_each_tensor_is_read_once_however_many_images(folder, reads, monkeypatch, residency):
    monkeypatch.setattr(batches, "MOST", 16)
    offloaded = load_model(folder, residency)
    assert reads == []
    expected = images(offloaded, Ancestral())
    tensors = range(len(pieces(folder / B)))
    visits = {A: 2, B: 1, C: 1}  # rows 4 and 1 have one owner, which comes for both
    assert sorted(reads) == sorted((name, i) for name, n in visits.items() for i in tensors for _ in range(n))
    if residency == "stream":
        assert reads == [(name, i) for name in (A, C, B, A) for i in tensors]
    reads.clear()
    images(Guided(offloaded, 2.0), DDIM())
    assert sorted(reads) == sorted((name, i) for name in (A, B, C) for i in tensors)  # row 1's is there from before
    reads.clear()
    monkeypatch.setattr(batches, "IN_FLIGHT", 2 * 2 * 4 * 64 * 16)  # x and x0_hat of two blocks at once
    assert torch.equal(images(offloaded, Ancestral()), expected)
    # two parts; the owner of row 1 is there when the first one and the second begin
    assert sorted(reads) == sorted((name, i) for name in (A, B, C) * 2 for i in tensors)


def test_the_next_expert_is_prefetched_while_one_computes(folder, reads, mixed):
    offloaded, x = load_model(folder, "offload"), torch.zeros(2, 1, 8, 8)
    offloaded.expect([4, 3, 2, 1])
    offloaded(x, 4)
    early = offloaded.at(3).layout.n_early
    assert early > 1
    n = len(pieces(folder / A))
    assert reads == [(A, i) for i in range(n)] + [(C, i) for i in range(early)]
    offloaded(x, 4)
    offloaded(x, 3)
    assert reads[n + early :] == [(C, i) for i in range(early, n)] + [(B, i) for i in range(early)]
    reads.clear()
    offloaded(x, 1)  # not the one that was expected
    assert reads == [(A, i) for i in range(n)]
    images(Guided(offloaded, 2.0), DDIM(steps=2))
    assert offloaded._path == [4, 2]  # which a sampler says, also through guidance
    two = load_model(mixed[0], "offload")
    two.expect([4, 3, 2])
    two(torch.zeros(1, 1, 4, 4), 4)
    assert two._slot.prefetched is two.at(2)  # row 3 is of the owner of row 4


@pytest.mark.parametrize(
    ("residency", "ahead", "bound"), [("stream", 0.25, 1.0), ("offload", 0.25, 1.3), ("offload", 1.0, 2.0)]
)
def test_the_slot_has_memory_for_one_expert_and_the_prefetched_part(
    residency, ahead, bound, monkeypatch, model, write, tmp_path
):
    monkeypatch.setattr(WeightSlot.__init__, "__defaults__", (ahead,))
    experts = [Denoiser(model(seed=s).network, V(), model().states, [s]) for s in (1, 2, 3, 4)]
    offloaded = load_model(compose([write(f"{e.rows[0]}", e) for e in experts], tmp_path / "few"), residency)
    slot, layout = offloaded._slot, offloaded.at(1).layout
    assert slot.memory is None  # nothing before the first is asked
    found = images(offloaded, DDIM())
    assert torch.equal(found, images(CompositeDenoiser(experts), DDIM()))
    one = layout.size
    assert one < 1.5 * sum(p.numel() * 4 for p in experts[0].parameters()) + 512 * len(layout.tensors)
    assert one <= slot.memory.numel() <= bound * one
    assert (layout.early_bytes > 0.1 * one) == (residency == "offload")
    with pytest.raises(InputError, match=r"\[0, 1\], got 1.5"):
        WeightSlot("offload", 1.5)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of experts of two architectures on eight rows, some of one row, some of several, and the experts."""
    from lightning_tdisent.models.card import Card
    from lightning_tdisent.models.expert import save_expert

    states = LatentStates(Linear(), S=8)
    owners = [[1, 5, 8], [2], [3, 4], [6], [7]]
    experts = [layered(states, rows, k, 2 + k % 2 * 3) for k, rows in enumerate(owners)]
    facts = dict.fromkeys(("steps", "images_seen", "seconds", "seed"), 0) | {
        "module": "SingleState",
        "data": "d",
        "weights": "ema",
    }
    out = tmp_path_factory.mktemp("mixed")
    for expert in experts:
        card = Card.of(expert, average=None, version="0", **facts)
        save_expert(out / f"{expert.rows[0]}.safetensors", expert, card)
    folder = compose(sorted(out.glob("*.safetensors")), out / "composite")
    return folder, CompositeDenoiser(experts)


@settings(max_examples=40, deadline=None)
@given(
    residency=st.sampled_from(["offload", "stream"]),
    ahead=st.sampled_from([0.0, 0.25, 0.6, 1.0]),
    expected=st.lists(st.integers(1, 8), max_size=8),
    asked=st.lists(st.integers(1, 8), min_size=1, max_size=12),
)
def test_a_wrong_announcement_does_not_change_the_result(mixed, residency, ahead, expected, asked):
    folder, resident = mixed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightSlot.__init__, "__defaults__", (ahead,))
        offloaded = load_model(folder, residency)
    offloaded.expect(expected)
    x = torch.linspace(-2, 2, 32).view(2, 1, 4, 4)
    with torch.inference_mode():
        assert all(torch.equal(offloaded(x, s), resident(x, s)) for s in asked)
        kept = [offloaded.at(s) for s in asked]  # asked again, each has its own weights again
        assert all(torch.equal(expert(x, s), resident(x, s)) for s, expert in zip(asked, kept, strict=True))
    with torch.no_grad():
        assert torch.equal(offloaded(x, asked[0]), resident(x, asked[0]))


@OFFLOADED
def test_errors_per_row_parameters_and_modes(mixed, residency):
    folder, resident = mixed
    offloaded = load_model(folder, residency).eval().to("cpu").float()
    pictures = torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = [1, 3, 8]
    assert torch.equal(x0_errors(offloaded, pictures, range(4), rows), x0_errors(resident, pictures, range(4), rows))
    ours, theirs = list(offloaded.parameters()), list(resident.parameters())
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    assert (ours[0].device, ours[0].dtype) == (theirs[0].device, theirs[0].dtype)
    here = list(resident.at(8).parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours[: len(here)], here, strict=True))  # the last one asked
    assert {p.device.type for p in ours[len(here) :]} == {"meta"}  # nobody takes them for weights
    for change in (lambda: offloaded.to(torch.bfloat16), offloaded.double):
        with pytest.raises(InputError, match=r"bfloat16|float64"):
            change()
    assert torch.equal(images(offloaded, DDIM()), images(resident, DDIM()))


def test_a_file_that_changes_after_loading_is_refused(folder):
    offloaded, x = load_model(folder, "stream"), torch.zeros(1, 1, 8, 8)
    resident = load_model(folder)
    offloaded(x, 3)
    content = (folder / B).read_bytes()
    (folder / B).unlink()
    with pytest.raises(InputError, match=r"rows_0002\.safetensors: can no longer be read: No such file"):
        offloaded(x, 2)
    (folder / B).write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"rows_0002\.safetensors: changed since"):
        offloaded(x, 2)
    with torch.no_grad():
        assert torch.equal(offloaded(x, 3), resident(x, 3))  # the others still answer


@OFFLOADED
def test_a_failed_read_leaves_no_mixture_of_two_experts(mixed, monkeypatch, residency):
    folder, resident = mixed
    inner, bad = OffloadedExpert.read, set()

    def read(self, memory, chosen, place):
        half = chosen[: len(chosen) // 2] if self.rows[0] in bad else chosen
        inner(self, memory, half, place)
        if self.rows[0] in bad:
            raise InputError("the disk is gone")

    monkeypatch.setattr(OffloadedExpert, "read", read)
    monkeypatch.setattr(WeightSlot.__init__, "__defaults__", (0.6,))
    offloaded, x = load_model(folder, residency), torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
    with torch.no_grad():
        offloaded.expect([6, 7])
        offloaded(x, 6)  # the one of row 7 begins to come
        bad.add(2)
        offloaded.expect([6, 2])
        with pytest.raises(InputError, match="the disk is gone"):
            offloaded(x, 6) if residency == "offload" else offloaded(x, 2)
        assert torch.equal(offloaded(x, 7), resident(x, 7))
        with pytest.raises(InputError, match="the disk is gone"):
            offloaded(x, 2)
        assert torch.equal(offloaded(x, 7), resident(x, 7))


@OFFLOADED
def test_weights_of_another_network_are_refused_before_any_is_read(model, write, forge, reads, tmp_path, residency):
    wide = model(rows=[1]).network.channels

    def change(card: dict) -> None:
        card["network"]["init_args"]["channels"] = [2 * wide[0]]

    runs = tmp_path / "runs"
    for s in (1, 2, 3, 4):
        path = write(f"{s}", model(rows=[s])) if s != 3 else forge(model(rows=[3]), change)
        (runs / f"{s}").mkdir(parents=True)
        path.rename(runs / f"{s}" / "model.safetensors")
    with pytest.raises(InputError, match=r"3/model\.safetensors: weights do not fit .*conv_in\.weight"):
        load_model(runs, residency)
    assert reads == []


@pytest.mark.parametrize("residency", ["resident", "offload", "stream"])
def test_a_flipped_bit_in_a_folder_of_runs_is_found_before_it_is_used(model, write, tmp_path, residency):
    for s in (1, 2, 3, 4):
        (tmp_path / "runs" / f"{s}").mkdir(parents=True)
        content = bytearray(write(f"{s}", model(rows=[s])).read_bytes())
        content[-1] ^= s == 2
        (tmp_path / "runs" / f"{s}" / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"2/model\.safetensors: damaged"):
        load_model(tmp_path / "runs", residency)
    with pytest.raises(InputError, match="residency 'disk': choose resident, offload, stream"):
        load_model(tmp_path / "runs", "disk")


def test_tensors_are_where_the_header_says(model, write, tmp_path):
    one = model()
    path = write("one", one)
    content, found = path.read_bytes(), pieces(path)
    assert [p.name for p in found] != []
    for piece in found:
        tensor = one.state_dict()[piece.name]
        assert (piece.dtype, piece.shape) == (tensor.dtype, tuple(tensor.shape))
        assert content[piece.begin : piece.begin + piece.nbytes] == tensor.numpy().tobytes()
    assert {p.name for p in found} == set(one.state_dict())
    assert found == sorted(found, key=lambda p: p.begin)
    for header in (
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}},
    ):
        text = json.dumps(header).encode()
        (tmp_path / "odd").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        with pytest.raises(InputError, match=r"as its header says|its header says it ends at byte"):
            pieces(tmp_path / "odd")
    for content in (b"", b"12345678", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"w": {}}'):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(InputError, match=r"odd: not a \.safetensors file"):
            pieces(tmp_path / "odd")


class Clocks:
    """Replaces streams and events of a GPU by vector clocks, which say what is ordered before what (Lamport, Mattern).

    Lane 0, 1, .. computes for the caller, lane -1 copies. `touch` fails if two uses of one byte are unordered and one
    of them writes.
    """

    def __init__(self, device: object) -> None:
        self.clocks: dict[int, dict[int, int]] = {}
        self.lane = self.caller = self.last = 0
        self.uses: list[tuple[int, int, bool, int, int]] = []
        self.side_used = 0

    def now(self) -> dict[int, int]:
        return self.clocks.setdefault(self.lane, {})

    def record(self) -> dict[int, int]:
        return dict(self.now())

    def wait(self, mark: dict[int, int] | None) -> None:
        for lane, tick in (mark or {}).items():
            self.now()[lane] = max(tick, self.now().get(lane, 0))

    def follow_caller(self) -> None:
        self.lane = self.caller
        if self.lane != self.last:
            self.wait(self.clocks.get(self.last))
            self.last = self.lane

    def synchronize(self, mark: object) -> None:
        pass

    def retain(self, memory: Tensor) -> None:
        pass

    @contextlib.contextmanager
    def on_side_stream(self, after: dict[int, int]):
        self.lane, self.side_used = -1, self.side_used + 1
        self.wait(after)
        yield
        self.lane = self.caller

    def touch(self, begin: int, end: int, write: bool) -> None:
        now = self.now()
        now[self.lane] = now.get(self.lane, 0) + 1
        for b, e, wrote, lane, tick in self.uses:
            if b < end and begin < e and (write or wrote):
                assert now.get(lane, 0) >= tick, f"bytes {b}..{e} of lane {lane} are used by lane {self.lane} meanwhile"
        self.uses.append((begin, end, write, self.lane, now[self.lane]))


@settings(max_examples=40, deadline=None)
@given(
    ahead=st.sampled_from([0.25, 0.6, 1.0]),
    walks=st.lists(
        st.tuples(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.booleans()), min_size=1, max_size=4
    ),
    asked=st.lists(st.integers(1, 8), max_size=4),
)
def test_copies_and_computations_are_ordered_on_a_device_with_own_memory(mixed, ahead, walks, asked):
    folder, resident = mixed
    inner = WeightSlot._copy

    def copy(self, expert, chosen, parity):
        for i in chosen:
            at = self._place(expert.layout, i, parity)
            self.streams.touch(at, at + expert.pieces[i].nbytes, True)
        inner(self, expert, chosen, parity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightSlot.__init__, "__defaults__", (ahead,))
        patch.setattr(residency, "has_own_memory", lambda device: True)
        patch.setattr(residency, "CopyStreams", Clocks)
        patch.setattr(WeightSlot, "_copy", copy)
        offloaded, x = load_model(folder, "offload"), torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
        slot = offloaded._slot

        def answer(s: int) -> None:
            with torch.inference_mode():
                found = offloaded(x, s)
            expert = offloaded.at(s)
            for i, piece in enumerate(expert.pieces):  # what its kernels read, on the lane of the caller
                at = slot._place(expert.layout, i, slot.parity)
                slot.streams.touch(at, at + piece.nbytes, False)
            assert torch.equal(found, resident(x, s))

        for path, other in walks:
            slot.streams.caller = int(other)  # a caller may compute on another stream than the last one
            offloaded.expect(path)
            for s in path:
                answer(s)
        for s in asked:
            answer(s)


def test_offload_copies_on_the_side_stream_from_host_memory_and_stream_does_not(mixed, monkeypatch):
    folder, resident = mixed
    monkeypatch.setattr(residency, "has_own_memory", lambda device: True)
    monkeypatch.setattr(residency, "CopyStreams", Clocks)
    for kind, hosts, beside in (("offload", 5, True), ("stream", 0, False)):
        offloaded = load_model(folder, kind)
        assert torch.equal(images(offloaded, DPMSolver()), images(resident, DPMSolver()))
        slot = offloaded._slot
        assert (len(slot.hosts), slot.streams.side_used > 0) == (hosts, beside)


@OFFLOADED
def test_a_composite_can_be_moved_to_another_device(mixed, residency):
    offloaded, x = load_model(mixed[0], residency), torch.zeros(1, 1, 4, 4)
    offloaded(x, 8)
    network = offloaded.at(8).network
    offloaded.to("meta")  # a device with memory of its own, without values
    assert offloaded._slot.memory is None
    assert {t.device.type for t in (*network.parameters(), *network.buffers())} == {"meta"}  # nothing holds the old one
    assert offloaded.states.a.device.type == offloaded.at(8).weights.device.type == "meta"
    assert next(iter(offloaded.parameters())).device.type == "meta"
    assert offloaded(x.to("meta"), 8).device.type == offloaded._slot.memory.device.type == "meta"
    assert len(offloaded._slot.hosts) == (5 if residency == "offload" else 0)
