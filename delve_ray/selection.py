"""Which modules of a model are recorded, and under which name."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from delve_ray.errors import OptionError
from delve_ray.layers import (
    ADAPTERS,
    FeatureMapAdapter,
    LayerAdapter,
    OutputAdapter,
    RowOptions,
    adapter_for,
    is_convolution,
)

log = logging.getLogger(__name__)

_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "AveragedModel"})
"""Classes that, like their subclasses, keep what they wrap under the name `module`."""
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names under which torch.compile, FSDP and activation checkpointing keep what they wrap."""
_WEIGHTS = frozenset({"parametrizations", "_packed_params"})
"""Names under which parametrized and quantized layers keep modules that make or hold their weights."""
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

_PUBLIC_NAMES = {nn.RNNBase: "LSTM, GRU, RNN", nn.RNNCellBase: "LSTMCell, GRUCell, RNNCell"}

LayerFilter = Callable[[dict[str, nn.Module]], dict[str, nn.Module]]


@dataclass(frozen=True, slots=True)
class TrackedLayer:
    """A module that is recorded: its public name, kind and width, None where only its first forward tells."""

    name: str
    module: nn.Module
    adapter: LayerAdapter
    features: int | None

    @property
    def layer_type(self) -> str:
        """Class name of the module, as shown in the files: without what parametrizations and FSDP make of it."""
        kind = parametrize.type_before_parametrizations(self.module)
        if [base.__name__ for base in kind.__bases__[:1]] == ["FSDPModule"]:
            kind = kind.__bases__[1]
        return (getattr(kind, "cls_to_become", None) or kind).__name__  # a lazy layer becomes the other class


Modules = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


def root_modules(modules: Modules | None) -> list[tuple[str, nn.Module]]:
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


def named_modules(modules: Modules | None) -> dict[str, nn.Module]:
    """Every module that a forward calls, by the name it has in `model.named_modules()`.

    Prefixes that wrappers add (DDP, FSDP, torch.compile, checkpointing) are removed, so that a name is the
    same with and without them. `modules` may also be a sequence or a mapping of modules; then the index or
    the key is the first part of the name. A module reached by two paths is one, under the first. A model that
    is itself a layer goes by its class's name.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for prefix, root in root_modules(modules):
        for path, module in _called_modules(root):
            if id(module) in seen:
                continue
            seen.add(id(module))
            name = ".".join(part for part in (prefix, path) if part) or _root_name(module)
            if name in found:
                raise OptionError(f"modules has two layers called {name!r}; give the models names that differ")
            found[name] = module
    return found


def _root_name(root: nn.Module) -> str:
    """The name of a model as a layer of itself, which has none: its class's, unless a child has that."""
    name = type(root).__name__
    return f"{name} (root)" if name in dict(root.named_children()) else name


