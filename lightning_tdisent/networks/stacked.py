"""Combine S networks with the same `spec` into one network whose layers compute all S at once.

Sample n of a batch belongs to network n % S. So a batch (B S, C, H, W) can be viewed as (B, S C, H, W) without a copy:
the S convolutions become one grouped convolution, the S group normalisations one with S times the groups. Attention,
resampling and channel concatenation have no weights and act on each sample as before.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.network import Network

Forward = Callable[..., Any]


def stack(networks: Sequence[Network]) -> tuple[Network, dict[str, Tensor]]:
    """Return one network that computes S networks, and its weights.

    The weights are leaf tensors (S, ...) under the parameter names of a single network. The network takes x
    (B S, C, H, W), time and label (B S,). Its output for sample n is that of network n % S up to the order of sums,
    and the gradient of a sample reaches the weights of its own network only. Convolutions, linear layers and group
    normalisations have specialised implementations; other layers with weights use `torch.func.vmap`. A layer that mixes
    the samples of a batch would mix networks. Raises InputError for networks with different specs.
    """
    makes = [spec(network) for network in networks]
    other = next((make for make in makes if make != makes[0]), None)
    if other is not None:
        raise InputError(f"networks with different arguments cannot be stacked: {makes[0]} and {other}")
    named = [dict(network.named_parameters()) for network in networks]
    weights = {name: torch.stack([n[name].detach() for n in named]).requires_grad_() for name in named[0]}
    network = copy.deepcopy(networks[0]).requires_grad_(requires_grad=False)
    done: tuple[str, ...] = ()
    for path, module in list(network.named_modules()):
        if next(module.parameters(recurse=False), None) is None or path.startswith(done):
            continue
        prefix = f"{path}." if path else ""
        done = (*done, prefix)
        module_weights = {name: weights[prefix + name] for name, _ in module.named_parameters()}
        module.forward = _IMPLEMENTATIONS.get(type(module), _vmapped)(module, module_weights, len(networks))
    return network, weights


def obstacle(network: Network) -> str:
    """Return the reason why a network cannot be stacked with others, or an empty string.

    Runs the network on two batches with perturbed weights, since a layer initialised to 0 hides the layers before it.
    Call it in training mode. Leaves weights and buffers unchanged.
    """
    weights = dict(network.named_parameters())
    if frozen := next((name for name, w in weights.items() if not w.requires_grad), None):
        return f"{frozen} is frozen"
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    leaves = {name: (w.detach() + 0.02 * noise(w)).requires_grad_() for name, w in weights.items()}
    zeros, time, label = network.example(4)
    x = noise(zeros)
    other = torch.cat([x[:2], noise(x[2:])])
    before = dict(network.named_buffers())
    buffers = {name: buffer.clone() for name, buffer in before.items()}
    out, again = (functional_call(network, {**leaves, **buffers}, (one, time, label)) for one in (x, other))
    if moved := next((name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])), None):
        return f"{moved} is a buffer that training changes"
    if not torch.allclose(out[:2], again[:2], rtol=1e-3, atol=1e-4 * float(out.detach().abs().max())):
        return "its output for one sample depends on the others in training"
    gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
    if unused := next((name for name, g in zip(leaves, gradients, strict=True) if g is None), None):
        return f"{unused} is not used"
    return ""


def _convolution(module: Any, weights: dict[str, Tensor], S: int) -> Forward:
    if module.padding_mode != "zeros":
        return _vmapped(module, weights, S)
    weight, bias = weights["weight"], weights.get("bias")
    options = (module.stride, module.padding, module.dilation, S * module.groups)

    def pointwise(x: Tensor) -> Tensor:
        y = weight.flatten(2) @ x.flatten(2).unflatten(0, (-1, S))
        y = y if bias is None else y + bias[..., None]
        out: Tensor = y.reshape(len(x), -1, *x.shape[2:])
        return out

    if module.kernel_size == (1, 1) and options == ((1, 1), (0, 0), (1, 1), S):
        return pointwise  # 25 % faster than a grouped convolution, gradients included

    def forward(x: Tensor) -> Tensor:
        wide = x.reshape(-1, S * x.shape[1], *x.shape[2:])
        y = F.conv2d(wide, weight.flatten(0, 1), bias if bias is None else bias.flatten(), *options)
        return y.reshape(len(x), -1, *y.shape[2:])

    return forward


def _linear(module: Any, weights: dict[str, Tensor], S: int) -> Forward:
    weight, bias = weights["weight"], weights.get("bias")

    def forward(x: Tensor) -> Tensor:
        apart = x.reshape(-1, S, *x.shape[1:]).transpose(0, 1)
        flat = apart.reshape(S, -1, x.shape[-1])
        y = flat @ weight.mT if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
        return y.view(*apart.shape[:-1], -1).transpose(0, 1).reshape(*x.shape[:-1], -1)

    return forward


def _group_norm(module: Any, weights: dict[str, Tensor], S: int) -> Forward:
    weight, bias = weights["weight"], weights["bias"]

    def forward(x: Tensor) -> Tensor:
        wide = x.reshape(-1, S * x.shape[1], *x.shape[2:])
        return F.group_norm(wide, S * module.num_groups, weight.flatten(), bias.flatten(), module.eps).view_as(x)

    return forward


def _vmapped(module: nn.Module, weights: dict[str, Tensor], S: int) -> Forward:
    """Run any layer with vmap: tensors as long as the first argument are batches, all other arguments are shared."""
    plain = copy.deepcopy(module)

    def forward(*args: Any) -> Any:
        batches = [isinstance(a, Tensor) and a.ndim > 0 and len(a) == len(args[0]) for a in args]
        apart = [a.unflatten(0, (-1, S)) if batch else a for a, batch in zip(args, batches, strict=True)]
        dims = (0, *(1 if batch else None for batch in batches))
        call = vmap(lambda w, *a: functional_call(plain, w, a), in_dims=dims, out_dims=1)
        return call(weights, *apart).flatten(0, 1)

    return forward


_IMPLEMENTATIONS: dict[type, Callable[[Any, dict[str, Tensor], int], Forward]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
}
