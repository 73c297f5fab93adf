"""The aggregation rules as they are printed: one SVD per client, one dense product per client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Client(NamedTuple):
    """`p`: weight; `s`: LoRA scale; `B (m, r)`, `A (r, n)`: the factors it returned."""

    p: float
    s: float
    B: Tensor
    A: Tensor


def truncation(W: Tensor, rank: int) -> Tensor:
    """`T_r(W)`."""
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]


def fedhl(W: Tensor, clients: Sequence[Client]) -> Tensor:
    """`W + Σ p_i (s_i B_i A_i - T_{r_i}(W))`; before round 1 `W = 0`, and so is what is subtracted."""
    new = W.double().clone()
    for p, s, B, A in clients:
        new += p * (s * B.double() @ A.double() - truncation(W, A.shape[0]))
    return new


def flexlora(clients: Sequence[Client]) -> Tensor:
    """`Σ p_i s_i B_i A_i`."""
    return torch.stack([p * s * B.double() @ A.double() for p, s, B, A in clients]).sum(dim=0)


def fedit(clients: Sequence[Client]) -> Tensor:
    """`s (Σ p_i B_i)(Σ p_i A_i)`, one scale for all."""
    B = torch.stack([c.p * c.B.double() for c in clients]).sum(dim=0)
    A = torch.stack([c.p * c.A.double() for c in clients]).sum(dim=0)
    return clients[0].s * B @ A


def truncation_weights(
    layers: Sequence[Tensor], ranks: Sequence[int], power: float, epsilon: float
) -> list[float]:
    """`p_i ∝ 1/(ê_i^power + ε)`, `ê_i = Σ_l ||W_l - T_{r_i}(W_l)||² / Σ_l ||W_l||²`."""
    energy = sum(float(W.double().square().sum()) for W in layers)
    inverse = []
    for rank in ranks:
        tail = sum(float((W.double() - truncation(W, rank)).square().sum()) for W in layers)
        inverse.append(1 / ((tail / energy) ** power + epsilon))
    return [x / sum(inverse) for x in inverse]
