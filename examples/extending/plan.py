"""A plan: Reduce, then Bcast of the sum, after which every rank takes the same step.

The base is `Exchange` in fedmpi/exchange/base.py. A plan declares what it `supports` and its `cost`; `finish` is the
round's exchange. This one inherits from `Whole`, which adds up the silos of a rank and divides the result by the
weights. Use it for MPI libraries whose Allreduce is slower than Reduce and Bcast.

    exchange: {plan: "examples.extending.plan:ReduceBroadcast"}
"""

from fedmpi.exchange.base import without
from fedmpi.exchange.cost import Cost, Traffic, limbs_bytes, word_bytes
from fedmpi.exchange.dense import Whole


class ReduceBroadcast(Whole):
    """Reduce to rank 0 and Bcast of the sum."""

    @classmethod
    def supports(cls, section, machine):
        return without(section)  # no codecs, no scope: silo

    @classmethod
    def cost(cls, section, sizes):
        num_bytes = sizes.num_elements * word_bytes(section, sizes) + limbs_bytes(section, sizes)
        each_way = (sizes.num_ranks - 1) * num_bytes
        memory = cls._held(section, sizes) | {"server state": sizes.state_bytes}
        return Cost(Traffic(each_way, each_way, 0, "Reduce + Bcast"), memory)

    def finish(self, params_P, server, state, lap=lambda phase: None):
        self.comm.reduce(self._sent(), self._recv)
        self.comm.bcast(self._recv)
        lap("exchange")
        mean_P = self._mean()
        if server.reads_norms:
            server = server.knowing(server.look(mean_P))
        new_P, state = server.step(params_P, mean_P, state)
        params_P.copy_(new_P)
        lap("step")
        self.verify(params_P)
        lap("exchange")
        return params_P, state
