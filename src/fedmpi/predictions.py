"""Predictions of a checkpoint, written where the samples are: a file per silo, on the rank that hosts it.

Only the model crosses ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch

from fedmpi import rng
from fedmpi.comm import Comm, SoloComm
from fedmpi.components import did_you_mean
from fedmpi.data.formats import write
from fedmpi.device import set_threads
from fedmpi.errors import ConfigError, agreed
from fedmpi.evaluate import evaluation_key
from fedmpi.objectives import LossAndMetrics, one_tensor, resolve
from fedmpi.placement import place
from fedmpi.results import RoundChoice, StoredRun, choose_on_ranks, members_of
from fedmpi.targets import alike
from fedmpi.trust import confined
from fedmpi.types import Samples, Source

Column = npt.NDArray[Any]
Part = Literal["test", "train", "all"]
ENDINGS = ("csv", "npz", "h5")


class Written(NamedTuple):
    """A file of predictions."""

    path: Path
    rows: int
    own: bool  # whether by the silo's own model
    round: int  # of the checkpoint
    replaced: bool  # whether an older file was there


@rng.borrowed()
def predict(
    root: Path,
    to: Path,
    which: RoundChoice = "newest",
    allow: Sequence[str] = (),
    comm: Comm | None = None,
    part: Part = "test",
    only: Sequence[str] = (),
    data: Path | None = None,
    ending: str = "csv",
) -> dict[str, Written]:
    """Writes predictions of this rank's silos into the folder `to`; returns each silo's file. A silo with a personal
    model uses that. An older file of the same name is replaced, but never a file that holds samples.

    `only`: these silos. `data`: samples of this file instead, prepared as those of the one silo in `only`, or by the
    global model (with the empty id) if none is given. Collective; raises ConfigError on every rank.
    """
    comm = SoloComm() if comm is None else comm
    if ending not in ENDINGS:
        raise agreed(ConfigError(f"--format {ending}: one of {', '.join(ENDINGS)}"))
    if part not in ("test", "train", "all"):
        raise agreed(ConfigError(f"--part {part}: one of test, train, all"))
    if data is not None and (len(only) > 1 or comm.size > 1):
        raise agreed(ConfigError("--data takes one process, and at most one --silo"))
    with confined(root, allow):
        run = StoredRun.open(root, comm)
        source, ids = run.source, [silo.id for silo in run.source.silos]
        if others := [silo for silo in only if silo not in ids]:
            raise agreed(ConfigError(f"--silo: no silo '{others[0]}'{did_you_mean(others[0], ids)}"))
        if source.task == "next_token":
            raise agreed(ConfigError("predict: next_token has no prediction per sample"))
        mine = ids
        if comm.size > 1:
            members = comm.collectively(lambda: place(source.silos, comm.hosts, run.config.server.dedicated))
            mine = members.hosted(comm.rank)
        mine = [silo for silo in mine if not only or silo in only] if data is None else list(only)
        round = choose_on_ranks(root, which, comm, mine)
        if data is None:
            were = members_of(root, round, comm)
            if gone := [silo for silo in only if silo not in were]:
                raise agreed(ConfigError(f"--silo: '{gone[0]}' was no member in round {round}; choose another --round"))
            mine = [silo for silo in mine if silo in were]
        comm.set_up(run.config.comm.timeout_s)
        if comm.size > 1:
            set_threads(comm, run.config.exchange.reduction == "reproducible")
        params_P = run.averaged_parameters(round, comm)
        objective = comm.collectively(lambda: resolve(run.config.objective, source.task, source.num_classes))

        def work() -> dict[str, Written]:
            try:
                to.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--to {to}: cannot write there: {error.strerror or error}") from None
            found = {}
            for silo in mine or ([""] if data is not None else []):
                own = bool(silo) and run.load_silo(silo, params_P, round)
                if not silo:
                    if run.model.has_personal:
                        raise ConfigError("every silo has layers of its own: name one with --silo")
                    run.model.load(params_P)
                path = to / f"{_name(silo, data)}.{ending}"
                replaced = _refuse_samples(path, [*source.files.values(), *([data] if data is not None else [])])
                columns = dict(_columns(run, objective, silo, round, part, data, lambda: comm.beat(trains=True)))
                try:
                    write(path, columns)
                except OSError as error:
                    raise ConfigError(f"--to {path}: cannot be written: {error.strerror or error}") from None
                found[silo] = Written(path, len(next(iter(columns.values()))), own, round, replaced)
            return found

        return comm.collectively(work)


def _name(silo: str, data: Path | None) -> str:
    """The name of a file of predictions, without its ending.

    >>> _name("a/b", None), _name("", Path("new.csv")), _name("a/b", Path("new.csv"))
    ('a%2Fb', 'new', 'new@a%2Fb')
    """
    of_silo = quote(silo, safe="")
    return of_silo if data is None else f"{data.stem}@{of_silo}" if silo else data.stem


def _refuse_samples(path: Path, samples: Sequence[Path]) -> bool:
    """Whether a file is there. Raises ConfigError if it is one of `samples`."""
    if not path.exists():
        return False
    if any(other.exists() and path.samefile(other) for other in samples):
        raise ConfigError(f"--to: {path} holds samples, and predictions would replace it; choose another folder")
    return True


def _columns(
    run: StoredRun,
    objective: LossAndMetrics,
    silo: str,
    round: int,
    part: Part,
    data: Path | None,
    between: Callable[[], object],
) -> Iterator[tuple[str, Column]]:
    """The columns of a silo's file, by the model that is loaded."""
    source = run.source
    if data is not None:
        if source.inputs is None:
            raise ConfigError("--data is for runs with data: files")
        if silo and source.fitted and source.shared is None:  # statistics are those of the silo's file
            run.opened(silo, run.kept(round, [silo])[silo])
        x, rows, y = source.inputs(data, silo or None)
        pieces: list[tuple[str, Samples, torch.Tensor | None, Column]] = [("new", x, y, rows)]
    else:
        opened = run.opened(silo, run.kept(round, [silo])[silo])
        train, test = source.rows.get(silo, (np.arange(len(opened.x_train)), np.arange(len(opened.x_test))))
        pieces = [("train", opened.x_train, opened.y_train, train), ("test", opened.x_test, opened.y_test, test)]
        pieces = [piece for piece in pieces if part in (piece[0], "all")]
    rng.set_all(evaluation_key(run.config.seed, round, silo))
    outputs = [_outputs(run, piece[1], between) for piece in pieces]
    yield "row", np.concatenate([piece[3] for piece in pieces])
    if part == "all" and data is None:
        yield "part", np.concatenate([np.full(len(piece[3]), piece[0]) for piece in pieces])
    if targets := [piece[2] for piece in pieces if piece[2] is not None]:
        yield from _labels(torch.cat(targets), source)
    yield from predicted(torch.cat(outputs), source, objective.own_loss)


