"""Every row goes to exactly one client, the same one for the same seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from fedhl.data.partition import Partition, by_column, dirichlet, iid, partition_table
from fedhl.errors import UserError

seeds = st.integers(0, 2**32 - 1)


def assert_covers(partition: Partition, n: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(list(partition.values()))), np.arange(n))
    for rows in partition.values():
        assert len(rows) and rows.dtype == np.int64 and np.all(np.diff(rows) > 0)
    assert list(partition) == sorted(partition)


def same(left: Partition, right: Partition) -> bool:
    return list(left) == list(right) and all(np.array_equal(left[k], right[k]) for k in left)


@given(st.integers(1, 60), st.integers(0, 200), seeds)
def test_iid(clients: int, extra: int, seed: int) -> None:
    n = clients + extra
    partition = iid(n, clients, seed)
    assert_covers(partition, n)
    sizes = [len(rows) for rows in partition.values()]
    assert len(sizes) == clients and max(sizes) - min(sizes) <= 1
    assert same(partition, iid(n, clients, seed))


@given(
    st.lists(st.sampled_from(["a", "b", "c", 4]), min_size=1, max_size=150),
    st.integers(1, 12),
    st.sampled_from([0.1, 1.0, 100.0]),
    st.integers(1, 3),
    seeds,
)
def test_dirichlet(
    labels: list[Any], clients: int, alpha: float, min_examples: int, seed: int
) -> None:
    assume(len(labels) >= clients * min_examples)
    try:
        partition = dirichlet(labels, clients, alpha, seed, min_examples)
    except UserError as error:  # a split that hardly any draw gives: refused, never an empty client
        assert f"alpha {alpha:g}" in str(error)
        return
    assert_covers(partition, len(labels))
    assert len(partition) == clients
    assert min(len(rows) for rows in partition.values()) >= min_examples
    assert same(partition, dirichlet(labels, clients, alpha, seed, min_examples))


def test_seeds_differ() -> None:
    labels = ["a", "b"] * 100
    assert not same(iid(200, 4, 0), iid(200, 4, 1))
    assert not same(dirichlet(labels, 4, 1.0, 0), dirichlet(labels, 4, 1.0, 1))


def test_alpha_is_the_skew() -> None:
    labels = np.repeat([0, 1, 2, 3], 500)

    def mean_top_share(alpha: float) -> float:
        parts = dirichlet(list(labels), 10, alpha, seed=0).values()
        return float(np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in parts]))

    assert mean_top_share(0.1) > 0.7
    assert mean_top_share(1000.0) < 0.3


def test_names_sort_as_numbers() -> None:
    assert list(iid(20, 10, 0)) == [f"client-{i}" for i in range(10)]
    names = list(iid(101, 101, 0))
    assert names[0] == "client-000" and names[-1] == "client-100"
    assert names == sorted(names)


def test_dirichlet_that_cannot_work_names_the_smallest_client() -> None:
    with pytest.raises(UserError, match=r"alpha 0\.001 .*'client-\d\d' has 0.*raise alpha"):
        dirichlet(["a", "b"] * 100, clients=50, alpha=0.001, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid(3, 4, 0), "3 rows cannot give 4 clients 1"),
        (lambda: iid(3, 0, 0), "number of clients is 0"),
        (lambda: dirichlet(["a"] * 9, 2, 1.0, 0, min_examples=5), "9 rows cannot give 2 clients 5"),
        (lambda: dirichlet(["a"] * 9, 2, 1.0, 0, min_examples=0), "min_examples is 0"),
        (lambda: dirichlet(["a"] * 9, 2, 0.0, 0), "alpha is 0"),
        (lambda: dirichlet(["a"] * 9, 2, float("nan"), 0), "alpha is nan"),
        (lambda: by_column([]), "no rows"),
        (lambda: by_column(["a", None]), "row 1 .* names no client"),
        (lambda: by_column(["a", "b\x1b[31m"]), "row 1 .* the client .* control character"),
        (lambda: partition_table({"a": np.array([], dtype=np.int64)}), "client 'a' has no rows"),
    ],
)
def test_bad_settings(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_by_column(values: list[int]) -> None:
    partition = by_column(values)
    assert_covers(partition, len(values))
    assert set(partition) == {str(value) for value in values}
    for name, rows in partition.items():
        assert {str(values[row]) for row in rows} == {name}


def rendered(partition: Mapping[str, Any], labels: Sequence[Any] | None = None) -> list[list[str]]:
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(partition_table(partition, labels))
    lines = capture.get().replace("│", " ").replace("┃", " ").splitlines()
    return [line.split() for line in lines if any(map(str.isalnum, line)) or "..." in line]


def test_table_counts_labels() -> None:
    table = rendered({"imdb": np.array([0, 1, 3]), "rt": np.array([2])}, [0, 1, 1, 0])
    assert table == [
        ["2", "clients,", "4", "examples"],
        ["client", "examples", "0", "1"],
        ["imdb", "3", "2", "1"],
        ["rt", "1", "0", "1"],
    ]
    assert rendered({"[b]a": np.array([0])})[1:] == [["client", "examples"], ["[b]a", "1"]]


def test_table_of_many_labels_and_clients() -> None:
    labels = [f"label{i % 9}" for i in range(90)]
    table = rendered({"a": np.array([0, 9, 1]), "b": np.array([2])}, labels)
    assert table[1] == ["client", "examples", "labels", "top", "label", "share"]
    assert table[2:] == [["a", "3", "2", "label0", "67%"], ["b", "1", "1", "label2", "100%"]]
    table = rendered(iid(100, 40, 0), labels + labels)
    assert [row[0] for row in table[2:]] == [
        *(f"client-0{i}" for i in range(10)),
        "...",
        "client-37",
        "client-38",
        "client-39",
        "min",
    ]
    assert table[-1][-5:] == ["2", "/", "2.5", "/", "3"]
