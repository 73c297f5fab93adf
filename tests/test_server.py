"""The server: what it sends, what it refuses and why, and what becomes of the rest."""

from __future__ import annotations

import gc
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.reference import dense as reference
from support.small_server import (
    CLIENTS,
    FEDHL,
    HEAD,
    OF_RANK_4,
    SEED,
    SHAPES,
    TOP,
    begun,
    draw,
    exact,
    play,
    reply,
    same,
    start,
    tensors,
)
from torch import Tensor

from fedhl import get_method, get_weighting, server
from fedhl.lora import LoRA, initial
from fedhl.method import Broadcast
from fedhl.server import Client, Reply, ServerState, diagnostics, measures, refusals
from fedhl.server.layers import Layers

EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def state() -> ServerState:
    return begun()


def test_the_norm_of_an_update_has_its_frozen_directions():
    """Task 2 of sd_lora: a client that moved its magnitudes far has the larger update."""
    method = get_method("sd_lora")
    state = start(method, top=4, scale=2.0)
    clients = OF_RANK_4[:2]
    state, _ = play(state, [reply(state, c, method) for c in clients], method)
    state = server.next_task(method, state)
    large, small = (
        replace(
            reply(state, client, method, step=1e-3),
            magnitudes={name: torch.tensor([alpha]) for name in state.layers},
        )
        for client, alpha in zip(clients, (100.0, 1.0), strict=True)
    )
    _, outcome = play(state, [large, small], method, get_weighting("norm"))
    weights = [c["weight"] for c in outcome.clients]
    assert weights[0] == pytest.approx(100 / 101, rel=1e-2)


# --- the cohort ---------------------------------------------------------------------------------


def test_sampling_is_seeded_and_without_replacement() -> None:
    clients = [replace(CLIENTS[0], id=f"client-{k:02d}") for k in range(20)]
    for size in (1, 7, 20, 50):
        cohort = server.sample(clients, size, SEED, 1)
        ids = [client.id for client in cohort]
        assert len(set(ids)) == len(ids) == min(size, 20) and ids == sorted(ids)
        assert cohort == server.sample(clients, size, SEED, 1)
    draws = {tuple(c.id for c in server.sample(clients, 7, s, r)) for s in (0, 1) for r in (1, 2)}
    assert len(draws) == 4, "another seed or another round, another cohort"


def test_sampling_does_not_depend_on_the_order_of_the_list() -> None:
    clients = [replace(CLIENTS[0], id=f"client-{k:02d}") for k in range(20)]
    for round in range(5):
        assert server.sample(clients[::-1], 6, SEED, round) == server.sample(
            clients, 6, SEED, round
        )


def test_sampling_is_uniform() -> None:
    """A client is in a cohort of 5 of 20 with probability 1/4: binomial counts over the rounds."""
    clients = [replace(CLIENTS[0], id=f"client-{k:02d}") for k in range(20)]
    rounds, p = 2000, 5 / 20
    counts = dict.fromkeys((client.id for client in clients), 0)
    for round in range(rounds):
        for client in server.sample(clients, 5, SEED, round):
            counts[client.id] += 1
    deviation = (rounds * p * (1 - p)) ** 0.5
    assert all(abs(count - rounds * p) < 5 * deviation for count in counts.values())


# --- what is sent -------------------------------------------------------------------------------


def test_a_broadcast_is_the_same_whenever_it_is_asked_for(state: ServerState) -> None:
    for client in CLIENTS:
        first, again = (server.broadcast(FEDHL, state, client, SEED) for _ in range(2))
        assert list(first) == sorted(SHAPES)
        for name, b in first.items():
            assert torch.equal(b.lora.A, again[name].lora.A)
            assert torch.equal(b.lora.B, again[name].lora.B)
            assert (b.lora.rank, b.lora.scale) == (client.rank, client.scale)


