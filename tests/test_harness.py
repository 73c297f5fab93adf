"""`fedhl eval --lm-eval`: the real lm-eval on a task over rows of ours, against transformers alone."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhl.config import load_config
from fedhl.errors import UserError
from fedhl.run.asked import Harness
from fedhl.run.delivery import export_run
from fedhl.run.harness import evaluate_by_harness, find_tasks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

CHOICES = ["the animal", "the plant"]
Likelihoods = list[list[float]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of lm-eval, and its rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": row["prompt"], "choices": CHOICES, "answer": CHOICES.index(row["completion"])}
        for row in tiny.rows(60, seed=1)
        if row["completion"] in CHOICES
    ][:12]
    data = tiny.write_rows(folder / "rows.jsonl", rows)
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    for name, changes in (("our_kinds", {}), ("our_code", {"unsafe_code": True})):
        text = yaml.safe_dump({**task, "task": name, **changes})
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def written(file: Path) -> tuple[dict[str, Any], Likelihoods]:
    """The results in a file of `--json`, and the log-likelihood of each choice of each row."""
    found = json.loads(file.read_text("utf-8"))
    rows = sorted(found["samples"]["our_kinds"], key=lambda row: row["doc_id"])
    return found, [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]


def chatted(tokenizer: Any, question: str) -> str:
    """The question as the user's turn, and what the template begins an answer with."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


@torch.no_grad()
def by_hand(
    model: Any, tokenizer: Any, tasks: Path, asked: Callable[[Any, str], str] = lambda _, text: text
) -> tuple[Likelihoods, float]:
    """`Σ log p` over the tokens of each choice, one row at a time, and the share of the rows whose likelier
    choice is the answer. `asked`: the prompt of a question."""
    found, right = [], []
    for line in (tasks / "rows.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        sums = []
        for choice in row["choices"]:
            question = asked(tokenizer, row["question"])
            prompt = tokenizer(question.rstrip())["input_ids"]
            ids = torch.tensor(tokenizer(question + choice)["input_ids"])
            logits = model(ids[None]).logits[0].double().log_softmax(-1)
            of_next = logits[:-1].gather(1, ids[1:, None])[:, 0]
            sums.append(float(of_next[len(prompt) - 1 :].sum()))
        found.append(sums)
        right.append(sums.index(max(sums)) == row["answer"])
    return found, sum(right) / len(right)


def same(ours: Likelihoods, theirs: Likelihoods) -> None:
    """Sums of some tens of logarithms in float32, in another order."""
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-4)


def test_the_command_finds_what_the_merged_model_says(runs: Path, tasks: Path, tmp_path: Path):
    file = tmp_path / "found.json"
    done = tiny.fedhl(
        runs.parent,
        *("eval", "runs/lm", "--lm-eval", "our_kinds", "--include-path", tasks, "--json", file),
    )
    assert done.code == 0, done
    export_run(runs / "lm", tmp_path / "model", None, "last")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected, accuracy = by_hand(model, AutoTokenizer.from_pretrained(tmp_path / "model"), tasks)
    found, likelihoods = written(file)
    same(likelihoods, expected)
    result = found["results"]["our_kinds"]
    assert found["fedhl"] == {"run": "lm", "round": 3, "model": "full-rank update"}
    assert result["acc,none"] == pytest.approx(accuracy) and result["sample_len"] == 12
    error = result["acc_stderr,none"]
    line = next(line for line in done.out.splitlines() if "our_kinds" in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["our_kinds", "acc", f"{accuracy:.4f}", f"{error:.4f}", "12"]
    # the share's standard error, with n - 1 below
    assert error == pytest.approx((accuracy * (1 - accuracy) / 11) ** 0.5)


def test_a_rank_is_that_of_the_exported_adapter(runs: Path, tasks: Path, tmp_path: Path):
    from peft import PeftModel

    file = tmp_path / "found.json"
    asked = Harness(["our_kinds"], tasks, file, rank=1)
    evaluate_by_harness(runs / "lm", 2, asked, places=here(runs, "llama"))
    export_run(runs / "lm", tmp_path / "adapter", 1, 2, places=here(runs, "llama"))
    base = AutoModelForCausalLM.from_pretrained(runs.parent / "llama")
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    found, likelihoods = written(file)
    assert found["fedhl"] == {"run": "lm", "round": 2, "model": "update truncated to rank 1"}
    same(likelihoods, by_hand(model, tokenizer, tasks)[0])


def test_a_chat_model_is_asked_in_its_template(runs: Path, tasks: Path, tmp_path: Path):
    run, file = shutil.copytree(runs / "chat", tmp_path / "chat"), tmp_path / "found.json"
    text = (run / "config.yaml").read_text()
    assert "precision: bfloat16" in text  # too coarse to compare
    (run / "config.yaml").write_text(text.replace("precision: bfloat16", "precision: float32"))
    asked = Harness(["our_kinds"], tasks, file, limit=5, chat=True)
    evaluate_by_harness(run, "last", asked, places=here(runs, "chat"))
    export_run(run, tmp_path / "model", None, "last", places=here(runs, "chat"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    found, likelihoods = written(file)
    assert found["results"]["our_kinds"]["sample_len"] == len(likelihoods) == 5
    same(likelihoods, by_hand(model, tokenizer, tasks, chatted)[0][:5])
    with pytest.raises(UserError, match="tokenizer has no chat template; leave it out"):
        evaluate_by_harness(
            runs / "lm", "last", replace(asked, json=None), places=here(runs, "llama")
        )


def here(runs: Path, model: str) -> list[str]:
    return [f"model.source={runs.parent / model}"]


def test_what_lm_eval_cannot_do_is_one_sentence(tasks: Path):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks)
    (found,) = find_tasks(manager, ["our_kind*"])
    assert found.task_name == "our_kinds"
    with pytest.raises(UserError, match="unknown task 'our_kindz'; did you mean 'our_kinds'"):
        find_tasks(manager, ["our_kinds", "our_kindz"])
    with pytest.raises(
        UserError,
        match=r"--lm-eval arc_easy: .*cannot be read: .*ai2_arc.* hub, .* and HF_HUB_OFFLINE is set",
    ):
        find_tasks(manager, ["arc_easy"])
    with pytest.raises(UserError, match="our_code runs code that the model writes"):
        find_tasks(manager, ["our_kinds", "our_code"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Harness(["a", ""]), "expected names of tasks with commas between them"),
        (Harness(["a"], Path("nowhere")), "--include-path nowhere: there is no such folder"),
        (
            Harness(["a"], None, Path("out.txt")),
            "--json out.txt: expected the name of a .json file",
        ),
    ],
)
def test_mistakes_are_named(asked: Harness, said: str, project: Path, monkeypatch: Any):
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=said):
        asked.check(load_config("lm.yaml"))


def test_without_lm_eval_it_is_told_how_to_install_it(project: Path, monkeypatch: Any):
    monkeypatch.chdir(project)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"install it with `pip install 'fedhl\[lm-eval\]'`"):
        Harness(["a"]).check(load_config("lm.yaml"))
