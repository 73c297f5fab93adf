"""Methods that average products: raflora, eclora, florist, flora, hlora, fedhera, fed_plora."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cohorts import answers, clients, draw
from support.contract import change, started
from support.reference import dense
from support.reference import products as reference
from support.reference.dense import Client, truncation
from torch import Tensor

from fedhl import LoRA, Method, Update, get_method
from fedhl.lora import initial
from fedhl.methods.eclora import ECLoRA
from fedhl.methods.fed_plora import FedPLoRA
from fedhl.methods.fedhera import FedHera
from fedhl.methods.fedhl import FedHL
from fedhl.methods.flexlora import FlexLoRA
from fedhl.methods.flora import FLoRA
from fedhl.methods.florist import FLoRIST
from fedhl.methods.hlora import HLoRA
from fedhl.methods.raflora import RaFLoRA
from fedhl.server.diagnostics import truncation_error

EPS = torch.finfo(torch.float64).eps


def fresh(m: int, n: int, top: int, seed: int = 0) -> LoRA:
    """An untrained adapter in float64."""
    lora = initial(m, n, top, 1.0, seed)
    return LoRA(lora.A.double(), lora.B.double(), 1.0)


def trained(m: int, n: int, top: int, seed: int = 0) -> LoRA:
    """One that somebody has trained before: `W = ΔW` of full rank `top`."""
    return LoRA(draw(seed, top, n), draw(seed + 1, m, top), 0.5)


def unchanged(method: Method[Any], state: Any, ranks: Sequence[int], p: Sequence[float]) -> Any:
    """The state after a round in which every client returns what it was sent."""
    sent = [method.broadcast(state, rank, 1.0) for rank in ranks]
    return method.aggregate(state, [Update(s, s.lora, w) for s, w in zip(sent, p, strict=True)])


def rounding(updates: Sequence[Update], *sized: Tensor) -> float:
    """A bound on the rounding of one aggregation in float64.

    Weights of clients are at most 1, also those of raflora; products here have an inner size below
    60 (5 clients of rank 9, and W's own 9), and a few SVDs and sums of the same size follow.
    """
    terms = [u.lora.scale * float(u.lora.A.norm() * u.lora.B.norm()) for u in updates]
    return 400 * EPS * (sum(terms) + sum(float(x.norm()) for x in sized))


def sensitivity(W: Tensor, rank: int) -> float:
    """How much `T_r(W)` moves per change of W: a rotation by `1/(σ_r - σ_{r+1})` of parts of size σ_r."""
    sigma = torch.cat([torch.linalg.svdvals(W), torch.zeros(1).double()])
    if rank >= len(sigma) or not sigma[0]:
        return 1.0
    gap = float(torch.maximum(sigma[rank - 1] - sigma[rank], EPS * sigma[0]))
    return 1 + 2 * float(sigma[rank - 1]) / gap


# Equality with the dense references


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """At least three clients of any ranks, scales and weights; m, n and the top rank differ."""
    m, n, top = draw(
        st.tuples(*[st.integers(2, 9)] * 2, st.integers(1, 8)).filter(
            lambda x: len(set(x)) == 3 and x[2] < min(x[:2])
        )
    )
    K = draw(st.integers(3, 5))
    raw = draw(st.lists(st.floats(0.01, 1.0), min_size=K, max_size=K))
    return {
        "shape": (m, n, top),
        "ranks": draw(st.lists(st.integers(1, top), min_size=K, max_size=K)),
        "scales": draw(st.lists(st.floats(0.1, 8.0), min_size=K, max_size=K)),
        "p": [x / sum(raw) for x in raw],
        "seed": draw(st.integers(10, 10**6)),
    }


Rule = Callable[[Tensor, list[Client]], Tensor]

anywhere = pytest.mark.parametrize(
    ("start", "rounds"), [(fresh, 0), (fresh, 2), (trained, 0), (trained, 2)]
)


def check(
    method: Method[Any],
    problem: dict[str, Any],
    start: Callable[..., LoRA],
    rounds: int,
    rule: Rule,
    condition: Callable[[Tensor, list[Client]], float] = lambda W, c: 1.0,
) -> None:
    """After `rounds` rounds from `start`, one more is `rule(W, clients)`."""
    cohort = {k: problem[k] for k in ("ranks", "scales", "p", "seed")}
    state = method.init(start(*problem["shape"], seed=problem["seed"]))
    for _ in range(rounds):
        state = method.aggregate(state, answers(method, state, **cohort))
    W = change(method, state)
    updates = answers(method, state, **cohort)
    got, want = change(method, method.aggregate(state, updates)), rule(W, clients(updates))
    allowed = rounding(updates, W) * condition(W, clients(updates))
    assert float((got - want).norm()) <= allowed


@anywhere
@given(problem=problems())
def test_raflora_equals_its_reference(start: Any, rounds: int, problem: dict[str, Any]):
    top = problem["shape"][2]
    seen = max(problem["ranks"])
    check(
        RaFLoRA(),
        problem,
        start,
        rounds,
        lambda W, c: reference.raflora(truncation(W, top) - truncation(W, seen), c),
        lambda W, c: sensitivity(W, top) + sensitivity(W, seen),
    )


@anywhere
@given(problem=problems())
def test_eclora_equals_its_reference(start: Any, rounds: int, problem: dict[str, Any]):
    top = problem["shape"][2]
    check(
        ECLoRA(),
        problem,
        start,
        rounds,
        lambda W, c: reference.eclora(W, top, c),
        lambda W, c: sensitivity(W, top),
    )


@anywhere
@given(problem=problems())
def test_flora_equals_its_reference(start: Any, rounds: int, problem: dict[str, Any]):
    check(FLoRA(), problem, start, rounds, reference.flora)


@anywhere
@given(problem=problems(), threshold=st.floats(0.05, 0.999))
def test_florist_equals_its_reference(
    start: Any, rounds: int, problem: dict[str, Any], threshold: float
):
    def condition(W: Tensor, c: list[Client]) -> float:
        k = torch.linalg.matrix_rank(reference.florist(torch.zeros_like(W), c, threshold))
        return sensitivity(reference.mean(c), int(k))

    check(
        FLoRIST(threshold),
        problem,
        start,
        rounds,
        lambda W, c: reference.florist(W, c, threshold),
        condition,
    )


@anywhere
@given(problem=problems())
def test_hlora_equals_its_reference(start: Any, rounds: int, problem: dict[str, Any]):
    top = problem["shape"][2]
    check(
        HLoRA(),
        problem,
        start,
        rounds,
        lambda W, c: reference.hlora(top, c),
        lambda W, c: sensitivity(reference.mean(c), top),
    )


@pytest.mark.parametrize("method", [FedHera(), FedHera(download=3), FedPLoRA()], ids=repr)
@anywhere
@given(problem=problems())
def test_fedhera_and_fed_plora_equal_the_reference_of_fedhl(
    method: Method[Any], start: Any, rounds: int, problem: dict[str, Any]
):
    """The part in the base is where the client starts and where it ends: it cancels."""
    check(
        method,
        problem,
        start,
        rounds,
        dense.fedhl,
        lambda W, c: max(sensitivity(W, len(client.A)) for client in c),
    )


@pytest.mark.parametrize(
    ("method", "reached"),
    [
        (RaFLoRA(), truncation),
        (FLoRA(), lambda W, r: W),
        (FLoRIST(), lambda W, r: W),
        (HLoRA(), truncation),
        (FedHera(), lambda W, r: truncation(W, 2 * r)),
        (FedHera(download=3), lambda W, r: truncation(W, 3 * r)),
        (FedPLoRA(), lambda W, r: W),
    ],
    ids=lambda x: repr(x) if not callable(x) else "",
)
@given(problem=problems())
def test_where_a_client_starts(
    method: Method[Any], reached: Callable[[Tensor, int], Tensor], problem: dict[str, Any]
):
    """`base + ΔW(lora)`, from the global change W alone, whatever the scale."""
    m, n, top = problem["shape"]
    state = method.init(trained(m, n, top, problem["seed"]))
    cohort = {k: problem[k] for k in ("ranks", "scales", "p", "seed")}
    updates = answers(method, state, **cohort)
    state = method.aggregate(state, updates)
    W = change(method, state)
    for rank, scale in zip(problem["ranks"], problem["scales"], strict=True):
        got = started(method.broadcast(state, rank, scale))
        condition = max(sensitivity(W, min(k * rank, m, n)) for k in (1, 2, 3))
        assert float((got - reached(W, rank)).norm()) <= rounding([], W) * condition


# eclora


def test_eclora_gives_back_what_the_top_rank_left_out():
    """Nobody trains, and all have the top rank: FlexLoRA forgets the tail, which no client was sent."""
    begun, p = fresh(9, 7, 2, seed=1), [0.2, 0.3, 0.5]
    updates = answers(ECLoRA(), ECLoRA().init(begun), [2, 2, 2], [1.0, 0.5, 2.0], p, seed=20)
    W = {}
    for method in (ECLoRA(), FlexLoRA()):
        state = method.aggregate(method.init(begun), updates)
        first = change(method, state)  # of rank 6, of which two components are sent
        for _ in range(3):
            state = unchanged(method, state, [2, 2, 2], p)
        W[type(method)] = change(method, state)
    allowed = 4 * rounding(updates, first) * sensitivity(first, 2)
    assert float((W[ECLoRA] - first).norm()) <= allowed
    assert float((W[FlexLoRA] - truncation(first, 2)).norm()) <= allowed
    assert float((W[ECLoRA] - W[FlexLoRA]).norm()) > 0.1 * float(first.norm())


# raflora


def steep(m: int, n: int, sigma: Sequence[float]) -> LoRA:
    """`U diag(σ) Vᵀ` as an adapter, and so a start whose spectrum is known."""
    k = len(sigma)
    U, V = torch.linalg.qr(draw(1, m, k))[0], torch.linalg.qr(draw(2, n, k))[0]
    return LoRA(V.T, U * torch.tensor(sigma, dtype=torch.float64), 1.0)


def test_raflora_differs_from_flexlora():
    """Rank collapse: FlexLoRA divides a component by the whole cohort, in every round; raFLoRA by
    those who hold it. Nobody trains here, and one client in ten (by weight) holds components 2 to 4."""
    start, ranks, p = steep(9, 7, [4.0, 3.0, 2.0, 1.0]), [1, 4, 1], [0.5, 0.1, 0.4]
    sigma = {}
    for method in (RaFLoRA(), FlexLoRA()):
        state = method.init(start)
        for _ in range(3):
            state = unchanged(method, state, ranks, p)
        sigma[type(method)] = torch.linalg.svdvals(change(method, state))[:4]
    size = 9 * 400 * EPS * 4
    assert torch.allclose(
        sigma[RaFLoRA], torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), rtol=0, atol=size
    )
    shrunk = torch.tensor([4.0, 3e-3, 2e-3, 1e-3], dtype=torch.float64)
    assert torch.allclose(sigma[FlexLoRA], shrunk, rtol=0, atol=size)


def test_raflora_is_flexlora_where_all_ranks_are_one():
    state = RaFLoRA().init(trained(9, 7, 3))
    updates = answers(RaFLoRA(), state, [3, 3, 3], [0.5, 1.0, 2.0], [0.2, 0.3, 0.5], seed=20)
    one, two = (m.aggregate(state, updates).W for m in (RaFLoRA(), FlexLoRA()))
    assert float((one - two).norm()) <= rounding(updates)


def test_raflora_keeps_what_nobody_in_the_round_could_see():
    """A round of small clients: the components above theirs stay as the server would have sent them,
    but nobody's weight counts for them, nor does a client without weight."""
    start = steep(9, 7, [5.0, 4.0, 3.0, 2.0])
    method = RaFLoRA()
    state = method.init(start)
    updates = answers(method, state, [2, 1, 2], [1.0, 0.5, 2.0], [0.6, 0.3, 0.1], seed=30)
    silent = answers(method, state, [4], [1.0], [0.0], seed=40)
    kept = truncation(start.delta(), 4) - truncation(start.delta(), 2)
    want = reference.raflora(kept, clients(updates))
    for cohort in (updates, [*silent, *updates]):
        got = method.aggregate(state, cohort).W
        assert float((got - want).norm()) <= rounding(cohort, start.delta())


def test_raflora_depends_on_how_a_client_splits_its_product():
    """Its Limitation: the order of a client's components decides by whom each is divided."""
    method = RaFLoRA()
    state = method.init(trained(9, 7, 3))
    updates = answers(method, state, [3, 1, 2], [1.0, 1.0, 1.0], [0.2, 0.5, 0.3], seed=50)
    first = updates[0].lora
    turned = Update(updates[0].sent, LoRA(first.A.flip(0), first.B.flip(1), 1.0), 0.2)
    assert float((turned.lora.delta() - first.delta()).norm()) <= rounding([turned])
    one, two = (method.aggregate(state, [u, *updates[1:]]).W for u in (updates[0], turned))
    assert float((one - two).norm()) > 0.1 * float(one.norm())


# flora and florist


def test_flora_differs_from_fedhl():
    """The same sum of the same changes; but clients start from zero with a fresh A, not from `T_r(W)`,
    and find W whole in their base."""
    lora = trained(9, 7, 3)
    methods: list[Method[Any]] = [FLoRA(), FedHL()]
    sent = {type(m): m.broadcast(m.init(lora), 2, 2.0) for m in methods}
    assert not sent[FLoRA].lora.B.any() and sent[FedHL].lora.B.any()
    assert sent[FedHL].base is None
    assert torch.equal(started(sent[FLoRA]), lora.delta())
    assert float((started(sent[FedHL]) - lora.delta()).norm()) > 0.1 * float(lora.delta().norm())

    moves = [LoRA(draw(60 + k, 2, 7), draw(70 + k, 9, 2), 2.0) for k in range(3)]
    after, bound = {}, 0.0
    for method in methods:
        start = sent[type(method)].lora
        updates = []  # each client adds the same change to what it was sent
        for x, weight in zip(moves, (0.5, 0.2, 0.3), strict=True):
            A, B = torch.cat([start.A, x.A]), torch.cat([start.B, x.B], dim=1)
            updates.append(Update(sent[type(method)], LoRA(A, B, 2.0), weight))
        after[type(method)] = change(method, method.aggregate(method.init(lora), updates))
        bound += rounding(updates, lora.delta())
    assert float((after[FLoRA] - after[FedHL]).norm()) <= bound


@pytest.mark.parametrize("method", [FLoRA(), FLoRIST()], ids=repr)
def test_every_round_restarts_with_a_fresh_nested_adapter(method: Method[Any]):
    """Before the first round the given A; then one drawn from seed and round, the same for all clients
    and new each time; B = 0 always, so a restart moves nobody."""
    start = fresh(9, 7, 5)
    state = method.init(start, seed=1)
    drawn = [method.broadcast(state, 5, 1.0).lora.A]
    assert torch.equal(drawn[0], start.A)
    for _ in range(2):
        state = method.aggregate(
            state, answers(method, state, [5, 2, 3], [1, 2, 3], [0.5, 0.2, 0.3], 9)
        )
        whole = method.broadcast(state, 5, 1.0).lora
        for rank in (1, 3, 5):
            sent = method.broadcast(state, rank, 0.1 * rank, key=rank)
            assert torch.equal(sent.lora.A, whole.A[:rank]) and not sent.lora.B.any()
            assert sent.base is not None and torch.equal(sent.base, change(method, state))
        assert float(whole.A.abs().max()) <= 7**-0.5  # as PEFT draws it
        drawn.append(whole.A)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    other = method.init(start, seed=2)
    other = method.aggregate(
        other, answers(method, other, [5, 2, 3], [1, 2, 3], [0.5, 0.2, 0.3], 9)
    )
    assert not torch.equal(method.broadcast(other, 5, 1.0).lora.A, drawn[1])


def cohort_of(sigma: Sequence[float], shape: tuple[int, int] = (9, 7)) -> list[Update]:
    """Three clients whose mean product has these singular values: each holds some of its components."""
    whole = steep(*shape, sigma)
    method = FLoRIST()
    state = method.init(fresh(*shape, len(sigma)))
    p, updates = [0.5, 0.2, 0.3], []
    for k, weight in enumerate(p):
        A, B = whole.A[k::3], whole.B[:, k::3] / weight
        sent = method.broadcast(state, len(A), 2.0)
        updates.append(Update(sent, LoRA(A, B / 2.0, 2.0), weight))
    return updates


@pytest.mark.parametrize(
    ("threshold", "k"),
    [(0.5, 1), (0.64, 1), (0.66, 2), (0.87, 2), (0.9, 3), (0.97, 3), (0.98, 4), (1.0, 5)],
)
def test_florist_keeps_the_fewest_components_with_the_share(threshold: float, k: int):
    """σ² = 65, 22.75, 9.75, 2, 0.5: cumulative shares 0.65, 0.8775, 0.975, 0.995, 1."""
    sigma = [x**0.5 for x in (65.0, 22.75, 9.75, 2.0, 0.5)]
    updates = cohort_of(sigma)
    method = FLoRIST(threshold)
    W = change(method, method.aggregate(method.init(fresh(9, 7, 5)), updates))
    got = torch.linalg.svdvals(W)
    want = torch.tensor([*sigma[:k], *[0.0] * (7 - k)], dtype=torch.float64)
    # Components are 0.8 apart and as good as the sum of the stacked factors' rounding.
    assert torch.allclose(got, want, rtol=0, atol=rounding(updates))


def test_florist_differs_from_flora():
    """At threshold 1 they are one; below, what each round's mean has beyond its share is lost."""
    updates = cohort_of([4.0, 2.0, 1.0, 0.5])
    state = FLoRA().init(trained(9, 7, 4))
    W = {t: FLoRIST(t).aggregate(state, updates).full.W for t in (1.0, 0.9)}
    exact = FLoRA().aggregate(state, updates).full.W
    bound = rounding(updates, state.full.W)
    assert float((W[1.0] - exact).norm()) <= bound
    # 16 of 21.25 is less than 0.9, 20 is more: two components are kept, √1.25 is lost.
    assert abs(float((W[0.9] - exact).norm()) - 1.25**0.5) <= bound


def test_florist_leaves_earlier_rounds_alone():
    """What is cut is the round's mean, not W: small old components survive a large new round."""
    state = FLoRIST().init(trained(9, 7, 4))
    updates = cohort_of([1e3, 1.0, 0.5])
    after = FLoRIST().aggregate(state, updates).full.W
    want = state.full.W + truncation(reference.mean(clients(updates)), 1)
    assert float((after - want).norm()) <= rounding(updates, state.full.W)


# hlora


def test_hlora_differs_from_flexlora():
    """The bank is FlexLoRA's dense mean cut to the top rank, at the server too; clients of either
    start from the same truncation."""
    lora = trained(9, 7, 3)
    p, ranks, scales = [0.2, 0.5, 0.3], [3, 1, 2], [0.5, 2.0, 1.0]
    flex, bank = FlexLoRA(), HLoRA()
    updates = answers(flex, flex.init(lora), ranks, scales, p, seed=80)
    one = flex.aggregate(flex.init(lora), updates)
    two = bank.aggregate(bank.init(lora), updates)
    assert torch.linalg.matrix_rank(change(flex, one)) == 6
    assert torch.linalg.matrix_rank(change(bank, two)) == 3
    bound = rounding(updates) * sensitivity(one.W, 3)
    assert float((change(bank, two) - truncation(one.W, 3)).norm()) <= bound
    for rank in (1, 2, 3):
        gap = started(bank.broadcast(two, rank, 2.0)) - started(flex.broadcast(one, rank, 2.0))
        assert float(gap.norm()) <= rounding(updates) * sensitivity(one.W, rank)


def test_hlora_refills_a_bank_that_the_cohort_does_not_fill():
    """Three clients whose products are of rank one, and the same: four of five components have no
    energy but rounding's. Their rows of A are unit vectors orthogonal to the others, new in each round,
    and B is zero there."""
    method = HLoRA()
    state = method.init(fresh(9, 7, 5), seed=4)
    same, rows = LoRA(draw(1, 1, 7).expand(2, 7), draw(2, 9, 2), 2.0), []
    for _ in range(2):
        sent = method.broadcast(state, 2, 2.0)
        state = method.aggregate(state, [Update(sent, same, p) for p in (0.5, 0.2, 0.3)])
        bank = state.lora
        assert float((bank.A @ bank.A.T - torch.eye(5)).norm()) <= 400 * EPS
        assert bank.B[:, 0].any() and not bank.B[:, 1:].any()
        rows.append(bank.A)
    assert not torch.allclose(rows[0][1:], rows[1][1:])


# fedhera and fed_plora


def test_fedhera_differs_from_fedhl():
    """The same factors to train and the same server step; the client starts at `T_2r(W)`, not `T_r(W)`.
    With download 1 nothing is left of the difference."""
    start = steep(9, 7, [6.0, 5.0, 4.0, 3.0, 2.0])
    hera, plain = get_method("fedhera"), get_method("fedhl")
    one = get_method("fedhera", download=1)
    states = {m: m.init(start) for m in (hera, one, plain)}
    for rank in (1, 2, 3, 5):
        sent = {m: m.broadcast(states[m], rank, 0.5) for m in states}
        for m in (hera, one):
            assert torch.equal(sent[m].lora.A, sent[plain].lora.A)
            assert torch.equal(sent[m].lora.B, sent[plain].lora.B)
        assert torch.equal(started(sent[one]), started(sent[plain]))
        error = {m: truncation_error(states[plain].W, sent[m]) for m in states}
        # Of the energy, 4² + 3² + ...: what lies beyond r, and beyond 2r.
        sigma = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0]).square()
        assert error[plain] == pytest.approx(float(sigma[rank:].sum()), abs=1e-12)
        assert error[hera] == pytest.approx(float(sigma[2 * rank :].sum()), abs=1e-12)
    updates = {
        m: answers(m, s, [1, 3, 2], [0.5, 1, 2], [0.2, 0.5, 0.3], 7) for m, s in states.items()
    }
    W = {m: change(m, m.aggregate(s, updates[m])) for m, s in states.items()}
    assert float((W[hera] - W[plain]).norm()) <= rounding(updates[plain], start.delta())
    assert torch.equal(W[one], W[plain])


