"""kill-loop: ranks that die again and again, at random moments, under `fedmpi run`; what was healed, and what it cost.

A campaign is a row of runs in one folder. In each of them ranks are killed until its last round is done, and its bits
are compared with those of an undisturbed run. A run is one line of `runs.jsonl`: a campaign that is called again goes
on, until it has seen so many deaths.
"""

import json
import math
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drill_job import CANNOT, POLL_S, RANKS, Cannot, Job, TooLong, mpirun, read_events, settings, testbed

GRACE_S = 15.0  # without progress, and the supervisor takes a job for hung
# How often each kind of fault is drawn, and how many ranks die of it.
KINDS = {"silo": (6, 1), "server": (3, 1), "two at once": (2, 2), "during recovery": (2, 2), "three in a row": (2, 3)}
SET_UP_S = 12.0  # within these a rank dies in set-up, when there is nothing yet to go on from
QUIET_S = 3.0  # since the last commit: the ranks do not train
RUN_S = 240.0  # the longest run; no faults in its second half


@dataclass(frozen=True)
class Campaign:
    """What the runs of a folder have in common."""

    rounds: int
    mtbf_s: float  # from a fault to the next, on average; exponentially distributed
    seed: int = 0
    ranks: int = RANKS  # and silos
    hosts: int = 1  # over which the ranks are spread
    spare: int = 0  # ranks of a job that no fault takes
    in_set_up: float = 0.25  # share of starts in which a rank dies before it trains

    def launch(self) -> tuple[list[str], list[str]]:
        """Words before a supervised job, and its launcher line. Cannot where the machine has no such hosts."""
        return ([], mpirun(self.ranks)) if self.hosts == 1 else testbed(self.hosts, self.ranks)

    def settings(self) -> tuple[str, ...]:
        return settings(self.rounds, silos=self.ranks)


@dataclass
class Tally:
    """What came of one run."""

    run: int
    deaths: int = 0
    healed: int = 0  # of these, in the job
    restarts: int = 0  # of the job, by the supervisor
    hung: int = 0  # restarts since there was no progress
    faults: Counter[str] = field(default_factory=Counter)  # by kind
    on_host: Counter[str] = field(default_factory=Counter)  # deaths
    undone: int = 0  # rounds trained again though a whole checkpoint of them had been there
    again: int = 0  # rounds trained again that had a record and no whole checkpoint yet
    missing: int = 0  # rounds without a record at the end
    next_round_s: list[float] = field(default_factory=list)  # of every fault
    healing_s: list[float] = field(default_factory=list)
    goodput: float = 0.0
    same_bits: bool = False
    code: int | None = None
    seconds: float = 0.0
    why: str = ""


def disturb(job: Job, rng: random.Random, tally: Tally, campaign: Campaign, limit_s: float) -> list[float]:
    """Kill ranks until the job ends, or has taken half of its time; when each fault was. The clock of faults runs while
    the ranks train: those that kill a start before it trains are drawn by start."""
    faults: list[float] = []
    rate = 1 / campaign.mtbf_s
    left_s, before_s, starts, due_s = rng.expovariate(rate), time.monotonic(), 0, math.inf
    while job.process.poll() is None:
        time.sleep(POLL_S)
        job.look()
        now_s = time.monotonic()
        passed_s, before_s = now_s - before_s, now_s
        so_far_s = now_s - job.begun_s
        if so_far_s > limit_s:
            raise TooLong(f"not over within {limit_s:.0f} s")
        if so_far_s > limit_s / 2:
            continue  # a run has to end
        if len(job.starts) > starts:
            starts = len(job.starts)
            due_s = now_s + rng.uniform(0.0, SET_UP_S) if rng.random() < campaign.in_set_up else math.inf
        trains = so_far_s - job.last_commit_s < QUIET_S
        left_s -= passed_s * trains
        if now_s > due_s:
            kind, due_s = "in set-up", math.inf
        elif left_s < 0:
            most, left_s = len(job.ranks()) - campaign.spare, rng.expovariate(rate)
            if not (weights := {kind: weight for kind, (weight, deaths) in KINDS.items() if deaths <= most}):
                continue
            kind = rng.choices([*weights], [*weights.values()])[0]
        else:
            continue
        if killed := _kill(job, kind, rng):
            tally.faults[kind] += 1
            tally.deaths += len(killed)
            tally.on_host.update(f"h{rank % campaign.hosts + 1}" for rank in killed)
            faults.append(now_s - job.begun_s)
    job.look()
    return faults


