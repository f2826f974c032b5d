"""Records: files that survive a kill, checksums and sums that do not depend on ranks, figures on a terminal."""

import errno
import io
import json
import math
import os
import sys
import time

import numpy as np
import pytest
import torch
from support.runs import config, put_back, run
from support.traces import write_trace

import fedmpi
from fedmpi import disk
from fedmpi.comm import SoloComm
from fedmpi.components import build, to_dict
from fedmpi.config import Config
from fedmpi.directory import save_tensors
from fedmpi.errors import ConfigError
from fedmpi.evaluate import worst_silo
from fedmpi.metrics.scorers import pooled
from fedmpi.records import PHASES, RunInfo, Sink, StatusTable, Timer, peak_rss_bytes, read_metrics
from fedmpi.records.metrics import Metrics, last_round, line_of
from fedmpi.records.terminal import Progress, on_terminal, silo_table
from fedmpi.records.trace import Trace

__all__ = ["put_back"]

# ---------------------------------------------------------------- metrics.jsonl


def opened(sink, root, resumed=0, **more):
    sink.open(RunInfo(root, resumed, **more))
    return sink


def write_metrics(root, rounds, resumed=0):
    metrics = opened(Metrics(), root, resumed)
    for number in rounds:
        metrics.write({"round": number, "loss": 1 / number})
    metrics.sync()
    metrics.close()


def rounds(root):
    return [record["round"] for record in read_metrics(root)]


@pytest.mark.parametrize("length", [10, 70_000, 300_000])
def test_the_last_round_is_read_from_the_end_of_the_file(tmp_path, length):
    assert last_round(tmp_path) == 0
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"")
    assert last_round(tmp_path) == 0
    for number in (7, 8, 9):
        with open(path, "ab") as file:
            file.write(line_of({"round": number, "text": "x" * length}))
        assert last_round(tmp_path) == number
    path.write_bytes(path.read_bytes()[:-20])
    assert last_round(tmp_path) == 0


def test_metrics_are_cut_at_the_round_that_a_run_resumes_from(tmp_path):
    assert read_metrics(tmp_path) == []
    write_metrics(tmp_path, [1, 2, 3, 4, 5])
    write_metrics(tmp_path, [4], resumed=3)
    assert rounds(tmp_path) == [1, 2, 3, 4] and read_metrics(tmp_path)[1] == {"round": 2, "loss": 0.5}
    write_metrics(tmp_path, [])
    assert rounds(tmp_path) == [] and sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "metrics.undone.jsonl"]
    undone = (tmp_path / "metrics.undone.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in undone] == [4, 5, 1, 2, 3, 4]


@pytest.mark.parametrize("lost", [1, 2, 10, 21])
def test_a_torn_last_line_is_left_out_and_gone_after_resuming(tmp_path, lost):
    write_metrics(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-lost])
    whole = [1, 2, 3] if lost == 1 else [1, 2]
    assert rounds(tmp_path) == whole
    write_metrics(tmp_path, [4], resumed=3)
    assert rounds(tmp_path) == [*whole, 4] and path.read_text().count("\n") == len(whole) + 1


@pytest.mark.parametrize("at", range(0, 70, 5))
@pytest.mark.parametrize("line", [0, 1])
def test_a_damaged_line_is_named_and_kept_aside_and_the_others_stay(tmp_path, caplog, line, at):
    write_metrics(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = bytes(
        [*lines[line][: (at := at % (len(lines[line]) - 1))], lines[line][at] ^ 1, *lines[line][at + 1 :]]
    )
    path.write_bytes(b"".join(lines))
    assert rounds(tmp_path) == [r for r in (1, 2, 3) if r != line + 1]
    assert f"metrics.jsonl, line {line + 1} is damaged" in caplog.text
    write_metrics(tmp_path, [4], resumed=3)
    assert rounds(tmp_path) == [r for r in (1, 2, 3, 4) if r != line + 1]
    assert (tmp_path / "metrics.bad.jsonl").read_bytes() == lines[line]
    assert f"metrics.jsonl has no record of round {line + 1};" in caplog.text


def test_records_that_are_older_than_checksums_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2, "loss": null}\n[3]\n\xff')
    assert read_metrics(tmp_path) == [{"round": 1}, {"round": 2, "loss": None}]