def test_fedhera_sends_no_more_than_there_is():
    """Of a layer of rank 7, a client of rank 5 gets all of W, one of rank 2 still misses three
    components; the ranks that may be trained stay 1 to 5."""
    method = FedHera()
    state = method.init(trained(9, 7, 5))
    state = method.aggregate(
        state, answers(method, state, [5, 4, 5], [1.0, 2.0, 3.0], [0.3, 0.3, 0.4], seed=110)
    )
    W = change(method, state)
    assert torch.linalg.matrix_rank(W) == 7
    assert float((started(method.broadcast(state, 5, 1.0)) - W).norm()) <= rounding([], W)
    assert truncation_error(W, method.broadcast(state, 2, 1.0)) > 0
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.5"):
        method.broadcast(state, 6, 1.0)
    assert method.traffic(9, 7, 2, [2]) == (4 * 16, 2 * 16)
    assert method.traffic(9, 7, 5, [5]) == (7 * 16, 5 * 16)


def test_fed_plora_differs_from_fedhl():
    """Every client starts at W itself, so its truncation error is zero; the server step is the same."""
    start = steep(9, 7, [6.0, 5.0, 4.0, 3.0, 2.0])
    plora, plain = FedPLoRA(), FedHL()
    state = plain.init(start)  # the same for both
    for rank in (1, 3, 5):
        sent = plora.broadcast(state, rank, 0.5)
        assert torch.equal(sent.lora.A, plain.broadcast(state, rank, 0.5).lora.A)
        assert truncation_error(state.W, sent) <= rounding([], state.W) ** 2
        if rank < 5:
            assert truncation_error(state.W, plain.broadcast(state, rank, 0.5)) > 1
    updates = answers(plora, state, [1, 3, 2], [0.5, 1.0, 2.0], [0.2, 0.5, 0.3], seed=120)
    one, two = (m.aggregate(state, updates).W for m in (plora, plain))
    assert torch.equal(one, two)


