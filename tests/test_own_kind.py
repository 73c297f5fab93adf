"""A kind of task from elsewhere, examples/tags.py, in a config, a run, an export and a second process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.table import Table
from support.tiny import ANIMALS, PLANTS, classification, rows, save_bert, write_rows
from tags import Tags, TagTask
from torch.nn.functional import cross_entropy

from fedhl.config.text import dump_config, load_config
from fedhl.errors import UserError
from fedhl.record import read_metrics, read_summary
from fedhl.run import resume_run, start_run
from fedhl.run.delivery import evaluate_run, export_run
from fedhl.task.examples import IGNORED

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def tag(word: str) -> str:
    return "animal" if word in ANIMALS else "plant" if word in PLANTS else "other"


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return classification(
        task={"kind": "tags:TagTask", "words": "tokens", "max_length": 16},
        model={"source": str(folder / "bert")},
        data={"source": str(folder / "rows.jsonl"), "held_out": {"count": 30}},
        partition={"kind": "iid", "clients": 3},
        lora={"targets": ["query", "value", "dense"], "ranks": [2, 2, 4]},
        rounds=2,
        training={"steps": 12, "learning_rate": 3e-2},
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tags")
    save_bert(folder / "bert")
    made = [
        {"tokens": (words := row["text"].split()), "tags": [tag(word) for word in words]}
        for row in rows(150)
    ]
    write_rows(folder / "rows.jsonl", made)
    (folder / "tags.yaml").write_text(yaml.safe_dump(settings(folder)), encoding="utf-8")
    start_run(load_config(folder / "tags.yaml"), folder / "run")
    return folder / "run"


def test_it_learns_and_is_judged_by_its_own_metric(run: Path) -> None:
    lines = read_metrics(run)
    accuracy = [line["evaluation"]["full"]["accuracy"] for line in lines]
    assert read_summary(run)["labels"] == ["animal", "other", "plant"]
    assert lines[-1]["evaluation"]["metric"] == "accuracy"
    assert accuracy[-1] > max(0.9, accuracy[0])


def test_its_accuracy_over_words_is_in_percent_but_has_no_interval_of_rows(run: Path) -> None:
    from fedhl.report.files import read_run
    from fedhl.report.run_page import run_page

    (found,) = evaluate_run(run, "last", None)
    assert isinstance(found, Table) and found.caption is None
    assert [str(column.header) for column in found.columns] == [
        *("model", "accuracy", "loss", "examples")
    ]
    page = run_page(read_run(run))
    full = read_metrics(run)[-1]["evaluation"]["full"]["accuracy"]
    assert f"{100 * full:.1f}%" in page and "Wilson" not in page


def test_its_settings_are_kept_in_the_run_folder(run: Path) -> None:
    config = load_config(run / "config.yaml")
    task: Any = config.task
    assert isinstance(task, TagTask) and task.words == "tokens"
    assert yaml.safe_load(dump_config(config))["task"] == {
        "kind": "tags:TagTask",
        "words": "tokens",
        "tags": "tags",
        "max_length": 16,
    }
    resume_run(run)  # finished: it is read, and nothing is trained


def test_what_it_has_learnt_is_an_adapter_for_tokens(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForTokenClassification

    export_run(run, tmp_path / "adapter", 4, "last")
    config = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = AutoModelForTokenClassification.from_pretrained(run.parent / "bert", config=config)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert model.peft_config["default"].task_type == "TOKEN_CLS"
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: token-classification" in card


def test_its_loss_is_a_mean_over_tagged_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=draw)
    labels = torch.randint(4, (3, 5), generator=draw)
    labels[0, 2:], labels[2, 0] = IGNORED, IGNORED
    loss = TagTask.score(logits, labels)["loss"]
    whole = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(loss.mean(), whole)
    assert Tags(TagTask, 0).terms({"labels": labels}) == len(loss) == 11


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("tags:Missing", r"task: kind 'tags:Missing' cannot be imported: .*Missing"),
        ("no_such_module:Kind", r"cannot be imported: No module named 'no_such_module'"),
        ("tags:Tags", r"must be a class derived from fedhl\.task\.Kind"),
    ],
)
def test_what_is_no_kind_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    wrong = settings(tmp_path)
    wrong["task"] = {"kind": kind}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(wrong), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        load_config(path)


def test_a_wrong_setting_of_it_is_named(tmp_path: Path) -> None:
    wrong = settings(tmp_path)
    wrong["task"] |= {"max_length": 0, "wods": "x"}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(wrong), encoding="utf-8")
    with pytest.raises(UserError, match=r"task: .*max_length: .*wods: "):
        load_config(path)


def test_rows_that_it_refuses_are_named() -> None:
    task = TagTask(kind="tags:TagTask")
    good = {"words": ["a"], "tags": ["x"]}
    for wrong in ({"words": ["a"], "tags": []}, {"words": "a", "tags": "x"}):
        with pytest.raises(UserError, match=r"f: row 1 .*expected as many tags as words"):
            task.check([good, wrong], "f")
