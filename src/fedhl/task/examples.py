"""Rows as a model reads them: token ids, and the labels that the model learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fedhl.task.rows import refuse, shown

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label that torch's cross-entropy skips


class Example(NamedTuple):
    """One row: its tokens, and its class, its number, or a label for every token."""

    input_ids: list[int]
    labels: int | float | list[int]


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: `examples[j]` is row `rows[j]`; `truncated` of them lost their end."""

    examples: list[Example]
    rows: list[int]
    truncated: int


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest row.

    input_ids and attention_mask are (batch, tokens); labels is (batch,) for classes and numbers, and
    (batch, tokens), padded with -100, for a label per token. All int64, but for numbers, which are
    float32.
    """
    import torch

    width = max(len(example.input_ids) for example in examples)
    ids = [example.input_ids + [pad_id] * (width - len(example.input_ids)) for example in examples]
    mask = [
        [1] * len(example.input_ids) + [0] * (width - len(example.input_ids))
        for example in examples
    ]
    labels = [
        label + [IGNORED] * (width - len(label)) if isinstance(label, list) else label
        for _, label in examples
    ]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def check_texts(texts: Sequence[Any], what: str) -> None:
    refuse(
        (row, f"the {what} is {type(text).__name__} {shown(text)}, expected text")
        for row, text in enumerate(texts)
        if not isinstance(text, str)
    )
