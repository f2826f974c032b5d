"""The configuration: one tree, the same in code, YAML and overrides. All checks of user input happen here.

    Config(rounds=3, model=Logistic(), local=Sgd(lr=0.1, epochs=1))       in code
    {rounds: 3, model: logistic, local: {name: sgd, lr: 0.1, epochs: 1}}  in YAML
    rounds=3 local.lr=0.1 server.optimizer=fedadam                        on the command line

A component is a mapping with a `name`, or just the name. `load` records where every value came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch

from fedmpi.aggregate import AGGREGATORS, Aggregator, Mean
from fedmpi.attacks import ATTACKS, Attack
from fedmpi.components import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    build,
    called,
    component,
    did_you_mean,
)
from fedmpi.data import DATASETS
from fedmpi.data.digits import Digits
from fedmpi.data.files import Files
from fedmpi.errors import ConfigError
from fedmpi.exchange.config import ExchangeSection
from fedmpi.flat import Entry, entries
from fedmpi.fork import ForkSection
from fedmpi.fork import conflicts as fork_conflicts
from fedmpi.health import StopSection
from fedmpi.local import RULES, RUNNERS, LocalRule, Sequential, Sgd, SiloRunner, by_silo
from fedmpi.membership import OnFailure
from fedmpi.models import MODELS, Logistic
from fedmpi.objectives import Objective
from fedmpi.pretrained import InitSection
from fedmpi.privacy import PRIVACIES, Privacy
from fedmpi.records import CALLBACKS, MEASUREMENTS, SINKS, Measurement, Sink
from fedmpi.records.measurements import Gram
from fedmpi.rounds import ENGINES, Engine, Policy, Synchronous
from fedmpi.rounds.disclosure import Disclose, hiding, refuse_hidden, showing
from fedmpi.secure.secagg import SECURE, SecAgg
from fedmpi.selection import SELECTORS, All, Selector
from fedmpi.server import OPTIMIZERS, Average, FedAvg, ReadsNorms, ServerOptimizer
from fedmpi.transforms import TRANSFORMS, Transform
from fedmpi.transports import TRANSPORTS, ByMpi, Transport
from fedmpi.types import Dataset
from fedmpi.yamlfile import ABOUT, parse, read


@component
class ServerSection:
    """The server's step, and whether rank 0 is reserved for it."""

    optimizer: Annotated[ServerOptimizer, OPTIMIZERS] = FedAvg()
    """how the aggregated update changes the global parameters"""
    average: Average | None = None
    """average of the parameters over rounds, evaluated and saved in their place"""
    dedicated: bool = False
    """rank 0 hosts no silo"""


@component
class CheckpointSection:
    """Checkpoints: how often they are written and how many are kept."""

    every: PositiveInt = 5
    """rounds between checkpoints; one is always written at the end and on a stop"""
    keep: PositiveInt = 3
    """newest checkpoints kept; the best round is kept as well, even if no checkpoint was due"""
    max_failures: PositiveInt = 3
    """consecutive failed writes that end the run; the last write of a run must not fail"""


@component
class ResumeSection:
    """What happens if a resumed run differs from its start."""

    code: Literal["refuse", "warn"] = "refuse"
    """what to do if your own code has changed; a copy is kept in OUT/code"""


@component
class EvaluateSection:
    """Evaluation of the global model on the silos' test data."""

    every: PositiveInt = 1
    """rounds between evaluations; the last round is always evaluated"""
    batch_size: PositiveInt = 1024
    """samples per batch"""
    finetune: Annotated[LocalRule, RULES] | None = None
    """local rule that fine-tunes the last model on each silo, for personal figures"""

    def conflicts(self, config: Config) -> str | None:
        """Refuses rules for fine-tuning that need other silos, and fine-tuning beside a personalised local rule."""
        if self.finetune is None:
            return None
        if self.finetune.auxiliaries:
            rule = called(self.finetune)
            return f"evaluate.finetune: {rule} trains with what other silos send; take one that trains alone"
        if self.finetune.by_delay is not None:
            return "evaluate.finetune.amount: nothing is delayed after the last round; leave by_delay out"
        if config.local.is_personal:
            rule = called(config.local)
            return f"evaluate.finetune: the personal figures are those of the models that {rule} makes"
        return None


