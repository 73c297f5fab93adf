"""SD-LoRA over a change of task: directions that stay, magnitudes that learn; alone, in PEFT, on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import contract
from support.contract import adapter
from support.reference import sd_lora as reference
from support.small_models import TARGETS, build, rows
from support.task_federation import federate, play
from torch import Tensor

from fedhl import LoRA, Update, dense, server
from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.federation.local import train_client
from fedhl.method import TaskSequence
from fedhl.methods.fedit import FedIT
from fedhl.methods.sd_lora import Directions, SDLoRA
from fedhl.model import peft
from fedhl.run import checkpoint
from fedhl.seeds import generator
from fedhl.server import Reply, ServerState, diagnostics, refusals
from fedhl.server.layers import Layers
from fedhl.server.participation import corrected
from fedhl.task.examples import collate

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
METHOD = SDLoRA()
SCALE = 1.5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draw", *shape), dtype=torch.float64)


def answers(state: Directions, weights: list[float], seed: int) -> list[Update]:
    """Updates of clients that have moved everything that they train."""
    updates = []
    for k, p in enumerate(weights):
        sent = METHOD.broadcast(state, state.lora.rank, SCALE)
        lora = contract.train(sent, generator(seed, "client", k))
        moved = sent.magnitudes
        if moved is not None:
            moved = moved + draw(seed + k, len(moved))
        updates.append(Update(sent, lora, p, moved))
    return updates


def after(tasks: int, m: int = 7, n: int = 5, rank: int = 2, rounds: int = 2) -> Directions:
    """The state as a task begins, after so many others."""
    state = METHOD.init(adapter(m, n, rank, seed=1, trained=False), seed=4)
    for k in range(tasks):
        for round in range(rounds):
            state = METHOD.aggregate(state, answers(state, [0.5, 0.3, 0.2], 10 * k + round))
        state = METHOD.next_task(state)
    return state


# --- against the printed formula ----------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, list[float]]:
    m, n = draw(st.tuples(st.integers(3, 9), st.integers(3, 9)).filter(lambda x: x[0] != x[1]))
    rank = draw(st.integers(1, min(m, n) - 1))
    raw = draw(st.lists(st.integers(1, 20), min_size=3, max_size=5, unique=True))
    return m, n, rank, [x / sum(raw) for x in raw]


@given(problems(), st.integers(0, 99))
def test_the_update_is_that_of_the_formula(
    problem: tuple[int, int, int, list[float]], seed: int
) -> None:
    """Three tasks of two rounds; sums of a few products of inner size `rank`, in float64."""
    m, n, rank, p = problem
    state = METHOD.init(adapter(m, n, rank, seed, trained=False), seed)
    frozen: list[tuple[Tensor, Tensor]] = []  # as the pairs were trained
    A, B, alphas = state.lora.A, state.lora.B, torch.zeros(0, dtype=torch.float64)
    for task in range(3):
        for round in range(2):
            updates = answers(state, p, 100 * seed + 10 * task + round)
            state = METHOD.aggregate(state, updates)
            A = reference.mean(p, [u.lora.A for u in updates])
            B = reference.mean(p, [u.lora.B for u in updates])
            if task:
                alphas = reference.mean(
                    p, [u.magnitudes for u in updates if u.magnitudes is not None]
                )
            past = [(float(a), *pair) for a, pair in zip(alphas, frozen, strict=True)]
            want = reference.update(SCALE, past, A, B)
            size = SCALE * (float(B.norm() * A.norm()) + sum(abs(a) for a, *_ in past))
            got = dense(METHOD.delta(state))
            assert float((got - want).norm()) <= 4 * (m + n) * EPS * size
        state = METHOD.next_task(state)
        frozen.append((A, B))
        alphas = torch.cat([alphas, (A.norm() * B.norm())[None]])


def test_a_change_of_task_leaves_the_model_as_it_is() -> None:
    assert isinstance(METHOD, TaskSequence)
    for tasks in range(3):
        state = after(tasks)
        state = METHOD.aggregate(state, answers(state, [0.6, 0.4], 77))
        following = METHOD.next_task(state)
        before, now = dense(METHOD.delta(state)), dense(METHOD.delta(following))
        size = SCALE * float(
            state.lora.A.norm() * state.lora.B.norm() + state.magnitudes.abs().sum()
        )
        assert float((before - now).norm()) <= 4 * (7 + 5) * EPS * size
        assert len(following.magnitudes) == tasks + 1 and following.past.rank == 2 * (tasks + 1)
        assert not following.lora.B.any() and following.lora.A.all()


def test_the_new_pair_is_drawn_anew_for_each_task_and_layer() -> None:
    fresh = [after(tasks).lora.A for tasks in range(4)]
    other = METHOD.next_task(METHOD.aggregate(s := replace(after(0), seed=5), answers(s, [1.0], 0)))
    fresh.append(other.lora.A)
    assert len({str(A.tolist()) for A in fresh}) == 5
    assert torch.equal(after(2).lora.A, fresh[2])


def test_a_pair_that_nobody_has_trained_has_no_direction() -> None:
    """Such as a layer that no client returned throughout a task."""
    for state in (after(0), after(2)):
        assert METHOD.next_task(state) is state


def test_frozen_directions_do_not_move_and_magnitudes_do() -> None:
    start = state = after(2)
    for round in range(3):
        state = METHOD.aggregate(state, answers(state, [0.5, 0.5], 50 + round))
    assert torch.equal(state.past.A, start.past.A) and torch.equal(state.past.B, start.past.B)
    assert (state.magnitudes != start.magnitudes).all()
    for k in range(2):  # each is a unit in either factor
        part = slice(2 * k, 2 * k + 2)
        assert float(state.past.A[part].norm()) == pytest.approx(1, abs=10 * EPS)
        assert float(state.past.B[:, part].norm()) == pytest.approx(1, abs=10 * EPS)


def test_sd_lora_differs_from_fedit_only_when_a_task_begins() -> None:
    """To the bit before; then FedIT goes on with the pair, and SD-LoRA with a fresh one."""
    fedit, lora = FedIT(), adapter(7, 5, 2, seed=1, trained=True)
    state, other = METHOD.init(lora, 4), fedit.init(lora)
    for round in range(3):
        updates = answers(state, [0.7, 0.3], round)
        state, other = METHOD.aggregate(state, updates), fedit.aggregate(other, updates)
        assert torch.equal(state.lora.A, other.A) and torch.equal(state.lora.B, other.B)
    state = METHOD.next_task(state)
    mine, theirs = METHOD.broadcast(state, 2, SCALE), fedit.broadcast(other, 2, SCALE)
    gap = float((dense(mine.whole) - dense(theirs.whole)).norm())
    assert gap <= 4 * (7 + 5) * EPS * SCALE * float(other.A.norm() * other.B.norm())
    assert not mine.lora.B.any() and theirs.lora.B.all()


def test_inputs_stay_untouched_after_a_change_of_task() -> None:
    state = after(2)
    updates = answers(state, [0.5, 0.5], 3)
    held = [state.past.A, state.past.B, state.magnitudes, *(u.magnitudes for u in updates)]
    before = [x.clone() for x in held if x is not None]
    sent = METHOD.broadcast(state, 2, SCALE)
    METHOD.aggregate(state, updates)
    METHOD.next_task(state)
    METHOD.delta(state)
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True) if x is not None)
    assert sent.magnitudes is not None
    sent.magnitudes.zero_()
    assert torch.equal(state.magnitudes, before[2]), "the client has a copy"


def test_weights_order_and_mistakes_after_a_change_of_task() -> None:
    state = after(2)
    updates = answers(state, [0.5, 0.3, 0.2], 3)
    one = METHOD.aggregate(state, updates)
    silent = replace(updates[0], weight=0.0, magnitudes=1e6 * torch.ones(2, dtype=torch.float64))
    assert torch.equal(METHOD.aggregate(state, [silent, *updates]).magnitudes, one.magnitudes)
    turned = METHOD.aggregate(state, updates[::-1]).magnitudes
    assert float((turned - one.magnitudes).abs().max()) <= 4 * EPS * float(
        one.magnitudes.abs().max()
    )
    for wrong in (None, torch.ones(1), torch.ones(3), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="must have 2 finite magnitudes, got"):
            METHOD.aggregate(state, [*updates[1:], replace(updates[0], magnitudes=wrong)])


# --- what the server makes of it ----------------------------------------------------------------


def test_diagnostics_see_magnitudes_and_directions() -> None:
    """A client that moves one magnitude moves W by `s Δα_k D_k`; nothing is lost on the way."""
    state = METHOD.aggregate(s := after(2), answers(s, [1.0], 5))
    sent = METHOD.broadcast(state, 2, SCALE)
    W = dense(METHOD.delta(state))
    assert diagnostics.truncation_error(W, sent) <= (4 * 12 * EPS * float(W.norm())) ** 2
    assert sent.magnitudes is not None
    turned = sent.magnitudes + torch.tensor([0.0, 0.25])
    update = Update(sent, sent.lora, 1.0, turned)
    A, B = state.past.A[2:], state.past.B[:, 2:]
    want = (SCALE * 0.25) ** 2 * float(reference.direction(A, B).square().sum())
    assert diagnostics.moved(update) == pytest.approx(want, rel=1e-9)
    new = METHOD.delta(METHOD.aggregate(state, [update]))
    products = diagnostics.of_products([update])
    lost = diagnostics.aggregation_error(METHOD.delta(state), new, [update], products)
    assert lost <= (4 * 12 * EPS * float(W.norm())) ** 2


def test_stragglers_enlarge_the_change_of_magnitudes_too() -> None:
    state = after(1)
    update = answers(state, [1.0], 3)[0]
    got, sent = corrected(update, 0.2, products=False).magnitudes, update.sent.magnitudes
    assert got is not None and sent is not None and update.magnitudes is not None
    want = sent + (update.magnitudes - sent) / 0.8
    assert torch.allclose(got, want, rtol=4 * EPS, atol=0) and not torch.equal(got, sent)


def task_two() -> tuple[Any, ServerState, list[Reply]]:
    """The second task's first round: the state it begins with, and the clients' replies."""
    federation = federate("sd_lora")
    state = server.next_task(federation.method, play(federation, 2)[-1][0])
    now, replies = federation.in_round(3), []
    for client in now.clients:
        sent = server.broadcast(now.method, state, client, 0)
        replies.append(train_client(now, client, sent, state.head, 3).reply)
    return federation, state, replies


@pytest.mark.parametrize(
    ("magnitudes", "said"),
    [
        (None, "got magnitudes of shape None, expected (1,)"),
        (torch.ones(2), "got magnitudes of shape (2,), expected (1,)"),
        (torch.tensor([float("nan")]), "got a non-finite or huge magnitude"),
        (torch.tensor([float("inf")]), "got a non-finite or huge magnitude"),
        (torch.tensor([1e30]), "got a non-finite or huge magnitude"),
    ],
)
def test_wrong_magnitudes_are_refused(magnitudes: Tensor | None, said: str) -> None:
    federation, state, replies = task_two()
    first, *others = replies
    name = sorted(state.layers)[-1]
    changed = {n: x for n, x in first.magnitudes.items() if n != name}
    changed |= {} if magnitudes is None else {name: magnitudes}
    bad = replace(first, magnitudes=changed)
    following, outcome = server.aggregate(
        federation.method, federation.weighting, state, [bad, *others], 0
    )
    assert [r["id"] for r in outcome.refused] == [first.client.id]
    assert outcome.refused[0]["reason"].startswith(f"layer {name!r}: {said}")
    want, _ = server.aggregate(federation.method, federation.weighting, state, others, 0)
    assert torch.equal(following.layers[name].magnitudes, want.layers[name].magnitudes)


def test_magnitudes_nobody_asked_for_are_refused() -> None:
    federation = federate("sd_lora")
    state, now = initial_state(federation), federation.in_round(1)
    client = now.clients[0]
    sent = server.broadcast(now.method, state, client, 0)
    reply = train_client(now, client, sent, state.head, 1).reply
    assert reply.magnitudes == {}
    reply = replace(reply, magnitudes={name: torch.ones(1) for name in state.layers})
    said = refusals.refusal(Layers(federation.method, state, 0), reply)
    assert said is not None and "got magnitudes of shape (1,), expected None" in said


# --- in a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_directions_in_a_real_model(kind: str) -> None:
    """The loss is that of the weight `W0 + s Σ α_k D_k`, and its slope in α_k is `<∂L/∂ΔW, s D_k>`.

    In float32: two ways to compute a loss of about 3, and a gradient through some tens of layers.
    """
    slots = peft.attach(build(kind), {2: 4}, TARGETS[kind])
    peft.activate(slots, 2, frozenset(), head=False)
    past, alphas, change = {}, {}, {}
    for k, (name, (m, n)) in enumerate(peft.layers(slots).items()):
        A, B = (draw(k, 4, n) / n**0.5).float(), (draw(k, m, 4) / m**0.5).float()
        past[name], alphas[name] = LoRA(A, B, SCALE), torch.tensor([0.5, -2.0])
        change[name] = SCALE * (0.5 * B[:, :2] @ A[:2] - 2.0 * B[:, 2:] @ A[2:])
    batch: Any = collate(rows(kind, 6), 0)
    with peft.directions(slots, past, alphas) as live:
        weights = {n: slots.modules[n].get_base_layer().weight for n in past}
        for weight in weights.values():
            weight.requires_grad_(True)  # pyright: ignore[reportCallIssue]
        loss = slots.model(**batch).loss
        loss.backward()
    with torch.no_grad():
        plain = slots.model(**batch).loss
        with peft.offset(slots, change):
            merged = slots.model(**batch).loss
    assert float(loss.detach()) == pytest.approx(float(merged), abs=200 * EPS32)
    assert abs(float(loss.detach()) - float(plain)) > 1e-3, "outside the block nothing is added"
    for name, lora in past.items():
        G = weights[name].grad
        assert isinstance(G, Tensor) and live[name].grad is not None
        G = G.T if kind == "gpt2" else G
        for k in range(2):
            part = slice(2 * k, 2 * k + 2)
            D = lora.B[:, part] @ lora.A[part]
            want = float((G * SCALE * D).sum())
            bound = 100 * EPS32 * SCALE * float(G.norm() * D.norm())
            assert abs(float(live[name].grad[k]) - want) <= bound  # pyright: ignore
            assert abs(want) > 10 * bound, "the test is about something"
        assert torch.equal(live[name].detach(), alphas[name])


def test_clients_train_the_magnitudes_and_the_server_averages_them() -> None:
    federation, state, replies = task_two()
    following, outcome = server.aggregate(
        federation.method, federation.weighting, state, replies, 0
    )
    p = [client["weight"] for client in outcome.clients]
    for name, layer in following.layers.items():
        want = reference.mean(p, [reply.magnitudes[name] for reply in replies])
        assert float(layer.magnitudes) == pytest.approx(float(want), rel=4 * EPS32)
        assert torch.equal(layer.past.A, state.layers[name].past.A)
    for reply in replies:
        assert reply.client.id in ("ada", "cyd", "dan")
        for name, layer in state.layers.items():
            assert reply.magnitudes[name].shape == (1,) and layer.past.rank == 2
            assert not torch.equal(reply.magnitudes[name], layer.magnitudes)
    assert len({str(reply.magnitudes) for reply in replies}) == len(replies)


def test_a_client_trains_only_the_magnitudes_of_its_layers() -> None:
    federation, state, _ = task_two()
    only = sorted(state.layers)[0]
    now = federation.in_round(3)
    sent = server.broadcast(now.method, state, now.clients[0], 0)
    reply = train_client(now, now.clients[0], sent, state.head, 3, layers=[only]).reply
    assert list(reply.magnitudes) == list(reply.adapter) == [only]


def test_with_one_client_nothing_is_lost_from_task_to_task() -> None:
    """No cross terms: W becomes what that client has trained, magnitudes included."""
    federation = federate("sd_lora")
    only_ada = {name: rows if name == "ada" else [] for name, rows in federation.rows.items()}
    for state, outcome in play(replace(federation, rows=only_ada), 4)[1:]:
        W = [dense(federation.method.delta(layer)) for layer in state.layers.values()]  # pyright: ignore
        size = sum(float(x.square().sum()) for x in W) ** 0.5
        assert outcome.diagnostics["aggregation_error"] <= 100 * EPS32 * size
        assert [len(x.magnitudes) for x in state.layers.values()] == [(state.round - 1) // 2] * 2


# --- on disk ------------------------------------------------------------------------------------


def test_a_state_that_has_grown_survives_a_checkpoint(tmp_path: Path) -> None:
    federation = federate("sd_lora")
    state = play(federation, 3)[-1][0]
    saved = checkpoint.save(tmp_path, state, {"metrics": None})
    loaded, _ = checkpoint.load(saved, initial_state(federation))
    for name, layer in state.layers.items():
        other = loaded.layers[name]
        pairs = zip(contract.tensors_of(layer), contract.tensors_of(other), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs) and len(other.magnitudes) == 1
    one, two = run_round(federation, state)[0], run_round(federation, loaded)[0]
    for name in state.layers:
        assert contract.same_bits(
            contract.tensors_of(one.layers[name]), contract.tensors_of(two.layers[name])
        )
