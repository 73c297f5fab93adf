"""Methods that average factors: their dense references, and what sets each one apart."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cohorts import answers, clients, draw
from support.contract import change, started
from support.reference import dense, means
from torch import Tensor

from fedhl import Broadcast, LoRA, Method, Update, get_method
from fedhl.lora import initial
from fedhl.method import SelfPruning
from fedhl.methods.fedex_lora import Corrected, FedExLoRA
from fedhl.methods.fedit import FedIT
from fedhl.methods.fedmomentum import FedMomentum
from fedhl.methods.flora_na import FLoRANA
from fedhl.methods.fslora import FSLoRA
from fedhl.methods.hetlora import HetLoRA
from fedhl.methods.lora_fair import LoRAFAIR
from fedhl.methods.rbla import RBLA
from fedhl.server.payload import carried

EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


def server(m: int, n: int, top: int, scale: float = 1.5, seed: int = 0) -> LoRA:
    """An adapter that has been trained before: both factors are random."""
    return LoRA(draw(seed, top, n), draw(seed, m, top), scale)


def alike(method: Method[Any], state: Any, p: list[float], seed: int = 7) -> list[Update]:
    """The same from clients of the state's own rank and scale."""
    lora = state.lora if isinstance(state, Corrected) else state
    return answers(method, state, [lora.rank] * len(p), [lora.scale] * len(p), p, seed)


def size(updates: list[Update]) -> float:
    """Bounds every product of any combination of these factors with coefficients <= 1."""
    A = sum(float(u.lora.A.norm()) for u in updates)
    return A * sum(u.lora.scale * float(u.lora.B.norm()) for u in updates)


def close(got: Tensor, want: Tensor, bound: float) -> bool:
    """To rounding in float64: a product of inner size < 10 and a handful of sums, generously."""
    return float((got - want).norm()) <= 100 * EPS64 * bound


# Equality with the dense references


@st.composite
def problems(draw: st.DrawFn, mixed: bool) -> dict[str, Any]:
    m, n = draw(st.tuples(st.integers(3, 9), st.integers(3, 9)).filter(lambda x: x[0] != x[1]))
    top = draw(st.integers(1, min(m, n) - 1))
    K = draw(st.integers(3, 5))
    raw = draw(st.lists(st.floats(0.05, 1.0), min_size=K, max_size=K, unique=True))
    scale = draw(st.floats(0.2, 8.0))
    several = st.lists(st.floats(0.2, 8.0), min_size=K, max_size=K)
    return {
        "start": (m, n, top, scale),
        "ranks": draw(st.lists(st.integers(1, top), min_size=K, max_size=K))
        if mixed
        else [top] * K,
        "scales": draw(several) if mixed else [scale] * K,
        "p": [x / sum(raw) for x in raw],
        "seed": draw(st.integers(10, 10**6)),
    }


from_round_0_and_2 = pytest.mark.parametrize("rounds", [0, 2])


def played(method: Method[Any], problem: dict[str, Any], rounds: int) -> tuple[Any, list[Update]]:
    """A state, fresh or after some rounds, and the updates that answer it."""
    m, n, top, scale = problem["start"]
    cohort = {k: problem[k] for k in ("ranks", "scales", "p", "seed")}
    fresh = initial(m, n, top, scale, seed=problem["seed"])
    state = method.init(LoRA(fresh.A.double(), fresh.B.double(), scale))
    for _ in range(rounds):
        state = method.aggregate(state, answers(method, state, **cohort))
    return state, answers(method, state, **cohort)


def aggregated(method: Method[Any], state: Any, updates: list[Update]) -> Tensor:
    return change(method, method.aggregate(state, updates))


@from_round_0_and_2
@given(problem=problems(mixed=True))
def test_hetlora_equals_its_reference(rounds: int, problem: dict[str, Any]):
    state, updates = played(HetLoRA(), problem, rounds)
    want = means.hetlora(state.rank, clients(updates))
    assert close(aggregated(HetLoRA(), state, updates), want, size(updates))


@from_round_0_and_2
@given(problem=problems(mixed=True))
def test_rbla_equals_its_reference(rounds: int, problem: dict[str, Any]):
    state, updates = played(RBLA(), problem, rounds)
    want = means.rbla(state.scale, state.B, state.A, clients(updates))
    bound = size(updates) + state.scale * float(state.A.norm() * state.B.norm())
    assert close(aggregated(RBLA(), state, updates), want, bound)


