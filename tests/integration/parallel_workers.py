"""What each rank of `test_parallel.py` does, in a module of its own: a spawned process imports it by name.

A rank trains a small network on scikit-learn's digits twice from the same seeds, without and with a tracker, and
writes down what both trainings computed, what the layers gave out by a path that is not ours, and what was logged.
Letters in names: B batch, T tokens, D features.
"""

from __future__ import annotations

import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import delve_ray

WORLD_SIZE = 2
STEPS = 3
COLLECTIVE_TIMEOUT = timedelta(seconds=30)


# --- the network and its data --------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block on B×T×D tokens."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.up(self.norm(x_BTD))))
        down_BTD: Tensor = self.down(hidden)
        return x_BTD + down_BTD


class Network(nn.Module):
    """Images of 1×8×8 to 10 classes: each row of the feature map is a token."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.embed = nn.Linear(32, 16)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x_BTD = self.embed(torch.relu(self.conv(images)).permute(0, 2, 3, 1).flatten(2))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(x_BTD).mean(1)
        return logits


LAYERS = {
    "conv": "Conv2d",
    "embed": "Linear",
    "blocks.0.up": "Linear",
    "blocks.0.down": "Linear",
    "blocks.1.up": "Linear",
    "blocks.1.down": "Linear",
    "head": "Linear",
}
"""Layers of the plain network and their kinds."""


@cache
def all_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 4 - 2, torch.tensor(data.target)


def digits(start: int, count: int) -> tuple[Tensor, Tensor]:
    images, labels = all_digits()
    return images[start : start + count], labels[start : start + count]


class Outputs:
    """Keeps what the layers' forwards return, by phase and layer; of a DTensor the whole, wherever its parts are."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[tuple[str, str], list[Tensor]] = {}
        self.paused = False
        for name in LAYERS:
            layer: Any = model.get_submodule(name)
            layer.forward = self._keeping(name, layer, layer.forward)

    def _keeping(self, name: str, layer: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def keeping(*args: Any) -> Tensor:
            output = forward(*args)
            if not self.paused:
                values = whole(output.detach()).double()
                rows = values.movedim(1, -1) if isinstance(layer, nn.Conv2d) else values
                kept = self.rows.setdefault((name, "train" if layer.training else "eval"), [])
                kept.append(rows.reshape(-1, rows.shape[-1]).clone())
            return output

        return keeping

    def collected(self) -> dict[tuple[str, str], Tensor]:
        return {key: torch.cat(parts) for key, parts in self.rows.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor | None) -> Tensor | None:
    """This rank's part of a parameter or gradient, copied."""
    if tensor is None:
        return None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


# --- ways to train in parallel -------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a plain network is made parallel, and where in that the tracker is made."""

    wrap: Callable[[nn.Module], nn.Module]
    tracked: str = "after"  # or "before" wrapping
    replicated: bool = False  # all ranks get the same batches, as tensor-parallel ranks do
    accumulate: bool = False
    trackers: Sequence[int] = (0, 1)
    network: Callable[[], nn.Module] = field(default=lambda: Network(dropout=0.2))


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD_SIZE,))


def checkpoint_blocks(model: nn.Module, implementation: CheckpointImpl = CheckpointImpl.NO_REENTRANT) -> nn.Module:
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block, checkpoint_impl=implementation)
    return model


def static_graph(model: nn.Module) -> nn.Module:
    """DDP with the one kind of checkpointing that needs a static graph."""
    return DistributedDataParallel(checkpoint_blocks(model, CheckpointImpl.REENTRANT), static_graph=True)


def shard_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2 as its users do: each block, then the root, whose parameters are what is left."""
    group = mesh()
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=group, **options)
    fully_shard(model, mesh=group, **options)
    return model


def shard_layers(model: nn.Module) -> nn.Module:
    """FSDP2 of every layer by itself, which changes the layers' classes."""
    group = mesh()
    for name in LAYERS:
        fully_shard(model.get_submodule(name), mesh=group)
    fully_shard(model, mesh=group)
    return model


