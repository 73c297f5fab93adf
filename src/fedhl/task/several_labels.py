"""Any number of labels for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedhl.names import listed, meant
from fedhl.record import Unit
from fedhl.task.labelled import LabelledText
from fedhl.task.labels import class_settings, label_name, problem_of_label, sorted_labels
from fedhl.task.rows import Rows, column, located, refuse, shown, text_column
from fedhl.task.texts import tokenised

if TYPE_CHECKING:
    from torch import Tensor


class SeveralLabelsTask(LabelledText):
    """Any number of labels per text: none, one or more. The classification head is trained whole, beside the
    adapters."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "f1")
    metric: ClassVar[str] = "f1"
    greater: ClassVar[bool] = True
    units: ClassVar[Mapping[str, Unit]] = {"f1": "share"}

    kind: Literal["multi-label-classification"]  # pyright: ignore[reportIncompatibleVariableOverride]
    label: str = "labels"
    """The field that holds the labels: a list, or a text in which `separator` parts them."""
    separator: str = ","
    """What parts the labels where the field holds a text, as in a CSV file."""

    @staticmethod
    def model_settings(labels: Sequence[str] | None) -> dict[str, Any]:
        if labels is None:
            return {}
        return class_settings(labels, "multi_label_classification")

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean binary cross-entropy over the labels of each row, and its
        `F1 = 2 |found ∩ right| / (|found| + |right|)`, 1 where both are empty; a label is found if its
        probability is above 1/2."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        loss = binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        found = (logits > 0).to(labels)
        both, sizes = (found * labels).sum(-1), found.sum(-1) + labels.sum(-1)
        return {"loss": loss, "f1": (2 * both / sizes).where(sizes > 0, 1.0)}

    @classmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        found = "[k for k, logit in enumerate(outputs.logits[0]) if logit > 0]"
        names = (
            "[model.config.id2label[k] for k, logit in enumerate(outputs.logits[0]) if logit > 0]"
        )
        shown = f"print({names if named else found})"
        return [tokenised(max_length), "outputs = model.eval()(**inputs)", shown]

    def check(self, rows: Rows, source: str) -> None:
        self.labels(rows, source)
        for field in self.fields():
            text_column(rows, field, source)

    def labels(self, rows: Rows, source: str) -> list[tuple[str, ...]]:
        """The names of the labels of every row, each once; none where a table has an empty cell."""
        lists = [
            row if row.get(self.label, "") is not None else row | {self.label: []} for row in rows
        ]
        values = [self.parted(value) for value in column(lists, self.label, source)]
        with located(rows, source):
            refuse(
                (row, f"field {self.label!r}: {problem}")
                for row, found in enumerate(values)
                if (problem := problem_of(found))
            )
        return [tuple(dict.fromkeys(map(label_name, found))) for found in values]

    def parted(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [name.strip() for name in value.split(self.separator) if name.strip()]

    def targets(
        self, rows: Rows, source: str, labels: Sequence[str] | None
    ) -> list[tuple[float, ...]]:
        found = self.labels(rows, source)
        known = (
            labels if labels is not None else sorted_labels({n for names in found for n in names})
        )
        with located(rows, source):
            refuse(
                (
                    row,
                    f"the label {name!r}{meant(name, known)} was not in training; known labels: "
                    f"{listed(known)}",
                )
                for row, names in enumerate(found)
                for name in names
                if name not in known
            )
        return [tuple(float(name in names) for name in known) for names in found]


def problem_of(found: Any) -> str:
    """Why this value is no list of labels; "" if it is one."""
    if not isinstance(found, list):
        return f"it is {shown(found)}, expected a list of labels, or a text"
    return next(filter(None, map(problem_of_label, found)), "")
