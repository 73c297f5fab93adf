"""Direct preference optimisation: its loss, its reference, and a federation that learns a preference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.characters import characters
from support.tiny import classification, rows, save_llama, write_rows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedhl.config import Config
from fedhl.errors import UserError
from fedhl.federation.prepare import prepare
from fedhl.record import read_metrics
from fedhl.run import start_run
from fedhl.run.asked import Asked
from fedhl.run.delivery import evaluate_run
from fedhl.task.causal import encode_completion
from fedhl.task.examples import IGNORED
from fedhl.task.preferences import Pair, PreferenceTask

TOKENIZER = characters()
ROWS = [
    {"prompt": "warm", "chosen": "yes", "rejected": "ice, no"},
    {"prompt": "ice", "chosen": "no!", "rejected": "a"},
]


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double().eval()


def task(**settings: Any) -> PreferenceTask:
    return PreferenceTask.model_validate({"kind": "preference", **settings})


@torch.no_grad()
def log_probability(model: nn.Module, ids: list[int], labels: Any) -> float:
    """Of the labelled tokens of one row, token by token."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return sum(
        float(logits[t - 1].log_softmax(-1)[labels[t]])
        for t in range(1, len(ids))
        if labels[t] != IGNORED
    )


def test_the_loss_is_that_of_the_paper() -> None:
    """Equation 7 of arXiv 2305.18290, one answer at a time, against the batch."""
    with torch.random.fork_rng():
        base, policy = model_of(0), model_of(1)
    beta = 0.3
    found = task(beta=beta)
    objective = found.objective(TOKENIZER, len(TOKENIZER))
    encoded = found.encode(ROWS, "f", TOKENIZER, None)

    @torch.no_grad()
    def outputs(some: Any) -> torch.Tensor:
        return objective.outputs(base, objective.batch(some))

    pairs = found.with_base(encoded.examples, outputs)
    losses = []
    for row, pair in zip(ROWS, pairs, strict=True):
        change = []
        for field in ("chosen", "rejected"):
            (one,) = encode_completion(TOKENIZER, [row["prompt"]], [row[field]], 99).examples
            change.append(
                log_probability(policy, one.input_ids, one.labels)
                - log_probability(base, one.input_ids, one.labels)
            )
        losses.append(-math.log(1 / (1 + math.exp(-beta * (change[0] - change[1])))))
        assert pair.reference != 0
    batch = objective.batch(pairs)
    with torch.no_grad():
        scores = objective.score(objective.outputs(policy, batch), batch)
        mean = objective.loss(policy, batch)
        at_base = objective.score(objective.outputs(base, batch), batch)["loss"]
    torch.testing.assert_close(
        scores["loss"].double(), torch.tensor(losses).double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(mean.double(), scores["loss"].mean().double())
    torch.testing.assert_close(at_base, torch.full_like(at_base, math.log(2)), rtol=1e-5, atol=0)


def test_a_batch_is_as_its_pairs_alone() -> None:
    with torch.random.fork_rng():
        model = model_of(0)
    objective = task().objective(TOKENIZER, len(TOKENIZER))
    pairs = task().encode(ROWS, "f", TOKENIZER, None).examples
    with torch.no_grad():
        together = objective.outputs(model, objective.batch(pairs))
        alone = [objective.outputs(model, objective.batch([pair])) for pair in pairs]
    torch.testing.assert_close(together, torch.cat(alone))
    parts = list(objective.parts([*pairs] * 3, 2))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert parts[0][0] == parts[0][1] == max(pairs, key=lambda pair: task().length(pair))


def test_chats_that_begin_alike_differ_by_their_last_turns_alone() -> None:
    """Earlier answers of the assistant are in both chats of a pair, and cancel."""
    chat = characters()
    chat.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    begin = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("on", "off"))
    apart = task().encode([{"prompt": begin, "chosen": good, "rejected": bad}], "f", chat, None)
    whole = task(prompt=None).encode(
        [{"chosen": begin + good, "rejected": begin + bad}], "f", chat, None
    )
    assert apart.examples == whole.examples
    (pair,) = apart.examples
    masked = [
        (ids, [IGNORED] * (len(ids) - len(text)) + ids[-len(text) :])
        for (ids, _, _), text in zip(pair[:2], ("on;", "off;"), strict=True)
    ]
    last = Pair(*(type(pair.chosen)(ids, labels) for ids, labels in masked))
    with torch.random.fork_rng():
        model = model_of(0)
    objective = task().objective(chat, len(chat))
    with torch.no_grad():
        both = objective.outputs(model, objective.batch([pair, last]))
    torch.testing.assert_close(both[0], both[1])


