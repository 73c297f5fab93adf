"""Metrics of a model on rows. Knows nothing of federation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from fedhl.task.objective import Objective

Metrics = dict[str, float | int]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Any],
    *,
    objective: Objective,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Metrics:
    """`loss`, `examples`, the number of rows, and what else `objective.score` measures, of the model in
    evaluation mode: means, in float64, over rows for classes, over completion tokens for language models.
    """
    model.eval()
    totals: dict[str, float] = {}
    count = 0
    for part in objective.parts(rows, batch_size):
        batch = send_to_device(objective.batch(part), device)
        with autocast():
            outputs = objective.outputs(model, batch)
        terms = objective.score(outputs, batch)
        count += len(terms["loss"])
        for name, values in terms.items():
            totals[name] = totals.get(name, 0.0) + float(values.double().sum())
    means = {name: total / count for name, total in totals.items()}
    return {"loss": means.pop("loss"), "examples": len(rows), **means}
