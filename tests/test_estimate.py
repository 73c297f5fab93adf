"""The time that `fedhl check` expects, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.small_federation import federate
from torch import Tensor

from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.federation.personal import personal_models
from fedhl.model import peft
from fedhl.run.estimate import rows_evaluated, seconds_per_row, seconds_per_step
from fedhl.run.rounds import finish, untrained


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedhl_ef", {"rounds": 3}),
        ("fedhl", {"rounds": 5, "evaluation": {"every": 2, "batch_size": 4}}),
        ("fedsa_lora", {"rounds": 2, "ranks": dict.fromkeys(["ada", "bob", "cyd"], 2)}),
        ("fedhl", {"rounds": 1, "personal": {"steps": 1}, "evaluation": {"client_fraction": 0.2}}),
    ],
)
def test_the_rows_are_those_that_a_run_evaluates(method: str, settings: dict[str, Any]):
    federation = federate("bert", method=method, own=3, **settings)
    federation = replace(federation, validation=federation.held_out[:4])
    federation = replace(
        federation, config=federation.config.model_copy(update={"method": of(method)})
    )
    seen = 0

    def count(model: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        nonlocal seen
        seen += 0 if model.training else len(kwargs["input_ids"])

    federation.slots.model.register_forward_pre_hook(count, with_kwargs=True)
    done = untrained(federation, initial_state(federation))
    for _ in range(federation.config.rounds):
        state, outcome = run_round(federation, done.state)
        done = finish(federation, state, done.state, outcome, [], done.best)
    if federation.config.personal is not None:
        assert len([*personal_models(federation, done.state)]) == 4
    assert seen == rows_evaluated(federation)


def of(method: str) -> Any:
    from fedhl.config.named import MethodConfig

    return MethodConfig(name=method).completed()


def test_what_is_tried_changes_nothing_that_a_run_begins_with():
    federation = federate("bert", own=2)
    head, state = peft.read_head(federation.slots), torch.random.get_rng_state()
    first = initial_state(federation)
    assert seconds_per_step(federation) > 0 and seconds_per_row(federation) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    # at a rate of 0 nothing moves; and a round starts from what it is sent
    assert all(torch.equal(x, head[name]) for name, x in peft.read_head(federation.slots).items())
    after, _ = run_round(federation, first)
    fresh = federate("bert", own=2)
    again, _ = run_round(fresh, initial_state(fresh))
    assert all(torch.equal(after.head[name], x) for name, x in again.head.items())


def test_without_rows_to_evaluate_there_is_no_time_of_evaluation():
    assert seconds_per_row(federate("bert", held_out=0)) == 0.0
