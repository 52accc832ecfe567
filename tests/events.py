"""Reading TensorBoard's event files back, with TensorBoard's own reader."""

from __future__ import annotations

import os


def tag_values(savefile: str | os.PathLike[str], tag: str) -> dict[int, float]:
    """The values of a scalar by step; of several on one step, the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(os.path.join(savefile, "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {point.step: point.value for point in accumulator.Scalars(tag)}
