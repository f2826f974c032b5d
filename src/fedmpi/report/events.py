"""Events of a run as sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedmpi import stopping
from fedmpi.report.numbers import listed, number, plural, seconds

# Fields that every event may have, and that no sentence needs.
_KNOWN = ("event", "round", "epoch", "time", "start", "text")


def sentence(event: Mapping[str, Any]) -> str:
    """An event of events.jsonl in words, without its round. Unknown events: their fields, one after the other.

    >>> sentence({"event": "lost", "round": 3, "ranks": [1, 2], "silos": {"a": 0, "b": None}, "num_ranks": 2})
    'Ranks 1, 2 were lost; silo a moved to rank 0; silo b left. 2 ranks went on.'
    >>> sentence({"event": "admit", "round": 4, "silo": "clinic", "epoch": 2})
    'Silo clinic joined.'
    >>> sentence({"event": "flood", "round": 4, "depth_m": 2})
    'flood: depth m 2'
    """
    silo = event.get("silo")
    match event.get("event"):
        case "lost":
            return _lost(event)
        case "joined":
            took = event.get("seconds")
            after = f" after {seconds(took)}" if isinstance(took, (int, float)) else ""
            return f"Fresh ranks joined{after}; {_ranks(event)} now."
        case "admit" if silo:
            return f"Silo {silo} joined."
        case "retire" if silo:
            return f"Silo {silo} left on request."
        case stopping.STOPPED:
            return "Training stopped on request."
        case stopping.ENDED:
            return f"The run ended: {event.get('why')}"
        case "forked":
            return f"The run was forked from {event.get('run')}, round {event.get('round')}."
    rest = [f"{key.replace('_', ' ')} {_plain(value)}" for key, value in event.items() if key not in _KNOWN]
    return ": ".join(filter(None, (str(event.get("event")), ", ".join(rest))))


def after(event: Mapping[str, Any]) -> int:
    """The round after which an event was; 0 before the first one, which a supervisor writes as -1."""
    told = event.get("round")
    return max(0, told) if isinstance(told, int) else 0


def supervised(event: Mapping[str, Any]) -> str:
    """An event of supervisor.jsonl in words: the supervisor has written them."""
    text = str(event.get("text") or event.get("event"))
    return f"Supervisor: {text}"


def _lost(event: Mapping[str, Any]) -> str:
    ranks, silos = event.get("ranks"), event.get("silos")
    ranks = [str(rank) for rank in ranks] if isinstance(ranks, list) else []
    what = "A rank was" if not ranks else f"Rank {ranks[0]} was" if len(ranks) == 1 else f"Ranks {listed(ranks)} were"
    moved: dict[Any, list[str]] = {}
    for silo, rank in silos.items() if isinstance(silos, dict) else ():
        moved.setdefault(rank, []).append(str(silo))
    parts = [f"{_named(who)} {'left' if rank is None else f'moved to rank {rank}'}" for rank, who in moved.items()]
    on = f" {_ranks(event)} went on." if event.get("num_ranks") else ""
    return f"{'; '.join([f'{what} lost', *parts])}.{on}"


def _named(silos: list[str]) -> str:
    return f"silo {silos[0]}" if len(silos) == 1 else f"silos {listed(silos, 6)}"


def _ranks(event: Mapping[str, Any]) -> str:
    num = event.get("num_ranks")
    return plural(num if isinstance(num, int) else 0, "rank")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else number(value) if isinstance(value, float) else json.dumps(value)
