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
    """One row: its tokens, and its class, its number, a 0 or 1 for each class, or (a list) a label for every
    token. `token_types`: which text of a pair each token belongs to, for models that want to know."""

    input_ids: list[int]
    labels: int | float | tuple[float, ...] | list[int]
    token_types: list[int] | None = None


@dataclass(frozen=True)
class Encoded:
    """Rows as the model reads them, texts as tokens: `examples[j]` is row `rows[j]`; `truncated` of them lost
    their end."""

    examples: list[Any]
    rows: list[int]
    truncated: int


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest row.

    input_ids, attention_mask and, for pairs, token_type_ids are (batch, tokens); labels is (batch,) for
    classes and numbers, (batch, classes) for a 0 or 1 each, and (batch, tokens), padded with -100, for a
    label per token. All int64, but numbers as labels, and 0s and 1s, are float32.
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
        for _, label, _ in examples
    ]
    batch = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }
    if examples[0].token_types is not None:
        kinds = [e.token_types or [] for e in examples]
        batch["token_type_ids"] = torch.tensor([k + [0] * (width - len(k)) for k in kinds])
    return batch


def classes_of(labels: Any) -> set[int]:
    """The ids of the classes that an encoded row, or any of its tokens, has."""
    if isinstance(labels, list):
        return {k for k in labels if k != IGNORED}
    return {k for k, has in enumerate(labels) if has} if isinstance(labels, tuple) else {labels}


def check_texts(texts: Sequence[Any], what: str) -> None:
    refuse(
        (row, f"the {what} is {type(text).__name__} {shown(text)}, expected text")
        for row, text in enumerate(texts)
        if not isinstance(text, str)
    )
