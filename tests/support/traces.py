"""Traces for tests: files made from given times, and what the Trace Event Format asks of any."""

import json
from collections import defaultdict

import numpy as np

from fedmpi.records import PHASES, RunInfo
from fedmpi.records.sink import Timings
from fedmpi.records.timer import PARTS, Spent
from fedmpi.records.trace import BEHIND, MAIN, ROUND, Trace

NAMES = {"process_name": "name", "process_labels": "labels", "process_sort_index": "sort_index", "thread_name": "name"}


def write_trace(root, numbers, resumed=False, close=True, **more):
    """A trace of two ranks whose phases take 0.5 s and 0.25 s; round n begins at 10 n s."""
    for_round = iter(numbers)

    def timings():
        starts = 10.0 * next(for_round) + np.arange(2)
        return Timings(starts, {name: np.array([0.5, 0.25]) for name in PHASES}, **more)

    trace = Trace()
    trace.open(RunInfo(root, int(resumed), timings=timings))
    for number in numbers:
        trace.write({"round": number})
    if close:
        trace.close()
    else:
        trace._file.close()  # as a kill would
    return root / "trace.json"


def events(path):
    return json.loads(path.read_bytes())


def slices(found):
    return [event for event in found if event["ph"] == "X"]


def sound(found):
    """Asserts what holds for every trace, and returns the names of slices by thread and depth."""
    named, stacks, last, by_depth = set(), defaultdict(list), {}, defaultdict(set)
    for event in found:
        assert {"name", "ph", "pid", "tid", "args"} <= event.keys() and event["ph"] in ("X", "M"), event
        assert type(event["pid"]) is int and type(event["tid"]) is int and event["tid"] in (MAIN, BEHIND)
        where = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert [*event["args"]] == [NAMES[event["name"]]], event
            named.add((event["name"], *where))
            continue
        assert ("process_name", event["pid"], MAIN) in named and ("thread_name", *where) in named, event
        assert [*event["args"]] == ["round"] and type(event["args"]["round"]) is int and event["args"]["round"] > 0
        start, end = event["ts"], event["ts"] + event["dur"]
        assert type(start) is int and type(event["dur"]) is int and event["dur"] >= 0, event
        assert start >= last.get(where, 0), "a thread's slices come in order of time"
        last[where], stack = start, stacks[where]
        while stack and stack[-1][1] <= start:
            stack.pop()
        assert not stack or end <= stack[-1][1], (event, stack)
        by_depth[event["tid"], len(stack)].add(event["name"])
        if len(stack) == 1 and event["tid"] == MAIN:
            assert event["name"] in PHASES
        stack.append((start, end))
    assert by_depth[MAIN, 0] <= {ROUND} and by_depth[BEHIND, 0] <= {"exchange"}
    assert by_depth[MAIN, 2] <= {*Spent._fields} and by_depth[BEHIND, 1] <= {*Spent._fields}
    assert {part for _, part in PARTS} == {*Spent._fields}
    return by_depth


def agrees_with_records(found, records):
    """Asserts that the longest rank of each phase took as long as the record says, to 0.1 ms."""
    for record in records:
        told = defaultdict(float)
        for event in slices(found):
            if event["tid"] == MAIN and event["args"]["round"] == record["round"] and event["name"] in PHASES:
                told[event["name"]] = max(told[event["name"]], event["dur"] / 1e6)
        for name in PHASES:
            assert abs(told[name] - record["seconds"][name]) < 1e-4, (record["round"], name)
