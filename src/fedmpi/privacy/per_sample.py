"""The sum of clipped gradients of single samples: sum_i g_i min(1, C / |g_i|).

    clipped_sum   any model, by torch.func: one gradient per sample, vectorised
    fast          linear layers and convolutions in sequence: one backward pass; the gradient of a sample is formed
                  only where that is small, and a linear layer's norm follows from its input and its output's gradient
                  (ghost clipping, Goodfellow 2015; book-keeping, Bu et al. 2023)

Losses are taken sample by sample, so no sample has a part in another one's gradient. A gradient that is not finite
counts as zero. N samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Tensors = list[torch.Tensor]

CHUNK = 64  # samples whose gradients are in memory at once, in the general case
UNFOLDED_BYTES = 1 << 19  # of a convolution's unfolded inputs, which are formed chunk by chunk to stay in the cache
SHAVED = 1 - 1e-6  # of the clip, so that rounding cannot lift a norm above it

# Modules without parameters that treat every sample by itself.
ALONE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Identity, nn.Flatten),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout),
)
OURS = ("_Outputs", "_ChannelsLast")  # the same, of fedmpi.models


def is_fast(module: nn.Module, trained: Sequence[nn.Parameter]) -> bool:
    """Whether `fast` is exact for the module: a sequence of known layers whose trained parameters all are weights and
    biases of its linear layers and convolutions, each used once."""
    if not isinstance(module, nn.Sequential):
        return False
    layers = [part for part in module.modules() if not isinstance(part, nn.Sequential)]
    if type(module).forward is not nn.Sequential.forward or len({*map(id, layers)}) != len(_leaves(module)):
        return False
    own = [id(param) for layer in layers if _summed(layer) for param in layer.parameters(recurse=False)]
    if len(own) != len({*own}) or not {id(param) for param in trained} <= {*own}:
        return False
    return all(_summed(layer) or type(layer) in ALONE or _is_ours(layer) for layer in layers)


def _leaves(module: nn.Sequential) -> list[nn.Module]:
    """The layers in order, with repetitions."""
    found: list[nn.Module] = []
    for part in module:
        found += _leaves(part) if isinstance(part, nn.Sequential) else [part]
    return found


def _is_ours(layer: nn.Module) -> bool:
    return type(layer).__module__ == "fedmpi.models" and type(layer).__name__ in OURS


def _summed(layer: nn.Module) -> bool:
    """Whether `_Layer` knows the layer."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def losses_of(loss: Loss, outputs_N: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    """The loss of each sample, [N]."""
    one = lambda output, target: loss(output[None], target[None])  # noqa: E731
    losses_N: torch.Tensor = torch.func.vmap(one)(outputs_N, y_N)
    return losses_N


def factors(squares_N: torch.Tensor, clip: float) -> torch.Tensor:
    """min(1, C / norm) from squares of norms, [N]; 0 where that is not finite."""
    factors_N = (clip * SHAVED / squares_N.sqrt()).clamp(max=1.0)
    return torch.where(squares_N.isfinite(), factors_N, 0.0)


def row_squares(part_NP: torch.Tensor) -> torch.Tensor:
    """The squared norm of each row, float64 [N]."""
    if part_NP.device.type != "cpu" or part_NP.dtype != torch.float32:
        return part_NP.double().square().sum(1)
    from fedmpi.kernels import vectors  # imported here, because numba takes a second to load

    squares_N = torch.empty(len(part_NP), dtype=torch.float64)
    vectors.squares(part_NP.detach().contiguous().numpy(), squares_N.numpy())
    return squares_N


# ---------------------------------------------------------------- any model


def clipped_sum(
    module: nn.Module, trained: Sequence[nn.Parameter], loss: Loss, x: torch.Tensor, y: torch.Tensor, clip: float
) -> Tensors:
    """The sum of the clipped gradients, one tensor per trained parameter."""
    names = {id(param): name for name, param in module.named_parameters()}
    fixed = {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers())}
    own = {names[id(param)]: param.detach() for param in trained}

    def of_one(params: dict[str, torch.Tensor], x_1: torch.Tensor, y_1: torch.Tensor) -> torch.Tensor:
        return loss(torch.func.functional_call(module, fixed | params, (x_1[None],)), y_1[None])

    gradients = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0), randomness="different")
    total = [torch.zeros_like(param) for param in trained]
    for start in range(0, len(x), CHUNK):
        with warnings.catch_warnings():  # an operation that torch batches one by one
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found = gradients(own, x[start : start + CHUNK], y[start : start + CHUNK])
        parts = [found[names[id(param)]].flatten(1) for param in trained]
        squares_N = torch.stack([row_squares(part) for part in parts]).sum(0)
        factors_N = factors(squares_N, clip)
        for one, part in zip(total, parts, strict=True):
            one.add_(_weighted(factors_N, part).view_as(one))
    return total


def _weighted(factors_N: torch.Tensor, part_NP: torch.Tensor) -> torch.Tensor:
    """sum_n f_n part_n; a sample with factor 0 counts as zero even if it is not finite."""
    if bool((factors_N == 0).any()):
        part_NP = torch.where((factors_N == 0)[:, None], 0.0, part_NP)
    return factors_N.to(part_NP) @ part_NP


# ---------------------------------------------------------------- linear layers and convolutions


class _Layer:
    """A layer's inputs and the gradient of its outputs, sample by sample."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.inputs = self.outgoing = torch.empty(0)
        self._whole: torch.Tensor | None = None  # gradients of the weight, [N, out, in]

    def keep(self, layer: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Forward hook."""
        self.inputs = given[0].detach()
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(self._take)  # type: ignore[no-untyped-call]

    def _take(self, gradient: torch.Tensor) -> None:
        self.outgoing = gradient

    def squares(self) -> torch.Tensor:
        """The squared norm of each sample's gradient, float64 [N]."""
        weight, bias = self.layer.weight.requires_grad, self.layer.bias is not None and self.layer.bias.requires_grad
        inputs, outgoing = self.inputs, self.outgoing
        squares_N = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
        if isinstance(self.layer, nn.Conv2d):
            outgoing = outgoing.flatten(2).transpose(1, 2)
        elif inputs.ndim > 2:
            inputs, outgoing = inputs.flatten(1, -2), outgoing.flatten(1, -2)
        self.inputs, self.outgoing = inputs, outgoing
        if weight and inputs.ndim == 2:
            squares_N += row_squares(inputs) * row_squares(outgoing)
        elif weight:
            self._whole = self._of_weight()
            squares_N += row_squares(self._whole.flatten(1))
        if bias:
            squares_N += row_squares(self._of_bias())
        return squares_N

    def _of_weight(self) -> torch.Tensor:
        if not isinstance(self.layer, nn.Conv2d):
            return self.outgoing.transpose(1, 2) @ self.inputs
        conv, num, outgoing = self.layer, len(self.inputs), self.outgoing.transpose(1, 2)
        assert not isinstance(conv.padding, str)
        length = conv.weight[0].numel()
        whole = outgoing.new_empty(num, conv.out_channels, length)
        step = max(1, UNFOLDED_BYTES // max(1, length * outgoing.shape[2] * outgoing.element_size()))
        for start in range(0, num, step):
            part = slice(start, start + step)
            about = (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
            unfolded = nn.functional.unfold(self.inputs[part], *about)
            torch.bmm(outgoing[part], unfolded.transpose(1, 2), out=whole[part])
        return whole

    def _of_bias(self) -> torch.Tensor:
        return self.outgoing if self.outgoing.ndim == 2 else self.outgoing.sum(1)

    def sums(self, factors_N: torch.Tensor) -> dict[int, torch.Tensor]:
        """The sums of the clipped gradients of weight and bias, by id."""
        found: dict[int, torch.Tensor] = {}
        if self.layer.weight.requires_grad:
            if self._whole is None:
                outgoing = torch.where((factors_N == 0)[:, None], 0.0, self.outgoing)
                inputs = torch.where((factors_N == 0)[:, None], 0.0, self.inputs)
                found[id(self.layer.weight)] = (outgoing * factors_N.to(outgoing)[:, None]).T @ inputs
            else:
                found[id(self.layer.weight)] = _weighted(factors_N, self._whole.flatten(1)).view_as(self.layer.weight)
        if self.layer.bias is not None and self.layer.bias.requires_grad:
            found[id(self.layer.bias)] = _weighted(factors_N, self._of_bias())
        return found


def fast(
    module: nn.Module, trained: Sequence[nn.Parameter], loss: Loss, x: torch.Tensor, y: torch.Tensor, clip: float
) -> Tensors:
    """As `clipped_sum`, for a module that `is_fast`."""
    layers = [_Layer(layer) for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    hooks = [one.layer.register_forward_hook(one.keep) for one in layers]
    frozen = [param for param in module.parameters() if param.requires_grad]
    try:
        for param in frozen:  # so that backward passes no gradients of whole batches to them
            param.requires_grad_(False)
        losses_of(loss, module(x), y).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for param in frozen:
            param.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        squares_N = torch.stack([one.squares() for one in layers]).sum(0)
        factors_N = factors(squares_N, clip)
        found: dict[int, torch.Tensor] = {}
        for one in layers:
            found |= one.sums(factors_N)
    return [found[id(param)] for param in trained]