def test_a_broadcast_nobody_can_be_sent_names_layer_and_client(state: ServerState) -> None:
    greedy = Client("eve", TOP + 1, 1.0, 5)
    with pytest.raises(ValueError, match=r"layer 'block\.0\.query', client 'eve': rank must be in"):
        server.broadcast(FEDHL, state, greedy, SEED)


def test_a_draw_is_of_its_round_client_and_layer() -> None:
    """A client is sent 3 of 6 components by chance. Sixteen rounds, clients or layers that all had the
    same 3 of the 20 choices would share the draw."""
    method = get_method("fslora")
    names, clients = (
        [f"layer.{k}" for k in range(16)],
        [Client(f"{k}", 3, 1.0, 1) for k in range(16)],
    )
    state = server.init(method, {name: initial(9, 8, 6, 1.0, seed=0) for name in names}, {}, SEED)

    def drawn(round: int, client: Client, layer: str) -> tuple[int, ...]:
        now = replace(state, round=round)
        index = server.broadcast(method, now, client, SEED)[layer].index
        assert index is not None
        return tuple(index.tolist())

    assert len({drawn(round, clients[0], names[0]) for round in range(16)}) > 1
    assert len({drawn(1, client, names[0]) for client in clients}) > 1
    assert len({drawn(1, clients[0], name) for name in names}) > 1


def test_truncation_errors_are_the_dense_tails(state: ServerState) -> None:
    """Per layer `Σ_{j>r} σ_j²`, and over all layers ê_i, relative to the energy.

    The factors sent are those of a float32 SVD: off by δ, ||δ|| <= 10 ε ||W||, the residual R moves
    by no more than δ, and its square by `2 ||R|| ||δ|| + ||δ||²`.
    """
    replies = [reply(state, client) for client in CLIENTS]
    cohort = measures.measure_cohort(Layers(FEDHL, state, SEED), replies)
    error, energy = torch.as_tensor(cohort.error), torch.as_tensor(cohort.energy)
    tails = torch.zeros_like(error)
    for column, name in enumerate(SHAPES):
        sigma = torch.linalg.svdvals(FEDHL.delta(state.layers[name]).double())  # pyright: ignore
        total = float(sigma.square().sum())
        assert float(energy[column]) == pytest.approx(total, rel=1e-12)
        for row, client in enumerate(CLIENTS):
            tails[row, column] = tail = float(sigma[client.rank :].square().sum())
            assert tail > 0, "the test is about something"
            off = 10 * EPS32 * total**0.5
            assert abs(float(error[row, column]) - tail) <= 2 * tail**0.5 * off + off**2
    _, outcome = play(state, replies)
    want = tails.sum(1) / energy.sum()
    assert [c["error"] for c in outcome.clients] == pytest.approx(want.tolist(), abs=20 * EPS32)
    assert all(0 < c["error"] < 1 for c in outcome.clients)


def test_before_the_first_round_there_is_no_error() -> None:
    state = start()
    _, outcome = play(state, [reply(state, client) for client in CLIENTS])
    assert [c["error"] for c in outcome.clients] == [0.0] * 4
    assert [c["weight"] for c in outcome.clients] == pytest.approx([0.25] * 4)
    assert outcome.diagnostics["effective_clients"] == pytest.approx(4)


