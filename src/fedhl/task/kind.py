"""What every kind of task says: its settings, what the libraries call it, what it does with rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedhl.record import Unit
from fedhl.strict import Strict
from fedhl.task.examples import Encoded
from fedhl.task.labels import label_names
from fedhl.task.objective import Objective
from fedhl.task.rows import Rows, column, located

if TYPE_CHECKING:
    from torch import Tensor


class Kind(Strict, ABC):
    """A kind of task. Its fields are the settings in a config: beside its own every kind has `kind`, its
    name. Its class variables are what it is to the libraries."""

    auto: ClassVar[str]
    """The class of transformers that loads the base model with the right output layer."""
    processor: ClassVar[str] = "AutoTokenizer"
    """The class of transformers that loads what makes model inputs of a row; or AutoImageProcessor."""
    peft_type: ClassVar[str | None]
    """PEFT's name for the kind, a `peft.TaskType`; None if PEFT has none."""
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
    units: ClassVar[Mapping[str, Unit]] = {}
    """What those of the metrics are that are more than a number: a share, or a share of rows."""
    class_setting: ClassVar[str | None] = None
    """The setting that names the field of a row's class; None where a row has no class, or several."""

    kind: str  # the name of the kind, or `package.module:Class` of one from elsewhere

    @property
    def longest(self) -> int | None:
        """The most tokens of a row; None if rows are not texts."""
        return None

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
        self, rows: Rows, source: str, processor: Any, labels: Sequence[str] | None
    ) -> Encoded:
        """Rows as the model reads them; `labels` are the names of the classes. Raises UserError as `check`
        does."""

    @abstractmethod
    def objective(self, processor: Any, vocabulary: int) -> Objective:
        """How the model learns from encoded rows; `vocabulary`: the number of logits of a token."""

    def with_base(
        self, examples: Sequence[Any], outputs: Callable[[Sequence[Any]], Tensor]
    ) -> Sequence[Any]:
        """Encoded rows with what the base model says of them before any training, for kinds that compare with
        that. `outputs`: those of the objective, for some of the rows."""
        return examples

    def length(self, example: Any) -> int:
        """The number of tokens of an encoded row; 1 if rows are not texts."""
        return 1

    def sizes(self, examples: Sequence[Any]) -> str:
        """How large these encoded rows are, for a sentence about them: " of 12 tokens on average"."""
        return ""

    @abstractmethod
    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """All that the model reads of a row that has passed `check`: two rows with the same texts are the
        same."""

    def learnt(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of the texts that should not be blank."""
        return self.texts(row)

    @classmethod
    @abstractmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        """Lines of Python for a model card, which use the variables `model` and `tokenizer` (or `processor`)
        on one row. `named`: whether the model's config names the labels; `max_length`: the most tokens of a
        row, None if nobody knows it."""

    @property
    def class_field(self) -> str | None:
        """The field of a row's class, by which rows are told apart; None where rows have no class."""
        return None if self.class_setting is None else getattr(self, self.class_setting)

    def classes(self, rows: Rows, source: str) -> list[Any] | None:
        """The class of every row as the data has it; None where rows have no class."""
        return None if self.class_field is None else column(rows, self.class_field, source)

    def labels(self, rows: Rows, source: str) -> list[tuple[str, ...]] | None:
        """The names of the labels of every row; None where the model has no labels."""
        classes = self.classes(rows, source)
        if classes is None:
            return None
        with located(rows, source):
            return [(name,) for name in label_names(classes)]


@dataclass(frozen=True)
class OfKind:
    """What the objectives of the kinds have in common: the metrics are those of the kind."""

    kind: type[Kind]

    @property
    def metric(self) -> str:
        return self.kind.metric

    @property
    def greater(self) -> bool:
        return self.kind.greater

    @property
    def unit(self) -> Unit:
        return self.kind.units.get(self.kind.metric, "number")

    def score(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.kind.score(outputs.float(), batch["labels"])
