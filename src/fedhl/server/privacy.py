"""Client-level differential privacy: only a clipped sum with Gaussian noise leaves the server.

In every round, with C the clip, z the noise multiplier and D a constant,

    S = 1/D Σ_{i arrived} c_i (ΔW_i - ΔW(sent_i)) + N(0, (z C / D)²),   c_i = min(1, C / ||change_i||),

in every layer, and the same for the head; the norm is over all of them together, so that one client
moves the sum by at most C/D, whatever it returns. The method is given S as if one client had returned it, so
that its next state, and every later broadcast, is a function of S and of earlier broadcasts: no method
can leak more. docs/privacy.md has the argument and its limits.

Sampling and noise come from a secret, by SHAKE-256: anyone who knew the secret could remove the noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedhl.lora import plus
from fedhl.method import Method, Update
from fedhl.server.robust import change

SECRET_BYTES = 32
"""The length of the secret: 256 bits, the strength of SHAKE-256."""


@dataclass(frozen=True)
class Mechanism:
    """The sampled Gaussian mechanism: `clip` C, `noise` z, `rate` q, the probability with which each
    client takes part in a round, independently of the others, and the number N of registered `clients`.

    Raises ValueError unless clip, noise and clients are positive, q in (0, 1] and the secret of 32 bytes.
    Source: DP-FedAvg, arXiv 1710.06963, with a fixed denominator.
    """

    clip: float
    noise: float
    rate: float
    clients: int
    secret: bytes = field(repr=False)  # which no log should show

    def __post_init__(self) -> None:
        for name in ("clip", "noise", "clients"):
            if not 0 < getattr(self, name) < math.inf:  # also when it is NaN
                raise ValueError(
                    f"privacy: {name} must be positive and finite, got {getattr(self, name)}"
                )
        if not 0 < self.rate <= 1:
            raise ValueError(f"privacy: rate must be above 0 and at most 1, got {self.rate}")
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(
                f"privacy: the secret must have {SECRET_BYTES} bytes, got {len(self.secret)}"
            )

    @property
    def denominator(self) -> float:
        """`D = q N`, the expected number of clients in a round; a constant, never the number of arrivals."""
        return self.rate * self.clients

    @property
    def deviation(self) -> float:
        """`z C / D`, the standard deviation of the noise on every entry."""
        return self.noise * self.clip / self.denominator

    def takes_part(self, client: str, round: int) -> bool:
        """Whether this client is in the cohort of this round: with probability q, independently of the
        others."""
        return float(uniforms(self.secret, 1, "cohort", round, client)) < self.rate

    def released(
        self,
        method: Method[Any],
        state: Any,
        updates: Iterable[tuple[float, Update]],
        round: int,
        layer: str,
    ) -> Update:
        """S of one layer, as one update of weight 1; `updates`: pairs of c_i and update, maybe none.

        It answers the broadcast of rank 1 and scale 1, which does not depend on which clients arrived.
        """
        delta = method.delta(state)
        assert delta is not None, "a method with the law of the exact mean has a global change"
        shape = torch.Size(delta.shape)
        total = self.deviation * normals(self.secret, shape, "layer", round, layer)
        for c, update in updates:
            B, A = change(update)
            total.addmm_(B.to(total), A.to(total), alpha=c / self.denominator)
        sent = method.broadcast(state, 1, 1.0)
        return Update(sent, plus(sent.lora, total), 1.0)

    def released_head(
        self,
        start: Mapping[str, Tensor],
        heads: Iterable[tuple[float, Mapping[str, Tensor]]],
        round: int,
    ) -> dict[str, Tensor]:
        """`h + S` of the head, from pairs of c_i and a client's head, maybe none."""
        heads = list(heads)
        following = {}
        for name, h in start.items():
            total = h.double() + self.deviation * normals(
                self.secret, h.shape, "head", round, name
            ).to(h.device)
            for c, head in heads:
                total += c / self.denominator * (head[name].double() - h.double())
            following[name] = total.to(h)
        return following


def why_not(method: Method[Any]) -> str | None:
    """The reason why this method cannot work on a noisy sum in place of the clients' updates, or None."""
    if not {"exact mean", "gauge"} <= method.laws or not method.mixed_ranks:
        return "does not move by the sum of the clients' products alone"
    # a layer so large that a matrix is not the shorter message
    if method.traffic(64, 64, 1, [1]) != method.traffic(64, 64, 1, [1, 1]):
        return "sends the clients each other's adapters, which no noise covers"
    return None


def uniforms(secret: bytes, count: int, *path: str | int) -> Tensor:
    """`count` numbers of U(0, 1) in float64, multiples of 2⁻⁵³ and half of one: the stream that
    `path` names. Without the secret it cannot be told from chance."""
    key = hashlib.blake2b(ascii(path).encode(), key=secret).digest()
    words = bytearray(hashlib.shake_256(key).digest(8 * count))
    bits = torch.frombuffer(words, dtype=torch.int64).bitwise_right_shift(11) & (2**53 - 1)
    return (bits.double() + 0.5) / 2**53


def normals(secret: bytes, shape: torch.Size, *path: str | int) -> Tensor:
    """N(0, 1) of this shape in float64 by Box and Muller: `√(-2 ln u) cos 2πv` and its sine."""
    half = -(-shape.numel() // 2)
    u, v = uniforms(secret, 2 * half, *path).view(2, half)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: shape.numel()].view(shape)
