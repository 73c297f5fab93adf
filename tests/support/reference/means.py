"""Rules that average factors, as they are printed: dense products, loops and masks, float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support.reference.dense import Client


def stacked(terms: Sequence[Tensor]) -> Tensor:
    """The sum of a non-empty list."""
    return torch.stack(list(terms)).sum(dim=0)


def mean_product(clients: Sequence[Client]) -> Tensor:
    """`M = Σ p_i B_i A_i`, without the scale."""
    return stacked([c.p * c.B @ c.A for c in clients])


def hetlora(top: int, clients: Sequence[Client]) -> Tensor:
    """`(Σ p_i s_i [B_i 0]) (Σ p_i [A_i; 0])`."""
    (m, _), (_, n) = clients[0].B.shape, clients[0].A.shape
    A, B = torch.zeros(top, n, dtype=torch.float64), torch.zeros(m, top, dtype=torch.float64)
    for p, s, Bi, Ai in clients:
        lacking = top - Ai.shape[0]
        A += p * torch.cat([Ai, torch.zeros(lacking, n, dtype=torch.float64)])
        B += p * s * torch.cat([Bi, torch.zeros(m, lacking, dtype=torch.float64)], dim=1)
    return B @ A


def rbla(s: float, B: Tensor, A: Tensor, clients: Sequence[Client]) -> Tensor:
    """One component after the other: `Σ_j b_j a_jᵀ`, each the mean of those who have it."""
    W = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for j in range(A.shape[0]):
        having = [c for c in clients if c.A.shape[0] > j]
        share = sum(c.p for c in having)
        a = stacked([c.p / share * c.A[j] for c in having]) if having else A[j]
        b = stacked([c.p / share * c.s * c.B[:, j] for c in having]) if having else s * B[:, j]
        W += torch.outer(b, a)
    return W


def fslora(
    s: float, B: Tensor, A: Tensor, clients: Sequence[Client], sets: Sequence[Tensor]
) -> Tensor:
    """`A + Σ p_i S_i (S_iᵀ-lifted A_i - A)` with 0-1 matrices S_i, and B in the server's units."""
    R, new_A, new_B = A.shape[0], A.clone(), B.clone()
    for (p, si, Bi, Ai), index in zip(clients, sets, strict=True):
        lift = torch.eye(R, dtype=torch.float64)[
            :, index
        ]  # (R, r): puts r components in their place
        mask = lift @ lift.T
        new_A += p * (lift @ Ai - mask @ A)
        new_B += p * (Bi * (len(index) / R) * (si / s) @ lift.T - B @ mask)
    return s * new_B @ new_A


def lora_fair(clients: Sequence[Client], lam: float) -> Tensor:
    """`min ||(B̄ + ΔB) Ā - M||² + μ ||ΔB||²`, as one least-squares problem in ΔBᵀ."""
    A, B = stacked([c.p * c.A for c in clients]), stacked([c.p * c.B for c in clients])
    r = A.shape[0]
    root = (lam * A.square().sum() / r).sqrt()
    left = torch.cat([A.T, root * torch.eye(r, dtype=torch.float64)])
    right = torch.cat([(mean_product(clients) - B @ A).T, torch.zeros_like(B.T)])
    return clients[0].s * (B + torch.linalg.lstsq(left, right).solution.T) @ A


def flora_na(clients: Sequence[Client], sweeps: int) -> Tensor:
    """Alternating least squares on the flattened dense products."""
    M = mean_product(clients)
    a = b = torch.tensor([c.p for c in clients], dtype=torch.float64)

    def nearer(x: Tensor, products: Sequence[Tensor]) -> Tensor:
        X = torch.stack([P.flatten() for P in products], dim=1)
        missing = M.flatten() - X @ x
        # The cutoff of the method, √eps on squares, is its root on the products themselves.
        cutoff = torch.finfo(torch.float64).eps ** 0.25
        step = torch.linalg.lstsq(X, missing[:, None], rcond=cutoff, driver="gelsd").solution
        return x + step[:, 0]

    A, B = (stacked([c.p * x for c, x in zip(clients, xs, strict=True)]) for xs in factors(clients))
    for _ in range(sweeps):
        b = nearer(b, [c.B @ A for c in clients])
        B = stacked([w * c.B for w, c in zip(b, clients, strict=True)])
        a = nearer(a, [B @ c.A for c in clients])
        A = stacked([w * c.A for w, c in zip(a, clients, strict=True)])
    return clients[0].s * B @ A


def factors(clients: Sequence[Client]) -> tuple[list[Tensor], list[Tensor]]:
    return [c.A for c in clients], [c.B for c in clients]


def fedex_lora(base: Tensor, clients: Sequence[Client]) -> Tensor:
    """`base + (M - B̄ Ā) + B̄ Ā`, in effective units."""
    A, B = stacked([c.p * c.A for c in clients]), stacked([c.p * c.B for c in clients])
    s = clients[0].s
    return base + s * (mean_product(clients) - B @ A) + s * B @ A


def fedmomentum(base: Tensor, clients: Sequence[Client]) -> tuple[Tensor, Tensor]:
    """What trains on, `T_r(s M)`, and the new base, `base + s M - T_r(s M)`, in effective units."""
    P, r = clients[0].s * mean_product(clients), clients[0].A.shape[0]
    U, S, Vt = torch.linalg.svd(P)
    cut = (U[:, :r] * S[:r]) @ Vt[:r]
    return cut, base + P - cut


def frlora(base: Tensor, s: float, B0: Tensor, A0: Tensor, clients: Sequence[Client]) -> Tensor:
    """The new base, `base + s (B̄ Ā - B0 A0)`."""
    A, B = stacked([c.p * c.A for c in clients]), stacked([c.p * c.B for c in clients])
    return base + s * B @ A - s * B0 @ A0
