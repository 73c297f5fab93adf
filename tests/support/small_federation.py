"""A federation in one process around a small model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fedhl import get_method, get_weighting
from fedhl.config import Config
from fedhl.federation.federation import Federation
from fedhl.model import peft
from fedhl.server import Client, ServerState
from fedhl.task.texts import Texts
from support.small_models import HEADS, TARGETS, build, rows

RANKS = {"ada": 2, "bob": 4, "cyd": 2, "dan": 3}
kinds = pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])


def federate(
    kind: str,
    ranks: Mapping[str, int] = RANKS,
    method: Any = "fedhl",
    weighting: Any = None,
    held_out: int = 9,
    own: int = 0,
    dropout: float = 0.1,
    device: str = "cpu",
    **settings: Any,
) -> Federation:
    """A federation around a tiny model, with dropout in the base and in the adapters."""
    classify = kind == "bert"
    base: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": "none"},
        "task": {"kind": "sequence-classification" if classify else "causal-lm"},
        "data": {"source": "none"},
        "partition": {"kind": "iid", "clients": len(ranks)},
        "lora": {"alpha": 8, "rslora": True, "dropout": dropout} | settings.pop("lora", {}),
        "rounds": 4,
        "training": {"steps": 3, "batch_size": 4, "learning_rate": 0.02, "schedule": "cosine"}
        | settings.pop("training", {}),
        "evaluation": {"batch_size": 5},
    }
    config = Config.model_validate(base | settings)
    slots = peft.attach(
        build(kind, dropout).to(device),  # pyright: ignore[reportArgumentType]
        {rank: config.lora.alpha_of(rank) for rank in sorted(set(ranks.values()))},
        TARGETS[kind],
        rslora=config.lora.rslora,
        dropout=config.lora.dropout,
        head=HEADS[kind],
    )
    data = {name: rows(kind, 5 + 3 * k, seed=k) for k, name in enumerate(sorted(ranks))}
    return Federation(
        config=config,
        method=get_method(method) if isinstance(method, str) else method,
        weighting=weighting or get_weighting("truncation", power=1, epsilon=0.1),
        clients=[Client(n, r, peft.scale(slots, r), len(data[n])) for n, r in ranks.items()],
        rows=data,
        own={n: rows(kind, own, seed=50 + k) for k, n in enumerate(sorted(ranks))} if own else {},
        held_out=rows(kind, held_out, seed=99),
        slots=slots,
        objective=Texts(type(config.task), pad_id=0),
        device=torch.device(device),
    )


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a state, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for k in value for t in tensors(value[k])]
    fields = getattr(value, "__dataclass_fields__", {})
    return [t for name in fields for t in tensors(getattr(value, name))]


def same(a: ServerState, b: ServerState) -> bool:
    """To the bit."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return a.round == b.round and all(torch.equal(x, y) for x, y in pairs)


BASE = {
    "name": "tiny",
    "model": {"source": "none"},
    "task": {"kind": "causal-lm"},
    "data": {"source": "none"},
    "partition": {"kind": "iid", "clients": 4},
}
