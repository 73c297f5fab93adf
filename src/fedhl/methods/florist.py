"""FLoRIST: as many components are sent as hold a share of the energy (arXiv 2506.09199)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedhl.lora import LoRA, concat, svd
from fedhl.method import Reference, Update, checked
from fedhl.methods.restarting import Grown, RestartingMethod


def truncate_to_share(mean: LoRA, threshold: float) -> LoRA:
    """`T_k(mean)` with k the fewest components that hold the share `threshold` of `||mean||_F²`.

    Found through the factors, never densely; k = 0 if `mean` is zero.
    """
    U, S, Vt = svd(mean)
    # What is left beyond k, summed from the small end: at threshold 1 every σ_j > 0 counts.
    beyond = S.double().square().flip(0).cumsum(0).flip(0)
    k = int((beyond > (1 - threshold) * beyond[0]).sum())
    return LoRA(Vt[:k], U[:, :k] * S[:k], 1.0)


@dataclass(frozen=True)
class FLoRIST(RestartingMethod):
    """FLoRA with a thin download: the round's mean is cut at a share of its energy, then merged.

    `W ← W + T_k(G)`, `G = Σ p_i s_i B_i A_i`, `k = min{k: Σ_{j<=k} σ_j² >= threshold · Σ σ_j²}`.
    Broadcast: W in the base, `B = 0` and a random A whose first r rows serve rank r.

    Inferred: the scale of every client is folded in; one draw of A for all. In v1 of the paper,
    Algorithm 1, clients merge the k components and start from fresh adapters of their own rank. 0.9
    is the default of the released code; the paper tunes it between 0.8 and 0.99 per model.
    Cost: QR of the stacked factors and an SVD of inner size `Σ r_i` per layer, never m x n; the factors
    of the whole cohort are in memory at once.
    Client: keeps its base and merges k components into it each round; one that sat out a round is sent W
    whole. k follows from the data: `min(Σ r_i (m + n), m n)` is an upper bound of the download.
    Nearest neighbour: FLoRA, which is threshold 1.
    Limitation: what the threshold cuts is lost, up to a share 1 - threshold of every round's energy;
    every round begins with a random A that knows nothing.
    """

    threshold: float = 0.9

    mixed_ranks: ClassVar[bool] = True
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "gauge"})
    reference: ClassVar[Reference] = Reference.arxiv("2506.09199")

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"florist: threshold must be in (0, 1], got {self.threshold}")

    def aggregate(self, state: Grown, updates: Iterable[Update]) -> Grown:
        mean = concat((u.weight, u.lora) for u in checked(updates, state.full.shape))
        return self.merge(state, [(1.0, truncate_to_share(mean, self.threshold))])
