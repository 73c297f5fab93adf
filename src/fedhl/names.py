"""Names that people choose from, what a name stands for, and figures as people read them."""

from __future__ import annotations

import unicodedata
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any

ALIKE = 0.5
"""The similarity, between 0 and 1, from which one name is taken for a slip of another."""


CALLED = {
    **{"lr": "learning_rate", "bs": "batch_size", "batch": "batch_size", "optim": "optimizer"},
    **{"num_train_epochs": "epochs", "num_epochs": "epochs", "local_epochs": "epochs"},
    **{"local_steps": "steps", "max_steps": "steps", "lr_scheduler_type": "schedule"},
    **{"lr_scheduler": "schedule", "scheduler": "schedule", "wd": "weight_decay"},
    **{"gradient_accumulation_steps": "accumulation", "grad_clip": "max_grad_norm"},
    **{"num_rounds": "rounds", "n_rounds": "rounds", "num_clients": "clients"},
    **{"n_clients": "clients", "r": "ranks", "rank": "ranks", "lora_r": "ranks"},
    **{"lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"},
    **{"use_rslora": "rslora", "load_in_4bit": "four_bit", "random_seed": "seed"},
    **{"max_len": "max_length", "max_seq_len": "max_length", "max_seq_length": "max_length"},
    **{"model_name_or_path": "source", "model_name": "source", "path": "source", "file": "source"},
    **{"torch_dtype": "dtype", "workers": "threads", "fp16": "precision", "bf16": "precision"},
    **{"fedavg": "fedit", "avg": "fedit", "fedavg_lora": "fedit", "fed_it": "fedit"},
}
"""What other tools and papers say, and what the same is called here. FedAvg of LoRA's factors is FedIT."""


def plain(name: str) -> str:
    return name.lower().replace("-", "_")


def called(name: str) -> str:
    """What a name is called here."""
    return CALLED.get(plain(name), plain(name))


def one_line(name: str) -> bool:
    """Whether a name from data can be printed and written: without control characters, line breaks and
    halves of a surrogate pair."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that are most like `name`, the nearest first; upper and lower case are alike, and so
    are `-` and `_`. What `CALLED` knows comes before all."""

    by_plain = {plain(other): other for other in known}
    if called(name) in by_plain:
        return [by_plain[called(name)]]
    found = get_close_matches(plain(name), list(by_plain), n=count, cutoff=ALIKE)
    return [by_plain[text] for text in found]


def meant(name: str, known: Iterable[str], count: int = 1) -> str:
    """` (did you mean 'x'?)`, to be put behind a name; "" if no known name is near."""
    close = nearest(name, known, count)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def listed(values: Iterable[object], most: int = 10) -> str:
    """`a, b, c`; of more than `most` values the first, and the number of the others."""
    texts = [str(value) for value in values]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`unknown KIND 'nmae'; did you mean 'name'? (known: name, other)`."""
    known = list(known)
    hint = "".join(f"; did you mean {near!r}?" for near in nearest(name, known))
    return f"unknown {kind} {name!r}{hint} (known: {listed(known)})"


# --- what a name stands for ---------------------------------------------------------------------


def imported(path: str) -> Any:
    """What `package.module:Name` names. Raises ImportError or AttributeError if it is not there."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


class Table(UserDict[str, Any]):
    """A dict of classes, each given as `package.module:Class` and imported when it is first asked for.
    Iteration, `in` and `len` import nothing: a name can be refused before torch is there."""

    def __getitem__(self, name: str) -> Any:
        if isinstance(self.data[name], str):
            self.data[name] = imported(self.data[name])
        return self.data[name]


def build(
    kind: str, table: Mapping[str, type[Any]], name: str, hyperparameters: Mapping[str, Any]
) -> Any:
    """`table[name](**hyperparameters)`. Raises ValueError for an unknown name, suggesting the nearest, and
    for a hyperparameter that the class does not have."""
    if name not in table:
        raise ValueError(unknown(kind, name, table))
    return construct(kind, name, table[name], hyperparameters)


def construct(kind: str, name: str, cls: type[Any], hyperparameters: Mapping[str, Any]) -> Any:
    """`cls(**hyperparameters)`, a dataclass. Raises ValueError for a hyperparameter that the class does not
    have, and for a value that it does not take."""
    known = [field.name for field in fields(cls)]
    surplus = sorted(set(hyperparameters) - set(known))
    if surplus:
        raise ValueError(
            f"{kind} {name!r} has no hyperparameter {surplus[0]!r}; "
            + (f"it has: {', '.join(known)}" if known else "it has none")
        )
    try:
        return cls(**hyperparameters)
    except TypeError as error:  # a value of the wrong type, or one that is missing
        given = ", ".join(f"{key}={value!r}" for key, value in hyperparameters.items()) or "nothing"
        raise ValueError(f"{kind} {name!r} cannot be made from {given}: {error}") from error


# --- figures ------------------------------------------------------------------------------------


def size(value: float) -> str:
    """Bytes in decimal units, to three digits: `163 kB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def plural(count: int, noun: str) -> str:
    """`1 update`, `12 updates`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
