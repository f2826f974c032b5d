"""The family of plans: each carries out what it supports, and which one `plan: auto` chooses."""

import ast
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from support.runs import config, put_back, refused, run  # noqa: F401

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.comm.threads import on_ranks
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.errors import ConfigError
from fedmpi.exchange import choose
from fedmpi.exchange.base import ExchangeContext, Machine
from fedmpi.exchange.chunks import SHORTEST
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.cost import Sizes
from fedmpi.exchange.dense import Whole
from fedmpi.exchange.plans import FORMERLY, PLANS
from fedmpi.flat import sha256
from fedmpi.plan import plan
from fedmpi.server import FedAvg, Server
from fedmpi.types import Contribution

P = 1000
SECTIONS = {
    "plain": {},
    "in the ring": {"reduction": "reproducible"},
    "of silos": {"scope": "silo"},
    "a linear codec up": {"up": {"codec": "randk"}},
    "a codec up": {"up": {"codec": "int8", "feedback": True}},
    "a codec down": {"down": {"codec": "int8"}},
    "in regions": {"regions": {}},
    "behind training": {"overlap": True},
}
LONG = SHORTEST + 1


def section(name="auto", **fields):
    return build(ExchangeSection, {"plan": name, **fields})


@pytest.mark.parametrize("how", SECTIONS)
@pytest.mark.parametrize("name", PLANS.members)
def test_a_plan_carries_out_what_it_supports_and_is_refused_with_the_reason_for_what_it_does_not(name, how):
    member = PLANS.members[name]
    if why := member.supports(section(**SECTIONS[how]), Machine()):
        with pytest.raises(ConfigError, match=rf"^plan {name} {why}; take .*sharded"):
            section(name, **SECTIONS[how])
        return
    exchange = choose.make(section(name, **SECTIONS[how]), SoloComm(), torch.zeros(P), ExchangeContext(1.0, "a", "a"))
    params_P, state = exchange.home(torch.zeros(P), FedAvg().init(torch.zeros(P)))
    exchange.begin(1, 1)
    exchange.add(Contribution("a", 1, 1.0, torch.ones(P), 0.0, 1, 1))
    params_P, state = exchange.finish(params_P, Server(FedAvg()), state)
    exchange.settle()
    assert any(one.tensor.shape == (P,) and one.tensor.any() for one in exchange.state(params_P))


@pytest.mark.parametrize("name", PLANS.members)
def test_what_a_plan_costs_is_known_by_name(name):
    one, many = (choose.cost(section(name), Sizes(P, 4, n, num_states=2, num_stepped=P)) for n in (1, 3))
    assert (one.traffic.up, one.traffic.down) == (0, 0)
    assert many.traffic.up > 0 or PLANS.members[name].in_shared_memory
    assert {"global parameters", "server state"} <= many.memory.keys() and many.memory["global parameters"] == 4 * P
    others = [choose.cost(section(name), Sizes(P, 4, 3, rank=rank, num_states=2, num_stepped=P)) for rank in (1, 2)]
    states = [found.memory.get("server state", 0) for found in (many, *others)]
    whole = 8 * P * (3 if name == "replicated" else 1)
    assert sum(states) == pytest.approx(whole, abs=2), "the server's state is somewhere, and where it is told"


@pytest.mark.parametrize(
    ("machine", "num_elements", "how", "takes", "why"),
    [
        (Machine(1), LONG, "plain", "replicated", "one rank"),
        (Machine(4), SHORTEST, "plain", "replicated", "at most 65,536 parameters"),
        (Machine(4, one_node=False), SHORTEST, "plain", "replicated", "at most 65,536 parameters"),
        (Machine(4), LONG, "plain", "shared_memory", "one node"),
        (Machine(4), LONG, "in the ring", "shared_memory", "one node"),
        (Machine(4, one_node=False), LONG, "plain", "sharded", "several nodes"),
        (Machine(4, on_device=True), LONG, "plain", "sharded", "shared_memory works in host memory"),
        (Machine(4), 10, "of silos", "sharded", "replicated takes no scope: silo"),
        (Machine(1), LONG, "a codec up", "sharded", "replicated takes no up.codec int8"),
        (Machine(1), LONG, "a linear codec up", "replicated", "one rank"),
        (Machine(4), LONG, "a linear codec up", "sharded", "shared_memory takes no up.codec randk"),
        (Machine(4), LONG, "in regions", "sharded", "shared_memory takes no regions"),
        (Machine(4, one_node=False), LONG, "behind training", "sharded", "several nodes"),
    ],
)
def test_auto_goes_by_placement_and_sizes(machine, num_elements, how, takes, why):
    asked = section(**SECTIONS[how])
    found = choose.by_rule(machine, num_elements, lambda name: PLANS.find(name).supports(asked, machine))
    assert found[0] == takes and found[1].startswith(why)


