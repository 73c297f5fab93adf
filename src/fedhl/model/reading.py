"""How a model reads rows: each as if it were alone, whatever the rows beside it in the batch.

Architectures differ in where they read a class (the first token, the last, the last that is no padding), in
how they count positions, and in what they cannot read at all. No table says so: it is found out, by forward
passes of a few tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedhl.errors import UserError, in_one_line
from fedhl.seeds import generator
from fedhl.task.examples import Encoded, Example, collate
from fedhl.task.objective import Objective
from fedhl.task.rows import RowError

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
    pad_id, known = padding_id(tokenizer), vocabulary(model)
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


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


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
        mask: Tensor | None = kwargs.get("attention_mask")
        if mask is None:  # nothing is padded
            return args, kwargs
        order = mask.argsort(dim=1, stable=True)
        padded = {"input_ids", "attention_mask", "token_type_ids"} & kwargs.keys()
        moved = {name: kwargs[name].gather(1, order) for name in sorted(padded)}
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


# --- the user's rows ----------------------------------------------------------------------------


def check_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    max_length: int,
) -> None:
    """Raises RowError unless the model can read each of these rows: all tokens are in its embedding, one at
    least is known, and the longest row is not too long. Where a model reads a class at the end token (BART,
    T5), all rows must have the same number of them."""
    examples = dict(zip(encoded.rows, encoded.examples, strict=True))
    if not examples:
        return
    known = vocabulary(model)
    for row, example in examples.items():
        if known is not None and max(example.input_ids) >= known:
            token = max(example.input_ids)
            raise RowError(
                row,
                f"it has the token {tokenizer.convert_ids_to_tokens(token)!r}, whose id is {token}, but the "
                f"model's embedding has {known} rows, counted from 0; use the tokenizer that belongs to the "
                "model, or enlarge the embedding",
            )
    special = set(tokenizer.all_special_ids)
    if all(special.issuperset(example.input_ids) for example in examples.values()):
        raise RowError(
            [],
            "no token of any row is known to the model's tokenizer: all are special ones, such as "
            f"{tokenizer.unk_token!r}; use the tokenizer that belongs to the model, and a model for "
            "this text",
        )
    longest = max(examples, key=lambda row: len(examples[row].input_ids))
    refuse_unreadable(model, examples[longest], longest, max_length)
    end: Any = tokenizer.eos_token_id
    ends = {row: example.input_ids.count(end) for row, example in examples.items()}
    ((usual, _),) = Counter(ends.values()).most_common(1)
    odd = next((row for row in ends if ends[row] != usual), None)
    if odd is not None:
        like = next(row for row in ends if ends[row] == usual)
        if error := unreadable(model, [examples[like], examples[odd]], padding_id(tokenizer)):
            raise RowError(
                odd,
                f"it has the end token {tokenizer.eos_token!r} {ends[odd]} times, and most rows have it "
                f"{usual} times, which a {type(model).__name__} cannot read together "
                f"({in_one_line(error)}); remove the token from the text",
            ) from error


@torch.no_grad()
def check_first(model: PreTrainedModel, objective: Objective, encoded: Encoded) -> None:
    """Raises RowError unless the model can read the first of these rows and computes a loss."""
    if not encoded.examples:
        return
    batch = send_to_device(objective.batch(encoded.examples[:1]), model.device)
    try:
        with InRange():
            objective.loss(model, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the library raises nearly everything here
        raise RowError(
            encoded.rows[0], f"a {type(model).__name__} cannot read it: {in_one_line(error)}"
        ) from error


def refuse_unreadable(model: PreTrainedModel, example: Example, row: int, max_length: int) -> None:
    """Raises RowError if the model cannot read a row, with the longest that it can read, if there is one."""
    error = unreadable(model, [example])
    if error is None:
        return
    length = len(example.input_ids)
    low, high = 0, length  # read, and not read
    while high - low > 1:
        middle = (low + high) // 2
        fails = unreadable(model, [cut(example, middle)])
        low, high = (low, middle) if fails else (middle, high)
    what = f"it has {length} tokens"
    if low == 0:
        raise RowError(
            row, f"{what}, which a {type(model).__name__} cannot read: {in_one_line(error)}"
        ) from error
    raise RowError(
        row,
        f"{what}, but a {type(model).__name__} reads at most {low}, the number of its positions; set "
        f"task.max_length, now {max_length}, to at most {low}",
    ) from error


def cut(example: Example, length: int) -> Example:
    """A row without its middle: special tokens at its ends stay."""
    ids, labels, kinds = example
    if isinstance(labels, list):
        labels = [*labels[: length - 1], labels[-1]]
    kinds = kinds and [*kinds[: length - 1], kinds[-1]]
    return Example([*ids[: length - 1], ids[-1]], labels, kinds)


@torch.no_grad()
def unreadable(
    model: PreTrainedModel, examples: Sequence[Example], pad_id: int = 0
) -> Exception | None:
    """What the model raises when it reads a batch and computes the loss; None if it can."""
    batch = {name: t.to(model.device) for name, t in collate(examples, pad_id).items()}
    try:
        with InRange():
            model(**batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the library raises nearly everything here
        return error
    return None


class InRange(TorchDispatchMode):
    """Inside the block, a look-up beyond the end of a table raises an IndexError on every device. A GPU would
    find it too late, and be of no use afterwards."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.embedding.default:
            within(args[1], len(args[0]))
        elif func is aten.gather.default:
            within(args[2], args[0].shape[args[1]])
        elif func is aten.index.Tensor:
            for size, index in zip(args[0].shape, args[1], strict=False):
                if index is not None and index.dtype == torch.int64:
                    within(index, size)
        return func(*args, **(kwargs or {}))


