"""Sections of `exchange`, and a vector with values that are sent exactly beside a lossy codec."""

import torch

from fedmpi.exchange.config import ExchangeSection
from fedmpi.layout import Layout, Segment

P = 13_000
EXACT, STILL = (slice(5, 9), slice(4090, 4100), slice(12_999, 13_000)), (slice(100, 110), slice(8190, 8195))
LAYOUT = Layout(
    (
        Segment("delta", 0, P, "delta"),
        *(Segment("statistics", part.start, part.stop, "exact", averaged=True) for part in EXACT),
        *(Segment("frozen", part.start, part.stop, "exact", averaged=True, still=True) for part in STILL),
    )
)


def section(plan="replicated", reduction="fast", **fields):
    return ExchangeSection(plan=plan, reduction=reduction, **fields)


def there(parts):
    chosen = torch.zeros(P, dtype=torch.bool)
    for part in parts:
        chosen[part] = True
    return chosen
