"""The values of the section on personal models: each client's own rows, and how two models score on them."""

from __future__ import annotations

from fedhl.report.files import Run, dig, natural, num
from fedhl.report.render import View


def personal(run: Run) -> View | None:
    """None for a run without personal models."""
    clients = dig(run.summary, "personal", "clients")
    if not isinstance(clients, dict):
        return None
    rows = [
        {
            "id": id,
            "order": " ".join(f"{n:09d}{t}" for _, n, t in natural(id)),
            "held_out": num(clients[id], "personal", "examples"),
            "steps": num(clients[id], "steps"),
            **compared(clients[id], run.metric),
        }
        for id in sorted(clients, key=natural)
    ]
    counts = {key: num(run.summary, "personal", key) for key in ("gained", "lost", "stayed")}
    mean = compared(dig(run.summary, "personal", "mean"), run.metric)
    return {"rows": rows, "mean": mean, **counts}


def compared(record: object, metric: str) -> View:
    """The metric of both models, and their difference."""
    before, after = num(record, "global", metric), num(record, "personal", metric)
    difference = None if before is None or after is None else after - before
    return {"before": before, "after": after, "difference": difference}
