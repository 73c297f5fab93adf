"""Methods that train one factor at a time, or keep one at home: references, differences, facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import contract
from support.cohorts import clients, draw
from support.contract import adapter, beneath, change, started
from support.reference import factors as reference
from torch import Tensor

from fedhl import LAWS, Broadcast, LoRA, Method, Update, get_method
from fedhl.methods.fedit import FedIT
from fedhl.methods.fedsa_lora import FedSALoRA
from fedhl.methods.fedsvd import FedSVD
from fedhl.methods.ffa_lora import FFALoRA
from fedhl.methods.flora import FLoRA
from fedhl.methods.lora_a2 import LoRAA2
from fedhl.methods.rac_lora import RACLoRA
from fedhl.methods.rolora import RoLoRA
from fedhl.seeds import generator

EPS = torch.finfo(torch.float64).eps
ONE_FACTOR: list[Any] = [
    FFALoRA(),
    RoLoRA(),
    LoRAA2(),
    RACLoRA(),
    RACLoRA(frozen="B"),
    FedSVD(),
    FedSVD(period=2),
]
"""In each round all clients train the same factor, and start at the whole global model."""

one_factor = pytest.mark.parametrize("method", ONE_FACTOR, ids=str)


# A cohort


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A layer (m, n, r all different) and at least three clients of unequal weights."""
    m, n = draw(st.tuples(st.integers(3, 9), st.integers(3, 9)).filter(lambda x: x[0] != x[1]))
    top = draw(st.integers(1, min(m, n) - 1))
    K = draw(st.integers(3, 5))
    # Weights apart by at least a tenth, so that no two clients can be taken for one another.
    raw = draw(st.lists(st.integers(1, 20), min_size=K, max_size=K, unique=True))
    return {
        "shape": (m, n, top),
        "ranks": draw(st.lists(st.integers(1, top), min_size=K, max_size=K)),
        "scales": draw(st.lists(st.floats(0.1, 8.0), min_size=K, max_size=K)),
        "p": [x / sum(raw) for x in raw],
        "seed": draw(st.integers(0, 10**6)),
        "trained": draw(st.booleans()),
    }


def alike(problem: dict[str, Any]) -> dict[str, Any]:
    """The same with the top rank and one scale for all."""
    K = len(problem["p"])
    return problem | {"ranks": [problem["shape"][2]] * K, "scales": [1.5] * K}


def cohort(method: Any, state: Any, problem: dict[str, Any], round: int = 0) -> list[Update]:
    """What clients return that moved, at random, the factors that they may."""
    g = generator(problem["seed"], "cohort", round)
    updates = []
    for key, (rank, scale, p) in enumerate(
        zip(problem["ranks"], problem["scales"], problem["p"], strict=True)
    ):
        sent = method.broadcast(state, rank, scale, key)
        updates.append(Update(sent, contract.train(sent, g), p))
    return updates


def after_rounds(method: Any, problem: dict[str, Any], rounds: int) -> Any:
    """The state after so many rounds, from a fresh or a trained adapter (of scale 1.5)."""
    m, n, top = problem["shape"]
    start = adapter(m, n, top, problem["seed"], trained=problem["trained"])
    state = method.init(start, seed=problem["seed"])
    for round in range(rounds):
        state = method.aggregate(state, cohort(method, state, problem, round))
    return state


def agrees(got: Tensor, want: Tensor, updates: list[Update], W: Tensor) -> bool:
    """To rounding: products of inner size < 10, an SVD through two QR at most, and a few sums of at
    most 6 terms, each wrong by a small multiple of its inner size times eps."""
    size = float(W.norm()) + sum(
        u.weight * x.scale * float(x.A.norm() * x.B.norm())
        for u in updates
        for x in (u.lora, u.sent.lora)
    )
    return got.shape == want.shape and float((got - want).norm()) <= 400 * EPS * size


# Equality with the dense references

rounds_before = pytest.mark.parametrize("rounds", [0, 1, 2, 3])


