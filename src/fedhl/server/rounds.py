"""One round of the server over all layers: who takes part, what is sent, what becomes of the replies.

The server's state is a value: each layer's method state, the trained head, the round. Functions
take it and return the next one; nothing here knows about models, files or networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedhl.lora import LoRA, dense, squared_norm
from fedhl.method import (
    Broadcast,
    Method,
    TaskSequence,
    Truncating,
    Update,
    finite,
    flatten,
    with_past,
)
from fedhl.seeds import derive, generator
from fedhl.server import diagnostics, robust
from fedhl.server.channel import AirComp, Signal, received, sends_products, signal
from fedhl.server.participation import corrected
from fedhl.server.payload import carried
from fedhl.server.privacy import Mechanism
from fedhl.server.robust import Guard
from fedhl.subspace import energy
from fedhl.weighting import Cohort, Weighting, data_share, relative_error

Done = TypeVar("Done")
HUGE = torch.finfo(torch.float32).max ** 0.5
"""The largest factor, update, head or loss that is accepted: the square of a larger one would overflow."""
SMALL = 2**21
"""Up to this many numbers a matrix is too small for two threads to share its products well."""


@dataclass(frozen=True)
class Client:
    """Who takes part: an id, the rank and LoRA scale of its adapters, its number of training rows,
    the only layers that it trains (None: all), and the type that its numbers travel in (see
    `fedhl.server.payload`)."""

    id: str
    rank: int
    scale: float
    examples: int
    layers: frozenset[str] | None = None
    payload: str = "float32"


@dataclass(frozen=True)
class ServerState:
    """`layers`: each layer's method state, by layer name; `head`: trained parameters outside the
    adapters, by name; `round`: the rounds done. `clients`: what each client keeps for itself between
    rounds, by id and name; only where clients live in the server's process, and never used here."""

    round: int
    layers: Mapping[str, Any]
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
    their `weights` sum to 1. `silence`: the chance that none would have returned it; `factors`: what
    each one's change is multiplied by where it is clipped, 1 for all unless given.
    """

    method: Method[Any]
    state: ServerState
    layer: str
    replies: Sequence[Reply]
    weights: Sequence[float]
    seed: int
    members: Sequence[int]
    silence: float = 0.0
    factors: Sequence[float] = ()

    def __iter__(self) -> Iterator[Update]:
        send = sender(self.method, self.state, self.layer, self.seed)
        factors = self.factors or [1.0] * len(self.replies)
        for reply, p, c in zip(self.replies, self.weights, factors, strict=True):
            magnitudes = reply.magnitudes.get(self.layer)
            update = Update(send(reply.client), reply.adapter[self.layer], p, magnitudes)
            update = robust.clipped(update, c)
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
        key = client.id if getattr(method, "drawn", True) else alike
        if key not in built:
            built[key] = broadcast_layer(method, alone, layer, client, seed)
        return built[key]

    return send


def broadcast(
    method: Method[Any], state: ServerState, client: Client, seed: int
) -> dict[str, Broadcast]:
    """What this client is sent, for every layer. Raises ValueError naming the layer."""
    return {name: broadcast_layer(method, state, name, client, seed) for name in state.layers}


def refusals(
    method: Method[Any],
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
    stragglers: bool = False,
) -> list[str | None]:
    """For each reply why it cannot be accepted, or None. Each is read and checked whole, one layer of
    all of them at a time.

    `stragglers`: whether a client may return fewer layers than it was asked for.
    """
    reasons = [wrong_names(state, reply, asked_of(state, reply, stragglers)) for reply in replies]
    for name in sorted(state.layers):
        send = sender(method, state, name, seed)
        for k, reply in enumerate(replies):
            if reasons[k] is None and name in reply.adapter:
                reason = wrong_layer(reply, name, send(reply.client))
                reasons[k] = reason and f"layer {name!r}: {reason}"
    return [
        wrong_numbers(state, reply) if reason is None else reason
        for reply, reason in zip(replies, reasons, strict=True)
    ]


def refusal(
    method: Method[Any], state: ServerState, reply: Reply, seed: int, stragglers: bool = False
) -> str | None:
    """Why this reply cannot be accepted, or None."""
    return refusals(method, state, [reply], seed, stragglers)[0]


def asked_of(state: ServerState, reply: Reply, stragglers: bool) -> set[str]:
    """The layers that this reply must have."""
    asked = set(state.layers if reply.client.layers is None else reply.client.layers)
    return asked & set(reply.adapter) if stragglers and reply.adapter else asked


def wrong_names(state: ServerState, reply: Reply, asked: set[str]) -> str | None:
    """What is wrong with the round, layers or head parameters that a reply is of, or None."""
    if reply.round != state.round + 1:
        return f"it is for round {reply.round}, this is round {state.round + 1}"
    for what, got, expected in (
        ("layer", set(reply.adapter), asked),
        ("head parameter", set(reply.head), set(state.head)),
    ):
        if got != expected:
            name = sorted(got ^ expected)[0]
            known = state.layers if what == "layer" else state.head
            surplus = "not one it trains" if name in known else "not one of this model"
            return f"{what} {name!r} is {'missing' if name in expected else surplus}"
    return None


def wrong_numbers(state: ServerState, reply: Reply) -> str | None:
    """What is wrong with a reply's head, or with what it reports, or None."""
    for name, value in state.head.items():
        if reply.head[name].shape != value.shape:
            return (
                f"head parameter {name!r}: got shape {tuple(reply.head[name].shape)}, "
                f"expected {tuple(value.shape)}"
            )
        if not reply.head[name].isfinite().all():
            return f"head parameter {name!r}: it has a non-finite value (did training diverge?)"
        if not (size := float(torch.linalg.vector_norm(reply.head[name]))) <= HUGE:
            return f"head parameter {name!r}: its norm is {size:.0e}, expected at most {HUGE:.0e}"
    if not abs(reply.loss) <= HUGE or not 0 <= reply.bound <= HUGE:  # also when they are NaN
        return f"it reports a loss of {reply.loss} and a bound of {reply.bound} (did training diverge?)"
    return None