@from_round_0_and_2
@given(problem=problems(mixed=True))
def test_fslora_equals_its_reference(rounds: int, problem: dict[str, Any]):
    state, updates = played(FSLoRA(), problem, rounds)
    sets = [u.sent.index for u in updates if u.sent.index is not None]
    want = means.fslora(state.scale, state.B, state.A, clients(updates), sets)
    A = float(state.A.norm()) + sum(float(u.lora.A.norm()) for u in updates)
    B = float(state.B.norm()) + sum(u.lora.scale * float(u.lora.B.norm()) for u in updates)
    assert close(aggregated(FSLoRA(), state, updates), want, max(1, state.scale) * A * B)


@from_round_0_and_2
@given(problem=problems(mixed=False), lam=st.sampled_from([1e-3, 0.01, 1.0, 30.0]))
def test_lora_fair_equals_its_reference(rounds: int, problem: dict[str, Any], lam: float):
    state, updates = played(LoRAFAIR(lam), problem, rounds)
    want = means.lora_fair(clients(updates), lam)
    # `Ā Āᵀ + μ I` has a condition number of at most 1 + r/lam.
    bound = (1 + state.rank / lam) * size(updates)
    assert close(aggregated(LoRAFAIR(lam), state, updates), want, bound)


@from_round_0_and_2
@given(problem=problems(mixed=False), sweeps=st.integers(0, 4))
def test_flora_na_equals_its_reference(rounds: int, problem: dict[str, Any], sweeps: int):
    state, updates = played(FLoRANA(sweeps), problem, rounds)
    want = means.flora_na(clients(updates), sweeps)
    got = aggregated(FLoRANA(sweeps), state, updates)
    # Normal equations resolve half the digits of what they are solved for.
    assert float((got - want).norm()) <= EPS64**0.5 * size(updates)


@from_round_0_and_2
@given(problem=problems(mixed=False))
def test_fedex_lora_equals_its_reference(rounds: int, problem: dict[str, Any]):
    state, updates = played(FedExLoRA(), problem, rounds)
    want = means.fedex_lora(state.base, clients(updates))
    got = aggregated(FedExLoRA(), state, updates)
    assert close(got, want, size(updates) + float(state.base.norm()))


@from_round_0_and_2
@given(problem=problems(mixed=False))
def test_fedmomentum_equals_its_reference(rounds: int, problem: dict[str, Any]):
    state, updates = played(FedMomentum(), problem, rounds)
    cut, base = means.fedmomentum(state.base, clients(updates))
    whole = size(updates) + float(state.base.norm())
    got = aggregated(FedMomentum(), state, updates)
    assert close(got, cut + base, whole)
    after = FedMomentum().aggregate(state, updates)
    left = float((after.base - state.base).double().norm())
    # of all choices of rank r the least is left for the base; which one it is where σ_r = σ_{r+1} is free
    assert left <= float((base - state.base).norm()) + 1e-5 * whole


def test_fedmomentum_trains_on_what_is_largest():
    """Against FedEx-LoRA: the sum is the same, and less of it is left in the base."""
    methods: list[Method[Any]] = [FedExLoRA(), FedMomentum()]
    bases = []
    for method in methods:
        state = method.init(server(7, 5, top=2, scale=2.0))
        state = method.aggregate(
            state, answers(method, state, [2, 2], [2.0, 2.0], [0.4, 0.6], seed=1)
        )
        bases.append((state.base.norm(), method.delta(state)))
    assert close(bases[1][1], bases[0][1], 1.0) and bases[1][0] < 0.9 * bases[0][0]


def test_fedmomentum_learns_again_from_nothing():
    """Clients that answer with zero leave components that can still learn."""
    method = FedMomentum()
    state = method.init(initial(6, 5, 3, 2.0, seed=0), seed=4)
    sent = method.broadcast(state, 3, 2.0)
    state = method.aggregate(
        state, [Update(sent, LoRA(torch.zeros(3, 5), torch.zeros(6, 3), 2.0), 1.0)]
    )
    assert (
        torch.linalg.matrix_rank(state.lora.A) == 3
        and not state.lora.B.any()
        and not state.base.any()
    )


# HetLoRA