@rounds_before
@given(problem=problems())
def test_ffa_lora_equals_its_reference(rounds: int, problem: dict[str, Any]):
    method, problem = FFALoRA(), alike(problem)
    state = after_rounds(method, problem, rounds)
    updates = cohort(method, state, problem, rounds)
    first = after_rounds(method, problem, 0).A  # the A of all rounds
    want = reference.ffa_lora(first, clients(updates))
    W = change(method, state)
    assert agrees(change(method, method.aggregate(state, updates)), want, updates, W)


@rounds_before
@given(problem=problems())
def test_rolora_equals_its_reference(rounds: int, problem: dict[str, Any]):
    method, problem = RoLoRA(), alike(problem)
    state = after_rounds(method, problem, rounds)
    updates = cohort(method, state, problem, rounds)
    factor = "A" if rounds % 2 else "B"
    A, B = reference.rolora(factor, state.lora.A, state.lora.B, clients(updates))
    got = method.delta(method.aggregate(state, updates))
    W = change(method, state)
    assert agrees(got.delta(), 1.5 * B @ A, updates, W)
    assert agrees(got.A, A, updates, W) and agrees(got.B, B, updates, W)


@rounds_before
@given(problem=problems())
def test_fedsa_lora_equals_its_reference(rounds: int, problem: dict[str, Any]):
    method, problem = FedSALoRA(), alike(problem)
    state = after_rounds(method, problem, rounds)
    updates = cohort(method, state, problem, rounds)
    got = method.aggregate(state, updates)
    assert agrees(got.A, reference.fedsa_lora(clients(updates)), updates, state.delta())


@rounds_before
@given(problem=problems(), floor=st.sampled_from([0.01, 0.2, 1.0]))
def test_lora_a2_equals_its_reference(rounds: int, problem: dict[str, Any], floor: float):
    method = LoRAA2(floor)
    state = after_rounds(method, problem, rounds)
    updates = cohort(method, state, problem, rounds)
    chosen = [u.sent.index for u in updates if u.sent.index is not None]
    A, B = state.lora.A, state.lora.B
    want = reference.lora_a2(1.5, A, B, clients(updates), chosen)
    W = change(method, state)
    assert agrees(change(method, method.aggregate(state, updates)), want, updates, W)


@rounds_before
@pytest.mark.parametrize("frozen", ["A", "B"])
@given(problem=problems())
def test_rac_lora_equals_its_reference(rounds: int, frozen: str, problem: dict[str, Any]):
    method = RACLoRA(frozen)
    state = after_rounds(method, problem, rounds)
    updates = cohort(method, state, problem, rounds)
    W = change(method, state)
    want = reference.rac_lora(W, clients(updates))
    assert agrees(change(method, method.aggregate(state, updates)), want, updates, W)


@rounds_before
@pytest.mark.parametrize("period", [1, 2, 3])
@given(problem=problems())
def test_fedsvd_equals_its_reference(rounds: int, period: int, problem: dict[str, Any]):
    method, problem = FedSVD(period), alike(problem)
    state = after_rounds(method, problem, rounds)
    updates = cohort(method, state, problem, rounds)
    product, sigma = reference.fedsvd(state.lora.A, clients(updates))
    got = method.aggregate(state, updates).lora
    W = change(method, state)
    assert agrees(got.delta(), product, updates, W)
    if (rounds + 1) % period == 0:  # got is the SVD: these three and the product determine it
        size = float(sigma[0])
        identity = torch.eye(got.rank, dtype=torch.float64)
        assert float((got.A @ got.A.T - identity).norm()) <= 100 * EPS
        gram = (got.scale * got.B).T @ (got.scale * got.B)
        assert float((gram - torch.diag(sigma**2)).norm()) <= 400 * EPS * size**2
    else:
        assert torch.equal(got.A, state.lora.A)


# The contract, for hyperparameters other than the defaults

