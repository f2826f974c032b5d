"""Figures of merit: FOM lines, one JSON schema, MLPerf-style logs, time to quality, scaling."""

import functools
import json
import math
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.mpi import FEDMPI, Done, mpirun

from fedmpi.bench import checkpoint, codecs, exchange, figures, quality, scaling
from fedmpi.bench.figures import Figure, Style
from fedmpi.cli.bench import bench as bench_commands
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError

TOP = Path(__file__).parents[2]
DIRECTIVES = (*("tags", "executable", "workload", "workload_variable", "figure_of_merit", "success_criteria"),)
KEYS = ["schema", "benchmark", "started", "seconds", "system", "settings", "figures", "rows"]
DIGITS = ("configs/digits.yaml", "local.epochs=2")


def bench(n: int, *arguments: str) -> Done:
    return mpirun(n, FEDMPI, "bench", *arguments, timeout_s=120)


def found(style: Style = Style.JSON) -> str:
    rows = [{"codec": "int8", "params": 100, "seconds": {"median": 0.5}}]
    values = [Figure("x.seconds", 0.5, "s"), Figure("x.lost", math.nan, "s")]
    result = figures.result(SoloComm(), "x", {"params": 100}, rows, values, 12.0)
    return figures.text(result, ["codec", "median_s"], style)


def test_one_schema() -> None:
    told = json.loads(found())
    assert list(told) == KEYS and told["schema"] == figures.SCHEMA
    assert told["started"] == "1970-01-01T00:00:12Z" and told["system"]["ranks"] == 1
    assert told["figures"] == [{"name": "x.seconds", "value": 0.5, "unit": "s"}]  # NaN is no figure, and no JSON


def test_text_is_the_table_and_a_line_for_each_figure() -> None:
    assert found(Style.TEXT).splitlines()[1:] == ["    int8    0.5000", "", "FOM x.seconds 0.5 s"]


def test_an_mllog_line() -> None:
    (line,) = found(Style.MLLOG).splitlines()
    fields = json.loads(line.removeprefix(":::MLLOG "))
    assert (fields["key"], fields["value"], fields["metadata"]) == ("x.seconds", 0.5, {"unit": "s"})


def test_two_styles_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="--json and --mllog"):
        Style.of(True, True)


def test_names_of_figures_are_single_words_and_differ() -> None:
    rows: list[dict[str, Any]] = [
        *exchange.exchange(SoloComm(), 3000, 1, [exchange.channel("{name: topk, ratio: 0.02}")]),
        *exchange.exchange(SoloComm(), 3000, 1, [exchange.channel("topk")])[-2:-1],
    ]
    names = [one.name for one in exchange.figures(rows) if one.unit == "s"]
    assert "exchange.sharded.topk-ratio-0.02.seconds" in names and "exchange.sharded.topk.seconds" in names
    assert "exchange.sharded.seconds" in names  # float32
    assert not any(" " in name for name in names) and len(set(names)) == len(names)
    bandwidth = {one.name: one.value for one in exchange.figures(rows) if one.unit == "GB/s"}
    assert bandwidth["exchange.memcpy.bandwidth"] == pytest.approx(4 * 3000 / rows[0]["seconds"]["median"] / 1e9)


def test_figures_of_codecs_and_checkpoints() -> None:
    row = {"codec": "int8", "params": 10**9, "seconds": {"median": 2.0}, "add_s": 4.0, "wire_bytes_per_param": 1.0}
    assert [one.value for one in codecs.figures([row])] == [2.0, 1.0, 1.0]
    row = {"waited": 0.1, "ratio": 1.5, "params": 10**9, "write_s": 2.0, "resume_s": 3.0}
    assert [one.value for one in checkpoint.figures(row)] == [0.1, 1.5, 2.0, 3.0]


def test_no_time_to_quality_if_one_run_misses_the_target() -> None:
    rows = [{"reached": i > 0, "to_target_s": None if i == 0 else 1.0, "rounds": 2} for i in range(4)]
    by_name = {one.name: one.value for one in quality.figures(rows, 60.0)}
    assert math.isnan(by_name["quality.time"])
    assert by_name["quality.reached"] == 0.75 and by_name["quality.models"] == 3


@pytest.mark.mpi
def test_time_to_quality_on_two_ranks() -> None:
    done = bench(2, "quality", *DIGITS, "--target", "0.9", "--runs", "3", "--json")
    assert done.rc == 0, done.tails
    told = json.loads(done.out)
    assert list(told) == KEYS
    rows = told["rows"]
    assert [row["seed"] for row in rows] == [rows[0]["seed"] + i for i in range(3)]
    assert all(row["reached"] and row["value"] >= 0.9 and row["metric"] == "accuracy" for row in rows)
    by_name = {one["name"]: one["value"] for one in told["figures"]}
    assert by_name["quality.time"] == sorted(row["to_target_s"] for row in rows)[1]
    assert by_name["quality.time"] < told["seconds"]


