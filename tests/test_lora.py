"""The LoRA algebra against dense float64, and the seeds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedhl import LoRA, dense
from fedhl.lora import (
    add_products,
    concat,
    initial,
    own,
    pad,
    prefix,
    refill,
    squared_norm,
    svd,
    trainable_truncation,
    truncate,
    working,
)
from fedhl.seeds import derive, generator

EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

dims = st.integers(1, 9)
scales = st.floats(0.01, 100.0)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draw", *shape), dtype=torch.float64)


def lora(seed: int, m: int, n: int, r: int, scale: float = 1.0) -> LoRA:
    return LoRA(draw(seed, r, n), draw(seed + 1, m, r), scale)


def close(x: Tensor, y: Tensor, size: float, eps: float = EPS64) -> bool:
    """Equal up to rounding: products and SVDs of matrices with sides below 100, of magnitude `size`."""
    return float((x - y).norm()) <= 400 * eps * size


def size(x: LoRA) -> float:
    return x.scale * float(x.A.norm() * x.B.norm())


# The value


def test_delta_rank_and_shape():
    x = LoRA(A=torch.tensor([[1.0, 2.0, 3.0]]), B=torch.tensor([[1.0], [10.0]]), scale=0.5)
    assert (x.rank, x.shape) == (1, (2, 3))
    assert x.delta().tolist() == [[0.5, 1.0, 1.5], [5.0, 10.0, 15.0]]


@pytest.mark.parametrize(
    ("A", "B"), [((3, 5), (7, 2)), ((5, 3), (7, 3)), ((5,), (7, 5)), ((2, 3, 5), (7, 2))]
)
def test_factors_of_different_ranks_are_refused(A: tuple[int, ...], B: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"got A \(.*\) and B \(.*\)"):
        LoRA(torch.zeros(A), torch.zeros(B), 1.0)


def test_dense_takes_both_forms():
    x = lora(0, 4, 3, 2)
    assert torch.equal(dense(x), x.delta())
    W = draw(0, 4, 3)
    assert dense(W) is W


def test_the_server_computes_in_float32_or_better():
    kinds = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    kinds |= {torch.float32: torch.float32, torch.float64: torch.float64}
    for given_, used in kinds.items():
        assert working(torch.ones(2, dtype=given_)).dtype == used


def test_own_shares_no_memory_and_is_row_major():
    A, B = draw(0, 5, 2).T, draw(1, 2, 7).T
    x = own(LoRA(A, B, 0.5))
    assert x.A.is_contiguous() and x.B.is_contiguous() and x.scale == 0.5
    assert torch.equal(x.A, A) and torch.equal(x.B, B)
    assert x.A.data_ptr() != A.data_ptr() and x.B.data_ptr() != B.data_ptr()


# The initial adapter


def test_initial_is_as_peft_draws_it_and_reproducible():
    x = initial(m=30, n=100, rank=8, scale=2.0, seed=5)
    assert (x.rank, x.shape, x.scale) == (8, (30, 100), 2.0)
    assert not x.B.any()
    # U(-1/√n, 1/√n): bounded by 0.1, standard deviation 0.1/√3; 800 draws are within 10 % of it.
    assert float(x.A.abs().max()) <= 0.1
    assert float(x.A.std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)
    assert torch.equal(x.A, initial(30, 100, 8, 2.0, seed=5).A)
    assert not torch.equal(x.A, initial(30, 100, 8, 2.0, seed=6).A)


@pytest.mark.parametrize("rank", [-1, 0, 4])
def test_initial_refuses_a_rank_out_of_range(rank: int):
    with pytest.raises(ValueError, match=r"1\.\.3 for a 5 x 3 layer"):
        initial(5, 3, rank, 1.0, 0)


# Prefixes, padding, sums


@given(m=dims, n=dims, r=dims, scale=scales, other=scales, seed=seeds)
def test_a_prefix_is_the_same_components_in_another_scale(
    m: int, n: int, r: int, scale: float, other: float, seed: int
):
    x = lora(seed, m, n, r, scale)
    for k in range(1, r + 1):
        cut = prefix(x, k, other)
        assert (cut.rank, cut.scale) == (k, other)
        assert close(cut.delta(), scale * (x.B[:, :k] @ x.A[:k]), size(x))


@given(m=dims, n=dims, r=dims, extra=st.integers(0, 4), seed=seeds)
def test_padding_changes_the_rank_alone(m: int, n: int, r: int, extra: int, seed: int):
    x = lora(seed, m, n, r, 0.7)
    padded = pad(x, r + extra)
    assert (padded.rank, padded.scale) == (r + extra, 0.7)
    assert close(padded.delta(), x.delta(), size(x))


def test_padding_never_cuts():
    with pytest.raises(ValueError, match="rank 3 down to 2"):
        pad(lora(0, 5, 4, 3), 2)


@given(m=dims, n=dims, ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=seeds)
def test_concat_and_add_products_are_the_weighted_sum(m: int, n: int, ranks: list[int], seed: int):
    terms = [(0.3 * k - 0.5, lora(seed + k, m, n, r, 0.5 + k)) for k, r in enumerate(ranks)]
    W = draw(seed, m, n)
    total = torch.stack([w * x.delta() for w, x in terms]).sum(dim=0)
    bound = sum(abs(w) * size(x) for w, x in terms) + float(W.norm())

    stacked = concat(terms)
    assert (stacked.rank, stacked.scale) == (sum(ranks), 1.0)
    assert close(stacked.delta(), total, bound)
    assert abs(squared_norm(terms) - float(total.square().sum())) <= 400 * EPS64 * bound**2
    for block in (1, 3, 256):
        before = W.clone()
        assert close(add_products(W, terms, block), W + total, bound)
        assert torch.equal(W, before)


def test_nothing_to_concatenate_is_an_error():
    with pytest.raises(ValueError, match="nothing"):
        concat([])


def test_add_products_of_nothing_is_a_copy():
    W = draw(0, 4, 3)
    same = add_products(W, [])
    assert torch.equal(same, W) and same.data_ptr() != W.data_ptr()


def test_add_products_holds_no_more_than_a_block():
    """Terms are read one by one and let go: a server of many clients never holds them all."""
    held = 0
    most = 0

    class Counted(LoRA):
        def __del__(self) -> None:
            nonlocal held
            held -= 1

    def terms() -> Iterator[tuple[float, LoRA]]:
        nonlocal held, most
        for k in range(40):
            held += 1
            most = max(most, held)
            yield 0.1, Counted(draw(k, 2, 4), draw(k, 5, 2), 1.0)

    add_products(torch.zeros(5, 4, dtype=torch.float64), terms(), block=8)
    assert most <= 8 // 2 + 2  # a block, the term that is being made and the one just read


def test_narrow_factors_are_summed_in_float32():
    """1000 terms of 1/1000: in bfloat16 (8 bits) the sum would stop growing long before 1."""
    one = LoRA(torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(2, 1, dtype=torch.bfloat16), 1.0)
    total = add_products(torch.zeros(2, 3), [(1 / 1000, one)] * 1000)
    assert total.dtype == torch.float32
    # Worst case of a float32 sum of 1000 terms of one sign: 1000 eps.
    assert float((total - 1).abs().max()) <= 1000 * EPS32


# The SVD


@given(m=dims, n=dims, r=dims, seed=seeds)
def test_the_svd_of_an_adapter_is_that_of_its_product(m: int, n: int, r: int, seed: int):
    x = lora(seed, m, n, r, 0.6)
    U, S, Vt = svd(x)
    assert close(U * S @ Vt, x.delta(), size(x))
    exact = torch.linalg.svdvals(x.delta())
    shared = min(len(S), len(exact))
    assert close(S[:shared], exact[:shared], size(x))
    assert bool((S[:-1] >= S[1:]).all())


@given(m=dims, n=dims, seed=seeds, data=st.data())
def test_truncation_is_the_best_approximation(m: int, n: int, seed: int, data: st.DataObject):
    """Eckart-Young: what is missing is exactly the tail of the spectrum."""
    r = data.draw(st.integers(1, min(m, n)))
    W = draw(seed, m, n)
    cut = truncate(W, r)
    assert (cut.rank, cut.shape, cut.scale) == (r, (m, n), 1.0)
    tail = torch.linalg.svdvals(W)[r:].norm()
    assert close((W - cut.delta()).norm(), tail, float(W.norm()))
    assert close(cut.A @ cut.A.T, torch.eye(r, dtype=torch.float64), r)
    assert cut.A.is_contiguous() and cut.B.is_contiguous()


@pytest.mark.parametrize("form", ["adapter", "dense"])
@pytest.mark.parametrize("rank", [0, 5])
def test_truncation_refuses_a_rank_out_of_range(form: str, rank: int):
    x = lora(0, 7, 4, 2)
    with pytest.raises(ValueError, match=r"1\.\.4 for a 7 x 4 layer"):
        truncate(x if form == "adapter" else x.delta(), rank)


def test_truncating_an_adapter_never_raises_its_rank():
    x = lora(0, 7, 5, 2, 3.0)
    cut = truncate(x, 4)
    assert cut.rank == 2
    assert close(cut.delta(), x.delta(), size(x))


# Truncations of which every component can learn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9)])
@pytest.mark.parametrize("live", [1, 2, 5])
def test_surplus_components_are_refilled(m: int, n: int, live: int, dtype: torch.dtype):
    W = lora(1, m, n, live).delta().to(dtype)
    full = trainable_truncation(W, 5, seed=7)
    eps = torch.finfo(dtype).eps
    assert full.rank == 5 and full.A.dtype == full.B.dtype == dtype
    assert close(full.delta(), W, float(W.norm()), eps)  # the product is unchanged
    assert close(full.A @ full.A.T, torch.eye(5, dtype=dtype), 5, eps)  # rows stay orthonormal
    assert not full.B[:, live:].any() and bool(full.B[:, :live].any(dim=0).all())


def test_refilled_rows_follow_from_the_seed():
    W = lora(1, 9, 6, 2).delta()
    one, same, other = (trainable_truncation(W, 5, seed).A for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert torch.equal(one[:2], other[:2]) and not torch.allclose(one[2:], other[2:])


def test_a_truncation_without_surplus_is_the_plain_one():
    W = draw(3, 9, 6)
    one, two = trainable_truncation(W, 4, 0), truncate(W, 4)
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def test_noise_of_rounding_is_not_taken_for_a_component():
    """In float32 the SVD of a rank-2 product shows σ_3 of about 1e-8, not 0."""
    W = (draw(1, 50, 2) @ draw(2, 2, 40)).float()
    sigma = torch.linalg.svdvals(W)
    assert 0 < sigma[2] < 1e-5 * sigma[0]
    full = trainable_truncation(W, 6, seed=0)
    assert not full.B[:, 2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_component_is_dead_below_eight_roundings_and_no_sooner(dtype: torch.dtype):
    """What is replaced has at most `(8 eps)²` of the energy, all that follows it counted together."""
    rows = torch.linalg.qr(draw(1, 9, 4)).Q.T.to(dtype)
    columns = torch.linalg.qr(draw(2, 12, 4)).Q.to(dtype)
    limit = 8 * torch.finfo(dtype).eps
    for tail, live in (
        ((1.1, 0.0), 3),
        ((0.9, 0.0), 2),
        ((0.8, 0.8), 3),  # the two together are 1.13 of it, the last alone is not
        ((0.6, 0.6), 2),
        ((1.2, 1.1), 4),
    ):
        sigma = torch.tensor([1.0, 0.1, *(limit * x for x in tail)], dtype=dtype)
        full = refill(LoRA(rows, columns * sigma, 1.0), 4, seed=7)
        assert int(full.B.any(dim=0).sum()) == live
        assert torch.equal(full.A[:live], rows[:live])
        assert torch.equal(full.B[:, :live], (columns * sigma)[:, :live])


def test_squared_norm_is_never_negative():
    x = lora(0, 7, 5, 3)
    same = LoRA(x.A.clone(), x.B.clone(), 1.0)
    # Two equal terms of opposite sign: the Gram products cancel to rounding, of either sign.
    assert 0 <= squared_norm([(1.0, x), (-1.0, same)]) <= 400 * EPS64 * size(x) ** 2


# Seeds


def test_seeds_do_not_depend_on_the_process():
    """A resumed run draws what an uninterrupted one would have drawn, whatever PYTHONHASHSEED is."""
    code = "from fedhl.seeds import derive; print(derive(1, 'batches', 2, 'client-3'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == derive(1, "batches", 2, "client-3")


def test_every_part_of_the_path_matters():
    seeds = [derive(0), derive(1), derive(0, "a"), derive(0, "b"), derive(0, "a", 1)]
    seeds += [derive(0, "a", 2), derive(0, "a", "1"), derive(0, 1, "a"), derive(0, "a1")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_leave_the_global_state_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "x"))
    assert torch.equal(before, torch.get_rng_state())
