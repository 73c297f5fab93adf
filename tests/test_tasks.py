"""Labels that arrive over time: whose turn it is, what is trained, what is measured, and what is said."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.fake_run import fake_run
from support.outcome import result
from support.small_federation import same
from support.task_federation import TASKS, build, federate, play
from support.tiny import (
    ANIMALS,
    OTHERS,
    PLANTS,
    classification,
    fedhl,
    start,
    write_config,
    write_rows,
)
from torch import Tensor
from torch.nn import functional as F

from fedhl import METHODS
from fedhl.config import Config, load_config
from fedhl.data import shards
from fedhl.data.label_groups import begins, forgetting, mean_accuracy, split_labels, task_of
from fedhl.errors import UserError
from fedhl.federation import engine, local, scores
from fedhl.federation.engine import run_round
from fedhl.federation.federation import Federation, initial_state
from fedhl.lora import dense
from fedhl.model import peft
from fedhl.model.training import batches, learning_rate
from fedhl.report import final_table, write_report
from fedhl.run.progress import steps
from fedhl.seeds import derive
from fedhl.server import ServerState
from fedhl.task.examples import collate
from fedhl.watch import Watcher

EPS32 = torch.finfo(torch.float32).eps

# --- tasks, labels, forgetting ------------------------------------------------------------------


@given(labels=st.integers(4, 60), data=st.data(), seed=st.integers(0, 9))
def test_labels_are_split_as_equally_as_possible(labels: int, data: Any, seed: int) -> None:
    count = data.draw(st.integers(2, labels // 2))
    groups = split_labels(labels, count, seed)
    assert sorted(label for group in groups for label in group) == list(range(labels))
    assert len(groups) == count and {len(g) - labels // count for g in groups} <= {0, 1}
    assert groups == split_labels(labels, count, seed)


def test_the_order_of_labels_is_drawn_by_the_seed() -> None:
    assert len({str(split_labels(12, 3, seed)) for seed in range(5)}) == 5


def test_each_task_has_its_rounds() -> None:
    assert [task_of(round, 2) for round in range(1, 7)] == [0, 0, 1, 1, 2, 2]
    assert [round for round in range(1, 7) if begins(round, 2)] == [3, 5]


@pytest.mark.parametrize(
    ("accuracy", "want"),
    [
        ([[0.9]], None),
        ([[0.9], [0.6, 0.8]], 0.3),
        ([[0.5], [0.7, 0.6]], -0.2),  # the second task helped the first
        ([[0.9], [0.6, 0.8], [0.7, 0.5, 1.0]], (0.2 + 0.3) / 2),
        ([[0.5], [0.9, 0.4], [0.6, 0.4, 0.1]], (0.3 + 0.0) / 2),  # the best came later
        ([[0.5], [0.5, 0.25], [0.5, 0.75, 0.0], [0.5, 0.5, 0.0, 1.0]], (0 + 0.25 + 0) / 3),
    ],
)
def test_forgetting(accuracy: list[list[float]], want: float | None) -> None:
    got = forgetting(accuracy)
    assert got is None if want is None else got == pytest.approx(want)


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"count": 2}, "rounds": 5}, "rounds: 5 rounds cannot be shared equally by 2"),
        ({"tasks": {"groups": [[0, 1], [2, 3], [4, 5]]}, "rounds": 4}, "e.g. 6"),
        ({"tasks": {"count": 2}, "task": {"kind": "causal-lm"}}, "tasks: only sequence-class"),
        ({"tasks": {"count": 1}}, "tasks.count: input should be greater than or equal to 2, got 1"),
        ({"tasks": {}}, "tasks: give exactly one of count and groups"),
        ({"tasks": {"count": 2, "groups": [["a", "b"], ["c", "d"]]}}, "exactly one of count and"),
        ({"tasks": {"groups": [["a", "b"]]}}, "tasks.groups: expected a list of at least two"),
        (
            {"tasks": {"groups": [["a", "b"], ["c"]]}},
            "at least two labels in every task, got ['c']",
        ),
        ({"tasks": {"groups": [["a", "b"], ["c", [1]]]}}, "tasks.groups: expected labels, got"),
        ({"tasks": {"groups": [["a", 1], ["c", "1"]]}}, "tasks.groups: label '1' is given twice"),
        ({"tasks": {"conut": 2}}, "tasks.conut: unknown key 'conut'; did you mean 'count'?"),
    ],
)
def test_a_mistake_in_the_config_names_the_field(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "c.yaml", classification(**({"rounds": 4} | changes)))
    with pytest.raises(UserError, match=re.escape(said)):
        load_config(path)


FOUR = {"pets": ANIMALS[:4], "wild": ANIMALS[4:], "trees": PLANTS[:4], "herbs": PLANTS[4:]}


def four_labels(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of seven words, five of them of the label's own four."""
    draw, made = random.Random(seed), []
    for k in range(count):
        label = list(FOUR)[k % 4]
        words = [*draw.choices(FOUR[label], k=5), *draw.choices(OTHERS, k=2)]
        draw.shuffle(words)
        made.append({"text": " ".join(words), "label": label, "site": f"site-{k % 2}"})
    return made