def test_what_a_rename_commits_is_flushed_first_and_its_folder_afterwards(tmp_path, monkeypatch):
    done, synced, replaced = [], os.fsync, os.replace

    def fsync(descriptor):
        done.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')).partition('.part')[0]}")
        synced(descriptor)

    def replace(source, target):
        done.append(f"name {os.path.basename(target)}")
        replaced(source, target)

    write_metrics(tmp_path, [1, 2])
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    opened(Metrics(), tmp_path, 2).close()
    opened(Trace(), tmp_path).close()
    save_tensors({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    names = ("metrics.jsonl", "trace.json", "model.safetensors")
    assert done == [step for n in names for step in (f"sync {n}", f"name {n}", f"sync {tmp_path.name}")]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_what_cannot_be_read_on_resume_is_put_aside_and_not_written_over(tmp_path, monkeypatch, caplog):
    def unreadable(path, most=1 << 30):
        assert most > 1 << 34  # of thousands of silos, or ranks, and rounds
        raise OSError(errno.EIO, "Input/output error", str(path))

    write_metrics(tmp_path, [1, 2, 3])
    write_trace(tmp_path, [1, 2, 3])
    before = {(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "trace.json")}
    monkeypatch.setattr(disk, "read_bytes", unreadable)
    write_metrics(tmp_path, [4], resumed=3)
    write_trace(tmp_path, [4], resumed=True)
    monkeypatch.undo()
    assert before <= {path.read_bytes() for path in tmp_path.iterdir()} and rounds(tmp_path) == [4]
    assert caplog.text.count("cannot be read (Input/output error) and is now ") == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "trace.json", "model.safetensors"])