@pytest.mark.mpi
def test_a_target_that_is_not_reached_fails_with_one_line() -> None:
    done = bench(2, "quality", *DIGITS, "rounds=1", "--target", "1", "--runs", "3", "--mllog")
    assert done.rc == 1, done.tails
    assert "no time to quality: seeds 0, 1, 2 did not reach 1 in 1 rounds" in done.err
    keys = [json.loads(line.removeprefix(":::MLLOG ")) for line in done.out.splitlines() if line.startswith(":::")]
    stops = [row["metadata"]["status"] for row in keys if row["key"] == "run_stop"]
    assert stops == ["aborted"] * 3 and "quality.time" not in [row["key"] for row in keys]


@pytest.mark.mpi
def test_scaling_on_three_ranks(tmp_path: Any) -> None:
    figure = tmp_path / "scaling.svg"
    options = ("--params", "2e4", "--repeats", "1", "--rounds", "2", "--codec", "identity", "--figure", str(figure))
    done = bench(3, "scaling", *options, "--json")
    assert done.rc == 0, done.tails
    rows = json.loads(done.out)["rows"]
    assert [(row["kind"], row["ranks"], row["silos"]) for row in rows] == [
        *[("exchange", n, n) for n in (1, 2, 3)],
        *[("strong", n, 3) for n in (1, 2, 3)],
        *[("weak", n, n) for n in (1, 2, 3)],
    ]
    seconds = [row["seconds"]["median"] for row in rows]
    assert rows[4]["efficiency"] == pytest.approx(seconds[3] / (2 * seconds[4]))
    assert rows[8]["efficiency"] == pytest.approx(seconds[6] / seconds[8])
    assert figure.read_text().lstrip().startswith("<?xml")


def test_counts_of_ranks() -> None:
    assert [scaling.counts(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]


def test_ramble_reads_the_lines_that_benchmarks_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application definition with stand-ins for Ramble's directives, which note their arguments."""
    said: dict[str, list[Any]] = {}
    kit: Any = types.ModuleType("ramble.appkit")
    kit.ExecutableApplication = object
    for name in DIRECTIVES:
        setattr(
            kit,
            name,
            functools.partial(lambda name, *given, **named: said.setdefault(name, []).append((given, named)), name),
        )
    monkeypatch.setitem(sys.modules, "ramble", types.ModuleType("ramble"))
    monkeypatch.setitem(sys.modules, "ramble.appkit", kit)
    runpy.run_path(str(TOP / "jobs/bench/suite/ramble/applications/fedmpi/application.py"))
    (((name,), merit),) = said["figure_of_merit"]
    line = re.search(merit["fom_regex"], f"# table\n{Figure('x.seconds', 0.5, 's')}\n", re.MULTILINE)
    assert line is not None and name.format(**line.groupdict()) == "x.seconds"
    assert (line[merit["group_name"]], merit["units"].format(**line.groupdict())) == ("0.5", "s")
    known = {command.name for command in bench_commands.registered_commands}
    executables = {given[0]: given[1].split() for given, _ in said["executable"]}
    assert {words[2] for words in executables.values()} <= known
    assert {given[0] for given, _ in said["workload"]} == executables.keys()
    variables = {given[0]: named["workloads"] for given, named in said["workload_variable"]}
    for one, words in executables.items():
        assert {word[1:-1] for word in words if word[0] == "{"} == {
            key for key, ones in variables.items() if one in ones
        }


@pytest.mark.mpi
def test_all_benchmarks_in_one_file(tmp_path: Any) -> None:
    path = tmp_path / "results/mine.json"
    done = bench(2, "all", "--minutes", "0.1", "--params", "2e4", "--save", str(path))
    assert done.rc == 0, done.tails
    told = json.loads(path.read_text())
    assert list(told) == [*KEYS, "doctor", "parts"]
    assert list(told["parts"]) == ["codecs", "exchange", "checkpoint", "scaling", "quality"]
    assert all(list(part) == KEYS for part in told["parts"].values())
    names = [one["name"] for one in told["figures"]]
    assert names == [one["name"] for part in told["parts"].values() for one in part["figures"]]
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("FOM ")] == names
    assert told["doctor"]["ranks"] and len(told["parts"]["quality"]["rows"]) == 3