def _kill(job: Job, kind: str, rng: random.Random) -> list[int]:
    """The ranks that have died of a fault of this kind; those of a job that is being set up may be among them."""

    def one(server: bool = False) -> list[int]:
        there = sorted(job.ranks())
        if not there:
            return []
        # The lowest one of those that are left is the server.
        chosen = there[0] if server or len(there) == 1 else rng.choice(there[1:])
        return _signalled(job, chosen)

    if kind == "two at once":
        there = sorted(job.ranks())
        return _signalled(job, *rng.sample(there, min(2, len(there))))
    if kind == "during recovery":
        killed = one()
        time.sleep(rng.uniform(0.01, 0.6))
        return killed + one(rng.random() < 0.5)
    if kind == "three in a row":
        killed = one()
        for _ in range(2):
            time.sleep(rng.uniform(0.2, 2.0))
            killed += one(rng.random() < 0.3)
        return killed
    return one(kind == "server")


def _signalled(job: Job, *ranks: int) -> list[int]:
    """The ranks that were killed; none once all rounds are done."""
    job.look()
    if job.newest >= job.rounds:
        return []
    try:
        job.signal(signal.SIGKILL, *ranks)
    except KeyError:
        return []
    return [*ranks]


def one_run(folder: Path, campaign: Campaign, number: int, whole: dict[str, Any], sha: Callable[[Path], str]) -> Tally:
    """One run from start to end; its folder stays where something is wrong."""
    rng, tally, out = random.Random(f"{campaign.seed} {number}"), Tally(number), folder / f"run-{number:03d}"
    inside, line = campaign.launch()
    with Job(out, campaign.settings(), line, GRACE_S, inside) as job:
        faults: list[float] = []
        try:
            faults = disturb(job, rng, tally, campaign, RUN_S)
            tally.code = job.process.returncode
        except TooLong as why:
            tally.why = str(why)
    losses = list(read_events(out))
    supervisor = Counter(event["event"] for event in read_events(out, "supervisor.jsonl"))
    tally.healed = sum(len(event["ranks"]) for event in losses)
    tally.restarts, tally.hung = supervisor["restarted"], supervisor["hung"]
    tally.healing_s = [event["seconds"] for event in losses]
    tally.undone, tally.again = job.undone, job.again - job.undone
    tally.missing = campaign.rounds - len(job.records)
    tally.next_round_s = [took for at_s in faults if (took := job.next_round_s(at_s)) is not None]
    tally.goodput = job.samples_per_s / whole["samples_per_s"]
    tally.seconds = time.monotonic() - job.begun_s
    if tally.code == 0:
        tally.same_bits = sha(out) == whole["sha256"]
    out.with_suffix(".moments").write_text("".join(f"+{at_s:.2f} s {text}\n" for at_s, text in job.moments))
    if passed(tally):
        shutil.rmtree(out)
    return tally


def passed(tally: Tally) -> bool:
    """Did the run come to its end with the bits of the undisturbed one, and no committed round lost?"""
    return tally.code == 0 and tally.same_bits and not tally.undone and not tally.missing


def undisturbed(folder: Path, campaign: Campaign, sha: Callable[[Path], str]) -> dict[str, Any]:
    """SHA-256 and samples per second of the campaign's configuration; trained once."""
    file = folder / "undisturbed.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    with Job(folder / "undisturbed", campaign.settings(), mpirun(campaign.ranks)) as job:
        if code := job.wait(RUN_S):
            raise TooLong(f"the undisturbed run ended with exit code {code}: see {job.out}.log")
    found = {"sha256": sha(job.out), "samples_per_s": job.samples_per_s}
    file.write_text(json.dumps(found))
    return found


