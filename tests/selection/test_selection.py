"""Selectors: one contract for the family, and each one's claims: unbiased if it says so, by seeded draws."""

import itertools
import json

import numpy as np
import pytest
from support.selectors import CASES, HALF, IDS, SPECS, K, N, step

from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError, NoCohort
from fedmpi.outcome import RoundOutcome
from fedmpi.selection import SELECTORS
from fedmpi.selection import losses as losses_
from fedmpi.selection.draws import inclusion, systematic
from fedmpi.selection.norms import least_variance


def make(name, spec):
    return SELECTORS.build({"name": name, **spec}, "select")


def outcome(number, cohort, seed=0):
    """The outcome of a round; figures that differ, one silo's update rejected."""
    rng = np.random.default_rng((seed, number))
    taken = cohort[: max(1, len(cohort) - (number == 2))]
    rows = {s: {"train_loss": float(rng.uniform(0.1, 2)), "delta_norm": float(rng.uniform(0, 3))} for s in taken}
    return RoundOutcome.of(IDS, number, cohort, [silo for silo in cohort if silo not in taken], rows)


def rounds(selector, number, state=None, last=None, first=1):
    state = selector.init(N.astype(int).tolist()) if state is None else state
    found = []
    for r in range(first, first + number):
        chosen = step(selector, state, last, np.random.default_rng(r))
        state, last = chosen.state, outcome(r, chosen.cohort)
        found.append((chosen, last))
    return found


# ---------------------------------------------------------------- one contract


def test_every_member_is_tested():
    assert SPECS.keys() == SELECTORS.members.keys()


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_cohort_is_in_order_not_empty_and_without_doubles(name, spec):
    selector = make(name, spec)
    for chosen, _ in rounds(selector, 30):
        assert chosen.cohort and chosen.cohort == sorted(set(chosen.cohort))
        assert (chosen.factors is not None) == bool(getattr(selector, "unbiased", False))
        assert chosen.factors is None or (len(chosen.factors) == len(chosen.cohort) and min(chosen.factors) > 0)


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_the_same_inputs_give_the_same_answer_and_are_left_as_they_were(name, spec):
    selector = make(name, spec)
    chosen, last = rounds(selector, 4)[-1]
    before = {key: array.copy() for key, array in chosen.state.items()}
    one, two = (step(selector, chosen.state, last, np.random.default_rng(9)) for _ in range(2))
    assert one.cohort == two.cohort and one.factors == two.factors
    for key, array in before.items():
        np.testing.assert_array_equal(chosen.state[key], array)
        np.testing.assert_array_equal(one.state[key], two.state[key])


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_going_on_from_what_a_checkpoint_holds_gives_the_same_cohorts(name, spec):
    selector = make(name, spec)
    found = rounds(selector, 8)
    chosen, last = found[3]
    first = selector.init(N.astype(int).tolist())
    assert {n: (a.dtype, a.shape) for n, a in first.items()} == {n: (a.dtype, a.shape) for n, a in chosen.state.items()}
    state = {key: np.frombuffer(array.tobytes(), array.dtype) for key, array in chosen.state.items()}
    again = rounds(selector, 4, state, last, first=5)
    assert [(c.cohort, c.factors) for c, _ in again] == [(c.cohort, c.factors) for c, _ in found[4:]]


# ---------------------------------------------------------------- claims about the mean

DELTAS = np.random.default_rng(3).normal(size=(K, 4)) * np.array([[1], [0.1], [3], [2], [1], [0.5]])
A = (N / N.sum())[:, None] * DELTAS  # what each silo adds to the full update
SILO = {silo: i for i, silo in enumerate(IDS)}


def estimates(selector, state, last, number, seed=11):
    """The aggregates of many independent draws from one state."""
    rng = np.random.default_rng(seed)
    found = np.empty((number, A.shape[1]))
    for row in found:
        chosen = step(selector, state, last, rng)
        rows = [SILO[silo] for silo in chosen.cohort]
        if chosen.factors is None:
            row[:] = A[rows].sum(0) / (N[rows].sum() / N.sum())
        else:
            among = N[[SILO[silo] for silo in chosen.among or IDS]].sum() / N.sum()
            row[:] = (np.array(chosen.factors)[:, None] * A[rows]).sum(0) / among
    return found


