"""A round as a value: its outcome is known before anything changes, and can be restored from its record."""

import json

import numpy as np
import pytest
from support.runs import OWN, config, everything, figures, put_back, run

from fedmpi.components import component
from fedmpi.errors import Diverged
from fedmpi.outcome import RoundOutcome
from fedmpi.rounds import Synchronous

__all__ = ["put_back"]

HERE = "rounds.test_rounds:"
SILO_BY_SILO = {"plan": "sharded", "scope": "silo"}
CASES = {
    "sgd": {},
    "feedback": {"exchange": {"plan": "sharded", "up": {"codec": "int8", "feedback": True}}},
    "topk": {"exchange": SILO_BY_SILO | {"up": {"codec": {"name": "topk", "ratio": 0.2}, "feedback": True}}},
    "reproducible": {"exchange": {"plan": "root", "reduction": "reproducible"}},
    "overlap": {"exchange": {"plan": "replicated", "overlap": True}},
    "window": {"exchange": {"plan": "window"}},
    "scaffold": {"local": {"name": "scaffold"}, "server": {"optimizer": {"name": "fedadam", "lr": 0.01}}},
    "personal": {
        "model": OWN + "Normed",
        "local": {"name": "fedrep", "head_steps": 2},
        "exchange": {"parameters": ["*", "!head.*"]},
    },
    "keeper": {"local": {"name": OWN + "Keeper"}, "server": {"average": {}}},
    "norms": {"select": {"name": "optimal", "fraction": 0.5}},
    "losses": {"select": {"name": "power_of_choice", "fraction": 0.5}, "aggregate": {"name": "qffl", "lr": 0.1}},
    "bandit": {"select": {"name": "ucb", "fraction": 0.5}},
    "rejected": {"data": {"infinite": "s1"}, "evaluate": {"every": 2}},
    "median": {"aggregate": "median", "exchange": SILO_BY_SILO},
}


@component
class Hesitant(Synchronous):
    """Prepares every round twice and drops the first."""

    def step(self, state, fed):
        super().step(state, fed)
        return super().step(state, fed)


@pytest.mark.parametrize("case", CASES)
def test_a_round_that_is_prepared_and_dropped_leaves_no_trace(tmp_path, case):
    records, _ = run(config(tmp_path / "once", 3, **CASES[case]))
    again, _ = run(config(tmp_path / "twice", 3, engine=HERE + "Hesitant", **CASES[case]))
    assert everything(tmp_path / "once") == everything(tmp_path / "twice")
    bytes_ = ("bytes_up", "bytes_down", "bytes_control")
    for one, two in zip(records, again, strict=True):
        assert {k: v for k, v in figures(one).items() if k not in bytes_} == {
            k: v for k, v in figures(two).items() if k not in bytes_
        }


def same(one, two):
    assert vars(one).keys() == vars(two).keys()
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(two, name), err_msg=name)
        assert not isinstance(value, np.ndarray) or value.dtype == getattr(two, name).dtype, name


@pytest.mark.parametrize("case", CASES)
def test_an_outcome_comes_back_from_its_stored_record_bit_for_bit(tmp_path, case):
    _, done = run(config(tmp_path, 2, **CASES[case]))
    outcome = done.state.outcome
    same(outcome, RoundOutcome.from_record(outcome.ids, json.loads(json.dumps(done.record))))
    assert outcome.round == 2 and outcome.cohort == done.record["cohort"] and outcome.taken_K.any()
    np.testing.assert_array_equal(np.isnan(outcome.norm_K), ~outcome.taken_K)
    tested = [done.record["silos"][silo].get("accuracy", np.nan) for silo in outcome.ids]
    np.testing.assert_array_equal(outcome.metric("accuracy"), tested)


def test_a_loss_that_is_not_finite_is_no_figure_of_its_silo(tmp_path):
    how = config(tmp_path, 1, objective={"loss": "support.runs:endless"}, stop={"not_finite": False})
    _, done = run(how)
    outcome = done.state.outcome
    assert outcome.taken_K.all() and np.isnan(outcome.loss_K).all() and outcome.loss is None
    assert outcome.not_finite == ["s0", "s1", "s2"] == done.record["not_finite"]
    same(outcome, RoundOutcome.from_record(outcome.ids, done.record))


def test_an_outcome_for_some_silos_keeps_their_figures_together():
    rows = {"a": {"delta_norm": 1.0, "auc": 0.5}, "c": {"delta_norm": 3.0, "train_loss": None}}
    outcome = RoundOutcome.of("abc", 4, "abc", "b", rows, loss=2.0)
    some = outcome.only(np.array([1, 2]))
    assert (some.ids, some.cohort, some.rejected, some.round, some.loss) == (["b", "c"], ["b", "c"], ["b"], 4, 2.0)
    np.testing.assert_array_equal(some.norm_K, [np.nan, 3.0])
    np.testing.assert_array_equal(outcome.metric("auc"), [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(some.metric("auc"), [np.nan, np.nan])


@component
class Stubborn:
    """Continues only if the whole cohort took part."""

    def objection(self, outcome):
        missing = outcome.rejected
        return f"{', '.join(missing)} was not heard" if missing else ""


def test_who_decides_that_a_round_goes_on_is_a_component(tmp_path):
    engine = {"name": "synchronous", "policy": HERE + "Stubborn"}
    records, _ = run(config(tmp_path / "a", 2, engine=engine))
    assert len(records) == 2
    with pytest.raises(Diverged, match="round 1: s1 was not heard") as caught:
        run(config(tmp_path / "b", 2, {"infinite": "s1"}, engine=engine))
    assert caught.value.agreed
