"""An over-the-air channel for study: all clients transmit at once, and the antenna receives the sum.

Analog aggregation (AirComp): client i transmits `√η p_i x_i`, x_i its change of this round, with one
η for all, since only aligned signals add up. Each is limited to a mean power P per number, so
`√η = √P / max_i p_i rms(x_i)`. The server receives `√η Σ p_i x_i + z`, `z ~ N(0, σ²)`, and divides by
√η: it has the weighted sum with noise of standard deviation `σ max_i p_i rms(x_i) / √P`.

An idealisation for methods that need more than one sum of what is transmitted (`fedex_lora`,
`lora_fair`, `flora_na`, `raflora`): an antenna would not tell the clients apart, here they are. And the
magnitudes of `sd_lora`, a few numbers, travel without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedhl.lora import LoRA, plus
from fedhl.method import Method, Update
from fedhl.server.diagnostics import moved


class Signal(NamedTuple):
    """One client's transmission in one layer: `Σ x²`, and how many numbers x has."""

    energy: float
    size: int


@dataclass(frozen=True)
class AirComp:
    """`snr_db`: signal-to-noise ratio of a client that transmits at power 1, so `σ² = 10^(-snr_db/10)`;
    `power`: the limit P on each client's mean power per number. Raises ValueError unless P > 0 and the
    ratio is a number."""

    snr_db: float
    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.snr_db > -math.inf:  # also when it is NaN
            raise ValueError(f"channel: snr_db must be a number, got {self.snr_db}")
        if not 0 < self.power < math.inf:
            raise ValueError(f"channel: power must be positive and finite, got {self.power}")

    def deviation(self, weights: Sequence[float], signals: Sequence[Sequence[Signal]]) -> float:
        """Standard deviation of the noise on `Σ p_i x_i`; `signals`: those of each client, by layer."""
        loudest = 0.0
        for p, layers in zip(weights, signals, strict=True):
            size = sum(signal.size for signal in layers)
            if size:
                loudest = max(loudest, p * (sum(x.energy for x in layers) / size) ** 0.5)
        return 10 ** (-self.snr_db / 20) * loudest / self.power**0.5


def sends_products(method: Method[object]) -> bool:
    """Whether the method sums products `s_i B_i A_i`, or factors. Products are transmitted as m n numbers,
    whatever the rank."""
    return method.mixed_ranks and "gauge" in method.laws


def signal(update: Update, products: bool) -> Signal:
    """The signal of this client: of the change of its product, or of the factors that leave it."""
    sent, lora = update.sent, update.lora
    if products:
        m, n = lora.shape
        return Signal(moved(update), m * n)
    energy, size = 0.0, 0
    for name in sorted(sent.train - sent.keep):
        unit = lora.scale if name == "B" else 1.0
        change = getattr(lora, name).double() - getattr(sent.lora, name).double()
        energy += unit**2 * float(change.square().sum())
        size += change.numel()
    return Signal(energy, size)


def received(
    updates: Iterable[Update], products: bool, deviation: float, g: torch.Generator
) -> list[Update]:
    """The updates of one layer, each with the same noise z: weighted by p_i, `Σ p_i = 1`, they sum to
    `Σ p_i x_i + z`, which is what the antenna has received. Components that only some clients have get
    `z / Σ_{i has it} p_i`, so that their sum, too, has noise z.
    """
    updates = list(updates)
    if deviation == 0:
        return updates
    m, n = updates[0].lora.shape
    if products:
        z = deviation * torch.randn(m, n, generator=g)
        return [replace(u, lora=plus(u.lora, z)) for u in updates]
    top = max(int(u.components.max()) for u in updates) + 1
    share = torch.zeros(top, dtype=torch.float64)
    for u in updates:
        share[u.components] += u.weight
    z = {"A": torch.randn(top, n, generator=g), "B": torch.randn(top, m, generator=g)}
    each = torch.where(share > 0, 1 / share, 0.0)[:, None]
    noise = {name: deviation * (each * x).float() for name, x in z.items()}
    return [replace(u, lora=with_factors(u, noise)) for u in updates]


def with_factors(update: Update, noise: dict[str, Tensor]) -> LoRA:
    """The trained factors with their noise; B in effective units, its scale folded in."""
    lora, rows, sent = update.lora, update.components, update.sent
    leaves = sent.train - sent.keep
    A = lora.A + noise["A"][rows].to(lora.A) if "A" in leaves else lora.A
    B = lora.B + (noise["B"][rows].T / lora.scale).to(lora.B) if "B" in leaves else lora.B
    return LoRA(A, B, lora.scale)
