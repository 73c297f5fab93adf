"""Clients that remember: they catch up, both ends hold the same bits, and forgetting biases nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference.dense import truncation
from support.small_server import (
    CLIENTS,
    FEDHL,
    SEED,
    SHAPES,
    draw,
    exact,
    play,
    reply,
    start,
)
from torch import Tensor

import docs
from fedhl import LoRA, Update, get_method, get_weighting, server
from fedhl.lora import initial, plus
from fedhl.method import Broadcast
from fedhl.methods.fedhl_ef import BEGINNINGS
from fedhl.record import round_name
from fedhl.run import checkpoint
from fedhl.server import Client, Reply, ServerState, ledger
from fedhl.server.carried import carried_reply
from fedhl.server.ledger import after, base_of, next_version, plus_product
from fedhl.server.payload import PAYLOADS, carried
from fedhl.shelf import Shelf

ROOT = Path(__file__).resolve().parent.parent
EF = get_method("fedhl_ef")
VARIANTS = [get_method("fedhl_ef", download=c, begin=begin) for c in (1, 2) for begin in BEGINNINGS]
UNIFORM = get_weighting("uniform")
EPS32 = torch.finfo(torch.float32).eps


def name_of(variant: Any) -> str:
    return f"{variant.begin}-{variant.download}"


every_variant = pytest.mark.parametrize("method", VARIANTS, ids=name_of)


def answer(
    state: ServerState, client: Client, method: Any = EF, step: float = 0.1, seed: int = 0
) -> Reply:
    """What a client returns that has trained from what it holds, and names the version of that."""
    sent = sent_to(state, client, method)
    version = next_version(state.ledger.version(client.id), sent)
    trained = replace(reply(state, client, method, step, seed), version=version)
    return carried_reply(trained, sent)


def sent_to(state: ServerState, client: Client, method: Any = EF) -> dict[str, Broadcast]:
    """What crosses the wire: the broadcasts without the bases."""
    return {name: server.broadcast_layer(method, state, name, client, SEED) for name in SHAPES}


def everybody(state: ServerState, method: Any = EF) -> list[Reply]:
    return [answer(state, client, method) for client in CLIENTS]


def change(state: ServerState, method: Any = EF) -> dict[str, Tensor]:
    """W of each layer."""
    return {name: method.delta(layer) for name, layer in state.layers.items()}


def assert_exact_sum(
    before: ServerState, after: ServerState, replies: Sequence[Reply], method: Any = EF
) -> None:
    """`W ← W + Σ p_i (s_i B_i A_i - s_i B_i' A_i')` with equal weights; B_i', A_i' as they were received."""
    was, now = change(before, method), change(after, method)
    for name in SHAPES:
        total, size = was[name].double(), was[name].norm()
        for r in replies:
            sent = server.broadcast_layer(method, before, name, r.client, SEED).lora
            total = total + (exact(r.adapter[name]) - exact(sent)) / len(replies)
            size += exact(sent).norm() + exact(r.adapter[name]).norm()
        assert (now[name].double() - total).norm() <= 8 * EPS32 * size, name


# --- catching up --------------------------------------------------------------------------------


def at_rest(W: Tensor, method: Any) -> Any:
    """The state with this W, of which no client holds anything yet."""
    m, n = W.shape
    state = method.init(initial(m, n, min(m, n), 1.0, seed=0))
    sent = method.broadcast(state, 1, 1.0)
    return method.aggregate(state, [Update(sent, plus(sent.lora, W.float()), 1.0)])


def next_broadcast(method: Any, state: Any, held: Tensor | None, rank: int) -> Broadcast:
    if held is None:
        return method.broadcast(state, rank, 2.0)
    return method.catch_up(state, held, rank, 2.0)


@every_variant
@pytest.mark.parametrize("rank", [1, 2, 4, 9])
@pytest.mark.parametrize("live", [9, 5])
def test_without_training_a_client_catches_up(method: Any, rank: int, live: int):
    """`E² <= (1 - r / min(m, n)) E²` in each round, and 0 after ⌈live / r⌉ rounds."""
    W = draw(1, 12, live) @ draw(2, live, 9)
    state, held, width = at_rest(W, method), None, min(method.download * rank, 9)
    error = state.full.W.double().norm()
    for _ in range(-(-live // width)):
        sent = next_broadcast(method, state, held, rank)
        held = after(held, sent)
        state = method.aggregate(state, [Update(sent, sent.lora, 1.0)])
        then, error = error, (state.full.W.double() - held.double()).norm()
        assert error <= (1 - width / 9) ** 0.5 * then + 16 * EPS32 * W.norm()
    assert error <= 32 * EPS32 * W.norm()


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("spectrum", ["flat", "slow", "fast"])
def test_rounding_hardly_weakens_the_contraction(payload: str, spectrum: str):
    """`||X - C(X)||² <= (1 - κ r / min(m, n)) ||X||²`, C the truncation and the rounding of the payload."""
    m, n, j = 64, 48, torch.arange(1, 49, dtype=torch.float64)
    S = {"flat": torch.ones(n), "slow": j**-0.5, "fast": 0.8**j}[spectrum].double()
    U, V = (torch.linalg.qr(draw(k, k, n).double()).Q for k in (m, n))
    X = U * S @ V.T
    u = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": m**0.5 / 253}[
        payload
    ]
    for r in (1, 4, 16, 47):
        sent = Broadcast(LoRA(V.T[:r].float(), (U * S)[:, :r].float() / 3, 3.0))
        left = (X - exact(carried(sent, payload).lora)).square().sum()
        kappa = 1 - (2 * u + u**2 * r**0.5) ** 2 - 2 * u**2 * n**0.5
        assert kappa > 0.9
        assert left <= (1 - kappa * r / n) * X.square().sum() * (1 + EPS32)


def test_the_error_of_a_moving_W_stays_below_its_bound():
    """`E_{t+1} <= q (E_t + Δ_t)`, and so `Σ E_t² <= (q / (1 - q))² (||W_0||² + Σ Δ_t²)`."""
    rank, (m, n) = 2, (12, 9)
    q, state, held = (1 - rank / n) ** 0.5, at_rest(draw(1, m, n), EF), None
    errors, moves = [], [float(state.full.W.double().norm())]
    for t in range(40):
        held = after(held, next_broadcast(EF, state, held, rank))
        errors.append(float((state.full.W.double() - held.double()).norm()))
        assert errors[-1] <= q * ((errors[-2] if t else 0.0) + moves[-1]) + 1e-5
        before, sent = state.full.W, EF.broadcast(state, rank, 1.0)
        state = EF.aggregate(state, [Update(sent, plus(sent.lora, draw(3 + t % 3, m, n)), 1.0)])
        moves.append(float((state.full.W - before).double().norm()))
    assert sum(e**2 for e in errors) <= (q / (1 - q)) ** 2 * sum(d**2 for d in moves[:-1])


def test_the_columns_of_the_iteration_are_not_those_of_earlier_rounds():
    """On a layer that is too large for a full SVD: what is sent is found from random columns, so that what is
    left is orthogonal to them. The tail stays within the tolerance only with other columns in each round."""
    n, rank, held = 514, 32, None
    state = EF.init(initial(n, n, rank, 1.0, seed=0))
    flat = torch.linalg.qr(draw(4, n, n)).Q
    for _ in range(5):
        other = EF.broadcast(state, rank, 1.0)
        state = EF.aggregate(state, [Update(other, plus(other.lora, flat), 1.0)])
        lacking = state.full.W - (0 if held is None else held)
        held = after(held, next_broadcast(EF, state, held, rank))
        best = torch.linalg.svdvals(lacking)[rank:].double().square().sum()
        assert (state.full.W - held).double().square().sum() <= 1.001 * best


@every_variant
def test_a_client_starts_at_what_it_holds_plus_the_best_of_the_rest(method: Any):
    """`M + T_{c r}(W - M)`, over rounds in which not everybody answers, against dense SVDs in float64."""
    state = start(method)
    for round in range(4):
        replies = [answer(state, client, method) for client in CLIENTS[round % 2 :]]
        state, outcome = play(state, replies, method, UNIFORM)
        assert not outcome.refused
    for client in CLIENTS:
        for name, sent in server.broadcast(method, state, client, SEED).items():
            W = method.delta(state.layers[name]).double()
            held = state.ledger.held(client.id, name)
            assert held is not None
            width = min(method.download * client.rank, *W.shape)
            best = held.double() + truncation(W - held.double(), width)
            base = 0.0 if sent.base is None else sent.base.double()
            assert (base + exact(sent.lora) - best).norm() <= 64 * EPS32 * W.norm()
            assert sent.lost == pytest.approx(float((W - best).square().sum()), abs=1e-5)
            if method.begin != "delta":
                assert not sent.lora.B.any() and sent.lora.A.abs().sum(dim=1).min() > 0


@every_variant
def test_the_traffic_is_what_is_sent(method: Any):
    """An adapter that the client draws itself is not."""
    state = start(method)
    for _ in range(2):
        state, _ = play(state, everybody(state, method), method, UNIFORM)
    for client in CLIENTS:
        for name, sent in sent_to(state, client, method).items():
            parts = [sent.lora] if sent.drawn is None else []
            parts += [] if sent.merged is None else [sent.merged]
            numbers = sum(x.numel() for lora in parts for x in (lora.A, lora.B))
            ranks = [other.rank for other in CLIENTS]
            counted = method.traffic(*SHAPES[name], client.rank, ranks)
            assert counted.down == numbers
            assert counted.up == sent.lora.A.numel() + sent.lora.B.numel()


def test_the_table_of_the_maths_page_is_that_of_the_result_file():
    page = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")
    assert page == docs.with_contraction(page), "write it anew: make docs"


def test_no_measured_error_exceeds_its_bound():
    result = json.loads((ROOT / "experiments/theory/contraction.json").read_text(encoding="utf-8"))
    rounding = 1.001  # four digits in the file
    for row in result["moving"]:
        q = (1 - row["rank"] / row["side"]) ** 0.5
        for t, error in enumerate(row["error"]):  # Δ = 1 from round -1 on
            assert error <= rounding * q * (1 - q ** (t + 1)) / (1 - q)
    for row in result["at rest"]:
        for error, tail in zip(row["error"], row["tail"], strict=True):
            assert error == pytest.approx(tail, rel=2e-3, abs=1e-6)


# --- who holds what -----------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("when", [1, 2, 3])
def test_forgetting_is_harmless(method: Any, when: int):
    state = start(method)
    for round in range(4):
        if round == when:
            state = replace(state, ledger=state.ledger.without(["bob", "dan"]))
            assert state.ledger.held("bob", "block.0.query") is None
        replies = everybody(state, method)
        following, outcome = play(state, replies, method, UNIFORM)
        assert not outcome.refused
        assert_exact_sum(state, following, replies, method)
        state = following
    assert set(state.ledger.of) == {client.id for client in CLIENTS}


def test_the_ledger_moves_for_accepted_replies_only():
    state, _ = play(start(EF), everybody(start(EF)), EF, UNIFORM)
    ada, bob, cyd, dan = everybody(state)
    broken = replace(bob, loss=float("nan"))
    stale = replace(cyd, version=state.ledger.version("cyd"))
    lost = replace(dan, version=None)
    following, outcome = play(state, [ada, broken, stale, lost], EF, UNIFORM)
    was, now = state.ledger, following.ledger
    assert now.version("ada") == ada.version != was.version("ada")
    for client in ("bob", "cyd", "dan"):
        assert now.version(client) == was.version(client)
        assert now.memories[now.of[client]] is was.memories[was.of[client]]
    assert set(now.memories) == set(now.of.values())
    reasons = {refused["id"]: refused["reason"] for refused in outcome.refused}
    said = "its client holds {}, expected version {}: the reply is relative to another start"
    assert "diverge" in reasons["bob"]
    held = f"version {was.of['cyd'][:12]}"
    assert reasons["cyd"] == said.format(held, (cyd.version or "")[:12])
    assert reasons["dan"] == said.format("nothing", (dan.version or "")[:12])


def test_a_round_without_replies_leaves_the_ledger_as_it_is():
    state, _ = play(start(EF), everybody(start(EF)), EF, UNIFORM)
    following, _ = play(state, [], EF, UNIFORM)
    assert following.ledger is state.ledger and following.round == state.round + 1


def test_a_method_that_forgets_takes_no_version():
    state, client = start(FEDHL), CLIENTS[0]
    told = replace(reply(state, client), version="0123456789abcdef")
    _, outcome = play(state, [told])
    (refused,) = outcome.refused
    assert refused["reason"].startswith("its client holds version 0123456789ab, expected nothing")


def test_clients_of_one_history_share_one_memory():
    twins = [Client(name, 2, 4.0, rows) for name, rows in (("ada", 30), ("eve", 5), ("fay", 9))]
    state = start(EF)
    for _ in range(2):
        state, _ = play(state, [answer(state, client) for client in twins], EF, UNIFORM)
    ada, eve, fay = (state.ledger.of[client.id] for client in twins)
    assert ada == eve == fay and len(state.ledger.memories) == 1
    held = [state.ledger.held(client.id, "block.0.query") for client in twins]
    assert held[0] is held[1] is held[2]
    sent = [sent_to(state, client)["block.0.query"] for client in twins]
    assert sent[0] is sent[1] is sent[2]  # and so one SVD
    state, _ = play(state, [answer(state, client) for client in twins[:2]], EF, UNIFORM)
    ada, eve, fay = (state.ledger.of[client.id] for client in twins)
    assert ada == eve != fay and len(state.ledger.memories) == 2


@every_variant
def test_a_version_is_of_every_bit_that_was_sent(method: Any):
    state, _ = play(start(method), everybody(start(method), method), method, UNIFORM)
    sent = sent_to(state, CLIENTS[0], method)
    version = next_version("before", sent)
    assert version == next_version("before", dict(reversed(sent.items())))
    others = [next_version(None, sent), next_version("Before", sent)]
    for name, broadcast in sent.items():
        for part in ("lora", "merged"):
            lora = getattr(broadcast, part)
            if lora is None:
                continue
            scaled = replace(lora, scale=lora.scale * (1 + 2**-52))
            changed = [scaled, *(one_bit_off(lora, factor) for factor in "AB")]
            for x in changed:
                others.append(
                    next_version("before", sent | {name: replace(broadcast, **{part: x})})
                )
    assert version not in others and len(set(others)) == len(others)


def one_bit_off(lora: LoRA, factor: str) -> LoRA:
    bits = getattr(lora, factor).clone().contiguous()
    bits.view(torch.int32)[-1, -1] ^= 1
    return replace(lora, **{factor: bits})


# --- both ends hold the same bits ---------------------------------------------------------------


def test_plus_product_is_the_product():
    M, lora = draw(1, 40, 30), LoRA(draw(2, 7, 30), draw(3, 40, 7), 1.7)
    for held in (None, M):
        dense = exact(lora) + (0 if held is None else held.double())
        size = 1.7 * lora.B.double().abs() @ lora.A.double().abs() + M.double().abs()
        assert ((plus_product(held, lora).double() - dense).abs() <= 8 * EPS32 * size).all()
    assert torch.equal(M, draw(1, 40, 30))


def test_plus_product_has_the_same_bits_for_every_block_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
):
    M, lora = draw(1, 301, 257), LoRA(draw(2, 5, 257), draw(3, 301, 5), 0.3)
    threads, expected = torch.get_num_threads(), plus_product(M, lora)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for block in (1, 1000, 2**14, 2**20):
                monkeypatch.setattr(ledger, "BLOCK", block)
                assert torch.equal(plus_product(M, lora), expected)
    finally:
        torch.set_num_threads(threads)
    one_by_one = M.clone()
    for j in range(5):
        one_by_one += (lora.scale * lora.B)[:, j, None] * lora.A[j]
    assert torch.equal(expected, one_by_one)


TYPES = [(payload, None) for payload in PAYLOADS]
TYPES += [("float32", "int8"), ("int8", "float32"), ("bfloat16", "float16")]


@pytest.mark.parametrize("variant", [(1, "delta"), (2, "delta"), (2, "random")], ids=str)
@pytest.mark.parametrize(("payload", "download"), TYPES)
def test_client_and_ledger_hold_the_same_bits(
    payload: str, download: str | None, variant: tuple[int, str]
):
    """Over rounds in which some clients do not answer, and W moves by the exact sum."""
    method = get_method("fedhl_ef", download=variant[0], begin=variant[1])
    clients = [replace(client, payload=payload, download=download) for client in CLIENTS]
    state = start(method)
    held: dict[str, Mapping[str, Tensor]] = {}
    versions: dict[str, str | None] = {}
    for silent in ({"bob"}, set(), {"ada", "dan"}, {"cyd"}, set()):
        replies = []
        for client in clients:
            sent = sent_to(state, client, method)
            mine = held.get(client.id, {})
            for name, whole in server.broadcast(method, state, client, SEED).items():
                received = carried(sent[name], client.downloaded)
                assert same_bits(base_of(mine.get(name), received), whole.base)
            if client.id in silent:  # its reply does not arrive: both ends keep what they had
                continue
            replies.append(answer(state, client, method))
            held[client.id] = {name: after(mine.get(name), b) for name, b in sent.items()}
            versions[client.id] = next_version(versions.get(client.id), sent)
        following, outcome = play(state, replies, method, UNIFORM)
        assert not outcome.refused
        assert_exact_sum(state, following, replies, method)
        state = following
        assert dict(state.ledger.of) == versions
        for id, memory in held.items():
            for name in SHAPES:
                assert same_bits(memory[name], state.ledger.held(id, name))


def test_clients_of_other_types_are_other_clients():
    """One rank, scale and history, but each download is rounded in its own way."""
    cohort = [Client(payload, 2, 4.0, 10, payload=payload) for payload in PAYLOADS]
    state = start(EF)
    for _ in range(2):
        replies = [answer(state, client) for client in cohort]
        following, outcome = play(state, replies, EF, UNIFORM)
        assert not outcome.refused
        assert_exact_sum(state, following, replies)
        state = following
    assert len(set(state.ledger.of.values())) == len(cohort)


def same_bits(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype == torch.float32 and torch.equal(x, y)


@pytest.mark.parametrize("method", [VARIANTS[0], VARIANTS[-1]], ids=name_of)
@pytest.mark.parametrize("download", PAYLOADS)
def test_the_rounding_of_the_download_does_not_enter_W(download: str, method: Any):
    """Clients return what they received; W stays, whatever the download lost, and they still catch up."""
    state = start(method)
    state, _ = play(state, everybody(state, method), method, UNIFORM)
    clients = [replace(client, download=download) for client in CLIENTS]
    first = change(state, method)
    for _ in range(12):
        replies = [answer(state, client, method, step=0.0) for client in clients]
        state, _ = play(state, replies, method, UNIFORM)
    for name, W in change(state, method).items():
        assert (W - first[name]).norm() <= 1e-5 * W.norm()
        for client in clients:
            held = state.ledger.held(client.id, name)
            assert held is not None and (W - held).norm() <= 1e-4 * W.norm()


# --- FedHL is the method of clients that forget -------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "examples", "truncation"])
def test_newcomers_alone_are_fedhl(weighting: str):
    """A cohort of new clients in each round gives the W of `fedhl`, to the bit."""
    weights = get_weighting(weighting)
    ours, theirs = start(EF), start(FEDHL)
    for round in range(4):
        cohort = [replace(client, id=f"{client.id}-{round}") for client in CLIENTS]
        ours, _ = play(ours, [answer(ours, c) for c in cohort], EF, weights)
        theirs, _ = play(theirs, [reply(theirs, c) for c in cohort], FEDHL, weights)
        for name, W in change(ours).items():
            assert torch.equal(W, change(theirs, FEDHL)[name])


def test_clients_that_remember_are_not_fedhl():
    ours, theirs = start(EF), start(FEDHL)
    for _ in range(3):
        ours, _ = play(ours, everybody(ours), EF, UNIFORM)
        theirs, _ = play(theirs, [reply(theirs, c) for c in CLIENTS], FEDHL, UNIFORM)
    for name, W in change(ours).items():
        assert not torch.allclose(W, change(theirs, FEDHL)[name], atol=1e-3)


@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_a_wrong_download_is_refused(wrong: Any):
    with pytest.raises(ValueError, match="download must be an integer >= 1, got"):
        get_method("fedhl_ef", download=wrong)


def test_a_wrong_beginning_is_refused():
    with pytest.raises(ValueError, match="begin must be delta or random, got 'zero'"):
        get_method("fedhl_ef", begin="zero")


# --- some of many clients -----------------------------------------------------------------------


def test_100_clients_of_which_10_take_part():
    """Against a float64 memory of each client alone: what is sent is the best of what it lacks, the sum is
    exact, and no more memories are kept than there are histories."""
    clients = [Client(f"{k:03d}", (1, 2, 4, 6)[k % 4], 1.0 + k % 3, 10 + k) for k in range(100)]
    state = start(EF)
    histories: dict[str, tuple[Any, ...]] = {client.id: () for client in clients}
    held = {
        c.id: {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()} for c in clients
    }
    for round in range(12):
        cohort = server.sample(clients, 10, SEED, round)
        W = {name: x.double() for name, x in change(state).items()}
        for client in cohort:
            for name, b in sent_to(state, client).items():
                lacks, D = W[name] - held[client.id][name], exact(b.lora)
                best = torch.linalg.svdvals(lacks)[client.rank :].square().sum()
                assert (lacks - D).square().sum() <= best + 1e-9 * W[name].square().sum()
                held[client.id][name] += D
            histories[client.id] += ((round, client.rank, client.scale),)
        replies = [answer(state, client) for client in cohort]
        following, outcome = play(state, replies, EF, UNIFORM)
        assert not outcome.refused
        assert outcome.diagnostics["memories"] == len({h for h in histories.values() if h})
        assert_exact_sum(state, following, replies)
        state = following
    for client in clients:
        for name in SHAPES:
            M = state.ledger.held(client.id, name)
            known = torch.zeros(SHAPES[name]) if M is None else M
            size = held[client.id][name].norm() + 1
            assert (known - held[client.id][name]).norm() <= 1e-5 * size
    assert any(len(h) > 1 for h in histories.values()) and any(not h for h in histories.values())


# --- on disk ------------------------------------------------------------------------------------


def test_memories_on_disk_are_those_in_memory(tmp_path: Path):
    """Checkpoints, and a shelf for each memory, against all in memory, to the bit, for rounds in which some
    take part; what no checkpoint names is removed; a damaged memory is named."""
    memory = disk = start(EF)
    for round in range(5):
        cohort = CLIENTS[round % 2 :]
        memory, _ = play(memory, [answer(memory, client) for client in cohort], EF, UNIFORM)
        replies = [answer(disk, client) for client in cohort]
        disk, _ = server.aggregate(
            *(EF, UNIFORM, disk, replies, SEED),
            memories=lambda version: Shelf(tmp_path / "shelf" / version, torch.zeros(1)),
        )
        checkpoint.save(tmp_path / "state", disk, {})
        checkpoint.prune(tmp_path / "state", 2, None)
        disk, manifest = checkpoint.load(tmp_path / "state" / round_name(round + 1), start(EF))
        assert manifest == {"round": round + 1}
        assert disk.ledger.of == memory.ledger.of
        for version, known in memory.ledger.memories.items():
            assert all(
                same_bits(disk.ledger.memories[version][name], known[name]) for name in SHAPES
            )
        assert all(same_bits(x, change(disk)[name]) for name, x in change(memory).items())
    kept = {file.stem for file in (tmp_path / "state" / "memories").iterdir()}
    named = [checkpoint.memories_of(tmp_path / "state" / round_name(k)) for k in (4, 5)]
    assert kept == named[0] | named[1] and named[0] != named[1]
    file = checkpoint.memory_file(tmp_path / "state", min(named[1]))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(checkpoint.CorruptCheckpoint, match=f"{file.name}: does not match"):
        checkpoint.load(tmp_path / "state" / round_name(5), start(EF))
