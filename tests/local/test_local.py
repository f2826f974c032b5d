"""One contract for every local rule, what optimizers do to gradients and keep, and properties of single rules."""

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import equations
from support.equations.rules import sum_of_a
from support.modules import with_vectors

import fedmpi
from fedmpi.comm import SoloComm
from fedmpi.components import Deferred, build
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel, entries
from fedmpi.local import RULES, LocalSilo, Round
from fedmpi.local.optimizers import TORCH_OPTIMIZERS, EmaSGD, num_gradients, plain_step, put_back, state_to_keep
from fedmpi.local.personal import FedRep
from fedmpi.types import SiloData

USUAL = {"lr": 0.1, "steps": 3, "batch_size": 6}  # what most rules need
NEEDS = {
    "fedsgd": {"lr": 0.1, "batch_size": 6},
    "fedrep": USUAL | {"head_steps": 2},
    "per_fedavg": USUAL | {"inner_lr": 0.05},
}
MORE = {
    "scaffold, I": {"name": "scaffold", "option": "I"},
    "scaffold, benchmark": {"name": "scaffold", "variant": "benchmark"},
    "scaffold, momentum": {"name": "scaffold", "optimizer": {"name": "SGD", "momentum": 0.9}},
    "fedprox, adaptive": {"name": "fedprox", "adaptive": True},
    "sgd, kept momentum": {"name": "sgd", "keep_optimizer": True, "optimizer": {"name": "SGD", "momentum": 0.9}},
    "sgd, kept AdamW": {"name": "sgd", "keep_optimizer": True, "optimizer": "AdamW"},
    "moon, kept Adam": {"name": "moon", "keep_optimizer": True, "optimizer": "Adam"},
}
ALL = {name: {"name": name} for name in RULES.members} | MORE


def made(case):
    """The rule of a case."""
    return RULES.build({**NEEDS.get(ALL[case]["name"], USUAL), **ALL[case]}, "local")


class Bench:
    """A model with dropout, a silo of twenty samples, and rounds in which a rule trains."""

    def __init__(self, rule):
        torch.manual_seed(3)
        layers = [torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(5, 2)]
        self.rule, self.auxiliaries = rule, getattr(rule, "auxiliaries", ())
        shared = ["*", "!3.*"] if isinstance(rule, FedRep) else "all"
        self.model = with_vectors(torch.nn.Sequential(*layers), shared, self.auxiliaries)
        self.params_P = self.model.params()
        x, y = torch.randn(20, 3), torch.arange(20) % 2
        self.silo = LocalSilo("a", SiloData(x, y, x[:4], y[:4]), 20.0)
        self.checks = 0

    def check(self):
        self.checks += 1

    def train(self, number, params_P=None, check=None):
        """A copy of the silo's contribution; the silo's state is committed, as a round would do."""
        generator = torch.Generator().manual_seed(number)
        vectors = {a.name: 0.1 * torch.randn(len(self.params_P), generator=generator) for a in self.auxiliaries}
        loss = torch.nn.functional.cross_entropy
        round = Round(number, 10, 0, loss, check or self.check, vectors)
        before = {name: vector.clone() for name, vector in vectors.items()}
        silo = copy.copy(self.silo)
        silo.kept = dict(silo.kept)
        self.model.take_delta(self.params_P)[len(self.params_P) :].fill_(math.nan)
        found = self.rule.train(silo, self.model, self.params_P if params_P is None else params_P, round)
        assert all(torch.equal(vectors[name], before[name]) for name in vectors), "the server's vectors are read only"
        found.vector_Q = found.vector_Q.clone()
        self.silo = silo
        return found


@pytest.fixture(params=ALL)
def bench(request):
    return Bench(made(request.param))


def test_every_case_has_its_rule():
    assert set(RULES.members) <= {case["name"] for case in ALL.values()}
    assert all(RULES.name_of(made(case)) == ALL[case]["name"] for case in ALL)


def test_the_same_inputs_give_the_same_bits(bench):
    other = Bench(bench.rule)
    for number in (1, 2, 3):
        one = bench.train(number)
        torch.rand(number)  # other draws do not matter
        two = other.train(number)
        assert torch.equal(one.vector_Q, two.vector_Q) and one.loss == two.loss
        assert bench.silo.kept.keys() == other.silo.kept.keys()
        assert all(torch.equal(t, other.silo.kept[name]) for name, t in bench.silo.kept.items())


def test_parameters_and_what_is_kept_are_read_and_not_written(bench):
    for number in (1, 2, 3):
        params_P, kept = bench.params_P.clone(), bench.silo.kept
        before = {name: tensor.clone() for name, tensor in kept.items()}
        delta_P = bench.train(number)["delta"]
        assert torch.equal(bench.params_P, params_P)
        assert kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in kept)
        pieces = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in bench.silo.kept.values() if t.nbytes]
        travels = bench.model.take_delta(params_P)  # the next silo's training overwrites it
        low, high = travels.data_ptr(), travels.data_ptr() + travels.nbytes
        assert all(end <= low or start >= high for start, end in pieces), "kept in the model's memory"
        bench.params_P = params_P + delta_P


