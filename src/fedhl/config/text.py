"""A config as text: YAML that people write, changes from the command line, and sentences for mistakes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, RootModel, ValidationError

from fedhl.config.conduct import MedianRule, TrimmedRule
from fedhl.config.inputs import ColumnPartition, DirichletPartition, IIDPartition
from fedhl.config.named import DEFAULT_METHOD, Named, named
from fedhl.config.schema import Config
from fedhl.config.settings import DRAFT, Settings
from fedhl.config.tracking import TRACKERS, Tracker
from fedhl.errors import UserError
from fedhl.names import called, unknown
from fedhl.strict import Strict
from fedhl.task import Task


def load_config(path: str | Path, overrides: Sequence[str] = (), *, draft: bool = False) -> Config:
    """The config in a YAML file, with `a.b=value` overrides. Raises UserError, naming the field.

    `draft`: only what can be checked without the classes of the method and the weighting, which import torch;
    for a first look, and never for a run.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    raw = parse(text, f"config file {path} is")
    if not isinstance(raw, dict):
        raise UserError(
            f"config file {path} must hold a mapping of settings, got {type(raw).__name__}"
        )
    for override in overrides:
        set_value(raw, override)
    try:
        return Config.model_validate(raw, context=DRAFT if draft else None)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


def parse(text: str, what: str) -> Any:
    """The value of a YAML text. Raises UserError, which begins with `what`."""
    try:
        return yaml.load(text, Loader=ConfigLoader)
    except yaml.MarkedYAMLError as error:
        mark, hint = error.problem_mark, ""
        line = text.splitlines()[mark.line : mark.line + 1] if mark else []
        if line and "\t" in line[0][: len(line[0]) - len(line[0].lstrip())]:
            hint = "\n  the line begins with a tab, which YAML does not allow; indent with blanks"
        raise UserError(f"{what} not valid YAML: {error}{hint}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # also of a date or a number
        raise UserError(f"{what} not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{what} not valid YAML: it is nested too deeply") from None


class ConfigLoader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as everybody expects (YAML 1.1 reads a string), and in which a key
    that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class ConfigDumper(yaml.SafeDumper):
    """Writes what `ConfigLoader` reads back: the text `1e-3` in quotes, odd line breaks escaped."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        odd = any(character in data for character in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if odd else None)


ConfigDumper.add_representer(str, ConfigDumper.represent_str)


for reader_or_writer in (ConfigLoader, ConfigDumper):
    reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def set_value(raw: dict[str, Any], override: str) -> None:
    """Apply `a.b=value` to a nested mapping; the value is YAML. Raises UserError if it is malformed."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r}: expected KEY=VALUE, e.g. --set training.steps=20")
    value = parse(text, f"--set {override!r}: the value is")
    node: Any = raw
    *parents, last = key.strip().split(".")
    for depth, part in enumerate(parents):
        child = node.get(part)
        if isinstance(child, str) and part in ("method", "weighting"):
            child = named(child)
        if child is None and depth == 0 and part == "method":
            child = {"name": DEFAULT_METHOD}
        if child is None and depth == 0 and part == "weighting":
            raise UserError(
                f"--set {override!r}: name the weighting that has this setting: "
                f"weighting={{name: NAME, {last}: {text}}}"
            )
        if child is None:
            child = {}
        if not isinstance(child, dict):
            where = ".".join(parents[: depth + 1])
            raise UserError(
                f"--set {override!r}: {where} is a single value, not a group of settings"
            )
        node[part] = child
        node = child
    node[last] = value


KINDS: dict[str, tuple[type[Strict], ...]] = {
    "task": get_args(Task),
    "partition": (IIDPartition, DirichletPartition, ColumnPartition),
    "reject": (MedianRule, TrimmedRule),
}
"""The groups of settings that come in several kinds."""


def kinds(name: str) -> list[str]:
    return [get_args(member.model_fields["kind"].annotation)[0] for member in KINDS[name]]


