"""`fedmpi plan`: what a run will need. Computed on a login node, without MPI and without training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmpi import pretrained
from fedmpi.assembly import told_columns
from fedmpi.components import to_dict
from fedmpi.config import Config, flatten, origin_of
from fedmpi.errors import ConfigError
from fedmpi.evaluate import Scores
from fedmpi.exchange.base import Machine
from fedmpi.exchange.choose import BY_ARRIVAL, UNMASKED, by_arrival, by_rule, cost
from fedmpi.exchange.chunks import Grid
from fedmpi.exchange.config import ExchangeSection
from fedmpi.exchange.cost import Sizes, Traffic, num_vectors
from fedmpi.exchange.fragments import parts
from fedmpi.exchange.overlap import MOST_TRACKS, Track
from fedmpi.exchange.plans import MEASURE, PLANS
from fedmpi.exchange.wire import Wire
from fedmpi.flat import Entry, layout_of, master_dtype, named_exact
from fedmpi.local import GradientRule, plain_step
from fedmpi.mirror import BUDDIES, COMMITS
from fedmpi.models import make
from fedmpi.objectives import resolve
from fedmpi.placement import place
from fedmpi.privacy import Privacy, epsilon
from fedmpi.privacy.base import REPEATS
from fedmpi.records import StatusTable, peak_rss_bytes
from fedmpi.reveals import reveals, trust
from fedmpi.rounds import DONE_RANK, READY_RANK, READY_SILO
from fedmpi.rounds.clocks import Virtual
from fedmpi.rounds.disclosure import ready_pooling, refuse_metrics
from fedmpi.rounds.pace import amounts, measured, paces
from fedmpi.secure.graph import degree
from fedmpi.secure.numbers import BYTES
from fedmpi.secure.ring import GROWS
from fedmpi.secure.session import num_covered
from fedmpi.transforms import Updates
from fedmpi.transports import ByFiles
from fedmpi.types import Silo, Source

_HEADER_BYTES = 8192  # of an HDF5 file with a handful of datasets


@dataclass(frozen=True)
class Counts:
    """Numbers of elements of a model's tensors."""

    total: int  # all
    trained: int  # with a gradient
    shared: int  # shared by all silos
    travels: int  # in an exchanged vector: the shared ones and the rule's auxiliary vectors
    word: int  # bytes per element
    kept_bytes: int  # bytes that each silo keeps from round to round
    exact: int | None  # most elements per round that bypass a lossy codec; None: there are none

    @classmethod
    def of(cls, found: Sequence[Entry], config: Config) -> Counts:
        """Counts of a model with these tensors."""
        named = named_exact(found, config.exchange.exact)
        layout = layout_of(found, config.local.auxiliaries, named)
        word = master_dtype(found).itemsize
        kept_bytes = sum(e.num_elements * e.dtype.itemsize for e in found if e.kind in ("personal", "integers"))
        kept_bytes += config.local.kept_vectors * layout.num_params * word
        rounds = [layout.part(part).exact for part in parts(layout.size, config.exchange.fragments)]
        exact = max(sum(part.stop - part.start for part in exact) for exact in rounds)
        return cls(
            total=sum(e.num_elements for e in found),
            trained=sum(e.num_elements for e in found if e.trainable),
            shared=layout.num_params,
            travels=layout.size,
            word=word,
            kept_bytes=kept_bytes,
            exact=exact if layout.exact or layout.still else None,
        )


