"""Diffusion models over few latent states, where each state may have its own network.

Reading order: diffusion.table, diffusion.process, sampling.sampler, models.composite, lit.modules.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "diffusion.schedules": (
        "NoiseSchedule Linear ScaledLinear Cosine Sigmoid LogLinear Geometric VarianceExploding FlowMatching"
    ),
    "diffusion.table": "Table",
    "diffusion.states": "LatentStates",
    "diffusion.spaces": "Space Pixels Haar",
    "diffusion.components": "ComponentStates",
    "diffusion.observation": "Observation",
    "diffusion.operators": "Operator Inpainting SuperResolution Edges Grey",
    "diffusion.objectives": "Objective Eps X0 V Weight Constant MinSNR P2 Likelihood",
    "networks.network": "Network",
    "networks.unet": "UNet",
    "networks.dit": "DiT",
    "sampling.denoiser": "Denoiser",
    "sampling.guidance": "Guided",
    "models.composite": "CompositeDenoiser",
    "models.compose": "compose load_model",
    "models.card": "Card read_card",
    "models.expert": "load_expert save_expert",
    "sampling.sampler": "Sampler DDIM Ancestral DPMSolver",
    "sampling.sample": "sample",
    "library": "evaluate plan_fleet run_fleet",
    "models.model_prior": "ModelPrior",
    "models.prior_files": "load_prior",
    "models.truncated": "TruncatedModel load_truncated",
    "sampling.likelihood": "variational_bound ode_likelihood",
    "priors.prior": "Prior StandardNormal",
    "priors.gaussian": "Gaussian",
    "priors.mixture": "Mixture",
    "priors.flow": "Flow",
    "lit.prior": "PriorModule",
    "lit.modules": "Baseline ReducedStates SingleState",
    "lit.inference": "Composite",
    "lit.datamodule": "ImageShards",
    "errors": "InputError",
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *_NAMES]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that importing the package does not import torch."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


class _TorchFidelity:
    """Import hook that makes torch-fidelity importable without torchvision, by skipping its ``__init__``.

    That ``__init__`` imports torchvision for parts that this project does not use. torchmetrics imports torch-fidelity
    if it is installed, and Lightning imports torchmetrics: without this hook, installing torch-fidelity without
    torchvision would break both.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch_fidelity" or importlib.util.find_spec("torchvision") is not None:
            return None
        found = PathFinder.find_spec(name, path)
        if found is None:
            return None
        bare = ModuleSpec(name, None, is_package=True)
        bare.submodule_search_locations = found.submodule_search_locations
        return bare


sys.meta_path.insert(0, _TorchFidelity)