def test_hetlora_differs_from_rbla():
    """A component with a share h of the weight behind it: HetLoRA has h times RBLA's factors."""
    p, ranks = [0.3, 0.5, 0.2], [4, 1, 2]
    shares = torch.tensor([1.0, 0.5, 0.3, 0.3], dtype=torch.float64)
    state = server(7, 5, top=4)
    updates = answers(HetLoRA(), state, ranks, [0.5, 2.0, 3.0], p, seed=3)
    het, mean = HetLoRA().aggregate(state, updates), RBLA().aggregate(state, updates)
    assert close(het.A, shares[:, None] * mean.A, size(updates))
    assert close(het.B, mean.B * shares, size(updates))
    assert float((het.A[1:] - mean.A[1:]).norm(dim=1).min()) > 0.1


def test_hetlora_shrinks_even_if_nobody_trains():
    state = server(7, 5, top=2)
    sent = [HetLoRA().broadcast(state, r, 1.5) for r in (2, 1)]
    updates = [Update(x, x.lora, w) for x, w in zip(sent, (0.25, 0.75), strict=True)]
    after = HetLoRA().aggregate(state, updates)
    assert close(after.A[0], state.A[0], size(updates))
    second = after.scale * torch.outer(after.B[:, 1], after.A[1])
    was = state.scale * torch.outer(state.B[:, 1], state.A[1])
    assert close(second, 0.25**2 * was, size(updates))


def low(method: Method[Any], state: LoRA) -> list[Update]:
    """A round in which nobody has components 1, 2, ..., or only somebody of weight 0."""
    return answers(method, state, [1, 3, 1], [1.5, 1.0, 0.5], [0.4, 0.0, 0.6], seed=5)


def test_hetlora_keeps_a_component_that_nobody_has_alive():
    """Its B is zero, as printed, so that delta is what the formula says; its row of A stays."""
    state = server(7, 5, top=3)
    after = HetLoRA().aggregate(state, low(HetLoRA(), state))
    assert torch.equal(after.A[1:], state.A[1:]) and not after.B[:, 1:].any()
    printed = means.hetlora(3, clients([u for u in low(HetLoRA(), state) if u.weight > 0]))
    assert close(change(HetLoRA(), after), printed, size(low(HetLoRA(), state)))
    slope, sent = draw(1, 7, 5), HetLoRA().broadcast(after, 3, 1.0).lora
    assert float((slope @ sent.A.T).norm(dim=0).min()) > 0.1  # the gradient of every column of B


both = pytest.mark.parametrize("method", [HetLoRA(), RBLA()], ids=["hetlora", "rbla"])


@both
def test_equal_ranks_and_scales_are_fedit(method: Method[Any]):
    state = server(7, 5, top=3)
    updates = alike(method, state, [0.5, 0.3, 0.2])
    want = aggregated(FedIT(), state, updates)
    assert close(aggregated(method, state, updates), want, size(updates))


@both
def test_a_client_starts_from_the_first_components_whatever_its_scale(method: Method[Any]):
    state = server(7, 5, top=3)
    for rank, scale in ((3, 1.5), (1, 0.3), (2, 8.0)):
        sent = method.broadcast(state, rank, scale).lora
        first = state.scale * state.B[:, :rank] @ state.A[:rank]
        assert (sent.rank, sent.scale) == (rank, scale)
        assert close(sent.delta(), first, 10 * float(state.delta().norm()))


@both
def test_a_reply_above_the_top_rank_is_refused(method: Method[Any]):
    state = server(7, 5, top=3)
    sent = method.broadcast(state, 3, 1.5)
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.3"):
        method.aggregate(state, [Update(sent, server(7, 5, top=4), 1.0)])


# HetLoRA: self-pruning


def test_hetlora_prunes_itself_and_no_one_else():
    assert isinstance(HetLoRA(), SelfPruning)
    assert not isinstance(RBLA(), SelfPruning)


@pytest.mark.parametrize(
    ("gamma", "rank", "k"),
    [
        (0.5, 8, 4),
        (0.5, 7, 4),
        (0.99, 8, 7),
        (0.99, 2, 1),
        (0.99, 1, 1),
        (0.99, 300, 297),
        (0.01, 8, 1),
        (0.55, 100, 55),
        (1.0, 8, 8),
    ],
)
def test_the_rank_after_pruning(gamma: float, rank: int, k: int):
    """⌈γ r⌉ but less than r, and at least 1; γ = 1 never prunes."""
    method = HetLoRA(gamma=gamma)
    before = LoRA(draw(0, rank, 4), draw(1, 6, rank), 2.0)
    after = LoRA(0.9 * before.A, before.B, 2.0)
    assert method.pruned_rank({"layer": before}, {"layer": after}) == k
    tail = 2.0 * float(before.B[:, k:].norm() * before.A[k:].norm())
    assert float(method.penalty(before)) == pytest.approx(method.decay * tail, rel=1e-12)


