"""Networks trained for real: a flaw that was built in is found, a sound network is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from delve_ray.analysis.diagnosis import diagnose
from tests.benchmarks.diagnosis import BEGIN, END, confusion, follow, misses, write
from tests.benchmarks.diagnosis import Result as Outcome
from tests.benchmarks.diagnosis_cases import CHOSEN_ON, HELD_OUT
from tests.benchmarks.diagnosis_networks import Case, Trained, load, train

pytestmark = pytest.mark.slow
CASES = {case.name: case for case in CHOSEN_ON}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(name: str, **changes: object) -> Trained:
    return train(replace(CASES[name], **changes), seed=0)


def diagnosed(result: Trained) -> dict[str, list[tuple[str, ...]]]:
    kinds: dict[str, list[tuple[str, ...]]] = {}
    for finding in diagnose(result.spectra, result.described):
        kinds.setdefault(finding.kind, []).append(finding.layers)
    return kinds


def last(result: Trained, layer: str, phase: str) -> dict:
    rows = [row for row in result.spectra.to_pylist() if (row["layer"], row["phase"]) == (layer, phase)]
    return max(rows, key=lambda row: row["step"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("cancer 16-8", {}), ("wine 16-8", {}), ("moons 32-32", {"epochs": 10}), ("digits 64-32", {"epochs": 12})],
)
def test_sound_networks_are_left_alone(name: str, changes: dict) -> None:
    assert diagnosed(trained(name, **changes)) == {}


def test_a_tail_that_can_go() -> None:
    result = trained("cancer 32×6")
    assert diagnosed(result)["tail"] == [("6", "8", "10")]
    shorter = trained("cancer 32×6", widths=(32, 32, 32))
    assert shorter.accuracy >= result.accuracy - 0.01
    assert "tail" not in diagnosed(shorter)


def test_a_bottleneck_that_costs_accuracy() -> None:
    result = trained("wine 32-1-32")
    assert diagnosed(result)["bottleneck"] == [("2",)]
    wider = train(CASES["wine 32-1-32"].repaired(), seed=0)
    assert wider.accuracy > result.accuracy + 0.1
    assert "bottleneck" not in diagnosed(wider)


def test_an_over_wide_layer_says_what_its_row_says() -> None:
    result = trained("cancer 256")
    (finding,) = (one for one in diagnose(result.spectra, result.described) if one.kind == "over-wide")
    row = last(result, "0", finding.phase)
    assert finding.layers == ("0",)
    assert finding.step == row["step"]
    assert f"lies in {row['intrinsic_dimensionality']} of 256 directions" in finding.evidence
    width = 3 * row["intrinsic_dimensionality"]
    fewer = (256 - width) * (30 + 1 + 2)
    assert f"Try {width} features" in finding.advice
    count = sum(parameter.numel() for parameter in result.model.parameters())
    assert f"{fewer:,} of the model's {count:,} parameters" in finding.advice
    narrow = trained("cancer 256", widths=(width,))
    assert count - sum(parameter.numel() for parameter in narrow.model.parameters()) == fewer
    assert narrow.accuracy >= result.accuracy - 0.03


def test_dead_units_are_as_many_as_there_are() -> None:
    result = trained("digits, half dead, recorded", epochs=4)
    units = []
    result.model[1].register_forward_hook(lambda module, inputs, output: units.append(output))
    result.model.eval()
    with torch.no_grad():
        result.model(load("digits", seed=0)[2])
    constant = int((units[0].amax(0) == units[0].amin(0)).sum())
    assert constant >= 32
    (finding,) = (one for one in diagnose(result.spectra, result.described) if one.layers == ("1",))
    assert finding.kind == "dead"
    assert finding.evidence.startswith(f"{constant} of the 64 eigenvalues of 1 are zero")


def test_a_dead_layer_and_one_that_dies() -> None:
    found = diagnosed(trained("digits, dead layer", epochs=3))
    assert found == {"dead": [("4",)]}
    late = diagnosed(trained("digits, late decay 1", epochs=12))
    assert {"2", "4"} <= set(late["collapse"][0])


@pytest.mark.parametrize(
    ("name", "layers"), [("digits, norm frozen", {"6"}), ("digits, eval times 3", {"0", "2", "4"})]
)
def test_a_gap_between_train_and_eval(name: str, layers: set[str]) -> None:
    case = CASES[name]
    (found,) = diagnosed(train(replace(case, epochs=12), seed=0))["gap"]
    assert layers <= set(found)
    assert "gap" not in diagnosed(train(replace(case.repaired(), epochs=12), seed=0))


def test_too_few_observations() -> None:
    assert diagnosed(trained("wine 256", epochs=8)) == {"too-few-observations": [("0",)]}


# --- the evaluation's own parts ------------------------------------------------------------------------


def test_cases_are_told_apart_by_their_names() -> None:
    for cases in (CHOSEN_ON, HELD_OUT):
        assert len({(case.name, case.flaw) for case in cases}) == len(cases)


def test_the_table_counts_runs(tmp_path) -> None:
    sound, flawed = Case("a", None, "wine", (4,)), Case("b", "tail", "wine", (4,))
    tail = diagnose(trained("cancer 32×6", epochs=8).spectra)[-1]
    results = [Outcome(sound, 0, 1.0, []), Outcome(sound, 1, 1.0, [tail]), Outcome(flawed, 0, 1.0, [])]
    lines = confusion(results)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2][:2] == ["none", "2"]
    assert cells[2][cells[0].index(tail.kind)] == "1"
    assert cells[2][-1] == "**1**"
    assert cells[3][:3] == ["tail", "1", "**0**"]
    assert misses(results)[0] == "- missed: tail (b, 1 of 1)"
    assert misses(results)[1] == f"- found in a sound network: {tail.kind} (a, 1 of 2)"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write("new", page)
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


def test_advice_is_followed_by_widths() -> None:
    result = trained("cancer 256", epochs=8)
    findings = diagnose(result.spectra, result.described)
    (width,) = follow("over-wide", findings, ["0", "2"], (256,))
    assert width == 3 * last(result, "0", findings[0].phase)["intrinsic_dimensionality"]
    assert follow("over-wide", findings, ["0", "1", "2"], (256,)) is None
    assert follow("tail", findings, ["0", "2"], (256,)) is None
