"""What a whole run must do on any number of ranks: see cases.py. Cases leave figures in FOLDER for later launches.

Arguments: FOLDER, shared by all launches, and the number of ranks of the launch before, except for the first.
"""

import contextlib
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from support import reference
from support.programs.cases import require_equal, run

import fedmpi
from fedmpi import comm as ranks
from fedmpi.aggregate import Mean
from fedmpi.components import build, component
from fedmpi.errors import ConfigError, Diverged, ExchangeError, SiloError
from fedmpi.exchange import plans
from fedmpi.flat import sha256
from fedmpi.membership import Membership
from fedmpi.plan import plan as promise
from fedmpi.results import newest
from fedmpi.selection import All

CASES = {}
ROUNDS = 4
BASE = {
    "rounds": ROUNDS,
    "data": {"name": "digits", "silos": 4, "partition": {"name": "dirichlet", "alpha": 0.5}},
    "model": {"name": "mlp", "hidden": [16]},
    "local": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 64},
    "checkpoint": {"every": 100},
    "device": {"name": "cpu"},
}
PLANS = tuple(plans.PLANS.members)
# Each must end with the same bits on 1, 2 and 4 ranks, and under every plan that supports it.
RUNS = {
    "digits": {},
    "nine_silos_a_third": {"data": {"name": "digits", "silos": 9}, "select": {"name": "uniform", "fraction": 0.34}},
    "two_silos": {"data": {"name": "digits", "silos": 2}},
    "fedadam": {"server": {"optimizer": {"name": "fedadam", "lr": 0.01}}},
    "fedyogi_uniform": {
        "server": {"optimizer": {"name": "fedyogi", "lr": 0.01}},
        "aggregate": {"name": "mean", "weights": "uniform"},
    },
    "personal_bias": {
        "exchange": {"parameters": ["*", "!*.bias"]},
        "select": {"name": "uniform", "fraction": 0.5},
        "server": {"optimizer": {"name": "fedavgm", "lr": 1.0}},
    },
    "codecs": {
        "exchange": {
            "plan": "sharded",
            "scope": "silo",
            "up": {"codec": {"name": "topk", "ratio": 0.1}, "feedback": True, "decay": 0.9},
            "down": {"codec": {"name": "int8", "rounding": "stochastic"}, "feedback": True},
        },
        "select": {"name": "uniform", "fraction": 0.5},
        "server": {"optimizer": {"name": "fedadam", "lr": 0.01}},
    },
    "fresh_losses": {"select": {"name": "power_of_choice", "fraction": 0.5, "num_candidates": 3, "samples": 50}},
    "median": {"exchange": {"plan": "sharded", "scope": "silo"}, "aggregate": {"name": "median"}},
    "average": {
        "server": {
            "optimizer": {"name": "fedavgm", "lr": 0.7, "nesterov": True, "schedule": "cosine"},
            "average": {"decay": 0.6},
        },
    },
}


def case(work):
    CASES[work.__name__] = work
    return work


def configured(folder, name, *changes, **more):
    """BASE with changes; sections are merged, components replaced."""
    values = {**BASE, "out": str(folder / name)}
    for change in (*changes, more):
        for key, value in change.items():
            both = key in ("server", "exchange", "checkpoint") and key in values
            values[key] = {**values[key], **value} if both else value
    return build(fedmpi.Config, values)


def trained(comm, config, until=None, membership=None):
    """SHA-256 of the final parameters, and the records."""
    records = []
    with fedmpi.Run(config, comm=comm, membership=membership) as started:
        for record in started:
            records.append(record)
            if record["round"] == until:
                break
    return sha256(started.averaged_parameters), records


def reproducible(name):
    def work(comm, folder):
        """All plans give the same bits; returns which plans ran."""
        shas = {}
        for plan in ("sharded",) if name in ("codecs", "median") else PLANS:
            exchange = {"exchange": {"plan": plan, "reduction": "reproducible"}}
            config = configured(folder, f"{name}-{plan}-{comm.size}", RUNS[name], exchange)
            shas[plan], records = trained(comm, config)
            require_equal("rounds", [r["round"] for r in records], list(range(1, ROUNDS + 1)))
            lines = comm.gather(json.dumps(records).encode().ljust(60_000))
            require_equal("ranks whose records differ", [r for r, line in enumerate(lines) if line != lines[0]], [])
            digests = comm.gather(shas[plan].encode())
            require_equal("ranks' parameters", len(set(digests)), 1)
        require_equal("shas", set(shas.values()), {shas["sharded"]})
        return shas["sharded"]

    return work


