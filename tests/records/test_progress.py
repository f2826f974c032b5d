"""What a command that trains prints: time to the end, lines a minute, JSON for programs, the log."""

import json
import logging
import subprocess
import sys
import time
from datetime import datetime

import pytest

from fedmpi import output
from fedmpi.records import RunInfo
from fedmpi.records.pace import LAST, Pace
from fedmpi.records.terminal import Progress


def paced(seconds, rounds=100, first=1):
    pace = Pace(rounds)
    for number, took_s in enumerate(seconds, first):
        pace.add({"round": number, "seconds": {"round": took_s}})
    return pace


@pytest.mark.parametrize(
    ("seconds", "left_s"),
    [
        ([], None),
        ([3.0], None),
        ([3.0, 3.0], 98 * 3.0),
        ([50.0, 3.0], 98 * 3.0),  # the first of a start
        ([3.0, 600.0, 3.0, 3.0], 96 * 3.0),  # a suspended rank
        ([1.0, 1.0, 1.0, 1.0, 11.0] * 4, 80 * 3.0),  # evaluation every five rounds
        ([1.0] * 30 + [2.0] * LAST, 50 * 2.0),
        ([None, 2.0, float("nan"), 2.0], 96 * 2.0),
    ],
)
def test_the_time_to_the_end_is_that_of_the_last_rounds(seconds, left_s):
    assert paced(seconds).left_s == (None if left_s is None else pytest.approx(left_s))


def test_there_is_no_time_to_the_end_at_the_end():
    assert paced([1.0] * 5, rounds=5).left_s is None and paced([1.0] * 4, rounds=5).left_s == 1.0


def test_a_record_that_comes_twice_counts_once():
    pace = paced([1.0])
    pace.add({"round": 1, "seconds": {"round": 9.0}})
    assert pace.left_s is None


def record(number):
    return {"round": number, "train_loss": 0.5, "seconds": {"round": 30.0}, "silos": {}}


def shown(lines, rounds, monkeypatch, capsys, log=None):
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    progress = Progress(lines, log)
    progress.open(RunInfo(None, 0, rounds, "accuracy"))
    for number in range(1, rounds + 1):
        progress.write(record(number))
        now_s[0] += 30.0
    progress.close()
    return [line.split()[1] for line in capsys.readouterr().out.splitlines()]


def test_minute_has_the_first_the_last_and_a_line_a_minute(monkeypatch, capsys):
    assert shown("minute", 6, monkeypatch, capsys) == ["1/6", "3/6", "5/6", "6/6"]
    assert shown("rounds", 3, monkeypatch, capsys) == ["1/3", "2/3", "3/3"]
    assert shown("none", 3, monkeypatch, capsys) == []


def test_the_log_has_every_round_and_every_warning_with_its_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "_log", None)
    log = logging.getLogger("fedmpi")
    before = list(log.handlers)
    try:
        (tmp_path / "log").write_text("an earlier start\n")
        assert shown("none", 3, monkeypatch, capsys, tmp_path / "log") == []
        log.warning("silo %s is slow", "a")
        output.say("the end")
        lines = (tmp_path / "log").read_text().splitlines()
    finally:
        log.handlers[:] = before
        output._log.close()
    assert lines[0] == "an earlier start"
    times, texts = zip(*(line.split(" ", 1) for line in lines[1:]), strict=True)
    assert all(datetime.fromisoformat(moment) for moment in times)
    assert [text[:9] for text in texts] == ["round 1/3", "round 2/3", "round 3/3", "silo a is", "the end"]
    assert texts[1].endswith("30.00 s  ETA 30 s") and "ETA" not in texts[0] + texts[2]


PROGRAM = """
import os, sys
from fedmpi import output
from fedmpi.records.terminal import JsonLines
from pathlib import Path
root = Path(sys.argv[1])
output.reserve()
lines = JsonLines(root)
lines.begin(rounds=2)
print("a print of the user", flush=True)
os.write(1, b"a print of a library\\n")
output.say("a message")
(root / "events.jsonl").open("a").write('{"event": "lost", "round": 0}\\n{"event": "jo')
lines.write({"round": 1, "loss": None})
(root / "events.jsonl").open("a").write('ined"}\\n')
lines.close()
"""


def test_standard_output_has_records_and_events_only(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "of an earlier start"}\n')
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("\\\\", "\\"), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("event", line.get("round")) for line in lines] == ["begin", "lost", 1, "joined"]
    assert lines[2] == {"round": 1, "loss": None}
    assert done.stderr.splitlines() == ["a print of the user", "a print of a library", "a message"]


@pytest.mark.slow
def test_a_job_for_a_program_prints_its_records_as_they_are_on_disk(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "rounds: 3\ndata: {name: digits, silos: 2}\nlocal: {name: sgd, lr: 0.1, steps: 2}\n"
    )
    words = [sys.executable, "-m", "fedmpi", "train", "c.yaml", "out=a", "--json", "--log-file", "log"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    begin, *records = map(json.loads, done.stdout.splitlines())
    assert begin["event"] == "begin" and begin["rounds"] == 3
    stored = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for one in stored:
        del one["crc32"]
    assert records == stored
    times = [datetime.fromisoformat(one["time"]) for one in (begin, *records)]
    assert times == sorted(times) and abs(times[-1].timestamp() - time.time()) < 120
    assert (tmp_path / "log").read_text().count(" round ") == 3
    words = [*words[:-1], "missing/log"]
    refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and refused.stderr == "fedmpi: --log-file missing/log: No such file or directory\n"
