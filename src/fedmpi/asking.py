"""`fedmpi retire` and `fedmpi admit`: send a request to the job that trains in a run directory; wait for its answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fedmpi import requests, roster, stopping
from fedmpi.components import did_you_mean
from fedmpi.errors import ConfigError, FedmpiError

POLL_S = 0.1


def ask(root: Path, what: requests.What, silo: str, path: Path | None, wait_s: float) -> str:
    """Send a request; returns one line that says what was done, or, with `wait_s` 0, that the request was sent.

    Raises ConfigError if the request is refused or no job trains, FedmpiError if no answer came within `wait_s` seconds
    or the job ended before it."""
    found = roster.tell(root)
    if found["training"] is False:
        over = f": all {found['rounds']} rounds are done" if found["round"] >= found["rounds"] else ""
        raise ConfigError(f"no job is training in {root}{over}")
    ids = [row["id"] for row in found["silos"]]
    if silo not in ids and (what == "retire" or found["admit"] != "any"):
        more = " and does not say admit: any" if what == "admit" else ""
        raise ConfigError(f"the configuration of {root} names no silo '{silo}'{more}{did_you_mean(silo, ids)}")
    if path is not None and not path.suffix:
        raise ConfigError(f"--path {path}: give the silo's file, .h5, .npz or .csv")
    request = requests.put(root, what, silo, path)
    sure = "" if found["training"] else ", if there is one: that cannot be seen from this host"
    if wait_s == 0:
        return f"asked the job in {root} to {what} silo '{silo}' after its round{sure}"
    return _waited(root, request, wait_s)


def _waited(root: Path, request: requests.Request, wait_s: float) -> str:
    until_s = time.monotonic() + wait_s
    later = "the request stays, and the next start takes it up"
    while True:
        training = stopping.is_training(root)  # before the answer, which may be the last thing that a job writes
        if (answer := _answer(root, request.token)) is not None:
            return _told(root, request, answer)
        if training is False:
            found = roster.read(root)
            if found["round"] >= found["rounds"]:
                requests.withdraw(root, request)
                raise ConfigError(f"no job is training in {root}: all {found['rounds']} rounds are done")
            raise FedmpiError(f"the job in {root} has ended before it took up the request; {later}")
        if time.monotonic() >= until_s:
            raise FedmpiError(
                f"the job in {root} has not taken up the request within {wait_s:g} s: it does at the end of its round; "
                f"see fedmpi silos {root}"
            )
        time.sleep(POLL_S)


def _answer(root: Path, token: str) -> Any:
    try:
        return next((one for one in roster.read(root)["answers"] if one["token"] == token), None)
    except ConfigError:  # a network file system may show a new file late
        return None


def _told(root: Path, request: requests.Request, answer: Any) -> str:
    """The answer in one line. Raises ConfigError if the request was refused."""
    if answer["refused"] is not None:
        raise ConfigError(f"refused after round {answer['round']}: {answer['refused']}")
    silo, done = request.silo, answer["round"]
    if request.what == "retire":
        return f"silo '{silo}' has left after round {done}"
    row = next((row for row in roster.read(root)["silos"] if row["id"] == silo), None)
    where = "" if row is None else f", on rank {row['rank']} ({row['host']}) with {row['num_train']} training samples"
    return f"silo '{silo}' takes part from round {done + 1} on{where}"
