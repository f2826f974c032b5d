"""The model, the loss and the metrics on a few samples of every silo: forwards, backwards, and all metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedmpi import pretrained, rng
from fedmpi.assembly import build_module, digest_of, first_values, starts_finite, weights_of
from fedmpi.check.findings import Findings
from fedmpi.config import Config
from fedmpi.errors import ConfigError, in_one_line
from fedmpi.flat import Entry, entries, frozen_alone
from fedmpi.local import GradientRule, LocalRule
from fedmpi.local.gradient import FedSgd
from fedmpi.objectives import LossAndMetrics, Objective, one_tensor, resolve
from fedmpi.targets import CLASS_TASKS, number_of
from fedmpi.trial import Subject, few, refuse_lone_samples, subject, tried
from fedmpi.types import SiloData, Source

_SHOWN = 4  # names of parameters in a message
FAR = 10  # times the loss of a uniform guess: a start that is far off


@dataclass
class Trial:
    """What a rank's silos gave."""

    module: torch.nn.Module | None = None
    entries: Sequence[Entry] = ()
    unshared: str = ""  # SHA-256 of the first values that are not shared
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)  # by silo: mean loss, and targets
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # by silo
    raised: dict[str, dict[str, str]] = field(default_factory=dict)  # by silo and metric: its exception


def objective_of(config: Config, source: Source, found: Findings) -> LossAndMetrics | None:
    """Loss and metrics; those that do not suit the data are noted, and the task's defaults stand in for them."""
    objective: Objective = config.objective
    for _ in range(4):
        try:
            resolved = resolve(objective, source.task, source.num_classes)
        except ConfigError as error:
            found.fault(str(error))
            part = next((name for name in ("loss", "metrics", "best") if f"objective.{name}" in str(error)), None)
            if part is None:
                return None
            wanted = objective.metrics
            objective = dataclasses.replace(objective, **{part: None})
            if part == "metrics" and wanted is not None and len(wanted) > 1:  # each of them by itself
                for metric in wanted:
                    alone = dataclasses.replace(config.objective, loss=None, best=None, metrics=[metric])
                    found.attempt(lambda: resolve(alone, source.task, source.num_classes), "objective.metrics")  # noqa: B023
        else:
            return resolved
    return None


def build(config: Config, source: Source, found: Findings) -> Trial:
    """The model with its first parameters, and the names of its tensors."""
    module = found.attempt(lambda: build_module(config, source), "model")
    if module is None:
        return Trial()
    if (init := config.init) is not None and (
        left_out := found.attempt(lambda: pretrained.start(module, init), "init")
    ):
        found.warn(left_out)
    tensors = found.attempt(lambda: entries(module, config.exchange.parameters), "model")
    if tensors is not None:
        found.attempt(lambda: starts_finite(module, tensors), "model")
    first = {} if tensors is None else first_values(module, tensors)
    return Trial(module, tensors or (), digest_of(first).hex())


def suits(config: Config, trial: Trial, ids: Sequence[str], num_train: Mapping[str, int], found: Findings) -> None:
    """Notes what does not suit the model or the number of silos: selectors, aggregators, rules, weights."""
    if (module := trial.module) is not None and trial.entries:
        found.attempt(lambda: config.entries(module, ids, ids), "configuration")
    known = {silo: num for silo, num in num_train.items() if num}
    found.attempt(lambda: weights_of(config, list(known), list(known.values())), "aggregate")
    if capped := config.select.capped(len(ids)):
        found.warn(capped)


def run(
    config: Config, source: Source, objective: LossAndMetrics, trial: Trial, data: Mapping[str, SiloData],
    device: torch.device, rule_is_known: bool, found: Findings,
) -> None:  # fmt: skip
    """Every silo of this rank through the model, forwards and backwards, and through all metrics."""
    assert trial.module is not None
    rng.set_all(rng.key(config.seed, purpose="trial"))
    with subject(trial.module, device) as one:
        fit = {silo: samples for silo, samples in data.items() if _fits(one, objective, trial, silo, samples, found)}
        for silo, samples in fit.items():
            _backward(config, one, objective, source, trial, silo, samples, found)
            _metrics(config, one, objective, trial, silo, samples, found)
        if rule_is_known:
            _lone(config, one, fit, found)
        if fit and (privacy := config.privacy) is not None:
            found.attempt(
                lambda: privacy.tries(one.module, objective.loss, *few(one, next(iter(fit.values())))), "privacy"
            )


def _fits(one: Subject, objective: LossAndMetrics, trial: Trial, silo: str, data: SiloData, found: Findings) -> bool:
    """The trial of `train`, on this silo."""
    try:
        changing = tried(one, objective, {silo: data}, frozen_alone(trial.entries))
    except ConfigError as error:
        found.fault(f"{error}; the model must take samples of {list(data.x_train.shape[1:])}"
                    if "disagree" in str(error) else str(error))  # fmt: skip
        return False
    if changing:
        names = ", ".join(f"'{name}'" for name in changing[:_SHOWN])
        found.warn(f"model: {names} changes in training and is not saved; every round begins with its first values")
    return True


