"""Metrics of a model on labelled rows. Knows nothing of federation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedhl.data.prompts import IGNORED, Example, collate

LOGITS_AT_ONCE = 2**27
"""The most logits in one forward pass (half a GiB in float32): a large vocabulary fills the memory."""

Metrics = dict[str, float | int]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Metrics:
    """`loss`, `examples` and, for classes, `accuracy`, of the model in evaluation mode.

    The loss is a mean over rows for classes and over completion tokens for language models, in
    float64. Longest rows first, so that a batch too large for the memory fails at once.
    """
    model.eval()
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    vocabulary = getattr(model.config, "vocab_size", 1)
    total, count, right = 0.0, 0, 0
    at = 0
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
        loss, terms, hits = score(logits.float(), labels.to(device))
        total, count, right = total + loss, count + terms, right + hits
    metrics: Metrics = {"loss": total / count, "examples": len(examples)}
    if isinstance(ordered[0].labels, int):
        metrics["accuracy"] = right / count
    return metrics


def score(logits: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """Summed cross-entropy, number of terms, and how many of them were predicted right."""
    if labels.ndim == 2:  # each position predicts the next token
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    keep = labels != IGNORED
    logits, labels = logits[keep], labels[keep]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    return float(loss), len(labels), int((logits.argmax(-1) == labels).sum())
