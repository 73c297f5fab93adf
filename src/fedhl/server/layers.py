"""The layers of a server's state in one round: the broadcasts and the updates of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedhl.lora import LoRA, add_products
from fedhl.method import Broadcast, Growing, Method, Remembering, Update, remembers
from fedhl.seeds import derive
from fedhl.server import robust
from fedhl.server.channel import sends_products
from fedhl.server.ledger import Ledger, after, base_of, next_version
from fedhl.server.participation import corrected
from fedhl.server.payload import carried, carried_lora
from fedhl.server.state import Client, Reply, ServerState
from fedhl.subspace import energy

ROUNDING = 1e-5
"""The relative distance of two matrices in float32 that are sums of the same terms in another order."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: its `state` after `round` rounds, the root `seed` of the draws for its clients, what they
    hold, and the broadcasts that many clients are sent, as far as they are `built`."""

    method: Method[Any]
    name: str
    state: Any
    round: int
    seed: int
    ledger: Ledger
    built: dict[Any, Broadcast]

    def broadcast(self, client: Client) -> Broadcast:
        """The broadcast as this client receives it, after the rounding of its payload; always the same within
        a round. Raises ValueError naming the layer and the client."""
        key = derive(self.seed, "broadcast", self.round, client.id, self.name)
        held = self.ledger.held(client.id, self.name)
        try:
            if held is not None and isinstance(self.method, Remembering):
                sent = self.method.catch_up(self.state, held, client.rank, client.scale, key)
            else:
                sent = self.method.broadcast(self.state, client.rank, client.scale, key)
                if sent.base is not None and not sent.base.any():
                    sent = replace(sent, base=None)
            there = carried(sent, client.downloaded)
            if held is not None and isinstance(self.method, Growing):
                there = grown(there, sent.base, held, self.method.grown(self.state), client)
            return there
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}, client {client.id!r}: {error}") from error

    def start(self, client: Client, sent: Broadcast | None = None) -> Broadcast:
        """The broadcast `sent` with the whole base of the client's start: what it holds, and what it adds to
        that."""
        sent = self.sender()(client) if sent is None else sent
        base = base_of(self.ledger.held(client.id, self.name), sent)
        return replace(sent, base=base, merged=None)

    def after(self, client: Client) -> Tensor:
        """What this client holds once it has received its broadcast."""
        return after(self.ledger.held(client.id, self.name), self.sender()(client))

    def sender(self) -> Callable[[Client], Broadcast]:
        """`broadcast`, but a broadcast that many clients are sent is built only once."""
        # those of single clients would fill the memory
        built = {} if self.method.per_client and not remembers(self.method) else self.built

        def send(client: Client) -> Broadcast:
            alike = alike_of(client), self.ledger.version(client.id)
            key = self.name, client.id if self.method.per_client else alike
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
        built = self.state.built if remembers(self.method) else {}
        return Layer(
            self.method, name, state, self.state.round, self.seed, self.state.ledger, built
        )

    def versions(self, clients: Iterable[Client]) -> dict[str, str]:
        """The version that each client holds once it has received its broadcast, by client id."""
        known: dict[Any, str] = {}
        found = {}
        for client in clients:
            before = self.state.ledger.version(client.id)
            key = client.id if self.method.per_client else (alike_of(client), before)
            if key not in known:
                sent = {layer.name: layer.sender()(client) for layer in self}
                known[key] = next_version(before, sent)
            found[client.id] = known[key]
        return found

    def __iter__(self) -> Iterator[Layer]:
        return (self.of(name, state) for name, state in self.state.layers.items())

    def __len__(self) -> int:
        return len(self.state.layers)


def grown(
    there: Broadcast, base: Tensor | None, held: Tensor, change: LoRA | None, client: Client
) -> Broadcast:
    """The broadcast `there` with `change` in place of its base. It stays as it is if a client that holds
    `held` would end more than twice as far from `base` with `change` as with the rounded base."""
    if base is None or change is None or there.base is None:
        return there
    change = carried_lora(change, client.downloaded)
    far = energy(base - add_products(held.to(base), [(1.0, change)]))
    if far > max(4 * energy(base - there.base), ROUNDING**2 * energy(base)):
        return there
    return replace(there, base=None, merged=change, lost=far)


def alike_of(client: Client) -> tuple[int, float, str]:
    """What two clients that hold the same must have in common, so that they are sent the same."""
    return client.rank, client.scale, client.downloaded


def broadcast_layer(
    method: Method[Any], state: ServerState, layer: str, client: Client, seed: int
) -> Broadcast:
    """The broadcast to this client for one layer as it travels: after the rounding of its payload, and
    relative to what the client holds."""
    return Layers(method, state, seed).layer(layer).sender()(client)


def travelling(
    method: Method[Any], state: ServerState, client: Client, seed: int
) -> dict[str, Broadcast]:
    """`broadcast_layer` of every layer, by layer name. Raises ValueError naming the layer."""
    return {layer.name: layer.sender()(client) for layer in Layers(method, state, seed)}


def broadcast(
    method: Method[Any], state: ServerState, client: Client, seed: int
) -> dict[str, Broadcast]:
    """The start of this client in every layer, with its whole base, by layer name. Raises ValueError naming
    the layer."""
    return {layer.name: layer.start(client) for layer in Layers(method, state, seed)}


def deltas(method: Method[Any], state: ServerState) -> dict[str, LoRA | Tensor]:
    """The global change of every layer; {} if there is no global model."""
    found = {name: method.delta(layer) for name, layer in state.layers.items()}
    return {name: delta for name, delta in found.items() if delta is not None}