def errors_in_standard_errors(found, expected):
    return np.abs(found.mean(0) - expected) / (found.std(0, ddof=1) / np.sqrt(len(found)))


UNBIASED = [(name, spec) for name, spec in CASES if getattr(make(name, spec), "unbiased", False)]


@pytest.mark.parametrize(("name", "spec"), UNBIASED)
@pytest.mark.parametrize("heard", [0, 3])
def test_who_claims_to_be_unbiased_is(name, spec, heard):
    """Before any silo took part, and from unequal probabilities."""
    selector = make(name, spec)
    state, last = selector.init(N.astype(int).tolist()), None
    if heard:
        chosen, last = rounds(selector, heard)[-1]
        state = chosen.state
    among = step(selector, state, last, np.random.default_rng(0)).among
    there = [SILO[silo] for silo in among or IDS]
    full = A[there].sum(0) / (N[there].sum() / N.sum())
    found = estimates(selector, state, last, 3000)
    assert found.std(0).min() > 1e-3
    assert errors_in_standard_errors(found, full).max() < 4


def test_uniform_with_inverse_weights_has_the_variance_that_it_says():
    found = estimates(make("uniform", {"fraction": 0.5, "weights": "inverse"}), {}, None, 8000)
    squares = ((found - A.sum(0)) ** 2).sum(1)
    C = 0.5
    said = K * (1 - C) / (C * (K - 1)) * ((A - A.mean(0)) ** 2).sum()
    assert abs(squares.mean() - said) < 4 * squares.std(ddof=1) / np.sqrt(len(squares))


def test_a_renormalised_mean_is_unbiased_at_equal_weights_only():
    """Exactly, over all cohorts of three; and the draws are those cohorts."""

    def expected(n_K):
        means = [np.average(DELTAS[list(c)], axis=0, weights=n_K[list(c)]) for c in itertools.combinations(range(K), 3)]
        return np.mean(means, axis=0)

    np.testing.assert_allclose(expected(np.ones(K)), DELTAS.mean(0), atol=1e-14)
    bias = np.linalg.norm(expected(N) - A.sum(0)) / np.linalg.norm(A.sum(0))
    assert 0.05 < bias < 1.0
    found = estimates(make("uniform", HALF), {}, None, 8000)
    assert errors_in_standard_errors(found, expected(N)).max() < 4
    assert errors_in_standard_errors(found, A.sum(0)).max() > 10


def test_the_optimal_probabilities_have_less_variance_than_uniform_ones():
    sizes = np.linalg.norm(A, axis=1)

    def variance(p_K):
        return ((1 - p_K) / p_K * sizes**2).sum()

    for m in (1, 2, 3, 5):
        p_K = least_variance(sizes, m)
        assert p_K.sum() == pytest.approx(m) and (p_K <= 1).all()
        least = variance(p_K)
        assert least < variance(np.full(K, m / K))
        for i, j in itertools.permutations(range(K), 2):  # nothing near it is better
            other = p_K.copy()
            other[i], other[j] = other[i] + 1e-3, other[j] - 1e-3
            assert other[i] > 1 or variance(other) > least
    np.testing.assert_array_equal(least_variance(np.array([0.0, 0.0, 5.0]), 2), [0.5, 0.5, 1.0])


def test_systematic_draws_have_the_probabilities_that_they_are_given():
    p_K, rng = inclusion(N, 3), np.random.default_rng(0)
    assert p_K.sum() == pytest.approx(3) and p_K.max() == 1
    draws = [systematic(p_K, 3, rng) for _ in range(8000)]
    assert all(len(set(draw.tolist())) == 3 for draw in draws)
    often = np.bincount(np.concatenate(draws), minlength=K) / len(draws)
    assert (np.abs(often - p_K) < 4 * np.sqrt(p_K * (1 - p_K) / len(draws)) + 1e-12).all()


# ---------------------------------------------------------------- single members


def test_silos_that_were_never_heard_are_drawn_like_the_largest():
    selector = make("norm", {"floor": 0.1})
    state = selector.init([1] * K)
    norms = {"a": {"delta_norm": 0.0}, "b": {"delta_norm": 2.0}}
    state = selector.observe(IDS, state, RoundOutcome.of(IDS, 1, "ab", rows=norms))
    np.testing.assert_array_equal(selector.sizes(state), [0, 2, 2, 2, 2, 2])
    later = selector.observe(IDS, state, RoundOutcome.of(IDS, 2, "b", rows={"b": {"delta_norm": 1.0}}))
    np.testing.assert_array_equal(later["norm"][:2], [0, 1])


