"""Tensors stay on the device that they came on, and what is computed there is what the CPU computes.

The device is one with CUDA's rules (see `elsewhere`), and CUDA itself where there is one, on which these
tests have never run; each in a process of its own. Adapters are compared by their products: the signs of
singular vectors are a matter of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, is_dataclass, replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from support import elsewhere, small_server
from support.cohorts import answers
from support.small_federation import RANKS, federate
from support.small_server import HEAD, SEED, TOP, draw, reply
from torch import Tensor

from fedhl import METHODS, WEIGHTINGS, Method, dense, get_method, get_weighting, server
from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.federation.local import evaluate_rows as metrics
from fedhl.federation.predictions import predictions
from fedhl.federation.scores import changed, evaluate_round, full_update
from fedhl.lora import LoRA, initial
from fedhl.model import peft
from fedhl.server import Outcome, Rules, ServerState
from fedhl.server.channel import AirComp
from fedhl.server.privacy import SECRET_BYTES, Mechanism, why_not
from fedhl.server.robust import Guard, Median

DEVICES = [elsewhere.NAME] if elsewhere.SETUP is not None else []
DEVICES += ["cuda"] if torch.cuda.is_available() else []
# each operation there costs much more than its arithmetic: a layer that is tall and one that is wide, the
# top rank and two below
SHAPES = dict(list(small_server.SHAPES.items())[:2])
CLIENTS, OF_RANK_4 = small_server.CLIENTS[:3], small_server.OF_RANK_4[:3]
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
There = Callable[..., None]


@pytest.fixture(scope="module", params=DEVICES)
def there(request: pytest.FixtureRequest) -> Iterator[There]:
    """`there(f, ...)` is `f(device, ...)` in the process that has the device."""
    start = elsewhere.register if request.param == elsewhere.NAME else None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start) as process:
        yield lambda f, *args: process.submit(f, request.param, *args).result()


def moved(value: Any, device: str) -> Any:
    """The same with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        kept = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **kept)
    if isinstance(value, Mapping):
        return {key: moved(x, device) for key, x in value.items()}
    return [moved(x, device) for x in value] if isinstance(value, list) else value


def clients_of(method: Method[Any]) -> list[server.Client]:
    """Clients of several ranks, or of the top rank where the method needs one for all."""
    alike = [replace(client, rank=TOP, scale=2.0) for client in CLIENTS]
    return CLIENTS if method.mixed_ranks else alike


def found(state: Any, name: str = "") -> dict[str, Tensor]:
    """The matrices of a state by name, its adapters as products."""
    if isinstance(state, LoRA):
        return {name: state.delta()}
    if isinstance(state, Tensor):
        return {name: state}
    if not is_dataclass(state):
        return {}
    parts = (found(getattr(state, f.name), f"{name}.{f.name}") for f in fields(state))
    return {key: x for part in parts for key, x in part.items()}


def assert_close(there: Any, here: Any, device: str, tolerance: float) -> None:
    """Relative to the longest of the tensors: some are what others leave."""
    expected, got = found(here), found(there)
    longest = max(float(x.double().norm()) for x in expected.values())
    for name, x in expected.items():
        assert got[name].device.type == device, name
        off = float((x.double() - got[name].cpu().double()).norm())
        assert off <= tolerance * longest, f"{name}: {off / longest}"


# --- the device ---------------------------------------------------------------------------------


def test_it_refuses_what_an_accelerator_refuses(there: There) -> None:
    there(refuses)


