"""A first config for rows that nobody has described: guessed from the names and the values of their fields.

Only rules that a reader can check by eye: what they found stands in the comments of the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedhl.data.image_folder import ENDINGS
from fedhl.data.loading import load_rows
from fedhl.errors import UserError
from fedhl.names import listed, plural
from fedhl.task import KINDS
from fedhl.task.images import file_of
from fedhl.task.rows import Rows

LOOK = 20_000
"""The number of rows that are looked at."""
PAIRS = (
    *(("prompt", "completion"), ("instruction", "output"), ("instruction", "response")),
    *(("question", "answer"), ("input", "output"), ("prompt", "response")),
)
"""Fields of prompts and completions, by the names that data sets give them."""
CHATS = ("messages", "conversations")
LABELS = (
    "label",
    "labels",
    "class",
    "category",
    "intent",
    "sentiment",
    "target",
    "rating",
    "stars",
)
OWNERS = (
    *("client", "client_id", "site", "hospital", "bank", "user", "user_id", "author", "speaker"),
    *("owner", "organisation", "organization", "agency", "department"),
    *("domain", "source", "country", "category", "topic"),
)
"""Fields that say whom a row belongs to, or what sets clients apart."""
MOST_LABELS, MOST_CLIENTS, FEWEST_ROWS = 200, 1000, 20
MODELS = {
    "image-classification": "google/vit-base-patch16-224-in21k",
    **dict.fromkeys(
        ("sequence-classification", "multi-label-classification"),
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    **dict.fromkeys(("causal-lm", "preference"), "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


@dataclass(frozen=True)
class Guess:
    """What the rows are taken for: the kind of task, the settings of its fields, and the field of the client,
    with the number of its values; None if no field looks like one."""

    kind: str
    fields: dict[str, str]
    owner: str | None
    owners: int = 0


def guess(rows: Rows) -> Guess:
    """What the rows are. Raises UserError if they have neither images with labels, nor preferences, nor
    chats, nor prompts with completions, nor texts with labels."""
    names = list(rows[0])
    lower = {name.lower(): name for name in names}
    image = next((name for name in names if is_image(rows[0][name])), None)
    label = next((lower[name] for name in LABELS if name in lower), None)
    if image is not None and label is not None:
        return with_owner(rows, "image-classification", {"image": image, "label": label})
    if {"prompt", "chosen", "rejected"} <= lower.keys():
        fields = {name: lower[name] for name in ("prompt", "chosen", "rejected")}
        return with_owner(rows, "preference", fields)
    for chat in CHATS:
        if chat in lower and isinstance(rows[0][lower[chat]], list):
            return with_owner(rows, "causal-lm", {"messages": lower[chat]})
    for prompt, completion in PAIRS:
        if prompt in lower and completion in lower:
            fields = {"prompt": lower[prompt], "completion": lower[completion]}
            return with_owner(rows, "causal-lm", fields)
    texts = {name: length for name in names if (length := mean_length(rows, name)) is not None}
    lists = [name for name in names if is_labels(rows[0][name])]
    if texts and lists:
        text = max(texts, key=lambda name: texts[name] or 0)
        return with_owner(rows, "multi-label-classification", {"text": text, "label": lists[0]})
    few = {name: count for name in names if (count := distinct(rows, name)) is not None}
    known = [lower[name] for name in LABELS if lower.get(name) in few]
    others = [
        n for n in few if n.lower() not in OWNERS and few[n] <= MOST_LABELS and n not in known
    ]
    labels = known + sorted(others, key=lambda name: few[name])
    text = max((n for n in texts if n not in few), key=lambda n: texts[n], default=None)
    if text is None or not labels:
        raise UserError(
            f"the fields {listed(names)} look neither like messages, nor like a prompt and a completion, nor "
            f"like a text and a label of at most {MOST_LABELS} values; write the config by hand "
            "(docs/config.md)"
        )
    return with_owner(rows, "sequence-classification", {"text": text, "label": labels[0]})


def is_image(value: Any) -> bool:
    """Whether a value is the path of an image, or the bytes of a file, which a table has of nothing else."""
    file = file_of(value)
    return isinstance(file, bytes) or (
        isinstance(file, str) and file.lower().endswith(ENDINGS) and len(file.split()) == 1
    )


def is_labels(value: Any) -> bool:
    """Whether a value is a list of names, as labels are."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def with_owner(rows: Rows, kind: str, fields: dict[str, str]) -> Guess:
    """The guess with the field of the client, if a field of such a name has few enough values."""
    for name in rows[0]:
        count = distinct(rows, name)
        if name.lower() in OWNERS and name not in fields.values() and count is not None:
            return Guess(kind, fields, name, count)
    return Guess(kind, fields, None)


