"""Runs to make pages of: large ones with statistics of their own eigenvalues, small ones with names that do harm."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from delve_ray.analysis import read_spectra
from delve_ray.schema import SCALARS_SCHEMA, SPECTRA_SCHEMA
from tests.spectra_tables import ROW, spectra_table
from tests.windows import START

WIDTHS = (64, 128, 256, 512)
THRESHOLD = 0.99
HOSTILE = (
    "<script>window.harmed = 1</script>",
    "</script><script>window.harmed = 2</script>",
    '"><img src=x onerror="window.harmed = 3">',
    "&amp;&lt;b&gt;",
    "--><!-- <!--<script>",
    "a\u2028b\u2029c",
    "<b>bold</b><br>$x^2$ %{y} {{data}}",
    "'quotes\" and \\ backslash",
    "javascript:window.harmed = 4",
    "\u202eright to left",
    "two\nlines",
    "n" * 200,
)
"""Names that do harm where they are taken for HTML, for a script, for a formula, or for a template."""


def write_rows(path: Path, *rows: dict[str, Any], described: dict[str, Any] | None = None) -> None:
    """A run of these rows, which say what differs from `spectra_tables.ROW`; its run.json says `described`."""
    (path / "spectra").mkdir(parents=True, exist_ok=True)
    table = spectra_table(*rows)
    steps = sorted(set(table.column("step").to_pylist()))
    for step in steps:
        of_step = table.filter(pc.field("step") == step)
        pq.write_table(of_step, path / "spectra" / f"000000-{step:010d}-000000.parquet", write_page_checksum=True)
    content = {"schema_version": 1, "run": "run", "world_size": 2} | (described or {})
    (path / "run.json").write_text(json.dumps(content))


def write_scalars(path: Path, *rows: dict[str, Any]) -> None:
    """User scalars of a run: name, step and value of each, and what else differs."""
    row = {"run": "run", "attempt": 0, "rank": 0, "wall_time": START}
    (path / "scalars").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row | one for one in rows], schema=SCALARS_SCHEMA)
    pq.write_table(table, path / "scalars" / "000000-0.parquet")


def rows_of(run: Path, phase: str, step: int) -> list[dict[str, Any]]:
    """The rows of a window, as the reader gives them."""
    window = [("phase", "==", phase), ("step", "==", step)]
    rows: list[dict[str, Any]] = read_spectra(run, filters=window).to_pylist()
    return rows


def data_of(page: Path) -> dict[str, Any]:
    """The JSON that a page carries."""
    content: dict[str, Any] = json.loads(_element(page, "data"))
    return content


def numbers_of(page: Path, place: dict[str, int]) -> np.ndarray:
    """The numbers at a place of a page, in their own precision; nulls are NaN."""
    pool = np.frombuffer(gzip.decompress(base64.b64decode(_element(page, "numbers"))), np.uint8)
    own = pool[place["at"] :][: place["count"] * place["bytes"]]
    return own.reshape(place["bytes"], -1).T.copy().view(f"<f{place['bytes']}")[:, 0]


def _element(page: Path, name: str) -> str:
    found = re.search(
        rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found
    return found[1]


def write_large_run(path: Path, layers: int = 300, steps: int = 100) -> None:
    """A run of layers 64 to 512 wide, train and eval; every statistic is computed from its power-law spectrum."""
    generator = np.random.default_rng(0)
    widths = np.array(WIDTHS)[np.arange(layers) * len(WIDTHS) // layers]
    folder = path / "spectra"
    folder.mkdir(parents=True)
    for block in np.array_split(np.arange(steps), min(steps, 10)):
        tables = [_window(generator, widths, phase, int(step)) for step in block for phase in ("train", "eval")]
        pq.write_table(pa.concat_tables(tables), folder / f"000000-{block[0]:010d}-000000.parquet", compression="zstd")


def _window(generator: np.random.Generator, widths: np.ndarray, phase: str, step: int) -> pa.Table:
    """One row per layer."""
    count = len(widths)
    samples = np.full(count, 50_000 if phase == "train" else 300)
    columns: dict[str, Any] = {
        "phase": [phase] * count,
        "step": np.full(count, step),
        "layer": [f"backbone.stage{i // 40}.block{i // 5 % 8}.part{i % 5}" for i in range(count)],
        "layer_type": [("Conv2d", "Linear")[i % 2] for i in range(count)],
        "features": widths,
        "samples": samples,
        "samples_per_feature": samples / widths,
        "undersampled": samples < widths,
    }
    spectra = [_eigenvalues(generator, width, index / count, step) for index, width in enumerate(widths.tolist())]
    columns["eigenvalues"] = pa.ListArray.from_arrays(np.append(0, np.cumsum(widths)), np.concatenate(spectra))
    rows = [_statistics(values) for values in spectra]
    columns |= {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {name: generator.uniform(0.9, 3.0, count) for name in ("alpha", "alpha_r2", "mean_norm", "noise_rank")}
    constant = {**ROW, "run": "large", "wall_time": START + timedelta(seconds=step)}
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.array([constant.get(field.name)] * count, field.type)
        for field in SPECTRA_SCHEMA
    ]
    return pa.table(arrays, schema=SPECTRA_SCHEMA)


def _eigenvalues(generator: np.random.Generator, width: int, depth: float, step: int) -> np.ndarray:
    values = np.arange(1, width + 1) ** -(0.8 + depth + step / 200) * np.exp(generator.normal(0.0, 0.2, width))
    return -np.sort(-values)


def _statistics(values: np.ndarray) -> dict[str, float]:
    total = values.sum()
    shares = values / total
    dimension = int(np.searchsorted(np.cumsum(shares), THRESHOLD)) + 1
    entropy = -float(shares @ np.log(shares))
    log_determinant = float(np.log(values).sum())
    return {
        "intrinsic_dimensionality": dimension,
        "saturation": dimension / values.size,
        "trace": total * (1 + 1e-12),
        "diagonal_trace": total,
        "log_determinant": log_determinant,
        "determinant": math.exp(log_determinant),
        "effective_rank": math.exp(entropy),
        "spectral_entropy": entropy,
        "participation_ratio": 1 / float(shares @ shares),
        "stable_rank": total / values[0],
        "condition_number": values[0] / values[-1],
    }
