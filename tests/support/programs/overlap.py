"""What `exchange.overlap` must do on any number of ranks: see cases.py. Cases leave figures in FOLDER for later
launches.

Arguments: FOLDER, shared by all launches, and the number of ranks of the launch before, except for the first.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from support import reference
from support.programs.cases import require_equal, run
from support.programs.training import configured, opened, trained
from support.traces import agrees_with_records, events, slices, sound

import fedmpi
from fedmpi import checkpoint
from fedmpi import comm as ranks
from fedmpi.components import component
from fedmpi.errors import Diverged, FedmpiError, SiloError, Stopped
from fedmpi.local import Sgd
from fedmpi.plan import plan as promise
from fedmpi.records.trace import BEHIND
from fedmpi.server import FedAvg

CASES = {}
PLANS = ("root", "replicated", "sharded")
ROUNDS = 5
MIXED = {
    "rounds": ROUNDS,
    "select": {"name": "uniform", "fraction": 0.6},
    "server": {"optimizer": {"name": "fedadam", "lr": 0.01}},
    "exchange": {"overlap": True, "parameters": ["*", "!*.bias"]},
}
INT8 = {"codec": "int8", "feedback": True}
COMPRESSED = {"exchange": {"plan": "sharded", "up": INT8, "down": INT8}}


def case(work):
    CASES[work.__name__] = work
    return work


# ---------------------------------------------------------------- events during runs


@component
class Slow(FedAvg):
    """A server with a slow step, so that the exchange is in flight during the whole next round."""

    seconds: float = 0.3

    def step(self, params_P, mean_P, state):
        time.sleep(self.seconds)
        return super().step(params_P, mean_P, state)


@component
class Troubled(Sgd):
    """In the round that the environment names, an event happens to the silo that it names, or to all."""

    def train(self, silo, model, params_P, round):
        what, _, where = os.environ.get("TROUBLE", "").partition(" ")
        if where not in (f"{round.number} {silo.id}", f"{round.number}"):
            return super().train(silo, model, params_P, round)
        if what == "raise":
            raise OSError("the disk is gone")
        if what == "stop":
            (Path(os.environ["OUT"]) / "stop").touch()
            time.sleep(0.1)  # polling interval of the file
        contribution = super().train(silo, model, params_P, round)
        if what != "stop":
            contribution.vector_Q[7] = {"diverge": float("inf"), "overflow": 2e5, "large": 6e4}[what]
        return contribution


TROUBLED = {"name": "support.programs.overlap:Troubled", "lr": 0.1, "epochs": 1}


@contextlib.contextmanager
def troubling(what):
    """`what` happens inside the block; nothing if it is empty."""
    os.environ["TROUBLE"] = what
    try:
        yield
    finally:
        del os.environ["TROUBLE"]


# ---------------------------------------------------------------- the equations


def overlapped(w_P, silos, cohorts, local_lr, gradient, server, **options):
    """w_1, w_2, ... as the silos see them; `silos` are (n_k, batches).

    Each silo continues from its own parameters. When w_t arrives, it moves by the change of the parameters minus its
    own delta of round t.
    """
    old_P = new_P = w_P
    m, v = reference.start(w_P, 0.0)
    stands, deltas, after = {}, {}, []
    for cohort in cohorts:
        starts = {k: stands.get(k, old_P) for k in cohort}
        ends = {k: reference.local_sgd(starts[k], silos[k][1], local_lr, gradient) for k in cohort}
        stands = {k: ends[k] + (new_P - old_P) - deltas.get(k, 0.0) for k in cohort}
        deltas = {k: ends[k] - starts[k] for k in cohort}
        mean_P = np.average(list(deltas.values()), axis=0, weights=[silos[k][0] for k in cohort])
        old_P = new_P
        new_P, m, v = reference.SERVERS[server](old_P, mean_P, m, v, **options)
        after.append(new_P)
    return after


def agrees(comm, folder, name, plan, trouble=""):
    """Every round's parameters follow the equations: unequal weights, a part of the silos, momentum on the server."""
    config = configured(
        folder,
        f"{name}-{comm.size}",
        rounds=6,
        data={"name": "digits", "silos": 5, "partition": {"name": "quantity"}},
        model="logistic",
        local={**TROUBLED, "lr": 0.2, "sampler": "in_order", "epochs": 2, "batch_size": 50},
        select={"name": "uniform", "fraction": 0.6},
        server={"optimizer": {"name": "fedavgm", "beta": 0.5}},
        exchange={"plan": plan, "overlap": True},
    )
    silos = {}
    for k, data in enumerate(opened(config)):
        x, y = data.x_train.reshape(len(data.x_train), -1).numpy(), data.y_train.numpy()
        silos[f"silo-{k}"] = (len(x), [(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)] * 2)
    with troubling(trouble), fedmpi.Run(config, comm=comm) as started:
        first_P, seen, cohorts, rejected = started.parameters.double().numpy(), [], [], []
        for record in started:
            seen.append(started.parameters.double().numpy())
            cohorts.append([silo for silo in record["cohort"] if silo not in record["rejected"]])
            rejected += record["rejected"]
    assert len({tuple(cohort) for cohort in cohorts}) > 1, "one cohort proves nothing about others"
    after = overlapped(first_P, silos, cohorts, 0.2, reference.softmax_gradient, "fedavgm", lr=1.0, beta=0.5)
    wanted = [first_P, *after[:4], after[5]]  # round t shows w_{t-1}, the last one w_T
    for number, (found_P, w_P) in enumerate(zip(seen, wanted, strict=True), start=1):
        worst = np.abs(found_P - w_P).max()
        assert worst < 1e-5, f"plan {plan}, round {number}: {worst}"
    assert np.abs(after[5] - after[4]).max() > 1e-3
    return rejected


