"""Tasks whose rows are texts: what they have in common, and how a model learns from their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedhl.task.examples import Example, collate
from fedhl.task.kind import Kind, OfKind
from fedhl.task.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_AT_ONCE = 2**27
"""The most logits in one forward pass (half a GiB in float32): a large vocabulary fills the memory."""


class TextKind(Kind):
    """A kind of task whose rows are read as tokens. Every such kind has the setting `max_length`, the most
    tokens of a row."""

    if TYPE_CHECKING:
        max_length: int

    @property
    def longest(self) -> int:
        return self.max_length

    def length(self, example: Any) -> int:
        return max(len(part.input_ids) for part in self.sequences(example))

    def sizes(self, examples: Sequence[Any]) -> str:
        tokens = [self.length(example) for example in examples]
        return f" of {sum(tokens) / len(tokens):.0f} tokens on average (longest {max(tokens)})"

    def sequences(self, example: Any) -> Sequence[Example]:
        """What the model reads of an encoded row, as it reads it."""
        return (example,)

    def objective(self, processor: Any, vocabulary: int) -> Objective:
        return Texts(type(self), processor.pad_token_id, vocabulary)


def tokenised(max_length: int | None) -> str:
    """The line of a model card that makes model inputs of a text."""
    at_most = f", max_length={max_length}" if max_length else ""
    return f'inputs = tokenizer(["A text."], truncation=True{at_most}, return_tensors="pt")'


def in_batches(
    ordered: Sequence[Any], size: int, most: Callable[[Any], int]
) -> Iterator[Sequence[Any]]:
    """Rows, the longest first, `size` at a time, or as many as `most` allows for a row of this length, but at
    least one."""
    at = 0
    while at < len(ordered):
        count = max(1, min(size, most(ordered[at])))
        yield ordered[at : at + count]
        at += count


@dataclass(frozen=True)
class Texts(OfKind):
    """Tokenised texts of one kind of task, for a model of transformers. `vocabulary`: the number of logits of
    a token."""

    pad_id: int
    vocabulary: int = 1

    def batch(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        return collate(rows, self.pad_id)

    def terms(self, batch: Mapping[str, Tensor]) -> int:
        labels = batch["labels"]
        per_row = labels.ndim == 1 or labels.is_floating_point()
        return len(labels) if per_row else int((labels[:, 1:] != -100).sum())

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**{name: x for name, x in batch.items() if name != "labels"}).logits

    def parts(self, rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
        """Longest rows first, so that a batch too large for the memory fails at once."""

        def most(example: Example) -> int:
            if not isinstance(example.labels, list):
                return size
            return LOGITS_AT_ONCE // (self.vocabulary * len(example.input_ids))

        return in_batches(sorted(rows, key=lambda row: -len(row.input_ids)), size, most)

    def tokens(self, batch: Mapping[str, Tensor]) -> int:
        return batch["input_ids"].shape[-1]
