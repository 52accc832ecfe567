"""Adapters: what a row of a layer's output is, one small class per layer kind.

Letters in names: B batch, C channels, T steps of a sequence, D features; positions are the pixels of a feature
map, whatever the number of its dimensions.

An adapter returns a tensor whose last dimension holds the features; all other dimensions together count the
observations. Where it can, that is a view: layout and precision are the accumulator's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from delve_ray.checks import check_integer
from delve_ray.errors import OptionError
from delve_ray.feature_maps import feature_map_rows

CONV_METHODS = ("channelwise", "mean", "max", "median", "flatten")
TIMESERIES_METHODS = ("timestepwise", "last_timestep")
INTERPOLATIONS = ("nearest", "nearest-exact", "area", "linear", "bilinear", "trilinear", "bicubic")


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How outputs with positions or steps become rows; see `SaturationTracker` for each."""

    conv_method: str = "channelwise"
    timeseries_method: str = "timestepwise"
    interpolation_strategy: str | None = None
    interpolation_downsampling: int = 32


class LayerAdapter:
    """What the recorder must know about a kind of layer.

    Attributes:
        sequence: whether rows of three dimensions are the steps of sequences, so that `last_timestep` applies.
        batch_first: whether the rows' first dimension is known to be the batch.
    """

    sequence = True
    batch_first = True

    def features(self, module: nn.Module, options: RowOptions) -> int | None:
        """Number of features D of a row; None where only a forward tells."""
        raise NotImplementedError

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """The rows of a forward's output, shape (…, D)."""
        raise NotImplementedError

    def has_steps(self, rows: Tensor) -> bool:
        """Whether the dimensions between the first and the last are steps, and not positions of feature maps."""
        return self.sequence

    def row_dimensions(self, module: nn.Module, dimensions: int, options: RowOptions) -> set[int]:
        """Which of an output's dimensions one row is made of, and must be whole where the others are spread."""
        if self.sequence and dimensions == 3 and options.timeseries_method == "last_timestep":
            return {2, 1 if getattr(module, "batch_first", True) else 0}
        return {dimensions - 1}


class TokenAdapter(LayerAdapter):
    """(…, D): Linear, Bilinear, Embedding and others; each leading index is an observation, every token counts."""

    batch_first = False

    def __init__(self, width: str) -> None:
        self.width = width

    def features(self, module: nn.Module, options: RowOptions) -> int | None:
        """The attribute called `width`."""
        width = getattr(module, self.width)
        return int(width[-1] if isinstance(width, Sequence) else width)

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """The output itself; of a nested one the values, which have no padding."""
        return _tokens(first_tensor(output), options)


class FeatureMapAdapter(LayerAdapter):
    """B×C×positions or unbatched C×positions: convolutions, and normalisations of feature maps.

    `channelwise`, each position is an observation of C features; `mean`, `max` and `median` (the lower of the two
    middle ones) are taken over the positions of each channel; `flatten` makes one row of all channels and positions.
    """

    sequence = False

    def __init__(self, width: str, dimensions: int | None) -> None:
        self.width = width
        self.dimensions = dimensions

    def features(self, module: nn.Module, options: RowOptions) -> int | None:
        """The channels; of a flattened map only a forward tells, as of a lazy normalisation."""
        return None if options.conv_method == "flatten" else int(getattr(module, self.width)) or None

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """(B, positions…, C), or (B, D) with the other methods; an unbatched map has B = 1."""
        x: Tensor = output
        if self.dimensions is not None and x.dim() == self.dimensions + 1:
            x = x.unsqueeze(0)
        return feature_map_rows(x, options)

    def row_dimensions(self, module: nn.Module, dimensions: int, options: RowOptions) -> set[int]:
        """The channels, and the positions where the options combine them."""
        return _map_dimensions(0 if self.dimensions == dimensions - 1 else 1, dimensions, options)


class RecurrentAdapter(LayerAdapter):
    """LSTM, GRU, RNN: the output sequence, T×B×D, or B×T×D with batch_first, or T×D unbatched, or packed.

    `timestepwise`, each step of each sequence is an observation; a packed sequence has no padding.
    `last_timestep`, the last (valid) step of each sequence is. D is hidden_size, or proj_size where set, twice
    that when bidirectional.
    """

    def features(self, module: nn.Module, options: RowOptions) -> int | None:
        """Width of the output sequence."""
        layer: Any = module
        return int(getattr(layer, "proj_size", 0) or layer.hidden_size) * (2 if layer.bidirectional else 1)

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """(B, T, D); of a packed sequence the steps (N, D), or the last ones (B, D)."""
        sequence: Tensor | PackedSequence = output[0]
        if not isinstance(sequence, PackedSequence):
            return _batch_first(sequence, module)
        if options.timeseries_method == "timestepwise":
            return sequence.data
        padded, lengths = pad_packed_sequence(sequence, batch_first=True)
        return padded[torch.arange(len(lengths)), lengths - 1]