def test_power_of_choice_takes_the_candidates_with_the_highest_losses():
    selector = make("power_of_choice", {"fraction": 0.3, "num_candidates": 4})
    state, rng = selector.init(N), np.random.default_rng(0)
    candidates = selector.candidates(IDS, state, None, rng)
    assert len(candidates) == 4
    losses = dict(zip(candidates, (1.0, float("nan"), 3.0, 2.0), strict=True))
    assert selector.select(IDS, state, None, rng, losses).cohort == [candidates[2], candidates[3]]  # nan comes last
    last = make("power_of_choice", {"fraction": 0.3, "num_candidates": 6, "losses": "last"})
    assert last.candidates(IDS, state, None, rng) == []
    known = {"a": {"train_loss": 3.0}, "b": {"train_loss": 1.0}, "c": {"train_loss": 5.0}, "d": {"train_loss": 2.0}}
    state = last.observe(IDS, last.init(N), RoundOutcome.of(IDS, 1, "abcd", rows=known))
    assert last.select(IDS, state, None, rng).cohort == ["e", "f"]  # unknown silos
    known = {"e": {"train_loss": 0.1}, "f": {"train_loss": 0.2}}
    state = last.observe(IDS, state, RoundOutcome.of(IDS, 2, "ef", rows=known))
    assert last.select(IDS, state, None, rng).cohort == ["a", "c"]


@pytest.mark.parametrize("name", ["ucb", "thompson"])
def test_a_bandit_finds_the_silos_whose_loss_still_falls(name):
    selector = make(name, {"fraction": 0.3})
    state, last = selector.init([1] * K), None
    loss, taken = dict.fromkeys(IDS, 100.0), dict.fromkeys(IDS, 0)
    for number in range(1, 121):
        chosen = step(selector, state, last, np.random.default_rng(number))
        for silo in chosen.cohort:
            taken[silo] += 1
            loss[silo] -= 0.5 if silo in "bf" else 0.01
        rows = {silo: {"train_loss": loss[silo]} for silo in chosen.cohort}
        state, last = chosen.state, RoundOutcome.of(IDS, number, chosen.cohort, rows=rows)
    assert min(taken["b"], taken["f"]) > max(taken[silo] for silo in "acde") and min(taken.values()) > 0


def test_candidates_are_drawn_by_samples_without_replacement():
    selector = make("power_of_choice", {"fraction": 0.1, "num_candidates": 2})
    state, rng, draws = selector.init(N), np.random.default_rng(0), 4000
    first = np.zeros(K)
    for _ in range(draws):
        for silo in selector.candidates(IDS, state, None, rng):
            first[IDS.index(silo)] += 1
    p_K = np.array(N) / sum(N)
    wanted_K = p_K + np.array([sum(p_K[j] * p_K[i] / (1 - p_K[j]) for j in range(K) if j != i) for i in range(K)])
    assert np.abs(first / draws - wanted_K).max() < 4 * np.sqrt(0.25 / draws) < np.abs(wanted_K - 2 / K).max()


EARNED = {"plays": [4.0, 2.0, 1.0, 9.0, 4.0, 0.0], "earned": [2.0, -1.0, 0.5, 4.0, 1.0, 0.0], "largest": [2.0] * 6}


def test_upper_confidence_bounds_are_the_papers():
    """Auer et al. 2002, UCB1, by hand: rewards halved by the largest, 20 plays, c 0.5."""
    state = {name: np.array(value) for name, value in EARNED.items()} | {"loss": np.full(6, np.nan)}
    bounds = {
        silo: earned / 2 / plays + 0.5 * np.sqrt(2 * np.log(20) / plays)
        for silo, plays, earned in zip(IDS, EARNED["plays"], EARNED["earned"], strict=True)
        if plays
    }
    order = ["f", *sorted(bounds, key=bounds.get, reverse=True)]  # silos that never played come first
    for size in range(1, K + 1):
        selector = make("ucb", {"fraction": size / K, "exploration": 0.5})
        assert selector.select(IDS, state, None, np.random.default_rng(0)).cohort == sorted(order[:size])