def refuses(device: str) -> None:
    x, i = torch.arange(6.0).view(2, 3), torch.tensor([1, 0])
    y = x.to(device)
    for mixture in (
        lambda: x + y,
        lambda: y @ x.T,
        lambda: torch.cat([x, y]),
        lambda: y.addmm_(x[:, :2], y),
        lambda: y.lerp(x, 0.5),
        lambda: x[i.to(device)],  # the other way round is allowed
        lambda: torch.randn(2, device=device, generator=torch.Generator()),
        lambda: y.normal_(generator=torch.Generator()),
        lambda: y.numpy(),
        lambda: torch.stack([y.sum(), x.sum()]),
        lambda: x.sum().add_(y.sum()),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mixture()
    assert torch.equal((2 * y + torch.tensor(1.0))[i].cpu(), 2 * x[i] + 1)
    y[:, 1:] = x[:, :2]
    assert y.cpu().tolist() == [[0, 0, 1], [3, 3, 4]] and float(y.sum()) == 11


# --- the mathematics ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5, 3), (560, 530, 8)])  # a full SVD; subspace iteration
@pytest.mark.parametrize("name", METHODS)
def test_every_method(there: There, name: str, shape: tuple[int, int, int]) -> None:
    there(two_rounds, name, *shape)


def two_rounds(device: str, name: str, m: int, n: int, top: int) -> None:
    """Two rounds, each from one state there and here: the same broadcasts, all there, and the same states."""
    method: Method[Any] = get_method(name)
    ranks, scales, p = [top] * 3, [1.5] * 3, [0.5, 0.3, 0.2]
    if method.mixed_ranks:
        ranks, scales, p = [1, top, 2, 1], [2.0, 0.5, 3.0, 0.7], [0.4, 0.3, 0.2, 0.1]
    start = LoRA(initial(m, n, top, 1.5, seed=0).A.double(), draw(0, m, top).double(), 1.5)
    here = method.init(start, seed=0)
    # a part of W is known to its rounding over the gaps between singular values: some 1e4 here
    tolerance = 1e5 * EPS64
    assert_close(method.init(moved(start, device), seed=0), here, device, tolerance)
    state = None
    for round in range(2):
        state = moved(here, device)
        updates = answers(method, here, ranks, scales, p, seed=round)
        for key, update in enumerate(updates, round):  # the keys of `answers`
            sent = method.broadcast(state, update.lora.rank, update.lora.scale, key=key)
            assert sent.lora.A.device.type == sent.lora.B.device.type == device
            assert_close(sent.lora, update.sent.lora, device, tolerance)
        state = method.aggregate(state, moved(updates, device))
        here = method.aggregate(here, updates)
        assert_close(state, here, device, tolerance)
    delta = method.delta(state)
    assert delta is None or dense(delta).device.type == device


# --- the server ---------------------------------------------------------------------------------


def of_both(
    method: Method[Any],
    device: str,
    clients: list[server.Client],
    play: Callable[[ServerState, list[server.Reply]], tuple[ServerState, Outcome]],
) -> None:
    """Two rounds, each from one state there and here: the same states and the same figures."""
    adapter = {n: initial(*shape, TOP, 2.0, seed=0) for n, shape in SHAPES.items()}
    head = {name: draw(9, *shape) for name, shape in HEAD.items()}
    here = server.init(method, adapter, head, SEED)
    for _ in range(2):
        replies = [reply(here, client, method) for client in clients]
        state, got = play(moved(here, device), moved(replies, device))
        here, expected = play(here, replies)
        assert {x.device.type for x in state.head.values()} == {device}
        for name, x in here.head.items():
            assert torch.allclose(state.head[name].cpu(), x, rtol=10 * EPS32, atol=10 * EPS32)
        for name, layer in here.layers.items():
            assert_close(state.layers[name], layer, device, 1e4 * EPS32)
        # of exact methods some are nothing but rounding
        assert got.diagnostics == pytest.approx(expected.diagnostics, rel=1e-3, abs=1e-4)
        for a, b in zip(got.clients, expected.clients, strict=True):
            numbers = {key for key, value in b.items() if isinstance(value, float)}
            assert {key: a[key] for key in numbers} == pytest.approx(
                {k: b[k] for k in numbers}, rel=1e-3
            )
            assert {k: a[k] for k in a.keys() - numbers} == {k: b[k] for k in b.keys() - numbers}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting(there: There, name: str) -> None:
    there(a_weighting, name)


def a_weighting(device: str, name: str) -> None:
    method, weighting = get_method("fedhl"), get_weighting(name)
    guard = Guard(clip=2.0, reject=Median(4.0))

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Outcome]:
        return server.aggregate(method, weighting, state, replies, SEED, Rules(guard=guard))

    of_both(method, device, CLIENTS, play)


