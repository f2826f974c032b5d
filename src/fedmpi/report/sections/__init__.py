"""The parts of a report about one run, one file each. A part is a function of a run that returns a section, or None if
there is nothing to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fedmpi.report.blocks import Block, Section, Switch
from fedmpi.report.reading import RunData
from fedmpi.report.sections.configuration import configuration
from fedmpi.report.sections.figures import figures
from fedmpi.report.sections.learning import learning
from fedmpi.report.sections.participation import participation
from fedmpi.report.sections.privacy import privacy
from fedmpi.report.sections.saved import saved
from fedmpi.report.sections.silos import silos
from fedmpi.report.sections.staleness import staleness
from fedmpi.report.sections.timing import timing
from fedmpi.report.sections.traffic import traffic
from fedmpi.report.sections.where import where

Part = Callable[[RunData], Section | None]

PARTS: Sequence[Part] = (
    *(learning, silos, figures, timing, traffic, participation, staleness, privacy, where, saved, configuration),
)


def sections(run: RunData, prefix: str = "") -> list[Section]:
    """All sections of a run; `prefix` makes their ids unique among runs."""
    found = (part(run) for part in PARTS)
    return [
        Section(prefix + one.id, one.title, [_unique(block, prefix) for block in one.blocks])
        for one in found
        if one is not None
    ]


def _unique(block: Block, prefix: str) -> Block:
    return replace(block, id=prefix + block.id) if isinstance(block, Switch) else block
