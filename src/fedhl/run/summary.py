"""`summary.json`: the state of a run, and everything that its numbers depend on."""

from __future__ import annotations

import hashlib
import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedhl import __version__
from fedhl.config import Config
from fedhl.data.label_groups import forgetting, mean_accuracy
from fedhl.data.shards import CLIENTS_OWN
from fedhl.errors import UserError
from fedhl.federation.prepare import Prepared
from fedhl.files import json_text, sha256, write_text
from fedhl.model.processors import processor_hash
from fedhl.record import FAILED, FINISHED, failure, read_scores, read_summary
from fedhl.run.commit import commit
from fedhl.task.examples import classes_of


def hashes(prepared: Prepared, folder: Path) -> dict[str, str]:
    """The hashes of all that a run is made from."""
    loaded = prepared.loaded
    return {
        "config": sha256(folder / "config.yaml"),
        "model": loaded.hash,
        "tokenizer": hash_once(loaded.processor),
        "data": prepared.data.hash,
    }


hash_once = lru_cache(maxsize=4)(processor_hash)
"""`processor_hash`, which reads the whole vocabulary, once for each tokenizer."""


def hash_before(folder: Path, round: int) -> str:
    """The sha256 of the lines of metrics.jsonl of the rounds before this one."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return hashlib.sha256(b"".join(lines[:round])).hexdigest()


def write_summary(
    prepared: Prepared,
    folder: Path,
    lines: Sequence[dict[str, Any]],
    status: str,
    best: dict[str, Any] | None,
) -> None:
    """Write the summary of a run from its metrics, line by line, and its settings. A run that ends without a
    result is not `finished` but `failed`, with the reason."""
    config, federation = prepared.config, prepared.federation
    weighting = config.weighting_used
    before = read_summary(folder) if (folder / "summary.json").exists() else {}
    reason = failure(lines) if status == FINISHED else None
    evaluations = [line["evaluation"] for line in lines if line["evaluation"]]
    summary = {
        "name": config.name,
        "status": status if reason is None else FAILED,
        "reason": reason,
        "fedhl": __version__,
        "commit": commit(),
        "task": config.task.kind,
        "model": before.get("model", config.model.source),
        "data": before.get("data", config.data.source),
        "labels": prepared.data.labels,
        "method": {"name": config.method.name, **config.method.hyperparameters},
        "weighting": {"name": weighting.name, **weighting.hyperparameters},
        "privacy": privacy_summary(prepared, lines),
        "rounds": config.rounds,
        "rounds_done": lines[-1]["round"] if lines else 0,
        "stopped": lines[-1].get("stopped") if lines else None,
        "metric": evaluations[-1]["metric"] if evaluations else None,
        "start": lines[0]["evaluation"] if lines and lines[0]["round"] == 0 else None,
        "final": evaluations[-1] if evaluations else None,
        "best": best,
        "tasks": tasks_summary(prepared, lines),
        "personal": read_scores(folder) if status == FINISHED and reason is None else None,
        "clients": [
            {
                "id": client.id,
                "rank": client.rank,
                "scale": client.scale,
                "examples": client.examples,
                "labels": label_counts(prepared, client.id),
            }
            for client in federation.clients
        ],
        "parameters": parameters(prepared),
        "bytes": {way: sum(line["bytes"][way] for line in lines) for way in ("down", "up")},
        "seconds": {
            phase: sum(line["seconds"].get(phase, 0.0) for line in lines)
            for phase in ("total", "train", "compute", "evaluate")
        },
        "peak_memory_bytes": max(peak_memory(), before.get("peak_memory_bytes", 0)),
        "device": str(federation.device),
        "precision": config.compute.precision,
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("torch", "transformers", "peft", "safetensors", "numpy")
            },
            "platform": platform.platform(),
            "threads": str(torch.get_num_threads()),
        },
        "seeds": {"root": config.seed},
        "hashes": hashes(prepared, folder),
    }
    save_summary(folder, summary)


def mark(folder: Path, status: str) -> None:
    """Change the status in the summary, which is that of the last finished round."""
    save_summary(folder, read_summary(folder) | {"status": status})


def save_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_text(folder / "summary.json", json_text(summary, indent=1) + "\n")


def label_counts(prepared: Prepared, client: str) -> dict[str, int] | None:
    """The number of a client's training rows with each label; None if the model has no labels, and if only
    the client knows it."""
    names = prepared.data.labels
    rows = prepared.tokenised.train.get(client)
    if names is None or rows is None:
        return None
    counts = Counter(k for example in rows for k in classes_of(example.labels))
    return {name: counts[k] for k, name in enumerate(names) if counts[k]}


def privacy_summary(
    prepared: Prepared, lines: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The mechanism, and the ε spent so far; None without privacy."""
    config, mechanism = prepared.config.privacy, prepared.federation.privacy
    if config is None or mechanism is None:
        return None
    return {
        **config.model_dump(),
        "clients": mechanism.clients,
        "rate": mechanism.rate,
        "denominator": mechanism.denominator,
        "deviation": mechanism.deviation,
        "epsilon": lines[-1]["diagnostics"]["epsilon"] if lines else 0.0,
    }


