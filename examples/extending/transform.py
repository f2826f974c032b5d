"""An update transform: clamps every coordinate of a delta.

The base is `Transform` in fedmpi/transforms.py: `on_silo` works on a silo's update in place and returns False to
reject it; `on_mean` works on slices of the mean; `follow` updates the state after a round.

    updates: [{name: "examples.extending.transform:Clamp", limit: 0.05}]
"""

from fedmpi.components import PositiveFloat, component
from fedmpi.transforms import Transform


@component
class Clamp(Transform):
    """Clamps the values of a delta to -limit..limit."""

    changes = True  # it changes updates

    limit: PositiveFloat
    """Largest magnitude of a value."""

    def on_silo(self, update, state, about):
        update["delta"].clamp_(-self.limit, self.limit)
        return True
