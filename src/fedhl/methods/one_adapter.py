"""The family of methods that keep one adapter per layer and average its factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedhl.lora import LoRA, own
from fedhl.method import Method, Update, check_alike, check_broadcast, checked


@dataclass(frozen=True, eq=False)
class Counted:
    """An adapter and the number of rounds done."""

    lora: LoRA
    round: int


def whole(method: str, state: LoRA, rank: int, scale: float) -> LoRA:
    """A copy of the adapter, for a client that must have its rank and scale.

    Raises ValueError, naming `method`, if it has not, or if they are none at all.
    """
    check_broadcast(rank, scale, state.rank)
    check_alike(method, rank, scale, state)
    return own(state)


def mean_factors(method: str, state: LoRA, updates: Iterable[Update], factors: str) -> LoRA:
    """`state` with its `factors`, "A", "B" or "AB", replaced by their means `Σ p_i F_i`, in the
    precision of the state; what the clients hold of another factor is not read.

    Raises ValueError, naming `method`, for a rank or scale that is not the state's.
    """
    means = {factor: torch.zeros_like(getattr(state, factor)) for factor in factors}
    for update in checked(updates, state.shape):
        check_alike(method, update.lora.rank, update.lora.scale, state)
        for factor, mean in means.items():
            mean += update.weight * getattr(update.lora, factor).to(mean)
    return replace(state, **means)


class OneAdapterMethod(Method[LoRA]):
    """A method of the family: with an adapter as its state, which is the global change."""

    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"

    def init(self, lora: LoRA, seed: int = 0) -> LoRA:
        return own(lora)

    def delta(self, state: LoRA) -> LoRA | None:
        return state
