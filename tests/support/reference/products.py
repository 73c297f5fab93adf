"""The rules that average products, as they are printed: dense, float64, client by client."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.reference.dense import Client, truncation


def raflora(kept: Tensor, clients: Sequence[Client]) -> Tensor:
    """One product per partition of the ranks `r_1 < r_2 < ...`, over the clients that reach its end.

    `kept (m, n)`: what the server would have sent above the highest rank.
    """
    new = kept.clone()
    ranks = sorted({len(c.A) for c in clients})
    for low, high in zip([0, *ranks], ranks, strict=False):
        having = [c for c in clients if len(c.A) >= high]
        total = sum(c.p for c in having)
        for p, s, B, A in having:
            new += p / total * s * B[:, low:high] @ A[low:high]
    return new


def eclora(W: Tensor, top: int, clients: Sequence[Client]) -> Tensor:
    """The mean, and what the last truncation to the top rank left out."""
    return mean(clients) + (W - truncation(W, top))


def mean(clients: Sequence[Client]) -> Tensor:
    """`Σ p_i s_i B_i A_i`, as the product of the stacked factors."""
    B = torch.cat([c.p * c.s * c.B for c in clients], dim=1)
    return B @ torch.cat([c.A for c in clients])


def flora(W: Tensor, clients: Sequence[Client]) -> Tensor:
    """Stack and merge."""
    return W + mean(clients)


def florist(W: Tensor, clients: Sequence[Client], threshold: float) -> Tensor:
    """Stack, keep the fewest components with the share `threshold` of the energy, merge."""
    energy = torch.linalg.svdvals(mean(clients)).square()
    k = next(k for k in range(len(energy) + 1) if energy[:k].sum() >= threshold * energy.sum())
    return W + truncation(mean(clients), k)


def hlora(rank: int, clients: Sequence[Client]) -> Tensor:
    """Both factors scaled by `√p_i` (and one by `s_i`), stacked, cut to the bank's rank."""
    B = torch.cat([c.p**0.5 * c.s * c.B for c in clients], dim=1)
    A = torch.cat([c.p**0.5 * c.A for c in clients])
    return truncation(B @ A, rank)
