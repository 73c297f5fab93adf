"""Checks of a timed step: its result must be that of dense arithmetic in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedhl import server
from fedhl.method import Update
from fedhl.methods import get_method
from fedhl.methods.full_rank import FullRank
from fedhl.server import Outcome, Reply, ServerState


def dense_step(state: FullRank, updates: Sequence[Update]) -> Tensor:
    """The next W of FedHL in dense float64 arithmetic, with the broadcasts as they were sent."""
    terms = [(c * u.weight, x) for u in updates for c, x in ((1, u.lora), (-1, u.sent.lora))]
    B = torch.cat([c * x.scale * x.B.double() for c, x in terms], dim=1)
    A = torch.cat([x.A.double() for _, x in terms])
    return state.W.double() + B @ A


def difference(W: Tensor, state: FullRank, updates: Sequence[Update]) -> float:
    """The relative difference of the next W from that of float64. Raises AssertionError if it is larger than
    the rounding error of float32 sums of inner size `Σ r_i`."""
    want = dense_step(state, updates)
    off = float((W.double() - want).norm() / want.norm())
    assert off < 1e-7 * sum(u.lora.rank for u in updates) ** 0.5, off
    return off


def check_layer(
    name: str, before: ServerState, after: ServerState, replies: Sequence[Reply], outcome: Outcome
) -> None:
    """Check one layer of a whole round, in which every reply was accepted, by `difference`."""
    method, weights = get_method("fedhl"), [record["weight"] for record in outcome.clients]
    updates = [
        Update(server.broadcast_layer(method, before, name, r.client, 0), r.adapter[name], p)
        for r, p in zip(replies, weights, strict=True)
    ]
    difference(after.layers[name].W, before.layers[name], updates)
