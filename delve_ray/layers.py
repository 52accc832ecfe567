"""Adapters: what a row of a layer's output is, one small class per layer kind.

Letters in names: B batch, C channels, H×W positions, T steps of a sequence, D features.

An adapter returns a view whose last dimension holds the features; all other dimensions together count the
observations. It copies nothing: layout and precision are the accumulator's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from delve_ray.errors import OptionError

CONV_METHODS = ("channelwise", "mean", "max", "median", "flatten")
TIMESERIES_METHODS = ("timestepwise", "last_timestep")

_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "AveragedModel"})
"""Classes that, like their subclasses, keep what they wrap under the name `module`."""
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names under which torch.compile, FSDP and activation checkpointing keep what they wrap."""


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How outputs with positions or steps become rows."""

    conv_method: str = "channelwise"
    timeseries_method: str = "timestepwise"


class LayerAdapter(Protocol):
    """What the recorder must know about a kind of layer."""

    def features(self, module: nn.Module) -> int:
        """Number of features D of a row."""

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """The rows of a forward's output: a view of shape (…, D)."""


class LinearAdapter:
    """Linear: (…, D), any leading dimensions; each is an observation, so every token of a sequence counts."""

    def features(self, module: nn.Module) -> int:
        """`out_features`."""
        return int(module.out_features)  # type: ignore[arg-type]

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """The output itself; of a nested one the values, which have no padding."""
        tensor: Tensor = output
        return tensor.values().view(-1, self.features(module)) if tensor.is_nested else tensor


class Conv2dAdapter:
    """Conv2d: B×C×H×W or unbatched C×H×W; channelwise, each position is an observation of C features."""

    def features(self, module: nn.Module) -> int:
        """`out_channels`."""
        return int(module.out_channels)  # type: ignore[arg-type]

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """(B, H, W, C) as a view."""
        tensor: Tensor = output
        return tensor.movedim(-3, -1)


class LSTMAdapter:
    """LSTM: the output sequence, T×B×D, or B×T×D with batch_first, or T×D unbatched, or packed.

    `timestepwise`, each step of each sequence is an observation, so the layout does not matter; a packed
    sequence has no padding. `last_timestep`, the last (valid) step of each sequence is the observation.
    D is hidden_size, or proj_size where set, twice that when bidirectional.
    """

    def features(self, module: nn.Module) -> int:
        """Width of the output sequence."""
        lstm: Any = module
        width = lstm.proj_size or lstm.hidden_size
        return int(width) * (2 if lstm.bidirectional else 1)

    def rows(self, module: nn.Module, output: Any, options: RowOptions) -> Tensor:
        """All steps (…, D), or the last step of each sequence (B, D)."""
        sequence: Tensor | PackedSequence = output[0]
        last = options.timeseries_method == "last_timestep"
        if isinstance(sequence, PackedSequence):
            if not last:
                return sequence.data
            padded, lengths = pad_packed_sequence(sequence, batch_first=True)
            return padded[torch.arange(len(lengths)), lengths - 1]
        if not last:
            return sequence
        batch_first: bool = module.batch_first  # type: ignore[assignment]
        return sequence[:, -1] if batch_first and sequence.dim() == 3 else sequence[-1]


ADAPTERS: dict[type[nn.Module], LayerAdapter] = {
    nn.Linear: LinearAdapter(),
    nn.Conv2d: Conv2dAdapter(),
    nn.LSTM: LSTMAdapter(),
}
"""Adapter by layer class; a subclass uses its nearest base class's."""


def adapter_for(module: nn.Module) -> LayerAdapter | None:
    """The adapter of a module's class or nearest base class, None for a module of no known kind."""
    for cls in type(module).__mro__:
        if cls in ADAPTERS:
            return ADAPTERS[cls]
    return None


@dataclass(frozen=True, slots=True)
class TrackedLayer:
    """A module that is recorded: its public name, kind and width."""

    name: str
    module: nn.Module
    adapter: LayerAdapter
    features: int

    @property
    def layer_type(self) -> str:
        """Class name of the module, as shown in the files."""
        return type(self.module).__name__


Modules = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


def _roots(modules: Modules) -> list[tuple[str, nn.Module]]:
    """The modules given, each with the first part of its layers' names. Raises OptionError for anything else."""
    given: Any = modules
    if isinstance(given, nn.Module):
        return [("", given)]
    if isinstance(given, Mapping):
        roots = [(str(key), module) for key, module in given.items()]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        roots = [(str(index), module) for index, module in enumerate(given)]
    else:
        kind = type(given).__name__
        raise OptionError(f"modules={given!r} is a {kind}; give a torch.nn.Module, a list or a dict of them")
    for prefix, root in roots:
        if not isinstance(root, nn.Module):
            raise OptionError(f"modules has an entry {prefix!r} that is a {type(root).__name__}, not a torch.nn.Module")
    return roots


