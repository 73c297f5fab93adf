"""RAC-LoRA: a chain of one-sided adapters, each merged and drawn afresh (arXiv 2410.08305)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedhl.lora import LoRA, add_products, empty, initial, own
from fedhl.method import (
    Broadcast,
    Formula,
    Method,
    Reference,
    Traffic,
    Update,
    check_broadcast,
    checked,
    if_fewer,
)
from fedhl.seeds import derive


@dataclass(frozen=True, eq=False)
class Chain:
    """`W (m, n)`: all that has been merged; `last`: the pair that was merged last, of rank 0 before round 1;
    `rank`: the top rank; `seed` and `round` name the draw of the frozen factor."""

    W: Tensor
    last: LoRA
    rank: int
    seed: int
    round: int


@dataclass(frozen=True)
class RACLoRA(Method[Chain]):
    """One factor is random and frozen, the other is trained from zero; then both are merged into W.

    With `frozen="A"`: `W ← W + (Σ p_i s_i B_i) A`, where B_i is padded with zeros to the top rank and
    a new A, the same for all, is drawn in every round, the first included; a client of rank r_i has
    its first r_i rows.
    With `frozen="B"`: `W ← W + B (Σ p_i s_i A_i)`.

    A is drawn as PEFT draws it, U(-1/√n, 1/√n), and B as the transpose of that, U(-1/√m, 1/√m): its
    columns have length about 1/√3 whatever m is, and a gradient step moves W about as far either way.

    Inferred: these two distributions (the theory asks only for random
    projections of full expected rank), mixed ranks, and that W starts at the update of a trained
    adapter.
    Cost: one product of inner size R per client and layer.
    Client: the merged W (m n numbers per layer, in place in its base model). It downloads the pair that was
    merged last, or W whole if it sat out a round, and draws the next pair itself if A is the frozen factor.
    Nearest neighbour: FFA-LoRA, whose A is drawn once and never merged; FLoRA, which restarts both
    factors and stacks the clients' instead of averaging one.
    Limitation: the base drifts, hence W has any rank and no small adapter holds it; clients cannot
    share one base model with another task.
    """

    frozen: str = "A"

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "one client"}
    )
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="min(R_c (m + n), m n)", up="r m")
    reference: ClassVar[Reference] = Reference.arxiv("2410.08305")

    def __post_init__(self) -> None:
        if self.frozen not in ("A", "B"):
            raise ValueError(f'frozen must be "A" or "B", got {self.frozen!r}')

    @property
    def trained(self) -> str:
        return "B" if self.frozen == "A" else "A"

    def init(self, lora: LoRA, seed: int = 0) -> Chain:
        W = own(lora).delta()
        return Chain(W, empty(W), lora.rank, seed, 0)

    def broadcast(self, state: Chain, rank: int, scale: float, key: int = 0) -> Broadcast:
        check_broadcast(rank, scale, state.rank)
        pair = self.fresh(state)
        lora = LoRA(pair.A[:rank].clone(), pair.B[:, :rank].clone(), scale)
        drawn = self.fresh_seed(state) if self.frozen == "A" else None
        return Broadcast(lora, base=state.W, train=frozenset({self.trained}), drawn=drawn)

    def grown(self, state: Chain) -> LoRA | None:
        """The pair that was merged last: see `fedhl.method.Growing`."""
        return if_fewer(state.last)

    def fresh_seed(self, state: Chain) -> int:
        """The seed of this round's frozen factor, which JSON can hold."""
        return derive(state.seed, "frozen factor", state.round) % 2**53

    def fresh(self, state: Chain) -> LoRA:
        """This round's pair at the top rank and scale 1: one factor random, the other zero."""
        m, n = state.W.shape
        seed = self.fresh_seed(state)
        if self.frozen == "A":
            pair = initial(m, n, state.rank, 1.0, seed)
            return LoRA(pair.A.to(state.W), pair.B.to(state.W), 1.0)
        pair = initial(n, m, state.rank, 1.0, seed)
        return LoRA(pair.B.T.to(state.W).contiguous(), pair.A.T.to(state.W).contiguous(), 1.0)

    def aggregate(self, state: Chain, updates: Iterable[Update]) -> Chain:
        pair, widest = self.fresh(state), 0
        mean = getattr(pair, self.trained)  # zero

        def terms() -> Iterator[tuple[float, LoRA]]:
            nonlocal widest
            for u in checked(updates, pair.shape):
                if u.lora.rank > state.rank:
                    raise ValueError(
                        f"an update has rank {u.lora.rank}, expected at most {state.rank}, the top rank"
                    )
                widest = max(widest, u.lora.rank)
                part = mean[:, : u.lora.rank] if self.trained == "B" else mean[: u.lora.rank]
                trained = getattr(u.lora, self.trained).to(part)
                part.add_(trained, alpha=u.weight * u.lora.scale)
                # the frozen factor as it was sent: the wire may have rounded it
                yield u.weight, replace(u.lora, **{self.frozen: getattr(u.sent.lora, self.frozen)})

        W = add_products(state.W, terms())
        last = LoRA(pair.A[:widest], pair.B[:, :widest].contiguous(), 1.0)
        return replace(state, W=W, last=last, round=state.round + 1)

    def delta(self, state: Chain) -> Tensor:
        return state.W

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        pair = min(max(cohort) * (m + n), m * n)
        if self.frozen == "A":
            return Traffic(down=pair, up=rank * m)
        return Traffic(down=pair + rank * (m + n), up=rank * n)
