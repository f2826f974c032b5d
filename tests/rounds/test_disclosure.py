"""What leaves a rank about single silos: all figures, who took part, or only sums."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import OWN, config, everything, put_back
from support.selectors import CASES as SELECTOR_CASES
from support.selectors import step

import fedmpi
from fedmpi import results
from fedmpi.aggregate import AGGREGATORS, CohortSummary
from fedmpi.comm import SoloComm
from fedmpi.components import build, component
from fedmpi.config import Config
from fedmpi.errors import ConfigError, Diverged
from fedmpi.evaluate import Scores
from fedmpi.metrics import METRICS as METRIC_FAMILY
from fedmpi.objectives import Objective, Tally, resolve
from fedmpi.outcome import RoundOutcome
from fedmpi.records import StatusTable
from fedmpi.records.terminal import Progress, silo_table
from fedmpi.rounds import READY_RANK, READY_SILO
from fedmpi.rounds.disclosure import heard, ready_pooling
from fedmpi.selection import SELECTORS

__all__ = ["put_back"]

HERE = "rounds.test_disclosure:"
OF_ONES_OWN = [{"name": OWN + name, "maximize": True} for name in ("needs_five", "nowhere")]
METRICS: list[Any] = ["accuracy", "log_loss", "balanced_accuracy", *OF_ONES_OWN]
HOW = {"objective": {"metrics": METRICS}, "select": {"name": "uniform", "fraction": 0.7}}


class Overheard(SoloComm):
    """One rank, and all numbers that it passes to a collective."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def share(self, values, meanwhile=None):
        self.numbers += np.asarray(values, dtype=np.float64).ravel().tolist()
        return super().share(values, meanwhile)


def trained(how):
    """The records of a run, what left the rank, and the run."""
    with fedmpi.Run(how, comm=(comm := Overheard())) as run:
        return list(run), set(comm.numbers), run


PRIVATE = ("train_loss", "delta_norm", "loss", "accuracy", "log_loss", "num_samples", "num_steps", "num_test")


def private(records):
    """The figures of single silos, except those that equal figures of all by chance."""
    found = {row[key] for record in records for row in record["silos"].values() for key in PRIVATE if key in row}
    return {value for value in found if value is not None and value not in (0, 1) and not float(value).is_integer()}


@pytest.mark.parametrize("other", [{}, {"local": {"name": "ditto", "lam": 0.1}, "select": "all"}])
@pytest.mark.parametrize("disclose", ["cohort", "pooled"])
def test_no_figure_of_a_single_silo_leaves_its_rank_and_those_of_all_are_the_same(tmp_path, disclose, other):
    how = HOW | other
    records, told, open_run = trained(config(tmp_path / "silo", 3, **how))
    secrets = private(records)
    assert len(secrets) > 20 and secrets <= told
    hidden, told, run = trained(config(tmp_path / disclose, 3, disclose=disclose, **how))
    assert not secrets & told
    assert not secrets & set(numbers_in(hidden))
    assert torch_equal(open_run, run)
    for one, two in zip(records, hidden, strict=True):
        assert two["cohort"] == one["cohort"]
        assert all(row.keys() == {"rank", "num_train"} for row in two["silos"].values())
        for key in ("train_loss", "delta_norm", "loss", *(k for k in one if "accuracy" in k or k == "log_loss")):
            assert two[key] == pytest.approx(one[key], rel=1e-12), key
        assert two["silo_mean_needs_five"] == pytest.approx(one["silo_mean_needs_five"])
        assert two["raised"] == {name: len(silos) for name, silos in one["raised"].items()}
        assert two["undefined"] == {name: len(silos) for name, silos in one["undefined"].items()}
        assert ("rejected" in two) == (disclose == "cohort") and "worst" not in two and "spread" not in two


