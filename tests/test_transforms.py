"""Transforms between rule and exchange; the numbers of clip and max_norm are in equations/updates.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import config, everything, figures, put_back, refused, run  # noqa: F401

import fedmpi
from fedmpi.components import component
from fedmpi.errors import Diverged
from fedmpi.layout import Layout, Segment
from fedmpi.server import FedAvg, NoState, Server
from fedmpi.transforms import BLOCK, TRANSFORMS, Clip, MaxNorm, Noise, Transform, Updates
from fedmpi.types import Contribution

NUM = BLOCK + 3000
FROZEN = slice(40, 90)
LAYOUT = Layout(
    (
        Segment("delta", 0, NUM, "delta"),
        Segment("frozen", 40, 90, "exact", averaged=True, still=True),
        Segment("control", NUM, 2 * NUM, "auxiliary", "population"),
    )
)
MEMBERS: dict[str, dict[str, Any]] = {
    "checks": {},
    "clip": {"norm": 1.0},
    "clip, quantile": {"norm": 1.0, "quantile": 0.5},
    "noise": {"sigma": 0.5},
    "noise, mean": {"sigma": 0.5, "where": "mean"},
    "max_norm": {"norm": 1e6},
    "max_norm, times": {"times": 2.0},
}


def made(case):
    return TRANSFORMS.build({"name": case.split(",")[0], **MEMBERS[case]}, "updates")


def update(scale=1.0, silo="a"):
    draw = torch.Generator().manual_seed(3)
    vector_Q = scale * torch.randn(2 * NUM, generator=draw, dtype=torch.float64)
    vector_Q[FROZEN] = 0.0
    return Contribution(silo, 1, 2.0, vector_Q, 0.0, 1, 1, layout=LAYOUT)


def steps(*transforms, kept=None, seed=0, round=1):
    updates = Updates(transforms)
    return updates.steps(updates.init() if kept is None else kept, seed, round, LAYOUT)


# ------------------------------------------------------------ all members


def test_every_member_has_a_case():
    assert {case.split(",")[0] for case in MEMBERS} == set(TRANSFORMS.members)


@pytest.mark.parametrize("case", MEMBERS)
def test_the_same_update_becomes_the_same_bits_and_only_the_delta_changes(case):
    one, two, before = update(), update(), update()
    transform = made(case)
    assert steps(transform).on_silo(one, math.inf)[0] == steps(transform).on_silo(two, math.inf)[0] == 0
    assert torch.equal(one.vector_Q, two.vector_Q) and torch.equal(one["control"], before["control"])
    assert not one["delta"][FROZEN].any() and one.weight == before.weight
    changes = transform.changes and MEMBERS[case].get("where") != "mean"
    assert torch.equal(one["delta"], before["delta"]) is not changes
    assert one.norm == pytest.approx(float(one["delta"].norm()), rel=1e-12)


@pytest.mark.parametrize("case", MEMBERS)
def test_a_mean_becomes_the_same_whatever_its_slices_are(case):
    on_mean = steps(made(case)).on_mean(share=0.25)
    mean_P = update()["delta"]
    if on_mean is None:
        assert type(made(case)).on_mean is Transform.on_mean
        return
    before_P, whole_P = mean_P.clone(), mean_P.clone()
    on_mean(whole_P, 0)
    for cut in (1, 1000, BLOCK, BLOCK + 1):
        parts_P = before_P.clone()
        on_mean(parts_P[:cut], 0)
        on_mean(parts_P[cut:], cut)
        assert torch.equal(parts_P, whole_P)
    assert torch.equal(whole_P, before_P) is (MEMBERS[case].get("where") != "mean")
    assert not whole_P[FROZEN].any()


@pytest.mark.parametrize("case", MEMBERS)
def test_state_is_arrays_that_follow_from_norms_alone_and_nothing_is_learned_of_no_norms(case):
    transform = made(case)
    before = transform.init()
    assert bool(before) is ("norm" in transform.reads)
    after = transform.follow(np.array([0.5, 3.0, 4.0]), before)
    assert after.keys() == before.keys() and all(np.isfinite(value).all() for value in after.values())
    assert transform.follow(np.zeros(0), after) == after


# ------------------------------------------------------------ single members


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("place", [1, NUM + 1])
def test_what_is_not_finite_or_absurd_is_rejected_before_a_clip_sees_it(bad, place):
    one = update()
    one.vector_Q[place] = bad
    assert steps(Clip(norm=1.0)).on_silo(one, 1e6)[0] == 1
    one = update()
    one.weight = bad
    assert steps().on_silo(one, 1e6)[0] == (0 if bad == 1e30 else 1)


def test_noise_beyond_all_room_is_rejected_by_the_checks_after_it():
    assert steps(Noise(sigma=1e30)).on_silo(update(), 1e6)[0] == 3
    assert Updates([Noise(sigma=1.0)]).names == ["checks", "noise", "checks"]


def test_a_clip_scales_the_delta_to_its_norm_and_leaves_shorter_ones_their_bits():
    long, short = update(), update(1e-6)
    before = short["delta"].clone()
    for one in (long, short):
        assert steps(Clip(norm=2.0)).on_silo(one, math.inf)[0] == 0
    assert long.norm == pytest.approx(2.0, rel=1e-12) and torch.equal(short["delta"], before)


def test_noise_has_its_deviation_and_is_another_for_every_round_silo_seed_and_transform():
    def noise(sigma=0.5, silo="a", round=1, seed=0, before=()):
        one = update(silo=silo)
        plain = one["delta"].clone()
        stages = steps(*before, Noise(sigma=sigma), seed=seed, round=round)
        stages.on_silo(one, math.inf)
        return (one["delta"] - plain)[100:].numpy()

    found = [noise(), noise(silo="b"), noise(round=2), noise(seed=1), noise(before=[MaxNorm(norm=1e9)])]
    for i, one in enumerate(found):
        assert one.std() == pytest.approx(0.5, rel=0.02) and abs(one.mean()) < 0.01
        assert all(abs(np.corrcoef(one, other)[0, 1]) < 0.02 for other in found[:i])
    assert not noise(sigma=0.0).any()


def test_noise_after_a_clip_is_in_units_of_its_norm_wherever_it_is_added():
    one = update()
    clip = Clip(norm=0.25)
    steps(clip, Noise(sigma=4.0)).on_silo(one, math.inf)
    clipped = update()
    steps(clip).on_silo(clipped, math.inf)
    assert float((one["delta"] - clipped["delta"])[100:].std()) == pytest.approx(1.0, rel=0.02)
    mean_P = torch.zeros(NUM, dtype=torch.float64)
    on_mean = steps(clip, Noise(sigma=4.0, where="mean")).on_mean(share=0.1)
    assert on_mean is not None
    on_mean(mean_P, 0)
    assert float(mean_P[100:].std()) == pytest.approx(0.1, rel=0.02)


def test_norms_are_told_as_they_come_in_to_each_that_asks():
    updates = Updates([Clip(norm=1.0, quantile=0.5), Noise(sigma=0.0), MaxNorm(times=2.0)])
    one = update()
    before = float(one["delta"].norm())
    number, norms = updates.steps(updates.init(), 0, 1, LAYOUT).on_silo(one, math.inf)
    assert number == 0 and updates.told == ("norm_1", "norm_3") == tuple(norms)
    assert list(norms.values()) == pytest.approx([before, 1.0], rel=1e-12)


def test_the_state_follows_the_silos_that_came_as_far_as_the_transform():
    updates = Updates([MaxNorm(norm=5.0), MaxNorm(times=2.0)])
    table = {
        "taken": np.array([1.0, 0.0, 0.0, 0.0, 1.0]),  # then: by checks, by the first one, by the second one, not there
        "rejected": np.array([0.0, 1.0, 2.0, 3.0, 0.0]),
        "norm_2": np.array([1.0, 0.0, 0.0, 4.0, 2.0]),
    }
    assert updates.follow(updates.init(), table.__getitem__)["2/median"].tolist() == [2.0]


def test_a_server_changes_the_mean_before_it_scales_and_steps_it_and_leaves_other_vectors_alone():
    def on_mean(mean_S, start):
        mean_S.add_(torch.arange(start, start + len(mean_S)))

    layout = Layout((Segment("delta", 0, 6, "delta"), Segment("control", 6, 12, "auxiliary")))
    wanted = torch.cat([3 * (1.0 + torch.arange(6.0)), torch.ones(6)])
    for block in (12, 5, 4):
        server = Server(FedAvg(), layout, scale=3.0, on_mean=on_mean)
        parts = [
            server.step(torch.zeros(12)[s : s + block], torch.ones(12)[s : s + block], NoState(), s)[0]
            for s in range(0, 12, block)
        ]
        assert torch.equal(torch.cat(parts), wanted)


# ------------------------------------------------------------ in a run


@component
class NoLongerThanMine(Transform):
    """A user's transform, which needs only what it writes."""

    def on_silo(self, update, state, about):
        return update.silo != "s1"


