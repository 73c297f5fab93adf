"""What the server sends: who takes part in a round, and what each client starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Method, TaskSequence
from fedhl.seeds import derive, generator
from fedhl.server.payload import carried
from fedhl.server.state import Client, ServerState


def init(
    method: Method[Any], adapter: Mapping[str, LoRA], head: Mapping[str, Tensor], seed: int
) -> ServerState:
    """The state before round 1, from the initial adapter at the top rank and the initial head."""
    layers = {
        name: method.init(adapter[name], derive(seed, "layer", name)) for name in sorted(adapter)
    }
    return ServerState(0, layers, {name: head[name] for name in sorted(head)})


def sample(clients: Sequence[Client], size: int, seed: int, round: int) -> list[Client]:
    """`size` of the clients, drawn without replacement for this round, sorted by id.

    The draw goes by id: it does not depend on the order of the list.
    """
    by_id = sorted(clients, key=lambda client: client.id)
    order = torch.randperm(len(by_id), generator=generator(seed, "cohort", round)).tolist()
    return [by_id[k] for k in sorted(order[:size])]


def next_task(method: Method[Any], state: ServerState) -> ServerState:
    """The state in which a new task begins: as it is, unless the method does something about it."""
    if not isinstance(method, TaskSequence):
        return state
    return replace(state, layers={n: method.next_task(x) for n, x in state.layers.items()})


def broadcast_layer(
    method: Method[Any], state: ServerState, layer: str, client: Client, seed: int
) -> Broadcast:
    """What this client has of what it is sent for this layer, after the rounding of its payload; the same
    whenever it is asked for in a round."""
    key = derive(seed, "broadcast", state.round, client.id, layer)
    try:
        sent = method.broadcast(state.layers[layer], client.rank, client.scale, key)
        return carried(sent, client.payload)
    except ValueError as error:
        raise ValueError(f"layer {layer!r}, client {client.id!r}: {error}") from error


def sender(
    method: Method[Any], state: ServerState, layer: str, seed: int
) -> Callable[[Client], Broadcast]:
    """`broadcast_layer` of one layer, which builds only once what many clients are sent."""
    alone = replace(state, layers={layer: state.layers[layer]})  # if from disk, then once
    built: dict[Any, Broadcast] = {}

    def send(client: Client) -> Broadcast:
        alike = client.rank, client.scale, client.payload
        key = client.id if method.per_client else alike
        if key not in built:
            built[key] = broadcast_layer(method, alone, layer, client, seed)
        return built[key]

    return send


def broadcast(
    method: Method[Any], state: ServerState, client: Client, seed: int
) -> dict[str, Broadcast]:
    """What this client is sent, for every layer. Raises ValueError naming the layer."""
    return {name: broadcast_layer(method, state, name, client, seed) for name in state.layers}
