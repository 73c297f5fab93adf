"""docs/config.schema.json from the code: what an editor needs to complete and check a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from config_page import sections
from pydantic import BaseModel

from fedhl.config import Config
from fedhl.config.named import MethodConfig, Named, WeightingConfig
from fedhl.config.tracking import TRACKERS
from fedhl.strict import help_of


def config_schema() -> str:
    """The JSON schema of a config, with the help of every setting."""
    schema = Config.model_json_schema()
    places: dict[type[BaseModel], dict[str, Any]] = {Config: schema}
    places |= {m: schema["$defs"][m.__name__] for _, m in sections(Config) if m is not Config}
    for model, said in places.items():
        for setting, text in help_of(model).items():
            if (there := said["properties"].get(setting)) is not None:
                there["description"] = " ".join(text.split())
    for named in (MethodConfig, WeightingConfig):
        schema["$defs"][named.__name__] = names(named)
    trackers = schema["properties"]["report_to"]
    short = {"enum": [*TRACKERS]}
    items = {"anyOf": [short, trackers.pop("items")]}
    del trackers["type"]
    trackers["anyOf"] = [{"type": "array", "items": items}, *items["anyOf"], {"type": "null"}]
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **without_titles(schema)}
    whole["title"] = "A run of fedhl"
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def names(named: type[Named]) -> dict[str, Any]:
    """A name, or a mapping with a name and hyperparameters; classes from elsewhere are MODULE:CLASS."""
    name = {"anyOf": [{"enum": list(named.table)}, {"type": "string", "pattern": ":"}]}
    whole = {"type": "object", "properties": {"name": name}, "required": ["name"]}
    return {"description": " ".join((named.__doc__ or "").split()), "anyOf": [name, whole]}


def without_titles(value: Any) -> Any:
    """The same without the titles that pydantic makes of names, which say nothing else."""
    if isinstance(value, Mapping):
        return {
            key: without_titles(x)
            for key, x in value.items()
            if not (key == "title" and isinstance(x, str))
        }
    return [without_titles(x) for x in value] if isinstance(value, list) else value
