"""The NumPy writer: what it puts into its archives, and which of them hold."""

import math
import shutil
import zipfile
from datetime import timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray.errors import OptionError
from delve_ray.moments import triangle_size
from delve_ray.schema import SCALAR_STATS
from delve_ray.storage import Storage
from delve_ray.writers import WriterRun, make_writers
from delve_ray.writers.npy import NpyWriter
from tests.windows import COVARIANCE, HEAD, HOSTILE_NAMES, START, layer_row, scalar, sketched_row, window

MATRIX = np.array([[1.0, 0.5, 0.25], [0.5, 2.0, -0.5], [0.25, -0.5, 3.0]])
"""What `COVARIANCE` is the packed upper triangle of."""


def opened(storage, **options):
    writer = NpyWriter(**options)
    writer.open(WriterRun("run", storage if isinstance(storage, Storage) else Storage(storage)))
    return writer


@pytest.fixture
def writer(tmp_path):
    return opened(tmp_path)


def load(tmp_path, step=0, phase="train"):
    return np.load(tmp_path / "npy" / phase / f"{step:010d}.npz", allow_pickle=False)


def files(tmp_path):
    return sorted(str(path.relative_to(tmp_path / "npy")) for path in (tmp_path / "npy").rglob("*") if path.is_file())


def remote(tmp_path):
    return Storage("run", filesystem=pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))


# --- what is in an archive -----------------------------------------------------------------------------


def test_an_archive_has_a_value_per_layer(tmp_path, writer):
    stats = {name: 0.1 + index for index, name in enumerate(SCALAR_STATS)} | {
        "trace": math.nan,
        "determinant": math.inf,
    }
    rows = [layer_row("fc", stats=stats), layer_row("conv", features=7, samples=9, layer_type="Conv2d")]
    writer.write(window(rows, step=3, attempt=1, revision=2))
    archive = load(tmp_path, 3)
    assert archive["layer"].tolist() == ["fc", "conv"]
    assert archive["layer_type"].tolist() == ["Linear", "Conv2d"]
    for name, values in {"features": [3, 7], "samples": [100, 9], "nonfinite_rows": [2, 2]}.items():
        assert archive[name].dtype == np.int64
        assert archive[name].tolist() == values
    np.testing.assert_array_equal(archive["threshold"], [0.99, 0.99])
    for name in SCALAR_STATS:
        other = layer_row().stats.get(name, math.nan)
        assert archive[name].dtype == np.float64
        np.testing.assert_array_equal(archive[name], [stats[name], other])
    single = {name: archive[name].item() for name in ("attempt", "step", "revision", "workers", "world_size")}
    assert single == {"attempt": 1, "step": 3, "revision": 2, "workers": 4, "world_size": 4}
    assert "rankme" not in archive, "no layer has it"


def test_an_archive_has_each_layers_spectrum(tmp_path, writer):
    spectrum = np.array([1e300, 1.0, 5e-324])
    writer.write(window([layer_row("fc", eigenvalues=spectrum, covariance=COVARIANCE), layer_row("conv")]))
    archive = load(tmp_path)
    np.testing.assert_array_equal(archive["eigenvalues/fc"], spectrum)
    np.testing.assert_array_equal(archive["mean/conv"], [3.0, 0.0, 4.0])
    np.testing.assert_array_equal(archive["covariance/fc"], MATRIX)
    assert "covariance/conv" not in archive
    assert "embedding/fc" not in archive
    assert "thresholds" not in archive


def test_an_archive_says_which_layers_are_sketched_and_how_well(tmp_path, writer):
    writer.write(window([layer_row("whole"), sketched_row("seen", 0.0625), sketched_row("unseen", 9.0)]))
    archive = load(tmp_path)
    assert archive["sketched"].tolist() == [False, True, True]
    np.testing.assert_array_equal(archive["saturation"], [2 / 3, 3 / 40, math.nan])
    np.testing.assert_array_equal(archive["saturation_low"], [math.nan, 3 / 40, 3 / 40])
    np.testing.assert_array_equal(archive["saturation_high"], [math.nan, 3 / 40, 37 / 40])
    np.testing.assert_array_equal(archive["unseen_variance"], [math.nan, 0.0625, 9.0])
    np.testing.assert_array_equal(archive["eigenvalues/unseen"], HEAD)
    writer.write(window([layer_row("whole")], step=1))
    assert "sketched" not in load(tmp_path, 1)


def test_an_archive_has_each_layers_embedding(tmp_path, writer):
    points = np.arange(10.0).reshape(5, 2)
    writer.write(window([layer_row("fc", embedding=points), layer_row("conv")]))
    np.testing.assert_array_equal(load(tmp_path)["embedding/fc"], points)
    assert "embedding/conv" not in load(tmp_path)


