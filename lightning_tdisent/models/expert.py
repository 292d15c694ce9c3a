"""Write and read experts: a denoiser with its card in one safetensors file."""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lightning_tdisent.artifacts import Piece, pieces, sealed, shapes_in
from lightning_tdisent.diffusion.spec import rebuild
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.finite import refuse_non_finite
from lightning_tdisent.models.card import Card, read_card, read_checkpoint
from lightning_tdisent.networks.rebuild import faithful
from lightning_tdisent.sampling.denoiser import Denoiser


def rebuilt(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser that would be read from a file of this one, sharing its tensors as weights.

    Raises InputError, naming the part and the difference, unless network, table, objective and operator compute the
    same when built from their description. See `networks.rebuild.faithful`.
    """
    network, objective, states = faithful(denoiser.network), rebuild(denoiser.objective), rebuild(denoiser.states)
    if states.fingerprint != denoiser.states.fingerprint:
        raise InputError(f"{denoiser.states} cannot be rebuilt from its schedule and cannot be described in a file")
    states.to(denoiser.weights.device)
    other = Denoiser(network, objective, states, denoiser.rows)
    other.weights = other.weights.to(denoiser.weights.device)
    generator = torch.Generator().manual_seed(1)
    x0, item = 2 * torch.rand(2, *denoiser.shape, generator=generator) - 1, torch.arange(2)
    x0, item = x0.to(denoiser.weights.device), item.to(denoiser.weights.device)
    z, again = denoiser.encode(x0, item), other.encode(x0, item)
    if z.shape != again.shape or not torch.allclose(z, again):
        raise InputError(
            f"{type(denoiser.states).__name__}: the table built from what a file would say of it makes other states of "
            "an image: its operator or space is random, or has arguments that are no attributes"
        )
    s = torch.tensor([denoiser.rows[0], denoiser.rows[-1]], device=x0.device)
    _, a, b = states.normalised(s, z)
    eps = torch.randn(z.shape, generator=generator).to(z)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    parts = ((d.weights, d.objective) for d in (denoiser, other))
    mine, theirs = ((weights, o.target(z, eps, a, b), o.x0(eps, z, a, b)) for weights, o in parts)
    if not all(torch.allclose(m, t, equal_nan=True) for m, t in zip(mine, theirs, strict=True)):
        raise InputError(
            f"{type(objective).__name__}: the objective built from what a file would say of it has other weights or "
            "targets: keep every argument of it, and of its weight, as an attribute of the same name"
        )
    return other


def save_expert(path: str | Path, denoiser: Denoiser, card: Card, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights and card to a .safetensors file, atomically.

    path: the file to write.
    weights: tensors by name; those of the denoiser if not given.

    The first entry of the card is the SHA-256 of the whole file, computed with zeros in its own place. Raises
    InputError, with nothing written, for a network that could not be rebuilt from the file, and for weights of other
    names or shapes, and `NotFinite` for NaN or infinity.
    """
    faithful(denoiser.network)
    own = denoiser.state_dict()
    state = weights if weights is not None else own
    if odd := sorted(k for k in own.keys() | state.keys() if k not in own or k not in state
                     or own[k].shape != state[k].shape):  # fmt: skip
        raise InputError(f"{path}: weights that do not fit their network were to be written: {', '.join(odd[:6])}")
    refuse_non_finite(str(path), state)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    write_whole(path, sealed(tensors, "card", dataclasses.asdict(card)))


def weights_digest(network: torch.nn.Module) -> str:
    """Return a hash that distinguishes random initial weights, empty if they are on the meta device.

    Computed from the first value of the first 32 non-constant tensors, to two digits: processors differ in the last
    bits of what one seed draws.
    """
    weights = [w for w in network.parameters() if w.numel() > 1]
    if any(w.is_meta for w in weights):
        return ""
    some = [w for w in weights if float(w.detach().flatten()[0]) != float(w.detach().flatten()[-1])][:32]
    values = " ".join(f"{float(w.detach().flatten()[0]):.1e}" for w in some)
    return digest(values)


def load_expert(path: str | Path, verify: bool = True) -> tuple[Denoiser, Card]:
    """Build the denoiser of a .safetensors file with its weights, in eval mode; see `spec.build` for allowed classes.

    path: the file, or the .ckpt of a training, of which the first average is loaded, or the live weights if it has
        none.
    verify: check the bytes of a .safetensors file; False if that has been done.

    Raises InputError for a damaged file, and `NotFinite` for weights with NaN or infinity.
    """
    checkpoint = read_checkpoint(Path(path)) if Path(path).suffix == ".ckpt" else None
    card = checkpoint[0] if checkpoint else read_card(path, verify)
    shapes = {k: v.shape for k, v in checkpoint[1].items()} if checkpoint else shapes_in(path)
    denoiser = card.build(str(path), shapes)
    try:
        # cloned for alignment: results must not depend on the length of the header
        state = checkpoint[1] if checkpoint else {k: v.clone() for k, v in load_file(path).items()}
        denoiser.load_state_dict(state, strict=True, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: weights do not fit the network named in the file: {error}") from None
    refuse_non_finite(str(path), state)
    return denoiser.eval(), card


def check_finite(path: str | Path) -> None:
    """Raise `NotFinite` for NaN or infinity in a .safetensors file; its tensors are read one by one."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator)
                refuse_non_finite(str(path), {name: file.get_tensor(name)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a .safetensors file of weights ({error})") from None


def fitting_pieces(path: str | Path, denoiser: Denoiser) -> list[Piece]:
    """Return the positions of the tensors in a file; no weights are read.

    Raises InputError unless their names and shapes are those of the denoiser.
    """
    found = pieces(path)
    there = {piece.name: list(piece.shape) for piece in found}
    here = {name: list(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    if odd := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        raise InputError(f"{path}: weights do not fit the network named in the file: {', '.join(odd[:8])}")
    return found
