"""What a run will need, before it is submitted: computed on a login node, without MPI and without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedmpi import pretrained, records
from fedmpi.components import to_dict
from fedmpi.config import Config, flatten, origin_of
from fedmpi.evaluate import Scores
from fedmpi.exchange.cost import memory, num_vectors, traffic
from fedmpi.flat import layout_of, master_dtype, named_exact
from fedmpi.local import plain_step
from fedmpi.models import make
from fedmpi.objectives import resolve
from fedmpi.placement import place
from fedmpi.rounds import DONE_RANK, READY_RANK, READY_SILO

_HEADER_BYTES = 8192  # of an HDF5 file with a handful of datasets


def plan(config: Config, origins: Mapping[str, str], num_ranks: int) -> dict[str, Any]:
    """Silos per rank, bytes per round, memory per rank, disk per checkpoint, collectives, and every value's origin.

    Raises ConfigError for whatever `train` would refuse that can be seen from here.
    """
    source = config.data.source(config.seed)
    objective = resolve(config.objective, source.task, source.num_classes)
    with torch.device("meta"):
        module = make(config.model, source)
    if config.init is not None:
        pretrained.fitting(module, config.init)
    found = config.entries(module, [silo.id for silo in source.silos])
    layers = any(e.kind == "personal" and e.num_elements for e in found)
    scores = Scores.of(objective, config.local, config.evaluate.finetune, layers)
    named = named_exact(found, config.exchange.exact)
    layout = layout_of(found, getattr(config.local, "auxiliaries", ()), named)
    num_params, shared = layout.num_params, layout.size  # all that travels
    total = sum(e.num_elements for e in found)
    kept_bytes = sum(e.num_elements * e.dtype.itemsize for e in found if e.kind in ("personal", "integers"))
    word = master_dtype(found).itemsize
    kept_bytes += getattr(config.local, "kept_vectors", 0) * num_params * word
    section = config.exchange
    if section.plan == "auto":  # what will be measured is not known here
        likely = "sharded" if "replicated" not in section.candidates else "replicated"
        section = replace(section, plan=likely)  # type: ignore[arg-type]
    # Pinned silos cannot be placed on hosts that are not known yet.
    free = [type(silo)(silo.id, silo.num_samples) for silo in source.silos]
    owners = place(free, [""] * num_ranks, config.server.dedicated).ranks
    flat = section.regions is None  # where regions lie is not known before ranks have hosts
    hosted = [owners.count(rank) for rank in range(num_ranks)]
    vectors = num_vectors(section, hosted)
    num_exact = sum(part.stop - part.start for part in layout.exact) if layout.exact or layout.still else None
    on_wire = traffic(section, shared, word, num_ranks, vectors, len(owners), num_exact)
    server_copies = _server_copies(config)
    averaged = num_params * word if config.server.average is not None else 0
    sample_bytes = 4 * int(torch.Size(source.shape).numel())
    ranks = []
    for rank in range(num_ranks):
        mine = [silo for silo, owner in zip(source.silos, owners, strict=True) if owner == rank]
        samples = sum(silo.num_samples or 0 for silo in mine)
        steps = 1.0 if section.plan == "replicated" or rank == 0 else 0.0
        if section.plan == "sharded":
            steps = 1 / num_ranks
        bytes_here = (
            total * word  # the model
            + sum(e.num_elements for e in found if e.trainable)
            * word
            * (1 + _local_copies(config))  # gradient, optimizer
            + shared * word  # the global parameters
            + averaged  # on every rank
            + (shared * word * (2 + 2 * len(mine)) if section.overlap else 0)  # twice, a start, each silo's deltas
            + memory(section, shared, word, num_ranks, len(mine), max(vectors))
            + round(num_params * word * server_copies * steps)
            # the checkpoint's copy, and the best round's parameters
            + (shared * word * (1 + section.overlap) if rank == 0 else 0)
            + (num_params * word * (1 + server_copies) + averaged if rank == 0 else 0)
            + kept_bytes * (1 + len(mine))
        )
        ranks.append(
            {
                "rank": rank,
                "silos": [silo.id for silo in mine],
                "train_samples": samples,
                "data_bytes": samples * sample_bytes,
                "vector_bytes": bytes_here,
                "memory_bytes": bytes_here + samples * sample_bytes + records.peak_rss_bytes(),
            }
        )
    small = num_ranks * (len(READY_RANK) + len(DONE_RANK)) + len(owners) * (len(READY_SILO) + len(scores.columns))
    small += scores.num_counts
    small += 2 * num_ranks * section.overlap  # are deltas folded everywhere? How long did the exchange take?
    small += (num_ranks + len(owners)) * bool(getattr(config.select, "asks", False))  # losses of candidates
    small += len(owners) ** 2 * ("gram" in config.records.needs)
    values = flatten(to_dict(config))
    return {
        "ranks": ranks,
        "silos": len(source.silos),
        "undeclared": [silo.id for silo in source.silos if silo.num_samples is None],
        "pinned": {silo.id: silo.host for silo in source.silos if silo.host is not None},
        "central": source.central,
        "parameters": total,
        "shared_parameters": num_params,
        "bytes_up": on_wire.up if flat else None,
        "bytes_down": on_wire.down if flat else None,
        "bytes_control": (2 * 8 * small * num_ranks + on_wire.control if num_ranks > 1 else 0) if flat else None,
        "plan": section.plan,
        "plan_asked": config.exchange.plan,
        "collectives": on_wire.collectives if flat else f"in regions, then across: {on_wire.collectives}",
        "checkpoint_bytes": shared * word * (1 + section.down.feedback)
        + num_params * word * server_copies
        + averaged
        + (shared * word * (1 + len(owners)) if section.overlap else 0)
        + (shared * word * sum(vectors) if section.up.feedback else 0)
        + len(owners) * (kept_bytes + 8)
        + _HEADER_BYTES * (1 + num_ranks),
        "checkpoints_kept": config.checkpoint.keep + 1,
        "out": str(Path(config.out)),
        "config": {key: {"value": value, "from": origin_of(key, origins)} for key, value in values.items()},
    }


def _server_copies(config: Config) -> int:
    """Vectors as long as the parameters in the server optimizer's state."""
    return len(config.server.optimizer.init(torch.zeros(1)))


def _local_copies(config: Config) -> int:
    """Vectors as long as the parameters in a silo's optimizer, found by one step of a small one."""
    spec = getattr(config.local, "optimizer", None)
    if spec is None:
        return 0
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = spec.target([weight], lr=0.1, **spec.arguments)
    with torch.no_grad():
        plain_step(optimizer)()
    return sum(v.numel() >= weight.numel() for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))