for run_name in RUNS:
    CASES[f"reproducible_{run_name}"] = reproducible(run_name)


@case
def fast_repeats_and_plans_agree(comm, folder):
    found = {}
    for name in (*PLANS, "again"):
        exchange = {"plan": "replicated" if name == "again" else name}
        with fedmpi.Run(configured(folder, f"fast-{name}-{comm.size}", exchange=exchange), comm=comm) as started:
            list(started)
        found[name] = started.parameters.clone()
    assert torch.equal(found["again"], found["replicated"]), "the same plan gave other bits"
    assert torch.allclose(found["root"], found["replicated"], atol=1e-6), (
        (found["root"] - found["replicated"]).abs().max()
    )


@case
def sums_alone_say_the_same_of_all_silos_on_every_rank(comm, folder):
    """`disclose: pooled` gives the same parameters and pooled figures as `silo`, equal on every rank."""
    done = {}
    for disclose in ("silo", "pooled"):
        done[disclose] = trained(comm, configured(folder, f"says-{disclose}-{comm.size}", disclose=disclose, rounds=2))
    (sha, records), (other, pooled) = done.values()
    assert sha == other
    for one, two in zip(records, pooled, strict=True):
        for key in ("train_loss", "delta_norm", "loss", "accuracy"):
            assert abs(one[key] - two[key]) <= 1e-12 * abs(one[key]), (key, one[key], two[key])
        assert two["num_rejected"] == 0 and all(len(row) == 2 for row in two["silos"].values())
    figures = [{k: v for k, v in record.items() if k not in ("seconds", "peak_rss_bytes")} for record in pooled]
    comm.require_equal("the records", hashlib.sha256(json.dumps(figures).encode()).digest())


@case
def what_a_run_leaves_behind_is_readable(comm, folder):
    """Parameters and model after other runs, on any device; also of a failed run."""
    for plan in PLANS:
        left = []
        for number, last in enumerate((ROUNDS, 2, ROUNDS)):
            config = configured(folder, f"left-{plan}-{number}-{comm.size}", exchange={"plan": plan})
            started = fedmpi.Run(config, comm=comm)
            with contextlib.suppress(LookupError), started:
                for record in started:
                    if record["round"] == last < ROUNDS:
                        raise LookupError
            left.append((started, sha256(started.parameters)))
        for started, sha in left:
            require_equal(f"plan {plan}", sha256(started.parameters), sha)
            assert all(tensor.isfinite().all() for tensor in started.model.parameters())
        parts = [tensor.reshape(-1) for tensor in started.model.state_dict().values()]
        require_equal(f"model, plan {plan}", sha256(torch.cat(parts)), sha)


def logistic(folder, name, **local):
    return configured(
        folder,
        name,
        data={"name": "digits", "silos": 5, "partition": {"name": "quantity"}},
        model="logistic",
        local={"name": "sgd", "lr": 0.2, "sampler": "in_order", **local},
    )


def opened(config):
    source = config.data.source(config.seed)
    return [source.open(silo.id) for silo in source.silos]


@case
def agrees_with_the_reference(comm, folder):
    for plan in PLANS:
        config = logistic(folder, f"reference-{plan}-{comm.size}", epochs=2, batch_size=50)
        config = build(fedmpi.Config, {**vars(config), "exchange": {"plan": plan}, "rounds": 3})
        silos = []
        for data in opened(config):
            x, y = data.x_train.reshape(len(data.x_train), -1).numpy(), data.y_train.numpy()
            batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)] * 2
            silos.append((len(x), lambda round, batches=batches: batches))
        with fedmpi.Run(config, comm=comm) as started:
            wanted = reference.train(started.parameters.numpy(), silos, 3, 0.2, reference.softmax_gradient)
            for record, w_P in zip(started, wanted, strict=True):
                worst = np.abs(started.parameters.numpy() - w_P).max()
                assert worst < 1e-5, f"plan {plan}, round {record['round']}: {worst}"


