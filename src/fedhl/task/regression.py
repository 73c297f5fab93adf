"""Numbers that texts stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedhl.task.labelled import LabelledText
from fedhl.task.rows import Rows, column, located, refuse, shown
from fedhl.task.texts import tokenised

if TYPE_CHECKING:
    from torch import Tensor


class RegressionTask(LabelledText):
    """One number per text: a rating, a similarity of two texts. The output layer is trained whole, beside the
    adapters. Numbers of size about 1 are learnt best: the loss is their mean squared error."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "mae")
    metric: ClassVar[str] = "loss"

    kind: Literal["regression"]  # pyright: ignore[reportIncompatibleVariableOverride]
    label: str = "label"
    """The field that holds the number."""

    @staticmethod
    def model_settings(labels: Sequence[str] | None) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The squared error and the absolute error of every row."""
        error = logits.squeeze(-1) - labels
        return {"loss": error.square(), "mae": error.abs()}

    @classmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        return [
            tokenised(max_length),
            "outputs = model.eval()(**inputs)",
            "print(float(outputs.logits))",
        ]

    def check(self, rows: Rows, source: str) -> None:
        self.targets(rows, source, None)
        super().check(rows, source)

    def targets(self, rows: Rows, source: str, labels: Sequence[str] | None) -> list[float]:
        values = column(rows, self.label, source)
        numbers = [number_of(value) for value in values]
        with located(rows, source):
            refuse(
                (row, f"field {self.label!r} is {shown(value)}, expected a number")
                for row, (value, number) in enumerate(zip(values, numbers, strict=True))
                if not math.isfinite(number)
            )
        return numbers


def number_of(value: Any) -> float:
    """A number, or the text of one, as in a CSV file; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan
