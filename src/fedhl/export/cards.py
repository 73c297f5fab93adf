"""The model card of an export: its kind, how to load it, and how it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedhl.task import KINDS

Kind = Literal["adapter", "merged"]


def model_card(
    summary: Mapping[str, Any],
    kind: Kind,
    rank: int | None,
    *,
    base: str,
    labels: Sequence[str] = (),
) -> str:
    """The README.md of an export: metadata, how to load it, and how it was made.

    `summary`: the content of a run's summary.json; `rank`: the rank of an adapter; `base`: the base model's
    name; `labels`: the labels of a classifier, in order.
    """
    what = f"A LoRA adapter of rank {rank}" if kind == "adapter" else "The full model"
    front = {
        "base_model": base,
        "base_model_relation": "adapter" if kind == "adapter" else "finetune",
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": KINDS[summary["task"]].pipeline,
        "tags": ["fedhl", "federated-learning", "lora"],
    }
    lines = [
        *front_matter(front),
        f"# {summary['name']}",
        "",
        f"{what} for `{base}`, fine-tuned by {len(summary['clients'])} clients that did not share "
        "their data, with fedhl.",
        "",
        *how_to_load(summary["task"], kind, base, labels),
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in run_facts(summary).items()),
        "",
    ]
    return "\n".join(lines)


def front_matter(front: Mapping[str, Any]) -> list[str]:
    # A JSON scalar or list is valid YAML, with any quoting that a path or a name needs.
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]


def how_to_load(task: str, kind: Kind, base: str, labels: Sequence[str]) -> list[str]:
    auto, head = KINDS[task].auto, KINDS[task].head
    folder = "path/to/this/folder"
    if kind == "merged":
        code = [
            f"from transformers import {auto}, AutoTokenizer",
            f'model = {auto}.from_pretrained("{folder}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        ]
    else:
        # a head without labels says one number
        count = f", num_labels={len(labels) or 1}" if head else ""
        code = [
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            f"base = {auto}.from_pretrained({json.dumps(base)}{count})",
            f'model = PeftModel.from_pretrained(base, "{folder}")',
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)})",
        ]
    lines = ["```python", *code, "```", ""]
    if labels:
        lines += ["Labels, in order: " + ", ".join(f"`{label}`" for label in labels) + ".", ""]
    return lines


def run_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The facts needed to judge or to repeat a run, from its summary.json."""
    clients = summary["clients"]
    ranks = sorted(client["rank"] for client in clients)
    counts = ", ".join(f"{ranks.count(r)} of rank {r}" for r in sorted(set(ranks)))
    facts = {
        "method": settings_text(summary["method"]),
        "weighting": settings_text(summary["weighting"]),
        "clients": f"{len(clients)} ({counts})",
        "training examples": f"{sum(client['examples'] for client in clients)}",
        "rounds": f"{summary['rounds_done']} of {summary['rounds']}",
    }
    final = summary.get("final") or {}
    names = KINDS[summary["task"]].metrics[::-1]
    for key, name in (("full", "full-rank update"), ("truncated", "update at the top rank")):
        scores = final.get(key)
        if scores:
            shown = (k for k in names if scores.get(k) is not None)
            facts[f"held out, {name}"] = ", ".join(f"{k} {scores[k]:.4f}" for k in shown)
    facts["fedhl"] = summary["fedhl"] + (
        f" (commit {summary['commit']})" if summary.get("commit") else ""
    )
    facts["seed"] = str(summary["seeds"]["root"])
    facts |= {f"{what} hash": f"`{value}`" for what, value in summary["hashes"].items()}
    return facts


def settings_text(choice: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in choice.items() if k != "name")
    return f"{choice['name']} ({settings})" if settings else str(choice["name"])
