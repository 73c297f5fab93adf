"""The size of each client's update, and the rules for updates that are too large: clipped, or refused.

The size is that of the product, never of the factors: `(B G, G⁻¹ A)` is the same update as `(B, A)`, and a
small change of both factors of a large product is a large change. All float64, on one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from fedhl.method import Update, scaled


def change(update: Update) -> tuple[Tensor, Tensor]:
    """`ΔW_i - ΔW(sent_i)` as `B A`: B (m, r + r_sent), A (r + r_sent, n), float64."""
    lora, sent = update.whole, update.sent.whole
    A = torch.cat([lora.A.double(), sent.A.double()])
    B = torch.cat([lora.scale * lora.B.double(), -sent.scale * sent.B.double()], dim=1)
    return B, A


def squared_change(update: Update) -> float:
    """`||ΔW_i - ΔW(sent_i)||_F²`, rounded up, from k x k Gram matrices: `<BᵀB, A Aᵀ>`, never dense.

    Large factors may cancel in a small product, and rounding may hide the rest. So the bound of the rounding
    error is added, `(m + n + k²) eps ||B||_F² ||A||_F²`: a norm that is too small would leave a client
    unclipped.
    """
    B, A = change(update)
    gram = float(((B.T @ B) * (A @ A.T)).sum())
    terms = len(B) + A.shape[1] + len(A) ** 2
    size = float(B.square().sum()) * float(A.square().sum())
    return max(0.0, gram) + terms * torch.finfo(torch.float64).eps * size


def squared_head_change(start: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> float:
    """`Σ ||h_i - h||²` over the parameters outside the adapters."""
    return sum(float((head[n].double() - h.double()).square().sum()) for n, h in start.items())


def clip_factors(norms: Sequence[float], bound: float | None) -> list[float]:
    """`c_i = min(1, C / ||change_i||)`; 1 for all without a bound C."""
    if bound is None:
        return [1.0] * len(norms)
    return [1.0 if norm <= bound else bound / norm for norm in norms]


def clipped(update: Update, c: float) -> Update:
    """The update with its change multiplied by c; the update itself if c = 1. For methods that sum
    products."""
    return update if c == 1 else scaled(update, c)


def clipped_head(
    start: Mapping[str, Tensor], head: Mapping[str, Tensor], c: float
) -> Mapping[str, Tensor]:
    """`h + c (h_i - h)`; the head itself if c = 1."""
    if c == 1:
        return head
    moved = {name: h.double() + c * (head[name].double() - h.double()) for name, h in start.items()}
    return {name: value.to(head[name]) for name, value in moved.items()}


def counted_rows(examples: Tensor, times: float) -> Tensor:
    """The rows with which clients count, (K,): at most `times` the median of what they report, of two middle
    ones the lower."""
    return examples.clamp(max=times * float(examples.median()))


class Rejection(Protocol):
    """For each client the reason to refuse it in this round, or None, from the norms of all that arrived."""

    def __call__(self, norms: Sequence[float]) -> list[str | None]: ...


@dataclass(frozen=True)
class Median:
    """Refuses clients whose norm is more than `factor` times the median of the norms.

    Works as long as fewer than half of the clients that arrived are faulty. Raises ValueError unless
    `factor >= 1`, below which about half of the clients would be refused in every round.
    """

    factor: float

    def __post_init__(self) -> None:
        if not self.factor >= 1:  # also when it is NaN
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    def __call__(self, norms: Sequence[float]) -> list[str | None]:
        if not norms:
            return []
        middle = median(norms)
        return [
            f"its update has norm {norm:.3g}, more than {self.factor:g} times the median of {middle:.3g} "
            "(robust.reject)"
            if norm > self.factor * middle
            else None
            for norm in norms
        ]


@dataclass(frozen=True)
class Trimmed:
    """Refuses the `⌊share · K⌋` of K clients with the largest norms; of equal ones, the last.

    Honest clients too, in every round: first the clients of high rank or rare data.
    Raises ValueError unless `0 < share < 1`.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:  # also when it is NaN
            raise ValueError(f"share must be above 0 and below 1, got {self.share}")

    def __call__(self, norms: Sequence[float]) -> list[str | None]:
        count = int(self.share * len(norms))
        furthest = sorted(range(len(norms)), key=lambda k: (norms[k], k))[len(norms) - count :]
        return [
            f"its update has norm {norm:.3g}, among the {count} largest of {len(norms)} "
            "(robust.reject)"
            if k in furthest
            else None
            for k, norm in enumerate(norms)
        ]


@dataclass(frozen=True)
class Guard:
    """`reject`: the rule that refuses updates; `clip`: the largest norm of the other updates, over all layers
    and the head together; `rows`: the most rows with which a client counts, as a multiple of the median.
    Raises ValueError unless `clip` is positive, and `rows` at least 1."""

    clip: float | None = None
    reject: Rejection | None = None
    rows: float = 3.0

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:  # also when it is NaN
            raise ValueError(f"clip must be positive, got {self.clip}")
        if not self.rows >= 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