def test_the_penalty_is_differentiable():
    A, B = (x.requires_grad_() for x in (draw(0, 5, 4), draw(1, 6, 5)))

    def term(A: Tensor, B: Tensor) -> Tensor:
        return HetLoRA(gamma=0.5, decay=2.0).penalty(LoRA(A, B, 0.7))

    assert term(A, B).ndim == 0
    assert torch.autograd.gradcheck(term, (A, B))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("zero", ["B", "A", "both"])
def test_the_penalty_of_a_fresh_adapter_has_gradient_zero(zero: str, rank: int):
    """The gradient of a norm at zero is 0/0: it must not reach the factors as NaN."""
    factors = {"A": draw(0, rank, 4), "B": draw(1, 6, rank)}
    for name in ("A", "B") if zero == "both" else (zero,):
        factors[name].zero_()
    A, B = (factors[name].requires_grad_() for name in "AB")
    term = HetLoRA(gamma=0.5).penalty(LoRA(A, B, 2.0))
    assert float(term.detach()) == 0
    term.backward()
    for x in (A, B):
        assert x.grad is not None and bool((x.grad == 0).all())


@pytest.mark.parametrize(
    ("before", "after", "rank"),
    [
        ((1.0, 1.0), (0.9, 1.0), 2),  # has fallen
        ((1.0, 1.0), (1.1, 1.0), 4),  # has risen
        ((1.0, 1.0), (1.0, 1.0), 4),  # has not moved
        ((0.0, 0.0), (0.0, 0.0), 4),  # a fresh adapter
        ((0.0, 0.0), (0.5, 0.0), 4),
        ((1.0, 1.0), (0.5, 1.6), 4),  # the sum over layers decides,
        ((1.0, 1.0), (0.5, 1.4), 2),  # not each layer
    ],
)
def test_a_client_prunes_if_its_tail_has_fallen(
    before: tuple[float, float], after: tuple[float, float], rank: int
):
    """Tails of these sizes in two layers; the components before them play no part."""

    def adapters(sizes: tuple[float, float], head: float) -> dict[str, LoRA]:
        found = {}
        for k, size in enumerate(sizes):
            A, B = draw(k, 4, 5), draw(k + 10, 6, 4)
            A[2:] /= A[2:].norm()
            B[:, 2:] *= size / B[:, 2:].norm()
            found[f"layer {k}"] = LoRA(head * A, B / head, 1.0)
            found[f"layer {k}"].A[2:] = A[2:]
            found[f"layer {k}"].B[:, 2:] = B[:, 2:]
        return found

    for head in (0.1, 10.0):
        got = HetLoRA(gamma=0.5).pruned_rank(adapters(before, 1.0), adapters(after, head))
        assert got == rank


