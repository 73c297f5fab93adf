"""The types in which numbers travel, and the values that the receiver gets. Pure, per layer.

Factors are rounded in effective units, the rows of `A` and the columns of `s B`, so that a client's
start does not depend on its scale. Float32 is not rounded. With int8 each such row or column x, one
component of one factor, travels as whole numbers and one step:

    x ≈ d q,   d = max|x| / 127 rounded to bfloat16,   q = round(x / d) in -127..127.

`d` has 8 significant bits and q has 7, so `d q` is exact in float32; and d is off by at most 2^-8 of it,
so that the largest entry is `x / d = 127 ± 127/256`, which rounds to 127: nothing is clipped, and no
entry is off by more than d/2. So rounding a rounded value again, by any of the types, changes no bit: the
server may compute a broadcast, encode it, and compute it again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedhl.lora import LoRA
from fedhl.method import Broadcast, finite

PAYLOADS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""The types of a run's payload, by name."""
TINY = 2.0**-100
"""Numbers below this are zero in the narrower types: so division by a scale, `s < 2^20`, gives no subnormal
number, whose rounding is coarser."""
STEP_BYTES = 2
"""Bytes of one step of int8, a bfloat16."""


def to_payload(x: Tensor, payload: str) -> tuple[Tensor, Tensor | None]:
    """`x` (k, n) in the type that travels, and with int8 the step of each row, (k,) in bfloat16.

    A row that is not finite has a step that is not finite.
    """
    x = x.float()
    if payload == "float32":
        return x, None
    x = torch.where(x.abs() < TINY, 0.0, x)
    if payload != "int8":
        return x.to(PAYLOADS[payload]), None
    step = (x.abs().amax(dim=1) / 127).bfloat16()
    q = (x / step.float()[:, None]).nan_to_num(0.0)  # 0/0 in a row of zeros
    return q.round().to(torch.int8), step


def from_payload(x: Tensor, step: Tensor | None) -> Tensor:
    """The values of `to_payload(x)` at the receiver: float32, (k, n)."""
    return x.float() if step is None else x.float() * step.float()[:, None]


def rows(lora: LoRA, factor: str, payload: str) -> Tensor:
    """One row per component, as it is rounded: A (r, n), or `s Bᵀ` (r, m); with float32 Bᵀ itself."""
    if factor == "A":
        return lora.A
    return (lora.B if payload == "float32" else lora.B.float() * lora.scale).T


def factor_of(rows: Tensor, factor: str, scale: float, payload: str) -> Tensor:
    """The factor with these `rows`: A (r, n) or B (m, r)."""
    if factor == "A":
        return rows.contiguous()
    return (rows if payload == "float32" else rows / scale).T.contiguous()


def carried_lora(lora: LoRA, payload: str, factors: frozenset[str] = frozenset("AB")) -> LoRA:
    """The adapter at the receiver, if only `factors` travel."""
    received = {
        f: factor_of(
            from_payload(*to_payload(rows(lora, f, payload), payload)), f, lora.scale, payload
        )
        for f in sorted(factors)
    }
    return replace(lora, **received)


def carried(broadcast: Broadcast, payload: str) -> Broadcast:
    """The broadcast at the receiver: the start of a client, and the adapter that is subtracted from its
    reply.

    Rounded are the factors, those of frozen directions and of what is merged too, and the base (m, n), with
    int8 row by row. Magnitudes, one number for each direction, travel as float32, an index as it is.
    `carried(carried(x)) == carried(x)` to the bit. Raises ValueError if the rounding makes a finite
    value infinite, as float16 does from 65,520 on.
    """
    lora, base, past, merged = broadcast.lora, broadcast.base, broadcast.past, broadcast.merged
    received = replace(
        broadcast,
        lora=lora if broadcast.drawn is not None else carried_lora(lora, payload),
        base=None if base is None else from_payload(*to_payload(base, payload)),
        past=None if past is None else carried_lora(past, payload),
        magnitudes=None if broadcast.magnitudes is None else broadcast.magnitudes.float(),
        merged=None if merged is None else carried_lora(merged, payload),
    )
    if payload != "float32" and not (
        finite(received.lora)
        and (received.base is None or received.base.isfinite().all())
        and (received.past is None or finite(received.past))
        and (received.merged is None or finite(received.merged))
    ):
        raise ValueError(f"a value is too large for {payload}; set wire.payload to bfloat16")
    return received


def sent_factors(broadcast: Broadcast) -> list[str]:
    """The factors of the adapter that travel to the client: none if the client draws them; and a factor that
    never leaves the client does not if it is zero."""
    if broadcast.drawn is not None:
        return []
    return [f for f in "AB" if f not in broadcast.keep or getattr(broadcast.lora, f).any()]


def returned_factors(broadcast: Broadcast) -> list[str]:
    """The factors that the client trains and does not keep: these travel back."""
    return sorted(broadcast.train - broadcast.keep)


def bytes_received(broadcast: Broadcast, payload: str) -> int:
    """Bytes of the tensors that travel to the client."""
    b, lora = broadcast, broadcast.lora
    whole = [(x, f) for x in (b.past, b.merged) if x is not None for f in "AB"]
    total = sum(
        matrix_bytes(rows(x, f, payload), payload)
        for x, f in [*whole, *((lora, f) for f in sent_factors(b))]
    )
    total += 0 if b.base is None else matrix_bytes(b.base, payload)
    total += 0 if b.magnitudes is None else 4 * len(b.magnitudes)
    return total + (0 if b.index is None else 8 * len(b.index))


def bytes_returned(broadcast: Broadcast, payload: str) -> int:
    """Bytes of the tensors of the client's answer to this broadcast."""
    total = sum(
        matrix_bytes(rows(broadcast.lora, f, payload), payload) for f in returned_factors(broadcast)
    )
    return total + (0 if broadcast.magnitudes is None else 4 * len(broadcast.magnitudes))


def matrix_bytes(x: Tensor, payload: str) -> int:
    """Bytes of a matrix in the type of the payload, with int8 also those of the steps of its rows."""
    steps = STEP_BYTES * len(x) if payload == "int8" else 0
    return PAYLOADS[payload].itemsize * x.numel() + steps


def number_bytes(payload: str, m: int, n: int) -> float:
    """Bytes per number of an adapter of an (m, n) layer: with int8 `r (m + n)` numbers have 2 r steps."""
    size = PAYLOADS[payload].itemsize
    return size + (STEP_BYTES * 2 / (m + n) if payload == "int8" else 0)
