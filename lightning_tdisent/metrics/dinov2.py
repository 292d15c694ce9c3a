"""DINOv2's class token, for FD-DINOv2: a network trained without labels, whose blind spots differ from Inception's."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_tdisent.digests import sha256 as file_digest
from lightning_tdisent.errors import InputError, Unavailable, nearest
from lightning_tdisent.files import expand
from lightning_tdisent.metrics.inception import AT_ONCE, pil_bicubic
from lightning_tdisent.metrics.network import Extracted, FeatureNetwork

SIDE = 224
RESIZES = ("pil_bicubic_uint8", "torch_bicubic")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VITL14 = (1024, 24, 14)
_GET = (
    "take config.json and model.safetensors of facebook/dinov2-large from the Hugging Face hub (on a machine with a "
    "network: hf download facebook/dinov2-large config.json model.safetensors --local-dir FOLDER) and give the folder "
    "by --weights FOLDER (weights: of a study or of SampleQuality)"
)


class DINOv2(FeatureNetwork):
    """A vision transformer of DINOv2 (2304.07193); FD-DINOv2 (2306.04675) is the distance in features of its ViT-L/14.

    weights: folder with config.json and model.safetensors as transformers writes them (facebook/dinov2-large has
    them); nothing is ever downloaded. resize: to 224 x 224, ``pil_bicubic_uint8`` rounded to bytes as in the code of
    the paper, or ``torch_bicubic``, antialiased and unrounded as in that of EDM2 (2312.02696); sha256: the digest that
    model.safetensors must have, any if None; dtype: of the computation, ``float32`` or ``float64``.

    Features (B, 1024), float32, are the class token after the last norm. The 37 x 37 position embeddings are
    interpolated to 16 x 16 as in DINOv2's code, by a factor of 16.1 / 37; transformers uses 16 / 37, which is another
    network. Grey images are repeated in three channels. The name is ``dinov2`` only for ViT-L/14; others add their
    sizes. Raises `InputError` for a missing or other folder, a missing transformers, and images with a number of
    channels other than 1 or 3.
    """

    name = "dinov2"

    def __init__(
        self,
        weights: str | None = None,
        resize: str = "pil_bicubic_uint8",
        sha256: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if resize not in RESIZES:
            raise InputError(
                f"dinov2: there is no resize {resize!r}.{nearest(resize, RESIZES)} Choose from {', '.join(RESIZES)}"
            )
        if dtype not in ("float32", "float64"):
            raise InputError(f"dinov2: dtype: float32 or float64, got {dtype!r}")
        self.weights = None if weights is None else str(weights)
        self.resize, self.sha256, self.dtype = resize, sha256, dtype
        self.packages = ("transformers", "pillow") if resize == "pil_bicubic_uint8" else ("transformers",)
        if weights is None:
            raise Unavailable(f"dinov2: no weights are given; {_GET}")
        folder = Path(expand(str(weights)))
        patch = _check(folder)
        self.weights_sha256 = file_digest(folder / "model.safetensors")
        if sha256 is not None and self.weights_sha256 != sha256.lower():
            raise InputError(f"dinov2: {folder}/model.safetensors has SHA-256 {self.weights_sha256}, expected {sha256}")
        self.model = _loaded(folder).to(getattr(torch, dtype))
        config: Any = self.model.config
        self.num_features = config.hidden_size
        if (config.hidden_size, config.num_hidden_layers, patch) != _VITL14:
            self.name = f"dinov2_{config.hidden_size}x{config.num_hidden_layers}"
        embeddings: Any = self.model.embeddings
        embeddings.position_embeddings = nn.Parameter(_positions(embeddings.position_embeddings.data, SIDE // patch))
        self.eval().requires_grad_(False)

    def extract(self, images: Tensor) -> Extracted:
        """Return the class tokens."""
        if images.shape[1] not in (1, 3):
            raise InputError(f"features {self.name}: takes images of 1 or 3 channels, got {images.shape[1]}")
        return Extracted(torch.cat([self._extract(part) for part in images.split(AT_ONCE)]))

    def _extract(self, images: Tensor) -> Tensor:
        dtype = getattr(torch, self.dtype)
        if self.resize == "pil_bicubic_uint8":
            x = pil_bicubic(images, SIDE, np.uint8).to(images.device, dtype)
        else:
            x = nn.functional.interpolate(images.to(dtype), (SIDE, SIDE), mode="bicubic", antialias=True)
        mean, std = torch.tensor([_MEAN, _STD], dtype=dtype, device=x.device)[..., None, None]
        x = (x.expand(-1, 3, -1, -1) / 255 - mean) / std
        tokens: Tensor = self.model(x).last_hidden_state
        return tokens[:, 0].float()


def _check(folder: Path) -> int:
    """Return the patch size of the model in a folder; raises InputError if it is not a DINOv2."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise Unavailable(f"dinov2: {folder} has no {name}; {_GET}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"dinov2: {folder}/config.json is not JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "dinov2":
        raise InputError(f"dinov2: {folder}/config.json describes a model of type {kind!r}, expected 'dinov2'")
    patch = config.get("patch_size", 14)
    if not isinstance(patch, int) or patch < 1 or SIDE % patch:
        raise InputError(f"dinov2: {folder}/config.json has patch_size {patch}, which does not divide {SIDE}")
    return patch


def _loaded(folder: Path) -> nn.Module:
    """Load the model by transformers, which maps the names in published files to its modules."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("features dinov2: transformers is not installed: pip install 'lightning_tdisent[dinov2]'")
    from transformers.models.dinov2 import Dinov2Model

    try:
        with _quiet():
            loaded: Any = Dinov2Model.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation="sdpa",  # a config could name code on the hub
                dtype=torch.float32,
            )
    except Exception as error:  # of safetensors, the hub client or transformers
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"dinov2: {folder} cannot be read: {reason}") from None
    network: nn.Module = loaded[0]
    info: dict[str, Any] = loaded[1]
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        said = "; ".join(f"{kind.replace('_', ' ')} {', '.join(keys[:3])}" for kind, keys in wrong.items() if keys)
        raise InputError(f"dinov2: {folder}/model.safetensors does not hold the network of config.json: {said}")
    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and reports: their content is checked."""
    import logging as levels

    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(levels.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _positions(learned: Tensor, side: int) -> Tensor:
    """Return position embeddings (1, 1 + side^2, d) from (1, 1 + n^2, d), as DINOv2's interpolate_pos_encoding."""
    first, rest = learned[:, :1], learned[:, 1:]
    grid = round(rest.shape[1] ** 0.5)
    if grid == side:
        return learned
    places = rest.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    factor = (side + 0.1) / grid
    places = nn.functional.interpolate(places.float(), scale_factor=(factor, factor), mode="bicubic").to(learned.dtype)
    return torch.cat([first, places.flatten(2).transpose(1, 2)], 1)
