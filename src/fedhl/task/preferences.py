"""Pairs of answers, of which one is preferred: direct preference optimisation (DPO, arXiv 2305.18290)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import PositiveFloat, PositiveInt

from fedhl.record import Unit
from fedhl.task.causal import CausalTask, encode_chat, encode_completion, problem_of
from fedhl.task.examples import IGNORED, Encoded, Example, collate
from fedhl.task.kind import OfKind
from fedhl.task.rows import Rows, column, located, refuse, shown
from fedhl.task.texts import LOGITS_AT_ONCE, TextKind, in_batches

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Pair(NamedTuple):
    """One row: the prompt with the better answer, and with the worse. `reference` is
    `log π₀(better) - log π₀(worse)` of the base model π₀ before any training."""

    chosen: Example
    rejected: Example
    reference: float = 0.0


class PreferenceTask(TextKind):
    """A language model that learns which of two answers people prefer, by direct preference optimisation.
    The reference is the base model before any training, without `lora.start`. What it says of the rows is
    computed once, before the first round."""

    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    pipeline: ClassVar[str] = "text-generation"
    head: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    metric: ClassVar[str] = "loss"
    units: ClassVar[Mapping[str, Unit]] = {"accuracy": "share of rows"}

    kind: Literal["preference"]  # pyright: ignore[reportIncompatibleVariableOverride]
    prompt: str | None = "prompt"
    """The field that holds the prompt, a text or chat messages; null: chosen and rejected are whole chats."""
    chosen: str = "chosen"
    """The field that holds the better answer, a text or chat messages."""
    rejected: str = "rejected"
    """The field that holds the worse answer, of the same form."""
    beta: PositiveFloat = 0.1
    """β of the loss: the larger, the closer the model stays to the base model."""
    max_length: PositiveInt = 512
    """A prompt with an answer is cut to this number of tokens."""

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of the margins `m = β (log π(y₊) - log π(y₋) - reference)` of all pairs: the loss `-log σ(m)`, and
        whether the model prefers the better answer more than the base model does, `m > 0`."""
        from torch.nn.functional import softplus

        return {"loss": softplus(-logits), "accuracy": logits > 0}

    @classmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        return CausalTask.usage(named, max_length)

    def check(self, rows: Rows, source: str) -> None:
        both = [column(rows, field, source) for field in (self.chosen, self.rejected)]
        prompts = [None] * len(rows) if self.prompt is None else column(rows, self.prompt, source)
        with located(rows, source):
            refuse(
                (row, problem)
                for row, values in enumerate(zip(prompts, *both, strict=True))
                if (problem := self.problem(*values))
            )

    def problem(self, prompt: Any, *answers: Any) -> str:
        """Why these values are no pair; "" if they are one."""
        if isinstance(answers[0], list):
            chats = (joined(prompt, answer) for answer in answers)
            return next(filter(None, (problem_of(chat) if chat else UNLIKE for chat in chats)), "")
        if self.prompt is None:
            return (
                f"without a prompt, {self.chosen!r} must be chat messages, not {shown(answers[0])}"
            )
        return "" if all(isinstance(x, str) for x in (prompt, *answers)) else UNLIKE

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        fields = [self.prompt] if self.prompt is not None else []
        return tuple(str(row[field]) for field in (*fields, self.chosen, self.rejected))

    def learnt(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return str(row[self.chosen]), str(row[self.rejected])

    def encode(
        self,
        rows: Rows,
        source: str,
        processor: PreTrainedTokenizerBase,
        labels: Sequence[str] | None,
    ) -> Encoded:
        self.check(rows, source)
        prompts = [None if self.prompt is None else row[self.prompt] for row in rows]
        with located(rows, source):
            better, worse = (
                encode_answers(processor, prompts, [row[field] for row in rows])
                for field in (self.chosen, self.rejected)
            )
        pairs, kept, truncated = [], [], 0
        for row, both in enumerate(zip(better, worse, strict=True)):
            pair = Pair(*(first_tokens(answer, self.max_length) for answer in both))
            if all(learnable(answer) for answer in pair[:2]):
                pairs.append(pair)
                kept.append(row)
                truncated += any(len(answer.input_ids) > self.max_length for answer in both)
        return Encoded(pairs, kept, truncated)

    def sequences(self, example: Pair) -> Sequence[Example]:
        return example[:2]

    def with_base(
        self, examples: Sequence[Pair], outputs: Callable[[Sequence[Pair]], Tensor]
    ) -> list[Pair]:
        found: list[Pair] = []
        while len(found) < len(examples):
            some = [pair._replace(reference=0.0) for pair in examples[len(found) : len(found) + 8]]
            margins = outputs(some).double().cpu() / self.beta
            found += [
                pair._replace(reference=float(m)) for pair, m in zip(some, margins, strict=True)
            ]
        return found

    def objective(self, processor: Any, vocabulary: int) -> Preferences:
        return Preferences(PreferenceTask, processor.pad_token_id, vocabulary, self.beta)


UNLIKE = "expected a prompt and two answers, all texts or all lists of chat messages"


def joined(prompt: Any, answer: Any) -> list[Any]:
    """A chat from its prompt, if there is one, and an answer; [] if they are no lists."""
    parts = ([] if prompt is None else prompt, answer)
    return [*parts[0], *parts[1]] if all(isinstance(part, list) for part in parts) else []


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], answers: Sequence[Any]
) -> list[Any]:
    """Prompts with answers, whole. Turns of the assistant that both chats of a pair begin with are learnt
    from, too, which changes nothing: they cancel in the difference."""
    if answers and isinstance(answers[0], list):
        return encode_chat(tokenizer, list(map(joined, prompts, answers)), sys.maxsize).examples
    return encode_completion(tokenizer, prompts, answers, sys.maxsize).examples


def learnable(answer: Any) -> bool:
    """Whether there is a token to learn; the first is predicted from nothing."""
    return any(label != IGNORED for label in answer.labels[1:])


def first_tokens(answer: Any, count: int) -> Any:
    return Example(answer.input_ids[:count], answer.labels[:count])


@dataclass(frozen=True)
class Preferences(OfKind):
    """Pairs of answers, for a language model of transformers."""

    pad_id: int
    vocabulary: int
    beta: float

    def batch(self, rows: Sequence[Pair]) -> dict[str, Tensor]:
        """The better answers and below them the worse, 2 B sequences."""
        import torch

        both = [*(row.chosen for row in rows), *(row.rejected for row in rows)]
        reference = torch.tensor([row.reference for row in rows], dtype=torch.float32)
        return collate(both, self.pad_id) | {"reference": reference}

    def terms(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["reference"])

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return self.score(self.outputs(model, batch), batch)["loss"].mean()

    def outputs(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The margins of the pairs."""
        from torch.nn.functional import cross_entropy

        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        # each position predicts the next token
        logits, labels = model(**inputs).logits[:, :-1].float(), batch["labels"][:, 1:]
        lost = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        better, worse = (-lost).sum(1).chunk(2)
        return self.beta * (better - worse - batch["reference"])

    def parts(self, rows: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
        """Longest rows first, so that a batch too large for the memory fails at once."""

        def longest(row: Pair) -> int:
            return max(len(part.input_ids) for part in row[:2])

        def most(row: Pair) -> int:
            return LOGITS_AT_ONCE // (2 * self.vocabulary * longest(row))

        return in_batches(sorted(rows, key=longest, reverse=True), size, most)

    def tokens(self, batch: Mapping[str, Tensor]) -> int:
        return batch["input_ids"].shape[-1]