def shard_bfloat16(model: nn.Module) -> nn.Module:
    return shard_blocks(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def meta_network() -> nn.Module:
    with torch.device("meta"):
        return Network(dropout=0.2)


def shard_and_load(model: nn.Module) -> nn.Module:
    """A network that has no values yet is sharded, and then gets them."""
    values = Network().state_dict()
    sharded: Any = shard_blocks(model)
    parts = {
        name: distribute_tensor(values[name], parameter.device_mesh, parameter.placements)
        for name, parameter in sharded.named_parameters()
    }
    sharded.load_state_dict(parts, assign=True)
    return model


def fsdp1(model: nn.Module, *, use_orig_params: bool) -> nn.Module:
    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def tensor_parallel(model: nn.Module, plan: dict[str, ParallelStyle]) -> nn.Module:
    parallel: dict[str, ParallelStyle] = {}
    for path, style in plan.items():
        names = [f"blocks.{index}.{path[2:]}" for index in range(2)] if path.startswith("*.") else [path]
        parallel |= dict.fromkeys(names, style)
    return parallelize_module(model, mesh(), parallel)


def split_features(model: nn.Module) -> nn.Module:
    """Colwise and rowwise layers between plain tensors that all ranks have."""
    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel(), "head": ColwiseParallel(output_layouts=Replicate())}
    return tensor_parallel(model, plan)


def split_features_dtensor(model: nn.Module) -> nn.Module:
    """The same between DTensors."""
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), use_local_output=False),
        "*.norm": SequenceParallel(),
        "*.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "*.down": RowwiseParallel(use_local_output=False),
        "head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
    }
    return tensor_parallel(model, plan)


def split_sequence(model: nn.Module, *, use_local_output: bool) -> nn.Module:
    """Sequence parallel between the blocks: each rank has half of the tokens."""
    own: dict[str, Any] = {"use_local_output": use_local_output}
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), **own),
        "*.norm": SequenceParallel(),
        "*.up": ColwiseParallel(input_layouts=Shard(1), **own),
        "*.down": RowwiseParallel(output_layouts=Shard(1), **own),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate(), **own),
    }
    return tensor_parallel(model, plan)


DATA_PARALLEL = {
    "ddp": Way(DistributedDataParallel),
    "ddp tracked before": Way(DistributedDataParallel, tracked="before"),
    "ddp no_sync": Way(DistributedDataParallel, accumulate=True),
    "ddp static_graph": Way(static_graph),
}
SHARDED = {
    "fsdp2": Way(shard_blocks),
    "fsdp2 tracked before": Way(shard_blocks, tracked="before"),
    "fsdp2 checkpointed": Way(lambda model: shard_blocks(checkpoint_blocks(model))),
    "fsdp2 checkpointed tracked before": Way(lambda model: shard_blocks(checkpoint_blocks(model)), tracked="before"),
    "fsdp2 each layer": Way(shard_layers),
    "fsdp2 bfloat16": Way(shard_bfloat16),
    "fsdp2 from meta": Way(shard_and_load, tracked="before", network=meta_network),
    "fsdp1": Way(lambda model: fsdp1(model, use_orig_params=True)),
    "fsdp1 flat": Way(lambda model: fsdp1(model, use_orig_params=False)),
    "fsdp1 checkpointed": Way(lambda model: fsdp1(checkpoint_blocks(model), use_orig_params=True), tracked="before"),
}
TENSOR_PARALLEL = {
    "features": Way(split_features, replicated=True),
    "features tracked before": Way(split_features, replicated=True, tracked="before"),
    "features tracked on rank 0": Way(split_features, replicated=True, trackers=(0,)),
    "features dtensor": Way(split_features_dtensor, replicated=True, network=Network),
    "sequence": Way(lambda model: split_sequence(model, use_local_output=True), replicated=True),
    "sequence dtensor": Way(
        lambda model: split_sequence(model, use_local_output=False), replicated=True, network=Network
    ),
}
WAYS = DATA_PARALLEL | SHARDED | TENSOR_PARALLEL


