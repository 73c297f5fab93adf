"""Every method of the library is put through the contract, `support.contract`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.contract import (
    CHECKS,
    UNIVERSAL,
    adapter,
    change,
    check_law,
    check_round_trip,
    check_start,
    scenarios,
    tolerance,
)
from support.reference.starts import OWN
from support.reference.starts import STARTS as REFERENCES

from fedhl import LAWS, METHODS, Method
from fedhl.method import STARTS, flatten, unflatten

everyone = pytest.mark.parametrize("name", METHODS)


# ---------------------------------------------------------------------------------------------
# The laws that a method claims or not.
# ---------------------------------------------------------------------------------------------


def test_every_law_has_a_check():
    assert set(CHECKS) == set(LAWS)


@everyone
def test_claims_only_known_laws(name: str):
    assert METHODS[name].laws <= set(LAWS)


@everyone
@pytest.mark.parametrize("law", LAWS)
def test_law(name: str, law: str):
    check_law(METHODS[name](), law)


def test_flexlora_has_the_exact_mean_from_the_start():
    """Its delta is the dense mean, untruncated: at W = 0 nothing has been cut yet."""
    method = METHODS["flexlora"]()
    for s in scenarios(method, rounds=[0]):
        if s.start.B.any():
            continue
        mean = sum(u.weight * u.lora.delta() for u in s.updates)
        after = change(method, s.after)
        assert float((after - mean).norm()) <= tolerance(s, after)


# ---------------------------------------------------------------------------------------------
# The universal laws.
# ---------------------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("check", UNIVERSAL, ids=lambda check: check.__name__)
def test_universal(name: str, check: Callable[[Method[Any]], None]):
    check(METHODS[name]())


# ---------------------------------------------------------------------------------------------
# What a client starts from.
# ---------------------------------------------------------------------------------------------


def test_every_start_has_a_reference():
    assert {*REFERENCES, "other"} == set(STARTS)
    assert {name for name in METHODS if METHODS[name].starts == "other"} == set(OWN)


@everyone
def test_start(name: str):
    check_start(METHODS[name](), OWN.get(name))


# ---------------------------------------------------------------------------------------------
# What a checkpoint and a table need.
# ---------------------------------------------------------------------------------------------


@everyone
def test_state_round_trips_through_safetensors(name: str, tmp_path: Path):
    check_round_trip(METHODS[name](), tmp_path)


@everyone
def test_is_a_frozen_dataclass_with_defaults(name: str):
    method = METHODS[name]()
    assert method == METHODS[name]() and hash(method) == hash(METHODS[name]())
    assert "Limitation:" in (METHODS[name].__doc__ or "")


# ---------------------------------------------------------------------------------------------
# States as tensors.
# ---------------------------------------------------------------------------------------------


def test_a_state_that_no_checkpoint_can_hold_is_refused():
    with pytest.raises(TypeError, match="not str"):
        flatten("text")


def test_a_missing_tensor_is_an_error():
    method = METHODS["fedhl"]()
    state = method.init(adapter(7, 5, 3, 0, trained=True))
    tensors = flatten(state)
    del tensors["sent.A"]
    with pytest.raises(KeyError, match="A"):
        unflatten(state, tensors)


def test_numbers_survive_the_round_trip():
    @dataclass(frozen=True)
    class Numbers:
        seed: int
        scale: float
        flag: bool

    numbers = Numbers(seed=2**63 - 1, scale=0.1, flag=True)
    back = unflatten(Numbers(0, 0.0, False), flatten(numbers))
    assert back == numbers and type(back.flag) is bool and type(back.seed) is int
