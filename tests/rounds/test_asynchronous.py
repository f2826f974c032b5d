"""Asynchronous rounds and virtual time. Their numbers are checked against the papers in equations/asynchronous.py."""

import json
import time
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from support.runs import OWN, config, everything, figures, put_back, refused, run

import fedmpi
from fedmpi.changes import asked_for
from fedmpi.comm import SoloComm
from fedmpi.components import component
from fedmpi.errors import ConfigError, Diverged, SiloError, Stopped
from fedmpi.exchange.arrivals import Arrivals
from fedmpi.exchange.config import ExchangeSection
from fedmpi.local import Sgd
from fedmpi.records.metrics import read_metrics
from fedmpi.requests import Request
from fedmpi.rounds import Buffered
from fedmpi.rounds.trainer import PACE_S, Trainer
from fedmpi.stopping import FAILED, STOP

__all__ = ["put_back"]

HERE = "rounds.test_asynchronous:"
NOISY = {"name": "virtual", "compute": {"name": "lognormal", "sigma": 0.8}, "slower": {"s2": 4.0}}


def buffered(size=2, **fields):
    return {"name": "buffered", "size": size, "clock": NOISY} | fields


# ---------------------------------------------------------------- whole runs


FEEDBACK = {"codec": {"name": "topk", "ratio": 0.3, "values": "int8"}, "feedback": True}
CODED = {"up": FEEDBACK, "down": {"codec": "int8", "feedback": True}}
CENTRED = {"name": "centered_clipping", "tau": 0.05}


@pytest.mark.parametrize(
    "case", ["fedasync", "fedbuff", "adam", "kept", "clip", "codecs", "centre", "norm_bound", "scaffold"]
)
def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not(tmp_path, case):
    more = {
        "fedasync": {"engine": buffered(1)},
        "fedbuff": {"engine": buffered(3, max_staleness=1, window_s=0.2)},
        "adam": {"engine": buffered(), "server": {"optimizer": "fedadam", "average": {}}},
        "kept": {"engine": buffered(1), "model": OWN + "Normed", "local": {"name": OWN + "Keeper"}},
        "clip": {"engine": buffered(), "updates": [{"name": "clip", "norm": 0.1, "quantile": 0.5}]},
        "codecs": {"engine": buffered(2, max_staleness=2), "exchange": CODED, "model": OWN + "Normed"},
        "centre": {"engine": buffered(3), "aggregate": CENTRED},
        "norm_bound": {"engine": buffered(3), "aggregate": {"name": "norm_bound", "quantile": 0.5}},
        "scaffold": {"engine": buffered(), "local": {"name": "scaffold"}},
    }[case]
    how = config(tmp_path / "whole", 9, **more)
    records, _ = run(how)
    run(replace(how, out=str(tmp_path / "cut"), rounds=4))
    again, _ = run(replace(how, out=str(tmp_path / "cut")))
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")
    assert [figures(record) for record in again] == [figures(record) for record in records[4:]]
    assert max(one["staleness"] for record in records for one in record["arrivals"]) > 0


@component
class Hesitant(Buffered):
    """Prepares every round twice and drops the first."""

    def step(self, state, fed):
        super().step(state, fed)
        return super().step(state, fed)


def test_a_round_that_is_prepared_and_dropped_leaves_no_trace(tmp_path):
    run(config(tmp_path / "once", 6, engine=buffered(2)))
    run(config(tmp_path / "twice", 6, engine=buffered(2, name=HERE + "Hesitant")))
    assert everything(tmp_path / "once") == everything(tmp_path / "twice")


def test_the_record_tells_every_arrival_in_order(tmp_path):
    records, _ = run(config(tmp_path, 12, engine=buffered(2, max_staleness=2)))
    arrivals = [one for record in records for one in record["arrivals"]]
    assert [one["at_s"] for one in arrivals] == sorted(one["at_s"] for one in arrivals)
    assert [record["virtual_s"] for record in records] == sorted({record["virtual_s"] for record in records})
    for record in records:
        came = [one for one in record["arrivals"] if not one.get("dropped")]
        assert len(came) == 2 and record["virtual_s"] == came[-1]["at_s"]
        assert {one["silo"] for one in came} == set(record["cohort"])
        for one in record["arrivals"]:
            assert one["staleness"] == record["round"] - 1 - one["version"]
            assert (one["staleness"] > 2) == one.get("dropped", False)
    assert any(one.get("dropped") for one in arrivals)
    assert records[-1]["seconds"]["round"] > 0


