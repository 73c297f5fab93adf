"""What clients of one layer return, for tests of methods: seeded noise on what they were sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedhl import LoRA, Method, Update
from fedhl.seeds import generator
from support.reference.dense import Client


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draw", *shape), dtype=torch.float64)


def answers(
    method: Method[Any],
    state: Any,
    ranks: Sequence[int],
    scales: Sequence[float],
    p: Sequence[float],
    seed: int,
) -> list[Update]:
    """What clients of these ranks, scales and weights return after moving both factors at random."""
    updates = []
    for k, (rank, scale, weight) in enumerate(zip(ranks, scales, p, strict=True)):
        sent = method.broadcast(state, rank, scale, key=seed + k)
        A, B = sent.lora.A, sent.lora.B
        moved = LoRA(A + draw(seed + k, *A.shape).to(A), B + draw(seed - k, *B.shape).to(B), scale)
        updates.append(Update(sent, moved, weight))
    return updates


def clients(updates: Sequence[Update]) -> list[Client]:
    """The same for the dense references."""
    return [Client(u.weight, u.lora.scale, u.lora.B, u.lora.A) for u in updates]
