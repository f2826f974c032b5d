"""The built-in models: components that take their shapes from the data.

    model = make(config.model, source)

| task           | one sample             | outputs               |
|----------------|------------------------|-----------------------|
| classification | any                    | [N, classes] logits   |
| binary         | any                    | [N] logits            |
| regression     | any                    | [N] or [N, targets]   |
| next_token     | [T] int64              | [N, T, symbols] logits |

Bring your own as `model: {name: "package.module:factory", width: 64}`: a class or function that returns a torch module
when it is called with those values, or a component whose `build(source)` also sees the data's shapes.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpi.components import Family, NonNegativeInt, PositiveInt, component
from fedmpi.errors import ConfigError
from fedmpi.types import Source

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def make(model: Any, source: Source) -> nn.Module:
    """The torch module that a component builds for the data; a module is returned as it is.

    Raises ConfigError if there is no torch module, or if its lazy layers cannot take the data's samples.

    >>> import torch
    >>> source = Source("binary", shape=(13,), num_classes=1, silos=(), open=lambda silo: None)
    >>> make(Logistic(), source)(torch.zeros(4, 13)).shape
    torch.Size([4])
    """
    built = model if isinstance(model, nn.Module) or not hasattr(model, "build") else model.build(source)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"model: {type(built).__name__} is no torch module, and has no 'build' that returns one")
    if _lazy(built):
        _fill(built, source)
    return built


def _lazy(module: nn.Module) -> list[str]:
    """Names of parameters and buffers that torch creates at the first forward pass (nn.LazyLinear, ...)."""
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    return [name for name, tensor in named if nn.parameter.is_lazy(tensor)]


def _fill(module: nn.Module, source: Source) -> None:
    """Initialize lazy layers with two zero samples of the data's shape, so that they are equal on every rank."""
    x = torch.zeros((2, *source.shape), dtype=torch.int64 if source.task == "next_token" else torch.float32)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            module(x)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"model: its lazy layers cannot take samples of {list(x.shape[1:])}: {text}") from None
    for part, training in modes:
        part.train(training)
    if still := _lazy(module):
        raise ConfigError(f"model: '{still[0]}' is lazy, and forward passes no sample to it")


@component
class Logistic:
    """Logistic or linear regression: one linear layer that returns logits; parameters are weights, then bias."""

    inputs: PositiveInt | None = None
    """values per sample; null: from the data"""
    classes: PositiveInt | None = None
    """classes, or targets of a regression; null: from the data"""

    def build(self, source: Source) -> nn.Module:
        """Flatten, linear."""
        inputs, outputs = _values(self.inputs, source), _outputs(self.classes, source)
        return _stack(flatten=nn.Flatten(), linear=nn.Linear(inputs, outputs), outputs=_Outputs(source))


@component
class MLP:
    """Linear layers with an activation between them; the default is the 2NN of McMahan et al. 2017, section 3."""

    hidden: tuple[PositiveInt, ...] = (200, 200)
    """widths of the hidden layers"""
    activation: Literal["relu", "gelu", "tanh", "sigmoid"] = "relu"
    """after every hidden layer"""
    inputs: PositiveInt | None = None
    """values per sample; null: from the data"""
    classes: PositiveInt | None = None
    """classes, or targets of a regression; null: from the data"""

    def build(self, source: Source) -> nn.Module:
        """Flatten, hidden layers, linear."""
        widths = [_values(self.inputs, source), *self.hidden]
        layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
        for n, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
            layers |= {f"hidden{n}": nn.Linear(inputs, outputs), f"activation{n}": ACTIVATIONS[self.activation]()}
        linear = nn.Linear(widths[-1], _outputs(self.classes, source))
        return _stack(**layers, linear=linear, outputs=_Outputs(source))