def test_a_dropped_update_leaves_its_silo_as_it_was(tmp_path):
    """s2 is always too old: it never advances in its data."""
    clock = {"name": "virtual", "slower": {"s2": 9.5}}
    records, done = run(
        config(tmp_path, 60, engine=buffered(1, max_staleness=3, clock=clock), records={"trace": False})
    )
    assert [one for record in records for one in record["arrivals"] if one.get("dropped")]
    assert done.federation.silos["s2"].cursor == 0 < done.federation.silos["s0"].cursor


def test_updates_of_a_window_are_merged_by_their_weights(tmp_path):
    clock = {"name": "virtual", "slower": {"s1": 1.2, "s2": 3.2}}
    records, _ = run(config(tmp_path, 3, engine=buffered(1, window_s=0.5, clock=clock)))
    assert [record["cohort"] for record in records] == [["s0", "s1"], ["s0", "s1"], ["s2"]]
    assert [record["virtual_s"] for record in records] == [1.5, 3.0, 3.7]


def test_a_silo_whose_updates_are_rejected_does_not_stop_the_others(tmp_path):
    clock = {"name": "virtual", "slower": {"s1": 0.9}}
    records, _ = run(config(tmp_path / "a", 4, {"infinite": "s1"}, engine=buffered(1, clock=clock)))
    assert records[0]["cohort"] == ["s0", "s1"] and records[0]["rejected"] == ["s1"]
    assert all(len(record["cohort"]) > len(record["rejected"]) for record in records)
    with pytest.raises(Diverged, match="every update was rejected"):
        run(config(tmp_path / "b", 4, engine=buffered(1), updates=[{"name": "max_norm", "norm": 1e-9}]))


@component
class Given(Sgd):
    """Its delta is a random vector."""

    def train(self, silo, model, params_P, round):
        contribution = super().train(silo, model, params_P, round)
        contribution["delta"].copy_(given(silo.id, round.training))
        return contribution


def given(silo, training, num=10):
    return torch.randn(num, generator=torch.Generator().manual_seed(100 * int(silo[1:]) + training))


@pytest.mark.parametrize("clock", [NOISY, "real"])
@pytest.mark.parametrize("feedback", [False, True])
def test_codecs_keep_what_they_lose_with_the_silo_and_with_the_server(tmp_path, clock, feedback):
    """A plain version: the largest three of ten values travel up and the largest five down, each way with what was
    lost before, if there is feedback. An update that is dropped loses nothing."""
    up, down = ({"codec": {"name": "topk", "ratio": ratio}, "feedback": feedback} for ratio in (0.3, 0.5))
    how = config(
        tmp_path,
        20,
        engine=buffered(2, max_staleness=1, clock=clock),
        exchange={"up": up, "down": down},
        local={"name": HERE + "Given"},
        server={"optimizer": {"name": "fedavg", "lr": 0.8}},
        aggregate={"name": "mean", "weights": "samples"},
    )
    with fedmpi.Run(how, comm=SoloComm()) as done:
        w, versions, records = done.parameters.numpy().copy(), [], []
        for record in done:
            versions.append(done.parameters.numpy().copy())
            records.append(record)
    assert len(w) == 10 and (clock == "real" or any(one.get("dropped") for r in records for one in r["arrivals"]))

    def largest(x, num):
        kept = np.zeros_like(x)
        places = np.argsort(-np.abs(x), kind="stable")[:num]
        kept[places] = x[places]
        return kept

    lost, lost_down, n = {silo: np.zeros(10) for silo in ("s0", "s1", "s2")}, np.zeros(10), (20, 30, 50)
    for record, found in zip(records, versions, strict=True):
        total, weight = np.zeros(10), 0.0
        for one in record["arrivals"]:
            if one.get("dropped"):
                continue
            silo = one["silo"]
            x = given(silo, one["training"] + 1).double().numpy() + feedback * lost[silo]
            sent = largest(x, 3)
            lost[silo] = x - sent
            total += n[int(silo[1:])] * (one["staleness"] + 1) ** -0.5 * sent
            weight += n[int(silo[1:])]
        x = 0.8 * total / weight + feedback * lost_down
        sent = largest(x, 5)
        lost_down, w = x - sent, w + sent
        assert np.allclose(found, w, atol=1e-5), record["round"]


