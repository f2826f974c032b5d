"""fedmpi watch: what it reads while files grow or are replaced, what a frame says, and that it changes nothing."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.pages import Page, directory, record
from support.silojobs import apart, trained_apart

from fedmpi.cli import app
from fedmpi.errors import ConfigError
from fedmpi.files.beats import Heart
from fedmpi.files.envelope import packed
from fedmpi.files.folder import Disk
from fedmpi.files.names import FOLDERS, SERVER
from fedmpi.jobs.serve import Serving
from fedmpi.records import read_metrics
from fedmpi.records.metrics import line_of
from fedmpi.report import write
from fedmpi.watch.follow import Follower, Records
from fedmpi.watch.frame import bar, frame, spark
from fedmpi.watch.jobs import Jobs
from fedmpi.watch.live import watch

SILOS = ("clinic", "ward", "lab")


def text(root, width=80, height=24, unicode=True):
    return "\n".join(line.plain.rstrip() for line in frame(Follower(root).look(), width, height, unicode))


def run_of(root, num=5, done=True, rounds=None, **config):
    return directory(root, [record(n, SILOS) for n in range(1, num + 1)], done=done, rounds=rounds or num, **config)


# ---------------------------------------------------------------- reading what grows


def rounds(rows):
    return [None if row is None else row["round"] for row in rows]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_read_in_pieces_is_what_the_whole_file_holds(tmp_path, seed):
    draw = random.Random(seed)
    path, follower = tmp_path / "metrics.jsonl", Records(tmp_path)
    assert follower.look() is False and follower.rows == []
    content, number = b"", 0
    for _ in range(60):
        what = draw.choice(["grow", "grow", "grow", "torn", "rest", "cut", "replace", "rewrite"])
        kept = content.splitlines(keepends=True)
        kept = [line for line in kept if line.endswith(b"\n")]
        if what == "grow":
            number += 1
            content = b"".join(kept) + line_of(record(number, SILOS, note="x" * draw.randrange(200)))
        elif what == "torn":
            content = b"".join(kept) + line_of(record(number + 1, SILOS))[: draw.randrange(1, 300)]
        elif what in ("cut", "replace", "rewrite") and kept:
            number = draw.randrange(len(kept))
            again = [line_of(record(n, SILOS, note=f"start {draw.random()}")) for n in range(1, number + 1)]
            content = b"".join(again if what == "rewrite" else kept[:number])
            number = json.loads(content.splitlines()[-1])["round"] if content else 0
        if what == "replace":
            (tmp_path / "new").write_bytes(content)
            os.replace(tmp_path / "new", path)
        else:
            with open(path, "r+b" if path.exists() else "wb") as file:  # the same inode
                file.write(content)
                file.truncate()
        follower.look()
        whole = b"".join(line for line in content.splitlines(keepends=True) if line.endswith(b"\n"))
        wanted = [json.loads(line) for line in whole.splitlines()]
        assert rounds(follower.rows) == [one["round"] for one in wanted], what
        assert [row.get("note") for row in follower.rows] == [one.get("note") for one in wanted]
        if wanted:
            assert follower.last == {k: v for k, v in wanted[-1].items() if k != "crc32"}


def test_a_second_look_reads_only_what_is_new(tmp_path, monkeypatch):
    run_of(tmp_path / "a", 3)
    follower, taken = Records(tmp_path / "a"), []
    take = Records._take

    def counted(self, line):
        taken.append(line)
        take(self, line)

    monkeypatch.setattr(Records, "_take", counted)
    follower.look()
    assert len(taken) == 3 and follower.look() is False and len(taken) == 3
    with open(tmp_path / "a" / "metrics.jsonl", "ab") as file:
        file.write(line_of(record(4, SILOS)))
    assert follower.look() is True and len(taken) == 4
    assert rounds(follower.rows) == [one["round"] for one in read_metrics(tmp_path / "a")]


def test_a_damaged_line_is_counted_and_no_more(tmp_path):
    root = run_of(tmp_path / "a", 3)
    lines = (root / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (root / "metrics.jsonl").write_bytes(lines[0] + lines[1].replace(b"0.25", b"0.26") + lines[2])
    follower = Records(root)
    follower.look()
    assert rounds(follower.rows) == [1, None, 3] and "3 of 3 rounds" in text(root)


# ---------------------------------------------------------------- states


def test_a_run_that_has_not_begun_says_so_and_begins(tmp_path):
    follower = Follower(tmp_path / "a")
    assert "no run has begun here" in text(tmp_path / "a")
    assert follower.look().run is None
    run_of(tmp_path / "a", 0, done=False, rounds=9)
    assert follower.look().run.goal == 9 and "no round is recorded" in text(tmp_path / "a")


def test_a_finished_run(tmp_path):
    found = text(run_of(tmp_path / "a"))
    assert "finished   5 of 5 rounds" in found and "ETA" not in found and "100 %" in found
    assert "0.5556   best 0.5556 in round 5   worst silo clinic 0.5000" in found
    assert "3.31 kB a round: 1.00 kB up, 2.00 kB down, 300 B tables; all 16.5 kB" in found
    assert "slowest" in found and "T train  w wait" in found


def test_a_running_one_has_the_time_to_its_end_and_says_when_it_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmpi.stopping.is_training", lambda root: True)
    root = run_of(tmp_path / "a", 6, done=False, rounds=26)
    found = text(root)
    assert "running   round 6 of 26   ETA 18 s" in found and "875 ms a round" in found and "no record" not in found
    (root / "stop").touch()
    old_s = time.time() - 90
    os.utime(root / "metrics.jsonl", (old_s, old_s))
    found = text(root)
    assert "no record for 1 min 30 s" in found and "a stop was requested" in found


@pytest.mark.parametrize(
    ("event", "word"),
    [
        ({"event": "stopped", "round": 3}, "stopped on request   3 of 8 rounds"),
        ({"event": "ended", "round": 3, "why": "round 4: the run has diverged"}, "round 4: the run has diverged"),
        (None, "ended early   3 of 8 rounds; an error or a kill"),
    ],
)
def test_a_run_that_ended_before_its_last_round_says_why(tmp_path, event, word):
    root = run_of(tmp_path / "a", 3, done=False, rounds=8)
    if event:
        (root / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert word in text(root, width=120)


def test_a_start_that_goes_on_is_an_event_and_its_pace_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmpi.stopping.is_training", lambda root: True)
    records = [record(n, SILOS) for n in range(1, 7)]
    for one in records[:3]:
        one["seconds"] = {**one["seconds"], "round": 100.0}
    records[3]["seconds"] = {**records[3]["seconds"], "agree": 0.0}
    root = directory(tmp_path / "a", records, done=False, rounds=10)
    found = text(root)
    assert "ETA 4 s" in found and "Training went on with round 4." in found
    with open(root / "events.jsonl", "w") as file:
        for number in range(9):
            file.write(json.dumps({"event": "lost", "round": 6, "ranks": [number], "silos": {"ward": None}}) + "\n")
    found = text(root)
    assert "Rank 8 was lost; silo ward left." in found and "Rank 4 was" in found and "Rank 3 was" not in found


def test_figures_of_single_silos_are_not_shown_if_they_are_not_told(tmp_path):
    records = [record(n, SILOS) for n in range(1, 4)]
    for one in records:
        one.pop("worst")
        one["silos"] = {silo: {"rank": 0, "num_train": 9} for silo in SILOS}
        one["num_rejected"] = 2
        del one["rejected"], one["cohort"]
    found = text(directory(tmp_path / "a", records, disclose="pooled"))
    assert "single silos are not told" in found and not any(silo in found for silo in SILOS)
    assert re.search(r"rejected +2$", found, re.MULTILINE)


def test_late_and_lost_silos_and_privacy(tmp_path):
    late = {"late": {"ward": "partial"}, "epsilon": 1.25001, "delta": 1e-5}
    root = directory(tmp_path / "a", [record(1, SILOS), record(2, SILOS, **late)])
    found = text(root)
    assert "ward (partial)" in found and "epsilon 1.251, delta 1e-05 spent" in found


# ---------------------------------------------------------------- silos in jobs of their own


def test_the_jobs_of_a_federation_over_a_folder(tmp_path, monkeypatch):
    """Server and silos as they are during a run and after it; the report's page is about the same run."""
    how, seen = apart(tmp_path, 3), []
    follower = Follower(tmp_path / "run")
    plain = Serving._tell

    def looked(self):
        plain(self)
        seen.append(follower.look())

    monkeypatch.setattr(Serving, "_tell", looked)
    records, _, _ = trained_apart(how)
    assert [one.run.history.num for one in seen] == [1, 2, 3]
    assert all(one.jobs["server"] == "alive" and one.run.in_jobs for one in seen)
    assert all({*one.jobs} == {"server", "s0", "s1", "s2"} for one in seen)
    assert all(re.match("alive|ended", state) for one in seen for state in one.jobs.values())
    found = text(tmp_path / "run", width=100)
    assert "finished   3 of 3 rounds" in found and f"worst silo {records[-1]['worst']['silo']}" in found
    assert re.search(r"^jobs +server ended, s0 ended, s1 ended, s2 ended$", found, re.MULTILINE), found
    page = Page(write([tmp_path / "run"]).read_text())
    assert "3 silos in jobs of their own, 3 of 3 rounds" in page.text and page.faults == []


