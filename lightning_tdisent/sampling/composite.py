"""`CompositeDenoiser`: experts behind one denoiser. The sampler cannot tell the difference."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.expert import Card, load_expert, read_card, sha256

MANIFEST = "composite.json"


class CompositeDenoiser(nn.Module):
    """Routes every row to the expert that owns it: composite(x, s) = experts[owner(s)](x, s).

    Refuses experts that do not own every row exactly once, or whose tables, shapes or classes differ.
    """

    def __init__(self, experts: Sequence[Denoiser]) -> None:
        super().__init__()
        refuse_unfit([f"expert {i}" for i in range(len(experts))], [_facts(e) for e in experts])
        self.experts = nn.ModuleList(experts)
        self.states: LatentStates = experts[0].states
        self.shape, self.classes = experts[0].shape, experts[0].classes
        self._owner = {s: expert for expert in experts for s in expert.rows}

    def at(self, s: int) -> Denoiser:
        """Return the owner of row s."""
        if s not in self._owner:
            raise InputError(f"row {s} is not among the latent rows 1..{self.states.S}")
        return self._owner[s]

    def forward(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        """x0_hat of the owner of row s, for the whole batch."""
        out: Tensor = self.at(s)(x, s, label)
        return out


def _facts(expert: Denoiser) -> dict[str, Any]:
    return {
        "rows": expert.rows,
        "S": expert.states.S,
        "table": expert.states.fingerprint,
        "parametrisation": type(expert.objective).__name__,
        "network input": {"shape": expert.shape, "classes": expert.classes},
    }


def _card_facts(card: Card) -> dict[str, Any]:
    network = card.network["init_args"]
    states = card.states["init_args"]
    return {
        "rows": card.rows,
        "S": states["S"],
        "table": f"{card.fingerprint} ({_brief(states)})",
        "parametrisation": card.objective["class_path"].rpartition(".")[2],
        "image range": card.image_range,
        "network input": {"shape": network.get("shape"), "classes": network.get("classes")},
        "training data": card.data,
        "weights": card.weights,
    }


def _brief(states: dict[str, Any]) -> str:
    schedule = states["schedule"]
    arguments = ", ".join(f"{k}={v}" for k, v in schedule["init_args"].items())
    return f"S={states['S']} {states['kind']} of {schedule['class_path'].rpartition('.')[2]}({arguments})"


def refuse_unfit(names: Sequence[str], facts: Sequence[dict[str, Any]]) -> None:
    """Refuse a set of experts that cannot be composed, naming every offender at once with both values.

    What most experts agree on is taken as right; the rows 1..S must be owned exactly once.
    """
    if not facts:
        raise InputError("no experts to compose")
    problems = []
    for field in facts[0]:
        if field == "rows":
            continue
        common = Counter(json.dumps(f[field]) for f in facts).most_common(1)[0][0]
        for name, fact in zip(names, facts, strict=True):
            if json.dumps(fact[field]) != common:
                problems.append(f"{name}: {field} is {json.dumps(fact[field])}, the others have {common}")
    S = Counter(f["S"] for f in facts).most_common(1)[0][0]
    owners: dict[int, list[str]] = {s: [] for s in range(1, S + 1)}
    for name, fact in zip(names, facts, strict=True):
        for s in fact["rows"]:
            owners.setdefault(s, []).append(name)
    missing = [s for s, who in owners.items() if not who]
    if missing:
        problems.append(f"no expert owns row{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of 1..{S}")
    problems += [f"row {s} is owned by {' and '.join(who)}" for s, who in owners.items() if len(who) > 1]
    if problems:
        raise InputError(f"these {len(facts)} experts cannot be composed:\n" + "\n".join(f"  - {p}" for p in problems))


def compose(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Write a composite folder from files of experts: a manifest, and every file (hard-linked where possible).

    Everything is checked on the cards alone, before any weights are read or anything is written.
    """
    files = sorted((Path(p) for p in paths), key=str)
    cards = _read_cards(files)
    refuse_unfit([str(p) for p in files], [_card_facts(c) for c in cards])
    _read_cards(files, verify=True)
    out = Path(out)
    if (out / MANIFEST).exists():
        raise InputError(f"{out} already holds a composite; remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    members = []
    for path, card in sorted(zip(files, cards, strict=True), key=lambda pair: pair[1].rows):
        name = "rows_" + "-".join(f"{s:04d}" for s in dict.fromkeys((card.rows[0], card.rows[-1]))) + ".safetensors"
        if not (out / name).exists() or not (out / name).samefile(path):
            (out / name).unlink(missing_ok=True)
            try:
                os.link(path, out / name)
            except OSError:
                shutil.copyfile(path, out / name)
        members.append({"rows": card.rows, "file": name, "sha256": sha256(out / name)})
    manifest = {"schema": 1, "fingerprint": cards[0].fingerprint, "experts": members}
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    return out


def _read_cards(files: Sequence[Path], verify: bool = False) -> list[Card]:
    """Cards of all files, or all that is wrong with them."""
    problems, cards = [], []
    for path in files:
        try:
            cards.append(read_card(path, verify))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("these files cannot be composed:\n" + "\n".join(f"  - {p}" for p in problems))
    return cards


def composite_files(folder: str | Path) -> list[Path]:
    """Files of a composite folder, after checking each against the manifest's digest."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        members = [(folder / m["file"], m["sha256"]) for m in manifest["experts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST}: not a composite ({type(error).__name__}: {error})") from None
    problems = [f"{path}: missing" for path, _ in members if not path.is_file()]
    problems += [
        f"{path}: sha256 is {found}, the manifest has {digest}"
        for path, digest in members
        if path.is_file() and (found := sha256(path)) != digest
    ]
    if problems:
        raise InputError("this composite is damaged:\n" + "\n".join(f"  - {p}" for p in problems))
    return [path for path, _ in members]


def find_files(source: str | Path) -> list[Path]:
    """Files of weights behind a name: a .safetensors file, a run folder, a composite folder, or a folder of runs."""
    source = Path(source)
    if source.is_file():
        return [source]
    if (source / MANIFEST).exists():
        return composite_files(source)
    if (source / "model.safetensors").exists():
        return [source / "model.safetensors"]
    found = sorted(source.glob("*/model.safetensors"))
    if not found:
        raise InputError(
            f"{source}: no weights here. Give a model.safetensors, the folder of a finished run, a folder of experts' "
            "runs, or a composite folder."
        )
    return found


def holds_weights(source: Path) -> bool:
    """Whether a name stands for a model; else it must be a folder or file of images."""
    if source.is_file():
        return source.suffix in (".safetensors", ".ckpt")
    return (
        (source / MANIFEST).exists() or any(source.glob("model.safetensors")) or any(source.glob("*/model.safetensors"))
    )


def load_model(source: str | Path) -> tuple[Denoiser | CompositeDenoiser, list[Card]]:
    """Load whatever `find_files` finds: one file that owns all rows as it is, several as a composite."""
    files = find_files(source)
    cards = [read_card(f) for f in files]
    if len(files) > 1:
        refuse_unfit([str(f) for f in files], [_card_facts(c) for c in cards])
        checked = (Path(source) / MANIFEST).exists()
        return CompositeDenoiser([load_expert(f, not checked)[0] for f in files]).eval(), cards
    return load_expert(files[0])[0], cards


def start_warm(denoiser: Denoiser, source: str) -> list[dict[str, Any]]:
    """Give a denoiser the weights of another run whose table has its rows at the same values.

    A network that sees the state takes them as they are; a time-agnostic one takes those of the source at its row,
    with the time embedding folded in, so that both say the same there. Returns what the source cost, for the card.
    """
    shared, cards = load_model(source)
    here, there = denoiser.states, shared.states
    row_there = {t: s for s, t in enumerate(there.index.tolist())}
    indices = {s: int(here.index[s]) for s in denoiser.rows}
    missing = [t for t in indices.values() if t not in row_there]
    if missing or not isinstance(shared, Denoiser):
        raise InputError(f"warm_start: {source} must be one network that has indices {list(indices.values())}")
    if not all(torch.allclose(here.log_snr[s], there.log_snr[row_there[t]]) for s, t in indices.items()):
        raise InputError(
            f"warm_start: {source} was trained with other noise levels at indices {list(indices.values())}"
        )
    if type(shared.objective) is not type(denoiser.objective):
        raise InputError(
            f"warm_start: {source} predicts {shared.objective.prediction}, this model {denoiser.objective.prediction}"
        )
    network = shared.network
    if network.sees_state and not denoiser.network.sees_state:
        network = network.at_index(indices[denoiser.rows[0]])
    if spec(network)["init_args"] | {"conditioning": 0} != spec(denoiser.network)["init_args"] | {"conditioning": 0}:
        raise InputError(f"warm_start: {source} holds another network: {spec(network)} is not {spec(denoiser.network)}")
    denoiser.network.load_state_dict(network.state_dict())
    cost = {k: getattr(cards[0], k) for k in ("network", "images_seen", "seconds")}
    return [*cards[0].parents, {"sha256": sha256(find_files(source)[0]), **cost}]
