"""Diagnostics of a round: the quantities of the convergence conditions. Pure, per layer.

A truncation error that does not vanish, an aggregation error that does not shrink with the step
size, weights far from the data's: each costs convergence (see docs/maths.md). All float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedhl.lora import LoRA, add_products, dense, squared_norm, svd, working
from fedhl.method import Broadcast, Update, directions
from fedhl.subspace import energy


def truncation_error(delta: Tensor, sent: Broadcast) -> float:
    """`e = ||delta - base - ΔW(merged) - ΔW(sent)||_F²`: the part of the global change that a client's
    start lacks.

    The difference is taken before squaring, in float64: `||W||² - Σ σ²` would cancel.
    """
    missing = delta.double()
    for lora in filter(None, (sent.whole, sent.merged)):
        missing = missing - lora.scale * (lora.B.double() @ lora.A.double())
    if sent.base is not None:
        missing -= sent.base
    return float(missing.square().sum())


def moved(update: Update) -> float:
    """`||ΔW_i - ΔW(sent_i)||_F²`, how far a client moved, through small Gram matrices."""
    return squared_norm([(1.0, update.whole), (-1.0, update.sent.whole)])


def step(before: LoRA | Tensor, after: LoRA | Tensor) -> float:
    """`||W_{t+1} - W_t||_F²`, how far the global change moved; of adapters through small Gram matrices."""
    if isinstance(before, LoRA) and isinstance(after, LoRA):
        return squared_norm([(1.0, after), (-1.0, before)])
    return energy(dense(after) - dense(before))


def of_products(updates: Iterable[Update]) -> Tensor:
    """`Σ p_i s_i B_i A_i`, shape (m, n), for `aggregation_error` and `product_gap`."""
    first = next(iter(updates)).lora
    zero = working(first.B).new_zeros(first.shape)
    return add_products(zero, ((u.weight, u.lora) for u in updates))


def aggregation_error(
    before: LoRA | Tensor, after: LoRA | Tensor, updates: Iterable[Update], products: Tensor
) -> float:
    """`||W_{t+1} - (W_t + Σ p_i (ΔW_i - ΔW(sent_i)))||_F²`: the error of the aggregation."""
    expected = add_products(dense(before), remaining_terms(updates))
    return energy(dense(after) - expected - products.to(expected))


def remaining_terms(updates: Iterable[Update], most: int = 512) -> Iterator[tuple[float, LoRA]]:
    """The terms of `Σ p_i (ΔW_i - s_i B_i A_i - ΔW(sent_i))`: the frozen directions, and the broadcasts, one
    term for all clients that were sent the same. Broadcasts of at most `most` components are held at once."""
    held: dict[int, tuple[float, Broadcast]] = {}
    for u in updates:
        frozen = directions(u.sent.past, u.magnitudes)
        if frozen is not None:
            yield u.weight, frozen
        weight, sent = held.get(id(u.sent), (0.0, u.sent))
        held[id(sent)] = weight - u.weight, sent
        if sum(sent.lora.rank for _, sent in held.values()) > most:
            yield from ((w, sent.whole) for w, sent in held.values())
            held.clear()
    yield from ((w, sent.whole) for w, sent in held.values())


def product_gap(updates: Iterable[Update], products: Tensor) -> float:
    """`||Σ p_i s_i B_i A_i - (Σ p_i s_i B_i)(Σ p_i A_i)||_F²`, sum of products against product of
    sums, factors zero-padded, each component in its place at the server. Updates are read one by one, and
    none is held.
    """
    m, n = products.shape
    A, B = products.new_zeros(0, n).double(), products.new_zeros(m, 0).double()
    for u in updates:
        rows, lora = u.components.to(A.device), u.lora
        missing = int(rows.max()) + 1 - len(A)
        if missing > 0:
            A = torch.cat([A, A.new_zeros(missing, n)])
            B = torch.cat([B, B.new_zeros(m, missing)], dim=1)
        A[rows] += u.weight * lora.A.to(A)
        B[:, rows] += u.weight * lora.scale * lora.B.to(B)
    return energy(torch.addmm(products, B.to(products), A.to(products), alpha=-1))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of one layer's global change, and the numbers that follow from them."""

    sigma: Tensor

    @property
    def energy(self) -> float:
        """`||W||_F² = Σ σ_j²`."""
        return float(self.sigma.square().sum())

    def tail_share(self, rank: int) -> float:
        """`Σ_{j>r} σ_j² / ||W||_F²`: the share of W that no client of rank <= r is sent; 0 if W = 0."""
        return float(self.sigma[rank:].square().sum()) / self.energy if self.energy else 0.0

    @property
    def effective_rank(self) -> float:
        """`exp(H)`, H the entropy of `σ_j² / Σ σ²`; 0 if W = 0."""
        if not self.energy:
            return 0.0
        share = self.sigma.square() / self.energy
        return float(torch.special.entr(share).sum().exp())


def spectrum(delta: LoRA | Tensor) -> Spectrum:
    """The singular values in float64, descending."""
    sigma = svd(delta).S if isinstance(delta, LoRA) else torch.linalg.svdvals(delta)
    return Spectrum(sigma.double().cpu())


def summarise_spectra(spectra: dict[str, Spectrum], rank: int, shown: int = 8) -> dict[str, Any]:
    """Per layer and over all layers: energy, share beyond `rank`, effective rank, singular values.

    The overall spectrum is `sqrt(Σ_layers σ_j²)`, a little beyond `rank`.
    """
    energy = sum(s.energy for s in spectra.values())
    tail = sum(s.tail_share(rank) * s.energy for s in spectra.values())
    width = min(rank + max(8, rank // 4), max(len(s.sigma) for s in spectra.values()))
    overall = torch.zeros(width, dtype=torch.float64)
    for s in spectra.values():
        top = s.sigma[:width].square()
        overall[: len(top)] += top
    return {
        "energy": energy,
        "tail_share": tail / energy if energy else 0.0,
        "effective_rank": sum(s.effective_rank for s in spectra.values()) / len(spectra),
        "spectrum": overall.sqrt().tolist(),
        "layers": {
            name: {
                "energy": s.energy,
                "tail_share": s.tail_share(rank),
                "effective_rank": s.effective_rank,
                "singular_values": s.sigma[:shown].tolist(),
            }
            for name, s in spectra.items()
        },
    }


def summarise_weights(p: Tensor, q: Tensor, error: Tensor) -> dict[str, float]:
    """`N_eff = 1/Σp²`, `χ²(p‖q) = Σ (p - q)²/q` over clients with data, and `Σ p_i² ê_i`."""
    has_data = q > 0
    return {
        "effective_clients": float(1 / p.square().sum()),
        "chi2": float(((p - q).square()[has_data] / q[has_data]).sum()),
        "weighted_error": float((p.square() * error).sum()),
    }
