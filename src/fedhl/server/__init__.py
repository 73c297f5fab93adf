"""A round of the server over all layers, as pure functions of a state that is a value."""

from __future__ import annotations

from fedhl.server.broadcasts import broadcast, broadcast_layer, init, next_task, sample
from fedhl.server.measures import deltas, spectra
from fedhl.server.rounds import aggregate, release
from fedhl.server.state import Client, Reply, Round, ServerState

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
