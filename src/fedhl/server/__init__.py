"""A round of the server over all layers, as pure functions of a state that is a value."""

from __future__ import annotations

from fedhl.server.rounds import (
    Client,
    Reply,
    Round,
    ServerState,
    aggregate,
    broadcast,
    broadcast_layer,
    deltas,
    init,
    next_task,
    release,
    sample,
    spectra,
)

__all__ = [
    "Client",
    "Reply",
    "Round",
    "ServerState",
    "aggregate",
    "broadcast",
    "broadcast_layer",
    "deltas",
    "init",
    "next_task",
    "release",
    "sample",
    "spectra",
]
