"""A policy of the engine: a round needs a quorum of updates.

A policy has `objection(outcome)`, asked on every rank after training and before any vector travels. What it returns
ends the run with the round before on disk; an empty text lets the round go on.

    engine: {name: synchronous, policy: {name: "examples.extending.policy:Quorum", share: 0.5}}
"""

from fedmpi.components import PositiveFraction, component


@component
class Quorum:
    """At least `share` of the cohort's updates must be usable."""

    reads = frozenset()  # of single silos; numbers alone

    share: PositiveFraction = 0.5
    """Of the cohort."""

    def objection(self, outcome):
        wanted = self.share * len(outcome.cohort)
        return "" if outcome.num_taken >= wanted else f"{outcome.num_taken} updates are usable, {wanted:g} are needed"
