"""Folders of runs that never were, and pages as a browser reads them."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

Json = dict[str, Any]
LAYERS = ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value")


def fake_run(
    path: Path,
    clients: int = 10,
    rounds: int = 12,
    fraction: float = 1.0,
    task: str = "sequence-classification",
    server_data: bool = True,
    labels: int = 2,
    seed: int = 0,
) -> Path:
    """A run folder with plausible numbers: a decaying spectrum, and errors and weights that follow it."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    metric = "accuracy" if task == "sequence-classification" else "loss"
    everyone = [_client(rng, i, labels if metric == "accuracy" else 0) for i in range(clients)]
    lines = [
        _round(rng, t, rounds, everyone, fraction, metric, server_data) for t in range(rounds + 1)
    ]
    values = [
        (line["evaluation"]["full"] or line["evaluation"]["clients"]["mean"])[metric]
        for line in lines
    ]
    top = (max if metric == "accuracy" else min)(values)
    summary = {
        "name": path.name,
        "status": "finished",
        "fedhl": "0.1.0",
        "commit": "abc1234",
        "method": {"name": "fedhl"},
        "weighting": {"name": "truncation", "power": 2, "epsilon": 0.001},
        "task": task,
        "rounds": rounds,
        "rounds_done": rounds,
        "metric": metric,
        "final": lines[-1]["evaluation"],
        "best": {"round": values.index(top), "value": top},
        "clients": everyone,
        "parameters": {
            "base": 22_700_000,
            "trainable": {str(c["rank"]): 18432 * c["rank"] for c in everyone},
            "head": 770,
        },
        "bytes": {way: sum(line["bytes"][way] for line in lines) for way in ("down", "up")},
        "seconds": {
            key: sum(line["seconds"][key] for line in lines)
            for key in ("total", "train", "compute")
        },
        "peak_memory_bytes": 1_234_567_890,
        "versions": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
        },
        "seeds": {"root": 0},
        "hashes": {
            "config": "9f86d081884c7d65",
            "model": "60303ae22b998861",
            "data": "fd61a03af4f77d87",
        },
        "device": "cpu",
        "precision": "float32",
    }
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.yaml").write_text(
        f"name: {path.name}\nmethod:\n  name: fedhl\nrounds: {rounds}\n"
    )
    return path


def _client(rng: random.Random, number: int, labels: int) -> Json:
    examples = int(200 + 900 * rng.random() ** 2)
    shares = [rng.gammavariate(0.5, 1.0) + 0.01 for _ in range(labels)]
    counts = {str(k): round(examples * s / sum(shares)) for k, s in enumerate(shares)}
    rank = (4, 4, 4, 8, 8, 16, 4, 8, 32, 64)[number % 10]
    return {
        "id": f"client-{number}",
        "rank": rank,
        "scale": 2.0,
        "examples": examples,
        "labels": counts or None,
    }


def _scores(rng: random.Random, progress: float, metric: str) -> Json:
    noise = rng.gauss(0, 0.006)
    loss = (0.70 if metric == "accuracy" else 2.60) - 0.22 * progress + noise
    found: Json = {"loss": loss, "examples": 500}
    return found | ({"accuracy": 0.5 + 0.29 * progress - noise} if metric == "accuracy" else {})


