"""Clients who move too far: how far is judged by products, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_federation import BASE, federate
from support.small_server import (
    CLIENTS,
    FEDHL,
    HEAD,
    OF_RANK_4,
    SEED,
    SHAPES,
    TRUNCATION,
    begun,
    draw,
    exact,
    louder,
    reply,
    same,
    start,
)
from torch import Tensor

from fedhl import METHODS, LoRA, Update, dense, get_method, get_weighting, server
from fedhl.config import Config
from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.method import Broadcast
from fedhl.server import Reply, Rules, ServerState, measures, robust
from fedhl.server.channel import AirComp, sends_products
from fedhl.server.layers import Layers
from fedhl.server.robust import Guard, Median, Trimmed

EPS32 = torch.finfo(torch.float32).eps
sizes = st.integers(1, 7)


@pytest.fixture(scope="module")
def state() -> ServerState:
    return begun()


def aggregate(state: ServerState, replies: Sequence[Reply], guard: Guard | None, method=FEDHL):
    return server.aggregate(method, TRUNCATION, state, replies, SEED, Rules(guard=guard))


# --- norms --------------------------------------------------------------------------------------


@given(m=sizes, n=sizes, r=sizes, k=sizes, size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_norm_is_the_dense_one(m: int, n: int, r: int, k: int, size: float) -> None:
    sent = Broadcast(LoRA(draw(1, r, n), draw(2, m, r), 0.7))
    update = Update(sent, LoRA(draw(3, k, n), size * draw(4, m, k), 1.3), 1.0)
    want = float((exact(update.lora) - exact(sent.lora)).norm())
    assert robust.squared_change(update) ** 0.5 == pytest.approx(want, rel=1e-4)


@given(size=st.floats(1e-3, 1e9), move=st.floats(0, 1e-3), seed=st.integers(0, 99))
def test_the_norm_is_never_too_small(size: float, move: float, seed: int) -> None:
    """Huge factors that cancel: the Gram matrices alone lose the product, and would not clip it."""
    b, a = size * draw(seed, 9, 1), size * draw(seed + 1, 1, 8)
    nothing = Broadcast(LoRA(torch.zeros(1, 8), torch.zeros(9, 1), 1.0))
    A = torch.cat([a, a + move * draw(seed + 2, 1, 8)])
    update = Update(nothing, LoRA(A, torch.cat([b, -b], dim=1), 1.0), 1.0)
    assert robust.squared_change(update) ** 0.5 >= float(exact(update.lora).norm())


def test_frozen_directions_count() -> None:
    """A client of sd_lora that trained its magnitudes alone."""
    past, m = LoRA(draw(1, 1, 5), draw(2, 6, 1), 2.0), torch.tensor
    sent = Broadcast(LoRA(draw(3, 2, 5), draw(4, 6, 2), 2.0), past=past, magnitudes=m([1.0]))
    update = Update(sent, sent.lora, 1.0, m([4.0]))
    assert robust.squared_change(update) ** 0.5 == pytest.approx(3 * float(exact(past).norm()))


def test_norms_are_over_all_layers_and_the_head(state: ServerState) -> None:
    answers = [reply(state, client) for client in CLIENTS]
    _, outcome = aggregate(state, answers, Guard(clip=1e9))
    for record, answer in zip(outcome.clients, answers, strict=True):
        sent = server.broadcast(FEDHL, state, answer.client, SEED)
        squares = [(exact(answer.adapter[n]) - exact(sent[n].lora)).square().sum() for n in SHAPES]
        squares += [(answer.head[n].double() - state.head[n].double()).square().sum() for n in HEAD]
        assert record["norm"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-6)
        assert record["clip"] == 1


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["examples", "balanced", "truncation", "loss"])
def test_a_client_that_lies_about_its_rows_owns_nothing(state: ServerState, weighting: str) -> None:
    """It counts with three times the median of the rows, in the head and in the weights: here 3 * 25."""
    liar = "bob"

    def round(rows: int, guard: Guard | None) -> tuple[ServerState, float]:
        clients = [replace(c, examples=rows) if c.id == liar else c for c in CLIENTS]
        answers = [reply(state, client) for client in clients]
        rules = Rules(guard=guard)
        rule = get_weighting(weighting)
        following, outcome = server.aggregate(FEDHL, rule, state, answers, SEED, rules)
        assert not outcome.refused
        return following, {c["id"]: c["weight"] for c in outcome.clients}[liar]

    guard = Guard(reject=Median(1e9))
    lied, weight = round(10**9, guard)
    most, as_many = round(3 * 30, guard)  # of the rows 30, 90, 60 and 25 the lower middle is 30
    assert weight == as_many and same(lied, most) and weight < 0.6
    owned, _ = round(10**9, None)  # without a rule its word counts, and its head is everybody's
    theirs = reply(state, replace(next(c for c in CLIENTS if c.id == liar), examples=10**9)).head
    name = "classifier.bias"
    assert torch.allclose(owned.head[name], theirs[name], atol=1e-5)
    assert not torch.allclose(lied.head[name], theirs[name], atol=1e-3)


@pytest.mark.parametrize("rows", [[5, 5, 5], [1, 2, 3, 3], [7], [30, 10, 60, 25]])
def test_rows_that_are_alike_count_as_they_are(rows: list[int]) -> None:
    given = torch.tensor(rows, dtype=torch.float64)
    assert torch.equal(robust.counted_rows(given, 3.0), given)
    assert robust.counted_rows(torch.tensor([10.0, 10.0**9]), 3.0).tolist() == [10, 30]


# --- clipping -----------------------------------------------------------------------------------


def test_what_is_clipped_is_the_change_of_the_product(state: ServerState) -> None:
    """`W + Σ p_i c_i (ΔW_i - ΔW(sent_i))`, and the head alike, against the dense formula."""
    answers = [louder(reply(state, client), k + 1) for k, client in enumerate(CLIENTS)]
    uniform = get_weighting("uniform")
    bound = min(measures.change_norms(Layers(FEDHL, state, SEED), answers))
    following, outcome = server.aggregate(
        FEDHL, uniform, state, answers, SEED, Rules(guard=Guard(clip=bound))
    )
    factors = [c["clip"] for c in outcome.clients]
    assert min(factors) < 0.5 and max(factors) == 1, "the test is about something"
    for record in outcome.clients:
        assert record["clip"] == pytest.approx(min(1, bound / record["norm"]))
    for name in SHAPES:
        want = state.layers[name].W.double()
        for c, answer in zip(factors, answers, strict=True):
            sent = server.broadcast(FEDHL, state, answer.client, SEED)[name]
            want = want + c / 4 * (exact(answer.adapter[name]) - exact(sent.lora))
        gap = (following.layers[name].W - want).norm()
        assert gap <= 100 * EPS32 * sum(x.adapter[name].B.norm() * 4 for x in answers)
    for name in HEAD:
        q = [c.examples / 125 for c in CLIENTS]
        want = state.head[name].double() * (1 - sum(p * c for p, c in zip(q, factors, strict=True)))
        for p, c, answer in zip(q, factors, answers, strict=True):
            want = want + p * c * answer.head[name].double()
        assert (following.head[name] - want).norm() <= 20 * EPS32 * want.norm()


@pytest.mark.parametrize("name", [n for n in METHODS if sends_products(METHODS[n]())])
def test_a_clipped_update_is_that_of_a_client_who_moved_less(name: str) -> None:
    """For every method that may be clipped: as if the client had returned `sent + c (own - sent)`."""
    method, uniform = get_method(name), get_weighting("uniform")
    state = start(method)
    answers = [reply(state, client, method) for client in CLIENTS]
    state, _ = server.aggregate(method, uniform, state, answers, SEED)
    loud, *others = [louder(reply(state, client, method), 3) for client in CLIENTS]
    bound = max(measures.change_norms(Layers(method, state, SEED), others))
    loud = louder(loud, 50)
    (norm,) = measures.change_norms(Layers(method, state, SEED), [loud])
    after, outcome = server.aggregate(
        method, uniform, state, [loud, *others], SEED, Rules(guard=Guard(clip=bound))
    )
    assert [c["clip"] for c in outcome.clients] == pytest.approx([bound / norm, 1, 1, 1])
    c = bound / norm
    for layer in SHAPES:
        updates, size = [], 0.0
        for answer in (loud, *others):
            sent = server.broadcast(method, state, answer.client, SEED)[layer]
            own, was = exact(answer.adapter[layer]), exact(sent.lora)
            product = was + (c if answer is loud else 1.0) * (own - was)
            whole = LoRA(product, torch.eye(len(product), dtype=torch.float64), 1.0)
            updates.append(Update(sent, whole, 1 / 4))
            size += float(own.norm() + was.norm())
        deltas = (after.layers[layer], method.aggregate(state.layers[layer], updates))
        one, two = (dense(x).double() for x in map(method.delta, deltas) if x is not None)
        # sums of products, and one SVD, in float32
        assert (one - two).norm() <= 30 * EPS32 * size


def test_who_is_not_clipped_changes_no_bit(state: ServerState) -> None:
    answers = [reply(state, client) for client in CLIENTS]
    plain, _ = aggregate(state, answers, None)
    wide, _ = aggregate(state, answers, Guard(clip=1e9, reject=Median(1e9)))
    assert same(plain, wide)


def test_the_weighting_and_the_channel_see_what_was_clipped(state: ServerState) -> None:
    """A client cannot buy weight, nor drown the others' signals, by an update that is cut anyway."""
    answers = [reply(state, client) for client in CLIENTS]
    attack = [louder(answers[0], 3e3), *answers[1:]]
    bound = max(measures.change_norms(Layers(FEDHL, state, SEED), answers))
    norm = get_weighting("norm")
    for clip, most in ((None, (0.99, 1.0)), (bound, (0.0, 0.6))):
        _, outcome = server.aggregate(
            FEDHL,
            norm,
            state,
            attack,
            SEED,
            Rules(guard=Guard(clip=clip), channel=AirComp(snr_db=20)),
        )
        assert most[0] <= outcome.clients[0]["weight"] <= most[1]
        assert (outcome.diagnostics["channel_noise"] > 10) == (clip is None)


