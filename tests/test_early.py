"""stop.early: a run ends by a metric, on all ranks, and stays ended; a resumed run does not forget its patience."""

import json

import pytest
import torch
from support.mpi import PYTHON, mpirun
from support.runs import config, everything, figures, refused, run
from typer.testing import CliRunner

from fedmpi import checkpoint, results, stopping
from fedmpi.cli import app
from fedmpi.compare.grid import Cell, is_done
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.health import EarlySection, Progress
from fedmpi.report.reading import read_run
from fedmpi.report.status import status


def plain(values, maximize, target=None, patience=None, min_delta=0.0):
    """The 1-based evaluation after which a run ends; None if it does not."""
    best, stale = None, 0
    for number, value in enumerate(values, 1):
        better = best is None or (value > best + min_delta if maximize else value < best - min_delta)
        best, stale = (value, 0) if better else (best, stale + 1)
        reached = target is not None and (value >= target if maximize else value <= target)
        if reached or (patience is not None and stale >= patience):
            return number
    return None


UP = [0.5, 0.6, 0.6, 0.61, 0.59, 0.58, 0.8, 0.7, 0.7, 0.7]


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {"target": 0.61},
        {"target": 0.8},
        {"patience": 1},
        {"patience": 2},
        {"patience": 3},
        {"patience": 2, "min_delta": 0.05},
        {"target": 0.9, "patience": 4},
    ],
    ids=str,
)
def test_it_ends_where_the_plain_rule_ends(how, maximize):
    values = UP if maximize else [-value for value in UP]
    how = how if maximize or "target" not in how else {**how, "target": -how["target"]}
    progress, ended = Progress(EarlySection(**how), "m", maximize, 1, 100), None
    for number, value in enumerate(values, 1):
        progress.hear({"round": number, "m": value})
        if progress.ended:
            ended = number
            break
    assert ended == plain(values, maximize, **how)


def test_rounds_without_an_evaluation_do_not_count_and_an_undefined_metric_is_no_better():
    progress = Progress(EarlySection(patience=2), "m", True, 2, 100)
    told = {1: 9.0, 2: 0.5, 3: None, 4: None, 5: 9.0, 6: 0.5}
    ended = []
    for number, value in told.items():
        progress.hear({"round": number, "m": value})
        ended.append(bool(progress.ended))
    assert ended == [False] * 5 + [True]


STALLS = {"lr": 1e-9}  # so no metric moves
EARLY = {"stop": {"early": {"metric": "accuracy", "patience": 3}}}


def test_a_run_ends_in_good_order_and_stays_ended(tmp_path):
    records, ended = run(config(tmp_path, 20, local=STALLS, **EARLY))
    assert [r["round"] for r in records] == [1, 2, 3, 4] and ended.ended.startswith("accuracy has not improved for ")
    assert (tmp_path / "model.safetensors").exists() and checkpoint.sealed_rounds(tmp_path)[-1] == 4
    assert stopping.ended(tmp_path) == (4, ended.ended)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path), "--done"])
    assert shown.exit_code == 0 and "ended early    accuracy has not improved for " in shown.stdout
    assert "stop.early     accuracy: patience 3\n" in shown.stdout
    before = everything(tmp_path)
    assert run(config(tmp_path, 20, local=STALLS, **EARLY))[0] == []
    assert run(config(tmp_path, 30, local=STALLS, **EARLY))[0] == [] and everything(tmp_path) == before
    patient = {"stop": {"early": {"metric": "accuracy", "patience": 5}}}
    assert [r["round"] for r in run(config(tmp_path, 20, local=STALLS, **patient))[0]] == [5, 6]
    assert [r["round"] for r in run(config(tmp_path, 8, local=STALLS))[0]] == [7, 8]
    assert stopping.ended(tmp_path) == (-1, "") and results.inspect(tmp_path)["ended"] is None


def test_a_resumed_run_remembers_how_long_it_has_waited(tmp_path):
    """Left after each round; checkpoints are written on leaving, so each start resumes the last round."""
    rounds = []
    for _ in range(6):
        rounds += [r["round"] for r in run(config(tmp_path / "a", 20, local=STALLS, **EARLY), rounds=1)[0]]
    assert rounds == [1, 2, 3, 4]
    run(config(tmp_path / "b", 20, local=STALLS, **EARLY))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_another_metric_begins_to_count_anew(tmp_path):
    run(config(tmp_path, 20, local=STALLS, **EARLY))
    other = {"stop": {"early": {"metric": "train_loss", "patience": 2, "min_delta": 0.5}}}
    assert [r["round"] for r in run(config(tmp_path, 20, local=STALLS, **other))[0]] == [5, 6, 7]


