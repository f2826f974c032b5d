"""Seconds that an exchange will take over a given link, for `fedmpi plan --link`. Nothing is measured here.

    wire       bits that the busiest rank sends or receives / the link's rate; plan root's way up and way down use two
               directions, but one after the other: they add up
    latency    messages that follow each other x the latency: 2 ceil(log2 n) for a tree (root), or for a reduction and a
               broadcast by halves (replicated), 2 for plan sharded, in which all ranks send to all at once
    computing  seconds of the same plan and codec per parameter, as `fedmpi bench exchange --save` measured them on one
               host, where nothing waits for a network; parameters x that
    at least   the larger of wire and computing: pieces travel while others are encoded; and latency
    at most    wire and computing one after the other; and latency

The model leaves out congestion, and that ranks on one host share its link.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmpi.bench.exchange import CHANNELS, channel, label
from fedmpi.bench.figures import SCHEMA
from fedmpi.codecs import Identity
from fedmpi.errors import ConfigError
from fedmpi.exchange.choose import cost
from fedmpi.exchange.config import Channel, ExchangeSection
from fedmpi.exchange.cost import Sizes

COLUMNS = ["plan", "codec", "at least s", "at most s", "wire s", "computing s", "latency s"]
_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12, "mb/s": 8e6, "gb/s": 8e9}
_TIMES = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def rate(text: str) -> float:
    """Bits per second.

    >>> rate("1gbit"), rate("12.5 GB/s")
    (1000000000.0, 100000000000.0)
    """
    return _quantity(text, "--link", _RATES, "1gbit, 100mbit or 12.5GB/s")


def latency(text: str) -> float:
    """Seconds.

    >>> latency("20ms")
    0.02
    """
    return _quantity(text, "--latency", _TIMES, "50us or 20ms")


def _quantity(text: str, option: str, units: Mapping[str, float], such_as: str) -> float:
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z/]+)\s*", text.lower())
    try:
        value = float(found[1]) * units[found[2]] if found else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"{option} {text}: give a positive number and its unit, such as {such_as}")
    return value


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `fedmpi bench exchange --save` wrote. Raises ConfigError."""
    try:
        found = json.loads(path.read_text())
        found = found["parts"]["exchange"] if found["benchmark"] == "all" else found
        if found["schema"] != SCHEMA or found["benchmark"] != "exchange":
            raise ValueError
        rows: list[dict[str, Any]] = found["rows"]
        return rows
    except OSError as error:
        raise ConfigError(f"--costs {path}: cannot read it: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--costs {path}: give a file of `fedmpi bench exchange --save FILE` or `bench all`"
        ) from None


def forecast(
    section: ExchangeSection,
    num_elements: int,
    num_ranks: int,
    bits_per_s: float,
    latency_s: float,
    costs: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """A row for the section, then for each plan that works across hosts and for common codecs, fastest first.

    `section`: its plan is named. `num_elements`: of a vector of float32 that is sent. With one rank nothing is sent.
    Without `costs`, computing is None and counts as 0.
    """
    plain = Channel()
    others = [ExchangeSection(plan=name) for name in ("root", "replicated", "sharded")]
    others += [ExchangeSection(plan="sharded", up=each, down=each) for each in CHANNELS]
    known = {label(each.codec) for each in (plain, *CHANNELS)}
    for text in dict.fromkeys(row["codec"] for row in costs if row["codec"] and row["codec"] not in known):
        each = channel(text)
        others.append(ExchangeSection(plan="sharded", up=each, down=each))
    rows = [_row(each, num_elements, num_ranks, bits_per_s, latency_s, costs) for each in dict.fromkeys(others)]
    mine = {**_row(section, num_elements, num_ranks, bits_per_s, latency_s, costs), "configured": True}
    rest = [row for row in rows if (row["plan"], row["codec"]) != (mine["plan"], mine["codec"])]
    return [mine, *sorted(rest, key=lambda row: float(row["at_least_s"]))]


def _row(
    section: ExchangeSection,
    num_elements: int,
    num_ranks: int,
    bits_per_s: float,
    latency_s: float,
    costs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    sizes = Sizes(num_elements, 4, num_ranks)
    traffic = cost(section, sizes).traffic
    up_R, down_R = (np.full(num_ranks, num_bytes / num_ranks) for num_bytes in (traffic.up, traffic.down))
    plan, alone = section.member, num_ranks == 1
    busiest_bytes = plan.link_bytes(up_R, down_R, 4 * num_elements) * (1 + plan.one_way_at_a_time)
    wire_s = 0.0 if alone else busiest_bytes * 8 / bits_per_s
    waited_s = 0.0 if alone else latency_s * plan.messages_in_turn(num_ranks)
    codec = label(section.up.codec)
    per_param = [
        row["seconds"]["median"] / row["params"]
        for row in costs
        if row["plan"] == section.plan and row["codec"] == codec
    ]
    computing_s = per_param[0] * num_elements if per_param else None
    return {
        "plan": section.plan,
        "codec": None if isinstance(section.up.codec, Identity) else codec,
        "at_least_s": max(wire_s, computing_s or 0.0) + waited_s,
        "at_most_s": wire_s + (computing_s or 0.0) + waited_s,
        "wire_s": wire_s,
        "computing_s": computing_s,
        "latency_s": waited_s,
        "configured": False,
    }