def test_the_norms_of_the_weighting_are_those_of_what_is_left(state: ServerState) -> None:
    """`||ΔW(sent) + c (ΔW - ΔW(sent))||`, which is not c times the norm of the update."""
    answers, factors = [reply(state, client) for client in CLIENTS], [0.0, 0.3, 1.0, 0.9]
    cohort = measures.measure_cohort(Layers(FEDHL, state, SEED), answers, factors=factors)
    want = []
    for c, answer in zip(factors, answers, strict=True):
        sent = server.broadcast(FEDHL, state, answer.client, SEED)
        own = {n: exact(answer.adapter[n]) for n in SHAPES}
        left = [exact(sent[n].lora) + c * (own[n] - exact(sent[n].lora)) for n in SHAPES]
        want.append(sum(float(x.square().sum()) for x in left) ** 0.5)
    assert torch.as_tensor(cohort.norms).tolist() == pytest.approx(want, rel=1e-5)


# --- rejection ----------------------------------------------------------------------------------


def test_who_is_rejected() -> None:
    norms = [1.0, 1.2, 0.9, 7.0, 1.1]

    def out(reasons: Sequence[str | None]) -> list[int]:
        return [k for k, reason in enumerate(reasons) if reason is not None]

    assert out(Median(5.0)(norms)) == [3]
    assert out(Median(7.0)(norms)) == []
    assert out(Median(2.0)([1.0, 1.0, 2.0])) == [], "exactly as far as is allowed"
    assert out(Median(1.0)([0.0, 0.0, 0.0])) == [], "nobody moved"
    assert "its update has norm 7, more than 5 times the median of 1.1" in str(
        Median(5.0)(norms)[3]
    )
    assert out(Trimmed(0.4)(norms)) == [1, 3]
    assert out(Trimmed(0.19)(norms)) == [], "rounded down"
    assert out(Trimmed(0.5)([2.0, 2.0])) == [1], "of equals the last"
    assert "among the 2 largest of 5" in str(Trimmed(0.4)(norms)[1])
    assert Median(5.0)([]) == Trimmed(0.5)([]) == []


