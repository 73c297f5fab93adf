"""A second device for machines that have none: the CPU's kernels, and CUDA's rules about where tensors are.

PyTorch leaves a dispatch key to devices that are written outside of it, in Python if need be. Here each
tensor of such a device holds one of the CPU's, on which the work is done. As on CUDA, what mixes tensors of
two devices is refused, unless it copies, or what is not there is an index or a 0-d number that is only read.
Nothing else of a GPU is here: not its kernels, which round in another order, nor its generators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "elsewhere"
SETUP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
"""What lets a device be written in Python; PyTorch 2.13 has it, and the oldest that fedhl allows does not."""
aten = torch.ops.aten
COPIES: Any = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
INDEXED: Any = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Their second argument is a list of indices."""
JOINED: Any = {aten.cat.default, aten.stack.default}
MAY_MIX = (Tensor, torch.Generator)


class There(Tensor):
    """A tensor of the device, around the CPU's tensor `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach()

    @data.setter
    def data(self, value: There) -> None:
        self.held = value.held

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(operation, *args, **(kwargs or {}))


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation of PyTorch, some of whose tensors are there, or whose result is to be."""
    leaves = leaves_of([*args, *kwargs.values()])
    there = [x for x in leaves if isinstance(x, There)]
    wanted = kwargs.get("device")
    result_there = bool(there) if wanted is None else torch.device(wanted).type == NAME
    if operation not in COPIES:
        refuse_mixtures(operation, args, leaves, there, result_there)
    here = {} if wanted is None else {"device": torch.device("cpu")}
    args, kwargs = mapped(held, args), mapped(held, kwargs | here)
    if operation is aten._copy_from.default:  # what is copied comes first
        args, operation = (args[1], args[0]), aten.copy_.default
    result = operation(*args, **kwargs)
    if not result_there:
        return result
    known = {id(x.held): x for x in there}  # what is changed in place is what it was
    return mapped(lambda x: wrapped(known, x), result)


def leaves_of(value: Any) -> list[Any]:
    """What is in lists and tuples, which is where operations have tensors.

    PyTorch's own trees can be anything, and take as long as all the rest of a test here.
    """
    if isinstance(value, list | tuple):
        return [leaf for x in value for leaf in leaves_of(x)]
    return [value]


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list):
        return [mapped(change, x) for x in value]
    if isinstance(value, tuple):
        return tuple(mapped(change, x) for x in value)
    if isinstance(value, dict):
        return {key: mapped(change, x) for key, x in value.items()}
    return change(value)


def refuse_mixtures(
    operation: Any, args: tuple[Any, ...], leaves: list[Any], there: list[There], result_there: bool
) -> None:
    """Raises RuntimeError for what CUDA refuses."""
    if operation in INDEXED:
        leaves = leaves_of((args[0], args[2:]))
    others = [x for x in leaves if isinstance(x, MAY_MIX) and not isinstance(x, There)]
    if not others:
        return
    written = [args[k] for k in places_written(operation) if k < len(args)]
    for x in others:
        number = isinstance(x, Tensor) and not x.ndim and operation not in JOINED
        number = number and not any(x is target for target in written)
        if isinstance(x, Tensor) and there and not number:
            raise RuntimeError(f"{operation}: tensors on {NAME} and on {x.device}")
        if isinstance(x, torch.Generator) and (there or result_there):
            raise RuntimeError(f"{operation}: a generator of {x.device} for a tensor on {NAME}")


@cache
def places_written(operation: Any) -> list[int]:
    """Which of its arguments it changes."""
    return [k for k, argument in enumerate(operation._schema.arguments) if argument.is_write]


def held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


def wrapped(known: dict[int, There], x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return known[id(x)] if id(x) in known else There(x)


class Rules:
    """What PyTorch asks the module of a device for."""

    is_available: Callable[[], bool] = staticmethod(lambda: True)
    is_initialized: Callable[[], bool] = staticmethod(lambda: True)
    device_count: Callable[[], int] = staticmethod(lambda: 1)
    current_device: Callable[[], int] = staticmethod(lambda: 0)
    _is_in_bad_fork: Callable[[], bool] = staticmethod(lambda: False)
    manual_seed_all: Callable[[int], None] = staticmethod(lambda seed: None)
    get_rng_state: Callable[..., Tensor] = staticmethod(lambda *_: torch.empty(0))
    set_rng_state: Callable[..., None] = staticmethod(lambda *_: None)


libraries: list[torch.library.Library] = []  # what they define goes when they go


def register() -> None:
    """Add the device to this process. PyTorch believes from then on that the machine has an accelerator, so
    it should be a process of its own."""
    assert SETUP is not None
    SETUP(NAME, backend_module=Rules())
    every = torch.library.Library("_", "IMPL")
    every.fallback(run, "PrivateUse1")
    # what `torch.tensor` calls where Python's fallback is not looked for
    some = torch.library.Library("aten", "IMPL")
    for name in ("empty_strided", "_copy_from"):
        some.impl(name, partial(run, getattr(aten, name).default), "PrivateUse1")
    libraries.extend((every, some))
