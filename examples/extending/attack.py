"""An attack, for experiments: hostile silos send their delta with half of its signs flipped.

The base is `Attack` in fedmpi/attacks.py; an attack defines `on_data`, `on_delta` or `on_honest`. It needs
`experimental: true`, and every record of the run marks it as an experiment.

    attack: {name: "examples.extending.attack:HalfFlip", count: 1}
    experimental: true
"""

from fedmpi.attacks import Attack
from fedmpi.components import component


@component
class HalfFlip(Attack):
    """Flips the sign of every second value of the delta."""

    def on_delta(self, delta_P, key):
        delta_P[::2].neg_()