@given(norms=st.lists(st.floats(0, 1e6), min_size=1, max_size=9), share=st.floats(0.01, 0.99))
def test_trimming_leaves_the_nearest(norms: list[float], share: float) -> None:
    reasons = Trimmed(share)(norms)
    gone = [n for n, reason in zip(norms, reasons, strict=True) if reason is not None]
    stay = [n for n, reason in zip(norms, reasons, strict=True) if reason is None]
    assert len(gone) == int(share * len(norms))
    assert not gone or max(stay, default=0.0) <= min(gone)


@pytest.mark.parametrize("method", ["fedhl", "fedit", "fedsa_lora"])
@pytest.mark.parametrize("rule", [Median(5.0), Trimmed(0.25)], ids=["median", "trimmed"])
def test_who_is_rejected_might_as_well_have_been_absent(method: str, rule) -> None:
    """With any method, to the bit."""
    value, clients = get_method(method), CLIENTS if method == "fedhl" else OF_RANK_4
    state = start(value, top=max(c.rank for c in clients), scale=clients[0].scale)
    for _ in range(2):
        calm = [reply(state, client, value, step=1e-3) for client in clients]
        wild = reply(state, clients[2], value, step=3.0)
        if method == "fedsa_lora":  # B stays with the client, so A alone may differ
            sent = server.broadcast(value, state, clients[2], SEED)
            kept = {n: LoRA(x.A, sent[n].lora.B, x.scale) for n, x in wild.adapter.items()}
            wild = replace(wild, adapter=kept)
            calm = [replace(c, adapter={n: sent[n].lora for n in c.adapter}) for c in calm]
        everybody = [*calm[:2], wild, calm[3]]
        after, outcome = aggregate(state, everybody, Guard(reject=rule), value)
        without, _ = aggregate(state, [*calm[:2], calm[3]], None, value)
        assert [r["id"] for r in outcome.refused] == ["cyd"]
        assert "robust.reject" in outcome.refused[0]["reason"]
        assert [c["id"] for c in outcome.clients] == ["ada", "bob", "dan"]
        assert same(after, without)
        state = after


