"""Metrics of a model on labelled rows. Knows nothing of federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fedhl.task.examples import Example, collate

LOGITS_AT_ONCE = 2**27
"""The most logits in one forward pass (half a GiB in float32): a large vocabulary fills the memory."""

Metrics = dict[str, float | int]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    score: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Metrics:
    """`loss`, `examples` and what else `score` measures, of the model in evaluation mode.

    Means, in float64, over all that `score` gives of logits and labels (see `Kind.score`): over rows
    for classes, over completion tokens for language models. Longest rows first, so that a batch too
    large for the memory fails at once.
    """
    model.eval()
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    vocabulary = getattr(model.config, "vocab_size", 1)
    totals: dict[str, float] = {}
    count = at = 0
    while at < len(ordered):
        size = batch_size
        if isinstance(ordered[at].labels, list):
            rows = LOGITS_AT_ONCE // (vocabulary * len(ordered[at].input_ids))
            size = max(1, min(batch_size, rows))
        batch = collate(ordered[at : at + size], pad_id)
        at += size
        labels = batch.pop("labels")
        with autocast():
            logits = model(**{name: t.to(device) for name, t in batch.items()}).logits
        terms = score(logits.float(), labels.to(device))
        count += len(terms["loss"])
        for name, values in terms.items():
            totals[name] = totals.get(name, 0.0) + float(values.double().sum())
    means = {name: total / count for name, total in totals.items()}
    return {"loss": means.pop("loss"), "examples": len(examples), **means}
