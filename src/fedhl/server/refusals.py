"""The reasons to refuse a reply: each reply is checked whole before any state moves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from fedhl.lora import LoRA
from fedhl.method import Broadcast, finite, remembers
from fedhl.server.layers import Layers
from fedhl.server.state import Reply, ServerState

HUGE = torch.finfo(torch.float32).max ** 0.5
"""The largest norm of a factor, update or head, and the largest loss, that is accepted: the square of a
larger number would overflow."""
FAR = 1e4
"""A factor, product, head or magnitude may come back this many times as large as it was sent, as those of the
other clients are in the median, or as 1. One larger update may end the run, and no real one comes near."""


def refusals(
    layers: Layers, replies: Sequence[Reply], stragglers: bool = False, compared: bool = True
) -> list[str | None]:
    """For each reply the reason why it cannot be accepted, or None. Every reply is read and checked whole,
    one layer of all replies at a time.

    `stragglers`: whether a client may return fewer layers than it was asked for. `compared`: whether a reply
    that is far larger than the others is refused.
    """
    far = FAR if compared else math.inf
    state = layers.state
    reasons = [wrong_names(state, reply, asked_of(state, reply, stragglers)) for reply in replies]
    for name in sorted(state.layers):
        send, sizes = layers.layer(name).sender(), dict[int, float]()
        for k, reply in enumerate(replies):
            if reasons[k] is None and name in reply.adapter:
                lora = reply.adapter[name]
                reason = wrong_layer(lora, reply, name, send(reply.client))
                reasons[k] = reason and f"layer {name!r}: {reason}"
                if reason is None:
                    sizes[k] = layer_size(lora, reply.magnitudes.get(name))
                del lora  # before the next one is read: all together may not fit into memory
        large = [k for k, size in sizes.items() if size > far]  # only these are compared
        starts = {k: start_size(send(replies[k].client)) for k in large}
        for k, reason in too_far(sizes, starts).items():
            reasons[k] = f"layer {name!r}: {reason}"
    clients = [reply.client for reply in replies]
    versions = layers.versions(clients) if remembers(layers.method) else {}
    reasons = [
        reason or wrong_version(reply, versions) or wrong_numbers(state, reply)
        for reply, reason in zip(replies, reasons, strict=True)
    ]
    for name, value in state.head.items():
        heads = {k: norm(replies[k].head[name]) for k, r in enumerate(reasons) if r is None}
        starts = dict.fromkeys((k for k, size in heads.items() if size > far), norm(value))
        for k, reason in too_far(heads, starts).items():
            reasons[k] = f"head parameter {name!r}: {reason}"
    return reasons


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float()))


def factors_size(lora: LoRA) -> float:
    """The largest of the norms of both factors, and of a bound of the norm of their product; a large factor
    is one even where the other is zero."""
    a, b = norm(lora.A), norm(lora.B)
    return max(a, b, lora.scale * a * b)


def layer_size(lora: LoRA, magnitudes: Tensor | None) -> float:
    return max(factors_size(lora), 0.0 if magnitudes is None else norm(magnitudes))


def start_size(sent: Broadcast) -> float:
    return layer_size(sent.lora, sent.magnitudes)


def too_far(sizes: Mapping[int, float], starts: Mapping[int, float]) -> dict[int, str]:
    """The clients of `starts` whose sizes are more than `FAR` times as large as anything they are compared
    with, and the reasons. `sizes`: of all clients; `starts`: of what was sent to those that are above `FAR`.
    Of two middle sizes of the other clients the lower counts, so that not even half of the clients make such
    sizes usual."""
    found = {}
    for k, start in starts.items():
        others = [other for j, other in sizes.items() if j != k]
        limit = FAR * max(1.0, start, median_low(others) if others else 0.0)
        if sizes[k] > limit:
            found[k] = (
                f"got an update that may be as large as {sizes[k]:.0e}, expected at most {limit:.0e}, "
                f"{FAR:,.0f} times what was sent or what the other clients return (did training "
                "diverge?)"
            )
    return found


def refusal(layers: Layers, reply: Reply, stragglers: bool = False) -> str | None:
    """The reason why this reply cannot be accepted, or None."""
    return refusals(layers, [reply], stragglers)[0]


def asked_of(state: ServerState, reply: Reply, stragglers: bool) -> set[str]:
    """The layers that this reply must have."""
    asked = set(state.layers if reply.client.layers is None else reply.client.layers)
    return asked & set(reply.adapter) if stragglers and reply.adapter else asked


def wrong_names(state: ServerState, reply: Reply, asked: set[str]) -> str | None:
    """The mistake in a reply's round, or in the names of its layers or head parameters, or None."""
    rows = reply.client.examples
    if type(rows) is not int or rows < 1:  # also when it is NaN, or True
        return f"the reply is of a client with {rows!r} training rows, expected a whole number"
    if reply.round != state.round + 1:
        return f"the reply is for round {reply.round}, expected round {state.round + 1}"
    for what, got, expected in (
        ("layer", set(reply.adapter), asked),
        ("head parameter", set(reply.head), set(state.head)),
    ):
        if got != expected:
            name = sorted(got ^ expected)[0]
            known = state.layers if what == "layer" else state.head
            surplus = "not a layer that the client trains" if name in known else "not in this model"
            return f"{what} {name!r} is {'missing' if name in expected else surplus}"
    return None


