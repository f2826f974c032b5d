"""Sinks that write to tracking services, with stand-ins for their packages."""

import json
import sys
from types import SimpleNamespace

import pytest
from support.runs import config, put_back, run

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import to_dict
from fedmpi.errors import ConfigError
from fedmpi.records import read_metrics
from fedmpi.records.sink import scalars

__all__ = ["put_back"]


class Service:
    """Stands for both packages: keeps what it is told, by run."""

    def __init__(self, fails_at=None, away=False):
        self.runs, self.states, self.fails_at, self.away, self.settings = {}, {}, fails_at, away, {}

    def keep(self, id, step, values):
        if step == self.fails_at:
            raise ConnectionError("no route")
        self.runs[id].append((step, values))

    # mlflow

    def MlflowClient(self, tracking_uri):
        self.settings["uri"] = tracking_uri
        return self

    def get_experiment_by_name(self, name):
        if self.away:
            raise ConnectionError("no route")
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment, run_name):
        id = f"{experiment}-{run_name}-{len(self.runs)}"
        self.runs[id], self.states[id] = [], ["RUNNING"]
        return SimpleNamespace(info=SimpleNamespace(run_id=id))

    def update_run(self, id, status):
        self.states[id].append(status)

    def log_batch(self, id, metrics):
        self.keep(id, metrics[0][3], {name: value for name, value, _, _ in metrics})

    def set_terminated(self, id):
        self.states[id].append("FINISHED")

    # wandb

    def Settings(self, **given):
        return given

    def init(self, **given):
        if self.away:
            raise ConnectionError("no route")
        self.settings = given
        id = given["id"]
        self.runs.setdefault(id, [])
        self.states.setdefault(id, []).append("RUNNING")
        return SimpleNamespace(
            log=lambda values, step: self.keep(id, step, values), finish=lambda: self.states[id].append("FINISHED")
        )


@pytest.fixture(params=["mlflow", "wandb"])
def package(request, monkeypatch):
    def install(**how):
        service = Service(**how)
        monkeypatch.setitem(sys.modules, request.param, service)
        monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=lambda *values: values))
        return service

    return SimpleNamespace(install=install, name=request.param)


def how(tmp_path, name, rounds, **more):
    return config(out=str(tmp_path / "a"), rounds=rounds, records={"sinks": [name]}, **more)


def test_every_number_of_a_record_arrives_and_a_resumed_run_goes_on_in_the_same_place(tmp_path, package):
    service = package.install()
    run(how(tmp_path, package.name, 2))
    run(how(tmp_path, package.name, 4))
    (told,) = service.runs.values()
    records = read_metrics(tmp_path / "a")
    assert [step for step, _ in told] == [1, 2, 3, 4]
    assert [values for _, values in told] == [scalars(record) for record in records]
    assert told[0][1]["loss"] == records[0]["loss"] and "seconds/train" in told[0][1]
    assert [*service.states.values()] == [["RUNNING", "FINISHED"] * 2]
    (tmp_path / "a").rename(tmp_path / "b")
    run(how(tmp_path, package.name, 1))
    assert len(service.runs) == 2, "another run of the same name is another run"


def test_a_service_that_fails_is_dropped_with_one_warning(tmp_path, package, caplog):
    service = package.install(fails_at=2)
    run(how(tmp_path, package.name, 4))
    assert [step for step, _ in next(iter(service.runs.values()))] == [1]
    assert [r["round"] for r in read_metrics(tmp_path / "a")] == [1, 2, 3, 4]
    assert caplog.text.count("no route") == 1 and "it gets no more records" in caplog.text


def test_a_service_that_is_away_at_the_start_does_not_hold_the_run(tmp_path, package, caplog):
    service = package.install(away=True)
    run(how(tmp_path, package.name, 2))
    assert service.runs == {} and caplog.text.count("cannot begin (ConnectionError: no route)") == 1
    assert not (tmp_path / "a" / f"{package.name}.json").exists()


def test_a_missing_package_is_one_line_before_training(tmp_path, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.name, None)
    with pytest.raises(ConfigError, match=rf"^records.sinks: {package.name} needs the package .*\(fedmpi\[.*\]\): .*"):
        run(how(tmp_path, package.name, 2))
    assert not (tmp_path / "a" / "checkpoints" / "round-000001").exists()


def test_options_reach_the_package(tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    sink = {"name": "wandb", "project": "hearts", "mode": "online"}
    run(config(out=str(tmp_path / "a"), rounds=1, records={"sinks": [sink]}))
    given = service.settings
    assert (given["project"], given["mode"], given["resume"], given["name"]) == ("hearts", "online", "allow", "a")
    assert given["settings"] == {"console": "off", "disable_git": True, "disable_code": True}
    assert given["dir"] == str(tmp_path / "a")
    with pytest.raises(ConfigError, match="mode 'of' is neither offline nor online"):
        run(config(out=str(tmp_path / "b"), rounds=1, records={"sinks": [{**sink, "mode": "of"}]}))


def test_no_figure_of_a_single_silo_is_sent(tmp_path, package):
    service = package.install()
    run(how(tmp_path, package.name, 1, disclose="pooled"))
    ((_, values),) = next(iter(service.runs.values()))
    assert "s0" not in json.dumps(values) and all("silo" not in name for name in values)
    assert {"loss", "train_loss", "bytes_up"} <= values.keys()


def test_the_configuration_names_them(tmp_path):
    made = config(str(tmp_path), records={"sinks": [{"name": "mlflow", "uri": "file:x"}, "wandb"]})
    assert json.loads(json.dumps(to_dict(made)["records"]["sinks"]))[0]["uri"] == "file:x"
    with pytest.raises(ConfigError, match="url"):
        fedmpi.Run(config(str(tmp_path), records={"sinks": [{"name": "mlflow", "url": "file:x"}]}), comm=SoloComm())
