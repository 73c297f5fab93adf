"""What is accepted in a round can be sent in the next one, whatever the type of the payload."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.small_server import CLIENTS, OF_RANK_4, SEED, obedient, same, start

from fedhl import METHODS, get_method, get_weighting, server
from fedhl.network.wire import encode_broadcast
from fedhl.server import Client, Reply, Rules, ServerState, refusals
from fedhl.server.carried import carried_reply


def narrow(name: str) -> list[Client]:
    clients = CLIENTS if get_method(name).mixed_ranks else OF_RANK_4
    return [replace(client, payload="float16") for client in clients]


def arrived(name: str, state: ServerState, client: Client, largest: float | None = None) -> Reply:
    """A reply as it arrives in float16; `largest`: every number of A and `s B` that is trained."""
    method = get_method(name)
    sent = server.travelling(method, state, client, SEED)
    answer, adapter = obedient(method, state, client), {}
    for layer, lora in answer.adapter.items():
        trained = sent[layer].train - sent[layer].keep
        if largest is not None:
            of = {"A": lora.A, "B": lora.B}
            unit = {"A": 1.0, "B": lora.scale}
            lora = replace(lora, **{f: torch.full_like(of[f], largest / unit[f]) for f in trained})
        adapter[layer] = lora
    return carried_reply(replace(answer, adapter=adapter), sent)


def sent_to_all(name: str, state: ServerState, clients: list[Client]) -> None:
    for client in clients:
        sent = server.travelling(get_method(name), state, client, SEED)
        encode_broadcast({}, sent, state.head, "float16", state.ledger.version(client.id))


@pytest.fixture(autouse=True)
def nothing_is_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "FAR", math.inf)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_after_factors_that_just_fit(name: str) -> None:
    """Three rounds in which one client returns what just fits into float16: alone, and among others."""
    method, clients = get_method(name), narrow(name)
    for cohort in (clients, clients[:1]):
        state = start(method, top=4 if not method.mixed_ranks else 6, scale=2.0)
        for _ in range(3):
            replies = [arrived(name, state, c, 3e4 if c == clients[0] else None) for c in cohort]
            rules = Rules(audience=clients)
            weighting = get_weighting("examples")
            state, outcome = server.aggregate(method, weighting, state, replies, SEED, rules)
            assert {r["id"] for r in outcome.refused} <= {clients[0].id}, "the others count"
            sent_to_all(name, state, clients)


def test_the_update_that_moves_furthest_is_refused_and_the_rest_counts() -> None:
    """A matrix that does not fit; the round is that of the other clients, to the bit."""
    method, clients = get_method("flora"), narrow("flora")
    state = start(method, top=6, scale=2.0)
    replies = [arrived("flora", state, c) for c in clients]
    first, weighting = replies[0], get_weighting("uniform")
    bad = [arrived("flora", state, clients[0], 3e4), *replies[1:]]
    got, outcome = server.aggregate(method, weighting, state, bad, SEED)
    want, honest = server.aggregate(method, weighting, state, replies[1:], SEED)
    assert same(got, want) and outcome.clients == honest.clients
    assert [r["id"] for r in outcome.refused] == [first.client.id]
    assert "could not be sent" in outcome.refused[0]["reason"]
    assert "too large for float16" in outcome.refused[0]["reason"]
    alone, outcome = server.aggregate(method, weighting, state, bad[:1], SEED)
    assert same(alone, replace(state, round=1)) and not outcome.clients
    # nothing is tried where the type holds whatever is accepted
    wide = [replace(r, client=replace(r.client, payload="bfloat16")) for r in bad]
    assert len(server.aggregate(method, weighting, state, wide, SEED)[1].clients) == 4