def test_a_message_holds_what_no_codec_may_touch(tmp_path):
    """Statistics travel exactly, frozen parameters not at all."""
    how = config(tmp_path, 6, engine=buffered(2), exchange=CODED, model=OWN + "Normed")
    records, done = run(how)
    start = fedmpi.Run(replace(how, out=str(tmp_path / "b")), comm=SoloComm())
    module, first = done.federation.model, start.federation.model.module.base.weight.clone()
    module.load(done.parameters)
    assert torch.equal(module.module.base.weight, first)
    assert (module.module.norm.running_var > 0).all()
    start.close()
    plain, _ = run(replace(how, out=str(tmp_path / "c"), exchange=ExchangeSection()))
    assert len(records) == len(plain)


def test_a_rejected_update_does_not_count_however_many_are_waited_for(tmp_path):
    """The server waits for `size` updates that it can use."""
    clock = {"name": "virtual", "slower": {"s1": 0.5}}
    records, _ = run(config(tmp_path, 4, {"infinite": "s1"}, engine=buffered(2, clock=clock)))
    for record in records:
        assert sum(one["silo"] != "s1" for one in record["arrivals"]) == 2
        assert record["rejected"] == ["s1"]


def test_a_rule_that_reads_each_update_needs_as_many_as_it_says(tmp_path):
    krum = {"name": "krum", "hostile": 1}
    with pytest.raises(ConfigError, match="krum with hostile: 1 needs 5 silos or more, and has 4"):
        run(config(tmp_path / "a", 4, engine=buffered(4), aggregate=krum))
    records, _ = run(config(tmp_path / "b", 4, engine=buffered(5), aggregate=krum))
    assert all(len(record["arrivals"]) == 5 for record in records)  # of three silos