def test_the_penalty_prunes_a_client_whose_data_says_nothing():
    """Gradient descent on the penalty alone, from a trained adapter: the tail falls, the head stays."""
    method = HetLoRA(gamma=0.5, decay=0.1)
    start = LoRA(draw(0, 4, 5), draw(1, 6, 4), 1.0)
    A, B = start.A.clone().requires_grad_(), start.B.clone().requires_grad_()
    optimiser = torch.optim.SGD([A, B], lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        method.penalty(LoRA(A, B, 1.0)).backward()
        optimiser.step()
    after = LoRA(A.detach(), B.detach(), 1.0)
    assert torch.equal(after.A[:2], start.A[:2]) and torch.equal(after.B[:, :2], start.B[:, :2])
    assert method.pruned_rank({"layer": start}, {"layer": after}) == 2
    assert HetLoRA(gamma=1.0).pruned_rank({"layer": start}, {"layer": after}) == 4


# RBLA


def test_rbla_differs_from_hetlora():
    """What a client lacks does not pull the others' components towards zero: nobody trains, nothing
    moves, and the one client of high rank is heard in full."""
    state = server(7, 5, top=3)
    sent = [RBLA().broadcast(state, r, s) for r, s in ((3, 0.5), (1, 2.0), (2, 4.0))]
    updates = [Update(x, x.lora, w) for x, w in zip(sent, (0.2, 0.5, 0.3), strict=True)]
    assert close(aggregated(RBLA(), state, updates), state.delta(), size(updates))
    lost = aggregated(HetLoRA(), state, updates) - state.delta()
    assert float(lost.norm()) > 0.1 * float(state.delta().norm())

    updates = answers(RBLA(), state, [3, 1, 2], [0.5, 2.0, 4.0], [0.2, 0.5, 0.3], seed=4)
    alone = RBLA().aggregate(state, updates)
    assert close(alone.A[2], updates[0].lora.A[2], size(updates))


def test_rbla_keeps_what_nobody_has():
    """Nobody in the round, or only somebody whose weight is 0."""
    state = server(7, 5, top=3)
    updates = low(RBLA(), state)
    for round in (updates, [u for u in updates if u.weight > 0]):
        after = RBLA().aggregate(state, round)
        assert torch.equal(after.A[1:], state.A[1:]) and torch.equal(after.B[:, 1:], state.B[:, 1:])
        assert float((after.A[0] - state.A[0]).norm()) > 0.1


def test_rbla_hears_a_client_of_tiny_weight():
    """A weight below the smallest float32: the mean of one is that one, not 0/0."""
    state = server(7, 5, top=2)
    state = LoRA(state.A.float(), state.B.float(), state.scale)
    whole, first = RBLA().broadcast(state, 2, 1.5), RBLA().broadcast(state, 1, 1.5)
    after = RBLA().aggregate(
        state, [Update(first, first.lora, 1.0), Update(whole, whole.lora, 1e-60)]
    )
    assert torch.allclose(after.A, state.A, rtol=4 * EPS32) and after.A.dtype == torch.float32


# FSLoRA


def test_fslora_differs_from_hetlora():
    """HetLoRA sends the first components as they are; FSLoRA any, R/r times as large."""
    state = server(9, 7, top=4)
    prefix = HetLoRA().broadcast(state, 2, 1.5).lora
    sets = set()
    for key in range(20):
        sent = FSLoRA().broadcast(state, 2, 1.5, key)
        assert sent.index is not None
        sets.add(tuple(sent.index.tolist()))
        part = state.B[:, sent.index] @ state.A[sent.index]
        assert close(
            sent.lora.delta(), 4 / 2 * state.scale * part, 10 * float(state.delta().norm())
        )
    assert len(sets) > 3
    assert torch.equal(prefix.A, state.A[:2])

    # A client that returns what it was sent says nothing about the rest.
    sent = [FSLoRA().broadcast(state, r, s, key=5) for r, s in ((1, 0.3), (3, 4.0))]
    updates = [Update(x, x.lora, 0.5) for x in sent]
    assert torch.equal(FSLoRA().aggregate(state, updates).A, state.A)
    assert torch.equal(FSLoRA().aggregate(state, updates).B, state.B)


def test_a_sketch_is_sorted_and_every_component_is_as_likely():
    """So `R/r` makes what is sent the server's update in expectation."""
    state, count = server(9, 7, top=4), 400
    for rank in (1, 2, 3):
        times = torch.zeros(4)
        for key in range(count):
            index = FSLoRA().broadcast(state, rank, 1.0, key).index
            assert index is not None and torch.equal(index, index.unique())  # sorted, distinct
            assert len(index) == rank
            times[index] += 1
        share = rank / 4
        deviation = math.sqrt(share * (1 - share) / count)
        assert float((times / count - share).abs().max()) < 4 * deviation


def test_the_top_rank_gets_all_components_as_they_are():
    state = server(9, 7, top=4)
    sent = FSLoRA().broadcast(state, 4, 0.5, key=11)
    assert sent.index is not None and sent.index.tolist() == [0, 1, 2, 3]
    assert torch.equal(sent.lora.A, state.A)
    assert close(sent.lora.delta(), state.delta(), 10 * float(state.delta().norm()))


def test_only_what_was_sent_is_changed():
    state = server(9, 7, top=4)
    (update,) = answers(FSLoRA(), state, [2], [0.7], [1.0], seed=8)
    index = update.sent.index
    assert index is not None
    after = FSLoRA().aggregate(state, [update])
    rest = [j for j in range(4) if j not in index.tolist()]
    assert torch.equal(after.A[rest], state.A[rest])
    assert torch.equal(after.B[:, rest], state.B[:, rest])
    assert float((after.A[index] - state.A[index]).norm(dim=1).min()) > 0.1
    # The client's product counts r/R, as its start was R/r of the server's.
    part = 2 / 4 * update.lora.delta()
    mine = after.scale * after.B[:, index] @ after.A[index]
    assert close(mine, part, 10 * float(update.lora.delta().norm()))


@pytest.mark.parametrize("index", [None, torch.tensor([0])])
def test_an_update_that_answers_no_sketch_is_refused(index: Tensor | None):
    state = server(9, 7, top=4)
    sent = Broadcast(FSLoRA().broadcast(state, 2, 1.0).lora, index=index)
    with pytest.raises(ValueError, match="not a sketch of its rank"):
        FSLoRA().aggregate(state, [Update(sent, sent.lora, 1.0)])


# LoRA-FAIR and FLoRA-NA: nearer to the mean product than the product of means


def residual(method: Method[Any], state: LoRA, updates: list[Update]) -> float:
    """`||ΔW - Σ p_i ΔW_i||_F`."""
    mean = means.stacked([u.weight * u.lora.delta() for u in updates])
    return float((aggregated(method, state, updates) - mean).norm())


def test_lora_fair_differs_from_fedit():
    """The same A, a better B; FedIT is the limit of a correction that costs too much."""
    state = server(9, 7, top=3)
    updates = alike(LoRAFAIR(), state, [0.5, 0.3, 0.2])
    fair, plain = LoRAFAIR().aggregate(state, updates), FedIT().aggregate(state, updates)
    assert close(fair.A, plain.A, size(updates))
    assert residual(LoRAFAIR(), state, updates) < 0.95 * residual(FedIT(), state, updates)
    gap = LoRAFAIR(lam=1e9).aggregate(state, updates).B - plain.B
    assert 0 < float(gap.norm()) <= 10 / 1e9 * float((fair.B - plain.B).norm())


def test_lora_fair_without_a_ridge_is_the_projection():
    """At `lam = 0` all that M has in the row space of Ā is there; a ridge trades some of it away."""
    state = server(9, 7, top=3)
    updates = alike(LoRAFAIR(), state, [0.5, 0.3, 0.2])
    exact = LoRAFAIR(lam=0).aggregate(state, updates)
    mean = means.stacked([u.weight * u.lora.delta() for u in updates])
    assert float(((exact.delta() - mean) @ exact.A.T).norm()) <= 1e4 * EPS64 * size(updates)
    lams = (0.0, 0.01, 1.0, 100.0)
    gaps = [residual(LoRAFAIR(lam), state, updates) for lam in lams]
    assert gaps == sorted(gaps) and gaps[0] < gaps[-1]
    assert gaps[-1] < residual(FedIT(), state, updates)


def test_lora_fair_does_not_depend_on_how_the_scale_is_split():
    """The ridge is relative: A in thousandths and B in thousands is the same problem."""
    state = server(9, 7, top=3)
    updates = alike(LoRAFAIR(lam=0.1), state, [0.5, 0.3, 0.2])
    moved = [Update(u.sent, LoRA(u.lora.A / 1e3, u.lora.B * 1e3, 1.5), u.weight) for u in updates]
    one, two = (aggregated(LoRAFAIR(lam=0.1), state, x) for x in (updates, moved))
    assert close(one, two, (1 + 3 / 0.1) * size(updates))


def test_flora_na_differs_from_fedit():
    """Without sweeps it is FedIT, with them nearer to the mean product."""
    state = server(9, 7, top=3)
    updates = alike(FLoRANA(), state, [0.5, 0.3, 0.2])
    plain = residual(FedIT(), state, updates)
    start = aggregated(FLoRANA(sweeps=0), state, updates)
    assert close(start, aggregated(FedIT(), state, updates), size(updates))
    assert residual(FLoRANA(), state, updates) < 0.98 * plain


def test_flora_na_differs_from_lora_fair():
    """FLoRA-NA moves both factors within the span of the clients'; LoRA-FAIR only B, and anywhere."""
    state = server(9, 7, top=3)
    updates = alike(FLoRANA(), state, [0.5, 0.3, 0.2])
    mean = FedIT().aggregate(state, updates)
    nearest, fair = (x.aggregate(state, updates) for x in (FLoRANA(), LoRAFAIR()))
    assert float((nearest.A - mean.A).norm()) > 0.01 and torch.allclose(fair.A, mean.A)
    for name in ("A", "B"):
        span = torch.stack([getattr(u.lora, name).flatten() for u in updates], dim=1)
        inside = [
            float((x - span @ torch.linalg.lstsq(span, x).solution).norm())
            for x in (getattr(nearest, name).flatten(), getattr(fair, name).flatten())
        ]
        assert inside[0] <= 1e4 * EPS64 * float(span.norm())
        assert name == "A" or inside[1] > 0.01


@given(problem=problems(mixed=False))
def test_no_sweep_of_flora_na_increases_the_residual(problem: dict[str, Any]):
    state, updates = played(FLoRANA(), problem, rounds=1)
    gaps = [residual(FLoRANA(sweeps), state, updates) for sweeps in range(7)]
    rounding = 100 * EPS64 * size(updates)
    assert all(new <= old + rounding for old, new in pairwise(gaps))


def test_flora_na_stays_where_the_residual_is_zero():
    """Only the first component is in use, and all clients have the same row of A there: FedIT is exact,
    and so is any a that sums to 1. Each would give the rows not yet in use another mean."""
    state = server(9, 7, top=3)
    updates = []
    for u in alike(FLoRANA(), state, [0.5, 0.3, 0.2]):
        A, B = u.lora.A.clone(), u.lora.B.clone()
        A[0] = state.A[0]
        B[:, 1:] = 0
        updates.append(Update(u.sent, LoRA(A, B, 1.5), u.weight))
    after, plain = FLoRANA().aggregate(state, updates), FedIT().aggregate(state, updates)
    assert close(after.A, plain.A, 10 * size(updates))
    assert close(after.B, plain.B, 10 * size(updates))


def test_flora_na_leaves_clients_of_weight_0_out_of_the_span():
    """With this client's factors the residual would be far smaller."""
    state = server(9, 7, top=3)
    updates = alike(FLoRANA(), state, [0.5, 0.3, 0.2])
    mean = means.stacked([u.weight * u.lora.delta() for u in updates])
    U, S, Vt = torch.linalg.svd(mean, full_matrices=False)
    best = Update(updates[0].sent, LoRA(Vt[:3], U[:, :3] * S[:3], 1.5), 0.0)
    one, two = (FLoRANA().aggregate(state, x) for x in (updates, [*updates, best]))
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)
    assert residual(FLoRANA(), state, updates) > 1.2 * float(S[3:].norm())