@case
def full_batch_step_is_the_pooled_gradients(comm, folder):
    """One step of every silo, weighted by n_k, equals one step on all samples together."""
    config = logistic(folder, f"pooled-{comm.size}", steps=1, batch_size=None)
    config = build(fedmpi.Config, {**vars(config), "rounds": 1})
    silos = opened(config)
    assert len({len(data.x_train) for data in silos}) > 1, "silos of one size prove nothing about weights"
    x = np.concatenate([data.x_train.reshape(len(data.x_train), -1).numpy() for data in silos]).astype(np.float64)
    y = np.concatenate([data.y_train.numpy() for data in silos])
    with fedmpi.Run(config, comm=comm) as started:
        w_P = started.parameters.numpy().astype(np.float64)
        list(started)
    weight, bias = w_P[:640].reshape(10, 64), w_P[640:]
    logits = x @ weight.T + bias
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    prob /= prob.sum(axis=1, keepdims=True)
    prob -= np.eye(10)[y]
    stepped = w_P - 0.2 / len(x) * np.concatenate([(prob.T @ x).reshape(-1), prob.sum(axis=0)])
    worst = np.abs(started.parameters.numpy() - stepped).max()
    assert worst < 5e-6, worst


def farthest(outputs, targets):
    """A metric that is no sum; undefined for silos of few samples."""
    return outputs.max() - outputs.min() if len(outputs) > 100 else float("nan")


@case
def figures_of_all_have_the_same_bits_on_any_number_of_ranks(comm, folder):
    """Figures from counts, sums and own code; the result is compared with that of other launches."""
    names = ["accuracy", "log_loss", "auc", "macro_f1", "confusion_matrix", {"name": "top_k", "k": 3}]
    own = {"name": f"{__name__}:farthest", "maximize": False}
    config = configured(
        folder, f"figures-{comm.size}", objective={"metrics": [*names, own]}, rounds=2,
        exchange={"reduction": "reproducible"}, server={"dedicated": comm.size > 1}, local=DITTO,
    )  # fmt: skip
    records = trained(comm, config)[1]
    left_out = ("seconds", "peak_rss_bytes", "bytes_up", "bytes_down", "bytes_control", "silos", "crc32")
    figures = [{k: v for k, v in record.items() if k not in left_out} for record in records]
    assert {"auc_within", "personal_confusion_matrix", "silo_mean_farthest"} < figures[0].keys(), figures[0].keys()
    assert 0 < len(figures[0]["undefined"]["farthest"]) < 4, figures[0]["undefined"]
    return json.dumps(figures)


DITTO = {"name": "ditto", "lr": 0.1, "steps": 3, "batch_size": 64}


@case
def dedicated_server_hosts_nothing(comm, folder):
    config = configured(
        folder, f"dedicated-{comm.size}", server={"dedicated": True}, exchange={"reduction": "reproducible"}
    )
    if comm.size == 1:
        try:
            fedmpi.Run(config, comm=comm)
        except ConfigError as error:
            assert "dedicated" in str(error), error
            return None
        raise AssertionError("one rank cannot be a dedicated server")
    sha, records = trained(comm, config)
    require_equal("silos of rank 0", [s for s, row in records[0]["silos"].items() if row["rank"] == 0], [])
    return sha


@case
def feedback_of_ranks_is_restored(comm, folder):
    """A run with rank sums (`scope: rank`) that is interrupted and resumed equals an uninterrupted one."""
    more = {
        "exchange": {"plan": "sharded", "up": {"codec": "int4", "feedback": True}, "down": {"codec": "bf16"}},
        "server": {"optimizer": {"name": "fedavgm", "lr": 1.0}},
    }
    whole, _ = trained(comm, configured(folder, f"fed-whole-{comm.size}", more))
    trained(comm, configured(folder, f"fed-left-{comm.size}", more), until=2)
    again, records = trained(comm, configured(folder, f"fed-left-{comm.size}", more))
    require_equal("rounds gone on with", [r["round"] for r in records], [3, 4])
    require_equal("sha", again, whole)


@case
def measure_says_what_it_measured_and_is_kept(comm, folder):
    config = configured(folder, f"auto-{comm.size}", exchange={"plan": "measure"})
    with fedmpi.Run(config, comm=comm) as started:
        found, seconds = started.federation.exchange.section.plan, dict(started.plan.seconds)
        next(iter(started))
    require_equal("measured", sorted(seconds), sorted(PLANS))
    require_equal("the fastest", found, min(PLANS, key=seconds.__getitem__))
    require_equal("ranks that chose", len(set(comm.gather(repr((found, seconds)).encode().ljust(300)))), 1)
    with fedmpi.Run(config, comm=comm) as again:
        require_equal("plan of the resumed run", again.federation.exchange.section.plan, found)
        require_equal("measured again", again.plan.seconds, {})


