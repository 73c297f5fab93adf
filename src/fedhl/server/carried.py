"""A reply as the server receives it, after the rounding of its payload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fedhl.lora import LoRA
from fedhl.method import Broadcast
from fedhl.server import Reply
from fedhl.server.payload import carried_lora, returned_factors


def carried_reply(reply: Reply, sent: Mapping[str, Broadcast]) -> Reply:
    """The reply as the server receives it: `read_reply(encode_reply(reply))`, without the bytes.

    The factors that leave the client have the type of its payload, the others are as they were sent;
    magnitudes and head are in float32; a loss or bound that is not finite is NaN.
    """
    payload = reply.client.payload
    adapter = {
        name: carried_lora(
            filled(lora, sent[name]), payload, frozenset(returned_factors(sent[name]))
        )
        for name, lora in reply.adapter.items()
    }
    return replace(
        reply,
        adapter=adapter,
        head={name: value.float() for name, value in reply.head.items()},
        loss=reply.loss if math.isfinite(reply.loss) else math.nan,
        bound=reply.bound if math.isfinite(reply.bound) else math.nan,
        magnitudes={name: x.float() for name, x in reply.magnitudes.items()},
    )


def filled(lora: LoRA, sent: Broadcast) -> LoRA:
    """The adapter, in which the factors that do not travel back are replaced by the factors that were
    sent."""
    fixed = {"A", "B"} - set(returned_factors(sent))
    return replace(lora, **{factor: getattr(sent.lora, factor) for factor in sorted(fixed)})
