"""What a run directory says: inspect it, evaluate a checkpoint of it, export its model. No MPI, no launcher."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load

from fedmpi import checkpoint, disk, rng
from fedmpi.assembly import build_module, digest_of, source_of
from fedmpi.components import build
from fedmpi.config import Config
from fedmpi.directory import UNSHARED_FILE, read_config, save_tensors
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.evaluate import PERSONAL, Scores, evaluate_silo, evaluation_key, personal_model, tell
from fedmpi.flat import FlatModel, changed_entries, sha256
from fedmpi.local import LocalSilo
from fedmpi.objectives import resolve
from fedmpi.records import Board, Record, plain
from fedmpi.trust import confined
from fedmpi.types import Source

log = logging.getLogger("fedmpi")

RoundChoice = int | Literal["best", "newest"]


def inspect(root: Path) -> dict[str, Any]:
    """Rounds done and safe on disk, SHA-256 of their parameters, the last record, the best, what is on disk,
    configuration, versions.

    `rounds` is the newest sealed checkpoint's; `metrics` is its record, None before the first round. `best` is of the
    best round that was evaluated until then, which is always on disk: the one that `eval` and `export` take.
    """
    begun = read_config(root)
    about = begun.about
    round = newest(root)
    params_P = checkpoint.read_server(root, round)[checkpoint.PARAMS][: about["params"]]
    scores = checkpoint.scores(root)
    best = _best(root)
    record = {} if best is None else checkpoint.manifest(root, best, checkpoint.kept_as_best(root, best)).record or {}
    return {
        "rounds": round,
        "params_sha256": sha256(params_P),
        "metrics": checkpoint.manifest(root, round).record,
        "best": {k: v for k, v in record.items() if k in ("round", "loss", about["metric"])} or None,
        "on_disk": [{"round": r, "resumable": r in checkpoint.sealed_rounds(root)} for r in scores],
        "config": begun.config,
        "versions": about["versions"],
    }


def _best(root: Path) -> int | None:
    """The best of the rounds on disk that is whole; of equals the first. Others are skipped with a warning."""
    scored = [(score, -r) for r, score in checkpoint.scores(root).items() if score is not None]
    for _, negative in sorted(scored, reverse=True):
        round = -negative
        try:
            checkpoint.check(root, round, best=checkpoint.kept_as_best(root, round))
        except CheckpointError as error:
            log.warning("skipped checkpoint of round %d: %s", round, error)
            continue
        return round
    return None


def newest(root: Path) -> int:
    """The newest round whose checkpoint is whole. Raises ConfigError when there is none."""
    round = checkpoint.newest(root, silos=())
    if round < 0:
        raise ConfigError(f"{root} holds no whole checkpoint")
    return round


def choose(root: Path, which: RoundChoice) -> int:
    """The round of a checkpoint that is there: by number, the best by the run's metric, or the newest."""
    if which == "newest":
        return newest(root)
    if which == "best":
        if (best := _best(root)) is None:
            raise ConfigError(f"{root}: no whole checkpoint was evaluated, so none is best")
        return best
    there = sorted({*checkpoint.sealed_rounds(root), *checkpoint.sealed_rounds(root, best=True)})
    if which not in there:
        raise ConfigError(f"{root}: no checkpoint of round {which}; there is: {', '.join(map(str, there)) or 'none'}")
    try:
        checkpoint.check(root, which, best=checkpoint.kept_as_best(root, which))
    except CheckpointError as error:
        raise ConfigError(f"{error}; choose another round, there is: {', '.join(map(str, there))}") from None
    return which


@rng.borrowed()
def evaluate(root: Path, which: RoundChoice = "newest", allow: Sequence[str] = ()) -> Record:
    """Loss and metric of a checkpoint on every silo's test data and pooled, of the silos' own models too where they
    have any (`evaluate.finetune` is not done again); this process opens all silos' data. Code that the directory names
    is imported as trust.py says, and from modules that `allow` names."""
    with confined(root, allow):
        return _evaluate(root, which)


