"""Each client alone: a run of its own for every client, and one record of all of them together.

A client alone is a federation of one: `participation.only` leaves it the rows, the rank, the held-out rows
and the draws that it has among all. The record of all is a run folder like any other, so that reports and
comparisons read it: its scores of the full W are means over the clients' models on the server's held-out
rows, its seconds are sums, and no byte has moved.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedhl.config import Config
from fedhl.config.text import dump_config
from fedhl.federation.examine import examine
from fedhl.federation.scores import over_clients
from fedhl.files import finite, json_text, private_folder, write_text
from fedhl.record import FAILED, FINISHED, more_is_better, read_metrics, read_summary, unit_of
from fedhl.report import write_report
from fedhl.run import resume_run, start_run
from fedhl.run.folder import anchored, trackers_of
from fedhl.watch import Watcher

Json = dict[str, Any]


def run_alone(config: Config, folder: Path, watcher: Watcher) -> None:
    """Start the missing runs, continue the stopped ones, and write the record of all."""
    private_folder(folder)
    write_text(folder / "config.yaml", dump_config(anchored(config)))
    runs = []
    clients = list(examine(config)[1])
    for k, client in enumerate(clients):
        run = folder / "clients" / str(k)
        here = watcher.labelled(f"{client} alone ({k + 1} of {len(clients)})")
        if not (run / "config.yaml").is_file():
            start_run(of_one(config, client), run, here)
        elif not finished(run):
            resume_run(run, here, [trackers_of(of_one(config, client))])
        runs.append(run)
        gc.collect()  # a model refers to itself: free it before the next is loaded
    names = config.task.metrics
    lines = [finite(line) for line in together([read_metrics(run) for run in runs], names)]
    text = "".join(json_text(line) + "\n" for line in lines)
    summary = summed_up([read_summary(run) for run in runs], lines)
    write_text(folder / "metrics.jsonl", text)
    write_text(folder / "summary.json", json_text(summary, indent=1) + "\n")
    write_report(folder)


def finished(run: Path) -> bool:
    """Whether nothing is left to do in a run folder, be it of one run or the record of several."""
    if not (run / "config.yaml").is_file() or not (run / "summary.json").is_file():
        return False
    # a kill in the last moment leaves no report: resuming writes it
    return read_summary(run)["status"] in (FINISHED, FAILED) and (run / "report.html").is_file()


def of_one(config: Config, client: str) -> Config:
    """The settings of one client's run: it takes part in every round, and trackers have it by its name."""
    raw = config.model_dump(mode="json")
    raw["participation"] |= {"only": [client], "fraction": 1.0, "count": None}
    for tracker in raw["report_to"]:
        if "run" in tracker:
            tracker["run"] = f"{tracker['run'] or config.name}, {client}"
    return Config.model_validate(raw)


def together(runs: Sequence[Sequence[Json]], names: Sequence[str]) -> Iterator[Json]:
    """The lines of all rounds, each from the lines of all clients; `names`: of the metrics."""
    for lines in zip(*runs, strict=True):
        yield {
            **{key: lines[0][key] for key in ("round", "learning_rate")},
            "evaluation": scores([line["evaluation"] for line in lines], names),
            "clients": [
                client | {"bytes_down": 0, "bytes_up": 0}
                for line in lines
                for client in line["clients"]
            ],
            "refused": [client for line in lines for client in line["refused"]],
            "diagnostics": {},
            "bytes": {"down": 0, "up": 0},
            "seconds": {
                phase: sum(line["seconds"][phase] for line in lines)
                for phase in lines[0]["seconds"]
            },
        }


def scores(evaluations: Sequence[Json | None], names: Sequence[str]) -> Json | None:
    """The evaluation of a round: means over the clients' models on the server's rows, and the metrics of each
    on its own rows. None if this round was not evaluated."""
    known = [each for each in evaluations if each]
    if not known:
        return None
    own = [each["clients"]["by_client"] for each in known if each["clients"]]
    by_client = {id: numbers(metrics) for group in own for id, metrics in group.items()}
    found: Json = {
        "metric": known[0]["metric"],
        "greater": more_is_better(known[0]),
        "unit": unit_of(known[0]),
    }
    for rows in ("full", "validation"):
        each = [numbers(e[rows]) for e in known if e.get(rows)]
        found[rows] = {n: sum(m[n] for m in each) / len(each) for n in names} if each else None
    return found | {
        "truncated": None,
        "ranks": {},
        "clients": over_clients(by_client, found["metric"], found["greater"], found["unit"])
        if by_client
        else None,
    }


def numbers(metrics: Json) -> dict[str, float]:
    """The metrics as they were before they became JSON, which has no NaN."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def summed_up(summaries: Sequence[Json], lines: Sequence[Json]) -> Json:
    """The summary of all runs, from those of each client."""
    first = summaries[0]
    failed = [s["reason"] for s in summaries if s["status"] == FAILED]
    evaluations = [line["evaluation"] for line in lines if line["evaluation"]]
    return first | {
        "status": FAILED if failed else FINISHED,
        "reason": failed[0] if failed else None,
        "method": {"name": "alone"},
        "start": lines[0]["evaluation"],
        "final": evaluations[-1],
        "best": None,
        "clients": [client for s in summaries for client in s["clients"]],
        "parameters": first["parameters"]
        | {"trainable": {k: v for s in summaries for k, v in s["parameters"]["trainable"].items()}},
        "bytes": {"down": 0, "up": 0},
        "seconds": {
            phase: sum(s["seconds"][phase] for s in summaries) for phase in first["seconds"]
        },
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in summaries),
    }
