"""Metrics: what a loop over single rows gives, however the rows are ordered and batched."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.small_models import CLASSES, LONGEST, VOCABULARY, both, build, rows
from transformers import PreTrainedModel

from fedhl.model.evaluation import Metrics, evaluate
from fedhl.task import CausalTask, ClassificationTask, texts
from fedhl.task.examples import IGNORED, Example
from fedhl.task.texts import Texts

EPS32 = torch.finfo(torch.float32).eps


def measure(model: PreTrainedModel, examples: list[Example], batch_size: int = 4) -> Metrics:
    kind = ClassificationTask if isinstance(examples[0].labels, int) else CausalTask
    return evaluate(
        model,
        examples,
        objective=Texts(kind, 0, model.config.vocab_size),
        batch_size=batch_size,
        device=torch.device("cpu"),
        autocast=nullcontext,
    )


@torch.no_grad()
def naive(model: PreTrainedModel, examples: list[Example]) -> tuple[list[float], list[bool]]:
    """Every term of the loss in float64 from unpadded single rows, and whether it was predicted."""
    losses, hits = [], []
    for example in examples:
        ids, labels = example.input_ids, example.labels
        assert not isinstance(labels, tuple)
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        if not isinstance(labels, list):
            losses.append(-float(logits.log_softmax(-1)[int(labels)]))
            hits.append(int(logits.argmax()) == labels)
            continue
        for position in range(1, len(ids)):  # position t is predicted from the tokens before it
            if labels[position] != IGNORED:
                losses.append(-float(logits[position - 1].log_softmax(-1)[labels[position]]))
    return losses, hits


def close(value: float | list[float]) -> Any:
    """Logits of about 10 in float32, which padding reaches through sums in another order."""
    return pytest.approx(value, abs=50 * EPS32)


@both
def test_metrics_of_a_naive_loop(kind: str) -> None:
    model, examples = build(kind), rows(kind, 23)
    losses, hits = naive(model, examples)
    got = measure(model, examples)
    assert got["loss"] == close(sum(losses) / len(losses))
    assert got["examples"] == 23
    if kind == "bert":
        assert got["accuracy"] == sum(hits) / 23 and 0 < got["accuracy"] < 1
    else:
        assert set(got) == {"loss", "examples"}
        lengths = {len(x.labels) - x.labels.count(IGNORED) for x in examples}  # pyright: ignore
        assert len(lengths) > 3, "completions of many lengths"
        by_row = [sum(naive(model, [x])[0]) / len(naive(model, [x])[0]) for x in examples]
        assert abs(got["loss"] - sum(by_row) / 23) > 1e-3, "a mean over tokens, not over rows"


@both
def test_order_and_batch_size_do_not_matter(kind: str) -> None:
    model, examples = build(kind), rows(kind, 23)
    want = measure(model, examples, batch_size=1)
    for batch_size in (2, 7, 23, 100):
        for some in (examples, examples[::-1], examples[11:] + examples[:11]):
            got = measure(model, some, batch_size)
            assert got.keys() == want.keys()
            assert got["loss"] == close(want["loss"])
            assert got.get("accuracy") == want.get("accuracy")
    kept = list(examples)
    measure(model, examples)
    assert examples == kept, "the caller's rows stay in their order"


@pytest.mark.parametrize("rows_at_once", [0, 1, 3])
def test_few_logits_at_once(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    """A smaller budget of logits makes smaller batches, never below one row, and the same metrics."""
    model, examples = build("llama"), rows("llama", 23)
    want = measure(model, examples, batch_size=8)
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    budget = rows_at_once * VOCABULARY * LONGEST
    monkeypatch.setattr(texts, "LOGITS_AT_ONCE", budget)
    got = measure(model, examples, batch_size=8)
    hook.remove()
    assert got["loss"] == close(want["loss"]) and got["examples"] == 23
    assert sum(batch for batch, _ in shapes) == 23
    assert all(b == 1 or b * VOCABULARY * width <= budget for b, width in shapes)
    assert max(b for b, _ in shapes) <= 8
    if rows_at_once == 3:
        assert shapes[0] == (3, LONGEST), "longest first, as many as fit"
        assert max(b for b, _ in shapes) > 3, "more of the short ones"


def test_the_score_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
    log_p = logits.double().log_softmax(-1)
    got = ClassificationTask.score(logits, torch.tensor([0, 1]))
    assert got["loss"].tolist() == close([-float(log_p[0, 0]), -float(log_p[1, 1])])
    assert got["accuracy"].tolist() == [True, False]
    # one row of three tokens: the first two positions predict tokens 1 and 2, and 1 is not asked for
    logits = torch.tensor([[[9.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    got = CausalTask.score(logits, torch.tensor([[0, IGNORED, 1]]))
    assert got.keys() == {"loss"}
    assert got["loss"].tolist() == close([-float(logits[0, 1].double().log_softmax(-1)[1])])


def test_nothing_is_trained_or_drawn() -> None:
    model, examples = build("bert", dropout=0.5), rows("bert", 9)
    before = torch.random.get_rng_state()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    first, again = measure(model, examples), measure(model, examples)
    assert first == again
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_left_in_training_mode_is_evaluated_without_dropout() -> None:
    model, examples = build("bert", dropout=0.5), rows("bert", 9)
    want = measure(model, examples)
    model.train()
    assert measure(model, examples) == want
    assert not model.training


def test_a_uniform_model_has_the_loss_of_guessing() -> None:
    model = build("bert")
    torch.nn.init.zeros_(model.get_parameter("classifier.weight"))
    torch.nn.init.zeros_(model.get_parameter("classifier.bias"))
    examples = rows("bert", 12)
    got = measure(model, examples)
    assert got["loss"] == close(float(torch.tensor(float(CLASSES)).log()))
    assert (
        got["accuracy"] == sum(x.labels == 0 for x in examples) / 12
    )  # argmax of equals: the first
