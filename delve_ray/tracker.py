"""`SaturationTracker`: all that a training loop touches."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from delve_ray.checks import check_flag, check_integer, check_name, check_number, check_seconds
from delve_ray.connect import choose, enter, given_store, identify, publication, through_combiner
from delve_ray.ending import Once, close_with_thread, depart
from delve_ray.errors import OptionError, StoreError
from delve_ray.integrations.trial import Trial
from delve_ray.masks import MaskFunction, check_mask
from delve_ray.memory import fit_memory
from delve_ray.options import (
    check_mask_function,
    check_resume,
    check_spill_dir,
    check_state,
    check_trial,
    check_unbuilt,
)
from delve_ray.outbox import Outbox, spill_folder
from delve_ray.recorder import Recorder
from delve_ray.recording import recorder_options
from delve_ray.selection import LayerFilter, Modules, model_summary, root_modules, select_layers
from delve_ray.shipping import Shipper
from delve_ray.store.protocol import LayerInfo
from delve_ray.waiting import wait_metrics, wait_written
from delve_ray.writers import SaveTo, Scalar

log = logging.getLogger(__name__)

WAIT_TIMEOUT_S = 60.0
"""Default deadline of `metrics(wait=True)` and `flush()`."""
CLOSE_TIMEOUT_S = 120.0
"""Default deadline of `close()`."""
_ANY_PHASE = -1


class SaturationTracker:
    """Records how much of each layer's width a network uses while it trains, on one machine or on many.

    Forward hooks reduce each layer's output to moments on its device; a thread ships them to the run's
    covariance store, which publishes eigenspectrum metrics. The constructor has Delve's option names. The same
    line serves in every worker: inside Ray Train run, rank and world size are found, and all ranks meet in one
    store; each Ray Tune trial has its own; with Ray initialised a store is started in the cluster; without Ray it
    lives in the process.

    Args:
        savefile: Directory of the run's files: a local path or a URI that pyarrow.fs opens. A relative path is
            meant from the working directory, in a Ray Train worker from the run's own directory under its
            storage_path, in a Ray Tune trial from the trial's; there it may be left out. A directory that holds a run
            already is refused.
        save_to: "parquet", "tensorboard", "csv", "console", "wandb", "mlflow", a name that another package registers,
            an object with the methods of `delve_ray.writers.Writer`, or a list of these.
        modules: The model, or a list or dict of models. Recorded are Linear, Bilinear, convolutions, recurrent
            layers, MultiheadAttention, embeddings, transformers' Conv1D and what `register_adapter` names.
        layers: Names of modules to record instead, any module, or patterns over names, in which "*" stands for
            anything: ["encoder.*", "!*.dropout"]. Each adds what it fits, or takes it away with "!"; where the first
            takes away, it does so from the layers recorded by default. A pattern that ends in "*" means layers, not
            the containers between them. What has no adapter is read with its features last, or as feature maps
            where the layers inside or before it make some.
        layer_filter: Function of {name: module} that returns it with layers removed, or modules of the model added.
        ignore_layer_names: Names of layers to leave out.
        log_interval: Record every n-th forward of each layer and phase; each window has its first.
        max_samples: Of each layer, phase and window, this worker's first so many rows are looked at, counted after
            `sample_fraction`; masked and non-finite ones are among them.
        sample_fraction: Share of each output's rows (of feature maps, positions, the same for a whole batch) that
            is recorded, chosen anew for every forward, each row with this probability.
        seed: Of that choice, which draws from generators of its own.
        mask: Function that gets what the model's forward gets (each model's, of several) and returns the batch's mask
            or None, see `mask()`. Under torch.compile it is traced like the model's own code.
        stats: Statistics to publish: Delve's short names (lsat, idim, cov, det, trc, dtrc, embed) or the long ones;
            by default every scalar one. "cov" publishes covariances as well; "embed" some rows of each layer along
            the two leading eigenvectors of its covariance; "correlation" and "rankme" are there on request. All of
            these but "cov" take decompositions of their own.
        embed_rows: How many rows of each layer, phase and window "embed" shows at most, 256 by default: a random choice
            among those of all ranks, each as likely as any other, by `seed`.
        include_conv: False leaves out convolutions.
        conv_method: "channelwise": each position of a feature map is an observation of C features; "mean", "max",
            "median" (the lower of two middle ones): over the positions of each channel, an observation per sample;
            "flatten": one observation of all channels and positions per sample.
        interpolation_strategy: A mode of torch's interpolate ("area", "nearest", "linear", …), by which feature maps
            larger than `interpolation_downsampling` along any dimension are resized to it before all else.
        timeseries_method: "timestepwise": each step of each sequence is an observation; "last_timestep": the last
            step of each sequence, the last valid one where a mask or a packed sequence tells. Outputs (B, T, D) count
            as sequences, batch first where the layer does not know better.
        sat_threshold: δ in (0, 1]: the share of variance that the intrinsic dimensionality has to explain; 0.99 by
            default. Of several, the first is that of `saturation`, and rows hold the dimensionality for each.
        device: Where moments are accumulated; by default where each layer's output is.
        initial_epoch: Step of the first window when `add_saturations` is called without one.
        nosave: True writes no file; `metrics()` works.
        store: A `CovarianceStore`, or the handle that `start_store` returned; then savefile, save_to, stats,
            sat_threshold, run and world_size may be left out and are the store's.
        run: Name of the run, the same in all ranks. Found inside Ray Train; needed with several ranks elsewhere.
        rank, world_size: This worker's place among the data-parallel ranks, whose rows differ.
        publish_every: Seconds between live rows (`final` = false) of an open window, or deliveries to `store`; 0: none.
        precision: Of the products: "float32" or "float64"; on a GPU also "tf32", "bfloat16". Sums are float64 always.
        max_features: Layers wider than this, 8192 by default, are sketched: a covariance takes d² values. Their rows
            have the head of the spectrum, with bounds, see docs/wide-layers.md.
        sketch_size: Columns k of such a sketch, which takes d·(k + 1) values; 1024 by default, rounded up to a
            multiple of 8. 0 leaves these layers out, with a warning.
        max_memory: Bytes that recording may take in this worker, device and host together, while the store takes what
            it is sent; checked here, and for layers whose width a forward tells, there: then one is left out by name.
        resume: True goes on with the run that the savefile holds, as its next attempt; a name does so for ranks that
            nobody else tells apart from those of the attempt before: all ranks of this attempt give the same, and no
            earlier one had it. By default a savefile that holds a run is refused, but for a Ray Train run or a
            torchrun that is restarted. Windows that the new attempt closes replace those of the same step.
        spill_dir: Local folder for what waits for the store and does not fit `max_memory`; a temporary one by default.
        max_overhead: Share of the training's time that the hooks may take, such as 0.02. Of each layer, forwards are
            chosen at random, and count as many times as there were for one that was chosen: nothing is biased, and
            `samples` says how many observations stand behind a row. Every window has some forward of each layer.
        num_shards: Of a store that this tracker starts in a Ray cluster: actors that share the layers' moments, spread
            over the nodes, behind the one that has the files; "auto" is one for each node, at most 8. By default 1.
        combine: True merges what the workers of a node have sent for a window before it goes to a store in a Ray
            cluster, so that it takes one delivery per node, not per worker. All or some workers may have it. A store
            in this process gets its rows without a network, and takes no notice.
        trial: What `delve_ray.integrations.tune.current_trial()` says in a trial that starts a trainer, for the
            trainer's workers: they record into the trial's directory, in one run. A trial itself is found.
        writer_args: Options of the writers, by their names: {"wandb": {"project": "cnn"}}.
        name: Of a second tracker in the same workers, such as one for each network of a GAN: its run is called
            `<run>-<name>`, and has a savefile of its own, `saturation-<name>` where that may be left out.
        verbose: True prints a line per window, as save_to="console" does.
        layerwise_sat, average_sat, reset_covariance: Not built yet; another value raises.

    Raises:
        OptionError: an option that cannot be used; it names the option, the value and what would be right.
        RegistrationError: the worker does not fit the run: other layers, other options, a rank taken already.
        NotImplementedError: an option that is understood and not built yet.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> with SaturationTracker(tempfile.mkdtemp() + "/run", save_to="parquet", modules=model) as tracker:
        ...     for epoch in range(2):
        ...         _ = model(torch.randn(64, 8))
        ...         tracker.add_saturations(step=epoch)
        ...     metrics = tracker.metrics(wait=True)
        >>> sorted(metrics)[-3:]
        ['trace/train/0', 'trace/train/2', 'trace/train/mean']
    """

    def __init__(
        self,
        savefile: str | os.PathLike[str] | None = None,
        save_to: SaveTo | None = None,
        modules: Modules | None = None,
        *,
        layer_filter: LayerFilter | None = None,
        ignore_layer_names: Sequence[str] = (),
        writer_args: Mapping[str, Any] | None = None,
        log_interval: int = 1,
        max_samples: int | None = None,
        stats: Sequence[str] | str | None = None,
        layerwise_sat: bool = True,
        reset_covariance: bool = True,
        average_sat: bool = True,
        include_conv: bool = True,
        conv_method: str = "channelwise",
        timeseries_method: str = "timestepwise",
        sat_threshold: float | Sequence[float] | None = None,
        nosave: bool = False,
        verbose: bool = False,
        device: str | torch.device | None = None,
        initial_epoch: int = 0,
        interpolation_strategy: str | None = None,
        interpolation_downsampling: int = 32,
        store: Any = None,
        run: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        publish_every: float = 30.0,
        precision: str = "float32",
        max_overhead: float | None = None,
        max_features: int | None = None,
        sketch_size: int | None = None,
        max_memory: int = 16 << 30,
        layers: Sequence[str] | str | None = None,
        mask: MaskFunction | None = None,
        sample_fraction: float = 1.0,
        seed: int = 0,
        resume: bool | str | None = None,
        spill_dir: str | os.PathLike[str] | None = None,
        name: str | None = None,
        trial: Trial | None = None,
        embed_rows: int | None = None,
        num_shards: int | str | None = None,
        combine: bool = False,
    ) -> None:
        check_unbuilt(locals())
        options = recorder_options(locals())
        live = check_seconds("publish_every", publish_every)
        first_step = check_integer("initial_epoch", initial_epoch, at_least=0)
        check_mask_function(mask)
        spill = check_spill_dir(spill_dir)
        selected = select_layers(
            modules,
            layers=layers,
            layer_filter=layer_filter,
            ignore_layer_names=ignore_layer_names,
            include_conv=check_flag("include_conv", include_conv),
            options=options.rows,
        )
        given = None if store is None else given_store(store)
        settings = given.settings() if given is not None else None
        identity = identify(savefile, run, rank, world_size, settings, check_resume(resume), check_trial(trial), name)
        config = publication(identity, settings, options, publish_every=live, model=model_summary(modules))
        unsaved = check_flag("nosave", nosave)
        shown = check_flag("verbose", verbose)
        check_flag("combine", combine)
        config = choose(
            config,
            settings,
            save_to,
            writer_args,
            stats,
            sat_threshold,
            embed_rows,
            nosave=unsaved,
            verbose=shown,
            num_shards=num_shards,
            max_features=max_features,
            sketch_size=sketch_size,
        )
        self._source = identity.source()
        options = replace(
            options,
            seed=options.seed + self._source.rank,
            embed_rows=config.rows_to_embed,
            max_features=config.max_features,
            sketch_size=config.sketch_size,
        )
        tracked = fit_memory(
            selected,
            max_features=options.max_features,
            max_memory=options.max_memory,
            embed_rows=options.embed_rows,
            sketch_size=options.sketch_size,
        )
        self._recorder = Recorder(tracked, options)
        try:
            if mask is not None:
                self._recorder.ask_for_masks([root for _, root in root_modules(modules)], mask)
            infos = [LayerInfo(layer.name, layer.layer_type, layer.features) for layer in tracked]
            self._store, welcome = enter(identity, self._source, config, infos, given)
        except BaseException:
            self._recorder.close()
            raise
        self._config = config
        outbox = Outbox(config, infos, spill_folder(config.run, self._source.source, spill))
        self._shipper = Shipper(
            through_combiner(self._store, config.run, infos) if combine else self._store,
            self._source,
            welcome,
            self._recorder,
            outbox,
            partial(self._store.register, self._source, config, infos),
            config=config,
            publish_every=live,
            first_step=first_step,
        )
        # After an exception the run stays open for the next attempt, where there can be one.
        self._rejoinable = store is not None or (identity.on_ray and identity.rejoinable)
        self._next_step = first_step
        self._closed_steps: dict[int, int] = {}
        self._closed = False
        self._closing = Once()
        self._recorder.start()
        atexit.register(self.close)
        closes = partial(self._close, CLOSE_TIMEOUT_S, completed=not self._rejoinable)
        self._closed_by_thread = identity.in_thread and close_with_thread(closes)

    # --- in the training loop ------------------------------------------------------------------------------

    def add_saturations(self, step: int | None = None) -> None:
        """Close the window on this rank; returns at once, the store publishes when every rank has closed it.

        Every rank calls it equally often and with the same steps; a rank without rows closes an empty window.
        `step` labels the window: an epoch or a global step, an integer that does not fall; by default one more
        than the last, from `initial_epoch` on. Two windows may have one step if they record different phases.
        Raises OptionError for a step that falls, or that has rows of the same phase already.
        """
        self._check_open("add_saturations")
        label = self._next_step if step is None else check_integer("step", step)
        phases = self._recorder.phases()
        last = max(self._closed_steps.values(), default=label)
        if label < last or any(self._closed_steps.get(phase) == label for phase in phases):
            raise OptionError(
                f"step={label} after step {last}: steps rise, so that a row is one window; leave step out to count them"
            )
        self._closed_steps |= dict.fromkeys((*phases, _ANY_PHASE), label)
        self._next_step = label + 1
        self._shipper.close_window(label)

    def mask(self, mask: Tensor | None, *, batch_first: bool = True) -> AbstractContextManager[None]:
        """Within `with tracker.mask(attention_mask):`, steps of sequences that are padding do not count.

        The mask is boolean or integer, (batch, steps), True or 1 where a step counts, as an attention mask is; a
        `key_padding_mask` of torch's attention is the opposite, `~mask`. Without `batch_first` it is (steps, batch),
        and so are the outputs of layers that do not know their own layout, such as Linear. It holds for outputs
        that begin with its shape, also flattened to rows; rows that stand for whole sequences count where any step
        does. What it does not fit counts whole, with a word. None lifts the mask of an outer block. It does not reach
        the threads of DataParallel. The option `mask=` takes a function of the model's inputs instead.

        Raises OptionError for what is no mask.

        Example:
            >>> model = torch.nn.Linear(3, 2)
            >>> with SaturationTracker(modules=model, nosave=True, savefile="unused") as tracker:
            ...     with tracker.mask(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])):
            ...         _ = model(torch.randn(2, 4, 3))
            ...     tracker.add_saturations()
            ...     _ = tracker.metrics(wait=True)
            ...     tracker.store.covariance("Linear", "train").shape
            (2, 2)
        """
        masks = self._recorder.masks
        return masks.use(None if mask is None else check_mask(mask, batch_first=batch_first))

    def add_scalar(self, name: str, value: SupportsFloat, step: int | None = None) -> None:
        """Record a value beside the spectra, such as an accuracy; returns at once.

        `step` is by default that of the open window. Raises OptionError for a name or value of another type.
        """
        self._check_open("add_scalar")
        check_name("name", name)
        number = check_number("value", value, name)
        label = self._next_step if step is None else check_integer("step", step)
        self._shipper.add_scalar(Scalar(self._source.run, 0, self._source.rank, name, label, number, datetime.now(UTC)))

    def metrics(self, wait: bool = False, timeout: float | None = None) -> dict[str, float]:
        """The last published metrics: `<stat>/<phase>/<layer>` and `<stat>/<phase>/mean`, over all ranks.

        Without `wait` these are the ones that this worker has heard of, at once. With `wait` they contain the
        window that this rank closed last; that needs every rank to close it. After `close()` they are the last that
        this rank has heard of. Raises StoreError when the window is not published within `timeout` seconds (60 by
        default), naming the ranks that are missing.
        """
        limit = WAIT_TIMEOUT_S if timeout is None else check_seconds("timeout", timeout)
        if wait and not self._closed:
            return dict(wait_metrics(self._shipper, limit))
        return dict(self._shipper.metrics)

    def stop(self) -> None:
        """Record nothing until `resume()`."""
        self._recorder.recording = False

    def resume(self) -> None:
        """Record again after `stop()`."""
        self._check_open("resume")
        self._shipper.resume()

    def is_recording(self) -> bool:
        """Whether forwards are recorded."""
        return self._recorder.recording

    @property
    def store(self) -> Any:
        """The store: a `CovarianceStore` in this process, or the actor's handle."""
        return getattr(self._store, "handle", self._store)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the recorded layers, in network order."""
        return tuple(layer.name for layer in self._recorder.layers)

    def state_dict(self) -> dict[str, Any]:
        """Where this tracker is in its run, for a checkpoint: plain values, the same in all ranks.

        `load_state_dict` in a later attempt goes on numbering windows from there.
        """
        return {"run": self._source.run, "attempt": self._shipper.attempt, "next_step": self._next_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was made: the next window without a step gets the one that was next then.

        Call it before the first `add_saturations`. A run that goes on replaces the windows that it replays, and keeps
        those before them. The state of another run numbers the windows of this one. Raises OptionError for what
        `state_dict` did not make, StoreError behind a window that is closed already.

        Example:
            >>> with SaturationTracker("unused", modules=torch.nn.Linear(3, 2), nosave=True) as tracker:
            ...     tracker.load_state_dict({"run": "cnn", "attempt": 0, "next_step": 7})
            ...     tracker.state_dict()["next_step"]
            7
        """
        self._check_open("load_state_dict")
        step = check_state(state)
        if self._closed_steps:
            raise StoreError(
                f"load_state_dict() after window {max(self._closed_steps.values())} was closed; load the state before "
                f"the first add_saturations()"
            )
        self._next_step = step
        self._shipper.number_from(step)

    # --- the end -------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> None:
        """Wait until what is recorded is written; what belongs to the open window as live rows.

        Raises StoreError when that takes longer than `timeout` seconds (60 by default).
        """
        self._check_open("flush")
        limit = WAIT_TIMEOUT_S if timeout is None else check_seconds("timeout", timeout)
        wait_written(self._shipper, limit)

    def save(self) -> None:
        """`flush()`, by Delve's name: files are written by themselves, and this waits for them."""
        self.flush()

    def close(self, timeout: float | None = None) -> None:
        """Remove the hooks, deliver everything, and leave the run; the last rank to leave waits for its files.

        Rows since the last `add_saturations` are published as a last window. What cannot be delivered within
        `timeout` seconds (120 by default) is said in the log, by step. A second call does nothing; in another thread
        it waits for the first.
        """
        self._close(CLOSE_TIMEOUT_S if timeout is None else check_seconds("timeout", timeout), completed=True)

    def __enter__(self) -> SaturationTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed_by_thread and kind is SystemExit:
            return  # a trial is stopped, and has no time left: see close_with_thread
        self._close(CLOSE_TIMEOUT_S, completed=kind is None or not self._rejoinable)

    def _close(self, timeout: float, *, completed: bool) -> None:
        if os.getpid() != self._source.pid:  # a forked child has no sender and nothing to deliver
            return
        if not self._closing.begin(timeout):
            return
        self._closed = True
        try:
            ways = {"completed": completed, "rejoinable": self._rejoinable}
            depart(self._recorder, self._shipper, self._config.savefile, timeout, **ways)
        finally:
            self._closing.end()
            atexit.unregister(self.close)

    def _check_open(self, method: str) -> None:
        if self._closed:
            raise StoreError(f"{method}() after close(); make a new tracker for a new run")
