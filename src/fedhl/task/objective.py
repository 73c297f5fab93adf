"""What a model learns from rows: all that training and evaluation know of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fedhl.record import Unit

if TYPE_CHECKING:
    from torch import Tensor


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

    @property
    def unit(self) -> Unit:
        """What this metric is."""
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
