"""Make the result file of an experiment again, or go on with it.

    python experiments/experiments.py NAME DATA

NAME is one of experiments.yaml, DATA the folder of the published data sets. What is finished stays, and an
experiment that was stopped goes on: its runs are in runs/experiments/NAME.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
EXPERIMENTS: dict[str, dict[str, Any]] = yaml.safe_load(
    (HERE / "experiments.yaml").read_text("utf-8")
)


def command(name: str) -> list[str]:
    """The comparison of this experiment, as words of the command line."""
    one = EXPERIMENTS[name]
    options = shlex.split(one["options"])
    config = str((HERE / one["config"]).relative_to(HERE.parent))
    return ["compare", config, *options, "--methods", one["methods"]]


def main(name: str, data: str) -> None:
    one = EXPERIMENTS[name]
    if rows := one.get("rows"):
        words = [word.replace("DATA", data, 1) for word in shlex.split(rows)]
        subprocess.run([sys.executable, *words], cwd=HERE.parent, check=True)
    out = HERE.parent / "runs" / "experiments" / name
    words = [sys.executable, "-m", "fedhl", *command(name), "--out", str(out)]
    done = subprocess.run(words, cwd=HERE.parent)
    if done.returncode:
        sys.exit(done.returncode)
    print(shutil.copyfile(out / "comparison.json", HERE / one["result"]))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in EXPERIMENTS:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(EXPERIMENTS)}")
    main(*sys.argv[1:])
