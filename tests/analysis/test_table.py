import pyarrow as pa
import pytest

from delve_ray.analysis.table import NOTHING_YET, abbreviate, bar, layer_table, shorten_layer
from delve_ray.analysis.windows import network_order, select_windows
from delve_ray.errors import ReadError
from tests.spectra_tables import network, spectra_table
from tests.windows import HOSTILE_NAMES


def rows_of(text):
    """The words of each line between heading and notes."""
    return [line.split() for line in text.splitlines()[2:] if not line.startswith(("dim:", "n/d:", "train:", "eval:"))]


def two_phases():
    return spectra_table(
        {"phase": "eval", "step": 3, "layer": "conv", "samples": 7, "saturation": 0.25, "intrinsic_dimensionality": 4},
        {"phase": "train", "step": 2, "layer": "conv", "saturation": 0.9},
        {
            "phase": "train",
            "step": 4,
            "layer": "conv",
            "layer_type": "Conv2d",
            "features": 16,
            "samples": 12345,
            "intrinsic_dimensionality": 8,
            "saturation": 0.5,
        },
        {"phase": "train", "step": 4, "layer": "fc", "saturation": 1.0, "intrinsic_dimensionality": 10},
    )


def test_the_last_window_of_each_phase_beside_each_other():
    text = layer_table(two_phases())

    assert text == "\n".join(
        [
            "                       ────── train, step 4 ──────  ─────── eval, step 3 ──────",
            "layer type   features  samples  dim saturation      samples  dim saturation",
            "conv  Conv2d       16    12345    8 ━━━━╸────  50%        7    4 ━━───────  25%",
            "fc    Linear       10      100   10 ━━━━━━━━━ 100%        –    –              –",
            "mean                                ━━━━━━━──  75%               ━━───────  25%",
            "dim: dimensions that hold 99 % of the variance; saturation: dim / features",
            "n/d: samples / features",
            "eval: undersampled, n/d is below 1: conv 0.70",
        ]
    )


def test_one_step_and_one_phase():
    text = layer_table(two_phases(), step=2, phase="train")
    assert rows_of(text)[0][:6] == ["conv", "Linear", "10", "100", "10.0", "5"]
    assert rows_of(text)[0][-1] == "90%"
    assert "eval" not in text
    assert "step 3" not in layer_table(two_phases(), step=4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"step": 9}, "step=9; there are: train 2 steps from 2 to 4; eval step 3"),
        ({"step": 2, "phase": "eval"}, "step=2 and phase=eval"),
        ({"phase": "test"}, "phase='test' is none of 'train', 'eval'"),
    ],
)
def test_what_is_not_there_is_said(asked, message):
    with pytest.raises(ReadError) as raised:
        layer_table(two_phases(), **asked)
    assert message in str(raised.value)


def test_a_run_without_rows_and_a_table_without_columns():
    assert layer_table(spectra_table()) == NOTHING_YET
    with pytest.raises(ReadError, match="lack the columns saturation"):
        layer_table(two_phases().drop_columns(["saturation"]))


def test_the_mean_leaves_out_what_is_not_finite():
    table = spectra_table(
        {"layer": "a", "saturation": 0.2},
        {"layer": "b", "saturation": float("nan")},
        {"layer": "c", "saturation": None, "intrinsic_dimensionality": None},
        {"layer": "d", "saturation": 0.4},
    )
    rows = rows_of(layer_table(table))
    assert [row[-1] for row in rows] == ["20%", "–", "–", "40%", "30%"]
    assert rows[-1][0] == "mean"


def test_what_is_missing_is_noted():
    table = spectra_table(
        {"layer": "a", "workers": 1, "final": False, "nonfinite_rows": 3},
        {"layer": "b", "workers": 1, "final": False},
        *({"layer": name, "phase": "eval", "nonfinite_rows": 1, "threshold": 0.9} for name in "abcde"),
    )
    assert layer_table(table).splitlines()[-5:] == [
        "dim: dimensions that hold 90 % or 99 % of the variance; saturation: dim / features",
        "train: live, the window is still open",
        "train: 1 of 2 workers have closed the window",
        "train: non-finite rows left out: a 3",
        "eval: non-finite rows left out: a 1, b 1, c 1 and 2 more layers",
    ]


def test_samples_per_feature_where_there_is_room():
    counts = [(0, 8), (3, 512), (5, 8), (8, 8), (7999, 8000), (1000, 80), (10**6, 2), (10**13, 2), (None, 8)]
    table = network([f"l{index}" for index in range(len(counts))], phases=("train",))
    for name, values in zip(("samples", "features"), zip(*counts, strict=True), strict=True):
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    text = layer_table(table)
    assert text.splitlines()[1].split() == ["layer", "type", "features", "samples", "n/d", "dim", "saturation"]
    ratios = [row[4] for row in rows_of(text)[:-1]]
    assert ratios == ["0.00", "<0.01", "0.62", "1.00", "0.99", "12.5", "5e+05", "5e+12", "–"]
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[-2:] == [
        "n/d: samples / features",
        "train: undersampled, n/d is below 1: l0 0.00, l1 <0.01, l2 0.62 and 1 more layer",
    ]