@component
class CommSection:
    """Timeouts of communication."""

    timeout_s: PositiveFloat = 300.0
    """time limit for a rank without a heartbeat, beyond the longest round; ranks send heartbeats while they train"""
    grace_s: PositiveFloat | None = None
    """time limit for a batch; a rank whose silo takes longer prints where it hangs and ends itself; null: none"""


@component
class DeviceSection:
    """Where a rank trains."""

    name: str = "auto"
    """auto (a GPU if there is one), cpu or cuda"""
    share: bool = False
    """whether several ranks may use one GPU"""


@component
class RecordsSection:
    """What is written besides metrics.jsonl, and what is measured besides the standard fields of a record."""

    trace: bool = True
    """write trace.json; turn it off for a thousand ranks"""
    tensorboard: bool = False
    """write TensorBoard events to OUT/tensorboard; needs the extra `report`"""
    sinks: tuple[Annotated[Any, SINKS], ...] = ()
    """further outputs for records; your own: package.module:Class"""
    gram: bool | Literal["matrix"] = False
    """measure diversity and cosines of the deltas; matrix: all cosines; needs exchange.scope: silo"""
    measure: tuple[Annotated[Measurement, MEASUREMENTS], ...] = ()
    """further measurements in each record"""

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """All measurements."""
        gram = (Gram(matrix=self.gram == "matrix"),) if self.gram else ()
        return gram + tuple(other for other in self.measure if other not in gram)

    @property
    def needs(self) -> frozenset[str]:
        """What the measurements need from the exchange."""
        return frozenset().union(*(measurement.needs for measurement in self.measurements))

    def conflicts(self, config: Config) -> str | None:
        """Refuses measurements of inner products if the deltas never meet one by one."""
        key = "records.gram" if self.gram else "records.measure"
        if "gram" not in self.needs:
            return None
        if not config.exchange.one_by_one:
            return f"{key}: needs exchange.scope: silo and plan sharded, where deltas meet one by one"
        if config.exchange.overlap:
            return f"{key}: not available with exchange.overlap: deltas arrive after their round's record"
        if config.exchange.fragments > 1:
            return f"{key}: not available with exchange.fragments: no rank sees whole deltas"
        return None

    def open_sinks(self) -> list[Sink]:
        """A new, unopened instance of each sink."""
        switched = [SINKS.build(name, "records") for name in ("trace", "tensorboard") if getattr(self, name)]
        others = [sink for sink in self.sinks if sink not in switched]
        return [sink.build(None) for sink in (*switched, *others)]


