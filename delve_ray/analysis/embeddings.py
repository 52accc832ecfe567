"""Embeddings of runs: rows of each layer along the two leading eigenvectors of its covariance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from delve_ray.analysis.reading import Filters, read
from delve_ray.analysis.run_files import EMBEDDINGS, RunPath


def read_embeddings(
    paths: RunPath | Iterable[RunPath],
    columns: Sequence[str] | None = None,
    filters: Filters | None = None,
    *,
    attempts: str = "latest",
) -> pa.Table:
    """The embeddings of one or several runs: one row per (run, phase, step, layer, point).

    `x` and `y` are a sampled observation's coordinates along the two leading eigenvectors of its layer's covariance in
    that window, from the mean, in the units of the layer's output; `point` numbers the observations of a layer and
    window. Columns and types are those of `delve_ray.schema.EMBEDDINGS_SCHEMA`. A step that a later attempt or revision
    published without embeddings has none. Everything else as in `read_spectra`.
    """
    return read(EMBEDDINGS, paths, columns, filters, attempts)
