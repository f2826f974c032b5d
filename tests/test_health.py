"""When a diverging run gives up."""

import pytest

from fedmpi.components import build
from fedmpi.health import Health, StopSection


def verdicts(rounds, **section):
    health = Health(build(StopSection, section))
    return [health.look(number, loss, norm) for number, (loss, norm) in enumerate(rounds, start=1)]


def given_up(rounds, **section):
    """The first round with a verdict, or 0."""
    return next((i for i, why in enumerate(verdicts(rounds, **section), start=1) if why), 0)


FINE = [(2.0, 1.0), (1.0, 0.9), (0.5, 0.8), (0.4, 0.7)]


@pytest.mark.parametrize(
    ("rounds", "section", "when"),
    [
        (FINE, {}, 0),
        ([*FINE, (None, 1.0)], {}, 5),
        ([*FINE, (None, 1.0)], {"not_finite": False}, 0),
        ([(None, None)], {}, 1),
        ([*FINE, *[(500.0, 1.0)] * 3], {}, 7),
        ([*FINE, *[(500.0, 1.0)] * 3], {"patience": 1}, 5),
        ([*FINE, *[(500.0, 1.0)] * 9], {"loss_factor": None}, 0),
        ([*FINE, *[(500.0, 1.0)] * 3], {"loss_factor": 600.0}, 0),
        ([*FINE, (500.0, 1.0), (500.0, 1.0), (0.4, 1.0), (500.0, 1.0), (500.0, 1.0)], {}, 0),  # the run has recovered
        ([(2.0, 1.0), (1e-6, 1.0), *[(1.9, 1.0)] * 5], {}, 0),  # another cohort, no worse than the first round
        ([(0.09, 1.0), (0.13, 1.0), (0.0013, 1.0), *[(0.3, 1.0)] * 5], {}, 0),  # a single easy cohort sets no standard
        ([*FINE, *[(0.4, 100.0)] * 3], {}, 7),
        ([*FINE, *[(0.4, 100.0)] * 9], {"norm_factor": None}, 0),
        ([(0.4, 1.0), (0.4, 1.0), *[(0.4, 1e4)] * 5], {}, 6),  # two rounds set no standard: the third is recorded
        ([*FINE, (500.0, 1.0), (0.4, 100.0), (500.0, 1.0)], {}, 7),
        ([(0.0, 0.0)] * 4 + [(1.0, 1.0)] * 4, {}, 0),
        ([(-1.0, 1.0)] * 4 + [(9.0, 1.0)] * 4, {"patience": 1}, 0),  # a loss that may be negative
    ],
)  # fmt: skip
def test_a_run_is_given_up_when_the_section_says(rounds, section, when):
    assert given_up(rounds, **section) == when


def test_the_verdict_names_what_has_exploded():
    assert verdicts([*FINE, (500.0, 100.0)], patience=1)[-1] == (
        "round 5: the run has diverged: its training loss 500 is more than stop.loss_factor = 100 times the median, 1 "
        "and the mean norm of its deltas 100 is more than stop.norm_factor = 100 times the median, 0.9"
    )
    assert verdicts([*FINE, *[(500.0, 1.0)] * 3])[-1].endswith("the median, 1 in round 3 of such")
    assert "not finite (stop.not_finite)" in verdicts([(None, 1.0)])[0]


def test_bad_rounds_are_no_measure_for_later_ones():
    health = Health(StopSection(patience=2))
    for number, (loss, norm) in enumerate([*FINE, (500.0, 100.0), (0.4, 0.7)], start=1):
        assert not health.look(number, loss, norm)
    assert health.doubts == 0 and not health.look(7, 0.4, 85.0) and health.doubts == 1
    assert health.look(8, 0.4, 85.0)
