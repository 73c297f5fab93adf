"""One round of the server over all layers: who takes part, what is sent, what becomes of the replies.

The server's state is a value: each layer's method state, the trained head, the round. Functions
take it and return the next one; nothing here knows about models, files or networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fedhl import diagnostics
from fedhl.channel import AirComp, Signal, received, sends_products, signal
from fedhl.lora import LoRA, dense, squared_norm
from fedhl.method import Broadcast, Method, TaskSequence, Update, with_past
from fedhl.participation import corrected
from fedhl.seeds import derive, generator
from fedhl.weighting import Cohort, Weighting, data_share, relative_error

HUGE = torch.finfo(torch.float32).max ** 0.5
"""The largest update that is accepted: the square of a larger one would overflow."""


@dataclass(frozen=True)
class Client:
    """Who takes part: an id, the rank and LoRA scale of its adapters, its number of training rows,
    and the only layers that it trains (None: all)."""

    id: str
    rank: int
    scale: float
    examples: int
    layers: frozenset[str] | None = None


@dataclass(frozen=True)
class ServerState:
    """`layers`: each layer's method state, by layer name; `head`: trained parameters outside the
    adapters, by name; `round`: the rounds done. `clients`: what each client keeps for itself between
    rounds, by id and name; only where clients live in the server's process, and never used here."""

    round: int
    layers: dict[str, Any]
    head: dict[str, Tensor]
    clients: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What one client returned for round `round`: its adapter (which may be read lazily, a layer at
    a time, and lacks the layers that it did not train), its head, its mean training loss, its number
    of steps, and the distance of the bounds it estimates (see `fedhl.weighting.moment_bounds`);
    `magnitudes`: those of the frozen directions, by layer, if it was sent some."""

    client: Client
    round: int
    adapter: Mapping[str, LoRA]
    head: Mapping[str, Tensor]
    loss: float
    steps: int
    bound: float = 0.0
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """What `aggregate` did: for the metrics, as plain data."""

    clients: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    seconds: dict[str, float]


@dataclass(frozen=True)
class LayerUpdates:
    """The updates of one layer, read anew in each iteration, so that nothing is held longer.

    `replies` are those that returned this layer, at the places `members` among all that were accepted;
    their `weights` sum to 1. `silence`: the chance that none would have returned it.
    """

    method: Method[Any]
    state: ServerState
    layer: str
    replies: Sequence[Reply]
    weights: Sequence[float]
    seed: int
    members: Sequence[int]
    silence: float = 0.0

    def __iter__(self) -> Iterator[Update]:
        for reply, p in zip(self.replies, self.weights, strict=True):
            sent = broadcast_layer(self.method, self.state, self.layer, reply.client, self.seed)
            magnitudes = reply.magnitudes.get(self.layer)
            update = Update(sent, reply.adapter[self.layer], p, magnitudes)
            yield corrected(update, self.silence, sends_products(self.method))


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


def refusal(
    method: Method[Any], state: ServerState, reply: Reply, seed: int, stragglers: bool = False
) -> str | None:
    """Why this reply cannot be accepted, or None. The whole reply is read and checked.

    `stragglers`: whether a client may return fewer layers than it was asked for.
    """
    client = reply.client
    if reply.round != state.round + 1:
        return f"it is for round {reply.round}, this is round {state.round + 1}"
    asked = set(state.layers if client.layers is None else client.layers)
    if stragglers and reply.adapter:
        asked &= set(reply.adapter)
    for what, got, expected in (
        ("layer", set(reply.adapter), asked),
        ("head parameter", set(reply.head), set(state.head)),
    ):
        if got != expected:
            name = sorted(got ^ expected)[0]
            known = state.layers if what == "layer" else state.head
            surplus = "not one it trains" if name in known else "not one of this model"
            return f"{what} {name!r} is {'missing' if name in expected else surplus}"
    for name in sorted(asked):
        lora = reply.adapter[name]
        if not isinstance(lora, LoRA):
            return f"layer {name!r}: got a {type(lora).__name__}, expected a LoRA"
        broadcast = broadcast_layer(method, state, name, client, seed)
        sent = broadcast.lora
        if (lora.A.shape, lora.B.shape) != (sent.A.shape, sent.B.shape):
            return (
                f"layer {name!r}: got A {tuple(lora.A.shape)} and B {tuple(lora.B.shape)}, "
                f"expected {tuple(sent.A.shape)} and {tuple(sent.B.shape)}"
            )
        if not abs(lora.scale - client.scale) <= 1e-6 * client.scale:  # also when it is NaN
            return f"layer {name!r}: got scale {lora.scale:g}, expected {client.scale:g}"
        if not (lora.A.isfinite().all() and lora.B.isfinite().all()):
            return f"layer {name!r}: it has a non-finite value (did training diverge?)"
        for factor in sorted({"A", "B"} - (broadcast.train - broadcast.keep)):
            if not torch.equal(getattr(lora, factor).to(sent.A), getattr(sent, factor)):
                return f"layer {name!r}: factor {factor} was not to be changed, but came back different"
        size = client.scale * float(lora.A.double().norm() * lora.B.double().norm())
        if size > HUGE:
            return (
                f"layer {name!r}: its update may be as large as {size:.0e}, expected at most "
                f"{HUGE:.0e} (did training diverge?)"
            )
        if reason := wrong_magnitudes(broadcast, reply.magnitudes.get(name)):
            return f"layer {name!r}: {reason}"
    for name, value in state.head.items():
        if reply.head[name].shape != value.shape:
            return (
                f"head parameter {name!r}: got shape {tuple(reply.head[name].shape)}, "
                f"expected {tuple(value.shape)}"
            )
        if not reply.head[name].isfinite().all():
            return f"head parameter {name!r}: it has a non-finite value (did training diverge?)"
    if not math.isfinite(reply.loss) or not 0 <= reply.bound < math.inf:
        return f"it reports a loss of {reply.loss} and a bound of {reply.bound} (did training diverge?)"
    return None


def wrong_magnitudes(sent: Broadcast, magnitudes: Tensor | None) -> str | None:
    """Why these are not the magnitudes of the frozen directions sent, or None."""
    got, expected = (None if x is None else tuple(x.shape) for x in (magnitudes, sent.magnitudes))
    if got != expected:
        return f"got magnitudes of shape {got}, expected {expected}"
    if magnitudes is not None and not float(magnitudes.double().norm()) <= HUGE:  # also when NaN
        return "it has a non-finite or huge magnitude (did training diverge?)"
    return None


def aggregate(
    method: Method[Any],
    weighting: Weighting,
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
    *,
    silence: Mapping[str, float] | None = None,
    channel: AirComp | None = None,
    head_rows: Mapping[str, Sequence[int]] | None = None,
) -> tuple[ServerState, Round]:
    """The next state from the replies that arrived, and what happened on the way.

    Every reply is checked whole before the first layer is touched; a refused one changes nothing
    but the list of the refused. With no reply accepted the layers and the head stay as they are.
    A layer is aggregated over the clients that returned it, with weights renormalised over them;
    one that nobody returned stays as it is.

    `silence`: clients may return fewer layers than asked for, and this is the chance, by layer, that
    none returns it (see `fedhl.participation`). `channel`: the updates are summed over the air.
    `head_rows`: the only rows of these head parameters that this round trains; the others stay as they
    are, to the bit, whatever was returned.
    """
    start = perf_counter()
    accepted, refused = [], []
    for reply in sorted(replies, key=lambda reply: reply.client.id):
        if accepted and accepted[-1].client.id == reply.client.id:
            reason = "another reply of this client was accepted already"
        else:
            reason = refusal(method, state, reply, seed, stragglers=silence is not None)
        if reason is None:
            accepted.append(reply)
        else:
            refused.append({"id": reply.client.id, "reason": reason})
    if not accepted:
        seconds = {"aggregate": perf_counter() - start, "diagnostics": 0.0}
        return replace(state, round=state.round + 1), Round([], refused, {}, seconds)

    cohort = measure(method, state, accepted, seed)
    p = weighting(cohort)
    arrived = {
        name: arrivals(method, state, name, accepted, p, seed, (silence or {}).get(name, 0.0))
        for name in state.layers
    }
    noise = None if channel is None else loudness(channel, method, accepted, p.tolist(), arrived)
    layers: dict[str, Any] = dict(state.layers)
    squares = {"aggregation_error": 0.0, "product_gap": 0.0}
    drift = torch.zeros(len(accepted), dtype=torch.float64)
    watching = 0.0
    for name, layer in state.layers.items():
        updates = arrived[name]
        if not sum(updates.weights):
            continue  # nobody who counts returned it
        if noise is None:
            layers[name] = method.aggregate(layer, updates)
        else:
            g = generator(seed, "channel", state.round, name)
            products = sends_products(method)
            # its weights were divided by the share of those who returned it, and so is the noise
            share = sum(float(p[k]) for k in updates.members)
            layers[name] = method.aggregate(layer, received(updates, products, noise / share, g))
        watch = perf_counter()
        before, after = method.delta(layer), method.delta(layers[name])
        if before is not None and after is not None:
            squares["aggregation_error"] += diagnostics.aggregation_error(before, after, updates)
        squares["product_gap"] += diagnostics.product_gap(updates)
        moved = [diagnostics.moved(update) for update in updates]
        drift[updates.members] += torch.tensor(moved, dtype=torch.float64)
        watching += perf_counter() - watch
    q = data_share(cohort)
    head = mean_head(accepted, q)
    for name, rows in (head_rows or {}).items():
        trained = head[name]
        head[name] = state.head[name].clone()
        head[name][rows] = trained[rows]
    following = ServerState(state.round + 1, layers, head, state.clients)
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
            "layers": len(reply.adapter),
        }
        for k, reply in enumerate(accepted)
    ]
    numbers = {name: value**0.5 for name, value in squares.items()}
    numbers |= diagnostics.summarise_weights(p, q, error)
    if noise is not None:
        numbers["channel_noise"] = noise
    return following, Round(clients, refused, numbers, seconds)


def arrivals(
    method: Method[Any],
    state: ServerState,
    layer: str,
    replies: Sequence[Reply],
    p: Tensor,
    seed: int,
    silence: float,
) -> LayerUpdates:
    """The updates of one layer: of those who returned it, with `p_i / Σ_{j returned it} p_j`, or all
    0 where theirs are."""
    members = [k for k, reply in enumerate(replies) if layer in reply.adapter]
    theirs = p[members]
    theirs = theirs / theirs.sum() if theirs.sum() > 0 else theirs
    those = [replies[k] for k in members]
    return LayerUpdates(method, state, layer, those, theirs.tolist(), seed, members, silence)


def loudness(
    channel: AirComp,
    method: Method[Any],
    replies: Sequence[Reply],
    p: Sequence[float],
    arrived: Mapping[str, LayerUpdates],
) -> float:
    """The standard deviation of the noise that this round's updates get over `channel`."""
    products = sends_products(method)
    signals: list[list[Signal]] = [[] for _ in replies]
    for updates in arrived.values():
        for k, update in zip(updates.members, updates, strict=True):
            signals[k].append(signal(update, products))
    return channel.deviation(p, signals)


