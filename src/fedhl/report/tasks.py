"""The values of the section on tasks: the accuracy on each task after each task, and the forgetting."""

from __future__ import annotations

from fedhl.report.files import Run, dig, num
from fedhl.report.plots import HEAT
from fedhl.report.render import View
from fedhl.report.statistics import mean_accuracy

DEEPEST = 0.55  # of the tint: text stays readable on it, dark on light and light on dark


def matrix(run: Run) -> list[list[float]]:
    """After each task that has been done, the accuracy on all tasks so far."""
    rows = dig(run.summary, "tasks", "accuracy")
    return rows if isinstance(rows, list) else []


def tasks(run: Run) -> View | None:
    """None for a run without tasks."""
    labels = dig(run.summary, "tasks", "labels")
    if not isinstance(labels, list):
        return None
    return {
        "labels": [", ".join(map(str, names)) for names in labels],
        "rows": [
            {
                "cells": [{"accuracy": a, "depth": DEEPEST * a} for a in row],
                "mean": mean_accuracy(row),
            }
            for row in matrix(run)
        ],
        "forgetting": num(run.summary, "tasks", "forgetting"),
        "tint": ",".join(map(str, HEAT)),
    }
