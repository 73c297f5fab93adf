"""Runs that end before their last round: because nothing gets better, or because time is up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.tiny import fedhl

from fedhl.config import Config, load_config
from fedhl.config.conduct import StopConfig
from fedhl.record import read_metrics, read_summary
from fedhl.run import resume_run, start_run
from fedhl.run.stop import why
from fedhl.watch import Watcher

SHORT = ["training.steps=1", "rounds=6"]


def lines(*evaluated: bool, seconds: float = 60.0) -> list[dict[str, Any]]:
    return [
        {
            "round": t,
            "evaluation": {} if not has else {"metric": "loss"},
            "seconds": {"total": seconds},
        }
        for t, has in enumerate(evaluated)
    ]


def test_evaluations_count_and_not_rounds() -> None:
    rule, best = StopConfig(patience=2), {"round": 1, "value": 0.5}
    assert why(rule, lines(True, True, True, False, False), best) is None
    said = why(rule, lines(True, True, True, False, True), best)
    assert said == "2 evaluations in a row were no better than that of round 1"
    assert why(rule, lines(True, True, True, True, True), {"round": 3, "value": 0.5}) is None
    assert why(rule, lines(*[True] * 9), None) is None  # no round has a finite score


def test_time_is_that_of_the_rounds() -> None:
    rule = StopConfig(hours=0.1)
    assert why(rule, lines(*[False] * 5), None) is None
    assert why(rule, lines(*[False] * 6), None) == (
        "the rounds have taken 0.1 hours, and stop.hours is 0.1"
    )
    with pytest.raises(ValidationError, match="give patience, hours or both"):
        StopConfig()


def tiny(project: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> Config:
    monkeypatch.chdir(project)
    return load_config(project / "tiny.yaml", [*SHORT, *changes])


def files(run: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "config.yaml")
    return {name: (run / name).read_bytes() for name in names}


def test_a_run_that_gets_no_better_ends_and_stays_so(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With steps of length zero every round is as good as the start, which is the best round."""
    run = tmp_path / "run"
    still = tiny(project, monkeypatch, "stop.patience=2", "training.learning_rate=1e-30")
    said: list[str] = []
    start_run(still, run, Watcher(say=said.append))
    done, summary = read_metrics(run), read_summary(run)
    reason = "2 evaluations in a row were no better than that of round 0"
    assert [line["round"] for line in done] == [0, 1, 2]
    assert f"ending after round 2 of 6: {reason}" in said
    assert (summary["status"], summary["stopped"], summary["rounds_done"]) == (
        "finished",
        reason,
        2,
    )
    assert summary["best"]["round"] == 0
    # the last round is evaluated as a last round is
    assert (
        set(summary["final"]["ranks"]) == {"1", "2", "4", "6"}
        and not done[1]["evaluation"]["ranks"]
    )
    assert f"This run ended before its last round: {reason}." in (run / "report.html").read_text()
    before = files(run)
    resume_run(run)
    assert files(run) == before and read_summary(run)["stopped"] == reason


def test_time_that_is_up_ends_a_run_with_an_evaluation(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start_run(tiny(project, monkeypatch, "stop.hours=1e-9", "evaluation.every=5"), tmp_path / "run")
    start, first = read_metrics(tmp_path / "run")
    assert first["round"] == 1 and set(first["evaluation"]["ranks"]) == {"1", "2", "4", "6"}
    assert "and stop.hours is 1e-09" in first["stopped"] and "stopped" not in start


def test_a_run_that_was_killed_while_it_ended_ends_all_the_same(project: Path) -> None:
    """The last round is on disk, and the summary does not know yet."""
    arguments = ["run", "tiny.yaml", "--set", "stop.patience=1", "--set", "training.steps=1"]
    arguments += ["--set", "training.learning_rate=1e-30", "--out", "runs/still", "--quiet"]
    assert fedhl(project, *arguments).code == 0
    run = project / "runs/still"
    whole, summary = files(run), read_summary(run)
    (run / "report.html").unlink()
    (run / "summary.json").unlink()
    assert fedhl(project, "resume", "runs/still", "--quiet").code == 0
    assert files(run) == whole and (run / "report.html").is_file()
    again = read_summary(run)
    for name in ("status", "stopped", "final", "best", "rounds_done"):
        assert again[name] == summary[name], name


def test_a_run_over_tasks_goes_to_its_end(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="stop: a run over tasks has to reach its last task"):
        tiny(project, monkeypatch, "stop.patience=2", "tasks.count=2")
