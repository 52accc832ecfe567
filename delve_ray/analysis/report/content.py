"""One run as the page's script reads it: layers, the packed numbers of each phase, scalars, findings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delve_ray.analysis.diagnosis import diagnose
from delve_ray.analysis.report import describing
from delve_ray.analysis.report.numbers import I64, NumberPool, eigenvalues_at, floats, nothing, shown_ranks, spread
from delve_ray.analysis.report.reading import RunTables
from delve_ray.analysis.report.words import OF_EVERY_ROW
from delve_ray.analysis.table import shorten_layer
from delve_ray.analysis.windows import network_order, steps_of
from delve_ray.errors import ReadError
from delve_ray.schema import PHASES

MAX_SCALARS = 24
"""User scalars of a run that are drawn, a chart each."""
MAX_POINTS = 1000
"""Points of a user scalar's line."""
MAX_RANKS = 64
"""Eigenvalues of a spectrum; of wider layers they are taken evenly in the logarithm of their rank."""
_SHORT_NAME = 26


@dataclass(frozen=True, slots=True)
class Room:
    """What one run may take of the page: rows of statistics, and eigenvalues."""

    rows: int
    eigenvalues: int


def describe_run(tables: RunTables, pool: NumberPool, room: Room, problems: list[str]) -> dict[str, Any]:
    """All that the page shows of a run; its numbers go to `pool`."""
    layers = _layers(tables.spectra)
    findings = _findings(tables, problems)
    phases = [phase for phase in PHASES if steps_of(tables.spectra, phase)]
    shown = {}
    for phase in phases:
        named = {finding["step"] for finding in findings if finding["phase"] == phase}
        rows = tables.spectra.filter(pc.field("phase") == phase)
        share = Room(room.rows // len(phases), room.eigenvalues // len(phases))
        shown[phase] = _phase(rows, layers, named, share, pool)
    return {
        "name": tables.name,
        "where": tables.where,
        "facts": describing.facts(tables),
        "options": describing.options(tables.described),
        "versions": describing.versions(tables.described),
        "attempts": describing.attempts(tables.described),
        "findings": findings,
        "layers": layers,
        "phases": shown,
        "ranks": {layer["features"]: shown_ranks(layer["features"], MAX_RANKS) for layer in layers},
        **_scalars(tables.scalars, pool),
    }


def _findings(tables: RunTables, problems: list[str]) -> list[dict[str, Any]]:
    try:
        return [finding.as_dict() for finding in diagnose(tables.spectra, tables.described)]
    except ReadError as error:
        problems.append(f"{tables.where}: no findings, {error}")
        return []


def _layers(spectra: pa.Table) -> list[dict[str, Any]]:
    """Name, type and width of each layer, in the order of the network."""
    known = spectra.select(["layer", "layer_type", "features"]).group_by("layer", use_threads=False)
    last = known.aggregate([("layer_type", "last"), ("features", "last")]).to_pylist()
    by_name = {row["layer"]: row for row in last}
    return [
        {
            "name": name,
            "short": shorten_layer(name, _SHORT_NAME),
            "type": by_name[name]["layer_type_last"] or "",
            "features": by_name[name]["features_last"] or 0,
        }
        for name in network_order(spectra)
    ]


def _phase(
    rows: pa.Table, layers: Sequence[Mapping[str, Any]], named: Collection[int], room: Room, pool: NumberPool
) -> dict[str, Any]:
    """The statistics of a phase, layer by layer and in each step by step, and its spectra."""
    every = sorted(pc.unique(rows.column("step")).to_pylist())
    steps = spread(every, max(1, room.rows // len(layers)), named)
    rows = _of_steps(rows, steps)
    place = _places(rows, layers, steps)
    columns = {}
    for name in OF_EVERY_ROW:
        if rows.column(name).null_count < rows.num_rows:
            dense = nothing(len(layers) * len(steps))
            dense[place] = floats(rows.column(name))
            columns[name] = pool.add(dense, exact=name == "samples")
    ranks = [shown_ranks(layer["features"], MAX_RANKS) for layer in layers]
    eigensteps = spread(steps, max(1, room.eigenvalues // max(1, sum(map(len, ranks)))), named)
    spectra = _spectra(_of_steps(rows, eigensteps), layers, ranks, eigensteps, pool)
    return {"steps": steps, "of": len(every), "columns": columns, "eigensteps": eigensteps, "eigenvalues": spectra}


def _of_steps(rows: pa.Table, steps: Sequence[int]) -> pa.Table:
    return rows.filter(pc.field("step").isin(pa.array(steps, pa.int64())))


def _places(rows: pa.Table, layers: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> I64:
    """Where each row stands: layer by layer, and step by step in each."""
    layer = pc.index_in(rows.column("layer"), pa.array([layer["name"] for layer in layers])).to_numpy()
    step = pc.index_in(rows.column("step"), pa.array(steps, pa.int64())).to_numpy()
    places: I64 = layer.astype(np.int64) * len(steps) + step
    return places


def _spectra(
    rows: pa.Table,
    layers: Sequence[Mapping[str, Any]],
    ranks: Sequence[Sequence[int]],
    steps: Sequence[int],
    pool: NumberPool,
) -> dict[str, int]:
    """The eigenvalues at the shown ranks, layer by layer, and step by step in each."""
    lists = rows.column("eigenvalues").combine_chunks()
    row_at = np.full(len(layers) * len(steps), -1)
    row_at[_places(rows, layers, steps)] = np.arange(rows.num_rows)
    pieces = [
        eigenvalues_at(lists, row, ranks[index // len(steps)]) if row >= 0 else nothing(len(ranks[index // len(steps)]))
        for index, row in enumerate(row_at.tolist())
    ]
    return pool.add(np.concatenate(pieces))


def _scalars(scalars: pa.Table, pool: NumberPool) -> dict[str, Any]:
    """What add_scalar recorded: a line for each name and rank."""
    names = list(dict.fromkeys(scalars.column("name").to_pylist()))
    lines = []
    for name in names[:MAX_SCALARS]:
        of_name = scalars.filter(pc.field("name") == name)
        for rank in sorted(pc.unique(of_name.column("rank")).to_pylist()):
            rows = of_name.filter(pc.field("rank") == rank)
            every = rows.column("step").to_pylist()
            rows = _of_steps(rows, spread(every, MAX_POINTS))
            steps, values = floats(rows.column("step")), floats(rows.column("value"))
            lines.append(
                {
                    "name": name,
                    "rank": rank,
                    "of": len(every),
                    "steps": pool.add(steps, exact=True),
                    "values": pool.add(values),
                }
            )
    return {"scalars": lines, "scalars_left_out": names[MAX_SCALARS:]}
