"""Clients that finish only part of the model: who trains what, and what the server makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.small_federation import RANKS, federate, kinds
from support.small_server import (
    CLIENTS,
    OF_RANK_4,
    SEED,
    SHAPES,
    draw,
    exact,
    obedient,
    reply,
    start,
)

from fedhl import METHODS, LoRA, Update, dense, get_method, get_weighting, server
from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.method import Broadcast, flatten
from fedhl.model import peft
from fedhl.server import Reply, Rules, ServerState, refusals
from fedhl.server.layers import Layers
from fedhl.server.participation import corrected, matching, reached, silence

LAYERS = [f"encoder.layer.{k}.{part}" for k in (1, 10) for part in ("query", "value")] + ["pooler"]
EPS32 = torch.finfo(torch.float32).eps


# --- who trains what ----------------------------------------------------------------------------


def test_parts_match_whole_components_of_names():
    assert matching(LAYERS, ["layer.1"]) == LAYERS[:2]  # and not layer.10
    assert matching(LAYERS, ["pooler", "query"]) == [LAYERS[0], LAYERS[2], LAYERS[4]]
    assert matching(LAYERS, [LAYERS[3]]) == [LAYERS[3]]
    with pytest.raises(ValueError, match="'que' is part of no layer's name"):
        matching(LAYERS, ["query", "que"])


def test_a_straggler_trains_the_last_layers_down_to_a_uniform_depth():
    draws = [reached(LAYERS, 1.0, seed) for seed in range(2000)]
    for layers in draws:
        assert layers == LAYERS[-len(layers) :] and layers
    for depth in range(1, 6):
        share = sum(len(layers) == depth for layers in draws) / len(draws)
        # five standard deviations of a binomial share
        assert abs(share - 1 / 5) < 5 * (0.2 * 0.8 / len(draws)) ** 0.5
    assert draws == [reached(LAYERS, 1.0, seed) for seed in range(2000)]
    assert all(reached(LAYERS, 0.0, seed) == LAYERS for seed in range(20))
    late = sum(len(reached(LAYERS, 0.3, seed)) < 5 for seed in range(2000)) / 2000
    assert abs(late - 0.3 * 4 / 5) < 5 * (0.24 * 0.76 / 2000) ** 0.5


def test_silence_is_the_frequency_with_which_nobody_returns_a_layer():
    cohort, chance, count = [LAYERS, LAYERS[2:], LAYERS[:1]], 0.8, 4000
    said = silence(cohort, chance)
    missing = dict.fromkeys(LAYERS, 0)
    for k in range(count):
        sets = [reached(layers, chance, 10 * k + j) for j, layers in enumerate(cohort)]
        for name in LAYERS:
            missing[name] += not any(name in layers for layers in sets)
    for name in LAYERS:
        p = said[name]
        assert abs(missing[name] / count - p) <= 5 * (p * (1 - p) / count) ** 0.5
    # the last layer of a client is always reached; the first one of the first client, seldom
    assert said[LAYERS[-1]] == 0 and said[LAYERS[1]] == pytest.approx(0.8 * 3 / 5)
    assert said[LAYERS[0]] == 0  # the third client has nothing else to train


def test_the_correction_makes_the_mean_over_all_rounds_that_of_full_participation():
    """With probability `silence` a layer stays as it is; else it moves by 1/(1 - silence)."""
    sent = Broadcast(LoRA(draw(0, 2, 5), draw(1, 7, 2), 0.5), train=frozenset({"B"}))
    lora = LoRA(sent.lora.A, draw(2, 7, 2), 0.5)
    for p in (0.1, 0.5, 0.9):
        moved = corrected(Update(sent, lora, 0.3), p, products=False).lora
        mean = p * exact(sent.lora) + (1 - p) * exact(moved)
        assert (mean - exact(lora)).norm() <= 20 * EPS32 * exact(lora).norm()
    same = Update(sent, lora, 0.3)
    assert corrected(same, 0.0, products=False) is same


def test_the_correction_makes_the_mean_of_magnitudes_that_of_full_participation():
    past, before, after = LoRA(draw(3, 2, 5), draw(4, 7, 2), 0.5), draw(5, 2), draw(6, 2)
    lora = LoRA(draw(0, 2, 5), draw(1, 7, 2), 0.5)
    sent = Broadcast(lora, past=past, magnitudes=before)
    for p in (0.1, 0.5, 0.9):
        moved = corrected(Update(sent, lora, 0.3, after), p, products=False)
        assert moved.magnitudes is not None
        mean = p * before + (1 - p) * moved.magnitudes
        assert (mean - after).norm() <= 20 * EPS32 * (before.norm() + after.norm())
        assert (moved.lora.A - lora.A).norm() <= 20 * EPS32 * lora.A.norm() / (1 - p)


def test_the_correction_of_a_product_is_exact_where_both_factors_moved():
    sent = Broadcast(LoRA(draw(0, 2, 5), draw(1, 7, 2), 0.5))
    lora = LoRA(draw(3, 2, 5), draw(2, 7, 2), 0.5)
    for p in (0.1, 0.5, 0.9):
        moved = corrected(Update(sent, lora, 0.3), p, products=True).lora
        mean = p * exact(sent.lora) + (1 - p) * exact(moved)
        size = exact(lora).norm() + exact(sent.lora).norm() / (1 - p)
        assert (mean - exact(lora)).norm() <= 20 * EPS32 * size
        factors = corrected(Update(sent, lora, 0.3), p, products=False).lora
        assert (exact(factors) - exact(moved)).norm() > 0.01 * exact(lora).norm()


# --- what the server makes of it ----------------------------------------------------------------


def without(answer: Reply, *layers: str) -> Reply:
    adapter = {name: x for name, x in answer.adapter.items() if name not in layers}
    return replace(answer, adapter=adapter)


def numbers(state: ServerState, layer: str) -> list[torch.Tensor]:
    return list(flatten(state.layers[layer]).values())


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_averaged_over_those_who_returned_it(name: str):
    """Not divided by all clients, as if the others had returned zero or the old value."""
    method, weighting = METHODS[name](), get_weighting("examples")
    clients = CLIENTS if method.mixed_ranks else OF_RANK_4
    first, second, third = SHAPES
    top = max(client.rank for client in clients)
    state = start(method, top=top, scale=clients[0].scale)
    answers = [obedient(method, state, client) for client in clients]
    partial = [without(answers[0], first), without(answers[1], first, second), *answers[2:]]
    after, outcome = server.aggregate(method, weighting, state, partial, SEED, Rules(silence={}))
    assert [c["layers"] for c in outcome.clients] == [2, 1, 3, 3]
    for layer, members in ((first, answers[2:]), (second, [answers[0], *answers[2:]])):
        alone, _ = server.aggregate(method, weighting, state, members, SEED)
        for x, y in zip(numbers(after, layer), numbers(alone, layer), strict=True):
            # the weights were normalised in another order, and an SVD may have turned a sign
            gap = float((x.abs() - y.abs()).double().norm())
            assert gap <= 1e-5 * (1 + float(y.double().norm()))
    whole, _ = server.aggregate(method, weighting, state, answers, SEED)
    for x, y in zip(numbers(after, third), numbers(whole, third), strict=True):
        assert torch.equal(x, y)


def test_a_layer_that_nobody_returned_stays():
    method, weighting = get_method("fedhl"), get_weighting("uniform")
    first = next(iter(SHAPES))
    state = start()
    answers = [without(reply(state, client), first) for client in CLIENTS]
    after, _ = server.aggregate(method, weighting, state, answers, SEED, Rules(silence={}))
    assert after.layers[first] is state.layers[first]
    assert all(after.layers[name] is not state.layers[name] for name in SHAPES if name != first)


def test_a_missing_layer_is_refused_unless_stragglers_are_expected():
    state, first = start(), next(iter(SHAPES))
    partial = without(reply(state, CLIENTS[0]), first)
    assert refusals.refusal(Layers(get_method("fedhl"), state, SEED), partial) == (
        f"layer {first!r} is missing"
    )
    assert (
        refusals.refusal(Layers(get_method("fedhl"), state, SEED), partial, stragglers=True) is None
    )
    nothing = replace(partial, adapter={})
    assert refusals.refusal(Layers(get_method("fedhl"), state, SEED), nothing, stragglers=True) == (
        f"layer {first!r} is missing"
    )


def test_a_client_that_trains_some_layers_returns_exactly_those():
    state, (first, *others) = start(), SHAPES
    client = replace(CLIENTS[0], layers=frozenset(others))
    full = replace(reply(state, client), client=client)
    method = get_method("fedhl")
    assert (
        refusals.refusal(Layers(method, state, SEED), full)
        == f"layer {first!r} is not a layer that the client trains"
    )
    assert refusals.refusal(Layers(method, state, SEED), without(full, first)) is None
    assert refusals.refusal(Layers(method, state, SEED), without(full, first, others[0])) == (
        f"layer {min(others)!r} is missing"
    )


def test_the_correction_of_a_layer_reaches_its_update():
    method, weighting = get_method("ffa_lora"), get_weighting("uniform")
    state = start(method, top=4, scale=2.0)
    answers = [obedient(method, state, client) for client in OF_RANK_4]
    first, second, _ = SHAPES
    plain, _ = server.aggregate(method, weighting, state, answers, SEED, Rules(silence={}))
    more, _ = server.aggregate(
        method, weighting, state, answers, SEED, Rules(silence={first: 0.75})
    )
    moves = {
        layer: [dense(method.delta(x.layers[layer])) for x in (state, plain, more)]  # type: ignore[arg-type]
        for layer in (first, second)
    }
    before, one, four = moves[first]
    assert ((four - before) - 4 * (one - before)).norm() <= 100 * EPS32 * one.norm()
    assert torch.equal(moves[second][1], moves[second][2])


def test_a_frozen_factor_that_came_back_changed_is_refused():
    method = get_method("ffa_lora")
    state = start(method, top=4, scale=2.0)
    good = obedient(method, state, OF_RANK_4[0])
    assert refusals.refusal(Layers(method, state, SEED), good) is None
    first = sorted(SHAPES)[0]
    x = good.adapter[first]
    bad = replace(good, adapter={**good.adapter, first: replace(x, A=x.A * 1.01)})
    assert refusals.refusal(Layers(method, state, SEED), bad) == (
        f"layer {first!r}: factor A is frozen, but came back changed"
    )


def test_the_weights_of_norms_do_not_depend_on_how_many_layers_came_back():
    """Two clients with the same update, of which one returned a single layer: they count alike."""
    method, state = get_method("hetlora"), start(get_method("hetlora"))
    first, second, _ = SHAPES
    one = reply(state, CLIENTS[1], method)
    twin = replace(one, client=replace(one.client, id="bob's twin"))
    square = {}
    for name, lora in one.adapter.items():  # of one norm in every layer
        square[name] = replace(lora, B=lora.B / exact(lora).norm().float())
    whole, part = (replace(x, adapter=square) for x in (one, twin))
    part = without(part, first, second)
    _, outcome = server.aggregate(
        method, get_weighting("norm"), state, [whole, part], SEED, Rules(silence={})
    )
    assert [c["weight"] for c in outcome.clients] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert [c["layers"] for c in outcome.clients] == [3, 1]


# --- in the simulation --------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("method", ["fedhl", "flora"])
def test_clients_of_some_layers_leave_the_others_alone(kind: str, method: str):
    federation = federate(kind, method=method)
    layers = list(peft.layers(federation.slots))
    ours = frozenset(layers[:1])
    federation = replace(
        federation, clients=[replace(client, layers=ours) for client in federation.clients]
    )
    state = initial_state(federation)
    following, outcome = run_round(federation, state)
    assert [c["layers"] for c in outcome.clients] == [1] * len(RANKS)
    for name in layers:
        assert (following.layers[name] is state.layers[name]) == (name not in ours)
    whole = run_round(federate(kind, method=method), state)[1]
    head = 4 * sum(p.numel() for p in federation.slots.head.values())
    m, n = peft.layers(federation.slots)[layers[0]]
    for one, other in zip(outcome.clients, whole.clients, strict=True):
        assert one["bytes_down"] == other["bytes_down"]
        assert one["bytes_up"] == 4 * one["rank"] * (m + n) + head < other["bytes_up"]


def test_stragglers_train_only_what_they_reach_and_are_reproducible():
    def play(chance: float) -> tuple[list[ServerState], list[int]]:
        federation = federate("bert", participation={"stragglers": chance})
        states, counts = [initial_state(federation)], []
        for _ in range(4):
            state, outcome = run_round(federation, states[-1])
            assert not outcome.refused
            states.append(state)
            counts += [c["layers"] for c in outcome.clients]
        return states, counts

    layers = len(peft.layers(federate("bert").slots))
    states, counts = play(0.9)
    assert min(counts) < layers and set(counts) <= set(range(1, layers + 1))
    again, _ = play(0.9)
    x, y = states[-1], again[-1]
    for name in x.layers:
        for a, b in zip(numbers(x, name), numbers(y, name), strict=True):
            assert torch.equal(a, b)
    _, all_of_them = play(0.0)
    assert set(all_of_them) == {layers}


@kinds
def test_the_last_layers_are_those_nearest_to_the_output(kind: str):
    """`query` before `value` in a block, block 0 before block 1, whatever the alphabet says."""
    federation = federate(kind)
    got = federation.slots.order
    assert sorted(got) == sorted(peft.layers(federation.slots))
    blocks = [[int(part) for part in name.split(".") if part.isdigit()] for name in got]
    assert blocks == sorted(blocks)