def plan(
    config: Config,
    origins: Mapping[str, str],
    num_ranks: int,
    speeds: Path | None = None,
    num_train: Mapping[str, int] = {},
) -> dict[str, Any]:
    """Silos per rank, bytes per round, memory per rank, disk per checkpoint, collectives, and the origin of each value.

    If a silo of a rank declares no number of samples, `train_samples` and `data_bytes` of the rank are None, and its
    `memory_bytes` are without these samples; `num_train` gives numbers that are known otherwise. With a virtual clock,
    or measured `speeds` (rounds/pace.py), also the pace of each engine. Raises ConfigError for what `train` would
    refuse, as far as it shows without data and ranks.
    """
    source = config.data.source(config.seed)
    sized = (replace(silo, num_samples=num_train.get(silo.id, silo.num_samples)) for silo in source.silos)
    source = replace(source, silos=tuple(sized))
    objective = resolve(config.objective, source.task, source.num_classes)
    refuse_metrics(config.disclosed, objective.scorers, config.secure is not None)
    with torch.device("meta"):
        module = make(config.model, source)
    if config.init is not None:
        pretrained.fitting(module, config.init)
    ids = [silo.id for silo in source.silos]
    found = config.entries(module, ids, ids)
    layers = any(e.kind == "personal" and e.num_elements for e in found)
    scores = Scores.of(objective, config.local, config.evaluate.finetune, layers, config.disclosed != "silo")
    counts = Counts.of(found, config)
    apart = config.transport.apart
    config.transport.suits(len(ids))
    if apart:  # a job of its own for the server and for each silo
        if num_ranks > 1:
            raise ConfigError(
                "transport: files has no ranks: the server and every silo are jobs (slurm/federation.sh submits them)"
            )
        section, why = by_arrival(config.exchange), ""
        num_ranks, owners = 1 + len(ids), [*range(1, 1 + len(ids))]
    else:
        section, why = _planned(config, num_ranks, counts.travels)
        # Pinned silos cannot be placed on hosts that are not known yet.
        free = [type(silo)(silo.id, silo.num_samples) for silo in source.silos]
        owners = place(free, [""] * num_ranks, config.server.dedicated).ranks
    hosted = [owners.count(rank) for rank in range(num_ranks)]
    sizes = Sizes(
        num_elements=counts.travels,
        element_bytes=counts.word,
        num_ranks=num_ranks,
        vectors=hosted if config.engine.arrivals or apart else num_vectors(section, hosted),
        num_silos=len(owners),
        num_exact=counts.exact,
        num_states=_server_copies(config),
        num_stepped=counts.shared,
        arrivals=config.engine.arrivals or len(ids) * apart,
        secure_bits=0 if config.secure is None else config.secure.ring(config, len(owners)).bits,
        aggregator=None if config.aggregate.needs == "sum" else config.aggregate,
    )
    sample_bytes = 4 * int(torch.Size(source.shape).numel())
    ranks = []
    for rank in range(num_ranks):
        mine = [silo for silo, owner in zip(source.silos, owners, strict=True) if owner == rank]
        samples = sum(silo.num_samples or 0 for silo in mine)
        known = all(silo.num_samples is not None for silo in mine)
        vectors = _vectors(config, counts, section, replace(sizes, rank=rank, hosted=len(mine)))
        ranks.append(
            {
                "rank": rank,
                "silos": [silo.id for silo in mine],
                "train_samples": samples if known else None,
                "data_bytes": samples * sample_bytes if known else None,
                "vectors": vectors,
                "vector_bytes": sum(vectors.values()),
                "memory_bytes": sum(vectors.values()) + samples * sample_bytes + peak_rss_bytes(),
            }
        )
    on_wire = cost(section, sizes).traffic
    flat = section.regions is None  # regions depend on the ranks' hosts, not known yet
    control = 2 * 8 * _num_figures(config, scores, num_ranks, len(owners)) * num_ranks + on_wire.control
    if apart:
        on_wire = _as_files(config, counts, section, sizes)
        control, sizes = 0, replace(sizes, vectors=[0], num_silos=0)  # a checkpoint holds no silo's state
    checkpoint = _checkpoint(config, counts, section, sizes)
    return {
        "ranks": ranks,
        "jobs": ["server", *ids] if apart else None,
        "silos": len(source.silos),
        "undeclared": [silo.id for silo in source.silos if silo.num_samples is None],
        "pinned": {silo.id: silo.host for silo in source.silos if silo.host is not None},
        "central": source.central,
        "parameters": counts.total,
        "shared_parameters": counts.shared,
        "vector_elements": counts.travels,
        "bytes_up": on_wire.up if flat else None,
        "bytes_down": on_wire.down if flat else None,
        "bytes_control": (control if num_ranks > 1 else 0) if flat else None,
        "plan": section.plan,
        "plan_asked": config.exchange.plan,
        "plan_why": why,
        "collectives": on_wire.collectives if flat else f"in regions, then across: {on_wire.collectives}",
        "checkpoint_bytes": sum(checkpoint.values()) + _HEADER_BYTES * (1 + num_ranks * (not apart)),
        "checkpoints_kept": config.checkpoint.keep + 1,
        "mirror_bytes": 0 if apart else _mirror(config, counts, checkpoint, num_ranks),
        "budget": None
        if config.privacy is None
        else budget(config, config.privacy, source, {silo.id: silo.num_samples for silo in source.silos}),
        **_engines(config, source.silos, speeds),
        "out": str(Path(config.out)),
        "privacy": [
            row._asdict()
            for row in reveals(config, ids, hosted, section.plan, source.central, layers or counts.kept_bytes > 0)
        ],
        "trust": trust(config, ids, hosted),
        "secure": _secure(config, ids),
        "config": {
            key: {"value": value, "from": origin_of(key, origins)} for key, value in flatten(to_dict(config)).items()
        },
    }


