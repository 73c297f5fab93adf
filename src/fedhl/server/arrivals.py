"""The updates of one layer, from the replies of a round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedhl.method import Method, Update
from fedhl.server import robust
from fedhl.server.broadcasts import sender
from fedhl.server.channel import sends_products
from fedhl.server.participation import corrected
from fedhl.server.state import Reply, ServerState


@dataclass(frozen=True)
class LayerUpdates:
    """The updates of one layer, read anew in each iteration, so that nothing is held longer.

    `replies` are those that returned this layer, at the places `members` among all that were accepted;
    their `weights` sum to 1. `silence`: the chance that none would have returned it; `factors`: what
    each one's change is multiplied by where it is clipped, 1 for all unless given.
    """

    method: Method[Any]
    state: ServerState
    layer: str
    replies: Sequence[Reply]
    weights: Sequence[float]
    seed: int
    members: Sequence[int]
    silence: float = 0.0
    factors: Sequence[float] = ()

    def __iter__(self) -> Iterator[Update]:
        send = sender(self.method, self.state, self.layer, self.seed)
        factors = self.factors or [1.0] * len(self.replies)
        for reply, p, c in zip(self.replies, self.weights, factors, strict=True):
            magnitudes = reply.magnitudes.get(self.layer)
            update = Update(send(reply.client), reply.adapter[self.layer], p, magnitudes)
            update = robust.clipped(update, c)
            yield corrected(update, self.silence, sends_products(self.method))


def arrivals(
    method: Method[Any],
    state: ServerState,
    layer: str,
    replies: Sequence[Reply],
    p: Tensor,
    seed: int,
    silence: float,
    factors: Sequence[float] = (),
) -> LayerUpdates:
    """The updates of one layer: of those who returned it, with `p_i / Σ_{j returned it} p_j`, or all
    0 where theirs are."""
    members = [k for k, reply in enumerate(replies) if layer in reply.adapter]
    theirs = p[members]
    theirs = theirs / theirs.sum() if theirs.sum() > 0 else theirs
    those = [replies[k] for k in members]
    clip = [factors[k] for k in members] if factors else ()
    return LayerUpdates(method, state, layer, those, theirs.tolist(), seed, members, silence, clip)
