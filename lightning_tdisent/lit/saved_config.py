"""The config that a run keeps in its folder: complete, and without what the environment holds."""

import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import absolute_paths, write_whole
from lightning_tdisent.lit.command_line import COMMANDS, UNRESOLVED
from lightning_tdisent.lit.loggers import flat
from lightning_tdisent.lit.resume import header
from lightning_tdisent.runs import CONFIG, held


class SaveConfig(SaveConfigCallback):
    """Write the resolved config to ``config.yaml`` of the run folder, on rank 0 and for `fit` only."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse values that YAML cannot represent. Nothing is written yet: a refused run must not claim its folder."""
        if stage == "fit" and not trainer.fast_dev_run and (lost := _unserializable(self._resolved(trainer))):
            raise InputError(
                f"{', '.join(lost)}: a value that config.yaml cannot store, so that the run could not be resumed. Give "
                "each as a number, text or a class_path, or leave the option out"
            )

    def _resolved(self, trainer: L.Trainer) -> dict[str, Any]:
        config = self.config.clone()
        config.ckpt_path = None  # a later resume uses the newest checkpoint, not the one used this time
        kept: dict[str, Any] = absolute_paths(yaml.safe_load(self.parser.dump(config, skip_none=False)))
        kept = without_secrets(kept)
        del kept["run"]  # it is the folder of the file
        place = held(trainer.default_root_dir)
        kept["id"] = place.run if place else None
        return kept

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the config before the first step, and give it to the loggers as hyperparameters."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            kept = self._resolved(trainer)
            for logger in trainer.loggers:
                logger.log_hyperparams(flat({key: kept[key] for key in kept if key not in _NO_HYPERPARAMETERS}))
            # a large width keeps each key on one line
            text = yaml.dump(kept, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)
            write_whole(Path(trainer.default_root_dir) / CONFIG, (header() + text).encode())


# what moves no weight, and what names this training
_NO_HYPERPARAMETERS = ("id", "ckpt_path", "resume", "round", "checkpoint", "guard", "losses", "weights_only", "verbose")


class Dumper(yaml.SafeDumper):
    """Quote text such as 1e5, which the config parser would read as a number and PyYAML would not."""


_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in which values from the environment are again references such as ``${oc.env:NAME}``.

    So are values that another ``${..}`` takes from the environment. The default of an unset variable is kept.
    """
    text = UNRESOLVED.get()
    given = yaml.safe_load(text) if text else {}
    given = next((given[command] for command in COMMANDS if command in given), given)

    def read(text: str) -> set[str]:
        names = re.findall(r"oc\.env:\s*([^\s,}]+)", text)
        return {os.environ[name] for name in names if os.environ.get(name)}

    values = read(text)

    def kept(mine: Any, theirs: Any) -> Any:
        if isinstance(theirs, str) and "${" in theirs:
            return theirs if read(theirs) or any(value in str(mine) for value in values) else mine
        if isinstance(mine, dict) and isinstance(theirs, dict):
            return {key: kept(value, theirs.get(key)) for key, value in mine.items()}
        if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
            return [kept(*pair) for pair in zip(mine, theirs, strict=True)]
        return mine

    out: dict[str, Any] = kept(config, given)
    return out


def _unserializable(value: Any, key: str = "") -> list[str]:
    """Return the keys of the values that jsonargparse could not serialise and replaced by a text."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = [name for k, v in items for name in _unserializable(v, f"{key}.{k}" if key else str(k))]
        return [name.replace(".init_args", "") for name in found]
    return [key] if isinstance(value, str) and value.startswith("Unable to serialize instance ") else []
