"""What trackers cost a run: seconds to open a record, milliseconds for each round, seconds to close it.

    python benchmarks/tracking.py [--clients 10] [--rounds 100] [--json FILE]

Each tracker has a process of its own, which adds made-up rounds to a run folder one by one and lets the
tracker have each, as a run does. `all clients`: with `clients: true`. In the same run each record is read
back: it must have every round once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from fedhl.config import load_config
from fedhl.files import append_line
from fedhl.run.commit import commit
from fedhl.run.tracking import Trackers
from fedhl.watch import Watcher

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}


def made_up(round: int, clients: int) -> dict[str, Any]:
    """A line of metrics.jsonl as a classifier of 24 adapted layers writes it."""
    loss = math.exp(-round / 50)
    metrics = {"loss": loss, "examples": 1000, "accuracy": 1 - loss / 2}
    ids = [f"client-{k}" for k in range(clients)]
    spectrum = {"energy": loss, "tail_share": 0.01, "effective_rank": 3.5}
    layers = {f"encoder.layer.{k}": {**spectrum, "singular_values": 8 * [loss]} for k in range(24)}
    own = {id: metrics for id in ids}
    record = {"rank": 8, "scale": 2.0, "examples": 100, "weight": 1 / clients, "error": 0.01}
    record |= {"drift": loss, "loss": loss, "steps": 8, "layers": 24, "bytes_down": 163_000}
    return {
        "round": round,
        "learning_rate": 1e-3,
        "evaluation": {
            **{"metric": "accuracy", "full": metrics, "truncated": {"rank": 64, **metrics}},
            "ranks": {},
            "clients": {
                "mean": metrics,
                "worst": {"client": ids[0], **metrics},
                "by_client": own,
            },
        },
        "clients": [{"id": id, **record, "bytes_up": 163_000} for id in ids],
        "refused": [],
        "diagnostics": {
            **{"product_gap": loss, "aggregation_error": 1e-7, "effective_clients": clients * 0.9},
            **{"chi2": 0.1, "weighted_error": 1e-3, "memories": 4, **spectrum},
            **{"spectrum": 80 * [loss], "layers": layers},
        },
        "bytes": {"down": clients * 163_000, "up": clients * 163_000},
        "seconds": {
            **{"broadcast": 0.03, "train": 2.1, "compute": 2.0, "diagnostics": 0.1},
            **{"aggregate": 0.1, "evaluate": 0.4, "total": 2.9, "checkpoint": 0.1},
        },
    }


def one(name: str, every: bool, rounds: int, clients: int, folder: Path) -> dict[str, Any]:
    """The times of one tracker. Raises AssertionError if its record does not have every round once."""
    tracker = json.dumps({"name": name, "clients": every})
    config = load_config(ROOT / "configs" / "demo.yaml", [f"report_to={tracker}"])
    (folder / "summary.json").write_text('{"status": "finished"}')
    said: list[str] = []
    began = perf_counter()
    trackers = Trackers(config, folder, Watcher(say=said.append))
    opening, sending = perf_counter() - began, []
    for round in range(rounds):
        append_line(folder / "metrics.jsonl", made_up(round, clients))
        began = perf_counter()
        trackers.send()
        sending.append(perf_counter() - began)
    began = perf_counter()
    trackers.close()
    closing = perf_counter() - began
    assert len(said) == 1, said
    assert steps(name, folder) == [*range(rounds)]
    return {
        "seconds to open": opening,
        "milliseconds a round, median": 1000 * median(sending),
        "milliseconds of the slowest round": 1000 * max(sending),
        "seconds to close": closing,
    }


def steps(name: str, folder: Path) -> list[int]:
    """The steps at which a record has the training loss, by the tracker's own reader."""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        return [event.step for event in events.Reload().Scalars("train/loss")]
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient((folder / "mlruns").as_uri())
        experiment = client.get_experiment_by_name("fedhl")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        return [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    record = (folder / "wandb" / "latest-run").resolve()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    entries = [json.loads(text) for text in answer.stdout.splitlines()]
    return [e["history"]["step"]["num"] for e in entries if e["type"] == "history"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--one", nargs=2, metavar=("TRACKER", "ALL"), help="for this program's own use"
    )
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as place:
            name, every = given.one
            found = one(name, every == "all", given.rounds, given.clients, Path(place))
        print(json.dumps(found))
        return
    results: dict[str, Any] = {}
    for name in PACKAGES:
        for every in ("round", "all"):
            command = [sys.executable, __file__, "--one", name, every]
            command += ["--rounds", str(given.rounds), "--clients", str(given.clients)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            label = name + (", all clients" if every == "all" else "")
            results[label] = json.loads(done.stdout.splitlines()[-1])
            times = ", ".join(f"{what}: {value:.3g}" for what, value in results[label].items())
            print(f"{label}: {times}", flush=True)
    if given.json:
        whole = {
            "clients": given.clients,
            "rounds": given.rounds,
            "trackers": results,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in PACKAGES.values()},
            },
            "commit": commit(),
        }
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
