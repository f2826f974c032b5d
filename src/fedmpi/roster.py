"""silos.json: the silos of a run and their state, for people and programs that watch it. A resume never reads it.

Rank 0 writes the file when silos are registered, when members change, and from time to time to update the last
contributions. Each write is atomic.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi import disk, requests, stopping
from fedmpi.errors import ConfigError

if TYPE_CHECKING:
    from fedmpi.membership import Membership

log = logging.getLogger("fedmpi")

FILE = "silos.json"
FORMAT = 1
MOST_BYTES = 1 << 28
ANSWERS = 100  # number kept, the newest
HEARD_S = 5.0  # shortest time between two writes that only update last contributions
SHARE = 0.01  # largest share of the run's time that these writes take

Row = dict[str, Any]


def contributors(record: Mapping[str, Any]) -> list[str]:
    """The silos whose updates count in a round, as far as its record tells.

    >>> contributors({"cohort": ["a", "b", "c", "d"], "rejected": ["a"], "late": {"b": "partial", "c": "dropped"}})
    ['b', 'd']
    >>> contributors({"cohort": ["a"], "stale": {"b": 1}})
    ['a', 'b']
    """
    absent = {silo for silo, what in record.get("late", {}).items() if what != "partial"}
    absent.update(record.get("rejected", ()))
    arrived = [silo for silo in record.get("stale", {}) if silo not in record["cohort"]]
    return [silo for silo in record["cohort"] if silo not in absent or silo in record.get("stale", {})] + arrived


class Roster:
    """Keeps silos.json up to date, on rank 0. Starts from the file of an earlier start, as of the round to resume from.

    Each silo has a row: `id`; `state` (active, retired, lost, or absent if it never took part) and `why`; `rank`,
    `host` and the other facts that `ranks` gives about the machine; `num_train`; `since` and `until`, its first and
    last round; `heard`, round and Unix time of its last contribution; `data` and `code`, its fingerprints when it was
    registered.
    """

    def __init__(self, root: Path, done: int, rounds: int, admit: str = "configured") -> None:
        self._path, self._rounds, self._done, self._admit = root / FILE, rounds, done, admit
        self._rows: dict[str, Row] = {}
        self._answers: list[Row] = []
        self._next_s, self._warned = 0.0, False
        try:
            before = read(root)
        except ConfigError:  # a new file replaces it
            return
        self._answers = before["answers"]
        for row in before["silos"]:
            if row["heard"] is not None and row["heard"]["round"] > done:
                row["heard"] = None
            if row["until"] is not None and row["until"] > done:  # it left after the round to resume from
                row |= {"state": "active", "why": None, "until": None}
            if row["since"] is not None and row["since"] > done + 1:  # it joined after it
                row |= {"state": "absent" if row["heard"] is None else "retired", "why": None, "since": None}
            self._rows[row["id"]] = row

    def register(
        self,
        members: Membership,
        known: Sequence[str],
        about: Mapping[str, Row],
        ranks: Sequence[Row],
        done: int,
        lost: Mapping[str, str],
        why: str | None = None,
    ) -> None:
        """Set the members after `done` rounds and write the file. Raises OSError if that fails.

        `known`: all silos that may take part. `about`: `num_train`, `data` and `code` of each member. `ranks`: one row
        per rank. `lost`: why each lost silo was lost; other silos that left count as retired, with the reason `why`.
        """
        rows: dict[str, Row] = {}
        for silo in known:
            row = self._rows.get(silo, {"id": silo, "state": "absent", "why": None, **dict.fromkeys(_FIELDS)})
            if silo in members.teams:
                if row["state"] != "active":
                    row |= {"state": "active", "why": None, "since": done + 1, "until": None, "code": None}
                told = about[silo]
                row |= {**told, "code": row["code"] or told["code"]}
                row |= {name: value for name, value in ranks[members.rank(silo)].items() if name in _OF_RANK}
            elif row["state"] == "active":
                state, reason = ("lost", lost[silo]) if silo in lost else ("retired", why)
                row |= {"state": state, "why": reason, "until": done}
            rows[silo] = row
        self._rows, self._done = rows, done
        self._write()

    def heard(self, done: int, silos: Collection[str]) -> None:
        """Record that these silos contributed to round `done`. Writes the file after the last round, else at times."""
        told = {"round": done, "time": round(time.time(), 3)}
        for silo in silos:
            self._rows[silo]["heard"] = told
        self._done = done
        if time.monotonic() >= self._next_s or done >= self._rounds:
            self.save()

    def answer(self, token: str, done: int, why: str | None) -> None:
        """Record that a request was applied after round `done`, or refused, with the reason `why`; write the file."""
        self._answers = [*self._answers, {"token": token, "round": done, "refused": why}][-ANSWERS:]
        self.save()

    def save(self) -> None:
        """Write the file. On failure, warn once and go on; the next write tries again."""
        began_s = time.monotonic()
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): it says what was before", self._path, error.strerror)
            self._warned = True
        took_s = time.monotonic() - began_s
        self._next_s = began_s + max(HEARD_S, took_s / SHARE)

    def _write(self) -> None:
        whole = {"format": FORMAT, "round": self._done, "rounds": self._rounds, "admit": self._admit}
        disk.replace_text(self._path, json.dumps({**whole, "silos": [*self._rows.values()], "answers": self._answers}))


_OF_RANK = ("rank", "host", "device", "gpu", "memory_bytes", "threads")
_FIELDS = (*_OF_RANK, "num_train", "since", "until", "heard", "data", "code")


def read(root: Path) -> dict[str, Any]:
    """The content of silos.json in `root`. Raises ConfigError if the file is missing, unreadable or damaged."""
    path = root / FILE
    try:
        found = json.loads(disk.read_bytes(path, MOST_BYTES))
        if found["format"] != FORMAT:
            raise ConfigError(f"{path} is of format {found['format']}; this fedmpi reads format {FORMAT}")
        for row in found["silos"]:
            if not isinstance(row["id"], str) or not {"state", "why", *_FIELDS} <= row.keys():
                raise ValueError
            if any(not isinstance(row[name], int | None) for name in ("since", "until")):
                raise ValueError
            heard = row["heard"]
            if heard is not None and not (isinstance(heard["round"], int) and isinstance(heard["time"], int | float)):
                raise ValueError
            if row["memory_bytes"] is not None and not isinstance(row["memory_bytes"], int):
                raise ValueError
        found.setdefault("answers", [])
        found.setdefault("admit", "configured")
        for answer in found["answers"]:
            if not isinstance(answer["token"], str) or not isinstance(answer["round"], int) or "refused" not in answer:
                raise ValueError
        if not isinstance(found["round"], int) or not isinstance(found["rounds"], int):
            raise ValueError
    except FileNotFoundError:
        raise ConfigError(f"{root} has no {FILE}: its run has not begun, or an earlier fedmpi has begun it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConfigError(f"{path} is damaged; the job that trains there writes it again") from None
    whole: dict[str, Any] = found
    return whole


def tell(root: Path) -> dict[str, Any]:
    """The content of silos.json, and `training`: whether a job trains in `root` now; None if this host cannot tell.

    For a silo with a waiting request, `why` says what is asked; a silo that waits for admission is `pending`. Raises
    ConfigError if `root` is no run directory, or as `read` does."""
    if not (root / "config.yaml").exists():
        raise ConfigError(f"{root} is not a run directory")
    found = read(root)
    rows = {row["id"]: row for row in found["silos"]}
    for _, request in requests.read(root):
        if isinstance(request, requests.Request) and request.epoch is None:
            unknown = {"id": request.silo, "state": "absent", "why": None, **dict.fromkeys(_FIELDS)}
            row = rows.setdefault(request.silo, unknown)
            row["why"] = f"asked to {'leave' if request.what == 'retire' else 'be admitted'}"
            if request.what == "admit" and row["state"] != "active":
                row["state"] = "pending"
    kept = {name: found[name] for name in ("round", "rounds", "admit", "answers")}
    return {"training": stopping.is_training(root), **kept, "silos": [*rows.values()]}


def table(found: Mapping[str, Any]) -> Any:
    """A rich table of what `tell` returns, one row per silo."""
    from rich.table import Table

    training = {True: "a job is training", False: "no job is training", None: "a job may be training on another host"}
    shown = Table(title=f"round {found['round']} of {found['rounds']}; {training[found['training']]}")
    names = ("silo", "state", "rounds", "last heard", "samples", "rank", "host", "device", "memory", "data", "code")
    for name in names:
        shown.add_column(name, justify="right" if name in ("samples", "rank", "memory") else "left")
    for row in found["silos"]:
        state = f"{row['state']}: {row['why']}" if row["why"] else row["state"]
        since, until = row["since"], row["until"]
        took_part = None if since is None else f"{since}-" if until is None else f"{since}-{max(until, since - 1)}"
        memory = row["memory_bytes"] and f"{row['memory_bytes'] / 2**30:.1f} GiB"
        device = f"{row['device']} ({row['gpu']})" if row["gpu"] else row["device"]
        figures = (took_part, _when(row["heard"]), row["num_train"], row["rank"], row["host"], device, memory)
        cells = (*figures, row["data"], row["code"])
        shown.add_row(row["id"], state, *("-" if cell is None else str(cell) for cell in cells))
    return shown


def _when(heard: Mapping[str, Any] | None) -> str | None:
    """Round and local time of a silo's last contribution; None if there is none."""
    if heard is None:
        return None
    return f"round {heard['round']}, {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(heard['time']))}"
