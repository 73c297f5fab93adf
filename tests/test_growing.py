"""Bases that grow: a client of the last round is sent what was added, every other one the whole base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cohorts import draw
from torch import Tensor

from fedhl import Update, get_method, get_weighting, server
from fedhl.lora import dense, initial
from fedhl.method import Broadcast
from fedhl.server import Client, Reply, Rules, ServerState
from fedhl.server.ledger import after, base_of, next_version
from fedhl.server.payload import PAYLOADS, carried

SEED = 5
SHAPES = {"key": (40, 30), "value": (30, 50)}
EPS32 = torch.finfo(torch.float32).eps
METHODS = [
    ("flora", {}),
    ("florist", {"threshold": 0.8}),
    ("rac_lora", {}),
    ("rac_lora", {"frozen": "B"}),
    ("fedex_lora", {"residual_rank": 4}),
    ("frlora", {}),
]
growing = pytest.mark.parametrize(
    "method", [get_method(name, **given) for name, given in METHODS], ids=str
)
payloads = pytest.mark.parametrize("payload", PAYLOADS)


def cohort(method: Any, payload: str = "float32") -> list[Client]:
    ranks = (1, 4, 2) if method.mixed_ranks else (4, 4, 4)
    names = zip(("ada", "bob", "cyd"), ranks, strict=True)
    return [Client(name, rank, 2.0, 10, payload=payload) for name, rank in names]


def start(method: Any) -> ServerState:
    adapter = {name: initial(m, n, 4, 2.0, seed=1) for name, (m, n) in SHAPES.items()}
    return server.init(method, adapter, {"bias": torch.zeros(3)}, SEED)


def answer(method: Any, state: ServerState, client: Client, layers: Sequence[str] = ()) -> Reply:
    """The reply of a client that moved what it trains, for these layers (by default all)."""
    sent = server.travelling(method, state, client, SEED)
    adapter = {
        name: replace(
            b.lora,
            **{
                f: getattr(b.lora, f)
                + 0.1 * draw(len(client.id) + state.round, *getattr(b.lora, f).shape).float()
                for f in b.train
            },
        )
        for name, b in sent.items()
        if name in (layers or sent)
    }
    version = next_version(state.ledger.version(client.id), sent)
    return Reply(client, state.round + 1, adapter, state.head, 0.5, 1, version=version)


def play(method: Any, state: ServerState, replies: Sequence[Reply]) -> ServerState:
    rules = Rules(silence={name: 0.0 for name in SHAPES})
    weighting = get_weighting("uniform")
    following, outcome = server.aggregate(method, weighting, state, replies, SEED, rules)
    assert not outcome.refused
    return following


def whole(method: Any, state: ServerState, name: str) -> Tensor:
    """The base of a newcomer."""
    base = method.broadcast(state.layers[name], 4, 2.0).base
    assert base is not None
    return base


@payloads
@growing
def test_who_took_part_in_the_last_round_is_sent_what_was_added(method: Any, payload: str) -> None:
    """And starts at most twice as far from the base as one who is sent all of it, or else is sent all of it,
    too. Ten rounds of absences; both ends hold the same bits, and the server holds no more than the bases
    of the last cohort."""
    state, held, versions = start(method), {}, {}
    clients, took_part, counts = cohort(method, payload), set(), {True: 0, False: 0}
    for round in range(10):
        replies, there = [], {}
        for client in clients:
            mine: Mapping[str, Tensor] = held.get(client.id, {})
            for name, sent in server.travelling(method, state, client, SEED).items():
                adds = sent.merged is not None
                counts[adds] += 1
                if round:  # before, there is no base
                    assert (sent.base is None) == adds
                    assert adds <= (client.id in took_part)
                    assert adds == (client.id in took_part) or payload != "float32"
                if not adds:
                    mine = {k: x for k, x in mine.items() if k != name}
                base = base_of(mine.get(name), sent)
                ours = server.broadcast(method, state, client, SEED)[name].base
                assert (base is None) == (ours is None)
                if base is not None and ours is not None:
                    assert torch.equal(base, ours)
                    exact = whole(method, state, name)
                    rounded = carried(Broadcast(sent.lora, base=exact), payload).base
                    assert rounded is not None
                    allowed = max(2 * float((rounded - exact).norm()), 1e-5 * float(exact.norm()))
                    assert float((base - exact).norm()) <= allowed
                there[client.id] = {**there.get(client.id, {}), name: after(mine.get(name), sent)}
            if (round + clients.index(client)) % 3:
                replies.append(answer(method, state, client))
        for reply in replies:
            held[reply.client.id] = there[reply.client.id]
            versions[reply.client.id] = reply.version
        state = play(method, state, replies)
        took_part = {reply.client.id for reply in replies}
        assert state.ledger.of == {id: versions[id] for id in took_part}
        for id in took_part:
            for name in SHAPES:
                ours = state.ledger.held(id, name)
                assert ours is not None and torch.equal(ours, held[id][name])
    assert min(counts.values()) > 5


@growing
def test_a_layer_that_nobody_returned_is_not_added_twice(method: Any) -> None:
    """Its base stays, and so does what was added last: the clients hold that already."""
    state, clients = start(method), cohort(method)
    for layers in (("key", "value"), ("key", "value"), ("key",)):
        state = play(method, state, [answer(method, state, c, layers) for c in clients])
    for client in clients:
        sent = server.travelling(method, state, client, SEED)
        assert sent["key"].merged is not None and sent["value"].merged is None
        for name, b in server.broadcast(method, state, client, SEED).items():
            exact = whole(method, state, name)
            assert b.base is not None
            assert float((b.base - exact).norm()) <= 1e-5 * float(exact.norm())


@growing
def test_more_components_than_a_matrix_are_not_sent(method: Any) -> None:
    """On a 5 x 4 layer every stack, pair or residual here has more numbers than the matrix."""
    state = method.init(initial(5, 4, 4, 2.0, seed=1))
    sent = method.broadcast(state, 4, 2.0)
    moved = {f: getattr(sent.lora, f) + draw(1, *getattr(sent.lora, f).shape) for f in sent.train}
    update = Update(sent, replace(sent.lora, **moved), 1.0)
    assert method.grown(state) is None
    after = method.aggregate(state, [update])
    change = method.grown(after)
    assert change is None or change.rank * (5 + 4) < 5 * 4
    assert float(dense(method.delta(after)).norm()) > 0


def test_a_drawn_adapter_is_the_prefix_of_a_larger_draw() -> None:
    """So that a client can draw its own rows alone."""
    for m, n, rank in ((7, 5, 5), (64, 33, 30), (300, 257, 64)):
        large = initial(m, n, rank, 1.0, seed=11)
        for r in (1, 2, rank // 2, rank):
            assert torch.equal(initial(m, n, r, 2.0, seed=11).A, large.A[:r])