def _outputs(run: StoredRun, x: Samples, between: Callable[[], object]) -> torch.Tensor:
    module, size = run.model.module, run.config.evaluate.batch_size
    module.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(x), size):
            between()
            outputs = one_tensor(module(x[start : start + size])).float()
            if run.source.task != "classification":
                num = run.source.num_classes if run.source.task == "regression" else 1
                outputs = alike(outputs, torch.empty(len(outputs), *((num,) if num > 1 else ())))
            elif outputs.ndim != 2:
                raise ConfigError(f"predict: the model gives {list(outputs.shape)}; it takes one class per sample")
            found.append(outputs)
    width = run.source.num_classes
    empty = torch.empty((0, width) if width > 1 or run.source.task == "classification" else (0,))
    return torch.cat(found) if found else empty


def _labels(y: torch.Tensor, source: Source) -> Iterator[tuple[str, Column]]:
    if source.task == "regression":
        yield from _numbered("target", y)
    else:
        yield "target", _named(y.long().numpy(), source)


def predicted(outputs: torch.Tensor, source: Source, own_loss: bool) -> Iterator[tuple[str, Column]]:
    """Columns for outputs [N, ...]: the prediction, and the probability of every class. With a user's loss outputs need
    not be logits: they are written as they are, without probabilities."""
    if source.task == "regression":
        yield from _numbered("prediction", outputs)
        return
    if own_loss:
        if source.task == "classification":
            yield "prediction", _named(outputs.argmax(1).numpy(), source)
        yield from _numbered("output", outputs)
        return
    if source.task == "binary":
        of_second = outputs.double().sigmoid()
        shares = torch.stack([1 - of_second, of_second], dim=1)
        classes = (outputs > 0).long()
    else:
        shares, classes = outputs.double().softmax(1), outputs.argmax(1)
    yield "prediction", _named(classes.numpy(), source)
    names = source.classes or range(shares.shape[1])
    for name, share in zip(names, shares.T, strict=True):
        yield f"p_{name}", share.numpy()


def _numbered(name: str, values: torch.Tensor) -> Iterator[tuple[str, Column]]:
    if values.ndim == 1:
        yield name, values.numpy()
    else:
        for i, column in enumerate(values.T):
            yield f"{name}_{i}", column.numpy()


def _named(classes: Column, source: Source) -> Column:
    """Classes as the silos' files name them."""
    if not source.classes:
        return classes
    whole = all(isinstance(name, int) for name in source.classes)
    names = np.array(source.classes if whole else [str(name) for name in source.classes])
    return names[classes] if len(classes) else names[:0]
