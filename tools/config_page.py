"""docs/config.md from the code: every setting, with its type, its default and its meaning."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from fedhl.config import Config
from fedhl.config.named import Named
from fedhl.config.text import ConfigDumper
from fedhl.strict import help_of

INTRODUCTION = """# Configuration

A run is one YAML file. Unknown keys are errors. On the command line, `--set key.sub=value` changes any key.
`fedhl check` shows what a config amounts to. Required keys have no default. An editor that knows YAML
completes and checks a config whose first line is `# yaml-language-server: $schema=PATH`, with the path of
[config.schema.json](config.schema.json). `make docs` writes this page and the schema from the code.
"""
BELOW = "settings below"
WORDS: dict[Any, str] = {
    bool: "true / false",
    int: "whole number",
    float: "number",
    str: "text",
    list: "list",
    dict: "mapping",
}
"""What a user calls the types that YAML has."""


# --- types and defaults -------------------------------------------------------------------------


def alternatives(annotation: Any) -> list[Any]:
    """The types of a union, without null and without what `Annotated` adds to them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [one for part in get_args(annotation) for one in alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def in_lists(annotation: Any) -> list[Any]:
    """The alternatives, and those of what a list has, if an alternative is a list."""
    found = alternatives(annotation)
    inner = [get_args(one)[0] for one in found if get_origin(one) is list and get_args(one)]
    return [*found, *(one for part in inner for one in alternatives(part))]


def models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models among the alternatives, also those of which there is a list."""
    return [
        one for one in in_lists(annotation) if isinstance(one, type) and issubclass(one, BaseModel)
    ]


def groups(annotation: Any) -> list[type[BaseModel]]:
    """The groups of settings among the alternatives: each has a section of its own."""
    return [model for model in models(annotation) if not issubclass(model, RootModel | Named)]


def word(kind: Any) -> str:
    """One type as a user would say it. Raises TypeError for a type that nobody has named yet."""
    if get_origin(kind) is Literal:
        return " / ".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, RootModel):
        return type_name(kind.model_fields["root"].annotation)
    if isinstance(kind, type) and issubclass(kind, Named):
        return "name, or {name: ..., its hyperparameters}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return BELOW
    if (plain := get_origin(kind) or kind) not in WORDS:
        raise TypeError(f"no word for the type {kind}")
    return WORDS[plain]


def type_name(annotation: Any) -> str:
    """A type as a user would say it: the words of its alternatives, each once."""
    return " or ".join(dict.fromkeys(word(kind) for kind in alternatives(annotation)))


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(value, Dumper=ConfigDumper, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def default(field: FieldInfo) -> str:
    """The default of a setting; of a group, what differs from the defaults in its section."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Named):
        value = value.name
    elif isinstance(value, RootModel):
        value = value.root
    elif isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
        if not value:
            return "as below"
    return f"`{flow(value)}`"


# --- the page -----------------------------------------------------------------------------------


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every group of settings from `model` on, with the keys that lead there, in order."""
    yield path, model
    for name, field in model.model_fields.items():
        for group in groups(field.annotation):
            yield from sections(group, f"{path}.{name}" if path else name)


def title(path: str, model: type[BaseModel], alone: bool) -> str:
    """The heading of a section; one of several at the same place says which it is."""
    for tag in ("kind", "name"):
        field = model.model_fields.get(tag)
        if field is not None and get_origin(field.annotation) is Literal:
            return f"{path} ({tag}: {type_name(field.annotation)})"
    return path if alone else f"{path} (with {next(iter(model.model_fields))})"


def meaning(field: FieldInfo, help: str | None) -> str:
    """The help of a setting on one line; for a group without one, that of its section."""
    inside = groups(field.annotation)
    text = help or (inside[0].__doc__ if len(inside) == 1 else None) or ""
    return " ".join(text.split()).replace("|", "\\|")


def config_page() -> str:
    """docs/config.md: every setting, with its type, its default and its meaning."""
    lines = [INTRODUCTION]
    found = list(sections(Config))
    paths = [path for path, _ in found]
    for path, model in found:
        if path:
            heading = title(path, model, alone=paths.count(path) == 1)
            lines += [f"## {heading}\n", f"{inspect.cleandoc(model.__doc__ or '')}\n"]
        else:
            lines.append("## top level\n")
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        help = help_of(model)
        for name, field in model.model_fields.items():
            text = meaning(field, help.get(name))
            cells = (f"`{name}`", type_name(field.annotation), default(field), text)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
