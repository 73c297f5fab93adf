"""A federation whose labels arrive over time, in two tasks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedhl import get_method, get_weighting
from fedhl.config import Config
from fedhl.federation.engine import run_round
from fedhl.federation.federation import Federation, initial_state
from fedhl.model import peft
from fedhl.seeds import generator
from fedhl.server import Client, ServerState
from fedhl.task.examples import Example
from fedhl.task.texts import Texts
from support.small_models import LONGEST, SIZE, TARGETS, VOCABULARY

TASKS = [[1, 4], [0, 2, 3]]
OF = {"ada": [0, 1, 2, 3, 4], "bob": [1, 4], "cyd": [0, 1, 2, 3, 4], "dan": [0, 2, 3]}
"""The labels of each client: bob has none of the second task, dan none of the first."""


def build(kind: str) -> PreTrainedModel:
    """Five labels. The hidden layer of RoBERTa's head has as many rows as there are labels."""
    size: dict[str, Any] = {
        **(SIZE | {"max_position_embeddings": LONGEST + 4}),
        **{"num_labels": 5, "num_hidden_layers": 1, "intermediate_size": 12, "pad_token_id": 0},
        **{"initializer_range": 0.2, "hidden_dropout_prob": 0.0},
        **{"attention_probs_dropout_prob": 0.0},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            return BertForSequenceClassification(
                BertConfig(**size, hidden_size=16, num_attention_heads=2)
            )
        return RobertaForSequenceClassification(
            RobertaConfig(**size, hidden_size=5, num_attention_heads=1)
        )


def examples(count: int, seed: int, labels: list[int]) -> list[Example]:
    draw, made = generator(seed, "rows"), []
    for k in range(count):
        ids = torch.randint(1, VOCABULARY, (3 + k % 5,), generator=draw).tolist()
        made.append(Example(ids, labels[k % len(labels)]))
    return made


def federate(
    method: Any = "fedit", kind: str = "bert", rank: int = 2, **settings: Any
) -> Federation:
    """In double precision: what is read from the model is correctly rounded."""
    model = build(kind).eval()
    head = [n for n, _ in model.named_parameters() if n.startswith("classifier")]
    base: dict[str, Any] = {
        "name": "tasks",
        "model": {"source": "none"},
        "task": {"kind": "sequence-classification"},
        "data": {"source": "none"},
        "partition": {"kind": "iid", "clients": len(OF)},
        "rounds": 4,
        "tasks": {"count": len(TASKS)},
        "training": {"steps": 3, "batch_size": 4, "learning_rate": 0.02, "schedule": "linear"},
    }
    config = Config.model_validate(base | settings)
    slots = peft.attach(model, {rank: 2 * rank}, TARGETS["bert"], head=head)
    slots.model.double()
    data = {name: examples(14 + 3 * k, k, of) for k, (name, of) in enumerate(OF.items())}
    return Federation(
        config=config,
        method=get_method(method) if isinstance(method, str) else method,
        weighting=get_weighting("examples"),
        clients=[Client(n, rank, peft.scale(slots, rank), len(rows)) for n, rows in data.items()],
        rows=data,
        own={},
        held_out=examples(40, 99, OF["ada"]),
        slots=slots,
        objective=Texts(type(config.task), pad_id=0),
        device=torch.device("cpu"),
        tasks=TASKS,
    )


def play(federation: Federation, rounds: int) -> list[tuple[ServerState, Any]]:
    state = initial_state(federation)
    history: list[tuple[ServerState, Any]] = [(state, None)]
    for _ in range(rounds):
        state, outcome = run_round(federation, state)
        assert not outcome.refused
        history.append((state, outcome))
    return history