def within(index: Tensor, size: int) -> None:
    if index.numel() and int(index.max()) >= size:
        raise IndexError(f"index {int(index.max())} is beyond a table of {size}")


# --- short forward passes -----------------------------------------------------------------------


def sample_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str
) -> tuple[Example, Example]:
    """Two rows of ordinary tokens, 4 and 8, between those that the tokenizer puts around a text, with an
    end token."""
    limit, special = vocabulary(model), set(tokenizer.all_special_ids)
    ordinary = sorted(
        id
        for id in tokenizer.get_vocab().values()
        if id not in special and (limit is None or id < limit)
    )
    if not ordinary:
        raise UserError(
            f"model {source!r}: its embedding has {limit} rows, and no token of its tokenizer is among them; "
            "put the tokenizer that belongs to the model beside its weights"
        )
    words = [ordinary[k * len(ordinary) // 12] for k in range(12)]
    around: Any = tokenizer("")["input_ids"]
    if tokenizer.eos_token_id not in (None, *around):
        around = [*around, tokenizer.eos_token_id]  # where BART and T5 read a class
    short, long = ([*around[:-1], *part, *around[-1:]] for part in (words[:4], words[4:]))
    return Example(short, 0), Example(long, 0)


def sample_logits(model: PreTrainedModel, processor: Any, source: str) -> Callable[[], Tensor]:
    """A forward pass over two short texts, or, with an image processor, over a small image of noise."""
    if hasattr(processor, "get_vocab"):
        rows, pad_id = sample_rows(model, processor, source), padding_id(processor)
        return lambda: logits(model, rows, pad_id, source)
    channels = getattr(model.config, "num_channels", 3)
    noise = torch.randint(256, (32, 32, channels), generator=generator(0, "image"))
    image = noise.to(torch.uint8).numpy()
    found = processor(image, input_data_format="channels_last", return_tensors="pt")
    pixels = found["pixel_values"].to(model.device)
    return torch.no_grad()(lambda: model(pixel_values=pixels).logits)


@torch.no_grad()
def logits(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, source: str) -> Tensor:
    """The logits of a batch. Raises UserError if the model cannot read it."""
    batch = collate(examples, pad_id)
    del batch["labels"]
    try:
        with InRange():
            return model(**{name: t.to(model.device) for name, t in batch.items()}).logits
    except Exception as error:  # the library raises nearly everything here
        raise UserError(
            f"model {source!r}: a {type(model).__name__} cannot read rows of "
            f"{' and '.join(str(len(row.input_ids)) for row in examples)} tokens: {in_one_line(error)}"
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