def _backward(
    config: Config, one: Subject, objective: LossAndMetrics, source: Source, trial: Trial, silo: str, data: SiloData,
    found: Findings,
) -> None:  # fmt: skip
    """One forward and backward pass in training mode; the loss goes into the trial."""
    num = max(2, batch_of(config.local, len(data.x_train)))
    x, y = data.x_train[:num].to(one.device), data.y_train[:num].to(one.device)
    if len(x) == 1:
        return  # too few for some models; what that means is said elsewhere
    module = one.module
    module.train()
    for param in module.parameters():
        param.grad = None
    try:
        outputs = one_tensor(module(x))
        if not _wide_enough(outputs, y, objective, source, found):
            return
        criterion = objective.criterion(y)
        loss = criterion.loss(outputs, y)
        if not loss.requires_grad:
            found.fault("objective.loss: it does not depend on the model's parameters; do not detach the outputs")
            return
        torch.autograd.backward(loss)
    except ConfigError as error:
        found.fault(str(error))
        return
    except Exception as error:
        found.fault(f"model: training on silo '{silo}' raises {in_one_line(error)}")
        return
    value, counted = float(loss.detach()), number_of(criterion.count(y))
    trial.losses[silo] = (value, counted)
    if not math.isfinite(value):
        found.fault(
            f"silo '{silo}': the loss before training is {value}; look for values that are not scaled, a logarithm of "
            "0 or a division by 0 in model and loss"
        )
        return
    _gradients(module, found)
    guess = math.log(max(source.num_classes, 2))
    if source.task in CLASS_TASKS and not objective.own_loss and value > FAR * guess:
        shown = config.disclosed == "silo"
        start = f"silo '{silo}': the loss before training is {value:.3g}" if shown else "a first loss is far higher"
        found.warn(f"{start}, and guessing gives {guess:.3g}: scale the inputs or the first parameters")


def batch_of(rule: LocalRule, num_samples: int) -> int:
    """Samples in a batch of a silo; 32 under a rule of a user's own that does not say."""
    given = rule.batch_size or num_samples if isinstance(rule, (GradientRule, FedSgd)) else 32
    return min(given, num_samples)


def _gradients(module: torch.nn.Module, found: Findings) -> None:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    if without and len(without) == len(trained):
        found.fault("model: no parameter gets a gradient; do not detach tensors or use no_grad in its forward pass")
    elif without:
        more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
        names = ", ".join(f"'{name}'" for name in without[:_SHOWN])
        found.warn(f"model: {names}{more} got no gradient: the forward pass does not use them; freeze or remove them")
    if bad := [name for name, p in trained.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]:
        found.fault(f"model: the first gradient of '{bad[0]}' is not finite; look for a root or logarithm of 0")
    elif trained and not without and all(not bool(p.grad.any()) for p in trained.values() if p.grad is not None):
        found.fault("model: the first gradient is 0 everywhere, so nothing will be learnt; look for dead activations")


def _wide_enough(
    outputs: torch.Tensor, y: torch.Tensor, objective: LossAndMetrics, source: Source, found: Findings
) -> bool:
    """Whether there is an output for each of the data's classes; notes outputs of another size."""
    if source.task not in CLASS_TASKS or (objective.own_loss and outputs.ndim < 2):
        return True
    logits, _ = objective.targets.rows(outputs, y)
    given, classes = logits.shape[-1], source.num_classes
    if given == classes:
        return True
    # With fewer, the loss of a label beyond them raises, once a batch holds one.
    note = found.fault if given < classes else found.warn
    note(
        f"model: it returns {given} numbers per target, and the data have {classes} classes; give its last layer "
        f"{classes} outputs"
    )
    return given > classes


def _metrics(
    config: Config, one: Subject, objective: LossAndMetrics, trial: Trial, silo: str, data: SiloData, found: Findings
) -> None:
    """All metrics on a batch of the silo's test samples, or of its training samples if it has none."""
    x, y = (data.x_test, data.y_test) if len(data.x_test) else (data.x_train, data.y_train)
    batch = config.evaluate.batch_size
    try:
        tally = objective.score(one.module, x[:batch], y[:batch], batch, one.device)
    except ConfigError as error:
        found.fault(str(error))
        return
    except Exception as error:
        found.fault(f"model: evaluation of silo '{silo}' raises {in_one_line(error)}")
        return
    trial.metrics[silo] = {name: value for name, value in tally.figures(objective.scorers).items()}
    trial.raised[silo] = dict(tally.raised)


def _lone(config: Config, one: Subject, data: Mapping[str, SiloData], found: Findings) -> None:
    """Notes batches of a single sample that the model cannot be trained on."""
    found.attempt(lambda: refuse_lone_samples("local", config.rule, config.rounds, one, data), "local")
    tuned = config.evaluate.finetune
    found.attempt(lambda: refuse_lone_samples("evaluate.finetune", tuned, 1, one, data), "evaluate.finetune")