def _as_files(config: Config, counts: Counts, section: ExchangeSection, sizes: Sizes) -> Traffic:
    """What a round writes into the shared folder: the updates, and the parameters, which each silo reads."""
    exact, grid = sizes.num_exact or 0, Grid(sizes.num_elements, 1)
    if sizes.secure_bits:  # words, and under the same masks the weight, the number of silos and figures
        hidden = ready_pooling(config.disclosed, masked=True)
        assert hidden is not None
        up = sizes.num_elements * sizes.secure_bits // 8 + BYTES * (2 + 2 * len(hidden.sums))
    elif section.up.plain:
        up = sizes.vector_bytes
    elif config.engine.arrivals:
        up = Wire.most_bytes(section.up, sizes.num_elements, exact)
    else:
        up = sum(section.up.codec.max_bytes(grid.size(piece)) for piece in range(grid.num_pieces))
        up += exact * sizes.element_bytes
    down = sizes.vector_bytes + counts.shared * counts.word * (config.server.average is not None)
    assert isinstance(config.transport, ByFiles)
    return Traffic(sizes.arrivals * up, down, 0, f"none; updates and parameters are files in {config.transport.root}")


def _secure(config: Config, ids: Sequence[str]) -> dict[str, Any] | None:
    """The ring and the threshold under `secure`."""
    if config.secure is None:
        return None
    ring = config.secure.ring(config, len(ids))
    noise = None if config.privacy is None else config.privacy.spread(config, len(ids))
    return {
        "threshold": config.secure.fewest(config, ids),
        "bits": ring.bits,
        "unit": ring.unit,
        "largest_sum": min(ring.largest, GROWS * ring.span),
        "cut": None if ring.span == math.inf else ring.span,
        "clip": ring.bound,
        "error": ring.error(len(ids)),
        "noise": None if noise is None else ring.unit * noise.least,
        "neighbours": len(ids) - 1
        if config.transport.apart
        else min(config.secure.neighbours or degree(len(ids)), len(ids) - 1),
    }


def _engines(config: Config, silos: Sequence[Silo], speeds: Path | None) -> dict[str, Any]:
    """The pace of each engine, and how much each silo would do if that follows delays; None if the speeds of silos are
    not known, or if nothing follows delays."""
    ids, clock = [silo.id for silo in silos], config.engine.clock
    unknown: dict[str, Any] = {"engines": None, "amounts": None}
    if speeds is None and not isinstance(clock, Virtual):
        return unknown
    if speeds is not None:
        rule = config.local
        clock = measured(speeds, ids, (rule.epochs or rule.steps or 0) if isinstance(rule, GradientRule) else 0)
    elif isinstance(clock, Virtual):
        clock.suits(ids)
        if clock.per == "sample" and any(silo.num_samples is None for silo in silos):
            return unknown
    about = (config, clock, ids, [silo.num_samples or 0 for silo in silos])
    orders = {silo: {"amount": one.amount, "scale": one.scale} for silo, one in amounts(*about).items()}
    return {"engines": [asdict(one) for one in paces(*about)], "amounts": orders or None}


def _planned(config: Config, num_ranks: int, num_elements: int) -> tuple[ExchangeSection, str]:
    """The exchange with the plan that it would get on one node, and how the plan is chosen; empty if the configuration
    names it."""
    section = config.exchange
    if config.engine.arrivals:
        return by_arrival(section), f"root ({BY_ARRIVAL})"
    if not section.chosen:
        return section, ""

    def ruled(machine: Machine) -> tuple[str, str]:
        def refuses(name: str) -> str:
            plan = PLANS.find(name)
            return (
                UNMASKED if config.secure is not None and not plan.masks_itself() else plan.supports(section, machine)
            )

        return by_rule(machine, section.at_a_time(num_elements), refuses)

    on_device = config.device.name == "cuda"
    name, why = ruled(Machine(num_ranks, on_device=on_device))
    if section.plan == MEASURE and section.regions is None:
        return replace(section, plan=name), f"measured when the run starts; the figures here are those of {name}"
    elsewhere: dict[str, list[str]] = {}  # plan: the kinds of machine that would get it
    for where, machine in (
        ("several nodes", Machine(num_ranks, one_node=False, on_device=on_device)),
        ("GPUs", Machine(num_ranks, on_device=config.device.name != "cpu")),
    ):
        if (other := ruled(machine)[0]) != name:
            elsewhere.setdefault(other, []).append(where)
    more = "".join(f"; on {' or '.join(places)} {other}" for other, places in elsewhere.items())
    return replace(section, plan=name), f"{name} ({why}){more}"


def _vectors(config: Config, counts: Counts, section: ExchangeSection, sizes: Sizes) -> dict[str, int]:
    """Bytes of the vectors that a rank holds, by name; zeros are left out."""
    averaged = counts.shared * counts.word if config.server.average is not None else 0
    vectors = {
        "model": counts.total * counts.word,
        "gradient": counts.trained * counts.word,
        "local optimizer": counts.trained * counts.word * _local_copies(config),
        **cost(section, sizes).memory,
        "average over rounds": averaged,
        "kept by silos": counts.kept_bytes * (1 + sizes.hosted),
    }
    if sizes.rank == 0:
        vectors["checkpoint"] = sizes.vector_bytes * (1 + section.overlap) + sizes.state_bytes + averaged
        vectors["best round"] = counts.shared * counts.word
    return {name: num_bytes for name, num_bytes in vectors.items() if num_bytes}