def _called_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Public path and module, without wrappers and without what is used as a weight and never called."""
    parents = dict(root.named_modules())
    for path, module in parents.items():
        parts = path.split(".") if path else []
        projection = path and isinstance(parents.get(path.rpartition(".")[0]), nn.MultiheadAttention)
        if projection or _wraps(module) or not _WEIGHTS.isdisjoint(parts):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            if not isinstance(parents.get(path.rpartition(".")[0] if path else "-"), torch.jit.ScriptModule):
                log.warning("%s is a ScriptModule, which takes no hooks; it is not recorded", path or "the model")
            continue
        kept = []
        for index, part in enumerate(parts):
            parent = parents.get(".".join(parts[:index]))
            if part not in _WRAPPER_PARTS and not (part == "module" and _wraps(parent)):
                kept.append(part)
        yield ".".join(kept), module


def _wraps(module: nn.Module | None) -> bool:
    """Whether a module only hands its inputs on to the one inside it."""
    kinds = {cls.__name__ for cls in type(module).__mro__}
    return bool(kinds & _WRAPPERS) or (
        module is not None and any(name in _WRAPPER_PARTS for name, _ in module.named_children())
    )


def named_layers(modules: Modules | None) -> dict[str, nn.Module]:
    """The modules that are recorded by default, by public name: those whose class has an adapter."""
    return {name: module for name, module in named_modules(modules).items() if adapter_for(module) is not None}


def select_layers(
    modules: Modules | None,
    *,
    layers: Sequence[str] | str | None = None,
    layer_filter: LayerFilter | None = None,
    ignore_layer_names: Sequence[str] = (),
    include_conv: bool = True,
    options: RowOptions | None = None,
) -> list[TrackedLayer]:
    """The layers to record, in network order, after the user's choices; see `SaturationTracker`.

    Raises OptionError when nothing is left, when a name or pattern fits no module, or when `layer_filter`
    returns something that is no part of the model.
    """
    everything = named_modules(modules)
    default = {name: module for name, module in everything.items() if adapter_for(module) is not None}
    if layers is not None:
        chosen = _match(layers, everything, default)
    elif not default and layer_filter is None:
        kinds = ", ".join(_PUBLIC_NAMES.get(cls, cls.__name__) for cls in ADAPTERS if isinstance(cls, type))
        raise OptionError(
            f"modules has no layer that can be tracked; kinds with an adapter: {kinds}. Name other modules with "
            f"layers=[…], or use delve_ray.register_adapter"
        )
    else:
        chosen = dict(default)
    if layer_filter is not None:
        chosen = _filter(layer_filter, chosen, everything)
    ignored = _ignored(ignore_layer_names, default | chosen)
    tracked, guides = [], _guides(everything)
    for name, module in everything.items():
        if name not in chosen or name in ignored or (is_convolution(module) and not include_conv):
            continue
        adapter = adapter_for(module, on_request=True) or _adapter_by_place(guides[name])
        tracked.append(TrackedLayer(name, module, adapter, adapter.features(module, options or RowOptions())))
    if not tracked:
        raise OptionError(
            f"layers, layer_filter, ignore_layer_names and include_conv leave no layer to track out of: "
            f"{', '.join(default or everything)}"
        )
    _report_untracked(everything, {layer.name for layer in tracked})
    return tracked


# --- the user's choices ----------------------------------------------------------------------------------


def _match(
    patterns: Sequence[str] | str, everything: dict[str, nn.Module], default: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The modules that patterns choose: one after the other, each adds what it fits, with "!" takes it away."""
    given = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(given, Sequence) or not given or not all(isinstance(pattern, str) for pattern in given):
        raise OptionError(f'layers={patterns!r} is not a list of patterns over names, such as ["encoder.*", "!*.norm"]')
    chosen = dict(default) if given[0].startswith("!") and given[0] not in everything else {}
    for pattern in given:
        taken_away = pattern.startswith("!") and pattern not in everything  # else it is a name
        wanted = pattern[1:] if taken_away else pattern
        fitting = [name for name, module in everything.items() if _fits(wanted, name, module)]
        if taken_away:
            if not fitting and not any(sign in wanted for sign in "*?["):
                raise _no_such("layers", pattern, wanted, everything)
            for name in fitting:
                chosen.pop(name, None)
        elif fitting:
            chosen |= {name: everything[name] for name in fitting}
        else:
            raise _no_such("layers", pattern, wanted, everything)
    return chosen


