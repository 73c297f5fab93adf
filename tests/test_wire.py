"""The wire: what arrives is what was subtracted, to the bit; and nothing that arrives is believed."""

from __future__ import annotations

import hashlib
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor
from wire_sizes import MODELS, RUN, sizes

import docs
from fedhl import METHODS, get_method, get_weighting, server
from fedhl.config import load_config
from fedhl.federation.traffic import bytes_moved
from fedhl.lora import LoRA, dense, initial
from fedhl.method import Broadcast, Growing, Method, remembers
from fedhl.network.message import DIMENSIONS, WHOLE, Limit, Malformed, opened, sealed
from fedhl.network.wire import (
    PROTOCOL,
    Run,
    decode_broadcast,
    encode_broadcast,
    encode_reply,
    read_reply,
)
from fedhl.run import start_run
from fedhl.seeds import generator
from fedhl.server import Client, Reply, ServerState, refusals
from fedhl.server.carried import carried_reply
from fedhl.server.layers import Layers
from fedhl.server.ledger import next_version
from fedhl.server.payload import (
    PAYLOADS,
    TINY,
    bytes_received,
    bytes_returned,
    carried,
    carried_lora,
    returned_factors,
)

SEED = 3
SHAPES = {"block.0.query": (43, 29), "block.1/välue": (37, 41)}
"""So large that the stacked adapters of the cohort are fewer numbers than the matrix."""
HEAD = {"classifier.weight": (3, 7), "classifier.bias": (3,)}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "wire.md"
EXACT = ["fedhl_ef", "fedhl", "fed_plora", "fedhera", "fedex_lora", "flora", "rac_lora"]
"""The methods that claim "exact mean", and keep it whatever the payload."""

payloads = pytest.mark.parametrize("payload", PAYLOADS)
methods = pytest.mark.parametrize("name", METHODS)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draw", *shape))


def cohort(method: Method[Any], payload: str) -> list[Client]:
    mixed = [("ada", 2, 0.7), ("bob", 6, 4 / 3), ("cyd", 4, 2.0)]
    alike = [(name, 6, 2.0) for name, _, _ in mixed]
    return [
        Client(name, rank, scale, 10 + rank, payload=payload)
        for name, rank, scale in (mixed if method.mixed_ranks else alike)
    ]


def trained(
    method: Method[Any], sent: Mapping[str, Broadcast], client: Client, state: ServerState
) -> Reply:
    """What a client has after moving all that it trains, before it travels."""
    k = sum(client.id.encode()) + 1000 * state.round
    adapter = {
        name: replace(
            b.lora,
            scale=client.scale,
            **{
                f: getattr(b.lora, f) + draw(k, *getattr(b.lora, f).shape)
                for f in returned_factors(b)
            },
        )
        for name, b in sent.items()
    }
    head = {name: value + draw(k, *value.shape) for name, value in state.head.items()}
    magnitudes = {n: b.magnitudes + 0.1 for n, b in sent.items() if b.magnitudes is not None}
    held = state.ledger.version(client.id)
    version = next_version(held, sent) if remembers(method) else None
    return Reply(client, state.round + 1, adapter, head, 0.5, 3, 0.25, magnitudes, version)


def arrived(method: Method[Any], state: ServerState, client: Client) -> Reply:
    sent = server.travelling(method, state, client, SEED)
    return carried_reply(trained(method, sent, client, state), sent)


def advance(method: Method[Any], state: ServerState, payload: str) -> ServerState:
    replies = [arrived(method, state, client) for client in cohort(method, payload)]
    following, outcome = server.aggregate(
        method, get_weighting("examples"), state, replies, SEED, watch=False
    )
    assert not outcome.refused
    return following


@cache
def played(name: str, payload: str) -> ServerState:
    """After two rounds and, for methods that do something about it, the beginning of a new task."""
    method = get_method(name)
    adapter = {layer: initial(m, n, 6, 2.0, seed=0) for layer, (m, n) in SHAPES.items()}
    state = server.init(method, adapter, {n: draw(9, *shape) for n, shape in HEAD.items()}, SEED)
    return server.next_task(method, advance(method, advance(method, state, payload), payload))


