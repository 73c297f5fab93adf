"""Many small layers at once, each on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from fedhl.method import flatten

Done = TypeVar("Done")
SMALL = 2**21
"""Up to this many numbers a matrix is too small for two threads to share its products well."""


def side_by_side(
    step: Callable[[str, Any], Done], layers: Mapping[str, Any]
) -> Iterator[tuple[str, Done]]:
    """`step` on every layer, in order. Small layers are processed several at a time, each on one thread:
    their products, and still more their SVDs, are too small to be divided among threads. Large layers, and
    layers on disk or on an accelerator, are processed one by one."""
    threads = torch.get_num_threads()
    small = isinstance(layers, dict) and all(
        tensor.device.type == "cpu" and tensor.numel() <= SMALL
        for layer in layers.values()
        for tensor in flatten(layer).values()
    )
    if threads == 1 or not small:
        yield from ((name, step(name, layer)) for name, layer in layers.items())
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from zip(layers, pool.map(step, layers, layers.values()), strict=True)
    finally:
        torch.set_num_threads(threads)  # threads begun later take the number set last
