"""trace.json: a sound trace in every run, on one clock, also after a kill, a resume and a loss."""

import json
import threading
import time

import numpy as np
import pytest
from support.runs import config, put_back, run
from support.traces import agrees_with_records, events, slices, sound, write_trace

from fedmpi.comm.threads import on_ranks
from fedmpi.records import PHASES
from fedmpi.records.clock import clock, offsets
from fedmpi.records.timer import Spent, Timer
from fedmpi.records.trace import BEHIND, EVENT, MAIN, ROUND
from fedmpi.report.trace import last_phases, read_phases

__all__ = ["put_back"]

EACH = 2 * (1 + len(PHASES))  # slices of a round


def test_a_trace_has_every_phase_of_every_rank_one_after_the_other(tmp_path):
    found = events(write_trace(tmp_path, [1, 2]))
    sound(found)
    assert len(slices(found)) == 2 * EACH
    around, *mine = [e for e in slices(found) if e["pid"] == 1 and e["args"]["round"] == 2]
    assert (around["name"], around["ts"], around["dur"]) == (ROUND, 21_000_000, 2_000_000)
    assert [e["name"] for e in mine] == list(PHASES) and all(e["dur"] == 250_000 for e in mine)
    assert [e["ts"] for e in mine] == [21_000_000 + i * 250_000 for i in range(len(PHASES))]


def test_processes_are_named_and_clocks_are_one(tmp_path):
    rows = [{"rank": 0, "host": "a", "silos": []}, {"rank": 1, "host": "b", "silos": [f"s{i}" for i in range(10)]}]
    rows[1] |= {"clock_ahead_s": 0.25, "clock_error_s": 0.001}
    found = events(write_trace(tmp_path, [1, 2], ranks=rows))
    sound(found)
    named = {(e["name"], e["pid"]): next(iter(e["args"].values())) for e in found if e["ph"] == "M"}
    assert len(named) == len(found) - len(slices(found))  # once, not once a round
    assert named["process_name", 0] == "rank 0 on a" and named["process_labels", 0] == "no silo"
    assert named["process_labels", 1] == (
        "silos s0, s1, s2, s3, s4, s5, s6, s7 and 2 more; clock +0.250000 s, error up to 0.001000 s"
    )
    assert [e["ts"] for e in slices(found) if e["name"] == ROUND and e["pid"] == 1] == [10_750_000, 20_750_000]


def test_parts_are_in_their_phase_and_the_thread_has_a_track(tmp_path):
    parts = {("train", "encode"): np.array([0.1, 9.0]), ("exchange", "decode"): np.array([0.1, 0.0])}
    track = {"of_round": [3, 0], "began_s": [19.0, 0], "lasted_s": [2.0, 0]}
    track = {name: np.array(v, float) for name, v in {**track, "encode": [0.5, 0], "transfer": [1.0, 0]}.items()}
    found = events(write_trace(tmp_path, [1], parts=parts, tracks=[track]))
    depths = sound(found)
    assert depths[MAIN, 2] == {"encode", "decode"} and depths[BEHIND, 1] == {"encode", "transfer"}
    inside = next(e for e in slices(found) if e["pid"] == 1 and e["name"] == "encode")
    assert inside["dur"] == 250_000  # no longer than its phase
    behind = [(e["name"], e["ts"], e["dur"], e["args"]["round"]) for e in slices(found) if e["tid"] == BEHIND]
    assert behind[:2] == [("exchange", 19_000_000, 2_000_000, 3), ("encode", 19_000_000, 500_000, 3)]
    assert read_phases(tmp_path).of_rank[0].sum() == pytest.approx(4.0)  # parts and tracks do not count twice
    assert sum(last_phases(tmp_path, 2)[1].values()) == pytest.approx(2.0)


def test_a_round_that_is_trained_again_is_told_apart(tmp_path):
    write_trace(tmp_path, [1, 2])
    write_trace(tmp_path, [2, 2], resumed=True)
    found = read_phases(tmp_path)
    assert found.of_round[2].sum() == pytest.approx(3.0) and found.repeated_s == pytest.approx(6.0)
    assert {rank: sum(row.values()) for rank, row in last_phases(tmp_path, 2).items()} == pytest.approx({0: 4, 1: 2})


# ---------------------------------------------------------------- a kill, a resume


@pytest.mark.parametrize("first", [[], [1], [1, 2]])
@pytest.mark.parametrize("second", [[], [3]])
def test_a_trace_is_valid_after_close_and_after_resuming_from_a_closed_one(tmp_path, first, second):
    assert len(slices(events(write_trace(tmp_path, first)))) == len(first) * EACH
    found = events(write_trace(tmp_path, second, resumed=True))
    sound(found)
    assert [e["args"]["round"] for e in slices(found)[::EACH]] == first + second


