"""Updates summed over the air: power, noise, and what the methods make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import contract
from support.small_server import CLIENTS, OF_RANK_4, SEED, SHAPES, obedient, start

from fedhl import METHODS, get_method, get_weighting, server
from fedhl.lora import dense
from fedhl.method import Method, Update
from fedhl.seeds import generator
from fedhl.server import Rules
from fedhl.server.channel import AirComp, Signal, received, sends_products, signal


def updates(method: Method[Any]) -> tuple[Any, list[Update]]:
    s = next(s for s in contract.scenarios(method, rounds=[2]) if s.dtype == torch.float64)
    return s.state, s.updates


def test_the_noise_is_that_of_the_client_that_needs_most_power():
    """σ = 10^(-snr/20); √η = √P / max p_i rms_i; the sum is decoded by 1/√η."""
    channel = AirComp(snr_db=20.0, power=4.0)
    signals = [[Signal(8.0, 2), Signal(10.0, 4)], [Signal(600.0, 6), Signal(0.0, 0)]]
    # rms: √(18/6) and √(600/6) = 10; weighted 0.75 √3 and 2.5: the second one decides
    assert channel.deviation([0.75, 0.25], signals) == pytest.approx(0.1 * 2.5 / 2)
    assert channel.deviation([1.0, 0.0], signals) == pytest.approx(0.1 * 3**0.5 / 2)
    assert AirComp(snr_db=40.0).deviation([1.0, 0.0], signals) == pytest.approx(0.01 * 3**0.5)
    assert channel.deviation([1.0], [[]]) == 0


@pytest.mark.parametrize("snr", [float("nan"), float("-inf")])
def test_an_impossible_ratio_is_refused(snr: float):
    with pytest.raises(ValueError, match="channel: snr_db"):
        AirComp(snr_db=snr)


@pytest.mark.parametrize("power", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_power_is_refused(power: float):
    with pytest.raises(ValueError, match="channel: power"):
        AirComp(snr_db=10.0, power=power)


def test_what_is_transmitted_is_the_change():
    _, (u, *_) = updates(get_method("fedhl"))
    m, n = u.lora.shape
    change = u.lora.delta() - u.sent.lora.delta()
    got = signal(u, products=True)
    assert got.size == m * n and got.energy == pytest.approx(float(change.square().sum()))
    got, r = signal(u, products=False), u.lora.rank
    want = (u.lora.A - u.sent.lora.A).square().sum()
    want = want + u.lora.scale**2 * (u.lora.B - u.sent.lora.B).square().sum()
    assert got.size == r * (m + n) and got.energy == pytest.approx(float(want))
    _, (u, *_) = updates(get_method("ffa_lora"))
    assert signal(u, products=False).size == u.lora.B.numel()
    _, (u, *_) = updates(get_method("fedsa_lora"))
    assert signal(u, products=False).size == u.lora.A.numel()


@pytest.mark.parametrize("name", METHODS)
def test_without_noise_nothing_changes(name: str):
    method = METHODS[name]()
    _, given = updates(method)
    got = received(given, sends_products(method), 0.0, generator(0, "z"))
    assert all(x is y for x, y in zip(got, given, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_what_was_received(name: str):
    """The sum has the same noise whoever is in it, and is another one with another draw."""
    method = METHODS[name]()
    state, given = updates(method)
    plain = contract.observed(method, method.aggregate(state, given), 3)
    seen = []
    for draw in (0, 0, 1):
        g = generator(draw, "z")
        noisy = received(given, sends_products(method), 1e-3, g)
        seen.append(contract.observed(method, method.aggregate(state, noisy), 3))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert 0 < float((seen[0] - plain).norm()) < 0.1 * float(plain.norm())


@pytest.mark.parametrize("name", [n for n in METHODS if sends_products(METHODS[n]())])
def test_a_sum_of_products_has_the_noise_of_one_dense_matrix(name: str):
    method = METHODS[name]()
    _, given = updates(method)
    m, n = given[0].lora.shape
    z = 0.5 * torch.randn(m, n, generator=generator(7, "z"))
    noisy = received(given, True, 0.5, generator(7, "z"))
    gap = sum(
        u.weight * (v.lora.delta() - u.lora.delta()) for u, v in zip(given, noisy, strict=True)
    )
    # z was made in float32
    assert float((gap - z).norm()) <= 1e-6 * float(z.norm())


@pytest.mark.parametrize("name", ["hetlora", "fslora", "fedit", "rolora"])
def test_a_sum_of_factors_has_the_same_noise_in_every_component(name: str):
    """Also in those that only some clients have."""
    method = METHODS[name]()
    _, given = updates(method)
    noisy = received(given, False, 0.5, generator(7, "z"))
    top = max(int(u.components.max()) for u in given) + 1
    m, n = given[0].lora.shape
    g = generator(7, "z")
    z = {"A": 0.5 * torch.randn(top, n, generator=g), "B": 0.5 * torch.randn(top, m, generator=g)}
    for factor in sorted(given[0].sent.train):
        total = torch.zeros(z[factor].shape, dtype=torch.float64)
        for u, v in zip(given, noisy, strict=True):
            change = getattr(v.lora, factor) - getattr(u.lora, factor)
            change = change if factor == "A" else u.lora.scale * change.T
            total[u.components] += u.weight * change
        held = torch.cat([u.components for u in given]).unique()
        # z was made in float32
        assert float((total - z[factor])[held].norm()) <= 1e-6 * float(z[factor].norm())


def test_a_frozen_factor_gets_no_noise():
    _, given = updates(get_method("ffa_lora"))
    for u, v in zip(given, received(given, False, 0.5, generator(7, "z")), strict=True):
        assert torch.equal(u.lora.A, v.lora.A) and not torch.equal(u.lora.B, v.lora.B)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_over_the_air(name: str):
    """At 200 dB it is the round without a channel; the noise is in the metrics and falls by 10^(dB/20)."""
    method, weighting = METHODS[name](), get_weighting("uniform")
    clients = CLIENTS if method.mixed_ranks else OF_RANK_4
    state = start(method, top=max(c.rank for c in clients), scale=clients[0].scale)
    replies = [obedient(method, state, client) for client in clients]
    rounds = {
        snr: server.aggregate(
            method,
            weighting,
            state,
            replies,
            SEED,
            Rules(channel=AirComp(snr_db=snr) if snr else None),
        )
        for snr in (None, 200.0, 30.0, 10.0)
    }
    noise = {
        snr: outcome.diagnostics.get("channel_noise", 0) for snr, (_, outcome) in rounds.items()
    }
    assert noise[None] == 0 < noise[30.0] and noise[10.0] == pytest.approx(10 * noise[30.0])
    for layer in state.layers:
        plain, clear, _, noisy = (
            contract.observed(method, following.layers[layer], clients[0].rank, clients[0].scale)
            for following, _ in rounds.values()
        )
        size = float(plain.norm())
        assert float((clear - plain).norm()) <= 1e-5 * size < float((noisy - plain).norm())


def test_a_layer_that_few_returned_is_noisier():
    """The sum of the few is divided by their share of the weights, and the noise with it."""
    method, weighting = get_method("fedhl"), get_weighting("uniform")
    state = start()
    one, *others = (obedient(method, state, client) for client in CLIENTS)
    layer = next(iter(SHAPES))
    others = [
        replace(r, adapter={k: x for k, x in r.adapter.items() if k != layer}) for r in others
    ]
    found = {}
    for channel in (None, AirComp(snr_db=0.0)):
        after, outcome = server.aggregate(
            method, weighting, state, [one, *others], SEED, Rules(silence={}, channel=channel)
        )
        found[channel] = [x.W for x in after.layers.values()]
    noise = outcome.diagnostics["channel_noise"]
    for name, clean, noisy in zip(state.layers, found[None], found[channel], strict=True):
        spread = float((noisy - clean).std()) / noise
        expected = 4 if name == layer else 1  # of 4 clients, one returned it
        # five standard deviations of a sample's spread
        assert spread == pytest.approx(expected, rel=5 / (2 * clean.numel()) ** 0.5)


def test_the_channel_is_that_of_the_round():
    """Another round, another noise; the same round again, the same."""
    method, weighting = get_method("fedhl"), get_weighting("uniform")
    state = start()
    later = replace(state, round=1)
    deltas = []
    for x in (state, state, later):
        replies = [replace(obedient(method, x, c), round=x.round + 1) for c in CLIENTS]
        replies = [replace(r, adapter=obedient(method, state, r.client).adapter) for r in replies]
        after, _ = server.aggregate(
            method, weighting, x, replies, SEED, Rules(channel=AirComp(snr_db=10.0))
        )
        deltas.append([dense(method.delta(s)) for s in after.layers.values()])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(deltas[0], deltas[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(deltas[0], deltas[2], strict=True))
