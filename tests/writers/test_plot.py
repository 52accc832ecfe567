"""The plot writer: which pictures there are, what they show, and how they keep up."""

import math
import os
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from delve_ray.errors import OptionError
from delve_ray.storage import Storage
from delve_ray.writers import WriterRun, make_writers, open_writers, plot
from delve_ray.writers.plot import PlotWriter
from tests.windows import HOSTILE_NAMES, layer_row, scalar, window

pytest.importorskip("matplotlib")


def opened(storage, **options):
    writer = PlotWriter(**options)
    writer.open(WriterRun("run", storage if isinstance(storage, Storage) else Storage(storage)))
    return writer


@pytest.fixture
def writer(tmp_path):
    return opened(tmp_path)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, in order."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def keep(figure, *arguments, **options):
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def layers(phase="train", **saturations):
    """A row for each layer, of 100 features, so that a saturation is a dimensionality in per cent."""
    return [
        layer_row(name, phase, features=100, stats={"saturation": value, "intrinsic_dimensionality": 100.0 * value})
        for name, value in saturations.items()
    ]


def files(tmp_path):
    root = tmp_path / "plot"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) if root.exists() else []


def size(path):
    """Width and height of a PNG in pixels."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82"), "it is whole"
    return struct.unpack(">II", content[16:24])


def heights(figure):
    """The bars of a picture of layers."""
    return [round(bar.get_height(), 9) for container in figure.axes[0].containers for bar in container]


def lines(figure):
    """Steps and saturations by the labels of the lines."""
    found = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    return {
        label: dict(
            zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).round(9).tolist(), strict=True)
        )
        for label, line in found.items()
        if label.split()[0] in ("train", "eval")
    }


def numbers(tmp_path, *columns):
    table = pq.read_table(tmp_path / "plot" / "saturation.parquet")
    return [
        tuple(row[name] for name in columns or ("phase", "step", "layer", "saturation")) for row in table.to_pylist()
    ]


# --- what is drawn -------------------------------------------------------------------------------------


def test_a_picture_of_each_phases_layers_and_one_of_all_steps(tmp_path, writer, figures):
    writer.write(window([*layers(a=0.25, b=0.5), *layers("eval", a=0.75)], step=3))
    assert files(tmp_path) == ["eval/0000000003.png", "saturation.parquet", "saturation.png", "train/0000000003.png"]
    train, evaluation, steps = figures
    assert heights(train) == [0.25, 0.5]
    assert heights(evaluation) == [0.75]
    assert lines(steps) == {"train a": {3: 0.25}, "train b": {3: 0.5}, "eval a": {3: 0.75}}
    for name in files(tmp_path):
        if name.endswith(".png"):
            assert min(size(tmp_path / "plot" / name)) > 300
    writer.close()
    assert len(figures) == 3, "there is nothing left to draw"


def test_the_picture_over_the_steps_goes_on(tmp_path, writer, figures):
    for step, value in ((0, 0.25), (1, 0.5), (5, 0.75)):
        writer.write(window(layers(a=value), step=step))
    assert lines(figures[-1]) == {"train a": {0: 0.25, 1: 0.5, 5: 0.75}}
    assert numbers(tmp_path) == [("train", 0, "a", 0.25), ("train", 1, "a", 0.5), ("train", 5, "a", 0.75)]
    assert files(tmp_path)[-3:] == [f"train/000000000{step}.png" for step in (0, 1, 5)]


def test_live_windows_empty_ones_and_user_scalars_are_not_drawn(tmp_path, writer):
    writer.write(window(layers(a=0.5), final=False))
    writer.write(window())
    writer.write_scalars([scalar()])
    writer.close()
    assert files(tmp_path) == []


def test_layers_without_a_saturation_and_of_any_name(tmp_path, writer, figures):
    rows = [
        *(layer_row(name) for name in (*HOSTILE_NAMES, "$x_{1}", "_hidden", "层" * 200)),
        layer_row("nan", stats={"saturation": math.nan, "intrinsic_dimensionality": math.nan}),
        layer_row("none", stats={}),
    ]
    writer.write(window(rows))
    assert size(tmp_path / "plot" / "train" / "0000000000.png") > (300, 300)
    values = {layer: value for _, _, layer, value in numbers(tmp_path)}
    assert list(values) == [row.layer for row in rows]
    assert values["none"] is None
    assert math.isnan(values["nan"])
    drawn = heights(figures[0])
    assert [value for value in drawn if value > 0] == [round(2 / 3, 9)] * (len(rows) - 2)


# --- windows that are published again ------------------------------------------------------------------


def test_a_corrected_window_is_drawn_again(tmp_path, writer, figures):
    writer.write(window(layers(a=0.5, b=0.5), step=1, revision=1))
    before = (tmp_path / "plot" / "train" / "0000000001.png").read_bytes()
    writer.write(window(layers(a=0.75), step=1, revision=2))
    assert numbers(tmp_path, "layer", "saturation", "revision") == [("a", 0.75, 2)]
    assert lines(figures[-1]) == {"train a": {1: 0.75}}
    assert (tmp_path / "plot" / "train" / "0000000001.png").read_bytes() != before


@pytest.mark.parametrize("again", [False, True], ids=["one writer", "a restarted one"])
def test_a_later_attempt_holds_whatever_comes_after_it(tmp_path, writer, figures, again):
    writer.write(window([*layers(a=0.1), *layers("eval", a=0.2)], step=4))
    writer.write(window(layers(a=0.3), step=4, attempt=1))
    late = opened(tmp_path) if again else writer
    picture = (tmp_path / "plot" / "train" / "0000000004.png").read_bytes()
    late.write(window([*layers(a=0.4), *layers("eval", a=0.5)], step=4, revision=3))
    assert sorted(numbers(tmp_path)) == [("eval", 4, "a", 0.5), ("train", 4, "a", 0.3)]
    assert lines(figures[-1]) == {"train a": {4: 0.3}, "eval a": {4: 0.5}}
    assert (tmp_path / "plot" / "train" / "0000000004.png").read_bytes() == picture
    late.write(window(layers(a=0.6), step=4, attempt=1, revision=1))
    assert sorted(numbers(tmp_path)) == [("eval", 4, "a", 0.5), ("train", 4, "a", 0.6)]


def test_a_restarted_writer_goes_on(tmp_path, writer, figures):
    for step in (0, 1):
        writer.write(window(layers(a=0.25, b=0.5), step=step))
    restarted = opened(tmp_path)  # nobody has closed the one before
    for step in (1, 2):  # the first of them again
        restarted.write(window(layers(a=0.25, b=0.5), step=step))
    assert lines(figures[-1]) == {"train a": dict.fromkeys((0, 1, 2), 0.25), "train b": dict.fromkeys((0, 1, 2), 0.5)}
    assert sorted(numbers(tmp_path)) == [
        ("train", step, *row) for step in (0, 1, 2) for row in (("a", 0.25), ("b", 0.5))
    ]


def test_what_a_crash_has_left_undrawn_is_drawn_at_the_end(tmp_path, writer, figures):
    writer.write(window(layers(a=0.25)))
    (tmp_path / "plot" / "saturation.png").unlink()
    opened(tmp_path).close()
    assert lines(figures[-1]) == {"train a": {0: 0.25}}
    assert (tmp_path / "plot" / "saturation.png").exists()


@pytest.mark.parametrize("broken", ["saturation.parquet", "train/0000000001.png", "saturation.png"])
def test_a_write_that_failed_is_made_again(tmp_path, writer, figures, monkeypatch, broken):
    writer.write(window(layers(a=0.25), step=0))
    put = Storage.write_atomic

    def fail(storage, name, data):
        if name == f"plot/{broken}":
            raise OSError(28, "disk full")
        put(storage, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_atomic", fail)
        with pytest.raises(OSError, match="disk full"):
            writer.write(window(layers(a=0.5), step=1))
    writer.write(window(layers(a=0.5), step=1))
    assert lines(figures[-1]) == {"train a": {0: 0.25, 1: 0.5}}
    assert numbers(tmp_path) == [("train", 0, "a", 0.25), ("train", 1, "a", 0.5)]
    assert "train/0000000001.png" in files(tmp_path)


def test_a_window_that_cannot_be_drawn_costs_no_other(tmp_path, writer, figures, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("delve_ray.analysis.plots.saturation_per_layer", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.write(window(layers("eval", a=0.25), step=0))
    writer.write(window(layers(a=0.5), step=0))
    assert files(tmp_path) == ["saturation.parquet", "saturation.png", "train/0000000000.png"]
    assert lines(figures[-1]) == {"eval a": {0: 0.25}, "train a": {0: 0.5}}


def test_numbers_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "plot" / "saturation.parquet"
    path.parent.mkdir()
    for content in (b"half of a file", None):
        if content is None:
            pq.write_table(pa.table({"other": [1]}), path)
        else:
            path.write_bytes(content)
        with pytest.raises(OptionError, match=r"plot/saturation\.parquet, which cannot be read .* remove it"):
            opened(tmp_path)


# --- keeping up ----------------------------------------------------------------------------------------


def test_where_windows_come_too_fast_the_last_ones_are_drawn_at_the_end(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(plot, "FREE_S", 0.0)
    monkeypatch.setattr(plot, "SHARE", 0.0)
    writer = opened(tmp_path)
    for step in range(4):
        writer.write(window([*layers(a=step / 4), *(layers("eval", a=0.5) if step < 2 else [])], step=step))
        assert len(numbers(tmp_path)) == min(2 * step + 2, step + 3), "the numbers are there at any time"
    first = ["eval/0000000000.png", "saturation.parquet", "saturation.png", "train/0000000000.png"]
    assert files(tmp_path) == first
    assert lines(figures[-1]) == {"train a": {0: 0.0}, "eval a": {0: 0.5}}
    writer.close()
    assert files(tmp_path) == sorted([*first, "eval/0000000001.png", "train/0000000003.png"])
    assert lines(figures[-1]) == {"train a": {s: s / 4 for s in range(4)}, "eval a": {0: 0.5, 1: 0.5}}
    assert len(figures) == 6


def test_a_picture_that_is_there_is_corrected_at_the_end(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(plot, "FREE_S", 0.0)
    monkeypatch.setattr(plot, "SHARE", 0.0)
    writer = opened(tmp_path)
    for step, value, revision in ((0, 0.1, 0), (1, 0.2, 0), (3, 0.3, 0), (0, 0.4, 1), (4, 0.6, 0), (2, 0.5, 1)):
        writer.write(window(layers(a=value), step=step, revision=revision))
    writer.close()
    assert [heights(figure) for figure in figures[2:-1]] == [[0.4], [0.6], [0.5]]
    assert files(tmp_path)[2:] == [f"train/000000000{step}.png" for step in (0, 2, 4)]
    assert lines(figures[-1]) == {"train a": {0: 0.4, 1: 0.2, 2: 0.5, 3: 0.3, 4: 0.6}}


def test_drawing_takes_up_again_when_its_share_allows(tmp_path, figures, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(plot.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(plot, "FREE_S", 2.0)
    writer = opened(tmp_path)
    draw = writer._png

    def slow(figure):
        clock[0] += 3.0
        return draw(figure)

    writer._png = slow
    drawn = []
    for step, at in ((0, 0.0), (1, 10.0), (2, 39.0), (3, 41.0), (4, 60.0)):
        clock[0] = at
        writer.write(window(layers(a=0.5), step=step))
        drawn.append(len(figures))
    assert drawn == [2, 2, 2, 4, 4], (
        "two pictures of 3 s each: as soon as 2 s and a tenth of the time are 6 s, then 12 s"
    )


# --- where and how -------------------------------------------------------------------------------------


def test_a_remote_savefile(tmp_path, figures):
    storage = Storage("run", filesystem=pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    assert not storage.is_local
    opened(storage).write(window(layers(a=0.25), step=0))
    opened(storage).write(window(layers(a=0.5), step=1))
    assert lines(figures[-1]) == {"train a": {0: 0.25, 1: 0.5}}
    assert size(tmp_path / "run" / "plot" / "saturation.png") > (300, 300)


def test_size_and_letters(tmp_path, figures):
    from matplotlib.text import Text

    writer = opened(tmp_path, figsize=[12, 6], fontsize=7.5)
    for step in range(5):  # so many that a large picture has more ticks
        writer.write(window([*layers(a=0.25, b=0.5), *layers("eval", a=0.75)], step=step * 10))
    for name in files(tmp_path):
        if name.endswith(".png"):
            width, height = size(tmp_path / "plot" / name)
            assert width == 2 * height
    for figure in figures:
        assert tuple(figure.get_size_inches()) == (12.0, 6.0)
        assert {text.get_fontsize() for text in figure.findobj(Text) if text.get_text()} == {7.5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"figsize": (9,)}, r"figsize=\(9,\) must be a width and a height in inches"),
        ({"figsize": (9, 0)}, "figsize=.* must be a width"),
        ({"figsize": "95"}, "figsize='95' must be a width"),
        ({"figsize": 9}, "figsize=9 must be a width"),
        ({"fontsize": 0}, "fontsize=0 must be a number of points"),
        ({"fontsize": math.inf}, "fontsize=inf must be"),
        ({"fontsize": "12"}, "fontsize='12' must be"),
        ({"colour": 1}, "does not fit: .*colour"),
    ],
)
def test_options_that_cannot_be_used(options, words, tmp_path):
    with pytest.raises(OptionError, match=words):
        make_writers(["plot"], WriterRun("run", Storage(tmp_path)), {"plot": options})


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = WriterRun("run", Storage(tmp_path))
    with pytest.raises(OptionError, match=r"save_to='plot' needs matplotlib .*pip install 'delve_ray\[plot\]'"):
        open_writers(make_writers(["plot"], run), run)
    assert os.listdir(tmp_path) == []


def test_it_leaves_pyplot_and_the_display_alone(tmp_path):
    """A script's own figures stay as they are, and so does its backend."""
    code = (
        "import sys; from delve_ray.writers import WriterRun, make_writers; from delve_ray.storage import Storage\n"
        "from tests.windows import layer_row, window\n"
        f"run = WriterRun('run', Storage({str(tmp_path)!r}))\n"
        "(writer,) = make_writers(['plot'], run)\n"
        "print(sorted({'matplotlib', 'torch', 'ray'} & set(sys.modules)))\n"
        "writer.open(run); writer.write(window([layer_row()])); writer.close()\n"
        "print(sorted({'matplotlib.pyplot', 'torch', 'ray'} & set(sys.modules)))"
    )
    environment = os.environ | {"DISPLAY": "", "MPLBACKEND": ""}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == ["[]", "[]"]
    assert "saturation.png" in files(tmp_path)