# --- a training ----------------------------------------------------------------------------------------


@dataclass
class Training:
    """What one training computed, and what its tracker left behind."""

    seen: list[Any]
    rows: dict[tuple[str, str], Tensor]
    layers: tuple[str, ...] = ()
    hooks: int = 0


def train(way: Way, rank: int, files: Path | None) -> Training:
    """Three steps, one more with its collectives counted, and a batch in evaluation; with `files` it is tracked."""

    def track(place: str, model: nn.Module) -> Any:
        if files is None or way.tracked != place or rank not in way.trackers:
            return None
        # A store in each process: the test merges what they publish.
        return delve_ray.SaturationTracker(files, "parquet", model, stats="cov", rank=0, world_size=1)

    torch.manual_seed(7)
    plain = way.network()
    outputs = Outputs(plain)
    shift = 0 if way.replicated else rank
    torch.manual_seed(100 + shift)
    tracker = track("before", plain)
    model = way.wrap(plain)
    tracker = tracker or track("after", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = [digits(700 * shift + 40 * step, 20 + 4 * shift) for step in range(2 * STEPS + 3)]

    def backward(batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs.paused = False
        loss = F.cross_entropy(whole(model(batch[0])), batch[1])
        outputs.paused = True  # checkpointing computes a forward again
        loss.backward()
        return loss.detach().clone()

    seen: list[Any] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if way.accumulate:
            with model.no_sync():  # type: ignore[operator]
                seen.append(backward(batches[STEPS + step]))
        seen.append(backward(batches[step]))
        seen += [local(parameter.grad) for parameter in model.parameters()]
        optimizer.step()
    with CommDebugMode() as communication:
        seen.append(backward(batches[-1]))
    seen.append({str(kind): count for kind, count in communication.get_comm_counts().items()})
    outputs.paused = False
    model.eval()
    with torch.no_grad():
        seen.append(local(model(batches[-2][0])))
    seen += [local(parameter) for parameter in model.parameters()]
    state = model.state_dict()
    seen += [torch.get_rng_state(), torch.rand(1), list(state), *map(local, state.values())]
    training = Training(seen, outputs.collected())
    if tracker is not None:
        tracker.add_saturations(0)
        training.layers = tracker.layers
        tracker.close()
    # Some wrappers have hooks of their own.
    training.hooks = sum(len(part._forward_hooks) for part in model.modules())
    return training


class Messages(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def compare(name: str, rank: int, folder: Path, messages: Messages) -> dict[str, Any]:
    """One way, without and with a tracker."""
    untracked = train(WAYS[name], rank, None)
    tracked = train(WAYS[name], rank, savefile(folder, name, rank))
    return {"untracked": untracked, "tracked": tracked, "warnings": list(messages.texts)}


# --- one layer whose output is placed in every way -----------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A layer's output as a DTensor, by the shape of the mesh and a placement for each of its dimensions."""

    placements: Sequence[Placement]
    mesh: tuple[int, ...] = (WORLD_SIZE,)
    layer: Callable[[], nn.Module] = lambda: nn.Linear(8, 20)
    shape: tuple[int, ...] = (6, 8)
    only: int | None = None  # the mesh is this rank's alone
    options: dict[str, Any] = field(default_factory=dict)


def conv() -> nn.Module:
    return nn.Conv2d(1, 20, 3)


def lstm() -> nn.Module:
    return nn.LSTM(8, 20, batch_first=True)


IMAGES = (1, 8, 8)
LAST = {"timeseries_method": "last_timestep"}
SMALLER = {"interpolation_strategy": "bilinear", "interpolation_downsampling": 4}
PLACED = {
    "placed: batch": Placed([Shard(0)]),
    "placed: sequence": Placed([Shard(1)]),
    "placed: replicated": Placed([Replicate()]),
    "placed: batch, replicated over 1": Placed([Shard(0), Replicate()], mesh=(2, 1)),
    "placed: batch over 1, replicated": Placed([Shard(0), Replicate()], mesh=(1, 2)),
    "placed: replicated over 1, batch": Placed([Replicate(), Shard(0)], mesh=(1, 2)),
    "placed: batch and sequence": Placed([Shard(0), Shard(1)], mesh=(2, 1)),
    "placed: replicated on rank 1 alone": Placed([Replicate()], mesh=(1,), only=1),
    "placed: batch of images": Placed([Shard(0)], layer=conv, shape=IMAGES),
    "placed: height of images": Placed([Shard(2)], layer=conv, shape=IMAGES),
    "placed: batch of an LSTM": Placed([Shard(0)], layer=lstm),
    "placed: steps of an LSTM": Placed([Shard(1)], layer=lstm),
    "placed: features": Placed([Shard(2)]),
    "placed: features of a batch": Placed([Shard(1)], shape=(8,)),
    "placed: features counted from the end": Placed([Shard(-1)]),
    "placed: channels of images": Placed([Shard(1)], layer=conv, shape=IMAGES),
    "placed: batch and features": Placed([Shard(0), Shard(2)], mesh=(2, 1)),
    "placed: last of the steps": Placed([Shard(0)], layer=lstm, options=LAST),
    "placed: last of the split steps": Placed([Shard(1)], layer=lstm, options=LAST),
    **{
        f"placed: {method}, {what}": Placed(
            [Shard(dimension)], layer=conv, shape=IMAGES, options={"conv_method": method}
        )
        for method in ("mean", "max", "median", "flatten")
        for what, dimension in (("batch", 0), ("height", 2))
    },
    "placed: interpolated, batch": Placed([Shard(0)], layer=conv, shape=IMAGES, options=SMALLER),
    "placed: interpolated, height": Placed([Shard(2)], layer=conv, shape=IMAGES, options=SMALLER),
    "placed: partial": Placed([Partial()]),
    "placed: batch, partial": Placed([Shard(0), Partial()], mesh=(1, 2)),
}


def place(name: str, rank: int, folder: Path, messages: Messages) -> dict[str, Any]:
    """Forwards whose outputs are placed, of batches that do not divide evenly and of one that leaves a rank nothing."""
    case = PLACED[name]
    ranks = list(range(WORLD_SIZE)) if case.only is None else [case.only]
    group = DeviceMesh("cpu", torch.tensor(ranks).reshape(case.mesh))
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(layer=case.layer()))
    layer: Any = model.layer
    forward = layer.forward
    rows: list[Tensor] = []
    sent = 0

    def placing(x: Tensor) -> Any:
        output = forward(x)
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        rows.append(placed_rows(tensor.detach().double().clone(), case.options))
        # A partial one is said to be what it is: older versions of torch do not make one of another placement.
        partial = any(placement.is_partial() for placement in case.placements)
        given = case.placements if partial else [Replicate() for _ in case.placements]
        placed = DTensor.from_local(tensor, group, given)
        placed = placed if partial else placed.redistribute(group, case.placements)
        return (placed, *output[1:]) if isinstance(output, tuple) else placed

    layer.forward = placing
    options: dict[str, Any] = {"stats": "cov", "rank": 0, "world_size": 1, **case.options}
    with delve_ray.SaturationTracker(savefile(folder, name, rank), "parquet", model, **options) as tracker:
        for seed, count in enumerate((5, 1, 8, 30) if rank in ranks else ()):
            with CommDebugMode() as communication:  # one for each forward: it loses its place in a second one
                model(torch.randn(count, *case.shape, generator=torch.Generator().manual_seed(seed)))
            sent += communication.get_total_counts()
        tracker.add_saturations(0)
    return {"rows": torch.cat(rows) if rows else None, "collectives": sent, "warnings": list(messages.texts)}


def placed_rows(values: Tensor, options: dict[str, Any]) -> Tensor:
    """The rows that the whole output has under a tracker's options."""
    if values.dim() < 4:
        return values[:, -1] if options == LAST else values.flatten(0, -2)
    if options == SMALLER:  # bilinear, from 6 positions to 4
        weights = torch.tensor([[3, 1, 0, 0, 0, 0], [0, 1, 3, 0, 0, 0], [0, 0, 0, 3, 1, 0], [0, 0, 0, 0, 1, 3]]) / 4.0
        values = torch.einsum("ih,bchw,jw->bcij", weights.double(), values, weights.double())
    positions = values.flatten(2)
    match options.get("conv_method"):
        case "mean":
            return positions.mean(2)
        case "max":
            return positions.amax(2)
        case "median":
            return positions.median(2).values
        case "flatten":
            return values.flatten(1)
    return positions.mT.flatten(0, 1)


# --- what a script without Ray Train does --------------------------------------------------------------


def refused_without_ray(name: str, rank: int, folder: Path, messages: Messages) -> dict[str, Any]:
    """What several ranks hear that have no cluster to meet in."""
    refusals = []
    for run in (None, "digits"):
        try:
            delve_ray.SaturationTracker(savefile(folder, name, rank), "parquet", Network(), run=run)
        except delve_ray.OptionError as error:
            refusals.append(str(error))
    return {"refusals": refusals}


def one_store_on_ray(name: str, rank: int, folder: Path, messages: Messages) -> dict[str, Any]:
    """FSDP2 in processes that are no Ray workers and only connect to a cluster; all ranks meet in one store."""
    import ray

    ray.init((folder / "address").read_text(), log_to_driver=False, logging_level=logging.ERROR)
    torch.manual_seed(7)
    plain = Network(dropout=0.2)
    outputs = Outputs(plain)
    model = shard_blocks(plain)
    rows, metrics = [], []
    with delve_ray.SaturationTracker(folder / name, "parquet", model, run="fsdp2", stats=["cov", "lsat"]) as tracker:
        for epoch in range(2):
            for step in range(2):
                model(digits(700 * rank + 200 * epoch + 50 * step, 30 + 10 * rank)[0])
            tracker.add_saturations(epoch)
            metrics.append(tracker.metrics(wait=True))
            rows.append(outputs.collected())
            outputs.rows.clear()
    ray.shutdown()
    return {"rows": rows, "metrics": metrics, "warnings": list(messages.texts)}


# --- a spawned process ---------------------------------------------------------------------------------

CASES: dict[str, Callable[[str, int, Path, Messages], dict[str, Any]]] = {
    **dict.fromkeys(WAYS, compare),
    **dict.fromkeys(PLACED, place),
    "refused": refused_without_ray,
    "one store": one_store_on_ray,
}


def savefile(folder: Path, name: str, rank: int) -> Path:
    """Where a rank with a store of its own publishes a case."""
    return folder / f"{name}-{rank}"


def run_rank(rank: int, folder: Path, names: Sequence[str]) -> None:
    """Run the cases one after another, and keep what each returns, or its error, in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=COLLECTIVE_TIMEOUT,
    )
    log = logging.getLogger("delve_ray")
    for name in names:
        messages = Messages()
        log.addHandler(messages)
        try:
            outcome = CASES[name](name, rank, folder, messages)
        except Exception:  # the other cases can go on
            outcome = {"error": traceback.format_exc()}
        log.removeHandler(messages)
        torch.save(outcome, folder / f"{name}-{rank}.pt")
    dist.barrier()  # a rank that leaves early would break the other's last collective
    dist.destroy_process_group()
