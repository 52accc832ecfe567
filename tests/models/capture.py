"""What a model's layers put out, by a path of its own: no hook, no adapter, no accumulator.

Each layer's `forward` is replaced on the instance by one that copies the output to float64. Which layers there
are, how wide they are and what their rows look like stands in a table here, written down a second time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from tests.helpers import F64

Rows = dict[tuple[str, str], F64]
"""Rows of shape (n, d) by (name of the layer, name of the phase)."""


def array(output: Tensor) -> F64:
    """A copy in float64, which holds every value of every narrower type."""
    copy: F64 = output.detach().to(torch.float64, copy=True).numpy()
    return copy


def last_dimension(layer: Any, output: Any) -> F64:
    """Linear and its like: whatever precedes the last dimension counts observations."""
    values = array(output)
    return values.reshape(-1, values.shape[-1])


def maps(dimensions: int) -> Callable[[Any, Any], F64]:
    """Convolutions: the channels at each position of each image, one image after the other."""

    def rows(layer: Any, output: Any) -> F64:
        images = array(output)
        images = images.reshape(-1, *images.shape[-dimensions - 1 :])
        return np.concatenate([image.reshape(len(image), -1).T for image in images])

    return rows


def steps(layer: Any, output: Any) -> F64:
    """Recurrent networks: every step of every sequence; a packed sequence is padded and cut to its lengths."""
    sequences = output[0]
    if not isinstance(sequences, PackedSequence):
        return last_dimension(layer, sequences)
    padded, lengths = pad_packed_sequence(sequences, batch_first=True)
    return np.concatenate([array(one)[:length] for one, length in zip(padded, lengths.tolist(), strict=True)])


def first_of_pair(layer: Any, output: Any) -> F64:
    """LSTM cells (hidden and cell state) and attention (output and weights)."""
    return last_dimension(layer, output[0])


KINDS: dict[type[nn.Module], tuple[Callable[[Any], int], Callable[[Any, Any], F64]]] = {
    nn.Linear: (lambda layer: len(layer.weight), last_dimension),
    nn.Bilinear: (lambda layer: len(layer.weight), last_dimension),
    nn.Conv1d: (lambda layer: len(layer.weight), maps(1)),
    nn.Conv2d: (lambda layer: len(layer.weight), maps(2)),
    nn.Conv3d: (lambda layer: len(layer.weight), maps(3)),
    nn.ConvTranspose1d: (lambda layer: layer.weight.shape[1] * layer.groups, maps(1)),
    nn.ConvTranspose2d: (lambda layer: layer.weight.shape[1] * layer.groups, maps(2)),
    nn.ConvTranspose3d: (lambda layer: layer.weight.shape[1] * layer.groups, maps(3)),
    # What one step hands on to the next, once for each direction.
    nn.RNNBase: (lambda layer: layer.weight_hh_l0.shape[1] * (1 + hasattr(layer, "weight_hh_l0_reverse")), steps),
    nn.LSTMCell: (lambda layer: layer.weight_hh.shape[1], first_of_pair),
    nn.GRUCell: (lambda layer: layer.weight_hh.shape[1], last_dimension),
    nn.RNNCell: (lambda layer: layer.weight_hh.shape[1], last_dimension),
    nn.MultiheadAttention: (lambda layer: len(layer.out_proj.weight), first_of_pair),
    nn.Embedding: (lambda layer: layer.weight.shape[1], last_dimension),
    nn.EmbeddingBag: (lambda layer: layer.weight.shape[1], last_dimension),
}
"""By class: the width of a layer, from the shapes of its parameters, and the rows of an output."""


def kind_of(module: nn.Module) -> tuple[Callable[[Any], int], Callable[[Any, Any], F64]] | None:
    """The entry of a module, None where it has none."""
    for cls, kind in KINDS.items():
        if isinstance(module, cls):
            return kind
    transformers: Any = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and isinstance(module, transformers.Conv1D):  # a Linear with its weight transposed
        return lambda layer: layer.weight.shape[1], last_dimension
    return None


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a tracker must record, by name, in the order of the model."""
    layers = {name: module for name, module in model.named_modules() if kind_of(module) is not None}
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    return {name: module for name, module in layers.items() if id(module) not in inside}


def width_of(module: nn.Module) -> int:
    """The number of features of one of these layers."""
    kind = kind_of(module)
    assert kind is not None
    return int(kind[0](module))


class Capture:
    """Keeps the rows of every layer of a model, in those forwards that run inside `observe`.

    Attributes:
        layers: the layers that are watched, by name.
        elsewhere: how many of their forwards ran outside `observe`, as in a backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = layers_of(model)
        self.elsewhere = 0
        self._kept: dict[tuple[str, str], list[F64]] = {}
        self._observing = False
        for name, module in self.layers.items():
            module.forward = self._keeping(name, module)

    def _keeping(self, name: str, module: nn.Module) -> Callable[..., Any]:
        forward, kind = module.forward, kind_of(module)
        assert kind is not None

        def keep(*args: Any, **options: Any) -> Any:
            output = forward(*args, **options)
            if self._observing:
                phase = "train" if module.training else "eval"
                self._kept.setdefault((name, phase), []).append(kind[1](module, output))
            else:
                self.elsewhere += 1
            return output

        return keep

    def observe(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run a forward and keep its rows."""
        self._observing = True
        try:
            return forward()
        finally:
            self._observing = False

    def window(self) -> Rows:
        """The rows since the last call."""
        kept, self._kept = self._kept, {}
        return {key: np.concatenate(parts) for key, parts in kept.items()}

    def close(self) -> None:
        """Give every layer its own forward back."""
        for module in self.layers.values():
            del module.forward
