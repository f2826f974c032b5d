"""The loop of `fedmpi watch`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live

from fedmpi.errors import ConfigError
from fedmpi.report.status import status
from fedmpi.watch.follow import Follower, Seen
from fedmpi.watch.frame import frame

TEXT_WIDTH = 100  # of a frame that does not go to a terminal


def watch(root: Path, every_s: float = 2.0, once: bool = False) -> None:
    """Show the run of `root` until it has finished or Ctrl-C; with `once` only as it is now.

    Raises ConfigError if there is no folder that could hold the run, and with `once` if its directory is damaged.
    """
    if not root.is_dir() and not root.parent.is_dir():
        raise ConfigError(f"{root}: there is no folder {root.parent}")
    follower = Follower(root)
    console = Console(width=None if sys.stdout.isatty() else TEXT_WIDTH, highlight=False)
    seen = follower.look()
    if once:
        if seen.trouble:
            raise ConfigError(seen.trouble)
        _print(console, seen)
        return
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            seen = _live(console, follower, seen, every_s)
            _print(console, seen)
        else:
            _scroll(console, follower, seen, every_s)
    except KeyboardInterrupt:
        return


def _live(console: Console, follower: Follower, seen: Seen, every_s: float) -> Seen:
    """One screen, drawn anew at every look. Returns what was seen last."""
    try:
        with Live(_lines(console, seen), console=console, screen=True, auto_refresh=False) as live:
            while not _is_over(seen):
                time.sleep(every_s)
                seen = follower.look()
                live.update(_lines(console, seen), refresh=True)
    except KeyboardInterrupt:
        pass
    return seen


def _scroll(console: Console, follower: Follower, seen: Seen, every_s: float) -> None:
    """A frame below the other whenever a round was committed or the state has changed."""
    told: tuple[object, ...] | None = None
    while True:
        stamp = () if seen.run is None else (seen.run.history.num, seen.run.events, status(seen.run).word)
        if stamp != told:
            _print(console, seen)
            console.print()
        told = stamp
        if _is_over(seen):
            return
        time.sleep(every_s)
        seen = follower.look()


def _is_over(seen: Seen) -> bool:
    """Whether all rounds are done and the model is saved. Others may go on: a run that failed can be resumed."""
    return seen.run is not None and status(seen.run).good is True


def _lines(console: Console, seen: Seen) -> Group:
    plain = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    unicode = (console.encoding or "").lower().startswith("utf") and not plain
    height = console.height - 1 if console.is_terminal else 60
    return Group(*frame(seen, console.width, height, unicode))


def _print(console: Console, seen: Seen) -> None:
    console.print(_lines(console, seen))
