"""FRLoRA: the printed update, the start from the components of W0, and a federation around a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cohorts import answers, clients, draw
from support.contract import change, started
from support.reference import means
from support.reference.dense import truncation
from support.small_federation import federate, kinds
from torch import Tensor

from fedhl import LoRA, Update, server
from fedhl.errors import UserError
from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.federation.local import deployed, evaluate_rows
from fedhl.method import FromBase
from fedhl.methods.fedit import FedIT
from fedhl.methods.frlora import Anchored, FRLoRA
from fedhl.model import peft
from fedhl.server.payload import carried

METHOD = FRLoRA()
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
ONE_RANK: dict[str, int] = dict.fromkeys(("ada", "bob", "cyd"), 4)


def begun(W0: Tensor, rank: int, s: float = 1.5, trained: float = 0.0) -> Anchored:
    """The state before round 1, on this W0; `trained`: the size of what has been trained before."""
    m, n = W0.shape
    lora = LoRA(draw(1, rank, n).to(W0), trained * draw(2, m, rank).to(W0), s)
    return METHOD.from_base(METHOD.init(lora), W0)


# --- one layer ----------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    m, n = draw(st.tuples(st.integers(3, 9), st.integers(3, 9)).filter(lambda x: x[0] != x[1]))
    raw = draw(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4, unique=True))
    return {
        "shape": (m, n),
        "rank": draw(st.integers(1, min(m, n))),
        "scale": draw(st.floats(0.2, 8.0)),
        "trained": draw(st.sampled_from([0.0, 1.0])),
        "p": [x / sum(raw) for x in raw],
        "seed": draw(st.integers(10, 10**6)),
    }


@given(problems())
def test_three_rounds_are_those_of_the_formula(problem: dict[str, Any]) -> None:
    """Ranks up to that of the layer, from W0's components, from nothing and from a trained adapter."""
    rank, s, p = problem["rank"], problem["scale"], problem["p"]
    state = begun(draw(problem["seed"], *problem["shape"]), rank, s, problem["trained"])
    A0, B0, base = state.lora.A, state.lora.B, state.base
    for round in range(3):
        updates = answers(
            METHOD, state, [rank] * len(p), [s] * len(p), p, problem["seed"] + 9 * round
        )
        base = means.frlora(base, s, B0, A0, clients(updates))
        state = METHOD.aggregate(state, updates)
        assert torch.equal(state.lora.A, A0) and torch.equal(state.lora.B, B0)
        size = float(base.norm()) + s * float(B0.norm() * A0.norm())
        size += sum(s * float(u.lora.A.norm() * u.lora.B.norm()) for u in updates)
        assert float((state.base - base).norm()) <= 100 * EPS64 * size
        want = base + s * B0 @ A0
        assert float((change(METHOD, state) - want).norm()) <= 100 * EPS64 * size


@given(problems())
def test_the_first_adapter_is_the_best_of_its_rank(problem: dict[str, Any]) -> None:
    """`s B0 A0 = T_r(W0)`, in factors of which neither is larger, and the model is where it was."""
    s, rank, W0 = problem["scale"], problem["rank"], draw(problem["seed"], *problem["shape"])
    state = begun(W0, rank, s, problem["trained"])
    assert state.lora.scale == s and state.lora.rank == rank
    # the norm, since W0 may have σ_r = σ_{r+1}
    off = abs(float((W0 - state.lora.delta()).norm() - (W0 - truncation(W0, rank)).norm()))
    bound = 100 * EPS64 * float(W0.norm())
    assert off <= bound
    A, B = state.lora.A, state.lora.B
    assert float((A @ A.T - B.T @ B).norm()) <= bound / s
    before = METHOD.init(LoRA(draw(1, *A.shape), problem["trained"] * draw(2, *B.shape), s))
    size = float(change(METHOD, before).norm() + W0.norm())
    assert float((change(METHOD, state) - change(METHOD, before)).norm()) <= 10 * EPS64 * size


def test_from_nothing_the_change_is_zero_to_the_bit() -> None:
    state = begun(draw(3, 40, 30).float(), 5)
    assert not change(METHOD, state).any()
    assert float(state.lora.delta().norm()) > 1


@pytest.mark.parametrize("alive", [0, 1])
def test_components_that_W0_does_not_have_can_learn(alive: int) -> None:
    """A weight of rank 0 or 1: the other columns of B are zero, and their rows of A are not."""
    W0 = torch.zeros(7, 5) if not alive else draw(4, 7, 1).float() @ draw(5, 1, 5).float()
    state = begun(W0, 3)
    A, B = state.lora.A, state.lora.B
    assert not B[:, alive:].any() and int(torch.linalg.matrix_rank(A)) == 3
    assert bool((B[:, :alive] != 0).all()) and torch.allclose(state.lora.delta(), W0, atol=1e-5)


