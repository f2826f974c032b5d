"""What a run has spent: epsilon at a delta, by the library `dp-accounting` (Google), and noise for a target epsilon.

    Use      one way of releasing something noisy: a Gaussian of multiplier sigma on a Poisson sample of rate q
    uses     how often each happened, {Use: count}; epsilon grows with each

Sampled uses are composed by privacy loss distributions (PLD, which bound epsilon from above), unsampled ones by the
exact formula of the Gaussian mechanism (Balle & Wang 2018). Neighbours differ by adding or removing one unit.

Sums of discrete Gaussians, which silos add under masks, satisfy concentrated differential privacy as a Gaussian of the
same multiplier does: rho = 1 / (2 sigma^2) (Kairouz, Liu & Steinke 2021, Theorem 1; secure/noise.py says why its tau is
nothing). Their privacy losses are not those of a Gaussian, so neither PLD nor the exact formula holds; epsilon follows
from Renyi divergences (Canonne, Kamath & Steinke 2020, Proposition 12), and is some percent larger.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedmpi.errors import ConfigError

INTERVAL = 1e-4  # of the discretised privacy losses; the library's default
SMALLEST_SIGMA = 0.05  # less takes the library long, and protects nobody
LARGEST_SIGMA = 1e4  # more noise than any target needs; far beyond, the library's formula loses its digits


class Use(NamedTuple):
    """A Gaussian mechanism of sensitivity 1 that a run applies once per round or step, or a sum of discrete ones."""

    sigma: float  # standard deviation / sensitivity of one participation
    rate: float = 1.0  # probability of a unit to take part, secretly drawn each time; 1: it may always
    every: int = 1  # a unit takes part at most once in so many uses in a row
    segment: str = ""  # uses with `every` above 1 count anew in each segment
    silo: str = ""  # whose records are protected; empty: the silos themselves
    discrete: bool = False  # a sum of discrete Gaussians, without sampling

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Use:
        """The use of a row of privacy.json. Raises KeyError if the row lacks a field; rows of before there was
        `discrete` do not have it."""
        sigma, rate, every, segment, silo = (row[name] for name in cls._fields[:-1])
        return cls(sigma, rate, every, segment, silo, row.get("discrete", False))


Uses = Mapping[Use, int]


def library() -> Any:
    """The module dp_accounting. Raises ConfigError if it is not installed."""
    try:
        import dp_accounting
        import dp_accounting.gaussian_mechanism
        import dp_accounting.pld
    except ImportError:
        raise ConfigError("privacy: needs the package dp-accounting; pip install 'fedmpi[privacy]'") from None
    return dp_accounting


def epsilon(uses: Uses, delta: float) -> float:
    """Epsilon at `delta` of these uses together; 0 for none. They protect the same units."""
    dp = library()
    if any(use.discrete for use, count in uses.items() if count):
        return _concentrated(dp, uses, delta)
    fixed = math.fsum(math.ceil(count / use.every) / use.sigma**2 for use, count in uses.items() if use.rate == 1.0)
    sampled = {use: count for use, count in uses.items() if use.rate < 1.0 and count}
    if not sampled:
        return float(dp.gaussian_mechanism.get_epsilon_gaussian(fixed**-0.5, delta)) if fixed else 0.0
    lost = [_once(use.sigma, use.rate).self_compose(count) for use, count in sampled.items()]
    lost += [_once(fixed**-0.5, 1.0)] if fixed else []
    return float(functools.reduce(lambda one, other: one.compose(other), lost).get_epsilon_for_delta(delta))


def _concentrated(dp: Any, uses: Uses, delta: float) -> float:
    """Epsilon at `delta` of uses some of which are known by their Renyi divergences only, at orders near the best."""
    from dp_accounting.rdp import RdpAccountant

    rounds = [(use, math.ceil(count / use.every)) for use, count in uses.items() if count]
    rho = math.fsum(times / (2 * use.sigma**2) for use, times in rounds)
    best = math.sqrt(math.log(1 / delta) / rho)
    orders = [1 + best * 2 ** (step / 16) for step in range(-32, 33)]
    accountant = RdpAccountant(orders)
    for use, times in rounds:
        if use.rate < 1.0:
            accountant.compose(dp.PoissonSampledDpEvent(use.rate, dp.GaussianDpEvent(use.sigma)), times)
        else:
            accountant.compose(dp.ZCDpEvent(rho=1 / (2 * use.sigma**2)), times)
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=64)
def _once(sigma: float, rate: float) -> Any:
    """The privacy loss distribution of one use, as PLDAccountant makes it."""
    from dp_accounting.pld import privacy_loss_distribution

    make = privacy_loss_distribution.from_gaussian_mechanism
    return make(sigma, value_discretization_interval=INTERVAL, sampling_prob=rate)


def by_silo(uses: Uses) -> dict[str, dict[Use, int]]:
    """The uses of each silo's records; those that protect silos have the key ''."""
    found: dict[str, dict[Use, int]] = {}
    for use, count in uses.items():
        found.setdefault(use.silo, {})[use] = count
    return found


def largest_epsilon(uses: Uses, delta: float) -> float:
    """Epsilon of the units that have lost most."""
    groups = {tuple(sorted((use._replace(silo=""), n) for use, n in of.items())) for of in by_silo(uses).values()}
    return max((epsilon(dict(group), delta) for group in groups), default=0.0)


def sigma_for(target: float, delta: float, uses: Iterable[tuple[Use, int]]) -> float:
    """The smallest noise multiplier, up to 0.1 % of epsilon, with which these uses (whose own sigma is ignored) spend
    at most `target`. Raises ConfigError if there is none."""
    wanted = list(uses)

    def spent(sigma: float) -> float:
        return epsilon({use._replace(sigma=sigma): count for use, count in wanted}, delta)

    high = low = 1.0
    above = below = spent(1.0)  # epsilon with `low`, too little noise, and with `high`, enough
    while below > target:
        low, above, high = high, below, 2 * high
        if high > LARGEST_SIGMA:
            raise ConfigError(f"privacy: no noise gives epsilon {target:g} at delta {delta:g}")
        below = spent(high)
    while above <= target and low > SMALLEST_SIGMA:
        high, below, low = low, above, low / 2
        above = spent(low)
    for number in range(40):
        if below >= target * (1 - 1e-3) or above <= target:
            break
        # Epsilon is about a power of sigma; half of the steps halve the interval, so that it always shrinks.
        slope = math.log(above / below) / math.log(high / low)
        guess = low * (above / (target * (1 - 5e-4))) ** (1 / slope)
        middle = guess if low < guess < high and number % 3 < 2 else (low + high) / 2
        found = spent(middle)
        if found <= target:
            high, below = middle, found
        else:
            low, above = middle, found
    return high
