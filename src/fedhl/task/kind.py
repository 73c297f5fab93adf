"""What every kind of task says: its settings, what the libraries call it, what it does with rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedhl.strict import Strict
from fedhl.task.examples import Encoded
from fedhl.task.rows import Rows, column

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Kind(Strict, ABC):
    """A kind of task. Its fields are the settings in a config: beside its own every kind has `kind`, its
    name, and `max_length`, the most tokens of a row. Its class variables are what it is to the libraries."""

    auto: ClassVar[str]
    """The class of transformers that loads the base model with the right output layer."""
    peft_type: ClassVar[str]
    """PEFT's name for the kind, a `peft.TaskType`."""
    pipeline: ClassVar[str]
    """The pipeline of transformers that uses such a model; the tag on its card."""
    head: ClassVar[bool]
    """Whether the output layer is trained whole, beside the adapters."""
    metrics: ClassVar[tuple[str, ...]]
    """What `score` measures, the loss first."""
    metric: ClassVar[str]
    """The metric by which a round is judged."""
    greater: ClassVar[bool] = False
    """Whether more of this metric is better."""
    class_setting: ClassVar[str | None] = None
    """The setting that names the field of a row's class; None where rows have no class."""

    @staticmethod
    def model_settings(labels: Sequence[str] | None) -> dict[str, Any]:
        """What the model's own config must say, given the names of the classes."""
        return {}

    @staticmethod
    @abstractmethod
    def score(logits: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        """Each of the metrics, for every prediction that the labels ask for: vectors of one length, whose
        means over all rows are reported."""

    @abstractmethod
    def check(self, rows: Rows, source: str) -> None:
        """Raises UserError, naming the source, the row and the field, unless every row can be encoded."""

    @abstractmethod
    def encode(
        self,
        rows: Rows,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str] | None,
    ) -> Encoded:
        """Tokenised rows; `labels` are the names of the classes. Raises UserError as `check` does."""

    @abstractmethod
    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """All that the model reads of a row that has passed `check`: two rows with the same texts are the
        same."""

    def learnt(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of the texts that should not be blank."""
        return self.texts(row)

    @property
    def class_field(self) -> str | None:
        """The field of a row's class, by which rows are told apart; None where rows have no class."""
        return None if self.class_setting is None else getattr(self, self.class_setting)

    def classes(self, rows: Rows, source: str) -> list[Any] | None:
        """The class of every row as the data has it; None where rows have no class."""
        return None if self.class_field is None else column(rows, self.class_field, source)
