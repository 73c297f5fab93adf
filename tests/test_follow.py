"""`fedhl watch`: a run that another process works on."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from support import tiny

from fedhl.record import read_metrics
from fedhl.run.folder import alone
from fedhl.run.follow import follow, held
from fedhl.run.progress import told

AGAIN = '<meta http-equiv="refresh"'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds, finished."""
    folder = tiny.project(tmp_path_factory.mktemp("watched"))
    done = tiny.fedhl(folder, "run", "tiny.yaml", "--set", "rounds=3")
    assert done.code == 0, done.err
    return folder / "runs" / "tiny"


def test_a_finished_run_is_told_to_its_end(run: Path) -> None:
    said: list[str] = []
    follow(run, said.append)
    assert sum(text.startswith("round ") for text in said) == 4
    assert said[-1].startswith("the run is finished; report: ")
    assert AGAIN not in (run / "report.html").read_text(encoding="utf-8")


def test_rounds_are_told_once_and_as_they_come(run: Path, tmp_path: Path) -> None:
    """The files of a run appear line by line, are taken back by a resumed run, and appear again."""
    from fedhl.run.folder import load_run_config

    config = load_run_config(run)
    here = tmp_path / "run"
    shutil.copytree(run, here, ignore=shutil.ignore_patterns("report.html", "state"))
    whole = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    summary = (run / "summary.json").read_text(encoding="utf-8")
    running = summary.replace('"status": "finished"', '"status": "running"')
    assert running != summary
    stages = iter([whole[:1], whole[:3], whole[:2], whole[:2], whole])
    said: list[str] = []
    pages: list[bool] = []

    def appear() -> bool:
        """The next stage of the files; whether it is the last."""
        lines = next(stages)
        (here / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        return len(lines) == len(whole)

    def wait(seconds: float) -> None:
        page = here / "report.html"
        pages.append(page.is_file() and AGAIN in page.read_text(encoding="utf-8"))
        last = appear()
        (here / "summary.json").write_text(summary if last else running, encoding="utf-8")

    (here / "summary.json").write_text(running, encoding="utf-8")
    appear()
    with alone(here):
        assert held(here)
        follow(here, said.append, wait)
    assert not held(here)
    rounds = [text for text in said if text.startswith("round ")]
    lines = read_metrics(run)
    wanted = [next(iter(told(lines[k], config))) for k in (0, 1, 2, 2, 3)]
    assert rounds == wanted, "round 2 was done again"
    assert all(pages)
    assert AGAIN not in (here / "report.html").read_text(encoding="utf-8")
    assert not any("no process" in text for text in said)


def test_it_says_once_that_nobody_works_on_a_run(run: Path, tmp_path: Path) -> None:
    here = tmp_path / "run"
    shutil.copytree(run, here, ignore=shutil.ignore_patterns("state"))
    summary = (run / "summary.json").read_text(encoding="utf-8")
    running = summary.replace('"status": "finished"', '"status": "running"')
    (here / "summary.json").write_text(running, encoding="utf-8")
    said: list[str] = []
    looks = iter(range(3))

    def wait(seconds: float) -> None:
        if next(looks) == 2:
            (here / "summary.json").write_text(summary, encoding="utf-8")

    follow(here, said.append, wait)
    assert [text for text in said if "no process" in text] == [
        f"no process works on this run now; to go on: fedhl resume {here}"
    ]


def test_two_processes(tmp_path: Path) -> None:
    """One trains, and one watches; Ctrl-C ends the watching alone."""
    folder = tiny.project(tmp_path)
    training = tiny.start(folder, "run", "tiny.yaml", "--set", "rounds=60")
    training.wait_until((folder / "runs/tiny/config.yaml").is_file)
    watching = tiny.start(folder, "watch", "runs/tiny")
    seen = watching.kill_when(lambda: "which loads itself" in watching.said(), signal.SIGINT)
    assert seen.code == 0 and "no longer watching" in seen.out, seen
    assert AGAIN in (folder / "runs/tiny/report.html").read_text(encoding="utf-8")
    assert training.process.is_alive()
    done = training.kill_when(lambda: True, signal.SIGINT)
    assert done.code != 0
    rounds = [text for text in seen.out.splitlines() if text.startswith("round ")]
    assert (
        rounds
        and rounds == [t for t in done.out.splitlines() if t.startswith("round ")][: len(rounds)]
    )


def test_a_round_that_comes_soon_after_a_report_is_in_the_next_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its report waits for the time between two reports, and not for the round after it."""
    here = tmp_path / "run"
    shutil.copytree(run, here, ignore=shutil.ignore_patterns("report.html", "state"))
    whole = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    summary = (run / "summary.json").read_text(encoding="utf-8")
    running = summary.replace('"status": "finished"', '"status": "running"')
    clock, pages = [0.0], []
    monkeypatch.setattr("fedhl.run.follow.monotonic", lambda: clock[0])

    def wait(seconds: float) -> None:
        clock[0] += 6  # a report is drawn every ten seconds
        pages.append((here / "report.html").read_bytes())
        (here / "metrics.jsonl").write_text("".join(whole[:2]), encoding="utf-8")
        if len(pages) == 3:
            (here / "summary.json").write_text(summary, encoding="utf-8")

    (here / "summary.json").write_text(running, encoding="utf-8")
    (here / "metrics.jsonl").write_text(whole[0], encoding="utf-8")
    with alone(here):
        follow(here, lambda text: None, wait)
    assert pages[0] == pages[1] != pages[2]