# --- a round ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "examples", "truncation"])
@pytest.mark.parametrize("name", ["fedhl", "flexlora"])
def test_a_round_is_the_dense_formula(state: ServerState, name: str, weighting: str) -> None:
    method = get_method(name)
    settings = {"power": 2, "epsilon": 1e-3} if weighting == "truncation" else {}
    rule = get_weighting(weighting, **settings)
    replies = [reply(state, client, method) for client in CLIENTS]
    following, outcome = play(state, replies, method, rule)
    W = {n: s.W for n, s in state.layers.items()}
    ranks = [client.rank for client in CLIENTS]
    rows = sum(client.examples for client in CLIENTS)
    p = {
        "uniform": [1 / 4] * 4,
        "examples": [client.examples / rows for client in CLIENTS],
        "truncation": reference.truncation_weights(list(W.values()), ranks, 2, 1e-3),
    }[weighting]
    # p follows ê, which is good to rounding in float32, and 1/(ê² + ε) is at most 1/√ε as steep
    assert [c["weight"] for c in outcome.clients] == pytest.approx(p, rel=20 * EPS32 / 1e-3**0.5)
    assert sum(c["weight"] for c in outcome.clients) == pytest.approx(1, rel=1e-12)
    for layer in SHAPES:
        clients = [
            reference.Client(c["weight"], x.client.scale, x.adapter[layer].B, x.adapter[layer].A)
            for c, x in zip(outcome.clients, replies, strict=True)
        ]
        want = (
            reference.fedhl(W[layer], clients) if name == "fedhl" else reference.flexlora(clients)
        )
        size = W[layer].norm() + sum(c.p * c.s * c.B.norm() * c.A.norm() for c in clients)
        got = method.delta(following.layers[layer])
        assert isinstance(got, Tensor)
        assert (got - want).norm() <= 20 * EPS32 * size  # sums of 18 products, one SVD
    assert following.round == state.round + 1


def test_the_head_is_averaged_by_data_share_whatever_the_weights(state: ServerState) -> None:
    replies = [reply(state, client) for client in CLIENTS]
    rows = sum(client.examples for client in CLIENTS)
    for weighting in ("uniform", "truncation"):
        following, _ = play(state, replies, weighting=get_weighting(weighting))
        assert list(following.head) == sorted(HEAD)
        for name in HEAD:
            terms = [x.client.examples / rows * x.head[name].double() for x in replies]
            want = torch.stack(terms).sum(0)
            bound = 8 * EPS32 * torch.stack(terms).abs().sum(0)  # four products and three sums
            assert following.head[name].dtype == torch.float32
            assert ((following.head[name] - want).abs() <= bound).all()


def test_what_a_round_reports(state: ServerState) -> None:
    replies = [reply(state, client) for client in CLIENTS]
    following, outcome = play(state, replies)
    for record, x in zip(outcome.clients, replies, strict=True):
        sent = server.broadcast(FEDHL, state, x.client, SEED)
        moved = sum(
            float((exact(x.adapter[n]) - exact(sent[n].lora)).square().sum()) for n in SHAPES
        )
        assert record["drift"] == pytest.approx(moved**0.5, rel=1e-4)
        assert {k: record[k] for k in ("id", "rank", "scale", "examples", "loss", "steps")} == {
            **{"id": x.client.id, "rank": x.client.rank, "scale": x.client.scale},
            **{"examples": x.client.examples, "loss": 0.5, "steps": 3},
        }
    p = torch.tensor([c["weight"] for c in outcome.clients], dtype=torch.float64)
    q = torch.tensor([c.examples for c in CLIENTS]).double() / 125
    error = torch.tensor([c["error"] for c in outcome.clients], dtype=torch.float64)
    numbers = dict(outcome.diagnostics)
    squares = {"aggregation_error": 0.0, "step": 0.0, "product_gap": 0.0}
    for name in SHAPES:
        updates = Layers(FEDHL, state, SEED).layer(name).updates(replies, p)
        before, after = state.layers[name].W, following.layers[name].W
        products = diagnostics.of_products(updates)
        lost = diagnostics.aggregation_error(before, after, updates, products)
        squares["aggregation_error"] += lost
        squares["step"] += float((after.double() - before.double()).square().sum())
        squares["product_gap"] += diagnostics.product_gap(updates, products)
    for name, square in squares.items():
        assert numbers.pop(name) == pytest.approx(square**0.5)
    assert numbers == pytest.approx(diagnostics.summarise_weights(p, q, error))
    size = max(float(x.W.norm()) for x in state.layers.values())
    assert outcome.diagnostics["aggregation_error"] < 100 * EPS32 * size
    assert outcome.refused == [] and set(outcome.seconds) == {"aggregate", "diagnostics"}