def test_a_transform_of_ones_own_docks_by_its_name_and_rejects_by_it(tmp_path):
    records, _ = run(config(tmp_path, 2, updates=["test_transforms:NoLongerThanMine"]))
    assert [record["rejected"] for record in records] == [["s1"]] * 2
    assert records[0]["rejected_by"] == {"s1": "test_transforms:NoLongerThanMine"}
    assert "delta_norm" not in records[0]["silos"]["s1"] and "delta_norm" in records[0]["silos"]["s0"]


def test_a_round_in_which_a_transform_rejects_everybody_stops_the_run_and_names_it(tmp_path):
    with pytest.raises(Diverged, match=r"every update was rejected.*s0 by max_norm.*see updates: max_norm"):
        run(config(tmp_path, 2, updates=[{"name": "max_norm", "norm": 1e-9}]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"updates": [{"name": "clip", "norm": 0}]}, "updates.0.norm: input should be greater than 0, got 0"),
        ({"updates": [{"name": "clp", "norm": 1}]}, "updates.0: no transform 'clp'; did you mean 'clip'?"),
        ({"updates": [{"name": "max_norm"}]}, "updates.0: give either 'norm' or 'times'"),
        (
            {"updates": [{"name": "clip", "norm": 1, "vectors": ["control"]}]},
            "updates: clip: no vector 'control' is sent; available: delta",
        ),
        (
            {
                "updates": [{"name": "noise", "sigma": 1}],
                "local": {"name": "feddyn"},
                "server": {"optimizer": "feddyn"},
            },
            "updates: noise changes deltas, but feddyn's server adds up the changes of the silos' h",
        ),
        (
            {"server": {"optimizer": "fedexp"}, "aggregate": "fednova"},
            "server.optimizer: fedexp uses the norms of deltas and of their weighted mean; it needs aggregate: mean",
        ),
        (
            {"server": {"optimizer": "fedexp"}, "exchange": {"regions": {"every": 2}}},
            "server.optimizer: fedexp uses the norms of one round, and exchange.regions.every is 2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, other, message):
    with pytest.raises(fedmpi.errors.ConfigError) as caught:
        config(tmp_path, **other)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("transform", "what"),
    [
        ({"name": "clip", "norm": 1, "quantile": 0.5}, "norm"),
        ({"name": "max_norm", "times": 2}, "norm"),
        ({"name": "noise", "sigma": 1, "where": "mean"}, "share"),
    ],
)
def test_what_reads_figures_of_single_silos_needs_them_disclosed(tmp_path, transform, what):
    with pytest.raises(fedmpi.errors.ConfigError, match=rf"^disclose: pooled, but updates\.0 reads the {what} of each"):
        config(tmp_path, updates=[transform], disclose="pooled")


