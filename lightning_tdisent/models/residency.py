"""Where the experts of a composite are while one of them computes: all in memory, on the host, or on disk.

``resident`` keeps every expert on the device. ``offload`` keeps them in the memory of the host (pinned beside a GPU; on
a CPU that is the system's cache of their files), ``stream`` on disk; both have memory for one expert on the device, a
`Slot`, where its tensors lie as aligned as those of a resident one: images are the same bit for bit in all three.
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
ALIGN = 512  # bytes, that of the allocators or more: a kernel may sum in another order elsewhere
AHEAD = 0.25


class Member(NamedTuple):
    """A file of weights, its card, and the rows it answers for."""

    path: Path
    card: Card
    rows: list[int]


class PassingExpert(Denoiser):
    """An expert whose weights come into the slot when it is asked, and stay until another one is.

    Experts of one architecture share one network: what `network` returns holds these weights until then only.
    """

    slot: "Slot"
    form: "_Form"

    def __init__(self, network: Network, objective: Objective, member: Member, states: Table) -> None:
        super().__init__(network, objective, states, member.rows)
        self.path, self.stamp = member.path, _stamp(member.path)
        self.pieces = fitting_pieces(member.path, self)

    @property
    def network(self) -> Network:  # type: ignore[override]
        """The network, with the weights of this expert."""
        self.slot.hold(self)
        return self._modules["network"]  # type: ignore[return-value]

    def read(self, memory: memoryview, chosen: range, place: Callable[[int], int]) -> None:
        """Read some tensors of the file to their places; raises InputError if it has changed since it was checked."""
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
            raise InputError(f"{self.path}: cannot be read any more: {error.strerror}") from None


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


class _Form:
    """How the tensors of experts alike lie in memory: in the order of the file, the early ones first, then the rest."""

    def __init__(self, network: nn.Module, tensors: Sequence[Piece], ahead: float) -> None:
        self.tensors, self.offsets, self.size = tensors, list[int](), 0
        for piece in tensors:
            self.offsets.append(self.size)
            self.size += -(-piece.nbytes // ALIGN) * ALIGN
        ends = [*self.offsets[1:], self.size]
        self.early = sum(end <= ahead * self.size for end in ends)  # tensors that are copied ahead, and their bytes
        self.cut = ends[self.early - 1] if self.early else 0
        self.homes: list[tuple[dict[str, Any], str, bool]] = []
        for piece in tensors:
            path, _, leaf = piece.name.removeprefix("network.").rpartition(".")
            module = network.get_submodule(path)
            learned = leaf in module._parameters
            self.homes.append((module._parameters if learned else module._buffers, leaf, learned))
        self.views: dict[int, list[Tensor]] = {}
        self.bind(self.blank())

    def blank(self, learned: bool = False) -> list[Tensor]:
        """The tensors, or the parameters among them, without values."""
        chosen = [piece for piece, (*_, is_one) in zip(self.tensors, self.homes, strict=True) if is_one or not learned]
        return [torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in chosen]

    def bind(self, views: list[Tensor]) -> None:
        """Make the network compute with these."""
        for (home, leaf, _), view in zip(self.homes, views, strict=True):
            home[leaf] = view


def has_own_memory(device: torch.device) -> bool:
    """Whether what it computes with must be copied there from the host."""
    return device.type != "cpu"


class Slot:
    """Memory for one expert on the device, and for the first share of the next one, copied while this one computes.

    residency: offload or stream; ahead: that share, in [0, 1], so that experts of one size take (1 + ahead) times that
    of one: 0.25 keeps the peak below 1.3 experts, 1 hides the whole copy. `stream` copies nothing ahead.
    """

    lanes: "Lanes"
    hosts: dict[int, Tensor]  # on the host beside a GPU, by the id of the expert
    at_hand: PassingExpert | None  # whose weights are here; coming: whose first share is
    coming: PassingExpert | None
    memory: Tensor | None
    parity: int  # which of the two places for early tensors those of the expert at hand have
    first: int  # bytes of such a place
    ready: Any  # marks behind the copies of the expert at hand, of the share of the coming one, and from the stage
    arrived: Any
    staged: Any
    stage: Tensor  # where a file is read before it goes to a GPU

    def __init__(self, residency: Literal["offload", "stream"], ahead: float = AHEAD) -> None:
        if not 0 <= ahead <= 1:
            raise InputError(f"ahead must lie in [0, 1], got {ahead}")
        self.residency, self.ahead = residency, ahead if residency == "offload" else 0.0
        self.experts: list[PassingExpert] = []
        self.forms: dict[Any, _Form] = {}
        self.device = torch.device("cpu")
        self._empty()

    def add(self, expert: PassingExpert) -> None:
        """Let an expert compute here."""
        network = expert._modules["network"]
        assert network is not None
        key = (id(network), tuple((p.name, p.dtype, p.shape) for p in expert.pieces))
        if key not in self.forms:
            self.forms[key] = _Form(network, expert.pieces, self.ahead)
        expert.slot, expert.form = self, self.forms[key]
        self.experts.append(expert)

    def hold(self, expert: PassingExpert, then: PassingExpert | None = None) -> None:
        """Bring the weights of an expert if they are not here, and begin to bring those of the one that comes then."""
        self.lanes.follow()
        if self.at_hand is not expert:
            self._bring(expert)
        if then is not None and then is not expert and then is not self.coming and then.form.early:
            self.coming = None
            with self.lanes.beside(self.ready):  # behind all that computed with what was in that place before
                self._copy(then, range(then.form.early), 1 - self.parity)
                self.coming, self.arrived = then, self.lanes.mark()

    def _bring(self, expert: PassingExpert) -> None:
        if self.memory is None:
            self._allocate()
        parity, coming = 1 - self.parity, self.coming
        self.at_hand = self.coming = None  # none is whole while this is going on
        self.lanes.wait(self.arrived)  # also where another one was expected, whose place is written over
        if coming is not expert:
            self._copy(expert, range(expert.form.early), parity)
        self._copy(expert, range(expert.form.early, len(expert.pieces)), parity)
        if parity not in expert.form.views:
            expert.form.views[parity] = self._views(expert.form, parity)
        expert.form.bind(expert.form.views[parity])
        self.at_hand, self.parity, self.ready = expert, parity, self.lanes.mark()

    def _allocate(self) -> None:
        """Two places for early tensors, which experts use in turn, and one for the others; and the host's share."""
        self.first = max(form.cut for form in self.forms.values())
        rest = max(form.size - form.cut for form in self.forms.values())
        largest = max(form.size for form in self.forms.values())
        with torch.inference_mode(False):
            self.memory = torch.empty(2 * self.first + rest, dtype=torch.uint8, device=self.device)
            self.lanes.lend(self.memory)
            if not has_own_memory(self.device):
                return
            if self.residency == "stream":
                self.stage = self._on_host(largest)
            for expert in self.experts if self.residency == "offload" else []:
                host = self.hosts[id(expert)] = self._on_host(expert.form.size)
                expert.read(host.numpy().data, range(len(expert.pieces)), expert.form.offsets.__getitem__)

    def _on_host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _place(self, form: _Form, i: int, parity: int) -> int:
        """Where tensor i of an expert lies in the memory."""
        if i < form.early:
            return parity * self.first + form.offsets[i]
        return 2 * self.first + form.offsets[i] - form.cut

    def _views(self, form: _Form, parity: int) -> list[Tensor]:
        assert self.memory is not None
        views: list[Tensor] = []
        with torch.inference_mode(False):
            for i, (piece, (*_, learned)) in enumerate(zip(form.tensors, form.homes, strict=True)):
                at = self._place(form, i, parity)
                view = self.memory[at : at + piece.nbytes].view(piece.dtype).view(piece.shape)
                views.append(nn.Parameter(view, requires_grad=False) if learned else view)
        return views

    def _copy(self, expert: PassingExpert, chosen: range, parity: int) -> None:
        """Copy some neighbouring tensors of an expert to the device, where the lane of the caller has its turn."""
        form, memory = expert.form, self.memory
        assert memory is not None
        if not chosen:
            return
        if not has_own_memory(self.device):
            expert.read(memory.numpy().data, chosen, lambda i: self._place(form, i, parity))
            return
        host = self.hosts.get(id(expert))
        if host is None:
            self.lanes.finish(self.staged)
            host = self.stage
            expert.read(host.numpy().data, chosen, form.offsets.__getitem__)
        begin, end = form.offsets[chosen.start], [*form.offsets, form.size][chosen.stop]
        at = self._place(form, chosen.start, parity)
        memory[at : at + end - begin].copy_(host[begin:end], non_blocking=True)
        self.staged = self.lanes.mark() if self.residency == "stream" else None

    def parameters(self) -> Iterator[Tensor]:
        """Weights of the expert at hand, the last one if there is none; of all others shape and type (device meta)."""
        if self.at_hand is None:
            self.hold(self.experts[-1])
        at_hand = self.at_hand
        assert at_hand is not None
        yield from at_hand.network.parameters()
        for expert in self.experts:
            if expert is not at_hand:
                yield from expert.form.blank(learned=True)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Compute on the device to which ``fn`` moves a tensor; refuses another number type than that of the files."""
        probe = fn(torch.empty(0, device=self.device))
        if probe.dtype != torch.float32:
            raise InputError(
                f"experts that are not resident compute in the type of their files, not in {probe.dtype}: load them "
                "with residency resident"
            )
        if probe.device == self.device:
            return
        for form in self.forms.values():
            form.bind(form.blank())
            form.views.clear()
        self.device = probe.device
        self._empty()
        for network in {id(e._modules["network"]): e._modules["network"] for e in self.experts}.values():
            assert network is not None
            for module in network.modules():  # computed by a constructor and in no file
                for name in module._non_persistent_buffers_set:
                    if module._buffers[name] is not None:
                        module._buffers[name] = fn(module._buffers[name])  # type: ignore[arg-type]

    def _empty(self) -> None:
        self.lanes, self.hosts = Lanes(self.device), {}
        self.at_hand = self.coming = self.memory = None
        self.parity, self.first, self.stage = 0, 0, torch.empty(0, dtype=torch.uint8)
        self.ready = self.arrived = self.staged = None


class Lanes:
    """The order of copies and computations: a CPU does each in its turn, a GPU copies on a stream beside."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        if self.cuda:
            self.side, self.last = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def follow(self) -> None:
        """Let a caller that computes on another stream than last time wait for what went before."""
        if self.cuda and (now := torch.cuda.current_stream(self.device)) != self.last:
            now.wait_stream(self.last)
            self.last = now

    def mark(self) -> Any:
        """Return a mark behind all that this lane has been told to do."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def wait(self, mark: Any) -> None:
        """What this lane is told from now on waits for a mark of any lane."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Any) -> None:
        """The host waits for a mark."""
        if mark is not None:
            mark.synchronize()

    def lend(self, memory: Tensor) -> None:
        """Memory is not given to others before the lane beside is done with it."""
        if self.cuda:
            memory.record_stream(self.side)

    @contextlib.contextmanager
    def beside(self, after: Any) -> Iterator[None]:
        """What is told within goes to the lane beside, behind a mark."""
        if not self.cuda:
            yield
            return
        with torch.cuda.stream(self.side):
            self.wait(after)
            yield


def passing(members: Sequence[Member], residency: Literal["offload", "stream"]) -> list[PassingExpert]:
    """Return experts that share one slot; raises InputError for files that do not fit their cards or are not finite."""
    slot, networks, experts = Slot(residency), dict[str, Network](), list[PassingExpert]()
    states = members[0].card.table(str(members[0].path))
    for member in members:
        architecture = json.dumps(member.card.network)
        if architecture not in networks:
            networks[architecture] = member.card.build(str(member.path), shapes_in(member.path)).network
        check_finite(member.path)
        objective = build(member.card.objective, Objective)
        expert = PassingExpert(networks[architecture], objective, member, states)
        slot.add(expert)
        experts.append(expert.eval())
    return experts
