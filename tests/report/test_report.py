"""`fedmpi report`: what stands on the page is what the run directory holds, for any run, and the page is sound."""

import base64
import hashlib
import json
import math
import re
from html import unescape

import numpy as np
import pytest
from support.pages import Page, directory, page, record, sound
from support.runs import config
from typer.testing import CliRunner

import fedmpi
from fedmpi import stopping
from fedmpi.cli import app
from fedmpi.comm import SoloComm
from fedmpi.errors import ConfigError, Diverged
from fedmpi.records import PHASES, read_metrics
from fedmpi.report import write
from fedmpi.report.blocks import Chart, Drawing, Section, Table
from fedmpi.report.drawings import strip
from fedmpi.report.history import gather
from fedmpi.report.numbers import thin
from fedmpi.report.page import Answer, render
from fedmpi.report.page import Page as Whole
from fedmpi.report.reading import read_run
from fedmpi.report.sections.participation import states
from fedmpi.report.trace import read_phases

SILOS = ["a", "b", "c", "d"]
METRICS = ["accuracy", "macro_f1", "confusion_matrix"]


def lines_of(root):
    """The oracle: metrics.jsonl, a line at a time."""
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three silos and five rounds, every second one evaluated, that was stopped after three and resumed."""
    root = tmp_path_factory.mktemp("trained") / "run"
    values = {
        "rounds": 5,
        "data": {"name": "digits", "silos": 3},
        "objective": {"metrics": METRICS},
        "evaluate": {"every": 2},
        "local": {"name": "sgd", "lr": 0.1, "epochs": 1},
        "checkpoint": {"every": 1},
    }
    for rounds in (3, 5):
        with fedmpi.Run(config(root, **{**values, "rounds": rounds}), comm=SoloComm()) as run:
            list(run)
    return root


def test_a_page_is_sound_and_loads_nothing(trained):
    found = page(trained)
    sound(found)
    assert found.resources == [] and "@import" not in found.html and "url(http" not in found.html
    style = re.search(r"<style>(.*?)</style>", found.html, re.DOTALL)[1]
    assert "url(" not in style
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', found.html)[1])
    assert policy.startswith("default-src 'none'") and "http:" not in policy and "script-src 'sha256" in policy
    run_by_browser = [text for text in found.scripts if not text.startswith('{"chart')]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run_by_browser]
    assert len(hashes) == 2 and all(f"'sha256-{one}'" in policy for one in hashes)


def test_the_figures_are_those_of_the_records(trained):
    found, lines = page(trained), lines_of(trained)
    evaluated = [line for line in lines if "accuracy" in line]
    assert [line["round"] for line in evaluated] == [2, 3, 4, 5]  # 3 was the last round once
    chart = found.under("Accuracy by round")
    by_name = {trace["name"]: trace for trace in chart["traces"] if trace.get("label")}
    assert by_name["all silos"]["y"] == [line["accuracy"] for line in evaluated]
    assert by_name["all silos"]["over"]["round"] == [2, 3, 4, 5]
    assert by_name["worst silo"]["y"] == [line["worst"]["accuracy"] for line in evaluated]
    spent = np.cumsum([line["seconds"]["round"] for line in lines])
    assert by_name["all silos"]["over"]["seconds"] == pytest.approx(spent[1:].tolist())
    sent = np.cumsum([line["bytes_up"] + line["bytes_down"] for line in lines])
    assert by_name["all silos"]["over"]["bytes"] == pytest.approx((sent[1:] / 1e6).tolist())
    low, high = (trace["y"] for trace in chart["traces"] if trace["name"].startswith("the middle"))
    assert low == pytest.approx([line["spread"]["p10"] for line in evaluated])
    ninth = [np.percentile([row["accuracy"] for row in line["silos"].values()], 90) for line in evaluated]
    assert high == pytest.approx(ninth)
    losses = {trace["name"]: trace["y"] for trace in found.under("Loss by round")["traces"]}
    assert losses["training loss"] == [line["train_loss"] for line in lines]
    assert losses["test loss"] == [line["loss"] for line in evaluated]

    rows = found.table("round", "seconds")
    for line in evaluated:
        assert rows[str(line["round"])]["accuracy"] == line["accuracy"]
        assert rows[str(line["round"])]["which"] == line["worst"]["silo"]
    last = lines[-1]
    of_silos = found.table("silo", "rank")
    for silo, row in last["silos"].items():
        told = of_silos[silo]
        assert told["accuracy"] == row["accuracy"] and told["loss"] == row["loss"]
        assert told["test samples"] == row["num_test"] and told["training samples"] == row["num_train"]
    assert of_silos["silo-0"]["rounds trained"] == 5
    figures = found.table("figure")
    top = max(evaluated, key=lambda line: line["macro_f1"])
    assert figures["macro_f1"]["last"] == last["macro_f1"] and figures["macro_f1"]["highest"] == top["macro_f1"]
    assert f"(round {top['round']})" in str(found.tables) and figures["macro_f1"]["of round"] == 5
    matrix = found.table("", "0")
    for true, row in enumerate(last["confusion_matrix"]):
        assert [matrix[f"true {true}"][str(c)] for c in range(10)] == row
        assert matrix[f"true {true}"]["recall"] == pytest.approx(row[true] / sum(row))
    for word in ("up", "down"):
        total = sum(line[f"bytes_{word}"] for line in lines)
        assert re.search(rf'<dt>Bytes {word}</dt><dd data-value="{total}">', found.html)
    total_s = sum(line["seconds"]["round"] for line in lines)
    told = re.search(r'<dt>All rounds</dt><dd data-value="([^"]*)"', found.html)[1]
    assert float(told) == pytest.approx(total_s)


def test_bytes_and_seconds_are_sums_over_rounds(tmp_path):
    found = page(directory(tmp_path / "run", [record(number, SILOS) for number in (1, 2, 3)]))
    line = next(trace for trace in found.under("Accuracy by round")["traces"] if trace["name"] == "all silos")
    assert line["over"]["bytes"] == pytest.approx([3301e-6, 6603e-6, 9906e-6])  # tables included
    assert line["over"]["seconds"] == [0.875, 1.75, 2.625]
    up, down, tables_ = (trace["y"] for trace in found.under("Megabytes of a round")["traces"])
    assert up == pytest.approx([1001e-6, 1002e-6, 1003e-6]) and down == [2e-3] * 3 and tables_ == [3e-4] * 3
    rows = found.table("round", "up")
    assert [rows[str(n)]["up"] for n in (1, 2, 3)] == [1001, 1002, 1003] and rows["1"]["down"] == 2000
    for name, total in (("up", 3006), ("down", 6000), ("tables", 900)):
        assert f'<dt>Bytes {name}</dt><dd data-value="{total}">' in found.html
    assert "1.00 kB in a median round" in found.text  # up


def test_the_top_of_the_page_answers_in_a_few_words(trained):
    found, last = page(trained, title="My run"), lines_of(trained)[-1]
    head = found.text.partition("Contents")[0]
    assert "My run" in head and "✓ finished" in head and "5 of 5 rounds" in head
    assert f"{last['accuracy']:.4f}" in head and f"worst silo {last['worst']['silo']}" in head
    assert "Stopped and resumed: a later start went on with round 4." in head
    assert "<title>My run</title>" in found.html


def test_times_by_rank_and_round_are_those_of_the_trace(trained):
    events = [e for e in json.loads((trained / "trace.json").read_text()) if e["ph"] == "X" and e["name"] in PHASES]
    found = page(trained)
    rows = found.table("rank", "train, s")
    for phase in PHASES:
        spent = sum(event["dur"] for event in events if event["name"] == phase) / 1e6
        assert rows["rank 0"][f"{phase}, s"] == pytest.approx(spent)
    assert rows["rank 0"]["sum, s"] == pytest.approx(sum(event["dur"] for event in events) / 1e6)
    of_round = found.table("round", "train, s")
    for number in range(1, 6):
        spent = sum(event["dur"] for event in events if event["args"]["round"] == number) / 1e6
        assert of_round[str(number)]["sum, s"] == pytest.approx(spent)


def test_a_round_that_was_trained_again_counts_once_by_round_and_twice_by_rank(tmp_path):
    def event(rank, round, start, seconds):
        args = {"round": round}
        times = {"ts": start * 1e6, "dur": seconds * 1e6}
        return json.dumps({"name": "train", "ph": "X", "pid": rank, "tid": 0, **times, "args": args})

    told = [(0, 1, 10, 2), (1, 1, 10, 4), (0, 2, 14, 8), (1, 2, 14, 6), (0, 2, 30, 1), (1, 2, 30, 3)]
    (tmp_path / "trace.json").write_text("[\n" + ",\n".join(event(*one) for one in told) + ',\n{"name": "tra')
    found, train = read_phases(tmp_path), PHASES.index("train")
    assert {rank: found.of_rank[rank][train] for rank in found.ranks} == {0: 11.0, 1: 13.0}
    assert {round: row[train] for round, row in found.of_round.items()} == {1: 3.0, 2: 2.0}
    assert (found.repeated_s, found.began_s, found.ended_s) == (7.0, 10.0, 33.0)
    assert found.idle_s == 33 - 10 - (3 + 7 + 2)  # a rank that is not in all rounds does not count as idle
    told = [(0, 1, 10, 2), (1, 1, 10, 2), (0, 2, 12, 2)]
    (tmp_path / "trace.json").write_text("[\n" + ",\n".join(event(*one) for one in told) + "\n]\n")
    assert read_phases(tmp_path).idle_s == 0.0
    (tmp_path / "trace.json").write_text("[\n]\n")
    assert read_phases(tmp_path) is None


# ---------------------------------------------------------------- runs of all kinds

EVIL = ["<script>alert(1)</script>", "<b>bold</b> & co", '"\'quoted"', "plain"]


def test_what_users_name_is_text(tmp_path):
    records = [record(number, EVIL) for number in (1, 2)]
    records[1]["late"] = {EVIL[0]: "partial"}
    records[1]["deadline_s"] = 1.0
    found = page(directory(tmp_path / "<i>run", records, init="<img src=x>"), title="<script>title</script>")
    sound(found)
    assert len(found.scripts) == 3 and "alert(1)" not in "".join(found.scripts[1:])
    assert "<i>" not in found.html and "<img" not in found.html and "<b>" not in found.html.partition("<script>")[0]
    for name in EVIL:
        assert name in found.text
    names = found.under("Accuracy of each silo, round 2")["layout"]["yaxis"]["ticktext"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in [name.replace("…", "") for name in names] or any(
        name.startswith("&lt;script&gt;") for name in names
    )


def test_data_of_charts_cannot_end_their_script():
    text = "</script><script>alert(1)</script><!--"
    chart = Chart(title=text, alt=text, traces=[{"name": text, "x": [1], "y": [2]}], table=Table([text], [[text]]))
    drawing = Drawing(title=text, alt=text, svg=strip([text], [1], [["full"]]), table=Table([text], [[text]]))
    found = Page(render(Whole(text, text, [Answer(text, text, [text])], [Section("a", text, [chart, drawing])], text)))
    assert found.faults == [] and len(found.scripts) == 3
    assert found.under(text)["traces"][0]["name"] == text


def half(number, **changes):
    return record(number, SILOS) | changes


def without(number, *names):
    return {k: v for k, v in record(number, SILOS).items() if k not in names}


NONE = ("accuracy", "loss", "worst")
RUNS = {
    "one_round": ([half(1)], {}, True, "finished"),
    "no_round": ([], {}, False, "no round"),
    "not_evaluated": ([without(1, *NONE), without(2, *NONE)], {}, False, "No round is evaluated yet"),
    "some_evaluated": ([without(1, *NONE), half(2), without(3, *NONE)], {}, True, "finished"),
    "ended_early": ([half(1), half(2)], {"rounds": 9}, False, "ended early"),
    "not_finite": (
        [half(1), half(2, accuracy=None, loss=None, train_loss=None), half(3)],
        {},
        True,
        "not finite in 1 ",
    ),
    "never_finite": ([half(1, accuracy=None, loss=None, train_loss=None, worst=None)], {}, True, "not finite in 1 "),
    "missing_rounds": ([half(1), half(4)], {}, True, "lacks 2 rounds"),
    "no_silo_rows": ([half(1, silos={}), half(2, silos={})], {}, True, "finished"),
    "rejected": ([half(1, rejected=["a"]), half(2, not_finite=["b"])], {}, True, "1 update rejected"),
}


@pytest.mark.parametrize("name", RUNS)
def test_any_run_makes_a_sound_page(tmp_path, name):
    records, values, done, words = RUNS[name]
    found = page(directory(tmp_path / name, records, done=done, **values))
    sound(found)
    assert words in found.text
    for chart in found.charts.values():
        assert any(v is not None for trace in chart["traces"] for v in trace["y"]) or "finite" in name


def test_gaps_are_gaps_and_rounds_without_evaluation_are_none(tmp_path):
    records = [half(1), without(2, *NONE), half(3, accuracy=None), half(4)]
    found = page(directory(tmp_path / "run", records))
    line = next(t for t in found.under("Accuracy by round")["traces"] if t["name"] == "all silos")
    assert line["over"]["round"] == [1, 3, 4] and line["y"][1] is None and None not in (line["y"][0], line["y"][2])


def test_a_run_that_goes_on_says_so(tmp_path, monkeypatch):
    root = directory(tmp_path / "run", [half(1), half(2)], done=False, rounds=5)
    with open(root / "metrics.jsonl", "ab") as file:
        file.write(b'{"round": 3, "cohor')  # being written
    monkeypatch.setattr(stopping, "is_training", lambda root: True)
    found = page(root)
    sound(found)
    assert "still running" in found.text and "2 of 5 rounds so far" in found.text and "damaged" not in found.text


def test_damage_is_told(tmp_path):
    root = directory(tmp_path / "run", [half(1), half(2), half(3)])
    lines = (root / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (root / "metrics.jsonl").write_bytes(lines[0] + lines[1].replace(b"0.25", b"0.26") + lines[2])
    found = page(root)
    assert "1 damaged line of metrics.jsonl left out" in found.text and "lacks 1 round;" in found.text
    assert [record["round"] for record in read_metrics(root)] == read_run(root).history.rounds.tolist()


@pytest.mark.parametrize(("value", "why"), [("pooled", "disclose: pooled"), ("cohort", "disclose: cohort")])
def test_without_figures_of_silos_the_page_says_so(tmp_path, value, why):
    records = [record(number, SILOS) for number in (1, 2, 3)]
    for one in records:
        one["silos"] = {silo: {"rank": 0, "num_train": 5} for silo in SILOS}
        del one["worst"]
    found = page(directory(tmp_path / "run", records, disclose=value))
    sound(found)
    assert why in found.text and "Accuracy of each silo, round 3" not in found.titles
    assert [trace["name"] for trace in found.under("Accuracy by round")["traces"] if trace.get("label")] == [
        "all silos"
    ]


def test_under_secure_aggregation_too(tmp_path):
    root = tmp_path / "run"
    values = {"rounds": 2, "data": {"name": "digits", "silos": 3}, "secure": {"name": "secagg"}}
    with fedmpi.Run(config(root, **values, updates=[{"name": "clip", "norm": 1.0}]), comm=SoloComm()) as run:
        list(run)
    found = page(root)
    sound(found)
    assert "Only sums over silos were ever seen" in found.text and "worst silo" not in found.text


def test_the_strip_tells_what_became_of_each_update(tmp_path):
    rows = record(1, SILOS)["silos"]
    records = [
        half(1, cohort=["a", "b"], rejected=["b"]),
        half(2, cohort=["a", "c"], late={"a": "partial", "c": "dropped"}, deadline_s=2.0),
        half(3, cohort=["b", "c"], late={"b": "buffered", "c": "void"}, deadline_s=2.0),
        half(4, cohort=["c"], stale={"b": 1}, silos={silo: rows[silo] for silo in "bcd"}),
        half(5, cohort=["b"], stale={"b": 1}),
    ]
    run = read_run(directory(tmp_path / "run", records, data={"name": "digits", "silos": 4}))
    found = {name: [(int(i) + 1, SILOS[j]) for i, j in np.argwhere(cells)] for name, cells in states(run).items()}
    assert found == {
        "full": [(1, "a"), (1, "b"), (2, "a"), (2, "c"), (3, "b"), (3, "c"), (4, "c"), (5, "b")],
        "rejected": [(1, "b")],
        "partial": [(2, "a")],
        "dropped": [(2, "c"), (3, "c")],
        "buffered": [(3, "b")],
        "stale": [(4, "b")],
        "away": [(4, "a")],
    }
    counts = page(run.root).table("silo", "rounds selected")
    assert counts["c"] == {"silo": "c", "rounds selected": 3, "share of rounds": 0.6, "partial": 0, "did not count": 2,
                           "buffered": 0, "older update only": 0, "rejected": 0, "no member": 0}  # fmt: skip
    assert "4 late updates from 3 silos" in page(run.root).text


def test_arrivals_are_counted_by_staleness(tmp_path):
    def arrival(silo, staleness, **more):
        return {"silo": silo, "at_s": 1.0, "version": 0, "staleness": staleness, "training": 0, **more}

    records = [half(1, arrivals=[arrival("a", 0), arrival("b", 2)]), half(2, arrivals=[arrival("a", 2, dropped=True)])]
    engine = {"name": "buffered", "size": 2, "staleness": "constant", "clock": {"name": "virtual"}}
    values = {"engine": engine, "aggregate": {"name": "mean", "weights": "uniform"}}
    found = page(directory(tmp_path / "run", records, **values))
    sound(found)
    rows = found.table("staleness")
    assert rows["0"] == {"staleness": "0", "counted": 1, "dropped": 0}
    assert rows["2"] == {"staleness": "2", "counted": 1, "dropped": 1} and "1 update too old to count" in found.text
    assert found.table("silo", "updates")["a"]["mean staleness"] == 1.0


def test_silos_in_jobs_of_their_own_are_told(tmp_path):
    records = [half(1), half(2)]
    root = directory(tmp_path / "run", records, transport={"name": "files", "root": str(tmp_path / "shared")})
    event = {"name": "train", "ph": "X", "pid": 0, "tid": 0, "ts": 1.0, "dur": 2.0, "args": {"round": 1}}
    (root / "trace.json").write_text(f"[\n{json.dumps(event)}\n]\n")
    found = page(root)
    sound(found)
    assert "4 silos in jobs of their own, 2 of 2 rounds" in found.text and "It is the server's job only" in found.text


def test_epsilon_and_its_budget(tmp_path):
    records = [half(number, epsilon=0.5 * number, delta=1e-5) for number in (1, 2, 3)]
    privacy = {"name": "silo", "clip": 0.5, "epsilon": 6, "delta": 1e-5}
    values = {"privacy": privacy, "aggregate": {"name": "mean", "weights": "uniform"}}
    found = page(directory(tmp_path / "run", records, **values))
    sound(found)
    spent, budget = found.under("Epsilon spent by round")["traces"]
    assert spent["y"] == [0.5, 1.0, 1.5] and budget["y"] == [6.0, 6.0]
    assert "epsilon 1.5, 25.0% of the budget" in found.text and "carry no noise" in found.text


def test_events_are_told(tmp_path):
    root = directory(
        tmp_path / "run", [half(1), half(2), half(3, seconds={"round": 1.0, "agree": 0.0})], rounds=9, done=False
    )
    lost = {"event": "lost", "round": 2, "ranks": [1], "silos": {"b": 0, "d": None}, "num_ranks": 1, "seconds": 0.5}
    stop = {"event": "stopped", "round": 3}
    (root / "events.jsonl").write_text(f"{json.dumps(lost)}\nnot json\n{json.dumps(stop)}\n")
    found = page(root)
    sound(found)
    line = next(t for t in found.under("Accuracy by round")["traces"] if t["name"] == "after a rank was lost")
    assert line["over"]["round"] == [3] and line["y"] == [3 / 7]
    assert "stopped on request" in found.text and "Lost rank 1 after round 2; d left." in found.text
    assert "Stopped and resumed" not in found.text  # round 3 follows the loss, not a new start
    (root / "events.jsonl").unlink()
    assert "Stopped and resumed: a later start went on with round 3" in page(root).text


@pytest.mark.parametrize(("maximize", "best", "rounds"), [(True, 0.75, 2), (False, 0.25, 3)])
def test_the_best_round_follows_the_direction_of_the_metric(tmp_path, maximize, best, rounds):
    records = [half(number, accuracy=value) for number, value in enumerate((0.5, 0.75, 0.25, 0.5), start=1)]
    found = page(directory(tmp_path / "run", records, about={"maximize": maximize}))
    assert f"best {best:.4f} (round {rounds})" in found.text.partition("Contents")[0]
    star = next(t for t in found.under("Accuracy by round")["traces"] if t["name"].startswith("best"))
    assert star["y"] == [best] and star["over"]["round"] == [rounds]


def test_the_reason_for_which_a_run_ended_is_told(tmp_path):
    root = tmp_path / "run"
    values = {"rounds": 3, "data": {"name": "digits", "silos": 3}, "local": {"name": "sgd", "lr": 1e9, "epochs": 1}}
    with pytest.raises(Diverged), fedmpi.Run(config(root, **values), comm=SoloComm()) as run:
        list(run)
    found = page(root)
    sound(found)
    assert "✗ ended early" in found.text and "every update was rejected" in found.text and "3 silos" in found.text


# ---------------------------------------------------------------- many rounds, many silos


def test_many_rounds_are_thinned_out_and_no_spike_is_lost(tmp_path):
    many = [f"silo-{i}" for i in range(70)]
    records = [record(number, SILOS) for number in range(1, 1501)]
    records[700]["accuracy"] = -3.0
    records[901]["loss"] = 44.0
    for one in records[-2:]:
        one.update(record(one["round"], many))
    records[-1]["late"], records[-1]["deadline_s"] = {"silo-69": "dropped"}, 1.0
    path = write([directory(tmp_path / "run", records)])
    assert path.stat().st_size < 3e6
    found = Page(path.read_text())
    sound(found)
    line = next(t for t in found.under("Accuracy by round")["traces"] if t["name"] == "all silos")
    assert len(line["y"]) < 500 and line["y"][line["over"]["round"].index(701)] == -3.0
    assert line["over"]["round"][0] == 1 and line["over"]["round"][-1] == 1500
    losses = {t["name"]: t for t in found.under("Loss by round")["traces"]}
    assert max(losses["test loss"]["y"]) == 44.0 and "of 1,500 rounds" in found.text
    assert "Shown are the 60 worst of 70 silos" in found.text and "rounds in 180 cells" in found.text


def test_thinning_keeps_ends_peaks_and_gaps():
    values = np.sin(np.arange(5000.0))
    values[1234], values[2000:3000] = 9.0, np.nan
    chosen = thin(5000, values, most=100)
    assert len(chosen) <= 102 and {0, 1234, 4999} <= set(chosen.tolist())
    assert np.isnan(values[chosen]).any() and np.nanmin(values[chosen]) == np.nanmin(values)
    assert thin(5, np.zeros(5), most=100).tolist() == [0, 1, 2, 3, 4] and thin(0).tolist() == []


def test_a_history_is_the_records(tmp_path):
    records = [record(1, "ab"), record(2, "bc", loss=None), None, record(3, "c")]
    found = gather(records)
    assert found.silos == ["a", "b", "c"] and found.damaged == 1 and found.num == 3
    assert found.member.tolist() == [[True, True, False], [False, True, True], [False, False, True]]
    for i, one in enumerate(one for one in records if one is not None):
        for j, silo in enumerate(found.silos):
            value = one["silos"].get(silo, {}).get("accuracy", math.nan)
            assert found.of_silos("accuracy")[i, j] == value or math.isnan(value)
    assert np.isnan(found.of("loss")[1]) and found.of("seconds", "train").tolist() == [0.5] * 3


# ---------------------------------------------------------------- the command


def test_the_command_writes_the_page_into_the_run_directory(tmp_path):
    root = directory(tmp_path / "run", [half(1)])
    done = CliRunner().invoke(app, ["report", str(root), "--title", "Named"])
    assert done.exit_code == 0 and done.stdout.startswith(f"report: {root / 'report.html'} (1.")
    assert "<title>Named</title>" in (root / "report.html").read_text()
    (tmp_path / "folder").mkdir()
    for arguments, words in (
        ([str(tmp_path / "folder")], "is not a run directory, and there is none below it"),
        ([str(tmp_path / "nothing")], "is not a run directory"),
        ([str(root), "--out", str(tmp_path / "folder")], "--out names another file"),
    ):
        done = CliRunner().invoke(app, ["report", *arguments])
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_damaged_configuration_is_refused(tmp_path):
    root = directory(tmp_path / "run", [half(1)])
    (root / "config.yaml").write_text((root / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(ConfigError, match="damaged"):
        write([root])