def test_a_silent_job_and_one_that_has_not_started_come_first(tmp_path):
    folder = Disk(tmp_path)
    for name in FOLDERS:
        folder.make(name)
    hearts = {who: Heart(folder, "run", who, 1) for who in (SERVER, "a", "b", "c")}
    for heart in hearts.values():
        heart.beat({})
    hearts["c"].beat({}, ended=True)
    (tmp_path / "updates" / "a.00000007.00000001").touch()
    old_s = time.time() - 90
    os.utime(tmp_path / "beats" / "b.00000001", (old_s, old_s))
    jobs = Jobs(str(tmp_path), 60.0)
    before = state_of(tmp_path)
    assert list(jobs.look(["a", "b", "c", "d"]).items()) == [
        ("server", "alive"),
        ("b", "silent for 1 min 30 s"),
        ("d", "not started"),
        ("c", "ended"),
        ("a", "alive, update 7 waits for the server"),
    ]
    assert state_of(tmp_path) == before
    told = {"number": 3, "by": 1, "parent": "", "entries": [], "files": [], "last": {"a": [7, 1, 7, 1]}, "about": {}}
    parts, _ = packed({"kind": "commit", **told, "ended": False})
    folder.publish("line/00000003", parts)
    assert jobs.look(["a"])["a"] == "alive"
    hearts["b"].beat({})
    assert jobs.look(["b"])["b"] == "alive"
    assert Jobs(str(tmp_path / "away"), 60.0).look(["a"]) == {}


