"""Every selector, and one step of a selector as in a round."""

from typing import Any

import numpy as np

from fedmpi.selection import SELECTORS, Selection

IDS = list("abcdef")
N = np.array([12.0, 30.0, 18.0, 7.0, 25.0, 60.0])
K = len(IDS)
HALF = {"fraction": 0.5}
SPECS: dict[str, list[dict[str, Any]]] = {
    "all": [{}],
    "poisson": [{"rate": 0.4}, {"rate": 0.01}],
    "uniform": [HALF, {**HALF, "weights": "inverse"}],
    "proportional": [HALF, {**HALF, "replace": False}],
    "round_robin": [{"count": 2}],
    "norm": [HALF, {"fraction": 0.3, "floor": 0.5}],
    "optimal": [HALF, {"fraction": 0.2}],
    "power_of_choice": [{"fraction": 0.3}, {"fraction": 0.3, "losses": "last", "num_candidates": 5}],
    "ucb": [HALF, {**HALF, "discount": 0.9}],
    "thompson": [HALF],
    "available": [
        {"traces": {"b": [[1, 3]], "f": []}, "inner": {"name": inner, **spec}}
        for inner, spec in (("all", {}), ("uniform", {**HALF, "weights": "inverse"}), ("optimal", HALF))
    ]
    + [{"traces": {"b": [[3, 9]], "a": [[1, 4], [6, 9]]}, "inner": {"name": "power_of_choice", "fraction": 0.5}}],
}
CASES = [(name, spec) for name in SELECTORS.members for spec in SPECS[name]]


def step(selector, state, last, rng):
    """One selection, as a round does it."""
    if hasattr(selector, "observe"):
        state = selector.observe(IDS, state, last)
    asked = selector.candidates(IDS, state, last, rng) if hasattr(selector, "candidates") else []
    if not asked:
        return Selection(*selector.select(IDS, state, last, rng))
    fresh = {silo: 1.0 + IDS.index(silo) for silo in asked}
    return Selection(*selector.select(IDS, state, last, rng, fresh))
