"""What is learnt: one file per kind of task, and the table of them, which everybody else asks."""

from __future__ import annotations

from typing import get_args

from fedhl.task.causal import CausalTask
from fedhl.task.classification import ClassificationTask

__all__ = ["KINDS", "CausalTask", "ClassificationTask", "Task"]

Task = ClassificationTask | CausalTask
"""The kinds, and the only list of them: a further kind is a file beside these and a member here."""

KINDS: dict[str, type[Task]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(Task)
}
"""Each kind by the name that a config gives it."""
