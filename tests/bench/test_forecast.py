"""`fedmpi plan --link`: seconds of exchanges from a rate, a latency and a saved benchmark."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpi.bench import forecast
from fedmpi.bench.exchange import channel
from fedmpi.bench.figures import SCHEMA
from fedmpi.cli import app
from fedmpi.errors import ConfigError
from fedmpi.exchange.config import ExchangeSection

P, N = 1_000_000, 4
COSTS = [
    {"plan": "sharded", "codec": "identity", "params": 2 * P, "seconds": {"median": 0.2}},
    {"plan": "sharded", "codec": "int8", "params": 2 * P, "seconds": {"median": 0.02}},
    {"plan": "memcpy", "codec": None, "params": 2 * P, "seconds": {"median": 0.01}},
]


def by_name(rows: list[dict[str, Any]]) -> dict[tuple[str, str | None], dict[str, Any]]:
    return {(row["plan"], row["codec"]): row for row in rows}


def test_a_sharded_exchange_sends_what_the_equation_says() -> None:
    rows = forecast.forecast(ExchangeSection(plan="sharded"), P, N, 1e9, 1e-3)
    row = rows[0]
    assert row["configured"] and (row["plan"], row["codec"]) == ("sharded", None)
    # Each rank sends 3 of 4 shards up and its own to 3 others down, in float32.
    assert row["wire_s"] == pytest.approx(2 * 3 / 4 * 4 * P * 8 / 1e9, rel=1e-3)
    assert row["latency_s"] == 2e-3 and row["computing_s"] is None
    assert row["at_least_s"] == row["at_most_s"] == row["wire_s"] + 2e-3
    root = by_name(rows)["root", None]
    assert root["latency_s"] == 4e-3  # two trees of depth 2
    assert root["wire_s"] == pytest.approx(2 * 4 * P * 8 / 1e9)  # a vector up, and only then one down
    int8 = by_name(rows)["sharded", "int8"]
    assert int8["wire_s"] / row["wire_s"] == pytest.approx(1.0156 / 4, rel=1e-2)


def test_computing_comes_from_the_file_by_parameter() -> None:
    rows = forecast.forecast(ExchangeSection(plan="sharded"), P, N, 1e12, 1e-9, COSTS)
    row = rows[0]
    assert row["computing_s"] == pytest.approx(0.1)
    assert row["at_least_s"] == pytest.approx(0.1) and row["at_most_s"] == pytest.approx(0.1 + row["wire_s"])
    found = by_name(rows)
    assert found["sharded", "int8"]["computing_s"] == pytest.approx(0.01)
    assert found["root", None]["computing_s"] is None
    others = [one["at_least_s"] for one in rows[1:]]
    assert others == sorted(others)


def test_codecs_of_the_file_are_rows() -> None:
    own = channel("{name: topk, ratio: 0.2}")
    costs = [{"plan": "sharded", "codec": "{name: topk, ratio: 0.2}", "params": P, "seconds": {"median": 0.2}}]
    found = by_name(forecast.forecast(ExchangeSection(plan="root"), P, N, 1e9, 1e-3, costs))
    assert found["sharded", "{name: topk, ratio: 0.2}"]["computing_s"] == pytest.approx(0.2)
    assert own.feedback


def test_one_rank_sends_nothing() -> None:
    row = forecast.forecast(ExchangeSection(plan="root"), P, 1, 1e9, 1e-3)[0]
    assert row["wire_s"] == row["latency_s"] == 0


@pytest.mark.parametrize("text", ["1", "gbit", "-1gbit", "0gbit", "1gbut", "1e999gbit"])
def test_rates_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--link"):
        forecast.rate(text)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with pytest.raises(ConfigError, match="cannot read"):
        forecast.read(path)
    for text in ("[]", "{}", "no", json.dumps({"schema": SCHEMA, "benchmark": "codecs", "rows": []})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="give a file of"):
            forecast.read(path)


def test_the_file_of_all_benchmarks_and_no_row_twice(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    plain = {"plan": "sharded", "codec": "bf16", "params": P, "seconds": {"median": 0.2}}
    part = {"schema": SCHEMA, "benchmark": "exchange", "rows": [plain, *COSTS]}
    path.write_text(json.dumps({"schema": SCHEMA, "benchmark": "all", "rows": [], "parts": {"exchange": part}}))
    costs = forecast.read(path)
    assert costs == part["rows"]
    rows = forecast.forecast(ExchangeSection(plan="root"), P, N, 1e9, 1e-3, costs)
    assert len(by_name(rows)) == len(rows)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"schema": SCHEMA, "benchmark": "exchange", "rows": COSTS}))
    run = ["plan", "configs/digits.yaml", "--ranks", "4", "--json"]
    plain = json.loads(CliRunner().invoke(app, run).stdout)
    assert plain["links"] is None
    told = CliRunner().invoke(app, [*run, "--link", "1gbit", "--latency", "1ms", "--costs", str(path)])
    rows = json.loads(told.stdout)["links"]
    assert rows[0]["configured"] and rows[0]["plan"] == plain["plan"].replace("shared_memory", "sharded")
    refused = {
        ("--costs", str(path)): "--costs needs --link",
        ("--link", "1gbit", "exchange.regions={}"): "--link: its model knows no regions",
        ("--link", "1"): "--link 1: give a positive number and its unit",
    }
    for options, says in refused.items():
        done = CliRunner().invoke(app, [*run, *options])
        assert done.exit_code == 2 and says in done.stderr, done.output
