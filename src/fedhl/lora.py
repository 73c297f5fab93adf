"""LoRA algebra: the low-rank updates of one layer, and the sums and truncations a server needs.

Everything here is pure: tensors in, tensors out, no configuration and no global random state.
Notation: a layer's weight is `(m, n)`; an adapter of rank r is `A (r, n)`, `B (m, r)` and a scale s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedhl.seeds import generator
from fedhl.subspace import check_rank, leading


@dataclass(frozen=True, eq=False)
class LoRA:
    """A low-rank update of one layer, `ΔW = scale · B A` with `A (r, n)` and `B (m, r)`.

    `scale` is what PEFT calls scaling: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    Raises ValueError if the factors are not matrices of one rank.
    """

    A: Tensor
    B: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                "a LoRA needs A of shape (r, n) and B of shape (m, r), "
                f"got A {tuple(self.A.shape)} and B {tuple(self.B.shape)}"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`, the shape of the layer."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """The dense update `scale · B A`, shape (m, n)."""
        return self.scale * (self.B @ self.A)


def dense(delta: LoRA | Tensor) -> Tensor:
    """The update as a dense (m, n) tensor, whichever way it is held."""
    return delta.delta() if isinstance(delta, LoRA) else delta


def working(x: Tensor) -> Tensor:
    """`x` in the precision of the server's arithmetic: float64 stays, narrower types become float32."""
    return x if x.dtype == torch.float64 else x.float()


def own(lora: LoRA) -> LoRA:
    """A copy in working precision and row-major order, which shares no memory with the caller's."""
    A = working(lora.A).clone(memory_format=torch.contiguous_format)
    B = working(lora.B).clone(memory_format=torch.contiguous_format)
    return LoRA(A, B, lora.scale)


def initial(m: int, n: int, rank: int, scale: float, seed: int) -> LoRA:
    """A fresh adapter: `B = 0`, `A ~ U(-1/√n, 1/√n)` as PEFT draws it; its first r rows serve rank r."""
    check_rank(rank, m, n)
    A = (2 * torch.rand(rank, n, generator=generator(seed, "initial A")) - 1) / n**0.5
    return LoRA(A, torch.zeros(m, rank), scale)


def empty(W: Tensor) -> LoRA:
    """An adapter of rank 0 for a matrix like W (m, n)."""
    return LoRA(W.new_zeros(0, W.shape[1]), W.new_zeros(W.shape[0], 0), 1.0)


def prefix(lora: LoRA, rank: int, scale: float) -> LoRA:
    """The first `rank` components of `lora`, written for a client whose scale is `scale`; a copy."""
    return LoRA(lora.A[:rank].clone(), lora.B[:, :rank] * (lora.scale / scale), scale)


def pad(lora: LoRA, rank: int) -> LoRA:
    """The same update with zero components up to `rank`. Raises ValueError if its rank is higher."""
    extra = rank - lora.rank
    if extra < 0:
        raise ValueError(f"cannot pad rank {lora.rank} down to {rank}")
    if not extra:
        return lora
    m, n = lora.shape
    A = torch.cat([lora.A, lora.A.new_zeros(extra, n)])
    B = torch.cat([lora.B, lora.B.new_zeros(m, extra)], dim=1)
    return LoRA(A, B, lora.scale)


def concat(terms: Iterable[tuple[float, LoRA]]) -> LoRA:
    """`Σ w ΔW` over (weight, adapter) pairs as one adapter of scale 1; its rank is the sum of ranks.

    Raises ValueError for no terms.
    """
    terms = list(terms)
    if not terms:
        raise ValueError("nothing to concatenate: expected at least one adapter")
    A = torch.cat([working(lora.A) for _, lora in terms])
    B = torch.cat([working(lora.B) * (w * lora.scale) for w, lora in terms], dim=1)
    return LoRA(A, B, 1.0)


def plus(lora: LoRA, Z: Tensor) -> LoRA:
    """`ΔW + Z` for a dense Z (m, n), as an adapter whose rank is larger by min(m, n)."""
    m, n = Z.shape
    Z, one = (Z / lora.scale).to(lora.B), torch.eye(min(m, n)).to(lora.B)
    B, A = (Z, one) if n <= m else (one, Z)
    return LoRA(torch.cat([lora.A, A.to(lora.A)]), torch.cat([lora.B, B], dim=1), lora.scale)


