"""How the silos of a federation differ: in labels, in sizes and in features; and what that suggests.

Sums cross ranks, and nothing else: counts of labels, sums and squares of features, counts of their values in bins. The
figures of single silos are made on the silos' own rank; they are told only under `disclose: silo`.

F features, C classes, K silos
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmpi.check.samples import histogram
from fedmpi.comm import Comm
from fedmpi.types import SiloData, Source

Array = npt.NDArray[np.float64]

SCALE = "data.scale: standard, data.statistics: pooled"
TABLE_BYTES = 128 << 20  # most of a streamed silo's features
BLOCK_BYTES = 8 << 20  # of its samples at a time
MOST_FEATURES = 4096  # beyond that, features are averaged in groups
SHOWN = 5  # features in the report: those that differ most between silos
BINS = 64  # of a feature's values, between mean - SPAN and mean + SPAN standard deviations
SPAN = 4.0
SOME, STRONG = 0.02, 0.1  # of a divergence, or of a share of variance, beyond what chance gives
UNEVEN = 10  # largest silo / smallest
QUANTILES = (0.05, 0.5, 0.95)


def jensen_shannon(p_C: Array, q_C: Array) -> float:
    """The divergence of two distributions, base 2: 0 if they are equal, 1 if they have nothing in common (Lin 1991).

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])), jensen_shannon(np.ones(2) / 2, np.ones(2) / 2)
    (1.0, 0.0)
    """
    middle_C = (p_C + q_C) / 2
    return float((_entropy_terms(p_C, middle_C) + _entropy_terms(q_C, middle_C)) / 2)


def _entropy_terms(p_C: Array, middle_C: Array) -> float:
    there = p_C > 0
    return float((p_C[there] * np.log2(p_C[there] / middle_C[there])).sum())


@dataclass
class Skew:
    """How the silos differ. Figures over all silos; `of_silos` has those of single silos that this rank opened."""

    silos: int  # opened, K
    sizes: Mapping[str, float]  # smallest, largest, mean
    labels: Mapping[str, Any] = field(default_factory=dict)  # counts, divergence, chance
    features: Mapping[str, Any] = field(default_factory=dict)  # between, chance, shown
    of_silos: dict[str, dict[str, Any]] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)


def measure(data: Mapping[str, SiloData], source: Source, names: Sequence[str], comm: Comm) -> Skew:
    """The skew of all silos that were opened on any rank. `names` are the columns' names, if the data have any.
    Collective."""
    sizes_K = np.array([len(one.x_train) for one in data.values()], dtype=np.float64)
    extent = [len(sizes_K), sizes_K.sum()]
    silos, samples = comm.share(np.array(extent, dtype=np.float64))
    smallest = comm.gather_number(sizes_K.min() if len(sizes_K) else math.nan)
    largest = comm.gather_number(sizes_K.max() if len(sizes_K) else math.nan)
    skew = Skew(int(silos), {"smallest": 0.0, "largest": 0.0, "mean": 0.0})
    if silos:
        ends = {"smallest": float(np.nanmin(smallest)), "largest": float(np.nanmax(largest))}
        skew.sizes = {**ends, "mean": float(samples / silos)}
        _labels(skew, data, source, comm)
        _features(skew, data, source, names, comm)
        _advise(skew, source)
    return skew


def _labels(skew: Skew, data: Mapping[str, SiloData], source: Source, comm: Comm) -> None:
    """Mean divergence of the silos' label distributions from the pooled one, and what chance alone would give."""
    if source.task == "regression":
        return
    classes = 2 if source.task == "binary" else source.num_classes
    counts = {silo: np.array(histogram(one.y_train, source), dtype=np.float64) for silo, one in data.items()}
    pooled_C = comm.share(sum(counts.values(), np.zeros(classes)))
    if not pooled_C.any():
        return
    shares_C = pooled_C / pooled_C.sum()
    far = {silo: jensen_shannon(own / own.sum(), shares_C) for silo, own in counts.items() if own.any()}
    # For samples of one distribution the divergence is about chi2 / (8 n ln 2), and chi2 is about classes - 1.
    freedom = int((pooled_C > 0).sum()) - 1
    chance = [freedom / (8 * counts[silo].sum() * math.log(2)) for silo in far]
    total, by_chance, num = comm.share(np.array([sum(far.values()), sum(chance), len(far)], dtype=np.float64))
    skew.labels = {
        "counts": [int(count) for count in pooled_C],
        "divergence": total / num,
        "chance": by_chance / num,
    }
    for silo, one in far.items():
        skew.of_silos.setdefault(silo, {})["divergence"] = one


