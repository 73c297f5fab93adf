"""Defects found in published code of this field, one test each that ours does not have it.

Each is named after the mistake and says where it was seen, at which commit. It says nothing about what
anybody ran for a paper. All methods of METHODS that a mistake could concern are put through its test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.contract import observed, started
from support.peft_models import IDS, gpt2, llama
from support.reference.dense import truncation
from torch import Tensor, nn

from fedhl import (
    METHODS,
    Broadcast,
    Cohort,
    LoRA,
    Method,
    Update,
    dense,
    get_method,
    get_weighting,
    server,
)
from fedhl.errors import UserError
from fedhl.export import merge_folders
from fedhl.lora import initial
from fedhl.model import peft
from fedhl.model.adapters import load_adapter, save_adapter
from fedhl.seeds import generator
from fedhl.server import Rules

# PEFT asks transformers for a property that a newer transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

M, N, TOP = 7, 5, 3
ALPHA = 16.0  # one for all ranks, as in most configs; the scale is ALPHA / rank
RANKS = (1, 3, 2, 3)
P = (0.4, 0.3, 0.2, 0.1)
EQUAL = torch.finfo(torch.float64).eps ** 0.5
"""What is computed here in float64 is right to rounding or wrong by a factor: half of the digits tell
the two apart, whatever an SVD makes of the rounding."""

MIXED = [name for name, cls in METHODS.items() if cls.mixed_ranks]
everyone = pytest.mark.parametrize("name", METHODS)
mixed = pytest.mark.parametrize("name", MIXED)


def adapter(m: int = M, n: int = N, rank: int = TOP, scale: float = ALPHA / TOP) -> LoRA:
    """One that somebody has trained before, in float64: its product has full rank `rank`."""
    g = generator(0, "adapter", m, n)
    B = torch.randn(m, rank, generator=g, dtype=torch.float64)
    return LoRA(initial(m, n, rank, scale, seed=0).A.double(), B / scale, scale)


def train(sent: Broadcast, seed: int) -> LoRA:
    """What a client makes of it: noise on the factors that it may train, of one size in effective
    units."""
    lora, noise = sent.lora, {}
    for factor, unit in (("A", 1.0), ("B", lora.scale)):
        x = getattr(lora, factor)
        g = generator(seed, "train", factor)
        step = torch.randn(x.shape, generator=g, dtype=torch.float64) / unit
        noise[factor] = x + step.to(x) if factor in sent.train else x.clone()
    return replace(lora, **noise)


def ranks_of(method: Method[Any]) -> tuple[int, ...]:
    return RANKS if method.mixed_ranks else (TOP,) * len(RANKS)


def play(method: Method[Any], state: Any, seed: int = 0) -> list[Update]:
    """One round up to the aggregation."""
    updates = []
    for k, (rank, weight) in enumerate(zip(ranks_of(method), P, strict=True)):
        sent = method.broadcast(state, rank, ALPHA / rank, key=k)
        updates.append(Update(sent, train(sent, 10 * seed + k), weight))
    return updates


def after(method: Method[Any], rounds: int, lora: LoRA | None = None) -> Any:
    """The state after some rounds, from a trained adapter."""
    state = method.init(lora or adapter(), seed=1)
    for round in range(rounds):
        state = method.aggregate(state, play(method, state, round))
    return state


def result(method: Method[Any], state: Any) -> Tensor:
    """The global change; without one, the factors that all clients share."""
    return observed(method, state, TOP, ALPHA / TOP)


def equal(x: Tensor, y: Tensor) -> bool:
    return float((x - y).norm()) <= EQUAL * max(float(x.norm()), float(y.norm()))


# --- averaging ----------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("rounds", [0, 1])
def test_first_client_only(name: str, rounds: int):
    """A misspelt name made plain averaging return the first client's factors times its weight, and
    nobody else's (FLoRA @7bea158). Here each of four clients moves the result, by its own weight, and
    the mean of equal replies is that reply."""
    method = get_method(name)
    state = after(method, rounds)
    updates = play(method, state, seed=5)
    whole = result(method, method.aggregate(state, updates))
    for k, update in enumerate(updates):
        other = [*updates]
        other[k] = replace(update, lora=train(update.sent, seed=999))
        assert not equal(result(method, method.aggregate(state, other)), whole), f"client {k}"

    one, two = updates[1], updates[3]  # of one rank, with weights 0.3 and 0.1
    swapped = [updates[0], replace(one, weight=0.1), updates[2], replace(two, weight=0.3)]
    assert not equal(result(method, method.aggregate(state, swapped)), whole)

    alone = result(method, method.aggregate(state, [replace(one, weight=1.0)]))
    same = [replace(one, weight=weight) for weight in P]
    assert equal(result(method, method.aggregate(state, same)), alone)


@everyone
def test_alpha_over_r_lost(name: str):
    """With one alpha for all ranks, averaging B A without the scale is off by up to r_max/r_min (NVFlare
    HLoRA @f3b7c1b, relative error 0.62; FLoRA @7bea158 relies on alpha = 2 r). Two federations with
    the same effective updates, one written in scales alpha/r, one in scale 1, are the same one: in
    what every client starts from, and in what becomes of the replies."""
    method = get_method(name)
    scaled, plain = method.init(adapter(), seed=1), method.init(written(adapter(), 1.0), seed=1)
    for round in range(3):
        pairs = []
        for k, (rank, weight) in enumerate(zip(ranks_of(method), P, strict=True)):
            one = method.broadcast(scaled, rank, ALPHA / rank, key=k)
            two = method.broadcast(plain, rank, 1.0, key=k)
            assert equal(started(one), started(two)), (round, rank)
            lora = train(one, 10 * round + k)
            pairs.append((Update(one, lora, weight), Update(two, written(lora, 1.0), weight)))
        scaled = method.aggregate(scaled, [one for one, _ in pairs])
        plain = method.aggregate(plain, [two for _, two in pairs])
        if method.delta(scaled) is not None:
            assert equal(result(method, scaled), result(method, plain)), round
        else:
            factors = [
                method.broadcast(s, TOP, x).lora for s, x in ((scaled, ALPHA / TOP), (plain, 1))
            ]
            assert equal(factors[0].A, factors[1].A), round


def written(lora: LoRA, scale: float) -> LoRA:
    """The same update in another scale."""
    return LoRA(lora.A, lora.B * (lora.scale / scale), scale)


@mixed
@pytest.mark.parametrize("alpha", [1.0, 8.0, 32.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_fixed_scale_16_over_rank(name: str, alpha: float, rslora: bool):
    """A scale written into the server, 16/rank, is right for one alpha only (a third-party FedHL baseline
    in FedHera @029e069; FlexLoRA @1cb1ab7). What a client starts from does not depend on its alpha."""
    method = get_method(name)
    state = after(method, rounds=2)
    for rank in (1, 2, 3):
        scale = alpha / (rank**0.5 if rslora else rank)
        one, two = (method.broadcast(state, rank, s, key=4) for s in (scale, 16 / rank))
        assert one.lora.scale == scale
        assert equal(started(one), started(two))


def test_absolute_epsilon():
    """A fixed ε beside squared norms means something else for every model and round (the same
    baseline). Ours is beside relative errors: a hundred times smaller W has the same weights."""
    error, energy = torch.tensor([[4.0], [1.0], [0.0]]), torch.tensor([9.0])
    weighting = get_weighting("truncation")
    one, two = (weighting(Cohort([1, 1, 1], error * x, energy * x)) for x in (1.0, 1e-4))
    assert torch.allclose(one, two)
    assert one[0] < one[1] < one[2]


SHRINKING = {"eclora", "flexlora", "hetlora", "hlora"}
"""Methods that count what a client was not sent as zero; each says so in its docstring."""


@mixed
def test_zero_padded_client_changing_the_mean(name: str):
    """A client of low rank, padded with zeros, pulls components that it has never seen towards zero
    (RB-LoRA @99cdb5a averages so, although its paper reweights). W has the top rank here, and nobody
    trains: then nothing may move, unless the method's own rule is to shrink it."""
    method = get_method(name)
    state = method.init(adapter(), seed=1)
    before = result(method, state)
    sent = [method.broadcast(state, r, ALPHA / r, key=k) for k, r in enumerate(RANKS)]
    updates = [Update(s, s.lora, p) for s, p in zip(sent, P, strict=True)]
    got = result(method, method.aggregate(state, updates))
    if name in SHRINKING:
        assert float(got.norm()) < 0.99 * float(before.norm())
    else:
        assert equal(got, before)


