"""One round of the server over all layers: who takes part, what is sent, what becomes of the replies.

The server's state is a value: each layer's method state, the trained head, the round. Functions
take it and return the next one; nothing here knows about models, files or networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedhl.method import Method
from fedhl.seeds import generator
from fedhl.server import diagnostics, robust
from fedhl.server.arrivals import LayerUpdates, arrivals
from fedhl.server.channel import AirComp, Signal, received, sends_products, signal
from fedhl.server.measures import change_norms, measure
from fedhl.server.privacy import Mechanism
from fedhl.server.refusals import accept
from fedhl.server.robust import Guard
from fedhl.server.side_by_side import side_by_side
from fedhl.server.state import Reply, Round, ServerState
from fedhl.weighting import Weighting, data_share, relative_error


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

    cohort = measure(method, state, accepted, seed, weighting.norms, factors)
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
