"""The problems to time: states of given spectra, cohorts, and the layer shapes of real models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedhl.lora import LoRA, refill
from fedhl.method import Broadcast, Update
from fedhl.methods.fedhl import FedHL
from fedhl.methods.full_rank import FullRank
from fedhl.seeds import generator
from fedhl.subspace import leading

RANKS = (4, 8, 16, 32, 64)
TOP = 64
SIDE = 4096
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "fast, 2^(-j/8)": lambda j: 2 ** (-j / 8),
    "1/j": lambda j: 1 / j,
    "slow, 1/sqrt j": lambda j: j**-0.5,
}
SMOLLM2 = {
    **{"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)},
    **{"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)},
}
BLOCKS = {"smollm2": 30, "llama2": 32}


def orthogonal(n: int, seed: int, columns: int | None = None) -> Tensor:
    """Orthonormal columns (n, columns); by default n columns."""
    return torch.linalg.qr(torch.randn(n, columns or n, generator=generator(seed, "bench"))).Q


def with_spectrum(sigma: Tensor, bases: tuple[Tensor, Tensor]) -> Tensor:
    return (bases[0] * sigma.float()) @ bases[1].T


def harmonic(m: int, n: int) -> Tensor:
    """W (m, n) with the singular values 1/j."""
    k = min(m, n)
    return with_spectrum(1 / torch.arange(1, k + 1), (orthogonal(m, 1, k), orthogonal(n, 2, k)))


def state_of(W: Tensor) -> FullRank:
    """The server's state of one layer with this W."""
    B, A, tail = leading(W, TOP)
    return FullRank(W, refill(LoRA(A, B, 1.0), TOP, 0), tail, 0, 0)


def draw_ranks(clients: int, seed: int = 0) -> list[int]:
    """A random rank for each client."""
    g = generator(seed, "ranks")
    return [RANKS[int(torch.randint(len(RANKS), (1,), generator=g))] for _ in range(clients)]


def cohort(state: FullRank, ranks: Sequence[int], seed: int) -> list[Update]:
    """The updates of clients that each moved by about a fifth of the norm of their broadcast."""
    size = 0.2 * float(state.sent.B.norm())
    sent = {rank: FedHL().broadcast(state, rank, 2.0) for rank in set(ranks)}
    return moved(sent, ranks, size, seed)


def moved(
    sent: Mapping[int, Broadcast], ranks: Sequence[int], size: float, seed: int
) -> list[Update]:
    """The updates of clients of these ranks, each of which moved by about `size` from its broadcast."""
    g, updates = generator(seed, "moves"), []
    for rank in ranks:
        lora = sent[rank].lora
        (m, n), device = lora.shape, lora.A.device
        A = torch.randn(rank, n, generator=g).to(device) * (0.2 / n**0.5)
        B = torch.randn(m, rank, generator=g).to(device) * (size / 2 / (m * rank) ** 0.5)
        trained = LoRA(lora.A + A, lora.B + B, lora.scale)
        updates.append(Update(sent[rank], trained, 1 / len(ranks)))
    return updates


def bare(state: FullRank, total_rank: int) -> Callable[[], Tensor]:
    """The product `B A`, which no server can do without."""
    (m, n), device = state.shape, state.W.device
    B, A = torch.randn(m, total_rank).to(device), torch.randn(total_rank, n).to(device)
    return lambda: B @ A


def to(state: FullRank, device: str) -> FullRank:
    sent = LoRA(state.sent.A.to(device), state.sent.B.to(device), 1.0)
    return replace(state, W=state.W.to(device), sent=sent)


def llama_block(side: int | None = None) -> dict[str, tuple[int, int]]:
    """The linear layers of one of Llama-2-7B's blocks, or of such a block with square matrices of another
    side."""
    side = side or SIDE
    wide = 11008 * side // 4096
    return {
        **{name: (side, side) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{"gate_proj": (wide, side), "up_proj": (wide, side), "down_proj": (side, wide)},
    }
