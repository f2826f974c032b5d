"""What ran, where, and how often it was started."""

from __future__ import annotations

from typing import Any

from fedmpi.report.blocks import Block, Cell, Facts, Section, Table
from fedmpi.report.events import after, sentence, supervised
from fedmpi.report.numbers import listed, moment, plural, seconds, size
from fedmpi.report.reading import RunData
from fedmpi.report.status import resumed, status, total_s

MOST_RANKS = 64  # rows of the table of ranks
MOST_EVENTS = 200


def where(run: RunData) -> Section:
    hosts = list(dict.fromkeys(str(row.get("host", "?")) for row in run.ranks))
    devices = list(dict.fromkeys(str(row.get("gpu") or row.get("device", "?")) for row in run.ranks))
    about = run.about
    rows: list[tuple[str, Any]] = [("Directory", str(run.root)), ("State", f"{status(run).word}: {status(run).text}")]
    if run.phases is not None:
        rows.append(("Training", f"{moment(run.phases.began_s)} to {moment(run.phases.ended_s)}"))
    elif run.changed_s:
        rows.append(("Last record", moment(run.changed_s)))
    rows.append(("Time of all rounds", Cell(seconds(total_s(run)), total_s(run))))
    if run.in_jobs:
        rows.append(("Silos", "jobs of their own, over a shared folder; machines below are those of the server's job"))
    num_ranks = len(run.ranks) or int(about.get("ranks", 1))
    rows.append(
        ("Machines", f"{plural(num_ranks, 'rank')} on {listed(hosts) or 'an unknown host'} ({listed(devices)})")
    )
    rows.append(("Data", f"{run.value('data', '?')}, {plural(run.num_silos, 'silo')}"))
    rows.append(("Model", f"{run.value('model', '?')}, {plural(int(about['params']), 'shared parameter')}"))
    rows.append(("Local rule", str(run.value("local", "?"))))
    aggregate, optimizer = run.value("aggregate", "mean"), run.value("server.optimizer", "fedavg")
    rows.append(("Server", f"aggregate {aggregate}, optimizer {optimizer}"))
    rows.append(("Rounds", f"engine {run.value('engine', 'synchronous')}, plan {about['plan']}"))
    if run.sha:
        rows.append((f"SHA-256 of the parameters, round {run.sha_round:,}", run.sha))
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())))
    if about.get("code"):
        rows.append(("Own code", listed([f"{name} ({digest[:12]})" for name, digest in about["code"].items()])))
    if begins := resumed(run):
        rows.append(
            ("Resumed", f"{plural(len(begins), 'time')}, going on with round {listed([str(r) for r in begins], 12)}")
        )
    blocks: list[Block] = [Facts(rows)]
    if run.ranks:
        blocks.append(_ranks(run))
    if run.events or run.supervised:
        blocks.append(_events(run))
    return Section("where", "What ran, where, and how long", blocks)


def _ranks(run: RunData) -> Table:
    memory = run.history.records[-1].get("peak_rss_bytes", []) if run.history.records else []
    rows = []
    for row in run.ranks[:MOST_RANKS]:
        rank = int(row.get("rank", 0))
        peak = Cell(size(memory[rank]), memory[rank]) if rank < len(memory) else None
        silos = listed([str(silo) for silo in row.get("silos", ())], 6)
        rows.append(
            [
                f"rank {rank}",
                str(row.get("host", "?")),
                str(row.get("gpu") or row.get("device", "?")),
                row.get("threads"),
                peak,
                silos or "none",
            ]
        )
    cut = f"The first {MOST_RANKS} of {len(run.ranks):,} ranks." if len(run.ranks) > MOST_RANKS else ""
    return Table(
        ["rank", "host", "device", "threads", "peak memory", "silos"], rows, note=cut, folded="Ranks of the last start"
    )


def _events(run: RunData) -> Table:
    """Lost and fresh ranks, requests and stops; and what a supervisor did."""
    rows: list[tuple[int, str, str]] = [(after(event), "", sentence(event)) for event in run.events]
    for event in run.supervised:
        when = moment(event["time"]) if isinstance(event.get("time"), (int, float)) else ""
        rows.append((after(event), when, supervised(event)))
    rows.sort(key=lambda row: row[0])  # stable: those of a round stay in their order
    note = f"The newest {MOST_EVENTS} of {len(rows):,}." if len(rows) > MOST_EVENTS else ""
    head, body = ["after round", "time", "what happened"], [list(row) for row in rows[-MOST_EVENTS:]]
    if not any(when for _, when, _ in rows):
        head, body = [head[0], head[2]], [[round, told] for round, _, told in body]
    return Table(head, body, note=note, caption="Events", mark="stack")
