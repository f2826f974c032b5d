"""What `exchange.fragments` must do on any number of ranks: see cases.py. Cases leave runs in FOLDER for later
launches.

Arguments: FOLDER, shared by all launches, and the number of ranks of the launch before, except for the first.
"""

import sys
from pathlib import Path

import torch
from support.programs.cases import require_equal, run
from support.programs.training import configured, trained

import fedmpi
from fedmpi import comm as ranks
from fedmpi.flat import sha256
from fedmpi.plan import plan as promise

CASES = {}
ROUNDS = 6
FOUR = {
    "rounds": ROUNDS,
    "select": {"name": "uniform", "fraction": 0.6},
    "server": {"optimizer": {"name": "fedavgm", "lr": 0.7, "nesterov": True}},
    "exchange": {"fragments": 4, "parameters": ["*", "!*.bias"], "reduction": "reproducible", "verify": True},
}
INT8 = {"codec": "int8", "feedback": True}
COMPRESSED = {"exchange": {"plan": "sharded", "scope": "silo", "up": INT8, "down": INT8}}
LATE = {"exchange": {"overlap": True}}


def case(work):
    CASES[work.__name__] = work
    return work


def under(plans, name, *changes):
    """The final bits of a run under each of these plans, which must be equal."""

    def work(comm, folder):
        shas = set()
        for plan in plans:
            config = configured(folder, f"{name}-{plan}-{comm.size}", FOUR, *changes, exchange={"plan": plan})
            sha, records = trained(comm, config)
            require_equal("rounds", [r["round"] for r in records], list(range(1, ROUNDS + 1)))
            shas.add(sha)
        require_equal("plans agree", len(shas), 1)
        return shas.pop()

    return work


CASES["reproducible_under_every_plan"] = under(("root", "replicated", "sharded", "shared_memory"), "plain")
CASES["reproducible_late"] = under(("root", "replicated", "sharded"), "late", LATE)
CASES["reproducible_with_codecs"] = under(("sharded",), "codecs", COMPRESSED)


def resumed(name, *changes):
    def work(comm, folder):
        """Leave a run at round 3, and resume the run of the launch before, on another number of ranks."""
        trained(comm, configured(folder, f"moved-{name}-{comm.size}", FOUR, *changes), until=3)
        if len(sys.argv) < 3:
            return None
        sha, records = trained(comm, configured(folder, f"moved-{name}-{sys.argv[2]}", FOUR, *changes))
        require_equal("rounds that were left", [r["round"] for r in records], [4, 5, 6])
        return sha

    return work


CASES["resumes_on_other_ranks"] = resumed("plain", {"exchange": {"plan": "sharded"}})
CASES["resumes_on_other_ranks_late"] = resumed("late", LATE, {"exchange": {"plan": "sharded"}})
CASES["resumes_on_other_ranks_with_codecs"] = resumed("codecs", COMPRESSED)


@case
def a_rebuild_on_the_way_changes_no_bit(comm, folder):
    """Ranks exchange their silos, whose state moves with them."""
    config = configured(folder, f"rebuilt-{comm.size}", FOUR, exchange={"plan": "sharded"})
    with fedmpi.Run(config, comm=comm) as started:
        for record in started:
            if record["round"] == 3:
                members = started.membership
                for silo in members.ids:
                    members = members.moved(silo, (members.rank(silo) + 1) % comm.size)
                started.rebuild(members)
    return sha256(started.parameters)


@case
def plan_tells_the_bytes_of_a_round(comm, folder):
    """Bytes of a round: a quarter of those without fragments."""
    each = {}
    for fragments in (1, 4):
        for plan, late in (("root", False), ("replicated", False), ("sharded", True)):
            exchange = {"plan": plan, "fragments": fragments, "overlap": late, "parameters": ["*.weight"]}
            config = configured(folder, f"bytes-{plan}-{fragments}-{comm.size}", exchange=exchange)
            promised, (_, records) = promise(config, {}, comm.size), trained(comm, config)
            keys = ("bytes_up", "bytes_down", "bytes_control")
            require_equal("plan", [sum(r[k] for r in records) for k in keys], [4 * promised[k] for k in keys])
            each[plan, fragments] = promised["bytes_up"] + promised["bytes_down"]
    for plan in ("root", "replicated", "sharded"):
        assert abs(4 * each[plan, 4] - each[plan, 1]) <= 0.02 * each[plan, 1], each


if __name__ == "__main__":
    torch.manual_seed(len(sys.argv))  # no run may depend on it
    run(CASES, ranks.connect(), Path(sys.argv[1]))