def equal(a: Any, b: Any) -> bool:
    """To the bit and in type, through mappings, adapters, broadcasts and replies."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, LoRA | Broadcast | Reply):
        return all(equal(x, getattr(b, name)) for name, x in vars(a).items())
    return a == b


def exact(lora: LoRA) -> Tensor:
    return lora.scale * lora.B.double() @ lora.A.double()


def read(
    source: Path | bytes, state: ServerState, client: Client, method: str, run: Run = RUN
) -> Reply:
    sent = server.broadcast(get_method(method), state, client, SEED)
    return read_reply(source, run, client, sent, sent.__getitem__, state.head)


# --- what is sent is what arrives ---------------------------------------------------------------


@payloads
@methods
def test_a_broadcast_arrives_to_the_bit(name: str, payload: str, tmp_path: Path) -> None:
    """Of what the server has, and of what it has rounded already."""
    method, state = get_method(name), played(name, payload)
    client = cohort(method, payload)[0]
    held = state.ledger.version(client.id)
    plain, here = (
        {
            layer: replace(b, lost=None)
            for layer, b in server.travelling(method, state, one, SEED).items()
        }
        for one in (replace(client, payload="float32"), client)
    )
    if isinstance(method, Growing):  # what has grown is rounded before it is judged
        plain = here
    sent = {layer: carried(b, payload) for layer, b in plain.items()}
    assert equal(here, sent)
    assert equal({layer: carried(b, payload) for layer, b in sent.items()}, sent)
    said = {**RUN._asdict(), "round": 3, "client": "ädä", "rate": 0.1}
    for broadcasts in (plain, sent):
        message = encode_broadcast(said, broadcasts, state.head, payload, held)
        header, got, head = decode_broadcast(message)
        assert header == {**said, "protocol": PROTOCOL, "payload": payload, "held": held}
        assert equal(got, sent) and equal(head, state.head)
        assert all(b.lora.B.is_contiguous() for b in got.values())
    (tmp_path / "message").write_bytes(message)
    assert equal(decode_broadcast(tmp_path / "message")[1], sent)
    assert load_file(tmp_path / "message").keys() == opened(message).tensors.keys()
    if payload == "float32":
        assert equal(sent, plain)


@payloads
@methods
def test_a_reply_arrives_to_the_bit(name: str, payload: str, tmp_path: Path) -> None:
    """From memory and from disk; what did not travel is what was sent; and the server accepts it."""
    method, state = get_method(name), played(name, payload)
    for client in cohort(method, payload):
        sent = server.travelling(method, state, client, SEED)
        reply = trained(method, sent, client, state)
        here = carried_reply(reply, sent)
        message = encode_reply(RUN, reply, sent)
        (tmp_path / "reply").write_bytes(message)
        for source in (message, tmp_path / "reply"):
            got = read(source, state, client, name)
            assert equal(here, replace(got, adapter=dict(got.adapter)))
        assert encode_reply(RUN, here, sent) == message  # twice is once
        assert refusals.refusal(Layers(method, state, SEED), got) is None
        with pytest.raises(KeyError):
            got.adapter["other"]
        if payload == "float32":
            assert equal(here, reply)


@payloads
def test_a_round_from_disk_is_the_round_in_memory(payload: str, tmp_path: Path) -> None:
    method, state = get_method("fedhl"), played("fedhl", payload)
    here, there = [], []
    for client in cohort(method, payload):
        sent = server.broadcast(method, state, client, SEED)
        reply = trained(method, sent, client, state)
        (tmp_path / client.id).write_bytes(encode_reply(RUN, reply, sent))
        here.append(carried_reply(reply, sent))
        there.append(read(tmp_path / client.id, state, client, "fedhl"))
    weighting = get_weighting("truncation")
    one, two = (server.aggregate(method, weighting, state, x, SEED) for x in (here, there))
    assert one[1].clients == two[1].clients and one[1].diagnostics == two[1].diagnostics
    for name in SHAPES:
        assert torch.equal(one[0].layers[name].W, two[0].layers[name].W)


def test_layers_that_a_straggler_did_not_reach_may_be_missing() -> None:
    method, state = get_method("fedhl"), played("fedhl", "int8")
    client = cohort(method, "int8")[0]
    sent = server.broadcast(method, state, client, SEED)
    reply = trained(method, sent, client, state)
    late = replace(reply, adapter={"block.0.query": reply.adapter["block.0.query"]})
    got = read(encode_reply(RUN, late, sent), state, client, "fedhl")
    assert list(got.adapter) == ["block.0.query"]
    assert refusals.refusal(Layers(method, state, SEED), got, stragglers=True) is None
    assert "'block.1/välue' is missing" in str(refusals.refusal(Layers(method, state, SEED), got))


@payloads
def test_a_client_that_diverged_is_refused_as_in_one_process(payload: str) -> None:
    method, state = get_method("fedhl"), played("fedhl", payload)
    client = cohort(method, payload)[0]
    sent = server.broadcast(method, state, client, SEED)
    fine = trained(method, sent, client, state)
    for bad in (math.nan, math.inf, -math.inf):
        adapter = {name: LoRA(x.A, x.B.clone(), x.scale) for name, x in fine.adapter.items()}
        adapter["block.0.query"].B[1, 1] = bad
        for reply in (replace(fine, loss=bad), replace(fine, adapter=adapter)):
            got = read(encode_reply(RUN, reply, sent), state, client, "fedhl")
            reason = refusals.refusal(Layers(method, state, SEED), got)
            assert reason and "did training diverge?" in reason
            assert reason == refusals.refusal(
                Layers(method, state, SEED), carried_reply(reply, sent)
            )


# --- rounding -----------------------------------------------------------------------------------

numbers = st.floats(-(2.0**60), 2.0**60, width=32)
moderate = st.floats(-(2.0**14), 2.0**14, width=32)
RELATIVE = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@payloads
@given(data=st.data())
def test_rounding_stays_within_its_bound_and_twice_is_once(payload: str, data: Any) -> None:
    m, n, r = (data.draw(st.integers(1, 5)) for _ in range(3))
    value = moderate if payload == "float16" else numbers
    A, B = (
        torch.tensor(data.draw(st.lists(value, min_size=k * r, max_size=k * r))).reshape(shape)
        for k, shape in ((n, (r, n)), (m, (m, r)))
    )
    lora = LoRA(A, B, data.draw(st.floats(2.0**-6, 2.0)))
    got = carried_lora(lora, payload)
    assert equal(carried_lora(got, payload), got)
    eps = torch.finfo(torch.float32).eps
    for before, after, unit in ((A, got.A, 1.0), (B.T, got.B.T, lora.scale)):
        x, y = unit * before.double(), unit * after.double()
        bound = RELATIVE.get(payload, 0.0) * x.abs()
        if payload == "int8":  # half a step; a step is max/127, itself rounded by 2^-8
            bound = bound + x.abs().amax(1, keepdim=True) / 127 / 2 * (1 + 2.0**-8)
        # below float16's smallest normal number, half its spacing; and s B, and back, in float32
        floor = {"float32": 0.0, "float16": 2.0**-25}.get(payload, TINY)
        assert ((x - y).abs() <= bound + 4 * eps * x.abs() + floor).all()
        zero = ~before.any(1)
        assert not after[zero].any()  # a component that is zero stays zero


def test_what_a_narrow_type_cannot_hold_is_refused_by_name() -> None:
    lora = LoRA(torch.ones(1, 3), torch.full((2, 1), 7e4), 1.0)
    with pytest.raises(ValueError, match=r"too large for float16; set wire.payload to bfloat16"):
        carried(Broadcast(lora), "float16")
    for payload in ("float32", "bfloat16", "int8"):
        assert carried(Broadcast(lora), payload).lora.B[0, 0] == pytest.approx(7e4, rel=2**-8)


@payloads
def test_components_are_rounded_alike_for_every_rank(payload: str) -> None:
    """What a small client is sent is a prefix of what a large one is, whatever its payload."""
    method, state = get_method("fedhl"), played("fedhl", "float32")
    small, large = (
        server.broadcast(method, state, Client("x", rank, 2.0, 1, payload=payload), SEED)
        for rank in (2, 6)
    )
    for name in SHAPES:
        assert torch.equal(small[name].lora.A, large[name].lora.A[:2])
        assert torch.equal(small[name].lora.B, large[name].lora.B[:, :2])


# --- what is subtracted is what was sent --------------------------------------------------------


def change(method: Method[Any], state: ServerState, layer: str) -> Tensor:
    delta = method.delta(state.layers[layer])
    assert delta is not None
    return dense(delta).double()


@payloads
@pytest.mark.parametrize("name", EXACT)
def test_the_mean_is_exact_and_nobody_moves_nothing(name: str, payload: str) -> None:
    """`W + Σ p_i (ΔW_i - ΔW(sent_i))`, dense in float64, of what the clients have and return; and if all
    return what they were sent, W does not move."""
    method, state = get_method(name), played(name, payload)
    clients = cohort(method, payload)
    sents = {c.id: server.travelling(method, state, c, SEED) for c in clients}
    total = sum(c.examples for c in clients)
    idle, busy = (
        {
            c.id: carried_reply(
                trained(method, sents[c.id], c, state)
                if move
                else replace(
                    trained(method, sents[c.id], c, state),
                    adapter={n: replace(b.lora, scale=c.scale) for n, b in sents[c.id].items()},
                ),
                sents[c.id],
            )
            for c in clients
        }
        for move in (False, True)
    )
    for replies in (idle, busy):
        following, outcome = server.aggregate(
            method, get_weighting("examples"), state, list(replies.values()), SEED
        )
        assert len(outcome.clients) == 3
        for layer in SHAPES:
            W, size = change(method, state, layer), 0.0
            expected = W.clone()
            for c in clients:
                back, sent = replies[c.id].adapter[layer], sents[c.id][layer].lora
                expected += c.examples / total * (exact(back) - exact(sent))
                size += float(exact(back).norm() + exact(sent).norm())
            # inner sizes are at most 24, and each product is rounded once more than it has terms
            bound = 32 * torch.finfo(torch.float32).eps * (size + float(W.norm()))
            assert float((change(method, following, layer) - expected).norm()) <= bound
            if replies is idle:
                assert float((expected - W).norm()) <= bound


# --- nothing is believed ------------------------------------------------------------------------

LAYER = "block.0.query"


@cache
def valid(payload: str = "int8") -> tuple[bytes, Client, ServerState]:
    method, state = get_method("fedhl"), played("fedhl", payload)
    client = cohort(method, payload)[0]
    sent = server.broadcast(method, state, client, SEED)
    return encode_reply(RUN, trained(method, sent, client, state), sent), client, state


def forged(
    header: Callable[[dict[str, Any]], Any] = lambda h: None,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda t: None,
    payload: str = "int8",
) -> bytes:
    """The valid reply with changes, and a checksum that is right."""
    message = opened(valid(payload)[0])
    said, held = dict(message.header), {name: message[name] for name in message.tensors}
    header(said)
    tensors(held)
    return sealed(said, held)


def raw(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_text(text: str) -> bytes:
    """A message without tensors whose header is this text, with the right checksum."""
    digest = hashlib.sha256(json.dumps([text, {}]).encode()).hexdigest()
    return raw({"__metadata__": {"fedhl": f"{digest} {text}"}})


def put(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda held: held.update(changes)


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda held: held.pop(name)


LORA, STEPS = f"lora::{LAYER}", f"lora.steps::{LAYER}"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "too large": (lambda: valid()[0] + bytes(10**5), r"it has .* bytes, expected at most"),
    "empty": (lambda: b"", "not a safetensors file"),
    "short": (lambda: b"\x01", "not a safetensors file"),
    "a pickle": (lambda: b"\x80\x04\x95" + bytes(200), "not a safetensors file"),
    "a long header": (lambda: (10**15).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "not JSON": (lambda: raw(b"{nothing}"), "its safetensors header is not JSON"),
    "not UTF-8": (lambda: raw(b'{"\xff": 1}'), "its safetensors header is not JSON"),
    "a list": (lambda: raw([1, 2]), "its safetensors header is a list, expected a mapping"),
    "no metadata": (lambda: save({"x": torch.ones(2)}), "must be one text, 'fedhl'"),
    "metadata": (lambda: raw({"__metadata__": {"fedhl": 1}}), "must be one text, 'fedhl'"),
    "more metadata": (
        lambda: raw({"__metadata__": {"fedhl": "", "more": ""}}),
        "must be one text, 'fedhl'",
    ),
    "many dimensions": (
        lambda: forged(tensors=put(**{"lora::x": torch.ones([1] * 9)})),
        "not described as safetensors does",
    ),
    "an endless field": (lambda: forged(put(**{"x" * 900: 1})), r"field 'xxx.*\.\.\. is unknown"),
    "an endless name": (
        lambda: forged(tensors=put(**{"x" * 900: torch.ones(1)}), payload="int8"),
        r"tensor 'xxx.*\.\.\. is not expected",
    ),
    "damaged": (lambda: valid()[0][:-1] + b"\x55", "does not match its own checksum"),
    "cut": (lambda: valid()[0][:-1], "its tensors have .* bytes, but .* follow the header"),
    "header no JSON": (lambda: with_text("{"), "its header is not JSON"),
    "header a number": (lambda: with_text("7"), "its header is 7, expected a mapping"),
    "header NaN": (lambda: with_text('{"loss": NaN}'), "its header is not JSON.*NaN"),
    "header deep": (lambda: with_text("[" * 2000 + "]" * 2000), "its header is"),
    "header huge": (lambda: with_text('{"round": 1' + "0" * 3900 + "}"), "it has protocol version"),
    "header twice": (lambda: with_text('{"a": 1, "a": 2}'), "a key is given twice"),
    "header empty": (lambda: with_text("{}"), "it has protocol version None, expected version 3"),
    "another version": (lambda: forged(put(protocol=1)), "protocol version 1, expected version 3"),
    "version true": (lambda: forged(put(protocol=True)), "protocol version True"),
    "field missing": (lambda: forged(drop("loss")), "header field 'loss' is missing"),
    "field surplus": (lambda: forged(put(extra=1)), "header field 'extra' is unknown"),
    "a bool": (lambda: forged(put(round=True)), "'round' is True, expected a whole number"),
    "a float": (lambda: forged(put(examples=12.0)), "'examples' is 12.0, expected a whole number"),
    "a text": (lambda: forged(put(loss="0.5")), "'loss' is '0.5', expected a number"),
    "a list for text": (lambda: forged(put(client=[[]])), "'client' is a list, expected text"),
    "negative": (lambda: forged(put(steps=-1)), "'steps' is -1, expected 0 to 2"),
    "endless": (lambda: forged(put(steps=10**400)), r"'steps' is 1000+\.\.\., expected 0 to 2"),
    "2^53": (lambda: forged(put(steps=2**53)), "'steps' is 9007199254740992, expected 0 to 2"),
    "a number beyond JSON's": (
        lambda: with_text(
            json.dumps(dict(opened(valid()[0]).header, loss=0.5)).replace("0.5", "1e400")
        ),
        "'loss' is inf, expected a finite number",
    ),
    "null": (lambda: forged(put(scale=None)), "'scale' is None, expected a number"),
    "another payload": (
        lambda: forged(put(payload="float16")),
        "payload type is 'float16', expected",
    ),
    "another run": (lambda: forged(put(run="other")), "its run is 'other', expected 'a-run'"),
    "another model": (lambda: forged(put(model="gpt")), "its base model is 'gpt', expected"),
    "another tokenizer": (lambda: forged(put(tokenizer="t")), "its tokenizer is 't', expected"),
    "another client": (lambda: forged(put(client="bob")), "its client id is 'bob', expected 'ada'"),
    "another rank": (lambda: forged(put(rank=3)), "its rank is 3, expected 2"),
    "another scale": (lambda: forged(put(scale=7.0)), "its scale is 7, expected 0.7"),
    "more rows": (lambda: forged(put(examples=10**9)), "training rows is 1000000000, expected 12"),
    "surplus layer": (
        lambda: forged(tensors=put(**{"lora::x": torch.ones(2, 2)})),
        "tensor 'lora::x' is not expected",
    ),
    "no steps": (lambda: forged(tensors=drop(STEPS)), "tensor 'lora.steps::block.0.query' is miss"),
    "steps alone": (
        lambda: forged(tensors=drop(LORA)),
        "'lora.steps::block.0.query' is not expected",
    ),
    "no head": (lambda: forged(tensors=drop("head::classifier.bias")), "'head::.*bias' is missing"),
    "surplus head": (
        lambda: forged(tensors=put(**{"head::x": torch.ones(2)})),
        "tensor 'head::x' is not expected",
    ),
    "another dtype": (
        lambda: forged(tensors=put(**{LORA: torch.ones(2, 72)})),
        r"'lora::block.0.query' is F32 \[2, 72\], expected I8 \[2, 72\]",
    ),
    "another shape": (
        lambda: forged(tensors=put(**{LORA: torch.ones(72, 2, dtype=torch.int8)})),
        r"is I8 \[72, 2\], expected I8 \[2, 72\]",
    ),
    "another dimension": (
        lambda: forged(tensors=put(**{LORA: torch.ones(44, dtype=torch.int8)})),
        r"is I8 \[44\], expected I8 \[2, 72\]",
    ),
    "an unknown dtype": (
        lambda: forged(tensors=put(**{LORA: torch.ones(2, 72, dtype=torch.bool)})),
        "'lora::block.0.query' is not described as safetensors does",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_reply_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[kind]
    message, (_, client, state) = make(), valid()
    (tmp_path / "reply").write_bytes(message)
    for source in (message, tmp_path / "reply"):
        with pytest.raises(Malformed, match=reason) as caught:
            read(source, state, client, "fedhl")
        assert len(str(caught.value)) < 300


def test_a_scale_may_differ_by_what_a_float32_of_it_does() -> None:
    """By a millionth, in the header and when it is written."""
    _, client, state = valid()
    sent = server.broadcast(get_method("fedhl"), state, client, SEED)
    reply = trained(get_method("fedhl"), sent, client, state)
    for off in (1e-6, -1e-6):
        near, far = (client.scale * (1 + k * off) for k in (0.9, 1.1))
        assert read(forged(put(scale=near)), state, client, "fedhl").client == client
        with pytest.raises(Malformed, match=r"its scale is 0\.\d+, expected 0\.7$"):
            read(forged(put(scale=far)), state, client, "fedhl")
        one, other = (
            replace(reply, adapter={n: replace(x, scale=scale) for n, x in reply.adapter.items()})
            for scale in (near, far)
        )
        encode_reply(RUN, one, sent)
        with pytest.raises(ValueError, match=rf"has scale {far}, expected 0\.7"):
            encode_reply(RUN, other, sent)


def tensor(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"x": tensor("F32", [2**52, 2**52], 0, 8)}, "has 8 bytes"),
        ({"x": tensor("F32", [2**60], 0, 8)}, "not described"),
        ({"x": tensor("F32", [-2], 0, 8)}, "not described"),
        ({"x": tensor("F32", [True], 0, 4)}, "not described"),
        ({"x": tensor("F32", [2], 0, 10**400)}, "not described"),
        ({"x": tensor("F32", [2], 8, 16)}, "gap or overlap at byte 0"),
        ({"x": tensor("F32", [2], 0, 8), "y": tensor("F32", [2], 4, 12)}, "overlap at byte 8"),
        ({"x": tensor("F32", [1], 0, 4)}, "have 4 bytes, but 8 follow"),
        ({"x": {**tensor("F32", [2], 0, 8), "more": 1}}, "not described"),
        ({"x": [1]}, "not described"),
    ],
)
def test_a_table_that_lies_is_refused(table: dict[str, Any], reason: str) -> None:
    data = bytes(8)
    said = f"{64 * '0'} {{}}"  # a checksum of a table that lies is never looked at
    with pytest.raises(Malformed, match=reason):
        opened(raw({**table, "__metadata__": {"fedhl": said}}, data))


def test_a_key_given_twice_in_the_table_is_refused() -> None:
    one = json.dumps(tensor("F32", [2], 0, 8))
    with pytest.raises(Malformed, match="a key is given twice"):
        opened(raw(f'{{"x": {one}, "x": {one}}}'.encode(), bytes(8)))


def test_what_is_just_within_the_limits_is_read() -> None:
    """A message may be as large as its limit, and no larger; numbers may be 0 and just below 2^53, and
    tensors have as many dimensions as any parameter of a model."""
    message, client, state = valid()
    header = int.from_bytes(message[:8], "little")
    tensors = len(message) - 8 - header
    opened(message, Limit(header, tensors))
    for tight, reason in (
        (Limit(header, tensors - 1), "it has .* bytes"),
        (Limit(header - 1, tensors + 1), "its header has"),
    ):
        with pytest.raises(Malformed, match=reason):
            opened(message, tight)
    for steps in (0, WHOLE - 1):
        assert read(forged(put(steps=steps)), state, client, "fedhl").steps == steps
    deep = opened(sealed({}, {"x": torch.ones([1] * DIMENSIONS)}))
    assert deep["x"].shape == (1,) * DIMENSIONS


@pytest.mark.parametrize("character", ["\x01", "\U0001f600", '"'], ids=ascii)
def test_texts_that_are_long_as_JSON_are_within_the_limit(character: str) -> None:
    """A character takes up to 14 bytes where it is written as JSON twice: a pair of `\\ud83d`, and their
    backslashes again. Run and client are named so; layers are short, whose own limit would hide it."""
    method, shape = get_method("fedhl"), (4, 3)
    text = 500 * character
    layers = {f"{k}{character}": initial(*shape, 2, 1.0, seed=0) for k in range(2)}
    head = {f"head{character}": torch.zeros(1)}
    state = server.init(method, layers, head, SEED)
    client, run = Client(text, 1, 1.0, 5, payload="int8"), Run(text, text, text)
    sent = server.broadcast(method, state, client, SEED)
    reply = trained(method, sent, client, state)
    got = read(encode_reply(run, reply, sent), state, client, "fedhl", run)
    assert equal(replace(got, adapter=dict(got.adapter)), carried_reply(reply, sent))


def test_tensors_are_aligned_as_any_others(tmp_path: Path) -> None:
    """Wherever they lie in the file: the last bits of a product may depend on the alignment."""
    held = {f"{k}": draw(k, k + 1, 3) for k in range(9)}
    message = sealed({}, held)
    (tmp_path / "message").write_bytes(message)
    for source in (message, tmp_path / "message"):
        got = [opened(source)[name] for name in held]
        assert all(x.data_ptr() % 64 == 0 for x in got)


def test_a_stale_round_and_a_second_reply_are_the_servers_to_refuse() -> None:
    message, client, state = valid()
    method = get_method("fedhl")
    stale = read(forged(put(round=1)), state, client, "fedhl")
    assert (
        refusals.refusal(Layers(method, state, SEED), stale)
        == "the reply is for round 1, expected round 3"
    )
    twice = [read(message, state, client, "fedhl") for _ in range(2)]
    _, outcome = server.aggregate(method, get_weighting("examples"), state, twice, SEED)
    assert [x["id"] for x in outcome.clients] == ["ada"]
    assert "another reply" in outcome.refused[0]["reason"]
    absurd = forged(
        tensors=put(**{STEPS: torch.full((2, 2), 1e30, dtype=torch.bfloat16)}), payload="int8"
    )
    reason = refusals.refusal(Layers(method, state, SEED), read(absurd, state, client, "fedhl"))
    assert reason and "got an update that may be as large as" in reason


def mutated(message: bytes, data: Any) -> bytes:
    """A few flips, cuts, insertions and repetitions."""
    held = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(held)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "length"])):
            case "flip" if place < len(held):
                held[place] ^= data.draw(st.integers(1, 255))
            case "cut":
                del held[place : place + data.draw(st.integers(1, 40))]
            case "insert":
                held[place:place] = data.draw(st.binary(min_size=1, max_size=40))
            case "repeat":
                held[place:place] = held[place : place + 60]
            case "length":
                held[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
            case _:
                pass
    return bytes(held)


def judged(message: bytes) -> None:
    """Refused by the reader or by the server; or it means what the valid reply means."""
    whole, client, state = valid()
    tracemalloc.start()
    try:
        got = read(message, state, client, "fedhl")
    except Malformed as error:
        assert str(error)
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Of JSON an empty list takes 2 bytes and 64 as an object, with its place in a list; what is read at
        # once is the header, of at most its limit, some copies of its text, and 1 MiB to be hashed.
        assert peak <= 2**21 + 50 * min(len(message), 2 * len(whole))
    if refusals.refusal(Layers(get_method("fedhl"), state, SEED), got) is None:
        honest = read(whole, state, client, "fedhl")
        assert equal(
            replace(honest, adapter=dict(honest.adapter)), replace(got, adapter=dict(got.adapter))
        )


@given(st.data())
def test_fuzzed_bytes_are_refused_or_mean_the_same(data: Any) -> None:
    judged(mutated(valid()[0], data))


@given(st.binary(max_size=2000))
def test_random_bytes_are_refused(message: bytes) -> None:
    judged(message)
    judged(raw(message))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
def test_forged_headers_are_refused_or_mean_the_same(data: Any) -> None:
    """With a checksum that is right: any value in any field, except what a client may say of itself."""
    own = {"loss", "steps", "bound"}
    field = data.draw(st.sampled_from([*sorted(opened(valid()[0]).header.keys() - own), "other"]))
    value = data.draw(json_values)
    judged(forged(put(**{field: value})))


@given(st.data())
def test_forged_tensors_are_refused_or_mean_the_same(data: Any) -> None:
    """With a checksum that is right: names, types and shapes; numbers are the client's own business."""
    names = sorted(opened(valid()[0]).tensors)
    name = data.draw(st.sampled_from(names))
    kind = data.draw(st.sampled_from(["drop", "rename", "shape", "type", "add"]))
    shape = data.draw(
        st.lists(st.integers(0, 30), max_size=4).filter(lambda s: math.prod(s) < 9999)
    )
    dtype = data.draw(st.sampled_from([torch.int8, torch.float32, torch.float64, torch.bool]))

    def change(held: dict[str, Tensor]) -> None:
        was = held[name]
        other = data.draw(st.text(max_size=9) | st.sampled_from(names))
        there = held.get(other, torch.zeros(0))
        assume(
            (there.shape, there.dtype) != (was.shape, was.dtype)
        )  # else it is only other numbers
        if kind in ("drop", "rename"):
            del held[name]
        if kind in ("rename", "add"):
            held[other] = was.clone()
        if kind == "shape":
            held[name] = torch.zeros(shape, dtype=was.dtype)
        if kind == "type":
            held[name] = was.to(dtype)

    try:
        got = read(forged(tensors=change), valid()[2], valid()[1], "fedhl")
    except Malformed:
        return
    # only layers that are absent as a whole are left to the server; numbers in the right shape are numbers
    honest = read(valid()[0], valid()[2], valid()[1], "fedhl")
    reason = refusals.refusal(Layers(get_method("fedhl"), valid()[2], SEED), got)
    assert reason is not None or kind == "shape" or equal(dict(got.adapter), dict(honest.adapter))


