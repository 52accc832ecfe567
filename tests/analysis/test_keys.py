import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from delve_ray.analysis.keys import Keys, dense, int64_array, matching, numbers

VALUES = {
    "text": (st.none() | st.text(max_size=2), pa.string()),
    "small": (st.integers(-3, 3), pa.int32()),
    "any": (st.none() | st.integers(-(2**62), 2**62), pa.int64()),
    "share": (st.none() | st.floats(-2, 2).map(lambda value: value + 0.0), pa.float64()),
}
ROWS = st.lists(st.tuples(*(values for values, _ in VALUES.values())), max_size=30)
NAMES = st.permutations(list(VALUES)).flatmap(lambda names: st.sampled_from([names[:1], names[:2], names[:3]]))


def table_of(rows, pieces=1):
    columns = {
        name: pa.array([row[index] for row in rows], kind) for index, (name, (_, kind)) in enumerate(VALUES.items())
    }
    table = pa.table(columns)
    parts = [
        table.slice(len(rows) * i // pieces, len(rows) * (i + 1) // pieces - len(rows) * i // pieces)
        for i in range(pieces)
    ]
    return pa.concat_tables(parts)


def comparable(value):
    return (value is not None, value if value is not None else 0)


@settings(max_examples=150, deadline=None)
@given(ROWS, NAMES, st.integers(1, 3))
def test_codes_compare_as_the_rows_do(rows, names, pieces):
    codes = Keys(table_of(rows, pieces)).codes(names)
    order = list(VALUES)
    keys = [tuple(comparable(row[order.index(name)]) for name in names) for row in rows]
    assert codes.dtype == np.int64
    for code, key in zip(codes, keys, strict=True):
        for other, other_key in zip(codes, keys, strict=True):
            assert (code < other) == (key < other_key)
            assert (code == other) == (key == other_key)
    squeezed = dense(codes)
    assert np.array_equal(np.argsort(squeezed, kind="stable"), np.argsort(codes, kind="stable"))
    assert squeezed.size == 0 or squeezed.max() <= 16 * squeezed.size


def test_a_column_that_is_asked_for_twice_is_encoded_once():
    table = table_of([("b", 1, None, 0.5), ("a", 0, 5, None)])
    keys = Keys(table)
    assert keys.codes(["text"]).tolist() == [1, 0]
    assert keys.codes(["small", "text"]).tolist() == [3, 0]


@settings(max_examples=50, deadline=None)
@given(ROWS, st.text(max_size=2), st.integers(-3, 3))
def test_matching_rows_are_those_with_the_values(rows, text, small):
    table = table_of(rows)
    expected = [row for row in table.to_pylist() if row["text"] == text and row["small"] == small]
    assert str(matching(table, text=text, small=small).to_pylist()) == str(expected)


def test_arrays_there_and_back():
    values = np.arange(10)[::-2]
    assert int64_array(values).to_pylist() == values.tolist()
    np.testing.assert_array_equal(numbers(int64_array(values)), values)
    np.testing.assert_array_equal(numbers(pa.chunked_array([[1, 2], [3]], pa.int32())), [1, 2, 3])
    assert numbers(pa.chunked_array([], pa.int64())).size == 0
    assert int64_array(np.array([], np.int64)).to_pylist() == []
