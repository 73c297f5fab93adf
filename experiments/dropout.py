"""Accuracy with clients that drop out, against the same run in which nobody does.

    python experiments/dropout.py [--seeds 0 1 2] [--chance 0.3] [--out experiments/results/dropout.json]

Five of the ten clients of configs/compare.yaml are asked in each round; each one does not answer with this
chance. The server goes on with the others, as over the network: that the state is then
the same is what tests/test_flower.py shows. Every run is a folder under runs/dropout/: finished ones are
kept, interrupted ones resumed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_comparison import interval

from fedhl.config import load_config
from fedhl.federation.engine import InProcess
from fedhl.federation.prepare import prepare
from fedhl.record import read_metrics, read_summary
from fedhl.run.folder import alone
from fedhl.run.loop import resume_prepared, start_prepared
from fedhl.seeds import generator
from fedhl.watch import Watcher

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "compare.yaml"
RUNS = HERE.parent / "runs" / "dropout"
CHANGES = ["method=fedhl", "participation.count=5", "training.learning_rate=4e-3"]


def finish(seed: int, chance: float, threads: int) -> Path:
    """The folder of this run, which is started, resumed or only looked at."""
    folder = RUNS / f"chance-{chance:g}-seed{seed}"
    if (folder / "summary.json").exists() and read_summary(folder)["status"] == "finished":
        return folder
    changes = [*CHANGES, f"seed={seed}", f"compute.threads={threads}"]
    watcher = Watcher(say=lambda line: print(line, flush=True))
    prepared = prepare(load_config(CONFIG, changes), watcher)

    def arrives(id: str, round: int) -> bool:
        return bool(torch.rand((), generator=generator(seed, "dropout", round, id)) >= chance)

    if (folder / "config.yaml").exists():
        with alone(folder):
            resume_prepared(prepared, folder, watcher, InProcess(arrives))
    else:
        start_prepared(prepared, folder, watcher, InProcess(arrives))
    return folder


def row(chance: float, runs: Sequence[Path]) -> dict[str, Any]:
    final = [read_summary(run)["final"] for run in runs]
    return {
        "chance": chance,
        "full": [f["full"]["accuracy"] for f in final],
        "full loss": [f["full"]["loss"] for f in final],
        "updates": [sum(len(line["clients"]) for line in read_metrics(run)) for run in runs],
    }


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--chance", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "dropout.json")
    given = parser.parse_args()
    runs = {
        chance: [finish(seed, chance, given.threads) for seed in given.seeds]
        for chance in (0.0, given.chance)
    }
    rows = [row(chance, those) for chance, those in runs.items()]
    some = read_summary(runs[0.0][0])
    gains = [b - a for a, b in zip(rows[0]["full"], rows[1]["full"], strict=True)]
    result = {
        "seeds": given.seeds,
        "config": CONFIG.read_text("utf-8"),
        "changes": CHANGES,
        "rows": rows,
        "difference": gains,
        "commits": sorted(
            {str(read_summary(r)["commit"]) for those in runs.values() for r in those}
        ),
        "versions": some["versions"],
    }
    given.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for r in rows:
        print(f"chance {r['chance']:g}: accuracy {interval(r['full'])}, updates {r['updates']}")
    print(f"difference {interval(gains)}")


if __name__ == "__main__":
    main()