def _features(skew: Skew, data: Mapping[str, SiloData], source: Source, names: Sequence[str], comm: Comm) -> None:
    """The share of each feature's variance that lies between silos, and quantiles of the features that differ most."""
    tables = {silo: _table(one, source) for silo, one in data.items()} if source.task != "next_token" else {}
    width = _width(source)
    sums = np.zeros((4, width))  # samples, values, squares; and n mean^2 of each silo
    for table in tables.values():
        mean = table.mean(0)
        sums += [np.full(width, len(table)), table.sum(0), np.square(table).sum(0), len(table) * np.square(mean)]
    num, total, squares, between = comm.share(sums.reshape(-1)).reshape(4, width)
    if not num.any():
        return
    mean = total / num
    spread = np.maximum(squares / num - np.square(mean), 0.0)
    std = np.sqrt(np.where(spread > 1e-12 * np.square(mean), spread, 0.0))
    share = np.divide(between / num - np.square(mean), spread, out=np.zeros(width), where=std > 0).clip(0, 1)
    worst = np.argsort(-share, kind="stable")[:SHOWN]
    skew.features = {
        "between": float(share.mean()),
        "chance": float(max(skew.silos - 1, 0) / max(num[0] - 1, 1)),
        "constant": [_named(int(i), names, width, source) for i in np.flatnonzero(std == 0)[:SHOWN]],
        "num_constant": int((std == 0).sum()),
        "unscaled": [
            {"feature": _named(int(i), names, width, source), "mean": float(mean[i]), "std": float(std[i])}
            for i in np.flatnonzero((std > 0) & ((np.abs(mean) > 10 * std) | (std > 100) | (std < 1e-3)))[:SHOWN]
        ],
        "shown": _quantiles(skew, tables, mean, std, share, worst, names, source, comm),
    }


def _quantiles(
    skew: Skew,
    tables: Mapping[str, Array],
    mean: Array,
    std: Array,
    share: Array,
    worst: npt.NDArray[np.int64],
    names: Sequence[str],
    source: Source,
    comm: Comm,
) -> list[dict[str, Any]]:
    """Pooled quantiles of these features, from counts in bins; each silo keeps its own. Collective."""
    edges = np.linspace(-SPAN, SPAN, BINS + 1)
    counts = np.zeros((len(worst), BINS))
    own: dict[str, Array] = {}
    for silo, table in tables.items():
        scaled = (table[:, worst] - mean[worst]) / np.where(std[worst] > 0, std[worst], 1.0)
        own[silo] = np.stack([np.histogram(column.clip(-SPAN, SPAN), edges)[0] for column in scaled.T]).astype(float)
        counts += own[silo]
    counts = comm.share(counts.reshape(-1)).reshape(counts.shape)
    shown = []
    for row, feature in enumerate(worst.tolist()):
        name = _named(feature, names, len(mean), source)
        at = [_quantile(counts[row], edges, q) * std[feature] + mean[feature] for q in QUANTILES]
        shown.append(
            {"feature": name, "between": float(share[feature]), "mean": float(mean[feature]),
             "std": float(std[feature]), "quantiles": at}
        )  # fmt: skip
        pooled_C = counts[row] / counts[row].sum()
        for silo, bins in own.items():
            here = tables[silo][:, feature]
            skew.of_silos.setdefault(silo, {}).setdefault("shift", {})[name] = {
                "mean": float(here.mean()),
                "quantiles": [float(np.quantile(here, q)) for q in QUANTILES],
                "distance": float(np.abs(np.cumsum(bins[row] / bins[row].sum() - pooled_C)).max()),
            }
    return shown


