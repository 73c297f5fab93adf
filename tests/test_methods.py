"""The facts that break naive versions of these methods, one test each, and the dense references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import contract
from support.cohorts import answers, clients, draw
from support.contract import change, started
from support.reference import dense as reference
from support.reference.starts import truncated
from support.tiny import classification
from torch import Tensor

from fedhl import METHODS, Broadcast, Cohort, LoRA, Method, Update, get_method, get_weighting
from fedhl.config import Config
from fedhl.lora import initial, truncate
from fedhl.methods import OPTIONAL
from fedhl.methods.fedhl import FedHL
from fedhl.methods.fedit import FedIT
from fedhl.methods.flexlora import FlexLoRA
from fedhl.methods.full_rank import FullRank, begin, move
from fedhl.server.diagnostics import truncation_error

EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
SVD_METHODS = [FedHL(), FlexLoRA()]

svd_methods = pytest.mark.parametrize("method", SVD_METHODS, ids=lambda m: type(m).__name__)


def holding(method: Any, W: Tensor, top: int) -> FullRank:
    """The state in which the global change is W: one client of full rank has sent it."""
    m, n = W.shape
    fresh = initial(m, n, top, 1.0, seed=0)
    state = method.init(LoRA(fresh.A.to(W), fresh.B.to(W), 1.0))
    whole = truncate(W, min(m, n))
    return method.aggregate(state, [Update(method.broadcast(state, top, 1.0), whole, 1.0)])


# Equality with the dense references


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    m, n = draw(st.tuples(st.integers(2, 9), st.integers(2, 9)).filter(lambda x: x[0] != x[1]))
    top = draw(st.integers(1, min(m, n)))
    K = draw(st.integers(1, 5))
    raw = draw(st.lists(st.floats(0.01, 1.0), min_size=K, max_size=K))
    return {
        "shape": (m, n, top),
        "ranks": draw(st.lists(st.integers(1, top), min_size=K, max_size=K)),
        "scales": draw(st.lists(st.floats(0.1, 8.0), min_size=K, max_size=K)),
        "p": [x / sum(raw) for x in raw],
        "seed": draw(st.integers(10, 10**6)),
    }


def agrees(got: Tensor, want: Tensor, updates: list[Update], W: Tensor) -> bool:
    """To rounding in float64: products of inner size < 10 and two SVDs of W, generously."""
    size = float(W.norm()) + sum(
        u.weight * u.lora.scale * float(u.lora.A.norm() * u.lora.B.norm()) for u in updates
    )
    return float((got - want).norm()) <= 400 * EPS64 * size


@pytest.mark.parametrize("rounds", [0, 2])
@given(problem=problems())
def test_fedhl_equals_its_reference(rounds: int, problem: dict[str, Any]):
    check_reference(FedHL(), rounds, problem, lambda W, c: reference.fedhl(W, c))


@pytest.mark.parametrize("rounds", [0, 2])
@given(problem=problems())
def test_flexlora_equals_its_reference(rounds: int, problem: dict[str, Any]):
    check_reference(FlexLoRA(), rounds, problem, lambda W, c: reference.flexlora(c))


@pytest.mark.parametrize("rounds", [0, 2])
@given(problem=problems())
def test_fedit_equals_its_reference(rounds: int, problem: dict[str, Any]):
    top, K = problem["shape"][2], len(problem["ranks"])
    alike = problem | {"ranks": [top] * K, "scales": problem["scales"][:1] * K}
    check_reference(FedIT(), rounds, alike, lambda W, c: reference.fedit(c))


def check_reference(method: Any, rounds: int, problem: dict[str, Any], rule: Any) -> None:
    m, n, top = problem["shape"]
    cohort = {k: problem[k] for k in ("ranks", "scales", "p", "seed")}
    fresh = initial(m, n, top, cohort["scales"][0], seed=problem["seed"])
    state = method.init(LoRA(fresh.A.double(), fresh.B.double(), fresh.scale))
    for _ in range(rounds):
        state = method.aggregate(state, answers(method, state, **cohort))
    W = change(method, state)
    updates = answers(method, state, **cohort)
    got = change(method, method.aggregate(state, updates))
    assert agrees(got, rule(W, clients(updates)), updates, W)


# Round 0


@svd_methods
def test_round_0_nested_A_and_zero_B(method: Any):
    """The SVD of W = 0 is A = B = 0, which never trains; the seeded A serves instead, cut for each."""
    start = initial(9, 7, 5, 1.0, seed=3)
    state = method.init(start)
    assert not change(method, state).any()
    for rank in range(1, 6):
        sent = method.broadcast(state, rank, 2.0).lora
        assert torch.equal(sent.A, start.A[:rank])
        assert sent.B.shape == (9, rank) and not sent.B.any()


@svd_methods
def test_round_0_trains(method: Any):
    """One gradient step from the first broadcast moves the global change."""
    state = method.init(initial(9, 7, 5, 1.0, seed=3))
    sent = method.broadcast(state, 3, 2.0)
    slope = draw(0, 9, 7).float()
    B = sent.lora.B - 0.1 * sent.lora.scale * slope @ sent.lora.A.T
    state = method.aggregate(state, [Update(sent, LoRA(sent.lora.A, B, 2.0), 1.0)])
    assert float((change(method, state) * slope).sum()) < 0  # downhill


@svd_methods
def test_W_that_comes_back_to_zero_is_sent_as_zero(method: Any):
    state = method.init(initial(9, 7, 5, 1.0, seed=3))
    for factor in (1.0, 0.0):
        sent = method.broadcast(state, 5, 1.0)
        # Whole numbers in one entry, so that W - T(W) is exactly zero in the second round.
        A, B = torch.zeros(5, 7), torch.zeros(9, 5)
        A[0, 0], B[0, 0] = 1.0, 2 * factor
        state = method.aggregate(state, [Update(sent, LoRA(A, B, 1.0), 1.0)])
    assert not change(method, state).any()
    sent = method.broadcast(state, 5, 1.0).lora
    assert not sent.delta().any() and bool(sent.A.any(dim=1).all())


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_from_an_existing_adapter(name: str):
    """`init` from a trained adapter: the first broadcast starts where that adapter was."""
    start = LoRA(draw(1, 3, 7), draw(2, 9, 3), 0.5)
    method = get_method(name)
    state = method.init(start)
    bound = 400 * EPS64 * float(start.delta().norm())
    if method.delta(state) is not None:
        assert float((change(method, state) - start.delta()).norm()) <= bound
    begin = started(method.broadcast(state, 3, 0.5))
    assert float((begin - start.delta()).norm()) <= bound


@svd_methods
def test_a_top_rank_beyond_the_layer_is_refused(method: Any):
    with pytest.raises(ValueError, match="<= 5"):
        method.init(LoRA(torch.zeros(6, 5), torch.zeros(9, 6), 1.0))


# Dead components


@svd_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_above_that_of_W_learn_in_every_component(method: Any, dtype: torch.dtype):
    """rank(W) = 2 and a client of rank 5: three components would be zero in both factors."""
    W = (draw(1, 9, 2) @ draw(2, 2, 7)).to(dtype)
    state = holding(method, W, top=5)
    sent = method.broadcast(state, 5, 2.0).lora
    assert float((sent.delta() - W).norm()) <= 100 * torch.finfo(dtype).eps * float(W.norm())

    slope = draw(3, 9, 7).to(dtype)
    grad_A, grad_B = sent.scale * sent.B.T @ slope, sent.scale * slope @ sent.A.T
    assert not grad_A[2:].any()  # their columns of B are zero,
    assert float(grad_B.norm(dim=0).min()) > 0.1  # but their rows of A are not: B learns


@svd_methods
def test_the_balanced_split_would_be_dead(method: Any):
    """What this guards against: `U√S, √S Vᵀ` of the same W has components that never learn."""
    W = draw(1, 9, 2) @ draw(2, 2, 7)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root = S.clamp(min=0).sqrt()
    A, B = (root[:, None] * Vt)[:5], (U * root)[:, :5]
    slope = draw(3, 9, 7)
    dead = (B.T @ slope).norm(dim=1) + (slope @ A.T).norm(dim=0)
    assert float(dead[2:].max()) < 1e-6  # √(rounding of σ), not a gradient
    sent = method.broadcast(holding(method, W, top=5), 5, 1.0).lora
    assert float((slope @ sent.A.T).norm(dim=0)[2:].min()) > 0.1


def test_dead_components_are_drawn_anew_in_every_round():
    """W has rank 1 and stays as it is: the other two rows are random, and other ones in the next round
    and with another seed, so that no direction is tried for ever. They are orthogonal to the live one."""
    fresh = LoRA(draw(1, 3, 9), draw(2, 12, 3), 1.0)
    W = torch.outer(draw(3, 12), draw(4, 9))
    one = move(begin(fresh, seed=5), W)
    later, other = move(one), move(begin(fresh, seed=6), W)
    for state in (one, later, other):
        A = state.sent.A
        assert int(state.sent.B.any(dim=0).sum()) == 1
        assert torch.allclose(A @ A.T, torch.eye(3, dtype=A.dtype), atol=10 * EPS64)
    for state in (later, other):
        assert torch.allclose(state.sent.A[:1], one.sent.A[:1])
        assert not torch.isclose(state.sent.A[1:], one.sent.A[1:]).any()


# Scale


@svd_methods
def test_every_scale_deploys_the_same_change(method: Any):
    """alpha, rank and rsLoRA set the scale; what a client starts from depends on its rank alone."""
    W = draw(0, 9, 7)
    state = holding(method, W, top=4)
    for rank in (1, 2, 4):
        for alpha in (1, 16, 32):
            for scale in (alpha / rank, alpha / rank**0.5):
                sent = method.broadcast(state, rank, scale).lora
                assert sent.scale == scale
                gap = (sent.delta() - reference.truncation(W, rank)).norm()
                assert float(gap) <= 400 * EPS64 * float(W.norm())


@svd_methods
def test_mixed_scales_aggregate_effective_updates(method: Any):
    """Two clients with the same product and different factors and scales: the mean is that product."""
    state = method.init(LoRA(draw(0, 4, 7), torch.zeros(9, 4, dtype=torch.float64), 1.0))
    product = LoRA(draw(1, 2, 7), draw(2, 9, 2), 8.0)  # alpha 16, r 2
    same = LoRA(product.A, product.B * (8.0 / 32**0.5), 32 / 32**0.5)  # rsLoRA-like
    sent = [method.broadcast(state, 2, x.scale) for x in (product, same)]
    updates = [Update(sent[0], product, 0.25), Update(sent[1], same, 0.75)]
    W = change(method, method.aggregate(state, updates))
    assert float((W - product.delta()).norm()) <= 400 * EPS64 * float(product.delta().norm())
    # Forgetting the scales would be off by a factor, not by rounding.
    blind = 0.25 * product.B @ product.A + 0.75 * same.B @ same.A
    assert float((W - blind).norm()) > 0.5 * float(W.norm())


# Weight collapse


def cohort_of(W: Tensor, state: FullRank, ranks: list[int]) -> Cohort:
    errors = [[truncation_error(state.W, FedHL().broadcast(state, r, 1.0))] for r in ranks]
    return Cohort([1] * len(ranks), errors, [float(W.double().square().sum())])


def test_a_client_without_error_takes_all_the_weight():
    """rank(W) = 4: the client of rank 4 lacks nothing, and a tiny ε gives it everything."""
    W = draw(1, 9, 4) @ draw(2, 4, 7)
    cohort = cohort_of(W, holding(FedHL(), W, top=4), ranks=[1, 1, 2, 2, 4])
    effective = {
        epsilon: 1 / float(get_weighting("truncation", epsilon=epsilon)(cohort).square().sum())
        for epsilon in (1e-12, 1e-3, 1e3)
    }
    assert effective[1e-12] == pytest.approx(1.0, abs=1e-6)
    assert 1.0 < effective[1e-3] < effective[1e3]
    assert effective[1e3] == pytest.approx(5.0, abs=1e-3)


# Cancellation


def decaying(decay: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float32 matrix with singular values `decay^j`, and those values as it really has them."""
    U, V = (torch.linalg.qr(draw(seed + k, size, 24))[0] for k, size in ((1, 40), (2, 30)))
    W = (U * decay ** torch.arange(24, dtype=torch.float64) @ V.T).float()
    return W, torch.linalg.svdvals(W.double())


