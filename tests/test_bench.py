"""`fedhl bench server` at a size that a test can afford: every part runs its own checks and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from support.tiny import fedhl

from fedhl.bench import checks, problems, remembering, server
from fedhl.bench.timing import Row, Say

FIGURES = {
    "layer": {
        "step / bare product",
        "truncation from nothing, s",
        "relative difference from float64",
    },
    "remembering": {
        "step / bare product",
        "step / truncation",
        "after, s",
        "relative difference from float64",
        "largest relative excess of a tail",
    },
    "accuracy": {"largest relative excess of the tail", "full SVD, s"},
    "growth": {"step, s", "truncation, s", "clients", "side"},
    "ceilings": {"copy of W, s", "bare product, s", "step, s", "layers"},
    "model": {"round, s", "diagnostics, s", "reading them from files, s"},
    "disk": {"round, s", "anonymous memory at its peak, GB"},
}


def test_every_part_reports_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {name: (m // 3, n // 3) for name, (m, n) in problems.SMOLLM2.items()}
    monkeypatch.setattr(problems, "SIDE", 256)
    monkeypatch.setattr(server, "SMOLLM2", small)
    monkeypatch.setattr(problems, "BLOCKS", {"smollm2": 1, "llama2": 1})
    said: list[str] = []
    file = tmp_path / "new/figures.json"
    for parts in (server.PARTS[:1], server.PARTS[1:]):  # the second adds to the first
        server.bench_server(parts, 1, "cpu", [], tmp_path, file, said.append)
    loaded = json.loads(file.read_text("utf-8"))
    assert set(loaded) == set(server.PARTS)
    assert all(part["machine"]["repeats"] == 1 for part in loaded.values())
    result = {name: part["rows"] for name, part in loaded.items()}
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
    flat = {row["total rank"] for row in result["remembering"] if "of rank" in row["series"]}
    assert flat == {3200}
    assert len(said) >= sum(len(rows) for rows in result.values())
    assert not [p for p in tmp_path.iterdir() if p.name != "new"]  # what `disk` wrote is gone


def test_a_part_that_is_stopped_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: object) -> Iterator[Row]:
        yield {"row": 1}
        raise KeyboardInterrupt

    file = tmp_path / "figures.json"
    file.write_text('{"growth": {"rows": [2]}, "remembering": {"rows": [3]}}')
    monkeypatch.setattr(server, "remembering", stopped)
    with pytest.raises(KeyboardInterrupt):
        server.bench_server(["remembering"], 1, "cpu", [], None, file, print)
    kept = json.loads(file.read_text("utf-8"))
    assert kept["growth"]["rows"] == [2] and kept["remembering"]["rows"] == [{"row": 1}]


@pytest.mark.parametrize("part", [server.one_layer, remembering.remembering])
def test_a_wrong_result_is_not_timed(
    part: Callable[[int, Say, str], Iterable[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems, "SIDE", 256)
    monkeypatch.setattr(checks, "dense_step", lambda state, updates: state.W.double() * 1.001)
    with pytest.raises(AssertionError):
        list(part(1, lambda line: None, "cpu"))


def test_an_increment_that_is_not_the_best_is_refused() -> None:
    W = problems.harmonic(128, 128)
    state, sent, held = remembering.some_rounds(W, "cpu")
    remembering.excess(state, held, remembering.catch_up(state, held))
    with pytest.raises(AssertionError):
        remembering.excess(state, held, sent)  # the clients hold that already


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = fedhl(tmp_path, "bench", "server", "--parts", "layer,speed")
    assert done.code == 2
    assert (
        "there is no 'speed', only layer, remembering, accuracy, growth, ceilings, model, disk"
        in done.err
    )
