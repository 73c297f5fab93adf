"""New labels over time: the labels of each task, the task of each round, and the forgetting.

A run with N tasks divides its rounds among them equally. In a round clients train only on rows of the
current task's labels, so that they may forget earlier tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fedhl.seeds import generator

Accuracy = Sequence[Sequence[float]]
"""Row k: after task k, the accuracy on each of the tasks 1 to k."""


def split_labels(labels: int, count: int, seed: int) -> list[list[int]]:
    """Label ids in `count` groups whose sizes differ by one at most, in an order drawn by the seed."""
    import torch

    order = torch.randperm(labels, generator=generator(seed, "tasks")).tolist()
    edges = [k * labels // count for k in range(count + 1)]
    return [sorted(order[a:b]) for a, b in pairwise(edges)]


def task_of(round: int, period: int) -> int:
    """The task, from 0, of a round, from 1, when each task takes `period` rounds."""
    return (round - 1) // period


def begins(round: int, period: int) -> bool:
    """Whether the labels change in this round: it is the first round of a task after the first."""
    return round > 1 and (round - 1) % period == 0


def mean_accuracy(accuracy: Accuracy) -> float:
    """The mean accuracy over the tasks, after the last task."""
    return sum(accuracy[-1]) / len(accuracy[-1])


def forgetting(accuracy: Accuracy) -> float | None:
    """`F = mean_{j<N} (max_{j<=k<N} a_{k,j} - a_{N,j})`: how far each earlier task is below its best;
    negative if later tasks helped it, None after a single task.

    Source: Chaudhry et al., arXiv 1801.10112.
    """
    *earlier, last = accuracy
    if not earlier:
        return None
    best = [max(row[j] for row in earlier[j:]) for j in range(len(earlier))]
    return sum(a - b for a, b in zip(best, last, strict=False)) / len(best)
