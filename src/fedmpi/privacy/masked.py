"""Privacy of whole silos under `secure`: the noise that each silo adds to its words before masks (secure/noise.py).

Weights are equal and cohorts of a fixed size, so the largest share of a silo is known before the run, and the ring gets
room for the noise. Who takes part is known to all ranks: nothing is claimed for chance.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from typing import TYPE_CHECKING

from fedmpi import rng
from fedmpi.aggregate import Mean
from fedmpi.errors import ConfigError, agreed
from fedmpi.exchange.weights import nearness
from fedmpi.layout import Layout
from fedmpi.membership import Membership
from fedmpi.secure.masks import KEY_BYTES
from fedmpi.secure.noise import NoiseShares
from fedmpi.secure.ring import Ring, Spread
from fedmpi.selection.draws import Poisson

if TYPE_CHECKING:
    from fedmpi.config import Config
    from fedmpi.privacy.silo import SiloPrivacy
    from fedmpi.privacy.spending import Spending


def conflict(section: SiloPrivacy, config: Config) -> str | None:
    """Why noise cannot be divided among the silos, in one line; None if it can."""
    if isinstance(config.select, Poisson):
        return "with privacy: silo all ranks know who takes part, so select: poisson amplifies nothing; take all"
    if isinstance(config.aggregate, Mean) and config.aggregate.weights != "uniform":
        return "with privacy: silo noise is sized for equal weights; take aggregate.weights: uniform"
    if section.bands > 1:
        return "privacy.bands above 1 subtracts earlier noise, which no silo tells; take 1"
    if section.quantile is not None:
        return "privacy.quantile reads the norm of each silo, and only sums are seen; take a fixed clip"
    if config.adopts:
        return f"on_failure: {config.heals} lets a rank know the noise of the silos that it adopts; take stop"
    return None


def _factor(section: SiloPrivacy, config: Config, num_silos: int) -> float:
    """What an update is multiplied by in the sum: its share of all weight, scaled up to the cohort's."""
    return nearness(section.part(config, num_silos)) / num_silos


def spread(section: SiloPrivacy, config: Config, num_silos: int) -> Spread:
    """The noise of a round's sums. Raises ConfigError if the colluding silos may be all there are."""
    assert config.secure is not None
    ids = [str(number) for number in range(num_silos)]
    fewest, most = config.secure.fewest(config, ids), config.select.least(ids, config.rounds)
    if (honest := fewest - section.colluding) < 1:
        raise ConfigError(
            f"privacy.colluding: {section.colluding}, but a sum may have {fewest} silos (secure.threshold): no noise "
            "is left; take fewer, or a higher threshold"
        )
    (sigma,) = section.sigmas(config, dict.fromkeys(ids, 0)).values()
    total = sigma * section.clip * _factor(section, config, num_silos)
    return Spread(
        total * math.sqrt(fewest / honest), total / math.sqrt(honest), total / math.sqrt(most - section.colluding)
    )


def shares(
    section: SiloPrivacy, config: Config, spending: Spending, members: Membership, ring: Ring, layout: Layout
) -> NoiseShares:
    """The noise of these members' silos. Raises ConfigError on every rank if a rank hosts more silos than may collude,
    or if their noise does not fit into the ring."""
    assert config.secure is not None
    hosts = {*members.ranks}
    most = max(members.ranks.count(rank) for rank in hosts)
    if len(hosts) > 1 and most > section.colluding:
        raise agreed(
            ConfigError(
                f"privacy.colluding: {section.colluding}, but a rank hosts {most} silos and knows the noise of all of "
                f"them; give {most}, or take more ranks"
            )
        )

    def key_of(silo: str, number: int) -> bytes:
        if spending.seed is None:
            return secrets.token_bytes(KEY_BYTES)
        text = repr((rng.key(spending.seed, purpose="privacy share", round=number, silo=silo), silo)).encode()
        return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()

    found = NoiseShares(spending.sigmas[""], section.clip, section.colluding, key_of, layout)
    fewest, cohort = config.secure.fewest(config, members.ids), config.select.least(members.ids, config.rounds)
    found.fits(ring, fewest, cohort, ring.unit * _factor(section, config, len(members.ids)))
    return found


def sentence(section: SiloPrivacy, config: Config, sampling: str) -> str:
    """Neighbours, sampling, and who is trusted."""
    return (
        "silo level: neighbours differ in one silo, whose update counts as zero (who takes part, the number of silos "
        f"and their sizes are public); {sampling}; each silo adds its share of the noise before its masks, so that "
        f"sums carry all of it, also where {section.colluding} of the silos know each other's; ranks are trusted to "
        "run this program unchanged; protected against are all ranks, as many silos of one party as that, the network "
        "and those who get the parameters; not covered are figures on test data, and whose update is rejected because "
        "it is not finite"
    )
