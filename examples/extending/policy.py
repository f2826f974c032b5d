"""A policy of the engine: a round needs a quorum of updates.

A policy has `objection(outcome)`, called on every rank after training and before vectors are sent. A reason ends the
run with the round before on disk; an empty string lets the round go on.

    engine: {name: synchronous, policy: {name: "examples.extending.policy:Quorum", share: 0.5}}
"""

from fedmpi.components import PositiveFraction, component


@component
class Quorum:
    """At least `share` of the cohort's updates must be usable."""

    reads = frozenset()  # no per-silo figures, only counts

    share: PositiveFraction = 0.5
    """Share of the cohort."""

    def objection(self, outcome):
        wanted = self.share * len(outcome.cohort)
        return "" if outcome.num_taken >= wanted else f"{outcome.num_taken} updates are usable, {wanted:g} are needed"
