"""Names with their hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from fedhl.methods import METHODS, get_method
from fedhl.names import unknown
from fedhl.weightings import WEIGHTINGS

if TYPE_CHECKING:
    from fedhl.method import Method
    from fedhl.weighting import Weighting

DEFAULT_METHOD = "fedhl_ef"
"""The method of a config that names none."""


def named(value: Any) -> Any:
    """`method: fedhl` is short for `method: {name: fedhl}`."""
    return {"name": value} if isinstance(value, str) else value


class Named(BaseModel):
    """A name and its hyperparameters, e.g. `{name: truncation, power: 2, epsilon: 0.001}`.

    An unknown name is refused at once. What the class behind a name knows is asked by `completed` and
    `build` alone, since that class imports torch.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: ClassVar[str]
    table: ClassVar[Mapping[str, type[Any]]]

    name: str

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
            return value  # the fields say what is wrong with such a value
        if value["name"] not in cls.table and ":" not in value["name"]:
            raise ValueError(unknown(cls.kind, value["name"], cls.table))
        return {str(key): x for key, x in value.items()}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})

    def build(self) -> Any:
        """The method or weighting itself. Raises ValueError if it cannot be made."""
        raise NotImplementedError

    def completed(self) -> Self:
        """The same with every hyperparameter, also those that were left at their defaults: what a run folder
        says must hold when a default has changed. A class from elsewhere is left as it is.

        Raises ValueError for an unknown hyperparameter and for a value of the wrong type.
        """
        if self.name not in self.table:
            self.build()
            return self
        cls, given = self.table[self.name], self.hyperparameters
        types, names = get_type_hints(cls), [field.name for field in fields(cls)]
        for key in (name for name in names if name in given):
            try:
                TypeAdapter(types[key]).validate_python(given[key], strict=True)
            except ValidationError as error:
                said = error.errors()[0]["msg"].removeprefix("Input should be ")
                raise ValueError(f"{key} should be {said}, got {given[key]!r}") from None
        built = self.build()
        return type(self)(name=self.name, **{name: getattr(built, name) for name in names})


class MethodConfig(Named):
    """An aggregation method and its hyperparameters; `fedhl methods` lists them."""

    kind = "method"
    table = METHODS

    def build(self) -> Method[Any]:
        return get_method(self.name, **self.hyperparameters)


class WeightingConfig(Named):
    """How clients are weighted, and the hyperparameters of that; `fedhl methods` lists them."""

    kind = "weighting"
    table = WEIGHTINGS

    def build(self) -> Weighting:
        from fedhl.weighting import get_weighting

        return get_weighting(self.name, **self.hyperparameters)
