"""Fed-PLoRA: the components that a client does not train are folded into its base (arXiv 2602.16936)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedhl.method import Broadcast, Formula, Reference, Traffic, Update
from fedhl.methods.full_rank import FullRank, FullRankMethod, move, send, unbiased


@dataclass(frozen=True)
class FedPLoRA(FullRankMethod):
    """Select and fold: every client starts at the whole global model, and trains r components of it.

    `W ← W + Σ p_i (s_i B_i A_i - T_{r_i}(W))`, broadcast `B = U_r S_r / s_i`, `A = V_rᵀ` to train and
    `W - T_r(W)` in the base: the start is W, whatever the rank.

    Inferred: of the paper the folding is kept. There the model is R rank-one modules, each client
    trains r of them drawn at random, and the server averages each factor of each module over the
    clients that trained it. In their place the leading components are trained, and the server rule is
    FedHL's, so that products are averaged and nothing is lost beyond R.
    Cost: one SVD per layer, and one product of inner size `Σ r_i` plus each distinct rank once, as FedHL.
    Client: downloads the dense base beside its adapter and holds it for the round; stores nothing
    between rounds.
    Nearest neighbour: FedHL, which sends `T_r(W)` alone, so that a client of low rank starts elsewhere.
    Limitation: the download is that of the full model's change; components beyond the top rank are
    never trained.
    """

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset(
        {"exact mean", "rounded mean", "no-op", "gauge", "one client"}
    )
    weighting: ClassVar[str] = "uniform"
    starts: ClassVar[str] = "whole"
    formula: ClassVar[Formula] = Formula(down="m n + r (m + n)", up="r (m + n)")
    reference: ClassVar[Reference] = Reference.arxiv("2602.16936")

    def broadcast(self, state: FullRank, rank: int, scale: float, key: int = 0) -> Broadcast:
        sent = send(state, rank, scale)
        return replace(sent, base=state.W - sent.lora.delta())

    def aggregate(self, state: FullRank, updates: Iterable[Update]) -> FullRank:
        return move(state, unbiased(state, updates))

    def lost(self, state: FullRank, rank: int) -> float:
        return 0.0

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=m * n + rank * (m + n), up=rank * (m + n))