def test_several_thresholds(tmp_path, writer):
    rows = [
        layer_row(name, thresholds=(0.9, 0.99), intrinsic_dimensionalities=found)
        for name, found in (("a", (1, 2)), ("b", (2, 3)))
    ]
    writer.write(window(rows))
    assert load(tmp_path)["thresholds"].tolist() == [0.9, 0.99]
    assert load(tmp_path)["intrinsic_dimensionalities"].tolist() == [[1, 2], [2, 3]]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_covariance_comes_back_square(tmp_path_factory, data):
    features = data.draw(st.integers(1, 70))
    seed = data.draw(st.integers(0, 2**32 - 1))
    square = np.random.default_rng(seed).standard_normal((features, features)) * 10.0 ** data.draw(
        st.integers(-200, 200)
    )
    square = np.triu(square) + np.triu(square, 1).T
    packed = square[np.triu_indices(features)]
    assert packed.size == triangle_size(features)
    folder = tmp_path_factory.mktemp("run")
    row = layer_row(features=features, mean=square[0], eigenvalues=square[-1], covariance=packed)
    opened(folder, zip=data.draw(st.booleans())).write(window([row]))
    archive = load(folder)
    for name, array in (("covariance", square), ("mean", square[0]), ("eigenvalues", square[-1])):
        np.testing.assert_array_equal(archive[f"{name}/conv1"], array)


def test_layer_names_are_data_and_never_paths(tmp_path, writer):
    names = [*HOSTILE_NAMES, "<b>$x^2$" + "层" * 200, "file", "layer"]
    rows = [layer_row(name, eigenvalues=np.full(3, float(index))) for index, name in enumerate(names)]
    writer.write(window(rows))
    assert files(tmp_path) == ["train/0000000000.npz"]
    archive = load(tmp_path)
    assert archive["layer"].tolist() == names
    assert [archive[f"eigenvalues/{name}"][0] for name in names] == list(range(len(names)))


def test_compression_changes_the_size_alone(tmp_path):
    row = layer_row(
        features=200, covariance=np.zeros(triangle_size(200)), mean=np.zeros(200), eigenvalues=np.zeros(200)
    )
    for name, options in (("stored", {}), ("zipped", {"zip": True})):
        opened(tmp_path / name, **options).write(window([row]))
    stored, zipped = (tmp_path / name / "npy" / "train" / "0000000000.npz" for name in ("stored", "zipped"))
    assert zipped.stat().st_size < stored.stat().st_size / 20
    with np.load(stored) as first, np.load(zipped) as second:
        assert first.files == second.files
        for name in first.files:
            np.testing.assert_array_equal(first[name], second[name])


def test_numpys_own_archive_has_the_same_members(tmp_path, writer):
    writer.write(window([layer_row(covariance=COVARIANCE)]))
    ours = load(tmp_path)
    np.savez(tmp_path / "theirs.npz", **{name: ours[name] for name in ours.files})
    with zipfile.ZipFile(tmp_path / "theirs.npz") as theirs, zipfile.ZipFile(ours.fid) as own:
        assert own.testzip() is None
        assert {name: own.read(name) for name in own.namelist()} == {
            name: theirs.read(name) for name in theirs.namelist()
        }


# --- which files there are -----------------------------------------------------------------------------


def test_a_file_per_phase_and_step(tmp_path, writer):
    writer.write(window([layer_row(), layer_row(phase="eval", samples=7)], step=0))
    writer.write(window([layer_row(phase="eval", samples=8)], step=2**62))
    assert files(tmp_path) == ["eval/0000000000.npz", f"eval/{2**62}.npz", "train/0000000000.npz"]
    assert load(tmp_path, phase="eval")["samples"].tolist() == [7]
    assert load(tmp_path, 2**62, "eval")["samples"].tolist() == [8]


def test_live_windows_and_empty_ones_are_left_out(tmp_path, writer):
    writer.write(window([layer_row()], final=False))
    writer.write(window())
    writer.write_scalars([])
    assert not (tmp_path / "npy").exists()


def test_a_corrected_window_replaces_its_file(tmp_path, writer):
    writer.write(window([layer_row(samples=90), layer_row("late")], revision=1))
    writer.write(window([layer_row(samples=100)], revision=2))
    assert files(tmp_path) == ["train/0000000000.npz"]
    assert load(tmp_path)["samples"].tolist() == [100]
    assert load(tmp_path)["revision"] == 2


@pytest.mark.parametrize("again", [False, True], ids=["one writer", "a restarted one"])
def test_a_later_attempt_holds_whatever_comes_after_it(tmp_path, writer, again):
    writer.write(window([layer_row(samples=1), layer_row(phase="eval", samples=2)], step=5, attempt=0))
    writer.write(window([layer_row(samples=3)], step=5, attempt=1))
    late = opened(tmp_path) if again else writer
    late.write(window([layer_row(samples=4), layer_row(phase="eval", samples=5)], step=5, attempt=0, revision=9))
    assert load(tmp_path, 5)["samples"].tolist() == [3]
    assert load(tmp_path, 5, "eval")["samples"].tolist() == [5], "that one the later attempt has not replayed"
    late.write(window([layer_row(samples=6)], step=5, attempt=1, revision=1))
    assert load(tmp_path, 5)["samples"].tolist() == [6]


