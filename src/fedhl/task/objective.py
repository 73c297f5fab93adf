"""What a model learns from rows: all that training and evaluation know of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fedhl.task.examples import Example, collate
from fedhl.task.kind import Kind

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_AT_ONCE = 2**27
"""The most logits in one forward pass (half a GiB in float32): a large vocabulary fills the memory."""


class Objective(Protocol):
    """A loss and metrics over batches of rows; a row and a batch may be anything that these functions know.

    A batch is moved to the model's device by whoever has made it: its tensors may be in tuples, lists and
    mappings.
    """

    @property
    def metric(self) -> str:
        """The metric by which a round is judged."""
        ...

    @property
    def greater(self) -> bool:
        """Whether more of this metric is better."""
        ...

    def batch(self, rows: Sequence[Any]) -> Any:
        """Rows as the model takes them, on the CPU."""
        ...

    def terms(self, batch: Any) -> int:
        """How many terms the mean loss of this batch has: rows, or tokens to be predicted."""
        ...

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The mean loss of a batch, with its graph."""
        ...

    def outputs(self, model: Any, batch: Any) -> Any:
        """What the metrics are made of, from a forward pass."""
        ...

    def score(self, outputs: Any, batch: Any) -> Mapping[str, Tensor]:
        """`loss` and the other metrics, one number for each term: vectors whose means over all batches are
        reported."""
        ...

    def parts(self, rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
        """All rows in batches for evaluation, of at most `size` rows."""
        ...

    def tokens(self, batch: Any) -> int | None:
        """The length of the longest row of this batch in tokens; None if rows are not texts."""
        ...


@dataclass(frozen=True)
class Texts:
    """Tokenised texts of one kind of task, for a model of transformers. `vocabulary`: the number of logits of
    a token."""

    kind: type[Kind]
    pad_id: int
    vocabulary: int = 1

    @property
    def metric(self) -> str:
        return self.kind.metric

    @property
    def greater(self) -> bool:
        return self.kind.greater

    def batch(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        return collate(rows, self.pad_id)

    def terms(self, batch: Mapping[str, Tensor]) -> int:
        labels = batch["labels"]
        return len(labels) if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**{name: x for name, x in batch.items() if name != "labels"}).logits

    def score(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.kind.score(outputs.float(), batch["labels"])

    def parts(self, rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
        """Longest rows first, so that a batch too large for the memory fails at once."""
        ordered = sorted(rows, key=lambda example: -len(example.input_ids))
        at = 0
        while at < len(ordered):
            count = size
            if isinstance(ordered[at].labels, list):
                most = LOGITS_AT_ONCE // (self.vocabulary * len(ordered[at].input_ids))
                count = max(1, min(size, most))
            yield ordered[at : at + count]
            at += count

    def tokens(self, batch: Mapping[str, Tensor]) -> int:
        return batch["input_ids"].shape[-1]