def test_a_contribution_tells_what_was_done(bench):
    for number in (1, 2, 3):
        cursor, bench.checks = bench.silo.cursor, 0
        found = bench.train(number)
        assert (found.silo, found.round, found.weight) == ("a", number, 20.0)
        assert bench.silo.cursor - cursor == found.num_samples > 0
        assert found.num_steps >= 1 and bench.checks >= found.num_steps
        assert found.normalizer is None or 0 < found.normalizer < math.inf
        assert math.isfinite(found.loss) and bool(found.vector_Q.isfinite().all()), "auxiliary vectors are written"
        assert found.vector_Q.numel() == len(bench.params_P) * (1 + len(bench.auxiliaries))
        assert bool(found["delta"].any())


def test_a_round_can_be_broken_off_between_batches(bench):
    bench.train(1)
    undisturbed = Bench(bench.rule)
    undisturbed.train(1)
    undisturbed.checks = 0
    wanted = undisturbed.train(2)
    for at in range(undisturbed.checks):
        calls = itertools.count()

        def check(at=at, calls=calls):
            if next(calls) == at:
                raise InterruptedError

        before = bench.silo
        with pytest.raises(InterruptedError):
            bench.train(2, check=check)
        assert bench.silo is before
    assert torch.equal(bench.train(2).vector_Q, wanted.vector_Q)


def config(case, out, rounds):
    local = {**NEEDS.get(ALL[case]["name"], USUAL), **ALL[case]}
    values = {"rounds": rounds, "out": str(out), "local": local, "data": "support.equations:Quadratics"}
    values |= {"model": "support.equations:two_layers", "select": {"name": "uniform", "fraction": 0.6}}
    values |= {"device": {"name": "cpu"}, "checkpoint": {"every": 2}}
    if local["name"] == "feddyn":
        values["server"] = {"optimizer": "feddyn"}
    if local["name"] == "fedrep":
        values["exchange"] = {"parameters": ["*", "!2.*"]}
    return build(fedmpi.Config, values)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(case, tmp_path):
    params = []
    for out, ends in (("whole", [6]), ("parts", [2, 4, 6])):
        for rounds in ends:
            with fedmpi.Run(config(case, tmp_path / out, rounds), comm=SoloComm()) as run:
                for _ in run:
                    pass
                params.append(run.parameters.clone())
                kept = {name: silo.kept for name, silo in run.federation.silos.items()}
        if out == "whole":
            wanted = kept
    assert torch.equal(params[0], params[-1]) and not torch.equal(params[0], params[1])
    for name, tensors in wanted.items():
        assert tensors.keys() == kept[name].keys()
        assert all(torch.equal(tensor, kept[name][what]) for what, tensor in tensors.items())


# ------------------------------------------------------------ how many gradients

SGD = torch.optim.SGD
LINEAR = [
    (SGD, {}, 0.0),
    (SGD, {"momentum": 0.9}, 0.0),
    (SGD, {"momentum": 0.7, "nesterov": True}, 0.0),
    (SGD, {"momentum": 0.6, "dampening": 0.3}, 0.0),
    (EmaSGD, {"beta": 0.8}, 0.0),
    (SGD, {}, 0.3),
    (SGD, {}, 1.4),  # each step overshoots the start: the coefficients change their signs
    (SGD, {"momentum": 0.9}, 0.8),
    (SGD, {"momentum": 0.7, "nesterov": True}, 0.2),
    (SGD, {"momentum": 0.6, "dampening": 0.3}, 0.5),
    (EmaSGD, {"beta": 0.8}, 0.4),
]


@pytest.mark.parametrize("tau", [1, 2, 7])
@pytest.mark.parametrize(("target", "takes", "pull"), LINEAR)
def test_num_gradients_is_the_sum_of_what_every_gradient_has_moved(target, takes, pull, tau):
    """With torch's own steps: parameter i has gradient 1 in step i, and only the proximal term's in all others."""
    lr = 0.05
    param = torch.nn.Parameter(torch.zeros(tau, dtype=torch.float64))
    optimizer = target([param], lr=lr, **takes)
    for i in range(tau):
        param.grad = torch.eye(tau, dtype=torch.float64)[i] + pull / lr * param.detach()
        optimizer.step()
    wanted = float(param.detach().abs().sum()) / lr
    assert num_gradients(Deferred("", target, takes), tau, pull) == pytest.approx(wanted, rel=1e-12)


