"""Differential privacy: what is clipped and noised, and what that spends.

silo        whole silos are protected: noise on the mean of their clipped updates
account     epsilon of what happened, noise for a target
spending    the account as state: counted before a release, never taken back
noise       noise from secret keys, independent or correlated between rounds
masked      noise of whole silos under `secure`, where each silo adds a share of it
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedmpi.aggregate import Mean
from fedmpi.comm import Comm
from fedmpi.components import Family
from fedmpi.privacy.account import Use, epsilon, sigma_for
from fedmpi.privacy.base import Privacy
from fedmpi.privacy.record import DpSgd, RecordPrivacy
from fedmpi.privacy.silo import Bounded, SiloPrivacy
from fedmpi.privacy.spending import Spending
from fedmpi.selection.draws import Poisson
from fedmpi.transforms import Transform

if TYPE_CHECKING:
    from fedmpi.config import Config

log = logging.getLogger("fedmpi")

PRIVACIES = Family("privacy", {"silo": SiloPrivacy, "record": RecordPrivacy}, Privacy, outside=False, defaults=True)


def prepare(
    config: Config, spending: Spending, num_train: Mapping[str, int], weights: Mapping[str, float], comm: Comm
) -> tuple[Transform, ...]:
    """Fit the account to these members, with their numbers of training samples and base weights. Returns the transforms
    of updates that privacy needs. Collective. Raises ConfigError if no noise meets the target."""
    section = config.privacy
    assert section is not None
    spending.renew()
    if comm.rank == 0 and not spending.uses and (why := section.loose(num_train)):
        log.warning(why)
    missing = {silo: num for silo, num in num_train.items() if silo not in spending.sigmas}
    if missing and "" not in spending.sigmas:
        told = comm.collectively(lambda: json.dumps(section.sigmas(config, missing)) if comm.rank == 0 else "")
        spending.sigmas |= json.loads(comm.broadcast_text(told, 0))
    if isinstance(section, RecordPrivacy):
        return _of_records(config, section, spending, num_train)
    assert isinstance(section, SiloPrivacy)
    part, aggregate = section.part(config, len(num_train)), config.aggregate
    assert isinstance(aggregate, Mean)
    spending.of_silos, spending.draws = True, isinstance(config.select, Poisson)
    spending.expected = part * len(num_train)
    spending.denominator, spending.largest_weight = part * sum(weights.values()), section.largest_weight(aggregate)
    spending.next = lambda segment, cohort: {section.use(config, len(num_train), spending.sigmas[""], segment): 1}
    comm.collectively(lambda: section.split(spending.sigmas[""], spending.expected))
    return (Bounded(section, spending, in_words=config.secure is not None),)


def _of_records(
    config: Config, section: RecordPrivacy, spending: Spending, num_train: Mapping[str, int]
) -> tuple[Transform, ...]:
    spending.next = lambda segment, cohort: section.uses_of(
        config, {silo: num_train[silo] for silo in (num_train if cohort is None else cohort)}, spending.sigmas
    )
    spending.guard = lambda silo, number: DpSgd.of(
        section, config, spending.sigmas[silo], silo, num_train[silo], number
    )
    return config.updates


__all__ = [
    "PRIVACIES",
    "Bounded",
    "DpSgd",
    "Privacy",
    "RecordPrivacy",
    "SiloPrivacy",
    "Spending",
    "Use",
    "epsilon",
    "prepare",
    "sigma_for",
]
