"""Names with their hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from fedhl.method import Method
from fedhl.methods import METHODS, get_method
from fedhl.weighting import WEIGHTINGS, Weighting, get_weighting


def named(value: Any) -> Any:
    """`method: fedhl` is short for `method: {name: fedhl}`."""
    return {"name": value} if isinstance(value, str) else value


class Named(BaseModel):
    """A name and its hyperparameters, e.g. `{name: truncation, power: 2, epsilon: 0.001}`. All of them, also
    those that were left at their defaults: what a run folder says holds when a default has changed."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


def complete(value: Any, table: Mapping[str, type[Any]], get: Callable[..., Any]) -> Any:
    """`{name: ..., hyperparameters}` with those that were not given; a class from elsewhere is left as it is.
    Raises ValueError for an unknown name, an unknown hyperparameter or a value of the wrong type."""
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return value  # what is wrong with it, the fields say
    given = {str(key): x for key, x in value.items() if key != "name"}
    if value["name"] not in table:
        get(value["name"], **given)
        return value
    cls = table[value["name"]]
    types = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    for key in (name for name in names if name in given):
        try:
            TypeAdapter(types[key]).validate_python(given[key], strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise ValueError(f"{key} should be {said}, got {given[key]!r}") from None
    built = get(value["name"], **given)
    return {"name": value["name"]} | {name: getattr(built, name) for name in names}


class MethodConfig(Named):
    """An aggregation method and its hyperparameters; `fedhl methods` lists them."""

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        return complete(value, METHODS, get_method)

    def build(self) -> Method[Any]:
        return get_method(self.name, **self.hyperparameters)


class WeightingConfig(Named):
    """How clients are weighted, and its hyperparameters; `fedhl methods` lists them."""

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        return complete(value, WEIGHTINGS, get_weighting)

    def build(self) -> Weighting:
        return get_weighting(self.name, **self.hyperparameters)
