"""The contract suite refuses wrong methods: thirteen, each with one deliberate mistake.

Each is a method of ours with one thing changed, which no law of `fedhl.LAWS` notices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from support import contract

from fedhl import LAWS, Broadcast, LoRA, Method, Update
from fedhl.methods.fedhl import FedHL
from fedhl.methods.fedit import FedIT
from fedhl.methods.flexlora import FlexLoRA
from fedhl.methods.fslora import FSLoRA
from fedhl.methods.full_rank import FullRank
from fedhl.methods.hetlora import HetLoRA
from fedhl.seeds import generator

# What a client is sent


@dataclass(frozen=True)
class Smallest(FedHL):
    """A client below the top rank is sent the smallest components."""

    def broadcast(self, state: FullRank, rank: int, scale: float, key: int = 0) -> Broadcast:
        super().broadcast(state, rank, scale, key)  # the errors are right
        A, B = state.sent.A.flip(0)[:rank], state.sent.B.flip(1)[:, :rank]
        return Broadcast(LoRA(A, B / scale, scale))


@dataclass(frozen=True)
class Half(FedHL):
    """A client below the top rank is sent half of `T_r(W)`."""

    def broadcast(self, state: FullRank, rank: int, scale: float, key: int = 0) -> Broadcast:
        sent = super().broadcast(state, rank, scale, key)
        share = 1.0 if rank == state.sent.rank else 0.5
        return replace(sent, lora=replace(sent.lora, B=share * sent.lora.B))


@dataclass(frozen=True)
class Noise(FedHL):
    """A client below the top rank is sent noise."""

    def broadcast(self, state: FullRank, rank: int, scale: float, key: int = 0) -> Broadcast:
        sent = super().broadcast(state, rank, scale, key)
        if rank == state.sent.rank:
            return sent
        B = torch.randn(sent.lora.B.shape, generator=generator(state.seed, "noise", rank))
        return replace(sent, lora=replace(sent.lora, B=B.to(sent.lora.B) / scale))


@dataclass(frozen=True)
class InitialScale(HetLoRA):
    """B is sent as if every client had the scale of the initial adapter."""

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        sent = super().broadcast(state, rank, scale, key)
        return replace(sent, lora=replace(sent.lora, B=sent.lora.B * scale / state.scale))


@dataclass(frozen=True)
class Unscaled(FSLoRA):
    """The sketch is sent without R/r, and taken back without r/R."""

    def broadcast(self, state: LoRA, rank: int, scale: float, key: int = 0) -> Broadcast:
        sent = super().broadcast(state, rank, scale, key)
        return replace(sent, lora=replace(sent.lora, B=sent.lora.B * rank / state.rank))

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        def wide(lora: LoRA) -> LoRA:
            return replace(lora, B=lora.B * (state.rank / lora.rank))

        return super().aggregate(
            state,
            [
                replace(u, lora=wide(u.lora), sent=replace(u.sent, lora=wide(u.sent.lora)))
                for u in updates
            ],
        )


# What the server makes of it


@dataclass(frozen=True)
class ScaleForgotten(HetLoRA):
    """`s_i` is taken for the scale of the initial adapter."""

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        alike = [replace(u, lora=replace(u.lora, scale=state.scale)) for u in checked(updates)]
        return super().aggregate(state, alike)


@dataclass(frozen=True)
class UniformA(FedIT):
    """B is averaged with the weights, A without."""

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        weighted = super().aggregate(state, updates)
        return replace(weighted, A=super().aggregate(state, uniform(updates)).A)


def checked(updates: Iterable[Update]) -> list[Update]:
    """For a mistake in scales or weights that are numbers, not in refusing those that are not."""
    held = list(updates)
    if any(not 0 < u.lora.scale < torch.inf for u in held):
        raise ValueError("a scale is not a positive number")
    return held


def reweighted(
    updates: Iterable[Update], weights: Callable[[list[float]], list[float]]
) -> list[Update]:
    """The updates with other weights, which again sum to 1; unless the weights are bad already."""
    held = list(updates)
    if not held or any(not 0 <= u.weight < torch.inf for u in held):
        return held
    p = weights([u.weight for u in held])
    return [replace(u, weight=w / sum(p)) for u, w in zip(held, p, strict=True)]


def uniform(updates: Iterable[Update]) -> list[Update]:
    return reweighted(updates, lambda p: [float(x > 0) for x in p])


def squared(updates: Iterable[Update]) -> list[Update]:
    return reweighted(updates, lambda p: [x**2 for x in p])


def largest(updates: Iterable[Update]) -> list[Update]:
    return reweighted(updates, lambda p: [float(x == max(p)) for x in p])


@dataclass(frozen=True)
class UniformProducts(FlexLoRA):
    """Weights are ignored."""

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        return super().aggregate(state, uniform(updates))


@dataclass(frozen=True)
class UniformFactors(FedIT):
    """Weights are ignored."""

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return super().aggregate(state, uniform(updates))


@dataclass(frozen=True)
class SquaredProducts(FlexLoRA):
    """Weights are squared."""

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        return super().aggregate(state, squared(updates))


@dataclass(frozen=True)
class SquaredFactors(FedIT):
    """Weights are squared."""

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return super().aggregate(state, squared(updates))


@dataclass(frozen=True)
class LargestProduct(FlexLoRA):
    """The client of the largest weight takes all."""

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        return super().aggregate(state, largest(updates))


@dataclass(frozen=True)
class LargestFactors(FedIT):
    """The client of the largest weight takes all."""

    laws: ClassVar[frozenset[str]] = FedIT.laws | {"gauge"}  # of one client it is true

    def aggregate(self, state: LoRA, updates: Iterable[Update]) -> LoRA:
        return super().aggregate(state, largest(updates))


WRONG: dict[type[Any], tuple[Callable[[Method[Any]], None], str]] = {
    Smallest: (contract.check_start, "start: rank"),
    Half: (contract.check_start, "start: rank"),
    Noise: (contract.check_start, "start: rank"),
    Unscaled: (contract.check_start, "start: rank"),
    InitialScale: (contract.check_start_scale, "start scale: rank"),
    ScaleForgotten: (contract.check_rescale, "rescale: a client's scale"),
    UniformA: (contract.check_split, "split: a client in two halves"),
    UniformProducts: (contract.check_split, "split: a client in two halves"),
    UniformFactors: (contract.check_split, "split: a client in two halves"),
    SquaredProducts: (contract.check_split, "split: a client in two halves"),
    SquaredFactors: (contract.check_split, "split: a client in two halves"),
    LargestProduct: (contract.check_split, "split: a client in two halves"),
    LargestFactors: (contract.check_split, "split: a client in two halves"),
}
"""A wrong method -> the check that must refuse it, and what it says."""


every_wrong = pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)


@every_wrong
def test_a_wrong_method_is_refused(wrong: type[Any]):
    check, said = WRONG[wrong]
    with pytest.raises(AssertionError, match=re.escape(said)):
        check(wrong())
    (right,) = wrong.__bases__
    check(right())


@pytest.mark.slow
@every_wrong
def test_no_other_law_notices(wrong: type[Any]):
    """Else the check would not be needed. (`lost` is a second answer to what a client is sent.)"""
    for law in LAWS:
        contract.check_law(wrong(), law)
    for check in contract.UNIVERSAL:
        if check not in (WRONG[wrong][0], contract.check_lost):
            check(wrong())
