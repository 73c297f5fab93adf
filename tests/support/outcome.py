"""What a run must leave, however often it was stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def result(run: Path) -> dict[str, Any]:
    """Everything about a finished run that must not depend on how often it was stopped."""
    metrics = [json.loads(text) for text in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    for line in metrics:
        del line["seconds"]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    kept = ("status", "rounds_done", "final", "best", "clients", "parameters", "bytes", "hashes")
    return {
        "files": sorted(p.name for p in run.iterdir()),
        "config": (run / "config.yaml").read_text("utf-8"),
        "metrics": json.dumps(metrics),
        "summary": {name: summary[name] for name in kept},
        "states": {
            p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(run.glob("state/*/state.safetensors"))
        },
        "in state": sorted(p.name for p in (run / "state").iterdir()),
    }
