import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_rgba

from delve_ray.analysis.plots import embedding
from delve_ray.analysis.plots.canvas import PHASE_COLOURS
from delve_ray.analysis.plots.points import LABEL_COLOURS, UNLABELLED
from delve_ray.errors import ReadError
from tests.analysis.plots.pictures import FIVE, HOSTILE, assert_legible, words_of


def table(layers=("a", "b"), phases=("train",), steps=(0,), labels=(0, 1, 1, None), run="run"):
    """Four points per window: x counts all points, y is its square root."""
    rows = [
        {"run": run, "phase": phase, "step": step, "layer": layer, "label": label}
        for phase in phases
        for step in steps
        for layer in layers
        for label in labels
    ]
    for index, row in enumerate(rows):
        row |= {"x": float(index), "y": float(index) ** 0.5}
    kinds = {"run": pa.string(), "phase": pa.string(), "step": pa.int64(), "layer": pa.string()}
    kinds |= {"x": pa.float64(), "y": pa.float64(), "label": pa.int32()}
    return pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items())))


def panels_of(figure):
    return {tuple(axes.get_title().split("\n")): axes for axes in figure.axes if axes.get_title()}


def points_of(axes):
    """Without and with a label: coordinates and colours."""
    return [
        (points.get_offsets().tolist(), [tuple(colour) for colour in points.get_facecolors()])
        for points in axes.collections
    ]


def test_a_panel_per_layer_with_its_points_by_label():
    figure = embedding(table())
    panels = panels_of(figure)
    assert list(panels) == [("a", "train, step 0"), ("b", "train, step 0")]
    unknown, known = points_of(panels["b", "train, step 0"])
    assert unknown == ([[7.0, 7.0**0.5]], [to_rgba(UNLABELLED)])
    assert known[0] == [[4.0, 2.0], [5.0, 5.0**0.5], [6.0, 6.0**0.5]]
    colours = [to_rgba(LABEL_COLOURS[label], 0.8) for label in (0, 1, 1)]
    np.testing.assert_allclose(known[1], colours)
    names = {text.get_text(): text.get_position() for text in panels["b", "train, step 0"].texts}
    assert names == {"0": (4.0, 2.0), "1": (5.5, pytest.approx((5**0.5 + 6**0.5) / 2))}
    assert words_of(figure) == ["0", "1", "none"]


def test_a_label_has_one_colour_in_all_panels():
    rows = table(["a"], labels=(3, 7)).to_pylist() + table(["b"], labels=(7, 9)).to_pylist()
    figure = embedding(pa.Table.from_pylist(rows, schema=table().schema))
    colours = [points_of(axes)[1][1] for axes in panels_of(figure).values()]
    expected = [to_rgba(colour, 0.8) for colour in LABEL_COLOURS[:3]]
    np.testing.assert_allclose(colours, [expected[:2], expected[1:]])
    assert words_of(figure) == ["3", "7", "9"]


def test_phases_have_rows_of_their_own_and_layers_are_chosen_by_depth():
    names = [f"l{index}" for index in range(300)]
    figure = embedding(table(names, ("train", "eval")))
    chosen = [f"l{round(299 * place / 5)}" for place in range(6)]
    assert list(panels_of(figure)) == [(name, f"{phase}, step 0") for phase in ("train", "eval") for name in chosen]
    assert "6 of 300 layers, evenly by depth" in figure.get_suptitle()
    assert len(panels_of(embedding(table(names), phase="train"))) == 12
    assert [name for name, _ in panels_of(embedding(table(names), layers=["l7", "l3"]))] == ["l3", "l7"]
    assert "evenly" not in embedding(table(names), layers="l7").get_suptitle()


def test_the_last_step_or_another():
    assert list(panels_of(embedding(table(["a"], steps=(1, 5))))) == [("a", "train, step 5")]
    assert list(panels_of(embedding(table(["a"], steps=(1, 5)), step=1))) == [("a", "train, step 1")]


def test_many_labels_have_a_scale():
    figure = embedding(table(["a"], labels=tuple(range(5, 105))))
    (axes,) = panels_of(figure).values()
    _, (_, colours) = points_of(axes)
    assert len(set(colours)) == 100
    bar = next(each for each in figure.axes if each is not axes)
    assert [label.get_text() for label in bar.get_yticklabels()][::8] == ["5", "104"]
    assert not axes.texts


@pytest.mark.parametrize("column", [True, False])
def test_without_labels_points_have_the_colour_of_the_phase(column):
    rows = table(["a"], ("train", "eval"), labels=(None, None))
    figure = embedding(rows if column else rows.drop_columns(["label"]))
    (train, _), (evaluation, _) = map(points_of, figure.axes)
    assert train == ([[0.0, 0.0], [1.0, 1.0]], [to_rgba(PHASE_COLOURS["train"])])
    assert evaluation == ([[2.0, 2.0**0.5], [3.0, 3.0**0.5]], [to_rgba(PHASE_COLOURS["eval"])])
    assert words_of(figure) == []


def test_points_that_are_not_finite_are_left_out():
    rows = table(["a", "b"]).to_pylist()
    rows[0]["x"], rows[1]["y"] = float("nan"), float("inf")
    rows[4:] = [row | {"x": None} for row in rows[4:]]
    panels = list(panels_of(embedding(pa.Table.from_pylist(rows, schema=table().schema))).values())
    assert [len(points) for points, _ in points_of(panels[0])] == [1, 1]
    assert [text.get_text() for text in panels[1].texts] == ["no points"]


@pytest.mark.parametrize("layers", [FIVE, HOSTILE])
def test_it_is_legible(layers):
    assert_legible(embedding(table(layers, ("train", "eval"), labels=(None,) * 5)))


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ReadError, match="no window to draw"):
        embedding(table([]))
    with pytest.raises(ReadError, match="layers: no layer 'c' among the 2; near: 'a', 'b'"):
        embedding(table(), layers=["c"])
    with pytest.raises(ReadError, match="no rows with step=3"):
        embedding(table(), step=3)
    with pytest.raises(ReadError, match="no rows with phase=eval"):
        embedding(table(), phase="eval")
    with pytest.raises(ReadError, match="lack the columns x"):
        embedding(table().drop_columns(["x"]))
    with pytest.raises(ReadError, match="2 runs"):
        embedding(pa.concat_tables([table(), table(run="other")]))
