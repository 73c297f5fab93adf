"""The model card of an export: its metadata, code that loads it, and how it was trained."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedhl.task import kind_named

Kind = Literal["adapter", "merged"]
FOLDER, BASE = "path/to/this/folder", "path/to/the/base/model"


def model_card(
    summary: Mapping[str, Any],
    kind: Kind,
    rank: int | None,
    *,
    base: str,
    max_length: int | None,
    labels: Sequence[str] = (),
    licence: str | None = None,
    client: str | None = None,
) -> str:
    """The README.md of an export: metadata, how to load it, and how it was made.

    `summary`: the content of a run's summary.json; `rank`: the rank of an adapter; `base`: the base model's
    hub id, or a folder, which is not named; `max_length`: the most tokens of a row, None if rows are not
    texts; `labels`: the labels of a classifier, in order; `licence`: that of the base model, if it is known;
    `client`: the client whose personal model it is, None of the global model.
    """
    hub, task = hub_id(base), kind_named(summary["task"])
    what = f"A LoRA adapter of rank {rank}" if kind == "adapter" else "The full model"
    of = f"for `{hub}`" if hub else "for a base model that was a local folder"
    scores = own_scores(summary, rank, client)
    then = "," if client is None else f", and then by the client {plain(client)} alone,"
    front = ModelCardData(
        base_model=hub,
        license=licence,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag=task.pipeline,
        tags=["fedhl", "federated-learning", "lora"],
        model_name=plain(str(summary["name"])),
        eval_results=eval_results(summary, scores),
        base_model_relation=hub and ("adapter" if kind == "adapter" else "finetune"),
    )
    advice = "" if licence else " The base model names none here: state it before you publish this."
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {plain(str(summary['name']))}",
        "",
        f"{what} {of}, fine-tuned by {among(summary)} clients that did not share "
        f"their data{then} with fedhl.",
        f"Licence: {licence or 'that of the base model and of the data.'}{advice}",
        "",
        *how_to_load(summary["task"], kind, hub, labels, max_length),
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *(
            f"| {key} | {value} |"
            for key, value in run_facts(summary, rank, scores, client).items()
        ),
        "",
    ]
    return "\n".join(lines)


def among(summary: Mapping[str, Any]) -> int:
    """The number of clients of the federation, of which a client on its own machine knows no other."""
    return summary.get("among") or len(summary["clients"])


def plain(text: str) -> str:
    """A text from elsewhere as Markdown that shows it and does nothing else, on one line."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]#!|~$])", r"\\\1", html.escape(printable, quote=False))


def hub_id(base: str) -> str | None:
    """The hub id of a base model; None of a folder, which only one machine has."""
    return None if Path(base).is_absolute() else base


def base_licence(base: str) -> str | None:
    """The licence that the card of a base model names, a folder or hub id; None if it cannot be read."""
    try:
        source = str(Path(base) / "README.md") if hub_id(base) is None else base
        named = ModelCard.load(source, ignore_metadata_errors=True).data.get("license")
    except Exception:  # no card, no connection, or a card that is none
        return None
    return named if isinstance(named, str) else None


