"""SD-LoRA: old directions stay, each with a learnt magnitude, and a new one is trained (arXiv 2501.13198)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, initial, own
from fedhl.method import Broadcast, Method, Reference, Update, with_past
from fedhl.methods.one_adapter import mean_factors, whole
from fedhl.seeds import derive


@dataclass(frozen=True, eq=False)
class Directions:
    """`lora`: the pair in training; `past`: the frozen directions, k of the same rank one after the
    other; `magnitudes (k,)`: one number for each; `seed` names the draws of the pairs to come."""

    lora: LoRA
    past: LoRA
    magnitudes: Tensor
    seed: int


@dataclass(frozen=True)
class SDLoRA(Method[Directions]):
    """When new labels arrive the adapter is frozen as a direction whose magnitude goes on learning.

    `ΔW = s (Σ_k α_k D_k + B A)`, `D_k = B_k A_k / (||B_k||_F ||A_k||_F)`. Clients train A, B and the α_k;
    `A = Σ p_i A_i`, `B = Σ p_i B_i`, `α_k = Σ p_i α_{k,i}`. As a task ends, `D_{t+1}` is made of the
    trained pair, `α_{t+1} = ||B||_F ||A||_F`, and the next pair begins with a fresh A and `B = 0`.

    Inferred: the federation of a centralised method, that is the means; a magnitude for each layer
    (the published code has one for all layers, a factor on the pair in training, and starts every
    magnitude again at 0.8 with each task; here a task begins with the model that the last one left).
    Cost: none to speak of.
    Client: stores nothing between rounds; it downloads the pair and all frozen directions, `r (m + n)`
    numbers per layer and task, and a magnitude for each, which also comes back. `traffic` is that of the
    first task, which has no frozen directions.
    Nearest neighbour: FedIT, which it is until new labels arrive; then FedIT goes on with the same pair.
    Limitation: the state and the clients' forward pass grow with every task; within a task cross terms
    as in FedIT; ranks and scales must be equal.
    """

    mixed_ranks: ClassVar[bool] = False
    laws: ClassVar[frozenset[str]] = frozenset({"no-op", "one client"})
    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "whole"
    reference: ClassVar[Reference] = Reference.arxiv("2501.13198")

    def init(self, lora: LoRA, seed: int = 0) -> Directions:
        lora = own(lora)
        none = LoRA(
            lora.A.new_zeros(0, lora.A.shape[1]), lora.B.new_zeros(len(lora.B), 0), lora.scale
        )
        return Directions(lora, none, lora.A.new_zeros(0), seed)

    def broadcast(self, state: Directions, rank: int, scale: float, key: int = 0) -> Broadcast:
        lora = whole("sd_lora", state.lora, rank, scale)
        if not len(state.magnitudes):
            return Broadcast(lora)
        return Broadcast(lora, past=state.past, magnitudes=state.magnitudes.clone())

    def aggregate(self, state: Directions, updates: Iterable[Update]) -> Directions:
        lora = mean_factors("sd_lora", state.lora, updates, "AB")
        alpha = torch.zeros_like(state.magnitudes)
        for update in updates:
            theirs = update.magnitudes
            theirs = alpha.new_zeros(0) if theirs is None else theirs.to(alpha)
            if theirs.shape != alpha.shape or not theirs.isfinite().all():
                raise ValueError(
                    f"an update must have {len(alpha)} finite magnitudes, got {theirs.tolist()}"
                )
            alpha += update.weight * theirs
        return Directions(lora, state.past, alpha, state.seed)

    def delta(self, state: Directions) -> LoRA:
        return with_past(state.lora, state.past, state.magnitudes)

    def next_task(self, state: Directions) -> Directions:
        """A pair that no client has trained, with `B = 0`, stays as it is: it has no direction yet."""
        lora, past, k = state.lora, state.past, len(state.magnitudes)
        a, b = torch.linalg.vector_norm(lora.A), torch.linalg.vector_norm(lora.B)
        if not a * b > 0:
            return state
        A, B = torch.cat([past.A, lora.A / a]), torch.cat([past.B, lora.B / b], dim=1)
        fresh = initial(*lora.shape, lora.rank, lora.scale, derive(state.seed, "task", k + 1))
        return Directions(
            LoRA(fresh.A.to(lora.A), fresh.B.to(lora.B), lora.scale),
            LoRA(A, B, lora.scale),
            torch.cat([state.magnitudes, (a * b)[None]]),
            state.seed,
        )