VARIANTS: list[Any] = [
    RACLoRA(frozen="B"),
    FedSVD(period=3),
    LoRAA2(floor=1e-6),
    LoRAA2(floor=1.0),
]


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_every_hyperparameter_fulfils_the_contract(method: Method[Any], tmp_path: Path):
    for law in LAWS:
        contract.check_law(method, law)
    for check in contract.UNIVERSAL:
        check(method)
    contract.check_start(method)
    contract.check_round_trip(method, tmp_path)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "match"),
    [
        ("lora_a2", {"floor": 0.0}, r"floor must be in \(0, 1\], got 0.0"),
        ("lora_a2", {"floor": -0.5}, "floor must be"),
        ("lora_a2", {"floor": 1.1}, "floor must be"),
        ("lora_a2", {"floor": float("nan")}, "floor must be"),
        ("rac_lora", {"frozen": "C"}, 'frozen must be "A" or "B", got \'C\''),
        ("rac_lora", {"frozen": "a"}, "frozen must be"),
        ("fedsvd", {"period": 0}, "period must be a whole number >= 1, got 0"),
        ("fedsvd", {"period": -1}, "period must be"),
        ("fedsvd", {"period": 1.5}, "period must be"),
        ("ffa_lora", {"period": 1}, "no hyperparameter 'period'; it has none"),
    ],
)
def test_a_wrong_hyperparameter_is_named(name: str, hyperparameters: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        get_method(name, **hyperparameters)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "down", "up"),
    [
        ("ffa_lora", {}, 3 * 12, 3 * 7),
        ("rolora", {}, 3 * 12, 3 * 12 / 2),
        ("fedsa_lora", {}, 3 * 5, 3 * 5),
        ("lora_a2", {}, 4 * 12, 3 * 12 / 2),
        ("rac_lora", {}, 7 * 5, 3 * 7),  # 4 components would be more
        ("rac_lora", {"frozen": "B"}, 7 * 5 + 3 * 12, 3 * 5),
        ("fedsvd", {}, 3 * 12, 3 * 7),
        ("fedsvd", {"period": 5}, 3 * 7 + 3 * 5 / 5, 3 * 7),
    ],
)
def test_traffic(name: str, hyperparameters: dict[str, Any], down: float, up: float):
    """A 7 x 5 layer, a client of rank 3; mixed ranks up to 4 where that is allowed."""
    method = get_method(name, **hyperparameters)
    ranks = [1, 3, 4] if method.mixed_ranks else [3, 3]
    assert method.traffic(7, 5, 3, ranks) == (down, up)


# Real gradients: what the frozen factor does to training


