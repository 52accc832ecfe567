"""MLflow: every metric under its key, the trial's config as parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from delve_ray.configs import flatten
from delve_ray.errors import OptionError
from delve_ray.schema import PublishedWindow, window_metrics
from delve_ray.writers.base import Scalar, WriterRun, remember, remembered

BATCH = 1000
"""Metrics that MLflow takes in one call."""
_FORBIDDEN = re.compile(r"[^\w\-. :/]")


class MlflowWriter:
    """Logs final windows and user scalars to an MLflow run, named as the run.

    Args:
        tracking_uri: Where MLflow keeps its runs; by default what MLflow itself takes (MLFLOW_TRACKING_URI).
        experiment: Name of the experiment; it is made if there is none.
        run_id: An MLflow run to log to, such as the one that the training logs its losses to; by default a new one.
        tags: Further tags of a new run.

    Keys are those of `metrics()`; what MLflow does not allow in a key becomes "_". A corrected window adds a newer
    point on its step. Raises OptionError without the package mlflow.
    """

    name = "mlflow"

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str = "delve_ray",
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        self._tracking_uri, self._experiment, self._run_id, self._tags = tracking_uri, experiment, run_id, tags
        self._own = run_id is None
        self._client: Any = None

    def open(self, run: WriterRun) -> None:
        """Begin the run, or find it."""
        try:
            from mlflow.entities import Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise OptionError(f"save_to='mlflow' needs mlflow ({error}): pip install 'delve_ray[mlflow]'") from error
        self._client = MlflowClient(tracking_uri=self._tracking_uri)
        self._run_id = self._run_id or remembered(run, self.name)
        if self._run_id is not None:
            self._client.get_run(self._run_id)
            return
        number = self._find_experiment()
        tags = {"savefile": run.storage.uri, **({"trial": run.trial} if run.trial else {}), **(self._tags or {})}
        self._run_id = self._client.create_run(number, run_name=run.run, tags=tags).info.run_id
        remember(run, self.name, self._run_id)
        parameters = {**flatten(run.trial_config or {}), **run.model}
        if parameters:
            self._client.log_batch(
                self._run_id, params=[Param(_FORBIDDEN.sub("_", k), str(v)) for k, v in parameters.items()]
            )

    def _find_experiment(self) -> str:
        """The experiment's id; it is made if there is none, which another trial may do at the same time."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment))
            except MlflowException:
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        return str(found.experiment_id)

    def write(self, window: PublishedWindow) -> None:
        """Log a final window."""
        if window.final:
            milliseconds = int(window.wall_time.timestamp() * 1000)
            self._log((k, v, milliseconds, window.step) for k, v in window_metrics(window.rows).items())

    def write_scalars(self, scalars: list[Scalar]) -> None:
        """Log user scalars under their own names."""
        self._log((s.name, s.value, int(s.wall_time.timestamp() * 1000), s.step) for s in scalars)

    def close(self) -> None:
        """End the run, if this writer began it."""
        if self._client is not None and self._own:
            self._client.set_terminated(self._run_id)

    def _log(self, metrics: Iterable[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        entities = [Metric(_FORBIDDEN.sub("_", key), value, time, step) for key, value, time, step in metrics]
        for start in range(0, len(entities), BATCH):
            try:
                self._client.log_batch(self._run_id, metrics=entities[start : start + BATCH])
            except MlflowException as error:
                if error.get_http_status_code() >= 500:  # a server that is away, too; in time it is there again
                    raise OSError(f"MLflow does not take metrics: {error}") from error
                raise
