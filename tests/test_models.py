"""Models: one contract for the family, published parameter counts, and the messages when shapes disagree."""

import pytest
import torch

from fedmpi.components import to_dict
from fedmpi.errors import ConfigError
from fedmpi.models import MODELS, make
from fedmpi.types import SiloData, Source


def source(task="classification", shape=(1, 28, 28), num_classes=10):
    return Source(
        task=task, shape=shape, num_classes=num_classes, silos=(), open=lambda silo: SiloData(*[torch.zeros(0)] * 4)
    )


TEXT = source("next_token", (12,), 65)
SMALL = {"resnet18": {"width": 8}, "transformer": {"width": 16, "layers": 2, "heads": 2}}
FITS = {
    name: [TEXT]
    if name == "transformer"
    else [
        source(),
        source("binary", num_classes=1),
        source("regression", num_classes=1),
        source("regression", num_classes=3),
    ]
    for name in MODELS.members
}
CASES = [pytest.param(name, data, id=f"{name}-{data.task}-{data.num_classes}") for name in FITS for data in FITS[name]]


def build(name, data, **options):
    return make(MODELS.build({"name": name, **options}, "model"), data)


def samples(data, num_samples=5):
    rng = torch.Generator().manual_seed(0)
    if data.task == "next_token":
        return torch.randint(data.num_classes, (num_samples, *data.shape), generator=rng)
    return torch.randn(num_samples, *data.shape, generator=rng)


def count(name, data, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in build(name, data, **options).parameters())


@pytest.mark.parametrize("name", MODELS.members)
def test_mapping_round_trip(name):
    model = MODELS.build({"name": name, **SMALL.get(name, {})}, "model")
    assert MODELS.build({"name": name, **to_dict(model)}, "model") == model


@pytest.mark.parametrize(("name", "data"), CASES)
def test_outputs_have_the_shape_of_the_task(name, data):
    outputs = build(name, data, **SMALL.get(name, {}))(samples(data))
    last = () if data.num_classes == 1 else (data.num_classes,)
    assert outputs.shape == (5, *(data.shape if data.task == "next_token" else ()), *last)
    assert outputs.dtype == torch.float32


@pytest.mark.parametrize(("name", "data"), CASES)
def test_gradient_reaches_every_parameter(name, data):
    model = build(name, data, **SMALL.get(name, {}))
    model(samples(data)).square().sum().backward()
    for param_name, param in model.named_parameters():
        assert param.grad is not None and bool(param.grad.any()), param_name


@pytest.mark.parametrize(("name", "data"), CASES)
def test_meta_build_holds_no_memory_and_has_the_same_parameters(name, data):
    with torch.device("meta"):
        empty = build(name, data, **SMALL.get(name, {}))
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    shapes = [(n, p.shape) for n, p in build(name, data, **SMALL.get(name, {})).named_parameters()]
    assert shapes == [(n, p.shape) for n, p in empty.named_parameters()]


@pytest.mark.parametrize("name", MODELS.members)
def test_the_seed_decides_the_first_parameters(name):
    def first(seed):
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(build(name, FITS[name][0], **SMALL.get(name, {})).parameters())

    with torch.random.fork_rng():
        assert torch.equal(first(1), first(1))
        assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("name", "data", "options", "num_params"),
    [
        ("logistic", source("binary", (13,), 1), {}, 14),
        ("logistic", source(), {}, 7_850),
        ("mlp", source(), {}, 199_210),  # McMahan et al. 2017: the 2NN
        ("mlp", source("regression", (4,), 2), {"hidden": []}, 10),
        ("cnn", source(), {}, 44_426),  # NIID-Bench on Fashion-MNIST
        ("cnn", source(shape=(3, 32, 32)), {}, 62_006),  # NIID-Bench on CIFAR-10
        ("resnet18", source(shape=(3, 224, 224), num_classes=1000), {"stem": "imagenet"}, 11_689_512),
        ("resnet18", source(shape=(3, 32, 32)), {}, 11_173_962),
        ("transformer", TEXT, {"width": 16, "layers": 2}, 65 * 16 + 12 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16),
        ("transformer", source("next_token", (1024,), 50_257), {"width": 768, "layers": 12, "heads": 12}, 124_439_808),
    ],
)
def test_number_of_parameters(name, data, options, num_params):
    assert count(name, data, **options) == num_params