def test_fedexp_and_rejections_need_no_figure_of_a_single_silo(tmp_path):
    ends, by = [], []
    for disclose in ("silo", "cohort", "pooled"):
        updates = [{"name": "max_norm", "norm": 0.2}]
        server = {"optimizer": {"name": "fedexp", "eps": 1e-6}}
        records, done = run(config(tmp_path / disclose, 3, updates=updates, disclose=disclose, server=server))
        by.append([record.get("rejected_by") for record in records])
        ends.append(done.parameters)
    assert all(torch.allclose(end, ends[0], rtol=1e-5, atol=1e-6) for end in ends)
    assert by[0] == by[1] and any(by[0]) and not any(by[2])


def test_fedexp_refuses_statistics_among_the_parameters(tmp_path):
    how = {"model": {"name": "support.runs:Normed"}, "server": {"optimizer": "fedexp"}}
    assert "'norm.running_mean' is a statistic" in refused(config(tmp_path, 1, **how))
    run(config(tmp_path, 1, **how, exchange={"parameters": "trainable"}))


BOTH = [
    {"name": "clip", "norm": 0.3, "quantile": 0.5},
    {"name": "noise", "sigma": 0.01},
    {"name": "max_norm", "times": 3},
]
WAYS = {
    "replicated": {},
    "reproducible": {"reduction": "reproducible"},
    "sharded, fed back": {"plan": "sharded", "up": {"codec": "int8", "feedback": True}},
    "overlap": {"plan": "sharded", "overlap": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_resuming_gives_the_bits_of_never_having_stopped(tmp_path, way):
    def how(out):
        return config(
            tmp_path / out, 5, updates=BOTH, exchange=WAYS[way], local={"name": "scaffold"} if not way else {}
        )

    whole, done = run(how("whole"))
    run(how("cut"), 3)
    again, resumed = run(how("cut"))
    assert [figures(r) for r in again] == [figures(r) for r in whole[-len(again) :]]
    assert torch.equal(resumed.parameters, done.parameters)
    assert resumed.state.updates.keys() == done.state.updates.keys() == {"1/norm", "3/median"}
    assert all(np.array_equal(resumed.state.updates[n], value) for n, value in done.state.updates.items())
    assert done.state.updates["1/norm"][0] != 0.3


def test_no_transform_leaves_every_bit_as_it_is(tmp_path):
    plain, loose = (
        run(config(tmp_path / str(len(updates)), 3, updates=updates))[1]
        for updates in ([], [{"name": "clip", "norm": 1e9}, {"name": "max_norm", "norm": 1e9}, "checks"])
    )
    assert torch.equal(plain.parameters, loose.parameters)