def test_a_resumed_trace_drops_what_is_damaged_and_keeps_other_events(tmp_path):
    path = write_trace(tmp_path, [1, 2])
    lines = path.read_bytes().splitlines()
    other = b'{"name": "mine", "ts": 1}'
    assert len([line for line in lines if EVENT.fullmatch(line)]) == 2 * EACH
    at = next(i for i, line in enumerate(lines) if EVENT.fullmatch(line))
    lines[at] = lines[at].replace(b'"ts"', b'"ts')
    lines[at + 2 : at + 2] = [other + b",", b"#"]
    path.write_bytes(b"\n".join(lines))
    wanted = [json.loads(line.rstrip(b",")) for i, line in enumerate(lines[1:-1], 1) if i not in (at, at + 3)]
    assert events(write_trace(tmp_path, [], resumed=True)) == wanted and json.loads(other) in wanted


def test_a_trace_is_valid_after_resuming_from_one_that_a_kill_tore(tmp_path):
    path = write_trace(tmp_path, [1, 2], close=False)
    content = path.read_bytes()
    for lost in range(0, 240, 3):
        path.write_bytes(content[: len(content) - lost])
        whole = content[: len(content) - lost].count(b"}}")
        found = events(write_trace(tmp_path, [3], resumed=True))
        assert [e["args"]["round"] for e in slices(found[whole:])] == [3] * EACH, lost


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 40])
def test_a_trace_is_valid_when_a_kill_left_not_even_one_event(tmp_path, kept):
    path = write_trace(tmp_path, [1], close=False)
    path.write_bytes(path.read_bytes()[:kept])
    assert len(slices(events(write_trace(tmp_path, [2], resumed=True)))) == EACH


def test_a_run_that_is_not_resumed_begins_a_new_trace(tmp_path):
    write_trace(tmp_path, [1, 2])
    assert {e["args"]["round"] for e in slices(events(write_trace(tmp_path, [1])))} == {1}


# ---------------------------------------------------------------- whole runs; of several ranks in tests/mpi


BUFFERED = {"name": "buffered", "size": 2}
CODEC = {"plan": "sharded", "up": {"codec": {"name": "int8"}}}


@pytest.mark.parametrize(
    ("more", "inside"),
    [
        ({}, set()),
        ({"exchange": CODEC}, {"encode", "decode"}),
        ({"engine": BUFFERED}, set()),
        ({"engine": BUFFERED | {"clock": {"name": "virtual"}}}, set()),
    ],
)
def test_the_trace_of_a_run_is_sound(tmp_path, more, inside):
    begun_us = time.time() * 1e6
    records, _ = run(config(tmp_path, 3, **more))
    found = events(tmp_path / "trace.json")
    assert sound(found)[MAIN, 2] >= inside
    agrees_with_records(found, records)
    assert {e["args"]["round"] for e in slices(found)} == {1, 2, 3}
    assert all(begun_us - 1e4 < e["ts"] < time.time() * 1e6 + 1e4 for e in slices(found))
    names = [e["args"]["name"] for e in found if e["name"] == "process_name"]
    assert len(names) == 1 and names[0].startswith("rank 0 on ")


def test_the_timer_splits_phases_by_what_the_exchange_spent():
    spent = [Spent(1.0, 1.0, 1.0), Spent(1.5, 1.0, 1.0), Spent(1.5, 3.0, 2.0), Spent(0.0, 9.0, 0.0)]
    timer = Timer(lambda: spent[0])
    for phase in ("train", "exchange", "wait"):
        del spent[0]
        timer.lap(phase)
    found = {name: value for name, value in timer.parts.items() if value}
    assert found == {"train_encode": 0.5, "exchange_transfer": 2.0, "exchange_decode": 1.0}


# ---------------------------------------------------------------- clocks


def test_offsets_of_clocks_are_found_within_the_error_they_state():
    ahead_s = [0.0, 12.5, -0.003]

    def work(comm):
        comm.machines = tuple(bytes([rank]) for rank in range(comm.size))
        return offsets(comm, lambda: clock() + ahead_s[comm.rank])

    found_s, error_s = on_ranks(3, work)[0]
    assert found_s[0] == error_s[0] == 0.0
    assert (np.abs(found_s - ahead_s) <= error_s + 1e-6).all() and (error_s < 0.1).all()


def test_ranks_of_one_machine_share_its_clock():
    calls = []
    lock = threading.Lock()

    def read():
        with lock:
            calls.append(1)
        return clock()

    found_s, error_s = on_ranks(2, lambda comm: offsets(comm, read))[1]
    assert not found_s.any() and not error_s.any() and calls == []
