"""Whether a run's moments fit the nodes of its stores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from delve_ray.errors import RegistrationError
from delve_ray.store.assignment import assign
from delve_ray.store.memory import store_bytes
from delve_ray.store.protocol import LayerInfo, StoreConfig
from delve_ray.store.room import check_room, shares

LAYERS = [LayerInfo(f"l{index}", "Linear", width) for index, width in enumerate((2048, 1024, 1024, 512))]
CONFIG = StoreConfig("r", "/nowhere", 4, num_shards=2)


def test_each_shard_has_the_bytes_of_its_own_layers() -> None:
    assigned = assign(LAYERS, 2, CONFIG.sketching)
    for shard, found in enumerate(shares(CONFIG, LAYERS, phases=2)):
        own = [info.features or 0 for info, where in zip(LAYERS, assigned, strict=True) if where == shard]
        assert found == store_bytes(own, phases=2, sources=4)
    alone = shares(replace(CONFIG, num_shards=1), LAYERS, phases=1)
    assert alone == [store_bytes([2048, 1024, 1024, 512], sources=4)]


def test_a_node_without_memory_for_its_shard_is_named_with_the_remedy() -> None:
    first, second = (share.resting for share in shares(CONFIG, LAYERS, phases=1))
    memory = {"a" * 20: first, "b" * 20: second - 1.0}
    with pytest.raises(
        RegistrationError, match=r"shards \[1\] on node bbbbbbbbbbbb would take at least .* max_features"
    ):
        check_room(CONFIG, LAYERS, ["a" * 20, "b" * 20], memory)
    with pytest.raises(RegistrationError, match=r"shards \[0, 1\] on node aaaa"):
        check_room(CONFIG, LAYERS, ["a" * 20, "a" * 20], {"a" * 20: first + second - 1.0})


def test_what_fits_barely_is_said(caplog: pytest.LogCaptureFixture) -> None:
    peaks = [share.peak for share in shares(CONFIG, LAYERS, phases=2)]
    check_room(CONFIG, LAYERS, ["a", "b"], {"a": peaks[0], "b": peaks[1]})
    assert caplog.text == ""
    check_room(CONFIG, LAYERS, ["a", "b"], {"a": peaks[0] - 1, "b": peaks[1]})
    assert "shards [0] on node a may take up to" in caplog.text


def test_a_shard_without_layers_takes_nothing_for_them() -> None:
    empty = shares(replace(CONFIG, num_shards=3), LAYERS[:1], phases=2)[-1]
    assert (empty.windows, empty.latest, empty.aside, empty.decomposing) == (0, 0, 0, 0)
    check_room(replace(CONFIG, num_shards=3), LAYERS[:1], ["a"] * 3, {"a": 1e12})


def test_nodes_that_nobody_knows_are_not_judged() -> None:
    check_room(CONFIG, LAYERS, [None, "gone"], {"a": 0.0})


def test_sketches_fit_where_triangles_do_not() -> None:
    layers = [LayerInfo("wide", "Linear", 8192)]
    whole = replace(CONFIG, num_shards=1)
    sketched = replace(whole, max_features=1024, sketch_size=64)
    memory = {"a": float(shares(sketched, layers, phases=1)[0].resting)}
    check_room(sketched, layers, ["a"], memory)
    with pytest.raises(RegistrationError, match=r"the store on node a would take at least 0\.5"):
        check_room(whole, layers, ["a"], memory)
