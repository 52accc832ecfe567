"""delve_ray.memory: what recording takes is known before it starts, and what does not fit is left out or refused."""

from __future__ import annotations

import logging
import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from delve_ray.errors import OptionError
from delve_ray.layers import RowOptions
from delve_ray.memory import fit_memory, known_widths, worker_bytes
from delve_ray.recorder import Recorder, RecorderOptions
from delve_ray.selection import select_layers
from tests.benchmarks.memory import CASES, MemoryCase, peak_bytes, reset_peak, status


def test_a_recorder_stays_within_the_bytes_that_are_stated() -> None:
    model = nn.Sequential(nn.Linear(8, 300), nn.Conv2d(1, 64, 1), nn.Linear(300, 17))
    layers = select_layers(model)
    recorder = Recorder(layers, RecorderOptions())
    recorder.start()
    for _ in range(2):
        model[2](model[0](torch.randn(5000, 8)))
        model[1](torch.randn(4, 1, 100, 100))
        model.eval()
    model.train()
    harvest = recorder.harvest(end_of_window=False)
    for part in (model[0], model[0].eval()):
        part(torch.randn(5000, 8))
    recorder.close()
    held = list(harvest.values()) + list(recorder.harvest(end_of_window=True).values())
    taken = sum(
        value.numel() * value.element_size()
        for accumulator in held
        for value in vars(accumulator).values()
        if isinstance(value, Tensor)
    )
    for workspace in recorder._workspaces.values():
        taken += sum(buffer.numel() * buffer.element_size() for buffer in workspace._flat.values())
    assert 0 < taken <= worker_bytes(known_widths(layers))
    assert worker_bytes([]) == 0


def test_layers_that_are_too_wide_are_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    layers = select_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 9), nn.Linear(9, 7)))
    kept = fit_memory(layers, max_features=8, max_memory=1 << 30)
    assert [layer.name for layer in kept] == ["0", "2"]
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith("layer 1 has 9 features and is left out; raise max_features=8")


def test_what_does_not_fit_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    layers = select_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 9)))
    needed = worker_bytes(known_widths(layers))
    assert fit_memory(layers, max_features=9, max_memory=needed) == layers
    with pytest.raises(OptionError, match=rf"max_memory={needed - 1} .* {needed} .*the widest: 1 \(9\), 0 \(8\)"):
        fit_memory(layers, max_features=9, max_memory=needed - 1)
    with pytest.raises(OptionError, match=r"max_features=7 leaves no layer out of \[8, 9\]"):
        fit_memory(layers, max_features=7, max_memory=needed)


def test_a_layer_of_unknown_width_is_decided_by_its_first_forward() -> None:
    layers = select_layers(nn.Sequential(nn.Conv2d(1, 4, 1)), options=RowOptions("flatten"))
    assert known_widths(layers) == []
    assert fit_memory(layers, max_features=1, max_memory=1) == layers


# --- the peak of a hook ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peaks() -> dict[str, dict[str, int]]:
    """What each case takes."""
    return {case.text: found for case, found in zip(CASES, peak_bytes(), strict=True)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.text)
def test_a_hook_takes_at_most_one_copy_of_the_output(case: MemoryCase, peaks: dict[str, dict[str, int]]) -> None:
    """And d² floats; the first one also makes scratch memory and the accumulator, which are bounded by their own."""
    peak = peaks[case.text]
    assert peak["later"] <= case.allowed_bytes
    assert peak["first"] <= case.allowed_bytes + (16 << 20)


def test_the_measurement_sees_a_copy() -> None:
    before = reset_peak()
    with mmap.mmap(-1, 64 << 20) as memory:  # what malloc gives may have been in use before
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
    assert status("VmHWM") - before > 60 << 20
