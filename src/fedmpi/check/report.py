"""The result of a check as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmpi.check.pace import duration
from fedmpi.output import at_most, size

_MOST = 40  # silos shown
_LABELS = 12  # classes shown of a silo


def lines(result: Mapping[str, Any]) -> list[str]:
    """The report, faults last."""
    text: list[str] = []
    if "task" in result:
        text += [*_head(result), *_silos(result), *_skew(result)]
    text += [*_model(result), *_estimate(result), *_privacy(result), *_out(result)]
    for name, what in (("unseen", "not looked at"), ("warnings", "warning"), ("faults", "fault")):
        text += [f"{what}: {line}" for line in result[name]]
    return [*text, _counts(result)]


def _counts(result: Mapping[str, Any]) -> str:
    """The last line."""
    faults, warnings, unseen = (len(result[name]) for name in ("faults", "warnings", "unseen"))
    said = [f"{faults} fault{'s' * (faults > 1)}" if faults else "no fault found"]
    said += [f"{warnings} warning{'s' * (warnings > 1)}"] * bool(warnings)
    said += [f"{unseen} part{'s' * (unseen > 1)} not looked at"] * bool(unseen)
    return ", ".join(said)


def _head(result: Mapping[str, Any]) -> list[str]:
    num, launched, ranks = result["num_silos"], result["launched"], result["ranks"]
    where = f"{launched} ranks" if launched > 1 else f"one process{f', for {ranks} ranks' if ranks > 1 else ''}"
    classes = f", {result['classes']} classes" if result["task"] in ("classification", "next_token") else ""
    missing = "" if result["missing"] is None else f", {result['missing']} values missing"
    return [
        f"{num} silo{'s' * (num != 1)} on {where}: {result['task']}{classes}, samples of {result['shape']}, "
        f"{result['num_train']} for training and {result['num_test']} for tests{missing}"
    ]


def _silos(result: Mapping[str, Any]) -> list[str]:
    rows = result["silos"]
    if not rows:
        return [f"figures of single silos are not shown (disclose: {result['disclose']})"] * (
            result["disclose"] != "silo"
        )
    table = [["silo", "rank", "train", "test", "features", "missing", "training labels"]]
    table[0][-1] += "" if any(row["labels"] for row in rows) else ": numbers"
    for row in rows[:_MOST]:
        figures = (row["silo"], row["rank"], row["train"], row["test"], row["features"], row["missing"])
        table.append([*map(str, figures), _histogram(row["labels"])])
    more = [f"  and {len(rows) - _MOST} more silos (--json has all)"] if len(rows) > _MOST else []
    return [*_aligned(table), *more]


def _histogram(labels: Sequence[int]) -> str:
    shown = [f"{label}:{count}" for label, count in enumerate(labels) if count]
    return " ".join(shown[:_LABELS]) + (f" and {len(shown) - _LABELS} more" if len(shown) > _LABELS else "")


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def _skew(result: Mapping[str, Any]) -> list[str]:
    skew, rows = result["skew"], result["silos"]
    if skew["silos"] < 2:
        return []
    sizes, labels, features = skew["sizes"], skew["labels"], skew["features"]
    text = ["how the silos differ"]
    if labels:
        far = max(rows, key=lambda row: row.get("divergence", 0.0), default=None)
        most = f"; most in {far['silo']}, {far['divergence']:.3f}" if far and "divergence" in far else ""
        text.append(
            f"  labels    Jensen-Shannon divergence from all labels, 0 to 1: mean {labels['divergence']:.3f} "
            f"({labels['chance']:.3f} by chance){most}"
        )
    least, largest = (f"{sizes[name]:.0f}" for name in ("smallest", "largest"))
    text.append(f"  sizes     {least} to {largest} training samples, mean {sizes['mean']:.0f}")
    if features:
        text.append(
            f"  features  share of the variance that lies between silos: mean {features['between']:.3f} "
            f"({features['chance']:.3f} by chance)"
        )
        text += [f"    {line}" for line in _features(features, rows)]
    return [*text, *(f"  suggests  {line}" for line in skew["advice"])]


def _features(features: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    shown = [one for one in features["shown"] if one["between"] > 2 * features["chance"] and one["between"] > 0.01]
    text = []
    for one in shown:
        name, (low, middle, high) = one["feature"], one["quantiles"]
        line = f"{name}: {one['between']:.3f}; mean {one['mean']:.3g}, 5/50/95 % {low:.3g} {middle:.3g} {high:.3g}"
        own = {row["silo"]: row["shift"][name] for row in rows if name in row.get("shift", {})}
        if own:
            silo = max(own, key=lambda silo: own[silo]["distance"])
            line += f"; farthest {silo}: mean {own[silo]['mean']:.3g}, median {own[silo]['quantiles'][1]:.3g}"
        text.append(line)
    return text


def _model(result: Mapping[str, Any]) -> list[str]:
    model, start = result.get("model"), result.get("start", {})
    if not model:
        return []
    text = f"model: {model['parameters']:,} parameters, {model['trained']:,} trained, {model['shared']:,} shared"
    figures = ", ".join(f"{name} {value:.4g}" for name, value in start.items() if value is not None)
    return [text + (f"; before training: {figures}" if figures else "")]


def _estimate(result: Mapping[str, Any]) -> list[str]:
    estimate = result.get("estimate") or {}
    text = []
    if (took := estimate.get("seconds")) is not None:
        exchange = "without communication" if took["exchange"] is None else f"exchange {duration(took['exchange'])}"
        text.append(
            f"time: a round about {duration(took['round'])} (training {duration(took['train'])}, evaluation "
            f"{duration(took['evaluate'])}, {exchange}), the run about {duration(took['run'])}; from {took['timed']} "
            f"timed batches of {duration(took['batch'])}"
        )
    if (memory := estimate.get("memory")) is not None:
        most, limit = max(memory["ranks"]), memory["limit_bytes"]
        host = f" of the {size(limit)} of a host" if limit else ""
        text.append(f"memory: up to {size(most)} a rank{host}")
    return text


def _privacy(result: Mapping[str, Any]) -> list[str]:
    if (spent := result.get("privacy")) is None:
        return []
    limit = "" if spent["budget"] is None else f", budget {spent['budget']:g}"
    return [
        f"privacy: all rounds spend epsilon {at_most(spent['epsilon'])} at delta {spent['delta']:g}{limit}, with noise "
        f"multiplier {spent['sigma']:.4g}"
    ]


def _out(result: Mapping[str, Any]) -> list[str]:
    if "out" not in result:
        return []
    out = result["out"]
    wrote = "a file was written, locked and removed" if out["written"] else "cannot be written"
    hosts = f" on {out['hosts']} hosts" if out["hosts"] > 1 else ""
    need = f", checkpoints need up to {size(out['checkpoint_bytes'])}" if out["checkpoint_bytes"] else ""
    newest = f"; the run goes on after round {out['newest_round']}" if out.get("newest_round") else ""
    return [f"out: {out['path']}: {wrote}{hosts}; {size(out['free_bytes'])} free{need}{newest}"]
