"""The scale benchmark: tiny runs whose numbers add up, what is left out, and its page."""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

import numpy as np
import pytest

from delve_ray.store.core import CovarianceStore
from delve_ray.store.protocol import moments_size
from tests.benchmarks import scale, scale_memory
from tests.benchmarks.report import Section
from tests.benchmarks.scale_local import bare_add, config_of, measure_local
from tests.benchmarks.scale_ray import measure_ray
from tests.benchmarks.scale_shapes import MAX_FEATURES, SHAPES, Acks, Deltas, delta_bytes, source_of

WIDTHS = [3, 9, 5]


@pytest.mark.parametrize(
    ("name", "layers", "nbytes", "left_out"),
    [
        ("resnet50", 54, 117_167_328, {}),
        ("vit-l", 146, 2_124_802_016, {}),
        ("7b", 161, 10_812_440_576, {11008: 64, 32000: 1}),
    ],
)
def test_shapes_have_the_layers_of_their_networks(
    name: str, layers: int, nbytes: int, left_out: dict[int, int]
) -> None:
    shape = SHAPES[name]
    assert len(shape.widths) == layers
    assert shape.left_out == left_out
    assert max(shape.widths) <= MAX_FEATURES
    assert delta_bytes(shape.widths) == sum(4 * d * d + 12 * d for d in shape.widths) == nbytes


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_pieces_of_a_delta_are_all_of_it_once(shards: int) -> None:
    deltas = Deltas(WIDTHS, shards)
    entries = [entry for piece in deltas.pieces for entry in piece.entries]
    assert sorted(entry[0] for entry in entries) == [0, 1, 2]
    assert sum(piece.buffer.nbytes for piece in deltas.pieces) == deltas.nbytes == delta_bytes(WIDTHS)
    whole = np.sort(Deltas(WIDTHS, 1).pieces[0].buffer)
    np.testing.assert_array_equal(np.sort(np.concatenate([piece.buffer for piece in deltas.pieces])), whole)


@pytest.mark.parametrize(("sources", "shards"), [(1, 1), (5, 1), (5, 2)])
def test_a_run_in_process_adds_up(sources: int, shards: int) -> None:
    run = scale.check(measure_local(WIDTHS, sources, shards, windows=3))
    assert run.received == 3 * sources * 8 * sum(map(moments_size, WIDTHS))
    assert run.acks.acked.shape == (sources, 3)
    assert (run.acks.acked >= run.acks.offered).all()
    assert (np.diff(run.acks.acked, axis=1) >= 0).all(), "a source offers one window after the other"
    assert run.deltas == 3 * sources
    assert 0 <= run.acks.behind <= 3
    cells = scale.cells([run, run], roof=2 * run.rate)
    assert len(cells) == len(scale.HEADINGS)
    assert cells[4].startswith("0.50 of ")


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_through_ray_adds_up(ray_session: None) -> None:
    run = scale.check(measure_ray(WIDTHS, 6, 2, windows=2))
    assert run.received == 2 * 6 * delta_bytes(WIDTHS)
    assert run.acks.acked.shape == (6, 2)
    assert (run.acks.acked > run.acks.offered).all()
    assert run.empty_rate > 0
    assert {"store", "front", "feeders", "ray", "driver"} == set(run.cpu_s)


def test_how_far_the_slowest_source_is_behind_the_fastest() -> None:
    fast, slow = [1.0, 2.0, 3.0, 4.0], [3.5, 5.0, 6.0, 7.0]
    assert Acks(np.zeros((2, 4)), np.array([fast, slow])).behind == 3
    assert Acks(np.zeros((2, 4)), np.array([fast, fast])).behind == 0


def test_what_a_delta_costs_does_not_grow_with_the_sources() -> None:
    """Python calls of all deltas and signs of life of a window, per source."""
    calls = {}
    for sources in (8, 512):
        deltas = Deltas([4], 1)
        config = config_of("/nowhere", sources, 1)
        store = CovarianceStore(config, writers=[])
        for rank in range(sources):
            store.register(source_of(rank), config, deltas.layers)
        headers = [deltas.pieces[0].header(source_of(rank), 0) for rank in range(sources)]
        profile = cProfile.Profile(builtins=False)
        profile.enable()
        for rank, delta in enumerate(headers):
            store.take(delta, deltas.pieces[0].buffer)
            store.heartbeat(source_of(rank))
        for rank in range(sources):
            store.leave(source_of(rank), completed=True, sent=1)
            store.goodbye(source_of(rank))
        profile.disable()
        store.wait_finished(30)
        calls[sources] = pstats.Stats(profile).total_calls / sources  # type: ignore[attr-defined]
    assert calls[512] < 1.2 * calls[8]


def test_what_does_not_fit_is_left_out_with_its_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr(scale, "measure_local", refuse)
    monkeypatch.setattr(scale, "bare_add", lambda *_: 1.0)
    monkeypatch.setattr(scale, "too_large", lambda needed, _: scale_too_large(needed, 1 << 20))
    options = scale.parse_options(["--local", "--sources", "2", "--shards", "1", "--width-scale", "0.125"])
    section = scale.table(options, "resnet50")
    needed = scale.needed_bytes(SHAPES["resnet50"].scaled(0.125), 2, 1, through_ray=False)
    assert f"left out: it needs {needed / (1 << 20):.1f} MiB" in section.table
    assert "widths times 0.125" in section.text
    assert "left out" in capsys.readouterr().out


scale_too_large = scale.too_large


def test_the_larger_of_a_network_needs_more_than_its_deltas() -> None:
    widths = SHAPES["7b"].widths
    needed = scale.needed_bytes(widths, 1024, 4, through_ray=True)
    assert needed > 3 * delta_bytes(widths)
    assert scale.too_large(needed, 64 << 30) is not None


def test_a_table_takes_the_place_of_the_one_of_its_name(tmp_path: Path) -> None:
    page = tmp_path / "SCALE.md"
    scale.write([Section("one", "text", "| a |"), Section("two", "text", "| b |")], page)
    scale.write([Section("one", "text", "| c |")], page)
    found = page.read_text()
    assert found.startswith("# Scale\n")
    assert found.count("\n## ") == 2
    assert found.index("## one") < found.index("| c |") < found.index("## two") < found.index("| b |")
    assert "| a |" not in found


@pytest.mark.parametrize("arguments", [["--sources", "0"], ["--windows", "0"], ["--ray", "--local"], ["--shape", "x"]])
def test_options_that_cannot_be_used_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        scale.parse_options(arguments)
    assert refusal.value.code == 2


def test_memory_is_predicted_for_the_case_that_is_measured() -> None:
    case = scale_memory.Case("resnet50", 1 / 32, 4, 2)
    formula, found = scale_memory.predicted(case), scale_memory.measure(case)
    assert set(found) == set(formula)
    assert formula["open"] < formula["peak"]
    assert found["peak"] >= found["open"] > 0


def test_a_bare_addition_has_a_rate() -> None:
    assert bare_add([64], 2, seconds=0.01) > 0
