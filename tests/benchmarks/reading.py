"""How long it takes to read a run of a million rows: in as many files as a real run has, and in few.

`python -m tests.benchmarks.reading` writes the runs into a temporary folder (some 800 MB), reads them in several ways,
in turns, and prints the median seconds of each, with those of pyarrow's own dataset beside them: it reads the same
columns and filters alike, but resolves neither attempts nor revisions. The files are in the page cache. Seconds of the
processor are those of all threads together: on a machine that does nothing else, reading takes less than that.

Where there are thousands of files, the time is that of opening them, with either reader: for each, a footer with its
fifty columns is decoded, and some pages are found.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from delve_ray.analysis import read_spectra
from delve_ray.schema import SPECTRA_SCHEMA
from delve_ray.writers.parquet import spectra_table
from tests.windows import layer_row, window

ROWS = 1_000_000
LAYERS, PHASES, WIDTH = 100, ("train", "eval"), 32
FILES = (5000, 1000, 4)
"""A window's rows each, as a run with 100 layers writes them; five times as many; few."""
QUESTIONS: Mapping[str, Mapping[str, Any]] = {
    "one layer, saturation over steps": {
        "columns": ["step", "saturation"],
        "filters": (pc.field("layer") == "block.7.attention.q") & (pc.field("phase") == "eval"),
    },
    "one step, all scalars": {
        "columns": [field.name for field in SPECTRA_SCHEMA if not pa.types.is_list(field.type)],
        "filters": pc.field("step") == 17,
    },
    "one step, eigenvalues": {"columns": ["layer", "eigenvalues"], "filters": pc.field("step") == 17},
    "rows above a saturation": {
        "columns": ["phase", "step", "layer", "saturation"],
        "filters": pc.field("saturation") > 0.999,
    },
    "three columns of all rows": {"columns": ["step", "layer", "saturation"], "filters": None},
}


def main() -> None:
    """Write, read in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--files", type=int, nargs="+", default=FILES, help="into how many files the rows are written")
    parser.add_argument("--repeat", type=int, default=7, help="times that each question is asked of each run")
    parser.add_argument("--folder", help="where the runs lie, or are written if they do not; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        windows = options.rows // (LAYERS * len(PHASES))
        counts = dict.fromkeys(min(count, windows) for count in options.files)
        runs = {f"{count} files": folder / f"{count}-of-{windows}" for count in counts}
        for name, path in runs.items():
            if not path.exists():
                write(path, windows, int(name.split()[0]))
        print(f"{windows * LAYERS * len(PHASES):,} rows; median seconds of {options.repeat}: elapsed, processor\n")
        print(f"{'':46}{'read_spectra':>14}{'pyarrow dataset':>16}{'rows':>10}")
        for question, asked in QUESTIONS.items():
            for name, path in runs.items():
                calls = {"ours": partial(read_spectra, path, **asked), "theirs": partial(dataset, path, **asked)}
                shown = [f"{elapsed:8.3f}{busy:7.3f}" for elapsed, busy in medians(calls, options.repeat).values()]
                print(f"{question:34}{name:>11}{''.join(shown)}{calls['ours']().num_rows:10,}", flush=True)


def medians(calls: Mapping[str, Callable[[], pa.Table]], repeat: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each call, elapsed and of the processor; calls take turns, and each is warmed once."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            start, busy = time.perf_counter(), time.process_time()
            call()
            if turn:
                seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    return {name: (median(e for e, _ in pairs), median(b for _, b in pairs)) for name, pairs in seconds.items()}


def dataset(path: Path, columns: list[str], filters: pc.Expression | None) -> pa.Table:
    """What pyarrow makes of the folder."""
    return pads.dataset(path / "spectra", schema=SPECTRA_SCHEMA).to_table(columns=columns, filter=filters)


def write(path: Path, windows: int, files: int) -> None:
    """A run of `windows` windows with random values, in so many files."""
    (path / "spectra").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"block.{index // 10}.attention.{'qkvoabcdef'[index % 10]}" for index in range(LAYERS)]
    empty = np.zeros(WIDTH)
    rows = [layer_row(name, phase, features=WIDTH, eigenvalues=empty) for phase in PHASES for name in names]
    template = spectra_table(window(rows))
    for number, steps in enumerate(np.array_split(np.arange(windows), files)):
        table = pa.concat_tables([template] * len(steps))
        for name, values in (
            ("step", pa.array(np.repeat(steps, template.num_rows))),
            ("saturation", pa.array(rng.random(table.num_rows))),
            ("eigenvalues", _lists(rng.random((table.num_rows, WIDTH)))),
        ):
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
        text = [field.name for field in table.schema if pa.types.is_string(field.type)]
        name = f"000000-{number:010d}-000000.parquet"
        # As the writer does, but that nothing is synced.
        pq.write_table(
            table, path / "spectra" / name, compression="zstd", use_dictionary=text, write_page_checksum=True
        )


def _lists(values: np.ndarray[Any, np.dtype[np.float64]]) -> pa.Array:
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values.ravel())


if __name__ == "__main__":
    main()