def how_to_load(
    task: str,
    kind: Kind,
    hub: str | None,
    labels: Sequence[str],
    max_length: int | None,
    *,
    classes: int | None = None,
    tokenizer: str = "folder",
) -> list[str]:
    """The section of a card that loads the export and runs it on a row.

    `max_length`: the most tokens of a row in training, None if nobody knows it; `classes`: how many a
    classifier has whose labels nobody has named; `tokenizer`: the variable that names where the tokenizer
    is, `folder` or `base`.
    """
    learnt, base = kind_named(task), hub or BASE
    auto, loader = learnt.auto, learnt.processor
    config = "AutoConfig, " if labels and kind == "adapter" else ""
    code = [f"from transformers import {config}{auto}, {loader}", "", f'folder = "{FOLDER}"']
    if kind == "merged":
        code += [f"model = {auto}.from_pretrained(folder)"]
    else:
        code[:0] = ["from peft import PeftModel"]
        settings = {"num_labels": classes} if classes else learnt.model_settings(None)
        said = "".join(f", {key}={value!r}" for key, value in settings.items())
        named = ", config=config" if labels else said
        named += ", ignore_mismatched_sizes=True" if named else ""
        code += [
            f"base = {json.dumps(base)}{'' if hub else '  # replace this'}",
            *(["config = AutoConfig.from_pretrained(folder)  # with the labels"] if labels else ()),
            f"model = {auto}.from_pretrained(base{named})",
            "model = PeftModel.from_pretrained(model, folder)",
        ]
    name = "tokenizer" if loader == "AutoTokenizer" else "processor"
    code += [
        f"{name} = {loader}.from_pretrained({tokenizer})",
        "",
        *learnt.usage(bool(labels), max_length),
    ]
    lines = ["```python", *code, "```", ""]
    if max_length:
        lines += [f"It was trained on texts of at most {max_length} tokens (`max_length`).", ""]
    if labels:
        names = json.dumps(dict(enumerate(labels)), indent=1)
        lines += ["The labels by their ids:", "", "```json", names, "```", ""]
    return lines


def own_scores(
    summary: Mapping[str, Any], rank: int | None, client: str | None = None
) -> Mapping[str, Any] | None:
    """The held-out metrics of what is exported: the update at this rank, or the full update, or the personal
    model of this client, on the client's own rows; None if nobody has measured them."""
    if client is not None:
        return summary["personal"]["clients"][client]["personal"] if rank is None else None
    final = summary.get("final") or {}
    if rank is None:
        return final.get("full")
    top = final.get("truncated") or {}
    return (final.get("ranks") or {}).get(str(rank)) or (top if top.get("rank") == rank else None)


def eval_results(
    summary: Mapping[str, Any], scores: Mapping[str, Any] | None
) -> list[EvalResult] | None:
    """The metrics for the model index of the hub."""
    task = kind_named(summary["task"])
    found = [(name, scores.get(name)) for name in task.metrics[::-1]] if scores else []
    return [
        EvalResult(task.pipeline, "private", "held-out rows of the federation", name, value)
        for name, value in found
        if value is not None
    ] or None


def run_facts(
    summary: Mapping[str, Any],
    rank: int | None,
    scores: Mapping[str, Any] | None,
    client: str | None = None,
) -> dict[str, str]:
    """The facts needed to judge or to repeat a run, from its summary.json."""
    clients = summary["clients"]
    ranks = sorted(client["rank"] for client in clients)
    counts = ", ".join(f"{ranks.count(r)} of rank {r}" for r in sorted(set(ranks)))
    facts = {
        "method": settings_text(summary["method"]),
        "weighting": settings_text(summary["weighting"]),
        "clients": f"{among(summary)} ({counts}{', and others' * (among(summary) > len(clients))})",
        "training examples": f"{sum(client['examples'] for client in clients)}"
        + ", and those of the others" * (among(summary) > len(clients)),
        "rounds": f"{summary['rounds_done']} of {summary['rounds']}",
    }
    names = kind_named(summary["task"]).metrics[::-1]
    full = (summary.get("final") or {}).get("full")
    here = {} if rank is None else {f"this adapter, rank {rank}": scores}
    if client is not None:
        here |= {
            f"the client's own rows, {stage} model": summary["personal"]["clients"][client][stage]
            for stage in ("global", "personal")
        }
    for what, measured in (here | {"full-rank update": full}).items():
        shown = (
            (f"{k} {measured[k]:.4f}" for k in names if measured.get(k) is not None)
            if measured
            else ()
        )
        facts[f"held out, {what}"] = ", ".join(shown) or "not measured"
    facts["fedhl"] = summary["fedhl"] + (
        f" (commit {summary['commit']})" if summary.get("commit") else ""
    )
    facts["seed"] = str(summary["seeds"]["root"])
    facts |= {f"{what} hash": f"`{value}`" for what, value in summary["hashes"].items()}
    return facts


def settings_text(choice: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in choice.items() if k != "name")
    return f"{choice['name']} ({settings})" if settings else str(choice["name"])
