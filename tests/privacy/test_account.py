"""The account: the library's numbers, targets, and an account that no kill, resume or repetition makes smaller."""

import json
import math
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from privacy.test_record import private as of_records
from privacy.test_silo import private
from support.runs import OWN, put_back, refused, run  # noqa: F401

from fedmpi import plan
from fedmpi.comm import SoloComm
from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.outcome import RoundOutcome
from fedmpi.privacy import SiloPrivacy, Use, account, epsilon, sigma_for
from fedmpi.privacy.noise import coefficients
from fedmpi.privacy.spending import Spending
from fedmpi.selection.draws import RoundRobin
from fedmpi.state import StateTensor

POISSON = {"name": "poisson", "rate": 0.3}


def of_library(*sampled, delta=1e-5):
    dp = account.library()
    whole = dp.pld.PLDAccountant()
    for sigma, rate, count in sampled:
        whole.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), count)
    return whole.get_epsilon(delta)


@pytest.mark.parametrize(("sigma", "rate", "count"), [(1.3, 0.004, 3750), (0.8, 0.1, 20), (5.0, 0.5, 50)])
def test_epsilon_is_the_library_s(sigma, rate, count):
    assert epsilon({Use(sigma, rate): count}, 1e-5) == pytest.approx(of_library((sigma, rate, count)), rel=1e-8)


def test_uses_of_different_kinds_add_up_and_segments_count_by_themselves():
    both = {Use(1.0, 0.1): 5, Use(2.0, 0.2): 7}
    assert epsilon(both, 1e-5) == pytest.approx(of_library((1.0, 0.1, 5), (2.0, 0.2, 7)), rel=1e-8)
    dp = account.library()
    turns = {Use(2.0, every=4, segment="a"): 9, Use(2.0, every=4, segment="b"): 1}  # 3 turns and 1
    assert epsilon(turns, 1e-5) == pytest.approx(dp.gaussian_mechanism.get_epsilon_gaussian(1.0, 1e-5), rel=1e-12)
    mixed = {Use(2.0): 4, Use(1.0, 0.1): 5}
    assert epsilon(mixed, 1e-5) > max(epsilon({use: n}, 1e-5) for use, n in mixed.items())
    assert epsilon({}, 1e-5) == 0.0


@pytest.mark.parametrize(("use", "count"), [(Use(1.0), 10), (Use(1.0, 0.2), 20), (Use(1.0, every=5), 12)])
def test_a_target_gets_the_least_noise_that_meets_it(use, count):
    sigma = sigma_for(2.0, 1e-4, [(use, count)])
    assert epsilon({use._replace(sigma=sigma): count}, 1e-4) <= 2.0
    assert epsilon({use._replace(sigma=sigma * 0.995): count}, 1e-4) > 2.0
    with pytest.raises(ConfigError, match="no noise gives epsilon"):
        sigma_for(1e-5, 1e-9, [(use, count)])


def test_turns_that_do_not_divide_the_silos_move_the_noise_by_no_more_than_is_counted():
    ids, bands, rounds = [f"s{k}" for k in range(7)], 3, 20
    robin, column = RoundRobin(count=2), coefficients(bands)
    state, outcome, took = robin.init([1] * 7), None, np.zeros((7, rounds))
    for number in range(rounds):
        cohort, state, *_ = robin.select(ids, state, outcome, None)
        took[[ids.index(silo) for silo in cohort], number] = 1
        outcome = RoundOutcome.of(ids, number + 1)
    C = sum(weight * np.eye(rounds, k=-age) for age, weight in enumerate(column))
    every = SiloPrivacy(clip=1.0, sigma=1.0, delta=1e-3)._every(SimpleNamespace(select=robin), 7)
    assert every >= bands
    moved = max(np.linalg.norm(C @ took_T) for took_T in took) / np.linalg.norm(column)  # in clips
    counted = epsilon({Use(2.0, every=every, segment="a"): rounds}, 1e-3)
    of_noise = account.library().gaussian_mechanism.get_epsilon_gaussian
    assert of_noise(2.0 / moved, 1e-3) <= counted <= of_noise(2.0 / math.sqrt(moved**2 + 1), 1e-3) * (1 + 1e-9)


# ------------------------------------------------------------ runs


def test_a_run_ends_when_its_budget_is_spent_and_saves_its_model(tmp_path, capsys):
    budget = epsilon({Use(0.7): 3}, 1e-3) * 1.0001
    records, _ = run(private(tmp_path, 6, privacy={"epsilon": budget}))
    assert len(records) == 3 and records[-1]["epsilon"] <= budget
    assert (tmp_path / "model.safetensors").exists()
    assert "the privacy budget is spent after round 3 of 6" in capsys.readouterr().err
    assert run(private(tmp_path, 6, privacy={"epsilon": budget}))[0] == []  # a resume spends nothing


def test_a_target_lasts_for_all_rounds(tmp_path):
    how = private(tmp_path, 5, privacy={"sigma": None, "epsilon": 2.0}, select=POISSON)
    records, _ = run(how)
    assert len(records) == 5 and 1.9 < records[-1]["epsilon"] <= 2.0
    told = plan.plan(how, {}, 2)["budget"]
    assert told["epsilon"] == pytest.approx(records[-1]["epsilon"]) and told["sigma"] == pytest.approx(
        json.loads((tmp_path / "privacy.json").read_text())["uses"][0]["sigma"]
    )
    assert "neighbours differ in one silo" in told["sentence"] and "probability 0.3" in told["sentence"]