@component
class Unheard(Mean):
    """Silos with an odd number of samples have weight 0."""

    def base(self, silo, num_samples):
        return float(num_samples % 2 == 0)


@case
def a_silo_that_weighs_nothing_is_refused(comm, folder):
    try:
        fedmpi.Run(configured(folder, f"unheard-{comm.size}", aggregate="support.programs.training:Unheard"), comm=comm)
    except ConfigError as error:
        assert "weighs 0.0; weights are positive" in str(error), error
    else:
        raise AssertionError("it went through")


@case
def verify_finds_the_rank_that_differs(comm, folder):
    config = configured(folder, f"verify-{comm.size}", exchange={"verify": True})
    started = fedmpi.Run(config, comm=comm)
    rounds = iter(started)
    next(rounds)
    next(rounds)
    last = comm.size - 1
    if comm.rank == last > 0:
        started.parameters[3] += 1e-3
    try:
        next(rounds)
    except ExchangeError as error:
        assert last > 0 and f"rank {last}" in str(error), error
    else:
        require_equal("ranks of a run in which nobody can differ", comm.size, 1)
    started.close()


@component
class Astray(All):
    """In round 2 the last rank omits a silo."""

    def select(self, ids, state, outcome, rng):
        astray = outcome is not None and ranks.connect().rank == ranks.connect().size - 1
        return list(ids)[astray:], state


@case
def ranks_that_would_exchange_something_else_say_what(comm, folder):
    last = comm.size - 1
    found = {}
    for what in ("cohort", "length"):
        astray = {"select": {"name": "support.programs.training:Astray"}} if what == "cohort" else {}
        started = fedmpi.Run(configured(folder, f"astray-{what}-{comm.size}", astray), comm=comm)
        rounds = iter(started)
        next(rounds)
        if what == "length" and comm.rank == last > 0:
            made = started.federation.exchange
            made._declared = {**made._declared, "length": 7}
            made._facts_text = repr(made._declared)
        try:
            next(rounds)
        except ExchangeError as error:
            found[what] = str(error)
        started.close()
    if last:
        assert f"against rank {last} (here): cohort is ['silo-0', " in found["cohort"], found
        assert found["length"].endswith("length is 1210 there and 7 here"), found
        require_equal("texts", len(set(comm.gather(repr(found).encode().ljust(4000)))), 1)


@case
def bytes_are_those_that_plan_says(comm, folder):
    for plan in PLANS:
        for reduction in ("fast", "reproducible"):
            exchange = {"plan": plan, "reduction": reduction}
            more = {"server": {"dedicated": comm.size > 1}} if reduction == "fast" else RUNS["personal_bias"]
            name = f"bytes-{plan}-{reduction}-{comm.size}"
            config = configured(folder, name, more, exchange=exchange, rounds=2)
            promised = promise(config, {}, comm.size)
            _, records = trained(comm, config)
            for record in records:
                for key in ("bytes_up", "bytes_down", "bytes_control"):
                    if (plan, reduction, key) == ("sharded", "reproducible", "bytes_up"):
                        assert record[key] <= promised[key], "a rank without a silo in the cohort sends nothing"
                        continue
                    require_equal(f"{name}, round {record['round']}, {key}", record[key], promised[key])
            hosted = [[s for s, row in record["silos"].items() if row["rank"] == r] for r in range(comm.size)]
            require_equal("silos by rank", hosted, [row["silos"] for row in promised["ranks"]])


@case
def figures_for_engines_and_policies_are_as_many_bytes_as_plan_says(comm, folder):
    delayed = {**BASE["local"], "epochs": 3, "amount": {"name": "by_delay", "budget_s": 3600.0}}
    for name, more in {
        "buffered": {"engine": {"name": "buffered", "size": 2}},
        "deadline": {"engine": {"policy": {"name": "deadline", "deadline_s": 3600.0}}},
        "by_delay": {"local": delayed},
    }.items():
        config = configured(folder, f"bytes-{name}-{comm.size}", more, rounds=2)
        promised = promise(config, {}, comm.size)
        for record in trained(comm, config)[1]:
            for key in ("bytes_down", "bytes_control"):
                require_equal(f"{name}, round {record['round']}, {key}", record[key], promised[key])
            if name == "buffered" and comm.size > 1:  # each update that comes from another rank is a vector
                vector = promised["bytes_down"] // (comm.size - 1)
                require_equal("bytes of a vector", [record["bytes_up"] % vector, promised["bytes_up"] % vector], [0, 0])