@component
class Config:
    """A whole run."""

    rounds: PositiveInt = 20
    """total number of rounds"""
    seed: NonNegativeInt = 0
    """seed of all random numbers"""
    out: str = "runs/run"
    """run directory; if it holds a checkpoint, the run resumes"""
    init: str | InitSection | None = None
    """file of initial parameters; see `fedmpi list init`"""
    fork: str | ForkSection | None = None
    """checkpoint of another run to go on from, RUN@ROUND; see `fedmpi list fork`"""
    data: Annotated[Dataset, DATASETS] = Digits()
    """dataset"""
    model: Annotated[Any, MODELS] = Logistic()
    """model to train"""
    objective: Objective = Objective()
    """loss and metrics; default: by the data's task"""
    local: Annotated[LocalRule, RULES] = Sgd(lr=0.05, epochs=1)
    """local rule: how a silo trains"""
    silos: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """settings of single silos by id, such as {clinic-3: {local.lr: 0.01, local.batch_size: 8}}: lr, epochs, steps,
    batch_size, last_batch and clip of local"""
    runner: Annotated[SiloRunner, RUNNERS] = Sequential()
    """how a rank runs its silos"""
    select: Annotated[Selector, SELECTORS] = All()
    """which silos take part in a round"""
    updates: tuple[Annotated[Transform, TRANSFORMS], ...] = ()
    """transforms applied to updates before the exchange"""
    aggregate: Annotated[Aggregator, AGGREGATORS] = Mean()
    """how deltas are combined"""
    privacy: Annotated[Privacy, PRIVACIES] | None = None
    """differential privacy, with its account; needs the extra `privacy`"""
    attack: Annotated[Attack, ATTACKS] | None = None
    """simulated attack by hostile silos; needs `experimental: true`"""
    experimental: bool = False
    """allow features meant for experiments only: attack"""
    server: ServerSection = ServerSection()
    engine: Annotated[Engine, ENGINES] = Synchronous()
    """how rounds follow one another"""
    transport: Annotated[Transport, TRANSPORTS] = ByMpi()
    """how silos and the server reach each other"""
    exchange: ExchangeSection = ExchangeSection()
    disclose: Disclose | None = None
    """which figures of single silos leave their rank: silo: all; cohort: only who took part; pooled: none, only sums;
    null: silo, with secure pooled"""
    secure: Annotated[SecAgg, SECURE] | None = None
    """secure aggregation: only sums over silos are seen by anybody; implies disclose: pooled"""
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    resume: ResumeSection = ResumeSection()
    stop: StopSection = StopSection()
    records: RecordsSection = RecordsSection()
    callbacks: tuple[Annotated[Any, CALLBACKS], ...] = ()
    """your own functions, module:function, called with each round's record and what a sink may know of the run"""
    device: DeviceSection = DeviceSection()
    comm: CommSection = CommSection()
    admit: Literal["configured", "any"] = "configured"
    """silos that `fedmpi admit` may bring in: configured: those of `data`; any: also others, each with its file (needs
    data: files)"""
    on_failure: OnFailure | None = None
    """when a rank dies under a fault-tolerant MPI (mpirun --with-ft ulfm): adopt: other ranks take over its silos if
    they can open their data; respawn: the same, until a fresh rank that MPI starts takes its place; continue: its silos
    leave; stop: the run ends; null: adopt, but stop with exchange.overlap, exchange.regions, secure, or engine:
    buffered in real time"""

    def open_sinks(self) -> list[Sink]:
        """A new, unopened instance of each sink and callback, in the order in which they get a record."""
        return [*self.records.open_sinks(), *(callback.build(None) for callback in self.callbacks)]

    @property
    def rule(self) -> LocalRule:
        """The local rule, with the settings of single silos."""
        return by_silo.combined(self.local, self.silos)

    @property
    def policy(self) -> Policy:
        """The engine's."""
        return self.engine.policy

    @property
    def disclosed(self) -> Disclose:
        """`disclose` with its default resolved."""
        return "pooled" if self.secure is not None else self.disclose or "silo"

    @property
    def heals(self) -> OnFailure:
        """`on_failure` with its default resolved."""
        at_large = self.engine.arrivals > 0 and not self.engine.clock.is_virtual  # updates under way are on one rank
        stops = self.exchange.overlap or self.exchange.regions or at_large or self.secure is not None
        return self.on_failure or ("stop" if stops else "adopt")

    @property
    def adopts(self) -> bool:
        """Whether other ranks take over the silos of a lost one."""
        return self.heals in ("adopt", "respawn")

    @property
    def hides_checksums(self) -> bool:
        """Whether nobody learns checksums of a silo's data: no other rank will have to tell if data are the same."""
        return self.secure is not None and not self.adopts

    @pydantic.model_validator(mode="after")
    def _disclosed(self) -> Config:
        readers: list[tuple[str, Any]] = [("select", self.select), ("aggregate", self.aggregate)]
        masked_apart = self.secure is not None and self.transport.apart
        seen = {"lateness"} if masked_apart else set[str]()  # by the server: it sees who has come
        if self.policy.reads is None or not self.policy.reads <= seen:
            readers.append(("engine.policy", self.policy))
        readers += [("records.measure", measurement) for measurement in self.records.measurements]
        readers += [] if self.privacy is None else [("privacy", self.privacy)]
        readers += [(f"updates.{i}", transform) for i, transform in enumerate(self.updates)]
        if self.secure is not None and (why := self.secure.conflicts(self)):
            raise ValueError(why)
        refuse_hidden(self.disclosed, readers, self.secure is not None)
        if self.disclosed != "silo" and self.exchange.scope == "silo":
            raise ValueError(f"disclose: {self.disclosed}, but with exchange.scope: silo each delta leaves its rank")
        return self

    @pydantic.model_validator(mode="after")
    def _outlived(self) -> Config:
        section = self.exchange
        for name, there in (("overlap", section.overlap), ("regions", section.regions is not None)):
            if there and self.on_failure not in (None, "stop"):
                raise ValueError(f"on_failure: {self.on_failure} cannot be combined with exchange.{name}; use stop")
        return self

    @pydantic.model_validator(mode="after")
    def _admits(self) -> Config:
        if self.admit == "any" and not isinstance(self.data, Files):
            raise ValueError("admit: any needs data: files, since an admitted silo brings a file")
        if self.admit == "any" and self.attack is not None:
            raise ValueError("admit: any does not go with attack: which silos are hostile depends on all of them")
        return self

    @pydantic.model_validator(mode="after")
    def _streams(self) -> Config:
        hostile = None if self.attack is None else self.attack.local
        rules = {"local": self.local, "evaluate.finetune": self.evaluate.finetune, "attack.local": hostile}
        rules |= {f"silos.{silo}.local": rule for silo, rule in by_silo.rules_of(self.local, self.silos).items()}
        for key, rule in rules.items() if isinstance(self.data, Files) and self.data.stream else ():
            if rule is not None and rule.takes_all:
                raise ValueError(
                    f"data.stream: {key}.batch_size null takes all samples of a silo at once; give a number"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _pools_statistics(self) -> Config:
        if not isinstance(self.data, Files) or self.data.statistics == "silo":
            return self
        what = "data.statistics: pooled"
        if self.secure is not None:
            raise ValueError(f"{what} sums columns without masks, which secure does not allow; take silo")
        if self.privacy is not None:
            raise ValueError(f"{what} sends sums of columns without noise, outside the account of privacy; take silo")
        if self.transport.apart:
            raise ValueError(
                f"{what} needs all silos at the start, and under transport: files they come one by one; take silo"
            )
        if self.data.scale == "minmax" and self.disclosed != "silo":
            raise ValueError(
                f"{what} and scale: minmax send extreme values; disclose: {self.disclosed} needs scale: standard"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _forks(self) -> Config:
        if why := fork_conflicts(self):
            raise ValueError(why)
        return self

    @pydantic.model_validator(mode="after")
    def _silos_differ(self) -> Config:
        if self.silos and (why := by_silo.conflicts(self)):
            raise ValueError(why)
        return self

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> Config:
        parts = (
            self.aggregate,
            self.attack,
            self.records,
            self.stop,
            self.local,
            self.server.optimizer,
            self.server.average,
        )
        engine = (self.engine, self.engine.clock, self.policy)
        others: tuple[Any, ...] = (self.privacy, self.select, self.evaluate, self.exchange, *engine, *self.updates)
        others += (self.transport,)
        for part in (*parts, *others):
            if part is not None and (why := part.conflicts(self)):
                raise ValueError(why)
        return self

    def entries(self, module: torch.nn.Module, ids: Sequence[str], known: Sequence[str]) -> list[Entry]:
        """The model's tensors and which are shared. Raises ConfigError if a component does not support them or the
        number of members `ids`, or names or counts silos beyond `known`, which are all that may ever take part."""
        found = entries(module, self.exchange.parameters)
        self.select.suits(len(known))
        self.select.knows(known)
        self.engine.clock.suits(known)
        if self.secure is not None:
            self.secure.fewest(self, ids)
            self.secure.ring(self, len(ids))
            personal = [entry.name for entry in found if entry.kind == "personal"]
            if personal and self.adopts:
                raise ConfigError(f"secure: on_failure: {self.heals} copies '{personal[0]}' to other ranks; take stop")
        masked = self.secure is not None
        if self.disclosed != "silo" and self.select.least(ids, self.rounds) < 2:
            raise ConfigError(
                f"{hiding(self.disclosed, masked)}, but a cohort may be a single silo, and sums over it are its "
                f"figures; take a select that draws two or more, or {showing(masked)}"
            )
        least = self.select.least(ids, self.rounds)
        self.policy.suits(least)
        self.aggregate.suits(self.engine.arrivals or self.policy.least(least))
        statistics = [entry.name for entry in found if entry.kind == "shared" and entry.buffer]
        if not self.aggregate.averages and statistics:
            raise ConfigError(
                f"aggregate: {called(self.aggregate)} gives a direction, and '{statistics[0]}' is a statistic that is "
                "averaged; leave it out of exchange.parameters"
            )
        if isinstance(self.server.optimizer, ReadsNorms) and statistics:
            raise ConfigError(
                f"server.optimizer: {called(self.server.optimizer)} uses the norms of deltas, and '{statistics[0]}' "
                "is a statistic of another unit; take exchange.parameters: all_but_batch_norm or trainable"
            )
        if self.privacy is not None:
            self.privacy.suits(module, found, ids, self)
        for rule in (self.local, self.evaluate.finetune):
            if rule is not None:
                rule.suits(module, found, known)
        if others := sorted(self.silos.keys() - set(known)):
            raise ConfigError(f"silos: no silo '{others[0]}'{did_you_mean(others[0], known)}")
        return found


CONFIG_FILE = "config.yaml"  # in a run directory


def _file(path: Path) -> Path:
    """The configuration file that is meant: a folder stands for its config.yaml."""
    return path / CONFIG_FILE if path.is_dir() else path


def run_directory(path: Path) -> Path | None:
    """The run directory that this configuration file was written into; None for a file that a user keeps elsewhere.
    `path` may also be the directory."""
    path = _file(path)
    try:
        written = ABOUT in read(path)[0]
    except ConfigError:  # reported by `load`
        return None
    folder = path.resolve().parent
    return folder if written or any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl")) else None


def load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """Reads a YAML file and applies overrides; returns the configuration and each value's origin.

    `path` may also be a run directory: its config.yaml is read, and `out` is this directory, even if it was moved.
    Environment variables in values are expanded (yamlfile.py). Origins are "FILE:LINE" or "command line", and the
    variables in the value. Raises a one-line ConfigError.
    """
    values, origins = values_of(path, overrides)
    return build(Config, values), origins


def values_of(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The plain values and origins that `load` builds a configuration from. Raises a one-line ConfigError."""
    file = _file(Path(path))
    values, origins = read(file)
    if values.pop(ABOUT, None) is not None:
        if file != Path(path):
            values["out"], origins["out"] = str(path), "command line"
        values = of_earlier(values)
    if "out" not in values:
        values["out"] = f"runs/{file.stem}"
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is not an override; write key=value, such as local.lr=0.1")
        value, origin = parse(key, text)
        put(values, key, value)
        for known in [k for k in origins if k == key or k.startswith(f"{key}.")]:
            del origins[known]
        origins[key] = origin
    return values, origins


def of_earlier(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run's config.yaml as this version writes them: earlier ones stored `disclose: silo` for null."""
    implied = values.get("secure") is not None and values.get("disclose") == "silo"
    return {**values, "disclose": None} if implied else values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; a component given by its name alone is turned into a mapping first."""
    *parents, last = key.split(".")
    for part in parents:
        below = values.get(part)
        if isinstance(below, str):
            below = {"name": below}
        elif not isinstance(below, dict):
            below = {}
        values[part] = dict(below)
        values = values[part]
    values[last] = value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted keys.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """The origin of a resolved value: its own line, the line of its component, or "default"."""
    if key in origins:
        return origins[key]
    parent, _, last = key.rpartition(".")
    if last == "name" and parent in origins:
        return origins[parent]
    return "default"
