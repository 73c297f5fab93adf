"""The base of every group of settings, and the help of each setting."""

from __future__ import annotations

import ast
import inspect
from textwrap import dedent

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Unknown keys are errors, numbers are finite, values do not change, and the text under a field is its
    help."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def help_of(model: type[BaseModel]) -> dict[str, str]:
    """The help of each setting of a group: the text under its field, also where that is inherited.

    It is read from the source when it is asked for. Pydantic can do so when a class is made; that took a
    third of the time of `import fedhl.config`, for which every command waits.
    """
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        generic = cls.__name__.endswith("]")  # RootModel[...], which has no source
        if not issubclass(cls, BaseModel) or cls.__module__.startswith("pydantic") or generic:
            continue
        (tree,) = ast.parse(dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = inspect.cleandoc(text.value.value)
    return {name: found[name] for name in model.model_fields if name in found}
