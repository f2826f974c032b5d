"""Learning rates over rounds: one contract for the family, and exact values."""

import math

import pytest

from fedmpi.components import to_dict
from fedmpi.schedules import SCHEDULES, Constant, Cosine, Linear, Step


@pytest.fixture(params=list(SCHEDULES.members))
def name(request):
    return request.param


def test_mapping_round_trip(name):
    schedule = SCHEDULES.build({"name": name, "warmup": 3}, "local.schedule")
    assert schedule.warmup == 3
    assert SCHEDULES.build({"name": name, **to_dict(schedule)}, "local.schedule") == schedule


def test_warmup_rises_in_equal_steps_and_then_leaves_the_schedule_as_it_is(name):
    plain, warm = SCHEDULES.build(name, ""), SCHEDULES.build({"name": name, "warmup": 4}, "")
    assert [warm.lr(0.3, t, 10) for t in (1, 2, 3, 4)] == [0.3 * 1 / 4, 0.3 * 2 / 4, 0.3 * 3 / 4, 0.3]
    assert [warm.lr(0.3, t, 10) for t in range(5, 11)] == [plain.lr(0.3, t, 10) for t in range(5, 11)]


def test_rates_never_exceed_eta0_nor_fall_below_0(name):
    for warmup in (0, 2, 20):
        schedule = SCHEDULES.build({"name": name, "warmup": warmup}, "")
        assert all(0 <= schedule.lr(0.7, t, 10) <= 0.7 for t in range(1, 11))


def test_constant():
    assert {Constant().lr(0.1, t, 50) for t in range(1, 51)} == {0.1}


def test_linear_is_exact():
    assert [Linear().lr(0.5, t, 8) for t in range(1, 9)] == [0.5 * max(0.1, (8 - t) / 8) for t in range(1, 9)]
    assert Linear().lr(0.5, 8, 8) == 0.5 * 0.1
    assert Linear(floor=0.0).lr(0.5, 8, 8) == 0.0


def test_a_step_falls_by_its_factor_every_so_many_rounds():
    assert [Step(every=3, factor=0.5).lr(0.8, t, 99) for t in range(1, 8)] == [0.8] * 3 + [0.4] * 3 + [0.2]


def test_cosine_is_exact():
    for floor in (0.0, 0.2):
        for t in range(1, 9):
            want = 0.5 * (floor + (1 - floor) * (1 + math.cos(math.pi * (t - 1) / 8)) / 2)
            assert Cosine(floor=floor).lr(0.5, t, 8) == want
    assert Cosine().lr(0.5, 5, 8) == 0.25


def test_the_first_round_of_a_cosine_trains_at_eta0_and_the_last_one_moves():
    rates = [Cosine().lr(0.5, t, 8) for t in range(1, 9)]
    assert rates[0] == 0.5 and rates[-1] > 0 and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", [Cosine, Linear])
def test_a_schedule_with_rounds_of_its_own_keeps_its_end_and_stays_there(schedule):
    short = [schedule(floor=0.1).lr(0.5, t, 8) for t in range(1, 9)]
    long = [schedule(floor=0.1, rounds=8).lr(0.5, t, 20) for t in range(1, 21)]
    assert long[:8] == short and long[9:] == pytest.approx([0.05] * 11)
