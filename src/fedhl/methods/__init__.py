"""The aggregation methods, one file each, and how to get one by name."""

from __future__ import annotations

from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from fedhl.method import Method
from fedhl.methods.fedhl import FedHL
from fedhl.methods.fedit import FedIT
from fedhl.methods.flexlora import FlexLoRA
from fedhl.weighting import build, construct

METHODS: dict[str, type[Any]] = {"fedhl": FedHL, "fedit": FedIT, "flexlora": FlexLoRA}


def get_method(name: str, **hyperparameters: Any) -> Method[Any]:
    """A method by name, or by `"package.module:Class"` for one that lives elsewhere.

    Raises ValueError for an unknown name (suggesting the nearest), a class that cannot be imported
    or is not a dataclass, and a hyperparameter that the method does not have.
    """
    if ":" not in name:
        return build("method", METHODS, name, hyperparameters)
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ValueError(f"method {name!r} must be a dataclass that follows fedhl.method.Method")
    return construct("method", name, cls, hyperparameters)