def test_what_is_printed_is_never_less_than_what_is_spent(tmp_path):
    spending = Spending(tmp_path / "privacy.json", 1e-5, budget=3.0)
    spending.epsilon = 2.99001
    assert spending.told == "epsilon 2.991 of 3 at delta 1e-05"


@pytest.mark.parametrize("of", [private, of_records])
def test_a_delta_that_promises_little_is_told(tmp_path, caplog, of):
    num, units = (6, "silos") if of is private else (50, "records of a silo")
    data = {"name": OWN + "Blobs", "sizes": [50] * 6, "declared": 50}
    for delta, told in ((0.99 / num, False), (1 / num, True)):
        how = build(Config, to_dict(of(tmp_path / f"{told}", 1, privacy={"delta": delta})) | {"data": data})
        caplog.clear()
        run(how)
        says = f"not below 1 / {num}, the number of {units}"
        assert [says in text for text in (caplog.text, plan.plan(how, {}, 2)["budget"]["sentence"])] == [told] * 2


def test_repeated_rounds_are_counted_again(tmp_path):
    run(private(tmp_path, 8), rounds=3)  # the newest checkpoint is of round 2, or of 3
    records, _ = run(private(tmp_path, 8))
    counts = [row["count"] for row in json.loads((tmp_path / "privacy.json").read_text())["uses"]]
    assert sum(counts) >= 8
    assert records[-1]["epsilon"] >= epsilon({Use(0.7): 8}, 1e-3) * (1 - 1e-12)


def test_an_account_that_lost_something_is_refused(tmp_path):
    run(private(tmp_path, 6), rounds=4)
    file = tmp_path / "privacy.json"
    text = file.read_text()
    file.unlink()
    assert "counts 0 uses and the checkpoint 4" in refused(private(tmp_path, 6))
    file.write_text(text[:-9])
    assert "is damaged" in refused(private(tmp_path, 6))
    file.write_text(text)
    assert len(run(private(tmp_path, 6))[0]) == 2


def test_correlated_noise_begins_anew_after_a_resume(tmp_path):
    how = private(tmp_path, 7, privacy={"bands": 3}, select={"name": "round_robin", "count": 2})
    run(how, rounds=4)
    run(how)
    uses = json.loads((tmp_path / "privacy.json").read_text())["uses"]
    assert [row["count"] for row in uses] == [4, 3] and len({row["segment"] for row in uses}) == 2


KILLED = """
import os, signal, sys
import fedmpi, fedmpi.exchange.base, fedmpi.privacy.spending as spending
from fedmpi.comm import SoloComm
sys.path.insert(0, {tests!r})
from pathlib import Path
from privacy.test_silo import private
at, where = int(sys.argv[2]), sys.argv[3]
calls = 0
def killing(method):
    def wrapped(*args, **keywords):
        global calls
        calls += 1
        if calls == at and where.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        done = method(*args, **keywords)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return wrapped
spending.Spending._write = killing(spending.Spending._write)
with fedmpi.Run(private(Path(sys.argv[1]), 6, privacy={{"reproducible": False}}), comm=SoloComm()) as run:
    for record in run:
        print(record["round"], flush=True)
"""


@pytest.mark.slow
def test_after_kills_at_random_rounds_no_less_is_spent_than_happened(tmp_path):
    """Each start is killed around a write of the account; what was released is what the file counts at least."""
    out, draw, released = tmp_path / "run", random.Random(3), 0
    program = KILLED.format(tests=os.path.dirname(os.path.dirname(__file__)))
    for _ in range(4):
        arguments = [str(out), str(draw.randint(1, 3)), draw.choice(["before", "after"])]
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, -9), done.stderr
        released += len(done.stdout.split())  # rounds whose parameters a user saw
        rows = json.loads((out / "privacy.json").read_text())["uses"] if (out / "privacy.json").exists() else []
        assert sum(row["count"] for row in rows) >= released
    records, _ = run(private(out, 6, privacy={"reproducible": False}))
    released += len(records)
    count = sum(row["count"] for row in json.loads((out / "privacy.json").read_text())["uses"])
    assert count >= max(released, 6)
    assert epsilon({Use(0.7): count}, 1e-3) >= epsilon({Use(0.7): 6}, 1e-3)


def test_nothing_takes_a_count_back(tmp_path):
    comm, spending = SoloComm(), Spending(tmp_path / "privacy.json", 1e-5)
    spending.next = lambda segment, cohort: {Use(1.0): 1}
    spending.open(comm)
    assert spending.begin(comm, 1)
    first = spending.secret
    spending.spend(comm)
    (before,) = spending.state()
    for _ in range(3):
        assert spending.begin(comm, 2)
        spending.spend(comm)
    spending.restore([before])  # of an earlier round
    assert spending.total() == 4 and spending.secret != first
    assert spending.epsilon == pytest.approx(epsilon({Use(1.0): 4}, 1e-5))
    again = Spending(tmp_path / "privacy.json", 1e-5)
    again.open(comm)
    assert again.uses == spending.uses and math.isclose(again.epsilon, spending.epsilon)
    assert first not in (tmp_path / "privacy.json").read_text()
    with pytest.raises(ConfigError, match="counts 4 uses and the checkpoint 5"):
        again.restore([StateTensor(("count",), before.tensor + 4)])
