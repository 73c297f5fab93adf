"""Stopped anywhere and resumed, a run ends as if it had never been stopped: the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support.outcome import result
from support.tiny import Done, classification, fedhl, rows, start, write_config, write_rows

LAST = "state/round-000005"


@pytest.fixture(scope="module")
def expected(runs: Path) -> dict[str, Any]:
    """Of the run that was never stopped."""
    found = result(runs / "tiny")
    assert found["summary"]["status"] == "finished" and "round-000005" in found["states"]
    return found


def finish(project: Path, run: Path) -> Done:
    done = fedhl(project, "resume", run)
    assert (done.code, done.err) == (0, ""), done
    return done


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def after(seconds: float) -> Callable[[], bool]:
    end = monotonic() + seconds
    return lambda: monotonic() > end


def copy(runs: Path, folder: Path) -> Path:
    shutil.copytree(runs / "tiny", folder)
    return folder


# --- killed -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(
    seed: int, project: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    draw, run = random.Random(seed), tmp_path / "run"
    command = start(project, "run", "tiny.yaml", "--out", run, "--quiet")
    for _ in range(6):
        command.wait_until((run / "config.yaml").exists)
        done = command.kill_when(after(draw.uniform(0.2, 1.3)))
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL and done.err == "", done
        command = start(project, "resume", run, "--quiet")
    done = command.wait()
    assert (done.code, done.err, done.out) == (0, "", "")
    assert result(run) == expected


@pytest.mark.slow
def test_killed_while_writing(project: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    state = run / "state"
    moments = [
        (run / "config.yaml").exists,
        (state / ".partial-round-000001").exists,
        (state / "round-000001").exists,
        (state / ".partial-round-000003/state.safetensors").exists,
        (state / ".partial-round-000004/manifest.json").exists,
        (state / "round-000005").exists,
    ]
    command = start(project, "run", "tiny.yaml", "--out", run)
    for happened in moments:
        done = command.kill_when(happened)
        assert done.err == "", done
        command = start(project, "resume", run)
    done = command.wait()
    assert (done.code, done.err) == (0, ""), done
    assert result(run) == expected


def test_what_a_kill_may_leave(
    project: Path, runs: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Half a line of metrics, an older summary, half-written files."""
    run = copy(runs, tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    (run / ".summary.json.partial").write_text("{")
    (run / "state/.partial-round-000005").mkdir()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running", "best": None}))
    (run / "report.html").write_text("<html>")
    finish(project, run)
    shutil.rmtree(run / "state/.partial-round-000005", ignore_errors=True)
    (run / ".summary.json.partial").unlink(missing_ok=True)
    assert result(run) == expected


def test_a_finished_run_is_not_trained_again(
    project: Path, runs: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    run = copy(runs, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    written = (run / LAST / "state.safetensors").stat().st_mtime_ns
    done = finish(project, run)
    assert "resuming after round 5 of 5" in done.out and "round 5/5" not in done.out
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / LAST / "state.safetensors").stat().st_mtime_ns == written
    assert result(run) == expected


# --- damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_used(
    file: str, project: Path, runs: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    run = copy(runs, tmp_path / "run")
    flip_a_byte(run / LAST / file)
    done = finish(project, run)
    assert "warning: the checkpoint of round 5 is corrupt" in done.out
    assert f"{LAST}/{file}" in done.out
    assert "resuming after round 4 of 5" in done.out and "round 5/5" in done.out
    assert result(run) == expected


def test_no_checkpoint_that_can_be_read(project: Path, runs: Path, tmp_path: Path) -> None:
    run = copy(runs, tmp_path / "run")
    for file in run.glob("state/*/state.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    done = fedhl(project, "resume", run)
    assert done.code == 2 and "Traceback" not in done.err
    assert "no checkpoint can be read; start the run anew" in done.err
    done = fedhl(project, "export", run, "--rank", "2", "--round", "5", "--out", tmp_path / "x")
    assert done.code == 2 and "the checkpoint of round 5 is corrupt" in done.err
    assert not (tmp_path / "x").exists()


# --- changed ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(project: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project and the finished run in another folder, to be changed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("bert", "rows.jsonl", "runs/tiny"):
        where = shutil.copytree if (project / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(exist_ok=True)
        where(project / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("what", "file"),
    [
        ("data", "rows.jsonl"),
        ("model", "bert/model.safetensors"),
        ("config", "runs/tiny/config.yaml"),
    ],
)
def test_what_has_changed_is_refused(what: str, file: str, elsewhere: Path) -> None:
    before = (elsewhere / file).read_bytes()
    if what == "data":
        write_rows(elsewhere / file, [*rows(400), *rows(1, seed=5)])
    elif what == "model":
        flip_a_byte(elsewhere / file)
    else:
        write_config(elsewhere / file, classification(seed=1))
    try:
        commands = {"resume": [], "eval": [], "export": ["--rank", "2", "--out", "x"]}
        refusing = {"data": ["resume", "eval"], "model": [*commands], "config": ["resume"]}[what]
        for command in refusing:
            here = {"data": ["data.source=rows.jsonl"], "model": ["model.source=bert"]}.get(
                what, []
            )
            places = [part for place in here for part in ("--set", place)]
            done = fedhl(elsewhere, command, "runs/tiny", *commands[command], *places)
            assert done.code == 2, done
            assert f"the {what} has changed since runs/tiny began" in done.err, done.err
        assert not (elsewhere / "x").exists()
    finally:
        (elsewhere / file).write_bytes(before)


# --- interrupted --------------------------------------------------------------------------------


def test_two_processes_in_one_folder(
    project: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """The second is refused while the first is at work, and the first ends as if it were alone."""
    run = tmp_path / "run"
    first = start(project, "run", "tiny.yaml", "--out", run)
    first.wait_until(lambda: "round 1/5" in first.said())
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        second = fedhl(project, "resume", run)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert second.code == 2 and f"another process is working in {run}" in second.err
    assert first.wait().code == 0
    assert result(run) == expected


def test_ctrl_c(project: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = start(project, "run", "tiny.yaml", "--out", run)
    done = command.kill_when(lambda: "round 2/5" in command.said(), signal.SIGINT)
    accuracy = interrupted(done, run)
    assert 3 <= len(accuracy) <= 5
    assert f"{accuracy[-1]:.4f}" in fedhl(project, "eval", run).out
    finish(project, run)
    assert result(run) == expected


def test_a_signal_while_writing_waits_until_it_is_written(
    project: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = start(project, "run", "tiny.yaml", "--out", run)
    done = command.kill_when(lambda: any(run.glob("state/.partial-*[1-4]")), signal.SIGTERM)
    interrupted(done, run)
    assert not list(run.glob("state/.partial-*"))
    finish(project, run)
    assert result(run) == expected


def interrupted(done: Done, run: Path) -> list[float]:
    """Check what an interrupted run says and leaves; the accuracy of the rounds that it finished."""
    assert done.code == 130 and "Traceback" not in done.err, done
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["evaluation"]["full"]["accuracy"] for line in lines]
    rounds = len(lines) - 1
    assert f"{rounds} finished rounds are saved. Continue with: fedhl resume {run}" in done.err
    assert (run / f"state/round-{rounds:06d}").is_dir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["rounds_done"] == rounds
    assert summary["best"] == {"round": accuracy.index(max(accuracy)), "value": max(accuracy)}
    return accuracy


# --- no room on the disk ------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process: Linux")
def test_no_disk_space(project: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Files of more than 20 kB cannot be written any more, in the middle of the run."""
    run = tmp_path / "run"
    command = start(project, "run", "tiny.yaml", "--out", run)
    command.wait_until(lambda: "round 2/5" in command.said())
    assert command.process.pid is not None
    resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = command.wait()
    assert done.code == 2 and "Traceback" not in done.err
    assert f"cannot write to {run}" in done.err and "MiB free" in done.err
    assert f"make room, then run fedhl resume {run}" in done.err
    assert not list(run.glob("state/.partial*"))
    saved = max(int(path.name.removeprefix("round-")) for path in run.glob("state/round-*"))
    assert 2 <= saved < 5
    evaluated = fedhl(project, "eval", run)
    assert evaluated.code == 0 and f"after round {saved}" in evaluated.out, evaluated
    done = finish(project, run)
    assert f"resuming after round {saved} of 5" in done.out
    assert result(run) == expected


# --- of another run -----------------------------------------------------------------------------


def test_the_state_of_another_run_is_refused(
    project: Path, runs: Path, tmp_path: Path, expected: dict[str, Any]
) -> None:
    """Of the same model and rows, but another seed."""
    run = copy(runs, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed: ", "seed: 1", 1))
    (run / "summary.json").unlink()
    done = fedhl(project, "resume", run)
    assert done.code == 2 and "is of another run: its config has the hash" in done.err


@pytest.mark.parametrize("how", ["emptied", "another digit"])
def test_metrics_that_the_run_did_not_write_are_refused(
    project: Path, runs: Path, tmp_path: Path, how: str
) -> None:
    run = copy(runs, tmp_path / "run")
    file = run / "metrics.jsonl"
    first, rest = file.read_text().split("\n", 1)
    changed = first.replace('"loss": 0.6', '"loss": 0.5', 1)
    assert changed != first
    file.write_text("" if how == "emptied" else f"{changed}\n{rest}")
    done = fedhl(project, "resume", run)
    assert done.code == 2 and "are not those that the run wrote" in done.err
