"""A round of the server over all layers, as pure functions of a state that is a value."""

from __future__ import annotations

from fedhl.server.layers import broadcast, broadcast_layer, deltas, travelling
from fedhl.server.measures import spectra
from fedhl.server.rounds import Rules, aggregate, release
from fedhl.server.state import Client, Outcome, Reply, ServerState, forget, init, next_task, sample

__all__ = [
    "Client",
    "Outcome",
    "Reply",
    "Rules",
    "ServerState",
    "aggregate",
    "broadcast",
    "broadcast_layer",
    "deltas",
    "forget",
    "init",
    "next_task",
    "release",
    "sample",
    "spectra",
    "travelling",
]