@pytest.mark.parametrize(
    "how",
    [
        {"engine": {"name": "buffered", "size": 2, "clock": "virtual"}},
        {"disclose": "pooled"},
        {"exchange": {"overlap": True}},
        {"evaluate": {"every": 2}},
        {"server": {"average": {"decay": 0.5}}},
    ],
    ids=lambda how: next(iter(how)),
)
def test_other_ways_of_training_end_where_the_plain_rule_ends_and_train_the_same_bits(tmp_path, how):
    every = how.get("evaluate", {}).get("every", 1)
    long, _ = run(config(tmp_path / "long", 14, checkpoint={"every": 1, "keep": 20}, **how))
    values = [r["loss"] for r in long if r["round"] % every == 0 or r["round"] == 14]
    target = values[2]
    early = {"stop": {"early": {"metric": "loss", "target": target}}}
    short, ended = run(config(tmp_path / "short", 14, **early, **how))
    last = every * plain(values, False, target=target)
    assert [figures(r) for r in short] == [figures(r) for r in long[:last]] and ended.ended
    assert f"loss is {target:.6g}" in ended.ended
    server = checkpoint.read_server(tmp_path / "long", last), checkpoint.read_server(tmp_path / "short", last)
    assert torch.equal(server[0][checkpoint.PARAMS], server[1][checkpoint.PARAMS])


def test_the_best_round_is_kept(tmp_path):
    _, ended = run(config(tmp_path, 20, local=STALLS, checkpoint={"every": 100}, **EARLY))
    assert results.choose(tmp_path, "best") == 1 and checkpoint.sealed_rounds(tmp_path)[-1] == 4
    assert ended.state.round == 4


def test_a_run_whose_last_round_meets_the_target_has_not_ended_early(tmp_path):
    """But it stays ended with more rounds."""
    run(config(tmp_path, 4, local=STALLS, **EARLY))
    assert stopping.ended(tmp_path) == (-1, "") and results.inspect(tmp_path)["ended"] is None
    assert run(config(tmp_path, 6, local=STALLS, **EARLY))[0] == [] and stopping.ended(tmp_path)[0] == 4


def test_reports_and_grids_know_why_it_ended(tmp_path):
    _, ended = run(config(tmp_path, 20, local=STALLS, **EARLY))
    told = status(read_run(tmp_path))
    assert (told.word, told.good, told.text) == ("finished early", True, f"4 of 20 rounds: {ended.ended}")
    for how, done in ((EARLY, True), ({"stop": {"early": {"metric": "accuracy", "patience": 5}}}, False), ({}, False)):
        assert is_done(Cell("p", "a", 0, config(tmp_path, 20, local=STALLS, **how))) is done


FINETUNED = {"evaluate": {"finetune": {"name": "sgd", "lr": 1, "epochs": 1}}}
PRIVATE = {
    "privacy": {"name": "silo", "clip": 1.0, "sigma": 1.0, "delta": 1e-5},
    "select": {"name": "poisson", "rate": 1},
}


@pytest.mark.parametrize(
    ("early", "values", "message"),
    [
        ({}, {}, "give 'target', 'patience' or both"),
        ({"target": float("nan")}, {}, "finite number"),
        ({"patience": 1}, FINETUNED, "evaluate.finetune tunes"),
        (
            {"patience": 1},
            {"transport": {"name": "files", "root": "x"}, "engine": "buffered"},
            "engine: buffered silos score different versions",
        ),
        ({"patience": 1}, PRIVATE, "the metric has no noise"),
        ({"patience": 1}, {"rounds": 4, "exchange": {"regions": {"every": 2}}}, "regions.every"),
    ],
)
def test_what_it_does_not_go_with_is_refused(early, values, message):
    with pytest.raises(ConfigError, match="stop") as caught:
        build(Config, {"stop": {"early": early}, **values})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_metric_that_no_record_has_is_refused(tmp_path):
    how = config(tmp_path, 3, stop={"early": {"metric": "acuracy", "patience": 2}})
    assert refused(how) == "stop.early.metric: records have no 'acuracy'; did you mean 'accuracy'?"


PROGRAM = """
import sys
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.train import Run
out, secure = sys.argv[1], sys.argv[2] == "secure"
values = {"rounds": 30, "out": out, "data": {"name": "digits", "silos": 4}, "model": "logistic",
          "local": {"name": "sgd", "lr": 0.1, "epochs": 1}, "stop": {"early": {"target": 0.8}}}
if secure:
    values["secure"] = {"name": "secagg", "threshold": 3}
with Run(build(Config, values)) as run:
    records = list(run)
reached = [r["accuracy"] >= 0.8 for r in records]
assert reached == [False] * (len(records) - 1) + [True] and run.ended, (reached, run.ended)
if run.comm.rank == 0:
    print("rounds", len(records))
"""


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["open", "secure"])
def test_all_ranks_end_in_the_same_round(tmp_path, what):
    done = mpirun(2, PYTHON, "-c", PROGRAM, str(tmp_path), what, timeout_s=120)
    assert done.rc == 0 and "rounds" in done.out, done.tails
    assert json.loads((tmp_path / "ended.json").read_text())["round"] > 1