def test_both_phases_show_samples_per_feature_on_a_wide_terminal():
    table = spectra_table({"samples": 5}, {"phase": "eval", "samples": 40})
    wide, narrow = layer_table(table, width=100), layer_table(table)
    assert rows_of(wide)[0][3:5] == ["5", "0.50"]
    assert wide.splitlines()[1].split().count("n/d") == 2
    assert "n/d" not in narrow.splitlines()[1]
    note = ["n/d: samples / features", "train: undersampled, n/d is below 1: conv1 0.50"]
    assert wide.splitlines()[-2:] == narrow.splitlines()[-2:] == note
    sampled = spectra_table({"samples": 10}, {"phase": "eval", "samples": 40})
    assert "n/d" not in layer_table(sampled)
    assert "undersampled" not in layer_table(sampled, width=100)


def test_files_of_before_have_the_ratio_in_the_table():
    lacking = ["samples_per_feature", "undersampled"]
    table = spectra_table({"samples": 5})
    assert [table[name].to_pylist() for name in lacking] == [[None], [None]]
    assert layer_table(table.drop_columns(lacking)) == layer_table(table)
    assert "conv1 0.50" in layer_table(table)


def test_several_runs_are_headed_by_their_names():
    text = layer_table(spectra_table({"run": "x", "saturation": 0.1}, {"run": "y", "saturation": 0.2}))
    first, second = text.split("\n\n")
    assert first.startswith("run x\n")
    assert second.startswith("run y\n")
    assert ("10%" in first, "20%" in first, "20%" in second) == (True, False, True)


LONG = [f"model.layers.{layer}.{part}" for layer in (0, 1, 31) for part in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize("layers", [["a"], LONG, ["x" * 200], [f"layer{i}.0.conv1" for i in range(40)]])
@pytest.mark.parametrize("phases", [("train",), ("eval", "train")])
def test_eighty_columns_are_enough(layers, phases):
    widest = {"features": 16384, "samples": 10**13, "intrinsic_dimensionality": 8192, "saturation": 1.0}
    text = layer_table(network(layers, 1, phases, layer_type="NonDynamicallyQuantizableLinear", **widest))
    table = text.splitlines()[: 2 + len(layers) + 1]
    assert max(map(len, table)) <= 80
    names = [line.split()[0] for line in table[2:-1]]
    assert len(set(names)) == len(layers)
    assert ["100%"] * len(phases) == [word for word in table[2].split() if word.endswith("%")]


def test_wide_terminals_get_whole_names():
    assert LONG[0] in layer_table(network(LONG, 1), width=120)


def test_hostile_names_keep_their_lines():
    text = layer_table(network(list(HOSTILE_NAMES)))
    assert len(text.splitlines()) == 2 + len(HOSTILE_NAMES) + 2
    assert r"a\nb" in text


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0.0, "────"), (0.01, "╸───"), (0.125, "╸───"), (0.25, "━───"), (0.375, "━╸──"), (1.0, "━━━━"), (1.5, "━━━━")],
)
def test_bars(share, drawn):
    assert bar(share, 4) == drawn


def test_names_are_abbreviated_only_as_far_as_needed():
    name = "model.layers.31.self_attn.q_proj"
    assert [abbreviate(name, width) for width in (32, 31, 24, 0)] == [
        name,
        "m.layers.31.self_attn.q_proj",
        "m.l.31.self_attn.q_proj",
        "m.l.31.s.q_proj",
    ]
    assert shorten_layer(name, 10) == "….s.q_proj"


def test_network_order_is_that_of_the_rows_whatever_windows_lack():
    table = spectra_table(
        *({"phase": "eval", "layer": name} for name in ["b", "d"]),
        *({"phase": "train", "layer": name} for name in ["z", "b", "c", "d"]),
        *({"phase": "train", "step": 1, "layer": name} for name in ["z", "b", "c", "d", "a"]),
    )
    assert network_order(table) == ["z", "b", "c", "d", "a"]


def test_windows_are_the_last_of_each_phase():
    table = network(["a"], 3)
    assert select_windows(table) == {"train": 2, "eval": 2}
    assert list(select_windows(table)) == ["train", "eval"]
    assert select_windows(table, 1, "eval") == {"eval": 1}
    assert select_windows(spectra_table()) == {}