def test_silos_leave_and_join_while_updates_are_under_way(tmp_path):
    with fedmpi.Run(config(tmp_path, 12, engine=buffered(2)), comm=SoloComm()) as done:
        records = []
        for record in done:
            records.append(record)
            if record["round"] == 4:
                done.rebuild(done.membership.without("s1"))
            if record["round"] == 8:
                done.rebuild(done.membership.with_silo("s1", 0))
    came = [{one["silo"] for one in record["arrivals"]} for record in records]
    assert not any("s1" in one for one in came[4:8]) and any("s1" in one for one in came[8:])
    versions = [one["version"] for record in records[8:] for one in record["arrivals"] if one["silo"] == "s1"]
    assert min(versions) == 8  # it fetched when it joined
    numbers = [one["training"] for record in records for one in record["arrivals"] if one["silo"] == "s1"]
    assert numbers == sorted(set(numbers))  # so no noise is drawn twice
    again = buffered(2, clock={"name": "replay", "run": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"silo 's1' has left .* before round 5"):
        config(tmp_path / "again", 12, engine=again)


def test_a_silo_that_leaves_a_replay_does_not_begin_anew(tmp_path):
    run(config(tmp_path / "first", 6, engine=buffered(2, clock="virtual"), local={"name": "scaffold"}))
    clock = {"name": "replay", "run": str(tmp_path / "first")}
    how = config(tmp_path / "again", 6, engine=buffered(2, clock=clock), local={"name": "scaffold"})
    with (
        pytest.raises(ConfigError, match="silo 's1' has left, and takes part in round 3"),
        fedmpi.Run(how, comm=SoloComm()) as done,
    ):
        for record in done:
            with pytest.raises(ConfigError, match="not by request"):
                asked_for(Request("0", "retire", "s1"), done._spec, done.federation)
            if record["round"] == 2:
                done.rebuild(done.membership.without("s1"))


def test_a_replay_knows_all_silos_of_its_run_also_one_that_brought_nothing(tmp_path, monkeypatch):
    run(config(tmp_path / "first", 3, engine=buffered(1, clock="virtual")))
    rows = [*read_metrics(tmp_path / "first")]
    rows[-1]["silos"]["s9"] = {}
    monkeypatch.setattr("fedmpi.rounds.clocks.read_metrics", lambda path: rows)
    clock = {"name": "replay", "run": str(tmp_path / "first")}
    assert "has a silo 's9', which is none here" in refused(config(tmp_path / "b", 3, engine=buffered(1, clock=clock)))


@pytest.mark.parametrize("clock", [{"name": "virtual", "slower": {"s2": 2.5}}, "real"])
def test_statistics_are_those_of_the_silo_however_stale_its_update_is(tmp_path, clock):
    """A step of batch normalization moves its running mean by a tenth of the way to the batch's, from the silo's start.
    The server's becomes the silo's; a sum of deltas would overshoot."""
    local = {"lr": 1e-12, "epochs": None, "steps": 1, "batch_size": None}
    how = config(tmp_path, 9, engine=buffered(1, clock=clock), model=OWN + "Normed", local=local)
    records, done = run(how)
    model = done.federation.model
    model.load(done.parameters)
    module = model.module.eval()
    means = {name: module.base(silo.data.x_train).mean(0) for name, silo in done.federation.silos.items()}
    versions = [torch.zeros(len(module.norm.running_mean))]
    for record in records:
        [one] = record["arrivals"]
        versions.append(0.9 * versions[one["version"]] + 0.1 * means[one["silo"]])
    assert torch.allclose(module.norm.running_mean, versions[-1], atol=1e-6)
    assert clock == "real" or max(record["arrivals"][0]["staleness"] for record in records) > 1


class Drawing(torch.nn.Linear):
    """A model that draws a random number in every pass of training."""

    drawn: ClassVar[list[float]] = []

    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.drawn.append(float(torch.rand(1)))
        return super().forward(x)


def test_no_training_repeats_the_random_numbers_of_another(tmp_path):
    """s0 trains several times from one version."""
    clock = {"name": "virtual", "slower": {"s0": 0.1}}
    local = {"epochs": None, "steps": 1, "amount": "drawn"}
    how = config(tmp_path, 3, engine=buffered(3, clock=clock), model=HERE + "Drawing", local=local)
    records, done = run(how)
    drawn = type(done.federation.model.module).drawn
    made = [(one["silo"], one["version"]) for record in records for one in record["arrivals"]]
    assert len(drawn) >= len(made) > len(set(made))
    assert len(set(drawn[-len(made) :])) == len(made)


def test_the_norm_of_a_silo_is_the_mean_of_its_updates_norms(tmp_path):
    how = config(
        tmp_path, 1, {"sizes": (20,)}, engine=buffered(2, clock="virtual"), updates=[{"name": "max_norm", "times": 9.0}]
    )
    [record], done = run(how)
    assert done.state.updates["1/median"] == pytest.approx([record["delta_norm"]], rel=1e-6)


def test_a_start_that_is_not_kept_is_an_error_and_no_other_start(tmp_path):
    with (
        fedmpi.Run(config(tmp_path, 9, engine=buffered(1)), comm=SoloComm()) as done,
        pytest.raises(Exception) as error,
    ):
        for _ in done:
            vars(done.federation.exchange)["_starts"].rows.clear()
    assert "fetched, are not kept" in str(error.value)


# ---------------------------------------------------------------- real time, on one rank


REAL = {
    "size": ({"size": 1}, {}),
    "dropped": ({"size": 2, "max_staleness": 0}, {}),
    "window": ({"size": 1, "window_s": 0.05}, {}),
    "codecs": ({"size": 2, "max_staleness": 0}, {"exchange": CODED}),
    "centre": ({"size": 3}, {"aggregate": CENTRED}),
    "scaffold": ({"size": 2}, {"local": {"name": "scaffold"}, "exchange": {"up": {"codec": "int8", "feedback": True}}}),
}


@pytest.mark.parametrize("case", REAL)
def test_a_run_in_real_time_is_replayed_with_its_bits(tmp_path, case):
    engine, others = REAL[case]
    more = {"model": OWN + "Normed", "local": {"name": OWN + "Keeper"}, "checkpoint": {"every": 3}} | others
    real = config(tmp_path / "real", 8, engine={"name": "buffered", **engine}, **more)
    run(replace(real, rounds=5))
    run(real)  # silos start anew after a resume
    clock = {"name": "replay", "run": str(tmp_path / "real")}
    records, _ = run(config(tmp_path / "again", 8, engine={"name": "buffered", "clock": clock, **engine}, **more))
    (round, wanted), (_, found) = everything(tmp_path / "real"), everything(tmp_path / "again")
    assert round == 8 and len(records) == 8

    def without_times(state):
        return {name: value for name, value in state.items() if "policy" not in name and "start" not in str(name)}

    assert without_times(found) == without_times(wanted)


def test_a_silo_that_waits_for_a_window_to_close_can_be_stopped(tmp_path, monkeypatch):
    """And it counts as resting, since it starts no batch."""
    silent, slept = [], []
    with fedmpi.Run(config(tmp_path, 1, engine={"name": "buffered", "window_s": 3600.0}), comm=SoloComm()) as done:
        watch = done.federation.watch
        monkeypatch.setattr(watch, "begin", lambda what: silent.append(what))
        monkeypatch.setattr(watch, "rest", silent.clear)

        def sleep(seconds):
            assert not silent and seconds < 1.0
            slept.append(seconds)
            watch.tell(STOP, "a test")

        monkeypatch.setattr("fedmpi.rounds.realtime.time.sleep", sleep)
        with pytest.raises(Stopped, match="a test"):
            list(done)
    assert slept


def test_no_vector_is_left_under_way_where_evaluation_ends_the_run(tmp_path, monkeypatch):
    """Another run on the same ranks would receive it as its own."""
    settled = []
    with (
        pytest.raises(SiloError, match="the evaluation"),
        fedmpi.Run(config(tmp_path, 5, engine="buffered"), comm=SoloComm()) as done,
    ):
        for record in done:
            fed, exchange = done.federation, done.federation.exchange
            assert isinstance(exchange, Arrivals)
            monkeypatch.setattr(exchange.runtime, "settle", lambda record=record: settled.append(record["round"]))

            def evaluate(*_, fed=fed):
                fed.done.clear()
                fed.done.set_rank(0, status=FAILED)
                return SiloError("the evaluation")

            monkeypatch.setattr("fedmpi.rounds.synchronous.evaluate", evaluate)
    assert settled == [1]


def test_trainings_run_on_the_device_of_their_model(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in (torch.device("cuda", 3), torch.device("cpu")):
        trainer = Trainer(device)
        for _ in range(2):
            trainer.start(lambda: list(chosen))
            assert trainer.turn() == [torch.device("cuda", 3)]
        trainer.end()


def test_a_training_gives_way_and_keeps_its_random_numbers():
    """Numbers drawn in the main thread between two turns do not change those of the training."""
    trainer = Trainer()

    def drawn(pauses):
        torch.default_generator.manual_seed(5)
        found = []
        for _ in range(4):
            found.append(float(torch.rand(1)) + np.random.default_rng(len(found)).random())
            time.sleep(2 * PACE_S * pauses)
            trainer.pause()
        return found

    results = []
    for pauses in (0, 1):
        trainer.start(lambda pauses=pauses: drawn(pauses))
        turns = 1
        while (result := trainer.turn()) is None:
            torch.default_generator.manual_seed(turns)
            turns += 1
        results.append(result)
    assert turns > 1 and results[0] == results[1]
    trainer.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.turn()
    trainer.start(lambda: drawn(1))
    assert trainer.turn() is None and trainer.busy
    trainer.end()


@component
class Pulling(Sgd):
    """Its delta depends on its start and on its silo alone."""

    def train(self, silo, model, params_P, round):
        contribution = super().train(silo, model, params_P, round)
        contribution["delta"].copy_(pulled(params_P, silo.id))
        return contribution


def pulled(w, silo):
    return -0.3 * w + (1 + int(silo[1:]))


def test_a_replay_trains_from_the_versions_that_are_recorded_however_old_they_are(tmp_path):
    """A silo may train from older parameters than its last update met, and bring two to a round from two versions."""
    made_from = [
        ("s0", 0),
        ("s1", 0),
        ("s0", 1),
        ("s2", 0),
        ("s1", 2),
        ("s1", 3),
        ("s1", 1),
        ("s0", 2),
        ("s2", 3),
        ("s0", 9),
    ]
    rows = [[(silo, version)] for silo, version in made_from]
    rows[8] = [("s2", 3), ("s2", 1), ("s1", 8)]
    (folder := tmp_path / "earlier").mkdir()
    lines, count = [], 0
    for number, of_round in enumerate(rows, start=1):
        arrivals = []
        for silo, version in of_round:
            row = {"silo": silo, "at_s": float(count), "version": version, "staleness": number - 1 - version}
            arrivals.append({**row, "training": count})
            count += 1
        lines.append(json.dumps({"round": number, "arrivals": arrivals, "silos": {"s0": {}, "s1": {}, "s2": {}}}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    how = config(
        tmp_path / "replay",
        len(rows),
        engine={"name": "buffered", "clock": {"name": "replay", "run": str(folder)}},
        aggregate={"name": "mean", "weights": "uniform"},
        local={"name": HERE + "Pulling"},
    )
    with fedmpi.Run(how, comm=SoloComm()) as done:
        versions = [done.parameters.clone()]
        for record in done:
            number = record["round"]
            step = torch.zeros_like(versions[0])
            for silo, version in rows[number - 1]:
                step += (number - version) ** -0.5 * pulled(versions[version], silo)
            versions.append(versions[-1] + step / len(rows[number - 1]))
            assert torch.allclose(done.parameters, versions[-1], atol=1e-5), number
            versions[-1] = done.parameters.clone()
    run(replace(how, out=str(tmp_path / "cut"), rounds=7))
    run(replace(how, out=str(tmp_path / "cut")))
    assert everything(tmp_path / "cut") == everything(tmp_path / "replay")


# ---------------------------------------------------------------- what it refuses


REFUSED = {
    "stateful": (
        {"engine": "buffered", "updates": [{"name": "max_norm", "times": 2.0}]},
        "takes no updates: max_norm that follows earlier rounds",
    ),
    "adopt": (
        {"engine": "buffered", "on_failure": "adopt"},
        "on_failure: adopt cannot be combined with engine: buffered",
    ),
    "select": ({"select": {"name": "uniform", "fraction": 0.5}}, "take select: all"),
    "fednova": ({"aggregate": "fednova"}, "aggregate: fednova, whose factor belongs to the silos of one round"),
    "fedlin": (
        {"local": {"name": "gradient_correction"}},
        "its gradient is a mean over silos that start from the same parameters",
    ),
    "feddyn": (
        {"local": {"name": "feddyn", "alpha": 0.1}, "server": {"optimizer": {"name": "feddyn", "alpha": 0.1}}},
        "does not go with local: feddyn",
    ),
    "fedexp": ({"server": {"optimizer": "fedexp"}}, "server.optimizer: fedexp"),
    "sharded": ({"exchange": {"plan": "sharded"}}, "exchange.plan: sharded"),
    "ring": ({"exchange": {"reduction": "reproducible"}}, "take exchange.reduction: fast"),
    "overlap": ({"exchange": {"overlap": True}}, "exchange.overlap"),
    "fragments": ({"exchange": {"fragments": 2}}, "exchange.fragments"),
    "regions": ({"exchange": {"regions": {"every": 2}}}, "exchange.regions"),
    "disclose": ({"disclose": "cohort"}, "needs disclose: silo"),
    "timed": ({"local": {"amount": {"name": "seconds", "seconds": 1.0}}}, "counts the machine's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, case):
    values, why = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **{"engine": buffered()} | values)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_replay_needs_the_arrivals_of_all_rounds(tmp_path):
    run(config(tmp_path / "first", 3, engine=buffered(1)))
    again = buffered(1, clock={"name": "replay", "run": str(tmp_path / "first")})
    with pytest.raises(ConfigError, match="first has no arrivals of round 4"):
        config(tmp_path / "second", 4, engine=again)
    with pytest.raises(ConfigError, match=r"has a silo 's\d', which is none here"):
        run(config(tmp_path / "second", 3, {"sizes": (20,)}, engine=again))
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl with arrivals"):
        config(tmp_path / "second", 3, engine=buffered(1, clock={"name": "replay", "run": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match="which only engine: buffered has"):
        config(tmp_path / "second", 3, engine={"name": "synchronous", "clock": again["clock"]})