for name in PLANS:
    CASES[f"is_the_simulation_{name}"] = lambda comm, folder, plan=name: agrees(comm, folder, f"simulated-{plan}", plan)


@case
def a_silo_whose_update_was_rejected_begins_where_those_do_that_took_no_part(comm, folder):
    require_equal("rejected", agrees(comm, folder, "rejected", "replicated", "diverge 3 silo-4"), ["silo-4"])


# ---------------------------------------------------------------- the same bits


@case
def reproducible_under_every_plan(comm, folder):
    shas = set()
    for plan in PLANS:
        exchange = {"exchange": {"plan": plan, "reduction": "reproducible", "verify": True}}
        sha, records = trained(comm, configured(folder, f"exact-{plan}-{comm.size}", MIXED, exchange))
        require_equal("rounds", [r["round"] for r in records], list(range(1, ROUNDS + 1)))
        shas.add(sha)
    require_equal("plans agree", len(shas), 1)
    return shas.pop()


@case
def reproducible_with_codecs(comm, folder):
    scope = {"exchange": {"scope": "silo", "reduction": "reproducible"}}
    return trained(comm, configured(folder, f"codecs-{comm.size}", MIXED, COMPRESSED, scope))[0]


@case
def a_dedicated_server_changes_no_bit(comm, folder):
    dedicated = {"exchange": {"reduction": "reproducible"}, "server": {"dedicated": comm.size > 1}}
    return trained(comm, configured(folder, f"dedicated-{comm.size}", MIXED, dedicated))[0]


@case
def another_run_that_is_left_goes_on_where_it_was(comm, folder):
    """Without `reproducible`, for the same number of ranks. Bytes of the last exchange are counted too."""

    def figures(records):
        return [{k: v for k, v in r.items() if k not in ("seconds", "peak_rss_bytes")} for r in records]

    plans = {plan: {"exchange": {"plan": plan, "verify": True}} for plan in PLANS}
    for name, more in {**plans, "int8": COMPRESSED}.items():
        whole, left = (configured(folder, f"{name}-{what}-{comm.size}", MIXED, more) for what in ("whole", "left"))
        sha, records = trained(comm, whole)
        again = trained(comm, left, until=2)[1] + (gone_on := trained(comm, left))[1]
        require_equal(f"{name}: bits", gone_on[0], sha)
        require_equal(f"{name}: records", figures(again), figures(records))


@case
def more_rounds_go_on_as_if_the_last_had_not_been(comm, folder):
    config = configured(folder, f"longer-{comm.size}", MIXED, exchange={"reduction": "reproducible"})
    short = configured(folder, f"longer-{comm.size}", MIXED, exchange={"reduction": "reproducible"}, rounds=3)
    ended = trained(comm, short)[0]
    require_equal("nothing to do", trained(comm, short), (ended, []))
    return trained(comm, config)[0]


def resumed(name, *changes):
    def work(comm, folder):
        """Leave a run at round 2, and resume the run of the launch before, on another number of ranks."""

        def config(writer):
            return configured(folder, f"moved-{name}-{writer}", MIXED, *changes, exchange={"reduction": "reproducible"})

        trained(comm, config(comm.size), until=2)
        if len(sys.argv) < 3:
            return None
        sha, records = trained(comm, config(sys.argv[2]))
        require_equal("rounds that were left", [r["round"] for r in records], [3, 4, 5])
        return sha

    return work


CASES["resumes_on_other_ranks"] = resumed("plain")
CASES["resumes_on_other_ranks_with_codecs"] = resumed("codecs", COMPRESSED, {"exchange": {"scope": "silo"}})


# ---------------------------------------------------------------- costs


def traced(comm, out, records, overlap):
    """The trace has the exchange on a thread of its own, if it runs behind training."""

    def look():
        found = events(out / "trace.json")
        names = sound(found)
        agrees_with_records(found, records)
        behind = {event["args"]["round"] for event in slices(found) if event["tid"] == BEHIND}
        assert behind == ({1, 2, 3} if overlap else set()), behind
        assert not overlap or comm.size == 1 or "transfer" in names[BEHIND, 1], names

    comm.collectively(look if comm.rank == 0 else lambda: None)