def gradient(D: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """Of `||X Dᵀ - Y||² / 2`, the loss of a linear layer that starts from W0 = 0."""
    return (X @ D.T - Y).T @ X


def train_locally(sent: Broadcast, X: Tensor, Y: Tensor, rate: float, steps: int = 1) -> LoRA:
    """Gradient descent on the factors that may be trained, by autograd."""
    factors = {"A": sent.lora.A.clone(), "B": sent.lora.B.clone()}
    leaves = [factors[name].requires_grad_() for name in sorted(sent.train)]
    base = beneath(sent)
    for _ in range(steps):
        D = base + sent.lora.scale * factors["B"] @ factors["A"]
        loss = (X @ D.T - Y).square().sum() / 2
        with torch.no_grad():
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf -= rate * grad
    return LoRA(factors["A"].detach(), factors["B"].detach(), sent.lora.scale)


M, N, R = 4, 6, 3
RATE = 0.01


def data(client: int) -> tuple[Tensor, Tensor]:
    """A client's inputs and targets: as many rows as there are inputs."""
    return draw(client, N, N), draw(100 + client, N, M)


def members(method: Any) -> list[tuple[int, float, float]]:
    """(rank, scale, weight) of three clients."""
    mixed = [(1, 2.0, 0.5), (R, 0.7, 0.3), (2, 1.5, 0.2)]
    return mixed if method.mixed_ranks else [(R, 1.5, p) for _, _, p in mixed]


@one_factor
def test_a_round_of_single_gradient_steps_is_a_projected_gradient_step(method: Any):
    """`ΔW ← ΔW - rate Σ p_i s_i² G_i AᵀA` if B is trained, `... B Bᵀ G_i` if A is, where G_i is the
    client's gradient at the *global* model. So for a frozen A: descent in its row space, exactly."""
    state = method.init(adapter(M, N, R, seed=1, trained=True), seed=5)
    for round in range(4):
        W = change(method, state)
        want, updates = W.clone(), []
        for k, (rank, s, p) in enumerate(members(method)):
            sent = method.broadcast(state, rank, s, key=k)
            A, B = sent.lora.A, sent.lora.B
            assert float((started(sent) - W).norm()) <= 100 * EPS * (1 + float(W.norm()))
            G = gradient(W, *data(k))
            step = G @ A.T @ A if sent.train == {"B"} else B @ B.T @ G
            want -= p * RATE * s**2 * step
            updates.append(Update(sent, train_locally(sent, *data(k), RATE), p))
        state = method.aggregate(state, updates)
        got = change(method, state)
        assert float((got - W).norm()) > 1e-3  # it has moved,
        assert agrees(got, want, updates, W), f"round {round}"  # as it should


@one_factor
def test_local_training_leaves_the_frozen_factor_alone(method: Any):
    """And it lowers the client's loss, from the first round and an untrained adapter on."""
    state = method.init(adapter(M, N, R, seed=1, trained=False), seed=5)
    X, Y = data(0)
    for round in range(4):
        sent = method.broadcast(state, 2 if method.mixed_ranks else R, 1.5, key=round)
        assert len(sent.train) == 1
        trained = train_locally(sent, X, Y, RATE, steps=5)
        for name in "AB":
            same = torch.equal(getattr(trained, name), getattr(sent.lora, name))
            assert same == (name not in sent.train)
        before = started(sent)
        state = method.aggregate(state, [Update(sent, trained, 1.0)])
        after = change(method, state)
        losses = [float((X @ D.T - Y).square().sum()) for D in (before, after)]
        assert losses[1] < losses[0]


@one_factor
def test_a_factor_that_is_not_trained_is_not_read(method: Any):
    """Whatever arrives in its place: it is not part of the reply."""
    problem = {
        "ranks": [R] * 3,
        "scales": [1.5] * 3,
        "p": [0.5, 0.3, 0.2],
        "seed": 7,
        "shape": (M, N, R),
        "trained": True,
    }
    for rounds in range(3):
        state = after_rounds(method, problem, rounds)
        updates = cohort(method, state, problem, rounds)
        spoiled = [
            replace(
                u,
                lora=LoRA(
                    u.lora.A if "A" in u.sent.train else draw(1, R, N),
                    u.lora.B if "B" in u.sent.train else draw(2, M, R),
                    u.lora.scale,
                ),
            )
            for u in updates
        ]
        one, two = (method.aggregate(state, x) for x in (updates, spoiled))
        assert torch.equal(change(method, one), change(method, two))


# Each and its nearest neighbour

COHORT = {
    "shape": (7, 5, 3),
    "ranks": [3, 3, 3],
    "scales": [1.5, 1.5, 1.5],
    "p": [0.5, 0.3, 0.2],
    "seed": 11,
    "trained": True,
}
"""Three clients of equal ranks and scales, on one layer, from a trained adapter."""


def test_ffa_lora_differs_from_fedit():
    """FedIT's clients train A as well, and the product of means is not the mean of products."""
    for method, exact in ((FFALoRA(), True), (FedIT(), False)):
        state = after_rounds(method, COHORT, 0)
        updates = cohort(method, state, COHORT)
        assert all(torch.equal(u.lora.A, state.A) == exact for u in updates)
        mean = reference.rac_lora(torch.zeros(7, 5), clients(updates))
        after = method.aggregate(state, updates)
        assert agrees(after.delta(), mean, updates, mean) == exact
        assert torch.equal(after.A, state.A) == exact


def test_rolora_differs_from_ffa_lora():
    """The first round is the same to the bit; in the second one A moves."""
    ffa, ro = FFALoRA(), RoLoRA()
    one, two = after_rounds(ffa, COHORT, 1), after_rounds(ro, COHORT, 1)
    assert torch.equal(one.A, two.lora.A) and torch.equal(one.B, two.lora.B)
    later, last = after_rounds(ffa, COHORT, 2), after_rounds(ro, COHORT, 2)
    assert torch.equal(later.A, one.A) and not torch.equal(later.B, one.B)
    assert torch.equal(last.lora.B, two.lora.B) and float((last.lora.A - one.A).norm()) > 0.1


def test_fedsa_lora_differs_from_fedit():
    """The same A to the bit; B is averaged by one and never arrives at the other."""
    sa, it = FedSALoRA(), FedIT()
    state = after_rounds(sa, COHORT, 0)
    updates = cohort(sa, state, COHORT)
    one, two = sa.aggregate(state, updates), it.aggregate(state, updates)
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, state.B) and not torch.equal(two.B, state.B)
    assert sa.delta(one) is None and it.delta(two) is not None