def wrong_layer(reply: Reply, name: str, broadcast: Broadcast) -> str | None:
    """What is wrong with a reply's adapter of this layer, or None."""
    lora, sent, scale = reply.adapter[name], broadcast.lora, reply.client.scale
    if not isinstance(lora, LoRA):
        return f"got a {type(lora).__name__}, expected a LoRA"
    if (lora.A.shape, lora.B.shape) != (sent.A.shape, sent.B.shape):
        return (
            f"got A {tuple(lora.A.shape)} and B {tuple(lora.B.shape)}, "
            f"expected {tuple(sent.A.shape)} and {tuple(sent.B.shape)}"
        )
    if not abs(lora.scale - scale) <= 1e-6 * scale:  # also when it is NaN
        return f"got scale {lora.scale:g}, expected {scale:g}"
    if not finite(lora):
        return "it has a non-finite value (did training diverge?)"
    for factor in sorted({"A", "B"} - (broadcast.train - broadcast.keep)):
        if not torch.equal(getattr(lora, factor).to(sent.A), getattr(sent, factor)):
            return f"factor {factor} was not to be changed, but came back different"
    a, b = (float(torch.linalg.vector_norm(x)) for x in (lora.A, lora.B))
    size = max(a, b, scale * a * b)  # a large factor is one even where the other is zero
    if not size <= HUGE:
        return (
            f"its update may be as large as {size:.0e}, expected at most "
            f"{HUGE:.0e} (did training diverge?)"
        )
    return wrong_magnitudes(broadcast, reply.magnitudes.get(name))


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
    guard: Guard | None = None,
    into: MutableMapping[str, Any] | None = None,
    watch: bool = True,
) -> tuple[ServerState, Round]:
    """The next state from the replies that arrived, and what happened on the way.

    Every reply is checked whole before the first layer is touched; a refused one changes nothing
    but the list of the refused. With no reply accepted the layers and the head stay as they are.
    A layer is aggregated over the clients that returned it, with weights renormalised over them;
    one that nobody returned stays as it is.

    `silence`: clients may return fewer layers than asked for, and this is the chance, by layer, that
    none returns it (see `fedhl.server.participation`). `channel`: the updates are summed over the air.
    `head_rows`: the only rows of these head parameters that this round trains; the others stay as they
    are, to the bit, whatever was returned. `guard`: who moved too far is refused as if it had not
    arrived, or clipped, before anything is weighted. `into`: where the next layer states are put, each
    as soon as it is known (see `fedhl.shelf`); a dict unless given. `watch`: whether to compute the
    diagnostics of each layer, which cost about as much as the round.
    """
    start = perf_counter()
    accepted, refused = accept(method, state, replies, seed, stragglers=silence is not None)
    checks: list[Check] = []
    if guard is not None:
        accepted, left_out, checks = guarded(guard, method, state, accepted, seed)
        refused += left_out
        accepted = [
            replace(reply, head=robust.clipped_head(state.head, reply.head, check.factor))
            for reply, check in zip(accepted, checks, strict=True)
        ]
    factors = [check.factor for check in checks]
    if not accepted:
        seconds = {"aggregate": perf_counter() - start, "diagnostics": 0.0}
        return replace(state, round=state.round + 1), Round([], refused, {}, seconds)

    cohort = measure(method, state, accepted, seed, getattr(weighting, "norms", True), factors)
    p = weighting(cohort)

    def arrived(name: str, layer: Any) -> LayerUpdates:
        alone = replace(state, layers={name: layer})  # which may have come from disk, once
        unheard = (silence or {}).get(name, 0.0)
        return arrivals(method, alone, name, accepted, p, seed, unheard, factors)

    noise = None
    if channel is not None:
        everything = (arrived(*item) for item in state.layers.items())
        noise = loudness(channel, method, accepted, p.tolist(), everything)

    def step(name: str, layer: Any) -> LayerStep:
        began = perf_counter()
        updates = arrived(name, layer)
        if not sum(updates.weights):  # nobody who counts returned it
            return LayerStep(layer)
        if noise is None:
            following = method.aggregate(layer, updates)
        else:
            g = generator(seed, "channel", state.round, name)
            products = sends_products(method)
            # its weights were divided by the share of those who returned it, and so is the noise
            share = sum(float(p[k]) for k in updates.members)
            following = method.aggregate(layer, received(updates, products, noise / share, g))
        done = LayerStep(following, perf_counter() - began)
        return observed(done, method, layer, updates) if watch else done

    layers: MutableMapping[str, Any] = {} if into is None else into
    gap_square = spent = watched = 0.0
    error_square = None
    drift = torch.zeros(len(accepted), dtype=torch.float64)
    began = perf_counter()
    for name, done in side_by_side(step, state.layers):
        layers[name] = done.following
        if done.aggregation_error is not None:
            error_square = (error_square or 0.0) + done.aggregation_error
        gap_square += done.product_gap
        for k, square in done.moved.items():
            drift[k] += square
        spent, watched = spent + done.seconds, watched + done.watched
    # layers may have been done side by side: the wall time, divided as their own seconds are
    watching = (perf_counter() - began) * watched / (spent + watched) if watched else 0.0
    q = data_share(cohort)
    head = mean_head(accepted, q)
    for name, rows in (head_rows or {}).items():
        trained = head[name]
        head[name] = state.head[name].clone()
        head[name][rows] = trained[rows]
    result = ServerState(state.round + 1, layers, head, state.clients)
    seconds = {"aggregate": perf_counter() - start - watching, "diagnostics": watching}

    error = relative_error(cohort)
    drifts = drift.sqrt().tolist() if watch else [None] * len(accepted)
    clients = records(accepted, p.tolist(), error.tolist(), drifts, checks)
    numbers = {"product_gap": gap_square**0.5} if watch else {}
    if error_square is not None:
        numbers["aggregation_error"] = error_square**0.5
    numbers |= diagnostics.summarise_weights(p, q, error)
    if noise is not None:
        numbers["channel_noise"] = noise
    return result, Round(clients, refused, numbers, seconds)


