"""Types that all modules share: what a dataset provides and what a silo contributes.

Shapes in names: `P` shared parameters, `K` silos of the federation, `N` samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch

from fedmpi.layout import Layout, Normaliser

if TYPE_CHECKING:
    from fedmpi.comm import Comm

Task = Literal["classification", "binary", "regression", "next_token"]


@dataclass(frozen=True)
class Silo:
    """What is declared of a silo before its data are opened."""

    id: str
    num_samples: int | None = None  # training samples; None: known once the silo is opened
    host: str | None = None  # the only host that may open it; None: any


class Streamed(ABC):
    """Samples [N, ...] that stay in a file; rows are read when they are asked for, as new tensors on the CPU."""

    shape: torch.Size
    dtype: torch.dtype
    device = torch.device("cpu")
    nbytes = 0  # of memory

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """The rows of a slice, or those with these numbers, in this order."""

    @abstractmethod
    def ahead(self, rows: slice | torch.Tensor) -> None:
        """These rows will be asked for next; a thread may read them meanwhile."""

    @abstractmethod
    def blocks(self) -> Iterator[torch.Tensor]:
        """All rows in order, a few MiB at a time."""


Samples = torch.Tensor | Streamed


def blocks(samples: Samples) -> Iterator[torch.Tensor]:
    """All samples in order: those in memory at once, streamed ones a few MiB at a time."""
    yield from samples.blocks() if isinstance(samples, Streamed) else (samples,)


class SiloData(NamedTuple):
    """One silo's samples, [N, ...]: tensors in memory, or inputs that are streamed from a file. Targets are int64 for
    classification and next_token, else float32."""

    x_train: Samples
    y_train: torch.Tensor
    x_test: Samples
    y_test: torch.Tensor


class SharedStatistics(Protocol):
    """Statistics of all silos' training samples, which the preparation of inputs needs before a silo is opened."""

    @property
    def known(self) -> bool:
        """Whether the ranks have agreed on them."""
        ...

    def read(self, silo: str) -> None:
        """Reads a silo for the statistics. Raises ConfigError."""
        ...

    def agree(self, comm: Comm) -> None:
        """Computes them from the silos that the ranks have read. Collective."""
        ...

    def told(self) -> dict[str, list[float]]:
        """As plain values, for the run directory."""
        ...

    def load(self, values: Mapping[str, Any]) -> None:
        """From plain values."""
        ...


@dataclass(frozen=True)
class Source:
    """A dataset whose silos can be opened one by one."""

    task: Task
    shape: tuple[int, ...]  # of one sample
    num_classes: int  # classes, or size of the vocabulary; 1 for binary, the number of targets for regression
    silos: tuple[Silo, ...]  # the federation, in the same order on every rank
    open: Callable[[str], SiloData]  # by silo id; reads only that silo's files unless `central`
    central: bool = False  # one partitioned data set, which every rank reads whole
    columns: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by opened silo: names of x's columns, if known
    fitted: bool = False  # preprocessing depends on training rows, such as normalisation by their mean
    filled: dict[str, int] = field(default_factory=dict)  # by opened silo: missing values that were filled in
    shared: SharedStatistics | None = None  # what `open` needs to know of all silos first
    rows: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # by opened silo: names of training and of test rows
    classes: tuple[Any, ...] = ()  # labels as in the files, class 0 first; empty: 0, 1, ...
    # Inputs of another file, names of its rows, and its targets if it has any.
    inputs: Callable[[Path, str | None], tuple[Samples, Any, torch.Tensor | None]] | None = None
    # How a silo's inputs are made from its file, as plain values; None: of all silos alike. None if nothing is done.
    preparation: Callable[[str | None], dict[str, Any] | None] | None = None
    files: Mapping[str, Path] = field(default_factory=dict)  # by silo id: its file or folder, if it has one
    readable: Callable[[str], bool] = lambda silo: True  # by silo id: whether this process sees its data; reads nothing


class Dataset(Protocol):
    """A component that provides the silos and their samples."""

    def source(self, seed: int) -> Source:
        """The dataset's silos. Reads no samples unless the set is central. Raises DataMissing."""
        ...


@dataclass(frozen=True)
class Auxiliary:
    """A vector [P] that is sent with the delta, in the same exchange (a control variate, for example).

    The server keeps it and every silo reads it. It starts at 0. After a round it is `decay * old + gain * m`, where m
    is the mean of the silos' vectors weighted by their base weights (`cohort`), or their sum divided by K, the number
    of all silos (`population`). The aggregator's own weights do not affect it.
    """

    name: str
    normaliser: Normaliser = "cohort"
    decay: float = 1.0
    gain: float = 1.0


@dataclass
class Contribution:
    """What a silo gives to the exchange: its delta, contribution["delta"], and the rule's auxiliary vectors by name.
    All are views of one vector, valid until the rank's next silo trains."""

    silo: str
    round: int
    weight: float
    vector_Q: torch.Tensor  # the delta [P], followed by the rule's auxiliary vectors, each [P]
    loss: float  # mean training loss over the targets visited this round
    num_samples: int  # samples visited this round
    num_steps: int
    normalizer: float | None = None  # FedNova's |a_k|_1, the number of gradients in the delta; None: num_steps
    start_loss: float = 0.0  # loss of the global parameters on the training samples, if the aggregator needs it
    # Targets that `loss` is the mean of, or with class weights the sum of their weights; None: num_samples.
    num_targets: float | None = None
    part: float = 1.0  # share of the planned gradients that it holds; below 1 if the silo was stopped early
    norm: float = math.nan  # norm of the delta, set by the last check
    layout: Layout | None = None  # of the vector; None: only the delta

    def __getitem__(self, name: str) -> torch.Tensor:
        """The vector of that name, a view [P]."""
        layout = Layout.whole(len(self.vector_Q)) if self.layout is None else self.layout
        return layout.of(self.vector_Q, name)

    @property
    def untaken(self) -> bool:
        """Whether the memory of `vector_Q` still holds trained parameters; reading `vector_Q` takes the delta."""
        return False

    @property
    def num_gradients(self) -> float:
        """The normaliser, or the number of steps."""
        return self.normalizer or self.num_steps

    @property
    def counted(self) -> float:
        """Number of targets that the loss is the mean of, or the sum of their weights."""
        return self.num_samples if self.num_targets is None else self.num_targets


class TrainedContribution(Contribution):
    """A contribution whose delta is taken when `vector_Q` is first read.

    Until then the same memory holds the trained parameters, and `norm` is that of the delta: a plan that subtracts the
    global parameters while it adds up saves a pass over the vector. `take` takes the delta, in place; it is None once
    that is done or no longer possible.
    """

    take: Callable[[], torch.Tensor] | None = None

    @property
    def vector_Q(self) -> torch.Tensor:  # type: ignore[override]
        if self.take is not None:
            take, self.take = self.take, None
            take()
        return self._memory_Q

    @vector_Q.setter
    def vector_Q(self, memory_Q: torch.Tensor) -> None:
        self._memory_Q = memory_Q

    @property
    def untaken(self) -> bool:
        return self.take is not None
