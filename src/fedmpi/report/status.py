"""What became of a run: its state, its best and last figures, and what went wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedmpi import stopping
from fedmpi.report.numbers import listed, number, plural, seconds
from fedmpi.report.reading import RunData


class Scored(NamedTuple):
    """A figure, and the round that it is of."""

    round: int
    value: float


@dataclass(frozen=True)
class Status:
    """How a run stands. `good`: True if all rounds are done, False if it ended before, None while it goes on."""

    word: str
    good: bool | None
    text: str


def status(run: RunData) -> Status:
    """The state of a run, as far as its directory tells."""
    done = int(run.history.rounds[-1]) if run.history.num else 0
    of = f"{done:,} of {plural(run.goal, 'round')}"
    if run.training:
        return Status("still running", None, f"{of} so far; this page shows what was there when it was made")
    if run.has_model and done >= run.goal:
        return Status("finished", True, of)
    if run.diverged:
        return Status("diverged", False, f"{of}: {run.diverged}")
    if run.has_model:
        budget = "the privacy budget is spent" if run.config.get("privacy") else "the model is saved all the same"
        after, why = stopping.ended(run.root)
        return Status("finished early", True, f"{of}: {why if after == done else budget}")
    event = run.events[-1] if run.events else {}
    if event.get("round", -1) >= done and event.get("event") == stopping.STOPPED:
        return Status("stopped on request", False, f"{of}; the same command resumes it")
    if event.get("round", -1) >= done and event.get("event") == stopping.ENDED:
        return Status("ended early", False, f"{of}: {event.get('why')}")
    if run.training is None:
        return Status("not finished", None, f"{of}; whether a job of another machine trains cannot be told from here")
    if done >= run.goal:
        return Status("not concluded", False, f"{of}, but there is no {'model.safetensors'}: its end was cut off")
    if not done:
        return Status("no round", False, "no round is recorded; the job's own output says why")
    return Status("ended early", False, f"{of}; an error or a kill ended it, and the job's own output says why")


def last(run: RunData, name: str) -> Scored | None:
    """The last finite value of a figure."""
    return _pick(run, name, lambda values, finite: int(finite[-1]))


def best(run: RunData, name: str | None = None) -> Scored | None:
    """The best value of the run's metric, the first of equal ones; or the lowest of another figure."""
    highest = name in (None, run.metric) and run.maximize

    def first(values: np.ndarray, finite: np.ndarray) -> int:
        some = values[finite]
        return int(finite[some.argmax() if highest else some.argmin()])

    return _pick(run, name or run.metric, first)


def _pick(run: RunData, name: str, choose: Any) -> Scored | None:
    values = run.history.of(name)
    finite = np.flatnonzero(np.isfinite(values))
    if not finite.size:
        return None
    at = choose(values, finite)
    return Scored(int(run.history.rounds[at]), float(values[at]))


def worst(run: RunData) -> tuple[str, float, int] | None:
    """The worst silo of the last round that names one: id, its value of the metric, the round."""
    for record in reversed(run.history.records):
        told = record.get("worst")
        if told and told.get(run.metric) is not None:
            return str(told["silo"]), float(told[run.metric]), int(record["round"])
    return None


def starts(run: RunData) -> list[int]:
    """The rounds at which training started or went on after an interruption: a round's record has the seconds of the
    last collective of the round before, which are 0 if this job trained none before."""
    records = run.history.records
    first = [int(r["round"]) for r in records if (r.get("seconds") or {}).get("agree") == 0.0]
    return first if len(first) < len(records) or len(records) == 1 else first[:1]


def resumed(run: RunData) -> list[int]:
    """The rounds with which a later start began, without those after the loss or the return of ranks."""
    healed = {int(e["round"]) + 1 for e in run.events if e.get("event") in ("lost", "joined") and "round" in e}
    first = int(run.history.rounds[0]) if run.history.num else 0
    return [round for round in starts(run) if round not in healed and round != first]


def total_s(run: RunData) -> float:
    """Seconds of all recorded rounds, each as long as its slowest rank."""
    return float(np.nansum(run.history.of("seconds", "round")))


def troubles(run: RunData) -> list[str]:
    """What went wrong or needs a look, the gravest first; empty if nothing did."""
    history = run.history
    found: list[str] = []
    state = status(run)
    if state.good is False:
        found.append(f"{state.word[:1].upper()}{state.word[1:]}: {state.text}.")
    for event in run.events:
        if event.get("event") == "lost":
            silos = event.get("silos") or {}
            left = [silo for silo, rank in silos.items() if rank is None]
            gone = f"; {listed(left)} left" if left else f"; {plural(len(silos), 'silo')} moved" if silos else ""
            ranks = listed([str(rank) for rank in event.get("ranks", ())])
            found.append(f"Lost rank {ranks} after round {event.get('round')}{gone}.")
    if begins := resumed(run):
        found.append(f"Stopped and resumed: a later start went on with round {listed([f'{r:,}' for r in begins])}.")
    if run.phases is not None and run.phases.repeated_s > 0:
        found.append(f"{seconds(run.phases.repeated_s)} went into rounds that were trained again.")
    late = sum(len(record.get("late") or ()) for record in history.records)
    if late:
        silos = np.flatnonzero(history.marked("late").any(axis=0))
        found.append(f"{plural(late, 'late update')} from {plural(len(silos), 'silo')}.")
    rejected = int(sum(_count(r, "rejected") for r in history.records))
    if rejected:
        found.append(f"{plural(rejected, 'update')} rejected.")
    lossless = sum(bool(_count(r, "not_finite")) for r in history.records)
    if lossless:
        found.append(f"A silo's training loss was not finite in {plural(lossless, 'round')}.")
    dropped = sum(bool(a.get("dropped")) for r in history.records for a in r.get("arrivals") or ())
    if dropped:
        found.append(f"{plural(dropped, 'update')} too old to count.")
    repeats = sum(int(r.get("repeats") or 0) for r in history.records)
    if repeats:
        found.append(f"Rounds were repeated {plural(repeats, 'time')} because too few silos were through.")
    blank = history.there(run.metric) & ~np.isfinite(history.of(run.metric))
    if blank.any():
        found.append(f"{run.metric} was undefined or not finite in {plural(int(blank.sum()), 'evaluated round')}.")
    raised = sum(bool(r.get("raised")) for r in history.records)
    if raised:
        found.append(f"A metric raised an error in {plural(raised, 'round')}.")
    if history.damaged:
        found.append(f"{plural(history.damaged, 'damaged line')} of metrics.jsonl left out.")
    rounds = history.rounds
    if history.num and (missing := int(rounds[-1]) - len(set(rounds.tolist()))) > 0:
        found.append(f"metrics.jsonl lacks {plural(missing, 'round')}; sums over rounds are too low by these.")
    if bad := [saved for saved in run.saved if saved.trouble]:
        found.append(f"{plural(len(bad), 'checkpoint')} cannot be read.")
    if run.maximize and (top := best(run)) and (end := last(run, run.metric)) and top.value - end.value > 0.02:
        found.append(
            f"{run.metric} fell after its best round: {number(top.value)} in round {top.round:,}, "
            f"{number(end.value)} in round {end.round:,}."
        )
    if "experiment" in (history.records[-1] if history.records else {}):
        found.append(f"It is an experiment: {history.records[-1]['experiment']}.")
    return found


def _count(record: Any, name: str) -> int:
    return len(record[name]) if record.get(name) else int(record.get(f"num_{name}") or 0)
