"""What is learnt: one file per kind of task, and the table of them, which everybody else asks."""

from __future__ import annotations

from typing import get_args

from fedhl.names import imported
from fedhl.task.causal import CausalTask
from fedhl.task.classification import ClassificationTask
from fedhl.task.images import ImageTask
from fedhl.task.kind import Kind
from fedhl.task.preferences import PreferenceTask
from fedhl.task.regression import RegressionTask
from fedhl.task.several_labels import SeveralLabelsTask

__all__ = ["KINDS", "CausalTask", "ClassificationTask", "ImageTask", "Kind", "Task", "kind_named"]

Task = (
    ClassificationTask
    | SeveralLabelsTask
    | RegressionTask
    | CausalTask
    | PreferenceTask
    | ImageTask
)
"""The kinds, and the only list of them: a further kind is a file beside these and a member here."""

KINDS: dict[str, type[Kind]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(Task)
}
"""Each kind by the name that a config gives it."""


def kind_named(name: str) -> type[Kind]:
    """The kind of this name, or of "package.module:Class". Raises ValueError for a class that cannot be
    imported or is no kind."""
    if ":" not in name:
        return KINDS[name]
    try:
        kind = imported(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"kind {name!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Kind)):
        raise ValueError(f"kind {name!r} must be a class derived from fedhl.task.Kind")
    return kind
