"""Whether a state can be sent: what is accepted in a round must be writable in the next one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedhl.method import Method, remembers
from fedhl.server.layers import alike_of, travelling
from fedhl.server.state import Client, ServerState, forget

NARROW = "float16"
"""The only type of a payload that cannot hold every number that is accepted: its largest is 65,504."""


def unsendable(
    method: Method[Any], state: ServerState, clients: Iterable[Client], seed: int
) -> str | None:
    """The reason why this state cannot be sent to one of these clients, or None. Each is tried that is sent
    something of its own, as one that holds what the ledger says, and as one that has lost it."""
    tried = set()
    for client in clients:
        if client.downloaded != NARROW:
            continue
        held = state.ledger.version(client.id)
        key = client.id if method.per_client else (alike_of(client), held)
        if key in tried:
            continue
        tried.add(key)
        newcomer = forget(state, [client.id]) if remembers(method) and held else None
        try:
            for there in filter(None, (state, newcomer)):
                travelling(method, there, client, seed)
        except ValueError as error:
            return f"with it the model could not be sent any more: {error}"
    return None