@component
class CNN:
    """The LeNet-like net of Li et al. 2022 (NIID-Bench): 6 and 16 channels of 5x5, fc 120 and 84.

    With 28x28 images of one channel it has the 44,426 parameters of its published Fashion-MNIST results. LeNet-5 (LeCun
    et al. 1998) has other pooling, activations and connections. Images below 16x16 need `padding`.
    """

    kernel: PositiveInt = 5
    """side of both convolutions, pixels"""
    padding: NonNegativeInt = 0
    """zeros around both convolutions' inputs, pixels; 8x8 images need 2"""
    inputs: PositiveInt | None = None
    """channels of an image; null: from the data"""
    classes: PositiveInt | None = None
    """classes, or targets of a regression; null: from the data"""

    def build(self, source: Source) -> nn.Module:
        """Two convolutions, each with 2x2 max pooling and ReLU; three linear layers."""
        channels, height, width = _image(self.inputs, source)
        height_out, width_out = self._side(height, self.padding), self._side(width, self.padding)
        if min(height_out, width_out) < 1:
            enough = next(p for p in range(self.kernel + 2) if self._side(min(height, width), p) >= 1)
            raise ConfigError(
                f"model.padding is {self.padding}: images of {height}x{width} are too small for two convolutions of "
                f"{self.kernel}x{self.kernel}; padding {enough} is enough"
            )
        return _stack(
            layout=_ChannelsLast(),
            conv1=nn.Conv2d(channels, 6, self.kernel, padding=self.padding),
            pool1=nn.MaxPool2d(2),  # before ReLU: same result, a quarter of the work
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 16, self.kernel, padding=self.padding),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * height_out * width_out, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, _outputs(self.classes, source)),
            outputs=_Outputs(source),
        )

    def _side(self, pixels: int, padding: int) -> int:
        """Pixels left of a side after both convolutions; below 1 if the image is too small."""
        for _ in range(2):
            pixels = max(pixels + 2 * padding - self.kernel + 1, 0) // 2
        return pixels


@component
class ResNet18:
    """ResNet-18 (He et al. 2016, table 1) with group normalization (Wu & He 2018) instead of batch normalization.

    Group normalization keeps no statistics of a silo's data, which averaging would mix (Hsieh et al. 2020); two groups
    as in Reddi et al. 2021. The cifar stem is one 3x3 convolution without pooling; the imagenet stem is the paper's.
    """

    stem: Literal["cifar", "imagenet"] = "cifar"
    """first layers: cifar is 3x3; imagenet is 7x7 with stride 2, then pooling"""
    groups: PositiveInt = 2
    """number of channel groups, each normalized together; divides `width`"""
    width: PositiveInt = 64
    """channels of the first stage; doubled three times"""
    inputs: PositiveInt | None = None
    """channels of an image; null: from the data"""
    classes: PositiveInt | None = None
    """classes, or targets of a regression; null: from the data"""

    def __post_init__(self) -> None:
        if self.width % self.groups:
            raise ValueError(f"groups is {self.groups}, which does not divide the width {self.width}")

    def build(self, source: Source) -> nn.Module:
        """Stem, eight residual blocks in four stages, mean over pixels, linear."""
        channels, _, _ = _image(self.inputs, source)
        side, stride = (3, 1) if self.stem == "cifar" else (7, 2)
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(channels, self.width, side, stride, padding=side // 2, bias=False),
            "norm": nn.GroupNorm(self.groups, self.width),
            "relu": nn.ReLU(),
        }
        if self.stem == "imagenet":
            layers["pool"] = nn.MaxPool2d(3, 2, padding=1)
        before = self.width
        for stage in range(4):
            after = self.width << stage
            layers[f"stage{stage + 1}a"] = _Residual(before, after, 1 if stage == 0 else 2, self.groups)
            layers[f"stage{stage + 1}b"] = _Residual(after, after, 1, self.groups)
            before = after
        linear = nn.Linear(before, _outputs(self.classes, source))
        return _stack(**layers, mean=_PixelMean(), linear=linear, outputs=_Outputs(source))