def test_num_gradients_by_the_papers_closed_forms():
    rho, tau, pull = 0.9, 11, 0.2
    momentum = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert num_gradients(Deferred("", SGD, {"momentum": rho}), tau) == pytest.approx(momentum, rel=1e-12)
    assert num_gradients(Deferred("", SGD, {}), tau, pull) == pytest.approx((1 - (1 - pull) ** tau) / pull, rel=1e-12)


@pytest.mark.parametrize(("target", "takes"), [(torch.optim.Adam, {}), (SGD, {"maximize": True})])
def test_what_is_not_linear_in_the_gradients_has_no_number(target, takes):
    assert num_gradients(Deferred("", target, takes), 3) is None


# ------------------------------------------------------------ optimizers that keep state


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS.members)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_from_what_was_kept(name, dtype):
    cls = TORCH_OPTIMIZERS.members[name]
    takes = {"SGD": {"momentum": 0.9}}.get(name, {})

    def steps(params, optimizer, numbers):
        for number in numbers:
            for i, param in enumerate(params):
                rng = torch.Generator().manual_seed(10 * number + i)
                param.grad = torch.randn(param.shape, generator=rng).to(dtype)
            plain = plain_step(optimizer)
            with torch.no_grad():
                plain()

    def new():
        rng = torch.Generator().manual_seed(0)
        shapes = [(3, 4), (4, 2)] if name == "Muon" else [(3, 4), (4,)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in shapes]
        return params, cls(params, lr=0.01, **takes)

    whole, optimizer = new()
    steps(whole, optimizer, range(6))
    parts, optimizer = new()
    kept: dict[str, torch.Tensor] = {}
    for numbers in (range(2), range(2, 3), range(3, 6)):
        optimizer = cls(parts, lr=0.01, **takes)
        before = {key: tensor.clone() for key, tensor in kept.items()}
        if numbers.start:
            put_back(optimizer, kept)
        steps(parts, optimizer, numbers)
        assert all(torch.equal(kept[key], before[key]) for key in kept)
        kept = state_to_keep(optimizer)
        assert all(tensor.dtype != torch.bfloat16 for tensor in kept.values())
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


# ------------------------------------------------------------ single rules


def run(local, out, rounds, **other):
    """The final parameters, on the problem of equations/."""
    values = {
        "rounds": rounds,
        "out": str(out),
        "data": "support.equations:Quadratics",
        "model": "support.equations:linear",
    }
    values |= {"device": {"name": "cpu"}, "checkpoint": {"every": rounds}, "local": {"sampler": "in_order", **local}}
    with fedmpi.Run(build(fedmpi.Config, values | other), comm=SoloComm()) as run:
        for _ in run:
            pass
        return run.parameters.numpy().copy()


def scaffold_on_quadratics(divisor, rounds, lr, steps, rho):
    """Option II with full gradients, momentum and equal weights; and the minimizer of the mean loss."""
    problem = equations.Problem(np.zeros(4), [], [])
    silos = [(x.T @ x / len(x), x.T @ y / len(x)) for x, y in map(_with_ones, map(problem.whole, range(5)))]
    w, c, own = np.zeros(4), np.zeros(4), [np.zeros(4)] * 5
    for _ in range(rounds):
        ends = []
        for k, (a, b) in enumerate(silos):
            y, buffer = w, 0.0
            for _ in range(steps):
                buffer = rho * buffer + 2 * (a @ y - b) - own[k] + c
                y = y - lr * buffer
            own[k] = own[k] - c + (w - y) / (lr * divisor)
            ends.append(y)
        w, c = np.mean(ends, axis=0), np.mean(own, axis=0)
    return w, np.linalg.solve(sum(a for a, _ in silos), sum(b for _, b in silos))


def _with_ones(batch):
    return np.c_[batch[0], np.ones(len(batch[0]))], batch[1]


def test_scaffold_with_momentum_converges_where_division_by_steps_diverges(tmp_path: Path) -> None:
    how = {"lr": 0.02, "steps": 10}
    plain, best = scaffold_on_quadratics(10, 20, rho=0.9, **how)
    assert np.abs(plain).max() > 1e6
    ours, _ = scaffold_on_quadratics(sum_of_a(0.9, 10), 20, rho=0.9, **how)
    assert np.abs(ours - best).max() < 1e-5
    local = {"name": "scaffold", "batch_size": None, "optimizer": {"name": "SGD", "momentum": 0.9}, **how}
    found = run(local, tmp_path, 20, aggregate={"name": "mean", "weights": "uniform"})
    assert np.abs(found - best).max() < 1e-5


@pytest.mark.parametrize("more", [{}, {"variant": "benchmark"}, {"name": "gradient_correction"}])
def test_a_last_round_in_which_nothing_moves(more: dict, tmp_path: Path) -> None:
    local = {"name": "scaffold", "lr": 0.05, "steps": 4, "schedule": {"name": "linear", "floor": 0.0}}
    assert np.isfinite(run({**local, **more}, tmp_path, 3)).all()


