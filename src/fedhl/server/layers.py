"""The layers of a server's state in one round: the broadcasts and the updates of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedhl.lora import LoRA
from fedhl.method import Broadcast, Method, Update
from fedhl.seeds import derive
from fedhl.server import robust
from fedhl.server.channel import sends_products
from fedhl.server.participation import corrected
from fedhl.server.payload import carried
from fedhl.server.state import Client, Reply, ServerState


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: its `state` after `round` rounds, and the root `seed` of the draws for its clients."""

    method: Method[Any]
    name: str
    state: Any
    round: int
    seed: int

    def broadcast(self, client: Client) -> Broadcast:
        """The broadcast as this client receives it, after the rounding of its payload; always the same within
        a round. Raises ValueError naming the layer and the client."""
        key = derive(self.seed, "broadcast", self.round, client.id, self.name)
        try:
            sent = self.method.broadcast(self.state, client.rank, client.scale, key)
            return carried(sent, client.payload)
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}, client {client.id!r}: {error}") from error

    def sender(self) -> Callable[[Client], Broadcast]:
        """`broadcast`, but a broadcast that many clients are sent is built only once."""
        built: dict[Any, Broadcast] = {}

        def send(client: Client) -> Broadcast:
            alike = client.rank, client.scale, client.payload
            key = client.id if self.method.per_client else alike
            if key not in built:
                built[key] = self.broadcast(client)
            return built[key]

        return send

    def updates(
        self,
        replies: Sequence[Reply],
        p: Tensor,
        silence: float = 0.0,
        factors: Sequence[float] = (),
    ) -> LayerUpdates:
        """The clients' updates of this layer, with the weights `p_i / Σ_{j returned it} p_j`; with weights 0
        if the sum is 0.

        `silence`: the probability that no client returns the layer; `factors`: the factor by which each
        client's change is multiplied to clip it; empty: 1 for all.
        """
        members = [k for k, reply in enumerate(replies) if self.name in reply.adapter]
        theirs = p[members]
        theirs = theirs / theirs.sum() if theirs.sum() > 0 else theirs
        those = [replies[k] for k in members]
        clip = [factors[k] if factors else 1.0 for k in members]
        return LayerUpdates(self, those, theirs.tolist(), members, silence, clip)


@dataclass(frozen=True, eq=False)
class LayerUpdates:
    """The updates of one layer, read anew in each iteration, so that none is held longer.

    `replies`: the accepted replies that have this layer; `members`: their places among all accepted
    replies; `weights`: of sum 1. `silence` and `factors`: see `Layer.updates`.
    """

    layer: Layer
    replies: Sequence[Reply]
    weights: Sequence[float]
    members: Sequence[int]
    silence: float
    factors: Sequence[float]

    def __iter__(self) -> Iterator[Update]:
        send, name = self.layer.sender(), self.layer.name
        products = sends_products(self.layer.method)
        for reply, p, c in zip(self.replies, self.weights, self.factors, strict=True):
            magnitudes = reply.magnitudes.get(name)
            update = Update(send(reply.client), reply.adapter[name], p, magnitudes)
            yield corrected(robust.clipped(update, c), self.silence, products)


@dataclass(frozen=True, eq=False)
class Layers:
    """All layers of `state` in its next round; each is read when it is asked for, maybe from disk."""

    method: Method[Any]
    state: ServerState
    seed: int

    def layer(self, name: str) -> Layer:
        return self.of(name, self.state.layers[name])

    def of(self, name: str, state: Any) -> Layer:
        """The layer of this name with this state, which has been read already."""
        return Layer(self.method, name, state, self.state.round, self.seed)

    def __iter__(self) -> Iterator[Layer]:
        return (self.of(name, state) for name, state in self.state.layers.items())

    def __len__(self) -> int:
        return len(self.state.layers)


def broadcast_layer(
    method: Method[Any], state: ServerState, layer: str, client: Client, seed: int
) -> Broadcast:
    """The broadcast to this client for one layer, after the rounding of its payload."""
    return Layers(method, state, seed).layer(layer).broadcast(client)


def broadcast(
    method: Method[Any], state: ServerState, client: Client, seed: int
) -> dict[str, Broadcast]:
    """The broadcast to this client for every layer, by layer name. Raises ValueError naming the layer."""
    return {layer.name: layer.broadcast(client) for layer in Layers(method, state, seed)}


def deltas(method: Method[Any], state: ServerState) -> dict[str, LoRA | Tensor]:
    """The global change of every layer; {} if there is no global model."""
    found = {name: method.delta(layer) for name, layer in state.layers.items()}
    return {name: delta for name, delta in found.items() if delta is not None}
