"""What the model says of single rows: its metrics row by row, and the texts that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedhl.errors import UserError
from fedhl.federation.federation import Federation
from fedhl.task.examples import IGNORED, Example


class Predicted(NamedTuple):
    """The prediction for one row, in float64 and on the CPU.

    `terms`: each metric, for every term of the loss that the row has, one for a class, and one for each
    completion token; `outputs`: what the model puts out where this is a vector, such as the logits (K,) of
    classes, else None.
    """

    terms: dict[str, Tensor]
    outputs: Tensor | None


@torch.no_grad()
def predictions(federation: Federation, rows: Sequence[Any]) -> list[Predicted]:
    """The predictions of the current model for `rows`, in their order."""
    model, objective = federation.slots.model, federation.objective
    model.eval()
    found: dict[int, Predicted] = {}
    for part in objective.parts(rows, federation.config.evaluation.batch_size):
        batch = send_to_device(objective.batch(part), federation.device)
        with federation.autocast():
            outputs = objective.outputs(model, batch)
        counts = [objective.terms(objective.batch([row])) for row in part]
        terms = {
            name: values.cpu().double().split(counts)
            for name, values in objective.score(outputs, batch).items()
        }
        vector = isinstance(outputs, Tensor) and outputs.ndim == 2
        vectors = outputs.cpu().double() if vector else [None] * len(part)
        for k, row in enumerate(part):
            of_row = {name: values[k] for name, values in terms.items()}
            # parts have an order of their own, but their rows are the same objects
            found[id(row)] = Predicted(of_row, vectors[k])
    return [found[id(row)] for row in rows]


class Completion(NamedTuple):
    """A prompt as the model reads it, the text that should follow, and the text that the model writes."""

    prompt: str
    wanted: str
    generated: str


@torch.no_grad()
def completions(
    federation: Federation,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    new_tokens: int,
) -> list[Completion]:
    """What the current language model writes after the prompt of each example: the most probable token at
    each step, up to an end token, to `new_tokens`, or to the last position of the model.

    The prompt is what comes before the first token with a label; of a chat the first answer is wanted.
    Raises UserError for a model that transformers cannot generate with.
    """
    model = federation.slots.model.eval()
    if not model.can_generate():
        raise UserError(f"a {type(model).__name__} of transformers cannot generate texts")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    theirs: GenerationConfig = model.generation_config
    found = []
    for example in examples:
        ids, labels = example.input_ids, example.labels
        assert isinstance(labels, list)
        start, end = first_answer(labels)
        room = new_tokens if positions is None else max(1, min(new_tokens, positions - start))
        model.generation_config = greedy(theirs, tokenizer, room)
        prompt = torch.tensor([ids[:start]], device=federation.device)
        try:
            with federation.autocast():
                tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt))
        finally:
            model.generation_config = theirs
        texts = (ids[:start], ids[start:end], tokens[0, start:].cpu().tolist())
        found.append(
            Completion(*(str(tokenizer.decode(t, skip_special_tokens=True)) for t in texts))
        )
    return found


def first_answer(labels: Sequence[int]) -> tuple[int, int]:
    """From where to where the first tokens with labels go. The first token of all belongs to the prompt,
    since it is predicted from nothing."""
    start = next(k for k, label in enumerate(labels) if k and label != IGNORED)
    rest = (k for k in range(start, len(labels)) if labels[k] == IGNORED)
    return start, next(rest, len(labels))


def greedy(
    theirs: GenerationConfig, tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> GenerationConfig:
    """Greedy decoding to an end token of the tokenizer or of the model, without what a checkpoint may say of
    sampling and of penalties."""
    of_model: Any = theirs.eos_token_id
    own: Any = tokenizer.eos_token_id
    ends = {own, *(of_model if isinstance(of_model, list) else [of_model])} - {None}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,
    )
