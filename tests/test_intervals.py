"""Intervals of shares, and which client is called the worst."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhl.federation.scores import over_clients
from fedhl.model.evaluation import Metrics
from fedhl.record import Unit
from fedhl.task.intervals import wilson

Z95 = 1.959963984540054
counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def contradicted(p: float, share: float, n: int) -> bool:
    """The score test: whether the share is further from p than 95% of the shares of n rows would be."""
    return abs(share - p) > Z95 * math.sqrt(p * (1 - p) / n)


def edge(inside: float, outside: float, share: float, n: int) -> float:
    """Where the score test begins to refuse, by bisection."""
    for _ in range(200):
        middle = (inside + outside) / 2
        if contradicted(middle, share, n):
            outside = middle
        else:
            inside = middle
    return inside


@given(counts)
def test_the_interval_has_every_p_that_the_score_test_does_not_refuse(counted: tuple[int, int]):
    k, n = counted
    low, high = wilson(k / n, n)
    assert low == pytest.approx(edge(k / n, 0.0, k / n, n), abs=1e-9)
    assert high == pytest.approx(edge(k / n, 1.0, k / n, n), abs=1e-9)


def test_it_holds_what_it_says():
    """Of all outcomes of 60 rows, 95% have an interval with p in it, on the average over p; for no p of the
    grid are they fewer than 93%."""
    n, grid = 60, [k / 200 for k in range(1, 200)]
    intervals = [wilson(k / n, n) for k in range(n + 1)]
    covered = [
        sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k, (low, high) in enumerate(intervals)
            if low <= p <= high
        )
        for p in grid
    ]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.005)
    assert min(covered) > 0.93


def test_ends_and_what_has_no_interval():
    assert wilson(0.0, 1) == (0.0, pytest.approx(Z95**2 / (1 + Z95**2)))
    assert wilson(1.0, 7) == pytest.approx((7 / (7 + Z95**2), 1.0))
    for share, n in ((1.1, 5), (-0.1, 5), (0.5, 0), (math.nan, 5)):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            wilson(share, n)


# --- the worst client ---------------------------------------------------------------------------


def client(accuracy: float, examples: int, loss: float = 0.5) -> Metrics:
    return {"loss": loss, "examples": examples, "accuracy": accuracy}


def worst(metric: str, greater: bool, unit: Unit = "share of rows", **clients: Metrics) -> str:
    found = over_clients(clients, metric, greater, unit)
    assert found["worst"] == {
        "client": found["worst"]["client"],
        **clients[found["worst"]["client"]],
    }
    return found["worst"]["client"]


def test_one_wrong_row_does_not_make_a_client_the_worst():
    unlucky, bad = client(0.0, 1), client(0.5, 100)
    assert worst("accuracy", True, unlucky=unlucky, bad=bad) == "bad"
    assert worst("accuracy", True, unlucky=client(0.0, 10), bad=bad) == "unlucky"
    # where less of it is better, it is the client whose interval begins highest
    assert worst("accuracy", False, unlucky=client(1.0, 1), bad=bad) == "bad"
    # tokens are no independent draws, and the number of rows says nothing of them
    assert worst("accuracy", True, "share", unlucky=unlucky, bad=bad) == "unlucky"
    # a loss has no interval: the mean counts, of whatever number of rows
    assert worst("loss", False, "number", a=client(0.9, 1, 2.0), b=client(0.1, 100, 1.9)) == "a"


def test_among_clients_of_the_same_number_of_rows_the_least_accurate_is_the_worst():
    shares = {f"client-{k}": client(k / 9, 9) for k in (4, 2, 7)}
    assert worst("accuracy", True, "share of rows", **shares) == "client-2"
    assert worst("accuracy", True, a=client(0.5, 4, 0.3), b=client(0.5, 4, 0.4)) == "b"


def test_nothing_is_worse_than_what_is_no_number():
    good, lost = client(0.0, 50), client(math.nan, 1)
    assert worst("accuracy", True, good=good, lost=lost) == "lost"
    assert worst("loss", False, "number", good=good, lost=client(1.0, 1, math.nan)) == "lost"