@everyone
@pytest.mark.parametrize(
    "wrong",
    [nn.Linear(N, TOP), {"A": torch.zeros(TOP, N)}, torch.zeros(M, N)],
    ids=lambda x: type(x).__name__,
)
def test_wrong_typed_inputs(name: str, wrong: Any):
    """An aggregator was given modules where it wanted state dicts, and failed inside (FedEx-LoRA
    @683a3f3). Anything but a LoRA is refused, by the name of its type, at the start."""
    method = get_method(name)
    state = after(method, rounds=1)
    updates = play(method, state)
    before = result(method, state).clone()
    with pytest.raises(TypeError, match=f"{type(wrong).__name__}, expected a LoRA"):
        method.aggregate(state, [replace(updates[0], lora=wrong), *updates[1:]])
    with pytest.raises((TypeError, AttributeError), match=r"Linear|dict|Tensor|tensor"):
        method.aggregate(state, [wrong])
    assert torch.equal(result(method, state), before)


# --- components ---------------------------------------------------------------------------------


def test_which_methods_select_components():
    """The next test is of all that do."""
    found = [
        n
        for n in METHODS
        if get_method(n).broadcast(after(get_method(n), 0), TOP, ALPHA / TOP).index is not None
    ]
    assert found == ["fslora", "lora_a2"]


