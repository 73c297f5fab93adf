"""Each diagnostic against its definition, written densely in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.reference import dense as reference
from torch import Tensor

from fedhl import METHODS, get_method
from fedhl.lora import LoRA, initial
from fedhl.method import Broadcast, Truncating, Update
from fedhl.seeds import generator
from fedhl.server import diagnostics
from fedhl.server.diagnostics import Spectrum

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
TOP = 6


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, *shape), dtype=dtype)


def lora(seed: int, m: int, n: int, rank: int, scale: float) -> LoRA:
    return LoRA(draw(seed, rank, n), draw(seed + 1, m, rank), scale)


def exact(x: LoRA) -> Tensor:
    return x.scale * x.B.double() @ x.A.double()


def norm(x: Tensor) -> float:
    return float(x.norm())


def size(updates: list[Update]) -> float:
    """What rounding errors of a weighted sum of the updates are relative to."""
    return sum(
        u.weight * x.scale * norm(x.A) * norm(x.B) for u in updates for x in (u.lora, u.sent.lora)
    )


@st.composite
def cohorts(draw: st.DrawFn) -> list[Update]:
    m, n = draw(st.integers(TOP, 12)), draw(st.integers(TOP, 12))
    ranks = draw(st.lists(st.integers(1, TOP), min_size=1, max_size=5))
    raw = [draw(st.floats(0.01, 1)) for _ in ranks]
    seed = draw(st.integers(0, 10**6))
    updates = []
    for k, rank in enumerate(ranks):
        scale = draw(st.floats(0.1, 8))
        sent = Broadcast(lora(seed + 10 * k, m, n, rank, scale))
        trained = lora(seed + 10 * k + 5, m, n, rank, scale)
        updates.append(Update(sent, trained, raw[k] / sum(raw)))
    return updates


# Per client


@pytest.mark.parametrize("method", ["fedhl", "flexlora"])
@pytest.mark.parametrize("shape", [(13, 9), (9, 13)])
def test_truncation_error_is_the_tail_of_the_spectrum(method: str, shape: tuple[int, int]) -> None:
    """The sent factors are float32: they are off by some δ with ||δ|| <= c ε ||W||, and
    `| ||R + δ||² - ||R||² | <= 2 ||R|| ||δ|| + ||δ||²`; c = 10 covers a backward-stable SVD this small.
    """
    rule: Any = get_method(method)
    state = rule.init(initial(*shape, TOP, 1.0, seed=0))
    whole = LoRA(draw(1, min(shape), shape[1]), draw(2, shape[0], min(shape)), 0.5)
    state = rule.aggregate(state, [Update(rule.broadcast(state, TOP, 1.0), whole, 1.0)])
    W = rule.delta(state)
    sigma = torch.linalg.svdvals(W.double())
    off = 10 * EPS32 * norm(W)
    for rank in range(1, TOP + 1):
        for scale in (0.3, 1.0, 7.0):
            got = diagnostics.truncation_error(W, rule.broadcast(state, rank, scale))
            want = float(sigma[rank:].square().sum())
            assert abs(got - want) <= 2 * want**0.5 * off + off**2


@pytest.mark.parametrize("side", [9, 530], ids=["exact", "iterated"])
@pytest.mark.parametrize("method", [n for n, x in METHODS.items() if isinstance(x, Truncating)])
def test_what_methods_say_is_lost_is_what_the_dense_difference_says(method: str, side: int) -> None:
    """`tail + Σ σ_j²` against `||W - base - ΔW(sent)||²`, at every rank, before and after learning."""
    rule: Any = get_method(method)
    top = 4
    state = rule.init(initial(side + 3, side, top, 1.0, seed=0))
    whole = LoRA(draw(1, 8, side), draw(2, side + 3, 8), 0.5)
    for _ in range(2):
        W = rule.delta(state)
        for rank in range(1, top + 1):
            want = diagnostics.truncation_error(W, rule.broadcast(state, rank, 2.0))
            off = 10 * EPS32 * norm(W)  # as above
            assert abs(rule.lost(state, rank) - want) <= 2 * want**0.5 * off + off**2
        state = rule.aggregate(state, [Update(rule.broadcast(state, top, 1.0), whole, 1.0)])


def test_truncation_error_near_zero_does_not_cancel() -> None:
    """||W||² - ||T(W)||² of a W of norm 100 is good to about 1e-3 in float32; the tail here is 1e-8."""
    U, V = torch.linalg.qr(draw(0, 8, 8)).Q, torch.linalg.qr(draw(1, 8, 8)).Q
    head = LoRA(V[:2], U[:, :2] * 100, 1.0)
    tail = 1e-4 * U[:, 2:3] @ V[2:3]
    W = exact(head) + tail.double()
    got = diagnostics.truncation_error(W, Broadcast(head))
    assert got == pytest.approx(float(tail.double().square().sum()), rel=1e-6)
    rounding = 4 * EPS64 * norm(W)
    assert diagnostics.truncation_error(W, Broadcast(head, base=tail)) <= rounding**2


def test_truncation_error_counts_the_base() -> None:
    W, base, sent = draw(0, 7, 9), draw(1, 7, 9), lora(2, 7, 9, 3, 1.5)
    want = (W.double() - base.double() - exact(sent)).square().sum()
    assert diagnostics.truncation_error(W, Broadcast(sent, base)) == pytest.approx(float(want))


@given(cohorts())
def test_moved(updates: list[Update]) -> None:
    """Through Gram matrices in float64; `s B` alone is rounded to float32."""
    for u in updates:
        want = float((exact(u.lora) - exact(u.sent.lora)).square().sum())
        bound = 4 * EPS32 * (size([u]) / u.weight) ** 2
        assert diagnostics.moved(u) == pytest.approx(want, abs=bound)
        assert diagnostics.moved(Update(u.sent, u.sent.lora, u.weight)) <= bound


# Per layer


@given(st.integers(0, 10**6), st.integers(1, 7), st.floats(1e-3, 1))
def test_step(seed: int, rank: int, far: float) -> None:
    """Of adapters, dense matrices and one of each; also of a step that is short beside W."""
    before = lora(seed, 9, 7, rank, 1.5)
    moved = lora(seed + 5, 9, 7, rank, 1.5)
    after = LoRA(before.A + far * moved.A, before.B + far * moved.B, 1.5)
    want = float((exact(after) - exact(before)).square().sum())
    off = 10 * EPS32 * sum(x.scale * norm(x.A) * norm(x.B) for x in (before, after))
    for b, a in ((before, after), (before.delta(), after.delta()), (before.delta(), after)):
        assert abs(diagnostics.step(b, a) - want) <= 2 * want**0.5 * off + off**2
        assert diagnostics.step(a, b) == pytest.approx(diagnostics.step(b, a))


@given(cohorts(), st.sampled_from(["fedhl", "flexlora"]))
def test_aggregation_error(updates: list[Update], name: str) -> None:
    """0 to rounding for FedHL; `||Σ p_i (W - T_{r_i}(W))||_F` for FlexLoRA: all that truncation took."""
    rule: Any = get_method(name)
    m, n = updates[0].lora.shape
    state = rule.init(initial(m, n, TOP, 1.0, seed=0))
    whole = LoRA(draw(1, min(m, n), n), draw(2, m, min(m, n)), 1.0)
    state = rule.aggregate(state, [Update(rule.broadcast(state, TOP, 1.0), whole, 1.0)])
    W = rule.delta(state)
    answers = [
        Update(rule.broadcast(state, u.lora.rank, u.lora.scale), u.lora, u.weight) for u in updates
    ]
    after = rule.aggregate(state, answers)
    products = diagnostics.of_products(answers)
    got = diagnostics.aggregation_error(W, rule.delta(after), answers, products) ** 0.5
    lost = sum(u.weight * (W.double() - reference.truncation(W, u.lora.rank)) for u in answers)
    want = 0.0 if name == "fedhl" else norm(torch.as_tensor(lost))
    # float32 sums of inner size up to 5 x 6 on both sides, and a float32 SVD
    assert got == pytest.approx(want, abs=30 * EPS32 * (norm(W) + size(answers)))


@given(cohorts(), st.integers(1, 40))
def test_what_was_sent_is_taken_once_however_little_is_held(
    updates: list[Update], most: int
) -> None:
    """Two clients were sent each of the broadcasts; before more than `most` components of these are held,
    they are given away, and counted no second time."""
    twice = [u for u in updates for _ in range(2)]
    read, waiting, total = 0, 0, torch.zeros(updates[0].lora.shape, dtype=torch.float64)

    def counted() -> Iterator[Update]:
        nonlocal read, waiting
        for u in twice:
            assert waiting <= most
            read += 1
            waiting += u.sent.lora.rank * (read % 2)  # its twin adds nothing
            yield u

    for weight, sent in diagnostics.remaining_terms(counted(), most):
        waiting = 0
        total += weight * exact(sent)
    want = torch.stack([u.weight * exact(u.sent.lora) for u in twice]).sum(0)
    assert norm(total + want) <= 4 * EPS64 * size(twice) * len(twice)


@given(cohorts())
def test_product_gap(updates: list[Update]) -> None:
    p = [u.weight for u in updates]
    m, n = updates[0].lora.shape
    products = torch.stack([w * exact(u.lora) for w, u in zip(p, updates, strict=True)]).sum(0)
    A, B = torch.zeros(TOP, n, dtype=torch.float64), torch.zeros(m, TOP, dtype=torch.float64)
    for u in updates:
        A[: u.lora.rank] += u.weight * u.lora.A.double()
        B[:, : u.lora.rank] += u.weight * u.lora.scale * u.lora.B.double()
    want = norm(products - B @ A)
    # both sums are formed in float32, of inner size up to 5 x 6
    assert gap(updates) == pytest.approx(want, abs=30 * EPS32 * size(updates))


def gap(updates: list[Update]) -> float:
    return diagnostics.product_gap(updates, diagnostics.of_products(updates)) ** 0.5


def test_equal_factors_have_no_gap() -> None:
    """With one A for all, the product of means is the mean of products (why FFA-LoRA freezes A)."""
    A = draw(0, 3, 9)
    updates = [
        Update(Broadcast(LoRA(A, draw(k, 7, 3), 2.0)), LoRA(A, draw(k + 10, 7, 3), 2.0), 0.25)
        for k in range(4)
    ]
    assert gap(updates) <= 30 * EPS32 * size(updates)
    assert gap(updates[:1]) > 0.1 * size(updates[:1]), "weights that do not sum to 1 do leave one"


def test_the_gap_puts_components_where_the_server_has_them() -> None:
    """Two clients with different components of one adapter have no component in common."""
    sent = [LoRA(draw(k, 2, 9), draw(k + 10, 7, 2), 2.0) for k in range(2)]
    updates = [
        Update(Broadcast(x, index=torch.tensor(index)), x, 0.5)
        for x, index in zip(sent, ([0, 3], [1, 2]), strict=True)
    ]
    # no cross terms: each product of means is a quarter of the client's own, the mean is a half
    want = norm(sum(0.25 * exact(x) for x in sent))  # type: ignore[arg-type]
    assert gap(updates) == pytest.approx(want, abs=30 * EPS32 * size(updates))


# Spectra


@pytest.mark.parametrize("shape", [(13, 9), (9, 13)])
def test_spectrum_of_a_tensor_and_of_factors(shape: tuple[int, int]) -> None:
    x = lora(0, *shape, 4, 1.7)
    want = torch.linalg.svdvals(exact(x))
    off = 10 * EPS32 * float(want[0])  # backward-stable SVDs of float32 numbers
    for delta, count in ((x, 4), (x.delta(), 9)):
        s = diagnostics.spectrum(delta)
        assert s.sigma.dtype == torch.float64 and len(s.sigma) == count
        torch.testing.assert_close(s.sigma, want[:count], rtol=0, atol=off)
        assert s.energy == pytest.approx(float(exact(x).square().sum()), rel=20 * EPS32)
        assert s.tail_share(4) == pytest.approx(0, abs=9 * off**2 / s.energy)
        tail = float(want[2:].square().sum() / want.square().sum())
        assert s.tail_share(2) == pytest.approx(tail, abs=20 * EPS32)
        assert s.tail_share(0) == pytest.approx(1) and s.tail_share(99) == 0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_effective_rank_of_equal_singular_values_is_their_number(k: int) -> None:
    sigma = torch.cat([torch.full((k,), 3.0), torch.zeros(4)]).double()
    assert Spectrum(sigma).effective_rank == pytest.approx(k, rel=1e-14)


def test_effective_rank_by_hand() -> None:
    """Shares 0.8 and 0.2 of the energy: exp(-0.8 ln 0.8 - 0.2 ln 0.2)."""
    want = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert Spectrum(torch.tensor([2.0, 1.0]).double()).effective_rank == pytest.approx(want)


def test_spectrum_of_zero() -> None:
    s = diagnostics.spectrum(torch.zeros(4, 3))
    assert (s.energy, s.tail_share(1), s.effective_rank) == (0, 0, 0)
    total = diagnostics.summarise_spectra({"a": s}, 2)
    assert (total["energy"], total["tail_share"], total["effective_rank"]) == (0, 0, 0)
    assert total["spectrum"] == [0, 0, 0]


def test_spectra_over_layers() -> None:
    sigmas = {
        "a": torch.tensor([4.0, 2.0, 1.0]).double(),
        "b": torch.tensor([3.0, 0.5]).double(),
    }
    total = diagnostics.summarise_spectra({n: Spectrum(s) for n, s in sigmas.items()}, 2, shown=1)
    assert total["spectrum"] == pytest.approx([5, math.hypot(2, 0.5), 1])
    assert total["energy"] == pytest.approx(21 + 9.25)
    assert total["tail_share"] == pytest.approx(1 / 30.25)
    ranks = [Spectrum(s).effective_rank for s in sigmas.values()]
    assert total["effective_rank"] == pytest.approx(sum(ranks) / 2)
    assert list(total["layers"]) == ["a", "b"]
    assert total["layers"]["a"] == {
        "energy": pytest.approx(21),
        "tail_share": pytest.approx(1 / 21),
        "effective_rank": pytest.approx(ranks[0]),
        "singular_values": [4.0],
    }


def test_the_overall_spectrum_goes_a_little_beyond_the_top_rank() -> None:
    long = Spectrum(torch.linspace(1, 0.01, 200).double())
    for rank, width in ((4, 12), (64, 80)):
        total = diagnostics.summarise_spectra({"a": long}, rank)
        assert total["spectrum"] == pytest.approx(long.sigma[:width].tolist())


# Weights


def test_weights_by_hand() -> None:
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    error = torch.tensor([0.4, 0.8, 0.0], dtype=torch.float64)
    got = diagnostics.summarise_weights(p, q, error)
    assert got == {
        "effective_clients": pytest.approx(1 / (0.25 + 0.0625 + 0.0625)),
        "chi2": pytest.approx(0.0625 / 0.25 + 0 + 0.0625 / 0.5),
        "weighted_error": pytest.approx(0.25 * 0.4 + 0.0625 * 0.8),
    }


def test_weights_at_the_extremes() -> None:
    equal = torch.full((8,), 1 / 8, dtype=torch.float64)
    error = torch.ones(8, dtype=torch.float64)
    assert diagnostics.summarise_weights(equal, equal, error)["effective_clients"] == 8
    assert diagnostics.summarise_weights(equal, equal, error)["chi2"] == 0
    one = torch.eye(8, dtype=torch.float64)[0]
    got = diagnostics.summarise_weights(one, equal, error)
    assert (got["effective_clients"], got["weighted_error"]) == (1, 1)
    # Σ p²/q - 1: all weight on one of eight equal clients
    assert got["chi2"] == pytest.approx(7)
    assert diagnostics.summarise_weights(one, one, error)["chi2"] == 0, "clients without data: out"
