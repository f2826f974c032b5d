"""Searches all buffers that ranks pass to MPI for a silo's private values. Arguments: FOLDER.

A private layer, or a silo's own model, holds a number that never changes, because its gradient is 0. The spy wraps
MPI's communicators and reads every buffer; a shared number proves that it sees what is sent.
"""

import json
import struct
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from support.programs.cases import run
from torch import nn

import fedmpi
from fedmpi import results
from fedmpi.assembly import source_of
from fedmpi.comm import MpiComm, connect
from fedmpi.components import build
from fedmpi.errors import ConfigError

SECRET, BEACON = 12345.678, 54321.125  # the first is private to silos, the second shared


class Marked(nn.Module):
    """A linear model, and numbers without a gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.beacon = nn.Parameter(torch.full((8,), BEACON))
        self.mark = nn.Parameter(torch.full((8,), 1.5))
        self.head = nn.Linear(10, 10)

    def forward(self, x):
        return self.head(self.linear(x.flatten(1)).relu()) + 0 * (self.mark.sum() + self.beacon.sum())


class Spy:
    """An MPI communicator that records the buffers of its callers."""

    seen: list[bytes] = []  # noqa: RUF012

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*arguments, **named):
            for argument in (*arguments, *named.values()):
                self._read(argument)
            found = value(*[a._inner if isinstance(a, Spy) else a for a in arguments], **named)
            return Spy(found) if type(found).__name__ == "Intracomm" else found

        return call

    def _read(self, argument):
        if isinstance(argument, (list, tuple)):
            for part in argument:
                self._read(part)
        elif isinstance(argument, (bytes, bytearray, memoryview, np.ndarray)):
            self.seen.append(np.ascontiguousarray(argument).tobytes() if len(argument) else b"")


def secret(rule, plan):
    """A run whose silos have a secret, and the secrets that the spy has seen."""

    def case(folder):
        from mpi4py import MPI

        connect()  # starts MPI
        Spy.seen.clear()
        comm = MpiComm(MPI, Spy(MPI.COMM_WORLD.Dup()))
        personal = rule["name"] == "fedrep"
        values = {
            "rounds": 3,
            "out": f"{folder}/{comm.size}-{rule['name']}",
            "data": {"name": "digits", "silos": 4},
            "model": "support.programs.personal:Marked",
            "local": {"lr": 0.05, **rule},
            "exchange": {"plan": plan, "parameters": ["*", "!head.*", "!mark"] if personal else "all"},
            "device": {"name": "cpu"},
            "checkpoint": {"every": 1},
        }
        with fedmpi.Run(build(fedmpi.Config, values), comm=comm) as run:
            fed = run.federation
            marks = torch.full((8,), SECRET)
            for silo in fed.silos.values():  # as if from an earlier round
                if personal:
                    silo.kept = {n: t.clone() for n, t in fed.model.first_personal.items()}
                    fed.model.named(run.parameters, silo.kept)["mark"].copy_(marks)
                else:
                    own_P = run.parameters.clone()
                    fed.model.named(own_P, {})["mark"].copy_(marks)
                    silo.kept = {"own_params": own_P}
                    if rule["name"] == "apfl":
                        silo.kept["own_alpha"] = torch.tensor(0.5, dtype=torch.float64)
            records = list(run)
            for silo in fed.silos.values():
                kept = silo.kept if personal else {"params": silo.kept["own_params"]}
                own = fed.model.named(kept.get("params", run.parameters), kept)["mark"]
                assert (own == SECRET).all() and silo.cursor > 0, own
        assert "personal_accuracy" in records[-1]
        _evaluated(run, records[-1], comm)
        found = [(chunk.count(pattern(SECRET)), chunk.count(pattern(BEACON))) for chunk in Spy.seen]
        assert not any(a for a, _ in found), "a silo's own was handed to MPI"
        return {"buffers": len(found), "secret": sum(a for a, _ in found), "shared": sum(b for _, b in found)}

    return case


def _evaluated(run, last, comm):
    """The checkpoint is evaluated where the silos' data are, with the run's figures; so are exported models."""
    opened = []

    def counting(config, admitted=()):
        source = source_of(config, admitted)

        def open(silo):
            opened.append(silo)
            return source.open(silo)

        return replace(source, open=open)

    with mock.patch.object(results, "source_of", counting):
        again = results.evaluate(run.out, comm=comm)
    assert opened == [silo for silo in run.federation.ids if silo in run.federation.silos], opened
    told = {name: last[name] for name in again if name != "silos"}
    assert {name: again[name] for name in told} == told, (again, told)
    for silo, row in again["silos"].items():
        assert row.items() <= last["silos"][silo].items(), (silo, row)
    there = [silo for silo in again["silos"] if run.silo_model(silo) is not None]
    assert there == opened, there
    rows = comm.gather(json.dumps(again).encode().ljust(20_000))
    assert len(set(rows)) == 1
    for which, said in ((7, "no checkpoint of round 7; available: 1, 2, 3"), ("best", "")):
        try:
            results.evaluate(run.out, which, comm=comm)
        except ConfigError as error:
            assert said and said in str(error), error
        else:
            assert not said


def pattern(number):
    """Two numbers, as bytes in memory."""
    return struct.pack("<2f", number, number)


CASES = {
    "ditto": secret({"name": "ditto", "lam": 0.0, "steps": 3}, "root"),
    "apfl": secret({"name": "apfl", "steps": 3}, "root"),
    "fedrep": secret({"name": "fedrep", "steps": 2, "head_steps": 2}, "root"),
}

if __name__ == "__main__":
    comm = connect()
    folder = comm.broadcast_text(sys.argv[1], 0)
    run(CASES, folder)
