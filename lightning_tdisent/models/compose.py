"""Composites on disk: find the files of a model, compose experts into a folder with a manifest, and load them."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lightning_tdisent.artifacts import shapes_in
from lightning_tdisent.diffusion.spec import build, changed
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import expand, output_path, remove_orphans, typed, whole, write_whole
from lightning_tdisent.models.agreement import ALLOWED, differing, facts_of_card, ownership, refuse_unfit
from lightning_tdisent.models.card import Card, has_card, read_card, refuse_foreign
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.expert import check_finite, fitting_pieces, load_expert
from lightning_tdisent.models.residency import Member, Residency, offloaded
from lightning_tdisent.runs import CHECKPOINTS, WEIGHTS, checkpoints_in
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.schemas import check_schema, parse_json

MANIFEST, SCHEMA = "composite.json", 1


def _find_filler(fill: str, first: Card, rows: list[int]) -> Member | None:
    """Return the file of the shared model in ``shared:PATH``, which will serve these rows; None for ``nearest``.

    first: card of one of the experts. Raises InputError for a model that does not fit, with all reasons.
    """
    kind, _, path = fill.partition(":")
    if fill == "nearest" or not rows:
        return None
    if kind != "shared" or not path:
        raise InputError(f"fill {fill!r}: choose nearest, or shared:PATH with the file or run of a shared model")
    files = find_files(path)
    if len(files) > 1:
        raise InputError(f"fill {fill}: {len(files)} files are there; it must be one network")
    card = read_card(files[0], verify=True)
    mine, theirs = facts_of_card(first), facts_of_card(card)
    fields = ("image range", "network input", "training data", "weights")
    problems = [f"{k} is {theirs[k]}, the experts have {mine[k]}" for k in fields if mine[k] != theirs[k]]
    here, there = build(first.states, LatentStates), build(card.states, LatentStates)
    if here.made_of != there.made_of or here.K != there.K:
        layouts = [states.made_of or "x_0" for states in (there, here)]
        problems.append(f"its states are made of [{layouts[0]}], those of the experts of [{layouts[1]}]")
    owned = {int(there.index[s]): s for s in card.rows}
    if none := [t for s in rows if (t := int(here.index[s])) not in owned]:
        problems.append(f"it owns no states of the original indices {', '.join(map(str, none))}")
    problems += [
        f"{found[0]} at index {t} is {found[2]}, the experts have {found[1]}"
        for s in rows
        if (t := int(here.index[s])) in owned and (found := here.difference(s, there, owned[t]))
    ]
    if problems:
        raise InputError(f"{files[0]} cannot fill rows {rows}:\n" + "\n".join(f"  - {p}" for p in problems))
    return Member(files[0], card, rows)


def refuse_taken(out: Path) -> None:
    """Raise InputError for a folder that is not empty, except for remains of an interrupted `compose`.

    Temporary files among these are removed.
    """
    if out.suffix == ".zip":
        raise InputError(f"{out}: a composite is a folder; choose a name without .zip")
    if (out / MANIFEST).exists():
        raise InputError(f"{out} already holds a composite; remove it or choose another name")
    remove_orphans(out, "rows_*")
    if others := [p.name for p in sorted(out.glob("*")) if not p.match("rows_*.safetensors")]:
        raise InputError(
            f"{out} holds other files ({', '.join(others[:3])}{', ..' * (len(others) > 3)}), and would be a composite "
            "afterwards; choose a new folder"
        )


def compose(paths: Sequence[str | Path], out: str | Path, fill: str | None = None, allow: Sequence[str] = ()) -> Path:
    """Write a composite folder from files or folders of experts: a manifest, and their files (hard-linked if possible).

    Everything is checked from the cards before any weights are read or anything is written.

    paths: files of experts, or folders that `find_files` accepts.
    out: the folder, which must contain nothing else.
    fill: ``nearest`` or ``shared:PATH``: rows may be missing. The manifest then marks the folder as a preview, and
        ``fill`` must be given again when it is loaded.
    allow: fields of `ALLOWED` in which experts may differ; the manifest records the differences, and they are reported
        with all results of the composite.

    Returns the path written. Raises InputError for experts that cannot be composed.
    """
    out = output_path(expand(str(out), "out"))
    files = sorted((f for p in map(local, paths) for f in (find_files(p) if p.is_dir() else [p])), key=str)
    if begun := [str(file) for file in files if file.suffix == ".ckpt"]:
        raise InputError(
            f"{', '.join(begun)}: checkpoints are not composed; finish these trainings, or export each first: "
            f"{typed('export', begun[0], '--out', 'FOLDER')}"
        )
    cards = _read_cards(files)
    facts = [facts_of_card(c) for c in cards]
    missing = refuse_unfit([str(p) for p in files], facts, fill is not None, allow)
    filler = _find_filler(fill, cards[0], missing) if fill else None
    _read_cards(files, verify=True)
    _refuse_unloadable(files, cards)
    for file in files:
        check_finite(file)
    refuse_taken(out)
    out.mkdir(parents=True, exist_ok=True)
    members = []
    for path, card in sorted(zip(files, cards, strict=True), key=lambda pair: pair[1].rows):
        name = "rows_" + "-".join(f"{s:04d}" for s in dict.fromkeys((card.rows[0], card.rows[-1]))) + ".safetensors"
        if not (out / name).exists() or not (out / name).samefile(path):
            (out / name).unlink(missing_ok=True)
            try:
                os.link(os.path.realpath(path), out / name)  # link to the file itself, not to a symbolic link
            except OSError:
                with whole(out / name) as copy, Path(path).open("rb") as source:
                    shutil.copyfileobj(source, copy, 1 << 20)
        members.append({"rows": card.rows, "file": name, "sha256": sha256(out / name)})
    manifest: dict[str, Any] = {"schema": SCHEMA, "fingerprint": cards[0].fingerprint, "experts": members}
    if differs := differing(facts, allow):
        manifest["differs"] = differs
    if missing:
        manifest["preview"] = {"missing": missing, "fill": fill, "sha256": sha256(filler.path) if filler else None}
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    return out


def recompose(paths: Sequence[str | Path], out: Path) -> bool:
    """Write a composite folder as `compose` does, unless it is complete and consists of exactly these weights.

    Returns whether it replaced another composite.
    """
    stale = (out / MANIFEST).exists()
    if stale:
        try:
            listed = [sha256(path) for path in composite_files(out)]
        except InputError:  # damaged
            listed = []
        if sorted(listed) == sorted(sha256(path) for path in paths):
            return False
        (out / MANIFEST).unlink()
        for old in out.glob("rows_*.safetensors"):
            old.unlink()
    compose(paths, out)
    return stale


def discard_damaged(out: Path) -> bool:
    """Remove the manifest of a composite folder whose files are damaged, so that `recompose` writes it again.

    Returns whether it was damaged.
    """
    if not (out / MANIFEST).exists():
        return False
    try:
        composite_files(out)
    except InputError:
        (out / MANIFEST).unlink(missing_ok=True)
        return True
    return False


def refuse_damaged(sources: Sequence[str | Path]) -> None:
    """Raise InputError for weights whose bytes differ from those written, for all files at once.

    sources: names that `find_files` accepts.
    """
    problems: dict[str, None] = {}
    for source in sources:
        try:
            files = find_files(source)
        except InputError as error:
            problems[str(error)] = None
            continue
        # `find_files` has verified those of a composite; a checkpoint is verified whenever it is read
        for file in () if (Path(source) / MANIFEST).exists() else [f for f in files if f.suffix == ".safetensors"]:
            try:
                read_card(file, verify=True)
            except InputError as error:
                problems[str(error)] = None
    if problems:
        raise InputError("\n".join(problems))


def _refuse_unloadable(files: Sequence[Path], cards: Sequence[Card]) -> None:
    """Raise InputError for all files whose weights do not fit the network of their card; no weights are read."""
    kinds: dict[str, Denoiser] = {}
    problems = []
    for path, card in zip(files, cards, strict=True):
        try:
            kind = json.dumps(card.network)
            if kind not in kinds:
                kinds[kind] = card.build(str(path), shapes_in(path))
            fitting_pieces(path, kinds[kind])
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("these files could be composed, but not loaded:\n" + "\n".join(f"  - {p}" for p in problems))


def local(source: str | Path) -> Path:
    """Return the path of a model with ``~``, variables and ``file://`` expanded; raises InputError for other URLs."""
    text = expand(str(source))
    if "://" in text:
        raise InputError(f"{text}: weights are read from local files; copy them here, and name the file or folder")
    return Path(text)