def named_layers(modules: Modules) -> dict[str, nn.Module]:
    """Every module that has an adapter, by the name it has in `model.named_modules()`.

    Prefixes that wrappers add (DDP, FSDP, torch.compile, checkpointing) are removed, so that a name is the
    same with and without them. `modules` may also be a sequence or a mapping of modules; then the index or
    the key is the first part of the name. A module reached by two paths is one layer, under the first.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for prefix, root in _roots(modules):
        parents = dict(root.named_modules())
        for path, module in parents.items():
            if id(module) in seen or adapter_for(module) is None:
                continue
            if isinstance(parents.get(path.rpartition(".")[0]), nn.MultiheadAttention):
                continue  # its projection is used as a weight and never called
            seen.add(id(module))
            name = ".".join(part for part in (prefix, _public_path(path, parents)) if part)
            name = name or type(module).__name__
            if name in found:
                raise OptionError(f"modules has two layers called {name!r}; give the models names that differ")
            found[name] = module
    return found


def _public_path(path: str, modules: Mapping[str, nn.Module]) -> str:
    """A dotted path without the parts that wrappers add."""
    parts = path.split(".") if path else []
    kept = []
    for index, part in enumerate(parts):
        parent = modules.get(".".join(parts[:index]))
        wrapped = part == "module" and any(cls.__name__ in _WRAPPERS for cls in type(parent).__mro__)
        if not wrapped and part not in _WRAPPER_PARTS:
            kept.append(part)
    return ".".join(kept)


def check_uncompiled(modules: Modules | None) -> Modules:
    """Refuse what torch.compile may have run already: hooks that are added after that never fire.

    Raises OptionError when there are no modules, NotImplementedError for a compiled one.
    """
    if modules is None:
        raise OptionError("modules=None: give the model to track")
    for _, root in _roots(modules):
        for path, module in root.named_modules():
            if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
                raise NotImplementedError(
                    f"modules contains the compiled module {path or type(root).__name__!r}: its hooks may never run; "
                    f"make the tracker first, then torch.compile the model"
                )
    return modules


def select_layers(
    modules: Modules,
    *,
    layer_filter: Callable[[dict[str, nn.Module]], dict[str, nn.Module]] | None = None,
    ignore_layer_names: Sequence[str] = (),
    include_conv: bool = True,
) -> list[TrackedLayer]:
    """The layers to record, in network order, after the user's choices; see `SaturationTracker`.

    Raises OptionError when nothing is left, when a name to ignore does not exist, or when `layer_filter`
    returns something that is no part of what it was given.
    """
    known = named_layers(modules)
    if not known:
        kinds = ", ".join(cls.__name__ for cls in ADAPTERS)
        raise OptionError(f"modules has no layer that can be tracked; kinds with an adapter: {kinds}")
    chosen = dict(known)
    if layer_filter is not None:
        rule = "it is a function that returns the dict {name: module} that it is given, with entries removed"
        if not callable(layer_filter):
            raise OptionError(f"layer_filter={layer_filter!r} is not a function; {rule}")
        chosen = layer_filter(dict(known))
        if not isinstance(chosen, dict):
            raise OptionError(f"layer_filter returned a {type(chosen).__name__}; {rule}")
        if foreign := [name for name, module in chosen.items() if known.get(name) is not module]:
            raise OptionError(
                f"layer_filter returned {foreign} that it was not given; {rule}. Given: {', '.join(known)}"
            )
    ignored = [ignore_layer_names] if isinstance(ignore_layer_names, str) else ignore_layer_names
    if not isinstance(ignored, Sequence | Set) or not all(isinstance(name, str) for name in ignored):
        raise OptionError(
            f"ignore_layer_names={ignore_layer_names!r} is not a list of layer names; the model's: {', '.join(known)}"
        )
    if unknown := sorted(set(ignored) - set(known)):
        raise OptionError(f"ignore_layer_names has {unknown}, which the model does not; its layers: {', '.join(known)}")
    layers = []
    for name, module in known.items():
        adapter = adapter_for(module)
        if name not in chosen or name in ignored or adapter is None:
            continue
        if isinstance(module, nn.Conv2d) and not include_conv:
            continue
        layers.append(TrackedLayer(name, module, adapter, adapter.features(module)))
    if not layers:
        raise OptionError(
            f"layer_filter, ignore_layer_names and include_conv leave no layer to track out of: {', '.join(known)}"
        )
    return layers
