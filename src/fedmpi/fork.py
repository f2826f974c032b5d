"""Starting a new run from a checkpoint of another one, with changed settings.

fork: runs/base@40                                            goes on after round 40 of runs/base
fork: {run: runs/base, round: 40, reset: [server, silos]}     but with new states where the old ones do not fit

The new run's directory gets a copy of that checkpoint and resumes from it. The other directory is only read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmpi import checkpoint, disk
from fedmpi.components import PositiveInt, called, component
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.sealed import MANIFEST, folder_of
from fedmpi.state import StateTensor

if TYPE_CHECKING:
    from fedmpi.config import Config

MARK = ".fork"  # in a run directory from before the copy until config.yaml describes the run

Part = Literal["server", "select", "updates", "silos", "stop"]

# Parts of a checkpoint's state that a fork can begin anew, and the first part of their keys there.
STATE: dict[Part, str] = {
    "server": "optimizer",
    "select": "selector",
    "updates": "updates",
    "silos": "silos",
    "stop": "health",
}

# What may change in a fork, besides what may change on every resume. All else must stay: the model, the data, the
# engine, and how updates travel.
FREE = (
    *("local", "silos", "select", "updates", "aggregate", "server.optimizer", "server.average.decay"),
    *("objective.loss", "evaluate", "seed", "runner", "fork", "exchange.plan", "exchange.scope"),
)

# Keys of local after whose change a silo's kept state still fits.
NUMBERS = (
    *("lr", "epochs", "steps", "batch_size", "micro_batch", "last_batch", "clip", "precision", "mu", "head_lr"),
    *("schedule", "step_schedule", "amount", "sampler", "head_epochs", "head_steps", "inner_lr"),
)


@component
class ForkSection:
    """A checkpoint of another run to go on from."""

    run: str
    """directory of the other run"""
    round: PositiveInt
    """round of one of its checkpoints; the new run goes on with the next round"""
    reset: tuple[Part, ...] = ()
    """states to begin anew: server (of server.optimizer), select, updates, silos (what the local rule keeps; personal
    layers and the place in the data stay), stop (earlier losses, for `stop`)"""


def section_of(fork: str | ForkSection | None) -> ForkSection | None:
    """The section for `RUN@ROUND`. Raises ValueError."""
    if not isinstance(fork, str):
        return fork
    run, at, round = fork.rpartition("@")
    if not at or not run or not round.isdigit() or not int(round):
        raise ValueError(f"fork: '{fork}' names no checkpoint; write RUN@ROUND, such as runs/base@40")
    return ForkSection(run=run, round=int(round))


def conflicts(config: Config) -> str | None:
    """Why the configuration cannot begin as a fork, in one line; None if it can."""
    section = section_of(config.fork)
    if section is None:
        return None
    if config.privacy is not None:
        return "fork: privacy: two runs from one checkpoint spend more than either account says; start a run of its own"
    if config.secure is not None:
        return "fork: secure: two sums of a round could be compared; start a run of its own"
    if config.transport.apart:
        return "fork: with transport: files the shared folder holds the run; start one of its own"
    if "silos" in section.reset and (config.engine.arrivals or called(config.policy) != "all"):
        return "fork.reset: silos that still train, or whose late updates wait, would lose them; leave out silos"
    if config.rounds <= section.round:
        return f"fork: rounds is {config.rounds}, and the fork begins after round {section.round}; give more rounds"
    return None


def look(section: ForkSection, out: Path) -> None:
    """Raises ConfigError if the checkpoint is needed for `out`, and is not there or damaged."""
    root, round = Path(section.run), section.round
    if root.resolve() == out.resolve():
        raise ConfigError(f"fork: {root} is the run's own directory; choose another out=")
    if checkpoint.sealed_rounds(out) and not begins(out):
        return
    there = checkpoint.sealed_rounds(root)
    if round not in there:
        has = f"it has those of {', '.join(map(str, there[-6:]))}" if there else "it has none"
        raise ConfigError(f"fork: {root} has no checkpoint of round {round}; {has}")
    try:
        checkpoint.check(root, round)
    except CheckpointError as error:
        raise ConfigError(f"fork: {error}") from None


def copied(config: Config, out: Path) -> None:
    """Copies the checkpoint, and the records up to its round, into a new run's directory `out`. Raises ConfigError."""
    section = section_of(config.fork)
    if (out / MARK).exists():  # of a start that was refused, or died
        _forget(out)
    if section is None:
        return
    root, round = Path(section.run), section.round
    look(section, out)
    if checkpoint.sealed_rounds(out):
        return
    folder = folder_of(root, round)
    try:
        disk.replace_text(out / MARK, f"{root.resolve()}\n")
        part = out / "checkpoints" / ".fork"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(folder, part)
        for file in part.iterdir():
            disk.sync(file)
        lines = (root / "metrics.jsonl").read_bytes().splitlines(keepends=True) if _has_records(root) else []
        disk.replace_bytes(out / "metrics.jsonl", b"".join(line for line in lines if _round_of(line) <= round))
        told = {"event": "forked", "run": str(root.resolve()), "round": round}
        told["manifest_sha256"] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        disk.append_line(out / "events.jsonl", json.dumps(told))
        part.rename(folder_of(out, round))
        disk.sync(out / "checkpoints")
        checkpoint.check(out, round)
    except CheckpointError as error:
        raise ConfigError(f"fork: {error}") from None
    except OSError as error:
        raise ConfigError(f"fork: cannot copy {folder} to {out}: {error.strerror or error}") from None


