"""A tiny federation from config to adapter: what a run writes, and what leaves it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor

from fedhl.federation.engine import server
from fedhl.federation.local import deployed
from fedhl.federation.prepare import Prepared, prepare
from fedhl.federation.scores import evaluate_round
from fedhl.lora import dense
from fedhl.model import adapters, peft
from fedhl.model.evaluation import evaluate
from fedhl.run.folder import load_checkpoint, load_run_config
from fedhl.server import ServerState

# PEFT asks transformers for a property that a newer transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text("utf-8"))


# --- what a run writes --------------------------------------------------------------------------


def test_the_folder_of_a_run(runs: Path) -> None:
    run = runs / "tiny"
    assert sorted(p.name for p in run.iterdir()) == [
        *("config.yaml", "metrics.jsonl", "report.html", "state", "summary.json")
    ]
    best = summary(run)["best"]["round"]
    kept = {f"round-{k:06d}" for k in (4, 5, best)}
    assert {p.name for p in (run / "state").iterdir()} == kept | {"memories"}
    page = (run / "report.html").read_text("utf-8")
    assert "</html>" in page and "client-5" in page


METRICS = {"loss", "accuracy", "examples"}
CLIENT = {
    *("id", "rank", "scale", "examples", "weight", "error", "drift", "loss", "steps"),
    *("bytes_down", "bytes_up", "layers"),
}
DIAGNOSTICS = {
    *("aggregation_error", "step", "product_gap"),
    *("effective_clients", "chi2", "weighted_error"),
    *("energy", "tail_share", "effective_rank", "spectrum", "layers"),
}
PHASES = {"broadcast", "train", "compute", "aggregate", "diagnostics", "evaluate", "checkpoint"}


@pytest.mark.parametrize("name", ["tiny", "flexlora", "fedit", "lm", "chat"])
def test_the_metrics_of_every_round(name: str, runs: Path) -> None:
    config = load_run_config(runs / name)
    written = lines(runs / name)
    assert [line["round"] for line in written] == list(range(config.rounds + 1))
    start, *rounds = written
    assert start["clients"] == [] and start["learning_rate"] is None
    for line in rounds:
        assert set(line["seconds"]) == PHASES | {"total"}
        remembers = {"memories"} if config.method.name == "fedhl_ef" else set()
        assert set(line["diagnostics"]) == DIAGNOSTICS | remembers
        assert line["refused"] == []
        assert [c["id"] for c in line["clients"]] == sorted(c["id"] for c in line["clients"])
        assert sum(c["weight"] for c in line["clients"]) == pytest.approx(1)
        for client in line["clients"]:
            assert set(client) == CLIENT
            assert 0 <= client["error"] <= 1 and client["drift"] > 0
        assert line["bytes"]["up"] == sum(c["bytes_up"] for c in line["clients"])
    for line in written:
        evaluation = line["evaluation"]
        last = line["round"] == config.rounds
        if name == "chat":  # the server has no rows
            assert evaluation["full"] is evaluation["truncated"] is None
            assert evaluation["ranks"] == {}
        else:
            top = max(client["rank"] for client in summary(runs / name)["clients"])
            assert evaluation["truncated"]["rank"] == top
            assert set(evaluation["full"]) == (METRICS if name != "lm" else METRICS - {"accuracy"})
            deployed_ranks = {str(client["rank"]) for client in summary(runs / name)["clients"]}
            assert set(evaluation["ranks"]) == (deployed_ranks if last else set())
        if name == "lm":
            assert evaluation["clients"] is None
        else:
            losses = {id: m["loss"] for id, m in evaluation["clients"]["by_client"].items()}
            assert set(losses) == {client["id"] for client in summary(runs / name)["clients"]}
            mean = sum(losses.values()) / len(losses)
            assert evaluation["clients"]["mean"]["loss"] == pytest.approx(mean)
            assert evaluation["clients"]["worst"]["client"] in losses


def test_partial_participation_and_clients_of_different_size(runs: Path) -> None:
    rounds = lines(runs / "tiny")[1:]
    cohorts = [[client["id"] for client in line["clients"]] for line in rounds]
    assert {len(cohort) for cohort in cohorts} == {4}
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert {client["rank"] for line in rounds for client in line["clients"]} == {1, 2, 4, 6}
    bytes_by_rank = {c["rank"]: c["bytes_up"] for line in rounds for c in line["clients"]}
    assert sorted(bytes_by_rank.values()) == [bytes_by_rank[rank] for rank in (1, 2, 4, 6)]
    rates = [line["learning_rate"] for line in rounds]
    assert rates == pytest.approx([0.01 * (1 - (k + 0.5) / 5) for k in range(5)])


def test_it_learns(runs: Path) -> None:
    full = [line["evaluation"]["full"] for line in lines(runs / "tiny")]
    assert full[0]["accuracy"] < 0.7 and full[-1]["accuracy"] >= 0.85
    assert summary(runs / "tiny")["best"]["value"] == max(m["accuracy"] for m in full)
    losses = [line["evaluation"]["full"]["loss"] for line in lines(runs / "lm")]
    assert losses[-1] < losses[0] - 0.3
    chats = [line["evaluation"]["clients"]["mean"]["loss"] for line in lines(runs / "chat")]
    assert chats[-1] < chats[0] - 0.3


def test_only_fedhl_aggregates_exactly(runs: Path) -> None:
    def errors(name: str) -> list[float]:
        """The aggregation error relative to the size of the global update."""
        after = [line["diagnostics"] for line in lines(runs / name)[1:]]
        return [d["aggregation_error"] / d["energy"] ** 0.5 for d in after]

    assert max(errors("tiny")) < 1e-6
    assert max(errors("flexlora")[1:]) > 1e-3  # exact from the start only
    assert min(errors("fedit")) > 1e-3


def test_the_summary_says_what_made_the_numbers(runs: Path) -> None:
    found = summary(runs / "tiny")
    assert found["status"] == "finished"
    assert found["rounds"] == found["rounds_done"] == 5
    assert found["final"] == lines(runs / "tiny")[-1]["evaluation"]
    assert found["method"] == {"name": "fedhl_ef", "download": 1, "begin": "delta"}
    assert found["weighting"] == {"name": "truncation", "power": 2, "epsilon": 0.1, "share": None}
    assert set(found["hashes"]) == {"config", "model", "tokenizer", "data"}
    assert {"python", "torch", "transformers", "peft"} < set(found["versions"])
    assert found["seeds"] == {"root": 0} and found["device"] == "cpu"
    assert found["peak_memory_bytes"] > 2**27
    assert found["bytes"]["down"] == sum(line["bytes"]["down"] for line in lines(runs / "tiny"))
    assert found["labels"] == ["animal", "plant"]
    for client in found["clients"]:
        assert sum(client["labels"].values()) == client["examples"]
    assert len({tuple(client["labels"].values()) for client in found["clients"]}) > 3
    trainable = found["parameters"]["trainable"]
    assert trainable["6"] == 6 * trainable["1"]
    assert found["parameters"]["head"] == 32 * 32 + 32 + 2 * 32 + 2
    assert summary(runs / "lm")["clients"][0]["labels"] is None


def test_what_a_run_prints(runs: Path) -> None:
    said = (runs.parent / "tiny.txt").read_text()
    for part in (
        "400 rows for 6 clients",
        "round 0/5",
        "round 5/5",
        "(full W)",
        "(rank 6)",
        "worst",
    ):
        assert part in said
    assert "fedhl export runs/tiny --rank" in said and "report: runs/tiny/report.html" in said
    assert "\x1b" not in said and "━━" not in said.split("round 5/5")[0]  # plain lines in a file
    assert (runs.parent / "flexlora.txt").read_text() == ""  # --quiet


@pytest.mark.slow
def test_a_terminal_gets_progress_bars(project: Path) -> None:
    """The one run through the interpreter, on a terminal, like a user's."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fedhl", "run", "tiny.yaml", "--out", "runs/terminal"]
    changes = ["--set", "rounds=1", "--set", "training.steps=8"]
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    process = subprocess.Popen(
        [*command, *changes], cwd=project, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    said = b""
    while chunk := read(ours):
        said += chunk
    os.close(ours)
    assert process.wait(600) == 0
    shown = said.decode()
    assert "round 1: training" in shown and "/32" in shown and "\x1b" in shown
    assert summary(project / "runs/terminal")["status"] == "finished"


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other side has closed
        return b""


# --- what leaves a run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inside(runs: Path) -> Iterator[dict[str, Prepared]]:
    """The runs tiny and lm, prepared in this process as they were in theirs."""
    here, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(runs.parent)
    try:
        yield {name: prepare(load_run_config(runs / name)) for name in ("tiny", "lm")}
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)


