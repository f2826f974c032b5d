"""Runs whose ranks aggregate in regions first: see cases.py. Argument: FOLDER."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from support import reference
from support.programs.cases import require_equal, run
from support.programs.overlap import TROUBLED, troubling
from support.programs.training import configured, logistic, opened, trained

import fedmpi
from fedmpi import checkpoint
from fedmpi import comm as ranks
from fedmpi.codecs import BFloat16
from fedmpi.components import build, component
from fedmpi.errors import ConfigError, FedmpiError, Stopped
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.exchange.config import ExchangeSection
from fedmpi.flat import sha256
from fedmpi.placement import place
from fedmpi.server import FedAvg, NoState, Server
from fedmpi.state import StateTensor
from fedmpi.types import Contribution

CASES = {}
SILOS = {"name": "digits", "silos": 6, "partition": {"name": "dirichlet", "alpha": 0.5}}
FEDBACK = {"codec": {"name": "int8"}, "feedback": True}


def case(work):
    CASES[work.__name__] = work
    return work


def regions(comm, config, number):
    """So many regions of silos; ranks are assigned in turn."""
    silos = config.data.source(config.seed).silos
    found = {}
    for silo, rank in zip(silos, place(silos, comm.hosts).ranks, strict=True):
        found.setdefault(f"region {rank % number}", []).append(silo.id)
    return found


def halves(comm, config):
    """The regions of even and of odd ranks; a single one if there is one rank."""
    return regions(comm, config, 2)


def in_regions(comm, folder, name, every=1, levels=None, **more):
    config = configured(folder, name, {"data": SILOS, "server": {"optimizer": {"name": "fedavgm", "lr": 1.0}}})
    levels = levels or [{"by": halves(comm, config)}]
    exchange = {"plan": "sharded", "regions": {"levels": levels, "every": every}, **more}
    return build(fedmpi.Config, {**vars(config), "exchange": exchange})


@case
def one_exchange_across_a_round_is_the_flat_mean(comm, folder):
    unused = in_regions(comm, folder, "unused")
    by_two, by_rank = halves(comm, unused), regions(comm, unused, comm.size)
    everybody = [silo for some in by_two.values() for silo in some]
    flat = build(fedmpi.Config, {**vars(in_regions(comm, folder, f"flat-{comm.size}")), "exchange": {}})
    with fedmpi.Run(flat, comm=comm) as started:
        list(started)
    wanted_P = started.parameters.clone()
    for number, levels in enumerate(
        (
            [{"by": "node"}],
            [{"by": by_two}],
            [{"by": by_two}, {"by": {"all": everybody}}],
            [{"by": by_two, "up": {"codec": "bf16"}, "down": {"codec": "bf16"}}],
            [{"by": by_rank}, {"by": by_two}, {"by": {"all": everybody}}],
        )
    ):
        for plan in ("sharded", "replicated", "root"):
            config = in_regions(comm, folder, f"levels-{number}-{plan}-{comm.size}", levels=levels, plan=plan)
            with fedmpi.Run(config, comm=comm) as started:
                list(started)
            worst = float((started.parameters - wanted_P).abs().max())
            assert worst < (2e-2 if number == 3 else 2e-6), (levels, plan, worst)
            require_equal("ranks' parameters", len(set(comm.gather(sha256(started.parameters).encode()))), 1)


@case
def hierarchical_averaging_is_its_equations(comm, folder):
    """Two rounds in each region by itself, then the mean of regions by samples; twice."""
    config = logistic(folder, f"reference-{comm.size}", epochs=1, batch_size=50)
    by_two = halves(comm, config)
    exchange = {"plan": "sharded", "regions": {"levels": [{"by": by_two}], "every": 2}}
    config = build(fedmpi.Config, {**vars(config), "exchange": exchange})
    names = [silo.id for silo in config.data.source(config.seed).silos]
    silos = {}
    for name, data in zip(names, opened(config), strict=True):
        x, y = data.x_train.reshape(len(data.x_train), -1).numpy(), data.y_train.numpy()
        batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)]
        silos[name] = (len(x), lambda round, batches=batches: batches)
    mine = next(r for r, members in by_two.items() if set(members) & set(started_silos(comm, config)))
    with fedmpi.Run(config, comm=comm) as started:
        w_P = started.parameters.numpy().copy()
        rounds = iter(started)
        for _cycle in range(2):
            path = {
                region: list(reference.train(w_P, [silos[s] for s in some], 2, 0.2, reference.softmax_gradient))
                for region, some in by_two.items()
            }
            next(rounds)
            assert np.abs(started.parameters.numpy() - path[mine][0]).max() < 1e-5, "a region by itself"
            next(rounds)
            samples = [sum(silos[s][0] for s in some) for some in by_two.values()]
            w_P = np.average([path[region][1] for region in by_two], axis=0, weights=samples)
            assert np.abs(started.parameters.numpy() - w_P).max() < 1e-5, "the mean of regions"


def started_silos(comm, config):
    silos = config.data.source(config.seed).silos
    return place(silos, comm.hosts).hosted(comm.rank)


@case
def left_between_two_exchanges_and_gone_on_with(comm, folder):
    more = {"every": 2, "up": FEDBACK, "down": FEDBACK}
    whole, _ = trained(comm, in_regions(comm, folder, f"whole-{comm.size}", **more))
    for until in (1, 3):
        name = f"left-{until}-{comm.size}"
        trained(comm, in_regions(comm, folder, name, **more), until=until)
        again, records = trained(comm, in_regions(comm, folder, name, **more))
        require_equal("rounds gone on with", records[0]["round"], until + 1)
        require_equal(f"sha after leaving at {until}", again, whole)
    if comm.rank == 0:  # between exchanges across, no checkpoint has a single evaluated model
        scored = [number for number, score in checkpoint.scores(folder / f"whole-{comm.size}").items() if score]
        assert scored and not any(number % 2 for number in scored), scored


@case
def what_feedback_keeps_of_regions_stays_when_silos_change_ranks(comm, folder):
    """Rank 0 leads the even ranks; the silo under which it stores its state moves to rank 2."""
    ids = [f"s{rank}" for rank in range(comm.size)]
    by = {"even": ids[::2], **({"odd": ids[1::2]} if comm.size > 1 else {})}
    told = {"plan": "sharded", "up": FEDBACK, "regions": {"levels": [{"by": by}]}}
    place_of = {0: 2, 2: 0} if comm.size > 2 else {}

    def exchange(hosted):
        facts = ExchangeContext(float(comm.size), ids, [ids[hosted]])
        return make(build(ExchangeSection, told), comm, torch.zeros(5000), facts)

    def lost(some):
        """The state kept across regions, summed over ranks."""
        tensors = [one.tensor for one in some.holders.state() if one.key[0] == "level 1" and one.key[-1] == "feedback"]
        return comm.share(sum(tensors, torch.zeros(5000)).double().numpy())

    before, params_P = exchange(comm.rank), torch.zeros(5000)
    before.begin(1, 1)
    delta_P = torch.linspace(-1, 1, 5000).pow(3) * (1 + comm.rank)
    before.add(Contribution(ids[comm.rank], 1, 1.0, delta_P, 0.0, 1, 1))
    params_P, _ = before.finish(params_P, Server(FedAvg()), NoState())
    wanted = lost(before)
    assert np.abs(wanted).max() > 1e-4
    tensors = [one for one in before.state(params_P) if one.silo]
    moved = place_of.get(comm.rank, comm.rank)
    own = []
    for owner in range(comm.size):  # each silo's to its new rank
        mine = tensors if comm.rank == owner else []
        shapes = [(one.key, str(one.tensor.dtype)[6:], list(one.tensor.shape)) for one in mine]
        for number, (key, dtype, shape) in enumerate(json.loads(comm.broadcast_text(json.dumps(shapes), owner))):
            tensor = mine[number].tensor.clone() if mine else torch.empty(shape, dtype=getattr(torch, dtype))
            comm.bcast(tensor.reshape(-1).view(torch.uint8), owner)
            if moved == owner:
                own.append(StateTensor(tuple(key), tensor, "per_silo", ids[owner]))
    after = exchange(moved)
    after.restore(torch.zeros(5000), 1, [StateTensor(("params",), params_P.clone()), *own])
    np.testing.assert_array_equal(lost(after), wanted)


@case
def stopped_between_two_exchanges_and_gone_on_with(comm, folder):
    """In a round that would have ended with an exchange across, and in one that would not have."""

    def config(name):
        return build(fedmpi.Config, {**vars(in_regions(comm, folder, name, every=2)), "local": TROUBLED})

    whole, _ = trained(comm, config(f"unstopped-{comm.size}"))
    for number in (2, 3):
        started = fedmpi.Run(config(f"stopped-{number}-{comm.size}"), comm=comm)
        os.environ["OUT"] = str(started.out)
        try:
            with troubling(f"stop {number}"):
                list(started)
        except Stopped:
            started.close()
        else:
            raise AssertionError("nobody was stopped")
        again, records = trained(comm, config(f"stopped-{number}-{comm.size}"))
        require_equal("rounds gone on with", records[0]["round"], number)
        require_equal(f"sha after a stop in round {number}", again, whole)


@component
class Narrow(BFloat16):
    """Refuses values beyond 1000."""

    def _encode(self, x, payload, key, scale, residual, into):
        return -1 if abs(x * scale).max() > 1e3 else super()._encode(x, payload, key, scale, residual, into)


@case
def what_a_codec_refuses_in_one_region_is_an_error_on_all_ranks(comm, folder):
    narrow = {"codec": {"name": "support.programs.regions:Narrow"}}
    unused = in_regions(comm, folder, "unused")
    last = comm.size - 1
    silos = unused.data.source(unused.seed).silos
    silo = place(silos, comm.hosts).hosted(last)[0]
    for what, level, across in (("inside", {"up": narrow}, {}), ("across", {}, {"up": narrow})):
        levels = [{"by": halves(comm, unused), **level}]
        config = in_regions(comm, folder, f"refused-{what}-{comm.size}", levels=levels, **across)
        said = "it went through"
        try:
            with troubling(f"overflow 2 {silo}"):
                trained(comm, build(fedmpi.Config, {**vars(config), "local": TROUBLED}))
        except FedmpiError as error:
            said = str(error)
        assert "exchange.up: values 0 to" in said and (comm.size == 1 or said.startswith("rank ")), said
        if what == "inside" and comm.size > 1:
            assert said.startswith(f"rank {last}: exchange"), said
        require_equal(f"{what}: texts", len({row for row in comm.gather(said.encode().ljust(4000))}), 1)


@case
def few_bytes_cross(comm, folder):
    """One vector per region, not one per rank."""
    config = in_regions(comm, folder, f"bytes-{comm.size}", levels=[{"by": "node"}], up=FEDBACK, down=FEDBACK)
    _, records = trained(comm, config)
    assert all(r["bytes_up"] == 0 and r["bytes_down"] == 0 for r in records), "one node sends nothing across"


@case
def regions_that_cannot_be_are_refused(comm, folder):
    by_two = halves(comm, in_regions(comm, folder, "unused"))
    some = next(iter(by_two.values()))
    config = in_regions(comm, folder, "unused")
    everybody = [silo.id for silo in config.data.source(config.seed).silos]
    first = place(config.data.source(config.seed).silos, comm.hosts).hosted(0)
    others = sorted(set(everybody) - set(first))
    wrong = {
        "'nobody' is no silo": [{"by": {"a": [*everybody, "nobody"]}}],
    }
    if len(first) > 1:
        wrong["belongs to first and rest"] = [{"by": {"first": first[:1], "rest": [*first[1:], *others]}}]
    if comm.size > 1:
        wrong["belongs to no region"] = [{"by": {"a": some}}]
        wrong["divides a region"] = [{"by": "node"}, {"by": by_two}]
    for reason, levels in wrong.items():
        try:
            fedmpi.Run(in_regions(comm, folder, f"refused-{comm.size}", levels=levels), comm=comm)
        except ConfigError as error:
            assert reason in str(error), error
        else:
            raise AssertionError(reason)


if __name__ == "__main__":
    torch.manual_seed(len(sys.argv))
    run(CASES, ranks.connect(), Path(sys.argv[1]))
