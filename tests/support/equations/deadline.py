"""Rounds that close at a deadline in virtual time: late silos do the steps that fit into it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from support.equations import IDS, ROUNDS, SIZES, Case, Problem

LR = 0.05
SECONDS = {"a": 1.0, "b": 1.3, "c": 2.9, "d": 0.7, "e": 3.1}  # of one training
DELAY = 0.25  # seconds of transfers
PLANNED = 4  # steps


def deadline(late: str, limit: float, quorum: int = 1) -> Callable[[Problem], list[np.ndarray]]:
    """McMahan et al. 2017, Algorithm 1, with FedNova's normalisation of late silos (Wang et al. 2020, equations 8-9): a
    silo that did the part r of its steps counts by 1/r, and the mean is multiplied by sum w r / sum w."""

    def wanted(problem: Problem) -> list[np.ndarray]:
        ends = {k: SECONDS[silo] + DELAY for k, silo in enumerate(IDS)}
        through = [k for k in ends if ends[k] <= limit]
        closes = limit if len(through) >= quorum else sorted(ends.values())[quorum - 1]
        w, after, waits = problem.start_P, [], dict[int, tuple[np.ndarray, float]]()
        for _ in range(ROUNDS):
            came: list[tuple[float, float, np.ndarray]] = []  # weight, part of the work, delta
            came += [(SIZES[k] / math.sqrt(2), r, delta) for k, (delta, r) in waits.items()]
            waits = {}
            for k, silo in enumerate(IDS):
                steps = PLANNED if ends[k] <= closes else math.floor(PLANNED * (closes - DELAY) / SECONDS[silo])
                if late == "drop" and steps < PLANNED:
                    continue
                y = w
                for batch in problem.steps(k, steps):
                    y = y - LR * problem.gradient(y, batch)
                if steps == PLANNED or late == "partial":
                    came.append((float(SIZES[k]), steps / PLANNED, y - w))
                else:
                    waits[k] = (y - w, steps / PLANNED)
            total = sum(n for n, _, _ in came)
            w = w + sum(n * r for n, r, _ in came) / total * sum(n / r * delta for n, r, delta in came) / total
            after.append(w)
        return after

    return wanted


def case(late: str, limit: float = 2.0, **policy: Any) -> Case:
    clock = {"name": "virtual", "slower": SECONDS, "delay": {"name": "constant", "value": DELAY}}
    engine = {
        "name": "synchronous",
        "clock": clock,
        "policy": {"name": "deadline", "deadline_s": limit, "late": late, **policy},
    }
    quorum = policy.get("min_silos", 1)
    return Case({"local": {"name": "sgd", "steps": PLANNED}, "engine": engine}, deadline(late, limit, quorum))


CASES = {
    "deadline_drop": case("drop"),
    "deadline_partial": case("partial"),
    "deadline_buffer": case("buffer"),
    "deadline_quorum": case("partial", min_silos=4),
}