def add_products(W: Tensor, terms: Iterable[tuple[float, LoRA]], block: int = 512) -> Tensor:
    """`W + Σ w ΔW` over (weight, adapter) pairs, shape (m, n); `W` itself is not touched.

    Terms are consumed one by one and multiplied in blocks of inner size `block` or a little more:
    wide enough for the product to be compute-bound, and memory does not grow with their number.
    """
    total = W.clone()
    held: list[tuple[float, LoRA]] = []
    width = 0

    def flush() -> None:
        if held:
            stacked = concat(held)
            total.addmm_(stacked.B.to(total), stacked.A.to(total))
            held.clear()

    for w, lora in terms:
        held.append((w, lora))
        width += lora.rank
        if width >= block:
            flush()
            width = 0
    flush()
    return total


class SVD(NamedTuple):
    """`U diag(S) Vt`: U (m, k), S (k,) descending, Vt (k, n)."""

    U: Tensor
    S: Tensor
    Vt: Tensor


def svd(delta: LoRA | Tensor) -> SVD:
    """The exact thin SVD. An adapter is decomposed through its factors, never densely:
    QR of B and of Aᵀ, then the SVD of an r x r matrix.
    """
    if isinstance(delta, Tensor):
        return SVD(*torch.linalg.svd(delta, full_matrices=False))
    Qb, Rb = torch.linalg.qr(delta.scale * delta.B)
    Qa, Ra = torch.linalg.qr(delta.A.T)
    U, S, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return SVD(Qb @ U, S, Vt @ Qa.T)


def truncate(delta: LoRA | Tensor, rank: int) -> LoRA:
    """`T_r(ΔW)`, the best rank-r approximation, as `B = U_r S_r`, `A = V_rᵀ`, scale 1.

    Of a large matrix within the tolerance of `fedhl.subspace.leading`; of an adapter through its
    factors, exactly. Raises ValueError unless `rank` is in 1..min(m, n). A LoRA of rank <= `rank`
    keeps its rank.
    """
    if isinstance(delta, Tensor):
        B, A, _ = leading(delta, rank)
        return LoRA(A, B, 1.0)
    check_rank(rank, *delta.shape)
    U, S, Vt = svd(delta)
    # Copies in row-major order, as in `leading`.
    A = Vt[:rank].clone(memory_format=torch.contiguous_format)
    return LoRA(A, (U[:, :rank] * S[:rank]).contiguous(), 1.0)


def trainable_truncation(W: LoRA | Tensor, rank: int, seed: int) -> LoRA:
    """`T_rank(W)` in factors of which every component can learn, shapes A (rank, n), B (m, rank), scale 1;
    an adapter may have fewer components than `rank`. See `refill`.
    """
    return refill(truncate(W, rank), rank, seed)


def refill(cut: LoRA, rank: int, seed: int) -> LoRA:
    """The truncation `cut`, `B = U S` and `A = Vᵀ`, with `rank` components that can all learn: A (rank, n),
    B (m, rank), scale 1.

    Where σ_j is numerically zero, `B` is zero and the row of `A` is replaced by a seeded random
    unit vector orthogonal to the other rows: with both factors zero neither would ever get a
    gradient. The product is unchanged up to the rounding of W itself: the energy of the replaced
    components is at most `(8 eps)²` of the whole, which for float32 is the floor of `leading`.
    """
    m, n = cut.shape
    energy = cut.B.double().square().sum(0)
    beyond = energy.flip(0).cumsum(0).flip(0)  # Σ_{k>=j} σ_k²
    live = int((beyond > (8 * torch.finfo(cut.B.dtype).eps) ** 2 * beyond[0]).sum())
    if live == rank:
        return cut
    fresh = torch.randn(rank - live, n, generator=generator(seed, "refill"), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([cut.A[:live], fresh.to(cut.A)]).T)
    A = torch.cat([cut.A[:live], basis[:, live:].T])
    B = torch.cat([cut.B[:, :live], cut.B.new_zeros(m, rank - live)], dim=1)
    return LoRA(A, B, 1.0)


def squared_norm(terms: Iterable[tuple[float, LoRA]]) -> float:
    """`||Σ w ΔW||_F²` in float64 through r x r Gram matrices: `<BᵀB, A Aᵀ>`, never dense."""
    stacked = concat(terms)
    A, B = stacked.A.double(), stacked.B.double()
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))
