"""Warm start: initialise a training with the weights of another run."""

from pathlib import Path
from typing import Any

from lightning_tdisent.artifacts import shapes_in
from lightning_tdisent.diffusion.spec import identity, spec
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.card import PARENT, read_card
from lightning_tdisent.models.compose import find_files, load_model
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.denoiser import Denoiser


def start_warm(denoiser: Denoiser, source: str) -> list[dict[str, Any]]:
    """Load the weights of another run, whose table has the rows of this denoiser with the same values.

    If both networks see the state, weights are copied. A time-agnostic network gets those of a source that sees the
    state with the time embedding at its row folded in, so that both have the same output there, or those of a
    time-agnostic expert, copied, even of another row of the table.

    source: name of the run or its weights; it must be one network.

    Returns the cost of the source and of its parents, for the card. Raises InputError for a source that does not fit.
    """
    shared = load_model(source)
    cards = shared.cards
    rows = [int(t) for t in denoiser.states.index[denoiser.rows]]
    if not isinstance(shared, Denoiser):
        raise InputError(f"warm_start: {source} must be one network that has indices {rows}")
    _refuse_states(denoiser, shared, source)
    network = shared.network
    if network.sees_state and not denoiser.network.sees_state:
        network = network.at_time(shared.states.time[shared.states.index.tolist().index(rows[0])].item())
    _refuse_network(denoiser, network, source)
    denoiser.network.load_state_dict(network.state_dict())
    card = cards[0]
    cost = {k: getattr(card, k) for k in PARENT}
    average = card.average or {}
    cost["steps"] = int(average.get("steps", card.steps) + average.get("before", 0))
    return [*card.parents, {"sha256": sha256(find_files(source)[0]), **cost, "rows": card.rows}]


def refuse_start(denoiser: Denoiser, source: str) -> None:
    """Raise InputError, from the card of one file of weights, in the cases in which `start_warm` would.

    Other sources (several files, checkpoints) are not checked.
    """
    files = find_files(source)
    if len(files) > 1 or Path(files[0]).suffix != ".safetensors":
        return
    shared = read_card(files[0]).build(str(files[0]), shapes_in(files[0]))
    _refuse_states(denoiser, shared, source)
    if not (shared.network.sees_state and not denoiser.network.sees_state):
        _refuse_network(denoiser, shared.network, source)
    elif type(shared.network).at_time is Network.at_time:
        shared.network.at_time(0)  # raises InputError


def _refuse_states(denoiser: Denoiser, shared: Denoiser, source: str) -> None:
    """Raise InputError for a source trained at other rows, noise levels or states, or for another prediction."""
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
    for s, t in indices.items():
        if found := here.difference(s, there, row_there[t]):
            raise InputError(
                f"warm_start: {source} was trained with other noise levels: {found[0]} at index {t} is {found[2]}, in "
                f"this table {found[1]}"
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
    """Raise InputError for a network that differs in more than its conditioning."""
    theirs, mine = (identity(spec(n))["init_args"] | {"conditioning": 0} for n in (network, denoiser.network))
    if theirs != mine:
        raise InputError(f"warm_start: {source} holds another network: {spec(network)} is not {spec(denoiser.network)}")
