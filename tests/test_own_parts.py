"""Users' samplers and selectors with invalid results: one line that names the fault."""

import numpy as np
import pytest
import torch
from support.runs import OWN, config, put_back, refused, run  # noqa: F401

from fedmpi import results
from fedmpi.components import component
from fedmpi.config import Config
from fedmpi.errors import ConfigError, NoCohort
from fedmpi.flat import sha256
from fedmpi.local import RULES, Sgd
from fedmpi.local.samplers import SAMPLERS
from fedmpi.local.workload import WORKLOADS
from fedmpi.selection import SELECTORS, All
from fedmpi.server import OPTIMIZERS

HERE = "test_own_parts:"  # how configurations name this module's components

GIVEN = {
    "many": lambda n: np.arange(n + 12) % n,
    "few": lambda n: np.arange(n - 1),
    "none": lambda n: np.zeros(0, dtype=np.int64),
    "outside": lambda n: np.arange(n) + 1,
    "negative": lambda n: np.arange(n) - 1,
    "twice": lambda n: np.where(np.arange(n) == 3, 4, np.arange(n)),
    "floats": lambda n: np.arange(n) / 1,
    "table": lambda n: np.arange(n)[:, None],
}


@component
class Sampling:
    """In order for the first epoch; then it gives silo s1 what the test sets."""

    what: str = "many"
    repeats: bool = False
    torch: bool = False

    def order(self, seed, silo, epoch, num_samples):
        given = GIVEN[self.what](num_samples) if (silo, epoch) == ("s1", 1) else np.arange(num_samples)
        return torch.from_numpy(given) if self.torch else given


WANTED = r"; expected the 30 integers from 0 to 29"


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("many", "42 indices"),
        ("few", "29 indices"),
        ("none", "0 indices"),
        ("outside", "the index 30"),
        ("negative", "the index -1"),
        ("twice", "the index 4 2 times"),
        ("floats", r"float64 of \[30\]"),
        ("table", r"int64 of \[30, 1\]"),
    ],
)
def test_a_sampler_that_gives_no_order_of_the_samples_is_refused_in_one_line(tmp_path, what, why):
    with pytest.raises(ConfigError) as caught:
        run(config(tmp_path, 3, local={"sampler": {"name": HERE + "Sampling", "what": what}}))
    assert "\n" not in str(caught.value)
    assert caught.match(rf"round 2: sampler '.*Sampling': silo 's1', epoch 1: returned {why}{WANTED}")


def test_a_sampler_may_repeat_samples_where_it_says_so(tmp_path):
    local = {"sampler": {"name": HERE + "Sampling", "what": "twice", "repeats": True, "torch": True}}
    records, _ = run(config(tmp_path, 2, local=local))
    assert records[-1]["silos"]["s1"]["num_samples"] == 30


TRIMMED = {"aggregate": {"name": "trimmed_mean", "fraction": 0.34}, "exchange": {"plan": "sharded", "scope": "silo"}}


@pytest.mark.parametrize(
    ("select", "least"),
    [
        ({"name": "uniform", "fraction": 0.67}, 2),
        ({"name": "uniform", "count": 2}, 2),
        ({"name": "round_robin", "count": 2}, 2),
        ({"name": "ucb", "count": 1}, 1),
        ({"name": "power_of_choice", "count": 2}, 2),
        ({"name": "available", "traces": {"s0": [[1, 3]]}}, 2),
        (
            {"name": "available", "traces": {"s0": [[4, 9]], "s1": [[1, 4]]}, "inner": {"name": "uniform", "count": 3}},
            2,
        ),
    ],
)
def test_a_trimmed_mean_is_refused_where_a_selector_may_give_too_few_silos(tmp_path, select, least):
    assert refused(config(tmp_path, 4, select=select, **TRIMMED)).startswith(
        f"aggregate.fraction: 0.34 of {least} silo"
    )


def test_a_trimmed_mean_takes_traces_that_leave_enough_silos_in_all_rounds(tmp_path):
    later = {"name": "available", "traces": {"s0": [[1, 5]], "s1": [[1, 9]]}}
    assert len(run(config(tmp_path, 4, select=later, **TRIMMED))[0]) == 4


def test_a_trimmed_mean_stops_where_so_few_are_heard_that_none_would_be_left_out(tmp_path):
    with pytest.raises(NoCohort, match=r"^round 1: aggregate.fraction: 0.34 of 2 silos is less than one silo"):
        run(config(tmp_path, 4, {"infinite": "s2"}, **TRIMMED))


@component
class Shrinking:
    """All silos, then two of them."""

    def init(self, num_train):
        return {}

    def select(self, ids, state, outcome, rng):
        return (ids if outcome is None else ids[:2]), state


def test_a_selector_of_ones_own_that_gives_a_trimmed_mean_too_few_ends_the_run(tmp_path):
    with pytest.raises(NoCohort, match=r"^round 2: aggregate.fraction: 0.34 of 2 silos"):
        run(config(tmp_path, 4, select=HERE + "Shrinking", **TRIMMED))


@pytest.mark.parametrize(
    ("select", "why"),
    [
        ({"name": "uniform", "count": 4}, "select.count: 4 silos, and there are 3"),
        ({"name": "round_robin", "count": 4}, "select.count: 4 silos, and there are 3"),
        ({"name": "available", "traces": {}, "inner": {"name": "round_robin", "count": 4}}, "select.count: 4 silos"),
        ({"name": "power_of_choice", "num_candidates": 4}, "select.num_candidates: 4 silos, and there are 3"),
        (
            {"name": "power_of_choice", "fraction": 0.67, "num_candidates": 1},
            "select.num_candidates: 1, and 2 silos are chosen of them",
        ),
    ],
)
def test_numbers_of_silos_that_cannot_be_are_refused_and_not_clipped(tmp_path, select, why):
    assert refused(config(tmp_path, 2, select=select)).startswith(why)


