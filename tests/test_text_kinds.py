"""Runs whose rows have several labels, a number, or two texts: trained, exported, used as the card says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny import ANIMALS, PLANTS, classification, rows, save_bert, write_rows

from fedhl.config import Config
from fedhl.export.cards import BASE, FOLDER
from fedhl.record import more_is_better, read_metrics, read_summary
from fedhl.run import start_run
from fedhl.run.delivery import export_run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def made(count: int) -> list[dict[str, Any]]:
    """Sentences, with all that is spoken of, the share of animals among the animals and plants, and whether a
    second sentence speaks of the same."""
    first, second = rows(count), rows(count, seed=1)
    found = []
    for one, other in zip(first, second, strict=True):
        words = one["text"].split()
        animals, plants = (sum(word in group for word in words) for group in (ANIMALS, PLANTS))
        kinds = [name for name, n in (("animal", animals), ("plant", plants)) if n]
        found.append(
            {
                "text": one["text"],
                "other": other["text"],
                "labels": kinds,
                "share": animals / max(animals + plants, 1),
                "same": "yes" if one["label"] == other["label"] else "no",
            }
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    save_bert(folder / "bert")
    write_rows(folder / "rows.jsonl", made(160))
    return folder


TASKS: dict[str, dict[str, Any]] = {
    "several": {"kind": "multi-label-classification"},
    "number": {"kind": "regression", "label": "share"},
    "pair": {"kind": "sequence-classification", "second": "other", "label": "same"},
}
METRICS = {"several": "f1", "number": "loss", "pair": "accuracy"}


@pytest.mark.parametrize("name", TASKS)
def test_a_run_is_trained_and_used(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config.model_validate(
        classification(
            task=TASKS[name] | {"max_length": 24},
            model={"source": str(folder / "bert")},
            data={"source": str(folder / "rows.jsonl"), "held_out": {"count": 40}},
            partition={"kind": "iid", "clients": 3},
            lora={"targets": ["query", "value", "dense"], "ranks": [2, 2, 4]},
            rounds=3,
            training={"steps": 12, "learning_rate": 3e-2},
        )
    )
    run = tmp_path / "run"
    start_run(config, run)
    lines = read_metrics(run)
    first, last = lines[0]["evaluation"], lines[-1]["evaluation"]
    assert last["metric"] == METRICS[name] and more_is_better(last) == (name != "number")
    assert {METRICS[name], "loss"} <= last["full"].keys()
    if name != "pair":  # two texts of random words are more than so small a model can compare
        assert last["full"]["loss"] < 0.9 * first["full"]["loss"]
    counts = [client["labels"] for client in read_summary(run)["clients"]]
    assert [bool(count) for count in counts] == [name != "number"] * 3

    export_run(run, tmp_path / "adapter", 4, "last")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for what, place in ((FOLDER, tmp_path / "adapter"), (BASE, folder / "bert")):
        assert what in code
        code = code.replace(what, str(place))
    exec(code, {})
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    if name == "number":
        assert abs(float(printed)) < 10
    else:
        labels = read_summary(run)["labels"]
        assert set(re.findall(r"\w+", printed)) <= set(labels)