def test_writing_again_changes_nothing(tmp_path, writer):
    """As after an outage, or by a store that was restarted."""
    for _ in range(2):
        writer.write(window([layer_row()], step=1))
        writer.write_scalars([scalar("loss", 0.5), scalar("loss", 0.5, rank=1)])
        found = {name: (tmp_path / "npy" / name).read_bytes() for name in files(tmp_path)}
        writer = opened(tmp_path)
        writer.write(window([layer_row()], step=1))
        writer.write_scalars([scalar("loss", 0.5), scalar("loss", 0.5, rank=1)])
        assert {name: (tmp_path / "npy" / name).read_bytes() for name in files(tmp_path)} == found
    assert len(found) == 2


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half of one"])
def test_what_is_no_archive_is_replaced(tmp_path, content):
    path = tmp_path / "npy" / "train" / "0000000000.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    opened(tmp_path).write(window([layer_row()]))
    assert load(tmp_path)["layer"].tolist() == ["conv1"]


def test_an_archive_of_something_else_is_replaced(tmp_path):
    path = tmp_path / "npy" / "train" / "0000000000.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, other=np.zeros(3))
    opened(tmp_path).write(window([layer_row()]))
    assert load(tmp_path)["layer"].tolist() == ["conv1"]


def test_a_failed_write_leaves_what_was_there(tmp_path, writer, monkeypatch):
    writer.write(window([layer_row(samples=90)]))
    with monkeypatch.context() as patch:
        patch.setattr("delve_ray.storage.os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            writer.write(window([layer_row(samples=100)], revision=1))
    assert load(tmp_path)["samples"].tolist() == [90]
    assert len(list((tmp_path / "npy" / "train").iterdir())) == 1, "nothing half-written stays"
    writer.write(window([layer_row(samples=100)], revision=1))
    assert load(tmp_path)["samples"].tolist() == [100]


def test_a_folder_that_somebody_has_removed(tmp_path, writer):
    writer.write(window([layer_row()]))
    shutil.rmtree(tmp_path / "npy")
    writer.write(window([layer_row(samples=7)]))
    assert load(tmp_path)["samples"].tolist() == [7]


def test_a_file_that_goes_while_it_is_looked_at(tmp_path, writer, monkeypatch):
    writer.write(window([layer_row(samples=1)], attempt=3))
    restarted = opened(tmp_path)
    listed = Storage.list_files

    def and_gone(self, *arguments):
        names = listed(self, *arguments)
        (tmp_path / "npy" / "train" / "0000000000.npz").unlink()
        return names

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "list_files", and_gone)
        restarted.write(window([layer_row(samples=2)], attempt=2))
    assert load(tmp_path)["samples"].tolist() == [2]


def test_a_remote_savefile(tmp_path):
    """Nothing here needs a local file: on an object store each is one put."""
    storage = remote(tmp_path)
    assert not storage.is_local
    opened(storage).write(window([layer_row(covariance=COVARIANCE)], attempt=1))
    opened(storage).write(window([layer_row(samples=1)], attempt=0))
    opened(storage).write_scalars([scalar()])
    archive = load(tmp_path / "run")
    assert archive["samples"].tolist() == [100]
    np.testing.assert_array_equal(archive["covariance/conv1"], MATRIX)
    assert len(files(tmp_path / "run")) == 2


# --- user scalars --------------------------------------------------------------------------------------


def scalars(tmp_path):
    found = [np.load(path, allow_pickle=False) for path in sorted((tmp_path / "npy" / "scalars").iterdir())]
    return [row for array in found for row in array.tolist()]


def test_user_scalars(tmp_path, writer):
    east = START.astimezone(timezone(timedelta(hours=5)))
    writer.write_scalars([scalar("loss", 0.1, step=2), scalar("größe", math.inf, rank=1, attempt=3, wall_time=east)])
    naive = START.replace(tzinfo=None)
    assert scalars(tmp_path) == [(0, 0, "loss", 2, 0.1, naive), (3, 1, "größe", 0, math.inf, naive)]


def test_equal_values_at_two_moments_are_two(tmp_path, writer):
    writer.write_scalars([scalar("loss", 0.1)])
    writer.write_scalars([scalar("loss", 0.1, wall_time=START + timedelta(microseconds=1))])
    assert [row[4] for row in scalars(tmp_path)] == [0.1, 0.1]


# --- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, "no", None])
def test_zip_is_true_or_false(value, tmp_path):
    with pytest.raises(OptionError, match=r"zip=.* must be True or False"):
        make_writers(["npy"], WriterRun("run", Storage(tmp_path)), {"npy": {"zip": value}})


def test_it_is_made_by_its_name(tmp_path):
    (writer,) = make_writers(["npy"], WriterRun("run", Storage(tmp_path)))
    assert isinstance(writer, NpyWriter)
    assert list(Path(tmp_path).iterdir()) == [], "nothing is written before there is something"
