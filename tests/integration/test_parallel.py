"""torch's own ways to train in parallel, in two real processes over gloo: DDP, FSDP, tensor and sequence parallel.

For each way: what the ranks publish, merged, has the two-pass covariance of what the layers gave out, under the plain
network's names; and training is the same to the bit with and without a tracker. `parallel_workers` is what a rank does.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from delve_ray import read_covariances, read_spectra
from delve_ray.moments import Moments, unpack_triangle
from tests.helpers import assert_exact, merged
from tests.integration.parallel_workers import (
    DATA_PARALLEL,
    LAYERS,
    PLACED,
    SHARDED,
    TENSOR_PARALLEL,
    WAYS,
    WORLD_SIZE,
    run_rank,
    savefile,
)

pytestmark = pytest.mark.slow
Key = tuple[str, str]

RANKS = range(WORLD_SIZE)
DEADLINE_S = 120.0
GROUPS = {"replicas": [*DATA_PARALLEL, *SHARDED, "refused"], "tensor": [*TENSOR_PARALLEL, *PLACED]}
"""Cases that share their processes, which take seconds to start."""


class Ranks:
    """Cases that were run in one process per rank, and what each rank returned."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        context: Any = spawn(run_rank, (folder, names), nprocs=WORLD_SIZE, join=False)
        deadline = time.monotonic() + DEADLINE_S
        try:
            while not context.join(1.0):
                assert time.monotonic() < deadline, f"the ranks take more than {DEADLINE_S:.0f} s"
        finally:
            for process in context.processes:  # whatever happened, none is left behind
                process.kill()
                process.join()

    def outcomes(self, name: str) -> list[dict[str, Any]]:
        found = [torch.load(self.folder / f"{name}-{rank}.pt", weights_only=False) for rank in RANKS]
        for rank, outcome in enumerate(found):
            assert "error" not in outcome, f"rank {rank}: {outcome['error']}"
        return found

    def published(self, name: str) -> list[dict[Key, Moments]]:
        """What the store of each rank published, by layer and phase; nothing of a rank without a tracker."""
        files = [savefile(self.folder, name, rank) for rank in RANKS]
        return [moments(read_covariances(path)) if path.exists() else {} for path in files]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("replicas"), GROUPS["replicas"])


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("tensor"), GROUPS["tensor"])


@pytest.fixture
def ranks(request: pytest.FixtureRequest, name: str) -> Ranks:
    """The ranks that ran a test's case; they ran all of its group."""
    (group,) = (group for group, names in GROUPS.items() if name in names)
    ranks: Ranks = request.getfixturevalue(group)
    return ranks


def cases(names: Iterable[str]) -> pytest.MarkDecorator:
    """A test for each of these cases."""
    return pytest.mark.parametrize("name", names)


def moments(table: Any) -> dict[Key, Moments]:
    """Covariances read from files as moments, which can be merged."""
    found = {}
    for row in table.to_pylist():
        covariance = unpack_triangle(row["covariance"], row["features"])
        found[row["layer"], row["phase"]] = Moments(row["samples"], np.array(row["mean"]), covariance * row["samples"])
    return found


# --- every way of training -----------------------------------------------------------------------------


