"""Build networks from their `spec`, and check that a rebuilt network computes the same function as the trained one."""

import contextlib
import inspect
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_tdisent.diffusion.bounds import Bounded
from lightning_tdisent.diffusion.spec import build, rebuild, said, spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.network import Network, evaluating

_REMEDY = (
    "Give every argument that changes the network a name in __init__ (not **kwargs, which dict_kwargs fills), keep it "
    "unchanged as an attribute of that name, and keep random or later changed values in buffers of the state dict"
)


def without_weights(data: dict[str, Any]) -> Network:
    """Build a network from its `spec`, on the meta device if possible.

    A network that keeps tensors outside its parameters and buffers is built with real tensors, since no file holds
    those.
    """
    with contextlib.suppress(Exception):  # a constructor that reads a tensor fails; real errors are raised again below
        with torch.device("meta"):
            network = build(data, Network)
        if not any(_holds_tensors(module) for module in network.modules()):
            return network
    return build(data, Network)


def of_file(data: dict[str, Any], shapes: Mapping[str, Sequence[int]], where: str) -> Network:
    """Build the network of a file from its `spec`, like `without_weights`, but no larger than the file's tensors.

    data: the `spec`; shapes: shapes of the file's tensors by name, each with the prefix ``network.``; where: name of
    the file, for messages. Raises InputError, before memory is allocated, for a network with other tensors.
    """
    with Bounded(where, max(map(math.prod, shapes.values()), default=0), len(shapes)):
        try:
            with torch.device("meta"):
                network = build(data, Network)
        except InputError as error:
            if "meta" not in str(error.__cause__):  # a constructor that reads a tensor
                raise
            network = build(data, Network)
    mine = {f"network.{name}": list(tensor.shape) for name, tensor in network.state_dict().items()}
    theirs = {name: list(shape) for name, shape in shapes.items()}
    if differing := sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)):
        raise InputError(f"{where}: weights do not fit the network named in the file: {', '.join(differing[:8])}")
    if any(_holds_tensors(module) for module in network.modules()):
        return build(data, Network)
    return network


def _holds_tensors(module: nn.Module) -> bool:
    own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")}
    return _tensor_in(own)


def _tensor_in(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_tensor_in, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(_tensor_in, value))
    return isinstance(value, Tensor)


