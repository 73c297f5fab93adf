"""Tensors stay on the device that they came on, and what is computed there is what the CPU computes.

The device is CUDA where there is one, and in any case one with its rules (see `elsewhere`); each in a
process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, is_dataclass, replace
from multiprocessing import get_context
from typing import Any

import elsewhere
import pytest
import torch
from cohorts import answers
from test_server import CLIENTS, HEAD, OF_RANK_4, SEED, SHAPES, TOP, draw, reply
from test_simulation import RANKS, federate
from torch import Tensor

from fedhl import METHODS, WEIGHTINGS, Method, dense, get_method, get_weighting, peft, server
from fedhl.channel import AirComp
from fedhl.lora import LoRA, initial
from fedhl.method import flatten
from fedhl.privacy import SECRET_BYTES, Mechanism, why_not
from fedhl.robust import Guard, Median
from fedhl.server import Round, ServerState
from fedhl.simulation import evaluate_round, initial_state, run_round
from fedhl.simulation import measure as metrics

DEVICES = [elsewhere.NAME, *(["cuda"] if torch.cuda.is_available() else [])]
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
OF_RANK_TOP = [replace(client, rank=TOP, scale=2.0) for client in CLIENTS]
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


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float) -> None:
    """Relative to the length of each tensor, or to the longest where it is what others leave."""
    longest = max(float(x.double().norm()) for x in a.values())
    for name, x in a.items():
        off = float((x.double() - b[name].cpu().double()).norm())
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
    """Two rounds there and here: the same states; and what clients are sent is there."""
    method: Method[Any] = get_method(name)
    ranks, scales, p = [top] * 3, [1.5] * 3, [0.5, 0.3, 0.2]
    if method.mixed_ranks:
        ranks, scales, p = [1, top, 2, 1], [2.0, 0.5, 3.0, 0.7], [0.4, 0.3, 0.2, 0.1]
    start = LoRA(initial(m, n, top, 1.5, seed=0).A.double(), draw(0, m, top).double(), 1.5)
    here, state = method.init(start, seed=0), method.init(moved(start, device), seed=0)
    for round in range(2):
        updates = answers(method, state, ranks, scales, p, seed=round)
        for update in updates:
            assert update.sent.lora.A.device.type == update.sent.lora.B.device.type == device
        state = method.aggregate(state, updates)
        here = method.aggregate(here, answers(method, here, ranks, scales, p, seed=round))
    found, expected = flatten(state), flatten(here)
    assert {x.device.type for x in found.values() if x.ndim > 1} == {device}
    # a basis of W is known to its rounding over the gaps between singular values: some 1e4 here
    assert_close(expected, found, 1e5 * EPS64)
    delta = method.delta(state)
    assert delta is None or dense(delta).device.type == device


# --- the server ---------------------------------------------------------------------------------


def of_both(
    method: Method[Any],
    device: str,
    clients: list[server.Client],
    play: Callable[[ServerState, list[server.Reply]], tuple[ServerState, Round]],
) -> None:
    """Two rounds from one state there and here: the same states and the same figures."""
    adapter = {n: initial(*shape, TOP, 2.0, seed=0) for n, shape in SHAPES.items()}
    head = {name: draw(9, *shape) for name, shape in HEAD.items()}
    here = server.init(method, adapter, head, SEED)
    state = moved(here, device)
    for _ in range(2):
        replies = [reply(here, client, method) for client in clients]
        state, found = play(state, moved(replies, device))
        here, expected = play(here, replies)
        assert {x.device.type for x in state.head.values()} == {device}
        # the noise of some methods' diagnostics is their value
        assert found.diagnostics == pytest.approx(expected.diagnostics, rel=1e-3, abs=1e-4)
        for a, b in zip(found.clients, expected.clients, strict=True):
            numbers = {key for key, value in b.items() if isinstance(value, float)}
            assert {key: a[key] for key in numbers} == pytest.approx(
                {k: b[k] for k in numbers}, rel=1e-3
            )
            assert {k: a[k] for k in a.keys() - numbers} == {k: b[k] for k in b.keys() - numbers}
    for name, layer in here.layers.items():
        after = flatten(state.layers[name])
        assert {x.device.type for x in after.values() if x.ndim > 1} == {device}
        assert_close(flatten(layer), after, 1e4 * EPS32)
    assert_close(here.head, state.head, 10 * EPS32)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting(there: There, name: str) -> None:
    there(a_weighting, name)


def a_weighting(device: str, name: str) -> None:
    method, weighting = get_method("fedhl"), get_weighting(name)
    guard = Guard(clip=2.0, reject=Median(4.0))

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Round]:
        return server.aggregate(method, weighting, state, replies, SEED, guard=guard)

    of_both(method, device, CLIENTS, play)


@pytest.mark.parametrize("name", METHODS)
def test_over_the_air(there: There, name: str) -> None:
    there(over_the_air, name)


def over_the_air(device: str, name: str) -> None:
    method, weighting = get_method(name), get_weighting("examples")

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Round]:
        channel = AirComp(snr_db=20)
        return server.aggregate(method, weighting, state, replies, SEED, channel=channel)

    of_both(method, device, CLIENTS if method.mixed_ranks else OF_RANK_TOP, play)


@pytest.mark.parametrize("name", METHODS)
def test_in_small_numbers_from_those_in_time(there: There, name: str) -> None:
    there(in_small_numbers, name)


def in_small_numbers(device: str, name: str) -> None:
    """Factors of 8 bits; and where clients may return fewer layers, the correction for who is late."""
    method, weighting = get_method(name), get_weighting("examples")
    clients = CLIENTS if method.mixed_ranks else OF_RANK_TOP
    silence = dict.fromkeys(SHAPES, 0.1) if method.mixed_ranks else None

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Round]:
        return server.aggregate(method, weighting, state, replies, SEED, silence=silence)

    of_both(method, device, [replace(client, payload="int8") for client in clients], play)


@pytest.mark.parametrize("name", [name for name in METHODS if why_not(get_method(name)) is None])
def test_with_privacy(there: There, name: str) -> None:
    there(a_noisy_sum, name)


def a_noisy_sum(device: str, name: str) -> None:
    method = get_method(name)
    mechanism = Mechanism(clip=0.5, noise=1.0, rate=0.5, clients=8, secret=bytes(SECRET_BYTES))

    def play(state: ServerState, replies: list[server.Reply]) -> tuple[ServerState, Round]:
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
    ranks = RANKS if get_method(name).mixed_ranks else dict.fromkeys(RANKS, 3)
    ends, figures = [], []
    for place in ("cpu", device):
        federation = federate(kind, ranks, name, own=3, dropout=0.0, device=place)
        state = initial_state(federation)
        for _ in range(2):
            state, outcome = run_round(federation, state)
            assert not outcome.refused
        ends.append({f"{n} {k}": x for n, s in state.layers.items() for k, x in flatten(s).items()})
        evaluated = evaluate_round(federation, state, every_rank=True)
        losses = [evaluated[key]["loss"] for key in ("full", "truncated") if evaluated[key]]
        losses.append(evaluated["clients"]["mean"]["loss"])
        if kind == "bert":
            with peft.only_labels(federation.slots, [0, 1]):
                rows = [example for example in federation.held_out if example.labels != 2]
                losses.append(metrics(federation, rows)["loss"])
        figures.append(losses)
        model = federation.slots.model
        assert {p.device.type for p in model.parameters()} == {place}
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
    # AdamW divides by the root of the squared gradient, which magnifies the rounding of small gradients
    assert_close(ends[0], ends[1], 1e4 * EPS32)