@case
def all_bytes_are_in_the_records(comm, folder):
    for plan, more in {"root": {}, "replicated": {}, "int8": COMPRESSED}.items():
        exchange = {"plan": "sharded" if plan == "int8" else plan}
        sums = {}
        for overlap in (False, True):
            changes = more, {"exchange": {**exchange, "overlap": overlap}}
            config = configured(folder, f"bytes-{plan}-{overlap}-{comm.size}", *changes, rounds=3)
            promised, (_, records) = promise(config, {}, comm.size), trained(comm, config)
            sums[overlap] = [sum(r[key] for r in records) for key in ("bytes_up", "bytes_down", "bytes_control")]
            all_said = [3 * promised[key] for key in ("bytes_up", "bytes_down", "bytes_control")]
            require_equal(f"{plan}, overlap {overlap}: what plan says", sums[overlap], all_said)
            require_equal("the first round's", records[0]["bytes_up"] > 0, comm.size > 1 and not overlap)
            require_equal("the figure", ["overlapped" in r["seconds"] for r in records], [overlap] * 3)
            traced(comm, Path(config.out), records, overlap)
        require_equal(f"{plan}: up and down", sums[True][:2], sums[False][:2])


# ---------------------------------------------------------------- faults while an exchange is in flight


def troubled(folder, name, **more):
    values = {
        "exchange": {"overlap": True, "reduction": "reproducible"},
        "local": TROUBLED,
        "server": {"optimizer": {"name": "support.programs.overlap:Slow"}},
        "checkpoint": {"every": 2},
    }
    return configured(folder, name, values, more)


def while_under_way(comm, folder, name, trouble, kind, kept):
    """A run that `trouble` ends in round 4, while the exchange of round 3 is in flight; it can be resumed."""
    config = troubled(folder, f"{name}-{comm.size}")
    started = fedmpi.Run(config, comm=comm)
    os.environ["OUT"] = str(started.out)
    try:
        with troubling(trouble):
            for record in started:
                busy = started.federation.exchange._inner._worker.pending  # type: ignore[attr-defined]
                require_equal(f"under way after round {record['round']}", busy, record["round"] in (1, 3))
    except kind:
        pass
    else:
        raise AssertionError(f"{trouble}: no {kind.__name__}")
    started.close()
    assert not started.federation.exchange._inner._worker.pending  # type: ignore[attr-defined]
    comm.collectively(lambda: require_equal("kept", max(checkpoint.sealed_rounds(started.out)), kept))
    sha, records = trained(comm, config)
    require_equal("rounds gone on with", [r["round"] for r in records], list(range(kept + 1, 5)))
    return sha


@case
def undisturbed(comm, folder):
    return trained(comm, troubled(folder, f"undisturbed-{comm.size}"))[0]


@case
def stopped_while_an_exchange_is_under_way(comm, folder):
    return while_under_way(comm, folder, "stopped", "stop 4", Stopped, 3)


@case
def all_rejected_while_an_exchange_is_under_way(comm, folder):
    return while_under_way(comm, folder, "diverged", "diverge 4", Diverged, 3)


@case
def a_silo_raises_while_an_exchange_is_under_way(comm, folder):
    return while_under_way(comm, folder, "raised", "raise 4 silo-3", SiloError, 2)


@case
def what_the_thread_raises_on_one_rank_is_one_error_on_all(comm, folder):
    """In the round after, or in the last round itself."""
    for scope in ("rank", "silo"):
        for rounds in (2, 4):
            exchange = {"plan": "sharded", "reduction": "fast", "scope": scope, "down": {"codec": "fp16"}}
            more = {
                "server": {"optimizer": {"name": "fedavg", "lr": 4}},
                "data": {"name": "digits", "silos": 2},
                "rounds": rounds,
            }
            more["checkpoint"] = {"every": 100}
            said = "a value that fp16 cannot hold went through"
            started = fedmpi.Run(troubled(folder, f"large-{scope}-{rounds}-{comm.size}", exchange=exchange, **more),
                                 comm=comm)  # fmt: skip
            try:
                with troubling("large 2 silo-1"):
                    list(started)
            except FedmpiError as error:
                said = str(error)
            started.close()
            assert "exchange.down: values 0 to" in said and "fp16" in said, said
            require_equal("texts", len({row for row in comm.gather(said.encode().ljust(4000))}), 1)


@case
def a_run_that_fails_gives_its_communicators_back(comm, folder):
    """At the next run's start, or with the process."""
    for number in range(3):
        while_under_way(comm, folder, f"again-{number}", "raise 4 silo-3", SiloError, 2)
        comm.finish()
        assert not comm._twins, "a twin was never freed"


if __name__ == "__main__":
    torch.manual_seed(len(sys.argv))  # no run may depend on it
    run(CASES, ranks.connect(), Path(sys.argv[1]))
