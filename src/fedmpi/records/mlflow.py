"""The MLflow sink."""

from __future__ import annotations

import time
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.records.record import Record
from fedmpi.records.sink import RunInfo, Tracker, scalars


class MLflow(Tracker):
    """Numbers of every record as metrics of one MLflow run (package mlflow or mlflow-skinny, extra `mlflow`).

    `uri`: of the tracking server, or `file:FOLDER` or `sqlite:///FILE`; the default is MLflow's own: the variable
    MLFLOW_TRACKING_URI, else a local store. `experiment`: its name there. `name`: of the run; the default is that of
    the run directory.
    """

    file = "mlflow.json"

    def __init__(self, uri: str = "", experiment: str = "fedmpi", name: str = "") -> None:
        self._uri, self._experiment, self._name = uri, experiment, name

    def require(self) -> None:
        try:
            import mlflow  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"records.sinks: mlflow needs the package mlflow-skinny (fedmpi[mlflow]): {error}"
            ) from None

    def begin(self, run: RunInfo, before: str) -> str:
        import mlflow
        from mlflow.entities import Metric

        self._metric: Any = Metric
        self._client: Any = mlflow.MlflowClient(tracking_uri=self._uri or None)
        if before:
            self._client.update_run(before, status="RUNNING")
            return before
        experiment = self._client.get_experiment_by_name(self._experiment)
        number = self._client.create_experiment(self._experiment) if experiment is None else experiment.experiment_id
        return str(self._client.create_run(number, run_name=self._name or run.root.name).info.run_id)

    def tell(self, record: Record) -> None:
        now_ms, step = int(time.time() * 1000), record["round"]
        metrics = [self._metric(name, value, now_ms, step) for name, value in scalars(record).items()]
        self._client.log_batch(self.id, metrics=metrics)

    def end(self) -> None:
        self._client.set_terminated(self.id)