def measure(method: Method[Any], state: ServerState, replies: Sequence[Reply], seed: int) -> Cohort:
    """What the weighting may ask: rows, truncation errors and energies, before aggregation; the
    norms of the updates, and what the clients report."""
    squares = torch.zeros(len(replies), len(state.layers), dtype=torch.float64)
    error = torch.zeros(len(replies), len(state.layers), dtype=torch.float64)
    energy = torch.zeros(len(state.layers), dtype=torch.float64)
    for column, (name, layer) in enumerate(state.layers.items()):
        delta = method.delta(layer)
        W = None if delta is None else dense(delta)
        if W is not None:
            energy[column] = W.double().square().sum()
        for row, reply in enumerate(replies):
            sent = broadcast_layer(method, state, name, reply.client, seed)
            if name in reply.adapter:
                lora = with_past(reply.adapter[name], sent.past, reply.magnitudes.get(name))
                squares[row, column] = squared_norm([(1.0, lora)])
            if W is not None and energy[column] > 0:
                error[row, column] = diagnostics.truncation_error(W, sent)
    # of the layers that a client returned, as if it had returned as many as the others
    returned = torch.tensor([len(reply.adapter) for reply in replies], dtype=torch.float64)
    norms = (squares.sum(dim=1) * len(state.layers) / returned).sqrt()
    return Cohort(
        examples=[reply.client.examples for reply in replies],
        error=error,
        energy=energy,
        norms=norms,
        losses=[reply.loss for reply in replies],
        bounds=[reply.bound for reply in replies],
    )


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


def deltas(method: Method[Any], state: ServerState) -> dict[str, LoRA | Tensor]:
    """The global change of every layer; {} if there is no global model."""
    found = {name: method.delta(layer) for name, layer in state.layers.items()}
    return {name: delta for name, delta in found.items() if delta is not None}


def spectra(method: Method[Any], state: ServerState, rank: int) -> dict[str, Any]:
    """Spectrum, energy, share beyond `rank` and effective rank of the global change; {} if none."""
    known = {name: diagnostics.spectrum(d) for name, d in deltas(method, state).items()}
    return diagnostics.summarise_spectra(known, rank) if known else {}
