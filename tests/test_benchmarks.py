"""The benchmarks' own parts: options, tables, and what is counted. Nothing is timed, and delve is rarely there."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.benchmarks import combining, feeder, growth, profile, report, run, timing
from tests.benchmarks.closing import check_same
from tests.benchmarks.models import WORKLOADS, Workload
from tests.benchmarks.report import Row, Section, Unmeasured
from tests.benchmarks.shipping import measure_bytes
from tests.benchmarks.steps import Trainer, check_same_losses
from tests.benchmarks.timing import Estimate
from tests.benchmarks.trackers import attach_delve, attach_ours, check_same_layers

MODULES = sorted(path.stem for path in Path(run.__file__).parent.glob("*.py"))
SMALL = Workload(
    "small", "4→3→10", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 10)), (8, 4), block=2
)
MET = Row("recorder, 2×3", 0.5, "XᵀX", 1.0, Estimate(0.5, 0.4, 0.6), 0.9, "a note", {"recorder": np.array([0.5])})
MISSED = Row("recorder, 4×5", 2.0, "XᵀX", 1.0, Estimate(2.0, 1.9, 2.1), 0.9)


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_and_their_examples_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"tests.benchmarks.{name}")).failed == 0


# --- options -------------------------------------------------------------------------------------------


def names(*arguments: str) -> list[str]:
    return [entry.name for entry in run.parse_options(arguments).entries]


def test_amounts_are_few_with_quick_and_as_given() -> None:
    options = run.parse_options(["--quick", "--blocks", "7"])
    assert (options.rounds, options.blocks, options.samples) == (1, 7, 10)
    assert run.parse_options([]).samples == 60


def test_only_chooses_by_a_part_of_the_name_or_a_pattern() -> None:
    assert names("--only", "step time, mlp", "--only", "recorder*conv 64×64") == [
        "extra step time, MLP",
        "recorder, conv 64×64×32×32",
    ]


def test_quick_leaves_out_what_is_slow_unless_it_is_named() -> None:
    assert "growth" in names()
    assert "growth" not in names("--quick")
    assert names("--quick", "--only", "growth") == ["growth"]


def test_a_device_measures_the_recording_alone() -> None:
    assert {name.partition(",")[0] for name in names("--device", "cuda")} == {"extra step time", "recorder"}


@pytest.mark.parametrize("arguments", [["--only", "nothing like it"], ["--repeat", "0"], ["--windows", "-1"]])
def test_options_that_cannot_be_used_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        run.parse_options(arguments)
    assert refusal.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--device", "cuda"])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 2
    assert "torch.cuda.is_available() is False" in capsys.readouterr().err


# --- tables --------------------------------------------------------------------------------------------


def test_a_row_has_both_quantities_the_ratio_and_the_target() -> None:
    assert MET.cells() == ("recorder, 2×3", "500 ms", "XᵀX: 1000 ms", "0.50", "0.40 … 0.60", "≤ 0.9", "yes")
    assert MISSED.met == "no"


@pytest.mark.parametrize(
    ("ratio", "at_least", "met"),
    [
        (Estimate(0.85, 0.8, 0.95), False, "yes, within noise"),
        (Estimate(0.95, 0.8, 1.0), False, "no, within noise"),
        (Estimate(0.95, 0.92, 1.0), True, "yes"),
        (Estimate(0.5, 0.4, 0.6), True, "no"),
        (Estimate(0.9, 0.9, 0.9), False, "yes"),
        (Estimate(-3.0, -4.0, 0.2), False, "yes, within noise"),
    ],
)
def test_whether_a_target_is_met(ratio: Estimate, at_least: bool, met: str) -> None:
    row = Row("x", 1e6, "y", 2e6, ratio, 0.9, unit="B/s", at_least=at_least)
    assert row.met == met
    assert row.cells()[1:3] == ("1 MB/s", "y: 2 MB/s")
    assert row.goal == ("≥ 0.9" if at_least else "≤ 0.9")


def test_a_row_without_figures_says_why() -> None:
    cells = Unmeasured("max_overhead=0.02, MLP", "not built").cells()
    assert (cells[0], cells[-1], len(cells)) == ("max_overhead=0.02, MLP", "not built", len(MET.cells()))


def test_rows_of_one_kind_in_short() -> None:
    assert report.in_short([MET, Unmeasured("z, 1", "not built"), MISSED]) == [
        ("what", "target", "ratios", "met"),
        ("recorder", "≤ 0.9", "0.50 … 2.00", "1 of 2"),
    ]


def test_several_runs_show_every_ratio_and_how_often_the_target_is_met() -> None:
    other = Row(MET.what, 1.0, "XᵀX", 1.0, Estimate(1.0, 0.9, 1.1), 0.9)
    assert report.repeats([[MET, MISSED], [other, MISSED], [MET, MISSED]])[1:] == [
        ("recorder, 2×3", "0.50", "1.00", "0.50", "≤ 0.9", "2 of 3"),
        ("recorder, 4×5", "2.00", "2.00", "2.00", "≤ 0.9", "0 of 3"),
    ]
    assert report.repeats([[MET], [MET]])[1][-1] == "all"


def test_results_hold_every_part() -> None:
    found = report.markdown(
        [[MISSED], [MET]], {"cores": 2}, "What it means.\n", [Section("Memory", "In MiB.", "| a |")]
    )
    for part in (
        "2 runs of `make bench` in a row",
        "| recorder | ≤ 0.9 | 0.50 | 1 of 1 |",
        "| recorder, 2×3 | 500 ms | XᵀX: 1000 ms | 0.50 | 0.40 … 0.60 | ≤ 0.9 | yes |",
        "- recorder, 2×3: a note",
        "## Memory\n\nIn MiB.\n\n| a |",
        "## What is measured\n\nWhat it means.",
        "- cores: 2",
    ):
        assert part in found


def test_the_json_file_has_every_sample() -> None:
    found = json.loads(report.as_json([[MET, Unmeasured("z", "not built")]], {"cores": 2}))
    first, second = found["runs"][0]
    assert (first["samples"], first["met"], first["ratio"]["low"]) == ({"recorder": [0.5]}, "yes", 0.4)
    assert second == {"what": "z", "why": "not built"}


# --- measuring -----------------------------------------------------------------------------------------


def test_variants_take_turns_and_blocks_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([float(value) for value in range(1000)])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls: list[tuple[str, int]] = []
    variants = {name: (lambda number, name=name: calls.append((name, number))) for name in ("a", "b")}
    found = timing.alternate(variants, calls=5, block=2, warmup=1)
    assert calls[:6] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: samples.tolist() for name, samples in found.items()} == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ratios_are_of_medians() -> None:
    base, ours, theirs = np.array([1.0, 1.0, 9.0]), np.array([2.0, 2.0, 10.0]), np.array([5.0, 5.0, 13.0])
    assert timing.ratio(ours, base).value == 2.0
    assert timing.ratio_of_extras(ours, theirs, base).value == 0.25


def test_bytes_are_those_of_the_triangles_and_the_headers() -> None:
    found = measure_bytes(SMALL, 2)
    assert found["triangles"].tolist() == [2 * (6 + 55) * 8] * 2  # two flushes of triangles of 3 and of 10 features
    means = 2 * (3 + 10) * 8
    assert (found["shipped"] > found["triangles"] + means).all()


def test_a_fed_store_has_the_moments_of_all_its_senders() -> None:
    fed = feeder.Feeder(feeder.Load(layers=2, width=3, flushes=4, senders=5))
    buffer = fed.buffer()
    assert fed.send(buffer) >= 0
    assert fed.send(buffer) >= 0
    mean, packed = buffer[:3], buffer[3:9]
    expected = np.zeros((3, 3))
    expected[np.triu_indices(3)] = packed / 64
    covariance = fed.store.covariance("layer1", "train")
    np.testing.assert_allclose(np.triu(covariance), expected, atol=1e-12)
    assert mean.any()
    assert fed.store.progress().published == 2


def test_the_exponent_of_a_square_with_a_part_that_is_constant() -> None:
    assert growth.exponent([10, 100, 1000], [1e-2 + 1e-4 * n**2 for n in (10, 100, 1000)]) == pytest.approx(2, abs=0.2)


def test_a_profile_sees_the_hooks_of_every_kind_of_layer_and_nothing_else() -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 2, 1), nn.Flatten()), SMALL
    )
    trainer.batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    with attach_ours(trainer.model, Path("unused"), ("lsat",), nosave=True) as tracker:
        watch = profile.Watch(trainer.model, tracker.layers)
        with watch.watching(profiling=False):
            trainer.step(0)
        with watch.watching(profiling=True):
            trainer.step(0)
    assert set(watch.seconds) == set(watch.profiles) == {"Linear", "Conv2d"}
    spent = profile.own_times(watch.profiles["Linear"])
    assert any(key[0].startswith(profile.PACKAGE) for key in spent)
    assert not any("linear" in key[2] or "backward" in key[2] for key in spent)
    assert "Linear" in profile.phases_table(watch.profiles, watch.seconds, 1)
    assert "recorder.py" in profile.functions_table(watch.profiles, 1, 1000)


def test_work_that_differs_is_no_comparison() -> None:
    check_same({"trace/train/a": 2.0, "saturation/train/a": 0.5}, {"a": (2.00001, 0.5)})
    with pytest.raises(RuntimeError, match="trace and saturation"):
        check_same({"trace/train/a": 2.0, "saturation/train/a": 0.5}, {"a": (2.1, 0.5)})
    with pytest.raises(RuntimeError, match="losses differ"):
        check_same_losses("MLP", {"ours": 1.0, "delve": 1.0000001})


# --- what both trackers see ----------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    """delve names every layer."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.skipif(importlib.util.find_spec("delve") is None, reason="delve is in .venv-bench alone")
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_both_trackers_record_the_same_rows_of_the_same_layers(workload: Workload, tmp_path: Path) -> None:
    trainer = Trainer(workload.build(), workload)
    theirs = attach_delve(trainer.model, tmp_path, ("lsat",))
    tokens = int(np.prod(workload.input_shape[:2])) if workload.tokens else None
    with attach_ours(trainer.model, tmp_path, ("lsat",), nosave=True) as ours:
        check_same_layers(ours, theirs)
        trainer.step(0)
        ours.add_saturations()
        ours.metrics(wait=True)
        for name, moments in theirs.logs["train-covariance-matrix"].items():
            reference = moments.fix().numpy()
            covariance = ours.store.covariance(name.replace("-", "."), "train")
            assert np.abs(covariance - reference).max() <= 1e-5 * np.abs(reference).max()
            assert tokens in (None, moments._tlen)


def test_combining_counts_what_the_store_takes() -> None:
    costs = combining.measure_combining((3, 5), windows=2, sources=3)
    assert (costs["alone"].calls, costs["combined"].calls) == ([3, 3], [1, 1])
    assert costs["alone"].nbytes == [3 * 8 * (3 + 6 + 5 + 15)] * 2
    assert costs["combined"].nbytes == [8 * (3 + 6 + 5 + 15)] * 2
