"""The flat model: the module's tensors stay views of one vector during all that training does."""

import copy
import hashlib
import struct

import pytest
import torch
from support.modules import with_vectors
from torch import nn

from fedmpi import flat
from fedmpi.errors import ConfigError
from fedmpi.flat import FlatModel, entries, master_dtype, num_shared, sha256, signature
from fedmpi.local.optimizers import TORCH_OPTIMIZERS, plain_step
from fedmpi.types import Auxiliary


class Tied(nn.Module):
    """Embedding and output share one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.body(self.embed((x[:, 0] * 10).long().abs() % 7)))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("hidden", torch.ones(5), persistent=False)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("grid", torch.arange(6).reshape(2, 3))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.scale


def frozen():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    return module


def mixed(first, second):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5).to(first), nn.Linear(5, 2).to(second)

        def forward(self, x):
            return self.b(self.a(x.to(first)).to(second)).float()

    return Mixed()


MODULES = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
    "tied": Tied,
    "frozen": frozen,
    "counting": Counting,
    "bf16 and float32": lambda: mixed(torch.bfloat16, torch.float32),
    "float32 and float64": lambda: mixed(torch.float32, torch.float64),
    "float64": lambda: mixed(torch.float64, torch.float64),
    "bf16": lambda: mixed(torch.bfloat16, torch.bfloat16),
}


class Pool:
    """An allocator that remembers its allocations."""

    def __init__(self):
        self.given = []

    def __call__(self, num_elements, dtype):
        self.given.append(torch.zeros(num_elements, dtype=dtype))
        return self.given[-1]

    def holds(self, tensor):
        starts = [(v.data_ptr(), v.data_ptr() + v.nbytes) for v in self.given]
        return any(a <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= b for a, b in starts)


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(1)
    return MODULES[request.param]()


def train(module, steps=4, optimizer=torch.optim.SGD, step_of=lambda optimizer: optimizer.step, **arguments):
    """A few steps with the same batches; gradients are set to None in between."""
    rng = torch.Generator().manual_seed(0)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = optimizer(trained, **{"lr": 0.05, **arguments})
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        module(torch.randn(6, 3, generator=rng)).square().mean().backward()
        with torch.no_grad():
            step_of(optimizer)()


def saved(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_views(model, pool):
    tensors = model.module.state_dict(keep_vars=True)
    for entry in model.entries:
        assert pool.holds(tensors[entry.name]) == (entry.kind == "shared"), entry
    assert sum(v.numel() for v in pool.given) == sum(e.num_elements for e in model.entries if e.kind == "shared")


@pytest.mark.parametrize("shared", ["all", "trainable", ["*", "!*weight"], ["*bias"]])
def test_the_storage_that_was_allocated_is_what_the_model_trains_in(module, shared):
    before, pool = saved(module), Pool()
    model = FlatModel(module, shared, allocate=pool)
    assert same(saved(module), before)
    assert_views(model, pool)
    for _ in range(2):
        params_P = model.params()
        train(module)
        assert not torch.equal(model.params(), params_P)
        model.take_delta(params_P)
        model.load(params_P)
        assert_views(model, pool)


def test_training_gives_the_bits_of_the_module_by_itself(module):
    alone = copy.deepcopy(module)
    model = FlatModel(module)
    model.load(model.params())
    train(alone)
    train(module)
    assert same(saved(alone), saved(module))


@pytest.mark.parametrize("name", sorted(set(TORCH_OPTIMIZERS.members) - {"Muon"}))  # Muon takes matrices only
def test_every_optimizer_moves_the_vector_as_it_moves_the_module_by_itself(name):
    torch.manual_seed(1)
    module = MODULES["plain"]()
    alone, pool = copy.deepcopy(module), Pool()
    model = FlatModel(module, allocate=pool)
    params_P = model.params()
    optimizer = TORCH_OPTIMIZERS.members[name]
    for _ in range(2):
        model.load(params_P)
        train(module, optimizer=optimizer, step_of=plain_step)
        assert_views(model, pool)
        local_P = model.params()
        assert not torch.equal(local_P, params_P)
        assert torch.equal(model.take_delta(params_P), local_P - params_P)
        model.load(params_P)
        assert torch.equal(model.params(), params_P)
    train(alone, optimizer=optimizer)
    assert torch.equal(local_P, FlatModel(alone).params())


def test_delta_is_local_minus_global_and_the_global_vector_is_not_written(module):
    model = FlatModel(module)
    params_P = model.params()
    before_P = params_P.clone()
    assert params_P.dtype == model.dtype == master_dtype(model.entries) and len(params_P) == model.num_shared
    train(module, optimizer=torch.optim.SGD, momentum=0.9)
    tensors = module.state_dict()
    expected_P = by_hand(model, tensors) - before_P
    assert torch.equal(model.take_delta(params_P), expected_P)
    assert torch.equal(params_P, before_P) and expected_P.abs().max() > 0


def by_hand(model, tensors):
    """One vector per dtype, names in the order of the state_dict."""
    shared = [e for e in model.entries if e.kind == "shared"]
    dtypes = list(dict.fromkeys(e.dtype for e in shared))
    return torch.cat([tensors[e.name].reshape(-1).to(model.dtype) for d in dtypes for e in shared if e.dtype == d])


MIXED = {
    **MODULES,
    "fp16": lambda: mixed(torch.float16, torch.float16),
    "bf16 and float64": lambda: mixed(torch.bfloat16, torch.float64),
}


@pytest.mark.parametrize("shared", ["all", "trainable", ["*", "!*bias"]])
@pytest.mark.parametrize("name", MIXED)
def test_a_delta_is_what_was_trained_minus_what_was_loaded_in_every_round(name, shared):
    torch.manual_seed(1)
    model = with_vectors(MIXED[name](), shared, [Auxiliary("control")])
    params_P = model.params()
    for number in range(3):
        params_P += 1e-4 * torch.randn(params_P.shape, dtype=params_P.dtype)  # below the resolution of half precision
        before_P = params_P.clone()
        model.load(params_P)
        loaded_P = by_hand(model, model.module.state_dict())
        assert not model.take_delta(params_P)[: model.num_shared].any(), "a step of nothing is a delta of nothing"
        model.load(params_P)
        train(model.module, steps=1 + number)
        moved_P = by_hand(model, model.module.state_dict()) - loaded_P
        delta_P = model.take_delta(params_P)
        assert moved_P.any() and torch.equal(delta_P[: model.num_shared], moved_P)
        model.layout.of(delta_P, "control").fill_(number)
        assert (delta_P[model.num_shared :] == number).all()
        assert torch.equal(params_P, before_P)
        assert torch.equal(model.as_loaded(params_P), loaded_P)
        params_P += moved_P


def test_integer_buffers_keep_their_dtype_with_a_silo():
    module = nn.Linear(2, 2)
    module.register_buffer("table", torch.arange(1000).to(torch.uint8))
    module.register_buffer("calls", torch.tensor([1 << 40]))
    module.register_buffer("seen", torch.tensor([True, False, True]))
    model = FlatModel(module)
    kept = model.personal()
    assert sum(t.nbytes for t in kept.values()) == 1000 + 8 + 3
    assert {name: t.dtype for name, t in model.named(model.params(), kept).items() if not t.is_floating_point()} == {
        "table": torch.uint8,
        "calls": torch.int64,
        "seen": torch.bool,
    }
    for tensor in (module.table, module.calls, module.seen):
        tensor.zero_()
    model.load_personal(kept)
    assert module.table.tolist() == [i % 256 for i in range(1000)]
    assert module.calls.tolist() == [1 << 40] and module.seen.tolist() == [True, False, True]


def test_load_then_params_is_the_identity_and_params_is_a_copy(module):
    model = FlatModel(module)
    params_P = model.params()
    train(module)
    model.load(params_P)
    assert torch.equal(model.params(), params_P)
    assert not torch.equal(model.params(), params_P.fill_(7.0))


@pytest.mark.parametrize(("name", "bits"), [("bf16", 32), ("bf16 and float32", 32), ("float32 and float64", 64)])
def test_master_parameters_of_half_precision_models_are_float32(name, bits):
    assert FlatModel(MODULES[name]()).params().dtype.itemsize == bits // 8


def test_float_buffers_of_batch_norm_are_shared_and_its_counter_stays_local():
    module = MODULES["batch norm"]()
    model = FlatModel(module)
    kinds = {e.name: e.kind for e in model.entries}
    assert kinds["1.running_mean"] == kinds["1.running_var"] == kinds["1.weight"] == "shared"
    assert kinds["1.num_batches_tracked"] == "integers" and model.num_shared == 15 + 5 + 4 * 5 + 12
    params_P = model.params()
    train(module, steps=4)
    kept = model.personal()
    assert kept["fedmpi/integers_int64"].tolist() == [4] and len(kept) == 1
    model.load(params_P)
    assert module[1].running_mean.abs().max() == 0 and int(module[1].num_batches_tracked) == 4
    model.load_personal(model.first_personal)
    assert int(module[1].num_batches_tracked) == 0
    few = entries(module, "trainable")
    assert {e.name for e in few if e.kind == "personal"} == {"1.running_mean", "1.running_var"}


def test_tied_weights_are_sent_once_and_stay_tied():
    model = FlatModel(Tied())
    module = model.module
    assert [e.name for e in model.entries] == ["embed.weight", "body.weight", "body.bias", "out.bias"]
    model.load(torch.arange(model.num_shared, dtype=torch.float32))
    train(module, steps=1, lr=1e-3)
    assert module.out.weight is module.embed.weight
    assert module.out.weight.data_ptr() == module.embed.weight.data_ptr()


def test_frozen_parameters_are_sent_with_all_and_stay_where_they_are_otherwise():
    module = frozen()
    assert FlatModel(copy.deepcopy(module)).num_shared == 16 + 10
    model = FlatModel(module, "trainable")
    assert model.num_shared == 10 and [e.kind for e in model.entries] == ["rest", "rest", "shared", "shared"]
    before, params_P = module[0].weight.clone(), model.params()
    train(module)
    model.load(params_P * 0)
    assert torch.equal(module[0].weight, before) and model.personal() == {}


@pytest.mark.parametrize(
    ("patterns", "shared"),
    [
        (["*"], {"a.weight", "a.bias", "b.weight", "b.bias"}),
        (["*", "!b.*"], {"a.weight", "a.bias"}),
        (["*", "!b.*", "b.bias"], {"a.weight", "a.bias", "b.bias"}),
        (["!b.*", "*"], {"a.weight", "a.bias", "b.weight", "b.bias"}),
        (["?.bias"], {"a.bias", "b.bias"}),
        (("a.*",), {"a.weight", "a.bias"}),
    ],
)
def test_the_last_pattern_that_matches_decides(patterns, shared):
    found = entries(MODULES["float64"](), patterns)
    assert {e.name for e in found if e.kind == "shared"} == shared
    assert {e.kind for e in found} <= {"shared", "personal"}
    assert num_shared(found) == sum(e.num_elements for e in found if e.name in shared)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["a.*", "c.*"], "exchange.parameters: 'c.*' matches no parameter"),
        (["*", "!haed.weight"], "exchange.parameters: '!haed.weight' matches no parameter"),
        (["a.wieght"], "exchange.parameters: 'a.wieght' matches no parameter; did you mean 'a.weight'?"),
        (["!*"], "exchange.parameters: nothing of the model is shared"),
        ([], "exchange.parameters: nothing of the model is shared"),
    ],
)
def test_a_pattern_for_nothing_and_a_model_of_which_nothing_is_shared_are_refused(patterns, says):
    with pytest.raises(ConfigError) as caught:
        entries(MODULES["float64"](), patterns)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shared", ["all", "trainable", ["*", "!*weight"], ["*bias"]])
def test_personal_parts_take_turns_in_one_model(module, shared):
    model = FlatModel(module, shared)
    params_P, kept = model.params(), {}
    for silo, steps in (("a", 1), ("b", 3)):
        model.load(params_P)
        model.load_personal(model.first_personal)
        train(module, steps)
        kept[silo] = (model.personal(), saved(module))
    for silo in ("a", "b", "a"):
        own, state = kept[silo]
        model.load_personal(own)
        mine = {e.name for e in model.entries if e.kind in ("personal", "integers")}
        assert all(torch.equal(module.state_dict()[name], state[name]) for name in mine)
        assert same(model.personal(), own)
    model.load(params_P)  # shared parameters do not touch personal ones
    assert same(model.personal(), kept["a"][0])


def test_signature_tells_models_apart_by_name_dtype_shape_and_kind():
    assert signature(entries(MODULES["plain"]()))["0.weight"] == ["float32", [5, 3], "shared"]
    assert signature(entries(MODULES["plain"](), ["0.*"]))["2.bias"] == ["float32", [2], "personal"]
    assert "0.weight" not in signature(entries(frozen(), "trainable"))


def test_sha256_is_of_the_little_endian_bytes():
    vector = torch.tensor([0.0, 1.0, -2.5])
    expected = hashlib.sha256(struct.pack("<3f", 0.0, 1.0, -2.5)).hexdigest()
    assert sha256(vector) == sha256(torch.tensor([[0.0, 9], [1, 9], [-2.5, 9]])[:, 0]) == expected
    assert sha256(vector.double()) != expected != sha256(vector.nextafter(vector + 1))


def test_where_what_is_not_trained_lies():
    module = MODULES["batch norm"]()
    for shared in ("all", ["*", "!0.*"]):
        model = FlatModel(module, shared)
        marked_P = torch.zeros(model.num_shared, dtype=model.dtype)
        for part in model.layout.averaged:
            marked_P[part] = 1.0
        buffers = ("1.running_mean", "1.running_var")
        assert all(bool(v.all() if name in buffers else not v.any()) for name, v in model.shared(marked_P).items())
        assert len(model.layout.averaged) == 1  # they are adjacent
    module = MODULES["batch norm"]()
    module[0].weight.requires_grad_(False)
    assert FlatModel(module).layout.averaged[0] == slice(0, module[0].weight.numel())


# ---------------------------------------------------------------- a model that is known to hold the parameters


@pytest.fixture
def large(monkeypatch):
    """Every model counts as a large one."""
    monkeypatch.setattr(flat, "COMPILED", 1)


def marked():
    """A model that holds params_P, and a mark in its memory that torch did not count and a copy would wipe out."""
    model = FlatModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    params_P = model.params()
    model.hold(params_P)
    model._shared[0].numpy()[0] = 77.0
    return model, params_P


def is_marked(model):
    return float(model.params()[0]) == 77.0


def test_parameters_that_the_model_holds_are_not_copied_again(large):
    model, params_P = marked()
    model.load(params_P)
    assert is_marked(model)
    model.load(params_P)  # training may have written since
    assert not is_marked(model)


def written(model, params_P):
    with torch.no_grad():
        next(model.module.parameters()).add_(1)


def counted(model, params_P):
    model.module.train()(torch.randn(8, 3))  # batch statistics


def rebound(model, params_P):
    model.module[0].bias.data = model.module[0].bias.data.clone()


@pytest.mark.parametrize(
    "spoil",
    [
        written,
        counted,
        rebound,
        lambda model, params_P: params_P.mul_(1),
        lambda model, params_P: params_P[2:].mul_(1),
        lambda model, params_P: model.hand_out(),
        lambda model, params_P: model.release(),
        lambda model, params_P: model.take_delta(params_P),
        lambda model, params_P: model.load(params_P.clone()),
        lambda model, params_P: model.leave(),
    ],
    ids=[
        "model",
        "statistics",
        "rebound",
        "vector",
        "part of it",
        "handed out",
        "released",
        "spent",
        "others loaded",
        "moved",
    ],
)
def test_they_are_copied_where_either_may_have_been_written(large, spoil):
    model, params_P = marked()
    spoil(model, params_P)
    model.load(params_P)
    assert not is_marked(model)


def test_statistics_that_a_forward_pass_updates_are_noticed():
    model = FlatModel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model.load(model.params())
    model.module.eval()(torch.randn(8, 3))
    assert not model.touched
    model.module.train()(torch.randn(8, 3))  # torch does not count this write
    assert model.touched


def test_other_memory_with_the_same_values_is_copied(large):
    model, params_P = marked()
    model.load(params_P.clone())
    assert not is_marked(model)


def test_a_module_that_was_handed_out_is_never_taken_to_hold_them(large):
    model, params_P = marked()
    assert model.hand_out() is model.module
    model.hold(params_P)
    model.load(params_P)
    assert not is_marked(model)


def test_a_model_of_half_precision_loads_every_time(large):
    model = FlatModel(nn.Linear(3, 4).half())
    params_P = model.params()
    model.hold(params_P)
    model._shared[0].numpy()[0] = 77.0
    model.load(params_P)
    assert not is_marked(model)


def test_a_small_model_loads_every_time():
    model, params_P = marked()
    model.load(params_P)
    assert not is_marked(model)


def test_a_module_stays_handed_out_when_a_run_makes_its_flat_model_anew(large):
    module = nn.Linear(3, 4)
    FlatModel(module).hand_out()
    again = FlatModel(module)
    params_P = again.params()
    again.hold(params_P)
    again._shared[0].numpy()[0] = 77.0
    again.load(params_P)
    assert not is_marked(again)
