"""Drawings in SVG whose colours come from the page's style: small lines, and the strip of silos by rounds."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 160, 56  # of a small line
ROW = 18  # height of a silo in the strip
SLIM, BROAD = set("fijlrtI1.,:;'|!()[] "), set("mwMWGOQ@%")  # letters of a sans-serif font


def sparkline(
    rounds: np.ndarray, values: np.ndarray, reference: np.ndarray, low: float, high: float, chosen: np.ndarray
) -> str:
    """A silo's values over rounds, with those of all silos dotted; both between `low` and `high`."""
    first, last = float(rounds[0]), float(rounds[-1])
    wide, tall = (last - first) or 1.0, (high - low) or 1.0

    def points(of: np.ndarray) -> list[tuple[float, float]]:
        return [
            (3 + (rounds[i] - first) / wide * (WIDTH - 6), 3 + (high - of[i]) / tall * (HEIGHT - 6))
            for i in chosen
            if np.isfinite(of[i])
        ]

    own, of_all = points(values), points(reference)
    drawn = "".join(
        f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in some)}"/>'
        for kind, some in (("ref", of_all), ("own", own))
        if len(some) > 1
    )
    end = f'<circle class="dot" cx="{own[-1][0]:.1f}" cy="{own[-1][1]:.1f}" r="3"/>' if own else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true"><rect class="frame" width="{WIDTH}" height="{HEIGHT}" '
        f'rx="4"/>{drawn}{end}</svg>'
    )


# How a state looks in a cell: its class, and top and height as shares of the cell. Shape tells it, colour repeats it.
SHAPES = {
    "full": (0.0, 1.0),
    "partial": (0.5, 0.5),
    "dropped": (0.75, 0.25),
    "buffered": (0.0, 0.5),
    "stale": (0.0, 0.25),
    "rejected": (0.4, 0.2),
    "away": (0.42, 0.16),
}


def sample(state: str) -> str:
    """A cell of the strip, for its legend."""
    top, height = SHAPES[state]
    return (
        '<svg width="16" height="14" viewBox="0 0 16 14" aria-hidden="true">'
        '<rect class="frame" width="16" height="14"/>'
        f'<rect class="s-{state}" x="1" width="14" y="{14 * top:.1f}" height="{14 * height:.1f}"/></svg>'
    )


def _width(text: str) -> float:
    """About as many pixels as the widest usual fonts take for a text of 12 px."""
    return sum(6.0 if c in SLIM else 12.0 if c in BROAD or ord(c) > 0x2E80 else 8.0 for c in text)


def strip(names: Sequence[str], rounds: Sequence[int], states: Sequence[Sequence[str]]) -> str:
    """A row per silo, a cell per round (or stretch of rounds). `states[silo][cell]`: a key of SHAPES, or empty."""
    num = len(rounds)
    left = 12 + max((_width(name[:22]) for name in names), default=0.0)
    cell = min(14.0, max(3.0, (908 - left) / num))  # the page's column has 912 pixels
    width, height = left + cell * num + 4, ROW * len(names) + 24
    parts = []
    for n, (name, row) in enumerate(zip(names, states, strict=True)):
        y = ROW * n + 2
        shown = name if len(name) <= 22 else f"{name[:21]}…"
        parts.append(f'<text x="{left - 8:.0f}" y="{y + 11}" text-anchor="end">{html.escape(shown)}</text>')
        parts.append(f'<rect class="frame" x="{left:.1f}" y="{y}" width="{cell * num:.1f}" height="{ROW - 4}"/>')
        start = 0
        while start < num:
            end = start + 1
            while end < num and row[end] == row[start]:
                end += 1
            if row[start]:
                top, share = SHAPES[row[start]]
                gap = 1 if cell >= 6 else 0
                wide = cell * (end - start)
                # Equal neighbours are one path with gaps between cells.
                path = f"M{left + cell * start:.1f} {y + (ROW - 4) * top:.1f}"
                tall = (ROW - 4) * share
                if gap:
                    path += f"h{cell - gap:.1f}v{tall:.1f}h-{cell - gap:.1f}z" + "".join(
                        f"m{cell:.1f} 0h{cell - gap:.1f}v{tall:.1f}h-{cell - gap:.1f}z" for _ in range(end - start - 1)
                    )
                else:
                    path += f"h{wide:.1f}v{tall:.1f}h-{wide:.1f}z"
                parts.append(f'<path class="s-{row[start]}" d="{path}"/>')
            start = end
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * cell >= 40 or s == 100)
    base = ROW * len(names) + 18
    for i in range(num):
        if rounds[i] % step and i and num == rounds[-1] - rounds[0] + 1:  # a cell is a round
            continue
        if i % step and num != rounds[-1] - rounds[0] + 1:
            continue
        middle = left + cell * (i + 0.5)
        parts.append(f'<text class="muted" x="{middle:.1f}" y="{base}" text-anchor="middle">{rounds[i]:,}</text>')
    body = "".join(parts)
    return (
        f'<svg width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}" aria-hidden="true">{body}</svg>'
    )