def mean_length(rows: Rows, name: str) -> float | None:
    """The mean length of a field's texts; None if not all values are text."""
    values = [row.get(name) for row in rows]
    texts = [value for value in values if isinstance(value, str)]
    return sum(map(len, texts)) / len(texts) if texts and len(texts) == len(values) else None


def distinct(rows: Rows, name: str) -> int | None:
    """The number of a field's values, if it is from 2 to `MOST_CLIENTS` and there are `FEWEST_ROWS` rows of
    each on average; else None."""
    values = {row.get(name) if isinstance(row.get(name), str | int) else None for row in rows}
    fits = 2 <= len(values) <= MOST_CLIENTS and len(values) * FEWEST_ROWS <= len(rows)
    return len(values) if fits and None not in values else None


def draft(source: str, model: str | None = None) -> str:
    """The text of a config for the rows of `source`. Raises UserError for a source that cannot be read, or
    whose fields cannot be guessed."""
    rows = load_rows(source, limit=LOOK)
    found = guess(rows)
    name = (
        re.sub(r"[^A-Za-z0-9]+", "-", Path(source.rpartition(":")[2]).stem).strip("-") or "my-run"
    )
    fields = "".join(f", {setting}: {quoted(field)}" for setting, field in found.fields.items())
    classify = found.kind not in ("causal-lm", "preference")
    texts = found.kind != "image-classification"
    most = f", max_length: {128 if classify else 512}" if texts else ""
    seen = plural(len(rows), "row") if len(rows) < LOOK else f"the first {LOOK:,} rows"
    used = {*found.fields.values(), found.owner}
    unused = [field for field in rows[0] if field not in used]
    lines = [
        f"# A first config for {source}, guessed from {seen}: read it, then fedhl check THIS_FILE",
        "# Every setting and its default: docs/config.md",
        f"name: {name}",
        "",
        f"model: {{source: {quoted(model or MODELS[found.kind])}}} # a hub id, or a folder",
        f"task: {{kind: {found.kind}{fields}{most}}}",
        *([f"# not used: {listed(json.dumps(field) for field in unused)}"] if unused else []),
        f"data: {{source: {quoted(source)}, held_out: {{fraction: 0.1}}}} # held out: to evaluate on",
        "",
        *partition(found),
        "",
        "lora:",
        "  # the rank that each client can afford: here drawn; or {clients: {NAME: 4}, default: 16}",
        "  ranks: {shares: {4: 0.5, 16: 0.3, 64: 0.2}}",
        "",
        "method: fedhl_ef # fedhl methods lists the others",
        "rounds: 10",
        "training:",
        f"  {{epochs: 1, batch_size: {16 if classify else 4}, learning_rate: 1e-3, schedule: linear}}",
        "evaluation: {client_fraction: 0.1} # each client evaluates on a tenth of its rows, too",
        "# stop: {patience: 3} # end when three evaluations in a row were no better",
    ]
    return "\n".join(lines) + "\n"


def partition(found: Guess) -> Sequence[str]:
    if found.owner is not None:
        return [
            f"# a client for each of the {found.owners} values of this field",
            f"partition: {{kind: by-column, column: {quoted(found.owner)}}}",
        ]
    lines = ["# no field says whom a row belongs to, so ten clients are drawn"]
    if KINDS[found.kind].class_setting is None:
        return [*lines, "partition: {kind: iid, clients: 10}"]
    return [
        f"{lines[0]}; a smaller alpha gives each client fewer labels",
        "partition: {kind: dirichlet, clients: 10, alpha: 1.0, min_examples: 20}",
    ]


def quoted(value: Any) -> str:
    """Text as YAML has it inside braces: plain where that is safe, else as JSON, which is YAML, too."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", str(value)) and str(value).lower() not in (
        *("yes", "no", "on", "off", "true", "false", "null", "y", "n"),
    )
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
