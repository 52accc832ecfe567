import io
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delve_ray.analysis.plots.canvas import PHASE_COLOURS
from delve_ray.errors import OptionError
from delve_ray.schema import EXTRA_STATS, PHASES, SCALAR_STATS, window_metrics
from delve_ray.storage import Storage
from delve_ray.writers import WriterRun, make_writers
from delve_ray.writers.parquet import spectra_table
from delve_ray.writers.tensorboard import (
    FIGURE_DPI,
    MAX_BINS,
    TensorBoardWriter,
    spectrum_histogram,
    window_figures,
)
from tests.windows import HOSTILE_NAMES, START, later, layer_row, scalar, sketched_row, window


@pytest.fixture
def writer(tmp_path):
    made = TensorBoardWriter(Storage(tmp_path))
    yield made
    made.close()


def events(tmp_path):
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def points(accumulator, tag):
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_a_sketched_layer_has_curves_of_its_interval(tmp_path, writer):
    writer.write(window([sketched_row("unseen", 9.0), layer_row("whole", stats={"saturation": 0.5})], step=3))
    found = events(tmp_path)
    tags = {tag: points(found, tag)[0][1] for tag in found.Tags()["scalars"] if tag.startswith("saturation")}
    assert tags == pytest.approx(
        {
            "saturation/train/whole": 0.5,
            "saturation/train/mean": 0.5,
            "saturation_low/train/unseen": 3 / 40,
            "saturation_high/train/unseen": 37 / 40,
            "saturation_low/train/mean": (3 / 40 + 0.5) / 2,
            "saturation_high/train/mean": (37 / 40 + 0.5) / 2,
        }
    )
    assert "eigenspectrum/train/unseen" in found.Tags()["histograms"]


def test_every_metric_under_its_key_with_step_and_time(tmp_path, writer):
    windows = [
        window(
            [
                layer_row("a", stats={name: 0.1 + i for i, name in enumerate((*SCALAR_STATS, *EXTRA_STATS))}),
                layer_row("b", stats={"saturation": 0.3 + step}),
                layer_row("a", "eval", stats={"saturation": 0.7}),
            ],
            step=step,
            window=step,
            wall_time=later(step),
        )
        for step in (0, 5)
    ]
    for each in windows:
        writer.write(each)

    read = events(tmp_path)
    assert set(read.Tags()["scalars"]) == set(window_metrics(windows[0].rows))
    for key, first in window_metrics(windows[0].rows).items():
        second = window_metrics(windows[1].rows)[key]
        assert points(read, key) == [(0, float(np.float32(first))), (5, float(np.float32(second)))]
        assert [event.wall_time for event in read.Scalars(key)] == [START.timestamp(), START.timestamp() + 5]


def test_values_that_are_not_finite(tmp_path, writer):
    writer.write(window([layer_row("a", stats={"trace": math.nan, "condition_number": math.inf})]))

    read = events(tmp_path)
    assert math.isnan(read.Scalars("trace/train/a")[0].value)
    assert read.Scalars("condition_number/train/a")[0].value == math.inf
    assert "condition_number/train/mean" not in read.Tags()["scalars"]


def test_the_eigenspectrum_as_a_histogram_of_decades(tmp_path, writer):
    eigenvalues = np.array([1000.0, 10.5, 10.0, 1.0, 0.0])
    writer.write(window([layer_row("a", "eval", eigenvalues=eigenvalues)], step=4))

    (event,) = events(tmp_path).Histograms("eigenspectrum/eval/a")
    histogram = event.histogram_value
    assert event.step == 4
    assert (histogram.min, histogram.max, histogram.num) == (0.0, 3.0, 4.0)
    assert histogram.sum == pytest.approx(3 + 1 + math.log10(10.5))
    assert histogram.sum_squares == pytest.approx(9 + 1 + math.log10(10.5) ** 2)
    buckets = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    filled = {round(limit, 6): count for limit, count in buckets if count}
    assert filled == {0.1: 1, 1.1: 2, 3.1: 1}  # right edges of bins one tenth of a decade wide


