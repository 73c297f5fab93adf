"""Adapter folders in PEFT's format, written and read without their base model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhl.errors import UserError
from fedhl.lora import LoRA

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
# Heads that PEFT itself wraps, for these tasks, by the end of the module's name.
AUTOMATIC_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def cpu_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


class AdapterFolder(NamedTuple):
    """The contents of a PEFT LoRA folder: the adapter, the head trained beside it, and the config."""

    adapter: dict[str, LoRA]
    head: dict[str, Tensor]
    config: LoraConfig


def save_adapter(
    folder: Path,
    adapter: Mapping[str, LoRA],
    head: Mapping[str, Tensor],
    *,
    base: str,
    task_type: str | None,
    fan_in_fan_out: bool = False,
    revision: str | None = None,
) -> None:
    """Write the PEFT adapter folder of `adapter` and `head`; ranks may differ between layers.

    The scale goes into B, and `lora_alpha = r`, so that PEFT's own scaling is 1 in every layer.
    `base` and `revision` name the model of the adapter, `task_type` is PEFT's name for its kind of task.
    """
    ranks = {name: adapter[name].rank for name in sorted(adapter)}
    if not ranks or min(ranks.values()) < 1:
        empty = [name for name, rank in ranks.items() if rank < 1]
        raise ValueError(
            f"an adapter needs at least one component in every layer; without one: {empty}"
        )
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored, or PEFT would take the pattern for any layer that ends in this name.
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        base_model_name_or_path=base,
        revision=revision,
        task_type=task_type,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        modules_to_save=head_modules(head) or None,
        fan_in_fan_out=fan_in_fan_out,
    )
    config.target_modules = list(ranks)  # PEFT made it a set; in order, the same file every time
    tensors: dict[str, Tensor] = {}
    for name in ranks:
        lora = adapter[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = cpu_copy(lora.A).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = cpu_copy(lora.B * lora.scale).contiguous()
    for name in sorted(head):
        tensors[PREFIX + name] = cpu_copy(head[name]).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def head_modules(head: Mapping[str, Tensor]) -> list[str]:
    """The modules that PEFT must save whole to cover these parameters, none inside another."""
    modules: set[str] = set()
    for name in head:
        parts = name.split(".")[:-1]
        if not parts:
            raise ValueError(
                f"head parameter {name!r} belongs to no module, so that PEFT cannot save it"
            )
        ends = [i for i, part in enumerate(parts, 1) if part.endswith(("classifier", "score"))]
        modules.add(".".join(parts[: ends[0] if ends else len(parts)]))
    return sorted(m for m in modules if not any(m.startswith(other + ".") for other in modules))


def load_adapter(folder: Path) -> AdapterFolder:
    """The contents of a PEFT LoRA folder, in float32, without loading its base model.

    Raises UserError for anything that plain LoRA on linear layers cannot express, and for any
    tensor that is missing, unknown or of a shape that contradicts the config.
    """
    config = read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} holds no {WEIGHTS_FILE}; expected a PEFT adapter folder (pickled .bin weights are "
            "not read: load and save the adapter again with a recent PEFT)"
        )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / WEIGHTS_FILE}: {error}; is it complete?") from error
    factors: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key in sorted(tensors):
        name = key.removeprefix(PREFIX)
        tensor = tensors[key].float()
        if name == key:
            raise UserError(f"{folder}: tensor {key!r} does not start with {PREFIX!r}")
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            layer, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
            factors.setdefault(layer, {})[factor] = tensor
        elif is_head(name, config):
            head[name] = tensor
        else:
            raise UserError(
                f"{folder}: tensor {name!r} is neither a LoRA factor of a linear layer nor in "
                f"modules_to_save ({config.modules_to_save}); such adapters are not supported"
            )
    if not factors:
        raise UserError(f"{folder}: {WEIGHTS_FILE} holds no LoRA factors")
    adapter = {layer: read_layer(folder, layer, factors[layer], config) for layer in factors}
    return AdapterFolder(adapter, head, config)


def read_layer(folder: Path, layer: str, factors: Mapping[str, Tensor], config: LoraConfig) -> LoRA:
    if factors.keys() != {"A", "B"}:
        raise UserError(
            f"{folder}: layer {layer} has only lora_{next(iter(factors))}, expected lora_A and lora_B"
        )
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
    A, B = factors["A"], factors["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise UserError(
            f"{folder}: layer {layer}: the config says rank {rank}, "
            f"but A is {tuple(A.shape)} and B is {tuple(B.shape)}"
        )
    return LoRA(A, B, float(alpha / (math.sqrt(rank) if config.use_rslora else rank)))


def is_head(name: str, config: LoraConfig) -> bool:
    saved = (*(config.modules_to_save or ()), *AUTOMATIC_HEADS.get(str(config.task_type), ()))
    parts = name.split(".")[:-1]
    return any(".".join(parts[:i]).endswith(saved) for i in range(1, len(parts) + 1))


# What must be unset for an adapter to be plain LoRA on linear layers.
NOT_PLAIN = (
    *("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config"),
    *("use_bdlora", "kasa_config", "velora_config", "monteclora_config", "megatron_config"),
    *("target_parameters", "trainable_token_indices", "layer_replication"),
)
# Initialisations that leave the base weights as they were; others (PiSSA, OLoRA, ...) change them.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}; expected the folder of a PEFT adapter")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if kind != "LORA":
        raise UserError(f"{folder} is a {kind} adapter; only LORA is supported")
    used = [name for name in NOT_PLAIN if raw.get(name)]
    if raw.get("bias", "none") != "none":
        used.append("bias")
    if raw.get("init_lora_weights", True) not in PLAIN_INITS:
        used.append(f"init_lora_weights={raw['init_lora_weights']}")
    if used:
        raise UserError(
            f"{folder} uses {', '.join(used)}: its update is not a plain LoRA of the base model; "
            "convert it with PEFT first (convert_to_lora), or train it without"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    assert isinstance(config, LoraConfig)
    return config
