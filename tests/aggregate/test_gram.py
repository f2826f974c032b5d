"""Inner products of silos' deltas: piece by piece over ranks that are threads, and in records."""

import numpy as np
import pytest
import torch
from support.runs import config, put_back
from support.runs import run as run_config

from fedmpi.aggregate import base
from fedmpi.comm.threads import on_ranks
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.exchange import chunks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.exchange.config import ExchangeSection
from fedmpi.outcome import RoundOutcome
from fedmpi.records.measurements import Dissimilarity, gradient_diversity, spread
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.types import Contribution

__all__ = ["put_back"]

HERE = "aggregate.test_gram:"
P, OWN = 17_000, 12_345  # only OWN elements are the delta
OWNERS = {1: (0, 0, 0, 0, 0), 2: (0, 1, 0, 1, 1), 3: (2, 0, 2, 1, 0)}
WEIGHTS = (3.0, 1.0, 2.0, 5.0, 4.0)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "SHORTEST", 4096)
    monkeypatch.setattr(base, "PART", 1000)


def run(num_ranks, deltas_KP, cohort, gram, up):
    """Gram matrix and parameters of every rank."""

    def work(comm):
        how = build(ExchangeSection, {"plan": "sharded", "scope": "silo", "up": up})
        ids, params_P = list("abcde"), torch.zeros(P)
        hosted = [silo for silo, owner in zip(ids, OWNERS[num_ranks], strict=True) if owner == comm.rank]
        exchange = make(how, comm, params_P, ExchangeContext(sum(WEIGHTS), ids, hosted, 7, gram=gram))
        optimizer = OPTIMIZERS.build("fedavg", "")
        mine = [k for k in cohort if ids[k] in hosted]
        exchange.begin(1, len(mine))
        for k in mine:
            exchange.add(Contribution(ids[k], 1, WEIGHTS[k], deltas_KP[k].clone(), 0.0, 1, 1))
        params_P, _ = exchange.finish(params_P, Server(optimizer), optimizer.init(params_P))
        return exchange.gram, params_P

    return on_ranks(num_ranks, work)


@pytest.mark.parametrize("num_ranks", OWNERS)
@pytest.mark.parametrize(("codec", "tolerance"), [("identity", 1e-12), ("bf16", 1e-2)])
def test_the_gram_matrix_is_that_of_what_arrived_and_moves_no_parameter(num_ranks, codec, tolerance):
    deltas_KP = torch.randn(5, P, generator=torch.Generator().manual_seed(1))
    cohort = [4, 1, 2]
    done = run(num_ranks, deltas_KP, cohort, OWN, {"codec": codec})
    exact = deltas_KP[sorted(cohort), :OWN].double()
    wanted = (exact @ exact.T).numpy()
    for gram_KK, _ in done:
        np.testing.assert_array_equal(gram_KK, done[0][0])
        assert np.abs(gram_KK - wanted).max() < tolerance * wanted.max()
    without = run(num_ranks, deltas_KP, cohort, 0, {"codec": codec})
    assert all(gram_KK is None for gram_KK, _ in without)
    assert all(torch.equal(params_P, without[0][1]) for _, params_P in (*done, *without))


def test_diversity_and_cosines_are_those_of_the_definitions():
    deltas_KP = np.random.default_rng(0).normal(size=(4, 9)) + 0.5
    said = gradient_diversity(deltas_KP @ deltas_KP.T, list("abcd"))
    assert said["diversity"] == pytest.approx((deltas_KP**2).sum() / (deltas_KP.sum(0) ** 2).sum())
    unit = deltas_KP / np.linalg.norm(deltas_KP, axis=1, keepdims=True)
    cosines = unit @ unit.T
    pairs = cosines[np.triu_indices(4, 1)]
    assert said["cosine"] == {"mean": pytest.approx(pairs.mean()), "min": pytest.approx(pairs.min())}
    assert said["cosines"]["silos"] == list("abcd")
    np.testing.assert_allclose(said["cosines"]["rows"], cosines)
    alike = np.ones((3, 3))
    assert (
        gradient_diversity(alike)["diversity"] == pytest.approx(1 / 3)
        and gradient_diversity(alike)["cosine"]["min"] == 1
    )


def test_what_does_not_move_has_no_cosine():
    one = np.array([[4.0, 0.0], [0.0, 0.0]])
    assert gradient_diversity(one, ["a", "b"]) == {
        "diversity": 1.0, "cosine": None, "cosines": {"silos": ["a", "b"], "rows": [[1.0, None], [None, None]]},
    }  # fmt: skip
    assert gradient_diversity(np.zeros((2, 2))) == {"diversity": None, "cosine": None}
    assert gradient_diversity(np.array([[1.0, -1.0], [-1.0, 1.0]])) == {
        "diversity": None,
        "cosine": {"mean": -1.0, "min": -1.0},
    }
    assert gradient_diversity(np.ones((1, 1)))["cosine"] is None


def test_spread_is_seen_from_the_worse_end():
    values = np.append(np.arange(11.0), np.nan)
    assert spread(values, True) == {"std": pytest.approx(np.std(np.arange(11))), "p10": 1.0}
    assert spread(values, False)["p90"] == 9.0 and spread(np.array([np.nan]), True) is None


def test_dissimilarity_is_the_mean_square_distance_to_the_mean():
    deltas_KP = np.random.default_rng(1).normal(size=(4, 9))
    outcome = RoundOutcome.of("abcd", 1, "abcd", gram_KK=deltas_KP @ deltas_KP.T)
    wanted = ((deltas_KP - deltas_KP.mean(0)) ** 2).sum(1).mean()
    assert Dissimilarity().of(outcome) == {"dissimilarity": pytest.approx(wanted)}
    assert Dissimilarity().of(RoundOutcome.of("ab", 1, "ab", gram_KK=np.ones((2, 2)))) == {"dissimilarity": 0.0}


@component
class Heard:
    """A user's measurement that needs no vector."""

    needs = frozenset()

    def of(self, outcome):
        return {"heard": int(outcome.taken_K.sum()), "mean_steps": float(np.nanmean(outcome.steps_K))}


def test_what_is_measured_is_in_the_record(tmp_path):
    how = {"exchange": {"plan": "sharded", "scope": "silo"}}
    measured = {"gram": True, "measure": ["dissimilarity", {"name": "gram", "matrix": True}, HERE + "Heard"]}
    records, _ = run_config(config(tmp_path / "a", 2, records=measured, **how))
    plain, _ = run_config(config(tmp_path / "b", 2, **how))
    for with_, without in zip(records, plain, strict=True):
        new = {name for name in with_ if name not in without}
        assert new == {"diversity", "cosine", "cosines", "dissimilarity", "heard", "mean_steps"}
        largest = max(row["delta_norm"] for row in with_["silos"].values())
        assert with_["heard"] == 3 and 0 < with_["dissimilarity"] < largest**2
        assert with_["delta_norm"] == without["delta_norm"]


def test_what_needs_inner_products_is_refused_where_deltas_never_meet(tmp_path):
    assert refused_config({"records": {"measure": ["dissimilarity"]}}).startswith(
        "records.measure: needs exchange.scope: silo"
    )
    assert refused_config({"records": {"gram": True}}).startswith("records.gram: needs exchange.scope: silo")


def refused_config(values):
    with pytest.raises(ConfigError) as caught:
        build(Config, values)
    return str(caught.value)