@pytest.mark.parametrize("decay", [0.9, 0.6, 0.3])
def test_the_error_energy_is_right_for_decaying_spectra(decay: float):
    W, sigma = decaying(decay)
    state = holding(FedHL(), W, top=12)
    size = float(W.norm())
    for rank in (1, 2, 4, 8, 12):
        sent = FedHL().broadcast(state, rank, 0.3)
        e, tail = truncation_error(state.W, sent), float(sigma[rank:].square().sum())
        # From the very factors that were sent, every operation in float64, summed exactly.
        start = sent.lora.scale * sent.lora.B.double() @ sent.lora.A.double()
        exact = math.fsum((state.W.double() - start).square().flatten().tolist())
        assert e >= 0
        # `W - ΔW(sent)` in float32 is off by a δ, ||δ|| <= (rank + 2) eps ||W||, the factors differ
        # from T_r(W) by the rounding of an SVD: so is the distance √e, never its square.
        assert abs(e**0.5 - exact**0.5) <= (rank + 2) * EPS32 * size
        assert abs(e**0.5 - tail**0.5) <= 30 * EPS32 * size
        if tail > 1e-4 * size**2:  # an error that a weight can notice
            assert e == pytest.approx(exact, rel=1e-6)


def test_the_naive_error_energy_goes_negative():
    """What this guards against: `||W||² - Σσ²` in float32 is noise of either sign."""
    found = []
    for seed in range(20):
        W, sigma = decaying(0.3, seed=10 * seed)
        naive = W.square().sum() - torch.linalg.svdvals(W)[:10].square().sum()
        found.append(float(naive))
        tail = float(sigma[10:].square().sum())
        assert abs(float(naive)) > 100 * tail or float(naive) == 0  # not one digit is right
    assert min(found) < 0