def test_lora_a2_differs_from_rolora():
    """With all components for everybody it is RoLoRA; with fewer, the others stay as they were."""
    a2, ro = LoRAA2(), RoLoRA()
    for rounds in range(3):
        state = after_rounds(ro, COHORT, rounds)
        updates = cohort(ro, state, COHORT, rounds)
        everything = torch.arange(3)
        indexed = [replace(u, sent=replace(u.sent, index=everything)) for u in updates]
        one, two = change(ro, ro.aggregate(state, updates)), a2.aggregate(state, indexed)
        assert agrees(change(a2, two), one, updates, change(ro, state))

        few = COHORT | {"ranks": [1, 1, 1]}
        updates = cohort(a2, state, few, rounds)
        with pytest.raises(ValueError, match="rolora needs rank 3"):
            ro.aggregate(state, updates)
        chosen = {int(u.sent.index[0]) for u in updates if u.sent.index is not None}
        after = a2.aggregate(state, updates).lora
        for j in range(3):
            component = LoRA(after.A[j : j + 1], after.B[:, j : j + 1], 1.0).delta()
            before = torch.outer(state.lora.B[:, j], state.lora.A[j])
            assert torch.equal(component, before) == (j not in chosen)


def test_rac_lora_differs_from_ffa_lora():
    """FFA-LoRA stays in the row space of its first A, and above the least loss in it. RAC-LoRA, with
    a new A in every round, descends below that, to an update of full rank."""
    X, Y = data(0)
    start = adapter(M, N, 2, seed=1, trained=False)
    # The least loss with this A: least squares for B, which is X Aᵀ (s Bᵀ) = Y.
    inputs = X @ start.A.T
    floor = float((inputs @ torch.linalg.pinv(inputs) @ Y - Y).square().sum())
    losses, ranks = [], []
    methods: list[Any] = [FFALoRA(), RACLoRA()]
    for method in methods:
        state = method.init(start, seed=5)
        for _ in range(100):
            sent = method.broadcast(state, 2, start.scale)
            trained = train_locally(sent, X, Y, RATE, steps=10)
            state = method.aggregate(state, [Update(sent, trained, 1.0)])
        D = change(method, state)
        losses.append(float((X @ D.T - Y).square().sum()))
        ranks.append(int(torch.linalg.matrix_rank(D)))
    assert losses[0] >= floor * (1 - 100 * EPS) and losses[1] < 0.9 * floor
    assert ranks == [2, min(M, N)]


def test_rac_lora_differs_from_flora():
    """Both merge and restart, but the clients of RAC-LoRA share the frozen factor: a round adds the
    top rank, however many they are, where FLoRA adds the sum of their ranks."""
    wide = COHORT | {"shape": (9, 8, 2), "ranks": [2, 1, 2], "trained": False}
    for method, added in ((RACLoRA(), 2), (FLoRA(), 5)):
        before, after = (change(method, after_rounds(method, wide, k)) for k in (2, 3))
        assert torch.linalg.matrix_rank(after - before) == added


def test_fedsvd_differs_from_ffa_lora():
    """The same global change after the same updates, but another A for what follows."""
    svd, ffa = FedSVD(), FFALoRA()
    one, two = after_rounds(svd, COHORT, 1), after_rounds(ffa, COHORT, 1)
    updates = cohort(ffa, after_rounds(ffa, COHORT, 0), COHORT)
    assert agrees(change(svd, one), change(ffa, two), updates, change(ffa, two))
    identity = torch.eye(3, dtype=torch.float64)
    sent = [m.broadcast(s, 3, 1.5).lora.A for m, s in ((svd, one), (ffa, two))]
    gaps = [float((A @ A.T - identity).norm()) for A in sent]
    assert gaps[0] <= 100 * EPS and gaps[1] > 0.1


# FFA-LoRA and RoLoRA


def test_ffa_lora_keeps_the_bits_of_A_for_ever():
    method = FFALoRA()
    start = after_rounds(method, COHORT, 0)
    for rounds in range(1, 5):
        state = after_rounds(method, COHORT, rounds)
        sent = method.broadcast(state, 3, 1.5)
        assert sent.train == {"B"}
        assert torch.equal(sent.lora.A, start.A) and torch.equal(state.A, start.A)