@pytest.mark.parametrize("name", ["fslora", "lora_a2"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_mask_that_masks_nothing(name: str, rounds: int):
    """Parameters were looked for under a name that never occurs, so that every mask stayed all ones
    (FSLoRA @ac24177). A selection of r of R components is one: the client gets those, and what it
    returns leaves the others as they were, to the bit."""
    R = 6
    method = get_method(name)
    state = method.init(adapter(9, 8, R), seed=1)
    for round in range(rounds):
        sent = method.broadcast(state, R, 1.0, key=round)
        state = method.aggregate(state, [Update(sent, train(sent, round), 1.0)])
    held = adapter_of(state)
    seen: set[int] = set()
    for key in range(40):
        sent = method.broadcast(state, 2, 0.5, key=key)
        assert sent.index is not None and len(set(sent.index.tolist())) == 2
        new = adapter_of(method.aggregate(state, [Update(sent, train(sent, key), 1.0)]))
        rest = torch.tensor(sorted(set(range(R)) - set(sent.index.tolist())))
        assert torch.equal(new.A[rest], held.A[rest])
        assert torch.equal(new.B[:, rest], held.B[:, rest])
        for factor in sent.train:
            moved = (getattr(new, factor) - getattr(held, factor)).norm(
                dim=1 if factor == "A" else 0
            )
            assert bool((moved[sent.index] > 0).all())
        seen |= set(sent.index.tolist())
    assert seen == set(range(R))


def adapter_of(state: Any) -> LoRA:
    """The server's adapter in the states of these methods."""
    return state if isinstance(state, LoRA) else state.lora


@pytest.mark.parametrize("name", ["fedhl", "flexlora", "raflora", "hlora", "fedhera", "fed_plora"])
@pytest.mark.parametrize(("m", "n"), [(9, 4), (4, 9)])
def test_truncated_svd_of_the_transposed_product(name: str, m: int, n: int):
    """The SVD was taken of the transposed product and its factors used as they were (APPFL, pull request
    398). On layers that are not square: what is sent is the truncation of the global change, and has its
    shape."""
    method = get_method(name)
    state = after(method, 2, adapter(m, n))
    W = result(method, state)
    for rank in (1, 2, 3):
        sent = method.broadcast(state, rank, ALPHA / rank).lora
        assert (sent.A.shape, sent.B.shape) == ((rank, n), (m, rank))
        assert equal(sent.delta(), truncation(W, rank))


# --- in real models -----------------------------------------------------------------------------

MODELS = {
    "linear": (llama, ["q_proj", "k_proj"]),  # nn.Linear: 32 x 32 and 16 x 32
    "conv1d": (gpt2, ["c_attn", "attn.c_proj"]),  # its transposed weight: 96 x 32 and 32 x 32
}
SLOTS = (2, 3)
kinds = pytest.mark.parametrize("kind", MODELS)


def attach(kind: str) -> peft.Slots:
    """A tiny model with one slot per rank, all of one alpha."""
    make, targets = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    return peft.attach(model, dict.fromkeys(SLOTS, ALPHA), targets)


def served(method: Method[Any]) -> tuple[int, ...]:
    return SLOTS if method.mixed_ranks else SLOTS[-1:]


def federate(method: Method[Any], slots: peft.Slots, rounds: int) -> server.ServerState:
    """The server's state after some rounds among clients of the slots' ranks."""
    top = max(SLOTS)
    scale = peft.scale(slots, top)
    first = {name: adapter(m, n, top, scale) for name, (m, n) in peft.layers(slots).items()}
    first = {name: LoRA(x.A.float(), x.B.float(), scale) for name, x in first.items()}
    state = server.init(method, first, {}, seed=0)
    ranks = (*SLOTS, top) if method.mixed_ranks else (top,) * 3
    for round in range(rounds):
        layers = {}
        for name, layer in state.layers.items():
            updates = []
            for k, (rank, weight) in enumerate(zip(ranks, (0.5, 0.3, 0.2), strict=True)):
                sent = method.broadcast(layer, rank, peft.scale(slots, rank), key=k)
                updates.append(Update(sent, train(sent, 10 * round + k), weight))
            layers[name] = method.aggregate(layer, updates)
        state = replace(state, round=round + 1, layers=layers)
    return state


def send(
    method: Method[Any], state: server.ServerState, slots: peft.Slots, rank: int
) -> dict[str, Broadcast]:
    client = server.Client("client", rank, peft.scale(slots, rank), examples=1)
    return server.broadcast(method, state, client, seed=0)


@contextmanager
def deployed(slots: peft.Slots, rank: int, sent: Mapping[str, Broadcast]) -> Iterator[None]:
    """Inside the block this is the client's model."""
    peft.write(slots, rank, {name: b.lora for name, b in sent.items()})
    peft.activate(slots, rank, frozenset())
    with peft.offset(slots, {name: b.base for name, b in sent.items() if b.base is not None}):
        yield


def weights(slots: peft.Slots) -> dict[str, Tensor]:
    """What every adapted layer does to its input, as a matrix (out, in): its outputs for unit vectors,
    less its bias."""
    found = {}
    with torch.no_grad():
        for name, (_, n) in peft.layers(slots).items():
            layer = slots.model.get_submodule(name)
            found[name] = (layer(torch.eye(n)) - layer(torch.zeros(1, n))).T
    return found


def close(x: Tensor, y: Tensor, *sized: Tensor) -> bool:
    """Equal up to the rounding in float32 of sums over at most 96 numbers."""
    size = sum(float(z.norm()) for z in (x, y, *sized))
    return float((x - y).norm()) <= 96 * torch.finfo(torch.float32).eps * size


@kinds
@everyone
def test_transposed_residual(kind: str, name: str):
    """A residual that is always transposed is right for GPT-2's Conv1D, wrong and silent for square
    linear layers, a crash for others (FedEx-LoRA @683a3f3, whose users saw FedIT's accuracy). In real
    modules of every kind, a client's weights are `W0 + base + s B A`, and those of the server's model
    `W0 + delta`."""
    slots, method = attach(kind), get_method(name)
    state = federate(method, slots, rounds=2)
    with peft.base_only(slots):
        plain = weights(slots)
    assert any(W.shape[0] == W.shape[1] for W in plain.values())
    assert any(W.shape[0] != W.shape[1] for W in plain.values())
    for rank in served(method):
        sent = send(method, state, slots, rank)
        with deployed(slots, rank, sent):
            got = weights(slots)
        for layer, b in sent.items():
            want = started(b)
            assert close(got[layer] - plain[layer], want, plain[layer])
            assert want.shape[0] != want.shape[1] or not close(want, want.T)
    deltas = {layer: method.delta(s) for layer, s in state.layers.items()}
    known = {layer: dense(delta) for layer, delta in deltas.items() if delta is not None}
    with peft.offset(slots, known), peft.base_only(slots):
        got = weights(slots)
    for layer, delta in known.items():
        assert close(got[layer] - plain[layer], delta, plain[layer])


@kinds
def test_rank_that_was_never_configured(kind: str):
    """The function that gave each client its rank was called nowhere, and all trained at one (FlexLoRA
    branch @1cb1ab7). Every slot has its rank in every layer: in PEFT's books, in what is trained, and
    in what it can express."""
    slots = attach(kind)
    for rank in SLOTS:
        parameters = peft.activate(slots, rank, head=False)
        assert len(parameters) == 2 * len(slots.modules)
        for name, module in slots.modules.items():
            (active,) = module.active_adapters
            assert module.r[active] == rank
            A, B = slots.factors[rank][name]
            assert (A.shape[0], B.shape[1]) == (rank, rank)
            assert any(p is A for p in parameters) and any(p is B for p in parameters)
        full = {
            name: replace(adapter(m, n, rank), scale=peft.scale(slots, rank))
            for name, (m, n) in peft.layers(slots).items()
        }
        peft.write(slots, rank, full)
        for module in slots.modules.values():
            delta: Any = module.get_delta_weight(module.active_adapters[0])  # pyright: ignore
            assert int(torch.linalg.matrix_rank(delta)) == rank


@mixed
def test_rank_that_was_asked_for_is_sent(name: str):
    """The server's side of it: what is sent fits the slot of the client's rank, in every layer."""
    slots, method = attach("linear"), get_method(name)
    state = federate(method, slots, rounds=1)
    for rank in SLOTS:
        sent = send(method, state, slots, rank)
        peft.write(slots, rank, {layer: b.lora for layer, b in sent.items()})  # or it raises
        assert {b.lora.rank for b in sent.values()} == {rank}


@kinds
@everyone
def test_keys_silently_unmatched(kind: str, name: str):
    """Server output under other names than the client's parameters was loaded without strictness: the
    clients got nothing and nobody noticed (the HetLoRA baseline of FlexLoRA's branch @1cb1ab7). The
    names sent are those of the client's layers, exactly; after loading, PEFT's own update is the one
    that was sent; and any other set of names is an error."""
    slots, method = attach(kind), get_method(name)
    state = federate(method, slots, rounds=1)
    rank = served(method)[-1]
    sent = send(method, state, slots, rank)
    assert set(sent) == set(slots.modules)
    adapters = {layer: b.lora for layer, b in sent.items()}
    peft.write(slots, rank, adapters)
    for layer, lora in peft.read(slots, rank).items():
        assert torch.equal(lora.A, adapters[layer].A) and torch.equal(lora.B, adapters[layer].B)
        delta: Any = slots.modules[layer].get_delta_weight(f"rank{rank}")  # pyright: ignore
        assert close(delta.T if kind == "conv1d" else delta, adapters[layer].delta())
    first = next(iter(adapters))
    renamed = {f"{layer}.local" if layer == first else layer: x for layer, x in adapters.items()}
    fewer = {layer: x for layer, x in adapters.items() if layer != first}
    for wrong in (renamed, fewer, adapters | {"nowhere": adapters[first]}):
        with pytest.raises(ValueError, match=r"missing|unknown"):
            peft.write(slots, rank, wrong)


def test_keys_silently_unmatched_in_a_file(tmp_path: Path):
    """The same through a file: factors saved as `lora_A.local.weight` were ignored by the adapter
    `default` (RB-LoRA @99cdb5a). Unknown, missing and renamed tensors are errors."""
    slots = attach("linear")
    adapters = {name: adapter(m, n) for name, (m, n) in peft.layers(slots).items()}
    save_adapter(tmp_path, adapters, {}, base="some/base", task_type="CAUSAL_LM")
    file = tmp_path / "adapter_model.safetensors"
    good = load_file(file)
    layer = next(iter(adapters))
    renamed = {k: k.replace(".weight", ".local.weight") for k in good if layer in k}
    outside = {k: k.removeprefix("base_model.") for k in good if layer in k}
    assert len(renamed) == 2
    for names in (renamed, outside, dict([*renamed.items()][:1])):
        save_file({names.get(k, k): x for k, x in good.items()}, file)
        with pytest.raises(UserError, match="lora_"):
            load_adapter(tmp_path)
    one = next(iter(renamed))
    save_file({k: x for k, x in good.items() if k != one}, file)
    with pytest.raises(UserError, match=f"{layer} has only lora_"):
        load_adapter(tmp_path)
    save_file(good, file)
    for name, lora in load_adapter(tmp_path).adapter.items():
        assert close(lora.delta(), adapters[name].delta().float())


def test_rslora_and_rank_pattern_lost_on_the_way(tmp_path: Path):
    """Merged adapters came out √r too large under rsLoRA, or without their rank pattern (PEFT issues
    3449 and 3744). From PEFT's folder to ours, merged and exported, and back into PEFT: the update of
    every layer stays what it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            rank_pattern={"k_proj": 3, "layers.0.self_attn.q_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 5},
            target_modules=["q_proj", "k_proj"],
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(llama(), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "theirs"))
    layers = {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    want = {name: module.get_delta_weight("default").detach() for name, module in layers.items()}  # pyright: ignore

    read = load_adapter(tmp_path / "theirs").adapter
    assert {name: lora.rank for name, lora in read.items()} == {
        name: module.r["default"]  # pyright: ignore
        for name, module in layers.items()
    }
    assert {lora.rank for lora in read.values()} == {2, 3, 4}
    save_adapter(tmp_path / "ours", read, {}, base="", task_type="CAUSAL_LM")
    merge_folders([str(tmp_path / "theirs")] * 2, [0.25, 0.75], None, tmp_path / "merged")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["rank_pattern"]
    for folder in ("ours", "merged"):
        again = PeftModel.from_pretrained(llama(), str(tmp_path / folder))
        loaded = load_adapter(tmp_path / folder).adapter
        assert set(loaded) == set(want)
        for name, delta in want.items():
            assert close(loaded[name].delta(), delta)
            module: Any = again.get_submodule(f"base_model.model.{name}")
            assert close(module.get_delta_weight("default").detach(), delta)


@everyone
def test_stale_merge_for_an_absent_client(name: str):
    """A client that merges only what it is sent in its own rounds has a stale base as soon as it sits one
    out, and a base that is merged in place drifts (stacking as in FLoRA @7bea158, which also breaks with
    a fraction of the clients). Here `base` is absolute: one that sat out two rounds starts, to the bit,
    where one that took part in all of them does, and leaves its base model as it found it."""
    method = get_method(name)
    present, absent = attach("linear"), attach("linear")
    rank = served(method)[-1]
    before = {key: p.clone() for key, p in present.model.named_parameters() if "base_layer" in key}
    got = {}
    for rounds in range(4):
        state = federate(method, present, rounds)
        sent = send(method, state, present, rank)
        with deployed(present, rank, sent):
            got["present"] = weights(present)
        if rounds in (0, 3):
            with deployed(absent, rank, sent):
                got["absent"] = weights(absent)
    for layer in got["present"]:
        assert torch.equal(got["present"][layer], got["absent"][layer])
    for key, parameter in present.model.named_parameters():
        assert key not in before or torch.equal(parameter, before[key])


@pytest.mark.parametrize(
    "name", ["fed_plora", "fedex_lora", "flora", "florist", "lora_a2", "rac_lora"]
)
def test_base_that_misses_a_round(name: str):
    """Those whose clients start from the whole global change: after three rounds all of it is there,
    for every rank, and still is after a round in which nobody moved."""
    method = get_method(name)
    state = after(method, rounds=3)
    want = result(method, state)
    same = [replace(u, lora=u.sent.lora) for u in play(method, state)]
    for now in (state, method.aggregate(state, same)):
        for rank in set(ranks_of(method)):
            assert equal(started(method.broadcast(now, rank, ALPHA / rank, key=7)), want)


@kinds
@everyone
def test_factor_that_was_to_be_frozen(kind: str, name: str):
    """A was frozen before the adapter was added, so that it trained after all (the FFA baseline in
    FedEx-LoRA's code @683a3f3). After a training step of the real model, with weight decay, the factors
    that are not to be trained are what they were, to the bit, and all the others have moved."""
    slots, method = attach(kind), get_method(name)
    for rounds in (0, 1):
        state = federate(method, slots, rounds)
        rank = served(method)[-1]
        sent = send(method, state, slots, rank)
        with deployed(slots, rank, sent):
            before = peft.read(slots, rank)
            (factors,) = {b.train for b in sent.values()}
            assert factors == {"B"} or name not in ("ffa_lora", "fedsvd")
            optimizer = torch.optim.AdamW(peft.activate(slots, rank, factors), weight_decay=0.1)
            slots.model(IDS).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            now = peft.read(slots, rank)
        for layer in sent:
            for factor in "AB":
                same = torch.equal(getattr(before[layer], factor), getattr(now[layer], factor))
                assert same == (factor not in factors), (layer, factor)


# --- stragglers ---------------------------------------------------------------------------------


def test_layers_divided_by_all_clients():
    """Layers that a straggler had not reached were filled with the old weights and the sum divided by
    all users (SALF@1a27cf0): half the clients missing halved the step. Here the mean is over
    those who returned the layer."""
    layer, method = "encoder.query", get_method("fedhl")
    fresh = initial(M, N, TOP, ALPHA / TOP, seed=0)
    state = server.init(method, {layer: fresh, "output": fresh}, {}, seed=0)
    clients = [server.Client(f"client-{k}", TOP, ALPHA / TOP, 10) for k in range(4)]
    replies = []
    for k, client in enumerate(clients):
        g = generator(k, "straggler")
        adapter = {
            name: LoRA(x.lora.A, torch.randn(M, TOP, generator=g), client.scale)
            for name, x in server.broadcast(method, state, client, seed=0).items()
        }
        reached = {name: x for name, x in adapter.items() if k < 2 or name == "output"}
        replies.append(server.Reply(client, 1, reached, {}, loss=1.0, steps=1))
    weighting = get_weighting("uniform")
    following, _ = server.aggregate(method, weighting, state, replies, 0, Rules(silence={}))
    for name, members in ((layer, replies[:2]), ("output", replies)):
        mean = sum(r.adapter[name].delta() for r in members) / len(members)
        gap = following.layers[name].W - mean
        assert float(gap.norm()) <= 1e-5 * float(torch.as_tensor(mean).norm())