def test_what_is_known_of_the_step_needs_a_global_model() -> None:
    for name, known in (("fedsa_lora", False), ("fedit", True)):
        method = get_method(name)
        adapter = {layer: initial(*shape, TOP, 2.0, seed=0) for layer, shape in SHAPES.items()}
        state = server.init(method, adapter, {}, SEED)
        client = replace(CLIENTS[0], rank=TOP, scale=2.0)
        sent = server.broadcast(method, state, client, SEED)
        unmoved = {layer: b.lora for layer, b in sent.items()}
        outcome = play(state, [Reply(client, 1, unmoved, {}, loss=0.5, steps=3)], method)[1]
        assert not outcome.refused
        for number in ("aggregation_error", "step"):
            assert (number in outcome.diagnostics) == known
        assert "product_gap" in outcome.diagnostics


@pytest.mark.parametrize("name", ["fedhl", "flexlora"])
def test_the_order_of_arrival_changes_no_bit(state: ServerState, name: str) -> None:
    method = get_method(name)
    replies = [reply(state, client, method) for client in CLIENTS]
    first, outcome = play(state, replies, method)
    again, reordered = play(state, [replies[k] for k in (2, 0, 3, 1)], method)
    assert same(first, again)
    assert outcome.clients == reordered.clients
    assert [c["id"] for c in outcome.clients] == ["ada", "bob", "cyd", "dan"]


def test_a_round_leaves_its_inputs_alone(state: ServerState) -> None:
    replies = [reply(state, client) for client in CLIENTS]
    inputs = [tensors(state)]
    for r in replies:
        factors = {f"{n}.{k}": getattr(x, k) for n, x in r.adapter.items() for k in "AB"}
        inputs.append(factors | dict(r.head))
    copies = [{n: t.clone() for n, t in values.items()} for values in inputs]
    play(state, replies)
    for values, copy in zip(inputs, copies, strict=True):
        assert all(torch.equal(values[n], copy[n]) for n in copy)


def test_equal_ranks_with_fedit() -> None:
    method = get_method("fedit")
    state = start(method, top=4, scale=2.0)
    for _ in range(2):
        replies = [reply(state, client, method) for client in OF_RANK_4]
        following, outcome = play(state, replies, method, get_weighting("examples"))
        for name in SHAPES:
            want = reference.fedit(
                [
                    reference.Client(c["weight"], 2.0, x.adapter[name].B, x.adapter[name].A)
                    for c, x in zip(outcome.clients, replies, strict=True)
                ]
            )
            got = method.delta(following.layers[name])
            assert isinstance(got, LoRA)
            size = 2.0 * float(got.A.norm() * got.B.norm())
            assert (exact(got) - want).norm() <= 20 * EPS32 * size
        # everybody is sent everything; the dense W is rounded to float32
        assert all(c["error"] <= (10 * EPS32) ** 2 for c in outcome.clients)
        state = following


# --- refusals -----------------------------------------------------------------------------------


def with_layer(name: str, change: Callable[[LoRA], LoRA]) -> Callable[[Reply], Reply]:
    return lambda r: replace(r, adapter=dict(r.adapter) | {name: change(r.adapter[name])})


def with_head(name: str, change: Callable[[Tensor], Any]) -> Callable[[Reply], Reply]:
    return lambda r: replace(r, head=dict(r.head) | {name: change(r.head[name])})


def without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {n: value for n, value in mapping.items() if n != name}


