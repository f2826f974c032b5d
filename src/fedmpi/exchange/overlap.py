"""Overlap: the exchange of a round runs behind the training of the next one and arrives one round late.

Let w_t be the parameters after the exchange of round t (sum, mean, server step). In round t+1 silos train from where
they stand (progress.py), since w_t is not there yet; meanwhile a thread makes w_t out of w_{t-1} and what silos sent in
round t, and is waited for after training.

Round t comes out of `finish` with w_{t-1}, and that is what its record evaluates. In the last round T there is nothing
to hide behind: its exchange is waited for within it, and the run ends with w_T.

What is committed. When round t is agreed upon, what was sent is known, its exchange is under way, and nothing breaks
that off. The state of round t is w_{t-1}, the server's state and the residuals of feedback before that exchange, and
what silos sent; the rest of it follows from them. Round t+1 changes none of it until its own `finish`, so a stop, a
silo that raises or updates that are all rejected leave round t as it was.

What is on disk. A checkpoint of round t first waits for its exchange, and then holds both w_{t-1} (`params`, which the
record speaks of) and w_t (`plan/params`), the server's state and the residuals after round t. A run that goes on from
there begins round t+1 as if w_t had just arrived: the same bits. The checkpoint of the last round has w_T as `params`
and w_{T-1} beside it, from where more rounds go on as if T had not been the last.

Threads. The plan that does the work has a twin of the communicator, which nobody else uses while the thread runs. It
sleeps where it waits. Ranks meet once their vectors are folded, before any vector travels; an error on one of them is
then an error of all, and so are the plans' own. It comes up where the exchange is waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.exchange.base import PARAMS, Exchange, Lap
from fedmpi.server import Server
from fedmpi.state import StateTensor, under, within
from fedmpi.types import Contribution
from fedmpi.worker import Worker

PLAN, ABOUT = "plan", "about"  # what they are called in a checkpoint


class Behind(Exchange):
    """Another exchange, `plan`, in a thread. `plan` has a twin of `comm`; parameters take turns in two vectors. What is
    added stays where it is until it has arrived, a round later."""

    def __init__(self, plan: Exchange, comm: Comm, params_P: torch.Tensor) -> None:
        super().__init__(plan.section, comm, params_P, plan.facts)
        self._plan = plan
        self._other_P = params_P.clone()  # w_t once it has arrived; after the last round w_{T-1}
        self._next: list[Contribution] = []  # of the round that is being trained
        self._taken_P = torch.zeros_like(params_P) if plan.exact is not None else params_P[:0]
        self._worker = Worker("exchange")
        # One for the whole run: torch keeps what a stream has used for that stream alone.
        self._stream: Any = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._sent = np.zeros(3)  # bytes up, down, control of exchanges that no record has yet
        self._seconds = self._told_s = 0.0  # that they took in the thread; and those of this round's record
        self._ended = False  # was the last exchange waited for within its round?

    # ------------------------------------------------------------ a round

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._next = []

    def add(self, contribution: Contribution) -> None:
        self._next.append(contribution)

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        """Wait for the exchange of the round before and begin this one's. The parameters that have arrived come back,
        in the other of two vectors: `params_P` is where the next ones will be."""
        self._told_s = 0.0
        self._arrive()
        arrived_P = self._other_P
        self._begin(arrived_P, params_P, server, state)
        self._ended = self.round >= self.facts.rounds
        if self._ended:
            self._arrive()
            arrived_P, params_P = params_P, arrived_P
        self._other_P = params_P
        lap("exchange")
        return arrived_P, state

    def figures(self) -> dict[str, float]:
        """`overlapped`: what the exchanges that arrived in this round took; `exchange` of it was waited for."""
        return {"overlapped": self._told_s}

    # ------------------------------------------------------------ the thread

    def _begin(self, old_P: torch.Tensor, new_P: torch.Tensor, server: Server, state: Any) -> None:
        """In a thread: new = old stepped by what silos sent this round, and the server's state in its own memory. What
        was sent and `old_P` are only read."""
        plan, given, round, near = self._plan, self._next, self.round, self._near
        self._next = []
        if self._stream is not None:  # after what is queued by now
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

        def fold() -> None:
            plan.begin(round, len(given), near)
            for contribution in given:
                if plan.exact is None:
                    plan.add(contribution)
                else:  # which takes values out of it, and silos go on from what it is
                    taken = self._taken_P[: len(contribution.vector_Q)]
                    plan.add(replace(contribution, vector_Q=taken.copy_(contribution.vector_Q)))

        def work() -> None:
            start_s, before = time.perf_counter(), _counted(plan.comm)
            try:
                with _on(self._stream):
                    new_P.copy_(old_P)
                    plan.comm.collectively(fold)
                    plan.finish(new_P, server, state)
            finally:
                self._sent += _counted(plan.comm) - before
                self._seconds += time.perf_counter() - start_s

        self._worker.start(work)

    def _wait(self) -> None:
        while not self._worker.wait(1.0):
            self.comm.beat(trains=True)
        if self._worker.error is not None:
            raise self._worker.error

    def _arrive(self) -> None:
        """Wait until nothing is under way; what it took goes into this round's record."""
        self._wait()
        up, down, control = self._sent.astype(int).tolist()
        self.comm.bytes_up += up
        self.comm.bytes_down += down
        self.comm.bytes_control += control
        self._told_s += self._seconds
        self._sent[:], self._seconds = 0, 0.0

    def leave(self) -> None:
        self._worker.close()

    def settle(self) -> None:
        self._wait()

    # ------------------------------------------------------------ where things are kept

    def state(self, params_P: torch.Tensor) -> Iterator[StateTensor]:
        """The parameters, and the state of the plan, which is a round ahead; which of the two parameters is which, and
        the bytes that the next record will count."""
        sums = self.comm.share(np.array([self._ended and self.comm.rank == 0, *self._sent]))
        yield from super().state(params_P)
        yield from under(PLAN, self._plan.state(self._other_P))
        yield StateTensor((ABOUT,), torch.from_numpy(sums).to(torch.int64))

    def restore(self, params_P: torch.Tensor, round: int, stored: Sequence[StateTensor]) -> None:
        about = next(one.tensor for one in stored if one.key == (ABOUT,))
        super().restore(params_P, round, [one for one in stored if one.key == (PARAMS,)])
        self._plan.restore(self._other_P, round, within(PLAN, stored))
        ended, *sent = about.tolist()
        self._sent[:] = sent if self.comm.rank == 0 else 0
        self._ended = round >= self.facts.rounds
        if self._ended != bool(ended):  # it is given more rounds, or fewer
            last_P = params_P.clone()
            params_P.copy_(self._other_P)
            self._other_P.copy_(last_P)

    def home(self, params_P: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        self._other_P.copy_(params_P)
        return self._plan.home(params_P, state)

    def shard(self, vector_P: torch.Tensor) -> torch.Tensor:
        return self._plan.shard(vector_P)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return self._plan.gather(part)

    def scatter(self, whole_P: torch.Tensor | None, part: torch.Tensor) -> None:
        self._plan.scatter(whole_P, part)


def _counted(comm: Comm) -> np.ndarray:
    return np.array([comm.bytes_up, comm.bytes_down, comm.bytes_control], dtype=float)


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    """What a GPU does within goes into a stream of its own, and is over when it is left."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()
