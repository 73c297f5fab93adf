"""SD-LoRA's update as it is printed, densely, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def direction(A: Tensor, B: Tensor) -> Tensor:
    """`B A / (||B||_F ||A||_F)`."""
    A, B = A.double(), B.double()
    return B @ A / (B.square().sum().sqrt() * A.square().sum().sqrt())


def update(s: float, past: Sequence[tuple[float, Tensor, Tensor]], A: Tensor, B: Tensor) -> Tensor:
    """`s (Σ_k α_k B_k A_k / (||B_k||_F ||A_k||_F) + B A)`; `past`: (α_k, A_k, B_k)."""
    total = B.double() @ A.double()
    for alpha, A_k, B_k in past:
        total += alpha * direction(A_k, B_k)
    return s * total


def mean(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """`Σ p_i x_i`."""
    return torch.stack([p * x.double() for p, x in zip(weights, values, strict=True)]).sum(dim=0)
