"""Rebuilds a federation between two rounds, after its members changed; training goes on with its state.

    admitted   opens new members' data and tries the model on them; a refusal changes nothing
    rebuilt    gathers the state (the whole on rank 0, kept state on the ranks that now host the silos), makes exchange,
               model and tables for the new members, and restores the state as from a checkpoint

The result has the same bits as a run that resumes with these members from a checkpoint of the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedmpi.assembly import Spec, begin, build_federation, open_members
from fedmpi.errors import ConfigError
from fedmpi.health import Health
from fedmpi.keeper import holders, restored
from fedmpi.membership import Comms, Membership
from fedmpi.moving import heirs, moved, remaining
from fedmpi.opening import Opened
from fedmpi.outcome import RoundOutcome
from fedmpi.rounds import Federation, State
from fedmpi.state import StateTensor, gathered


def admitted(spec: Spec, fed: Federation, state: State, members: Membership) -> Opened:
    """The members' data: new ones are opened and tried. Collective. Raises ConfigError on every rank if members are
    refused; the federation is then unchanged."""
    fed.comm.collectively(lambda: _between_crossings(fed, state))
    if fed.remote is not None:
        return fed.remote.admitted(members)
    fed.model.load(fed.layout.params(state.params_Q))  # the trial needs the global parameters, not the last silo's
    fed.model.load_personal({})
    return open_members(spec, members, fed.comms, fed.silos, fed.facts)


def rebuilt(spec: Spec, fed: Federation, state: State, health: Health, opened: Opened) -> tuple[Federation, State]:
    """The federation of these members, and the state in its memory. `fed` cannot be used afterwards. Collective."""
    comm, before, members = fed.comm, fed.membership, opened.members
    heir_of = heirs(before, members)
    fed.exchange.settle()
    kept = gathered(holders(state, fed, health), fed.exchange, comm.rank)
    whole = [_copied(one) for one in kept if one.placement != "per_silo"]
    stays = remaining((one for one in kept if one.placement == "per_silo"), before, heir_of)
    of_silos = moved(stays, members, heir_of, comm)

    fed.exchange.leave()
    leave_memory(fed)
    fed.comms.world.free_parts()
    return begun_again(spec, fed, fed.comms, state, health, opened, whole, of_silos)


def leave_memory(fed: Federation) -> None:
    """Copy the model out of the exchange's memory, which is freed with the federation. Call between two rounds."""
    fed.model.thaw()
    fed.model.load_personal({})  # new silos start from the model's first personal layers
    fed.model.leave()


def begun_again(
    spec: Spec,
    fed: Federation,
    comms: Comms,
    state: State,
    health: Health,
    opened: Opened,
    whole: Sequence[StateTensor],
    of_silos: Sequence[StateTensor],
) -> tuple[Federation, State]:
    """The opened members' federation with the gathered state: `whole` is on rank 0, `of_silos` is the kept state of the
    silos that this rank hosts now. `fed` cannot be used afterwards. Collective."""
    before = fed.membership
    new = build_federation(spec, opened, comms, fed.silos, remote=fed.remote).federation
    new.timer = fed.timer
    outcome = None if state.record is None else RoundOutcome.from_record(new.ids, state.record)
    begun = replace(begin(new), round=state.round, outcome=outcome, record=state.record, written=state.written)
    stays = remaining(of_silos, before, heirs(before, opened.members))
    return new, restored(begun, new, health, whole, stays, before)


def _between_crossings(fed: Federation, state: State) -> None:
    regions = fed.exchange.section.regions
    if regions is not None and state.round % regions.every:
        raise ConfigError(
            f"membership: after round {state.round} regions hold different parameters; change members after a round "
            f"that averages over regions, a multiple of exchange.regions.every ({regions.every})"
        )


def _copied(one: StateTensor) -> StateTensor:
    """A copy on the CPU, outside the exchange's memory."""
    return one._replace(tensor=one.tensor.detach().to("cpu", copy=True))