def state_of(prepared: Prepared, run: Path, which: Any = "last") -> ServerState:
    return load_checkpoint(run, prepared.initial_state(), which)[0]


@torch.no_grad()
def logits(prepared: Prepared, model: Any) -> Tensor:
    batch = prepared.federation.objective.batch(prepared.federation.held_out[:20])
    del batch["labels"]
    return model.eval()(**batch).logits


def logits_at(prepared: Prepared, state: ServerState, rank: int) -> Tensor:
    """What the run computes with the broadcast of this rank, to a client that holds nothing yet."""
    federation = prepared.federation
    client = next(c for c in federation.clients if c.rank == rank)
    newcomer = replace(client, id="newcomer")
    sent = server.broadcast(federation.method, state, newcomer, federation.config.seed)
    with deployed(federation, rank, sent, state.head):
        return logits(prepared, federation.slots.model)


def logits_full(prepared: Prepared, state: ServerState) -> Tensor:
    slots, method = prepared.federation.slots, prepared.federation.method
    deltas = {name: method.delta(layer) for name, layer in state.layers.items()}
    full = {name: dense(delta) for name, delta in deltas.items() if delta is not None}
    peft.write_head(slots, state.head)
    with peft.offset(slots, full), peft.base_only(slots):
        return logits(prepared, slots.model)


