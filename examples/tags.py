"""A kind of task of one's own: a tag for every word, as for names of people and places in a text.

A config names it by its import path, and gives its settings as for any other kind:

    task: {kind: "tags:TagTask", words: tokens, tags: ner_tags}

    PYTHONPATH=examples fedhl run my-config.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import PositiveInt

from fedhl.record import Unit
from fedhl.task.examples import IGNORED, Encoded, Example
from fedhl.task.labels import class_settings
from fedhl.task.rows import Rows, column, located, refuse
from fedhl.task.texts import TextKind, Texts


class TagTask(TextKind):
    """One tag per word. The output layer is trained whole, beside the adapters."""

    auto: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str | None] = "TOKEN_CLS"
    pipeline: ClassVar[str] = "token-classification"
    head: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    metric: ClassVar[str] = "accuracy"
    greater: ClassVar[bool] = True
    units: ClassVar[Mapping[str, Unit]] = {"accuracy": "share"}  # of tokens, not of rows

    words: str = "words"
    """The field that holds the words, a list."""
    tags: str = "tags"
    """The field that holds the tags, a list of the same length."""
    max_length: PositiveInt = 128
    """Longer rows are cut to this number of tokens."""

    @staticmethod
    def model_settings(labels: Sequence[str] | None) -> dict[str, Any]:
        return {} if labels is None else class_settings(labels, "single_label_classification")

    @staticmethod
    def score(logits: Any, labels: Any) -> dict[str, Any]:
        """The cross-entropy of each tagged token, and whether its likeliest tag is the right one."""
        from torch.nn.functional import cross_entropy

        asked = labels != IGNORED
        logits, labels = logits[asked], labels[asked]
        loss = cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(-1) == labels}

    def check(self, rows: Rows, source: str) -> None:
        words, tags = column(rows, self.words, source), column(rows, self.tags, source)
        with located(rows, source):
            refuse(
                (row, f"expected as many {self.tags} as {self.words}, in two lists")
                for row, (a, b) in enumerate(zip(words, tags, strict=True))
                if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b) > 0)
            )

    def labels(self, rows: Rows, source: str) -> list[tuple[str, ...]]:
        return [tuple(map(str, tags)) for tags in column(rows, self.tags, source)]

    def texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(row[self.words])

    def encode(
        self, rows: Rows, source: str, processor: Any, labels: Sequence[str] | None
    ) -> Encoded:
        self.check(rows, source)
        known = {name: k for k, name in enumerate(labels or ())}
        examples, cut = [], 0
        for row in rows:
            whole = processor(row[self.words], is_split_into_words=True)
            ids = [IGNORED] * len(whole["input_ids"])
            before = None
            for token, word in enumerate(whole.word_ids()):
                if word is not None and word != before:  # the first token of a word has its tag
                    ids[token] = known[str(row[self.tags][word])]
                before = word
            cut += len(ids) > self.max_length
            examples.append(Example(whole["input_ids"][: self.max_length], ids[: self.max_length]))
        return Encoded(examples, [*range(len(rows))], cut)

    def objective(self, processor: Any, vocabulary: int) -> Texts:
        return Tags(type(self), processor.pad_token_id)

    @classmethod
    def usage(cls, named: bool, max_length: int | None) -> list[str]:
        return [
            'inputs = tokenizer("A text.", return_tensors="pt")',
            "print(model.eval()(**inputs).logits.argmax(-1))",
        ]


class Tags(Texts):
    """The loss is a mean over the tagged tokens; that of a language model skips the first token."""

    def terms(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())