def test_flora_na_refuses_a_cohort_without_weight():
    state = server(9, 7, top=3)
    with pytest.raises(ValueError, match="weight > 0"):
        FLoRANA().aggregate(state, alike(FLoRANA(), state, [0.0, 0.0]))


# FedEx-LoRA


def mean_of_products(updates: list[Update]) -> Tensor:
    return means.stacked([u.weight * u.lora.delta() for u in updates])


def test_fedex_lora_differs_from_fedit():
    """The adapter is FedIT's; the base holds exactly what FedIT drops."""
    state = FedExLoRA().init(server(9, 7, top=3))
    updates = alike(FedExLoRA(), state, [0.5, 0.3, 0.2])
    after, plain = FedExLoRA().aggregate(state, updates), FedIT().aggregate(state.lora, updates)
    assert close(after.lora.A, plain.A, size(updates))
    assert close(after.lora.B, plain.B, size(updates))
    dropped = mean_of_products(updates) - plain.delta()
    assert close(after.base, dropped, size(updates))
    assert float(dropped.norm()) > 0.1 * float(plain.delta().norm())


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_fedex_lora_is_exact_on_square_and_other_layers(shape: tuple[int, int]):
    """A transposed residual would pass unseen on a square layer, but for the values."""
    method = FedExLoRA()
    state = method.init(server(*shape, top=2))
    for seed in (7, 70):  # over two rounds: the base adds up
        updates = alike(method, state, [0.5, 0.3, 0.2], seed)
        want = state.base + mean_of_products(updates)
        state = method.aggregate(state, updates)
        assert close(change(method, state), want, size(updates) + float(state.base.norm()))
    sent = method.broadcast(state, 2, 1.5)
    assert torch.equal(started(sent), change(method, state))


