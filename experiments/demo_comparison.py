"""FedHL against FlexLoRA and FedIT on the demo task: same data, steps, initial adapter and seeds.

    python experiments/demo_comparison.py [--seeds 0 1 2] [--out experiments/results/demo_comparison.json]

Every run is a folder under runs/demo-comparison/: finished ones are kept, interrupted ones resumed. Only
the seed and what `VARIANTS` names differ between runs. Data order and local steps depend on the seed
alone; FedIT cannot mix ranks, so it and a FedHL control run at rank 8 everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "demo.yaml"
RUNS = HERE.parent / "runs" / "demo-comparison"

VARIANTS: dict[str, list[str]] = {
    "fedhl, truncation weights": ["method=fedhl"],
    "flexlora, data weights": ["method=flexlora", "weighting=examples"],
    "fedit, data weights, rank 8": ["method=fedit", "weighting=examples", "lora.ranks=8"],
    "fedhl, data weights": ["method=fedhl", "weighting=examples"],
    "fedhl, data weights, rank 8": ["method=fedhl", "weighting=examples", "lora.ranks=8"],
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a 95% interval of a mean, by the number of runs."""


def folder(variant: str, seed: int) -> Path:
    return RUNS / f"{variant.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def finish(variant: str, seed: int) -> dict[str, Any]:
    """The summary of this run, which is started, resumed or only read."""
    run = folder(variant, seed)
    command = [sys.executable, "-m", "fedhl"]
    if (run / "config.yaml").exists():
        summary = run / "summary.json"
        if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
            subprocess.run([*command, "resume", str(run)], check=True)
    else:
        changes = [f"--set={change}" for change in [f"seed={seed}", *VARIANTS[variant]]]
        subprocess.run([*command, "run", str(CONFIG), *changes, "--out", str(run)], check=True)
    return json.loads((run / "summary.json").read_text())


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95% interval of the mean."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = T_95[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.3f} ± {half:.3f}"


def row(variant: str, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    final = [summary["final"] for summary in summaries]
    return {
        "variant": variant,
        "full": [f["full"]["accuracy"] for f in final],
        "truncated": [f["truncated"]["accuracy"] for f in final],
        "lowest rank": [f["ranks"][min(f["ranks"], key=int)]["accuracy"] for f in final],
        "full loss": [f["full"]["loss"] for f in final],
        "best": [summary["best"]["value"] for summary in summaries],
        "bytes up": [summary["bytes"]["up"] for summary in summaries],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "demo_comparison.json")
    parser.add_argument("--first", type=int, default=len(VARIANTS), help="only so many variants")
    arguments = parser.parse_args()
    variants = list(VARIANTS)[: arguments.first]
    runs = {(v, s): finish(v, s) for s in arguments.seeds for v in variants}
    rows = [row(v, [runs[v, s] for s in arguments.seeds]) for v in variants]
    some = next(iter(runs.values()))
    result = {
        "seeds": arguments.seeds,
        "config": CONFIG.read_text(),
        "variants": {v: VARIANTS[v] for v in variants},
        "rows": rows,
        "commits": sorted({str(run["commit"]) for run in runs.values()}),
        "versions": some["versions"],
        "hashes": {name: some["hashes"][name] for name in ("model", "data")},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print("| variant | full W | T_rmax(W) | smallest rank | loss, full W |\n|---|---|---|---|---|")
    for r in rows:
        cells = (interval(r[name]) for name in ("full", "truncated", "lowest rank", "full loss"))
        print(f"| {r['variant']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