def kill_loop(folder: Path, campaign: Campaign, minutes: float, deaths: int | None, sha: Callable[[Path], str]) -> int:
    """Runs until the time is up, or the campaign has seen so many deaths; then its report. The exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    until_s = time.monotonic() + 60 * minutes
    about, rows = folder / "campaign.json", folder / "runs.jsonl"
    if about.exists() and json.loads(about.read_text()) != asdict(campaign):
        print(f"FAIL kill-loop: {folder} holds a campaign of other settings ({about.read_text()}); take another --out")
        return 1
    about.write_text(json.dumps(asdict(campaign)))
    try:
        whole = undisturbed(folder, campaign, sha)
        while deaths is None or sum(row["deaths"] for row in read_events(folder, rows.name)) < deaths:
            done = list(read_events(folder, rows.name))
            longest_s = max((row["seconds"] for row in done), default=60.0)
            if time.monotonic() + longest_s > until_s and (done or minutes <= 0):
                break
            tally = one_run(folder, campaign, len(done) + 1, whole, sha)
            with rows.open("a") as file:
                file.write(json.dumps(vars(tally)) + "\n")
            said = "ok" if passed(tally) else f"NOT, exit code {tally.code} {tally.why}"
            print(
                f"  run {tally.run}: {tally.deaths} deaths, {tally.healed} healed, {tally.restarts} restarts, "
                f"{tally.seconds:.0f} s: {said}",
                flush=True,
            )
    except Cannot as why:
        print(f"CANNOT kill-loop: {why}")
        return CANNOT
    except TooLong as why:
        print(f"FAIL kill-loop: {why}")
        return 1
    return report(campaign, list(read_events(folder, rows.name)), deaths)


def report(campaign: Campaign, rows: list[dict[str, Any]], wanted: int | None) -> int:
    """What the runs so far came to; 0 where all is well."""
    runs = [Tally(**{**row, "faults": Counter(row["faults"]), "on_host": Counter(row["on_host"])}) for row in rows]
    total = {name: sum(getattr(run, name) for run in runs) for name in ("deaths", "healed", "restarts", "hung")}
    faults = sum((run.faults for run in runs), Counter[str]())
    next_s = [took for run in runs for took in run.next_round_s]
    healing_s = [took for run in runs for took in run.healing_s]
    seconds = sum(run.seconds for run in runs)
    print(f"  {'runs':<14}{len(runs)} of {campaign.rounds} rounds, {seconds / 60:.1f} minutes")
    print(f"  {'faults':<14}{', '.join(f'{number} {kind}' for kind, number in faults.items()) or 'none'}")
    print(
        f"  {'deaths':<14}{total['deaths']}: {total['healed']} healed in the job, the others by {total['restarts']} "
        f"restarts of the supervisor ({total['hung']} of them of a job that hung)"
    )
    if campaign.hosts > 1:
        on_host = sum((run.on_host for run in runs), Counter[str]())
        print(f"  {'hosts':<14}{', '.join(f'{number} deaths on {host}' for host, number in sorted(on_host.items()))}")
    lost = sum(run.undone for run in runs), sum(run.missing for run in runs), sum(run.again for run in runs)
    print(
        f"  {'lost':<14}{lost[0] + lost[1]} committed rounds; {lost[2]} not yet on disk were trained again by a restart"
    )
    for name, some in (("next round", next_s), ("healing itself", healing_s)):
        if some:
            print(f"  {name:<14} median {statistics.median(some):.2f} s, at most {max(some):.2f} s, of {len(some)}")
    if runs:
        goodput = sum(run.goodput * run.seconds for run in runs) / seconds
        print(f"  {'goodput':<14}{goodput:.0%} of the undisturbed run, faults every {campaign.mtbf_s:g} s")
    same = sum(run.same_bits for run in runs)
    print(f"  {'same bits':<14}{same} of {len(runs)} runs end with the undisturbed run's SHA-256")
    enough = wanted is None or total["deaths"] >= wanted
    if not enough:
        print(f"  {'to do':<14}{total['deaths']} of {wanted} deaths so far: the same command goes on")
    failed = sum(not passed(run) for run in runs)
    print(f"{'FAIL' if failed or not runs else 'PASS'} kill-loop" + (f": {failed} runs failed" if failed else ""))
    return int(failed > 0 or not runs)