def release(
    mechanism: Mechanism,
    method: Method[Any],
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
    *,
    into: MutableMapping[str, Any] | None = None,
) -> tuple[ServerState, Round]:
    """`aggregate` with client-level differential privacy: the method is given the noisy sum of the
    clipped updates in place of the updates, and the head moves by such a sum, too (`fedhl.server.privacy`).

    Also when nobody arrived, or nobody is accepted: the noise hides that. What the round reports is of
    the clients' own numbers, and for the server alone.
    """
    start = perf_counter()
    accepted, refused = accept(method, state, replies, seed)
    accepted, _, checks = guarded(Guard(clip=mechanism.clip), method, state, accepted, seed)
    factors = [check.factor for check in checks]
    alike = torch.full((len(accepted),), 1 / max(len(accepted), 1), dtype=torch.float64)

    def step(name: str, layer: Any) -> LayerStep:
        alone = replace(state, layers={name: layer})
        updates = arrivals(method, alone, name, accepted, alike, seed, 0.0)
        terms = ((factors[k], u) for k, u in zip(updates.members, updates, strict=True))
        released = mechanism.released(method, layer, terms, state.round + 1, name)
        return LayerStep(method.aggregate(layer, [released]))

    layers: MutableMapping[str, Any] = {} if into is None else into
    for name, done in side_by_side(step, state.layers):
        layers[name] = done.following
    heads = ((c, reply.head) for c, reply in zip(factors, accepted, strict=True))
    head = mechanism.released_head(state.head, heads, state.round + 1)
    result = ServerState(state.round + 1, layers, head, state.clients)
    clients, numbers = [], {}
    if accepted:
        cohort = measure(method, state, accepted, seed, norms=False)
        error = relative_error(cohort)
        weights, drifts = [1 / mechanism.denominator] * len(accepted), [None] * len(accepted)
        clients = records(accepted, weights, error.tolist(), drifts, checks)
        numbers = diagnostics.summarise_weights(alike, data_share(cohort), error)
    seconds = {"aggregate": perf_counter() - start, "diagnostics": 0.0}
    return result, Round(clients, refused, numbers, seconds)