def test_rolora_trains_the_factors_in_turn():
    method = RoLoRA()
    for rounds, factor in enumerate("BABAB"):
        state = after_rounds(method, COHORT, rounds)
        assert method.broadcast(state, 3, 1.5).train == {factor}
        after = after_rounds(method, COHORT, rounds + 1)
        for name in "AB":
            same = torch.equal(getattr(state.lora, name), getattr(after.lora, name))
            assert same == (name != factor)


# FedSA-LoRA


def test_fedsa_lora_never_sees_a_B():
    """What stays with the client is B; whatever an update holds in its place changes nothing."""
    method = FedSALoRA()
    state = after_rounds(method, COHORT, 2)
    updates = cohort(method, state, COHORT, 2)
    assert all(u.sent.keep == {"B"} and u.sent.train == {"A", "B"} for u in updates)
    noise = [
        replace(u, lora=replace(u.lora, B=draw(k, *u.lora.B.shape))) for k, u in enumerate(updates)
    ]
    one, two = method.aggregate(state, updates), method.aggregate(state, noise)
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def test_a_client_of_fedsa_lora_that_has_no_B_starts_from_the_first_one():
    method = FedSALoRA()
    start, state = after_rounds(method, COHORT, 0), after_rounds(method, COHORT, 3)
    assert torch.equal(method.broadcast(state, 3, 1.5).lora.B, start.B)


# LoRA-A²


def sized(sizes: list[float], zero: str = "", round: int = 0) -> Any:
    """A state of these component sizes `||B_j|| ||A_j||`; where 0, the factor `zero` is zero."""
    R = len(sizes)
    A = torch.eye(R, 2 * R, dtype=torch.float64)
    B = torch.eye(R + 1, R, dtype=torch.float64) * torch.tensor(sizes, dtype=torch.float64)
    if zero == "A":
        A, B = A * (B.norm(dim=0) > 0)[:, None], torch.eye(R + 1, R, dtype=torch.float64)
    return replace(LoRAA2().init(LoRA(A, B, 1.5)), round=round)


def chosen(method: LoRAA2, state: Any, rank: int, key: int) -> list[int]:
    index = method.broadcast(state, rank, 2.0, key).index
    assert index is not None and index.dtype == torch.int64
    return index.tolist()


def test_lora_a2_starts_everybody_at_the_global_model():
    method = LoRAA2()
    for rounds in range(4):
        state = after_rounds(method, COHORT | {"ranks": [1, 3, 2]}, rounds)
        W = change(method, state)
        for rank in (1, 2, 3):
            for key in range(5):
                sent = method.broadcast(state, rank, 0.4, key)
                assert (sent.merged is None) == (rank == 3)
                assert sent.lora.scale == 0.4 and sent.index is not None
                assert torch.equal(sent.lora.A, state.lora.A[sent.index])
                assert float((started(sent) - W).norm()) <= 100 * EPS * float(W.norm())


def test_lora_a2_chooses_distinct_components_in_order():
    method, state = LoRAA2(), sized([1.0, 2.0, 3.0, 4.0, 5.0])
    for rank in range(1, 6):
        seen = {tuple(chosen(method, state, rank, key)) for key in range(50)}
        assert all(len(set(x)) == rank and list(x) == sorted(x) for x in seen)
        assert all(set(x) <= set(range(5)) for x in seen)
        assert len(seen) > 1 or rank == 5  # not the same for every key,
        assert chosen(method, state, rank, 3) == chosen(method, state, rank, 3)  # but for one


@pytest.mark.parametrize("floor", [0.1, 0.5, 1.0])
def test_lora_a2_chooses_in_proportion_to_size_above_a_floor(floor: float):
    """One component of four, 4000 keys: shares as stated, within 5 standard errors of a share."""
    method, sizes, draws = LoRAA2(floor), [0.0, 1.0, 2.0, 7.0], 4000
    state = sized(sizes)
    counts = [0] * 4
    for key in range(draws):
        counts[chosen(method, state, 1, key)[0]] += 1
    for size, count in zip(sizes, counts, strict=True):
        share = (1 - floor) * size / sum(sizes) + floor / 4
        assert abs(count / draws - share) <= 5 * (share * (1 - share) / draws) ** 0.5