def poisoned(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[-1] = value
    return t


NAME = "block.0.value"  # 7 x 11; "cyd" has rank 4 and scale 2
LAYER = r"^layer 'block\.0\.value': "
WRONG = {
    "missing layer": (
        lambda r: replace(r, adapter=without(r.adapter, NAME)),
        r"^layer 'block\.0\.value' is missing$",
    ),
    "surplus layer": (
        lambda r: replace(r, adapter={**r.adapter, "block.9": r.adapter[NAME]}),
        r"^layer 'block\.9' is not in this model$",
    ),
    "transposed": (
        with_layer(NAME, lambda x: LoRA(x.B.T, x.A.T, x.scale)),
        LAYER + r"got A \(4, 7\) and B \(11, 4\), expected \(4, 11\) and \(7, 4\)$",
    ),
    "rank": (
        with_layer(NAME, lambda x: LoRA(x.A[:3], x.B[:, :3], x.scale)),
        LAYER + r"got A \(3, 11\) and B \(7, 3\), expected \(4, 11\) and \(7, 4\)$",
    ),
    "scale": (
        with_layer(NAME, lambda x: LoRA(x.A, x.B, 16.0)),
        LAYER + r"got scale 16, expected 2$",
    ),
    "negative scale": (
        with_layer(NAME, lambda x: LoRA(x.A, x.B, -2.0)),
        LAYER + r"got scale -2, expected 2$",
    ),
    "scale that is no number": (
        with_layer(NAME, lambda x: LoRA(x.A, x.B, math.nan)),
        LAYER + r"got scale nan, expected 2$",
    ),
    "NaN in A": (
        with_layer(NAME, lambda x: LoRA(poisoned(x.A, math.nan), x.B, x.scale)),
        LAYER + "got a non-finite value",
    ),
    "infinity in B": (
        with_layer(NAME, lambda x: LoRA(x.A, poisoned(x.B, -math.inf), x.scale)),
        LAYER + "got a non-finite value",
    ),
    "absurd size": (  # finite, but the product is not
        with_layer(NAME, lambda x: LoRA(x.A + 1e25, x.B + 1e25, x.scale)),
        LAYER + r"got an update that may be as large as inf, expected at most 2e\+19",
    ),
    "absurd factor beside one that is zero": (  # no update at all, but methods may average factors
        with_layer(NAME, lambda x: LoRA(0 * x.A + 3e38, 0 * x.B, x.scale)),
        LAYER + r"got an update that may be as large as inf, expected at most 2e\+19",
    ),
    "absurd head": (
        with_head("classifier.bias", lambda t: poisoned(t, 3e38)),
        r"^head parameter 'classifier\.bias': got norm (3e\+38|inf), expected at most 2e\+19$",
    ),
    "absurd loss": (lambda r: replace(r, loss=1e300), r"^the reply reports loss 1e\+300"),
    "missing head": (
        lambda r: replace(r, head=without(r.head, "classifier.bias")),
        r"^head parameter 'classifier\.bias' is missing$",
    ),
    "surplus head": (
        lambda r: replace(r, head={**r.head, "pooler.weight": torch.zeros(2)}),
        r"^head parameter 'pooler\.weight' is not in this model$",
    ),
    "head shape": (
        with_head("classifier.weight", lambda t: t.T),
        r"^head parameter 'classifier\.weight': got shape \(7, 3\), expected \(3, 7\)$",
    ),
    "NaN in the head": (
        with_head("classifier.bias", lambda t: poisoned(t, math.nan)),
        r"^head parameter 'classifier\.bias': got a non-finite value",
    ),
    **{
        f"{rows!r} rows": (
            lambda r, rows=rows: replace(r, client=replace(r.client, examples=rows)),
            r"^the reply is of a client with .* training rows, expected a whole number$",
        )
        for rows in (-5, 0, math.nan, math.inf, 2.5, True, "60", None)
    },
    "a head that is no tensor": (
        with_head("classifier.bias", lambda t: t.tolist()),
        r"^head parameter 'classifier\.bias': got a list, expected a tensor$",
    ),
    **{
        f"a loss of {loss!r}": (
            lambda r, loss=loss: replace(r, loss=loss),
            r"^the reply reports a (NoneType|str), expected a number$",
        )
        for loss in (None, "0.5")
    },
    "stale": (
        lambda r: replace(r, round=r.round - 1),
        r"^the reply is for round 2, expected round 3$",
    ),
    "from the future": (
        lambda r: replace(r, round=r.round + 1),
        r"^the reply is for round 4, expected round 3$",
    ),
}


@pytest.mark.parametrize("times", [1e8, 3e15])
@pytest.mark.parametrize("part", ["A", "B", "head"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_client_cannot_end_a_run_without_any_setting(
    state: ServerState, part: str, times: float, count: int
) -> None:
    """An update that is finite, and after which the loss would not be: alone, and among honest clients,
    which count as if it had been absent."""
    good = [reply(state, client) for client in CLIENTS][:count]
    wild = {
        "A": with_layer(NAME, lambda x: LoRA(times * x.A, x.B, x.scale)),
        "B": with_layer(NAME, lambda x: LoRA(x.A, times * x.B, x.scale)),
        "head": with_head("classifier.bias", lambda t: times * t),
    }[part](good[-1])
    got, outcome = play(state, [*good[:-1], wild])
    want = play(state, good[:-1])
    assert same(got, want[0]) and outcome.clients == want[1].clients
    (refused,) = outcome.refused
    assert refused["id"] == wild.client.id
    assert re.search(
        r"as large as [1-9]e\+\d+, expected at most [1-9]e\+0[45], 10,000 times", refused["reason"]
    )


def test_updates_that_are_large_everywhere_are_usual(state: ServerState) -> None:
    """A model whose honest updates are large: what one client returns is judged by what the others do, and
    by what it was sent; and half of the clients are not enough to make such updates usual."""
    good = [reply(state, client) for client in CLIENTS]
    large = [with_layer(NAME, lambda x: LoRA(x.A, 1e8 * x.B, x.scale))(r) for r in good]
    assert not play(state, large)[1].refused
    assert {r["id"] for r in play(state, [*large[:1], *good[1:]])[1].refused} == {"ada"}
    assert {r["id"] for r in play(state, [*large[:1], *good[1:3]])[1].refused} == {"ada"}
    assert len(play(state, [*large[:2], good[2]])[1].refused) == 2
    assert not play(state, [*large[:3], good[3]])[1].refused
    grown = play(state, large)[0]
    assert not play(grown, [reply(grown, client) for client in CLIENTS[:1]])[1].refused


def test_the_largest_update_that_is_accepted(
    state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`s ||A|| ||B||` up to the root of the largest float32, and each factor, head, loss and bound alike:
    what is larger has no square."""
    monkeypatch.setattr(refusals, "FAR", math.inf)
    good, huge = reply(state, CLIENTS[2]), torch.finfo(torch.float32).max ** 0.5

    def single(shape: torch.Size, value: float) -> Tensor:
        found = torch.zeros(shape)
        found[-1, -1] = value
        return found

    def spoilt(share: float) -> Iterator[Reply]:
        x = good.adapter[NAME]
        root = (share * huge / x.scale) ** 0.5  # both factors are far below the bound
        A, B = x.A.shape, x.B.shape
        yield with_layer(NAME, lambda x: LoRA(single(A, root), single(B, root), x.scale))(good)
        yield with_layer(NAME, lambda x: LoRA(single(A, share * huge), 0 * x.B, x.scale))(good)
        yield with_layer(NAME, lambda x: LoRA(0 * x.A, single(B, share * huge), x.scale))(good)
        head = {**good.head, "classifier.weight": single(torch.Size((3, 7)), share * huge)}
        yield replace(good, head=head)
        yield replace(good, loss=share * huge)
        yield replace(good, loss=-share * huge)
        yield replace(good, bound=share * huge)

    assert [refusals.refusal(Layers(FEDHL, state, SEED), r) for r in spoilt(0.99)] == [None] * 7
    assert all(
        "2e+19" in str(r)
        for r in refusals.refusals(Layers(FEDHL, state, SEED), [*spoilt(1.01)][:4])
    )
    assert all(refusals.refusals(Layers(FEDHL, state, SEED), [*spoilt(1.01)][4:]))
    assert refusals.refusal(Layers(FEDHL, state, SEED), replace(good, bound=0.0)) is None
    assert refusals.refusal(Layers(FEDHL, state, SEED), replace(good, bound=-1e-300))


def test_the_largest_magnitudes_that_are_accepted() -> None:
    huge = torch.finfo(torch.float32).max ** 0.5
    lora = LoRA(draw(0, 2, 5), draw(1, 7, 2), 1.0)
    sent = Broadcast(lora, past=lora, magnitudes=torch.ones(2))
    for share, fine in ((0.99, True), (1.01, False), (math.nan, False)):
        reason = refusals.wrong_magnitudes(sent, torch.tensor([0.0, -share * huge]))
        assert reason is None if fine else "non-finite or huge magnitude" in str(reason)


def test_a_scale_may_differ_by_what_a_float32_of_it_does(state: ServerState) -> None:
    good = reply(state, CLIENTS[2])

    def refused(factor: float) -> str | None:
        other = with_layer(NAME, lambda x: LoRA(x.A, x.B, x.scale * factor))(good)
        return refusals.refusal(Layers(FEDHL, state, SEED), other)

    for off in (1e-6, -1e-6):
        assert refused(1 + 0.9 * off) is None
        assert "got scale 2, expected 2" in str(refused(1 + 1.1 * off))


@pytest.mark.parametrize("case", WRONG)
def test_a_refused_reply_says_why_and_changes_nothing(state: ServerState, case: str) -> None:
    spoil, message = WRONG[case]
    good = [reply(state, client) for client in CLIENTS]
    spoilt = [spoil(r) if r.client.id == "cyd" else r for r in good]
    others = [r for r in good if r.client.id != "cyd"]
    got, outcome = play(state, spoilt)
    want, reference_outcome = play(state, others)
    assert same(got, want)
    assert outcome.clients == reference_outcome.clients
    assert outcome.diagnostics == reference_outcome.diagnostics
    assert sum(c["weight"] for c in outcome.clients) == pytest.approx(1, rel=1e-12)
    (refused,) = outcome.refused
    assert refused["id"] == "cyd"
    assert re.search(message, refused["reason"]), refused["reason"]


def test_a_second_reply_of_a_client_does_not_count(state: ServerState) -> None:
    replies = [reply(state, client) for client in CLIENTS]
    twice = [replies[0], reply(state, CLIENTS[0], seed=1), *replies[1:]]
    got, outcome = play(state, twice)
    assert same(got, play(state, replies)[0])
    reason = "another reply of this client has been accepted already"
    assert outcome.refused == [{"id": "ada", "reason": reason}]
    # but one that is refused does not stand in the way of a good one
    bad = replace(replies[0], round=0)
    assert same(play(state, [bad, *replies])[0], got)


def test_no_reply_accepted(state: ServerState) -> None:
    for replies in ([], [replace(reply(state, c), round=1) for c in CLIENTS]):
        following, outcome = play(state, replies)
        assert same(replace(following, round=state.round), state)
        assert following.round == state.round + 1
        assert outcome.clients == [] and outcome.diagnostics == {}
        assert [r["id"] for r in outcome.refused] == [r.client.id for r in replies]
    # and the round after works as if nothing had happened
    again, outcome = play(following, [reply(following, client) for client in CLIENTS])
    assert again.round == state.round + 2 and len(outcome.clients) == 4


def test_a_narrow_reply_is_accepted(state: ServerState) -> None:
    """Clients may send bfloat16; the server computes in float32."""
    r = reply(state, CLIENTS[2])
    narrow = {n: LoRA(x.A.bfloat16(), x.B.bfloat16(), x.scale) for n, x in r.adapter.items()}
    wide = {n: LoRA(x.A.float(), x.B.float(), x.scale) for n, x in narrow.items()}
    got = play(state, [replace(r, adapter=narrow)])
    assert same(got[0], play(state, [replace(r, adapter=wide)])[0])
    assert {t.dtype for t in tensors(got[0]).values() if t.ndim} == {torch.float32}


# --- replies on disk ----------------------------------------------------------------------------


class OnDisk(Mapping[str, LoRA]):
    """An adapter in a safetensors file, read one layer at a time; counts what is alive."""

    alive = most = 0

    def __init__(self, file: Path, adapter: Mapping[str, LoRA]) -> None:
        self.file, self.scales = file, {name: lora.scale for name, lora in adapter.items()}
        pairs = {"A": lambda x: x.A, "B": lambda x: x.B}
        save_file({f"{n}.{k}": f(x) for n, x in adapter.items() for k, f in pairs.items()}, file)

    def __getitem__(self, name: str) -> LoRA:
        with safe_open(self.file, framework="pt") as tensors:
            A, B = (tensors.get_tensor(f"{name}.{k}") for k in "AB")
        lora = LoRA(A, B, self.scales[name])
        OnDisk.alive += 1
        OnDisk.most = max(OnDisk.most, OnDisk.alive)
        weakref.finalize(lora, OnDisk.gone)
        return lora

    @staticmethod
    def gone() -> None:
        OnDisk.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __len__(self) -> int:
        return len(self.scales)


@pytest.mark.parametrize("name", ["fedhl", "flexlora", "fedit"])
def test_adapters_read_from_disk_are_never_all_in_memory(tmp_path: Path, name: str) -> None:
    """Sums are formed in blocks of inner size 512: 128 updates of rank 4, and the one being read; by as
    many layers as are done side by side."""
    method, clients = get_method(name), [Client(f"c{k:03d}", 4, 2.0, 1 + k % 5) for k in range(150)]
    state = start(method, top=4, scale=2.0)
    state, _ = play(state, [reply(state, client, method) for client in OF_RANK_4], method)
    replies = [reply(state, client, method) for client in clients]
    lazy = [replace(r, adapter=OnDisk(tmp_path / r.client.id, r.adapter)) for r in replies]
    gc.collect()
    OnDisk.alive = OnDisk.most = 0
    got, outcome = play(state, lazy, method)
    want, reference_outcome = play(state, replies, method)
    assert same(got, want)
    assert outcome.clients == reference_outcome.clients
    assert outcome.diagnostics == reference_outcome.diagnostics
    assert OnDisk.alive == 0
    assert OnDisk.most <= (512 // 4 + 2) * min(torch.get_num_threads(), len(SHAPES))


def test_spectra(state: ServerState) -> None:
    got = server.spectra(FEDHL, state, 4)
    sigmas = {n: torch.linalg.svdvals(s.W.double()) for n, s in state.layers.items()}
    energy = sum(float(s.square().sum()) for s in sigmas.values())
    tail = sum(float(s[4:].square().sum()) for s in sigmas.values())
    assert got["energy"] == pytest.approx(energy, rel=20 * EPS32)
    assert got["tail_share"] == pytest.approx(tail / energy, abs=20 * EPS32)
    assert list(got["layers"]) == sorted(SHAPES)
    longest = max(len(s) for s in sigmas.values())
    overall = [
        math.sqrt(sum(float(s[j]) ** 2 for s in sigmas.values() if j < len(s)))
        for j in range(longest)
    ]
    assert got["spectrum"] == pytest.approx(overall, abs=10 * EPS32 * overall[0])


def test_initial_state_in_the_order_of_names() -> None:
    state = start()
    assert list(state.layers) == sorted(SHAPES) and list(state.head) == sorted(HEAD)
    assert state.round == 0
    seeds = {s.seed for s in state.layers.values()}
    assert len(seeds) == len(SHAPES), "each layer draws its own"


@pytest.mark.parametrize("name", ["fedhl", "flexlora", "fedit", "hlora"])
def test_layers_side_by_side_are_the_same_to_the_bit(name: str) -> None:
    """With one thread the layers are done one by one; with several, each on a thread of its own."""
    method = get_method(name)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state = start(method, top=4, scale=2.0)
            state, _ = play(state, [reply(state, client, method) for client in OF_RANK_4], method)
            again = [reply(state, client, method) for client in OF_RANK_4]
            results.append(play(state, again, method))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for state, outcome in results[1:]:
        assert same(state, results[0][0])
        assert outcome.diagnostics == results[0][1].diagnostics
        assert outcome.clients == results[0][1].clients