# Frozen tail


def test_components_beyond_the_top_rank_never_change_under_fedhl():
    """Clients who move only the subspace they were sent leave what FedHL holds beyond it for ever;
    FlexLoRA forgets it in one round. So both W and T_rmax(W) must be evaluated."""
    U, V = torch.linalg.qr(draw(1, 9, 7))[0], torch.linalg.qr(draw(2, 7, 7))[0]
    sigma = torch.tensor([9.0, 8.0, 7.0, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
    W, top = U * sigma @ V.T, 3
    tail = W - reference.truncation(W, top)
    for method, kept in ((FedHL(), 1.0), (FlexLoRA(), 0.0)):
        state = holding(method, W, top)
        for _ in range(3):
            updates = []
            for rank, weight in ((3, 0.6), (2, 0.4)):
                sent = method.broadcast(state, rank, 1.0)
                C = torch.eye(rank, dtype=torch.float64) + 0.05 * draw(rank, rank, rank)
                moved = LoRA(sent.lora.A, sent.lora.B @ C, 1.0)  # inside its own subspace
                updates.append(Update(sent, moved, weight))
            state = method.aggregate(state, updates)
        full = change(method, state)
        cut = reference.truncation(full, top)
        assert float((full - W).norm()) > 0.1  # the head has moved,
        gap = (full - cut) - kept * tail  # the tail is all there, or all gone
        assert float(gap.norm()) <= 400 * EPS64 * float(W.norm())
        assert float((full - cut).norm()) == pytest.approx(
            kept * float(sigma[3:].norm()), abs=400 * EPS64 * float(W.norm())
        )


# One SVD serves all


@given(problem=problems())
def test_the_prefix_formula_is_the_sum_over_clients(problem: dict[str, Any]):
    """`U diag(σ_j Σ_{i: r_i >= j} p_i) Vᵀ = Σ p_i T_{r_i}(W)`: one thin product, not one per client."""
    m, n, top = problem["shape"]
    W = draw(problem["seed"], m, n)
    method = FedHL()
    state = holding(method, W, top)
    cohort = {k: problem[k] for k in ("ranks", "scales", "p", "seed")}
    updates = answers(method, state, **cohort)
    literal = state.W + sum(u.weight * (u.lora.delta() - u.sent.lora.delta()) for u in updates)
    assert agrees(change(method, method.aggregate(state, updates)), literal, updates, W)


@given(problem=problems())
def test_fedhl_less_flexlora_is_the_truncation_bias(problem: dict[str, Any]):
    """`W_FedHL - W_Flex = Σ p_i (W - T_{r_i}(W))`, for the same clients and weights."""
    m, n, top = problem["shape"]
    W = draw(problem["seed"], m, n)
    state = holding(FedHL(), W, top)
    cohort = {k: problem[k] for k in ("ranks", "scales", "p", "seed")}
    updates = answers(FedHL(), state, **cohort)
    gap = FedHL().aggregate(state, updates).W - FlexLoRA().aggregate(state, updates).W
    bias = torch.stack(
        [
            p * (W - reference.truncation(W, r))
            for p, r in zip(cohort["p"], cohort["ranks"], strict=True)
        ]
    ).sum(dim=0)
    assert agrees(gap, bias, updates, W)


def test_what_was_subtracted_is_what_was_sent():
    """Clients who return their broadcast leave W where it was, to rounding, for 50 rounds: nothing
    accumulates in one direction as it would if another truncation were subtracted than was sent."""
    W = draw(0, 30, 20).float()
    method = FedHL()
    state = holding(method, W, top=8)
    before = state.W
    for _ in range(50):
        sent = [method.broadcast(state, r, s) for r, s in ((2, 0.7), (8, 2.83), (5, 1 / 3))]
        updates = [Update(x, x.lora, 1 / 3) for x in sent]
        state = method.aggregate(state, updates)
    # Each round rounds W (1 eps) and two products of inner size <= 8 and 15; 50 of them, worst case.
    assert float((state.W - before).norm()) <= 50 * (1 + 8 + 15) * EPS32 * float(before.norm())


# Refusals


def test_subtracted_is_what_was_sent_whatever_that_was():
    """Not a prefix of the state's own truncation: each client was sent something else."""
    method = FedHL()
    state = holding(method, draw(0, 9, 7), top=4)
    W, updates = state.W.double(), []
    for k, (rank, p) in enumerate(((2, 0.2), (4, 0.3), (6, 0.5))):
        sent = Broadcast(LoRA(draw(k, rank, 7).float(), draw(k + 9, 9, rank).float(), 0.7))
        back = LoRA(draw(k + 20, rank, 7).float(), draw(k + 30, 9, rank).float(), 0.7)
        updates.append(Update(sent, back, p))
        for sign, x in ((1, back), (-1, sent.lora)):
            W = W + sign * p * x.scale * x.B.double() @ x.A.double()
    # inner sizes add up to 24; the products, of norm below 100, are rounded once more than that
    error = float((method.aggregate(state, updates).W - W).norm())
    assert error <= 25 * EPS32 * 100


# Getting a method by name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("flexlra", "flexlora"), ("FedHL", "fedhl"), ("FLoRA", "flora"), ("FedEx-LoRA", "fedex_lora")],
)
def test_an_unknown_method_suggests_the_nearest(name: str, nearest: str):
    with pytest.raises(ValueError, match=f"unknown method '{name}'; did you mean '{nearest}'\\?"):
        get_method(name)


def test_an_unknown_hyperparameter_is_named():
    with pytest.raises(ValueError, match="method 'fedhl' has no hyperparameter 'rate'"):
        get_method("fedhl", rate=0.1)


def test_a_method_from_elsewhere():
    assert get_method("fedhl.methods.flexlora:FlexLoRA") == FlexLoRA()


SILENT = """
from dataclasses import dataclass
from fedhl.methods.flexlora import FlexLoRA

@dataclass(frozen=True)
class Silent:
    mixed_ranks, laws = FlexLoRA.mixed_ranks, FlexLoRA.laws
    init, broadcast, aggregate = FlexLoRA.init, FlexLoRA.broadcast, FlexLoRA.aggregate
    delta, traffic = FlexLoRA.delta, FlexLoRA.traffic
"""
"""A method that inherits nothing and has only what it must."""


def test_a_method_from_elsewhere_that_inherits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Clients then count by their rows, and each broadcast is built for one client."""
    (tmp_path / "silent.py").write_text(SILENT, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = Config.model_validate(classification(weighting=None, method="silent:Silent"))
    assert config.weighting_used.name == "examples"
    method = config.method.build()
    assert [getattr(method, part) for part in OPTIONAL] == [
        getattr(Method, part) for part in OPTIONAL
    ]
    with pytest.raises(AssertionError, match="per_client is True, but the key does not"):
        contract.check_per_client(method)
    with pytest.raises(AssertionError, match="starts is 'other': give `check_start` a reference"):
        contract.check_start(method)
    contract.check_start(method, truncated)


def test_a_method_that_lacks_a_part_cannot_be_made():
    class Half(Method[LoRA]):
        def init(self, lora: LoRA, seed: int = 0) -> LoRA:
            return lora

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no_such_package.at_all:Thing", "cannot be imported.*no_such_package"),
        ("fedhl.methods.fedhl:Missing", "cannot be imported.*Missing"),
        ("fedhl.methods.fedhl:move", "must be a dataclass"),
        ("fedhl.weighting:Uniform", "lacks mixed_ranks, laws, init, broadcast"),
    ],
)
def test_a_method_from_elsewhere_that_is_none(name: str, match: str):
    with pytest.raises(ValueError, match=match):
        get_method(name)
