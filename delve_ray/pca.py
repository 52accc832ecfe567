"""Acting on a run: a trained model with its layers' outputs projected onto the eigenspaces that were recorded.

Accuracy against δ then shows whether the directions that hold the variance are those that the network needs; random
directions of the same number are the control. Source: Shenk et al., Feature Space Saturation during Training,
arXiv 2006.08679.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from delve_ray.analysis.reading import read_covariances, read_spectra
from delve_ray.analysis.run_files import RunPath, find_runs
from delve_ray.analysis.windows import select_windows
from delve_ray.checks import check_integer
from delve_ray.errors import OptionError, ReadError
from delve_ray.layers import AttentionAdapter, FeatureMapAdapter, OutputAdapter, RecurrentAdapter, RowOptions
from delve_ray.matrices import FLOAT32_EPS
from delve_ray.moments import triangle_size, unpack_triangle
from delve_ray.pca_layers import Conv2dPCALayer as Conv2dPCALayer
from delve_ray.pca_layers import LinearPCALayer as LinearPCALayer
from delve_ray.pca_layers import check_threshold
from delve_ray.projected_outputs import Insertion
from delve_ray.schema import F64, PHASES
from delve_ray.selection import TrackedLayer, named_modules, select_layers
from delve_ray.storage import Storage
from delve_ray.store.run_file import NAME, read_run

log = logging.getLogger(__name__)

SWEEP_SCHEMA = pa.schema(
    [
        pa.field("threshold", pa.float64()),
        pa.field("random", pa.bool_()),
        pa.field("intrinsic_dimensionality", pa.int64()),
        pa.field("saturation", pa.float64()),
        pa.field("value", pa.float64()),
    ]
)
"""What `sweep_thresholds` returns; the dimensionality is the sum of k over the layers, the saturation the mean k/d."""
_MOST_LISTED = 20


class Projection(nn.Module):
    """The projections behind a model's layers, as `project` inserts them; a context manager that removes them.

    They replace the layers' outputs through forward hooks: the model's modules, names and state_dict stay as they are.
    To save them on their own there is this module's state_dict; `model.projection = projection` makes it a part of the
    model, which then saves, moves and copies both (in a Sequential it hands on what it gets). A copy of a model keeps
    projections of its own.

    Example:
        >>> import tempfile
        >>> from delve_ray import SaturationTracker
        >>> model, run = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), tempfile.mkdtemp() + "/run"
        >>> with SaturationTracker(run, "parquet", model, stats=["lsat", "cov"]) as tracker:
        ...     _ = model(torch.randn(64, 8))
        ...     tracker.add_saturations(step=0)
        >>> with project(model, run, threshold=0.9) as projection:
        ...     outputs = model(torch.randn(5, 8))
        ...     projection.threshold = 0.5
        ...     projection.layers["0"].threshold = 1.0
        >>> {name: layer.intrinsic_dimensionality for name, layer in projection.layers.items()}
        {'0': 4, '2': 1}
    """

    def __init__(self, insertions: Sequence[tuple[nn.Module, Insertion]]) -> None:
        super().__init__()
        self.inserted = nn.ModuleDict()
        self._keys: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        for module, insertion in insertions:
            key = "/" + insertion.name.replace(".", "/")  # torch takes no dots, and no names of its own attributes
            while key in self.inserted:
                key += "/"
            self._keys[insertion.name] = key
            self.inserted[key] = insertion.layer
            self._handles.append(module.register_forward_hook(insertion))
        _compile_anew()

    @property
    def layers(self) -> Mapping[str, LinearPCALayer]:
        """The projections by the names of the layers that they stand behind, in network order."""
        found: dict[str, Any] = {name: self.inserted[key] for name, key in self._keys.items()}
        return MappingProxyType(found)

    @property
    def threshold(self) -> dict[str, float]:
        """δ of each layer. Set a number for all layers, or a mapping for some; k follows.

        Raises OptionError for a number outside (0, 1], or a layer that has no projection; then nothing changes.
        """
        return {name: layer.threshold for name, layer in self.layers.items()}

    @threshold.setter
    def threshold(self, value: float | Mapping[str, float]) -> None:
        layers = self.layers
        given = value if isinstance(value, Mapping) else dict.fromkeys(layers, value)
        if unknown := [name for name in given if name not in layers]:
            raise OptionError(f"threshold names {unknown}, which have no projection; there are: {_some(layers)}")
        checked = {name: check_threshold(share) for name, share in given.items()}
        for name, share in checked.items():
            layers[name].threshold = share

    def randomize(self, seed: int | None = 0) -> None:
        """Keep as many random directions in each layer, other ones for each seed; None: the leading ones again."""
        if seed is not None:
            check_integer("seed", seed)
        for index, layer in enumerate(self.layers.values()):
            if seed is not None:  # each layer draws its own, also where widths are the same
                layer.seed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
            layer.random = seed is not None

    def remove(self) -> None:
        """Take the projections out: the model is as it was. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _compile_anew()

    def forward(self, x: Any) -> Any:
        """The input itself: what projects are the hooks."""
        return x

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def project(
    model: nn.Module,
    run: RunPath,
    threshold: float | Mapping[str, float] = 0.99,
    *,
    layers: Sequence[str] | str | None = None,
    phase: str = "train",
    step: int | None = None,
    centering: bool = True,
    random: bool = False,
    seed: int = 0,
) -> Projection:
    """Project the outputs of a model's layers onto the eigenspaces that a run recorded of them.

    Every row that was recorded as an observation is projected: tokens and steps of sequences, positions of feature
    maps. Of a recurrent layer's final hidden state that are the rows of its last layer; its cell state stays.

    Args:
        model: The model that was tracked, or one with layers of the same names and widths, on any device.
        run: The run's savefile: a path, a URI or a `Storage`. It was tracked with "cov" among its stats.
        threshold: δ in (0, 1], for all layers or by name (then 0.99 for the others); see `Projection.threshold`.
        layers: Names of layers, or patterns over names such as "encoder.*"; by default all that the window has.
        phase: "train" or "eval": whose covariances.
        step: Of which window; by default the phase's last.
        centering: False projects towards zero and not the mean, see `LinearPCALayer.from_covariance`.
        random: True keeps random directions of the same number, see `Projection.randomize`.
        seed: Of the random directions.

    Raises:
        ReadError: no single run there, one without covariances, no such window, a layer that the model does not have
            or has in another width, or whose rows cannot be put back: those of `conv_method="mean"` and the like.
        OptionError: an option that cannot be used, or a layer that has a projection already.
    """
    _check_shares(threshold)
    check_integer("seed", seed)
    window = _read_window(run, layers, phase, step)
    insertions = []
    for found in _find_layers(model, window):
        module = found.module
        if any(isinstance(hook, Insertion) for hook in module._forward_hooks.values()):
            raise OptionError(f"layer {found.name!r} has a projection already; remove() that one before")
        layer = _make_layer(found, window, centering)
        insertions.append((module, Insertion(found.name, layer, found.adapter, window.options)))
    projection = Projection(insertions)
    try:
        projection.threshold = threshold
        if random:
            projection.randomize(seed)
    except BaseException:
        projection.remove()
        raise
    return projection


