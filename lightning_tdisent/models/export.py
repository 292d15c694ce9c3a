"""Export models for use elsewhere: safetensors with plain JSON, or a pipeline of diffusers.

Import this module before loading a pipeline of several networks, `Experts`, with diffusers: diffusers does not import a
class because a folder names it.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMPipeline, DDIMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

import lightning_tdisent
from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import output_path, typed, write_whole
from lightning_tdisent.models.card import Card
from lightning_tdisent.models.compose import compose, find_files, load_model
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.cost import training_cost
from lightning_tdisent.models.expert import save_expert
from lightning_tdisent.models.truncated import signal_note
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.runs import WEIGHTS
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.guidance import extras

PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def export(source: str | Path, out: str | Path, form: Literal["safetensors", "diffusers"] = "safetensors") -> Path:
    """Write a model that `load_model` can load as a folder with weights, config.json and README.md.

    source: name of the model.
    out: the folder; raises InputError if it is not empty.
    form: ``safetensors`` writes model.safetensors, or one file per expert with composite.json; `load_model` reads it
        again, bit for bit. ``diffusers`` writes a DDIMPipeline, for unconditional models of images that own every row
        of their table.

    Returns the folder.
    """
    out = output_path(out)
    if form not in ("safetensors", "diffusers"):
        raise InputError(f"--format {form}: safetensors or diffusers")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; choose another folder")
    model = load_model(source)
    cards = model.cards
    config = describe(model, cards)
    if form == "diffusers":
        pipe = pipeline(model)
        pipe.save_pretrained(out)
        loading = _DIFFUSERS.format(
            first=_IMPORT if isinstance(pipe.unet, Experts) else "", S=model.states.S, shape=model.shape
        )
        # safetensors writes files that only their owner can read; give them the mode of other files
        mode = (out / "model_index.json").stat().st_mode & 0o777
        for file in out.rglob("*.safetensors"):
            file.chmod(mode)
    else:
        whole = not isinstance(model, Denoiser) or list(model.rows) == list(model.states.rows)
        loading = _SAFETENSORS.format(
            imports="".join(f"    import {name}  # has the network's class\n" for name in _modules(cards)),
            drawn=_DRAWN if whole and model.states.observation is None else "",
            command=_command(model, cards)
            if whole
            else "Compose it with the experts of the other rows to draw images.",
        )
        if isinstance(model, Denoiser):
            save_expert(out / WEIGHTS, model, cards[0])
        else:
            compose(find_files(source), out, allow=list(model.differs))
    if note := signal_note(model):
        loading += f"\nNote: {note}.\n"
    config["files"] = {file.relative_to(out).as_posix(): sha256(file) for file in sorted(out.rglob("*.safetensors"))}
    write_whole(out / "config.json", json.dumps(config, indent=1, allow_nan=False).encode())
    write_whole(out / "README.md", _readme(config, form, loading).encode())
    return out


_SAFETENSORS = """
Without Lightning, with the package:

{imports}    from lightning_tdisent.models.compose import load_model

    model = load_model("FOLDER")  # checks the table, the rows and every byte
    cards = model.cards
{drawn}
{command} Without the package: the tensors are plain safetensors with
the names of `network`'s modules in config.json, and the table there holds all that a sampler needs.
"""

_DRAWN = """
    from lightning_tdisent.sampling.sampler import DDIM
    from lightning_tdisent.sampling.sample import sample

    images = next(sample(model, DDIM(), seeds=range(16)))  # uint8
"""

_DIFFUSERS = """
    {first}from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("FOLDER")
    images = pipe(batch_size=16, num_inference_steps={S}, use_clipped_model_output=True).images

Choose a number of steps that divides {S}: for others diffusers' scheduler steps to levels that the network is not asked
at next. `use_clipped_model_output` takes the noise that fits the clipped image, as this model's own sampler does.

`DDIMPipeline` calls `DDIMScheduler` alone. Others go into a loop of your own:

    import torch
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps({S})
    x = torch.randn(16, *{shape})
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    images = (x.clamp(-1, 1) + 1) / 2

- `DDIMScheduler`, `DDPMScheduler`, `DPMSolverMultistepScheduler` and `UniPCMultistepScheduler` work so. The last two do
  not clip the estimate of the image at each step, as `DDIMScheduler` here and this model's own samplers do
  (`clip_sample`): their images differ from those, and may leave [-1, 1] before the clamp.
- `EulerDiscreteScheduler`, `EulerAncestralDiscreteScheduler`, `HeunDiscreteScheduler`, `LMSDiscreteScheduler` and
  `KDPM2DiscreteScheduler` do not work: their timesteps are floating-point numbers, and the network takes whole ones.
- `PNDMScheduler` runs, but asks beside the rows that the network was trained for.