@pytest.mark.parametrize("eigenvalues", [[], [0.0, 0.0], [math.nan, -1.0]])
def test_no_histogram_without_a_positive_eigenvalue(tmp_path, writer, eigenvalues):
    writer.write(window([layer_row("a", eigenvalues=np.array(eigenvalues, np.float64))]))

    tags = events(tmp_path).Tags()
    assert tags["histograms"] == []
    assert "saturation/train/a" in tags["scalars"]


@pytest.mark.parametrize("decades", [0, 1, 6.35, 6.5, 16, 600])
def test_bins_count_every_eigenvalue_and_line_up(decades):
    values = 10.0 ** np.random.default_rng(0).uniform(-decades / 2, decades / 2, 1000)
    histogram = spectrum_histogram(values)
    limits, counts = np.array(histogram["bucket_limit"]), np.array(histogram["bucket"])

    assert counts.sum() == histogram["num"] == 1000
    assert 1 <= counts.size <= MAX_BINS
    width = 0.1
    while not np.isclose(limits[0] / width, round(limits[0] / width)) or (
        counts.size > 1 and not np.isclose(np.diff(limits), width).all()
    ):
        width *= 2
        assert width < 100
    logs = np.log10(values)
    assert limits[0] - width <= logs.min() < limits[0] + 1e-9
    assert limits[-1] - width - 1e-9 <= logs.max() <= limits[-1] + 1e-9
    for limit, below in zip(limits, np.cumsum(counts), strict=True):
        assert below == np.count_nonzero(logs < limit)


@pytest.mark.parametrize(("decades", "bins"), [(6.35, 64), (6.45, 33)])
def test_bins_widen_where_there_would_be_too_many(decades, bins):
    assert len(spectrum_histogram(np.array([10.0**decades, 1.0]))["bucket"]) == bins


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_tags_are_the_keys_to_the_letter(tmp_path, writer, name):
    row = layer_row(name, stats={"saturation": 0.5})
    writer.write(window([row]))
    writer.write_scalars([scalar(name or "x", 2.0, step=9)])

    read = events(tmp_path)
    shown = "layer:mean" if name == "mean" else name
    assert set(read.Tags()["scalars"]) == {f"saturation/train/{shown}", "saturation/train/mean", name or "x"}
    assert read.Tags()["histograms"] == [f"eigenspectrum/train/{shown}"]
    assert points(read, name or "x") == [(9, 2.0)]


def test_live_revisions_are_left_out(tmp_path, writer):
    writer.write(window([layer_row()], final=False))
    writer.write(window([], final=True))
    assert not (tmp_path / "tensorboard").exists()

    writer.write(window([layer_row(stats={"saturation": 0.5})], revision=1))
    assert points(events(tmp_path), "saturation/train/conv1") == [(0, 0.5)]


def test_a_correction_is_a_newer_point_on_its_step(tmp_path, writer):
    for revision, value in enumerate((0.5, 0.25)):
        row = layer_row(stats={"saturation": value})
        writer.write(window([row], step=3, revision=revision, wall_time=later(revision)))

    assert points(events(tmp_path), "saturation/train/conv1") == [(3, 0.5), (3, 0.25)]


def test_a_reader_sees_everything_when_a_call_returns(tmp_path, writer):
    for step in range(50):
        writer.write(window([layer_row(stats={"saturation": step / 64})], step=step, window=step))
        writer.write_scalars([scalar(value=step, step=step * 10)])
        if step % 10 == 0:
            assert points(events(tmp_path), "saturation/train/conv1")[-1] == (step, step / 64)
            assert points(events(tmp_path), "loss")[-1] == (step * 10, step)
    assert len(points(events(tmp_path), "loss")) == 50
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_writers_started_in_the_same_second_keep_their_files(tmp_path):
    for step in range(5):
        writer = TensorBoardWriter(Storage(tmp_path))
        writer.write_scalars([scalar(value=step, step=step)])
        writer.close()
        writer.close()

    assert len(list((tmp_path / "tensorboard").iterdir())) == 5
    assert points(events(tmp_path), "loss") == [(step, step) for step in range(5)]