def test_a_cut_residual_is_the_best_of_its_rank():
    """Eckart and Young: what is missing are the residual's other singular values."""
    state = FedExLoRA().init(server(9, 7, top=2))
    updates = alike(FedExLoRA(), state, [0.4, 0.3, 0.2, 0.1])
    full = FedExLoRA().aggregate(state, updates)
    sigma = torch.linalg.svdvals(full.base)
    for k in range(1, 8):
        cut = FedExLoRA(residual_rank=k).aggregate(state, updates)
        assert torch.equal(cut.lora.A, full.lora.A) and torch.equal(cut.lora.B, full.lora.B)
        missing = float((full.base - cut.base).norm())
        assert abs(missing - float(sigma[k:].norm())) <= 100 * EPS64 * size(updates)
        assert int(torch.linalg.matrix_rank(cut.base)) <= k
    assert float(sigma[1:].norm()) > 0.1 * float(sigma[0])  # so that the cut is one


@given(problem=problems(mixed=False), more=st.integers(0, 3))
def test_a_residual_rank_of_K_r_is_exact(problem: dict[str, Any], more: int):
    """Also where it is beyond the rank of the layer."""
    enough = FedExLoRA(residual_rank=sum(problem["ranks"]) + more)
    state, updates = played(FedExLoRA(), problem, rounds=1)
    got, want = (aggregated(x, state, updates) for x in (enough, FedExLoRA()))
    assert close(got, want, 10 * (size(updates) + float(state.base.norm())))