class CellAdapter(LayerAdapter):
    """LSTMCell, GRUCell, RNNCell: the hidden state, B×D or D; each call is one step of each sequence."""

    sequence = False

    def features(self, module: nn.Module, options: RowOptions) -> int | None:
        """`hidden_size`."""
        return int(cast(Any, module).hidden_size)

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """The hidden state (B, D)."""
        return first_tensor(output)


class AttentionAdapter(LayerAdapter):
    """MultiheadAttention: its output, T×B×D, or B×T×D with batch_first, or T×D unbatched. D is embed_dim.

    Its projection `out_proj` is used as a weight and never called, so the output of the whole is the layer's.
    """

    def features(self, module: nn.Module, options: RowOptions) -> int | None:
        """`embed_dim`."""
        return int(cast(Any, module).embed_dim)

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """(B, T, D); of a nested tensor the values (N, D)."""
        tensor: Tensor = output[0]
        return _tokens(tensor, options) if tensor.is_nested else _batch_first(tensor, module)


class OutputAdapter(LayerAdapter):
    """Any other module: the first floating-point tensor in its output, a tensor, tuple, list or mapping.

    With `dimensions` a tensor of that many dimensions beside batch and channels is a feature map B×C×positions;
    every other one has its features last. `rows` and `features` say otherwise, see `register_adapter`.
    """

    batch_first = False

    def __init__(
        self,
        rows: Callable[[nn.Module, Any], Tensor] | None = None,
        features: int | str | Callable[[nn.Module], int] | None = None,
        dimensions: int = 0,
    ) -> None:
        self._rows = rows
        self._features = features
        self.dimensions = dimensions

    def features(self, module: nn.Module, options: RowOptions) -> int | None:
        """What was said, or None: the first forward tells."""
        given = self._features
        if given is None or isinstance(given, int):
            return given
        kind = type(module).__name__
        if isinstance(given, str) and not hasattr(module, given):
            raise OptionError(f"features={given!r} of the adapter for {kind}: the module has no such attribute")
        width = getattr(module, given) if isinstance(given, str) else given(module)
        return check_integer(f"features (of the adapter for {kind})", width, at_least=1)

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """The rows (…, D)."""
        if self._rows is not None:
            return self._rows(module, output)
        tensor = first_tensor(output)
        return feature_map_rows(tensor, options) if self._is_map(tensor.dim()) else _tokens(tensor, options)

    def _is_map(self, dimensions: int) -> bool:
        return self.dimensions > 0 and dimensions == self.dimensions + 2

    def has_steps(self, rows: Tensor) -> bool:
        """Not where they are those of a feature map."""
        return not self._is_map(rows.dim())

    def row_dimensions(self, module: nn.Module, dimensions: int, options: RowOptions) -> set[int]:
        """Of a function's rows nobody knows; samples at least are whole."""
        if self._rows is not None:
            return set(range(1, dimensions))
        if self._is_map(dimensions):
            return _map_dimensions(1, dimensions, options)
        return super().row_dimensions(module, dimensions, options)


def _map_dimensions(channels: int, dimensions: int, options: RowOptions) -> set[int]:
    combined = options.conv_method != "channelwise" or options.interpolation_strategy is not None
    return set(range(channels, dimensions if combined else channels + 1))


def first_tensor(output: Any) -> Tensor:
    """The first floating-point tensor of at least one dimension in an output. Raises TypeError without one."""
    found = search_tensor(output)
    if found is None:
        raise TypeError(
            f"a {type(output).__name__} without a floating-point tensor; leave the layer out, or say with "
            f"delve_ray.register_adapter what its rows are"
        )
    return found


def search_tensor(output: Any) -> Tensor | None:
    """The tensor that `first_tensor` finds, None where there is none; a loss, without dimensions, is passed over."""
    if isinstance(output, Tensor):
        return output if output.dim() and (output.is_floating_point() or output.is_quantized) else None
    if isinstance(output, PackedSequence):
        return output.data
    if is_dataclass(output):
        output = vars(output)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        for item in output:
            found = search_tensor(item)
            if found is not None:
                return found
    return None


def has_padding(output: Any) -> bool:
    """Whether a mask can concern this output: packed sequences and nested tensors hold no padding."""
    first = output[0] if isinstance(output, tuple) and not isinstance(output, PackedSequence) and output else output
    return not (isinstance(first, PackedSequence) or (isinstance(first, Tensor) and first.is_nested))


def _tokens(tensor: Tensor, options: RowOptions) -> Tensor:
    """The tensor itself; of a nested one, which has no padding, all steps (N, D) or the last ones (B, D)."""
    if not tensor.is_nested:
        return tensor
    if options.timeseries_method == "last_timestep":
        return torch.stack([steps[-1] for steps in tensor.unbind() if len(steps)])
    return tensor.values().view(-1, tensor.size(-1))