def tasks_summary(prepared: Prepared, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The labels of each task; for each finished task its last round, and the accuracy on all tasks so far;
    after the last finished task the mean accuracy, and the forgetting."""
    names, tasks, period = prepared.data.labels, prepared.data.tasks, prepared.config.period
    if names is None or not tasks:
        return None
    done = [
        (line["round"], line["evaluation"]["tasks"]["accuracy"])
        for line in lines
        if line["round"] and line["round"] % period == 0 and line["evaluation"]["tasks"]
    ]
    accuracy = [row for _, row in done]
    return {
        "labels": [[names[k] for k in task] for task in tasks],
        "rounds": [round for round, _ in done],
        "accuracy": accuracy,
        "mean": mean_accuracy(accuracy) if accuracy else None,
        "forgetting": forgetting(accuracy) if accuracy else None,
    }


def parameters(prepared: Prepared) -> dict[str, Any]:
    """Numbers in the frozen base, in the adapter of each rank, and in the head."""
    slots = prepared.federation.slots
    adapters = {p for slot in slots.factors.values() for pair in slot.values() for p in pair}
    head = sum(p.numel() for p in slots.head.values())
    return {
        "base": sum(p.numel() for p in slots.model.parameters() if p not in adapters) - head,
        "trainable": {
            str(rank): sum(p.numel() for pair in slot.values() for p in pair)
            for rank, slot in slots.factors.items()
        },
        "head": head,
    }


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def clients_own_data(folder: Path) -> bool:
    """Whether the clients of this run have rows of their own."""
    file = folder / "summary.json"
    return file.is_file() and read_summary(folder)["hashes"]["data"].startswith(CLIENTS_OWN)


def check_same(folder: Path, config: Config, now: Mapping[str, str]) -> None:
    """Raises UserError unless each hash in `now` is the hash from when the run began."""
    if not (folder / "summary.json").is_file():
        return
    was = read_summary(folder)["hashes"]
    sources = {
        "config": folder / "config.yaml",
        "model": config.model.source,
        "tokenizer": config.model.source,
        "data": config.data.source,
    }
    for what, hash in now.items():
        if was.get(what, hash) != hash:  # an older run has no hash of its tokenizer
            raise UserError(
                f"the {what} has changed since {folder} began: {sources[what]} had the hash {was[what]}, now "
                f"{hash}; restore the {what}, or start a new run"
            )


def check_checkpoint(folder: Path, manifest: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raises UserError unless a checkpoint is of the run in this folder: of the same config, model, tokenizer
    and data, and after the rounds in metrics.jsonl. A checkpoint of an older fedhl does not say."""
    round = manifest["round"]
    for what, hash in manifest.get("hashes", now).items():
        if now[what] != hash:
            raise UserError(
                f"{folder}: the checkpoint of round {round} is of another run: its {what} has the hash "
                f"{hash}, that of this folder {now[what]}; restore the {what}, or the folder's own state"
            )
    before = hash_before(folder, round)
    if manifest.get("before", before) != before:
        raise UserError(
            f"{folder}/metrics.jsonl: the lines of the rounds before {round} are not those that the run "
            "wrote; restore the file"
        )
