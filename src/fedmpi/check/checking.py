"""Looks at a whole run, on the ranks that are there, and trains nothing.

Every rank executes the same lines. What a rank finds is collected and not raised, so that no rank leaves the others in
a collective, and all faults are told at once. Without a launcher one process opens all silos, and `num_ranks` says how
many ranks the estimates are for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmpi import device as devices
from fedmpi import rng
from fedmpi.alike import unlike
from fedmpi.assembly import digest_of, source_of
from fedmpi.check import folder, pace, setting_up, skew, trying
from fedmpi.check.findings import Findings, merged
from fedmpi.check.reading import Reading, read
from fedmpi.check.samples import Look, look
from fedmpi.comm import Comm, ranks_text
from fedmpi.components import called
from fedmpi.config import run_directory
from fedmpi.differences import digest
from fedmpi.errors import ConfigError
from fedmpi.local import by_silo
from fedmpi.membership import Membership, same_host
from fedmpi.module import saved
from fedmpi.objectives import LossAndMetrics
from fedmpi.opening import CHECKSUMS, NUM_FACTS, agree_on_statistics, facts_of, open_silo, same_columns
from fedmpi.output import size
from fedmpi.placement import place
from fedmpi.plan import plan
from fedmpi.records import peak_rss_bytes
from fedmpi.rounds.disclosure import refuse_metrics
from fedmpi.trust import confined
from fedmpi.types import Silo, SiloData, Source


@rng.borrowed()
def check(
    path: str | Path,
    overrides: Sequence[str],
    comm: Comm,
    num_ranks: int = 1,
    timing: bool = True,
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """What is known about the run, and all that is wrong with it: plain values, equal on every rank. Collective.

    `num_ranks` counts without a launcher only. The keys `faults`, `warnings` and `unseen` are lists of lines.
    """
    found = Findings()
    with confined(run_directory(Path(path)), allow):
        reading = read(path, overrides, found)
        result: dict[str, Any] = {}
        if _all_alike(reading, comm, found):
            assert reading is not None
            result = _Check(reading, comm, comm.size if comm.size > 1 else num_ranks, timing, found).run()
    all_found = merged(comm, found)
    return {
        **result,
        "faults": all_found.faults,
        "warnings": all_found.warnings,
        "unseen": all_found.unseen,
    }


def _all_alike(reading: Reading | None, comm: Comm, found: Findings) -> bool:
    """Whether every rank has read a configuration, and all the same. Collective."""
    what = None if reading is None else [digest(reading.config).hex(), list(reading.left_out)]
    rows = comm.gather_values(what)
    others = [rank for rank, row in enumerate(rows) if row != rows[0]]
    if others and None not in rows:
        assert reading is not None
        same = f"the configuration differs: rank 0 against {ranks_text(others)}; give all ranks the same file"
        found.fault(unlike(comm, reading.config, reading.origins) or same)
    if others or rows[0] is None:
        found.skip("data, model and out: the configuration comes first")
        return False
    return True


class _Check:
    """One check, in the order of its methods. All are collective unless they say otherwise."""

    def __init__(self, reading: Reading, comm: Comm, num_ranks: int, timing: bool, found: Findings) -> None:
        self.config, self.reading, self.comm, self.found = reading.config, reading, comm, found
        self.num_ranks, self.timing = num_ranks, timing
        self.hosted: Collection[str] = ()  # silos of this rank
        self.data: dict[str, SiloData] = {}  # opened on this rank
        self.looks: dict[str, Look] = {}
        self.num_train: dict[str, int] = {}  # of all silos that were opened on some rank
        self.num_test = self.num_tested = 0  # test samples, and silos that have some
        self.trial = trying.Trial()
        # Whether sums over this rank's silos may leave it: one silo's figures, if it has only one.
        self.sums = comm.size == 1 or self.config.secure is None

    def run(self) -> dict[str, Any]:
        """All of it; the result as plain values."""
        self.comm.set_up(self.config.comm.timeout_s)
        self._choose_device()
        result: dict[str, Any] = {
            "ranks": self.num_ranks,
            "launched": self.comm.size,
            "disclose": self.config.disclosed,
        }
        source = None if self.reading.lacks("data") else self.found.attempt(lambda: source_of(self.config), "data")
        if self.reading.lacks("data"):
            self.found.skip("the data, and the model on them: the configuration of data comes first")
        elif source is None:
            self.found.skip("the model: the data come first")
        if not any(key.partition(".")[0] == "data" for key in self.reading.origins) and self.comm.rank == 0:
            self.found.warn(
                f"data: not in the configuration, so training takes the default, {called(self.config.data)}"
            )
        if self._same_silos(source):
            assert source is not None
            setting_up.shared_folder(self.config, [silo.id for silo in source.silos], self.comm, self.found)
            result |= self._with_data(source)
        setting_up.outputs(self.config, self.comm, self.found)
        return result | {"out": self._out(result)}

    def _choose_device(self) -> None:
        config = self.config
        self.device = torch.device("cpu")
        try:
            self.device = devices.choose(config.device.name, config.device.share, self.comm)
        except ConfigError as error:  # the same on all ranks
            self.found.fault(str(error))
        self.threads = devices.set_threads(self.comm, config.exchange.reduction == "reproducible")

    def _same_silos(self, source: Source | None) -> bool:
        facts = None if source is None else repr((source.silos, source.task, source.shape, source.num_classes))
        rows = self.comm.gather_values(facts)
        if None not in rows and len(set(rows)) > 1:
            others = [rank for rank, row in enumerate(rows) if row != rows[0]]
            self.found.fault(f"the list of silos differs: rank 0 against {', '.join(map(str, others[:8]))}")
        return None not in rows and len(set(rows)) == 1

    # ------------------------------------------------------------ data

    def _with_data(self, source: Source) -> dict[str, Any]:
        members = self._members(source)
        self.hosted = members.hosted(self.comm.rank)
        mine = [silo for silo in source.silos if silo.id in self.hosted]
        try:
            agree_on_statistics(source, mine, self.comm)
            self._open(source, members)
        except ConfigError as error:  # the same on all ranks
            self.found.fault(str(error))
        self._facts(source, members)
        if self.config.disclosed != "silo":
            self.found.skip(f"what is unusual in single silos: disclose: {self.config.disclosed}")
        names = next((source.columns[silo] for silo in self.data if source.columns.get(silo)), ())
        if not self.sums:
            self.found.skip("how the silos differ, the first loss: under `secure` no sum leaves a rank unmasked")
        differing = skew.measure(self._fitting(source) if self.sums else {}, source, names, self.comm)
        if (labels := differing.labels.get("counts")) and sum(map(bool, labels)) == 1 and sum(labels) > 1:
            only = next(label for label, count in enumerate(labels) if count)
            self.found.fault(f"every training label of all silos is {only}: nothing can be learnt; check data.target")
        result = {
            "task": source.task,
            "shape": list(source.shape),
            "classes": source.num_classes,
            "central": source.central,
            "silos": self._silo_rows(source, members, differing),
            "num_silos": len(source.silos),
            "num_train": int(sum(self.num_train.values())),
            "num_test": self.num_test,
            "missing": self._missing(),
            "skew": {
                "silos": differing.silos,
                "sizes": differing.sizes,
                "labels": differing.labels,
                "features": differing.features,
                "advice": differing.advice,
            },
        }
        return result | self._with_model(source, members)

    def _members(self, source: Source) -> Membership:
        """Which rank opens which silo; not collective. Silos that nobody here may open are left out and noted."""
        config, hosts = self.config, self.comm.hosts
        self._idle(source, hosts if self.comm.size > 1 else [""] * self.num_ranks)
        silos: list[Silo] = []
        for silo in source.silos:
            if any(same_host(silo.host, host) for host in hosts):
                silos.append(silo)
            elif self.comm.size == 1:
                self.found.skip(f"silo '{silo.id}': only host '{silo.host}' may open it, and this is '{hosts[0]}'")
        if self.comm.size == 1:
            if not silos:
                self.found.skip(
                    "samples, model and loss on them, speed: no silo can be opened from here; run the check where the "
                    "ranks will be, such as mpirun or srun ... fedmpi check CONFIG"
                )
            return Membership(0, {silo.id: (0,) for silo in silos})
        members = self.found.attempt(lambda: place(source.silos, hosts, config.server.dedicated), "data")
        if members is None:  # look at those that can be placed
            with_rank = Findings().attempt(lambda: place(silos, hosts, config.server.dedicated), "data")
            members = with_rank or Membership(0, {})
            self.found.skip("silos that have no rank, see above")
        return members

    def _idle(self, source: Source, hosts: Sequence[str]) -> None:
        able = len(hosts) - (1 if self.config.server.dedicated and len(hosts) > 1 else 0)
        if (idle := able - len(source.silos)) > 0:
            num = len(hosts) - idle
            self.found.warn(
                f"{len(hosts)} ranks for {len(source.silos)} silos: {idle} would host none; start {num} "
                f"rank{'s' if num > 1 else ''}"
            )

    def _open(self, source: Source, members: Membership) -> None:
        """Open this rank's silos and look at their samples; not collective."""
        mine = members.hosted(self.comm.rank)
        for silo in source.silos:
            if silo.id in mine:
                data = self.found.attempt(lambda: open_silo(silo, source), f"silo '{silo.id}'")  # noqa: B023
                if data is None:
                    continue
                seen = Findings()
                if (one := look(silo.id, data, source, self.config.objective.ignore_index, seen)) is not None:
                    self.data[silo.id], self.looks[silo.id] = data, one
                self.found.faults += seen.faults
                if self.config.disclosed == "silo":
                    self.found.warnings += seen.warnings

    def _facts(self, source: Source, members: Membership) -> None:
        """Sizes and checksums of all silos: columns that differ, files that are the same."""
        ids = members.ids
        facts_KF = np.zeros((len(ids), NUM_FACTS))
        for i, silo in enumerate(ids):
            if silo in self.data:
                facts_KF[i] = facts_of(silo, self.data[silo], source, {})
        if not self.sums:
            facts_KF[:, CHECKSUMS] = 0.0
        facts_KF = self.comm.share(facts_KF.reshape(-1)).reshape(facts_KF.shape)
        self.num_train = {silo: int(num) for silo, num in zip(ids, facts_KF[:, 0], strict=True) if num}
        self.num_test, self.num_tested = int(facts_KF[:, 1].sum()), int(np.count_nonzero(facts_KF[:, 1]))
        try:
            same_columns(facts_KF[:, 4], source, members, self.comm)
        except ConfigError as error:  # the same on all ranks
            self.found.fault(str(error))
        if self.sums:
            self._twins(ids, facts_KF)
        if self.num_train and not facts_KF[:, 1].any():
            self.found.warn("no silo has test samples, so nothing is evaluated: give the data a test part")
        self._batches()

    def _twins(self, ids: Sequence[str], facts_KF: np.ndarray) -> None:
        first: dict[tuple[float, ...], str] = {}
        for silo, facts in zip(ids, facts_KF.tolist(), strict=True):
            if facts[0] and (twin := first.setdefault(tuple(facts[:3]), silo)) != silo:
                self.found.warn(f"silo '{silo}' has the samples of silo '{twin}'; is one file a copy of the other?")

    def _batches(self) -> None:
        if self.reading.lacks("local"):
            return
        asked = trying.batch_of(self.config.local, 1 << 62)
        small = [silo for silo, num in self.num_train.items() if num < asked < 1 << 62]
        if small:
            more = f" and {len(small) - 1} more" if len(small) > 1 else ""
            self.found.warn(
                f"local.batch_size is {asked}, and silo '{small[0]}' has {self.num_train[small[0]]} training "
                f"samples{more}: one step per epoch there; take a smaller batch"
            )

    def _fitting(self, source: Source) -> dict[str, SiloData]:
        """The silos whose samples have the dataset's shape."""
        return {silo: data for silo, data in self.data.items() if tuple(data.x_train.shape[1:]) == tuple(source.shape)}

    def _silo_rows(self, source: Source, members: Membership, differing: skew.Skew) -> list[dict[str, Any]]:
        """A row per silo, or none where only sums may be told."""
        if self.config.disclosed != "silo":
            return []
        mine = [
            {
                "silo": silo,
                "rank": self.comm.rank,
                "train": one.num_train,
                "test": one.num_test,
                "features": one.features,
                "missing": one.missing,
                "labels": list(one.labels),
                **differing.of_silos.get(silo, {}),
            }
            for silo, one in self.looks.items()
        ]
        rows = {row["silo"]: row for some in self.comm.gather_values(mine) for row in some}
        return [rows[silo.id] for silo in source.silos if silo.id in rows]

    # ------------------------------------------------------------ model

    def _with_model(self, source: Source, members: Membership) -> dict[str, Any]:
        config, found = self.config, self.found
        objective = trying.objective_of(config, source, found)
        if self.reading.lacks("model"):
            found.skip("the model: its configuration comes first")
        else:
            self.trial = trying.build(config, source, found)
        trial, all_open = self.trial, len(self.num_train) == len(source.silos)
        if objective is not None:
            found.attempt(
                lambda: refuse_metrics(config.disclosed, objective.scorers, config.secure is not None), "disclose"
            )
            layers = any(e.kind == "personal" and e.num_elements for e in trial.entries)
            setting_up.stops(config, objective, layers, self.num_test > 0 or not all_open, found)
        num_tested = self.num_tested if all_open else 0
        setting_up.masks(config, [silo.id for silo in source.silos], num_tested, self.device, found)
        trying.suits(config, trial, [silo.id for silo in source.silos], self.num_train, found)
        firsts = self.comm.gather_values(None if trial.module is None else digest_of(saved(trial.module)).hex())
        if None not in firsts and len(set(firsts)) > 1:
            found.fault("the model's first parameters differ between ranks; give all the same torch and `init` file")
        result: dict[str, Any] = {"privacy": None}
        if not self.reading.lacks("local", "select", "aggregate"):
            result["privacy"] = setting_up.account(config, source, self.num_train, self.comm, found)
        if objective is not None and trial.module is not None and trial.entries:
            trying.run(
                config, source, objective, trial, self._fitting(source), self.device,
                not self.reading.lacks("local"), found,
            )  # fmt: skip
            result["model"] = self._model_row(trial)
        mine = self._timed(source, objective, trial)
        self._raised(objective, trial)
        result["estimate"] = self._estimate(source, members, trial, mine)
        result["start"] = self._start(objective, trial)
        return result

    def _timed(self, source: Source, objective: LossAndMetrics | None, trial: trying.Trial) -> pace.Pace | None:
        """A few timed batches on this rank, if there is something to time; not collective."""
        if not self.timing:
            self.found.skip("speed: --no-timing")
        elif self.reading.lacks("local"):
            self.found.skip("speed: the configuration of local comes first")
        elif objective is not None and trial.module is not None and trial.losses:
            data = {silo: self.data[silo] for silo in trial.losses}
            return pace.measure(
                self.config, source, objective, trial.module, trial.entries, data, self.device, self.found
            )
        return None

    def _model_row(self, trial: trying.Trial) -> dict[str, Any]:
        found = trial.entries
        return {
            "parameters": sum(e.num_elements for e in found),
            "trained": sum(e.num_elements for e in found if e.trainable),
            "shared": sum(e.num_elements for e in found if e.kind == "shared"),
        }

    def _raised(self, objective: LossAndMetrics | None, trial: trying.Trial) -> None:
        """Metrics that raise: everywhere a fault, on some silos a warning."""
        names = [scorer.name for scorer in objective.scorers] if objective is not None else []
        names = [*names, "loss"]
        raised = np.array([[float(name in some) for name in names] for some in trial.raised.values()])
        mine = raised.sum(0) if len(raised) else np.zeros(len(names))
        widest = int(self.comm.gather_number(len(names)).max())
        sums = np.zeros(widest + 1)
        sums[: len(names)], sums[widest] = mine, len(raised)
        sums = self.comm.share(sums)
        for i, name in enumerate(names):
            text = next((some[name] for some in trial.raised.values() if name in some), "")
            what = "objective.loss" if name == "loss" else f"objective.metrics: '{name}'"
            if text and sums[i] == sums[widest]:
                self.found.fault(f"{what} raised on every silo's samples: {text}")
            elif text:
                here = [f"'{silo}'" for silo, some in trial.raised.items() if name in some]
                who = f"silo {', '.join(here)}, " if self.config.disclosed == "silo" else ""
                self.found.warn(f"{what} raised on {who}{sums[i]:.0f} of {sums[widest]:.0f} silos: {text}")

    def _start(self, objective: LossAndMetrics | None, trial: trying.Trial) -> dict[str, Any]:
        """Loss and metrics before training: means over targets, and over silos."""
        scorers = objective.scorers if objective is not None and self.sums else ()
        names = [scorer.name for scorer in scorers if scorer.maximize is not None]
        finite = [(value, num) for value, num in trial.losses.values() if math.isfinite(value) and self.sums]
        sums = np.zeros((1 + len(names), 2))
        sums[0] = [sum(value * num for value, num in finite), sum(num for _, num in finite)]
        for i, name in enumerate(names, start=1):
            values = [row.get(name, math.nan) for row in trial.metrics.values()]
            defined = [value for value in values if math.isfinite(value)]
            sums[i] = [sum(defined), len(defined)]
        sums = self.comm.share(sums.reshape(-1)).reshape(sums.shape)
        means = [total / num if num else None for total, num in sums.tolist()]
        return dict(zip(("loss", *names), means, strict=True))

    def _missing(self) -> int | None:
        """Missing values of all silos; None if no sum may leave a rank."""
        own = sum(one.missing for one in self.looks.values())
        return int(self.comm.share(np.array([float(own)]))[0]) if self.sums else None

    # ------------------------------------------------------------ estimates

    def _estimate(
        self, source: Source, members: Membership, trial: trying.Trial, mine: pace.Pace | None
    ) -> dict[str, Any]:
        """Seconds of a round and of the run, and memory of each rank."""
        config, comm = self.config, self.comm
        planned = None
        if not self.reading.lacks("model", "local") and trial.entries:
            unknown = [silo.id for silo in source.silos if silo.num_samples is None and silo.id not in self.num_train]
            if unknown and config.privacy is not None and config.privacy.of_records:
                self.found.skip(f"memory and disk: the size of silo '{unknown[0]}' is not known here")
            else:
                ranks, sizes = self.num_ranks, self.num_train
                planned = self.found.attempt(lambda: plan(config, {}, ranks, num_train=sizes), "configuration")
        num_shared = sum(e.num_elements for e in trial.entries if e.kind == "shared")
        sends = pace.exchange_s(comm, int(comm.gather_number(num_shared).max())) if self.timing else 0.0
        tests = sum(one.num_test for one in self.looks.values())
        row = {
            "batch_s": None if mine is None else mine.batch_s,
            "timed": 0 if mine is None else mine.timed,
            "test_s": 0.0 if mine is None else mine.test_s * tests,
            "rss_bytes": peak_rss_bytes(),
            "data_bytes": sum(tensor.nbytes for some in self.data.values() for tensor in some),
            "limit_bytes": pace.memory_limit(),
        }
        rows = comm.gather_values(row)
        paces = [one["batch_s"] for one in rows if one["batch_s"] is not None]
        estimate: dict[str, Any] = {"seconds": None, "memory": None}
        if planned is not None:
            self.checkpoint_bytes = planned["checkpoint_bytes"] * planned["checkpoints_kept"]
            estimate["memory"] = self._memory(rows, planned)
        if paces and not self.reading.lacks("local"):
            estimate["seconds"] = self._seconds(source, members, rows, sends)
        return estimate

    def _seconds(
        self, source: Source, members: Membership, rows: Sequence[Mapping[str, Any]], sends: float
    ) -> dict[str, Any]:
        """The slowest rank decides a round. A cohort of some silos takes its share of the work."""
        config, alone = self.config, self.comm.size == 1
        hosted = members.by_rank(self.comm.size)
        if alone and self.num_ranks > 1:
            free = [Silo(silo.id, self.num_train.get(silo.id)) for silo in source.silos if silo.id in members.teams]
            placed = Findings().attempt(lambda: place(free, [""] * self.num_ranks, config.server.dedicated), "data")
            hosted = placed.by_rank(self.num_ranks) if placed is not None else hosted
        typical = float(np.median([row["batch_s"] for row in rows if row["batch_s"] is not None]))
        of_batch = [typical if row["batch_s"] is None else row["batch_s"] for row in rows]
        counts, rules = self.num_train, by_silo.rules_of(config.local, config.silos)
        num = {silo: pace.num_batches(rules.get(silo, config.local), counts[silo]) for silo in counts}
        batches = [sum(num.get(silo, 0) for silo in some) for some in hosted]
        train = [num * (of_batch[0] if alone else of_batch[rank]) for rank, num in enumerate(batches)]
        ids = [silo.id for silo in source.silos]
        share = min(1.0, config.select.least(ids, config.rounds) / max(len(ids), 1))
        train_s = max(max(train) * share, typical)
        test_s = max(row["test_s"] for row in rows) / (len(hosted) if alone else 1)
        round_s = train_s + test_s / config.evaluate.every + sends
        return {
            "batch": typical,
            "timed": sum(row["timed"] for row in rows),
            "train": train_s,
            "evaluate": test_s,
            "exchange": None if alone else sends,
            "round": round_s,
            "run": round_s * config.rounds,
        }

    def _memory(self, rows: Sequence[Mapping[str, Any]], planned: Mapping[str, Any]) -> dict[str, Any]:
        """Bytes by rank: this process after the trial, and the vectors of a round. Compared with what the host has."""
        alone = self.comm.size == 1
        vectors = [rank["vector_bytes"] for rank in planned["ranks"]]
        if alone:
            each = rows[0]["data_bytes"] // max(self.num_ranks, 1)
            ranks = [rows[0]["rss_bytes"] - rows[0]["data_bytes"] + each + num for num in vectors]
        else:
            ranks = [row["rss_bytes"] + num for row, num in zip(rows, vectors, strict=True)]
        for machine in dict.fromkeys(self.comm.machines):
            here = range(self.num_ranks) if alone else [r for r, m in enumerate(self.comm.machines) if m == machine]
            first = 0 if alone else here[0]
            limit, need = rows[first]["limit_bytes"], sum(ranks[r] for r in here)
            if limit and need > limit and not (alone and self.num_ranks > 1):  # else the ranks' hosts are not known
                host = self.comm.hosts[first]
                self.found.fault(
                    f"host {host} has {size(limit)} of memory, and its {len(here)} ranks need about "
                    f"{size(need)}; start fewer ranks there, or take more hosts"
                )
        return {"ranks": ranks, "limit_bytes": rows[0]["limit_bytes"]}

    # ------------------------------------------------------------ out

    checkpoint_bytes = 0  # of all checkpoints that are kept

    def _out(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Each host writes and removes a file in `out`; rank 0 looks at what is there, and every rank at what it would
        read of a checkpoint."""
        root, row = Path(self.config.out), None
        if self.comm.machines.index(self.comm.machines[self.comm.rank]) == self.comm.rank:
            wrote = folder.probe(root, self.found)
            free = folder.room(root, self.checkpoint_bytes if wrote else 0, self.found)
            row = {"path": str(root), "written": wrote, "free_bytes": free, "checkpoint_bytes": self.checkpoint_bytes}
        if not self.reading.left_out:
            newest = folder.goes_on_after(root, self.comm, self.hosted, self.found)
            if row is not None and self.comm.rank == 0:
                row["newest_round"] = newest
                folder.stored(root, self.config, newest, self.trial.entries, self.trial.unshared, self.found)
        rows = self.comm.gather_values(row)
        return {**rows[0], "hosts": sum(one is not None for one in rows)}