class Ranks(SoloComm):
    """Any number of ranks, on any number of nodes."""

    def __init__(self, size=2, nodes=1, full=""):
        super().__init__()
        self.size, self._nodes, self._full = size, nodes, full

    def one_node(self):
        return self._nodes == 1

    def room(self, num_bytes):
        return self._full if num_bytes else ""


def chosen(name, ranks, before="", num_elements=LONG, **fields):
    about = ExchangeContext(1.0, ["a"], ["a"])
    return choose.choose(section(name, **fields), ranks, torch.zeros(num_elements), about, lambda: before)


def test_a_full_memory_is_left_out_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        choice = chosen("auto", Ranks(full="/dev/shm on here is full"))
    assert choice.section.plan == "sharded" and choice.why == "shared_memory has no room: /dev/shm on here is full"
    assert "exchange.plan: auto skips shared_memory: /dev/shm on here is full" in caplog.text
    with pytest.raises(
        ConfigError, match=r"shared_memory has no room: /dev/shm on here is full; take replicated, .* or"
    ):
        chosen("window", Ranks(full="/dev/shm on here is full"))


def test_a_named_plan_that_the_machine_cannot_carry_out_is_one_line():
    with pytest.raises(ConfigError) as caught:
        chosen("window", Ranks(nodes=2))
    assert str(caught.value) == (
        "exchange.plan: shared_memory needs all ranks on one node; take replicated, sharded, root or auto"
    )


def test_ranks_with_and_without_a_gpu_choose_alike():
    choices = on_ranks(3, lambda comm: Machine.of(comm, torch.device("cuda" if comm.rank == 1 else "cpu")).on_device)
    assert choices == [True] * 3


@pytest.mark.parametrize("asked", ["auto", "measure"])
@pytest.mark.parametrize("before", ["root", "window"])
def test_a_run_keeps_the_plan_that_it_was_begun_with(asked, before):
    choice = chosen(asked, Ranks(), before)
    assert choice.section.plan == FORMERLY.get(before, before) and choice.why == "as when the run started"
    assert not choice.seconds


def test_a_plan_that_cannot_go_on_gives_way_and_this_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", Ranks(nodes=2), "shared_memory").section.plan == "sharded"
    assert "the run continues with sharded; it started with shared_memory, which needs all ranks on one" in caplog.text


# ---------------------------------------------------------------- in whole runs


def test_a_run_of_the_old_default_goes_on_with_the_same_bits(tmp_path):
    """config.yaml records the resolved plan, replicated, although nobody had named it."""
    whole = run(config(tmp_path / "whole", 4, exchange={"plan": "root"}))[1]
    run(config(tmp_path / "left", 2, exchange={"plan": "root"}))
    again = run(config(tmp_path / "left", 4))[1]
    assert (again.resumed, again.plan.section.plan, again.plan.why) == (2, "root", "as when the run started")
    assert sha256(again.parameters) == sha256(whole.parameters)
    assert "exchange.plan is root there and sharded here" in refused(
        config(tmp_path / "left", 6, exchange={"plan": "sharded"})
    )
    assert run(config(tmp_path / "left", 6, exchange={"plan": "root"}))[1].resumed == 4


def test_a_directory_that_says_window_is_resumed(tmp_path):
    from fedmpi import directory

    def older(text):
        values = yaml.safe_load(text)
        about = values.pop("about")
        values["exchange"]["plan"] = about["plan"] = "window"
        directory.write_config(tmp_path, values, about)

    for rounds, how in ((2, {}), (4, {"exchange": {"plan": "shared_memory"}}), (6, {"exchange": {"plan": "window"}})):
        run(config(tmp_path, rounds - 1, exchange={"plan": "shared_memory"}))
        older((tmp_path / "config.yaml").read_text())
        again = run(config(tmp_path, rounds, **how))[1]
        assert (again.resumed, again.plan.section.plan) == (rounds - 1, "shared_memory")


