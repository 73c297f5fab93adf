"""A federation from Python: the same rounds as the command line's, for any model and any rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.small_federation import same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

import fedhl
from fedhl.config import load_config
from fedhl.config.schema import Inputs
from fedhl.errors import UserError
from fedhl.federation.prepare import prepare
from fedhl.lora import truncate
from fedhl.model.loading import load_model
from fedhl.run import Result, start_run
from fedhl.server.ledger import Ledger
from fedhl.task.examples import collate
from fedhl.watch import SILENT

FAST = {"steps": 3, "batch_size": 8, "learning_rate": 0.05}


class Net(nn.Module):
    """Two kinds of linear layers, and an output that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.first, self.second, self.last = nn.Linear(6, 10), Conv1D(8, 10), nn.Linear(8, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / 3

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def points(count: int, seed: int) -> list[tuple[Tensor, int]]:
    X = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [(x, int(x[:3].argmax())) for x in X]


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def metrics(model: nn.Module, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"accuracy": (model(batch[0]).argmax(-1) == batch[1]).float()}


def play(model: nn.Module | None = None, clients: Any = None, **settings: Any) -> Result:
    given: dict[str, Any] = {
        **{"ranks": [2, 4], "rounds": 3, "training": FAST, "loss": loss, "watcher": SILENT},
        **{"metrics": metrics, "held_out": points(50, 9), "lora": {"targets": ["first", "second"]}},
        **settings,
    }
    return fedhl.simulate(model or Net(), clients or [points(20, 1), points(30, 2)], **given)


def weight(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight")


def without_seconds(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_it_is_the_command_lines_federation_to_the_bit(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(project)
    changes = ["rounds=2", "training.steps=2", "lora.dropout=0.1"]
    config = load_config("tiny.yaml", changes)
    run = start_run(config, tmp_path / "run")
    prepared = prepare(config)
    rows, labels = prepared.federation, prepared.data.labels
    loaded = load_model(
        config.model.source,
        config.task.kind,
        labels=labels,
        seed=config.seed,
        dropout=config.model.dropout,
    )

    def accuracy(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        return {"accuracy": (model(**inputs).logits.argmax(-1) == batch["labels"]).float()}

    settings = config.model_dump(exclude=set(Inputs.model_fields))
    del settings["checkpoints"], settings["evaluation"]["client_fraction"]
    ranks = {client.id: client.rank for client in rows.clients}
    lora = {key: value for key, value in settings.pop("lora").items() if key != "ranks"}
    ours = fedhl.simulate(
        loaded.model,
        rows.rows,
        ranks=ranks,
        held_out=rows.held_out,
        client_held_out=rows.own,
        collate=partial(collate, pad_id=rows.objective.pad_id),  # pyright: ignore
        metrics=accuracy,
        metric="accuracy",
        head=["bert.pooler.dense", "classifier"],
        lora=lora,
        watcher=SILENT,
        **settings,
    )
    # the memories of a run folder are on disk; their versions are hashes of all that was sent
    assert ours.state.ledger.of == run.state.ledger.of != {}
    assert same(*(replace(result.state, ledger=Ledger()) for result in (ours, run)))
    for mine, theirs in zip(
        without_seconds(ours.metrics), without_seconds(run.metrics), strict=True
    ):
        # rows are evaluated in another order, so that the sums differ in the last bits
        evaluations = mine.pop("evaluation"), theirs.pop("evaluation")
        assert mine == theirs
        for model in ("full", "truncated"):
            assert evaluations[0][model] == pytest.approx(evaluations[1][model], rel=1e-6)
        own = [e["clients"]["by_client"] for e in evaluations]
        assert own[0].keys() == own[1].keys()
        for id, measured in own[0].items():
            assert measured == pytest.approx(own[1][id], rel=1e-6)
    assert run.folder == tmp_path / "run" and run.best == ours.best
    run.export(tmp_path / "adapter", rank=2)
    assert (tmp_path / "adapter" / "tokenizer_config.json").is_file()


def test_any_module_learns_and_stays_as_it_was():
    model = Net()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    result = play(model, head=["last"], metric="accuracy", rounds=6)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    start, end = result.metrics[0]["evaluation"]["full"], result.metrics[-1]["evaluation"]["full"]
    assert end["loss"] < 0.9 * start["loss"] and result.best is not None
    assert result.best["value"] == max(
        line["evaluation"]["full"]["accuracy"] for line in result.metrics
    )
    assert repr(result).startswith("<Result: 6 rounds, accuracy 0.")


def test_the_metrics_are_those_of_the_merged_model():
    """Against the model that `model()` merges: the mean over all rows, whatever the batches."""
    result = play(head=["last"], evaluation={"batch_size": 7})
    merged, held = result.model(), points(50, 9)
    assert isinstance(merged, Net) and isinstance(merged.second, Conv1D)
    X, y = torch.stack([x for x, _ in held]), torch.tensor([y for _, y in held])
    with torch.no_grad():
        expected = {"loss": float(loss(merged, (X, y))), **metrics(merged, (X, y))}
    found = result.metrics[-1]["evaluation"]["full"]
    assert found["examples"] == 50
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(float(expected["accuracy"].mean()))
    for name, W in result.updates().items():
        base = dict(Net().named_modules())[name]
        moved = weight(merged, name) - weight(Net(), name)
        shift = moved.T if isinstance(base, Conv1D) else moved
        assert (shift - W).abs().max() < 1e-6 and W.norm() > 0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # PEFT's, of both kinds in one model
@pytest.mark.parametrize("rank", [None, 3])
def test_the_exported_adapter_is_the_truncation(tmp_path: Path, rank: int | None):
    result = play(head=["last"])
    base, X = Net(), torch.stack([x for x, _ in points(20, 5)])
    theirs = PeftModel.from_pretrained(base, result.export(tmp_path / "adapter", rank)).eval()
    expected = Net()
    for name, W in result.updates().items():
        layer = dict(expected.named_modules())[name]
        cut = truncate(W, min(rank or 4, *W.shape)).delta()
        weight(expected, name).data += cut.T if isinstance(layer, Conv1D) else cut
    expected.last.load_state_dict(
        {name.removeprefix("last."): x for name, x in result.state.head.items()}
    )
    assert (theirs(X) - expected(X)).abs().max() < 1e-5
    with pytest.raises(UserError, match="not an empty folder"):
        result.export(tmp_path / "adapter")


def test_a_head_that_peft_would_not_find_again_is_refused(tmp_path: Path):
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 8))
    model.add_module("out", nn.Linear(8, 3))
    result = play(model, head=["out"], lora={"targets": ["first"]}, rounds=1)
    with pytest.raises(UserError, match="'out' is also the end of 'lora_dropout'"):
        result.export(tmp_path / "adapter")


def test_rows_may_be_anything_that_can_be_read():
    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(points(20, 1))

    lists = play(clients={"a": points(20, 1), "b": points(30, 2)}, ranks={"a": 2, "b": 4})
    by_number = play(clients={1: points(20, 1)}, ranks={1: 2}, client_held_out={1: points(5, 3)})
    assert [client.id for client in by_number.federation.clients] == ["1"]
    streams = play(
        clients={"b": (row for row in points(30, 2)), "a": Stream()}, ranks={"a": 2, "b": 4}
    )
    assert same(lists.state, streams.state)
    rows = Dataset.from_dict({"x": torch.randn(20, 6).tolist(), "y": [0, 1] * 10}).with_format(
        "torch"
    )
    by_name = play(
        clients=[rows, rows],
        held_out=rows,
        loss=lambda model, batch: cross_entropy(model(batch["x"]), batch["y"]),
        metrics=lambda model, batch: {"mean": model(batch["x"]).mean()},
    )
    assert [c.id for c in by_name.federation.clients] == ["client-0", "client-1"]
    assert "mean" in by_name.metrics[-1]["evaluation"]["full"]


def test_clients_judge_themselves_and_less_is_better_if_so_said():
    own = {"client-0": points(9, 3), "client-1": points(11, 4)}
    result = play(client_held_out=own, held_out=(), metric="accuracy", greater_is_better=False)
    assert result.metrics[-1]["evaluation"]["full"] is None
    means = [line["evaluation"]["clients"]["mean"]["accuracy"] for line in result.metrics]
    assert result.best is not None and result.best["value"] == min(means)
    worst = result.metrics[-1]["evaluation"]["clients"]
    highest = max(m["accuracy"] for m in worst["by_client"].values())
    assert worst["worst"]["accuracy"] == highest


def test_settings_are_those_of_a_config():
    full, half = play(), play(participation={"count": 1}, method="flexlora", seed=4)
    assert len(half.metrics[-1]["clients"]) == 1 and len(full.metrics[-1]["clients"]) == 2
    early = play(stop={"patience": 1}, rounds=40, metric="accuracy")
    assert len(early.metrics) < 41 and early.metrics[-1]["stopped"]
    said: list[str] = []
    play(watcher=fedhl.watch.Watcher(say=said.append))
    assert [line.split("  ")[0] for line in said] == [f"round {k}/3" for k in range(4)]


def test_numbers_for_a_table_and_a_picture():
    result = play()
    table = result.rows
    assert [row["round"] for row in table] == [0, 1, 2, 3]
    assert table[-1]["eval/full/accuracy"] == result.metrics[-1]["evaluation"]["full"]["accuracy"]
    assert table[-1]["bytes/down"] == result.metrics[-1]["bytes"]["down"]
    assert all(type(x) in (int, float) for row in table for x in row.values())
    assert table[-1]["bytes/down_total"] == sum(line["bytes"]["down"] for line in result.metrics)
    (ax,) = result.plot().axes
    drawn = {str(line.get_label()): line.get_ydata() for line in ax.get_lines()}
    assert list(drawn) == ["full W", "cut to the top rank"]
    assert np.asarray(drawn["full W"]).tolist() == [row["eval/full/loss"] for row in table]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"learning_rate": 1e-2},
            "learning_rate: unknown key .*did you mean training.learning_rate",
        ),
        ({"data": {}}, "data: unknown key"),
        ({"report_to": ["wandb"]}, "report_to: unknown key"),
        ({"training": {"steps": 0}}, "training.steps: "),
        ({"ranks": 7}, "rank 7 does not fit layer first"),
        (
            {"ranks": {"a": 2}, "clients": {"a": points(3, 1), "b": points(3, 1)}},
            "client 'b' has no rank",
        ),
        ({"ranks": [1, 2, 3]}, "3 ranks for 2 clients"),
        ({"lora": {"ranks": 4}}, "lora.ranks: give the ranks as ranks="),
        ({"head": ["lastt"]}, "head: .*did you mean 'last'"),
        ({"clients": {"a": []}, "ranks": 2}, "clients: 'a' has no rows"),
        ({"clients": {"a": 5}, "ranks": 2}, "clients: 'a': expected rows"),
        ({"client_held_out": {"nobody": points(3, 1)}}, "client_held_out: .*nobody"),
        ({"metric": "f1"}, "metric: .*f1"),
        ({"metrics": lambda model, batch: {"x": torch.ones(3, 2)}}, "'x' has the shape"),
        ({"checkpoints": {"keep": 3}}, "checkpoints: .*nothing is written"),
        ({"participation": {"count": 5}}, "participation.count: expected at most 2"),
        ({"evaluation": {"client_fraction": 0.2}}, "give client_held_out"),
        ({"method": "fedsa_lora", "ranks": 2}, "give client_held_out"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        play(**given)