def sweep_thresholds(projection: Projection, evaluate: Callable[[], float], thresholds: Iterable[float]) -> pa.Table:
    """What `evaluate()` says of the projected model at each δ, as rows of `SWEEP_SCHEMA`.

    Directions stay the leading or the random ones that they are; afterwards the thresholds are those of before. Raises
    OptionError for a δ outside (0, 1], before anything is evaluated.
    """
    shares = [check_threshold(share) for share in thresholds]
    before = projection.threshold
    layers = list(projection.layers.values())
    rows = []
    try:
        for share in shares:
            projection.threshold = share
            kept = [layer.intrinsic_dimensionality for layer in layers]
            saturation = float(np.mean([k / layer.in_features for k, layer in zip(kept, layers, strict=True)]))
            rows.append((share, layers[0].random, sum(kept), saturation, float(evaluate())))
    finally:
        projection.threshold = before
    return pa.Table.from_pylist([dict(zip(SWEEP_SCHEMA.names, row, strict=True)) for row in rows], schema=SWEEP_SCHEMA)


# --- what the run recorded -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Window:
    """The covariances of one window: (mean, packed covariance) by layer, and how rows were made."""

    where: str
    moments: Mapping[str, tuple[F64, F64]]
    options: RowOptions
    product_eps: float


