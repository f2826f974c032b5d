"""Results of a run directory: inspect it, evaluate a checkpoint, export a model. No launcher is needed; under one, each
rank evaluates its own silos."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load

from fedmpi import checkpoint, disk, rng, sources, stopping
from fedmpi.assembly import Admitted, build_module, digest_of, source_of
from fedmpi.comm import Comm, SoloComm, ranks_text
from fedmpi.components import build, did_you_mean, to_dict
from fedmpi.config import Config, of_earlier
from fedmpi.device import set_threads
from fedmpi.directory import CODE, STATISTICS, UNSHARED_FILE, newest_whole, read_config, save_model
from fedmpi.errors import CheckpointError, ConfigError, FedmpiError, agreed
from fedmpi.evaluate import PERSONAL, Scores, Tuning, evaluate_silo, evaluation_key, load_own, own_model, tell
from fedmpi.flat import FlatModel, changed_entries, sha256
from fedmpi.graphs import GRAPHS, write_graph
from fedmpi.local import LocalSilo, Round
from fedmpi.objectives import LossAndMetrics, Tally, resolve
from fedmpi.opening import facts_of, is_of
from fedmpi.placement import place
from fedmpi.records import Record, StatusTable, plain
from fedmpi.records.metrics import METRICS
from fedmpi.state import Key
from fedmpi.trust import confined
from fedmpi.types import SiloData, Source

log = logging.getLogger("fedmpi")

RoundChoice = int | Literal["best", "newest"]


def inspect(root: Path) -> dict[str, Any]:
    """A summary of a run directory, for `fedmpi inspect`. Raises ConfigError if there is no whole checkpoint.

    `rounds` is the round of the newest sealed checkpoint, `params_sha256` the SHA-256 of its parameters and `metrics`
    its record (None before the first round). `best` describes the best evaluated round, which is always on disk and
    which `eval` and `export` take. `on_disk`, `config` and `versions` list checkpoints, configuration and versions.
    `early` has the metric of `stop.early` and what it waits for, `ended` why it has ended the run, if it has.
    """
    begun = read_config(root)
    about = begun.about
    round = newest(root)
    params_P = checkpoint.read_server(root, round)[checkpoint.PARAMS][: about["params"]]
    scores = checkpoint.scores(root)
    best, (after, why) = _best(root), stopping.ended(root)
    record = {} if best is None else checkpoint.manifest(root, best, checkpoint.kept_as_best(root, best)).record or {}
    early = (begun.config.get("stop") or {}).get("early")
    early = None if early is None else {**early, "metric": early.get("metric") or about["metric"]}
    told = {"round", "loss", about["metric"], *([] if early is None else [early["metric"]])}
    return {
        "rounds": round,
        "params_sha256": sha256(params_P),
        "metrics": checkpoint.manifest(root, round).record,
        "best": {k: v for k, v in record.items() if k in told} or None,
        "on_disk": [{"round": r, "resumable": r in checkpoint.sealed_rounds(root)} for r in scores],
        "config": begun.config,
        "versions": about["versions"],
        "early": early,
        "ended": why if 0 <= after <= round else None,
    }


def _best(root: Path, silos: Collection[str] | None = None, others: bool = False) -> int | None:
    """The best round on disk whose checkpoint is whole for these silos; the first of equal ones. Damaged checkpoints
    are skipped with a warning. None if there is none."""
    scored = [(score, -r) for r, score in checkpoint.scores(root).items() if score is not None]
    for _, negative in sorted(scored, reverse=True):
        round = -negative
        try:
            checkpoint.check(root, round, silos=silos, best=checkpoint.kept_as_best(root, round), others=others)
        except CheckpointError as error:
            log.warning("skipped checkpoint of round %d: %s", round, error)
            continue
        return round
    return None


def newest(root: Path, silos: Collection[str] | None = (), others: bool = False) -> int:
    """The newest round whose checkpoint is whole: the server's file and the files with these silos (None: all files).
    Raises ConfigError if there is none."""
    round = checkpoint.newest(root, silos=silos, others=others)
    if round < 0:
        of_silos = f" with silo {', '.join(silos)}; look where that silo's files are" if silos else ""
        early = (root / METRICS).exists() and not of_silos and not checkpoint.sealed_rounds(root)
        how = f" yet; fedmpi watch {root} shows its rounds" if early else of_silos
        raise ConfigError(f"{root} holds no whole checkpoint{how}")
    return round


def choose(root: Path, which: RoundChoice, silos: Collection[str] | None = None, others: bool = False) -> int:
    """The round of a whole checkpoint: by number, the best by the run's metric, or the newest. Checks the server's file
    and the files with these silos (None: all files). With `others` silos that were not members then are allowed. Raises
    ConfigError if there is none."""
    if which == "newest":
        return newest(root, silos, others)
    if which == "best":
        if (best := _best(root, silos, others)) is None:
            metric = read_config(root).about["metric"]
            raise ConfigError(f"{root}: no whole checkpoint has a value of {metric}, so none is best")
        return best
    there = sorted({*checkpoint.sealed_rounds(root), *checkpoint.sealed_rounds(root, best=True)})
    if which not in there:
        raise ConfigError(f"{root}: no checkpoint of round {which}; available: {', '.join(map(str, there)) or 'none'}")
    try:
        checkpoint.check(root, which, silos=silos, best=checkpoint.kept_as_best(root, which), others=others)
    except CheckpointError as error:
        raise ConfigError(f"{error}; choose another round; available: {', '.join(map(str, there))}") from None
    return which


@rng.borrowed()
def evaluate(root: Path, which: RoundChoice = "newest", allow: Sequence[str] = (), comm: Comm | None = None) -> Record:
    """Losses and metrics of a checkpoint, per silo and pooled, as a record like the run's; also those of personal
    models, if there are any. Each rank opens the data of its silos, placed as in training; a single process opens all.
    Collective over `comm`; the record is equal on every rank. Code named by the directory is imported only as trust.py
    allows, and from the modules in `allow`."""
    comm = SoloComm() if comm is None else comm
    with confined(root, allow):
        run = StoredRun.open(root, comm)
        if comm.size > 1 and run.config.secure is not None:
            raise agreed(
                ConfigError(
                    "secure: a rank's figures would leave it without masks; take those of the records, or a single "
                    "process that may open all data"
                )
            )
        ids = [silo.id for silo in run.source.silos]
        mine = ids
        if comm.size > 1:
            members = comm.collectively(lambda: place(run.source.silos, comm.hosts, run.config.server.dedicated))
            mine = members.hosted(comm.rank)
        round = choose_on_ranks(root, which, comm, mine)
        were = members_of(root, round, comm)
        ids, mine = ([silo for silo in some if silo in were] for some in (ids, mine))
        comm.set_up(run.config.comm.timeout_s)
        if comm.size > 1:
            set_threads(comm, run.config.exchange.reduction == "reproducible")
        params_P = run.averaged_parameters(round, comm)
        kept = comm.collectively(lambda: run.kept(round, mine))
        objective = comm.collectively(lambda: resolve(run.config.objective, run.source.task, run.source.num_classes))
        scores = Scores(objective, pools=run.config.disclosed != "silo")
        board = StatusTable(comm.size, (), len(ids), scores.columns, scores.num_counts, scores.pooling)

        def score() -> None:
            for silo in mine:
                local = run.silo(silo, kept[silo], run.opened(silo, kept[silo]))
                for prefix, tally in run.score(objective, local, params_P, round, comm):
                    scores.enter(board, ids.index(silo), tally, prefix)

        comm.collectively(score)
        board.share(comm.share)
    rows: dict[str, dict[str, Any]] = {}
    if not scores.pools:
        rows = {silo: {"num_test": int(num)} for silo, num in zip(ids, board.silo("tests"), strict=True)}
    record: Record = {"round": round}
    for prefix in ("", PERSONAL):
        of_silos, figures = scores.figures(board, ids, prefix)
        record |= figures
        for silo, row in of_silos.items():
            rows[silo] |= row
    return {name: plain(value) for name, value in {**record, "silos": rows}.items()}


def export(
    root: Path,
    target: Path,
    which: RoundChoice = "newest",
    allow: Sequence[str] = (),
    silo: str | None = None,
    shared: bool = False,
) -> int:
    """Write a checkpoint's model: a state_dict (.safetensors, .pt) or a graph (.torchscript, .onnx). Returns the round.

    With `silo` it is that silo's personal model, with `shared` only the shared tensors. A model with personal layers
    needs one of them, because the global model has no trained personal layers. A file that is not the full global model
    says so in its metadata. `preparation` there says, as JSON, how inputs are prepared, by the statistics of all
    silos or of one. Raises ConfigError for a wrong target, silo or round.
    """
    if target.suffix not in (endings := (".safetensors", ".pt", *GRAPHS)):
        raise ConfigError(f"--to {target}: end the name with {', '.join(endings[:-1])} or {endings[-1]}")
    if shared and target.suffix in GRAPHS:
        raise ConfigError(f"--to {target}: a graph is a whole model, and --shared is a part of one")
    if target.is_dir():
        raise ConfigError(f"--to {target}: a folder is there; name a file")
    if silo is not None and shared:
        raise ConfigError("give either --silo or --shared")
    with confined(root, allow):
        run = StoredRun.open(root, SoloComm())
        if silo is not None and silo not in (ids := [known.id for known in run.source.silos]):
            raise ConfigError(f"--silo: no silo '{silo}'{did_you_mean(silo, ids)}")
        round = choose(root, which, () if silo is None else [silo])
        params_P = run.averaged_parameters(round, SoloComm())
        model, about = run.model, {"round": str(round)}
        if silo is not None:
            about["holds"] = f"the model of silo '{silo}'"
            if not run.load_silo(silo, params_P, round):
                log.warning("silo '%s' has no personal model: the global model is written", silo)
        else:
            if model.has_personal and not shared:
                layers = [e.name for e in model.entries if e.kind == "personal"]
                more = ", ..." if len(layers) > 3 else ""
                raise ConfigError(
                    f"every silo has its own {', '.join(layers[:3])}{more}: give --silo ID for that silo's model, "
                    "or --shared for the shared tensors only"
                )
            model.load(params_P)
        if prepared := _preparation(run, round, silo):
            about["preparation"] = prepared
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix in GRAPHS:
            write_graph(model.module, run.source, target, about)
        else:
            save_model(model, target, shared, about if len(about) > 1 or shared else None)
    except OSError as error:
        raise ConfigError(f"--to {target}: cannot write there: {error.strerror or error}") from None
    return round


def _preparation(run: StoredRun, round: int, silo: str | None) -> str:
    """How inputs are prepared, as JSON; empty if they are not, or, with a warning, if the file cannot say how."""
    source = run.source
    why = "`fedmpi predict` prepares them"
    if source.preparation is not None and (silo is not None or source.shared is not None or not source.fitted):
        try:
            if silo is not None and source.fitted and source.shared is None:
                run.opened(silo, run.kept(round, [silo])[silo])  # warns if its data have changed since
            found = source.preparation(silo)
        except FedmpiError as error:
            why = str(error)
        else:
            return "" if found is None else json.dumps(found)
    elif source.preparation is not None:
        why = "each silo has its own; --silo ID writes that silo's into the file's metadata"
    if source.fitted:
        log.warning("the model takes inputs prepared with statistics that are not in the file: %s", why)
    return ""


def choose_on_ranks(root: Path, which: RoundChoice, comm: Comm, mine: Collection[str]) -> int:
    """The chosen round; every rank has the files that it needs. Collective. Raises ConfigError on every rank."""
    if which == "newest":
        round, lost = newest_whole(root, comm, mine, others=True)
        if round < 0:
            where = f" that {ranks_text(lost)} can read" if comm.size > 1 else ""
            raise agreed(ConfigError(f"{root} holds no whole checkpoint{where}"))
        return round
    chosen = comm.collectively(lambda: choose(root, which, mine, others=True) if comm.rank == 0 else -1)
    round = int(comm.broadcast_text(str(chosen), 0))
    best = checkpoint.kept_as_best
    reads = comm.rank == 0 or mine
    try:
        comm.collectively(
            lambda: checkpoint.check(root, round, comm.rank == 0, mine, best(root, round), True) if reads else None
        )
    except FedmpiError as error:
        raise agreed(ConfigError(f"{error}; choose another round")) from None
    return round


def _admitted(root: Path) -> list[list[str]]:
    """Id and path of the silos that the configuration does not name, of all checkpoints: a later one has them all."""
    for round in reversed(checkpoint.sealed_rounds(root)):
        with contextlib.suppress(CheckpointError):  # reported when it is to be read
            return checkpoint.manifest(root, round).admitted
    return []


def members_of(root: Path, round: int, comm: Comm) -> set[str]:
    """The silos that were members in that round. Collective."""
    best = comm.collectively(lambda: comm.rank == 0 and checkpoint.kept_as_best(root, round))
    hosted = comm.collectively(lambda: checkpoint.manifest(root, round, best).hosted if comm.rank == 0 else [])
    return {silo for silos in json.loads(comm.broadcast_text(json.dumps(hosted), 0)) for silo in silos}


@dataclass(frozen=True)
class StoredRun:
    """Configuration, data source and model of a run directory."""

    root: Path
    config: Config
    source: Source
    model: FlatModel

    @classmethod
    def open(cls, root: Path, comm: Comm) -> StoredRun:
        """Read the run directory on rank 0 (others need not see it) and build all parts on every rank. Collective."""
        begun = comm.collectively(lambda: read_config(root) if comm.rank == 0 else None)
        told = None if begun is None else [begun.config, begun.about, _admitted(root)]
        values, about, admitted = yaml.safe_load(comm.broadcast_text(yaml.safe_dump(told), 0))
        unshared = comm.collectively(lambda: _unshared(root, about["unshared"]) if comm.rank == 0 else {})
        unshared = _from_first(unshared, comm)

        def put_together() -> StoredRun:
            config = build(
                Config, of_earlier({**values, "init": None})
            )  # pretrained tensors are in the run directory already
            source = source_of(config, [Admitted(*one) for one in admitted])
            if source.shared is not None:
                source.shared.load(about.get(STATISTICS, {}))
            module = build_module(config, source)
            module.load_state_dict(unshared, strict=False)
            if comm.rank == 0:
                _warn_of_code(root, config, about.get("code", {}))
            model = FlatModel(module, config.exchange.parameters)
            if others := changed_entries(about["model"], model.entries):
                raise ConfigError(f"{root}: it is not the model that was trained: {others[0]}")
            return cls(root, config, source, model)

        return comm.collectively(put_together)

    def averaged_parameters(self, round: int, comm: Comm) -> torch.Tensor:
        """The parameters that the round evaluated, [P] (averaged ones, if the run kept an average). Rank 0 reads them.
        Collective."""
        best = checkpoint.kept_as_best(self.root, round)
        stored = comm.collectively(lambda: checkpoint.read_server(self.root, round, best) if comm.rank == 0 else {})
        served = {"": stored.get(checkpoint.AVERAGE, stored[checkpoint.PARAMS])} if stored else {}
        return self.model.layout.params(_from_first(served, comm)[""])

    def kept(self, round: int, silos: Collection[str]) -> dict[str, dict[Key, torch.Tensor]]:
        """The silos' kept state, by silo. Raises CheckpointError."""
        return checkpoint.read_silos(self.root, round, silos, checkpoint.kept_as_best(self.root, round))

    def opened(self, silo: str, kept: Mapping[Key, torch.Tensor]) -> SiloData:
        """The silo's data; warns if they are not those that the checkpoint, with this kept state, was trained on."""
        data, known = self.source.open(silo), kept.get(checkpoint.CHECKSUM)
        if known is not None and not is_of(int(known), facts_of(silo, data, self.source, {}), data):
            log.warning("silo '%s': its data, or how they are prepared, differ from those that it was trained on", silo)
        return data

    def silo(self, silo: str, kept: Mapping[Key, torch.Tensor], data: SiloData) -> LocalSilo:
        """The silo with its data and kept state."""
        return LocalSilo(
            silo, data, 0.0, kept={key[-1]: tensor for key, tensor in kept.items() if key[:-1] == checkpoint.KEPT}
        )

    def tuning(
        self, objective: LossAndMetrics, silo: LocalSilo, round: int, check: Callable[[], None] = lambda: None
    ) -> Tuning | None:
        """How to fine-tune the last round's model for a silo; None if the run did not."""
        config = self.config
        if config.evaluate.finetune is None or round < config.rounds:
            return None
        criterion = objective.criterion(silo.data.y_train)
        about = Round(round, config.rounds, config.seed, criterion.loss, check, count=criterion.count)
        return config.evaluate.finetune, about

    def score(
        self, objective: LossAndMetrics, silo: LocalSilo, params_P: torch.Tensor, round: int, comm: Comm
    ) -> Iterator[tuple[str, Tally]]:
        """Yield the silo's results for the global model, with prefix "", and for its personal model, if it has one.
        Between batches it tells the other ranks that this one is alive."""

        def look() -> None:
            comm.beat(trains=True)

        key = evaluation_key(self.config.seed, round, silo.id)
        tuning = self.tuning(objective, silo, round, look)
        found = [("", (params_P, silo))]
        if len(silo.data.x_test) and (own := own_model(self.config.rule, self.model, silo, params_P, tuning)):
            found.append((PERSONAL, own))
        for prefix, (averaged_parameters, served) in found:
            self.model.load(averaged_parameters)
            rng.set_all(key)
            tally = evaluate_silo(self.model, objective, served, self.config.evaluate.batch_size, look)
            tell(f"round {round}", silo.id, tally)
            yield prefix, tally

    def load_silo(self, silo: str, params_P: torch.Tensor, round: int) -> bool:
        """Load the silo's personal model, or the global one. True if it is personal."""
        try:
            kept = self.kept(round, [silo])[silo]
        except CheckpointError as error:
            raise ConfigError(f"{error}; export where that silo's files are") from None
        objective = resolve(self.config.objective, self.source.task, self.source.num_classes)
        tunes = self.config.evaluate.finetune is not None and round >= self.config.rounds
        nothing = torch.zeros(0)
        local = self.silo(silo, kept, self.source.open(silo) if tunes else SiloData(*[nothing] * 4))
        tuning = self.tuning(objective, local, round) if tunes else None
        with rng.borrowed():
            return load_own(self.config.rule, self.model, local, params_P, tuning)