def accept(
    method: Method[Any],
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
    stragglers: bool = False,
) -> tuple[list[Reply], list[dict[str, Any]]]:
    """The replies that can be accepted, by client id, one of each; and the others with the reason."""
    accepted, refused = [], []
    replies = sorted(replies, key=lambda reply: reply.client.id)
    reasons = refusals(method, state, replies, seed, stragglers)
    for reply, reason in zip(replies, reasons, strict=True):
        if accepted and accepted[-1].client.id == reply.client.id:
            reason = "another reply of this client was accepted already"
        if reason is None:
            accepted.append(reply)
        else:
            refused.append({"id": reply.client.id, "reason": reason})
    return accepted, refused


class Check(NamedTuple):
    """How far a client moved, over all that it returned, and what that is multiplied by."""

    norm: float
    factor: float


def guarded(
    guard: Guard, method: Method[Any], state: ServerState, replies: Sequence[Reply], seed: int
) -> tuple[list[Reply], list[dict[str, Any]], list[Check]]:
    """Those who stay; the others, with the reason; and how far those who stay moved, with the factors
    by which they are yet to be clipped."""
    norms = change_norms(method, state, replies, seed)
    reasons = guard.reject(norms) if guard.reject is not None else [None] * len(norms)
    factors = robust.clip_factors(norms, guard.clip)
    kept, refused, checks = [], [], []
    for reply, reason, norm, c in zip(replies, reasons, norms, factors, strict=True):
        if reason is not None:
            refused.append({"id": reply.client.id, "reason": reason})
            continue
        kept.append(reply)
        checks.append(Check(norm, c))
    return kept, refused, checks


def change_norms(
    method: Method[Any], state: ServerState, replies: Sequence[Reply], seed: int
) -> list[float]:
    """`sqrt(Σ_layers ||ΔW_i - ΔW(sent_i)||_F² + ||h_i - h||²)` of each client, over what it returned."""
    squares = [robust.squared_head_change(state.head, reply.head) for reply in replies]
    alike = torch.ones(len(replies), dtype=torch.float64)
    for name, layer in state.layers.items():
        alone = replace(state, layers={name: layer})
        updates = arrivals(method, alone, name, replies, alike, seed, 0.0)
        for k, update in zip(updates.members, updates, strict=True):
            squares[k] += robust.squared_change(update)
    return [square**0.5 for square in squares]


def records(
    replies: Sequence[Reply],
    weights: Sequence[float],
    errors: Sequence[float],
    drifts: Sequence[float | None],
    checks: Sequence[Check],
) -> list[dict[str, Any]]:
    """What is noted of each client; with `checks`, how far it moved before it was clipped, and c_i."""
    noted = [
        {
            "id": reply.client.id,
            "rank": reply.client.rank,
            "scale": reply.client.scale,
            "examples": reply.client.examples,
            "weight": p,
            "error": error,
            "drift": drift,
            "loss": reply.loss,
            "steps": reply.steps,
            "layers": len(reply.adapter),
        }
        for reply, p, error, drift in zip(replies, weights, errors, drifts, strict=True)
    ]
    for record, check in zip(noted, checks, strict=False):  # of all clients, or of none
        record |= {"norm": check.norm, "clip": check.factor}
    return noted


@dataclass(frozen=True)
class LayerStep:
    """One layer's next state and the seconds that it took; what `observed` adds: squared diagnostics (the
    first is None without a global model), how far each client moved, by its place among the accepted, and
    the seconds that this took."""

    following: Any
    seconds: float = 0.0
    aggregation_error: float | None = None
    product_gap: float = 0.0
    moved: Mapping[int, float] = field(default_factory=dict)
    watched: float = 0.0


