"""Secure aggregation: sums of vectors whose summands nobody sees.

shamir.py     secrets in shares over a prime field
masks.py      key agreement, key derivation, key streams (all from the package `cryptography`)
graph.py      who shares masks with whom: everybody, or a regular graph
protocol.py   the protocol of Bonawitz et al. 2017 for messages that may be lost, as two state machines
numbers.py    small figures beside a vector in such a sum
apart.py      such sums, as the federation of silos in jobs of their own sees them
"""

from __future__ import annotations