@given(st.data())
def test_a_fuzzed_broadcast_is_refused_or_means_the_same(data: Any) -> None:
    _, client, state = valid()
    sent = server.broadcast(get_method("fedhl"), state, client, SEED)
    message = encode_broadcast({"round": 3}, sent, state.head, "int8")
    try:
        header, got, head = decode_broadcast(mutated(message, data))
    except Malformed:
        return
    assert header["round"] == 3 and equal(got, sent) and equal(head, state.head)


def flips(message: bytes) -> Iterator[bytes]:
    """The message with one bit flipped, for every bit."""
    for place in range(8 * len(message)):
        held = bytearray(message)
        held[place // 8] ^= 1 << place % 8
        yield bytes(held)


@pytest.mark.parametrize("payload", ["float32", "int8"])
def test_no_bit_of_a_message_can_flip_and_change_its_meaning(payload: str) -> None:
    """Also not in the table of the tensors: a name that flips is a tensor that is lost. The smallest message
    that has every kind of tensor, and the reply to it."""
    lora = initial(2, 3, 1, 1.0, seed=0)
    whole = replace(lora, B=torch.ones(2, 1))
    sent = {
        "q": Broadcast(
            *(lora, torch.ones(2, 3)),
            **{"index": torch.tensor([4]), "past": whole, "merged": whole},
            **{"magnitudes": torch.ones(1), "absorbed": True},
        )
    }
    head = {"b": torch.ones(1)}
    message = encode_broadcast({}, sent, head, payload)
    kinds = {key.split("::")[0] for key in opened(message).tensors}
    assert kinds >= {"lora", "base", "past", "merged", "magnitudes", "index", "head"}
    expected, refused = decode_broadcast(message), 0
    for flipped in flips(message):
        try:
            assert equal(decode_broadcast(flipped)[1:], expected[1:])
        except Malformed:
            refused += 1
    assert refused >= 7.9 * len(message)  # the rest: the case of a \u escape, a tab for a space
    client = Client("c", 1, 1.0, 5, payload=payload)
    run = Run("r", "m", "t")
    reply = Reply(client, 1, {"q": whole}, head, 0.5, 3, 0.1, {"q": torch.ones(1)}, "v")
    message = encode_reply(run, reply, sent)
    for flipped in flips(message):
        with suppress(Malformed):
            got = read_reply(flipped, run, client, sent, sent.__getitem__, head)
            assert equal(replace(got, adapter=dict(got.adapter)), carried_reply(reply, sent))


def in_layer(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """The header's entry of a layer with these changes, or without the fields that are ...."""

    def change(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        said = header["layers"][LAYER]
        said.update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            del said[name]

    return change


def with_tensor(name: str, x: Tensor) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda _, tensors: tensors.update({name: x})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_tensor(f"bose::{LAYER}", torch.ones(2)), "'bose::block.0.query' is not expected"),
        (with_tensor("lora::other", torch.ones(2, 2)), "'lora::other' is not expected"),
        (with_tensor(f"base::{LAYER}", torch.ones(43, 29)), "'base::.*' is not expected"),
        (with_tensor(f"past::{LAYER}", torch.ones(2, 72)), "'past::.*' is not expected"),
        (with_tensor("x", torch.ones(2)), "tensor 'x' is not expected"),
        (lambda _, tensors: tensors.pop(f"lora::{LAYER}"), "'lora::.*' is missing"),
        (with_tensor(f"lora::{LAYER}", torch.ones(2, 72).half()), "is F16 .* expected F32"),
        (with_tensor(f"lora::{LAYER}", torch.ones(2, 71)), r"is F32 \[2, 71\], expected F32 .*72"),
        (with_tensor("head::classifier.bias", torch.ones(3).half()), "is F16 .* expected F32"),
        (in_layer(also=["base"]), "'base::.*' is missing"),
        (in_layer(also=["lora"]), "also of layer 'block.0.query' is a list"),
        (in_layer(past=1.0), "'past::.*' is missing"),
        (in_layer(absorbed=1), "absorbed of layer 'block.0.query' is 1"),
        (in_layer(absorbed=...), "field 'absorbed' of layer 'block.0.query' is missing"),
        (in_layer(extra=1), "field 'extra' of layer 'block.0.query' is unknown"),
        (in_layer(scale=True), "scale of layer 'block.0.query' is True"),
        (in_layer(shape=[43.0, 29]), "shape of layer 'block.0.query' is a list"),
        (in_layer(train="AC"), "train of layer 'block.0.query' is 'AC'"),
    ],
)
def test_a_broadcast_with_what_its_header_does_not_announce_is_refused(
    change: Callable[[dict[str, Any], dict[str, Tensor]], Any], reason: str
) -> None:
    """With a checksum that is right."""
    client, state = valid("float32")[1:]
    sent = server.broadcast(get_method("fedhl"), state, client, SEED)
    message = opened(encode_broadcast({"round": 3}, sent, state.head, "float32"))
    header = json.loads(json.dumps(message.header))
    tensors = {name: message[name] for name in message.tensors}
    decode_broadcast(sealed(header, tensors))
    change(header, tensors)
    with pytest.raises(Malformed, match=reason):
        decode_broadcast(sealed(header, tensors))