def _evaluate(root: Path, which: RoundChoice) -> Record:
    model, config, source = _model(root)
    round = choose(root, which)
    objective = resolve(config.objective, source.task, source.num_classes)
    scores = Scores(objective)
    ids = [silo.id for silo in source.silos]
    board = Board(1, (), len(ids), scores.columns, scores.num_counts)
    params_P = _served(root, round)[: model.num_shared]
    kept = checkpoint.read_silos(root, round, ids, checkpoint.kept_as_best(root, round))
    rows: dict[str, dict[str, Any]] = {}
    for i, silo in enumerate(ids):
        mine = {key[1]: tensor for key, tensor in kept[silo].items() if key[0] == "kept"}
        local = LocalSilo(silo, source.open(silo), 0.0, kept=mine)
        rows[silo] = {"num_test": len(local.data.x_test)}
        own = personal_model(config.local, local, params_P)
        for prefix, served in (("", (params_P, local)), (PERSONAL, own)):
            if served is not None:
                model.load(served[0])
                rng.set_all(evaluation_key(config.seed, round, silo))
                tally = evaluate_silo(model, objective, served[1], config.evaluate.batch_size)
                scores.enter(board, i, tally, prefix)
                tell(f"round {round}", silo, tally)
    record: Record = {"round": round}
    for prefix in ("", PERSONAL):
        of_silos, figures = scores.figures(board, ids, prefix)
        record |= figures
        for silo, row in of_silos.items():
            rows[silo] |= row
    return {name: plain(value) for name, value in {**record, "silos": rows}.items()}


def export(root: Path, target: Path, which: RoundChoice = "newest", allow: Sequence[str] = ()) -> int:
    """Write a checkpoint's model as .safetensors or .pt (a state_dict); personal parameters are as they began. The
    round comes back."""
    if target.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"--to {target}: end the name with .safetensors or .pt")
    if target.is_dir():
        raise ConfigError(f"--to {target}: a folder is there; name a file")
    with confined(root, allow):
        model, _, _ = _model(root)
    round = choose(root, which)
    model.load(_served(root, round))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()  # torch's own error is none of the system's
        if target.suffix == ".pt":
            torch.save({n: t.clone() for n, t in model.module.state_dict().items()}, target)
        else:
            save_tensors(model.module.state_dict(), target)
    except OSError as error:
        raise ConfigError(f"--to {target}: cannot write there: {error.strerror or error}") from None
    return round


def _served(root: Path, round: int) -> torch.Tensor:
    """The parameters that the round's record is about, and behind them what else travels."""
    tensors = checkpoint.read_server(root, round, checkpoint.kept_as_best(root, round))
    return tensors.get(checkpoint.AVERAGE, tensors[checkpoint.PARAMS])


def _model(root: Path) -> tuple[FlatModel, Config, Source]:
    begun = read_config(root)
    config = build(Config, {**begun.config, "init": None})  # what it set is in the checkpoint, or beside it
    source = source_of(config)
    module = build_module(config, source)
    if (digest := begun.about["unshared"]) != digest_of({}).hex():
        module.load_state_dict(_unshared(root / UNSHARED_FILE, digest), strict=False)
    model = FlatModel(module, config.exchange.parameters)
    if others := changed_entries(begun.about["model"], model.entries):
        raise ConfigError(f"{root}: it is not the model that was trained: {others[0]}")
    return model, config, source


def _unshared(path: Path, digest: str) -> dict[str, torch.Tensor]:
    """What the model started with and no checkpoint has. ConfigError unless it is what the run wrote."""
    try:
        tensors = load(disk.read_bytes(path, 1 << 40))
    except Exception as error:  # safetensors has an error type of its own
        raise ConfigError(f"{path}: {error}") from None
    if digest_of(tensors).hex() != digest:
        raise ConfigError(f"{path} is damaged: it is not what the run began with")
    return tensors