def _read_window(run: RunPath, layers: Sequence[str] | str | None, phase: str, step: int | None) -> _Window:
    """The window's covariances of the chosen layers. Raises ReadError."""
    if phase not in PHASES:
        raise ReadError(f"phase={phase!r} is none of {', '.join(map(repr, PHASES))}")
    found = find_runs(run, "covariances")
    if len(found) > 1:
        uris = [storage.uri for storage in found]
        raise ReadError(f"run={str(run)!r} holds {len(found)} runs; name one of them: {_some(uris)}")
    storage = found[0]
    rows = read_covariances(storage, columns=["run", "phase", "step", "layer", "samples"])
    if not rows.num_rows:
        raise ReadError(
            f'{storage.uri} has no covariances; track it with "cov" among the statistics, such as '
            f'SaturationTracker(…, save_to="parquet", stats=["lsat", "idim", "cov"]); sketched layers have none'
        )
    names = pc.unique(rows.column("run")).to_pylist()
    if len(names) > 1:
        raise ReadError(f"{storage.uri} holds the covariances of several runs, {_some(names)}; keep those of one there")
    try:
        step = select_windows(rows, step, phase)[phase]
    except ReadError as error:
        raise ReadError(f"{storage.uri}/covariances: {error}") from None
    where = f"{storage.uri}, {phase} step {step}"
    window = (pc.field("phase") == phase) & (pc.field("step") == step)
    seen = {row["layer"]: row["samples"] for row in rows.filter(window).to_pylist()}
    sketched = read_spectra(storage, ["layer"], window & pc.field("sketched")).column("layer").to_pylist()
    chosen = _choose_layers(layers, list(seen), sketched, where)
    if empty := [name for name in chosen if not seen[name]]:
        raise ReadError(f"{where}: {_some(empty)} had no finite row there; choose another step, or other layers=[…]")
    table = read_covariances(
        storage, columns=["layer", "mean", "covariance"], filters=window & pc.field("layer").isin(chosen)
    )
    columns = (table.column(name) for name in ("layer", "mean", "covariance"))
    moments = {
        name.as_py(): (mean.values.to_numpy(), packed.values.to_numpy())
        for name, mean, packed in zip(*columns, strict=True)
    }
    return _Window(where, moments, *_recorded_with(storage))


def _choose_layers(layers: Sequence[str] | str | None, names: list[str], sketched: list[str], where: str) -> list[str]:
    """The layers of a window that names and patterns choose, in its order; sketched ones have no covariance."""
    given: Any = ["*"] if layers is None else [layers] if isinstance(layers, str) else layers
    if not isinstance(given, Sequence) or not given or not all(isinstance(pattern, str) for pattern in given):
        raise OptionError(f'layers={layers!r} is not a list of names or patterns over names, such as ["encoder.*"]')
    chosen: set[str] = set()
    for pattern in given:
        fitting, without = (_fitting(pattern, among) for among in (names, sketched))
        if not fitting and without:
            raise ReadError(
                f"layers has {pattern!r}, of which {where} has sketches alone, and no covariance: {_some(without)}; "
                f"record them with max_features of their width, or choose others"
            )
        if not fitting:
            raise ReadError(f"layers has {pattern!r}, which fits nothing in {where}; its layers: {_some(names)}")
        if without:
            log.warning("%s: sketched layers have no covariance and are not projected: %s", where, _some(without))
        chosen.update(fitting)
    return [name for name in names if name in chosen]


def _fitting(pattern: str, names: list[str]) -> list[str]:
    return [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]


def _recorded_with(storage: Storage) -> tuple[RowOptions, float]:
    """How the run made rows, and the epsilon of its products; the defaults where run.json is not there."""
    described = read_run(storage).get("options", {}) if storage.exists(NAME) else {}
    recording = described.get("recording") or {}
    known = {field.name: recording[field.name] for field in fields(RowOptions) if field.name in recording}
    return RowOptions(**known), float(described.get("product_eps", FLOAT32_EPS))