def auto(name: str) -> Any:
    import transformers

    return (
        transformers.AutoModelForCausalLM
        if name == "lm"
        else transformers.AutoModelForSequenceClassification
    )


def with_adapter(name: str, folder: Path) -> Any:
    """The exported adapter on its base model, as its card says."""
    from peft import PeftModel

    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    heads = {} if name == "lm" else {"num_labels": 2}
    return PeftModel.from_pretrained(auto(name).from_pretrained(base, **heads), folder)


@pytest.mark.parametrize("name", ["tiny", "lm"])
def test_an_evaluation_can_be_repeated_to_the_bit(
    name: str, runs: Path, inside: Mapping[str, Prepared]
) -> None:
    prepared, last = inside[name], lines(runs / name)[-1]["evaluation"]
    state = state_of(prepared, runs / name)
    assert evaluate_round(prepared.federation, state, every_rank=True) == last

    done = tiny.fedhl(runs.parent, "eval", f"runs/{name}")
    assert (done.code, done.err) == (0, "")
    assert f"{last['full']['loss']:.4f}" in done.out
    for rank, metrics in last["ranks"].items():
        row = next(text for text in done.out.splitlines() if f"truncated to rank {rank} " in text)
        assert f"{metrics['loss']:.4f}" in row


@pytest.mark.parametrize(("name", "rank"), [("tiny", 6), ("tiny", 2), ("lm", 4)])
def test_an_exported_adapter_computes_what_the_run_measured(
    name: str, rank: int, runs: Path, inside: Mapping[str, Prepared], tmp_path: Path
) -> None:
    prepared = inside[name]
    done = tiny.fedhl(
        runs.parent, "export", f"runs/{name}", "--rank", str(rank), "--out", tmp_path / "adapter"
    )
    assert (done.code, done.err) == (0, ""), done.err
    assert f"PEFT adapter of rank {rank}" in done.out
    model = with_adapter(name, tmp_path / "adapter")
    expected = logits_at(prepared, state_of(prepared, runs / name), rank)
    assert (logits(prepared, model) - expected).abs().max() < 1e-5
    federation = prepared.federation
    metrics = evaluate(
        model,
        federation.held_out,
        objective=federation.objective,
        batch_size=16,
        device=federation.device,
        autocast=federation.autocast,
    )
    assert metrics == pytest.approx(lines(runs / name)[-1]["evaluation"]["ranks"][str(rank)])
    assert "held out" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_merged_model_computes_what_the_full_update_does(
    which: str, runs: Path, inside: Mapping[str, Prepared], tmp_path: Path
) -> None:
    prepared, run = inside["tiny"], runs / "tiny"
    state = state_of(prepared, run, which)
    assert state.round == (summary(run)["best"]["round"] if which == "best" else 5)
    done = tiny.fedhl(
        runs.parent, "export", run, "--merged", "--round", which, "--out", tmp_path / "model"
    )
    assert (done.code, done.err) == (0, ""), done.err
    assert f"round {state.round}, full-rank update merged" in done.out
    model = auto("tiny").from_pretrained(tmp_path / "model")
    assert (logits(prepared, model) - logits_full(prepared, state)).abs().max() < 1e-5
    assert model.config.id2label == {0: "animal", 1: "plant"}