@torch.no_grad()
def faithful(network: Network) -> Network:
    """Return the network that would be loaded from a file of this one; it shares this network's weight tensors.

    The new network is built from the `spec` of ``network``. Both are evaluated in eval mode on one random input, with
    perturbed weights, since a layer initialised to 0 would hide the layers before it. Raises InputError, naming what
    differs, unless the arguments, the names and shapes of the weights, and the outputs agree and an output has the
    shape of its input. Outputs must be equal on a CPU, and equal up to rounding on other devices.

    Also raises InputError for tied weights, a forward with another signature or that fails, an output that is random
    in eval mode, and an output that depends on the other samples of the batch. The state of the process's random
    generators does not change.
    """
    name, parameter = type(network).__name__, next(network.parameters(), torch.zeros(()))
    each = dict(network.named_parameters())
    if tied := [key for key, _ in network.named_parameters(remove_duplicate=False) if key not in each]:
        raise InputError(
            f"{name}: {', '.join(tied[:4])}: weights that also have another name (tied weights). A file stores one "
            "weight per name, so loading it would untie them; use the same module object in both places"
        )
    with _seeded(0x5EED):
        other = rebuild(network, without_weights)
        state = network.state_dict()
        try:
            _refuse_other_weights(name, state, other.state_dict())
            other.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            said_ = " ".join(str(error).split())
            raise InputError(f"{name}: its weights do not fit the network built from its arguments: {said_}") from None
        other.to(parameter.device)
    generator = torch.Generator().manual_seed(0)
    values = {
        key: value + 0.02 * torch.randn(value.shape, generator=generator).to(value)
        if value.is_floating_point()
        else value
        for key, value in network.named_parameters()
    }
    zeros, time, label = network.example(2)
    random_x = torch.randn(zeros.shape, generator=generator).to(zeros)
    _refuse_signature(network)

    def output(of: Network, n: int = 2, seed: int = 0) -> Tensor:
        x, given = random_x[:n], [None if t is None else t[:n] for t in (time, label)]
        with evaluating(of), _seeded(seed):
            try:
                out = functional_call(of, values, (x, *given))
            except (InputError, OSError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                what = f"x {list(x.shape)}, time and label {'none' if label is None else list(label.shape)}"
                raise InputError(f"{name} fails for {what}: {said(error)}") from error
        if not isinstance(out, Tensor) or out.shape != x.shape:
            found = list(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise InputError(
                f"{name}: for an input of shape {list(x.shape)} its output is {found}; a network returns one value for "
                "each value of its input, in the same shape"
            )
        return out

    mine = output(network)
    if not _same(mine, output(other)):
        if not _same(mine, output(network)):
            raise InputError(
                f"{name}: two calls with one input, in eval mode and with the same random state, give different "
                "outputs; a network must be a function of its input and its weights"
            )
        raise InputError(
            f"{name}: the network built from its arguments {_arguments(network)} has the same weights but other "
            f"outputs, so a trained model could not be loaded{_differing(network, other)}. {_REMEDY}"
        )
    if not _close(mine, output(network, seed=1)):
        raise InputError(
            f"{name}: its outputs in eval mode are random (dropout without training=self.training, or noise): an image "
            "would not be a function of its seed"
        )
    if not _close(mine[:1], output(network, n=1)):
        raise InputError(
            f"{name}: its output for an image depends on the other images of the batch: an image would not be a "
            "function of its seed. Compute statistics over each image separately (dimensions 1 and up)"
        )
    return other


@torch.no_grad()
def draws(network: Network) -> bool:
    """Return whether a forward pass in training mode draws from torch's global generator.

    The pass runs on a copy built from the `spec` of the network; network and generators do not change.
    """
    x, time, label = network.example(2)
    with _seeded(0):
        other = rebuild(network, without_weights)
        other.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
        other.to(x.device).train()
        before = _states(x.device)
        other(x, time, label)
        return any(not torch.equal(a, b) for a, b in zip(before, _states(x.device), strict=True))


def _states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _arguments(network: Network) -> str:
    return ", ".join(f"{k}={v}" for k, v in spec(network)["init_args"].items())


def _refuse_other_weights(name: str, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    shapes = [{key: list(value.shape) for key, value in state.items()} for state in (mine, theirs)]
    differing = sorted(key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key))
    if differing:
        pairs = [f"{key} {shapes[0].get(key, 'none')}, rebuilt {shapes[1].get(key, 'none')}" for key in differing[:6]]
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise InputError(
            f"{name}: the network built from its arguments has other weights: {'; '.join(pairs)}{more}, so a "
            f"trained model could not be loaded. {_REMEDY}"
        )


def _refuse_signature(network: Network) -> None:
    """Raise InputError unless forward can be called as ``forward(x, time, label)``."""
    try:
        signature = inspect.signature(network.forward)
        signature.bind(None, None, None)
    except TypeError:
        raise InputError(
            f"{type(network).__name__}.forward{signature} cannot be called as forward(x, time, label); it must accept "
            "these three (time is None for a time-agnostic network, label is None without classes)"
        ) from None
    except ValueError:  # a callable without a signature
        return


def _same(a: Tensor, b: Tensor) -> bool:
    equal = bool(((a == b) | (a.isnan() & b.isnan())).all())
    if equal or a.device.type == "cpu":
        return equal
    return bool((a - b).abs().max() <= 1e-3 * a.abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether two outputs are equal up to rounding."""
    bound = 1e-3 if a.dtype in (torch.float32, torch.float64) else 0.05
    return bool((a - b).nan_to_num().abs().max() <= bound * a.nan_to_num().abs().max())


def _differing(network: Network, other: Network) -> str:
    """Describe the attributes in which two networks differ: plain values, buffers, tensors outside the state dict."""
    found = []
    theirs = dict(other.named_modules())
    for path, module in network.named_modules():
        if path not in theirs:
            continue
        mine, rebuilt = ({**vars(m), **m._buffers} for m in (module, theirs[path]))
        for key, value in mine.items():
            if key.startswith("_") and key not in module._buffers:
                continue
            now, where = rebuilt.get(key), f"{path}.{key}".lstrip(".")
            if isinstance(value, Tensor) and isinstance(now, Tensor):
                if value.shape != now.shape or not torch.equal(value, now.to(value)):
                    found.append(f"the tensor {where}")
            elif isinstance(value, (int, float, str, bool, tuple, list)) and value != now and key != "training":
                found.append(f"{where} is {value!r}, rebuilt {now!r}")
    return f" ({'; '.join(found[:4])})" if found else ""


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators inside the context, and restore their states afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    others = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002
