"""Clocks: medians of interleaved runs, and figures as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch

Row = dict[str, Any]
Say = Callable[[str], None]
T = TypeVar("T")


def timed(work: Callable[[], T], device: str = "cpu") -> tuple[T, float]:
    """The result of `work`, and its wall time, including work that it left running on an accelerator."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = perf_counter()
    result = work()
    wait()
    return result, perf_counter() - start


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, float]:
    """The median seconds of each work, after one call of each to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            spent = timed(work, device)[1]
            if repeat:
                taken[name].append(spent)
    return {name: median(times) for name, times in taken.items()}


def describe(row: Row) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )
