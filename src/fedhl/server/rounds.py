"""One round of the server over all layers: from the replies of a cohort to the next state.

The server's state is a value: each layer's method state, the trained head, the round. Functions
take it and return the next one; nothing here knows about models, files or networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedhl.errors import UserError
from fedhl.method import Method, Remembering, Update, remembers
from fedhl.seeds import generator
from fedhl.server import diagnostics, robust
from fedhl.server.channel import AirComp, Signal, received, sends_products, signal
from fedhl.server.layers import Layer, Layers, LayerUpdates
from fedhl.server.ledger import Ledger
from fedhl.server.measures import change_norms, measure_cohort
from fedhl.server.privacy import Mechanism
from fedhl.server.refusals import accept
from fedhl.server.robust import Guard
from fedhl.server.sendable import unsendable
from fedhl.server.side_by_side import side_by_side
from fedhl.server.state import Client, Outcome, Reply, ServerState
from fedhl.weighting import Weighting, data_share, relative_error


@dataclass(frozen=True)
class Rules:
    """The rules of a round for its replies, apart from their weighted sum; none by default.

    `guard`: an update that is too large is refused, as if it had not arrived, or clipped, before the
    weighting, and no client counts with many more rows than the others. `silence`: clients may return fewer
    layers than they were asked for; by layer, the probability that no client returns it (see
    `fedhl.server.participation`). `channel`: the updates are summed over the air. `head_rows`: the only rows
    of these head parameters that this round trains; the others stay as they are, to the bit, whatever was
    returned. `audience`: the clients that may be sent the next state, besides those that replied; a state
    that cannot be sent to all of them is not kept.
    """

    guard: Guard | None = None
    silence: Mapping[str, float] | None = None
    channel: AirComp | None = None
    head_rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    audience: Sequence[Client] = ()


PLAIN = Rules()
"""Every accepted update counts as it is."""
Memories = Callable[[str], MutableMapping[str, Tensor]]
"""Gives the mapping, empty, that receives the memory of a version (see `fedhl.server.ledger`)."""


def in_memory(version: str) -> MutableMapping[str, Tensor]:
    return {}


def aggregate(
    method: Method[Any],
    weighting: Weighting,
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
    rules: Rules = PLAIN,
    *,
    into: MutableMapping[str, Any] | None = None,
    memories: Memories = in_memory,
    watch: bool = True,
) -> tuple[ServerState, Outcome]:
    """The next state from the replies that arrived, and the outcome of the round.

    Every reply is checked whole before the first layer is touched; a refused reply changes nothing
    but the list of refused clients. Without an accepted reply the layers and the head stay as they are.
    A layer is aggregated over the clients that returned it, with weights renormalised over them;
    a layer that no client returned stays as it is. If the next state cannot be sent in the type of the
    payload, the update that moves furthest is refused, until the rest can be sent (`fedhl.server.sendable`).

    `into`: the mapping that receives each next layer state as soon as it is known (see `fedhl.shelf`); a
    new dict by default. `watch`: whether to compute the diagnostics of each layer, which cost about as much
    as the round.
    """
    start = perf_counter()
    layers = Layers(method, state, seed)
    accepted, refused = accept(layers, replies, stragglers=rules.silence is not None)
    checks: list[Check] = []
    if rules.guard is not None:
        accepted, left_out, checks = guarded(rules.guard, layers, accepted)
        refused += left_out
        accepted = with_clipped_heads(state.head, accepted, checks)
    audience = [*rules.audience, *(reply.client for reply in replies)]
    while accepted:
        result, outcome = combined(
            weighting, layers, accepted, checks, rules, into=into, memories=memories, watch=watch
        )
        reason = unsendable(method, result, audience, seed)
        if reason is None:
            spent = perf_counter() - start - outcome.seconds["diagnostics"]
            seconds = outcome.seconds | {"aggregate": spent}
            return result, replace(outcome, refused=refused, seconds=seconds)
        norms = change_norms(layers, accepted)
        worst = norms.index(max(norms))
        refused.append({"id": accepted[worst].client.id, "reason": reason})
        del accepted[worst], checks[worst : worst + 1]
    seconds = {"aggregate": perf_counter() - start, "diagnostics": 0.0}
    return replace(state, round=state.round + 1), Outcome([], refused, {}, seconds)


def combined(
    weighting: Weighting,
    layers: Layers,
    accepted: Sequence[Reply],
    checks: Sequence[Check],
    rules: Rules,
    *,
    into: MutableMapping[str, Any] | None,
    memories: Memories,
    watch: bool,
) -> tuple[ServerState, Outcome]:
    """The next state from these replies, all of which count; of the seconds, those of the diagnostics."""
    method, state = layers.method, layers.state
    factors, silence = [check.factor for check in checks], rules.silence or {}
    cohort = measure_cohort(layers, accepted, weighting.norms, factors)
    if rules.guard is not None:
        rows = torch.as_tensor(cohort.examples)
        cohort = replace(cohort, examples=robust.counted_rows(rows, rules.guard.rows))
    p, q, error = weighting(cohort), data_share(cohort), relative_error(cohort)

    def arrived(layer: Layer) -> LayerUpdates:
        return layer.updates(accepted, p, silence.get(layer.name, 0.0), factors)

    noise = None
    if rules.channel is not None:
        noise = channel_deviation(rules.channel, accepted, p, map(arrived, layers))

    def step(name: str, before: Any) -> LayerStep:
        began, updates = perf_counter(), arrived(layers.of(name, before))
        if not sum(updates.weights):  # no client of weight > 0 returned it
            return LayerStep(before)
        heard = updates if noise is None else over_the_air(updates, noise, p)
        done = LayerStep(method.aggregate(before, heard), perf_counter() - began)
        return observed(done, updates) if watch else done

    following: MutableMapping[str, Any] = {} if into is None else into
    steps: list[LayerStep] = []
    began = perf_counter()
    for name, done in side_by_side(step, state.layers):
        following[name] = done.following
        steps.append(
            replace(done, following=None)
        )  # it may be on disk, and need not stay in memory
    wall = perf_counter() - began

    head = only_rows(mean_head(accepted, q), state.head, rules.head_rows)
    ledger = remembered(layers, accepted, memories)
    result = ServerState(state.round + 1, following, head, state.clients, ledger)
    # layers may have been done side by side: the wall time, divided as their own seconds are
    spent, watched = sum(done.seconds for done in steps), sum(done.watched for done in steps)
    watching = wall * watched / (spent + watched) if watched else 0.0
    moved = drifts(steps, len(accepted)) if watch else [None] * len(accepted)
    numbers = over_layers(steps) if watch else {}
    numbers |= diagnostics.summarise_weights(p, q, error)
    if remembers(method):
        numbers["memories"] = len(ledger.memories)
    if noise is not None:
        numbers["channel_noise"] = noise
    clients = records(accepted, p.tolist(), error.tolist(), moved, checks)
    return result, Outcome(clients, [], numbers, {"diagnostics": watching})


def release(
    mechanism: Mechanism,
    method: Method[Any],
    state: ServerState,
    replies: Sequence[Reply],
    seed: int,
    *,
    into: MutableMapping[str, Any] | None = None,
    memories: Memories = in_memory,
) -> tuple[ServerState, Outcome]:
    """`aggregate` with client-level differential privacy: the method is given the noisy sum of the
    clipped updates in place of the updates, and the head moves by such a sum, too (`fedhl.server.privacy`).

    Also if no client arrived, or none is accepted: the noise hides that. The outcome holds the clients' own
    numbers, and is for the server alone. Raises UserError if the next state cannot be sent in the type of
    the payload: no client can be left out for that, or its absence would say something of its update.
    """
    start = perf_counter()
    layers = Layers(method, state, seed)
    # what becomes of a client must not depend on the others: their updates are clipped instead
    accepted, refused = accept(layers, replies, compared=False)
    accepted, _, checks = guarded(Guard(clip=mechanism.clip), layers, accepted)
    factors = [check.factor for check in checks]
    alike = torch.full((len(accepted),), 1 / max(len(accepted), 1), dtype=torch.float64)

    def step(name: str, before: Any) -> Any:
        updates = layers.of(name, before).updates(accepted, alike)
        terms = ((factors[k], u) for k, u in zip(updates.members, updates, strict=True))
        released = mechanism.released(method, before, terms, state.round + 1, name)
        return method.aggregate(before, [released])

    following: MutableMapping[str, Any] = {} if into is None else into
    for name, after in side_by_side(step, state.layers):
        following[name] = after
    heads = ((c, reply.head) for c, reply in zip(factors, accepted, strict=True))
    head = mechanism.released_head(state.head, heads, state.round + 1)
    ledger = remembered(layers, accepted, memories)
    result = ServerState(state.round + 1, following, head, state.clients, ledger)
    reason = unsendable(method, result, [reply.client for reply in replies], seed)
    if reason is not None:
        raise UserError(
            f"round {result.round}, with privacy: {reason}; use `wire.payload: bfloat16`, which holds "
            "numbers as large as float32 does, or a smaller privacy.clip"
        )
    clients, numbers = [], {}
    if accepted:
        cohort = measure_cohort(layers, accepted, norms=False)
        error = relative_error(cohort)
        weights, moved = [1 / mechanism.denominator] * len(accepted), [None] * len(accepted)
        clients = records(accepted, weights, error.tolist(), moved, checks)
        numbers = diagnostics.summarise_weights(alike, data_share(cohort), error)
    seconds = {"aggregate": perf_counter() - start, "diagnostics": 0.0}
    return result, Outcome(clients, refused, numbers, seconds)


def remembered(layers: Layers, replies: Sequence[Reply], memories: Memories) -> Ledger:
    """The ledger after these replies were accepted: each client holds what it was sent, in all layers, also
    in the layers that it did not train. Where a base grows (see `fedhl.method.Growing`), what the other
    clients hold is of no use any more, and is forgotten."""
    ledger = layers.state.ledger
    if not remembers(layers.method):
        return ledger
    now = layers.versions([reply.client for reply in replies])
    first = {now[reply.client.id]: reply.client for reply in reversed(replies)}
    fresh = {version: memories(version) for version in first}
    for layer in layers:
        for version, client in first.items():
            fresh[version][layer.name] = layer.after(client)
    before = ledger if isinstance(layers.method, Remembering) else Ledger()
    return before.moved(now, fresh)


class Check(NamedTuple):
    """The norm of a client's update, over all layers that it returned and the head, and the factor c_i by
    which its change is multiplied."""

    norm: float
    factor: float


def guarded(
    guard: Guard, layers: Layers, replies: Sequence[Reply]
) -> tuple[list[Reply], list[dict[str, Any]], list[Check]]:
    """The replies that stay; the refused replies, with the reason; and for each reply that stays its norm and
    the factor by which its change is yet to be clipped."""
    norms = change_norms(layers, replies)
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


def with_clipped_heads(
    head: Mapping[str, Tensor], replies: Sequence[Reply], checks: Sequence[Check]
) -> list[Reply]:
    """The replies, each with its head moved from `head` by no more than its adapters may."""
    return [
        replace(reply, head=robust.clipped_head(head, reply.head, check.factor))
        for reply, check in zip(replies, checks, strict=True)
    ]


def records(
    replies: Sequence[Reply],
    weights: Sequence[float],
    errors: Sequence[float],
    drifts: Sequence[float | None],
    checks: Sequence[Check],
) -> list[dict[str, Any]]:
    """The record of each client for the metrics; with `checks`, also its norm before clipping, and c_i."""
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
    """One layer's next state and the seconds of its aggregation. `observed` adds: the squared diagnostics
    (`aggregation_error` and `step` are None without a global model), `moved`, the squared norm of each
    client's update by its place among the accepted replies, and `watched`, the seconds of these
    diagnostics."""

    following: Any
    seconds: float = 0.0
    aggregation_error: float | None = None
    step: float | None = None
    product_gap: float = 0.0
    moved: Mapping[int, float] = field(default_factory=dict)
    watched: float = 0.0


def observed(done: LayerStep, updates: LayerUpdates) -> LayerStep:
    """The step with its diagnostics."""
    began, layer = perf_counter(), updates.layer
    before, after = layer.method.delta(layer.state), layer.method.delta(done.following)
    products = diagnostics.of_products(updates)
    if before is not None and after is not None:
        error = diagnostics.aggregation_error(before, after, updates, products)
        done = replace(done, aggregation_error=error, step=diagnostics.step(before, after))
    return replace(
        done,
        product_gap=diagnostics.product_gap(updates, products),
        moved={
            k: diagnostics.moved(update) for k, update in zip(updates.members, updates, strict=True)
        },
        watched=perf_counter() - began,
    )


def over_layers(steps: Sequence[LayerStep]) -> dict[str, float]:
    """The diagnostics of all layers together: roots of sums of squares."""
    numbers = {"product_gap": sum(step.product_gap for step in steps) ** 0.5}
    for name in ("aggregation_error", "step"):
        squares = [s for step in steps if (s := getattr(step, name)) is not None]
        numbers |= {name: sum(squares) ** 0.5} if squares else {}
    return numbers


def drifts(steps: Sequence[LayerStep], count: int) -> list[float]:
    """The norm of the update of each of `count` clients, over all layers."""
    squares = torch.zeros(count, dtype=torch.float64)
    for step in steps:
        for k, square in step.moved.items():
            squares[k] += square
    return squares.sqrt().tolist()


def channel_deviation(
    channel: AirComp, replies: Sequence[Reply], p: Tensor, arrived: Iterable[LayerUpdates]
) -> float:
    """The standard deviation of the noise that this round's updates get over `channel`."""
    signals: list[list[Signal]] = [[] for _ in replies]
    for updates in arrived:
        products = sends_products(updates.layer.method)
        for k, update in zip(updates.members, updates, strict=True):
            signals[k].append(signal(update, products))
    return channel.deviation(p.tolist(), signals)


def over_the_air(updates: LayerUpdates, noise: float, p: Tensor) -> list[Update]:
    """The updates of one layer as the antenna receives them. Their weights were divided by the total weight
    of the clients that returned the layer, and so is the noise."""
    layer = updates.layer
    share = sum(float(p[k]) for k in updates.members)
    g = generator(layer.seed, "channel", layer.round, layer.name)
    return received(updates, sends_products(layer.method), noise / share, g)


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


def only_rows(
    head: Mapping[str, Tensor], before: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """`head`, in which the parameters named in `rows` change in these rows only; their other rows are as
    `before`."""
    kept = dict(head)
    for name, those in rows.items():
        kept[name] = before[name].clone()
        kept[name][those] = head[name][those]
    return kept