def wrong_version(reply: Reply, versions: Mapping[str, str]) -> str | None:
    """The mistake in what a reply's client holds, or None. `versions`: what each client should hold, by id;
    empty if clients remember nothing."""
    expected = versions.get(reply.client.id)
    if reply.version != expected:
        got = "nothing" if reply.version is None else f"version {reply.version[:12]}"
        wanted = "nothing" if expected is None else f"version {expected[:12]}"
        return f"its client holds {got}, expected {wanted}: the reply is relative to another start"
    return None


def wrong_numbers(state: ServerState, reply: Reply) -> str | None:
    """The mistake in a reply's head, or in the numbers that it reports, or None."""
    for name, value in state.head.items():
        if not isinstance(reply.head[name], Tensor):
            return f"head parameter {name!r}: got a {type(reply.head[name]).__name__}, expected a tensor"
        if reply.head[name].shape != value.shape:
            return (
                f"head parameter {name!r}: got shape {tuple(reply.head[name].shape)}, "
                f"expected {tuple(value.shape)}"
            )
        if not reply.head[name].isfinite().all():
            return f"head parameter {name!r}: got a non-finite value (did training diverge?)"
        if not (size := float(torch.linalg.vector_norm(reply.head[name]))) <= HUGE:
            return f"head parameter {name!r}: got norm {size:.0e}, expected at most {HUGE:.0e}"
    for number in (reply.loss, reply.bound, reply.steps):
        if isinstance(number, bool) or not isinstance(number, int | float):
            return f"the reply reports a {type(number).__name__}, expected a number"
    if not abs(reply.loss) <= HUGE or not 0 <= reply.bound <= HUGE:  # also when they are NaN
        return (
            f"the reply reports loss {reply.loss} and bound {reply.bound} (did training diverge?)"
        )
    return None


def wrong_layer(lora: LoRA, reply: Reply, name: str, broadcast: Broadcast) -> str | None:
    """The mistake in `lora`, a reply's adapter of this layer, or None."""
    sent, scale = broadcast.lora, reply.client.scale
    if not isinstance(lora, LoRA):
        return f"got a {type(lora).__name__}, expected a LoRA"
    (m, n), rank = sent.shape, sent.rank + (min(sent.shape) if reply.client.full else 0)
    if (lora.A.shape, lora.B.shape) != ((rank, n), (m, rank)):
        return (
            f"got A {tuple(lora.A.shape)} and B {tuple(lora.B.shape)}, "
            f"expected {(rank, n)} and {(m, rank)}"
        )
    if not abs(lora.scale - scale) <= 1e-6 * scale:  # also when it is NaN
        return f"got scale {lora.scale:g}, expected {scale:g}"
    if not finite(lora):
        return "got a non-finite value (did training diverge?)"
    for factor in sorted({"A", "B"} - (broadcast.train - broadcast.keep)):
        if not torch.equal(getattr(lora, factor).to(sent.A), getattr(sent, factor)):
            return f"factor {factor} is frozen, but came back changed"
    size = factors_size(lora)
    if not size <= HUGE:
        return (
            f"got an update that may be as large as {size:.0e}, expected at most "
            f"{HUGE:.0e} (did training diverge?)"
        )
    return wrong_magnitudes(broadcast, reply.magnitudes.get(name))


def wrong_magnitudes(sent: Broadcast, magnitudes: Tensor | None) -> str | None:
    """The mistake in a reply's magnitudes of the frozen directions, or None."""
    if not isinstance(magnitudes, Tensor | None):
        return f"got magnitudes of type {type(magnitudes).__name__}, expected a tensor"
    got, expected = (None if x is None else tuple(x.shape) for x in (magnitudes, sent.magnitudes))
    if got != expected:
        return f"got magnitudes of shape {got}, expected {expected}"
    if magnitudes is not None and not float(magnitudes.double().norm()) <= HUGE:  # also when NaN
        return "got a non-finite or huge magnitude (did training diverge?)"
    return None


def accept(
    layers: Layers, replies: Sequence[Reply], stragglers: bool = False, compared: bool = True
) -> tuple[list[Reply], list[dict[str, Any]]]:
    """The accepted replies, sorted by client id, one of each client; and the refused ones with the reason."""
    accepted, refused = [], []
    replies = sorted(replies, key=lambda reply: reply.client.id)
    for reply, reason in zip(replies, refusals(layers, replies, stragglers, compared), strict=True):
        if accepted and accepted[-1].client.id == reply.client.id:
            reason = "another reply of this client has been accepted already"
        if reason is None:
            accepted.append(reply)
        else:
            refused.append({"id": reply.client.id, "reason": reason})
    return accepted, refused
