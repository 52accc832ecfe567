"""Hugging Face Transformers: a callback that records while a Trainer trains, without the padding."""

from __future__ import annotations

import logging
import os
from typing import Any

from delve_ray.integrations.fits import Fit, free_savefile, on_ray, writers
from delve_ray.tracker import SaturationTracker

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"the Transformers callback needs transformers ({error}): pip install 'delve_ray[transformers]'"
    ) from error


log = logging.getLogger(__name__)


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """The attention mask that the model's forward is called with, where it says of each token whether it counts."""
    mask = kwargs.get("attention_mask")
    return mask if getattr(mask, "ndim", None) == 2 else None


class SaturationCallback(Fit, TrainerCallback):  # type: ignore[misc]
    """Records a model's layers while a `transformers.Trainer` trains it, without what the attention mask leaves out.

    A window is what lies between two evaluations, the second one included, or, where there are none, an epoch. Its
    step is the Trainer's `global_step`. It serves alone, under torchrun where Ray is initialised in each process, and
    in Ray Train's workers.

    Args:
        savefile: Directory of the run's files; by default `saturation` in the Trainer's `output_dir`, `saturation-1`
            for a second training there, and so on; in Ray Train and Ray Tune in the directory of the run's or the
            trial's results.
        save_to: As `SaturationTracker` takes it; by default Parquet and TensorBoard.
        every_n_steps: Close a window after every so many optimizer steps instead.
        metrics: Patterns over metric keys that are added to the Trainer's `state.log_history` at the end of each
            window, where Ray Train's report callback finds them; it stands behind this one. None adds nothing, and
            waits for nothing. The Trainer's own loggers see only what the Trainer logs: choose a writer in `save_to`.
        options: Further options of `SaturationTracker`; `mask` is the batch's attention mask unless given.

    The tracker is `callback.tracker` during the training.

    Raises:
        OptionError: an option that cannot be used; those of the tracker, when the training begins.

    Example:
        >>> callback = SaturationCallback(save_to="parquet", layers=["transformer.h.*"])
    """

    _evaluated = False  # whether an evaluation is in the open window, of which there may be several

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to record."""
        self._end_fit()
        model, options = kwargs["model"], dict(self._options)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            log.info("the attention mask is that of the encoder alone: padding counts; give mask= to leave it out")
        else:
            options = {"mask": attention_mask, **options}
        savefile = self._savefile
        if not on_ray():
            options = _resuming(args, state.global_step) | options
            if savefile is None and args.world_size == 1:
                savefile = free_savefile(args.output_dir, again=bool(state.global_step))
            elif savefile is None:
                savefile = os.path.join(args.output_dir, "saturation")
        self.tracker = SaturationTracker(savefile, writers(self._save_to), model, **options)
        self._last, self._evaluated = int(state.global_step), False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the window that has ended with evaluations."""
        self._end_evaluations(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close a window, if it is time."""
        if self._every is not None and state.global_step - self._last >= self._every:
            self._close_window(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that an evaluation is over; another one may follow, of another dataset."""
        self._evaluated = self._every is None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the window that has ended with evaluations, before its metrics are reported with the checkpoint."""
        self._end_evaluations(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close an epoch's window, where no evaluation does."""
        if self._every is None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            self._close_window(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Deliver the rest and leave the run."""
        self._end_evaluations(state)
        self._close_window(state)
        self._end_fit()

    def _end_evaluations(self, state: Any) -> None:
        if self._evaluated:
            self._close_window(state)
        self._evaluated = False

    def _close_window(self, state: Any) -> None:
        step = int(state.global_step)
        if metrics := self._end_window(step):
            state.log_history.append({**metrics, "epoch": state.epoch, "step": step})


def _resuming(args: Any, step: int) -> dict[str, Any]:
    """The options by which the ranks of a training meet, and by which one that goes on from `step` says so."""
    options: dict[str, Any] = {}
    if args.world_size > 1:
        options["run"] = args.run_name or os.path.basename(os.path.abspath(args.output_dir))
    if step:  # torchrun tells the ranks of an attempt what they share
        alone = args.world_size == 1 or "TORCHELASTIC_RUN_ID" in os.environ
        options["resume"] = True if alone else f"from step {step}"
    return options
