"""The leading singular triplets: optimal within the stated tolerance at every rank, on any spectrum."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fedhl import subspace
from fedhl.seeds import generator
from fedhl.subspace import Leading, energy, full, iterate, leading

TOLERANCE, FLOOR = 1e-3, 1e-12
"""What `leading` promises, in its own words: not what the module has, which is under test."""
RANK = 24
J = torch.arange(1, 201, dtype=torch.float64)
SPECTRA = {
    "fast": 2 ** (-J / 2),  # beyond what float32 resolves within RANK
    "faster": 2**-J,
    "1/j^2": J**-2,
    "1/j": 1 / J,
    "slow": J**-0.5,
    "slower": J**-0.1,
    "low rank": (J <= 10).double(),
    "rank 1": (J <= 1).double(),
    "a step inside": torch.where(J <= 20, 1.0, 1e-3).double(),
    "a step outside": torch.where(J <= 40, 1.0, 1e-3).double(),
    "constant": torch.ones(200, dtype=torch.float64),
}


@cache  # most matrices here have the same singular vectors
def orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    draw = torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(draw).Q


def matrix(name: str, m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of this spectrum, or of Gaussian numbers."""
    if name == "gaussian":
        return torch.randn(m, n, generator=generator(3), dtype=torch.float64).to(dtype)
    return with_spectrum(SPECTRA[name], m, n).to(dtype)


def with_spectrum(sigma: Tensor, m: int, n: int, left: int = 1, right: int = 2) -> Tensor:
    """`U diag(sigma) Vᵀ` (m, n) in float64, U and V drawn with the seeds `left` and `right`."""
    return orthogonal(m, len(sigma), left) * sigma @ orthogonal(n, len(sigma), right).T


def check(found: Leading, W: Tensor, rank: int) -> None:
    """Every prefix against Eckart and Young, from the float64 SVD of the same W."""
    sigma2 = torch.linalg.svdvals(W.double()).square()
    B, A = found.B.double(), found.A.double()
    assert (B.shape, A.shape) == ((W.shape[0], rank), (rank, W.shape[1]))
    for r in range(1, rank + 1):
        got = float((W.double() - B[:, :r] @ A[:r]).square().sum())
        best = float(sigma2[r:].sum())
        assert got <= best + max(TOLERANCE * best, FLOOR * float(sigma2.sum())), r
    whole = float((W.double() - B @ A).square().sum())
    assert found.tail == pytest.approx(whole, rel=1e-5, abs=FLOOR * float(sigma2.sum()))
    # rows of A orthonormal, columns of B orthogonal and falling, to the rounding of W's own numbers:
    # each comes of a rotation of some 2 rank others
    rounding = 2 * RANK * torch.finfo(W.dtype).eps
    assert float((A @ A.T - torch.eye(rank)).abs().max()) <= rounding
    lengths = B.norm(dim=0)
    assert bool((lengths[:-1] >= lengths[1:] - rounding * lengths[0]).all())
    between = B.T @ B - torch.diag(lengths.square())
    assert float(between.abs().max()) <= rounding * float(sigma2.sum())


@pytest.mark.parametrize("start", ["cold", "warm", "wrong", "of another rank"])
@pytest.mark.parametrize("shape", [(230, 200), (200, 310)])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "gaussian"])
def test_every_prefix_is_optimal(spectrum: str, shape: tuple[int, int], start: str) -> None:
    W = matrix(spectrum, *shape)
    starts = {
        "cold": lambda: None,
        "warm": lambda: iterate(W + 0.01 * matrix("slow", *shape), RANK, None),
        "wrong": lambda: Leading(torch.empty(0), orthogonal(shape[1], RANK, 9).T.float(), 0.0),
        "of another rank": lambda: Leading(
            torch.empty(0), orthogonal(shape[1], 5, 9).T.float(), 0.0
        ),
    }
    given_rows = starts[start]()
    found = iterate(W, RANK, None if given_rows is None else given_rows.A)
    assert found is not None, "it did not settle"
    check(found, W, RANK)