def _fits(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether a pattern chooses a module.

    A pattern that ends in "*" means the layers below, not the containers between them; a container is meant by
    a pattern that ends otherwise.
    """
    if isinstance(module, _NEVER_CALLED) or not (name == pattern or fnmatchcase(name, pattern)):
        return False
    if name == pattern:
        return True
    container = next(module.children(), None) is not None and adapter_for(module, on_request=True) is None
    return not (container and pattern.endswith("*"))


def _no_such(option: str, given: str, wanted: str, names: Mapping[str, nn.Module]) -> OptionError:
    if wanted in names:
        kind = type(names[wanted]).__name__
        return OptionError(f"{option} has {given!r}, a {kind}, which is never called; name what is in it: '{wanted}.*'")
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, close))}?" if close else f"its modules: {_some(names)}"
    return OptionError(f"{option} has {given!r}, which fits no module of the model; {hint}")


def _some(names: Mapping[str, nn.Module]) -> str:
    listed = list(names)
    return ", ".join(listed[:40]) + (f" and {len(listed) - 40} more" if len(listed) > 40 else "")


def _filter(
    layer_filter: LayerFilter, chosen: dict[str, nn.Module], everything: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    rule = (
        "it is a function that gets {name: module} of the layers and returns it with entries removed, or with other "
        "modules of the model added under their names"
    )
    if not callable(layer_filter):
        raise OptionError(f"layer_filter={layer_filter!r} is not a function; {rule}")
    kept: Any = layer_filter(dict(chosen))
    if not isinstance(kept, dict):
        raise OptionError(f"layer_filter returned a {type(kept).__name__}; {rule}")
    if foreign := [name for name, module in kept.items() if everything.get(name) is not module]:
        raise OptionError(
            f"layer_filter returned {foreign}, which the model does not have; {rule}. Its modules: {_some(everything)}"
        )
    return kept


def _ignored(names: object, layers: Mapping[str, nn.Module]) -> set[str]:
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Sequence | Set) or not all(isinstance(name, str) for name in given):
        raise OptionError(f"ignore_layer_names={names!r} is not a list of layer names; the model's: {_some(layers)}")
    if unknown := sorted(set(given) - set(layers)):
        raise OptionError(
            f"ignore_layer_names has {unknown}, which the model does not; its layers: {', '.join(layers)}"
        )
    return set(given)


# --- modules without an adapter -----------------------------------------------------------------------------


def _guides(everything: Mapping[str, nn.Module]) -> dict[str, LayerAdapter | None]:
    """For each module the adapter of the last layer of a known kind inside it, or else of the nearest one before it."""
    guides: dict[str, LayerAdapter | None] = {}
    nearest = None
    for name, module in everything.items():
        guides[name] = nearest
        adapter = adapter_for(module)
        if adapter is not None:
            nearest = adapter
            while name := name.rpartition(".")[0]:
                guides[name] = adapter
    return guides


def _adapter_by_place(guide: LayerAdapter | None) -> LayerAdapter:
    """How to read a module of no known kind: as feature maps where its guide makes some, else with features last."""
    return OutputAdapter(dimensions=guide.dimensions or 0 if isinstance(guide, FeatureMapAdapter) else 0)


def _report_untracked(everything: Mapping[str, nn.Module], tracked: Set[str]) -> None:
    """Say which leaves are not recorded though they have weights: quantized ones aloud, as they used to be layers."""
    kinds: Counter[str] = Counter()
    for name, module in everything.items():
        kind = type(module)
        if name in tracked or adapter_for(module, on_request=True) is not None:
            continue
        if "quantized" in kind.__module__ and hasattr(module, "_packed_params"):
            log.warning(
                "layer %s is a %s of %s, for which there is no adapter; it is not recorded. Name it in layers=[…], or "
                "use delve_ray.register_adapter",
                name,
                kind.__name__,
                kind.__module__,
            )
        elif next(module.parameters(recurse=False), None) is not None:
            kinds[kind.__name__] += 1
    if kinds:
        listed = ", ".join(f"{name} ({count})" for name, count in kinds.most_common())
        log.info("not recorded, as no adapter knows them: %s; name them in layers=[…] to record them", listed)


def model_summary(modules: Modules | None) -> dict[str, int]:
    """Numbers of the models' parameters, shared ones once; those whose shape a first forward tells are not counted."""
    parameters = {id(p): p for _, root in root_modules(modules) for p in root.parameters() if not is_lazy(p)}
    return {
        "num_parameters": sum(p.numel() for p in parameters.values()),
        "num_trainable_parameters": sum(p.numel() for p in parameters.values() if p.requires_grad),
    }
