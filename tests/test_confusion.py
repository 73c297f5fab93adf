"""Scores of classes and calibration, against slow references that count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhl.task.confusion import by_class, calibration, confusion, confusions, macro_f1

K = 4
outcomes = st.lists(
    st.tuples(st.integers(0, K - 1), st.integers(0, K - 1)), min_size=1, max_size=40
)
confident = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def apart(rows: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [a for a, _ in rows], [b for _, b in rows]


def counted(rows: list[tuple[int, int]], k: int) -> tuple[int, int, int]:
    """Rows of class k that were found, that were missed, and others that were taken for it."""
    found = [row for row in rows if row == (k, k)]
    missed = [row for row in rows if row[0] == k and row[1] != k]
    wrong = [row for row in rows if row[0] != k and row[1] == k]
    return len(found), len(missed), len(wrong)


@given(outcomes)
def test_scores_of_classes(rows: list[tuple[int, int]]):
    C = confusion(*apart(rows), K)
    assert int(C.sum()) == len(rows)
    scores = by_class(C)
    harmonic: list[float] = []
    for k, score in enumerate(scores):
        found, missed, wrong = counted(rows, k)
        assert score.rows == found + missed
        assert score.precision == (found / (found + wrong) if found + wrong else None)
        assert score.recall == (found / (found + missed) if found + missed else None)
        if found:
            assert score.precision and score.recall
            harmonic.append(2 / (1 / score.precision + 1 / score.recall))
        elif missed or wrong:
            harmonic.append(0.0)
        assert score.f1 == (pytest.approx(harmonic[-1]) if found + missed + wrong else None)
    assert macro_f1(scores) == pytest.approx(sum(harmonic) / len(harmonic))


@given(outcomes)
def test_confusions_are_the_wrong_rows_the_most_frequent_first(rows: list[tuple[int, int]]):
    pairs = confusions(confusion(*apart(rows), K))
    assert {(i, j): n for i, j, n in pairs} == {
        row: rows.count(row) for row in rows if row[0] != row[1]
    }
    assert [n for _, _, n in pairs] == sorted((n for _, _, n in pairs), reverse=True)


def binned(rows: list[tuple[float, bool]], bins: int) -> float:
    """The expected calibration error in exact fractions, bin by bin."""
    total = Fraction(0)
    for m in range(1, bins + 1):
        low, high = Fraction(m - 1, bins), Fraction(m, bins)
        inside = [
            (Fraction(p), hit) for p, hit in rows if low < Fraction(p) <= high or p == m - 1 == 0
        ]
        if inside:
            accuracy = Fraction(sum(hit for _, hit in inside), len(inside))
            confidence = sum(p for p, _ in inside) / len(inside)
            total += Fraction(len(inside), len(rows)) * abs(accuracy - confidence)
    return float(total)


@given(confident, st.sampled_from([1, 8, 16]))  # powers of two, whose edges floats have exactly
def test_the_expected_calibration_error(rows: list[tuple[float, bool]], bins: int):
    found = calibration(*apart(rows), bins)
    assert found.error == pytest.approx(binned(rows, bins), abs=1e-12)
    assert found.confidence == pytest.approx(math.fsum(p for p, _ in rows) / len(rows))
    assert found.accuracy == sum(hit for _, hit in rows) / len(rows)


def test_fifteen_bins_and_what_cannot_be_binned():
    """One row in the middle of each bin, every third right: gaps do not cancel between bins."""
    rows = [((m - 0.5) / 15, m % 3 == 0) for m in range(1, 16)]
    assert calibration(*apart(rows)).error == pytest.approx(binned(rows, 15))
    assert calibration([0.8] * 10, [True] * 8 + [False] * 2).error == pytest.approx(0)
    assert calibration([0.8, 0.3], [False, True]).error == pytest.approx(0.75)
    for confidence in ([], [1.1], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match="confidences between 0 and 1"):
            calibration(confidence, [True] * len(confidence))
    with pytest.raises(ValueError, match="no class has a row"):
        macro_f1(by_class(confusion([], [], 3)))
