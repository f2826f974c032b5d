"""Pretrained parameters to start from.

init: body.safetensors                                     names and shapes equal the model's
init: {path: body.pt, strict: false, prefix: "body."}      takes the tensors that fit: a body, with a new head
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedmpi.components import component
from fedmpi.errors import ConfigError

_SHOWN = 3  # names of a kind in a message


@component
class InitSection:
    """A file of parameters to start from."""

    path: str
    """.safetensors, or a torch file of a state_dict (.pt, .pth, .bin); no code in it is run"""
    strict: bool = True
    """names and shapes must equal the model's; false: take the tensors that fit, report the others"""
    prefix: str = ""
    """prefix that the model's names have and the file's lack, such as "body."; or the other way round"""


def start(module: torch.nn.Module, init: str | InitSection) -> str:
    """Load the file's tensors into the module. Returns a line about tensors left out, or an empty string. Raises
    ConfigError if they do not fit."""
    ready, told = fitting(module, init)
    module.load_state_dict(ready, strict=False)
    return told


def fitting(module: torch.nn.Module, init: str | InitSection) -> tuple[dict[str, Tensor], str]:
    """The file's tensors by the module's names (tied tensors under each of their names), and a line about tensors left
    out.

    The module may be on the meta device. Raises ConfigError if the file cannot be read or does not fit.
    """
    init = init if isinstance(init, InitSection) else InitSection(path=init)
    wanted = {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    given = _renamed(_read(Path(init.path)), wanted, init.prefix)
    where = f"init: {init.path}"
    ready: dict[str, Tensor] = {}
    missing, other_shape = [], []
    for names in _by_memory(wanted):
        found = [name for name in names if name in given]
        for name in found[1:]:
            if not torch.equal(given[name], given[found[0]]):
                raise ConfigError(f"{where}: '{found[0]}' and '{name}' are one tensor in the model and differ there")
        if not found:
            missing += [name for name in names[:1] if not name.endswith("num_batches_tracked")]  # absent in old files
        elif not _alike(given[found[0]], wanted[found[0]]):
            other_shape.append(f"{found[0]} (there {_kind(given[found[0]])}, in the model {_kind(wanted[found[0]])})")
        else:
            ready |= dict.fromkeys(names, given[found[0]])
    left = [name for name in given if name not in wanted]
    if not (missing or other_shape or left):
        return ready, ""
    told = "; ".join(
        f"{what} {_some(names)}"
        for what, names in (("the file lacks", missing), ("differs:", other_shape), ("the model lacks", left))
        if names
    )
    if init.strict or not ready:
        advice = _advice(_read(Path(init.path)), wanted, init, len(ready))
        raise ConfigError(f"{where} fits {len(ready)} of the model's {len(wanted)} tensors: {told}{advice}")
    return ready, f"{where}: {len(ready)} of the model's {len(wanted)} tensors are loaded; {told}"


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, by name."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK") or None)
    except OSError as error:
        raise ConfigError(f"init: {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise ConfigError(f"init: {path} is neither a safetensors nor a torch file") from None
        raise ConfigError(
            f"init: {path} holds more than tensors (a whole module?); save model.state_dict() instead"
        ) from None
    except Exception as error:  # safetensors and torch raise many types for damaged files
        raise ConfigError(f"init: {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return _tensors(held, path)


def _tensors(held: object, path: Path) -> dict[str, Tensor]:
    """The state_dict in a torch file: the whole file, or its only entry that is one (beside epochs, optimizers)."""
    if isinstance(held, Mapping):
        tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
        inner = [
            v for v in held.values() if isinstance(v, Mapping) and v and all(isinstance(t, Tensor) for t in v.values())
        ]
        if not tensors and len(inner) == 1:
            tensors = {str(name): value for name, value in inner[0].items()}
        if tensors:
            return tensors
    raise ConfigError(f"init: {path} holds no state_dict (names and tensors); save model.state_dict()")


def _renamed(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The file's tensors with the prefix added or removed, whichever fits more of the model's names."""
    if not prefix:
        return dict(given)
    prefix = prefix.removesuffix(".") + "."
    longer = {prefix + name: tensor for name, tensor in given.items()}
    shorter = {name.removeprefix(prefix): t for name, t in given.items() if name.startswith(prefix)}
    rest = {name: t for name, t in given.items() if not name.startswith(prefix) and name not in shorter}
    return longer if _num_fit(longer, wanted) > _num_fit(shorter, wanted) else shorter | rest


def _num_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> int:
    return sum(name in wanted and _alike(tensor, wanted[name]) for name, tensor in given.items())


def _by_memory(wanted: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of names, one per tensor; tied names form one group."""
    groups: dict[object, list[str]] = {}
    for name, tensor in wanted.items():
        whole = tensor.numel() and not tensor.is_meta and not torch.nn.parameter.is_lazy(tensor)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if whole else id(tensor)
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def _alike(given: Tensor, wanted: Tensor) -> bool:
    """Whether one can be copied into the other. Integers do not fit floats: such weights are quantized."""
    if torch.nn.parameter.is_lazy(wanted):
        return True
    return given.shape == wanted.shape and given.is_floating_point() == wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"


def _advice(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], init: InitSection, num_fit: int) -> str:
    """Advice for an error: a prefix with which more tensors fit, or `strict: false`."""
    parts = {n.split(".")[0] for n in (*given, *wanted) if "." in n} | {
        ".".join(n.split(".")[:2]) for n in (*given, *wanted) if n.count(".") > 1
    }
    fit = {part: _num_fit(_renamed(given, wanted, part), wanted) for part in sorted(parts)}
    best = max(fit, key=lambda part: fit[part], default="")
    if best and fit[best] > num_fit and not init.prefix:
        strict = "" if fit[best] == len(wanted) == len(given) else ", strict: false"
        return f"; with init: {{path: {init.path}, prefix: {best}.{strict}}} {fit[best]} fit"
    return f"; init: {{path: {init.path}, strict: false}} takes those that fit" if num_fit else ""