# ---------------------------------------------------------------- frames


def trace_line(name, rank, number, dur):
    args = {"round": number}
    return json.dumps({"name": name, "ph": "X", "pid": rank, "tid": 0, "ts": 1.0, "dur": dur, "args": args})


def test_the_phases_are_those_of_the_last_round_on_every_rank(tmp_path):
    root = run_of(tmp_path / "a", 2)
    events = [trace_line(name, rank, 2, us) for rank in (0, 1) for name, us in (("train", 9e6), ("wait", 9e6))]
    events += [trace_line("train", 0, 2, 3e6), trace_line("exchange", 0, 2, 1e6), trace_line("train", 1, 2, 2e6)]
    (root / "trace.json").write_text("[\n" + ",\n".join(events) + ',\n{"name": "wai')
    assert Follower(root).look().phases == {0: {"train": 3.0, "exchange": 1.0}, 1: {"train": 2.0}}
    found = text(root)
    line = next(line for line in found.splitlines() if line.startswith("rank 0"))
    assert line.count("T") == 3 * line.count("x") and "4 s" in line


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 50)])
@pytest.mark.parametrize("unicode", [True, False])
def test_a_frame_fits_its_terminal(tmp_path, width, height, unicode):
    root = run_of(tmp_path / "a", 300, rounds=1000, done=False)
    (root / "ranks.json").write_text(
        json.dumps([{"rank": r, "host": f"node{r}", "silos": [f"s{r}{'x' * 30}"]} for r in range(64)])
    )
    events = [trace_line("train", rank, 300, 1e6 + rank) for rank in range(64)]
    (root / "trace.json").write_text("[\n" + ",\n".join(events))
    with open(root / "events.jsonl", "w") as file:
        for number in range(40):
            file.write(json.dumps({"event": "retire", "round": number, "silo": "y" * 100}) + "\n")
    lines = frame(Follower(root).look(), width, height, unicode)
    assert len(lines) <= height and all(line.cell_len <= width for line in lines)
    whole = "\n".join(line.plain for line in lines)
    assert "300 of 1,000" in whole and (unicode or whole.isascii())
    assert height < 24 or ("rank 0" in whole and "Silo yyy" in whole)
    assert height < 50 or "56 ranks more" in whole