def test_a_small_change_of_large_components_is_not_lost_in_float32() -> None:
    """Clients move by a hundred-thousandth of W0's components: their difference as two products would keep
    few digits."""
    state = begun(1e3 * draw(6, 30, 20).float(), 4)
    sent = METHOD.broadcast(state, 4, 1.5)
    A, B = (
        x + 1e-5 * draw(7, *x.shape).float() * x.abs().max() for x in (sent.lora.A, sent.lora.B)
    )
    last = METHOD.aggregate(state, [Update(sent, LoRA(A, B, 1.5), 1.0)]).last
    exact = means.frlora(
        torch.zeros(30, 20, dtype=torch.float64),
        *(1.5, sent.lora.B.double(), sent.lora.A.double()),
        clients([Update(sent, LoRA(A.double(), B.double(), 1.5), 1.0)]),
    )
    off = float((last.delta() - exact).norm())
    assert off <= 20 * EPS32 * float(exact.norm())
    plain = LoRA(A, B, 1.5).delta() - sent.lora.delta()
    assert float((plain - exact).norm()) > 20 * off, "the test is about something"


def test_frlora_differs_from_fedit() -> None:
    """After one round the global change is the same product of means; in the second, clients of FRLoRA start
    from the same model by other factors."""
    lora = LoRA(draw(1, 3, 7), draw(2, 9, 3), 1.5)
    one, two = METHOD.init(lora), FedIT().init(lora)
    updates = answers(FedIT(), two, [3, 3], [1.5, 1.5], [0.4, 0.6], seed=8)
    one, two = METHOD.aggregate(one, updates), FedIT().aggregate(two, updates)
    assert torch.allclose(change(METHOD, one), two.delta(), atol=1e-12)
    sent = METHOD.broadcast(one, 3, 1.5)
    assert torch.equal(sent.lora.A, lora.A) and not torch.allclose(two.A, lora.A)
    assert torch.allclose(started(sent), two.delta(), atol=1e-12)


@pytest.mark.parametrize("payload", ["bfloat16", "int8"])
def test_what_the_wire_rounds_away_moves_nothing(payload: str) -> None:
    state = begun(draw(9, 12, 10).float(), 4)
    sent = carried(METHOD.broadcast(state, 4, 1.5), payload)
    assert not torch.equal(sent.lora.A, state.lora.A)
    after = METHOD.aggregate(state, [Update(sent, sent.lora, w) for w in (0.25, 0.75)])
    assert torch.equal(after.base, state.base)


# --- around a model -----------------------------------------------------------------------------


@kinds
def test_the_first_model_is_the_base_and_its_adapter_the_components(kind: str) -> None:
    federation = federate(kind, ONE_RANK, FRLoRA(), dropout=0.0)
    assert isinstance(federation.method, FromBase)
    plain = federate(kind, ONE_RANK, FedIT(), dropout=0.0)
    state = initial_state(federation)
    client = federation.clients[0]
    sent = server.broadcast(federation.method, state, client, federation.config.seed)
    modules = dict(plain.slots.model.named_modules())
    for name, (m, n) in peft.layers(federation.slots).items():
        weight = modules[name].get_base_layer().weight.double()
        W0 = weight.T if kind == "gpt2" else weight
        assert W0.shape == (m, n)
        got, want = sent[name].lora.delta(), truncation(W0, 4)
        assert float((got - want).norm()) <= 1e3 * EPS32 * float(W0.norm())
        assert not change(federation.method, state.layers[name]).any()
    with deployed(federation, federation.slot_of(client), sent, state.head):
        found = evaluate_rows(federation, federation.held_out)
    expected = evaluate_rows(plain, federation.held_out)  # B = 0
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_clients_of_the_last_round_are_sent_what_was_added() -> None:
    """Over rounds in a federation, all of them at the base of the state; the adapter never changes."""
    federation = federate("bert", ONE_RANK, FRLoRA(), dropout=0.0)
    state, seed = initial_state(federation), federation.config.seed
    first = {name: layer.lora for name, layer in state.layers.items()}
    for round in range(3):
        travels = server.travelling(federation.method, state, federation.clients[0], seed)
        for b in travels.values():
            assert (b.base is None) == (b.merged is not None) == bool(round)
        state, outcome = run_round(federation, state)
        assert not outcome.refused
        for name, layer in state.layers.items():
            assert torch.equal(layer.lora.A, first[name].A)
            start = server.broadcast(federation.method, state, federation.clients[0], seed)[name]
            assert start.base is not None
            off = float((start.base - layer.base).norm())
            assert off <= 1e-5 * float(layer.base.norm())
            assert float(change(federation.method, layer).norm()) > 1e-3


def test_a_base_that_cannot_be_read_is_refused() -> None:
    federation = federate("bert", ONE_RANK, FRLoRA())
    name = next(iter(federation.slots.modules))
    base = federation.slots.modules[name].get_base_layer()
    base.weight = torch.nn.Parameter(base.weight.data.to(torch.uint8), requires_grad=False)  # pyright: ignore
    with pytest.raises(UserError, match=f"the weight of {name} is held as torch.uint8"):
        initial_state(federation)