def _from_first(tensors: Mapping[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor]:
    """Broadcast rank 0's tensors. Collective."""
    told = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()]
    found = {}
    for name, dtype, shape in json.loads(comm.broadcast_text(json.dumps(told), 0)):
        found[name] = tensors[name].contiguous() if comm.rank == 0 else torch.zeros(shape, dtype=getattr(torch, dtype))
        comm.bcast(found[name].reshape(-1).view(torch.uint8))
    return found


def _unshared(root: Path, digest: str) -> dict[str, torch.Tensor]:
    """Tensors that the run wrote once because no checkpoint holds them. Raises ConfigError if they are damaged."""
    path = root / UNSHARED_FILE
    if digest == digest_of({}).hex():
        return {}
    try:
        tensors = load(disk.read_bytes(path, 1 << 40))
    except Exception as error:  # safetensors has an error type of its own
        raise ConfigError(f"{path}: {error}") from None
    if digest_of(tensors).hex() != digest:
        raise ConfigError(f"{path} is damaged: it is not what the run began with")
    return tensors


def _warn_of_code(root: Path, config: Config, there: Mapping[str, str]) -> None:
    """Warn if the user's code has changed since the run was trained."""
    changed = sources.changed(there, to_dict(config))
    if changed := [name for name in changed if not name.endswith(" (gone)")]:  # not needed here
        log.warning("code has changed since %s was trained with it (see %s): %s", root, root / CODE, ", ".join(changed))
