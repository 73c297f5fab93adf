"""Which classes are taken for which, and whether the probabilities of a classifier are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 15
"""The bins of Guo et al. 2017."""


def confusion(classes: Sequence[int], predicted: Sequence[int], count: int) -> NDArray[np.int64]:
    """C, (count, count): `C[i, j]` rows of class i were taken for class j."""
    C = np.zeros((count, count), dtype=np.int64)
    np.add.at(C, (list(classes), list(predicted)), 1)
    return C


class OfClass(NamedTuple):
    """The scores of one class; None for a share of nothing."""

    rows: int
    precision: float | None
    recall: float | None
    f1: float | None


def by_class(C: NDArray[np.int64]) -> list[OfClass]:
    """The scores of each class i, from the confusions C:

    precision `C_ii / Σ_j C_ji`, recall `C_ii / Σ_j C_ij`, and F1, their harmonic mean,
    `2 C_ii / Σ_j (C_ij + C_ji)`, which is 0 if one of them is 0 or missing, and None only for a class that
    no row has and nobody predicts.
    """
    right, rows, taken = (each.tolist() for each in (C.diagonal(), C.sum(1), C.sum(0)))

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return [
        OfClass(n, share(k, m), share(k, n), share(2 * k, n + m))
        for k, n, m in zip(right, rows, taken, strict=True)
    ]


def macro_f1(scores: Sequence[OfClass]) -> float:
    """The mean of F1 over the classes that have one. Raises ValueError if none has."""
    known = [each.f1 for each in scores if each.f1 is not None]
    if not known:
        raise ValueError("no class has a row")
    return sum(known) / len(known)


def confusions(C: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Every pair (i, j, rows of class i that were taken for class j), i ≠ j, that occurs, the most frequent
    first."""
    pairs = [(int(i), int(j), int(C[i, j])) for i, j in np.argwhere(C) if i != j]
    return sorted(pairs, key=lambda pair: -pair[2])


class Calibration(NamedTuple):
    """Mean confidence, accuracy, and the expected calibration error."""

    confidence: float
    accuracy: float
    error: float


def calibration(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> Calibration:
    """Whether predictions of confidence 0.8 are right in 80% of the rows.

    The expected calibration error is `Σ_m |B_m| / n · |acc(B_m) - conf(B_m)|` over `bins` bins of equal
    width, of which B_m has the rows with a confidence in ((m - 1)/M, m/M] (Guo et al. 2017). `confidence`:
    the probability of the predicted class, (n,); `right`: whether it is the row's. Raises ValueError without
    rows, and unless every confidence is in [0, 1].
    """
    p, hit = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    if not (len(p) and np.all((p >= 0) & (p <= 1))):
        raise ValueError("expected confidences between 0 and 1, of at least one row")
    m = np.maximum(np.ceil(p * bins).astype(int) - 1, 0)
    gaps = np.bincount(m, weights=hit - p, minlength=bins)  # |B_m| (acc(B_m) - conf(B_m))
    return Calibration(float(p.mean()), float(hit.mean()), float(np.abs(gaps).sum() / len(p)))