@pytest.mark.parametrize("k", [None, 1])
def test_a_small_residual_is_not_lost_in_float32(k: int | None):
    """Clients a thousandth apart: their residual is a millionth of their product, some ulps of it."""
    start = server(30, 20, top=4)
    method = FedExLoRA(residual_rank=k)
    state = method.init(LoRA(start.A.float(), start.B.float(), start.scale))
    sent = method.broadcast(state, 4, 1.5)
    updates = []
    for seed, weight in ((1, 0.5), (2, 0.5)):
        A, B = (x + 1e-3 * draw(seed, *x.shape).float() for x in (sent.lora.A, sent.lora.B))
        updates.append(Update(sent, LoRA(A, B, 1.5), weight))
    after = method.aggregate(state, updates)
    wide = [LoRA(u.lora.A.double(), u.lora.B.double(), 1.5) for u in updates]
    mean = 0.5 * wide[0].delta() + 0.5 * wide[1].delta()
    lora = after.lora
    want = mean - LoRA(lora.A.double(), lora.B.double(), 1.5).delta()
    assert float(want.norm()) < 1e-5 * float(mean.norm())
    if k is not None:
        want = dense.truncation(want, k)
    assert float((after.base - want).norm()) <= 4 * EPS32 * float(want.norm())


@pytest.mark.parametrize("k", [None, 5])
def test_what_the_wire_rounds_away_is_in_the_base(k: int | None):
    """Clients who return what they were sent, in bfloat16: nothing moves. The base takes over what is
    missing in what they have, since the adapter is from now on the rounded one."""
    method, start = FedExLoRA(residual_rank=k), server(9, 7, top=2)
    state = method.init(LoRA(start.A.float(), start.B.float(), start.scale))
    sent = carried(method.broadcast(state, 2, 1.5), "bfloat16")
    after = method.aggregate(state, [Update(sent, sent.lora, w) for w in (0.25, 0.75)])
    lost = exact(state.lora) - exact(sent.lora)
    rounding = 4 * EPS32 * size([Update(sent, sent.lora, 1.0)])  # `s B` is a float32 in each term
    assert float(lost.norm()) > 1e3 * rounding, "the test is about something"
    assert float((after.base - lost).norm()) <= rounding
    assert torch.equal(after.lora.A, sent.lora.A) and torch.equal(after.lora.B, sent.lora.B)


def exact(lora: LoRA) -> Tensor:
    return lora.scale * lora.B.double() @ lora.A.double()


def test_the_traffic_of_fedex_lora():
    """A client downloads the adapter and this round's residual, dense or as factors."""
    assert FedExLoRA().traffic(9, 7, 2, [2, 2]) == (2 * 16 + 9 * 7, 2 * 16)
    assert FedExLoRA(residual_rank=3).traffic(9, 7, 2, [2, 2]) == ((2 + 3) * 16, 2 * 16)


# Refusals


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("hetlora", "gamma", (0, -0.5, 1.01, math.nan)),
        ("hetlora", "decay", (-1e-3, math.inf, math.nan)),
        ("lora_fair", "lam", (-0.01, math.inf, math.nan)),
        ("flora_na", "sweeps", (-1, 2.5)),
        ("fedex_lora", "residual_rank", (0, -2, 1.5)),
    ],
)
def test_bad_hyperparameters_are_refused(name: str, field: str, values: tuple[float, ...]):
    for value in values:
        with pytest.raises(ValueError, match=f"{field} must be"):
            get_method(name, **{field: value})


def test_good_hyperparameters_are_taken():
    assert get_method("hetlora", gamma=1, decay=0) == HetLoRA(1, 0)
    assert get_method("lora_fair", lam=0) == LoRAFAIR(0)
    assert get_method("flora_na", sweeps=0) == FLoRANA(0)
    assert get_method("fedex_lora", residual_rank=1) == FedExLoRA(1)
