"""What `fedmpi check` tells of silos, time and memory, and to whom."""

import json
import math

import numpy as np
import pytest
from support.runs import put_back
from support.study import SILOS, no_gpu, samples, study
from typer.testing import CliRunner

from fedmpi.check import lines, skew
from fedmpi.cli import app
from fedmpi.data.files import parts_of

__all__ = ["no_gpu", "put_back", "study"]


def skewed(study):
    """Labels, sizes and one feature differ between silos; one silo has equal labels."""
    for number, silo in enumerate(SILOS):
        x, y = samples(number, 30 + 60 * number)
        y = np.where(np.arange(len(y)) % 10 < 8, number % 3, y)
        x[:, 1] += 3 * number
        y = y if number else np.zeros_like(y)
        study.arrays[silo] = {"x": x, "y": y}


def test_ranks_and_one_process_tell_the_same(study, monkeypatch):
    skewed(study)
    alone = study.check()
    four = study.check_on(4, monkeypatch)
    assert all(other == four[0] for other in four)
    assert [row["rank"] for row in four[0]["silos"]] == [0, 1, 2, 3]
    for row, other in zip(alone["silos"], four[0]["silos"], strict=True):
        assert row["labels"] == other["labels"]
        assert row["shift"] == other["shift"] and row["divergence"] == other["divergence"]
    assert json.dumps(alone["skew"]["labels"]) == json.dumps(four[0]["skew"]["labels"])
    for name in ("between", "chance"):
        assert alone["skew"]["features"][name] == pytest.approx(four[0]["skew"]["features"][name])
    assert alone["start"] == pytest.approx(four[0]["start"])


def test_divergence_and_share_of_variance_are_those_of_their_definitions(study):
    skewed(study)
    result = study.check()
    data = {}
    for silo in SILOS:
        with np.load(study.root / "data" / f"{silo}.npz") as file:
            train, _ = parts_of(len(file["y"]), 0.2, silo)
            data[silo] = file["x"][train], file["y"][train]
    counts = np.stack([np.bincount(y, minlength=3) for _, y in data.values()])
    pooled = counts.sum(0) / counts.sum()

    def kl(p, q):
        return sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True) if a)

    far = []
    for own in counts / counts.sum(1, keepdims=True):
        middle = (own + pooled) / 2
        far.append((kl(own, middle) + kl(pooled, middle)) / 2)
    assert [row["divergence"] for row in result["silos"]] == pytest.approx(far)
    assert result["skew"]["labels"]["divergence"] == pytest.approx(np.mean(far))
    assert result["skew"]["labels"]["counts"] == counts.sum(0).tolist()
    x = np.concatenate([x for x, _ in data.values()]).astype(float)
    between = sum(len(own) * (own.mean(0) - x.mean(0)) ** 2 for own, _ in data.values()) / len(x) / x.var(0)
    assert result["skew"]["features"]["between"] == pytest.approx(between.mean())
    first = result["skew"]["features"]["shown"][0]
    assert first["feature"] == "x[1]" and first["between"] == pytest.approx(between[1])
    width = 2 * skew.SPAN * x[:, 1].std() / skew.BINS
    assert first["quantiles"] == pytest.approx(np.quantile(x[:, 1], skew.QUANTILES), abs=width)
    advice = " ".join(result["skew"]["advice"])
    assert "labels differ strongly" in advice and "features differ between silos" in advice


def test_alike_silos_suggest_nothing(study):
    assert study.check()["skew"]["advice"] == ["nothing: labels, sizes and features are alike"]


@pytest.mark.parametrize("disclose", ["pooled", "cohort"])
def test_only_sums_are_told_unless_silos_are_disclosed(study, disclose, monkeypatch):
    skewed(study)
    study.config["disclose"] = disclose
    result = study.check_on(4, monkeypatch)[0]
    assert result["silos"] == [] and result["skew"]["labels"]["divergence"] > 0.1
    text = "\n".join(lines(result))
    assert f"disclose: {disclose}" in text and "most in" not in text and "farthest" not in text
    assert not result["warnings"] and any("single silos" in line for line in result["unseen"])
    sent = json.dumps(result)
    study.config["disclose"] = "silo"
    shown = study.check()
    assert len(shown["silos"]) == 4 and f"most in {shown['silos'][0]['silo']}" not in text
    for row in shown["silos"]:
        assert str(row["divergence"]) not in sent


def test_no_sum_leaves_a_rank_under_secure_aggregation(study, monkeypatch):
    pytest.importorskip("cryptography")
    skewed(study)
    study.config |= {"secure": {"name": "secagg", "threshold": 3}, "exchange": {"plan": "replicated"}}
    result = study.check_on(4, monkeypatch)[0]
    assert result["faults"] == [] and any("`secure`" in line for line in result["unseen"]), lines(result)
    assert result["num_test"] > 0 and result["missing"] is None and "missing" not in lines(result)[0]
    assert result["silos"] == [] and result["skew"]["silos"] == 0 and set(result["start"].values()) == {None}
    assert result["skew"]["labels"] == {} and result["skew"]["features"] == {}


def test_time_and_memory_are_estimated(study):
    study.timing, study.ranks = True, 2
    study.config |= {"rounds": 10}
    result = study.check()
    took = result["estimate"]["seconds"]
    assert took["timed"] == 6 and took["batch"] > 0 and took["exchange"] is None
    assert took["train"] == pytest.approx(12 * took["batch"])  # two silos of 48 samples on a rank, batches of 8
    assert took["run"] == pytest.approx(10 * took["round"])
    assert len(result["estimate"]["memory"]["ranks"]) == 2 and result["estimate"]["memory"]["limit_bytes"] > 1 << 28
    assert any(line.startswith("time: a round about") for line in lines(result))


def test_the_command_prints_lines_and_ends_with_2_for_a_fault(study, monkeypatch):
    monkeypatch.chdir(study.root)
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "FEDMPI_RANKS"):
        monkeypatch.delenv(variable, raising=False)
    study.write()
    done = CliRunner().invoke(app, ["check", "config.yaml", "--no-timing"])
    assert done.exit_code == 0 and "no fault found" in done.stdout and "a     0     48     12" in done.stdout
    done = CliRunner().invoke(app, ["check", "config.yaml", "local.lr=0", "--no-timing"])
    assert done.exit_code == 2 and "fault: local.lr: input should be greater than 0, got 0" in done.stdout
    done = CliRunner().invoke(app, ["check", "config.yaml", "--no-timing", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["faults"] == []


def test_plan_says_what_it_did_not_look_at(study, monkeypatch):
    monkeypatch.chdir(study.root)
    study.write()
    done = CliRunner().invoke(app, ["plan", "config.yaml"])
    assert "not looked at: files, samples, model and loss on them, speed, out; `fedmpi check` does" in done.stdout