def _quantile(counts: Array, edges: Array, share: float) -> float:
    """The value below which a share of the counts lies, interpolated inside its bin.

    >>> _quantile(np.array([1.0, 1.0]), np.array([0.0, 1.0, 2.0]), 0.5)
    1.0
    """
    below = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    return float(np.interp(share, below, edges))


def _width(source: Source) -> int:
    """Number of features in the report: values of a sample, channels of an image, or groups of many values."""
    if source.task == "next_token":
        return 1
    return source.shape[0] if len(source.shape) == 3 else min(math.prod(source.shape), MOST_FEATURES)


def _table(data: SiloData, source: Source) -> Array:
    """A silo's training features [N, F] in float64; NaN and infinite values as 0 (they are faults anyway). Of streamed
    samples a part at equal distances, if all would take much memory."""
    x = data.x_train
    if isinstance(x, torch.Tensor):
        return _values(x, source)
    most = max(1, TABLE_BYTES // (8 * _width(source)))
    some = torch.arange(0, len(x), math.ceil(len(x) / most))
    size = max(1, BLOCK_BYTES // (4 * math.prod(source.shape)))
    return np.concatenate([_values(x[some[at : at + size]], source) for at in range(0, len(some), size)])


def _values(block: torch.Tensor, source: Source) -> Array:
    x = block.to(torch.float32)
    if len(source.shape) == 3:
        x = x.mean((2, 3))
    else:
        x = x.flatten(1)
        if x.shape[1] > MOST_FEATURES:
            x = torch.stack([part.mean(1) for part in x.tensor_split(MOST_FEATURES, 1)], 1)
    table: Array = x.nan_to_num(0.0, 0.0, 0.0).numpy().astype(np.float64)
    return table


def _named(feature: int, names: Sequence[str], width: int, source: Source) -> str:
    if len(names) == width:
        return f"'{names[feature]}'"
    return f"channel {feature}" if len(source.shape) == 3 else f"x[{feature}]"


def _advise(skew: Skew, source: Source) -> None:
    """What the figures suggest, in one line each."""
    labels, features, advice = skew.labels, skew.features, skew.advice
    beyond = labels["divergence"] - labels["chance"] if labels else 0.0
    if beyond > STRONG:
        advice.append("labels differ strongly: take fewer local epochs, scaffold or fedprox; watch the worst silo")
    elif beyond > SOME:
        advice.append("labels differ somewhat: watch the worst silo; fedprox or fewer local epochs if it falls behind")
    if empty := [c for c, count in enumerate(labels.get("counts", ())) if not count and source.task != "next_token"]:
        advice.append(f"no silo has training labels of {_some('class', 'classes', empty)}; check data.num_classes")
    if skew.sizes["largest"] > UNEVEN * max(skew.sizes["smallest"], 1):
        advice.append(
            "sizes differ more than tenfold: the largest silos decide (aggregate.weights: uniform counts silos alike), "
            "and epochs give them more steps (local.steps gives all the same)"
        )
    if features and features["shown"] and features["shown"][0]["between"] - features["chance"] > STRONG:
        advice.append(
            "features differ between silos: check units and preparation first; then a personal model or layers "
            "(local: ditto, exchange.parameters), with batch normalization exchange.parameters: all_but_batch_norm"
        )
    if features and features["unscaled"] and len(source.shape) == 1:
        some = ", ".join(one["feature"] for one in features["unscaled"])
        advice.append(
            f"scale the columns to mean 0 and standard deviation 1 in all silos alike ({SCALE}), first {some}"
        )
    if features and features["num_constant"] and len(source.shape) == 1:
        some, num = ", ".join(features["constant"]), features["num_constant"]
        advice.append(f"{num} feature{'s are' if num > 1 else ' is'} constant in all silos and teach nothing: {some}")
    if not advice:
        advice.append("nothing: labels, sizes and features are alike")


def _some(one: str, many: str, values: Sequence[int]) -> str:
    head = ", ".join(map(str, values[:SHOWN])) + (", ..." if len(values) > SHOWN else "")
    return f"{one if len(values) == 1 else many} {head}"
