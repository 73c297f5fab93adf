"""`fedhl bench server` at a size that a test can afford: every part runs its own checks and reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny import fedhl

from fedhl import bench

FIGURES = {
    "layer": {
        "step / bare product",
        "truncation from nothing, s",
        "relative difference from float64",
    },
    "accuracy": {"largest relative excess of the tail", "full SVD, s"},
    "growth": {"step, s", "truncation, s", "clients", "side"},
    "model": {"round, s", "diagnostics, s", "reading them from files, s"},
    "disk": {"round, s", "anonymous memory at its peak, GB"},
}


def test_every_part_reports_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SIDE", 288)
    monkeypatch.setattr(bench, "BLOCKS", {"smollm2": 1, "llama2": 1})
    said: list[str] = []
    result = bench.bench_server(bench.PARTS, 1, "cpu", [], tmp_path, said.append)
    bench.save(result, tmp_path / "new/figures.json")
    loaded = json.loads((tmp_path / "new/figures.json").read_text("utf-8"))
    assert loaded == result and set(loaded) == {"machine", *bench.PARTS}
    for part, figures in FIGURES.items():
        assert result[part]
        for row in result[part]:
            assert figures <= set(row), part
            assert all(x > 0 and math.isfinite(x) for k, x in row.items() if k.endswith(", s"))
    one = {row["clients"]: row for row in result["layer"] if row["spectrum"] == "1/j"}
    assert {"literal / step", "full SVD / step"} <= set(one[10]) and "literal / step" not in one[
        100
    ]
    flat = {r["total rank"] for r in result["growth"] if "and one of 64" in r["series"]}
    assert flat == {3264}
    assert len(said) > sum(len(rows) for part, rows in result.items() if part != "machine")
    assert not [p for p in tmp_path.iterdir() if p.name != "new"]  # what `disk` wrote is gone


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIDE", 288)
    monkeypatch.setattr(bench, "dense_step", lambda state, updates: state.W.double() * 1.001)
    with pytest.raises(AssertionError):
        bench.one_layer(1, lambda line: None, "cpu")


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = fedhl(tmp_path, "bench", "server", "--parts", "layer,speed")
    assert done.code == 2
    assert "there is no 'speed', only layer, accuracy, growth, model, disk" in done.err
