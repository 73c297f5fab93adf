"""How a model reads rows: each as if it were alone, whatever the rows beside it in the batch.

Architectures differ in where they read a class (the first token, the last, the last that is no padding), in
how they count positions, and in what they cannot read at all. No table says so: it is found out, by forward
passes of a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedhl.errors import UserError, first_line
from fedhl.task.examples import Example, collate

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# --- padding ------------------------------------------------------------------------------------


def settle_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, head: bool
) -> bool:
    """Have `model` read a batch that `collate` pads on the right as it reads each of its rows alone.

    The padding id of the tokenizer becomes that of the model. A classifier (`head`) that reads the last
    position is handed the padding on the left. Returns whether that was enough; if not (a model that mixes
    all positions), only batches of one row are right.
    Raises UserError for a tokenizer that cannot pad, and for a padding token that the model does not know.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model {source!r}: its tokenizer has neither a padding nor an end-of-text token, "
                "so that rows cannot be batched; add a pad_token to tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    pad_id, known = tokenizer.pad_token_id, vocabulary(model)
    assert isinstance(pad_id, int)
    if known is not None and pad_id >= known:
        raise UserError(
            f"model {source!r}: its tokenizer pads with {str(tokenizer.pad_token)!r}, token {pad_id}, but "
            f"the model's embedding has {known} rows, counted from 0; name another pad_token in "
            "tokenizer_config.json, or enlarge the embedding"
        )
    if not counts_from_padding(model):
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = pad_id
    short, long = sample_rows(model, tokenizer, source)
    if reads_alone(model, short, long, pad_id, source):
        return True
    if head:
        hook = pad_left(model)
        if reads_alone(model, short, long, pad_id, source):
            tokenizer.padding_side = "left"
            return True
        hook.remove()
    return False


def counts_from_padding(model: nn.Module) -> bool:
    """Whether positions are counted from the padding id on, as in RoBERTa: then the id is a part of what the
    weights have learnt, and nothing else depends on it."""
    return any(
        "position" in name.rpartition(".")[2] and getattr(module, "padding_idx", None) is not None
        for name, module in model.named_modules()
    )


def pad_left(model: nn.Module) -> RemovableHandle:
    """From now on `model` moves the padding of its batches from the right to the left. Positions are counted
    from the first token of a row."""
    positions = "position_ids" in signature(model.forward).parameters

    def move(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask: Tensor = kwargs["attention_mask"]
        order = mask.argsort(dim=1, stable=True)
        moved = {name: kwargs[name].gather(1, order) for name in ("input_ids", "attention_mask")}
        if positions:
            moved["position_ids"] = (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return args, kwargs | moved

    return model.register_forward_pre_hook(move, with_kwargs=True)


def reads_alone(
    model: PreTrainedModel, short: Example, long: Example, pad_id: int, source: str
) -> bool:
    """Whether the logits of the short row are the same alone and beside the long one, up to rounding."""
    alone = logits(model, [short], pad_id, source)[0].float()
    beside = logits(model, [short, long], pad_id, source)[0].float()
    if alone.ndim == 2:  # one for each token
        beside = beside[: len(alone)]
    rounding = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    return not (alone - beside).abs().max() > rounding * alone.abs().max()


# --- short forward passes -----------------------------------------------------------------------


def sample_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> tuple[Example, Example]:
    """Two rows of ordinary tokens, 4 and 8, between those that the tokenizer puts around a text."""
    limit, special = vocabulary(model), set(tokenizer.all_special_ids)
    ordinary = sorted(
        id
        for id in tokenizer.get_vocab().values()
        if id not in special and (limit is None or id < limit)
    )
    if not ordinary:
        raise UserError(
            f"model {source!r}: its tokenizer knows no token but special ones "
            f"({', '.join(map(str, tokenizer.all_special_tokens[:6]))}), so that every word would be "
            "unknown; put the tokenizer that belongs to the model beside its weights"
        )
    words = [ordinary[k * len(ordinary) // 12] for k in range(12)]
    around: list[int] = tokenizer("")["input_ids"]  # pyright: ignore[reportAssignmentType]
    short, long = ([*around[:-1], *part, *around[-1:]] for part in (words[:4], words[4:]))
    return Example(short, 0), Example(long, 0)


@torch.no_grad()
def logits(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, source: str) -> Tensor:
    """The logits of a batch. Raises UserError if the model cannot read it."""
    batch = collate(examples, pad_id)
    del batch["labels"]
    try:
        return model(**{name: t.to(model.device) for name, t in batch.items()}).logits
    except Exception as error:  # the library raises nearly everything here
        raise UserError(
            f"model {source!r}: a {type(model).__name__} cannot read rows of "
            f"{' and '.join(str(len(row.input_ids)) for row in examples)} tokens: {first_line(error)}"
        ) from error


def vocabulary(model: PreTrainedModel) -> int | None:
    """The number of tokens that the model has an embedding and, if it predicts tokens, logits for; None
    without a table of tokens."""
    try:
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:
        return None
    rows = [getattr(table, "num_embeddings", None) for table in tables[:1]]
    rows += [getattr(table, "out_features", None) for table in tables[1:]]
    return min((n for n in rows if n is not None), default=None)
