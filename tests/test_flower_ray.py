"""Federations over Flower's simulation: the same state as in one process, with clients in actors of Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from federation import difference
from support import hostile, tiny
from support.beside import alone, environment

from fedhl.record import read_metrics


def simulated(project: Path, name: str, client: str, config: dict[str, Any]) -> Path:
    """A run on Ray, with clients in processes of their own; its folder."""
    tiny.write_config(project / f"{name}.yaml", config)
    folder = project / "runs" / name
    done = subprocess.run(
        [sys.executable, "-m", "support.simulate", f"{name}.yaml", folder, client],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kind_of_broken_update_is_refused_and_the_state_is_as_without_its_sender(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny.classification(
        name="hostile",
        rounds=len(hostile.KINDS),
        participation={"fraction": 1.0},
        training={"steps": 1},
        evaluation={"client_fraction": 0.0, "every": 100},
    )
    run = simulated(project, "hostile", "support.hostile:mallory", config)
    lines = read_metrics(run)[1:]
    honest = [f"client-{k}" for k in range(5)]
    for line, (kind, reason) in zip(lines, hostile.KINDS, strict=True):
        assert [client["id"] for client in line["clients"]] == honest, kind
        assert [refused["id"] for refused in line["refused"]] == [hostile.MALLORY], kind
        assert reason in line["refused"][0]["reason"], (kind, line["refused"])
    other = alone(project, "hostile", config, lambda id, round: id != hostile.MALLORY, monkeypatch)
    assert difference(run, other) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_with_100_clients_of_which_30_percent_drop_out_each_update_counts_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny.classification(
        name="load",
        rounds=8,
        data={"source": "many.jsonl", "held_out": {"count": 60}},
        partition={"kind": "iid", "clients": 100},
        lora={"targets": ["query"], "ranks": {"shares": {1: 0.5, 2: 0.3, 4: 0.2}}},
        participation={"fraction": 1.0},
        training={"steps": 1, "batch_size": 2},
        evaluation={"client_fraction": 0.0, "every": 100},
    )
    tiny.write_rows(project / "many.jsonl", tiny.rows(460))
    run = simulated(project, "load", "support.hostile:dropping", config)
    everyone = sorted(f"client-{k:02d}" for k in range(100))
    for line in read_metrics(run)[1:]:
        gone = [id for id in everyone if hostile.drops(id, line["round"])]
        assert [client["id"] for client in line["clients"]] == sorted(set(everyone) - set(gone))
        assert [refused["id"] for refused in line["refused"]] == gone
        assert sum(client["weight"] for client in line["clients"]) == pytest.approx(1)
    # to the bit: none is missing, and none counts twice
    other = alone(project, "load", config, lambda *at: not hostile.drops(*at), monkeypatch)
    assert difference(run, other) == 0