def test_lora_a2_second_component_is_drawn_from_the_rest():
    """Without replacement: P(first j, then k) = w_j w_k / (1 - w_j), summed over both orders."""
    method, draws = LoRAA2(0.1), 4000
    state = sized([1.0, 2.0, 7.0])
    w = [0.9 * x / 10 + 0.1 / 3 for x in (1.0, 2.0, 7.0)]
    pairs = [tuple(chosen(method, state, 2, key)) for key in range(draws)]
    for j, k in ((0, 1), (0, 2), (1, 2)):
        share = w[j] * w[k] * (1 / (1 - w[j]) + 1 / (1 - w[k]))
        error = (share * (1 - share) / draws) ** 0.5
        assert abs(pairs.count((j, k)) / draws - share) <= 5 * error


@pytest.mark.parametrize(("round", "zero"), [(1, "B"), (2, "A")])
def test_lora_a2_prefers_components_that_can_learn(round: int, zero: str):
    """In a round that trains A a component whose B is zero has no gradient, and the reverse."""
    method = LoRAA2(floor=1.0)
    state = sized([0.0, 3.0, 0.0, 1e-9, 2.0], zero, round)
    for key in range(20):
        sent = method.broadcast(state, 3, 1.0, key)
        assert sent.index is not None and sent.index.tolist() == [1, 3, 4]
        assert sent.train == {"A" if zero == "B" else "B"}
        assert set(chosen(method, state, 2, key)) < {1, 3, 4}
        assert set(chosen(method, state, 4, key)) > {1, 3, 4}


def test_a_component_of_lora_a2_that_one_client_has_moves_by_its_weight():
    """Two clients with different components: each moves its own, by p_i, in effective units."""
    method = LoRAA2()
    state = sized([1.0, 1.0, 1.0])
    updates = []
    for rank, scale, p in ((1, 2.0, 0.7), (1, 0.5, 0.3)):
        key = next(k for k in range(100) if chosen(method, state, 1, k) == [len(updates)])
        sent = method.broadcast(state, rank, scale, key)
        updates.append(Update(sent, replace(sent.lora, B=sent.lora.B + 1), p))
    step = method.aggregate(state, updates).lora.B - state.lora.B
    want = torch.tensor([0.7 * 2.0 / 1.5, 0.3 * 0.5 / 1.5, 0.0], dtype=torch.float64)
    assert float((step - want).abs().max()) <= 4 * EPS


def test_lora_a2_refuses_an_update_that_does_not_fit_its_index():
    """A rank-1 reply would otherwise be spread over all the components that were sent."""
    method = LoRAA2()
    state = after_rounds(method, COHORT, 1)
    sent = method.broadcast(state, 2, 1.5)
    short = LoRA(sent.lora.A[:1], sent.lora.B[:, :1], 1.5)
    with pytest.raises(ValueError, match="rank 1"):
        method.aggregate(state, [Update(sent, short, 1.0)])
    with pytest.raises(ValueError, match="index None"):
        method.aggregate(state, [Update(replace(sent, index=None), sent.lora, 1.0)])