def numbers_in(value):
    """All numbers in a record."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, (int, float)) else []


def torch_equal(one, two):
    return bool((one.parameters == two.parameters).all())


def pack(rows, disclose):
    """What a rank passes to the collective about training, and what is known after it."""
    board = StatusTable(2, READY_RANK, 3, READY_SILO, pooling=ready_pooling(disclose))
    for silo, row in enumerate(rows):
        board.set_silo(silo, **row)
    packed = []

    def over(values):
        packed.append(values.copy())
        return values

    board.share(over)
    assert board.num_bytes == packed[0].nbytes
    return packed[0].tobytes(), board


COMMON = {"taken": 1, "samples": 8, "steps": 2, "normalizer": 2, "weight": 1, "sent": 1, "targets": 4}


def test_private_rows_with_the_same_sums_are_the_same_bytes():
    one = [COMMON | {"loss": 1.0, "norm": 2.0}, COMMON | {"loss": 4.0, "norm": 3.0}]
    two = [COMMON | {"loss": 4.0, "norm": 3.0}, COMMON | {"loss": 1.0, "norm": 2.0}]
    three = [COMMON | {"loss": 2.5, "norm": 3.0}, COMMON | {"loss": 2.5, "norm": 2.0}]
    for disclose in ("cohort", "pooled"):
        assert pack(one, disclose)[0] == pack(two, disclose)[0] == pack(three, disclose)[0]
    assert pack(one, "silo")[0] != pack(two, "silo")[0]
    other = [COMMON | {"loss": 1.0, "norm": 2.0}, {"rejected": 1}, COMMON | {"loss": 4.0, "norm": 3.0}]
    moved = [{"rejected": 1}, COMMON | {"loss": 1.0, "norm": 2.0}, COMMON | {"loss": 4.0, "norm": 3.0}]
    assert pack(other, "pooled")[0] == pack(moved, "pooled")[0] and pack(other, "cohort")[0] != pack(moved, "cohort")[0]


def test_a_rank_does_not_even_keep_its_own_rows():
    rows = [COMMON | {"loss": 1.0, "norm": 2.0}, COMMON | {"loss": 4.0, "norm": 3.0}, {"rejected": 1}]
    _, board = pack(rows, "cohort")
    assert np.isnan(board.silo("loss")).all() and board.silo("taken").tolist() == [1, 1, 0]
    _, board = pack(rows, "pooled")
    assert all(np.isnan(board.silo(name)).all() for name in READY_SILO)


def test_sums_say_of_those_that_were_heard_what_rows_say():
    rows = [
        {"taken": 1, "weight": 3.0, "sent": 6.0, "normalizer": 2.0, "loss": 0.5, "norm": 2.0},
        {"taken": 1, "weight": 1.0, "sent": 5.0, "normalizer": 5.0, "loss": math.inf, "norm": 1.0},
        {"rejected": 1, "weight": 7.0, "normalizer": 9.0, "norm": math.nan},
    ]
    each, all_ = heard(pack(rows, "silo")[1]), heard(pack(rows, "pooled")[1])
    for name in ("weights", "sent"):
        assert getattr(each, name).sum() == getattr(all_, name).sum()
    assert (each.weights * each.normalizers).sum() == (all_.weights * all_.normalizers).sum()
    assert (each.sent * each.norms**2).sum() == pytest.approx((all_.sent * all_.norms**2).sum(), rel=1e-15)
    assert np.isnan(all_.start_losses).all() and pack(rows, "pooled")[1].sum("not_finite") == 1


def test_private_test_figures_with_the_same_sums_are_the_same_bytes():
    objective = resolve(Objective(metrics=("log_loss",)), "binary", 2)
    scores = Scores(objective, personal=False, pools=True)

    def packed(losses):
        board = StatusTable(1, (), 3, scores.columns, scores.num_counts, scores.pooling)
        for silo, loss in enumerate(losses):
            parts = {"log_loss": (np.zeros(0), np.array([4.0]))}
            scores.enter(board, silo, Tally(4, loss, 4, parts, {"log_loss": loss}))
        found = []

        def over(values):
            found.append(values.tobytes())
            return values

        board.share(over)
        return found[0]

    assert packed([1.0, 2.0, 6.0]) == packed([6.0, 1.0, 2.0]) == packed([3.0, 3.0, 3.0]) != packed([1.0, 2.0, 7.0])


@pytest.mark.parametrize("disclose", ["cohort", "pooled"])
def test_a_run_that_is_taken_up_again_ends_with_the_same_bits(tmp_path, disclose):
    how = HOW | {"disclose": disclose, "data": {"infinite": "s1"}, "select": "all"}
    whole, *_ = trained(config(tmp_path / "whole", 4, **how))
    with fedmpi.Run(config(tmp_path / "a", 4, **how), comm=SoloComm()) as run:
        for record in run:
            if record["round"] == 2:
                break
    assert run.state.outcome.num_rejected == 1 and run.state.outcome.num_taken == 2
    again = RoundOutcome.from_record(run.state.outcome.ids, json.loads(json.dumps(run.record)))
    for name, value in vars(run.state.outcome).items():
        np.testing.assert_array_equal(value, getattr(again, name), err_msg=name)
    rest, *_ = trained(config(tmp_path / "a", 4, **how))
    assert everything(tmp_path / "a") == everything(tmp_path / "whole")
    assert [r["loss"] for r in rest] == [r["loss"] for r in whole[2:]]
    assert whole[0].get("rejected") == (["s1"] if disclose == "cohort" else None)
    scored = results.evaluate(tmp_path / "a")
    assert scored["silos"] == {} and scored["loss"] == pytest.approx(whole[-1]["loss"])
    line = Progress()
    line.open(fedmpi.records.RunInfo(tmp_path, rounds=4, metric="accuracy"))
    assert ("rejected s1" if disclose == "cohort" else "rejected 1") in line._line(whole[0])
    silo_table(whole[-1], "accuracy")


def test_where_every_update_is_rejected_nobody_is_named_but_under_cohort(tmp_path):
    how = {"local": {"schedule": {"name": OWN + "Cliff", "at": 1}}}
    with pytest.raises(Diverged, match="every update was rejected: not finite"):
        trained(config(tmp_path / "a", 1, disclose="pooled", **how))
    with pytest.raises(Diverged, match=r"every update was rejected \(s0, s1, s2\): not finite"):
        trained(config(tmp_path / "b", 1, disclose="cohort", **how))


@pytest.mark.parametrize("how", [{"data": {"sizes": [20]}}, {"select": {"name": "uniform", "count": 1}}])
def test_a_cohort_of_one_silo_has_no_sums_to_hide_behind(tmp_path, how):
    with pytest.raises(ConfigError, match=r"^disclose: pooled, but a cohort may be a single silo"):
        fedmpi.Run(config(tmp_path, 1, disclose="pooled", **how), comm=SoloComm())


@component
class Curious:
    """A selector that does not declare what it reads."""

    def init(self, num_train):
        return {}

    def select(self, ids, state, outcome, rng):
        return list(ids), state


SHARDED = {"plan": "sharded", "scope": "silo"}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"select": {"name": "ucb", "fraction": 0.5}}, "select reads the loss of each silo"),
        ({"select": {"name": "norm", "fraction": 0.5}}, "select reads the norm of each silo"),
        ({"select": {"name": "power_of_choice", "fraction": 0.5}}, "select reads the loss of each silo"),
        (
            {"select": {"name": "available", "traces": {}, "inner": {"name": "thompson"}}},
            "select reads the loss of each silo",
        ),
        ({"select": HERE + "Curious"}, r"select does not say what it reads of single silos"),
        ({"aggregate": {"name": "qffl", "lr": 0.1}}, "aggregate reads the norm and the start_loss of each silo"),
        ({"aggregate": "median", "exchange": SHARDED}, "aggregate reads the delta of each silo"),
        ({"exchange": SHARDED}, "with exchange.scope: silo each delta leaves its rank"),
        ({"records": {"gram": True}, "exchange": SHARDED}, "records.measure reads the gram of each silo"),
    ],
)
@pytest.mark.parametrize("disclose", ["cohort", "pooled"])
def test_what_reads_figures_of_single_silos_is_refused_with_the_reason(values, why, disclose):
    with pytest.raises(ConfigError, match=why) as caught:
        build(Config, values | {"disclose": disclose})
    assert f"disclose: {disclose}" in str(caught.value) and "\n" not in str(caught.value)
    build(Config, values)  # `silo` allows it


def test_a_metric_that_is_no_sum_is_refused(tmp_path):
    how = {"data": {"task": "regression"}, "model": {"name": "mlp", "hidden": [3]}, "objective": {"metrics": "r2"}}
    with pytest.raises(ConfigError, match=r"^objective.metrics: r2 needs the rows of each silo"):
        fedmpi.Run(config(tmp_path, 1, disclose="pooled", **how), comm=SoloComm())


# ---------------------------------------------------------------- declarations of members


def told(hide):
    """An outcome in which the arrays of these names are nan."""
    rng = np.random.default_rng(5)
    names = {"train_loss": "loss", "delta_norm": "norm", "num_samples": "samples", "num_steps": "steps"}
    rows = {silo: {key: float(rng.uniform(1, 3)) for key in names} for silo in "bcdf"}
    rows = {silo: {key: v for key, v in row.items() if names[key] not in hide} for silo, row in rows.items()}
    return RoundOutcome.of("abcdef", 3, "bcdf", (), rows)


@pytest.mark.parametrize("case", SELECTOR_CASES, ids=lambda case: case[0])
def test_a_selector_reads_no_more_than_it_declares(case):
    name, spec = case
    selector = SELECTORS.build({"name": name, **spec}, "select")
    answers = []
    for hide in (set(), {"loss", "norm", "samples", "steps"} - selector.reads):
        state = selector.init([12, 30, 18, 7, 25, 60])
        answers.append(step(selector, state, told(hide), np.random.default_rng(3)))
    assert answers[0].cohort == answers[1].cohort and answers[0].factors == answers[1].factors
    for key, array in answers[0].state.items():
        np.testing.assert_array_equal(array, answers[1].state[key])
    assert bool(getattr(selector, "asks", False)) <= ("loss" in selector.reads)


@pytest.mark.parametrize("name", [name for name, cls in AGGREGATORS.members.items() if not getattr(cls, "reads", 1)])
def test_an_aggregator_that_reads_nothing_of_single_silos_needs_sums_alone(name):
    aggregator = AGGREGATORS.members[name]
    rows = [
        {"taken": 1, "weight": w, "sent": s, "normalizer": n, "norm": x}
        for w, s, n, x in ((3.0, 1.5, 2.0, 2.0), (1.0, 0.2, 5.0, 1.0), (4.0, 4.0, 1.0, 0.5))
    ]
    each, all_ = (heard(pack(rows, disclose)[1]) for disclose in ("silo", "pooled"))
    scales = [aggregator().scale(CohortSummary(*known, 11.0)) for known in (each, all_)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-14)


def scorers_of(task, num_classes):
    members: dict[str, Any] = METRIC_FAMILY.members
    names = [name for name, cls in members.items() if task in cls.tasks]
    return [(task, num_classes, name) for name in names]


@pytest.mark.parametrize(
    ("task", "num_classes", "name"),
    [*scorers_of("binary", 2), *scorers_of("classification", 8), *scorers_of("regression", 1)],
)
def test_a_metric_that_adds_up_gives_the_same_figure_from_sums(task, num_classes, name):
    names = [name, *(["accuracy"] if name == "confusion_matrix" else [])]  # it is no number
    objective = resolve(build(Objective, {"metrics": names}), task, num_classes)
    if not all(scorer.adds_up for scorer in objective.scorers):
        assert name == "r2"
        return
    generator = torch.Generator().manual_seed(1)
    both = [Scores(objective, personal=False, pools=pools) for pools in (False, True)]
    boards = [StatusTable(1, (), 3, scores.columns, scores.num_counts, scores.pooling) for scores in both]
    for silo, num in enumerate((5, 9, 30)):
        outputs = torch.randn(num, num_classes if task == "classification" else 1, generator=generator)
        targets = torch.randint(num_classes, (num,), generator=generator)
        targets = {"binary": targets.float(), "regression": outputs + 1 / num}.get(task, targets)
        tally = objective.score(torch.nn.Identity(), outputs, targets, 4, torch.device("cpu"))
        for scores, board in zip(both, boards, strict=True):
            scores.enter(board, silo, tally)
    found = []
    for scores, board in zip(both, boards, strict=True):
        board.share(lambda values: values)
        found.append(scores.figures(board, "abc")[1])
    for key, value in found[1].items():
        np.testing.assert_allclose(value, found[0][key], rtol=1e-12, err_msg=key)
    assert found[1].keys() == found[0].keys() - {"worst", "spread"}
