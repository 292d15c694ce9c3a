"""Weight offloading: where the experts of a composite are kept while one of them computes.

- ``resident``: all experts are on the device.
- ``offload``: experts are in host memory (pinned if the device is a GPU; on a CPU that is the system's cache of their
  files).
- ``stream``: experts are on disk.

The last two have device memory for one expert only, a `WeightSlot`. Tensors in the slot have the same alignment as
those of a resident expert, so images are the same bit for bit in all three modes.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tdisent.artifacts import Piece, shapes_in
from lightning_tdisent.diffusion.objectives import Objective
from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.card import Card
from lightning_tdisent.models.expert import check_finite, fitting_pieces
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.denoiser import Denoiser

Residency = Literal["resident", "offload", "stream"]
ALIGN = 512  # bytes, at least the allocators' alignment: a kernel may sum in another order at other alignments
AHEAD = 0.25  # default fraction of the next expert that is prefetched


class Member(NamedTuple):
    """Hold the path of a file of weights, its card, and the rows that it serves."""

    path: Path
    card: Card
    rows: list[int]


class OffloadedExpert(Denoiser):
    """An expert whose weights are in a shared slot from when it is called until another expert is called.

    Experts of one architecture share one network object: what `network` returns holds the weights of this expert only
    until another expert is loaded.
    """

    slot: "WeightSlot"
    layout: "_Layout"

    def __init__(self, network: Network, objective: Objective, member: Member, states: Table) -> None:
        super().__init__(network, objective, states, member.rows)
        self.path, self.stamp = member.path, _stamp(member.path)
        self.pieces = fitting_pieces(member.path, self)

    @property
    def network(self) -> Network:  # type: ignore[override]
        """Load the weights of this expert, and return the network."""
        self.slot.load(self)
        return self._modules["network"]  # type: ignore[return-value]

    def read(self, memory: memoryview, chosen: range, place: Callable[[int], int]) -> None:
        """Read tensors of the file into memory.

        chosen: positions of the tensors in the file. place: maps a position to the byte offset in ``memory``.

        Raises InputError if the file has changed since it was checked, cannot be read, or is too short.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                if _stamp(self.path) != self.stamp:
                    raise InputError(f"{self.path}: changed since it was checked; load the composite again")
                for i in chosen:
                    file.seek(self.pieces[i].begin)
                    view = memory[place(i) : place(i) + self.pieces[i].nbytes]
                    while view:
                        if not (n := file.readinto(view)):
                            raise InputError(f"{self.path}: ends within {self.pieces[i].name}")
                        view = view[n:]
        except OSError as error:
            raise InputError(f"{self.path}: can no longer be read: {error.strerror}") from None


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class _Layout:
    """Byte layout of the tensors of experts with equal tensor names, types and shapes.

    Tensors keep the order of the file. The first ``n_early`` of them (``early_bytes`` bytes) are those that may be
    prefetched.
    """

    def __init__(self, network: nn.Module, tensors: Sequence[Piece], ahead: float) -> None:
        self.tensors, self.offsets, self.size = tensors, list[int](), 0
        for piece in tensors:
            self.offsets.append(self.size)
            self.size += -(-piece.nbytes // ALIGN) * ALIGN
        ends = [*self.offsets[1:], self.size]
        self.n_early = sum(end <= ahead * self.size for end in ends)
        self.early_bytes = ends[self.n_early - 1] if self.n_early else 0
        self.owners: list[tuple[dict[str, Any], str, bool]] = []
        for piece in tensors:
            path, _, leaf = piece.name.removeprefix("network.").rpartition(".")
            module = network.get_submodule(path)
            learned = leaf in module._parameters
            self.owners.append((module._parameters if learned else module._buffers, leaf, learned))
        self.views: dict[int, list[Tensor]] = {}
        self.bind(self.meta_tensors())

    def meta_tensors(self, learned: bool = False) -> list[Tensor]:
        """Return the tensors, or with ``learned`` the parameters among them, on the meta device."""
        chosen = [piece for piece, (*_, is_one) in zip(self.tensors, self.owners, strict=True) if is_one or not learned]
        return [torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in chosen]

    def bind(self, views: list[Tensor]) -> None:
        """Make the network use these tensors."""
        for (owner, leaf, _), view in zip(self.owners, views, strict=True):
            owner[leaf] = view


def has_own_memory(device: torch.device) -> bool:
    """Return whether weights must be copied from the host to this device."""
    return device.type != "cpu"


class WeightSlot:
    """Device memory for one expert, and for the first part of the next one, which is prefetched meanwhile.

    residency: ``offload`` or ``stream``.
    ahead: fraction of an expert that is prefetched, in [0, 1]; for experts of one size the memory is (1 + ahead) times
        that of one. 0.25 keeps the peak below 1.3 experts, 1 hides the whole copy. ``stream`` prefetches nothing.
    """

    streams: "CopyStreams"
    hosts: dict[int, Tensor]  # weights in host memory if the device is a GPU, by id() of the expert
    loaded: OffloadedExpert | None  # the expert whose weights are complete here
    prefetched: OffloadedExpert | None  # the expert whose early tensors are here, or on their way
    memory: Tensor | None
    parity: int  # 0 or 1: which of the two areas has the early tensors of the loaded expert
    early_capacity: int  # size of each of these areas in bytes
    loaded_event: Any  # recorded after the copies of the loaded expert
    prefetched_event: Any  # recorded after the copies of the prefetched tensors
    staged_event: Any  # recorded after the last copy from `staging`
    staging: Tensor  # host buffer that files are read into before they are copied to a GPU

    def __init__(self, residency: Literal["offload", "stream"], ahead: float = AHEAD) -> None:
        if not 0 <= ahead <= 1:
            raise InputError(f"ahead must lie in [0, 1], got {ahead}")
        self.residency, self.ahead = residency, ahead if residency == "offload" else 0.0
        self.experts: list[OffloadedExpert] = []
        self.layouts: dict[Any, _Layout] = {}
        self.device = torch.device("cpu")
        self._empty()

    def add(self, expert: OffloadedExpert) -> None:
        """Register an expert that computes in this slot."""
        network = expert._modules["network"]
        assert network is not None
        key = (id(network), tuple((p.name, p.dtype, p.shape) for p in expert.pieces))
        if key not in self.layouts:
            self.layouts[key] = _Layout(network, expert.pieces, self.ahead)
        expert.slot, expert.layout = self, self.layouts[key]
        self.experts.append(expert)

    def load(self, expert: OffloadedExpert, following: OffloadedExpert | None = None) -> None:
        """Load the weights of an expert if they are not here, and start to prefetch ``following``, if given."""
        self.streams.follow_caller()
        if self.loaded is not expert:
            self._load(expert)
        if following is None or following is expert or following is self.prefetched or not following.layout.n_early:
            return
        self.prefetched = None
        # after all computations that used the area before
        with self.streams.on_side_stream(self.loaded_event):
            self._copy(following, range(following.layout.n_early), 1 - self.parity)
            self.prefetched, self.prefetched_event = following, self.streams.record()

    def _load(self, expert: OffloadedExpert) -> None:
        if self.memory is None:
            self._allocate()
        parity, prefetched = 1 - self.parity, self.prefetched
        self.loaded = self.prefetched = None  # neither is complete until the copies below are
        self.streams.wait(self.prefetched_event)  # also if another expert was prefetched: it is overwritten
        if prefetched is not expert:
            self._copy(expert, range(expert.layout.n_early), parity)
        self._copy(expert, range(expert.layout.n_early, len(expert.pieces)), parity)
        if parity not in expert.layout.views:
            expert.layout.views[parity] = self._views(expert.layout, parity)
        expert.layout.bind(expert.layout.views[parity])
        self.loaded, self.parity, self.loaded_event = expert, parity, self.streams.record()

    def _allocate(self) -> None:
        """Allocate the memory: on the device two areas for early tensors, used in turn, and one for the rest.

        On the host: the weights of all experts for ``offload``, a staging buffer for ``stream``, if the device is no
        CPU.
        """
        self.early_capacity = max(layout.early_bytes for layout in self.layouts.values())
        rest = max(layout.size - layout.early_bytes for layout in self.layouts.values())
        largest = max(layout.size for layout in self.layouts.values())
        with torch.inference_mode(False):
            self.memory = torch.empty(2 * self.early_capacity + rest, dtype=torch.uint8, device=self.device)
            self.streams.retain(self.memory)
            if not has_own_memory(self.device):
                return
            if self.residency == "stream":
                self.staging = self._on_host(largest)
            for expert in self.experts if self.residency == "offload" else []:
                host = self.hosts[id(expert)] = self._on_host(expert.layout.size)
                expert.read(host.numpy().data, range(len(expert.pieces)), expert.layout.offsets.__getitem__)

    def _on_host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _place(self, layout: _Layout, i: int, parity: int) -> int:
        """Return the byte offset of tensor i of an expert in the memory of the slot."""
        if i < layout.n_early:
            return parity * self.early_capacity + layout.offsets[i]
        return 2 * self.early_capacity + layout.offsets[i] - layout.early_bytes

    def _views(self, layout: _Layout, parity: int) -> list[Tensor]:
        assert self.memory is not None
        views: list[Tensor] = []
        with torch.inference_mode(False):
            for i, (piece, (*_, learned)) in enumerate(zip(layout.tensors, layout.owners, strict=True)):
                at = self._place(layout, i, parity)
                view = self.memory[at : at + piece.nbytes].view(piece.dtype).view(piece.shape)
                views.append(nn.Parameter(view, requires_grad=False) if learned else view)
        return views

    def _copy(self, expert: OffloadedExpert, chosen: range, parity: int) -> None:
        """Copy adjacent tensors of an expert to the device, on the current stream."""
        layout, memory = expert.layout, self.memory
        assert memory is not None
        if not chosen:
            return
        if not has_own_memory(self.device):
            expert.read(memory.numpy().data, chosen, lambda i: self._place(layout, i, parity))
            return
        host = self.hosts.get(id(expert))
        if host is None:
            self.streams.synchronize(self.staged_event)
            host = self.staging
            expert.read(host.numpy().data, chosen, layout.offsets.__getitem__)
        begin, end = layout.offsets[chosen.start], [*layout.offsets, layout.size][chosen.stop]
        at = self._place(layout, chosen.start, parity)
        memory[at : at + end - begin].copy_(host[begin:end], non_blocking=True)
        self.staged_event = self.streams.record() if self.residency == "stream" else None

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights of the loaded expert, and meta tensors for those of all others.

        If no expert is loaded, the last one is loaded first.
        """
        if self.loaded is None:
            self.load(self.experts[-1])
        loaded = self.loaded
        assert loaded is not None
        yield from loaded.network.parameters()
        for expert in self.experts:
            if expert is not loaded:
                yield from expert.layout.meta_tensors(learned=True)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move to the device to which ``fn`` moves a tensor.

        Raises InputError for a dtype other than float32: experts that are not resident keep the dtype of their files.
        """
        probe = fn(torch.empty(0, device=self.device))
        if probe.dtype != torch.float32:
            raise InputError(
                f"experts that are not resident compute in the type of their files, not in {probe.dtype}: load them "
                "with residency resident"
            )
        if probe.device == self.device:
            return
        for layout in self.layouts.values():
            layout.bind(layout.meta_tensors())
            layout.views.clear()
        self.device = probe.device
        self._empty()
        for network in {id(e._modules["network"]): e._modules["network"] for e in self.experts}.values():
            assert network is not None
            for module in network.modules():  # non-persistent buffers are in no file
                for name in module._non_persistent_buffers_set:
                    if module._buffers[name] is not None:
                        module._buffers[name] = fn(module._buffers[name])  # type: ignore[arg-type]

    def _empty(self) -> None:
        self.streams, self.hosts = CopyStreams(self.device), {}
        self.loaded = self.prefetched = self.memory = None
        self.parity, self.early_capacity, self.staging = 0, 0, torch.empty(0, dtype=torch.uint8)
        self.loaded_event = self.prefetched_event = self.staged_event = None


class CopyStreams:
    """Order copies and computations: in program order on a CPU, with a second CUDA stream for copies on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        if self.cuda:
            self.side, self.last = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def follow_caller(self) -> None:
        """Make the caller's stream wait for the previous caller's stream if it is another one."""
        if self.cuda and (now := torch.cuda.current_stream(self.device)) != self.last:
            now.wait_stream(self.last)
            self.last = now

    def record(self) -> Any:
        """Record an event on the current stream, after all work submitted to it so far; None on a CPU."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def wait(self, event: Any) -> None:
        """Make work submitted to the current stream from now on wait for an event of any stream."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Block the host until an event has completed."""
        if event is not None:
            event.synchronize()

    def retain(self, memory: Tensor) -> None:
        """Keep the allocator from reusing memory before the side stream has finished with it."""
        if self.cuda:
            memory.record_stream(self.side)

    @contextlib.contextmanager
    def on_side_stream(self, after: Any) -> Iterator[None]:
        """Run the work submitted inside on the side stream, after an event; on a CPU in program order."""
        if not self.cuda:
            yield
            return
        with torch.cuda.stream(self.side):
            self.wait(after)
            yield


def offloaded(members: Sequence[Member], residency: Literal["offload", "stream"]) -> list[OffloadedExpert]:
    """Return experts that share one slot.

    members: files whose experts have the same table. residency: ``offload`` or ``stream``.

    Raises InputError for files that do not fit their cards, and `NotFinite` for files with NaN or infinity.
    """
    slot, networks, experts = WeightSlot(residency), dict[str, Network](), list[OffloadedExpert]()
    states = members[0].card.table(str(members[0].path))
    for member in members:
        architecture = json.dumps(member.card.network)
        if architecture not in networks:
            networks[architecture] = member.card.build(str(member.path), shapes_in(member.path)).network
        check_finite(member.path)
        objective = build(member.card.objective, Objective)
        expert = OffloadedExpert(networks[architecture], objective, member, states)
        slot.add(expert)
        experts.append(expert.eval())
    return experts