@case
def losses_of_candidates_and_inner_products_are_as_many_bytes_as_plan_says(comm, folder):
    more = {"exchange": {"plan": "sharded", "scope": "silo"}, "records": {"gram": True}, "select": "power_of_choice"}
    config = configured(folder, f"bytes-probe-{comm.size}", more, rounds=2)
    promised = promise(config, {}, comm.size)
    for record in trained(comm, config)[1]:
        require_equal("control", record["bytes_control"], promised["bytes_control"])
        assert record["cosine"]["min"] <= record["cosine"]["mean"] <= 1, record["cosine"]


on_last_rank = False


def refuses_to_look(outputs, targets):
    """On the last rank it cannot be evaluated, only trained and tried on two samples."""
    if on_last_rank and not torch.is_grad_enabled() and len(outputs) > 2:
        raise OSError("no look")
    return torch.nn.functional.cross_entropy(outputs, targets)


@case
def a_silo_that_fails_while_losses_are_looked_up_is_an_error_on_every_rank(comm, folder):
    global on_last_rank
    on_last_rank = comm.rank == comm.size - 1
    objective = {"loss": f"{__name__}:refuses_to_look"}
    config = configured(folder, f"look-{comm.size}", objective=objective, select="power_of_choice")
    try:
        trained(comm, config)
    except SiloError as error:
        assert f"rank {comm.size - 1}, silo " in str(error) and "before round 1" in str(error), error
    else:
        raise AssertionError("a loss that raises went through")


@dataclass(frozen=True)
class Slope:
    """A learning rate that is much too large from round 4 on."""

    def lr(self, eta0, round, rounds):
        return 1e3 * eta0 if round >= 4 else eta0


@case
def norms_that_explode_end_the_run_alike_on_every_rank(comm, folder):
    local = {"name": "sgd", "lr": 0.1, "epochs": 1, "schedule": f"{__name__}:Slope"}
    config = configured(folder, f"exploded-{comm.size}", local=local, rounds=8, stop={"patience": 2, "norm_factor": 20})
    try:
        trained(comm, config)
    except Diverged as error:
        said = comm.gather(str(error).encode().ljust(400))
        require_equal("what ranks say", len(set(said)), 1)
        assert str(error).startswith("round 5: the run has diverged: "), error
    else:
        raise AssertionError("nobody has seen it")
    require_equal("newest checkpoint", newest(Path(config.out)), 3)


@case
def diverging_is_an_error_on_every_rank(comm, folder):
    config = configured(folder, f"diverged-{comm.size}", local={"name": "sgd", "lr": 1e30, "epochs": 1}, rounds=3)
    try:
        trained(comm, config)
    except Diverged as error:
        assert "silo-0" in str(error), error
    else:
        raise AssertionError("a norm of 1e30 went through")
    sha, _ = trained(comm, configured(folder, f"diverged-then-{comm.size}"))  # the communicator still works
    return sha


def resumed(name):
    def work(comm, folder):
        """Leave a run at round 2, and resume the run of the launch before, on another number of ranks."""

        def config(writer):
            exact = {"reduction": "reproducible"}
            return configured(folder, f"left-{name}-{writer}", RUNS[name], exchange=exact)

        trained(comm, config(comm.size), until=2)
        if len(sys.argv) < 3:
            return None
        with fedmpi.Run(config(sys.argv[2]), comm=comm) as started:
            require_equal(f"resumed from {sys.argv[2]} ranks after round", started.resumed, 2)
            require_equal("rounds that were left", [r["round"] for r in started], [3, 4])
        return sha256(started.averaged_parameters)

    return work


for run_name in ("personal_bias", "fedadam", "codecs", "average"):
    CASES[f"resumes_on_other_ranks_{run_name}"] = resumed(run_name)