@pytest.mark.parametrize(("stem", "side", "left"), [("cifar", 32, 4), ("imagenet", 224, 7)])
def test_resnet_stages_halve_the_image_as_in_the_paper(stem, side, left):
    data = source(shape=(3, side, side))
    with torch.device("meta"):
        model = build("resnet18", data, stem=stem)
        assert model[:-3](torch.empty(2, *data.shape)).shape == (2, 512, left, left)


def test_untied_output_layer_and_longer_context_add_their_own():
    assert count("transformer", TEXT, tied=False) - count("transformer", TEXT) == 65 * 128
    assert count("transformer", TEXT, context=20) - count("transformer", TEXT) == 8 * 128


def test_transformer_sees_no_later_symbol():
    model = build("transformer", TEXT, **SMALL["transformer"])
    x = samples(TEXT)
    y = x.clone()
    y[:, 7:] = (y[:, 7:] + 1) % 65
    before, after = model(x), model(y)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(-1).any()


def test_transformer_takes_shorter_samples():
    assert build("transformer", TEXT, **SMALL["transformer"])(samples(TEXT)[:, :4]).shape == (5, 4, 65)


def test_cnn_on_digits_with_padding():
    digits = source(shape=(1, 8, 8))
    assert build("cnn", digits, padding=2)(samples(digits)).shape == (5, 10)


@pytest.mark.parametrize(
    ("value", "data", "message"),
    [
        (
            {"name": "logistic", "inputs": 13},
            source("binary", (12,), 1),
            "model.inputs is 13 but samples have 12 values",
        ),
        ({"name": "mlp", "classes": 3}, source(), "model.classes is 3 but the data have 10 classes"),
        ({"name": "cnn", "inputs": 3}, source(), "model.inputs is 3 but images have 1 channel"),
        (
            {"name": "cnn"},
            source(shape=(1, 8, 8)),
            "images of 8x8 are too small for two convolutions of 5x5; padding 2",
        ),
        ({"name": "cnn"}, source(shape=(13,)), r"needs images \[channels, height, width\], samples are \[13\]"),
        ({"name": "mlp"}, TEXT, "take the transformer"),
        ({"name": "transformer"}, source(), "the transformer is for next_token, the data's task is classification"),
        ({"name": "transformer", "context": 8}, TEXT, "model.context is 8 but samples have 12 symbols"),
        ({"name": "transformer", "heads": 3}, TEXT, "heads is 3, which does not divide the width 128"),
        ({"name": "resnet18", "groups": 3}, source(), "groups is 3, which does not divide the width 64"),
        ({"name": "mlp", "activation": "swish"}, source(), "model.activation: input should be 'relu', 'gelu'"),
        ({"name": "torch.nn:Identiti"}, source(), "cannot import 'torch.nn:Identiti'"),
        ({"name": "math:sqrt"}, source(), "model: 'math:sqrt'|model: 'sqrt'"),
        ({"name": "collections:Counter"}, source(), "Counter is no torch module"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(value, data, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(MODELS.build(value, "model"), data)
    assert "\n" not in str(caught.value)


def test_smallest_padding_that_is_named_is_enough():
    for side in range(1, 20):
        data = source(shape=(1, side, side))
        try:
            build("cnn", data)
        except ConfigError as error:
            padding = int(str(error).split("padding ")[-1].split()[0])
            build("cnn", data, padding=padding)(samples(data))
            with pytest.raises(ConfigError):
                build("cnn", data, padding=padding - 1)


def test_your_own_factory_and_component(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "import torch\n"
        "from fedmpi.components import component\n"
        "def factory(width): return torch.nn.Linear(width, 2)\n"
        "@component\n"
        "class Wide:\n"
        "    width: int = 3\n"
        "    def build(self, source): return torch.nn.Linear(source.shape[0], self.width)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    factory = MODELS.build({"name": "own_models:factory", "width": 4}, "model")
    module = make(factory, source())
    assert isinstance(module, torch.nn.Linear) and module.in_features == 4
    assert make(factory, source()) is not module
    with torch.device("meta"):
        assert make(factory, source()).weight.is_meta
    assert make(module, source()) is module
    wide = make(MODELS.build("own_models:Wide", "model"), source(shape=(7,)))
    assert (wide.in_features, wide.out_features) == (7, 3)
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        MODELS.build({"name": "own_models:factory", "widht": 4}, "model")