def test_what_a_bandit_remembers_fades_round_by_round():
    selector = make("ucb", {"fraction": 0.3, "discount": 0.5})
    state = selector.init(N)
    for number, losses in enumerate(({"a": 3.0, "b": 2.0}, {"a": 1.0, "c": 5.0}, {"a": 1.5, "b": 1.0}), start=1):
        told = {silo: {"train_loss": loss} for silo, loss in losses.items()}
        state = selector.observe(IDS, state, RoundOutcome.of(IDS, number, list(losses), rows=told))
    assert state["plays"].tolist() == [1.75, 1.25, 0.5, 0.0, 0.0, 0.0]
    assert state["earned"].tolist() == [2.0 / 2 - 0.5, 1.0, 0.0, 0.0, 0.0, 0.0] and state["largest"].max() == 2.0


def test_thompson_draws_from_the_papers_posterior(monkeypatch):
    """Agrawal and Goyal 2013, Algorithm 2: N(earned / (t + 1), 1 / (t + 1)), rewards halved by the largest."""
    scores = []

    def highest(drawn_K, size, rng):
        scores.append(drawn_K)
        return np.arange(size)

    monkeypatch.setattr(losses_, "highest", highest)
    state = {name: np.array(value) for name, value in EARNED.items()} | {"loss": np.full(6, np.nan)}
    selector, rng, draws = make("thompson", {"fraction": 0.3, "deviation": 2.0}), np.random.default_rng(0), 20_000
    for _ in range(draws):
        selector.select(IDS, state, None, rng)
    known_K = np.array(EARNED["plays"]) + 1
    mean_K, std_K = np.array(EARNED["earned"]) / 2 / known_K, 2.0 / np.sqrt(known_K)
    assert np.abs((np.mean(scores, axis=0) - mean_K) / std_K).max() < 4 / np.sqrt(draws)
    assert np.abs(np.std(scores, axis=0) / std_K - 1).max() < 4 / np.sqrt(2 * draws)


def test_round_robin_gives_everybody_a_turn():
    found = [chosen.cohort for chosen, _ in rounds(make("round_robin", {"count": 4}), 3)]
    assert found == [["a", "b", "c", "d"], ["a", "b", "e", "f"], ["c", "d", "e", "f"]]


# ---------------------------------------------------------------- availability


def test_only_who_is_there_is_chosen_and_what_others_did_is_not_forgotten():
    selector = make("available", {"traces": {"a": [[1, 2], [3, 9]]}, "inner": {"name": "norm", "fraction": 0.5}})
    found = rounds(selector, 3)
    assert "a" not in found[1][0].cohort and found[1][0].among == IDS[1:] and found[0][0].among == IDS
    np.testing.assert_array_equal(found[1][0].state["norm"][0], found[0][1].norm_K[0])


def test_a_round_without_anybody_and_a_silo_that_is_none_are_errors_in_one_line():
    everybody = {silo: [[1, 3]] for silo in IDS}
    selector = make("available", {"traces": everybody})
    rounds(selector, 2)
    with pytest.raises(NoCohort, match=r"^round 3: no silo is there \(select.traces\)$"):
        rounds(selector, 3)
    with pytest.raises(ConfigError, match=r"^select.traces: no silo 'z'"):
        make("available", {"traces": {"z": [[1, 2]]}}).knows(IDS)
    assert len(rounds(make("available", {"traces": {"z": [[1, 2]]}}), 1)) == 1  # one that has left the run


def test_traces_in_a_file_become_part_of_the_configuration(tmp_path):
    wanted = {"a": [(1, 3), (5, 6)], "c": [(2, 4)]}
    (tmp_path / "t.json").write_text(json.dumps(wanted))
    (tmp_path / "t.csv").write_text("silo,from,to\na,1,3\nc,2,4\na,5,6\n")
    for name in ("t.json", "t.csv"):
        config = build(Config, {"select": {"name": "available", "traces": str(tmp_path / name)}})
        assert config.select.traces == wanted  # type: ignore[attr-defined]
    for content in ("{", '{"a": 3}', "silo,when\na,1\n"):
        for name in ("bad.json", "bad.csv"):
            (tmp_path / name).write_text(content)
            with pytest.raises(ConfigError) as caught:
                build(Config, {"select": {"name": "available", "traces": str(tmp_path / name)}})
            assert str(caught.value).startswith("select.traces") and "\n" not in str(caught.value)