def test_rounds_that_were_not_kept_are_refused(runs: Path, tmp_path: Path) -> None:
    done = tiny.fedhl(
        runs.parent, "export", "runs/tiny", "--rank", "2", "--round", "1", "--out", tmp_path / "x"
    )
    assert done.code == 2 and "no checkpoint of round 1; kept: " in done.err
    assert not (tmp_path / "x").exists()


def test_merging_two_exports_is_their_weighted_sum(runs: Path, tmp_path: Path) -> None:
    parts = []
    for rank, which in (("2", "last"), ("6", "best")):
        out = tmp_path / f"rank{rank}"
        done = tiny.fedhl(
            runs.parent, "export", "runs/tiny", "--rank", rank, "--round", which, "--out", out
        )
        assert done.code == 0, done.err
        parts.append(adapters.load_adapter(out))
    folders = [tmp_path / "rank2", tmp_path / "rank6"]
    done = tiny.fedhl(
        runs.parent, "merge", *folders, "--weights", "3,7", "--out", tmp_path / "merged"
    )
    assert (done.code, done.err) == (0, ""), done.err
    assert "0.3000" in done.out and "rank 8" in done.out
    merged = adapters.load_adapter(tmp_path / "merged")
    for name, lora in merged.adapter.items():
        sum_of_both = 0.3 * parts[0].adapter[name].delta() + 0.7 * parts[1].adapter[name].delta()
        assert (lora.delta() - sum_of_both).abs().max() < 1e-6
    for name, value in merged.head.items():
        assert torch.allclose(value, 0.3 * parts[0].head[name] + 0.7 * parts[1].head[name])

    done = tiny.fedhl(runs.parent, "merge", *folders, "--rank", "4", "--out", tmp_path / "small")
    assert done.code == 0 and "truncation lost" in done.out
    assert {lora.rank for lora in adapters.load_adapter(tmp_path / "small").adapter.values()} == {4}


