"""Exports: a PEFT adapter folder, or the whole model with the update merged."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedhl.errors import UserError
from fedhl.files import whole_folder
from fedhl.lora import LoRA
from fedhl.model.adapters import save_adapter
from fedhl.model.library import quiet
from fedhl.model.loading import Loaded
from fedhl.model.peft import shifted
from fedhl.model.targets import is_conv1d
from fedhl.task import kind_named


def export_adapter(
    out: Path, loaded: Loaded, adapter: Mapping[str, LoRA], head: Mapping[str, Tensor], card: str
) -> None:
    """Write `adapter` and `head` as a PEFT adapter folder of the base model `loaded`, with the tokenizer, and
    for a classifier the model's config, which names the labels.

    Raises UserError if `out` exists and is not an empty folder, or cannot be written.
    """
    with publish(out) as staging:
        save_adapter(
            staging,
            adapter,
            head,
            base=loaded.source_for_adapter,
            task_type=kind_named(loaded.task).peft_type,
            fan_in_fan_out=is_conv1d(loaded.model, list(adapter)),
            revision=loaded.revision,
        )
        if kind_named(loaded.task).head:
            save_config(loaded, staging)
        loaded.processor.save_pretrained(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")


def export_merged(
    out: Path, loaded: Loaded, deltas: Mapping[str, Tensor], head: Mapping[str, Tensor], card: str
) -> None:
    """Write the base model with `W0 + delta` in every layer, as a plain transformers folder.

    `loaded` must come fresh from `load_model`, unquantised and without LoRA layers; its weights are
    changed in place. Deltas are (out, in), by layer name. Raises ValueError for a layer, head
    parameter or shape that the model does not have; UserError as `export_adapter`, and for a 4-bit
    model.
    """
    model = loaded.model
    if getattr(model, "is_loaded_in_4bit", False):
        raise UserError("a 4-bit base cannot be merged into; load the base model unquantised")
    if head.keys() != set(loaded.head):
        raise ValueError(f"head: expected the parameters {sorted(loaded.head)}, got {sorted(head)}")
    modules = dict(model.named_modules())
    with publish(out) as staging, torch.no_grad():
        for name in sorted(deltas):
            if name not in modules:
                raise ValueError(f"layer {name}: not in this {type(model).__name__}")
            base = modules[name]
            base.weight.data = shifted(base, deltas[name])  # pyright: ignore
        for name in loaded.head:
            model.get_parameter(name).copy_(head[name])
        if loaded.use_cache:
            model.config.use_cache = True
        with quiet():
            model.save_pretrained(staging)
        loaded.processor.save_pretrained(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")


def save_config(loaded: Loaded, folder: Path) -> None:
    """Write the model's config as it is without training, with the names of the labels."""
    config = copy.deepcopy(loaded.model.config)
    if loaded.use_cache:
        config.use_cache = True
    config.save_pretrained(folder)


@contextmanager
def publish(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and vanishes otherwise."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"{out} exists and is not an empty folder; choose another --out, or remove it"
        )
    try:
        with whole_folder(out, out.parent / f".{out.name}.partial-{os.getpid()}") as staging:
            yield staging
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}; nothing was left there") from error