def test_a_count_takes_the_place_of_a_fraction(tmp_path):
    by_count, _ = run(config(tmp_path / "a", select={"name": "uniform", "count": 2}))
    by_share, _ = run(config(tmp_path / "b", select={"name": "uniform", "fraction": 0.67}))
    assert [r["cohort"] for r in by_count] == [r["cohort"] for r in by_share] and len(by_count[0]["cohort"]) == 2
    with pytest.raises(ConfigError, match="either 'fraction' or 'count'"):
        config(tmp_path / "c", select={"name": "uniform", "count": 2, "fraction": 0.5})


def test_a_run_that_is_given_more_rounds_says_that_its_schedule_ends_elsewhere(tmp_path, capsys):
    falling = {"name": "cosine"}
    run(config(tmp_path / "a", 2, local={"schedule": falling}))
    assert capsys.readouterr().err == ""
    run(config(tmp_path / "a", 4, local={"schedule": falling}))
    assert "rounds was 2 and is 4: local.schedule now ends at 4; to keep it as it was, local.schedule.rounds=2" in (
        capsys.readouterr().err
    )


def test_a_schedule_keeps_its_end_with_the_rounds_that_it_had(tmp_path, capsys):
    run(config(tmp_path / "a", 2, local={"schedule": "cosine"}))
    run(config(tmp_path / "a", 4, local={"schedule": {"name": "cosine", "rounds": 2}}))
    run(config(tmp_path / "a", 5, local={"schedule": {"name": "cosine", "rounds": 2}}))
    assert capsys.readouterr().err == ""
    assert "local.schedule.rounds is 2 there and 3 here" in refused(
        config(tmp_path / "a", 5, local={"schedule": {"name": "cosine", "rounds": 3}})
    )


def test_a_schedule_that_does_not_end_has_nothing_to_say(tmp_path, capsys):
    run(config(tmp_path, 2))
    run(config(tmp_path, 3))
    assert capsys.readouterr().err == ""


@component
class Namer(Sgd):
    """Keeps tensors of ones under its own names."""

    names: tuple[str, ...] = ()

    def train(self, silo, model, params_P, round):
        contribution = super().train(silo, model, params_P, round)
        assert all(silo.kept.get(name, torch.ones(1)) == 1 for name in self.names)
        silo.kept |= {name: torch.ones(1) for name in self.names}
        return contribution


def test_names_that_a_rule_keeps_tensors_under_are_nobody_else_s(tmp_path):
    """Layers, integers, an optimizer and a loss are kept beside them, and the model's own figures are reported."""
    names = ["personal_0", "integers", "optimizer_0_momentum_buffer", "optimizer_mine", "train_loss", "own_params"]
    shas = []
    for out, some in (("plain", ["x"]), ("other", names)):
        local = {"name": HERE + "Namer", "names": some, "keep_optimizer": True}
        local |= {
            "epochs": 3,
            "optimizer": {"name": "SGD", "momentum": 0.5},
            "amount": {"name": "by_loss", "target": 0.3},
        }
        how = {"model": OWN + "Normed", "local": local, "exchange": {"parameters": ["*", "!head.*"]}}
        _, done = run(config(tmp_path / out, 3, **how))
        shas.append((sha256(done.parameters), results.evaluate(tmp_path / out)))
    assert shas[0] == shas[1]
    local = {"name": HERE + "Namer", "names": names}
    run(config(tmp_path / "shared", 2, local=local))
    assert not any(key.startswith("personal_") for key in results.evaluate(tmp_path / "shared"))


def test_what_a_class_that_inherits_nothing_does_not_say_is_as_the_family_s_base_has_it():
    class Bare:
        unbiased = True

        def init(self, num_train):
            return {}

        def select(self, ids, state, outcome, rng):
            return list(ids), state

    chosen = Config(select=component(Bare)()).select
    assert (chosen.unbiased, chosen.asks, chosen.samples, chosen.least("abc", 5)) == (True, False, None, 3)
    assert chosen.observe("abc", {"x": 1}, None) == {"x": 1} and chosen.candidates("abc", {}, None, None) == []
    chosen.suits(1)


@pytest.mark.parametrize("family", [SELECTORS, RULES, OPTIMIZERS, SAMPLERS, WORKLOADS], ids=lambda family: family.what)
def test_members_inherit_from_their_family_s_base_and_say_what_is_abstract_there(family):
    for name, member in family.members.items():
        assert issubclass(member, family.protocol), name
        abstract = [m for m in dir(member) if getattr(getattr(member, m), "__isabstractmethod__", False)]
        assert not abstract, f"{name} lacks {abstract}"


def test_a_component_of_one_s_own_says_what_it_does_not_go_with():
    @component
    class Picky(All):
        def conflicts(self, config):
            return "rounds: this selector needs an even number" if config.rounds % 2 else super().conflicts(config)

    assert Config(select=Picky(), rounds=2).select.least("ab", 2) == 2
    with pytest.raises(ValueError, match="rounds: this selector needs an even number"):
        Config(select=Picky(), rounds=3)
