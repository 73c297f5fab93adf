"""What a round did, in the quantities that the convergence conditions are about. Pure, per layer.

A truncation error that does not vanish, an aggregation error that does not shrink with the step
size, weights far from the data's: each costs convergence (see docs/maths.md). All float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedhl.lora import LoRA, add_products, dense, pad, squared_norm, svd
from fedhl.method import Broadcast, Update


def truncation_error(delta: Tensor, sent: Broadcast) -> float:
    """`e = ||delta - base - ΔW(sent)||_F²`: what a client's start lacks of the global change.

    The difference is taken before squaring, in float64: `||W||² - Σ σ²` would cancel.
    """
    lora = sent.whole
    missing = delta.double() - lora.scale * (lora.B.double() @ lora.A.double())
    if sent.base is not None:
        missing -= sent.base
    return float(missing.square().sum())


def moved(update: Update) -> float:
    """`||ΔW_i - ΔW(sent_i)||_F²`, how far a client moved, through small Gram matrices."""
    return squared_norm([(1.0, update.whole), (-1.0, update.sent.whole)])


def aggregation_error(
    before: LoRA | Tensor, after: LoRA | Tensor, updates: Iterable[Update]
) -> float:
    """`||W_{t+1} - (W_t + Σ p_i (ΔW_i - ΔW(sent_i)))||_F²`: what aggregation lost or added."""
    terms = (
        (sign * u.weight, x) for u in updates for sign, x in ((1, u.whole), (-1, u.sent.whole))
    )
    expected = add_products(dense(before), terms)
    return float((dense(after).to(expected) - expected).double().square().sum())


def product_gap(updates: Iterable[Update]) -> float:
    """`||Σ p_i s_i B_i A_i - (Σ p_i s_i B_i)(Σ p_i A_i)||_F²`, sum of products against product of
    sums, factors zero-padded, each component in its place at the server. Updates are read one by one
    and not held.
    """
    m, n = next(iter(updates)).lora.shape
    mean = LoRA(torch.zeros(0, n).double(), torch.zeros(m, 0).double(), 1.0)  # on the CPU

    def terms() -> Iterator[tuple[float, LoRA]]:
        nonlocal mean
        for u in updates:
            lora = LoRA(u.lora.A.double().cpu(), u.lora.B.double().cpu(), u.lora.scale)
            rows = u.components
            mean = pad(mean, max(mean.rank, int(rows.max()) + 1))
            mean.A[rows] += u.weight * lora.A
            mean.B[:, rows] += u.weight * lora.scale * lora.B
            yield u.weight, lora

    of_products = add_products(torch.zeros(m, n, dtype=torch.float64), terms())
    return float((of_products - mean.delta()).square().sum())


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of one layer's global change, and what follows from them."""

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
