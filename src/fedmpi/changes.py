"""Turns a request to retire or admit a silo into the next membership, or refuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedmpi.assembly import Admitted, Spec, with_admitted
from fedmpi.components import did_you_mean
from fedmpi.errors import ConfigError, agreed
from fedmpi.membership import Membership
from fedmpi.placement import adopted
from fedmpi.requests import Request
from fedmpi.rounds import Federation


def asked_for(request: Request, spec: Spec, fed: Federation) -> tuple[Spec, Membership]:
    """The spec and the membership after the request. The spec has one more silo if the request admits a silo that the
    configuration does not name. Opens no data. Collective; raises the same ConfigError on every rank if it refuses."""
    now, silo = fed.membership, request.silo
    if fed.remote is not None:
        raise agreed(
            ConfigError("transport: files: silos neither join nor leave by request; one joins when its job registers")
        )
    if spec.config.engine.clock.members(1) is not None:
        raise agreed(
            ConfigError("engine.clock: replay: silos join after the rounds of the earlier run, not by request")
        )
    if spec.config.secure is not None:
        why = "a repeated round with other silos would give two sums that differ by one silo's update"
        raise agreed(ConfigError(f"secure: silos neither join nor leave a running job: {why}"))
    if request.what == "retire":
        return spec, _without(silo, spec, now)
    if silo in now.teams:
        raise agreed(ConfigError(f"silo '{silo}' takes part already"))
    if silo in spec.known and request.path not in (None, dict(spec.admitted).get(silo)):
        raise agreed(ConfigError(f"silo '{silo}' has its data already; leave out --path"))
    if silo not in spec.known:
        spec = _with_new(request, spec, fed)
    return spec, now.with_silo(silo, rank_for(silo, spec, fed))


def _without(silo: str, spec: Spec, now: Membership) -> Membership:
    if silo not in spec.known:
        raise agreed(ConfigError(f"the run has no silo '{silo}'{did_you_mean(silo, now.ids)}"))
    if silo not in now.teams:
        raise agreed(ConfigError(f"silo '{silo}' takes no part"))
    if len(now.teams) == 1:
        raise agreed(ConfigError(f"silo '{silo}' is the last one that takes part; `fedmpi stop` ends the run"))
    return now.without(silo)


def _with_new(request: Request, spec: Spec, fed: Federation) -> Spec:
    """The spec with a silo that the configuration does not name. Collective."""
    silo = request.silo
    if spec.config.admit != "any":
        near = did_you_mean(silo, spec.known)
        raise agreed(ConfigError(f"the configuration names no silo '{silo}' and does not say admit: any{near}"))
    if request.path is None:
        raise agreed(ConfigError(f"the configuration names no silo '{silo}': give its file, --path FILE"))
    more = (*spec.admitted, Admitted(silo, str(Path(request.path))))
    return fed.comm.collectively(lambda: with_admitted(spec, more))


def rank_for(silo: str, spec: Spec, fed: Federation) -> int:
    """The rank for a new silo: the one with the fewest samples among those that can read its data. Collective."""
    comm, config, hosts = fed.comm, spec.config, fed.comms.world.hosts
    declared = next(one for one in spec.source.silos if one.id == silo)
    seen = comm.gather_number(comm.collectively(lambda: spec.source.readable(silo)))
    sizes = {**dict(zip(fed.ids, fed.num_train, strict=True)), silo: declared.num_samples or 0}

    def first(able: Any) -> int | None:
        taken = adopted(
            fed.membership.teams, [declared], spec.source.silos, sizes, hosts, config.server.dedicated, able
        )
        return taken[silo][0] if silo in taken else None

    rank = first({int(r) for r in np.flatnonzero(seen)})
    rank = first(None) if rank is None else rank  # opening the silo there then reports what is missing
    if rank is None:
        where = f"it is pinned to host '{declared.host}'" if declared.host else "all ranks host pinned silos"
        raise agreed(ConfigError(f"no rank may open silo '{silo}': {where}"))
    return rank
