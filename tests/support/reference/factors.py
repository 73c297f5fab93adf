"""Methods that train one factor at a time, or share one: as they are printed, densely, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from support.reference.dense import Client


def total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.double() for x in terms]).sum(dim=0)


def ffa_lora(A: Tensor, clients: Sequence[Client]) -> Tensor:
    """`Σ p_i s_i B_i A` with the one A of all."""
    return total([p * s * B.double() @ A.double() for p, s, B, _ in clients])


def rolora(
    factor: Literal["A", "B"], A: Tensor, B: Tensor, clients: Sequence[Client]
) -> tuple[Tensor, Tensor]:
    """The next (A, B), `factor` being the one that was trained."""
    if factor == "B":
        return A.double(), total([c.p * c.B for c in clients])
    return total([c.p * c.A for c in clients]), B.double()


def fedsa_lora(clients: Sequence[Client]) -> Tensor:
    """`Σ p_i A_i`; nothing becomes of the B_i."""
    return total([c.p * c.A for c in clients])


def lora_a2(
    s: float, A: Tensor, B: Tensor, clients: Sequence[Client], chosen: Sequence[Tensor]
) -> Tensor:
    """`s B A` and, component by component, what every client that has it has changed in it."""
    new = s * B.double() @ A.double()
    for (p, s_i, B_i, A_i), index in zip(clients, chosen, strict=True):
        for k, j in enumerate(index.tolist()):
            new += p * s_i * torch.outer(B_i[:, k].double(), A_i[k].double())
            new -= p * s * torch.outer(B[:, j].double(), A[j].double())
    return new


def rac_lora(W: Tensor, clients: Sequence[Client]) -> Tensor:
    """`W + Σ p_i s_i B_i A_i`: every adapter started at zero and is merged."""
    return W.double() + total([p * s * B.double() @ A.double() for p, s, B, A in clients])


def fedsvd(A: Tensor, clients: Sequence[Client]) -> tuple[Tensor, Tensor]:
    """The product, and its singular values from the SVD of the m x n matrix, r of them."""
    product = ffa_lora(A, clients)
    return product, torch.linalg.svdvals(product)[: A.shape[0]]