def test_a_link_in_a_files_place_leaves_its_target_alone(tmp_path, name):
    (tmp_path / "precious").write_text("precious")
    for link in (name, f"{name}.part", f"{name}.part-{os.getpid()}"):
        (tmp_path / link).symlink_to("precious")
    opened(Metrics(), tmp_path).close()
    opened(Trace(), tmp_path).close()
    save_tensors({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path):
    metrics = opened(Metrics(), tmp_path)
    metrics.write({"round": 1})
    assert rounds(tmp_path) == [1]
    metrics.close()


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("owners", [[0, 0, 0], [0, 1, 2], [2, 2, 0]])
def test_a_board_is_the_same_on_every_rank_wherever_silos_live(owners):
    boards = [StatusTable(3, ("status", "rss"), 3, ("loss", "tests")) for _ in range(3)]
    for rank, board in enumerate(boards):
        board.set_rank(rank, status=rank, rss=100.0 + rank)
        for silo, owner in enumerate(owners):
            if owner == rank:
                board.set_silo(silo, loss=0.1 * silo, tests=silo)
    total = sum(board._values for board in boards)
    for board in boards:
        assert board.num_bytes == (3 * 2 + 3 * 2) * 8
        board.share(lambda values: total.copy())
        assert board.rank("status").tolist() == [0, 1, 2] and board.rank("rss").tolist() == [100, 101, 102]
        assert board.silo("loss").tolist() == [0.0, 0.1, 0.2] and board.silo("tests").tolist() == [0, 1, 2]
    boards[0].clear()
    assert not boards[0].rank("rss").any() and not boards[0].silo("loss").any() and boards[1].silo("loss").any()


def test_the_phases_of_a_round_add_up_to_its_time(monkeypatch):
    clock = iter([0.0, 1.0, 1.5, 4.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = Timer()
    for phase in ("select", "train", "exchange"):
        timer.lap(phase)
    assert timer.seconds == dict.fromkeys(PHASES, 0.0) | {"select": 1.0, "train": 0.5, "exchange": 2.5}
    timer.reset()
    assert not any(timer.seconds.values())


def test_peak_memory_is_in_bytes():
    assert 10 << 20 < peak_rss_bytes() < 1 << 40


def test_the_worst_silo_is_by_the_metrics_own_sense_and_only_among_those_that_were_tested():
    silos = {"a": {"auc": 0.5}, "b": {}, "c": {"auc": 0.9}, "d": {"auc": math.nan}}
    assert worst_silo(silos, "auc", True) == {"silo": "a", "auc": 0.5}
    assert worst_silo(silos, "auc", False) == {"silo": "c", "auc": 0.9}
    assert worst_silo({"b": {}, "d": {"auc": math.nan}}, "auc", True) is None


def test_a_pooled_figure_is_the_mean_over_samples():
    rng = np.random.default_rng(0)
    counts = np.array([3, 0, 5])
    samples = [rng.normal(size=n) for n in counts]
    values = np.array([s.mean() if len(s) else 0.0 for s in samples])
    assert pooled(values, counts) == pytest.approx(np.concatenate(samples).mean(), rel=1e-14)
    assert pooled(np.zeros(2), np.zeros(2)) is None


# ---------------------------------------------------------------- terminal


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("variables", "parent", "answer"),
    [
        ({}, None, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "/dev/pts/3", True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "/home/me/log.txt", False),
        ({"PMI_SIZE": "2"}, "pipe:[123]", False),
        ({"FEDMPI_RANKS": "2"}, None, False),
    ],
)
def test_under_a_launcher_it_is_the_launchers_output_that_counts(monkeypatch, variables, parent, answer):
    def readlink(path):
        if parent is None:
            raise PermissionError
        return parent

    for name in ("FEDMPI_RANKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "readlink", readlink)
    monkeypatch.setattr(sys, "stdout", Screen())
    assert on_terminal() is answer


RECORD = {
    "round": 7, "train_loss": 0.5, "loss": 0.25, "accuracy": 0.75, "rejected": ["b"], "seconds": {"round": 1.5},
    "silos": {"a": {"rank": 0, "num_train": 9, "num_test": 4, "loss": 0.25, "accuracy": 0.75},
              "b": {"rank": 1, "num_train": 5}},
}  # fmt: skip


def test_output_into_a_file_is_one_plain_line_a_round(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert on_terminal() is False
        progress = opened(Progress(), tmp_path, 6, rounds=10, metric="accuracy")
        progress.write(RECORD)
        progress.write({**{k: v for k, v in RECORD.items() if k not in ("loss", "accuracy")}, "train_loss": None})
        progress.close()
    assert (tmp_path / "log").read_text().splitlines() == [
        "round  7/10  train 0.5000  loss 0.2500  accuracy 0.7500  rejected b  1.50 s",
        "round  7/10  train -  rejected b  1.50 s",
    ]


def test_the_final_table_has_a_row_for_every_silo_and_one_for_all():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(silo_table(RECORD, "accuracy"))
    assert cells(console) == [
        ["a", "0", "9", "4", "0.2500", "0.7500"],
        ["b", "1", "5", "-", "-", "-"],
        ["all", "", "14", "4", "0.2500", "0.7500"],
    ]


def test_the_final_table_has_the_figures_of_all_where_those_of_silos_are_hidden():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    hidden = {"a": {"rank": 0, "num_train": 9}, "b": {"rank": 1, "num_train": 5}}
    console.print(silo_table({**RECORD, "silos": hidden}, "accuracy"))
    assert cells(console) == [
        ["a", "0", "9", "-", "-", "-"],
        ["b", "1", "5", "-", "-", "-"],
        ["all", "", "14", "-", "0.2500", "0.7500"],
    ]


def cells(console):
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_a_mean_over_silos_is_called_so_and_many_metrics_leave_the_best_its_place():
    from rich.console import Console

    silo = {"rank": 0, "num_train": 9, "num_test": 3, "loss": 0.1, "dice": 0.5} | {f"m{i}": i / 10 for i in range(8)}
    others = {f"m{i}": i / 10 for i in range(8)}
    record = {"round": 3, "loss": 0.1, **others, "silo_mean_dice": 0.5, "silos": {"a": silo}}
    console = Console(file=io.StringIO(), width=120)
    console.print(silo_table(record, "silo_mean_dice"))
    assert cells(console)[1:] == [
        ["all", "", "9", "3", "0.1000", "-", "0.0000", "0.1000", "0.2000", "0.3000"],
        ["mean of silos", "", "", "", "-", "0.5000", "-", "-", "-", "-"],
    ]


def test_the_figures_of_own_models_stand_beside_the_global_ones(tmp_path, monkeypatch):
    from rich.console import Console

    own = {"personal_loss": 0.1, "personal_accuracy": 0.9}
    record = {**RECORD, **own, "silos": {**RECORD["silos"], "a": {**RECORD["silos"]["a"], **own}}}
    console = Console(file=(text := io.StringIO()), width=120)
    console.print(silo_table(record, "accuracy"))
    assert "personal accuracy" in text.getvalue()
    assert [row[-2:] for row in cells(console)] == [["0.7500", "0.9000"], ["-", "-"], ["0.7500", "0.9000"]]
    with open(tmp_path / "log", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        opened(Progress(), tmp_path, 6, rounds=10, metric="accuracy").write(record)
    assert "accuracy 0.7500  personal 0.9000  rejected b" in (tmp_path / "log").read_text()


# ---------------------------------------------------------------- sinks


class Mine(Sink):
    """A user's sink, which fails on command."""

    def __init__(self, prefix: str = "r", fails: int = 0) -> None:
        self.prefix, self.fails = prefix, fails

    def open(self, run):
        self.path = run.root / "mine.txt"
        self.tell(f"open {run.metric} {run.rounds} {run.resumed}")

    def tell(self, line):
        with open(self.path, "a") as file:
            print(line, file=file)

    def write(self, record):
        if record["round"] == self.fails:
            raise LookupError("no such project")
        self.tell(f"{self.prefix} {record['round']}")

    def close(self):
        self.tell("close")


class NoSink:
    def close(self):
        """It lacks `write`."""


def told(root):
    return (root / "mine.txt").read_text().splitlines()


def test_a_sink_of_ones_own_gets_every_record_and_is_closed(tmp_path):
    how = config(tmp_path, 2, records={"sinks": [{"name": "records.test_records:Mine", "prefix": "x"}]})
    assert build(Config, to_dict(how)) == how
    run(how)
    assert told(tmp_path) == ["open accuracy 2 0", "x 1", "x 2", "close"]


def test_a_sink_that_fails_is_left_out_and_training_goes_on(tmp_path, caplog):
    records, _ = run(config(tmp_path, 3, records={"sinks": [{"name": "records.test_records:Mine", "fails": 2}]}))
    assert len(records) == 3 and told(tmp_path) == ["open accuracy 3 0", "r 1", "close"]
    assert caplog.text.count("Mine raised LookupError: no such project; it gets no more records") == 1


def test_a_sink_can_be_added_to_a_run(tmp_path):
    with fedmpi.Run(config(tmp_path, 2), comm=SoloComm()) as started:
        rounds = iter(started)
        next(rounds)
        started.add_sink(Mine())
        next(rounds)
    assert told(tmp_path) == ["open accuracy 2 0", "r 2", "close"]


@pytest.mark.parametrize(
    ("sinks", "why"),
    [
        (["records.test_records:NoSink"], "records.sinks.0: 'records.test_records:NoSink' has no "),
        ([{"name": "records.test_records:Mine", "prefx": 1}], "'Mine' has no 'prefx'; did you mean 'prefix'?"),
        (["tensorbord"], "no sink 'tensorbord'; did you mean 'tensorboard'?"),
    ],
)
def test_what_is_no_sink_is_refused_in_one_line(sinks, why):
    with pytest.raises(ConfigError) as caught:
        build(Config, {"records": {"sinks": sinks}})
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_sink_that_an_option_has_switched_on_is_there_once():
    section = build(Config, {"records": {"trace": True, "sinks": ["trace"]}}).records
    assert [type(sink) for sink in section.open_sinks()] == [Trace]
    assert build(Config, {"records": {"trace": False}}).records.open_sinks() == []


def test_every_line_says_its_schema_and_one_without_is_read(tmp_path):
    run(config(tmp_path, 1))
    path = tmp_path / "metrics.jsonl"
    assert json.loads(path.read_text())["schema"] == 1
    path.write_text('{"round": 1, "loss": 0.5}\n')
    assert read_metrics(tmp_path) == [{"round": 1, "loss": 0.5}]
