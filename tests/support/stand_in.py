"""A simulated GPU: tensors in host memory that behave as if they were on a device.

with stand_in.gpu():
    torch.zeros(3, device="cuda").numpy()       # TypeError, as on a GPU
    torch.zeros(3, device="cuda") + torch.ones(3)   # RuntimeError: two devices

It computes what the CPU computes, so whole runs can be compared, and it refuses what a GPU would refuse: two devices in
one operation, numpy, page-locking device memory, operations without a deterministic form while these are required. It
does not simulate streams, rounding, speed or limited memory.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

DEVICE = torch.device("cuda", 0)
FACTORIES = (
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
)
ACROSS = {"copy_", "__setitem__", "__getitem__", "index_put_"}  # may take indices or values from the host
# torch.use_deterministic_algorithms: "will throw a RuntimeError when called on a CUDA tensor".
NOT_DETERMINISTIC = {"kthvalue", "put_", "histc", "median", "nanmedian", "grid_sample", "bincount"}
NOT_ITS_OWN = {"numpy", "__array__", "pin_memory"}
_local = threading.local()
_torch_to, _module_to = torch.Tensor.to, torch.nn.Module.to


class OnGpu(torch.Tensor):
    """A tensor that claims to be on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name == "__get__":
            of = getattr(func.__self__, "__name__", "")
            told = {"device": DEVICE, "is_cuda": True, "is_cpu": False}
            if of in told:
                return told[of]
        if name in NOT_ITS_OWN and isinstance(args[0], OnGpu):
            raise TypeError(f"{name}: can't convert cuda:0 device type tensor to numpy or page-locked memory")
        if name in ("cpu", "cuda"):
            return to(args[0], name)
        if name in NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name}_cuda does not have a deterministic implementation")
        if "device" in kwargs:
            there = torch.device(kwargs.pop("device") or DEVICE)
            found = cls.__torch_function__(func, types, args, kwargs)
            return to(found, there)
        one_device(name, args, kwargs)
        before = args[0].clone() if name == "sqrt" else None
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            if name == "sqrt" and not args[0].requires_grad:  # a GPU rounds it correctly, MKL often does not
                found.copy_(torch.from_numpy(np.sqrt(plain(before).numpy())))
        if name in ("copy_", "__setitem__", "__set__") or (name == "__get__" and not isinstance(found, torch.Tensor)):
            return found
        return wrapped(found)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a device's tensor is not to be pickled")


