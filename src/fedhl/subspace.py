"""The leading singular triplets of a large matrix, found by subspace iteration and checked.

A server needs `T_r(W)` for r up to some 64, not all of `W`'s singular values. Block subspace iteration
(Halko, Martinsson and Tropp, arXiv 0909.4061) reads W twice an iteration; how many iterations it takes
depends on how fast the spectrum decays, so an a-posteriori estimate of the error decides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedhl.seeds import generator

EXACT = 512
"""Up to this `min(m, n)` a full SVD is as fast, and is taken."""
TOLERANCE, FLOOR = 1e-3, 1e-12
"""The tail energy may exceed the optimum by `TOLERANCE` of itself, or by `FLOOR · ||W||_F²`, which a
float32 W does not resolve."""
FRESH = 32
"""The least number of random columns. A direction is overlooked if it is nearly orthogonal to all of them:
the more columns, the rarer; with one or two it happens."""
LIMIT = 64
"""Iterations after which a full SVD is taken."""


class Leading(NamedTuple):
    """`W V Vᵀ` for orthonormal columns V: `B = W V (m, r)`, columns orthogonal, the longest first;
    `A = Vᵀ (r, n)`; `tail = ||W - B A||_F²`, in float64."""

    B: Tensor
    A: Tensor
    tail: float


def leading(
    W: Tensor, rank: int, start: Tensor | None = None, exact: bool = False, seed: int = 0
) -> Leading:
    """`T_rank(W)` as `B A`, of which every prefix `B[:, :r] A[:r]` is `T_r(W)`.

    W is (m, n). `start` (k, n), k <= rank: rows whose span is near that of A, e.g. the A of the last round;
    they save iterations, and change the result within the tolerance only. `seed`: of the random columns; if W
    is what earlier truncations left, it must differ from theirs. The tail energy `||W - T_r(W)||_F²`
    is within 1e-3 of the optimum, or within `1e-12 ||W||_F²`, for every r <= rank. A full SVD in W's own
    precision is taken with `exact`, for small matrices, for matrices that are hardly wider than the
    iteration, and where the iteration does not settle. Then its rounding error, up to `(max(m, n) eps)²
    ||W||_F²`, stands in place of the floor: for a constant float32 matrix it is larger. Raises ValueError
    unless rank is in 1..min(m, n).

    Source: arXiv 0909.4061, Algorithm 4.4; the estimate is Kato's and Temple's, from residuals.
    """
    m, n = W.shape
    check_rank(rank, m, n)
    if exact or min(m, n) <= max(EXACT, 2 * columns(rank)):
        return full(W, rank)
    found = iterate(W, rank, start, seed)
    return full(W, rank) if found is None else found


def check_rank(rank: int, m: int, n: int) -> None:
    """Raises ValueError unless `rank` is in 1..min(m, n)."""
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank must be in 1..{min(m, n)} for a {m} x {n} layer, got {rank}")


def full(W: Tensor, rank: int) -> Leading:
    """`leading` by the full SVD."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    # Copies in row-major order: a slice would keep all of Vᵀ in memory, and LAPACK's column-major
    # order, lost in a checkpoint, would make a resumed run differ in the last bits.
    A = Vt[:rank].clone(memory_format=torch.contiguous_format)
    return Leading(
        (U[:, :rank] * S[:rank]).contiguous(), A, float(S[rank:].double().square().sum())
    )


def columns(rank: int) -> int:
    """The number of columns of the iteration. The more columns, the fewer iterations: each iteration shrinks
    the error by `(σ_columns / σ_rank)⁴`. At least `FRESH` columns are not from `start`, to find new
    directions."""
    return rank + max(rank, FRESH)