def _batch_first(sequence: Tensor, module: nn.Module) -> Tensor:
    """(B, T, D) as a view, B = 1 for an unbatched sequence."""
    if sequence.dim() == 2:
        return sequence.unsqueeze(0)
    return sequence if cast(Any, module).batch_first else sequence.transpose(0, 1)


_CONVOLUTIONS: dict[type[nn.Module] | str, LayerAdapter] = {
    kind: FeatureMapAdapter("out_channels", 1 + index % 3)
    for index, kind in enumerate(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    )
}
ADAPTERS: dict[type[nn.Module] | str, LayerAdapter] = {
    nn.Linear: TokenAdapter("out_features"),
    nn.Bilinear: TokenAdapter("out_features"),
    **_CONVOLUTIONS,
    nn.RNNBase: RecurrentAdapter(),
    nn.RNNCellBase: CellAdapter(),
    nn.MultiheadAttention: AttentionAdapter(),
    nn.Embedding: TokenAdapter("embedding_dim"),
    nn.EmbeddingBag: TokenAdapter("embedding_dim"),
    "transformers.pytorch_utils.Conv1D": TokenAdapter("nf"),
    "torch.ao.nn.quantized.modules.linear.Linear": TokenAdapter("out_features"),
    **{
        f"torch.ao.nn.quantized.modules.conv.{kind.__name__}": adapter
        for kind, adapter in _CONVOLUTIONS.items()
        if isinstance(kind, type)
    },
    "torch.ao.nn.quantized.modules.embedding_ops.Embedding": TokenAdapter("embedding_dim"),
    "torch.ao.nn.quantized.dynamic.modules.rnn.RNNBase": RecurrentAdapter(),
    "torch.ao.nn.quantized.dynamic.modules.rnn.RNNCellBase": CellAdapter(),
}
"""Adapter by layer class, or by its full name where importing it would cost too much; recorded by default."""
NORMALISATIONS: dict[type[nn.Module], LayerAdapter] = {
    nn.LayerNorm: TokenAdapter("normalized_shape"),
    **({nn.RMSNorm: TokenAdapter("normalized_shape")} if hasattr(nn, "RMSNorm") else {}),
    nn.GroupNorm: FeatureMapAdapter("num_channels", None),
    nn.InstanceNorm1d: FeatureMapAdapter("num_features", 1),
    nn.InstanceNorm2d: FeatureMapAdapter("num_features", 2),
    nn.InstanceNorm3d: FeatureMapAdapter("num_features", 3),
    _NormBase: FeatureMapAdapter("num_features", None),
}
"""Adapters of layers that are recorded on request: their outputs repeat what comes before them, rescaled."""


def adapter_for(module: nn.Module, *, on_request: bool = False) -> LayerAdapter | None:
    """The adapter of a module's class or nearest base class, None for a module of no known kind.

    The normalisations have one only with `on_request`.
    """
    for cls in type(module).__mro__:
        found = ADAPTERS.get(cls) or ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is None and on_request:
            found = NORMALISATIONS.get(cls)
        if found is not None:
            return found
    return None


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is one of those that `include_conv` is about."""
    return any(cls is _ConvNd or cls.__module__.endswith("quantized.modules.conv") for cls in type(module).__mro__)


def register_adapter(
    kind: type[nn.Module],
    rows: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    features: int | str | Callable[[nn.Module], int] | None = None,
) -> None:
    """Record layers of a class of your own, and of its subclasses, from the next tracker on.

    In distributed training every worker registers it, for example in the module that defines the class.

    Args:
        kind: The class, a subclass of torch.nn.Module.
        rows: Function (module, output) → floating-point tensor (…, D): features last, every other index an
            observation; (B, T, D) are sequences. By default the first tensor of the output. Under torch.compile
            it is traced like the model's own code.
        features: D, the name of the module's attribute that holds it, or a function of the module; by default
            the first forward tells.

    Raises:
        OptionError: `kind` is no class of modules, `rows` no function, or `features` no width; the latter also from
            the tracker, where only the module shows it.

    Example:
        >>> class Gate(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.sigmoid(), x.norm()
        >>> register_adapter(Gate, lambda module, output: output[0])
        >>> adapter_for(Gate()).rows(Gate(), Gate()(torch.zeros(5, 3)), RowOptions()).shape
        torch.Size([5, 3])
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise OptionError(f"kind={kind!r} is no class of torch.nn.Module; give the class of the layer, not a layer")
    if rows is not None and not callable(rows):
        raise OptionError(f"rows={rows!r} is no function; it takes (module, output) and returns a tensor (…, features)")
    if isinstance(features, int):
        check_integer("features", features, at_least=1)
    elif not (features is None or isinstance(features, str) or callable(features)):
        raise OptionError(
            f"features={features!r} is no width: a number, an attribute's name, or a function of the module"
        )
    ADAPTERS[kind] = OutputAdapter(rows, features)
