"""What makes model inputs of a row: a tokenizer of texts, an image processor of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedhl.errors import UserError
from fedhl.files import sha256_of
from fedhl.model.library import cannot_load, quiet
from fedhl.model.weights import find_weights
from fedhl.names import listed
from fedhl.task import kind_named
from fedhl.task.kind import Kind

SETTINGS: dict[str, dict[str, Any]] = {
    "AutoTokenizer": {},
    # torchvision would round the numbers of a smaller image in another way, and not every machine has it
    "AutoImageProcessor": {"use_fast": False},
}
"""The classes that load a processor, and how they are told to."""


def load_processor(source: str, task: str, revision: str | None = None) -> Any:
    """The tokenizer or image processor alone of a model. Raises UserError as `load_model` does."""
    return read_processor(kind_named(task), find_weights(source)[0], source, revision)


def read_processor(kind: type[Kind], folder: str, source: str, revision: str | None) -> Any:
    """The tokenizer or image processor of a model, as this kind of task needs one. Raises UserError if it
    cannot be read, and for a tokenizer without words."""
    import transformers

    kwargs = {} if revision is None or Path(folder).exists() else {"revision": revision}
    texts = kind.processor == "AutoTokenizer"
    with quiet():
        try:
            loader = getattr(transformers, kind.processor)
            processor = loader.from_pretrained(folder, **kwargs, **SETTINGS[kind.processor])
        except Exception as error:  # the library raises nearly everything here
            what = "tokenizer" if texts else "image processor"
            raise UserError(cannot_load(what, source, error)) from error
    if texts:
        refuse_empty(processor, source)
    return processor


def refuse_empty(tokenizer: Any, source: str) -> None:
    """Raises UserError for a tokenizer without any of its files: it consists of special tokens and blanks."""
    special = set(tokenizer.all_special_tokens)
    if not any(token.strip("▁ ") for token in tokenizer.get_vocab() if token not in special):
        raise UserError(
            f"model {source!r}: the tokenizer is missing, or empty: it knows no word, only special "
            f"tokens ({listed(tokenizer.all_special_tokens, 5)}); put its files (tokenizer.json, or what the "
            "model was published with) beside the weights"
        )


def processor_hash(processor: Any) -> str:
    """The sha256 of everything that decides what becomes of a row: of a tokenizer its vocabulary, special
    tokens, chat template, and the rules of a fast one; of an image processor its settings."""
    if not hasattr(processor, "get_vocab"):
        return sha256_of(json.dumps(json.loads(processor.to_json_string()), sort_keys=True))
    backend = getattr(processor, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    rules = {key: rules[key] for key in rules if key not in ("truncation", "padding")}  # set by use
    special = {name: str(token) for name, token in processor.special_tokens_map.items()}
    known = [processor.get_vocab(), special, str(processor.chat_template), rules]
    return sha256_of(json.dumps(known, sort_keys=True))