def iterate(W: Tensor, rank: int, start: Tensor | None, seed: int = 0) -> Leading | None:
    """Subspace iteration; None if it has not settled after `LIMIT` iterations.

    Bases are in float64: only the products with W are in W's own precision.
    """
    n, known = W.shape[1], 0 if start is None else len(start)
    V = torch.randn(
        columns(rank), n, generator=generator(seed, "subspace", n), dtype=torch.float64
    ).to(W.device)
    if start is not None:
        V[:known] = start
    V = torch.linalg.qr(V.T).Q
    # Directions that the start lacks can only come from the random columns: these go ahead by an iteration.
    Q = torch.linalg.qr(times(W, V[:, known:])).Q
    V = torch.linalg.qr(torch.cat([V[:, :known], times(W.T, Q)], dim=1)).Q
    U = S = None
    whole = energy(W)
    for _ in range(LIMIT):
        Y = times(W, V)
        if S is not None and U is not None and settled(W, whole, V, S, U, Y, rank):
            break
        Q = torch.linalg.qr(Y).Q
        V, S, Pt = torch.linalg.svd(times(W.T, Q), full_matrices=False)
        U = Q @ Pt.T
    else:
        return None
    # Half an iteration more for nothing: Y = W V holds the Rayleigh-Ritz approximation from V.
    _, S, Gt = torch.linalg.svd(Y, full_matrices=False)
    B, A = (Y @ Gt.T)[:, :rank].to(W.dtype).contiguous(), (V @ Gt.T).T[:rank].to(W.dtype)
    return Leading(B, A.contiguous(), beyond(W, whole, S, B, A))


def times(W: Tensor, V: Tensor) -> Tensor:
    """`W V`, multiplied in W's own precision, in float64."""
    return (W @ V.to(W.dtype)).double()


def settled(W: Tensor, whole: float, V: Tensor, S: Tensor, U: Tensor, Y: Tensor, rank: int) -> bool:
    """Whether all tail energies up to `rank` are within tolerance, by estimate.

    For Ritz triplets with `Wᵀu_j = σ_j v_j` and `ρ_j = ||W v_j - σ_j u_j||²`, the eigenvalue of `W Wᵀ`
    exceeds σ_j² by about `σ_j² ρ_j / (σ_j² - d)`, where d is the largest eigenvalue that is left out; the
    smallest Ritz value stands for d (Kato and Temple). The tail is too large by their sum. The bound is a
    quarter of the tolerance, since d is an estimate.

    A pair beyond `rank` may be an eigenvector on its way to the front. So the tail must also be within
    tolerance if each of these turned out as large as its residual allows, `σ_j² + σ_j √ρ_j` (Weinstein).
    `Y = W V`.
    """
    theta, residual = S.square(), (Y - U * S).square().sum(0)
    gap = (theta - theta[-1]).clamp(min=torch.finfo(torch.float64).tiny)
    growth = (theta * residual / gap)[:rank]
    possible = torch.cat([theta[:rank] + growth, theta[rank:] + (theta * residual)[rank:].sqrt()])
    overtaken = possible.sort(descending=True).values[:rank] - theta[:rank]
    excess = torch.maximum(4 * growth.cumsum(0), overtaken.cumsum(0))
    if float(excess.max()) <= FLOOR * whole:
        return True
    last = beyond(W, whole, S[:rank], Y[:, :rank], V.T[:rank])
    tails = last + theta[:rank].flip(0).cumsum(0).flip(0) - theta[:rank]
    return bool((excess <= (TOLERANCE * tails).clamp(min=FLOOR * whole)).all())


def beyond(W: Tensor, whole: float, S: Tensor, B: Tensor, A: Tensor) -> float:
    """`||W - B A||_F² = ||W||_F² - Σ σ_j²`; the difference itself where that would cancel."""
    tail = whole - float(S[: len(A)].square().sum())
    if tail > 1e-4 * whole:
        return tail
    A = A.to(W.dtype)
    blocks = zip(W.split(512), B.to(W.dtype).split(512), strict=True)
    return sum(energy(torch.addmm(rows, b, A, alpha=-1)) for rows, b in blocks)


def energy(W: Tensor) -> float:
    """`||W||_F²` in float64, in blocks of rows that stay in the cache, all in one block of memory."""
    block = W.new_empty(min(64, len(W)), W.shape[1], dtype=torch.float64)
    return float(sum(block[: len(rows)].copy_(rows).square_().sum() for rows in W.split(64)))
