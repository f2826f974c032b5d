"""Server optimizers: one contract for the family, and each one's equations from reference.py."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from support import reference

from fedmpi import server
from fedmpi.catalogue import descriptions
from fedmpi.components import to_dict
from fedmpi.errors import ConfigError
from fedmpi.layout import Layout, Segment
from fedmpi.server import OPTIMIZERS, FedAvgM, FedDyn, Server

NAMES = list(OPTIMIZERS.members)
P = 1000


def vectors(num_rounds=4, dtype=torch.float64):
    """Parameters and a mean delta for every round, some of them 0."""
    rng = torch.Generator().manual_seed(1)
    params_P = torch.randn(P, generator=rng, dtype=dtype)
    means_P = [torch.randn(P, generator=rng, dtype=dtype) * 0.1 ** (r % 3) for r in range(num_rounds)]
    for mean_P in means_P:
        mean_P[:7] = 0
    return params_P, means_P


def run(optimizer, params_P, means_P, part=slice(None)):
    params_P = params_P[part].clone()
    state = optimizer.init(params_P)
    for mean_P in means_P:
        params_P, state = optimizer.step(params_P, mean_P[part].clone(), state)
    return params_P, state


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=[1 << 18, 64], ids=["one-block", "many-blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(server, "BLOCK_CPU", request.param)


def test_mapping_round_trip(name):
    optimizer = OPTIMIZERS.build(name, "server.optimizer")
    assert OPTIMIZERS.name_of(optimizer) == name
    assert OPTIMIZERS.build({"name": name, **to_dict(optimizer)}, "server.optimizer") == optimizer


def test_every_field_is_explained(name):
    cls = OPTIMIZERS.members[name]
    assert {field.name for field in dataclasses.fields(cls)} <= set(descriptions(cls))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_is_named_vectors_of_the_parameters_kind(name, dtype):
    params_P, means_P = vectors(dtype=dtype)
    params_P, state = run(OPTIMIZERS.build(name, ""), params_P, means_P)
    assert hasattr(state, "_fields")
    for vector in (params_P, *state):
        assert vector.dtype == dtype and vector.shape == (P,) and bool(vector.isfinite().all())


def test_step_writes_no_parameters_and_reuses_the_rest(name):
    params_P, (mean_P, *_) = vectors()
    before_P = params_P.clone()
    optimizer = OPTIMIZERS.build(name, "")
    state = optimizer.init(params_P)
    new_P, new_state = optimizer.step(params_P, mean_P, state)
    assert torch.equal(params_P, before_P)
    assert not torch.equal(new_P, params_P)
    assert new_P.data_ptr() == mean_P.data_ptr()
    assert [v.data_ptr() for v in new_state] == [v.data_ptr() for v in state]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shards_step_to_the_bits_of_the_whole(name, dtype, block):
    params_P, means_P = vectors(dtype=dtype)
    optimizer = OPTIMIZERS.build(name, "")
    whole_P, whole_state = run(optimizer, params_P, means_P)
    for bounds in ([0, 1, 3, 8, 500, P], [0, 333, 666, P], [0, 0, P, P]):
        for low, high in itertools.pairwise(bounds):
            part = slice(low, high)
            shard, shard_state = run(optimizer, params_P, means_P, part)
            assert torch.equal(shard, whole_P[part])
            assert all(torch.equal(s, w[part]) for s, w in zip(shard_state, whole_state, strict=True))


def test_a_step_is_the_same_with_any_number_of_threads(name):
    params_P, means_P = (torch.randn(100_003, dtype=torch.float32) for _ in range(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = run(OPTIMIZERS.build(name, ""), params_P, [means_P])
        torch.set_num_threads(2)
        two, _ = run(OPTIMIZERS.build(name, ""), params_P, [means_P])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


EQUATIONS = [
    ("fedavg", {}, {}, 0.0),
    ("fedavg", {"lr": 0.3}, {}, 0.0),
    ("fedavgm", {}, {"lr": 1.0, "beta": 0.9}, 0.0),
    ("fedavgm", {"lr": 0.3, "beta": 0.5}, {}, 0.0),
    ("fedavgm", {"lr": 0.7, "beta": 0.9, "nesterov": True}, {}, 0.0),
    ("fedgm", {}, {"lr": 1.0, "beta": 0.9, "gamma": 1.0}, 0.0),
    ("fedgm", {"lr": 0.3, "beta": 0.5, "gamma": 2.5}, {}, 0.0),
    ("fedgm", {"gamma": 0.0}, {"lr": 1.0, "beta": 0.9}, 0.0),
    ("fedadagrad", {}, {"lr": 1e-2, "beta1": 0.0, "tau": 1e-3}, 1e-6),
    ("fedadagrad", {"lr": 0.316228, "beta1": 0.9, "tau": 1e-8, "v0": 0.0}, {}, 0.0),
    ("fedadam", {}, {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}, 1e-6),
    ("fedadam", {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "tau": 1e-8, "v0": 0.0}, {}, 0.0),
    ("fedyogi", {}, {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}, 1e-6),
    ("feddyn", {}, {"alpha": 0.01}, 0.0),
    ("feddyn", {"alpha": 0.3}, {}, 0.0),
    ("fedexp", {}, {}, 0.0),  # by itself; with norms of deltas in equations/updates.py
    ("fedyogi", {"lr": 0.1, "beta1": 0.2, "beta2": 0.7, "tau": 0.1, "v0": 0.5}, {}, 0.5),
]


@pytest.mark.parametrize(("name", "options", "defaults", "v0"), EQUATIONS)
def test_equations(name, options, defaults, v0, block):
    params_P, means_P = vectors(num_rounds=9)
    got_P, _ = run(OPTIMIZERS.build({"name": name, **options}, ""), params_P, means_P)
    w = params_P.numpy()
    m, v = reference.start(w, v0)
    given = {key: value for key, value in options.items() if key != "v0"}
    for mean_P in means_P:
        w, m, v = reference.SERVERS[name](w, mean_P.numpy(), m, v, **{**defaults, **given})
    np.testing.assert_allclose(got_P.numpy(), w, rtol=1e-12, atol=1e-12)


def test_feddyn_in_a_round_where_a_part_was_heard():
    params_P, means_P = vectors(num_rounds=5)
    optimizer, state, new_P = FedDyn(alpha=0.3), FedDyn(alpha=0.3).init(params_P), params_P
    w = params_P.numpy()
    m, v = reference.start(w)
    for number, mean_P in enumerate(means_P, start=1):
        w, m, v = reference.feddyn(w, mean_P.numpy(), m, v, alpha=0.3, fraction=number / 5)
        new_P, state = optimizer.at(number, 5, number / 5).step(new_P, mean_P.clone(), state)
    np.testing.assert_allclose(new_P.numpy(), w, rtol=1e-12, atol=1e-12)


def test_every_member_has_equations():
    assert {name for name, *_ in EQUATIONS} == set(NAMES) == set(reference.SERVERS)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_is_torchs_sgd_on_the_pseudo_gradient(nesterov):
    params_P, means_P = vectors(num_rounds=6)
    got_P, _ = run(server.FedAvgM(lr=0.7, beta=0.9, nesterov=nesterov), params_P, means_P)
    w = torch.nn.Parameter(params_P.clone())
    outer = torch.optim.SGD([w], lr=0.7, momentum=0.9, nesterov=nesterov)
    for mean_P in means_P:
        w.grad = -mean_P
        outer.step()
    torch.testing.assert_close(got_P, w.detach(), rtol=1e-12, atol=1e-12)


def test_fedgm_is_quasi_hyperbolic_momentum():
    params_P, means_P = vectors(num_rounds=6)
    eta, nu, beta = 1.3, 0.7, 0.9
    got_P, _ = run(server.FedGM(lr=eta * (1 - nu), beta=beta, gamma=nu / (1 - nu)), params_P, means_P)
    w, m = params_P.numpy().copy(), np.zeros(P)
    for mean_P in means_P:
        m = beta * m + (1 - beta) * mean_P.numpy()
        w = w + eta * ((1 - nu) * mean_P.numpy() + nu * m)
    np.testing.assert_allclose(got_P.numpy(), w, rtol=1e-12, atol=1e-12)


SCHEDULED = [name for name, cls in OPTIMIZERS.members.items() if issubclass(cls, server.Scheduled)]


@pytest.mark.parametrize("name", SCHEDULED)
def test_at_is_the_optimizer_of_one_round(name):
    plain = OPTIMIZERS.build({"name": name, "lr": 0.5}, "")
    assert plain.at(7, 10, 0.3) is plain
    falling = OPTIMIZERS.build({"name": name, "lr": 0.5, "schedule": {"name": "cosine", "warmup": 4}}, "")
    assert [falling.at(t, 10, 1.0).lr for t in (2, 6)] == pytest.approx([0.25, 0.25])
    assert falling.lr == 0.5 and type(falling.at(2, 10, 1.0)) is type(falling)
    params_P, means_P = vectors(num_rounds=1)
    ending = OPTIMIZERS.build({"name": name, "lr": 0.5, "schedule": {"name": "linear", "floor": 0.0}}, "")
    still_P, _ = run(ending.at(10, 10, 1.0), params_P, means_P)
    assert torch.equal(still_P, params_P)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_average_weighs_rounds_by_the_powers_of_decay(decay, block):
    _, points_P = vectors(num_rounds=7)
    average_P = torch.full((P,), 1e9, dtype=torch.float64)  # its start is forgotten
    for number, point_P in enumerate(points_P, start=1):
        average_P = server.Average(decay=decay).follow(average_P, point_P, number)
        weights = np.array([decay ** (number - i) for i in range(1, number + 1)])
        wanted = sum(w * p.numpy() for w, p in zip(weights / weights.sum(), points_P, strict=False))
        np.testing.assert_allclose(average_P.numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_reference_is_gradient_descent_when_batches_are_whole_and_alone():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)), rng.integers(2, size=12)
    parts = [(n, lambda _, part=slice(low, low + n): [(x[part], y[part])]) for low, n in ((0, 4), (4, 8))]
    got = reference.train(np.zeros(4), parts, rounds=5, local_lr=0.1, gradient=reference.binary_gradient)[-1]
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(5):
        logits = torch.from_numpy(x) @ w[:-1] + w[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(y).double())
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - 0.1 * gradient).detach().requires_grad_()
    np.testing.assert_allclose(got, w.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize(("gradient", "num_params"), [(reference.softmax_gradient, 16), (reference.square_gradient, 4)])
def test_reference_gradients(gradient, num_params):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(6, 3)), rng.integers(4, size=6), rng.normal(size=num_params)
    parameters = torch.from_numpy(w).requires_grad_()
    rows = torch.from_numpy(x) @ parameters[: -(num_params // 4)].reshape(-1, 3).T + parameters[-(num_params // 4) :]
    if num_params == 16:
        loss = torch.nn.functional.cross_entropy(rows, torch.from_numpy(y))
    else:
        loss = torch.nn.functional.mse_loss(rows[:, 0], torch.from_numpy(y).double())
    loss.backward()
    np.testing.assert_allclose(gradient(w, x, y), parameters.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fedadm", "server.optimizer: no server optimizer 'fedadm'; did you mean 'fedadam'?"),
        ({"name": "fedadam", "beta3": 1}, "server.optimizer: server optimizer 'fedadam' has no 'beta3'; did you mean"),
        ({"name": "fedadam", "beta1": 1.0}, "server.optimizer.beta1: input should be less than 1, got 1.0"),
        ({"name": "fedyogi", "tau": 0}, "server.optimizer.tau: input should be greater than 0, got 0"),
    ],
)
def test_wrong_configuration_is_one_line(value, message):
    with pytest.raises(ConfigError) as caught:
        OPTIMIZERS.build(value, "server.optimizer")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_statistics_become_the_mean_of_the_silos_whatever_the_optimizer_makes_of_parameters():
    generator = torch.Generator().manual_seed(0)
    params_P, mean_P = torch.rand(12, generator=generator), torch.randn(12, generator=generator)
    averaged = [Segment("statistics", start, stop, "exact", averaged=True) for start, stop in ((2, 4), (9, 12))]
    there = torch.tensor([i in (2, 3, 9, 10, 11) for i in range(12)])
    optimizer = FedAvgM(lr=2.0, beta=0.9)
    server = Server(optimizer, Layout((Segment("delta", 0, 12, "delta"), *averaged)), scale=3.0)
    plain_P, _ = optimizer.step(params_P, 3 * mean_P, optimizer.init(params_P))
    whole_P, _ = server.step(params_P, mean_P.clone(), optimizer.init(params_P))
    assert torch.equal(whole_P, torch.where(there, params_P + mean_P, plain_P))
    for start in range(0, 12, 5):  # any slice gives the same as the whole
        part = slice(start, start + 5)
        some_S, _ = server.step(params_P[part], mean_P[part].clone(), optimizer.init(params_P[part]), start)
        assert torch.equal(some_S, whole_P[part])


@pytest.mark.parametrize("num_params", [None, 4, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("fresh", [True, False])
def test_an_optimizer_of_ones_own_may_return_other_tensors(num_params, scale, fresh):
    class Own(FedAvgM):
        def step(self, params_P, mean_P, state):
            return params_P + mean_P if fresh else mean_P.add_(params_P)[None], state

    params_P, mean_P = torch.arange(4.0), torch.ones(4)
    layout = None if num_params is None else Layout.whole(num_params)
    server = Server(Own(), layout, scale=scale)
    new_P, _ = server.step(params_P, mean_P, Own().init(params_P))
    assert new_P.data_ptr() == mean_P.data_ptr() and new_P.shape == (4,)
    assert new_P[:num_params].tolist() == (torch.arange(4.0) + scale)[:num_params].tolist()