def test_a_pair_of_which_an_answer_has_no_room_is_dropped() -> None:
    long = [{"prompt": "x" * 9, "chosen": "y", "rejected": "z"}, *ROWS]
    encoded = task(max_length=9).encode(long, "f", TOKENIZER, None)
    assert encoded.rows == [1, 2] and encoded.truncated == 1  # "warm" and "ice, no" with their end


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "expected"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "all texts or all lists"),
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "all texts or all lists"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": [], "rejected": []},
            "no assistant message",
        ),
    ],
)
def test_what_is_no_pair_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"f: row 1 .*{said}"):
        task().check([ROWS[0], row], "f")
    with pytest.raises(UserError, match="without a prompt, 'chosen' must be chat messages"):
        task(prompt=None).check(ROWS, "f")


def test_a_federation_learns_a_preference(tmp_path: Path) -> None:
    """Sentences are to be followed by the right word rather than by the wrong one."""
    save_llama(tmp_path / "llama", chat=False)
    other = {"animal": "plant", "plant": "animal"}
    made = [
        {
            "prompt": row["text"] + " ",
            "chosen": f"the {row['label']}",
            "rejected": f"the {other[row['label']]}",
        }
        for row in rows(150)
    ]
    write_rows(tmp_path / "rows.jsonl", made)
    config = Config.model_validate(
        classification(
            task={"kind": "preference", "max_length": 24, "beta": 0.5},
            model={"source": str(tmp_path / "llama")},
            data={"source": str(tmp_path / "rows.jsonl"), "held_out": {"count": 40}},
            partition={"kind": "iid", "clients": 3},
            lora={"targets": ["q_proj", "v_proj", "down_proj"], "ranks": [2, 2, 4]},
            rounds=3,
            training={"steps": 10, "learning_rate": 2e-2},
        )
    )
    prepared = prepare(config)
    held_out: Any = prepared.federation.held_out
    assert all(pair.reference != 0 for pair in held_out)
    run = tmp_path / "run"
    start_run(config, run)
    lines = read_metrics(run)
    first, last = lines[0]["evaluation"]["full"], lines[-1]["evaluation"]["full"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["loss"] < 0.5 and last["accuracy"] > 0.7
    file = tmp_path / "predictions.jsonl"
    asked = Asked(predictions=file, samples=2, new_tokens=4)
    evaluate_run(run, "last", None, asked=asked)
    written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert sum(line["loss"] for line in written) / 40 == pytest.approx(last["loss"], rel=1e-4)
    assert sum(line["generated"] is not None for line in written) == 2
    more = str(write_rows(tmp_path / "more.jsonl", made[:20]))
    file.unlink()
    evaluate_run(run, "last", more, asked=Asked(predictions=file))
    again = [json.loads(line)["loss"] for line in file.read_text(encoding="utf-8").splitlines()]
    known = {line["prompt"]: line["loss"] for line in written}
    same = [
        (known[r["prompt"]], x) for r, x in zip(made, again, strict=False) if r["prompt"] in known
    ]
    assert same and all(a == pytest.approx(b, rel=1e-4) for a, b in same)