def _checkpoint(config: Config, counts: Counts, section: ExchangeSection, sizes: Sizes) -> dict[str, int]:
    """Bytes of a checkpoint's tensors, by name."""
    return {
        "parameters": sizes.vector_bytes,
        "server state": sizes.state_bytes,
        "average over rounds": counts.shared * counts.word if config.server.average is not None else 0,
        "residual down": sizes.vector_bytes * section.down.feedback,
        "residuals up": sizes.vector_bytes * sum(sizes.vectors) * section.up.feedback,
        "parameters that arrive": sizes.vector_bytes * section.overlap,
        "progress of silos": sizes.vector_bytes * sizes.num_silos * section.goes_on,
        "kept by silos": sizes.num_silos * (counts.kept_bytes + 8),
    }


def _mirror(config: Config, counts: Counts, checkpoint: Mapping[str, int], num_ranks: int) -> int:
    """Most bytes that a rank keeps under a fault-tolerant launcher: the best round's parameters, and commits. A commit
    holds the state that belongs to no silo, and the silo state of this rank and its buddies."""
    if config.heals == "stop" or num_ranks == 1:
        return 0
    of_silos = sum(checkpoint[name] for name in ("residuals up", "progress of silos", "kept by silos"))
    shares, whole = 1 + min(BUDDIES, num_ranks - 1), sum(checkpoint.values()) - of_silos
    return counts.shared * counts.word + COMMITS * (whole + of_silos * shares // num_ranks)


def budget(config: Config, section: Privacy, source: Source, sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """What the run will spend, undisturbed, with these numbers of training samples. Raises ConfigError if that is not
    known without the data."""
    section.takes(source)
    num_train = {silo: num for silo, num in sizes.items() if num is not None}
    unknown = sorted(sizes.keys() - num_train.keys())
    if unknown and section.of_records:
        raise ConfigError(f"privacy: silo '{unknown[0]}' declares no num_samples, so its budget is not known")
    sigmas = section.sigmas(config, {silo: num or 0 for silo, num in sizes.items()})
    uses = section.uses(config, {silo: num or 0 for silo, num in sizes.items()})
    spent = {
        use.silo: epsilon({use._replace(sigma=sigmas[use.silo]): count}, section.delta) for use, count in uses.items()
    }
    sentence = section.sentence(config) + (f"; but reproducible: {REPEATS}" if section.reproducible else "")
    if why := section.loose({silo: num or 0 for silo, num in sizes.items()}):
        sentence += f"; but {why}"
    return {
        "sentence": sentence,
        "epsilon": max(spent.values()),
        "delta": section.delta,
        "budget": section.epsilon,
        "sigma": max(sigmas.values()),
        "silos": {silo: {"epsilon": spent[silo], "sigma": sigmas[silo]} for silo in sigmas if silo},
    }


def _num_figures(config: Config, scores: Scores, num_ranks: int, num_silos: int) -> int:
    """Elements of the small tables that ranks share in a round."""
    of_silo = (*READY_SILO, *Updates(config.updates).told, *told_columns(config))
    masked = config.secure is not None
    ready = StatusTable(num_ranks, READY_RANK, num_silos, of_silo, pooling=ready_pooling(config.disclosed, masked))
    done = StatusTable(num_ranks, DONE_RANK, num_silos, scores.columns, scores.num_counts, scores.pooling)
    num = (ready.num_bytes + done.num_bytes) // 8
    num += sum(num_covered(table.num_hidden) - table.num_hidden for table in (ready, done)) if masked else 0
    # Whether deltas are folded everywhere; the exchange's seconds, and its tracks.
    num += (2 + MOST_TRACKS * len(Track._fields)) * num_ranks * config.exchange.overlap
    num += (num_ranks + num_silos) * config.select.asks  # losses of candidates
    return num + num_silos**2 * ("gram" in config.records.needs)


def _server_copies(config: Config) -> int:
    """Vectors as long as the parameters in the server optimizer's state."""
    return len(config.server.optimizer.init(torch.zeros(1)))


def _local_copies(config: Config) -> int:
    """Vectors as long as the parameters in a silo's optimizer, counted after one step on a small parameter."""
    spec = config.local.optimizer
    if spec is None:
        return 0
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = spec.target([weight], lr=0.1, **spec.arguments)
    with torch.no_grad():
        plain_step(optimizer)()
    return sum(v.numel() >= weight.numel() for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))
