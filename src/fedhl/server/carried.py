"""What the server has of a reply, after the rounding of its payload."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fedhl.lora import LoRA
from fedhl.method import Broadcast
from fedhl.server import Reply
from fedhl.server.payload import carried_lora


def returned_factors(sent: Broadcast) -> list[str]:
    """The factors that the client trains and does not keep: they travel back."""
    return sorted(sent.train - sent.keep)


def carried_reply(reply: Reply, sent: Mapping[str, Broadcast]) -> Reply:
    """What the server has of a reply: `read_reply(encode_reply(reply))`, without the bytes.

    The factors that leave the client in the type of its payload, the others as they were sent;
    magnitudes and head in float32; a loss or bound that is not finite is NaN.
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
    """The adapter with the factors that do not travel as they were sent."""
    fixed = {"A", "B"} - set(returned_factors(sent))
    return replace(lora, **{factor: getattr(sent.lora, factor) for factor in sorted(fixed)})
