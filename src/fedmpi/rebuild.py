"""A federation that is built again between two rounds, since its members have changed, and goes on with its state.

    admitted   whoever is new is opened and tried; what is refused leaves everything as it was
    rebuilt    the state is gathered: whole on rank 0, and what is kept of silos on the ranks that get them; exchange,
               model and tables are made for the new members; they take up the state as out of a checkpoint

It ends with the bits of a run that is resumed with these members from a checkpoint of the round.
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
    """The members' data, opened where they were not and tried. A call of all ranks; ConfigError, alike on every one,
    for members that cannot be, and the federation is as it was."""
    fed.comm.collectively(lambda: _between_crossings(fed, state))
    fed.model.load(fed.layout.params(state.params_Q))  # a trial of what training has left would say nothing
    fed.model.load_personal({})
    return open_members(spec, members, fed.comms, fed.silos, fed.facts)


def rebuilt(spec: Spec, fed: Federation, state: State, health: Health, opened: Opened) -> tuple[Federation, State]:
    """The federation of these members, and the state in its memory; `fed` is spent. A call of all ranks."""
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
    """The model, as it is between two rounds, gets memory of its own: that of the exchange goes with the federation."""
    fed.model.thaw()
    fed.model.load_personal({})  # a silo that is new begins with what the model began with
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
    """The opened members' federation in place of `fed`, which is spent, with the state that was gathered: `whole` is
    rank 0's, `of_silos` what is kept of the silos that this rank has now. A call of all ranks."""
    before = fed.membership
    new = build_federation(spec, opened, comms, fed.silos).federation
    new.timer = fed.timer
    outcome = None if state.record is None else RoundOutcome.from_record(new.ids, state.record)
    begun = replace(begin(new), round=state.round, outcome=outcome, record=state.record, written=state.written)
    stays = remaining(of_silos, before, heirs(before, opened.members))
    return new, restored(begun, new, health, whole, stays, before)


def _between_crossings(fed: Federation, state: State) -> None:
    regions = fed.exchange.section.regions
    if regions is not None and state.round % regions.every:
        raise ConfigError(
            f"membership: after round {state.round} regions differ; change members after a round that goes across, a "
            f"multiple of exchange.regions.every, {regions.every}"
        )


def _copied(one: StateTensor) -> StateTensor:
    """In memory of its own: that of the exchange goes with it."""
    return one._replace(tensor=one.tensor.detach().to("cpu", copy=True))
