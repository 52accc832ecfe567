"""Lightning: a callback that records while a Trainer fits, for `lightning` and for `pytorch_lightning`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from delve_ray.checks import check_integer
from delve_ray.integrations.keys import Patterns, check_patterns, select
from delve_ray.integrations.ray_train import current_worker
from delve_ray.tracker import SaturationTracker
from delve_ray.writers import SaveTo

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """The Callback of the package that is in use; of both, where both are."""
    used = [name for name in _PACKAGES if sys.modules.get(name) is not None]
    if not used:
        used = [name for name in _PACKAGES if find_spec(name.partition(".")[0]) is not None][:1]
    if not used:
        raise ImportError(
            "the Lightning callback needs lightning or pytorch_lightning: pip install 'delve_ray[lightning]'"
        )
    return tuple(dict.fromkeys(import_module(name).Callback for name in used))


class SaturationCallback(*_bases()):  # type: ignore[misc]
    """Records a LightningModule's layers while a Trainer fits it; a window is an epoch, its validation included.

    It serves alone, in Lightning's own distributed strategies where Ray is initialised in each process, and in Ray
    Train's workers, where run and ranks are found. Validation's sanity check is not recorded.

    Args:
        savefile: Directory of the run's files; by default `saturation` in the Trainer's `log_dir`, in a Ray Train
            worker in the run's own directory.
        save_to: As `SaturationTracker` takes it.
        every_n_steps: Close a window after every so many optimizer steps, instead of every epoch.
        metrics: Patterns over metric keys that are logged at the end of each window, to the Trainer's loggers and its
            `callback_metrics`, where EarlyStopping, ModelCheckpoint and Ray Train's report callback find them; those
            stand behind this one in the list of callbacks. None logs nothing, and waits for nothing.
        options: Further options of `SaturationTracker`.

    The tracker is `callback.tracker` while the Trainer fits. State is kept in Lightning's checkpoints.

    Raises:
        OptionError: an option that cannot be used; those of the tracker, when the fit begins.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[SaturationCallback(save_to="parquet")], logger=False)
    """

    def __init__(
        self,
        savefile: str | os.PathLike[str] | None = None,
        save_to: SaveTo = ("parquet", "tensorboard"),
        *,
        every_n_steps: int | None = None,
        metrics: Patterns | None = "*",
        **options: Any,
    ) -> None:
        super().__init__()
        self.tracker: SaturationTracker | None = None
        self._savefile, self._save_to, self._options = savefile, save_to, options
        self._every = None if every_n_steps is None else check_integer("every_n_steps", every_n_steps, at_least=1)
        self._patterns = None if metrics is None else check_patterns(metrics)
        self._state: Mapping[str, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record."""
        self._close()
        options = dict(self._options)
        savefile = self._savefile
        if current_worker() is None:
            folder = trainer.log_dir or trainer.default_root_dir  # the same in all ranks
            savefile = savefile if savefile is not None else os.path.join(folder, "saturation")
            options = {"rank": trainer.global_rank, "world_size": trainer.world_size, **options}
        self.tracker = SaturationTracker(savefile, self._save_to, pl_module, **options)
        if self._state:
            self.tracker.load_state_dict(self._state)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Leave the sanity check out."""
        if self.tracker is not None:
            self.tracker.stop()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Record from here on."""
        if self.tracker is not None:
            self.tracker.resume()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Close a window, if it is time."""
        if self._every is not None and trainer.global_step % self._every == 0:
            self._close_window(pl_module, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the epoch's window; its validation is over."""
        if self._every is None:
            self._close_window(pl_module, trainer.current_epoch)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Deliver the rest and leave the run."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the run open for the next attempt, where there can be one."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return dict(self._state) if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints, before the fit begins."""
        self._state = dict(state_dict)

    def _close_window(self, pl_module: Any, step: int) -> None:
        if self.tracker is None or self.tracker.state_dict()["next_step"] > step:  # closed at this step already
            return
        self.tracker.add_saturations(step=step)
        if self._patterns is not None:
            pl_module.log_dict(select(self.tracker.metrics(wait=True), self._patterns), on_step=False, on_epoch=True)

    def _close(self) -> None:
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            self._state = tracker.state_dict()
            tracker.close()
