"""FedHL with error feedback: clients are sent what they lack of W (arXiv 2209.15218)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedhl.lora import LoRA, initial, pad, prefix, refill
from fedhl.method import Broadcast, Formula, Method, Reference, Traffic, Update, check_broadcast
from fedhl.methods.full_rank import FullRank, Tailed, lost, move, start, unbiased
from fedhl.seeds import derive
from fedhl.subspace import leading

BEGINNINGS = ("delta", "random")


@dataclass(frozen=True)
class FedHLEF(Method[Tailed]):
    """FedHL whose clients remember: each is sent the best rank r of what it lacks of W.

    A client holds M, the sum of all that it was ever sent. `D = T_r(W - M)`, broadcast `B = U_r S_r / s_i`,
    `A = V_rᵀ`; the client starts at `W0 + M + D`; `W ← W + Σ p_i (s_i B_i A_i - D_i)`; then `M ← M + D`.
    A newcomer holds M = 0, and starts as in FedHL.

    `download = c`: D has rank c r; its first r components are trained, the others go into the base at once.
    `begin`: the adapter at the start is D itself (`delta`); or D goes into the base at once, and the client
    draws an adapter with `B = 0` from a seed (`random`).

    Inspired by EF21-P (arXiv 2209.15218), with a truncated SVD as compressor, a memory for each client as in
    Rand-MCM (arXiv 2102.12528), and LoRA factors as the local step. The convergence is in docs/maths.md.
    Cost: one SVD per layer for newcomers, and one for each distinct memory of the cohort, at its rank; the
    sum of FedHL.
    Client: keeps its base with M added, `m n` numbers per layer, in float32. The server keeps each distinct
    memory.
    Nearest neighbour: FedHL, whose clients forget: M = 0 always.
    Limitation: clients need the memory of a dense update; a client that is seldom drawn starts far from W.
    """

    download: int = 1
    begin: str = "delta"

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "gauge", "one client"}
    )
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "truncation"
    formula: ClassVar[Formula] = Formula(down="r (m + n)", up="r (m + n)")
    reference: ClassVar[Reference] = Reference.arxiv("2209.15218")

    def __post_init__(self) -> None:
        if not (isinstance(self.download, int) and self.download >= 1):
            raise ValueError(f"fedhl_ef: download must be an integer >= 1, got {self.download}")
        if self.begin not in BEGINNINGS:
            raise ValueError(f"fedhl_ef: begin must be delta or random, got {self.begin!r}")

    def init(self, lora: LoRA, seed: int = 0) -> Tailed:
        widest = max(lora.rank, min(self.download * lora.rank, *lora.shape))
        return Tailed(start(pad(lora, widest), seed), lora.rank)

    def broadcast(self, state: Tailed, rank: int, scale: float, key: int = 0) -> Broadcast:
        check_broadcast(rank, scale, state.top)
        width = self.width(rank, state.full)
        D = LoRA(state.full.sent.A[:width], state.full.sent.B[:, :width], 1.0)
        return self.split(state, D, rank, scale, lost(state.full, width))

    def catch_up(
        self, state: Tailed, held: Tensor, rank: int, scale: float, key: int = 0
    ) -> Broadcast:
        check_broadcast(rank, scale, state.top)
        full = state.full
        width = self.width(rank, full)
        # With the same columns in each round, what the client lacks would be orthogonal to them in the end.
        columns = derive(full.seed, "columns", full.round)
        B, A, tail = leading(full.W - held.to(full.W), width, seed=columns)
        D = refill(LoRA(A, B, 1.0), width, derive(full.seed, "refill", full.round))
        return self.split(state, D, rank, scale, tail)

    def width(self, rank: int, full: FullRank) -> int:
        """The rank of D for a client of this rank."""
        return min(self.download * rank, *full.shape)

    def split(self, state: Tailed, D: LoRA, rank: int, scale: float, tail: float) -> Broadcast:
        """D as the adapter that is trained and the part that goes into the base at once."""
        if self.begin == "delta":
            rest = LoRA(D.A[rank:].clone(), D.B[:, rank:].clone(), 1.0) if D.rank > rank else None
            return Broadcast(prefix(D, rank, scale), merged=rest, absorbed=True, lost=tail)
        seed = derive(state.full.seed, "start", state.full.round) % 2**53  # which JSON can hold
        fresh = initial(*state.full.shape, rank, scale, seed)
        return Broadcast(fresh, merged=D, absorbed=True, lost=tail, drawn=seed)

    def aggregate(self, state: Tailed, updates: Iterable[Update]) -> Tailed:
        return Tailed(move(state.full, unbiased(state.full, updates)), state.top)

    def delta(self, state: Tailed) -> Tensor:
        return state.full.W

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=min(self.download * rank, m, n) * (m + n), up=rank * (m + n))