@cases(WAYS)
def test_training_is_the_same_to_the_bit(ranks: Ranks, name: str) -> None:
    """Losses, gradients, parameters, random numbers, state_dict, and the collectives that a step calls."""
    for outcome in ranks.outcomes(name):
        untracked, tracked = outcome["untracked"], outcome["tracked"]
        for one, other in zip(untracked.seen, tracked.seen, strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert len(untracked.seen) > 30
        assert tracked.hooks == untracked.hooks, "after close() no hook is left"


@cases(WAYS)
def test_layers_are_those_of_the_plain_network(ranks: Ranks, name: str) -> None:
    for rank in WAYS[name].trackers:
        assert ranks.outcomes(name)[rank]["tracked"].layers == tuple(LAYERS)
        for row in read_spectra(savefile(ranks.folder, name, rank)).to_pylist():
            assert row["layer_type"] == LAYERS[row["layer"]]


@cases(DATA_PARALLEL | SHARDED)
def test_all_ranks_rows_are_recorded(ranks: Ranks, name: str) -> None:
    outcomes, published = ranks.outcomes(name), ranks.published(name)
    for key in itertools.product(LAYERS, ("train", "eval")):
        rows = [outcome["tracked"].rows[key] for outcome in outcomes]
        assert len(rows[0]) < len(rows[1])
        for rank in RANKS:
            assert published[rank][key].n == len(rows[rank])
        assert_exact(merged([part[key] for part in published]), torch.cat(rows))
    assert [len(part) for part in published] == [2 * len(LAYERS)] * WORLD_SIZE
    assert [outcome["warnings"] for outcome in outcomes] == [[], []]


# --- tensor and sequence parallel ----------------------------------------------------------------------

SPLIT, FIRST, COPIED = "split", "first", "copied"
"""Each rank has rows of its own; rank 0 records all; both do: plain tensors do not say that they are the same."""
NARROW, SPREAD, SUM = r"\bwidth\b", "Shard", "Partial"
"""Nothing is recorded, and what the one warning says."""
RECORDED = {
    "features": (COPIED, COPIED, NARROW, COPIED, COPIED),
    "features tracked before": (COPIED, COPIED, SPREAD, SUM, SPREAD),
    "features tracked on rank 0": (FIRST, FIRST, NARROW, FIRST, FIRST),
    "features dtensor": (COPIED, FIRST, SPREAD, FIRST, FIRST),
    "sequence": (COPIED, SPLIT, NARROW, SPLIT, COPIED),
    "sequence dtensor": (COPIED, SPLIT, SPREAD, SPLIT, FIRST),
}
"""How the layers conv, embed, blocks.*.up, blocks.*.down and head are recorded."""


@cases(TENSOR_PARALLEL)
def test_rows_of_tensor_parallel_layers(ranks: Ranks, name: str) -> None:
    outcomes, published = ranks.outcomes(name), ranks.published(name)
    conv, embed, up, down, head = RECORDED[name]
    expected = dict(zip(LAYERS, (conv, embed, up, down, up, down, head), strict=True))
    for (layer, how), phase in itertools.product(expected.items(), ("train", "eval")):
        rows = outcomes[0]["tracked"].rows[layer, phase]
        assert torch.equal(rows, outcomes[1]["tracked"].rows[layer, phase]), "the whole output, the same on both ranks"
        parts = [part[layer, phase] for part in published if (layer, phase) in part]
        if how == SPLIT:
            assert [part.n for part in parts] == [len(rows) // 2] * WORLD_SIZE
            assert_exact(merged(parts), rows)
        elif how == FIRST:
            assert (layer, phase) in published[0]
            assert [part.n for part in parts] == [len(rows)]
            assert_exact(parts[0], rows)
        elif how == COPIED:
            for part in parts:
                assert_exact(part, rows)
            assert len(parts) == WORLD_SIZE
        else:
            assert parts == []
    refused = {layer: how for layer, how in expected.items() if how not in (SPLIT, FIRST, COPIED)}
    for rank in WAYS[name].trackers:
        assert_warned(outcomes[rank]["warnings"], refused)


def assert_warned(warnings: Sequence[str], refused: dict[str, str]) -> None:
    """Exactly one warning for each of these layers, that names it and says this."""
    for layer, words in refused.items():
        about = [text for text in warnings if re.search(rf"layer {re.escape(layer)}[: ]", text)]
        assert len(about) == 1, warnings
        assert re.search(words, about[0]), about
    assert len(warnings) == len(refused), warnings


EITHER = [
    "placed: last of the split steps",
    *(f"placed: {method}, height" for method in ("mean", "max", "median", "flatten", "interpolated")),
]
"""Rows that no rank has whole: to record nothing and say so is right, and so would be the true rows."""
REFUSED = {
    "placed: features": SPREAD,
    "placed: features of a batch": SPREAD,
    "placed: features counted from the end": SPREAD,
    "placed: channels of images": SPREAD,
    "placed: batch and features": SPREAD,
    "placed: partial": SUM,
    "placed: batch, partial": SUM,
}


@cases(PLACED)
def test_rows_of_distributed_tensors(ranks: Ranks, name: str) -> None:
    outcomes = ranks.outcomes(name)
    parts = [part["layer", "train"] for part in ranks.published(name) if part]
    (rows, *_) = [outcome["rows"] for outcome in outcomes if outcome["rows"] is not None]
    assert [outcome["collectives"] for outcome in outcomes] == [0, 0], "a hook does not talk to other ranks"
    if name in REFUSED or (name in EITHER and not parts):
        assert parts == []
        for outcome in outcomes:
            assert_warned(outcome["warnings"], {"layer": REFUSED.get(name, "DTensor")})
    else:
        assert_exact(merged(parts), rows)
        assert [outcome["warnings"] for outcome in outcomes] == [[], []]


# --- without Ray Train ---------------------------------------------------------------------------------


@cases(["refused"])
def test_ranks_that_could_not_meet_are_refused_in_words(ranks: Ranks, name: str) -> None:
    for outcome in ranks.outcomes(name):
        without_run, without_ray = outcome["refusals"]
        assert "give all ranks the same run=" in without_run
        assert "call ray.init() before the tracker" in without_ray


@pytest.mark.ray
def test_ranks_that_only_connect_to_ray_meet_in_one_store(ray_session: None, tmp_path: Path) -> None:
    """FSDP2 started by something else than Ray Train: rank and world size come from torch.distributed."""
    import ray

    (tmp_path / "address").write_text(ray.get_runtime_context().gcs_address)
    outcomes = Ranks(tmp_path, ["one store"]).outcomes("one store")
    table = read_covariances(tmp_path / "one store")
    assert {(row["step"], row["workers"], row["world_size"]) for row in table.to_pylist()} == {(0, 2, 2), (1, 2, 2)}
    for step in range(2):
        published = moments(read_covariances(tmp_path / "one store", filters=[("step", "==", step)]))
        assert [layer for layer, _ in published] == list(LAYERS)
        for layer in LAYERS:
            rows = torch.cat([outcome["rows"][step][layer, "train"] for outcome in outcomes])
            assert_exact(published[layer, "train"], rows)
    assert outcomes[0]["metrics"] == outcomes[1]["metrics"]
    assert [outcome["warnings"] for outcome in outcomes] == [[], []]