def _read_cards(files: Sequence[Path], verify: bool = False) -> list[Card]:
    """Return the cards of all files; raises InputError with all problems."""
    problems, cards = [], []
    for path in files:
        try:
            cards.append(card := read_card(path, verify))
            parts = [card.states, card.network, card.objective]
            problems += [f"{path}: {line}" for line in changed(parts)]
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("these files cannot be composed:\n" + "\n".join(f"  - {p}" for p in problems))
    return cards


def composite_files(folder: str | Path) -> list[Path]:
    """Return the files of a composite folder, verified against its manifest: bytes, cards and missing rows.

    Raises InputError with all problems of a damaged composite.
    """
    folder = Path(folder)
    content = _manifest(folder)
    members = [(folder / m["file"], m) for m in content["experts"]]
    problems = [f"{path}: missing" for path, _ in members if not path.is_file()]
    problems += [
        f"{path}: sha256 is {found}, the manifest has {m['sha256']}"
        for path, m in members
        if path.is_file() and (found := sha256(path)) != m["sha256"]
    ]
    if not problems:
        cards = [(path, m, read_card(path)) for path, m in members]
        problems += [
            f"{path}: {key.replace('_', ' ')} {found}, the manifest has {said}"
            for path, m, card in cards
            for key, found, said in (
                ("rows", card.rows, m["rows"]),
                ("fingerprint", card.fingerprint, content["fingerprint"]),
            )
            if found != said
        ]
        facts = [facts_of_card(card) for _, _, card in cards]
        if (differ := differing(facts, list(content["differs"]))) != content["differs"]:
            problems.append(f"{folder / MANIFEST}: differs is {content['differs']}, its experts differ in {differ}")
        missing, _ = ownership([m["file"] for m in content["experts"]], [f["rows"] for f in facts], facts[0]["S"] or 0)
        if missing != content["missing"]:
            problems.append(f"{folder / MANIFEST}: says rows {content['missing']} are missing, these are: {missing}")
    if problems:
        raise InputError(
            "this composite is damaged:\n"
            + "\n".join(f"  - {p}" for p in problems)
            + f"\nCopy it again; or remove {folder}, and compose it again from its experts"
        )
    return [path for path, _ in members]


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a manifest: ``experts``, ``fingerprint``, ``differs`` and the ``missing`` rows.

    Raises InputError for another schema, and for content that `compose` does not write.
    """
    path = folder / MANIFEST
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a composite ({type(error).__name__}: {error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a composite: a {type(content).__name__}, not an object")
    check_schema(content, str(path), SCHEMA)
    members, differs = content.get("experts"), content.get("differs", {})
    if not isinstance(members, list) or not members:
        raise InputError(f"{path}: damaged: experts: expected a list of experts, got {members!r:.100}")
    for i, member in enumerate(members):
        kinds = {"rows": list, "file": str, "sha256": str}
        if not isinstance(member, dict) or any(not isinstance(member.get(k), kind) for k, kind in kinds.items()):
            raise InputError(f"{path}: damaged: experts[{i}]: expected rows, file and sha256, got {member!r:.200}")
        if Path(member["file"]).name != member["file"] or "\0" in member["file"]:
            raise InputError(f"{path}: {member['file']!r:.100} is not a file of this folder")
    if len({member["file"] for member in members}) < len(members):
        raise InputError(f"{path}: damaged: experts: the same file stands there twice")
    if not isinstance(content.get("fingerprint"), str):
        raise InputError(f"{path}: damaged: fingerprint: {content.get('fingerprint')!r:.100}")
    if not isinstance(differs, dict) or not set(differs) <= set(ALLOWED):
        raise InputError(f"{path}: damaged: differs: {differs!r:.100}; experts may differ in {', '.join(ALLOWED)}")
    preview = content.get("preview", {"missing": []})
    missing = preview.get("missing") if isinstance(preview, dict) else None
    if not isinstance(missing, list):
        raise InputError(f"{path}: damaged: preview: {preview!r:.100}")
    return {**{k: content[k] for k in ("fingerprint", "experts")}, "differs": differs, "missing": missing}


def find_files(source: str | Path) -> list[Path]:
    """Return the files of weights behind a name.

    It is a file of weights, a run folder, a composite, a folder of runs, or a folder of files of weights.

    Raises InputError if there are none.
    """
    source = local(source)
    if source.suffix == ".zip":
        raise InputError(f"{source}: an archive is not opened here: unpack it, and name the folder")
    if source.is_file():
        return [source]
    if (source / MANIFEST).exists():
        return composite_files(source)
    found = [source / WEIGHTS]
    found = found if found[0].exists() else sorted(source.glob(f"*/{WEIGHTS}")) or _loose(source)
    for file in found:
        refuse_foreign(file)
    if not found:
        checkpoints = sorted([*source.glob("*.ckpt"), *source.glob(f"{CHECKPOINTS}/*.ckpt")])
        raise InputError(
            f"{source}: no weights here. Give a {WEIGHTS}, the folder of a finished run, a folder of experts' "
            "runs, or a composite folder."
            + (f" A checkpoint is taken by its own name, e.g. {checkpoints[-1]}." if checkpoints else "")
        )
    return found


def holds_weights(source: Path) -> bool:
    """Return whether a path is a model; otherwise it is expected to be a folder or file of images."""
    if source.is_file():
        return source.suffix in (".safetensors", ".ckpt")
    kinds = (MANIFEST, WEIGHTS, f"*/{WEIGHTS}")
    return any(any(source.glob(kind)) for kind in kinds) or bool(_loose(source))


def _loose(folder: Path) -> list[Path]:
    """Return the files of weights in a folder by whatever names, such as those received from other machines."""
    return [file for file in sorted(folder.glob("*.safetensors")) if has_card(file)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: its last parts, as many as make all names different.

    The name of a file of weights in a run folder is that of the folder.
    """
    parts = [Path(os.path.abspath(p.parent if p.name == WEIGHTS else p)).parts for p in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]).lstrip("/") or str(path) for part, path in zip(parts, paths, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def newest_of(source: Path) -> Path:
    """Return the newest checkpoint of a run that has no weights yet, and print which; any other path as it is."""
    checkpoints = checkpoints_in(source / CHECKPOINTS)
    if not checkpoints or holds_weights(source):
        return source
    print(f"note: {source} is not finished: its newest checkpoint is used, {checkpoints[-1]}", file=sys.stderr)
    return checkpoints[-1]


def load_model(
    source: str | Path, residency: Residency = "resident", fill: str | None = None, upto: int | float | None = None
) -> Denoiser | CompositeDenoiser:
    """Load a model: one file that owns all rows as a denoiser, several files as a composite.

    Its attribute ``cards`` has the cards of the files.

    source: a name that `find_files` accepts.
    residency: where the experts of a composite are kept (see `residency`).
    fill: ``nearest`` or ``shared:PATH`` to load a preview, in which rows have no owner; see `CompositeDenoiser.filled`.
        The card of the shared model comes last.
    upto: the last row that is needed, or a fraction of the rows; experts of rows above alone are not loaded.

    Raises InputError for files that are damaged or cannot be composed.
    """
    if residency not in get_args(Residency):
        raise InputError(f"residency {residency!r}: choose {', '.join(get_args(Residency))}")
    source = local(source)
    files = find_files(source)
    cards = _read_cards(files) if len(files) > 1 else [read_card(files[0])]
    if len(files) == 1 and (fill is None or len(cards[0].rows) == facts_of_card(cards[0])["S"]):
        one = load_expert(files[0])[0]
        one.cards = cards
        return one
    checked = (source / MANIFEST).exists()  # `find_files` has verified it
    allow = list(_manifest(source)["differs"]) if checked else []
    facts = [facts_of_card(c) for c in cards]
    last = build(cards[0].states, LatentStates).truncate(upto).S if upto is not None else None
    missing = refuse_unfit([str(f) for f in files], facts, fill is not None, allow, last)
    used = [i for i, card in enumerate(cards) if last is None or card.rows[0] <= last]
    files, cards, facts = [files[i] for i in used], [cards[i] for i in used], [facts[i] for i in used]
    filler = _find_filler(fill, cards[0], missing) if fill else None
    members = [Member(f, c, c.rows) for f, c in zip(files, cards, strict=True)]
    experts: list[Denoiser] = []
    stand_in: Denoiser | None = None
    if residency == "resident":
        experts += [load_expert(f, not checked)[0] for f in files]
        if filler:
            shared = load_expert(filler.path, verify=False)[0]
            stand_in = Denoiser(shared.network, shared.objective, experts[0].states, missing)
    else:
        if not checked:
            _read_cards(files, verify=True)
        experts += offloaded([*members, filler] if filler else members, residency)
        stand_in = experts.pop() if filler else None
    composite = CompositeDenoiser(experts, stand_in or ("nearest" if fill else None), allow, last).eval()
    composite.differs = differing(facts, allow)
    composite.cards = [*cards, filler.card] if filler else cards
    return composite
