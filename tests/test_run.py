"""What a run tells, how it judges its rounds, and runs in which something is missing or goes wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.tiny import Done, fedhl

from fedhl.errors import UserError
from fedhl.files import json_text, write_text
from fedhl.record import better, failure, headline, read_metrics
from fedhl.run.folder import keep_metrics, uninterrupted, writing
from fedhl.run.progress import describe


def evaluation(metric: str, full: float | None, truncated: float | None, mean: float | None) -> Any:
    def metrics(value: float | None) -> dict[str, Any] | None:
        return None if value is None else {metric: value, "rank": 4}

    clients = metrics(mean) and {"mean": metrics(mean), "worst": metrics(mean)}
    both = {"full": metrics(full), "truncated": metrics(truncated)}
    return {"metric": metric, **both, "ranks": {}, "clients": clients}


def test_a_round_is_judged_by_the_full_model_if_there_is_one() -> None:
    assert headline(evaluation("accuracy", 0.5, 0.6, 0.7)) == 0.5
    assert headline(evaluation("accuracy", None, 0.6, 0.7)) == 0.6
    assert headline(evaluation("accuracy", 0.0, 0.6, 0.7)) == 0.0
    assert headline(evaluation("loss", None, None, 0.7)) == 0.7
    assert headline(evaluation("loss", None, None, None)) is None


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("accuracy", [0.5, 0.8, 0.8, 0.7], 1), ("loss", [3.0, 2.0, 1.5, 1.5], 2)],
)
def test_the_best_round_is_the_first_of_equals(metric: str, values: list[float], best: int) -> None:
    found = None
    for round, value in enumerate(values):
        found = better(found, evaluation(metric, value, None, None), round)
    assert found == {"round": best, "value": values[best]}
    assert better(found, evaluation(metric, None, None, None), 9) == found


def round_of(
    number: int, loss: float | None, accepted: int, reason: str | None = None
) -> dict[str, Any]:
    scores = {"full": {"loss": loss}, "truncated": None, "clients": None}
    refused = [{"id": "a", "reason": reason}] if reason else []
    return {"round": number, "evaluation": scores, "clients": [{}] * accepted, "refused": refused}


def test_how_a_run_fails() -> None:
    start = round_of(0, 0.7, 0)
    assert failure([start]) is None and failure([]) is None
    assert failure([start, round_of(1, 0.6, 2), round_of(2, 0.6, 0, "late")]) is None
    none = [
        start,
        round_of(1, 0.7, 0, "late"),
        round_of(2, 0.7, 0, "late"),
        round_of(3, 0.7, 0, "NaN"),
    ]
    assert failure(none) == (
        "no update was accepted in any of the 3 rounds, so that nothing was learnt: 2 times 'late', "
        "1 times 'NaN'"
    )
    assert "no client answered" in str(failure([start, round_of(1, 0.7, 0)]))
    for loss in (None, float("nan"), float("inf")):
        after = failure([start, round_of(1, loss, 2), round_of(2, loss, 2) | {"evaluation": None}])
        assert after == "training diverged: the loss is not finite after round 1"
        assert failure([start, round_of(1, loss, 2), round_of(2, 0.5, 2)]) is None


def test_numbers_that_are_not_finite_are_null() -> None:
    value = {"a": [float("nan"), 1, None, {"b": (float("-inf"), 0.5, True)}], "c": "NaN"}
    assert json.loads(json_text(value)) == {
        "a": [None, 1, None, {"b": [None, 0.5, True]}],
        "c": "NaN",
    }
    first = better(None, evaluation("loss", float("nan"), None, None), 0)
    assert first is None
    assert better(first, evaluation("loss", 2.0, None, None), 1) == {"round": 1, "value": 2.0}


STEEP = ["training.optimizer=sgd", "training.learning_rate=1e14", "training.max_grad_norm=null"]
"""One step of SGD whose update is finite, and after which the loss is infinite or NaN."""


def diverging(project: Path, name: str, *settings: str) -> tuple[Done, Path]:
    steps = [*STEEP, "training.steps=1", "rounds=2", *settings]
    given = [text for step in steps for text in ("--set", step)]
    return fedhl(
        project, "run", "tiny.yaml", *given, "--out", f"runs/{name}"
    ), project / "runs" / name


def test_a_run_that_diverges_fails(project: Path) -> None:
    """Where no round was good: the first is not evaluated."""
    done, run = diverging(project, "infinite", "evaluation.every=2")
    assert done.code == 3 and "export" not in done.out
    assert "failed: training diverged: the loss is not finite after round 2" in done.err
    summary = json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["status"] == "failed" and "diverged" in summary["reason"]
    rounds = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text, parse_constant=pytest.fail)["round"] for text in rounds] == [0, 1, 2]
    page = (run / "report.html").read_text()
    assert 'class="status failed"' in page and "This run failed: training diverged" in page
    done = fedhl(project, "export", run, "--rank", "2", "--out", "infinite-adapter")
    assert done.code == 2 and "had diverged by round 2" in done.err and "--round best" in done.err


def test_a_round_whose_loss_is_not_finite_is_undone(project: Path) -> None:
    """The model is that of the round before, and the metrics name the clients of the round."""
    done, run = diverging(project, "undone")
    assert done.code == 3 and "failed: no update was accepted in any of the 2 rounds" in done.err
    reason = "the round was undone, since the loss of its model was not finite"
    first, *rounds = read_metrics(run)
    for line in rounds:
        assert line["clients"] == [] and [r["reason"] for r in line["refused"]] == 4 * [reason]
        assert line["evaluation"]["full"] == first["evaluation"]["full"]
        assert line["diagnostics"]["energy"] == 0 and line["bytes"]["up"] > 0
    assert f"warning: client 'client-0' does not count: {reason}" in done.out
    said = "the weights explode: round 1 was undone, since the loss of its model was not finite; "
    assert rounds[0]["signatures"]["explosion"].startswith(said) and "signatures" not in rounds[1]
    assert done.out.replace("\n", " ").count(said) == 1
    # and whatever a run writes, nobody else may read
    for path in (run, *run.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_round_in_one_line_of_text() -> None:
    client = {"examples": 30, "loss": 0.25}
    line: dict[str, Any] = {
        "round": 3,
        "evaluation": evaluation("accuracy", 0.5, 0.25, 0.125),
        "clients": [client, {"examples": 10, "loss": 1.25}],
        "diagnostics": {"effective_clients": 1.8},
        "seconds": {"total": 2.04},
    }
    assert describe(line, 10) == (
        "round  3/10  accuracy 0.5000 (full W)  accuracy 0.2500 (rank 4)  "
        "clients 0.1250, worst 0.1250  training loss 0.5000  1.8 effective clients  2.0 s"
    )
    bare = {**line, "evaluation": None, "clients": []}
    assert describe(bare, 9) == "round 3/9  2.0 s"


# --- files --------------------------------------------------------------------------------------


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    def line(round: int, **more: Any) -> dict[str, Any]:
        return {"round": round, "id": "Zoë\u2028", **more}

    path = tmp_path / "metrics.jsonl"
    texts = [json.dumps(line(k, seconds=k), ensure_ascii=False) for k in range(4)]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    keep_metrics(tmp_path, line(2))
    assert read_metrics(tmp_path) == [line(k, seconds=k) for k in range(3)]
    keep_metrics(tmp_path, line(3))
    assert read_metrics(tmp_path)[-1] == line(3)

    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("ë".encode()) + 1])  # torn inside a character
    assert read_metrics(tmp_path) == [line(k, seconds=k) for k in range(3)]
    path.unlink()
    assert read_metrics(tmp_path) == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_what_to_do_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing was trained.*--out"), writing(tmp_path / "run"):
        (tmp_path / "run/state").mkdir()
    (tmp_path / "config.yaml").write_text("")
    with (
        pytest.raises(UserError, match=r"every finished round is saved.*fedhl resume"),
        writing(tmp_path),
    ):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number: int) -> None:
    before, written = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        written.append(True)
    assert written and signal.getsignal(number) is before


# --- runs in which something is missing or goes wrong -------------------------------------------


def run(project: Path, name: str, *changes: str) -> Done:
    overrides = [part for change in changes for part in ("--set", change)]
    done = fedhl(project, "run", "tiny.yaml", "--out", f"runs/{name}", *overrides)
    assert (done.code, done.err) == (0, ""), done
    return done


def test_clients_that_diverge_are_refused_and_the_model_stays(project: Path) -> None:
    changes = ["--set", "training.learning_rate=1e30", "--set", "rounds=2"]
    done = fedhl(project, "run", "tiny.yaml", "--out", "runs/diverged", *changes)
    assert done.code == 3 and "PEFT adapter" not in done.out
    assert "failed: no update was accepted in any of the 2 rounds" in done.err
    assert "warning: client 'client-2' does not count: layer " in done.out
    assert done.out.count("no update was accepted in this round; the model stays as it was") == 2
    first, *rounds = read_metrics(project / "runs/diverged")
    for line in rounds:
        assert len(line["refused"]) == 4 and line["clients"] == []
        assert line["evaluation"]["full"] == first["evaluation"]["full"]
    page = (project / "runs/diverged/report.html").read_text("utf-8")
    assert "refused" in page


def test_weights_that_collapse_are_noticed(project: Path) -> None:
    done = run(
        project, "collapsed", "weighting.epsilon=1e-9", "training.learning_rate=3e-2", "rounds=2"
    )
    assert "warning: the weights of 4 clients amount to 1.0 effective ones" in done.out
    warned = [text for text in done.out.splitlines() if text.startswith("warning")]
    assert len(warned) == 1  # not in round 1: there is no truncation error yet


def test_a_run_that_nobody_evaluates(project: Path, tmp_path: Path) -> None:
    changes = ["data.held_out=null", "evaluation.client_fraction=0", "rounds=1", "training.steps=1"]
    done = run(project, "unseen", *changes)
    assert "accuracy" not in done.out.split("┏")[0]
    summary = json.loads((project / "runs/unseen/summary.json").read_text())
    assert summary["best"] is None and summary["status"] == "finished"
    done = fedhl(project, "eval", "runs/unseen")
    assert done.code == 2 and "no held-out rows; name a file of rows with --data" in done.err
    done = fedhl(project, "eval", "runs/unseen", "--data", "rows.jsonl")
    assert done.code == 0 and " 400 " in done.out
    export = ["export", "runs/unseen", "--rank", "2", "--out", tmp_path / "adapter"]
    done = fedhl(project, *export, "--round", "best")
    assert done.code == 2 and "no round was evaluated, so that no round is the best" in done.err
    assert fedhl(project, *export).code == 0


def test_the_other_settings_of_training(project: Path) -> None:
    done = run(
        project,
        "settings",
        "partition={kind: by-column, column: site}",
        "lora={targets: all-linear, ranks: {shares: {1: 1, 3: 2}}, alpha: 4, rslora: true, dropout: 0.1}",
        "rounds=3",
        "training={epochs: 0.3, optimizer: sgd, accumulation: 4, warmup_rounds: 2, schedule: cosine}",
        "evaluation={every: 2}",
        "participation={count: 2}",
        "weighting=examples",
    )
    assert "round 1/3  training loss" in done.out  # not evaluated
    lines = read_metrics(project / "runs/settings")
    assert [line["evaluation"] is not None for line in lines] == [True, False, True, True]
    rates = [line["learning_rate"] for line in lines[1:]]
    assert rates == pytest.approx([1e-3 / 4, 1e-3 * 3 / 4, 1e-3 / 2])
    for line in lines[1:]:
        assert len(line["clients"]) == 2
        rows = sum(client["examples"] for client in line["clients"])
        for client in line["clients"]:
            assert client["weight"] == pytest.approx(client["examples"] / rows)
            assert client["scale"] == pytest.approx(4 / client["rank"] ** 0.5)
            assert client["steps"] == 3  # 0.3 epochs of about 113 rows, 16 at a time
    ranks = {
        c["id"]: c["rank"]
        for c in json.loads((project / "runs/settings/summary.json").read_text())["clients"]
    }
    assert sorted(ranks) == ["site-0", "site-1", "site-2"] and sorted(ranks.values()) == [1, 3, 3]