def test_gradient_correction_of_everybody_alike_is_scaffold(tmp_path: Path) -> None:
    alike = {"aggregate": {"name": "mean", "weights": "uniform"}}
    work = {"lr": 0.05, "steps": 4, "batch_size": 5, "optimizer": {"name": "SGD", "momentum": 0.5}}
    one = run({"name": "gradient_correction", **work}, tmp_path / "one", 6, **alike)
    two = run({"name": "scaffold", **work}, tmp_path / "two", 6, **alike)
    assert np.abs(one - two).max() < 1e-12


def test_fedprox_lowers_mu_after_five_falls_and_raises_it_at_once() -> None:
    bench = Bench(RULES.build({"name": "fedprox", "mu": 0.25, "adaptive": True, "lr": 0.3, "epochs": 1}, "local"))
    bench.model.module.eval()
    bench.model.module[2].p = 0.0
    mus = []
    for number in range(1, 13):
        bench.params_P = bench.params_P + bench.train(number).vector_Q
        mus.append(round(bench.silo.kept["proximal"][0].item(), 9))
    assert mus == [0.25] * 5 + [0.15] * 5 + [0.05] * 2
    bench.params_P = -3 * bench.params_P
    bench.train(13)
    assert bench.silo.kept["proximal"].tolist()[::2] == [pytest.approx(0.15), 0.0]
    for number in range(14, 26):
        bench.params_P = bench.params_P + bench.train(number).vector_Q
    assert bench.silo.kept["proximal"][0] == 0.0  # and no lower


def test_moon_is_sgd_in_the_first_round_and_without_mu() -> None:
    sgd, moon, free = (
        Bench(RULES.build({**USUAL, **local}, "local"))
        for local in ({"name": "sgd"}, {"name": "moon"}, {"name": "moon", "mu": 0.0})
    )
    one, two, three = (bench.train(1).vector_Q for bench in (sgd, moon, free))
    assert torch.equal(one, two) and torch.equal(one, three)
    one, two, three = (bench.train(2).vector_Q for bench in (sgd, moon, free))
    assert not torch.equal(one, two) and torch.equal(one, three)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in moon.model.module.modules())


def test_moon_leaves_running_statistics_to_the_model_that_trains() -> None:
    def bench(local):
        found = Bench(RULES.build({**USUAL, "batch_size": 5, **local}, "local"))
        torch.manual_seed(4)
        module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        found.model = FlatModel(module, ["*", "!1.*"])
        found.params_P = found.model.params()
        return found

    # The second layer's mean uses personal statistics, so only three batches per round have changed it.
    sgd, moon = bench({"name": "sgd", "lr": 1e-9}), bench({"name": "moon", "features": "0", "lr": 1e-9})
    for number in (1, 2, 3):
        for one in (sgd, moon):
            one.train(number)
    assert torch.allclose(sgd.silo.kept["fedmpi/personal_0"], moon.silo.kept["fedmpi/personal_0"], atol=1e-6)
    assert torch.equal(sgd.silo.kept["fedmpi/integers_int64"], moon.silo.kept["fedmpi/integers_int64"])


def test_moon_says_which_model_it_cannot_compare() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten())
    with pytest.raises(ConfigError, match=r"local.features: the model has no Linear layer; name the module"):
        RULES.build({"name": "moon", **USUAL}, "local").suits(module, entries(module), [])
    with pytest.raises(ConfigError, match=r"local.features: the model has no module '2'; available: , 0, 1"):
        RULES.build({"name": "moon", "features": "2", **USUAL}, "local").suits(module, entries(module), [])
    RULES.build({"name": "moon", "features": "1", **USUAL}, "local").suits(module, entries(module), [])
    single = torch.nn.Sequential(torch.nn.Linear(3, 1))
    with pytest.raises(ConfigError, match=r"local: moon compares hidden representations, and this model is"):
        RULES.build({"name": "moon", **USUAL}, "local").suits(single, entries(single), [])


@pytest.mark.slow
def test_optimizers_are_made_and_step_without_torch_s_compiler_which_would_come_without_that_patch():
    """Fails if torch changes below local/optimizers.py, or no longer imports its compiler."""
    code = """
import inspect, sys, torch
from fedmpi.local import plain_step

def step():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with torch.no_grad():
        plain_step(optimizer)()
    optimizer.zero_grad()
    return "torch._dynamo" in sys.modules

spared = not step()
for method in ("add_param_group", "zero_grad"):
    del inspect.unwrap(getattr(torch.optim.Optimizer, method)).__dynamo_disable
print(spared, step())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True"], done.stderr
