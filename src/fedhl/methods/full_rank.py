"""The family of methods that keep a dense W per layer and send prefixes of its SVD."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, add_products, own, prefix, refill
from fedhl.method import Broadcast, Method, Update, changes, check_broadcast, checked
from fedhl.seeds import derive
from fedhl.subspace import energy, leading


@dataclass(frozen=True, eq=False)
class FullRank:
    """`W (m, n)`: the global change; `sent`: its truncation to the top rank, scale 1, of which every
    client's broadcast is a prefix; `tail = ||W - ΔW(sent)||_F²`; `seed` and `round` name the draw of
    dead components."""

    W: Tensor
    sent: LoRA
    tail: float
    seed: int
    round: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]


@dataclass(frozen=True, eq=False)
class Tailed:
    """`full`: W with its truncation to the highest rank that is downloaded; `top`: the highest rank that is
    trained."""

    full: FullRank
    top: int


def begin(lora: LoRA, seed: int) -> FullRank:
    """`W = ΔW(lora)`, and the adapter's own A with `B = 0` to send, `A_r` being its first r rows.

    Raises ValueError if the adapter has more components than the layer has rank.
    """
    check_top(lora)
    lora = own(lora)
    W = lora.delta()
    return FullRank(W, unsent(lora), energy(W), seed, 0)


def check_top(lora: LoRA) -> None:
    """Raises ValueError if the adapter has more components than the layer has rank."""
    if lora.rank > min(lora.shape):
        raise ValueError(f"the top rank must be <= {min(lora.shape)} here, got {lora.rank}")


def unsent(lora: LoRA) -> LoRA:
    """The adapter's A with `B = 0`, scale 1."""
    return LoRA(lora.A, torch.zeros_like(lora.B), 1.0)


def start(lora: LoRA, seed: int, exact: bool = False) -> FullRank:
    """`begin`, with the truncation of W to send. If W is zero its SVD would send `A = B = 0`, which never
    trains: then the initial adapter's own A is sent.
    """
    return move(replace(begin(lora, seed), round=-1), exact=exact)


def move(state: FullRank, W: Tensor | None = None, exact: bool = False) -> FullRank:
    """The state one round later, with W in its place and a new truncation, computed once: from the
    subspace of the last one, or by a full SVD if `exact`."""
    W = state.W if W is None else W
    round = state.round + 1
    if not energy(W):  # also when W has come back to zero: then the last B must not be sent again
        return FullRank(W, unsent(state.sent), 0.0, state.seed, round)
    B, A, tail = leading(W, state.sent.rank, state.sent.A, exact)
    sent = refill(LoRA(A, B, 1.0), len(A), derive(state.seed, "refill", round))
    return FullRank(W, sent, tail, state.seed, round)


def send(state: FullRank, rank: int, scale: float) -> Broadcast:
    """`B = U_r S_r / s`, `A = V_rᵀ`. Raises ValueError unless rank is in 1..top rank and s > 0."""
    check_broadcast(rank, scale, state.sent.rank)
    return Broadcast(prefix(state.sent, rank, scale))


def lost(state: FullRank, rank: int) -> float:
    """`||W - T_rank(W)||_F²`, from the singular values: `tail + Σ_{j>rank} σ_j²`."""
    return state.tail + float(state.sent.B[:, rank:].double().square().sum())


def unbiased(state: FullRank, updates: Iterable[Update]) -> Tensor:
    """`W + Σ p_i (s_i B_i A_i - ΔW(sent_i))`: FedHL's sum, which truncation does not bias.

    Subtracted is the broadcast as it was received, after the rounding of its payload: `ΔW(sent)` times the
    weight of all clients that were sent the same. The server builds one broadcast for all clients of a rank
    and scale, so that there are few terms.
    """
    return add_products(state.W, changes(checked(updates, state.shape)))


class FullRankMethod(Method[FullRank]):
    """A method of the family: with W as its state, and `T_r(W)` for a client of rank r, as a prefix."""

    per_client: ClassVar[bool] = False
    starts: ClassVar[str] = "truncation"

    def init(self, lora: LoRA, seed: int = 0) -> FullRank:
        return start(lora, seed)

    def broadcast(self, state: FullRank, rank: int, scale: float, key: int = 0) -> Broadcast:
        return send(state, rank, scale)

    def delta(self, state: FullRank) -> Tensor:
        return state.W

    def lost(self, state: FullRank, rank: int) -> float:
        """`||W - T_rank(W)||_F²`: see `fedhl.method.Truncating`."""
        return lost(state, rank)
