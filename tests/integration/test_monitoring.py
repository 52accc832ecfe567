"""A store's metrics as Prometheus would read them: scraped from Ray's own endpoint during a real run."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from delve_ray.store.monitoring import METRICS
from tests.chaos.processes import family, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]
pytest.importorskip("prometheus_client", reason="ray[default] exports the metrics")

STEPS, ROWS = 3, 50


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def scraped(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples of ours by name, and by those of their labels that are ours."""
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except OSError:
        return {}
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"ray_(delve_ray_\w+)\{(.*)\} (\S+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            ours = tuple(sorted((k, v) for k, v in labels.items() if k in ("run", "rank", "layer", "phase", "writer")))
            found.setdefault(match[1], {})[ours] = float(match[3])
    return found


def watch(savefile: str, port: int) -> None:
    """A run whose metrics are scraped before it ends; prints nothing that matters."""
    import ray
    import torch

    import delve_ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, _metrics_export_port=port, log_to_driver=False)
    model = torch.nn.Linear(6, 4)
    with delve_ray.SaturationTracker(
        savefile, ["parquet", "csv"], model, run="watched", rank=0, world_size=1
    ) as tracker:
        for step in range(STEPS):
            model(torch.randn(ROWS, 6))
            tracker.add_saturations(step)
        metrics = tracker.metrics(wait=True)
        wait_until(lambda: scraped(port).get("delve_ray_deltas_total", {}), "the metrics")
        wait_until(
            lambda: (
                scraped(port)
                .get("delve_ray_saturation", {})
                .get((("layer", "layer:0"), ("phase", "train"), ("run", "watched")))
                or sum(scraped(port)["delve_ray_deltas_total"].values()) >= STEPS
            ),
            "all deltas",
        )
        check(scraped(port), metrics)
    ray.shutdown()
    print("everything was there")


def check(found: dict[str, Any], metrics: dict[str, float]) -> None:
    run = ("run", "watched")
    assert found["delve_ray_deltas_total"] == {(run,): STEPS}
    moments = 4 + 4 * 5 // 2
    assert found["delve_ray_bytes_total"] == {(run,): 8.0 * STEPS * moments}
    (saturation,) = {value for key, value in metrics.items() if key == "saturation/train/mean"}
    assert set(found["delve_ray_saturation"].values()) == {saturation}
    assert found["delve_ray_lag_windows"] == {(("rank", "0"), run): 0.0}
    assert found["delve_ray_merge_seconds_count"] == {(run,): STEPS}
    assert found["delve_ray_publish_seconds_count"] == {(run,): STEPS}
    assert found["delve_ray_write_seconds_count"] == {(run, ("writer", name)): STEPS for name in ("parquet", "csv")}
    quiet = {"delve_ray_refused_total", "delve_ray_repeated_total", "delve_ray_late_total", "delve_ray_dropped_total"}
    for metric in METRICS:
        names = [metric.name + suffix for suffix in ("_bucket", "_sum", "_count")]
        names = names if metric.kind == "histogram" else [metric.name]
        for name in names:
            assert (name in found) or metric.name in quiet, name


def test_ray_exports_the_metrics_under_their_names(savefile: str, tmp_path: Path) -> None:
    with family(tmp_path) as processes:
        assert "everything was there" in processes.run(watch, savefile, free_port())
        processes.wait_gone()