# --- elsewhere ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_used_from_another_folder_and_after_a_move(tmp_path: Path) -> None:
    """From another working folder as it is; on another machine, where model and data lie elsewhere, with
    their places: it is evaluated, exported and resumed to the same numbers."""
    here, there, run = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    other = tmp_path / "other"
    other.mkdir()
    tiny.project(here)
    short = ["rounds=2", "training.steps=1", "checkpoints.keep=3"]
    settings = [part for change in short for part in ("--set", change)]
    done = tiny.fedhl(here, "run", "tiny.yaml", *settings, "--out", run)
    assert done.code == 0, done.err
    before, told = lines(run), tiny.fedhl(other, "eval", run)
    assert told.code == 0, told.err
    here.rename(there)
    for command in (["eval", run], ["export", run, "--merged", "--out", "model"], ["resume", run]):
        done = tiny.fedhl(other, *command)
        assert done.code == 2 and "model.source: no file or folder" in done.err
        assert "--set model.source=PATH" in done.err.replace("\n", " ")
    model = ["--set", f"model.source={there / 'bert'}"]
    done = tiny.fedhl(other, "export", run, "--merged", "--out", "model", *model)
    assert done.code == 0, done.err
    done = tiny.fedhl(other, "eval", run, *model, "--data", there / "rows.jsonl")
    assert done.code == 0 and " 400 " in done.out, done
    done = tiny.fedhl(other, "eval", run, *model)
    assert done.code == 2 and "--set data.source=PATH" in done.err.replace("\n", " ")
    places = [*model, "--set", f"data.source={there / 'rows.jsonl'}"]
    again = tiny.fedhl(other, "eval", run, *places)
    assert again.code == 0 and again.out.split("after")[1] == told.out.split("after")[1], again
    shutil.rmtree(run / "state" / "round-000002")
    done = tiny.fedhl(other, "resume", run, *places)
    assert done.code == 0, done.err
    assert [line["evaluation"] for line in lines(run)] == [line["evaluation"] for line in before]
    done = tiny.fedhl(other, "resume", run, "--set", "rounds=9")
    assert done.code == 2 and "a run keeps its settings" in done.err


# --- starting from an adapter -------------------------------------------------------------------


def test_a_run_can_start_from_an_adapter(runs: Path, tmp_path: Path) -> None:
    project, adapter = runs.parent, tmp_path / "adapter"
    tiny.fedhl(project, "export", "runs/tiny", "--rank", "4", "--out", adapter)
    start = ["run", "tiny.yaml", "--set", f"lora.start={adapter}", "--set", "rounds=1"]
    done = tiny.fedhl(project, *start, "--out", "runs/continued")
    assert (done.code, done.err) == (0, "")
    expected = dict(lines(runs / "tiny")[-1]["evaluation"]["ranks"]["4"])
    first = lines(runs / "continued")[0]["evaluation"]
    assert first["full"] == pytest.approx(expected)
    assert {k: first["truncated"][k] for k in expected} == pytest.approx(expected)

    (adapter / "config.json").rename(adapter / "unnamed.json")
    done = tiny.fedhl(project, "check", *start[1:])
    assert done.code == 0 and "warning: nothing says which labels the head of" in done.out
    text = (adapter / "unnamed.json").read_text()
    (adapter / "config.json").write_text(text.replace('"plant"', '"stone"'))
    done = tiny.fedhl(project, *start, "--out", tmp_path / "refused")
    assert done.code == 2 and "has the labels 'animal', 'stone', the data has" in done.err
    (adapter / "config.json").write_text(text)
    done = tiny.fedhl(project, *start, "--set", "lora.ranks=2", "--out", tmp_path / "refused")
    assert done.code == 2
    assert "rank 4, expected (32, 32) and at most 2" in done.err and "fedhl merge" in done.err
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", ["chat", "fedit"])
def test_other_runs_are_evaluated_and_exported_too(name: str, runs: Path, tmp_path: Path) -> None:
    done = tiny.fedhl(runs.parent, "eval", f"runs/{name}")
    assert (done.code, done.err) == (0, "")
    assert "worst client, " in done.out
    done = tiny.fedhl(runs.parent, "export", runs / name, "--merged", "--out", tmp_path / "m")
    assert (done.code, done.err) == (0, "")
    auto("lm" if name == "chat" else name).from_pretrained(tmp_path / "m")