def test_after_a_failed_write_the_next_goes_to_a_new_file(tmp_path, writer, monkeypatch):
    writer.write_scalars([scalar(step=0)])
    fsync = os.fsync

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        writer.write_scalars([scalar(step=1)])
    monkeypatch.setattr(os, "fsync", fsync)
    writer.write_scalars([scalar(step=2)])

    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert points(events(tmp_path), "loss")[-1] == (2, 1.5)


@pytest.mark.parametrize("removed", ["tensorboard", "file", "replaced"])
def test_a_removed_event_file_is_followed_by_a_new_one(tmp_path, writer, removed):
    writer.write_scalars([scalar(step=0)])
    writer.write_scalars([scalar(step=1)])
    (file,) = (tmp_path / "tensorboard").iterdir()
    if removed == "tensorboard":
        shutil.rmtree(tmp_path / "tensorboard")
    else:
        file.unlink()
    if removed == "replaced":  # by a copy of itself, say: still not the file that is open
        file.write_bytes(b"")
    writer.write(window([layer_row(stats={"saturation": 0.5})], step=2))
    writer.write_scalars([scalar(step=3)])

    read = events(tmp_path)
    assert points(read, "saturation/train/conv1") == [(2, 0.5)]
    assert points(read, "loss") == [(3, 1.5)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1 + (removed == "replaced")


def test_a_file_in_the_way_of_the_directory(tmp_path, writer):
    (tmp_path / "tensorboard").write_text("in the way")
    for _ in range(2):
        with pytest.raises(OSError):
            writer.write_scalars([scalar(step=1)])
    (tmp_path / "tensorboard").unlink()
    writer.write_scalars([scalar(step=1)])
    assert points(events(tmp_path), "loss") == [(1, 1.5)]


def test_half_an_event_hides_nothing_and_tries_leave_no_files(tmp_path, writer, monkeypatch):
    writer.write_scalars([scalar(step=0)])
    (first,) = (tmp_path / "tensorboard").iterdir()
    fsync = os.fsync

    def fail(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 7)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for _ in range(5):
        with pytest.raises(OSError, match="No space"):
            writer.write_scalars([scalar(step=1)])
    assert list((tmp_path / "tensorboard").iterdir()) == [first]
    monkeypatch.setattr(os, "fsync", fsync)
    for step in (1, 2):
        writer.write_scalars([scalar(step=step)])

    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert points(events(tmp_path), "loss") == [(0, 1.5), (1, 1.5), (2, 1.5)]


def test_a_close_that_fails_leaves_nothing_behind(tmp_path, writer, monkeypatch):
    writer.write_scalars([scalar(step=0)])

    def fail(self):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("tensorboardX.record_writer.RecordWriter.close", fail)
        with pytest.raises(OSError, match="Stale"):
            writer.close()
    writer.close()
    writer.write_scalars([scalar(step=1)])
    assert points(events(tmp_path), "loss") == [(0, 1.5), (1, 1.5)]


def test_only_local_directories():
    with pytest.raises(NotImplementedError, match="save_to='tensorboard' needs a local savefile, not savefile='mock:"):
        TensorBoardWriter(Storage("mock:///bucket/run"))


def test_without_its_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto", None)
    with pytest.raises(OptionError, match="pip install tensorboardX"):
        TensorBoardWriter(Storage(tmp_path))


def pictures(tmp_path):
    """Every image in the event files: {tag: [(step, decoded RGBA image, width, height)]}."""
    from PIL import Image

    accumulator = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    accumulator.Reload()
    return {
        tag: [
            (event.step, Image.open(io.BytesIO(event.encoded_image_string)), event.width, event.height)
            for event in accumulator.Images(tag)
        ]
        for tag in accumulator.Tags()["images"]
    }


def two_phases(step=0, **changes):
    """A window of two layers in both phases, with a tail of bars and a spectrum."""
    eigenvalues = 5.0 * 0.5 ** np.arange(20)
    rows = [
        layer_row(layer, phase, features=20, samples=500, stats={"saturation": 0.4}, eigenvalues=eigenvalues)
        for phase in ("train", "eval")
        for layer in ("conv1", "$conv_{")
    ]
    return window(rows, step=step, window=step, **changes)


def test_figures_are_images_of_each_phase_and_step(tmp_path):
    writer = TensorBoardWriter(Storage(tmp_path), figures=True)
    for step in (0, 3):
        writer.write(two_phases(step))
    writer.close()

    found = pictures(tmp_path)
    assert set(found) == {f"{name}/{phase}" for name in ("saturation_per_layer", "eigenspectra") for phase in PHASES}
    for tag, images in found.items():
        assert [step for step, *_ in images] == [0, 3]
        for _, image, width, height in images:
            assert image.size == (width, height)
            assert (image.mode, min(image.size) > 300) == ("RGBA", True)
            colour = to_rgb(PHASE_COLOURS[tag.rpartition("/")[2]])
            near = np.abs(np.asarray(image)[..., :3] / 255 - colour).max(axis=-1) < 0.02
            assert near.sum() > 50, tag
    assert points(events(tmp_path), "saturation/train/conv1") == [(0, pytest.approx(0.4)), (3, pytest.approx(0.4))]


def test_figures_are_those_of_the_analysis(tmp_path):
    from delve_ray.analysis.plots import eigenspectra, saturation_per_layer

    drawn = window_figures(two_phases(7))
    spectra = spectra_table(two_phases(7))
    for name, draw in (("saturation_per_layer", saturation_per_layer), ("eigenspectra", eigenspectra)):
        for phase in PHASES:
            file = io.BytesIO()
            draw(spectra, phase=phase).savefig(file, format="png", dpi=FIGURE_DPI)
            assert drawn[f"{name}/{phase}"]["encoded_image_string"] == file.getvalue()


def test_nothing_is_drawn_unless_asked_for(tmp_path):
    program = f"""
import sys
from delve_ray.storage import Storage
from delve_ray.writers.tensorboard import TensorBoardWriter
from tests.windows import layer_row, window
for figures in (False, True):
    writer = TensorBoardWriter(Storage({str(tmp_path)!r}), figures=figures)
    writer.write(window([layer_row()], final=not figures))
    assert "delve_ray.analysis.plots" not in sys.modules
    assert "matplotlib" not in sys.modules
writer.write(window([layer_row()], step=1))
assert "delve_ray.analysis.plots" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {step for images in pictures(tmp_path).values() for step, *_ in images} == {1}


def test_a_picture_that_cannot_be_drawn_costs_no_values(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no ink")

    monkeypatch.setattr("delve_ray.analysis.plots.eigenspectra", fail)
    writer = TensorBoardWriter(Storage(tmp_path), figures=True)
    writer.write(two_phases(4))
    writer.close()
    assert points(events(tmp_path), "saturation/eval/conv1") == [(4, pytest.approx(0.4))]
    assert pictures(tmp_path) == {}
    assert "figures of run 'run', step 4 cannot be drawn" in caplog.text
    assert "no ink" in caplog.text


def test_figures_need_matplotlib_and_a_flag(tmp_path, monkeypatch):
    run = WriterRun("run", Storage(tmp_path))
    with pytest.raises(OptionError, match="figures='yes' must be True or False"):
        make_writers(["tensorboard"], run, {"tensorboard": {"figures": "yes"}})
    with pytest.raises(OptionError, match=r"writer_args=\{'tensorboard': \{'figure': True\}\} does not fit: .*figure"):
        make_writers(["tensorboard"], run, {"tensorboard": {"figure": True}})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"needs matplotlib: pip install \"delve_ray\[plot\]\""):
        make_writers(["tensorboard"], run, {"tensorboard": {"figures": True}})
    assert make_writers(["tensorboard"], run, {"tensorboard": {"figures": False}})