diffusers does not check its images: where float16 overflows it draws black ones without an error. Load the pipeline in
float32 or bfloat16, or look at the output of `output_type="np"` for NaN.
"""
_IMPORT = "import lightning_tdisent.models.export  # routes rows to networks; diffusers imports nothing itself\n    "


def _modules(cards: Sequence[Card]) -> list[str]:
    """Return the modules outside this package that define the networks."""
    names = {card.network["class_path"].rpartition(".")[0] for card in cards}
    return sorted(name for name in names if name.split(".")[0] != lightning_tdisent.__name__)


def _command(model: Denoiser | CompositeDenoiser, cards: Sequence[Card]) -> str:
    """Return a sentence with the command that generates images."""
    words = [word for name in _modules(cards) for word in ("--import", name)]
    words += [] if model.states.observation is None else ["--observe", "DATA"]
    return f"Draw images with `{typed('sample', 'FOLDER', '--out', 'images', *words)}`."


def describe(model: Denoiser | CompositeDenoiser, cards: Sequence[Card]) -> dict[str, Any]:
    """Return all facts about a model as plain JSON: its table row by row, how it was trained, and the cost.

    A state is x = signal x_0 + noise eps. ``log_snr`` is null where no signal is left. ``index`` is the level in the
    chain, ``time`` the input of a network that sees the state.
    """
    cards = sorted(cards, key=lambda card: card.rows)
    states = model.states
    columns = (states.index, states.time, states.log_snr)
    table = zip(states.rows, *(column[1:].tolist() for column in columns), strict=True)
    a, b = states.a.tolist(), states.b.tolist()
    return {
        "format": "lightning_tdisent",
        "version": lightning_tdisent.__version__,
        "shape": model.shape,
        "classes": model.classes,
        "image_range": cards[0].image_range,
        "prediction": " and ".join(dict.fromkeys(model.at(card.rows[0]).objective.prediction for card in cards)),
        "T": states.schedule.T,
        "S": states.S,
        "fingerprint": states.fingerprint,
        "table": [
            {
                "row": s,
                "index": t,
                "time": time,
                "log_snr": [x if math.isfinite(x) else None for x in L],
                "signal": a[s],
                "noise": b[s],
            }
            for s, t, time, L in table
        ],
        "cost": training_cost(cards),
        "experts": [dataclasses.asdict(card) for card in cards],
    }


def pipeline(model: Denoiser | CompositeDenoiser) -> DDIMPipeline:
    """Return a diffusers DDIMPipeline of an unconditional model of images; its timestep is the row minus 1.

    One U-Net becomes a `UNet2DModel` with the same output bit for bit, anything else `Experts`. Raises InputError, with
    all reasons, for models that this pipeline cannot sample.
    """
    states, filled = model.states, list(extras(model).filled)
    rows = model.rows if isinstance(model, Denoiser) else states.rows
    unknown = sorted({model.at(s).objective.prediction for s in rows} - PREDICTION.keys())
    why = {
        "it has classes, and DDIMPipeline gives no labels": model.classes is not None,
        f"it makes {model.shape}, and DDIMPipeline draws images of 1 or 3 channels": model.shape[0] not in (1, 3),
        f"it owns rows {rows} of 1..{states.S} only": rows != states.rows,
        f"it is a preview without rows {filled}": bool(filled),
        f"its table has {states.K} columns, a scheduler of diffusers one": states.K > 1,
        "its table is not variance preserving, and that of DDIMScheduler is": not states.variance_preserving,
        f"diffusers does not know {', '.join(unknown)}": bool(unknown),
        "its experts predict different things": "parametrisation" in extras(model).differs,
    }
    if any(why.values()):
        raise InputError("cannot be exported as a diffusers pipeline: " + "; ".join(k for k, v in why.items() if v))
    owners = [model.at(s) for s in rows]
    scheduler = DDIMScheduler(
        num_train_timesteps=states.S,
        trained_betas=betas(states),
        clip_sample=True,
        timestep_spacing="trailing",
        prediction_type=PREDICTION[owners[0].objective.prediction],
    )
    network = owners[0].network
    if isinstance(model, Denoiser) and type(network) is UNet:
        return DDIMPipeline(standard(network, states), scheduler)
    experts = list(dict.fromkeys(owners))
    unet = Experts(
        [spec(e.network) for e in experts],
        [experts.index(owner) for owner in owners],
        states.time[1:].tolist(),
        model.shape[0],
        model.shape[1:],
    )
    for mine, theirs in zip(unet.experts, experts, strict=True):
        mine.load_state_dict(theirs.network.state_dict(), assign=True)
    return DDIMPipeline(unet.eval(), scheduler)


def betas(states: Table) -> list[float]:
    """Return betas of a variance-preserving table, so that diffusers' products of 1 - beta are alpha-bar of rows 1..S.

    beta_s = 1 - abar_s / prod_{r<s} (1 - beta_r) with the rounded earlier betas, so that errors do not accumulate:
    abar_s is within 1e-7 abar_{s-1}.
    """
    out, product = list[float](), 1.0
    for alpha_bar in states.a[1:, 0].square().tolist():
        beta = torch.tensor(1 - alpha_bar / product, dtype=torch.float32)
        out.append(float(beta))
        product *= float(1 - beta)
    return out


@torch.no_grad()
def standard(network: UNet, states: Table) -> UNet2DModel:
    """Return the same U-Net as a diffusers `UNet2DModel`, with timesteps 0..S-1 for the rows 1..S.

    Its timestep embedding is a table (``learned``): the sinusoids of the rows' times, or zeros for a
    time-agnostic network, whose other missing weights are zeros, too.
    """
    config = {name: value for name, value in network.net.config.items() if not name.startswith("_")}
    net = UNet2DModel(**{**config, "time_embedding_type": "learned", "num_train_timesteps": states.S})
    zeros = {name: torch.zeros_like(value, dtype=network.net.dtype) for name, value in net.state_dict().items()}
    weights = zeros | network.net.state_dict()
    if network.sees_state:
        weights["time_proj.weight"] = network.net.time_proj(states.time[1:])
    net.load_state_dict(weights, assign=True)
    return net.eval()


class Experts(UNet2DModel):  # type: ignore[misc]
    """Several networks as one diffusers model, which its pipelines use as a `UNet2DModel`.

    networks: class paths with arguments; see `spec.build` for allowed classes.
    owner: for every row 1..S, the position of its network in ``networks``.
    index: time input of every row.
    in_channels, sample_size: of the images.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        networks: list[dict[str, Any]],
        owner: list[int],
        index: list[int | float],
        in_channels: int,
        sample_size: list[int],
    ) -> None:
        ModelMixin.__init__(self)
        if len(owner) != len(index) or set(owner) != set(range(len(networks))):
            raise InputError(f"{len(networks)} networks cannot own {len(index)} rows as {owner}")
        self.experts = nn.ModuleList([build(network, Network) for network in networks])
        self.owner, self.index = list(owner), list(index)

    def forward(
        self, sample: Tensor, timestep: Tensor | int, class_labels: None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the raw output of the owner of row timestep + 1, for the whole batch.

        Raises InputError for a timestep that is not an integer in 0..S-1.
        """
        whole = isinstance(timestep, int) or not timestep.is_floating_point()
        if not whole or not 0 <= int(timestep) < len(self.owner):
            raise InputError(
                f"timestep {timestep}: this model takes whole numbers from 0 to {len(self.owner) - 1}; schedulers that "
                "ask between them (Euler, Heun, LMS) do not work"
            )
        network = self.experts[self.owner[int(timestep)]]
        index = None
        if network.sees_state:
            index = torch.full((len(sample),), self.index[int(timestep)], device=sample.device)
        raw = network(sample, index if network.sees_state else None, None)
        return UNet2DOutput(sample=raw) if return_dict else (raw,)


def _readme(config: dict[str, Any], form: str, loading: str) -> str:
    """Return the text of the model card (README.md)."""
    cost, experts = config["cost"], config["experts"]
    drawn = config["classes"] is None and config["shape"][0] in (1, 3)
    rows = ", ".join(f"{e['rows'][0]}..{e['rows'][-1]}" if len(e["rows"]) > 1 else str(e["rows"][0]) for e in experts)
    same = all(e["network"] == experts[0]["network"] for e in experts)
    network = experts[0]["network"]["class_path"].rpartition(".")[2] if same else "of several kinds"
    sources = sum("weight" in p for e in experts for p in e["parents"])
    facts = {
        "networks": f"{len(experts)} ({network})" + (f", averages of {sources} experts" if sources else ""),
        "rows owned": f"{rows} of 1..{config['S']}, of a chain of T = {config['T']}",
        "table": f"{config['fingerprint']}, listed in config.json",
        "says": f"{config['prediction']}, for x_0 in {config['image_range']}",
        "makes": f"{config['shape']} (channels, height, width), classes: {config['classes'] or 'none'}",
        "weights": ", ".join(sorted({e["weights"] for e in experts})),
        "training data": f"digest {experts[0]['data']}",
        "images seen": f"{cost['images_seen']:,.0f} in all, {cost['images_seen_longest']:,.0f} by the longest training",
        "training": f"{cost['training_flops']:.3g} operations, {cost['training_seconds']:,.0f} s",
        "validation": f"{cost['validation_flops']:.3g} operations, {cost['validation_seconds']:,.0f} s",
        "total compute": f"{cost['total_flops']:.3g} floating point operations, validation included",
    }
    return "\n".join(
        [
            "---",
            f"library_name: {'diffusers' if form == 'diffusers' else 'lightning_tdisent'}",
            *(["pipeline_tag: unconditional-image-generation"] if drawn else []),
            "tags: [diffusion, few-latent-states]",
            "---",
            f"# A diffusion model over {config['S']} latent states",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {fact} |" for name, fact in facts.items()),
            "",
            "## How to load it",
            loading,
        ]
    )