def test_a_round_in_which_all_are_rejected_leaves_the_state(state: ServerState) -> None:
    class Nobody:
        def __call__(self, norms: Sequence[float]) -> list[str | None]:
            return ["not today"] * len(norms)

    answers = [reply(state, client) for client in CLIENTS]
    after, outcome = aggregate(state, answers, Guard(reject=Nobody()))
    assert same(after, replace(state, round=state.round + 1)) and len(outcome.refused) == 4


def test_a_rejected_client_keeps_what_it_had_and_its_bytes_are_counted() -> None:
    federation = federate("bert", method="fedsa_lora", ranks=dict.fromkeys("abc", 2))
    state, _ = run_round(federation, initial_state(federation))
    guard = Guard(reject=Trimmed(0.34))
    after, outcome = run_round(replace(federation, guard=guard), state)
    (refused,) = outcome.refused
    assert refused["bytes_up"] > 0
    for id in "abc":
        before, now = state.clients[id], after.clients[id]
        untouched = all(torch.equal(before[name], now[name]) for name in before)
        assert untouched == (id == refused["id"])


# --- settings -----------------------------------------------------------------------------------


def test_settings_make_a_guard() -> None:
    def built(**robust: object) -> Guard:
        config = Config.model_validate(BASE | {"robust": robust})
        assert config.robust is not None
        return config.robust.build()

    assert built(clip=2.0) == Guard(2.0)
    assert built(reject={"kind": "median"}) == Guard(None, Median(5.0))
    assert built(clip=1, reject={"kind": "trimmed", "share": 0.2}) == Guard(1.0, Trimmed(0.2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"robust": {}}, "give clip, reject, or both"),
        ({"robust": {"clip": 0}}, "greater than 0"),
        ({"robust": {"reject": {"kind": "median", "factor": 0.5}}}, "greater than or equal to 1"),
        ({"robust": {"reject": {"kind": "trimmed", "share": 1}}}, "less than 1"),
        ({"robust": {"clip": 1.0}, "method": "fedit"}, "'fedit' combines factors.*fedhl"),
        ({"robust": {"clip": 1.0}, "method": "raflora"}, "'raflora' combines factors"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate(BASE | settings)


def test_values_that_cannot_be_meant() -> None:
    nan = float("nan")
    for make, values in ((Median, (0.9, nan)), (Trimmed, (0, 1, nan)), (Guard, (0, -1, nan))):
        for value in values:
            with pytest.raises(ValueError, match="must be"):
                make(value)


def test_a_clipped_head_keeps_its_type(state: ServerState) -> None:
    head: dict[str, Tensor] = {name: h.bfloat16() for name, h in state.head.items()}
    cut = robust.clipped_head(state.head, head, 0.5)
    assert all(cut[name].dtype == torch.bfloat16 for name in head)
    assert robust.clipped_head(state.head, head, 1.0) is head
