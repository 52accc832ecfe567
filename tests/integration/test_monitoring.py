"""A store's metrics as Prometheus would read them: scraped from Ray's own endpoint during a real run."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from delve_ray.store.monitoring import COMBINER_METRICS, METRICS
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

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 1000},
        log_to_driver=False,
    )
    model = torch.nn.Linear(6, 4)
    delve_ray.start_store(savefile, run="watched", world_size=1, save_to=["parquet", "csv"])
    begun = wait_until(lambda: scraped(port).get("delve_ray_deltas_total"), "the counters, before anybody has come")
    assert begun == {(("run", "watched"),): 0.0}, begun
    assert not scraped(port).get("delve_ray_merge_seconds_count")
    with delve_ray.SaturationTracker(
        savefile, ["parquet", "csv"], model, run="watched", rank=0, world_size=1
    ) as tracker:
        for step in range(STEPS):
            model(torch.randn(ROWS, 6))
            tracker.add_saturations(step)
        metrics = tracker.metrics(wait=True)
        wait_until(lambda: complete(scraped(port)), "everything that has happened")
        check(scraped(port), metrics)
    watch_combiner(f"{savefile}-combined", port)
    ray.shutdown()
    print("everything was there")


def watch_combiner(savefile: str, port: int) -> None:
    """Two workers of this node, whose deltas meet in its combiner."""
    import ray
    import torch

    import delve_ray

    models = [torch.nn.Linear(6, 4) for _ in range(2)]
    shared = {"run": "combined", "world_size": 2, "publish_every": 0, "combine": True}
    trackers = [delve_ray.SaturationTracker(savefile, "parquet", m, rank=r, **shared) for r, m in enumerate(models)]
    names = [metric.name for metric in COMBINER_METRICS]

    def told() -> dict[str, float]:
        found = scraped(port)
        return {name: found[name][("run", "combined"),] for name in names if name in found}

    begun = wait_until(lambda: (found := told()).keys() == set(names) and found, "the combiner, with nothing to do")
    assert begun == dict.fromkeys(names, 0.0), begun
    sent = 0
    while not ray.get(trackers[0].store.status.remote())[
        "bundles"
    ]:  # who comes more than 0.2 s after the other goes alone
        for model, tracker in zip(models, trackers, strict=True):
            model(torch.randn(ROWS, 6))
            tracker.add_saturations(sent)
        trackers[0].metrics(wait=True)
        sent += 1
        assert sent < 50, told()
    for tracker in trackers:
        tracker.flush()  # nothing is on its way
    found = wait_until(
        lambda: (
            (now := told())["delve_ray_combiner_deltas_total"] == 2 * sent
            and now["delve_ray_combiner_waiting"] == 0
            and now
        ),
        "all deltas",
    )
    bundles = found["delve_ray_combiner_bundles_total"]
    assert bundles >= 1
    assert found["delve_ray_combiner_alone_total"] == 2 * (sent - bundles)
    assert found["delve_ray_combiner_saved_bytes_total"] == bundles * 8 * (4 + 4 * 5 // 2)
    for tracker in reversed(trackers):
        tracker.close()


def complete(found: dict[str, Any]) -> bool:
    written = found.get("delve_ray_write_seconds_count", {})
    deltas = found["delve_ray_deltas_total"]
    return sum(deltas.values()) >= STEPS and len(written) == 2 and min(written.values()) >= STEPS


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
    for name in ("refused", "repeated", "late"):
        assert found[f"delve_ray_{name}_total"] == {(run,): 0.0}, name
    assert found["delve_ray_dropped_total"] == {(run, ("writer", name)): 0.0 for name in ("parquet", "csv")}
    for metric in METRICS:
        names = [metric.name + suffix for suffix in ("_bucket", "_sum", "_count")]
        names = names if metric.kind == "histogram" else [metric.name]
        for name in names:
            assert name in found, name


def test_ray_exports_the_metrics_under_their_names(savefile: str, tmp_path: Path) -> None:
    with family(tmp_path) as processes:
        assert "everything was there" in processes.run(watch, savefile, free_port())
        processes.wait_gone()
