"""One round of the server over all layers: who takes part, what is sent, what becomes of the replies.

The server's state is a value: each layer's method state, the trained head, the round. Functions
take it and return the next one; nothing here knows about models, files or networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fedhl import diagnostics
from fedhl.lora import LoRA, dense
from fedhl.method import Broadcast, Method, Update
from fedhl.seeds import derive, generator
from fedhl.weighting import Cohort, Weighting, data_share, relative_error

HUGE = torch.finfo(torch.float32).max ** 0.5
"""The largest update that is accepted: the square of a larger one would overflow."""


@dataclass(frozen=True)
class Client:
    """Who takes part: an id, the rank and LoRA scale of its adapters, its number of training rows."""

    id: str
    rank: int
    scale: float
    examples: int


@dataclass(frozen=True)
class ServerState:
    """`layers`: each layer's method state, by layer name; `head`: trained parameters outside the
    adapters, by name; `round`: the rounds done."""

    round: int
    layers: dict[str, Any]
    head: dict[str, Tensor]


@dataclass(frozen=True)
class Reply:
    """What one client returned for round `round`: its adapter (which may be read lazily, a layer at
    a time), its head, its mean training loss and its number of steps."""

    client: Client
    round: int
    adapter: Mapping[str, LoRA]
    head: Mapping[str, Tensor]
    loss: float
    steps: int


@dataclass(frozen=True)
class Round:
    """What `aggregate` did: for the metrics, as plain data."""

    clients: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    seconds: dict[str, float]


@dataclass(frozen=True)
class LayerUpdates:
    """The updates of one layer, read anew in each iteration, so that nothing is held longer."""

    method: Method[Any]
    state: ServerState
    layer: str
    replies: Sequence[Reply]
    weights: Sequence[float]
    seed: int

    def __iter__(self) -> Iterator[Update]:
        for reply, p in zip(self.replies, self.weights, strict=True):
            sent = broadcast_layer(self.method, self.state, self.layer, reply.client, self.seed)
            yield Update(sent, reply.adapter[self.layer], p)


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


def broadcast_layer(
    method: Method[Any], state: ServerState, layer: str, client: Client, seed: int
) -> Broadcast:
    """What this client is sent for this layer, the same whenever it is asked for in a round."""
    key = derive(seed, "broadcast", state.round, client.id, layer)
    try:
        return method.broadcast(state.layers[layer], client.rank, client.scale, key)
    except ValueError as error:
        raise ValueError(f"layer {layer!r}, client {client.id!r}: {error}") from error


def broadcast(
    method: Method[Any], state: ServerState, client: Client, seed: int
) -> dict[str, Broadcast]:
    """What this client is sent, for every layer. Raises ValueError naming the layer."""
    return {name: broadcast_layer(method, state, name, client, seed) for name in state.layers}


def refusal(method: Method[Any], state: ServerState, reply: Reply, seed: int) -> str | None:
    """Why this reply cannot be accepted, or None. The whole reply is read and checked."""
    client = reply.client
    if reply.round != state.round + 1:
        return f"it is for round {reply.round}, this is round {state.round + 1}"
    for what, got, expected in (
        ("layer", set(reply.adapter), set(state.layers)),
        ("head parameter", set(reply.head), set(state.head)),
    ):
        if got != expected:
            name = sorted(got ^ expected)[0]
            return (
                f"{what} {name!r} is {'missing' if name in expected else 'not one of this model'}"
            )
    for name in state.layers:
        lora = reply.adapter[name]
        sent = broadcast_layer(method, state, name, client, seed).lora
        if (lora.A.shape, lora.B.shape) != (sent.A.shape, sent.B.shape):
            return (
                f"layer {name!r}: got A {tuple(lora.A.shape)} and B {tuple(lora.B.shape)}, "
                f"expected {tuple(sent.A.shape)} and {tuple(sent.B.shape)}"
            )
        if not abs(lora.scale - client.scale) <= 1e-6 * client.scale:  # also when it is NaN
            return f"layer {name!r}: got scale {lora.scale:g}, expected {client.scale:g}"
        if not (lora.A.isfinite().all() and lora.B.isfinite().all()):
            return f"layer {name!r}: it has a non-finite value (did training diverge?)"
        size = client.scale * float(lora.A.double().norm() * lora.B.double().norm())
        if size > HUGE:
            return (
                f"layer {name!r}: its update may be as large as {size:.0e}, expected at most "
                f"{HUGE:.0e} (did training diverge?)"
            )
    for name, value in state.head.items():
        if reply.head[name].shape != value.shape:
            return (
                f"head parameter {name!r}: got shape {tuple(reply.head[name].shape)}, "
                f"expected {tuple(value.shape)}"
            )
        if not reply.head[name].isfinite().all():
            return f"head parameter {name!r}: it has a non-finite value (did training diverge?)"
    return None


def aggregate(
    method: Method[Any],
    weighting: Weighting,
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
) -> tuple[ServerState, Round]:
    """The next state from the replies that arrived, and what happened on the way.

    Every reply is checked whole before the first layer is touched; a refused one changes nothing
    but the list of the refused. With no reply accepted the layers and the head stay as they are.
    """
    start = perf_counter()
    accepted, refused = [], []
    for reply in sorted(replies, key=lambda reply: reply.client.id):
        if accepted and accepted[-1].client.id == reply.client.id:
            reason = "another reply of this client was accepted already"
        else:
            reason = refusal(method, state, reply, seed)
        if reason is None:
            accepted.append(reply)
        else:
            refused.append({"id": reply.client.id, "reason": reason})
    if not accepted:
        seconds = {"aggregate": perf_counter() - start, "diagnostics": 0.0}
        return replace(state, round=state.round + 1), Round([], refused, {}, seconds)

    cohort = measure(method, state, accepted, seed)
    p = weighting(cohort)
    top = max(reply.client.rank for reply in accepted)
    layers: dict[str, Any] = {}
    squares = {"aggregation_error": 0.0, "product_gap": 0.0}
    drift = torch.zeros(len(accepted), dtype=torch.float64)
    watching = 0.0
    for name, layer in state.layers.items():
        updates = LayerUpdates(method, state, name, accepted, p.tolist(), seed)
        layers[name] = method.aggregate(layer, updates)
        watch = perf_counter()
        before, after = method.delta(layer), method.delta(layers[name])
        if before is not None and after is not None:
            squares["aggregation_error"] += diagnostics.aggregation_error(before, after, updates)
        squares["product_gap"] += diagnostics.product_gap(updates, top)
        drift += torch.tensor([diagnostics.moved(u) for u in updates], dtype=torch.float64)
        watching += perf_counter() - watch
    q = data_share(cohort)
    following = ServerState(state.round + 1, layers, mean_head(accepted, q))
    seconds = {"aggregate": perf_counter() - start - watching, "diagnostics": watching}

    error = relative_error(cohort)
    clients = [
        {
            "id": reply.client.id,
            "rank": reply.client.rank,
            "scale": reply.client.scale,
            "examples": reply.client.examples,
            "weight": float(p[k]),
            "error": float(error[k]),
            "drift": float(drift[k].sqrt()),
            "loss": reply.loss,
            "steps": reply.steps,
        }
        for k, reply in enumerate(accepted)
    ]
    numbers = {name: value**0.5 for name, value in squares.items()}
    numbers |= diagnostics.summarise_weights(p, q, error)
    return following, Round(clients, refused, numbers, seconds)


def measure(method: Method[Any], state: ServerState, replies: Sequence[Reply], seed: int) -> Cohort:
    """What the weighting may ask: rows, truncation errors and energies, before aggregation."""
    error = torch.zeros(len(replies), len(state.layers), dtype=torch.float64)
    energy = torch.zeros(len(state.layers), dtype=torch.float64)
    for column, (name, layer) in enumerate(state.layers.items()):
        delta = method.delta(layer)
        if delta is None:
            continue
        W = dense(delta)
        energy[column] = W.double().square().sum()
        if energy[column] == 0:
            continue
        for row, reply in enumerate(replies):
            sent = broadcast_layer(method, state, name, reply.client, seed)
            error[row, column] = diagnostics.truncation_error(W, sent)
    return Cohort([reply.client.examples for reply in replies], error, energy)


def mean_head(replies: Sequence[Reply], q: Tensor) -> dict[str, Tensor]:
    """The head averaged by data share, in float32; it has no rank, so truncation does not touch it."""
    return {
        name: torch.stack(
            [
                share * reply.head[name].float()
                for share, reply in zip(q.tolist(), replies, strict=True)
            ]
        ).sum(0)
        for name in sorted(replies[0].head)
    }


def spectra(method: Method[Any], state: ServerState, rank: int) -> dict[str, Any]:
    """Spectrum, energy, share beyond `rank` and effective rank of the global change; {} if none."""
    deltas = {name: method.delta(layer) for name, layer in state.layers.items()}
    known = {name: diagnostics.spectrum(d) for name, d in deltas.items() if d is not None}
    return diagnostics.summarise_spectra(known, rank) if known else {}
