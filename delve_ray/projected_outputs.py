"""Layers' outputs with their rows projected: what `delve_ray.layers` takes out, put back in.

Letters in names: B batch, T steps of a sequence, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from delve_ray.errors import OptionError
from delve_ray.layers import LayerAdapter, OutputAdapter, RecurrentAdapter, RowOptions, search_tensor
from delve_ray.pca_layers import LinearPCALayer


@dataclass(frozen=True, slots=True, eq=False)
class Insertion:
    """A forward hook that replaces a layer's output by its projection; with its module it can be copied and pickled."""

    name: str
    layer: LinearPCALayer
    adapter: LayerAdapter
    options: RowOptions

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """What torch calls after the layer's forward. Raises OptionError for an output that cannot be projected."""
        found = search_tensor(output)
        if found is None:
            raise OptionError(f"layer {self.name!r} gave no floating-point tensor that could be projected")
        if found.is_quantized:
            raise OptionError(f"layer {self.name!r} is quantized; project the model that it was made from")
        last = self.options.timeseries_method == "last_timestep"
        if last and found.dim() == 3 and self.adapter.has_steps(found):
            raise OptionError(
                f"layer {self.name!r} was recorded with timeseries_method='last_timestep', so that other steps are no "
                f"observations; choose other layers=[…], or track it otherwise"
            )
        if self.layer.mean.device != found.device:
            self.layer.to(found.device)  # the model has been moved
        if isinstance(self.adapter, RecurrentAdapter):
            return _recurrent(module, output, self.layer)
        return _replaced(output, found, self._projected(found))

    def _projected(self, tensor: Tensor) -> Tensor:
        if tensor.is_nested:
            return torch.nested.as_nested_tensor(
                [self._projected(part) for part in tensor.unbind()], layout=tensor.layout
            )
        if isinstance(self.adapter, OutputAdapter) and self.adapter._is_map(tensor.dim()):
            return cast(Tensor, self.layer(tensor.movedim(1, -1))).movedim(-1, 1)
        return cast(Tensor, self.layer(tensor))


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """An output of any structure that `search_tensor` looks into, with one tensor replaced by another."""
    if output is old:
        return new
    if isinstance(output, PackedSequence):
        return output._replace(data=new) if output.data is old else output
    if is_dataclass(output) and not isinstance(output, type):
        values = {key: _replaced(value, old, new) for key, value in vars(output).items()}
        return replace(output, **{key: value for key, value in values.items() if value is not getattr(output, key)})
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        for key, value in output.items():
            changed[key] = _replaced(value, old, new)
        return changed
    if isinstance(output, tuple | list):
        items = [_replaced(item, old, new) for item in output]
        make: Any = getattr(output, "_make", type(output))
        return make(items)
    return output


def _recurrent(module: nn.Module, output: Any, layer: LinearPCALayer) -> Any:
    """The output of LSTM, GRU, RNN: the sequence, and of the final hidden state the rows that are in it, too.

    These are the last step's features, of the backward direction those of the first step.
    """
    sequence, state = output
    hidden = state[0] if isinstance(state, tuple) else state
    projected: Any
    if isinstance(sequence, PackedSequence):
        projected = sequence._replace(data=layer(sequence.data))
        steps_BTD, lengths = pad_packed_sequence(projected, batch_first=True)
        first, last = steps_BTD[:, 0], steps_BTD[torch.arange(len(lengths)), lengths - 1]
    else:
        projected = layer(sequence)
        dimension = 1 if sequence.dim() == 3 and cast(Any, module).batch_first else 0
        first, last = projected.select(dimension, 0), projected.select(dimension, -1)
    width = hidden.shape[-1]
    ends = [last[..., :width], *([first[..., width:]] if cast(Any, module).bidirectional else [])]
    hidden = torch.cat([hidden[: -len(ends)], torch.stack(ends)])
    return projected, (hidden, *state[1:]) if isinstance(state, tuple) else hidden