def _round(
    rng: random.Random,
    t: int,
    rounds: int,
    everyone: list[Json],
    fraction: float,
    metric: str,
    server_data: bool,
) -> Json:
    progress = 1 - math.exp(-4 * t / max(rounds, 1))
    spectrum = [math.sqrt(progress) * 2.5 * j**-0.9 for j in range(1, 73)] if t else []
    energy = math.fsum(s * s for s in spectrum)
    chosen = rng.sample(everyone, max(1, round(fraction * len(everyone)))) if t else []
    cohort = []
    for client in sorted(chosen, key=lambda c: c["id"]):
        kept = math.fsum(s * s for s in spectrum[: client["rank"]])
        traffic = 4 * 18432 * client["rank"]
        cohort.append(
            {key: client[key] for key in ("id", "rank", "scale", "examples")}
            | {
                "error": max(0.0, 1 - kept / energy) if t > 1 else 0.0,
                "drift": 0.4 * client["rank"] ** 0.3 * rng.uniform(0.8, 1.2) / math.sqrt(t),
                "loss": 0.7 - 0.3 * progress + rng.gauss(0, 0.02),
                "steps": 10,
                "bytes_down": traffic,
                "bytes_up": traffic + 3080,
            }
        )
    raw = [1 / (client["error"] ** 2 + 0.02) for client in cohort]
    shares = [client["examples"] / sum(c["examples"] for c in cohort) for client in cohort]
    for client, value in zip(cohort, raw, strict=True):
        client["weight"] = value / sum(raw)
    weights = [client["weight"] for client in cohort]
    compute = rng.uniform(7.5, 8.5) if t else 0.0
    seconds = {
        "broadcast": 0.12 * bool(t),
        "train": compute * 1.03,
        "compute": compute,
        "aggregate": 0.2 * bool(t),
        "diagnostics": 0.1 * bool(t),
        "evaluate": rng.uniform(1.1, 1.4),
        "checkpoint": 0.05,
    }
    seconds["total"] = 0.02 + sum(v for k, v in seconds.items() if k != "compute")
    ranks = sorted({client["rank"] for client in everyone})
    scores: Json = {
        "metric": metric,
        "full": _scores(rng, progress, metric) if server_data else None,
        "truncated": {"rank": max(ranks), **_scores(rng, progress * 0.98, metric)}
        if server_data
        else None,
        "clients": None,
    }
    if not server_data:
        each = {c["id"]: _scores(rng, progress * rng.uniform(0.7, 1), metric) for c in everyone}
        pick = min if metric == "accuracy" else max
        worst = pick(each, key=lambda name: each[name][metric])
        mean = {k: math.fsum(s[k] for s in each.values()) / len(each) for k in {metric, "loss"}}
        scores["clients"] = {
            "mean": mean,
            "worst": each[worst] | {"client": worst},
            "by_client": each,
        }
    elif t == rounds:
        scores["ranks"] = {str(r): _scores(rng, progress * (1 - 0.4 / r), metric) for r in ranks}
    return {
        "round": t,
        "learning_rate": 1e-3,
        "evaluation": scores,
        "clients": cohort,
        "refused": [{"id": "client-3", "reason": "a non-finite value in layer q"}]
        if t == 5
        else [],
        "diagnostics": {
            "aggregation_error": rng.uniform(1e-7, 3e-7) if t else None,
            "step": math.hypot(*(c["weight"] * c["drift"] for c in cohort)) if t else None,
            "product_gap": 0.4 * progress * rng.uniform(0.9, 1.1) if t else None,
            "effective_clients": 1 / math.fsum(w * w for w in weights) if t else None,
            "chi2": math.fsum((p - q) ** 2 / q for p, q in zip(weights, shares, strict=True))
            if t
            else None,
            "weighted_error": math.fsum(c["weight"] ** 2 * c["error"] for c in cohort)
            if t
            else None,
            "energy": energy,
            "tail_share": math.fsum(s * s for s in spectrum[max(ranks) :]) / energy if t else None,
            "effective_rank": 4 + 20 * progress if t else None,
            "spectrum": spectrum,
            "layers": {name: {"energy": energy / 2} for name in LAYERS},
        },
        "bytes": {way: sum(c[f"bytes_{way}"] for c in cohort) for way in ("down", "up")},
        "seconds": seconds,
    }


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text by tag, and whether every tag was closed."""

    void = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "script" not in self.open:
            self.text.append(data)

    def numbers(self) -> list[float]:
        return [float(attrs["value"] or "") for tag, attrs in self.tags if tag == "data"]


EVIL = """<evil a="'$x^{$'">&"""


def evil(html: str) -> list[str]:
    """Where a text from a file became a tag or an attribute of the page."""
    tags = [tag for tag, attributes in Page(html).tags if "evil" in f"{tag}{[*attributes]}"]
    return tags + re.findall("<evil.{,20}", html)


def evil_metric(run: Path) -> None:
    for file in (run / "metrics.jsonl", run / "summary.json"):
        file.write_text(file.read_text().replace('"accuracy"', json.dumps(EVIL)))