def begins(out: Path) -> bool:
    """Whether the directory holds the copied checkpoint of a fork that has not begun yet."""
    return (out / MARK).exists()


def origin(out: Path) -> Path:
    """The directory of the run that a fork in `out` goes on from, before it has begun."""
    return Path((out / MARK).read_text(encoding="utf-8").rstrip("\n"))


def has_begun(out: Path) -> None:
    """The directory describes the run from now on."""
    (out / MARK).unlink(missing_ok=True)


def _forget(out: Path) -> None:
    """Removes what `copied` has copied, unless the run has begun since."""
    if not (out / "config.yaml").exists():
        checkpoint.remove_after(out, 0)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints" / ".fork", ignore_errors=True)
    (out / MARK).unlink()


def _has_records(root: Path) -> bool:
    return (root / "metrics.jsonl").is_file()


def _round_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["round"])
    except (ValueError, LookupError, TypeError):
        return float("inf")


def refused(changed: Sequence[str]) -> list[str]:
    """Of the differences between two configurations, as text, those that a fork may not have; names come first."""

    def depth(text: str) -> tuple[bool, int]:
        key = text.partition(" is ")[0]
        return not key.endswith(".name"), key.count(".")

    return sorted((text for text in changed if not _is_below(text, FREE)), key=depth)


def _is_below(text: str, keys: Collection[str]) -> bool:
    """Whether a difference `KEY is A there and B here` is at or below one of the keys."""
    key = text.partition(" is ")[0]
    return any(key == free or key.startswith((f"{free}.", f"{free}[")) for free in keys)


def unfit(section: ForkSection, out: Path, changed: Sequence[str], feedback: bool, stateful: bool) -> str:
    """Why a state does not fit what has `changed`, in one line; empty if all fit or are reset. `out` holds the copy;
    `stateful`: whether the new server optimizer keeps a state."""
    if feedback and (way := [text for text in changed if _is_below(text, ["exchange.plan", "exchange.scope"])]):
        return f"{way[0]}: what error feedback has kept does not fit; leave it as it was"
    kept = dict(_kept(out, section.round))
    for part, texts in _moved(changed).items():
        if not texts or part in section.reset:
            continue
        how = f"{{run: {section.run}, round: {section.round}, reset: [{part}]}}"
        if part == "server" and stateful and not kept.get(part):
            return f"{texts[0]}, and round {section.round} has no state of it; begin it anew with fork: {how}"
        if names := kept.get(part):
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            state = f"the state '{part}' of round {section.round} ({shown})"
            return f"{texts[0]}, so {state} does not fit; begin it anew with fork: {how}"
    return ""


def begin_anew(section: ForkSection, root: Path, changed: Sequence[str]) -> str:
    """Which states begin anew, as the end of a message: those that are reset, and those of what has `changed` of which
    the checkpoint in `root` holds none; empty if all go on."""
    kept = dict(_kept(root, section.round))
    lacking = [part for part, texts in _moved(changed).items() if texts and not kept.get(part)]
    told = [f"'{part}' (reset)" for part in section.reset]
    told += [f"'{part}' (the checkpoint has none)" for part in lacking if part not in section.reset]
    return f"; states that begin anew: {', '.join(told)}" if told else ""


def _moved(changed: Sequence[str]) -> dict[Part, list[str]]:
    """The differences after which a state does not fit any more, by part."""
    return {
        "server": [text for text in changed if _is_below(text, ["server.optimizer.name"])],
        "select": [text for text in changed if _is_below(text, ["select.name"])],
        "updates": [text for text in changed if _is_below(text, ["updates"])],
        "silos": [
            text for text in changed if _is_below(text, ["local"]) and not _is_below(text, _numbers("local", NUMBERS))
        ],
        "stop": [text for text in changed if _is_below(text, ["objective.loss"])],
    }


def _numbers(key: str, names: Collection[str]) -> list[str]:
    return [f"{key}.{name}" for name in names]


def _kept(root: Path, round: int) -> Iterator[tuple[str, set[str]]]:
    """The states that a checkpoint holds, by part, as names of tensors."""
    server = checkpoint.read_server(root, round)
    for part, first in STATE.items():
        if part == "silos":
            ids = [silo for some in checkpoint.manifest(root, round).hosted for silo in some]
            rows = checkpoint.read_silos(root, round, ids)
            yield part, {key[-1] for row in rows.values() for key in row if key[:2] == checkpoint.KEPT}
        else:
            yield part, {"/".join(key[1:]) for key in server if key[0] == first}


def without(stored: Sequence[StateTensor], reset: Collection[Part], personal: Mapping[str, Any]) -> list[StateTensor]:
    """A checkpoint's tensors without those that begin anew. `personal` names the model's personal layers."""
    gone = {STATE[part] for part in reset if part != "silos"}
    found = [one for one in stored if one.key[0] not in gone]
    if "silos" not in reset:
        return found
    return [one for one in found if one.key[:2] != checkpoint.KEPT or one.key[2] in personal]