def observed(done: LayerStep, method: Method[Any], layer: Any, updates: LayerUpdates) -> LayerStep:
    """The step from state `layer` with its diagnostics."""
    began = perf_counter()
    before, after = method.delta(layer), method.delta(done.following)
    products = diagnostics.of_products(updates)
    return replace(
        done,
        aggregation_error=None
        if before is None or after is None
        else diagnostics.aggregation_error(before, after, updates, products),
        product_gap=diagnostics.product_gap(updates, products),
        moved={
            k: diagnostics.moved(update) for k, update in zip(updates.members, updates, strict=True)
        },
        watched=perf_counter() - began,
    )


def side_by_side(
    step: Callable[[str, Any], Done], layers: Mapping[str, Any]
) -> Iterator[tuple[str, Done]]:
    """`step` on every layer, in order. Small layers several at a time, each on one thread: their products,
    and still more their SVDs, are too small to be shared out among threads. Large ones, and what is on
    disk or on an accelerator, one by one."""
    threads = torch.get_num_threads()
    small = isinstance(layers, dict) and all(
        tensor.device.type == "cpu" and tensor.numel() <= SMALL
        for layer in layers.values()
        for tensor in flatten(layer).values()
    )
    if threads == 1 or not small:
        yield from ((name, step(name, layer)) for name, layer in layers.items())
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from zip(layers, pool.map(step, layers, layers.values()), strict=True)
    finally:
        torch.set_num_threads(threads)  # threads begun later take the number set last


def arrivals(
    method: Method[Any],
    state: ServerState,
    layer: str,
    replies: Sequence[Reply],
    p: Tensor,
    seed: int,
    silence: float,
    factors: Sequence[float] = (),
) -> LayerUpdates:
    """The updates of one layer: of those who returned it, with `p_i / Σ_{j returned it} p_j`, or all
    0 where theirs are."""
    members = [k for k, reply in enumerate(replies) if layer in reply.adapter]
    theirs = p[members]
    theirs = theirs / theirs.sum() if theirs.sum() > 0 else theirs
    those = [replies[k] for k in members]
    clip = [factors[k] for k in members] if factors else ()
    return LayerUpdates(method, state, layer, those, theirs.tolist(), seed, members, silence, clip)


def loudness(
    channel: AirComp,
    method: Method[Any],
    replies: Sequence[Reply],
    p: Sequence[float],
    arrived: Iterable[LayerUpdates],
) -> float:
    """The standard deviation of the noise that this round's updates get over `channel`."""
    products = sends_products(method)
    signals: list[list[Signal]] = [[] for _ in replies]
    for updates in arrived:
        for k, update in zip(updates.members, updates, strict=True):
            signals[k].append(signal(update, products))
    return channel.deviation(p, signals)


def measure(
    method: Method[Any],
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
    norms: bool = True,
    factors: Sequence[float] = (),
) -> Cohort:
    """What the weighting may ask: rows, truncation errors and energies, before aggregation; what the
    clients report; and the norms of the updates, if asked for, clipped by `factors` if given."""
    squares = torch.zeros(len(replies), len(state.layers), dtype=torch.float64)
    error = torch.zeros(len(replies), len(state.layers), dtype=torch.float64)
    whole = torch.zeros(len(state.layers), dtype=torch.float64)
    for column, (name, layer) in enumerate(state.layers.items()):
        delta = method.delta(layer)
        W = None if delta is None else dense(delta)
        whole[column] = 0.0 if W is None else energy(W)
        send = sender(method, replace(state, layers={name: layer}), name, seed)
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
                    known[key] = (
                        method.lost(layer, reply.client.rank)
                        if isinstance(method, Truncating)
                        else diagnostics.truncation_error(W, sent)
                    )
                error[row, column] = known[key]
    # of the layers that a client returned, as if it had returned as many as the others
    returned = torch.tensor([len(reply.adapter) for reply in replies], dtype=torch.float64)
    return Cohort(
        examples=[reply.client.examples for reply in replies],
        error=error,
        energy=whole,
        norms=(squares.sum(dim=1) * len(state.layers) / returned).sqrt() if norms else None,
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
    known = dict(side_by_side(lambda _, delta: diagnostics.spectrum(delta), deltas(method, state)))
    return diagnostics.summarise_spectra(known, rank) if known else {}