# Numbers on the wire, hyperparameters


@pytest.mark.parametrize(
    ("name", "down"),
    [
        ("raflora", 2 * 16),
        ("eclora", 2 * 16),
        ("florist", 63),  # (2 + 1 + 4) 16 would be more
        ("flora", 63),
        ("hlora", 2 * 16),
        ("fedhera", 4 * 16),
        ("fed_plora", 63 + 2 * 16),
    ],
)
def test_traffic(name: str, down: int):
    """For a client of rank 2 in a cohort of ranks 2, 1, 4 on a 9 x 7 layer; every reply is r (m + n)."""
    assert get_method(name).traffic(9, 7, 2, [2, 1, 4]) == (down, 2 * 16)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share(threshold: float):
    with pytest.raises(ValueError, match="threshold"):
        FLoRIST(threshold)


@pytest.mark.parametrize("download", [0, -1, 1.5])
def test_a_download_that_is_no_factor(download: Any):
    with pytest.raises(ValueError, match="download"):
        FedHera(download)


@pytest.mark.parametrize(
    "name", ["raflora", "eclora", "flora", "florist", "hlora", "fedhera", "fed_plora"]
)
def test_a_top_rank_beyond_the_layer_is_refused(name: str):
    with pytest.raises(ValueError, match="<= 5"):
        get_method(name).init(LoRA(torch.zeros(6, 5), torch.zeros(9, 6), 1.0))
