"""Server optimizers keep state for the parameters only, not for vectors that follow their own rule."""

import pytest
import torch
from support.exchanges import section
from support.runs import config, everything, put_back, run  # noqa: F401

from fedmpi.comm.threads import on_ranks
from fedmpi.exchange import chunks
from fedmpi.exchange.base import ExchangeContext
from fedmpi.exchange.choose import make
from fedmpi.layout import Layout, Segment
from fedmpi.server import OPTIMIZERS, Server
from fedmpi.types import Contribution

NUM = 5000
LAYOUT = Layout((Segment("delta", 0, NUM, "delta"), Segment("c", NUM, 2 * NUM, "auxiliary")))

SCAFFOLD = {"local": {"name": "scaffold", "steps": 4, "epochs": None}, "server": {"optimizer": "fedadam"}}


@pytest.mark.parametrize("plan", ["root", "replicated", "sharded", "window"])
def test_scaffold_with_fedadam_keeps_moments_of_the_parameters_alone(tmp_path, plan):
    exchange = {"exchange": {"plan": plan}}
    _, done = run(config(tmp_path / "whole", 4, **SCAFFOLD, **exchange))
    num = len(done.parameters)
    assert len(done.state.params_Q) == 2 * num
    stored = everything(tmp_path / "whole")[1]
    moments = {name: shape for name, (shape, _) in stored.items() if "m_P" in str(name) or "v_P" in str(name)}
    assert len(moments) == 2 and set(moments.values()) == {(num,)}
    run(config(tmp_path / "cut", 4, **SCAFFOLD, **exchange), rounds=2)
    run(config(tmp_path / "cut", 4, **SCAFFOLD, **exchange))
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("plan", ["root", "replicated", "sharded"])
def test_shards_of_moments_are_put_together_wherever_the_parameters_end(plan, num_ranks, monkeypatch):
    monkeypatch.setattr(chunks, "SHORTEST", 4096)
    num, optimizer = NUM, OPTIMIZERS.build("fedyogi", "")  # the second of three pieces holds both
    draw = torch.Generator().manual_seed(0)
    start_Q, delta_Q = torch.randn(2 * num, generator=draw), torch.randn(2 * num, generator=draw)

    def work(comm):
        params_Q = start_Q.clone()
        exchange = make(section(plan), comm, params_Q, ExchangeContext(1.0, ["a"], ["a"] if comm.rank == 0 else []))
        state = optimizer.init(exchange.shard(params_Q[:num]))
        for number in (1, 2):
            exchange.begin(number, int(comm.rank == 0))
            if comm.rank == 0:
                exchange.add(Contribution("a", number, 1.0, delta_Q.clone(), 0.0, 1, 1))
            params_Q, state = exchange.finish(params_Q, Server(optimizer, LAYOUT), state)
        whole = [exchange.gather(part).clone() for part in state]
        for part, whole_P in zip(state, whole, strict=True):
            kept = part.clone()
            part.zero_()
            exchange.scatter(whole_P if comm.rank == 0 else None, part)
            assert torch.equal(part, kept)
        return params_Q, whole

    wanted_P, state = start_Q[:num], optimizer.init(start_Q[:num])
    for _ in range(2):
        wanted_P, state = optimizer.step(wanted_P, delta_Q[:num].clone(), state)
    done = on_ranks(num_ranks, work)
    for params_Q, _ in done:
        torch.testing.assert_close(params_Q, torch.cat([wanted_P, start_Q[num:] + 2 * delta_Q[num:]]))
    for found, part in zip(done[0][1], state, strict=True):
        torch.testing.assert_close(found, part)