@component
class Transformer:
    """A decoder-only transformer (Vaswani et al. 2017) with the layout of GPT-2 (Radford et al. 2019).

    Layer normalization before each part, learned positions, GELU, hidden width 4 x width, no dropout.
    """

    layers: PositiveInt = 4
    """number of blocks"""
    heads: PositiveInt = 4
    """attention heads per block; divides `width`"""
    width: PositiveInt = 128
    """size of a symbol's embedding"""
    context: PositiveInt | None = None
    """longest input, symbols; null: as long as the samples"""
    tied: bool = True
    """whether the embedding is also the output layer (Press & Wolf 2017)"""
    classes: PositiveInt | None = None
    """symbols of the vocabulary; null: from the data"""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}, which does not divide the width {self.width}")

    def build(self, source: Source) -> nn.Module:
        """Embedding, blocks, normalization, logits."""
        if source.task != "next_token":
            raise ConfigError(f"model: the transformer is for next_token, the data's task is {source.task}")
        context = self.context or source.shape[0]
        if context < source.shape[0]:
            raise ConfigError(f"model.context is {context} but samples have {source.shape[0]} symbols")
        return _Transformer(self, _outputs(self.classes, source), context)


class _Outputs(nn.Module):
    """[N, 1] becomes [N] if the task has one output."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.single = source.task == "binary" or (source.task == "regression" and source.num_classes == 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(-1) if self.single else x


class _ChannelsLast(nn.Module):
    """Stores images with channels innermost on a CPU, where few channels and small kernels then take half the time.

    The layers that follow keep that order; parameters keep theirs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return x
        x = x.contiguous(memory_format=torch.channels_last)
        # With one channel both layouts have the same memory, so set the strides explicitly.
        return x.as_strided(x.shape, (*x.stride()[:1], 1, *x.stride()[2:])) if x.shape[1] == 1 else x


class _PixelMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


class _Residual(nn.Module):
    """The basic block: two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride != 1:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = _stack(conv=conv, norm=nn.GroupNorm(groups, after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut: Tensor = self.shortcut(x)
        return F.relu(y + shortcut)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.attend(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # each [N, heads, T, width / heads]
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(y.transpose(1, 2).flatten(-2))
        out: Tensor = x + self.narrow(F.gelu(self.widen(self.norm2(x))))
        return out


class _Transformer(nn.Module):
    def __init__(self, options: Transformer, num_symbols: int, context: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, options.width)
        self.positions = nn.Embedding(context, options.width)
        self.blocks = nn.Sequential(*(_Block(options.width, options.heads) for _ in range(options.layers)))
        self.norm = nn.LayerNorm(options.width)
        self.head = None if options.tied else nn.Linear(options.width, num_symbols, bias=False)
        for name, param in self.named_parameters():
            if param.dim() == 2:  # GPT-2: 0.02, less for layers that add to the residual stream
                adds = name.endswith(("attended.weight", "narrow.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * options.layers) if adds else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.symbols(x) + self.positions.weight[: x.shape[1]]))
        return F.linear(x, self.symbols.weight if self.head is None else self.head.weight)


def _stack(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _same(field: str, given: int | None, actual: int, who: str, what: str) -> int:
    """`actual`. Raises ConfigError if `given` differs."""
    if given is not None and given != actual:
        raise ConfigError(f"model.{field} is {given} but {who} {actual} {what}")
    return actual


def _outputs(classes: int | None, source: Source) -> int:
    what = {"classification": "classes", "next_token": "symbols", "regression": "targets", "binary": "output"}
    return _same("classes", classes, source.num_classes, "the data have", what[source.task])


def _values(inputs: int | None, source: Source) -> int:
    if source.task == "next_token":
        raise ConfigError("model: this model takes whole samples; for next_token take the transformer")
    return _same("inputs", inputs, math.prod(source.shape), "samples have", "values")


def _image(inputs: int | None, source: Source) -> tuple[int, int, int]:
    if len(source.shape) != 3 or source.task == "next_token":
        raise ConfigError(f"model: this one needs images [channels, height, width], samples are {list(source.shape)}")
    channels, height, width = source.shape
    return _same("inputs", inputs, channels, "images have", "channels"), height, width


# Members have `build(source)`, which returns a new module for the data. torch's generator decides its values, torch's
# default device its place.
MODELS = Family(
    "model",
    {"logistic": Logistic, "mlp": MLP, "cnn": CNN, "resnet18": ResNet18, "transformer": Transformer},
    deferred=True,
)