@pytest.mark.parametrize(
    "change",
    [drop("layers"), put(layers=[]), put(layers={"x": {}}), put(payload="float8"), drop("payload")],
)
def test_a_broadcast_that_makes_no_sense_is_refused(change: Callable[[Any], None]) -> None:
    _, client, state = valid()
    sent = server.broadcast(get_method("fedhl"), state, client, SEED)
    message = opened(encode_broadcast({"round": 3}, sent, state.head, "int8"))
    header = dict(message.header)
    change(header)
    with pytest.raises(Malformed, match="it is not a broadcast"):
        decode_broadcast(sealed(header, {name: message[name] for name in message.tensors}))
    with pytest.raises(Malformed, match="protocol version 0"):
        decode_broadcast(sealed({"protocol": 0}, {}))


# --- runs and sizes -----------------------------------------------------------------------------


def test_a_run_with_every_payload_ends_with_an_accuracy(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    sizes, losses = [], []
    for payload in PAYLOADS:
        few = ["rounds=1", "training.steps=2", f"wire.payload={payload}"]
        start_run(load_config(project / "tiny.yaml", few), project / payload)
        summary = json.loads((project / payload / "summary.json").read_text())
        assert summary["status"] == "finished" and 0 <= summary["final"]["full"]["accuracy"] <= 1
        sizes.append(summary["bytes"]["up"])
        losses.append(summary["final"]["full"]["loss"])
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert len(set(losses)) == 4  # each rounds in its own way
    assert load_config(project / "int8" / "config.yaml").wire.payload == "int8"


@payloads
@methods
def test_the_bytes_that_are_counted_are_the_bytes_that_are_sent(name: str, payload: str) -> None:
    """From the first round on, also to a client that sat out a round, to the byte."""
    method = get_method(name)
    adapter = {layer: initial(m, n, 6, 2.0, seed=0) for layer, (m, n) in SHAPES.items()}
    state = server.init(method, adapter, {"bias": torch.zeros(3)}, SEED)
    for absent in ((), ("bob",), ("ada", "bob"), ()):
        replies = []
        for client in cohort(method, payload):
            sent = server.travelling(method, state, client, SEED)
            reply = trained(method, sent, client, state)
            held = state.ledger.version(client.id)
            messages = (
                encode_broadcast({}, sent, state.head, payload, held),
                encode_reply(RUN, reply, sent),
            )
            bodies = (load(message).values() for message in messages)
            assert bytes_moved(sent, reply) == tuple(sum(x.nbytes for x in b) for b in bodies)
            if client.id not in absent:
                replies.append(carried_reply(reply, sent))
        state, outcome = server.aggregate(
            method, get_weighting("examples"), state, replies, SEED, watch=False
        )
        assert not outcome.refused


@methods
def test_the_traffic_of_a_method_is_what_is_sent(name: str) -> None:
    """In numbers, over two usual rounds, without heads; to `florist` no more."""
    method, state = get_method(name), played(name, "float32")
    clients = cohort(method, "float32")
    ranks = [client.rank for client in clients]
    down, up = [0.0, 0.0], [0.0, 0.0]  # what is sent, and what is said
    for _ in range(2):
        for client in clients:
            sent = server.travelling(method, state, client, SEED)
            said = [method.traffic(m, n, client.rank, ranks) for m, n in SHAPES.values()]
            # the traffic leaves out indices, magnitudes and frozen directions
            beside = [replace(b, index=None, magnitudes=None, past=None) for b in sent.values()]
            down[0] += sum(bytes_received(b, "float32") / 4 for b in beside)
            down[1] += sum(traffic.down for traffic in said)
            up[0] += sum(bytes_returned(b, "float32") / 4 for b in beside)
            up[1] += sum(traffic.up for traffic in said)
        state = advance(method, state, "float32")
    assert up[0] == up[1]
    assert down[0] <= down[1] if name == "florist" else down[0] == down[1]


def test_the_sizes_in_the_docs_are_those_of_messages() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == docs.with_sizes(page), "write it anew: make docs"


@payloads
@pytest.mark.parametrize("model", MODELS)
def test_the_metrics_count_what_is_sent(model: str, payload: str) -> None:
    """Within the headers, whose share is largest where there is least to send."""
    for rank in MODELS[model][2]:
        whole, counted = sizes(model, rank, payload)
        assert counted < whole <= 1.15 * counted
        if rank >= 16 or payload == "float32":
            assert whole <= 1.05 * counted