@given(
    m=st.integers(8, 160),
    n=st.integers(8, 160),
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
)
@example(m=9, n=27, seed=403, share=1.0)  # rank 2: the tail was 1% too large with four columns
def test_any_shape_and_rank(m: int, n: int, seed: int, share: float) -> None:
    rank = 1 + round(share * (min(m, n) // 4 - 1))
    W = torch.randn(m, n, generator=generator(seed))
    # A few do not settle: then there is a full SVD, as in `leading`.
    check(iterate(W, rank, None) or full(W, rank), W, rank)


# Neighbours on a plateau are told apart slowly, and where it ends the tail is small, so that it matters.
@pytest.mark.parametrize("slope", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_neighbours_on_a_plateau_are_told_apart(rank: int, slope: float) -> None:
    n = 160
    for seed in range(12):
        length = 2 * rank + 4 * seed
        sigma = torch.where(J[:n] <= length, 1 - slope * J[:n] / length, 1e-3)
        W = with_spectrum(sigma, n, n, seed, 100 + seed).float()
        check(iterate(W, rank, None) or full(W, rank), W, rank)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("power", [0.1, 0.3, 1.0])
def test_what_the_start_hides_is_found(rank: int, power: float) -> None:
    """A start that is converged, but for one leading direction to which all of it is orthogonal."""
    n = 530
    W = with_spectrum(torch.arange(1, n + 1, dtype=torch.float64) ** -power, n, n).float()
    right = orthogonal(n, n, 2)
    for missing in {0, rank // 2, rank - 1}:
        start = right.T[[j for j in range(rank + 1) if j != missing]].float()
        found = iterate(W, rank, start)
        assert found is not None
        check(found, W, rank)


def test_several_that_the_start_hides_do_not_add_up() -> None:
    """A converged start whose residuals are zero, orthogonal to the 8 leading directions. Each of these
    is within what the tail may be too large by, or nearly; together they are not, and among 150 others
    on a plateau the random columns have found none of them at first."""
    n, rank = 160, 8
    sigma = torch.where(J[:n] <= 150, 0.9, 1e-3)
    sigma[rank : 2 * rank] = 0.96
    sigma[:rank] = 1
    W = with_spectrum(sigma, n, n).float()
    found = iterate(W, rank, orthogonal(n, n, 2).T[rank : 2 * rank].float())
    assert found is not None
    check(found, W, rank)


@pytest.mark.parametrize("level", [2e-6, 3e-6, 4e-6])
def test_a_tail_that_is_just_above_the_floor_is_told_apart(level: float) -> None:
    """One large singular value, and beside it others whose squares are some `1e-12 ||W||²` each: a floor
    of ten times as much would leave them as the random columns found them."""
    sigma = torch.cat([torch.ones(1), level * J[:199] ** -0.05])
    W = with_spectrum(sigma, 230, 200).float()
    found = iterate(W, 4, None)
    assert found is not None, "a floor below the rounding of float32 would never be reached"
    check(found, W, 4)


@pytest.mark.parametrize("shape", [(500, 400), (560, 530)])
def test_a_full_svd_is_good_to_its_own_rounding(shape: tuple[int, int]) -> None:
    """A constant matrix is the worst: n rounding errors of one sign in every sum, each of `eps` at most.
    Its products in float32 are so far off that the iteration does not settle, however large it is."""
    W = torch.ones(shape)
    B, A, tail = leading(W, 4)
    assert torch.equal(B, full(W, 4).B)
    whole = float(shape[0] * shape[1])  # all of it in the first component
    bound = (max(shape) * torch.finfo(torch.float32).eps) ** 2 * whole
    assert float((W.double() - B.double() @ A.double()).square().sum()) <= bound
    assert tail <= bound


def test_a_new_direction_is_found_from_an_old_subspace() -> None:
    """What the last round knew nothing of, and what is orthogonal to all it knew."""
    old = matrix("1/j", 300, 250)
    known = iterate(old, RANK, None)
    assert known is not None
    u, v = orthogonal(300, 300, 1)[:, 250:251], orthogonal(250, 250, 2)[:, 240:241]
    for size in (0.03, 0.3, 3.0):
        W = old + size * (u @ v.T).float()
        found = iterate(W, RANK, known.A)
        assert found is not None
        check(found, W, RANK)


@pytest.mark.parametrize("exact", [False, True])
def test_small_and_exact_are_the_full_svd(exact: bool) -> None:
    W = matrix("slow", 560, 530) if exact else matrix("slow", 300, 200)
    found = leading(W, RANK, exact=exact)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    assert torch.equal(found.A, Vt[:RANK]) and torch.equal(found.B, U[:, :RANK] * S[:RANK])
    check(found, W, RANK)


def test_large_ones_are_not_but_agree_with_it() -> None:
    W = matrix("slow", 560, 530)
    fast, exact = leading(W, RANK), leading(W, RANK, exact=True)
    assert not torch.equal(fast.A, exact.A)
    check(fast, W, RANK)
    assert fast.tail == pytest.approx(exact.tail, rel=TOLERANCE)


def test_what_does_not_settle_is_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix("gaussian", 560, 530)
    monkeypatch.setattr(subspace, "LIMIT", 2)
    assert iterate(W, RANK, None) is None
    assert torch.equal(leading(W, RANK).A, leading(W, RANK, exact=True).A)


def test_the_same_matrix_gives_the_same_bits() -> None:
    W = matrix("slow", 560, 530)
    one = leading(W, RANK)
    torch.rand(1)  # whatever the global random state is
    two = leading(W, RANK)
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B) and one.tail == two.tail


def test_a_float64_matrix_is_resolved_as_such() -> None:
    W = matrix("faster", 230, 200, torch.float64)
    found = iterate(W, RANK, None)
    assert found is not None and found.A.dtype == torch.float64
    check(found, W, RANK)


@pytest.mark.parametrize("rank", [0, 201])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.200 for a 230 x 200 layer"):
        leading(matrix("slow", 230, 200), rank)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_energy_is_that_of_float64(rows: int) -> None:
    W = torch.randn(rows, 31, generator=generator(rows)) * 1e3
    assert energy(W) == pytest.approx(float(W.double().square().sum()), rel=1e-14)
