"""Selectors: which silos form a round's cohort.

    base       the base classes, the selection, weighted draws
    draws      independent of training: all, uniform, proportional, round robin
    norms      by the norms of updates: importance sampling, optimal client sampling
    losses     by losses: power-of-choice, bandits
    available  traces of availability, around one of the others

A selector gets the same inputs on every rank and returns the same cohort, without a message; only fresh losses take one
small collective. Its state is a dict of arrays, passed in and returned, and saved in the checkpoint. It sees the last
round's outcome, never a vector.
"""

from __future__ import annotations

from fedmpi.components import Family
from fedmpi.selection.available import INNER, Available
from fedmpi.selection.base import Selection, Selector, State, carried
from fedmpi.selection.draws import All, Uniform

SELECTORS = Family("selector", {**INNER.members, "available": Available}, Selector, defaults=True)

__all__ = ["SELECTORS", "All", "Selection", "Selector", "State", "Uniform", "carried"]
