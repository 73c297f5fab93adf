"""The variants of a comparison, as the command line names them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from pydantic import ValidationError

from fedhl.config import Config
from fedhl.config.text import explain, set_value
from fedhl.errors import UserError
from fedhl.methods import METHODS
from fedhl.names import unknown

DECIDED = {
    "name": "its folder",
    "seed": "--seeds",
    "method": "its name",
    "method.name": "its name",
}
"""Settings that a variant cannot change, and the option that decides them."""


EITHER = {
    f"{section}.{one}": f"{section}.{other}"
    for section in ("participation", "data.held_out")
    for one, other in (("count", "fraction"), ("fraction", "count"))
}
"""Pairs of settings of which a config has one: a variant that sets one unsets the other."""


ONE_CLIENT = (
    *("weighting=uniform", "robust=null", "privacy=null", "channel=null"),
    *("participation.stragglers=0", "wire.payload=float32", "wire.download=null"),
)
"""Settings that mean nothing where there is one client: nothing is weighted, travels, or is rounded."""
POOLED = ("participation.pooled=true", "personal=null", *ONE_CLIENT)
SETTINGS = {
    "pooled": POOLED,
    "pooled_full": (*POOLED, "training.full=true"),
    "alone": ("personal=null", *ONE_CLIENT),  # such a model is personal already
}
"""The settings of the baselines, by name."""
METHOD = {"pooled": "fedit", "pooled_full": "flora", "alone": "fedit"}
"""With one client `fedit` is plain LoRA, and `flora` adds to W what the client has trained."""


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own: `fedit@lora.ranks=8` is `fedit` at rank 8. `alone`: a run of its own
    for each client."""

    text: str
    method: str
    changes: tuple[str, ...]
    alone: bool = False

    @property
    def folder(self) -> str:
        """The text as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.text).strip("-.")

    def config(self, base: Config, seed: int, *more: str) -> Config:
        """The settings of one run; `more` settings are applied last. Raises UserError, naming the variant."""
        raw = base.model_dump(mode="json")
        raw["name"], raw["seed"] = f"{base.name}-{self.folder}-seed-{seed}", seed
        if raw["method"]["name"] != self.method:  # else it keeps the config's hyperparameters
            raw["method"] = {"name": self.method}
        for change in (*self.changes, *more):
            set_value(raw, change)
            key, _, value = change.partition("=")
            if (other := EITHER.get(key.strip())) and value.strip() != "null":
                set_value(raw, f"{other}=null")  # the config's, or a default
        try:
            return Config.model_validate(raw)
        except ValidationError as error:
            raise UserError(f"--methods {self.text}: {explain(error)}") from None


def parse_variants(text: str) -> list[str]:
    """The parts between commas; commas inside brackets, as in `lora.ranks=[4, 8]`, belong to a value."""
    return [part.strip() for part in split(text, ",")]


def split(text: str, separator: str) -> list[str]:
    """`text.split(separator)`, but not inside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse_variant(text: str) -> Variant:
    """NAME@KEY=VALUE@KEY=VALUE. Raises UserError if it is malformed, or if there is no such method."""
    name, *changes = (part.strip() for part in split(text, "@"))
    for change in changes:
        key, equals, _ = change.partition("=")
        if not key or not equals:
            raise UserError(
                f"--methods {text!r}: expected NAME or NAME@KEY=VALUE, e.g. fedit@lora.ranks=8"
            )
        settings = hyperparameters(name)
        if key in settings:
            raise UserError(
                f"--methods {text!r}: {key} is a setting of the method; write {name}@method.{change}"
            )
        if key in DECIDED:
            raise UserError(f"--methods {text!r}: {key} follows from {DECIDED[key]}; leave it out")
    method = METHOD.get(name, name)
    changes = (*SETTINGS.get(name, ()), *changes)
    variant = Variant(text, method, changes, alone=name == "alone")
    if not variant.folder:
        raise UserError(
            f"--methods {text!r}: expected the name of a method; `fedhl methods` lists them"
        )
    if method not in METHODS and ":" not in method:
        known = [*METHODS, *SETTINGS]
        raise UserError(f"--methods {text}: method: {unknown('method', method, known)}")
    return variant


def hyperparameters(method: str) -> set[str]:
    """The names of a method's settings; empty if there is no such method."""
    return {field.name for field in fields(METHODS[method])} if method in METHODS else set()