@pytest.mark.parametrize(
    ("tasks", "data", "said"),
    [
        (
            {"count": 3},
            {},
            "tasks.count: 3 tasks of at least two labels each need 6 labels, the data has 4",
        ),
        (
            {"groups": [["pets", "wild"], ["trees", "herb"]]},
            {},
            "tasks.groups: unknown label 'herb'",
        ),
        ({"groups": [["pets", "wild"], ["trees", 7]]}, {}, "tasks.groups: unknown label '7'"),
        ({"groups": [["pets", "wild"], ["trees", "herbs"]]}, {"where": {}}, ""),
    ],
)
def test_labels_that_do_not_fit_the_data(
    tasks: dict[str, Any], data: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = str(write_rows(tmp_path / "four.jsonl", four_labels(80)))
    config = classification(data={"source": source} | data, tasks=tasks, rounds=6)
    config["partition"] = {"kind": "iid", "clients": 3}
    config["evaluation"] = {}
    if said:
        with pytest.raises(UserError, match=re.escape(said)):
            shards.read(Config.model_validate(config))
        return
    read = shards.read(Config.model_validate(config))
    assert read.labels == ["herbs", "pets", "trees", "wild"] and read.tasks == [[1, 3], [0, 2]]


def test_a_label_in_no_task(tmp_path: Path) -> None:
    made = four_labels(80) + [{"text": "the", "label": "odd", "site": "site-0"}] * 8
    config = classification(
        data={"source": str(write_rows(tmp_path / "rows.jsonl", made)), "held_out": {"count": 8}},
        tasks={"groups": [["pets", "wild"], ["trees", "herbs"]]},
        partition={"kind": "by-column", "column": "site"},
        rounds=4,
    )
    with pytest.raises(UserError, match=re.escape("tasks.groups: label 'odd' is in no task")):
        shards.read(Config.model_validate(config))


@pytest.mark.parametrize("held_out", [0, 8])
def test_a_task_without_rows(held_out: int, tmp_path: Path) -> None:
    """Rows of two labels only in the server's own file, or only with the clients."""
    made = four_labels(80)
    few = [row for row in made if row["label"] in ("pets", "wild")][: held_out or None]
    other = str(write_rows(tmp_path / "held.jsonl", few if held_out else made))
    config = classification(
        data={"source": str(write_rows(tmp_path / "rows.jsonl", made))},
        tasks={"groups": [["pets", "wild"], ["trees", "herbs"]]},
        partition={"kind": "by-column", "column": "site"},
        evaluation={"client_fraction": 0.0},
        rounds=4,
    )
    config["data"]["held_out"] = {"source": other}
    read = shards.read(Config.model_validate(config | {"tasks": None}))
    if not held_out:  # take the clients' rows of a task away
        keep = [k for k, row in enumerate(made) if row["label"] in ("pets", "wild")]
        read = replace(
            read, clients={n: p[[k in keep for k in p]] for n, p in read.clients.items()}
        )
    said = "the server has no held-out row" if held_out else "no client has training rows"
    with pytest.raises(UserError, match=f"tasks: {said} .*herbs, trees"):
        shards.with_tasks(Config.model_validate(config), read)


# --- rounds -------------------------------------------------------------------------------------


def test_in_a_round_only_those_take_part_who_have_rows_of_its_task() -> None:
    federation = federate()
    seen = [outcome.clients for _, outcome in play(federation, 4)[1:]]
    assert [[c["id"] for c in clients] for clients in seen] == 2 * [["ada", "bob", "cyd"]] + 2 * [
        ["ada", "cyd", "dan"]
    ]
    for task, clients in zip((0, 0, 1, 1), seen, strict=True):
        counts = {
            name: sum(example.labels in TASKS[task] for example in rows)
            for name, rows in federation.rows.items()
        }
        assert {c["id"]: c["examples"] for c in clients} == {n: k for n, k in counts.items() if k}


def test_the_steps_to_do_in_a_round_are_those_of_its_task() -> None:
    """They follow from the rows: one pass over those of the task."""
    training = {"epochs": 1.0, "batch_size": 4}
    federation, seen = federate(training=training), []
    watcher = Watcher(step=lambda _, done, total: seen.append((done, total)))
    for state, _ in play(federation, 3)[:4:2]:
        run_round(federation, state, steps(federation, state, watcher))
        assert seen[-1][0] == seen[-1][1] == len(seen)
        seen.clear()


def test_a_cohort_is_drawn_among_those_who_have_rows() -> None:
    federation = federate(participation={"count": 2}, rounds=12)
    drawn = [{c["id"] for c in outcome.clients} for _, outcome in play(federation, 12)[1:]]
    assert all(len(ids) == 2 for ids in drawn)
    assert set().union(*drawn[:6]) == {"ada", "bob", "cyd"}
    assert set().union(*drawn[6:]) == {"ada", "cyd", "dan"}


def naive(federation: Federation, state: ServerState, client: str, labels: list[int]) -> Any:
    """Training on the logits of `labels` alone, numbered anew, from rows of them alone."""
    config, round = federation.config, state.round + 1
    model = build("bert").double().requires_grad_(False)
    ours = [ex for ex in federation.rows[client] if ex.labels in labels]
    adapted: dict[str, Any] = {}
    for name, layer in state.layers.items():
        A, B = (x.double().requires_grad_() for x in (layer.A, layer.B))
        weight = model.get_parameter(f"{name}.weight")
        adapted[name] = A, B, weight.clone(), layer.scale
    head = {name: value.double().requires_grad_() for name, value in state.head.items()}
    free = [p for A, B, *_ in adapted.values() for p in (A, B)] + list(head.values())
    optimizer = torch.optim.AdamW(free, weight_decay=config.training.weight_decay)
    order = batches(len(ours), 4, derive(config.seed, "training", round, client))
    for k in range(3):
        progress = (round - 1) % 2 + (k + 0.5) / 3  # each task has two rounds
        optimizer.param_groups[0]["lr"] = learning_rate(config.training, 2, progress)
        batch = collate([ours[j] for j in next(order)], 0)
        targets = torch.tensor([labels.index(int(y)) for y in batch.pop("labels")])
        weights = {f"{n}.weight": W + s * B @ A for n, (A, B, W, s) in adapted.items()}
        logits = torch.func.functional_call(model, weights | head, kwargs=dict(batch)).logits
        F.cross_entropy(logits[:, labels], targets).backward()
        torch.nn.utils.clip_grad_norm_(free, config.training.max_grad_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    return {n: (A, B) for n, (A, B, *_) in adapted.items()}, head


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_client_trains_on_its_rows_and_the_logits_of_the_task(decay: float) -> None:
    """In both tasks. Computed in double, read in float32: equal to rounding; AdamW, which divides by the
    size of a gradient, may enlarge differences between double computations, by far less than EPS32."""
    training = {"steps": 3, "batch_size": 4, "learning_rate": 0.02, "schedule": "linear"}
    federation = federate(training=training | {"weight_decay": decay})
    for state, _ in play(federation, 3)[:4:2]:
        now = federation.in_round(state.round + 1)
        client = now.clients[0]
        sent = engine.server.broadcast(now.method, state, client, 0)
        reply = local.train_client(now, client, sent, state.head, state.round + 1).reply
        labels = list(TASKS[state.round // 2])
        adapters, head = naive(federation, state, client.id, labels)
        for name, (A, B) in adapters.items():
            for got, want in ((reply.adapter[name].A, A), (reply.adapter[name].B, B)):
                assert (got - want).abs().max() <= 2 * EPS32 * want.abs().max()
        for name, want in head.items():
            got = reply.head[name]
            assert (got - want)[labels].abs().max() <= 2 * EPS32 * want.abs().max()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_rows_of_the_head_that_belong_to_other_tasks_do_not_move(kind: str, optimizer: str) -> None:
    training = {"steps": 3, "batch_size": 4, "learning_rate": 0.1, "weight_decay": 0.3}
    federation = federate(kind=kind, training=training | {"optimizer": optimizer})
    history = [state.head for state, _ in play(federation, 4)]
    last = "classifier." if kind == "bert" else "classifier.out_proj."
    for round in range(4):
        before, after = history[round], history[round + 1]
        for name in before:
            moved = (before[name] != after[name]).reshape(5, -1).any(dim=1).tolist()
            of_task = [label in TASKS[round // 2] for label in range(5)]
            assert moved == (of_task if name.startswith(last) else [True] * 5), name


def test_a_head_without_a_row_for_each_label_is_refused() -> None:
    federation = federate()
    federation.slots.model.config.num_labels = 7
    with pytest.raises(UserError, match="classifier, has 5 rows for 7 labels"):
        peft.label_rows(federation.slots, [0])


def test_without_tasks_nothing_is_masked() -> None:
    """The same run with all labels from the start trains on all rows, and moves the whole head."""
    federation = replace(federate(tasks=None), tasks=())
    state, outcome = play(federation, 1)[1]
    assert {c["id"]: c["examples"] for c in outcome.clients} == {
        name: len(rows) for name, rows in federation.rows.items()
    }
    before = initial_state(federation).head["classifier.weight"]
    assert (state.head["classifier.weight"] != before).any(dim=1).all()
    assert "tasks" not in scores.evaluate_round(federation, state, every_rank=False)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_through_all_tasks(name: str) -> None:
    federation = federate(name)
    state, _ = play(federation, 4)[-1]
    got = scores.evaluate_tasks(federation, state)
    known = [federation.method.delta(layer) for layer in state.layers.values()]
    assert got is None if None in known else got and got["current"] == len(got["accuracy"]) == 2


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedex_lora", "flexlora", "sd_lora"])
def test_each_task_is_judged_among_the_labels_so_far(method: str) -> None:
    federation = federate(method)
    history, want = play(federation, 4), []
    assert scores.evaluate_tasks(federation, history[0][0]) is None
    for state, _ in history[1:]:
        seen = TASKS[: 1 + (state.round - 1) // 2]
        model = build("bert").double().eval()
        weights = {n: v.double() for n, v in state.head.items()}
        for name, layer in state.layers.items():
            delta = dense(federation.method.delta(layer))  # pyright: ignore[reportArgumentType]
            weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight") + delta
        allowed = torch.tensor([label for task in seen for label in task])
        want = []
        for task in seen:
            hits = []
            for ex in federation.held_out:
                if ex.labels in task:
                    inputs = {"input_ids": torch.tensor([ex.input_ids])}
                    logits = torch.func.functional_call(model, weights, kwargs=inputs).logits[0]
                    hits.append(int(allowed[logits[allowed].argmax()]) == ex.labels)
            want.append(sum(hits) / len(hits))
        found = scores.evaluate_round(federation, state, every_rank=False)["tasks"]
        assert found == {"current": len(seen), "accuracy": want}
    assert len({0.0, *want}) == 3, "the test is about something"


def test_evaluating_changes_nothing() -> None:
    looked, blind = federate(), federate()
    a, b = initial_state(looked), initial_state(blind)
    for _ in range(3):
        scores.evaluate_round(looked, a, every_rank=True)
        a, b = run_round(looked, a)[0], run_round(blind, b)[0]
        assert same(a, b)
    logits = blind.slots.model(torch.tensor([[3, 4]])).logits
    assert isinstance(logits, Tensor) and logits.isfinite().all(), "no label stays unknown"


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(project: Path) -> Path:
    """A folder with finished runs `fedex_lora` and `sd_lora` over two tasks of two rounds."""
    write_rows(project / "four.jsonl", four_labels(240))
    config = classification(
        name="four",
        data={"source": "four.jsonl", "held_out": {"count": 60}},
        partition={"kind": "iid", "clients": 3},
        lora={"targets": ["query", "value"], "ranks": 4},
        weighting="examples",
        tasks={"groups": [["pets", "trees"], ["herbs", "wild"]]},
        rounds=4,
        evaluation={"client_fraction": 0.0, "every": 3},
        participation={"fraction": 1.0},
    )
    write_config(project / "four.yaml", config)
    commands = {
        name: start(project, "run", "four.yaml", "--set", f"method={name}", "--out", f"four/{name}")
        for name in ("fedex_lora", "sd_lora")
    }
    for name, command in commands.items():
        ended = command.wait()
        assert (ended.code, ended.err) == (0, ""), ended
        (project / f"four/{name}.txt").write_text(ended.out)
    return project / "four"


def read(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return lines, json.loads((run / "summary.json").read_text("utf-8"))


@pytest.mark.parametrize("method", ["fedex_lora", "sd_lora"])
def test_a_run_over_tasks(method: str, done: Path) -> None:
    lines, summary = read(done / method)
    evaluated = {line["round"]: line["evaluation"] for line in lines if line["evaluation"]}
    assert list(evaluated) == [0, 2, 3, 4], "and after the last round of every task"
    assert evaluated[0]["tasks"] is None
    accuracy = [evaluated[round]["tasks"]["accuracy"] for round in (2, 4)]
    assert [evaluated[round]["tasks"]["current"] for round in (2, 3, 4)] == [1, 2, 2]
    assert summary["tasks"] == {
        "labels": [["pets", "trees"], ["herbs", "wild"]],
        "rounds": [2, 4],
        "accuracy": accuracy,
        "mean": mean_accuracy(accuracy),
        "forgetting": accuracy[0][0] - accuracy[1][0],
    }
    assert accuracy[0][0] > 0.8 and accuracy[1][1] > 0.5, "it learns what is new"
    # all labels have been seen, so the two accuracies are one; 30 rows of each task
    assert sum(accuracy[1]) / 2 == pytest.approx(evaluated[4]["full"]["accuracy"])
    rates = [line["learning_rate"] for line in lines[1:]]
    assert rates[:2] == rates[2:] and rates[0] > rates[1], "the schedule begins anew with each task"
    assert sum(c["examples"] for c in lines[1]["clients"]) == 90, "of 180 rows, those of the task"


@pytest.mark.parametrize("method", ["fedex_lora", "sd_lora"])
def test_what_a_run_over_tasks_tells(method: str, done: Path) -> None:
    said = (done / f"{method}.txt").read_text()
    _, summary = read(done / method)
    first, last = summary["tasks"]["accuracy"]
    assert "2 tasks of 2 rounds: pets, trees; herbs, wild" in said
    assert f"tasks {last[0]:.4f}, {last[1]:.4f}" in said
    table = final_table(done / method)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    by_name = {str(row[0]): [str(cell) for cell in row] for row in rows}
    assert by_name["task 1"][-2:] == [f"{100 * first[0]:.1f}%", "–"]
    forgot = f"{100 * summary['tasks']['forgetting']:.1f}%".replace("-", "\u2212")
    assert by_name["final"][-2:] == [f"{100 * summary['tasks']['mean']:.1f}%", forgot]
    page = write_report(done / method).read_text("utf-8")
    section = page.split("<h2>Tasks</h2>")[1].split("</section>")[0]
    for value in (*first, *last, summary["tasks"]["mean"], summary["tasks"]["forgetting"]):
        assert f'<data value="{value!r}">' in section
    assert "herbs, wild" in section


def test_an_evaluation_tells_of_every_task(project: Path, done: Path) -> None:
    _, summary = read(done / "sd_lora")
    told = fedhl(project, "eval", done / "sd_lora").out
    for k, accuracy in enumerate(summary["tasks"]["accuracy"][-1], start=1):
        assert re.search(rf"task {k}, among the labels so far +│ +{accuracy:.4f}", told)


def test_a_report_without_tasks_has_no_such_section(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    assert "<h2>Tasks</h2>" not in write_report(run).read_text("utf-8")
    assert "forgetting" not in [column.header for column in final_table(run).columns]


@pytest.mark.parametrize("moment", ["round 2/4", "round 3/4"])
def test_killed_at_a_change_of_task_or_within_the_second(
    moment: str, project: Path, done: Path, tmp_path: Path
) -> None:
    """To the same bits, although the state has grown meanwhile."""
    run = tmp_path / "run"
    command = start(project, "run", "four.yaml", "--set", "method=sd_lora", "--out", run)
    killed = command.kill_when(lambda: moment in command.said())
    assert killed.code != 0, "it was stopped before its end"
    resumed = fedhl(project, "resume", run)
    assert (resumed.code, resumed.err) == (0, ""), resumed
    assert result(run) == result(done / "sd_lora")
    assert read(run)[1]["tasks"] == read(done / "sd_lora")[1]["tasks"]


def test_what_has_grown_can_be_exported(project: Path, done: Path, tmp_path: Path) -> None:
    """Its rank is that of two directions and a pair, or less if asked for."""
    ended = fedhl(project, "export", done / "sd_lora", "--rank", "64", "--out", tmp_path / "whole")
    assert ended.code == 0 and "PEFT adapter of rank 8 " in ended.out, ended
    state = load_file(done / "sd_lora/state/round-000004/state.safetensors")
    assert {x.shape for name, x in state.items() if name.endswith("::magnitudes")} == {(1,)}
    ended = fedhl(project, "eval", done / "sd_lora")
    assert ended.code == 0 and "full-rank update" in ended.out, ended
