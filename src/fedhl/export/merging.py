"""Merging PEFT adapters of any ranks: the weighted sum of their updates as one adapter."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCardData
from pydantic_core import from_json
from torch import Tensor

from fedhl import __version__
from fedhl import lora as algebra
from fedhl.errors import UserError
from fedhl.export.cards import FOLDER, base_licence, how_to_load, hub_id, plain
from fedhl.export.fetch import adapter_folder
from fedhl.export.folders import publish
from fedhl.lora import LoRA
from fedhl.model.adapter_config import AdapterConfig
from fedhl.model.adapters import (
    AUTOMATIC_HEADS,
    AdapterFolder,
    adapter_labels,
    is_finite,
    load_adapter,
    save_adapter,
)
from fedhl.task import KINDS

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
"""What the tokenizers of transformers save beside a model."""
# The parameter of a head with a row for each class: a linear layer, alone or after others.
HEAD_ROWS = ("classifier.weight", "score.weight", "out_proj.weight")


class Merge(NamedTuple):
    """The result of `merge_folders`.

    `weights`: those that were used; `ranks`: of the result, by layer; `errors[layer]` and `error` (of all
    layers): the share of the energy that truncation lost, `||ΔW - T_r(ΔW)||² / ||ΔW||²` in [0, 1];
    `unnamed`: the folders of classifiers that do not name the labels of the heads that were averaged.
    """

    weights: tuple[float, ...]
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float
    unnamed: tuple[str, ...] = ()


def merge_adapters(
    adapters: Sequence[Mapping[str, LoRA]], weights: Sequence[float]
) -> dict[str, LoRA]:
    """`Σ w_i s_i B_i A_i` in every layer, exactly, as one adapter of scale 1 and rank `Σ r_i`.

    Raises UserError unless all adapters have the same layers of the same shapes, there is one
    finite weight for each, and the sum is finite.
    """
    if not adapters:
        raise UserError("no adapters to merge; give at least one")
    if len(weights) != len(adapters):
        raise UserError(f"expected one weight per adapter, got {len(weights)} for {len(adapters)}")
    if not all(math.isfinite(w) for w in weights):
        raise UserError(f"weights must be finite numbers, got {list(weights)}")
    first = adapters[0]
    for i, adapter in enumerate(adapters[1:], 2):
        different = sorted(adapter.keys() ^ first.keys())
        if different:
            shown = ", ".join(different[:4]) + (", ..." if len(different) > 4 else "")
            raise UserError(
                f"adapters 1 and {i} do not adapt the same layers; only one of them has {shown}; "
                "merge adapters that were trained with the same target modules"
            )
        for name in sorted(first):
            if adapter[name].shape != first[name].shape:
                raise UserError(
                    f"layer {name} is {first[name].shape} in adapter 1 and {adapter[name].shape} in "
                    f"adapter {i}; they belong to different base models"
                )
    merged = {
        name: algebra.concat(
            (w, adapter[name]) for w, adapter in zip(weights, adapters, strict=True)
        )
        for name in sorted(first)
    }
    for name, lora in merged.items():
        if not (is_finite(lora.A) and is_finite(lora.B)):
            raise UserError(
                f"layer {name}: the sum of the updates times their weights is not finite in float32; "
                f"choose smaller weights than {list(weights)}, and finite adapters"
            )
    return merged


def merge_folders(
    folders: Sequence[str],
    weights: Sequence[float] | None,
    rank: int | None,
    out: str | Path,
    *,
    normalize: bool = True,
    force: bool = False,
) -> Merge:
    """Merge PEFT adapter folders of any ranks and scales into the new PEFT adapter folder `out`.

    `weights` are uniform by default and, if `normalize`, divided by their sum; a head trained beside
    the adapters is always averaged with weights of sum 1. `rank` None keeps the exact sum, whatever
    its rank; otherwise every layer is cut to the best approximation of at most this rank.
    `force` merges adapters of different base models.
    """
    out = Path(out)
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}")
    paths = [adapter_folder(folder) for folder in folders]
    parts = [load_adapter(path) for path in paths]
    if not parts:
        raise UserError("no adapters to merge; name at least one adapter folder")
    used = list(weights) if weights is not None else [1.0] * len(parts)
    if not all(math.isfinite(w) and w >= 0 for w in used):
        raise UserError(f"the weights must be finite numbers and not negative, got {used}")
    if not 0 < sum(used) < math.inf:
        raise UserError(f"the weights must sum to more than 0, and to a finite number, got {used}")
    shares = [w / sum(used) for w in used]
    used = shares if normalize else used
    exact = merge_adapters([part.adapter for part in parts], used)
    config = common_config(folders, parts, force)
    labels = [adapter_labels(path) for path in paths]
    refuse_other_labels(folders, labels)
    head = average_heads(folders, parts, shares)
    frozen = same_frozen(folders, parts)
    tokenizer = common_tokenizer(folders, paths)
    unnamed = [f for f, names in zip(folders, labels, strict=True) if names is None]
    averaged = head and config.task_type in AUTOMATIC_HEADS and len(folders) > 1

    merged: dict[str, LoRA] = {}
    lost, total = {}, {}
    for name, lora in exact.items():
        merged[name], lost[name], total[name] = truncate_layer(lora, rank)
    result = Merge(
        tuple(used),
        {name: lora.rank for name, lora in merged.items()},
        {name: share_of(lost[name], total[name]) for name in merged},
        share_of(sum(lost.values()), sum(total.values())),
        tuple(unnamed) if averaged else (),
    )
    with publish(out) as staging:
        save_adapter(
            staging,
            merged,
            head,
            base=str(config.base_model_name_or_path or ""),
            task_type=config.task_type,
            fan_in_fan_out=config.fan_in_fan_out,
            revision=config.revision,
            frozen=frozen,
        )
        named = next((p for p, names in zip(paths, labels, strict=True) if names is not None), None)
        if head and named is not None:
            shutil.copyfile(named / "config.json", staging / "config.json")
        if tokenizer is not None:
            for file in TOKENIZER_FILES:
                if (tokenizer / file).is_file():
                    shutil.copyfile(tokenizer / file, staging / file)
        names = next((names for names in labels if names is not None), None) if head else None
        card = merge_card(folders, config, result, names, head, tokenizer is not None)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return result


def truncate_layer(lora: LoRA, rank: int | None) -> tuple[LoRA, float, float]:
    """`lora` at a rank of at most `rank` and min(m, n); the energy lost, and the energy it had."""
    full = min(*lora.shape)
    keep = min(full, rank or full)
    if lora.rank <= keep:
        return lora, 0.0, algebra.squared_norm([(1.0, lora)])
    # Columns of B come out as U S, so that their squared norms are the energies; float64 throughout.
    ordered = algebra.truncate(LoRA(lora.A.double(), lora.B.double(), lora.scale), full)
    energy = ordered.B.square().sum(dim=0)
    best = algebra.prefix(ordered, keep, 1.0)
    best = LoRA(best.A.float(), best.B.float(), 1.0)
    return best, float(energy[keep:].sum()), float(energy.sum())


def share_of(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def common_config(folders: Sequence[str], parts: Sequence[AdapterFolder], force: bool) -> Any:
    """The config of the first adapter, after checking that the others belong to the same model."""
    first = parts[0].config
    for folder, part in zip(folders, parts, strict=True):
        for field in ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out"):
            expected, got = getattr(first, field), getattr(part.config, field)
            if got == expected or (force and field in ("base_model_name_or_path", "revision")):
                continue
            advice = "; to merge them anyway, add --force" if field.startswith("base") else ""
            raise UserError(
                f"{folder} and {folders[0]} do not belong together: {field} is {got!r} in the first "
                f"and {expected!r} in the second{advice}"
            )
    return first


def refuse_other_labels(folders: Sequence[str], labels: Sequence[Sequence[str] | None]) -> None:
    """Raises UserError unless all adapters that name their labels name the same, in the same order."""
    named = [(f, names) for f, names in zip(folders, labels, strict=True) if names is not None]
    for folder, names in named[1:]:
        if names != named[0][1]:
            raise UserError(
                f"{folder} and {named[0][0]} are classifiers of other labels, {shown(names)} and "
                f"{shown(named[0][1])}, so that the mean of their heads means nothing; merge adapters of the "
                "same labels in the same order"
            )


def shown(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"


def average_heads(
    folders: Sequence[str], parts: Sequence[AdapterFolder], shares: Sequence[float]
) -> dict[str, Tensor]:
    first = parts[0].head
    for folder, part in zip(folders, parts, strict=True):
        shapes = {name: tuple(t.shape) for name, t in part.head.items()}
        expected = {name: tuple(t.shape) for name, t in first.items()}
        if shapes != expected:
            raise UserError(
                f"{folder} and {folders[0]} have different heads, {shapes} and "
                f"{expected}; merge adapters of the same task and labels"
            )
    return {
        name: torch.stack(
            [w * part.head[name].double() for w, part in zip(shares, parts, strict=True)]
        )
        .sum(dim=0)
        .float()
        for name in sorted(first)
    }


def same_frozen(folders: Sequence[str], parts: Sequence[AdapterFolder]) -> dict[str, Tensor]:
    """The base weights that the adapters bring. Raises UserError if two bring other weights of one layer."""
    found: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for folder, part in zip(folders, parts, strict=True):
        for layer, weight in part.frozen.items():
            if layer in found and not torch.equal(found[layer], weight):
                raise UserError(
                    f"{folder} and {owner[layer]} were trained on other weights of {layer}, as after a "
                    "vocabulary was extended; merge adapters of one base model"
                )
            found.setdefault(layer, weight)
            owner.setdefault(layer, folder)
    return found


def common_tokenizer(folders: Sequence[str], paths: Sequence[Path]) -> Path | None:
    """The first of the folders that brings a tokenizer, if any does. Raises UserError if two of them split
    texts in other ways."""
    read = {}
    for folder, path in zip(folders, paths, strict=True):
        file = path / "tokenizer.json"
        if file.is_file():
            try:
                known = from_json(file.read_bytes())
                # how texts are cut and padded is what the last call asked for, not what the tokenizer is
                read[folder] = path, known | {"truncation": None, "padding": None}
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"cannot read the tokenizer in {file}: {error}") from error
    first = next(iter(read), None)
    for folder, (_, known) in read.items():
        if first is not None and known != read[first][1]:
            raise UserError(
                f"{folder} and {first} were trained with different tokenizers, so that they read other "
                "tokens in the same text; merge adapters of one tokenizer"
            )
    return read[first][0] if first is not None else None


def merge_card(
    folders: Sequence[str],
    config: AdapterConfig,
    merge: Merge,
    labels: Sequence[str] | None,
    head: Mapping[str, Tensor],
    tokenizer: bool,
) -> str:
    """The README.md of a merged adapter; `tokenizer`: whether the folder holds one."""
    ranks = sorted(set(merge.ranks.values()))
    base = config.base_model_name_or_path or None
    hub = base and hub_id(base)
    kind = next(
        (n for n, k in KINDS.items() if k.peft_type == config.task_type and k.peft_type), None
    )
    front = ModelCardData(
        base_model=hub,
        license=base_licence(base) if base else None,
        library_name="peft",
        pipeline_tag=KINDS[kind].pipeline if kind else None,
        tags=["fedhl", "lora", "merge"],
        base_model_relation=hub and "adapter",
    )
    if kind:
        heads = [len(tensor) for name, tensor in head.items() if name.endswith(HEAD_ROWS)]
        use = how_to_load(
            *(kind, "adapter", hub, labels or (), None),
            classes=heads[-1] if heads else None,
            tokenizer="folder" if tokenizer else "base",
        )
    else:
        use = [
            "Load the base model as for any of the adapters, then `peft.PeftModel.from_pretrained(model, "
            f'"{FOLDER}")`.',
            "",
        ]
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        "# Merged LoRA adapter",
        "",
        f"The weighted sum of {len(folders)} LoRA adapters of {plain(hub) if hub else 'one base model'}, "
        f"of rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}, made by "
        f"fedhl {__version__}. The products B A are summed, not the factors; cutting the rank "
        f"lost {merge.error:.3%} of the squared norm.",
        "",
        *use,
        "| adapter | weight |",
        "|---|---|",
        *(
            f"| {plain(Path(f).name)} | {w:.6g} |"
            for f, w in zip(folders, merge.weights, strict=True)
        ),
        "",
    ]
    return "\n".join(lines)