@pytest.mark.parametrize(
    ("num_ranks", "how", "says"),
    [
        (1, {}, "replicated (one rank)"),
        (2, {}, "replicated (at most 65,536 parameters)"),
        (2, {"model": {"name": "mlp", "hidden": [1000]}}, "shared_memory (one node); on several nodes or GPUs sharded"),
        (
            2,
            {"model": {"name": "mlp", "hidden": [1000]}, "device": {"name": "cuda"}},
            "sharded (shared_memory works in host memory)",
        ),
        (
            2,
            {"exchange": {"plan": "measure"}},
            "measured when the run starts; the figures here are those of replicated",
        ),
        (2, {"exchange": {"plan": "window"}}, ""),
    ],
)
def test_a_login_node_says_what_the_rule_will_choose(num_ranks, how, says):
    found = plan(build(Config, how), {}, num_ranks)
    assert found["plan_why"] == says and found["plan"] in (says.partition(" (")[0], "replicated", "shared_memory")
    assert all(row["vector_bytes"] == sum(row["vectors"].values()) for row in found["ranks"])


def test_memory_for_ranks_that_outlive_each_other_is_told_where_they_may():
    scaffold = {"local": {"name": "scaffold", "lr": 0.1, "steps": 1}, "server": {"optimizer": "fedadam"}}
    for how, vectors, kept in (({}, 1, 0), (scaffold, 4, 1)):  # the delta; control variate and Adam's two besides
        found = plan(build(Config, how), {}, 4)
        of_silo = kept * 4 * found["shared_parameters"] + 8
        best, all_alike = 4 * found["shared_parameters"], vectors * 4 * found["shared_parameters"]
        wanted = best + 2 * (all_alike + found["silos"] * of_silo)  # each rank has the state of all four
        assert found["mirror_bytes"] == wanted, (how, found["mirror_bytes"], wanted)
    for how, num_ranks in (({}, 1), ({"on_failure": "stop"}, 4), ({"exchange": {"overlap": True}}, 4)):
        assert plan(build(Config, how), {}, num_ranks)["mirror_bytes"] == 0


class Gathered(Whole):
    """A user's plan: every rank receives all ranks' sums, and adds them in the order of ranks."""

    @classmethod
    def supports(cls, section, machine):
        return "takes no overlap" if section.overlap else PLANS.members["root"].supports(section, machine)

    @classmethod
    def cost(cls, section, sizes):
        traffic, memory = PLANS.members["replicated"].cost(section, sizes)
        return traffic, memory | {"all ranks' sums": sizes.num_ranks * sizes.vector_bytes}

    def finish(self, params_P, server, state, lap=lambda phase: None):
        mine, size = self._sent(), self.comm.size
        all_R = torch.zeros(size * len(mine), dtype=mine.dtype)
        all_R.view(size, -1)[self.comm.rank] = mine
        self.comm.allreduce(all_R.clone(), all_R)  # zeros from the others: nothing is rounded
        torch.sum(all_R.view(size, -1), 0, out=self._recv)
        new_P, state = server.step(params_P, self._mean(), state)
        return params_P.copy_(new_P), state


def test_a_plan_of_one_s_own_opens_one_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_plans", types.SimpleNamespace(Gathered=Gathered))
    own = {"exchange": {"plan": "my_plans:Gathered"}}
    theirs, ours = (run(config(tmp_path / name, 2, **how))[1] for name, how in (("a", {}), ("b", own)))
    torch.testing.assert_close(ours.parameters, theirs.parameters, rtol=1e-6, atol=1e-7)
    assert ours.plan.section.plan == "my_plans:Gathered"
    assert run(config(tmp_path / "b", 3))[1].plan.section.plan == "my_plans:Gathered"  # the run started with it
    with pytest.raises(
        ConfigError, match="plan my_plans:Gathered takes no overlap; take replicated or sharded or root"
    ):
        build(Config, {"exchange": {"plan": "my_plans:Gathered", "overlap": True}})
    with pytest.raises(ConfigError, match=r"exchange\.plan: 'yaml:safe_load' is no subclass of fedmpi\.exchange"):
        build(Config, {"exchange": {"plan": "yaml:safe_load"}})


def test_no_file_compares_the_names_of_plans():
    names, guilty = {*PLANS.members, *FORMERLY}, []
    for path in sorted(Path(fedmpi.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and "plan" in ast.unparse(node):
                texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                guilty += [f"{path.name}:{node.lineno}"] if texts & names else []
    assert guilty == []
