"""Hugging Face Transformers: a callback that records while a Trainer trains, without the padding."""

from __future__ import annotations

import os
from typing import Any

from delve_ray.checks import check_integer
from delve_ray.integrations.keys import Patterns, check_patterns, select
from delve_ray.integrations.ray_train import current_worker
from delve_ray.tracker import SaturationTracker
from delve_ray.writers import SaveTo

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"the Transformers callback needs transformers ({error}): pip install 'delve_ray[transformers]'"
    ) from error


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """The attention mask that the model's forward is called with, where it says of each token whether it counts."""
    mask = kwargs.get("attention_mask")
    return mask if getattr(mask, "ndim", None) == 2 else None


class SaturationCallback(TrainerCallback):  # type: ignore[misc]
    """Records a model's layers while a `transformers.Trainer` trains it, without what the attention mask leaves out.

    A window is what lies between two evaluations, the second one included, or, where there are none, an epoch. Its
    step is the Trainer's `global_step`. It serves alone, under torchrun where Ray is initialised in each process, and
    in Ray Train's workers.

    Args:
        savefile: Directory of the run's files; by default `saturation` in the Trainer's `output_dir`, in a Ray Train
            worker in the run's own directory.
        save_to: As `SaturationTracker` takes it.
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

    def __init__(
        self,
        savefile: str | os.PathLike[str] | None = None,
        save_to: SaveTo = ("parquet", "tensorboard"),
        *,
        every_n_steps: int | None = None,
        metrics: Patterns | None = "*",
        **options: Any,
    ) -> None:
        self.tracker: SaturationTracker | None = None
        self._savefile, self._save_to, self._options = savefile, save_to, options
        self._every = None if every_n_steps is None else check_integer("every_n_steps", every_n_steps, at_least=1)
        self._patterns = None if metrics is None else check_patterns(metrics)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to record."""
        self._close()
        options = {"mask": attention_mask, **self._options}
        savefile = self._savefile
        if current_worker() is None:
            savefile = savefile if savefile is not None else os.path.join(args.output_dir, "saturation")
            if args.world_size > 1:
                options = {"run": args.run_name or os.path.basename(os.path.abspath(args.output_dir)), **options}
            elif state.global_step:  # it was resumed from a checkpoint
                options = {"resume": True, **options}
        self.tracker = SaturationTracker(savefile, self._save_to, kwargs["model"], **options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close a window, if it is time."""
        if self._every is not None and state.global_step % self._every == 0:
            self._close_window(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the window that ends with an evaluation."""
        if self._every is None:
            self._close_window(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close an epoch's window, where no evaluation does."""
        if self._every is None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            self._close_window(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Deliver the rest and leave the run."""
        self._close()

    def _close_window(self, state: Any) -> None:
        step = int(state.global_step)
        if self.tracker is None or self.tracker.state_dict()["next_step"] > step:  # closed at this step already
            return
        self.tracker.add_saturations(step=step)
        if self._patterns is not None:
            metrics = select(self.tracker.metrics(wait=True), self._patterns)
            state.log_history.append({**metrics, "epoch": state.epoch, "step": step})

    def _close(self) -> None:
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.close()
