"""Callbacks that a module brings to a `Trainer` without them, so that a plain one trains as the command fit does."""

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging

from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.weights import EMA, Export

AVERAGING = (EMA, StochasticWeightAveraging, WeightAveraging, ModelPruning)  # with the others `EMA` cannot be used


def brought(trainer: L.Trainer) -> list[L.Callback]:
    """Return a `Guard`, and for `fit` also `LossPerState`, `EMA` and `Export`, each unless the trainer has one."""

    def lacks(*kinds: type[L.Callback]) -> bool:
        return not any(isinstance(callback, kinds) for callback in trainer.callbacks)

    out: list[L.Callback] = [Guard()] if lacks(Guard) else []
    if trainer.state.fn == "fit":
        out += [LossPerState()] if lacks(LossPerState) else []
        out += [EMA()] if lacks(*AVERAGING) else []
        out += [Export(brought=True)] if lacks(Export) else []
    return out