# RAC-LoRA


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_rac_lora_freezes_one_factor_for_all_and_draws_it_anew(frozen: str):
    """Nested between ranks, whatever the scale and the key; another one in the next round, and for
    another seed; the trained factor starts at zero."""
    method, seen = RACLoRA(frozen), []
    for rounds in range(3):
        state = after_rounds(method, COHORT, rounds)
        whole = method.broadcast(state, 3, 1.5)
        assert whole.train == {"A", "B"} - {frozen}
        for rank, scale, key in ((1, 0.3, 5), (2, 4.0, 6), (3, 1.5, 7)):
            sent = method.broadcast(state, rank, scale, key)
            A, B = sent.lora.A, sent.lora.B
            fixed, full = (A, whole.lora.A[:rank]) if frozen == "A" else (B, whole.lora.B[:, :rank])
            assert torch.equal(fixed, full) and bool(fixed.any())
            assert not (B if frozen == "A" else A).any()
            assert sent.base is not None and torch.equal(sent.base, change(method, state))
        seen.append(getattr(whole.lora, frozen))
    other = method.init(adapter(7, 5, 3, 1, trained=False), seed=99)
    seen.append(getattr(method.broadcast(other, 3, 1.5).lora, frozen))
    for k, x in enumerate(seen):
        assert all(float((x - y).norm()) > 0.1 for y in seen[:k])


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_rac_lora_draws_a_factor_of_sensible_size(frozen: str):
    """Vectors of length 1/√3 in layers of any size. U²/size has variance 4/(45 size²), so the
    square of a length has standard error √(4/(45 size)); 5 of them."""
    for size in (500, 3000):
        shape = (4, size) if frozen == "A" else (size, 4)
        start = LoRA(torch.zeros(2, shape[1]), torch.zeros(shape[0], 2), 1.0)
        method = RACLoRA(frozen)
        factor = getattr(method.broadcast(method.init(start), 2, 8.0).lora, frozen)
        squares = factor.square().sum(dim=1 if frozen == "A" else 0)
        assert squares.shape == (2,)
        assert float((squares - 1 / 3).abs().max()) <= 5 * (4 / (45 * size)) ** 0.5


def test_rac_lora_merges_a_trained_adapter_into_its_base():
    start = adapter(7, 5, 3, 1, trained=True)
    method = RACLoRA()
    state = method.init(start)
    assert torch.equal(change(method, state), start.delta())
    sent = method.broadcast(state, 3, 1.5)
    assert torch.equal(started(sent), start.delta()) and not sent.lora.B.any()


def test_rac_lora_refuses_an_update_above_the_top_rank():
    method = RACLoRA()
    state = after_rounds(method, COHORT, 1)
    sent = method.broadcast(state, 3, 1.5)
    wide = LoRA(torch.ones(4, 5), torch.ones(7, 4), 1.5)
    with pytest.raises(ValueError, match="rank 4"):
        method.aggregate(state, [Update(sent, wide, 1.0)])


# FedSVD


@pytest.mark.parametrize("live", [0, 1, 2, 3])
def test_fedsvd_has_orthonormal_rows_whatever_the_rank_of_the_product(live: int):
    """`σ = 0` leaves no row of A undetermined or zero: no component is dead."""
    method = FedSVD()
    state = method.init(adapter(7, 5, 3, 1, trained=False))
    sent = method.broadcast(state, 3, 1.5)
    B = torch.zeros_like(sent.lora.B)
    B[:, :live] = draw(3, 7, live)
    trained = replace(sent.lora, B=B)
    lora = method.aggregate(state, [Update(sent, trained, 1.0)]).lora
    assert lora.scale == 1.5 and lora.A.is_contiguous() and lora.B.is_contiguous()
    assert float((lora.A @ lora.A.T - torch.eye(3)).norm()) <= 100 * EPS
    size = float(trained.delta().norm())
    assert float((lora.delta() - trained.delta()).norm()) <= 100 * EPS * size
    norms = lora.B.norm(dim=0)
    assert bool((norms[:live] > 0.1).all()) and bool((norms[live:] <= 100 * EPS * size).all())


def test_fedsvd_never_leaves_the_row_space_of_its_first_A():
    """`Vᵀ` spans the same rows as A: it is FFA-LoRA's subspace in another basis."""
    method = FedSVD()
    first = after_rounds(method, COHORT, 0).lora.A
    basis, _ = torch.linalg.qr(first.T)
    for rounds in range(1, 6):
        A = after_rounds(method, COHORT, rounds).lora.A
        assert float((A - A @ basis @ basis.T).norm()) <= 400 * EPS


@pytest.mark.parametrize("period", [1, 2, 3])
def test_fedsvd_refreshes_A_every_period(period: int):
    method = FedSVD(period)
    for rounds in range(1, 7):
        before, after = (after_rounds(method, COHORT, k).lora.A for k in (rounds - 1, rounds))
        assert torch.equal(before, after) == (rounds % period != 0)


def test_fedsvd_refuses_a_rank_that_its_svd_has_not():
    with pytest.raises(ValueError, match="<= 5"):
        FedSVD().init(LoRA(torch.zeros(6, 5), torch.zeros(9, 6), 1.0))
