"""Measures of a cohort before aggregation, and of the global change after a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedhl.lora import dense, squared_norm
from fedhl.method import Broadcast, Method, Truncating, with_past
from fedhl.server import diagnostics, robust
from fedhl.server.layers import Layer, Layers, deltas
from fedhl.server.side_by_side import side_by_side
from fedhl.server.state import Client, Reply, ServerState
from fedhl.subspace import energy
from fedhl.weighting import Cohort


def change_norms(layers: Layers, replies: Sequence[Reply]) -> list[float]:
    """`sqrt(Σ_layers ||ΔW_i - ΔW(sent_i)||_F² + ||h_i - h||²)` of each client, over the layers that it
    returned."""
    squares = [robust.squared_head_change(layers.state.head, reply.head) for reply in replies]
    alike = torch.ones(len(replies), dtype=torch.float64)
    for layer in layers:
        updates = layer.updates(replies, alike)
        for k, update in zip(updates.members, updates, strict=True):
            squares[k] += robust.squared_change(update)
    return [square**0.5 for square in squares]


def measure_cohort(
    layers: Layers, replies: Sequence[Reply], norms: bool = True, factors: Sequence[float] = ()
) -> Cohort:
    """The cohort for the weighting: rows, truncation errors and energies before aggregation, the numbers that
    the clients report, and, with `norms`, the norms of the updates, clipped by `factors` if there are any."""
    method, count = layers.method, len(layers)
    squares = torch.zeros(len(replies), count, dtype=torch.float64)
    error = torch.zeros(len(replies), count, dtype=torch.float64)
    whole = torch.zeros(count, dtype=torch.float64)
    for column, layer in enumerate(layers):
        delta = method.delta(layer.state)
        W = None if delta is None else dense(delta)
        whole[column] = 0.0 if W is None else energy(W)
        send, name = layer.sender(), layer.name
        known: dict[Any, float] = {}
        for row, reply in enumerate(replies):
            sent = send(reply.client)
            if norms and name in reply.adapter:
                lora = with_past(reply.adapter[name], sent.past, reply.magnitudes.get(name))
                c = factors[row] if factors else 1.0
                clip = [] if c == 1 else [(1 - c, sent.whole)]
                squares[row, column] = squared_norm([(c, lora), *clip])
            if W is not None and whole[column] > 0:
                key = id(sent)  # `send` holds on to it
                if key not in known:
                    known[key] = lost(layer, reply.client, sent, W)
                error[row, column] = known[key]
    # of the layers that a client returned, as if it had returned as many as the others
    returned = torch.tensor([len(reply.adapter) for reply in replies], dtype=torch.float64)
    return Cohort(
        examples=[reply.client.examples for reply in replies],
        error=error,
        energy=whole,
        norms=(squares.sum(dim=1) * count / returned).sqrt() if norms else None,
        losses=[reply.loss for reply in replies],
        bounds=[reply.bound for reply in replies],
    )


def lost(layer: Layer, client: Client, sent: Broadcast, W: Tensor) -> float:
    """`||delta - start||_F²` of this client, `delta = W`."""
    if sent.lost is not None:
        return sent.lost
    if isinstance(layer.method, Truncating):
        return layer.method.lost(layer.state, client.rank)
    return diagnostics.truncation_error(W, sent)


def spectra(method: Method[Any], state: ServerState, rank: int) -> dict[str, Any]:
    """Spectrum, energy, share beyond `rank` and effective rank of the global change; {} without a global
    model."""
    known = dict(side_by_side(lambda _, delta: diagnostics.spectrum(delta), deltas(method, state)))
    return diagnostics.summarise_spectra(known, rank) if known else {}