@pytest.mark.parametrize("name", METHODS)
def test_over_the_air(there: There, name: str) -> None:
    there(over_the_air, name)


def over_the_air(device: str, name: str) -> None:
    method, weighting = get_method(name), get_weighting("examples")

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Outcome]:
        channel = AirComp(snr_db=20)
        return server.aggregate(method, weighting, state, replies, SEED, Rules(channel=channel))

    of_both(method, device, clients_of(method), play)


@pytest.mark.parametrize("name", METHODS)
def test_in_small_numbers_from_those_in_time(there: There, name: str) -> None:
    there(in_small_numbers, name)


def in_small_numbers(device: str, name: str) -> None:
    """Factors of 8 bits; and where clients may return fewer layers, the correction for who is late."""
    method, weighting = get_method(name), get_weighting("examples")
    silence = dict.fromkeys(SHAPES, 0.1) if method.mixed_ranks else None

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Outcome]:
        return server.aggregate(method, weighting, state, replies, SEED, Rules(silence=silence))

    of_both(method, device, [replace(c, payload="int8") for c in clients_of(method)], play)


@pytest.mark.parametrize("name", [name for name in METHODS if why_not(get_method(name)) is None])
def test_with_privacy(there: There, name: str) -> None:
    there(a_noisy_sum, name)


def a_noisy_sum(device: str, name: str) -> None:
    method = get_method(name)
    mechanism = Mechanism(clip=0.5, noise=1.0, rate=0.5, clients=8, secret=bytes(SECRET_BYTES))

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Outcome]:
        return server.release(mechanism, method, state, replies, SEED)

    of_both(method, device, OF_RANK_4, play)


# --- the clients --------------------------------------------------------------------------------

WAYS = [
    ("bert", "fedhl"),
    ("bert", "fedex_lora"),  # sends a change of the base
    ("bert", "fedsa_lora"),  # clients keep a factor
    ("bert", "sd_lora"),  # sends frozen directions
    ("bert", "hetlora"),  # a term is added to the loss
    ("llama", "fedhl"),
    ("gpt2", "flora"),  # weights that are transposed, and a change of them
]


@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_a_federation_whose_model_is_there(there: There, kind: str, name: str) -> None:
    there(a_federation, kind, name)


def a_federation(device: str, kind: str, name: str) -> None:
    ranks = {client: RANKS[client] for client in ("ada", "bob")}
    ranks = ranks if get_method(name).mixed_ranks else dict.fromkeys(ranks, 3)
    ends, figures = [], []
    for place in ("cpu", device):
        federation = federate(
            kind, ranks, name, own=3, dropout=0.0, device=place, training={"steps": 2}
        )
        state = initial_state(federation)
        for _ in range(2):
            state, outcome = run_round(federation, state)
            assert not outcome.refused
        ends.append(state)
        evaluated = evaluate_round(federation, state, every_rank=True)
        losses = [evaluated[key]["loss"] for key in ("full", "truncated") if evaluated[key]]
        losses.append(evaluated["clients"]["mean"]["loss"])
        with changed(federation, state, full_update(federation, state)):
            rows = predictions(federation, federation.held_out)
            losses += [float(row.terms["loss"].mean()) for row in rows]
        if kind == "bert":
            with peft.only_labels(federation.slots, [0, 1]):
                rows = [example for example in federation.held_out if example.labels != 2]
                losses.append(metrics(federation, rows)["loss"])
        figures.append(losses)
        model = federation.slots.model
        assert {p.device.type for p in model.parameters()} == {place}
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    for name, layer in ends[0].layers.items():  # the server is on the CPU, wherever the model is
        # AdamW divides by the root of the squared gradient, which magnifies the rounding of small ones
        assert_close(ends[1].layers[name], layer, "cpu", 1e4 * EPS32)