# State of silos, and state that ranks hold for them, by rules, residuals and plans.
MOVES = {
    "scaffold": {
        "local": {
            **{"name": "scaffold", "lr": 0.1, "epochs": 1, "batch_size": 64},
            "optimizer": {"name": "SGD", "momentum": 0.5},
        },
        "select": {"name": "ucb", "fraction": 0.7},
        "exchange": {"plan": "sharded"},
    },
    "ditto": {
        "local": {"name": "ditto", "lam": 0.1, "lr": 0.1, "epochs": 1, "batch_size": 64, "keep_optimizer": True},
        "select": {"name": "power_of_choice", "fraction": 0.5, "losses": "last"},
        "exchange": {"plan": "window"},
        "server": {"optimizer": {"name": "fedavgm", "lr": 0.7}},
    },
    "residuals_of_ranks": {
        "exchange": {"plan": "sharded", "up": {"codec": "int4", "feedback": True}, "down": {"codec": "bf16"}},
    },
    "residuals_of_silos": {
        "exchange": {"plan": "sharded", "scope": "silo", "up": RUNS["codecs"]["exchange"]["up"]},
    },
    "overlap": {"exchange": {"plan": "replicated", "overlap": True}},
}


def turned(now, size):
    """Every rank gets the silos of the rank before it."""
    for silo in now.ids:
        now = now.moved(silo, (now.rank(silo) + 1) % size)
    return now


def changes_members(name):
    def work(comm, folder):
        """Ranks exchange their silos, one leaves and one joins: same bits as a restart with these members."""
        silos = [f"silo-{i}" for i in range(6)]
        begun = Membership(0, {silo: (i % comm.size,) for i, silo in enumerate(silos[:5])})

        def config(which):
            data = {**BASE["data"], "silos": 6}
            return configured(folder, f"members-{which}-{name}-{comm.size}", {"data": data}, MOVES[name])

        with fedmpi.Run(config("rebuilt"), comm=comm, membership=begun) as started:
            before = sorted(started.federation.silos)
            for record in started:
                if record["round"] == 2:
                    changed = turned(started.membership, comm.size).without("silo-0").with_silo("silo-5", 0)
                    started.rebuild(changed)
        require_equal("silos", [*started.membership.teams], silos[1:])
        require_equal("this rank's", [*started.federation.silos], started.membership.hosted(comm.rank))
        assert comm.size == 1 or sorted(started.federation.silos) != before
        trained(comm, config("left"), until=2, membership=begun)
        sha, records = trained(comm, config("left"), membership=started.membership)
        require_equal("rounds", [record["round"] for record in records], [3, 4])
        require_equal("parameters", sha256(started.averaged_parameters), sha)
        where = {silo: row["rank"] for silo, row in started.record["silos"].items()}
        require_equal("ranks in the record", where, {s: started.membership.rank(s) for s in silos[1:]})
        for one in (records[-1], started.record):
            del one["seconds"], one["peak_rss_bytes"]
        require_equal("last record", started.record, records[-1])
        return sha

    return work


for run_name in MOVES:
    CASES[f"changes_members_{run_name}"] = changes_members(run_name)


@case
def silos_that_change_ranks_change_no_bit(comm, folder):
    """For sums that do not depend on the order of ranks."""
    config = configured(folder, f"turned-{comm.size}", RUNS["personal_bias"], exchange={"reduction": "reproducible"})
    with fedmpi.Run(config, comm=comm) as started:
        for _ in started:
            started.rebuild(turned(started.membership, comm.size))
    require_equal("membership", started.membership.epoch, len(started.federation.ids) * ROUNDS)
    return sha256(started.parameters)


@case
def what_cannot_be_a_member_is_one_line_and_the_run_goes_on(comm, folder):
    config = configured(folder, f"refused-{comm.size}", exchange={"plan": "window"})
    sha, _ = trained(comm, configured(folder, f"refused-not-{comm.size}", exchange={"plan": "window"}))
    with fedmpi.Run(config, comm=comm) as started:
        first = started.membership
        wrong = (
            (
                first.moved("silo-1", comm.size),
                f"silo 'silo-1' is on rank {comm.size}, and there are {comm.size} ranks",
            ),
            (first.with_silo("silo-9", 0), "the data have no silo 'silo-9'"),
            (first.without(*first.ids), "no silo takes part"),
        )
        for _ in started:
            for members, says in wrong:
                try:
                    started.rebuild(members)
                except ConfigError as error:
                    assert f"membership: {says}" in str(error) and error.agreed, error
                else:
                    raise AssertionError(f"not refused: {says}")
        require_equal("membership", started.membership, first)
    require_equal("parameters", sha256(started.parameters), sha)


if __name__ == "__main__":
    torch.manual_seed(len(sys.argv))  # no run may depend on it
    run(CASES, ranks.connect(), Path(sys.argv[1]))