@pytest.mark.parametrize("cells", [1, 5, 40])
def test_a_sparkline_has_the_lowest_and_the_highest_mark(cells):
    drawn = spark(np.linspace(0, 1, 40), cells)
    assert len(drawn) == cells and (cells == 1 or (drawn[-1] == "█" and list(drawn) == sorted(drawn)))
    assert spark(np.array([]), 5) == spark(np.array([np.nan]), 5) == "" and spark(np.ones(3), 5) == "▁▁▁"


def test_a_bar_is_as_long_as_its_rank_took():
    assert bar({"wait": 1.0, "train": 3.0}, 8, 8.0).plain == "TTTw    " and bar({"train": 0.0}, 4, 0.0).plain == "    "


# ---------------------------------------------------------------- the command


def state_of(root):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def test_once_prints_a_frame_and_changes_nothing(tmp_path, capsys, monkeypatch):
    root = run_of(tmp_path / "a")
    before = state_of(root)
    app(["watch", str(root), "--once"], standalone_mode=False)
    assert "finished   5 of 5 rounds" in capsys.readouterr().out and state_of(root) == before
    app(["watch", str(tmp_path / "later"), "--once"], standalone_mode=False)
    assert "no run has begun here" in capsys.readouterr().out and not (tmp_path / "later").exists()
    watch(root, 0.1)  # it is over, so it ends
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there is no folder"):
        watch(tmp_path / "no" / "where", once=True)
    (root / "config.yaml").write_text("rounds: [")
    with pytest.raises(ConfigError, match="is damaged"):
        watch(root, once=True)
    assert "is damaged" in " ".join(text(root).split())


@pytest.mark.slow
def test_ctrl_c_leaves_quietly_and_each_new_round_is_a_frame_in_a_pipe(tmp_path):
    root = run_of(tmp_path / "a", 2, done=False, rounds=9)
    words = [sys.executable, "-m", "fedmpi", "watch", str(root), "--every", "0.1"]
    watching = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TERM": "dumb"}
    )
    try:
        seen = ""
        while "2 of 9 rounds" not in seen:
            seen += watching.stdout.readline()
        with open(root / "metrics.jsonl", "ab") as file:
            file.write(line_of(record(3, SILOS)))
        while "3 of 9 rounds" not in seen:
            seen += watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=30)
    finally:
        watching.kill()
    assert watching.returncode == 0 and err == "" and (seen + out).isascii() and seen.count("2 of 9 rounds") == 1
