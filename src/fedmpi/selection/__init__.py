"""Selectors: which silos form a round's cohort.

    base       what they share: the selection, the protocol, draws
    draws      by nothing or by numbers of samples: all, uniform, proportional, round robin
    norms      by the norms of updates: importance sampling, optimal client sampling
    losses     by losses: power-of-choice, bandits
    available  traces of who is there, around one of the others

A selector is called with the same inputs on every rank and answers the same on every rank: no message is needed, but
where it asks for fresh losses one small collective.
Its state is a dict of arrays that goes in and comes out, and into the checkpoint. What it learns of silos is the last
round's outcome; it never sees a vector.
"""

from __future__ import annotations

from fedmpi.components import Family
from fedmpi.selection.available import INNER, Available
from fedmpi.selection.base import Selection, Selector, State, carried
from fedmpi.selection.draws import All, Uniform

SELECTORS = Family("selector", {**INNER.members, "available": Available}, Selector, defaults=True)

__all__ = ["SELECTORS", "All", "Selection", "Selector", "State", "Uniform", "carried"]
