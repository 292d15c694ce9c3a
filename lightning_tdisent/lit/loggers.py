"""Loggers of a run: TensorBoard with captions and hyperparameters, and the run's own file of metrics."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_tdisent import metrics_file
from lightning_tdisent.evaluation.pictures import captioned
from lightning_tdisent.files import ask_guards
from lightning_tdisent.runs import METRICS

X_AXIS = "The x-axis of all charts and pictures (Step) is the number of training images seen."


class TensorBoard(TensorBoardLogger):
    """TensorBoard logger that writes only while this process holds the run folder."""

    _ended: Any = None

    @property
    def experiment(self) -> Any:
        """Return the event writer; raise Lost if this process has lost the run folder."""
        ask_guards(Path(self.log_dir) / "events", quick=True)
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], metrics: Any = None, step: int | None = None) -> None:
        """Write the hyperparameters for the tab HPARAMS, which shows them beside the last value of every metric."""
        from torch.utils.tensorboard.summary import hparams  # imported here: a plan of a study needs no TensorBoard

        self.experiment.add_text("x-axis", X_AXIS)
        # without torch's summary of the experiment: TensorBoard would show the columns of one run for all of them
        _, started, self._ended = hparams(params, {})
        self.experiment.file_writer.add_summary(started)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write that the training ended, and close the file."""
        if status == "success" and self._ended is not None:
            self.experiment.file_writer.add_summary(self._ended)
        super().finalize(status)

    def save(self) -> None:
        """Flush the events; no hparams.yaml is written, since the run has its config.yaml."""
        if self._experiment is not None:
            self.experiment.flush()


class MetricsFile(Logger):
    """Write all metrics to ``metrics.jsonl`` of the run folder, whatever the other loggers are.

    If the file cannot be written, such as on a full disk, the training goes on, and a warning says so once.

    until: images seen at the checkpoint that the training resumes from; the first write removes all points beyond it,
    which are logged again. None keeps all points, -1 none. A run of an earlier version, which has no such file, gets
    none: it would lack the beginning.
    """

    name, version, save_dir = None, None, None  # it has no place of its own

    def __init__(self, folder: str | Path, until: int | None) -> None:
        super().__init__()
        self.folder, self.until, self._begun, self._failed = Path(folder), until, False, False
        self._whole = until in (-1, 0) or (self.folder / METRICS).exists()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a point. step: images seen."""
        if not self._whole:
            return
        try:
            if not self._begun and self.until is not None:
                metrics_file.cut(self.folder, self.until)
            self._begun = True
            metrics_file.append(self.folder, step or 0, {name: float(value) for name, value in metrics.items()})
        except OSError as error:
            if not self._failed:
                rank_zero_warn(f"{self.folder / METRICS} lacks points from now on: {error.strerror or error}")
            self._failed = True

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Do nothing: the run folder has its config.yaml."""


def flat(config: dict[str, Any], key: str = "") -> dict[str, Any]:
    """Return a config as numbers and texts by dotted keys, a class by its name, without what is null.

    Lists of classes, such as callbacks, become their names.
    """
    out: dict[str, Any] = {}
    for name, value in config.items():
        where = f"{key}.{name}" if key else name
        if name == "class_path":
            out[key] = _short(value)
        elif name in ("init_args", "dict_kwargs"):
            out |= flat(value or {}, key)
        elif isinstance(value, dict):
            out |= flat(value, where)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            out[where] = ", ".join(
                _short(item.get("class_path", "?")) if isinstance(item, dict) else "?" for item in value
            )
        elif isinstance(value, bool | int | float | str):
            out[where] = value
        elif value is not None:
            out[where] = str(value)
    return out


def _short(class_path: str) -> str:
    return str(class_path).rpartition(".")[2]


def log_picture(loggers: list[Logger], name: str, picture: Tensor, caption: str, images_seen: int) -> None:
    """Log a picture, uint8 (C, H, W), with a caption to TensorBoard and W&B.

    TensorBoard shows no captions; there it is part of the picture.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, captioned(picture, caption), images_seen)
        elif isinstance(logger, WandbLogger):
            logger.log_image(key=name, images=[picture.permute(1, 2, 0).numpy()], step=images_seen, caption=[caption])
