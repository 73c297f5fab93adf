"""Classes of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedhl.record import Unit
from fedhl.task.labelled import LabelledText
from fedhl.task.labels import class_settings, label_names, named_labels, print_class
from fedhl.task.rows import Rows, column, located
from fedhl.task.texts import tokenised

if TYPE_CHECKING:
    from torch import Tensor


class ClassificationTask(LabelledText):
    """One label per text. The classification head is trained whole, beside the adapters."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    metric: ClassVar[str] = "accuracy"
    greater: ClassVar[bool] = True
    units: ClassVar[Mapping[str, Unit]] = {"accuracy": "share of rows"}
    class_setting: ClassVar[str | None] = "label"

    kind: Literal["sequence-classification"]  # pyright: ignore[reportIncompatibleVariableOverride]

    @staticmethod
    def model_settings(labels: Sequence[str] | None) -> dict[str, Any]:
        if labels is None:  # as many as the checkpoint has
            return {}
        return class_settings(labels, "single_label_classification")

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return score_classes(logits, labels)

    @classmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        return [tokenised(max_length), "outputs = model.eval()(**inputs)", print_class(named)]

    def check(self, rows: Rows, source: str) -> None:
        labels = column(rows, self.label, source)
        with located(rows, source):
            label_names(labels)  # one alone is enough for a client that has its own rows
        super().check(rows, source)

    def targets(self, rows: Rows, source: str, labels: Sequence[str] | None) -> list[int]:
        return named_labels(column(rows, self.label, source), rows, source, labels)[0]


def score_classes(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The cross-entropy, and whether the likeliest class is the right one, of every row."""
    from torch.nn.functional import cross_entropy

    loss = cross_entropy(logits, labels, reduction="none")
    return {"loss": loss, "accuracy": logits.argmax(-1) == labels}
