"""Overlap: the exchange of a round runs behind the training of the next one and arrives one round late.

Let w_t be the parameters after the exchange of round t (sum, mean, server step). In round t+1 silos train from their
own parameters (progress.py), since w_t has not arrived. Meanwhile a thread computes w_t from w_{t-1} and from what
silos sent in round t. The round waits for it after training.

`finish` of round t returns w_{t-1}, and the record of round t evaluates w_{t-1}. The last round T has no next training
to overlap with: it waits for its own exchange, and the run ends with w_T.

What is committed. Once all ranks agree on round t, its contributions are fixed, its exchange is running, and nothing
cancels it. The state of round t is w_{t-1}, the server's state and the feedback residuals before that exchange, and the
contributions; all else follows from them. Round t+1 changes none of these before its own `finish`. So a stop, a silo
that raises, or a round whose updates are all rejected leave round t as it was.

What is on disk. A checkpoint of round t first waits for its exchange. It then holds both w_{t-1} (`params`, which the
record evaluates) and w_t (`plan/params`), the server's state and the residuals after round t. A run that resumes from
it starts round t+1 as if w_t had just arrived, with the same bits. The checkpoint of the last round holds w_T as
`params` and w_{T-1} beside it, so that a run with more rounds continues as if T had not been the last.

Threads. The inner plan has a duplicate of the communicator, which nobody else uses while the thread runs. The thread
sleeps while it waits. Ranks synchronize once they have folded their vectors, before they send any; an error on one rank
is then raised on all, as are the plans' own errors. It is raised where the main thread waits for the exchange.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fedmpi.comm import Comm
from fedmpi.exchange.base import PARAMS, Exchange, Lap
from fedmpi.records.clock import clock
from fedmpi.server import Server
from fedmpi.state import StateTensor, under, within
from fedmpi.types import Contribution
from fedmpi.worker import Worker

PLAN, ABOUT = "plan", "about"  # keys in a checkpoint
MOST_TRACKS = 2  # exchanges that arrive in one round: that of the round before, and in the last round its own


class Track(NamedTuple):
    """An exchange of the thread: of which round, when it began (records/clock.py), and how long it took."""

    of_round: float = 0.0
    began_s: float = 0.0
    lasted_s: float = 0.0
    encode: float = 0.0
    transfer: float = 0.0
    decode: float = 0.0


class Behind(Exchange):
    """Runs another exchange, `plan`, in a thread.

    `plan` has a duplicate of `comm`. Two parameter vectors take turns. The memory of a contribution must stay unchanged
    until its exchange has arrived, one round later.
    """

    def __init__(self, plan: Exchange, comm: Comm, params_P: torch.Tensor) -> None:
        super().__init__(plan.section, comm, params_P, plan.facts)
        self._plan = plan
        self._other_P = params_P.clone()  # w_t once it has arrived; after the last round w_{T-1}
        self._next: list[Contribution] = []  # of the round in training
        self._taken_P = torch.zeros_like(params_P) if plan.exact is not None else params_P[:0]
        self._worker = Worker("exchange")
        # One stream for the whole run: torch caches memory per stream.
        self._stream: Any = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._sent = np.zeros(3)  # bytes up, down and control that no record counts yet
        self._seconds = self._told_s = 0.0  # seconds in the thread; and those in this round's record
        self._tracks: list[Track] = []  # that no round has told yet
        self._told_tracks: list[Track] = []  # of this round
        self._ended = False  # whether the last round waited for its own exchange

    # ------------------------------------------------------------ a round

    def begin(self, round: int = 0, num_contributions: int = 2, near: float = 1.0) -> None:
        super().begin(round, num_contributions, near)
        self._next = []

    def add(self, contribution: Contribution) -> None:
        self._next.append(contribution)

    def finish(
        self, params_P: torch.Tensor, server: Server, state: Any, lap: Lap = lambda phase: None
    ) -> tuple[torch.Tensor, Any]:
        """Wait for the exchange of the round before, then start this round's.

        Returns the parameters that arrived, in the other of the two vectors; the next ones will be in `params_P`.
        """
        self._told_s = 0.0
        self._told_tracks.clear()
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
        """`overlapped`: seconds of the exchanges that arrived in this round, of which it waited for `exchange`."""
        return {"overlapped": self._told_s}

    def tracks(self) -> dict[str, float]:
        """The fields of `MOST_TRACKS` tracks, with their number at the end; zeros where there is none."""
        told = [*self._told_tracks, *[Track()] * MOST_TRACKS][:MOST_TRACKS]
        return {f"{name}_{i}": value for i, track in enumerate(told) for name, value in track._asdict().items()}

    # ------------------------------------------------------------ the thread

    def _begin(self, old_P: torch.Tensor, new_P: torch.Tensor, server: Server, state: Any) -> None:
        """Start the thread: new = old, stepped by this round's contributions. The server's state changes in place; the
        contributions and `old_P` are only read.
        """
        plan, given, round, near, there = self._plan, self._next, self.round, self._near, self.there
        self._next = []
        if self._stream is not None:  # after the work queued so far
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

        def fold() -> None:
            plan.begin(round, len(given), near)
            plan.meet(there)
            for contribution in given:
                if plan.exact is None:
                    plan.add(contribution)
                else:  # `add` takes values out of the vector, but silos continue from it
                    taken = self._taken_P[: len(contribution.vector_Q)]
                    plan.add(replace(contribution, vector_Q=taken.copy_(contribution.vector_Q)))

        def work() -> None:
            start_s, before = time.perf_counter(), _counted(plan.comm)
            began_s, spent = clock(), plan.spent()
            try:
                with _on(self._stream):
                    new_P.copy_(old_P)
                    plan.comm.collectively(fold)
                    plan.finish(new_P, server, state)
            finally:
                self._sent += _counted(plan.comm) - before
                self._seconds += (lasted_s := time.perf_counter() - start_s)
                self._tracks.append(Track(round, began_s, lasted_s, *plan.spent().since(spent)))

        self._worker.start(work)

    def _wait(self) -> None:
        while not self._worker.wait(1.0):
            self.comm.beat(trains=True)
        if self._worker.error is not None:
            raise self._worker.error

    def _arrive(self) -> None:
        """Wait for the exchange in flight, and count its bytes and seconds in this round's record."""
        self._wait()
        up, down, control = self._sent.astype(int).tolist()
        self.comm.bytes_up += up
        self.comm.bytes_down += down
        self.comm.bytes_control += control
        self._told_s += self._seconds
        self._told_tracks += self._tracks
        self._tracks.clear()
        self._sent[:], self._seconds = 0, 0.0

    def leave(self) -> None:
        self._worker.close()

    def settle(self) -> None:
        self._wait()

    # ------------------------------------------------------------ memory and state

    def state(self, params_P: torch.Tensor) -> Iterator[StateTensor]:
        """The parameters, the plan's state (one round ahead), the order of the two vectors, and uncounted bytes."""
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
        if self._ended != bool(ended):  # the run has more rounds now, or fewer
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
    """Queue the GPU work of the block in its own stream, and wait for it at the end."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream.synchronize()
