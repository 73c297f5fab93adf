"""`adapter_config.json` of a PEFT adapter from anywhere: every type is checked, and no pattern can hang."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Generic, TypeVar

from peft import TaskType
from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveInt, ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema, from_json

from fedhl.errors import UserError

CONFIG_FILE = "adapter_config.json"

# What must be unset for an adapter to be plain LoRA on linear layers.
NOT_PLAIN = (
    *("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config"),
    *("use_bdlora", "kasa_config", "velora_config", "monteclora_config", "megatron_config"),
    *("target_parameters", "trainable_token_indices", "layer_replication", "ensure_weight_tying"),
)
# Initialisations that leave the base weights as they were; others (PiSSA, OLoRA, ...) change them.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def known_task(name: str) -> str:
    return TaskType(name).value


class AdapterConfig(BaseModel):
    """The settings of a `peft.LoraConfig` that say what its tensors mean, with PEFT's defaults; the others
    matter to training alone."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: Annotated[str, AfterValidator(known_task)] | None = None
    r: PositiveInt = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None


def read_config(folder: Path) -> AdapterConfig:
    """The config in an adapter's folder. Raises UserError unless it is that of a plain LoRA adapter."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}; expected the folder of a PEFT adapter")
    try:
        raw = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, got {raw!r:.60}")
    if raw.get("peft_type") != "LORA":
        raise UserError(
            f"{folder} is a {raw.get('peft_type')!s:.60} adapter; only LORA is supported"
        )
    used = [name for name in NOT_PLAIN if raw.get(name)]
    if raw.get("bias", "none") != "none":
        used.append("bias")
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        used.append(f"init_lora_weights={raw['init_lora_weights']!s:.60}")
    if used:
        raise UserError(
            f"{folder} uses {', '.join(used)}: its update is not a plain LoRA of the base model; "
            "convert it with PEFT first (convert_to_lora), or train it without"
        )
    try:
        return AdapterConfig.model_validate(raw)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r:.60}"
        ) from None


# --- patterns -----------------------------------------------------------------------------------

LITERAL = re.compile(r"\^?[\w-]+(\.[\w-]+)*")
MOST = 1000
"""The most regular expressions of one adapter, and the most characters of one."""
PATIENCE = 5.0
"""Seconds for all the regular expressions of one adapter."""

Value = TypeVar("Value", int, float)


@dataclass
class Patterns(Generic[Value]):
    """`rank_pattern` or `alpha_pattern`: the first pattern in which a layer's name ends has its value.

    PEFT takes every pattern as a regular expression of Python, which may take any time. Here plain names,
    nearly all patterns in use, are looked up, and expressions are matched by the engine behind pydantic, in a
    time linear in the name; `spent` are their seconds so far.
    """

    what: str
    values: list[Value]
    names: dict[str, int]
    expressions: list[tuple[int, SchemaValidator]]
    spent: float = 0.0

    def of(self, layer: str, default: Value) -> Value:
        """The value of the layer. Raises UserError if the expressions take too long."""
        ends = (
            f"^{layer}",
            layer,
            *(layer.split(".", k)[k] for k in range(1, layer.count(".") + 1)),
        )
        known = (self.names[name] for name in ends if name in self.names)
        found = min(known, default=len(self.values))
        began = monotonic()
        for k, expression in self.expressions:
            if k > found or expression.isinstance_python(layer):
                found = min(k, found)
                break
        self.spent += monotonic() - began
        if self.spent > PATIENCE:
            raise UserError(
                f"{self.what}: its regular expressions take more than {PATIENCE:g} s to match; write the "
                "names of the layers instead"
            )
        return self.values[found] if found < len(self.values) else default


def patterns(what: str, given: Mapping[str, Value] | None) -> Patterns[Value]:
    """Patterns ready to be asked; `what` names them in errors. Raises UserError for one that is none."""
    given = given or {}
    names = {text: k for k, text in enumerate(given) if LITERAL.fullmatch(text)}
    others = [(k, text) for k, text in enumerate(given) if text not in names]
    if len(others) > MOST or any(len(text) > MOST for _, text in others):
        raise UserError(
            f"{what} has more than {MOST} regular expressions, or one of more than {MOST} characters; "
            "write the names of the layers instead"
        )
    expressions = []
    for k, text in others:
        rule = core_schema.str_schema(pattern=rf"^(?:.*\.)?(?:{text})$")
        try:
            expressions.append((k, SchemaValidator(rule)))
        except SchemaError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"{what}: {text!r:.60} cannot be matched: {reason:.100}; write the names of the "
                "layers instead"
            ) from None
    return Patterns(what, list(given.values()), names, expressions)
