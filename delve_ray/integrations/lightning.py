"""Lightning: a callback that records while a Trainer fits, for `lightning` and for `pytorch_lightning`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

from delve_ray.errors import StoreError
from delve_ray.integrations.fits import Fit, free_savefile, on_ray, writers
from delve_ray.tracker import SaturationTracker

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


class SaturationCallback(Fit, *_bases()):  # type: ignore[misc]
    """Records a LightningModule's layers while a Trainer fits it; a window is an epoch, its validation included.

    It serves alone, in Lightning's own distributed strategies where Ray is initialised in each process, and in Ray
    Train's workers, where run and ranks are found. Validation's sanity check is not recorded.

    Args:
        savefile: Directory of the run's files; by default `saturation` in the Trainer's `log_dir`, `saturation-1` for a
            second fit there, and so on; in Ray Train and Ray Tune in the directory of the run's or the trial's results.
        save_to: As `SaturationTracker` takes it; by default Parquet and TensorBoard.
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

    _state: Mapping[str, Any] = MappingProxyType({})
    _resumes = False  # whether the state was loaded for the fit that begins next

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to record."""
        self._end_fit()
        options = dict(self._options)
        savefile = self._savefile
        if not on_ray():
            folder = trainer.log_dir or trainer.default_root_dir  # the same in all ranks
            if savefile is None and trainer.world_size == 1:
                savefile = free_savefile(folder, again=self._resumes)
                options = {"resume": self._resumes, **options}
            elif savefile is None:
                savefile = os.path.join(folder, "saturation")
            options = {"rank": trainer.global_rank, "world_size": trainer.world_size, **options}
        if trainer.fast_dev_run:
            options["nosave"] = True
        self.tracker = SaturationTracker(savefile, writers(self._save_to), pl_module, **options)
        if self._resumes:
            self.tracker.load_state_dict(self._state)
        self._resumes, self._last = False, -1

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Leave the sanity check out."""
        if self.tracker is not None:
            self.tracker.stop()

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Record from here on."""
        if self.tracker is not None:
            with suppress(StoreError):  # nothing can be delivered, which was said
                self.tracker.resume()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count steps from here; a fit that is resumed has some already."""
        if self._every is not None:
            self._last = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Close a window, if it is time."""
        if self._every is None or trainer.global_step - self._last < self._every:
            return
        metrics = self._end_window(trainer.global_step)
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.global_step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the epoch's window; its validation is over."""
        if self._every is None and (metrics := self._end_window(trainer.current_epoch)):
            pl_module.log_dict(metrics, on_step=False, on_epoch=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Deliver the rest and leave the run."""
        if self.tracker is not None and self._every is not None and trainer.global_step > self._last:
            self._end_window(trainer.global_step)
        self._end_fit()

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
        self._state, self._resumes = dict(state_dict), bool(state_dict)

    def _end_fit(self) -> None:
        self._state = self.state_dict()
        super()._end_fit()