def explain(error: ValidationError, model: type[Settings] = Config) -> str:
    """One line per mistake in settings of this model: the field, what was found, what is allowed."""
    return "\n  ".join(dict.fromkeys(explain_one(dict(item), model) for item in error.errors()))


def explain_one(item: dict[str, Any], model: type[Settings]) -> str:
    """The line of one mistake."""
    unsaid = {"[key]", *TRACKERS, *(kind for name in KINDS for kind in kinds(name))}
    location = [str(part) for part in item["loc"] if part not in unsaid]
    field = ".".join(location) or "config"
    if item["type"] == "extra_forbidden":
        key, known = location[-1], siblings(item["loc"], model)
        name, colon, value = key.partition(":")
        if colon and name in known:
            return f"{field}: YAML needs a blank after the colon: {name}: {value}"
        elsewhere = places(key, model)
        if elsewhere and field not in elsewhere and called(key) not in known:
            return f"{field}: unknown key {key!r}; did you mean {' or '.join(elsewhere)}?"
        return f"{field}: {unknown('key', key, known)}"
    if item["type"] == "missing":
        return f"{field}: required, but not given"
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        known = kinds(location[-1])
        got = item["input"].get("kind")
        if got is None:
            return f"{field}.kind: required, one of {', '.join(known)}"
        return f"{field}.kind: {unknown('kind', str(got), known)}"
    message = item["msg"].removeprefix("Value error, ")
    message = re.sub(r"a valid dictionary or instance of \w+", "a group of settings", message)
    message = message[0].lower() + message[1:]
    got = item.get("input")
    if (
        item["type"] == "value_error" and not location
    ):  # a rule of the whole config names its field itself
        return message
    if item["type"] == "value_error" or isinstance(got, dict):
        return f"{field}: {message}"
    return f"{field}: {message}, got {got!r}"


def siblings(location: tuple[int | str, ...], model: Any) -> list[str]:
    """The keys allowed beside the one at `location` (whose union members are named by their kind)."""
    if (
        location[0] == "report_to" and len(location) > 2
    ):  # report_to, its place in the list, its name, the key
        return list(TRACKERS[str(location[2])].model_fields)
    for part in location[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            members = [model.model_fields[str(part)].annotation]
        else:  # a member of a union, named by its discriminator
            members = [
                member
                for member in get_args(model)
                if "kind" in getattr(member, "model_fields", {})
                and part in get_args(member.model_fields["kind"].annotation)
            ]
        model = next(iter(members), None)
        options = [m for m in get_args(model) if isinstance(m, type) and issubclass(m, BaseModel)]
        if len(options) == 1:
            model = options[0]
    return list(getattr(model, "model_fields", {}))


def places(name: str, model: type[Settings] = Config) -> list[str]:
    """The settings of this name, or of what is meant by it, such as `training.learning_rate`; those of the
    topmost groups alone, and of groups that every config has, if one of them has such a setting."""
    named = [path for path in settings(model) if path.rpartition(".")[2] == called(name)]
    usual = [p for p in named if model.model_fields[p.partition(".")[0]].default is not None]
    named = usual or named
    top = min((path.count(".") for path in named), default=0)
    return [path for path in dict.fromkeys(named) if path.count(".") == top]


def settings(model: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all settings that a type mentions; `method`, `weighting` and `report_to` are one setting
    each."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        for part in get_args(model):
            yield from settings(part, prefix)
        return
    if issubclass(model, RootModel):  # a rank or a list of ranks
        yield prefix[:-1]
        return
    if issubclass(model, Named | Tracker):
        return
    for name, field in model.model_fields.items():
        inner = list(settings(field.annotation, f"{prefix}{name}."))
        yield from inner or [f"{prefix}{name}"]


def dump_config(config: Config) -> str:
    """The YAML of a config, with every setting and the weighting that is used."""
    data = config.model_dump(mode="json")
    data["weighting"] = config.weighting_used.model_dump(mode="json")
    return yaml.dump(data, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)
