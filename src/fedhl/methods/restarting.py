"""The family of methods that merge each round into the base and start from a fresh adapter again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedhl.lora import LoRA, add_products, concat, empty, initial
from fedhl.method import Broadcast, Formula, Method, Traffic
from fedhl.methods.full_rank import FullRank, begin, send
from fedhl.seeds import derive
from fedhl.subspace import energy


@dataclass(frozen=True, eq=False)
class Grown:
    """`full`: W, and a fresh adapter to send; `last`: the components by which the last round has moved W, of
    rank 0 if they are more numbers than W."""

    full: FullRank
    last: LoRA


def fresh_seed(full: FullRank) -> int:
    """The seed of this round's adapter, which JSON can hold."""
    return derive(full.seed, "restart", full.round) % 2**53


def noted(
    terms: Iterable[tuple[float, LoRA]], shape: tuple[int, int], into: list[tuple[float, LoRA]]
) -> Iterator[tuple[float, LoRA]]:
    """The terms; `into` receives them all, or none if they are more numbers than a matrix of this shape."""
    (m, n), rank = shape, 0
    for weight, lora in terms:
        rank += lora.rank
        if rank * (m + n) < m * n:
            into.append((weight, lora))
        else:
            into.clear()
        yield weight, lora


class RestartingMethod(Method[Grown]):
    """A method of the family: with W in the base, `B = 0`, and one random A for all, of which a client of
    rank r has the first r rows. The adapter of round 1 is the one that was given."""

    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="min(Σr (m + n), m n)", up="r (m + n)")

    def init(self, lora: LoRA, seed: int = 0) -> Grown:
        full = begin(lora, seed)
        return Grown(full, empty(full.W))

    def broadcast(self, state: Grown, rank: int, scale: float, key: int = 0) -> Broadcast:
        full = state.full
        drawn = fresh_seed(full) if full.round else None
        return replace(send(full, rank, scale), base=full.W, drawn=drawn)

    def grown(self, state: Grown) -> LoRA | None:
        """What the last round has merged: see `fedhl.method.Growing`."""
        return state.last if state.last.rank else None

    def merge(self, state: Grown, terms: Iterable[tuple[float, LoRA]]) -> Grown:
        """The state one round later: `W ← W + Σ w ΔW` over (weight, adapter) pairs, and a fresh adapter."""
        full, last = state.full, []
        W = add_products(full.W, noted(terms, full.shape, last))
        full = replace(full, W=W, tail=energy(W), round=full.round + 1)
        fresh = initial(*full.shape, full.sent.rank, 1.0, fresh_seed(full))
        full = replace(full, sent=LoRA(fresh.A.to(W), fresh.B.to(W), 1.0))
        return Grown(full, concat(last) if last else empty(W))

    def delta(self, state: Grown) -> Tensor:
        return state.full.W

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=min(sum(cohort) * (m + n), m * n), up=rank * (m + n))