class Parameter(OnGpu, torch.nn.Parameter):
    """A module's parameter on the GPU; as on a real one, the object is the one from the host."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def wrapped(found: Any) -> Any:
    if isinstance(found, torch.Tensor) and not isinstance(found, OnGpu):
        with torch._C.DisableTorchFunctionSubclass():
            return found.as_subclass(OnGpu)
    if isinstance(found, tuple | list):
        return type(found)(wrapped(item) for item in found)
    return found


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list | dict):
            yield from tensors_in(value)


def one_device(name: str, args: Any, kwargs: Any) -> None:
    """Refuse what torch refuses for tensors on two devices. Scalars may come from the host."""
    if name in ("copy_", "to", "__set__", "_has_compatible_shallow_copy_type"):
        return
    if name in ACROSS and isinstance(args[0], OnGpu):
        if name == "__setitem__" and isinstance(args[2], torch.Tensor) and not isinstance(args[2], OnGpu):
            advanced = any(True for _ in tensors_in(args[1] if isinstance(args[1], tuple) else (args[1],)))
            if not advanced or args[2].dim() == 0:
                return
        else:
            return
    if name == "__setitem__" and not any(tensors_in(args[1] if isinstance(args[1], tuple) else (args[1],))):
        return
    found = [*tensors_in(args), *tensors_in(kwargs)]
    there = [tensor for tensor in found if isinstance(tensor, OnGpu)]
    here = [tensor for tensor in found if not isinstance(tensor, OnGpu) and tensor.dim()]
    if there and here:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")


def to(tensor: torch.Tensor, where: Any, **others: Any) -> torch.Tensor:
    """The tensor on that device; a copy if it is elsewhere."""
    there = torch.device(where).type == "cuda"
    bare = plain(tensor)
    moved = _torch_to(bare, **others) if others else bare
    if there == isinstance(tensor, OnGpu):
        return tensor if moved is bare else (wrapped(moved) if there else moved)
    moved = moved.clone() if moved.data_ptr() == bare.data_ptr() else moved
    return wrapped(moved) if there else moved


def _tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    where, dtype, flags = kwargs.pop("device", None), kwargs.pop("dtype", None), []
    for argument in args:
        if isinstance(argument, torch.Tensor):
            where, dtype = argument.device, argument.dtype
        elif isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, bool):
            flags.append(argument)
        elif argument is not None:
            where = argument if not isinstance(argument, int) else DEVICE
    kwargs.pop("non_blocking", None)
    copy = kwargs.pop("copy", len(flags) > 1 and flags[1])
    if where is not None and torch.device(where).type == "meta":
        return _torch_to(plain(self), *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        moved = _torch_to(self, dtype or self.dtype, copy=copy, **kwargs)
    moved = wrapped(moved) if isinstance(self, OnGpu) else moved
    return moved if where is None else to(moved, where)


def _moved(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Parameters stay the same objects; their content moves."""
    _module_to(self, *args, **kwargs)
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    if device is not None:
        for param in self.parameters():
            param.__class__ = Parameter if device.type == "cuda" else torch.nn.Parameter
    return self


def _factory(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            out = kwargs.pop("out", None)
            assert out is None and not pin_memory
            return wrapped(make(*args, **kwargs))
        tensor = make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)
        return locked(tensor) if pin_memory else tensor

    return made


def locked(tensor: torch.Tensor) -> torch.Tensor:
    """Mark the tensor as page-locked."""
    storage = tensor.untyped_storage()
    _locked[storage.data_ptr()] = storage  # keep the storage, so that no other gets its address
    return tensor


_locked: dict[int, Any] = {}


class Stream:
    """A queue; here all work is done at once."""

    made = 0

    def __init__(self, device: Any = None) -> None:
        type(self).made += 1

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def _within(stream: Any) -> Iterator[None]:
    before = getattr(_local, "stream", None)
    _local.stream = stream
    try:
        yield
    finally:
        _local.stream = before


@contextlib.contextmanager
def gpu(free_bytes: int = 1 << 30, num_gpus: int = 1) -> Iterator[None]:
    """Inside the block, this machine has GPUs."""
    on_gpu = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return on_gpu("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    about = SimpleNamespace(uuid="GPU-make-believe", name="make-believe", total_memory=2 * free_bytes, major=9, minor=0)
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: num_gpus,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: about,
        "get_device_name": lambda device=None: about.name,
        "mem_get_info": lambda device=None: (free_bytes, 2 * free_bytes),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state_all": lambda: [],
        "set_rng_state_all": lambda states: None,
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "stream": _within,
        "_sleep": lambda cycles: None,
        "current_stream": lambda device=None: getattr(_local, "stream", None),
    }
    with contextlib.ExitStack() as stack:
        for name in FACTORIES:
            stack.enter_context(mock.patch.object(torch, name, _factory(getattr(torch, name))))
        for name, stands_in in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stands_in))
        stack.enter_context(mock.patch.object(torch, "autocast", autocast))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", _moved))
        torch.Tensor.to = _tensor_to  # type: ignore[method-assign, assignment]
        torch.Tensor.pin_memory = lambda self, device=None: locked(self.clone())  # type: ignore[method-assign, assignment]
        torch.Tensor.is_pinned = lambda self: self.untyped_storage().data_ptr() in _locked  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del torch.Tensor.to, torch.Tensor.pin_memory, torch.Tensor.is_pinned
            _locked.clear()
