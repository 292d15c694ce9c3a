"""The weights of another run as the start of a training."""

from pathlib import Path
from typing import Any

import torch

from lightning_tdisent.artifacts import shapes_in
from lightning_tdisent.diffusion.spec import identity, spec
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.card import PARENT, read_card
from lightning_tdisent.models.compose import find_files, load_model
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.denoiser import Denoiser


def start_warm(denoiser: Denoiser, source: str) -> list[dict[str, Any]]:
    """Give a denoiser the weights of another run whose table has its rows at the same values.

    A network that sees the state takes them as they are; a time-agnostic one takes those of the source at its row,
    with the time embedding folded in, so that both say the same there, or those of a time-agnostic expert of another
    row of the table as they are. Returns what the source cost, for the card.
    """
    shared, cards = load_model(source)
    rows = [int(t) for t in denoiser.states.index[denoiser.rows]]
    if not isinstance(shared, Denoiser):
        raise InputError(f"warm_start: {source} must be one network that has indices {rows}")
    _refuse_states(denoiser, shared, source)
    network = shared.network
    if network.sees_state and not denoiser.network.sees_state:
        network = network.at_index(rows[0])
    _refuse_network(denoiser, network, source)
    denoiser.network.load_state_dict(network.state_dict())
    card = cards[0]
    cost = {k: getattr(card, k) for k in PARENT}
    average = card.average or {}
    cost["steps"] = int(average.get("steps", card.steps) + average.get("before", 0))
    return [*card.parents, {"sha256": sha256(find_files(source)[0]), **cost, "rows": card.rows}]


def refuse_start(denoiser: Denoiser, source: str) -> None:
    """Refuse, by the card of a file of weights alone, what `start_warm` would; nothing is refused of several files."""
    files = find_files(source)
    if len(files) > 1 or Path(files[0]).suffix != ".safetensors":
        return
    shared = read_card(files[0]).build(str(files[0]), shapes_in(files[0]))
    _refuse_states(denoiser, shared, source)
    if not (shared.network.sees_state and not denoiser.network.sees_state):
        _refuse_network(denoiser, shared.network, source)
    elif type(shared.network).at_index is Network.at_index:
        shared.network.at_index(0)  # refuses


def _refuse_states(denoiser: Denoiser, shared: Denoiser, source: str) -> None:
    """Refuse a source that was not trained at these rows, at these noise levels, for this prediction."""
    here, there = denoiser.states, shared.states
    row_there = {t: s for s, t in enumerate(there.index.tolist())}
    indices = {s: int(here.index[s]) for s in denoiser.rows}
    if [t for t in indices.values() if t not in row_there]:
        raise InputError(f"warm_start: {source} must be one network that has indices {list(indices.values())}")
    if here.made_of != there.made_of or here.K != there.K:
        raise InputError(
            f"warm_start: the states of {source} are made of [{there.made_of or 'x_0'}], this table's of "
            f"[{here.made_of or 'x_0'}]"
        )
    if not all(torch.allclose(here.log_snr[s], there.log_snr[row_there[t]]) for s, t in indices.items()):
        raise InputError(
            f"warm_start: {source} was trained with other noise levels at indices {list(indices.values())}"
        )
    strange = [t for t in indices.values() if row_there[t] not in shared.rows]
    if strange and (shared.network.sees_state or denoiser.network.sees_state):
        owned = [int(there.index[s]) for s in shared.rows]
        raise InputError(
            f"warm_start: {source} was trained at indices {owned}, not at {strange}; only a time-agnostic expert may "
            "start as one of another state, if that is time-agnostic, too"
        )
    if type(shared.objective) is not type(denoiser.objective):
        raise InputError(
            f"warm_start: {source} predicts {shared.objective.prediction}, this model {denoiser.objective.prediction}"
        )


def _refuse_network(denoiser: Denoiser, network: Network, source: str) -> None:
    """Refuse another network, but for its conditioning."""
    theirs, mine = (identity(spec(n))["init_args"] | {"conditioning": 0} for n in (network, denoiser.network))
    if theirs != mine:
        raise InputError(f"warm_start: {source} holds another network: {spec(network)} is not {spec(denoiser.network)}")