# --- the model's layers ----------------------------------------------------------------------------------


def _find_layers(model: nn.Module, window: _Window) -> list[TrackedLayer]:
    """The model's layers of the window, in network order. Raises ReadError for one that does not fit."""
    present = named_modules(model)
    if missing := [name for name in window.moments if name not in present]:
        raise ReadError(
            f"{window.where} has {_some(missing)}, which the model does not; give the model that was tracked, or "
            f"choose among its layers with layers=[…]. The model's: {_some(list(present))}"
        )
    names = list(window.moments)
    layers = [layer for layer in select_layers(model, layers=names, options=window.options) if layer.name in names]
    for layer in layers:
        features = window.moments[layer.name][0].size
        if problem := _unprojectable(layer, window.options):
            raise ReadError(f"{window.where}: {layer.name} {problem}; choose other layers=[…], or track it otherwise")
        if layer.features not in (None, features):
            raise ReadError(
                f"{window.where}: {layer.name} has {features} features there and {layer.features} in the model, a "
                f"{layer.layer_type}; give the model that was tracked, or choose other layers=[…]"
            )
    return layers


def _unprojectable(layer: TrackedLayer, options: RowOptions) -> str | None:
    """Why rows of a layer cannot be put back into its output, in words; None where they can."""
    adapter = layer.adapter
    if isinstance(adapter, OutputAdapter) and adapter._rows is not None:
        return "has rows that a function given to register_adapter makes, and nothing says how they go back"
    if isinstance(adapter, FeatureMapAdapter) or (isinstance(adapter, OutputAdapter) and adapter.dimensions):
        if options.conv_method != "channelwise":
            return f"was recorded with conv_method={options.conv_method!r}, so that a position is no observation"
        if options.interpolation_strategy not in (None, "nearest", "nearest-exact"):
            return f"was recorded with interpolation_strategy={options.interpolation_strategy!r}, which mixes positions"
    elif isinstance(adapter, RecurrentAdapter | AttentionAdapter) and options.timeseries_method == "last_timestep":
        return "was recorded with timeseries_method='last_timestep', so that other steps are no observations"
    return None


def _make_layer(found: TrackedLayer, window: _Window, centering: bool) -> LinearPCALayer:
    """The projection of one layer, on its device."""
    mean, packed = window.moments[found.name]
    kind, dim, adapter = LinearPCALayer, -1, found.adapter
    if isinstance(adapter, FeatureMapAdapter):
        dim = 1 if adapter.dimensions is None else -adapter.dimensions - 1
        kind = Conv2dPCALayer if dim == Conv2dPCALayer.default_dim else LinearPCALayer
    if packed.shape != (triangle_size(mean.size),):
        raise ReadError(f"{window.where}: the covariance of {found.name} is damaged, {packed.size} values; restore it")
    try:
        layer = kind.from_covariance(
            mean,
            unpack_triangle(packed, mean.size),
            centering=centering,
            dim=dim,
            product_eps=window.product_eps,
        )
    except OptionError:
        raise
    except ValueError as error:
        raise ReadError(f"{window.where}: {found.name} has no eigenspace: {error}") from error
    weight = next((p for p in found.module.parameters() if p.device.type != "meta"), None)
    return layer if weight is None else layer.to(weight.device)


def _check_shares(threshold: object) -> None:
    for share in threshold.values() if isinstance(threshold, Mapping) else [threshold]:
        check_threshold(share)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _MOST_LISTED
    return ", ".join(map(repr, listed[:_MOST_LISTED])) + (f" and {more} more" if more > 0 else "")


def _compile_anew() -> None:
    """Forget what torch.compile has compiled: it does not look whether hooks have come or gone."""
    dynamo: Any = sys.modules.get("torch._dynamo.convert_frame")
    if getattr(dynamo, "FRAME_COUNTER", 0):
        log.info("torch.compile has run in this process: its caches are reset, as hooks have changed")
        torch._dynamo.reset()
